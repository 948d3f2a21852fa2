"""Configurations of a tiny model that take different paths through it, and expressions about three images."""

INDEX = [1, 0, 0, 2, 0, 1, 1]  # image of each expression
VARIANTS = {
    "default": {},
    "two of the experts": {"num_selected_experts": 2},
    "routers of the image alone": {"expression_aware_routing": False, "num_selected_experts": 3},
    "gates of the raw sentence": {"sentence_gate": "linear"},
    "no gates": {"sentence_gate": "none"},
    "no routers": {"routing": "uniform"},
    "late": {"adapter_layers": [3]},
    "no adapters": {"adapter_layers": []},
    "from the first block": {"adapter_layers": [0]},
    "presence": {"predict_presence": True, "num_selected_experts": 1},
}

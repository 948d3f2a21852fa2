"""The subjects of the inference benchmark: models with random weights, their inputs, and their number of operations."""

import copy
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPSegConfig, CLIPSegForImageSegmentation

from modeling_sera import SeraConfig, SeraForReferringSegmentation
from training.configuration import OptimizationSettings
from training.learning.optimizers import build_optimizer
from training.learning.tuning import apply_tuning

PRECISIONS = ("float32", "bf16 autocast", "bf16 weights")
KINDS = {
    "backbone": "bare DINOv2-B/14, 4 registers",
    "sera": "SERA-B",
    "fused": "SERA-B, fused for inference",
    "late": "SERA-B, late adapters",
    "clipseg": "CLIPSeg, 352×352",
}
NUM_TOKENS = 8  # of every expression, with its start and end tokens


@dataclass(frozen=True)
class Entry:
    """One line of the benchmark: a kind of model, its precision, and the size of its input."""

    kind: str
    precision: str = "float32"
    images: int = 1
    expressions: int = 1
    at_once: int | None = None
    compiled: bool = False

    @property
    def name(self) -> str:
        """The name in tables."""
        amount = "" if self.images == 1 else f", {self.images} images"
        amount += "" if self.expressions == self.images else f", {self.expressions} expressions"
        amount += "" if self.at_once is None else f", {self.at_once} at once"
        return f"{KINDS[self.kind]}{amount} ({self.precision}{', compiled' if self.compiled else ''})"


def sera_config(kind: str, tiny: bool) -> SeraConfig:
    """The configuration of SERA-B or of a tiny model. The kind "late" has adapters in the last two blocks alone."""
    if tiny:
        return SeraConfig.tiny(**({"adapter_layers": [2, 3]} if kind == "late" else {}))
    return SeraConfig(adapter_layers=[10, 11]) if kind == "late" else SeraConfig()


def build_model(kind: str, tiny: bool) -> nn.Module:
    """A model of a kind with random weights, in evaluation mode, on the default device."""
    torch.manual_seed(0)
    if kind == "clipseg":
        return CLIPSegForImageSegmentation(_clipseg_config(tiny)).eval()
    model = SeraForReferringSegmentation(sera_config(kind, tiny)).eval()
    if kind == "fused":
        model.fuse_for_inference()
    return model.model.vision.tower if kind == "backbone" else model


def build_inputs(entry: Entry, tiny: bool, device: torch.device, side: int | None = None) -> dict[str, Tensor]:
    """Random images of `side` pixels (`None`: the usual side of the kind), and expressions spread evenly over them."""
    side = side or (64 if tiny else 352) if entry.kind == "clipseg" else side or (56 if tiny else 448)
    dtype = torch.bfloat16 if entry.precision == "bf16 weights" else torch.float32
    pixels = torch.randn(entry.images, 3, side, side, device=device, dtype=dtype)
    if entry.kind == "backbone":
        return {"pixel_values": pixels}
    config = sera_config("sera", tiny).text_config
    ids = torch.randint(0, config.vocab_size - 3, (entry.expressions, NUM_TOKENS), device=device)
    ids[:, -1] = config.eos_token_id
    inputs = {"pixel_values": pixels, "input_ids": ids}
    if entry.kind == "clipseg":
        return inputs | {"attention_mask": torch.ones_like(ids)}
    index = torch.arange(entry.expressions, device=device) * entry.images // entry.expressions
    return inputs | {"image_index": index}


class Models:
    """Models by kind and precision. Each is made once."""

    def __init__(self, tiny: bool, device: torch.device):
        self.tiny, self.device = tiny, device
        self.made: dict[tuple, nn.Module] = {}

    def get(self, entry: Entry) -> nn.Module:
        """The model of an entry, on the device."""
        is_cast = entry.precision == "bf16 weights"
        key = (entry.kind, is_cast, entry.compiled)
        if key not in self.made:
            if entry.compiled:
                plain = self.get(Entry(entry.kind, entry.precision))
                mode = "reduce-overhead" if self.device.type == "cuda" else None  # CUDA graphs
                self.made[key] = torch.compile(plain, mode=mode, dynamic=False)
            elif is_cast:
                self.made[key] = copy.deepcopy(self.get(Entry(entry.kind))).bfloat16()
            else:
                self.made[key] = build_model(entry.kind, self.tiny).to(self.device)
        return self.made[key]

    def forward(
        self, entry: Entry, side: int | None = None, max_expressions: int | None = None
    ) -> Callable[[], object]:
        """A function that calls the entry's model on its inputs."""
        model, inputs = self.get(entry), build_inputs(entry, self.tiny, self.device, side)
        if at_once := max_expressions or entry.at_once:
            inputs["max_expressions"] = at_once

        def call() -> object:
            with torch.inference_mode(), autocast(entry.precision, self.device):
                return model(**inputs)

        return call


def autocast(precision: str, device: torch.device):
    """The autocast context of a precision."""
    return torch.autocast(device.type, torch.bfloat16) if precision == "bf16 autocast" else nullcontext()


def training_step(
    model: SeraForReferringSegmentation, precision: str, batch_size: int, tiny: bool, device: torch.device
) -> Callable[[], object]:
    """A function that does one training step (norm-and-bias tuning, AdamW) on images with one expression each."""
    model.train()
    apply_tuning(model, vision="norm_bias", text="norm_bias")
    optimizer = build_optimizer(model, OptimizationSettings())
    inputs = build_inputs(Entry("sera", images=batch_size, expressions=batch_size), tiny, device)
    labels = (torch.rand(batch_size, *inputs["pixel_values"].shape[-2:], device=device) > 0.5).float()

    def step() -> None:
        with autocast(precision, device):
            loss = model(**inputs, labels=labels).loss
        loss.backward()
        nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def run_once(entry: Entry, tiny: bool, max_expressions: int | None = None) -> None:
    """Build a model and do one forward pass on the CPU, to measure its memory."""
    Models(tiny, torch.device("cpu")).forward(entry, max_expressions=max_expressions)()


def train_once(precision: str, batch_size: int, tiny: bool) -> None:
    """Build a model and do two training steps on the CPU, to measure their memory. The second has the optimiser's state."""
    step = training_step(build_model("sera", tiny), precision, batch_size, tiny, torch.device("cpu"))
    step()
    step()


@cache
def count_flops(kind: str, images: int, expressions: int, tiny: bool) -> int:
    """Count the floating-point operations of a forward pass without computing it. A multiplication and an addition are two.

    The counter does not see fused attention on the CPU or fused transformer layers, so both are switched off.
    """
    device = torch.device("meta")
    with device:
        model = build_model("sera" if kind == "fused" else kind, tiny)
    inputs = build_inputs(Entry(kind, images=images, expressions=expressions), tiny, device)
    inputs.pop("attention_mask", None)  # all ones; the meta device cannot check that
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            model(**inputs)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    return counter.get_total_flops()


def _clipseg_config(tiny: bool) -> CLIPSegConfig:
    """The published rd64-refined: a CLIP-B/16 whose blocks 3, 6 and 9 feed the decoder, at 352×352."""
    text, vision = {}, {"image_size": 352, "patch_size": 16}
    refined = {"extract_layers": [3, 6, 9], "reduce_dim": 64, "use_complex_transposed_convolution": True}
    if tiny:
        small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4}
        config = sera_config("sera", tiny).text_config
        ids = {name: getattr(config, name) for name in ("vocab_size", "eos_token_id", "bos_token_id", "pad_token_id")}
        text, vision = small | ids, small | {"image_size": 64, "patch_size": 16}
        refined |= {"extract_layers": [1, 2, 3], "reduce_dim": 16, "projection_dim": 24}
    return CLIPSegConfig(text_config=text, vision_config=vision, **refined)

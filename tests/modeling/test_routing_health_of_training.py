"""A short training on drawn scenes: afterwards no router is dead or saturated, and no expert idle."""

from collections import defaultdict
from dataclasses import dataclass

import pytest
import torch
from torch.utils.data import DataLoader

from modeling_sera import SeraForReferringSegmentation
from training.configuration import (
    AugmentationSettings,
    DataSettings,
    ModelSettings,
    OptimizationSettings,
    TrainingSettings,
)
from training.examples.batches import Collator, TrainingExamples
from training.learning.building import build_model, build_processor
from training.learning.optimizers import build_optimizer, cosine_schedule
from training.learning.tuning import apply_tuning
from training.sources.scenes.dataset import generate_scenes

STEPS, BATCH, SIDE = 300, 8, 64
VISION = {"model_type": "dinov2", "hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2, "mlp_ratio": 2}
TEXT = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 2}
SETTINGS = TrainingSettings(
    model=ModelSettings(
        config={
            "vision_config": VISION | {"patch_size": 16, "image_size": SIDE},
            "text_config": TEXT,
            "projection_dim": 48,
            "adapter_layers": [1, 2],
            "tap_layers": [1, 2, 3],
            "adapter_scale": 1.0,
            **{"adapter_dim": 16, "adapter_num_heads": 2, "fusion_dim": 16, "fusion_num_heads": 1},
            **{"router_hidden_dim": 16, "decoder_dim": 32, "decoder_num_layers": 1, "decoder_num_heads": 2},
            **{"decoder_ffn_dim": 64, "decoder_dropout": 0.0},
        },
        vision_tuning="full",
        text_tuning="full",
    ),
    data=DataSettings(source="scenes", scene_size=SIDE, image_size=(SIDE, SIDE), objects_per_image=6),
    optimization=OptimizationSettings(optimizer="muon", learning_rate=3e-3),
)


@dataclass
class Observed:
    """Of a trained model on scenes that it was not trained on.

    Attributes:
        weights: (N, E) routing weights of every router.
        hidden: (N, router_hidden_dim) of every fusion router, after the activation.
        shares: Of every expert the norm of what it adds to a map, as a share of the map's norm, before its routing weight.
    """

    weights: dict[str, torch.Tensor]
    hidden: dict[str, torch.Tensor]
    shares: dict[str, float]


def observe(model: SeraForReferringSegmentation, batches: DataLoader) -> Observed:
    weights, hidden, shares = defaultdict(list), defaultdict(list), defaultdict(list)
    for depth, fusion in zip(model.config.tap_layers, model.model.fusions, strict=True):
        fusion.router.activation.register_forward_hook(lambda m, args, out, key=depth: hidden[f"tap {key}"].append(out))
        for name, expert in fusion.experts.items():
            expert.register_forward_hook(
                lambda m, args, out, key=f"tap {depth} {name}": shares[key].append(
                    (out - args[0]).norm() / args[0].norm()
                )
            )
    for block, adapted in model.model.vision.adapted_blocks.items():
        for name, gain in (("spatial", 0.25), ("boundary", 0.15)):
            getattr(adapted.adapter, f"{name}_expert").register_forward_hook(
                lambda m, args, out, key=f"adapter {block} {name}", gain=gain: shares[key].append(
                    gain * out.norm() / args[0].norm()
                )
            )
    with torch.no_grad():
        for inputs, _ in batches:
            outputs = model.eval()(**inputs, output_router_weights=True)
            for depth, routed in zip(model.config.tap_layers, outputs.fusion_router_weights, strict=True):
                weights[f"tap {depth}"].append(routed)
            for block, routed in zip(model.config.adapter_layers, outputs.adapter_router_weights, strict=True):
                weights[f"adapter {block}"].append(routed)
    return Observed(
        {router: torch.cat(parts) for router, parts in weights.items()},
        {router: torch.cat(parts) for router, parts in hidden.items()},
        {expert: torch.stack(parts).mean().item() for expert, parts in shares.items()},
    )


@pytest.fixture(scope="module")
def observed() -> Observed:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    rows, unseen = (generate_scenes(count, 0, SIDE, split=split) for count, split in ((400, "train"), (24, "val")))
    processor = build_processor(SETTINGS, rows)
    model = build_model(SETTINGS, processor).train()
    apply_tuning(model, vision="full", text="full")
    drawing = {"sentences_per_object": 1, "augmentation": AugmentationSettings(), "seed": 0}
    examples = TrainingExamples(rows, objects_per_image=SETTINGS.data.objects_per_image, **drawing)
    collator = Collator(processor, with_labels=True)
    loader = DataLoader(examples, BATCH, shuffle=True, drop_last=True, collate_fn=collator)
    optimizer = build_optimizer(model, SETTINGS.optimization)
    schedule = cosine_schedule(optimizer, STEPS)
    step = 0
    while step < STEPS:
        examples.set_epoch(step)
        for inputs, _ in loader:
            model(**inputs).loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            step += 1
            if step == STEPS:
                break
    held_out = TrainingExamples(unseen, objects_per_image=6, **drawing)
    return observe(model, DataLoader(held_out, BATCH, collate_fn=collator))


def test_no_router_is_dead(observed):
    assert len(observed.weights) == 5
    for router, weights in observed.weights.items():
        assert weights.std(dim=0).max() >= 0.05, router
    for router, hidden in observed.hidden.items():
        assert (hidden.std(dim=0) > 0.05).float().mean() > 0.9, router


def test_no_router_is_saturated(observed):
    for router, weights in observed.weights.items():
        assert (weights.amax(dim=1) > 0.99).float().mean() < 0.5, router
        assert weights.mean(dim=0).min() >= 0.05 and weights.mean(dim=0).max() <= 0.9, router


def test_no_expert_is_idle(observed):
    assert len(observed.shares) == 16
    assert {expert: share for expert, share in observed.shares.items() if not 0.1 <= share <= 3} == {}

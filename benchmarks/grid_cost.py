"""What a grid of an ablation costs: floating-point operations counted without computing them, and hours at an assumed rate.

`python benchmarks/grid_cost.py training/configs/ablations/refcoco.yaml` prints a Markdown table. A run is, in each epoch, a
training step for every sentence that is drawn and a forward pass for every validation sentence, and two more passes over the
validation sentences for the final evaluation. Towers are those of the configuration (default: SERA-B's), whatever their weights.
"""

import argparse
import logging
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from modeling_sera import SeraConfig, SeraForReferringSegmentation
from training.ablations.grid import Grid, Run, read_grid
from training.learning.tuning import apply_tuning
from training.sources.published_counts import PUBLISHED_REFS
from training.support.commands import run_command

logger = logging.getLogger(__name__)

BATCH = 2  # the routers' losses and statistics need more than one
NUM_TOKENS = 8  # of every expression, with its start and end tokens


@dataclass(frozen=True)
class Cost:
    """What one run costs.

    Attributes:
        forward: Floating-point operations of a forward pass for one expression. A multiplication and an addition are two.
        step: Those of its forward and backward pass.
        training: Expressions trained on.
        validation: Expressions scored.
    """

    forward: float
    step: float
    training: float
    validation: float

    @property
    def total(self) -> float:
        """Floating-point operations of the run."""
        return self.step * self.training + self.forward * self.validation


def count_training_flops(run: Run) -> tuple[float, float]:
    """Operations of a forward pass, and of a forward and backward pass, of a run's model for one expression about one image.

    The counter does not see fused attention or fused transformer layers, so both are switched off.
    """
    config = SeraConfig(**run.settings.model.config)
    height, width = run.settings.data.image_size or (config.image_size, config.image_size)
    with torch.device("meta"):
        model = SeraForReferringSegmentation(config).train()
        inputs = {
            "pixel_values": torch.zeros(BATCH, 3, height, width),
            "input_ids": torch.zeros(BATCH, NUM_TOKENS, dtype=torch.long),
            "image_index": torch.arange(BATCH),
            "labels": torch.zeros(BATCH, height, width),
        }
    apply_tuning(model, vision=run.settings.model.vision_tuning, text=run.settings.model.text_tuning)
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            loss = model(**inputs).loss
            forward = counter.get_total_flops()
            loss.backward()
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    return forward / BATCH, counter.get_total_flops() / BATCH


def cost_of(run: Run, training: int, validation: float) -> Cost:
    """The cost of a run on so many training objects and validation expressions."""
    optimization, data = run.settings.optimization, run.settings.data
    passes = (
        optimization.epochs // run.settings.evaluate_every + 2
    )  # the final evaluation has two, as written and shuffled
    return Cost(
        *count_training_flops(run),
        training=optimization.epochs * training * data.sentences_per_object,
        validation=passes * validation,
    )


def format_costs(grid: Grid, costs: dict[str, Cost], tflops: float) -> str:
    """The costs of all seeds as a Markdown table."""
    lines = ["| variant | GFLOP, forward | GFLOP, training step | EFLOP for a run | hours for a run | runs | hours |"]
    lines += ["|---|--:|--:|--:|--:|--:|--:|"]
    total = 0.0
    for name, cost in costs.items():
        hours = cost.total / (tflops * 1e12) / 3600
        total += hours * len(grid.seeds)
        cells = [f"{cost.forward / 1e9:.1f}", f"{cost.step / 1e9:.1f}", f"{cost.total / 1e18:.2f}", f"{hours:.1f}"]
        lines.append("| " + " | ".join([name, *cells, str(len(grid.seeds)), f"{hours * len(grid.seeds):.0f}"]) + " |")
    lines += ["", f"All runs: {total:.0f} hours of one GPU that sustains {tflops:g} TFLOP/s."]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("grid", help="YAML file of the ablation")
    parser.add_argument("--tflops", type=float, default=50, help="rate that the GPU sustains (default: %(default)s)")
    parser.add_argument("--objects", type=int, help="training objects (default: the published number of the set)")
    parser.add_argument("--validation", type=int, help="validation objects (default: the published number)")
    parser.add_argument(
        "--sentences", type=float, default=2.87, help="sentences of a validation object (default: 2.87)"
    )
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    grid = read_grid(Path(options.grid))
    costs = {}
    for name, run in grid.variants.items():
        data = run.settings.data
        published = PUBLISHED_REFS.get((data.dataset, data.split_by), {}) if data.source == "refer" else {}
        objects = options.objects or published.get(data.train_split)
        validation = options.validation or published.get(data.val_split)
        if objects is None or validation is None:
            raise ValueError(
                f"{data.dataset} ({data.split_by}) has no published numbers; give --objects and --validation."
            )
        costs[name] = cost_of(run, objects, validation * options.sentences)
    logger.info(format_costs(grid, costs, options.tflops))


if __name__ == "__main__":
    run_command(main)

"""Statistics and a sample sheet of the benchmark's scenes (ours).

As a command: `python training/scene_statistics.py --output docs/scene-statistics.md --sheet docs/scenes.png`.
"""

from __future__ import annotations

import io
import itertools
import logging
import textwrap
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from accelerate.utils import tqdm
from jsonargparse import ArgumentParser
from jsonargparse.typing import NonNegativeInt, PositiveInt
from PIL import Image

from training.scoring.figures import DPI, new_figure
from training.sources.scenes.benchmark import (
    COLOR_NAMES,
    LEVELS,
    SHAPES,
    SPLITS,
    TEXTURES,
    VERSION,
    BenchmarkScene,
    composition_split,
    compositions,
    describe_benchmark_scene,
    describe_nothing,
    draw_benchmark_scene,
    held_out_for,
)
from training.sources.scenes.semantics import ATTRIBUTES, KINDS, Expression
from training.sources.scenes.shapes import FORMS
from training.support.commands import run_command
from training.support.environment import command_line
from training.support.files import write_binary, write_text

logger = logging.getLogger(__name__)

Table = tuple[list[str], list[list[Any]]]  # header and rows


@dataclass(frozen=True, eq=False)
class DescribedScene:
    """A scene with its split, its number and its expressions; and per kind an expression that fits no object, or `None`."""

    split: str
    number: int
    scene: BenchmarkScene
    expressions: tuple[Expression, ...]
    absent: tuple[str | None, ...]


def describe_scenes(seed: int, size: int, numbers: dict[str, int]) -> tuple[list[DescribedScene], float]:
    """The first scenes of each split with all expressions of the mixed set, and the seconds of processor time per scene."""
    described, seconds = [], 0.0
    for split, number in tqdm([(split, i) for split, count in numbers.items() for i in range(count)], leave=False):
        start = time.process_time()
        scene = draw_benchmark_scene(seed, split, number, size)
        said = [describe_benchmark_scene(scene, kind, seed, split, number) for kind in KINDS]
        seconds += time.process_time() - start
        absent = tuple(describe_nothing(scene, kind, seed, split, number) for kind in KINDS)
        described.append(DescribedScene(split, number, scene, tuple(itertools.chain(*said)), absent))
    return described, seconds / len(described)


def split_table(scenes: Sequence[DescribedScene]) -> Table:
    """Scenes, objects and targets of each split."""
    rows = []
    for split, group in _by_split(scenes).items():
        objects = [item for member in group for item in member.scene.objects]
        targets = [member.scene.objects[i] for member in group for i in member.scene.targets]
        shown = {(item.shape, item.color, item.texture) for item in targets}
        possible = compositions("train" if split == "test_seen" else split)
        rows.append(
            [
                split,
                len(group),
                len(objects),
                f"{len(objects) / len(group):.1f}",
                len(targets),
                f"{len(shown)} of {len(possible)}",
                f"{np.median([item.radius for item in objects]):.0f}",
                f"{np.median([item.area for item in objects]):.0f}",
                sum(text is not None for member in group for text in member.absent),
            ]
        )
    header = ["split", "scenes", "objects", "per scene", "targets", "compositions of targets shown"]
    return [*header, "median radius, px", "median visible area, px", "expressions without a target"], rows


def sentence_table(scenes: Sequence[DescribedScene]) -> Table:
    """Sentences and words of each set and split."""
    splits = _by_split(scenes)
    rows = []
    for kind in KINDS:
        known: set[str] = set()
        for split, group in splits.items():
            said = [expression for member in group for expression in member.expressions if expression.kind == kind]
            texts = [expression.text.split() for expression in said]
            words = {word for text in texts for word in text}
            known = known or words  # the training split comes first
            lengths = [len(text) for text in texts]
            targets = sum(len(member.scene.targets) for member in group)
            rows.append(
                [
                    kind,
                    split,
                    len(texts),
                    f"{100 * len(texts) / targets:.0f} %",
                    f"{np.mean(lengths):.1f} ({min(lengths)}–{max(lengths)})",
                    len({" ".join(text) for text in texts}),
                    len(words),
                    len(words - known),
                    f"{100 * np.mean([_names_held_out(expression) for expression in said]):.0f} %",
                ]
            )
    header = ["set", "split", "sentences", "of the targets", "words", "distinct sentences", "vocabulary"]
    return [*header, "words not in train", "name a held-out pair"], rows


def _names_held_out(expression: Expression) -> bool:
    """Whether the target's noun phrase has a shape with a colour or a texture that training never shows together."""
    shape, color, _, texture = expression.meaning.attributes
    return shape is not None and any(held_out_for(shape, other) for other in (color, texture) if other is not None)


def relation_table(scenes: Sequence[DescribedScene]) -> Table:
    """The relations in the sentences of each set, over all splits."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    two_steps: Counter[str] = Counter()
    for member in scenes:
        for expression in member.expressions:
            meaning = expression.meaning
            counts[expression.kind][meaning.clause.relation if meaning.clause else "attributes alone"] += 1
            two_steps[expression.kind] += meaning.anchor is not None and meaning.anchor.clause is not None
    rows = [
        [kind, name, f"{100 * count / counts[kind].total():.1f} %"]
        for kind in KINDS
        for name, count in counts[kind].most_common()
    ]
    rows += [
        [kind, "(of all: over two steps)", f"{100 * two_steps[kind] / counts[kind].total():.1f} %"]
        for kind in KINDS[-1:]
    ]
    return ["set", "relation", "share"], rows


def level_table(scenes: Sequence[DescribedScene]) -> Table:
    """Figures of the levels of difficulty, over all splits."""
    rows = []
    for name, level in LEVELS.items():
        group = [member for member in scenes if member.scene.level == name]
        objects = [item for member in group for item in member.scene.objects]
        pairs = [
            sum(getattr(a, key) == getattr(b, key) for key in ATTRIBUTES) == len(ATTRIBUTES) - 1
            for member in group
            for a, b in itertools.combinations(member.scene.objects, 2)
        ]
        hidden = [1 - item.area / item.full_mask.sum() for item in objects]
        sentences = sum(len(member.expressions) for member in group)
        rows.append(
            [
                name,
                f"{100 * len(group) / len(scenes):.0f} %",
                f"{100 * sentences / sum(len(member.expressions) for member in scenes):.0f} %",
                f"{len(objects) / len(group):.1f}",
                f"{100 * np.mean([share > 0.02 for share in hidden]):.0f} %",
                f"{sum(pairs) / len(group):.1f}",
                f"{100 * np.mean([not FORMS[item.shape].solid for item in objects]):.0f} %",
                f"{100 * np.mean([item.size == 'small' for item in objects]):.0f} %",
                f"{level.clutter[0]}–{level.clutter[1]}",
                f"{level.nuisance:.1f}",
                f"{np.mean([member.scene.quality for member in group]):.0f}",
            ]
        )
    header = [
        "level",
        "of the scenes",
        "of the sentences",
        "objects",
        "partly hidden",
        "pairs that differ in one attribute",
    ]
    return [*header, "thin or hollow", "small", "clutter", "strength of nuisances", "JPEG quality"], rows


def composition_table() -> Table:
    """Which split shows a shape in a colour or a texture: v val only, t test only, · every split, – none."""
    rows = []
    for shape in SHAPES:
        drawn = TEXTURES if FORMS[shape].solid else TEXTURES[:2]
        marks = [{"val": "v", "test": "t", None: "·"}[held_out_for(shape, name)] for name in COLOR_NAMES]
        marks += [
            {"val": "v", "test": "t", None: "·"}[held_out_for(shape, name)] if name in drawn else "–"
            for name in TEXTURES
        ]
        rows.append([shape, *marks])
    return ["", *COLOR_NAMES, *TEXTURES], rows


def format_statistics(scenes: Sequence[DescribedScene], seed: int, size: int, command: str) -> str:
    """All statistics as a page of Markdown."""
    numbers = Counter(composition_split(*parts) for parts in itertools.product(SHAPES, COLOR_NAMES, TEXTURES[:1]))
    held_out = (
        f"Of {numbers.total()} pairs of a shape and a color, only the test split shows {numbers['test']} and only the val split "
        f"{numbers['val']}."
    )
    parts = [
        f"# Statistics of the benchmark's scenes\n\nVersion {VERSION}, seed {seed}, {size} pixels; made by `{command}`.",
        "## Splits\n\n" + _markdown(split_table(scenes)),
        "## Sentences\n\n" + _markdown(sentence_table(scenes)),
        "## Relations\n\n" + _markdown(relation_table(scenes)),
        "## Levels of difficulty\n\n" + _markdown(level_table(scenes)),
        f"## Held-out compositions\n\n{held_out} v: val only, t: test only, ·: every split, –: never drawn.\n\n"
        + _markdown(composition_table()),
    ]
    return "\n\n".join(parts) + "\n"


def draw_sample_sheet(scenes: Sequence[DescribedScene], path: Path, columns: int = 4) -> None:
    """Draw a PNG with the first test scenes of each level. Each has an outlined target, its expressions, and one without a target.

    Only scenes with a target that every kind describes are shown. Otherwise none is chosen by hand.
    """
    figure = new_figure(3.3 * columns, 4.6 * len(LEVELS))
    grid = figure.add_gridspec(
        len(LEVELS), columns, left=0.03, right=0.99, top=0.985, bottom=0.11, hspace=0.5, wspace=0.08
    )
    for row, level in enumerate(LEVELS):
        fitting = [(member, target) for member in scenes for target in _told_fully(member) if member.split == "test"]
        firsts = {
            member.number: (member, target) for member, target in reversed(fitting) if member.scene.level == level
        }
        for column, number in enumerate(sorted(firsts)[:columns]):
            member, target = firsts[number]
            axis = figure.add_subplot(grid[row, column])
            axis.imshow(_as_kept(member.scene), interpolation="bicubic")
            axis.contour(member.scene.objects[target].mask, [0.5], colors="magenta", linewidths=1.4)
            axis.set_xticks([])
            axis.set_yticks([])
            if column == 0:
                axis.set_ylabel(level, fontsize=15)
            said = [(e.kind, e.text) for e in member.expressions if e.target == target]
            said.append(("nothing", next(text for text in member.absent if text is not None)))
            lines = [textwrap.fill(f"{kind}: {text}", 43, subsequent_indent="   ") for kind, text in said]
            axis.text(0, -0.03, "\n".join(lines), transform=axis.transAxes, va="top", fontsize=9.2)
    memory = io.BytesIO()
    figure.savefig(memory, format="png", dpi=DPI)
    pixels = np.asarray(Image.open(memory).convert("RGB"))
    sheet = Image.fromarray(
        pixels & 0xF8 | pixels >> 5
    )  # the images' noise does not compress; five bits per channel halve the file
    write_binary(path, lambda partial: sheet.save(partial, "PNG", optimize=True))


def _told_fully(member: DescribedScene) -> list[int]:
    told = Counter(expression.target for expression in member.expressions)
    return [target for target, number in told.items() if number == len(KINDS) and any(member.absent)]


def _as_kept(scene: BenchmarkScene) -> Image.Image:
    """The image as its JPEG file shows it."""
    file = io.BytesIO()
    Image.fromarray(scene.image).save(file, "JPEG", quality=scene.quality, subsampling=0)
    return Image.open(file)


def _by_split(scenes: Sequence[DescribedScene]) -> dict[str, list[DescribedScene]]:
    groups: dict[str, list[DescribedScene]] = defaultdict(list)
    for member in scenes:
        groups[member.split].append(member)
    return groups


def _markdown(table: Table) -> str:
    header, rows = table
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = ArgumentParser(description="Statistics and a sample sheet of the benchmark's scenes.")
    parser.add_argument(
        "--num_scenes",
        type=tuple[PositiveInt, PositiveInt],
        default=(1000, 400),
        help="number of scenes of train, and of each other split",
    )
    parser.add_argument("--scene_seed", type=NonNegativeInt, default=0, help="seed of the scenes")
    parser.add_argument("--scene_size", type=PositiveInt, default=112, help="side of the images in pixels")
    parser.add_argument("--output", type=str, default="scene-statistics.md", help="Markdown file")
    parser.add_argument("--sheet", type=str | None, default=None, help="also draw a sample sheet to this PNG file")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    train, others = options.num_scenes
    numbers = {split: train if split == "train" else others for split in SPLITS}
    scenes, seconds = describe_scenes(options.scene_seed, options.scene_size, numbers)
    command = command_line("training/scene_statistics.py", arguments)
    write_text(Path(options.output), format_statistics(scenes, options.scene_seed, options.scene_size, command))
    if options.sheet:
        draw_sample_sheet(scenes, Path(options.sheet))
    logger.info(f"{options.output}; {1 / seconds:.0f} scenes with all their sentences per second of processor time")


if __name__ == "__main__":
    run_command(main)

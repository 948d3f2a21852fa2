"""Teach a SERA's vision tower what the things of the embedded scenes are: `python training/scene_attributes.py --model FOLDER
--output FOLDER`.

SERA stands on a vision tower that was trained before. For the scenes this is such a training: at each cell of a picture the tower
learns to name the shape, color, texture and size of the object there and to point at its middle, by a linear layer that is thrown
away. Scenes are those of the training split, so compositions of val and test are neither drawn nor named. That a purple thing was
never a cross must not teach the tower that it cannot be one: an answer that training never shows with the object's other attributes
does not compete with the right one, and a part of the pictures loses some or all of its color. The folder written is the model
with the new tower, for `--model.pretrained`. Under `accelerate launch`, processes share the scenes. (Ours.)
"""

import io
import json
import logging
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed, tqdm
from jsonargparse.typing import NonNegativeInt, PositiveFloat, PositiveInt
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

from modeling_sera import SeraForReferringSegmentation
from processing_sera import SeraProcessor
from training.building import load_whole
from training.commands import run_command
from training.configuration import OptimizationSettings, read_settings_of
from training.files import save_model, write_text
from training.optimizers import build_optimizer, cosine_schedule
from training.scene_benchmark import (
    COLOR_NAMES,
    LEVELS,
    RADII,
    SHAPES,
    TEXTURES,
    compositions,
    draw_benchmark_scene,
)
from training.tuning import apply_tuning

logger = logging.getLogger(__name__)

VALUES = {"shape": SHAPES, "color": COLOR_NAMES, "texture": TEXTURES, "size": tuple(RADII)}
CELLS = 4  # along each side of a patch, as fine as SERA's logits
MOST_OBJECTS = max(level.objects[1] for level in LEVELS.values())
FADED_SHARE = 0.5  # of the pictures, whose saturation is multiplied by a number between 0 and 1
NAMED_SATURATION = 0.6  # below it, color goes unnamed
CENTER_WEIGHT = 4.0  # of the loss in which centers are, in units of the picture's side
LOG_EVERY = 50  # steps


@dataclass
class AttributeSettings:
    """Teach a SERA's vision tower what the things of the embedded scenes are.

    Args:
        model: Folder or Hub id of the SERA whose tower is trained.
        output: Folder for the model with the new tower.
        size: Side of the pictures in pixels, a multiple of the patch.
        num_scenes: Scenes of the training split.
        num_val_scenes: Scenes of the validation split that the tower is measured on.
        scene_seed: Seed of the scenes.
        epochs: Passes over the scenes.
        batch_size: Pictures in a step of each process.
        learning_rate: Of Muon, after warm-up; it falls to zero as a cosine.
        seed: Seed of everything else that is random.
    """

    model: str
    output: str
    size: PositiveInt = 96
    num_scenes: PositiveInt = 10000
    num_val_scenes: PositiveInt = 100
    scene_seed: NonNegativeInt = 0
    epochs: PositiveInt = 7
    batch_size: PositiveInt = 16
    learning_rate: PositiveFloat = 3e-3
    seed: NonNegativeInt = 0


@dataclass(frozen=True)
class AttributeScenes:
    """Drawn scenes.

    Attributes:
        pictures: (N, S, S, 3) uint8.
        cells: (N, C, C) uint8, the number of the object at the middle of each cell, MOST_OBJECTS for none.
        values: (N, MOST_OBJECTS + 1, 4) int64, each object's values of VALUES; -1 beyond a scene's objects.
        centers: (N, MOST_OBJECTS + 1, 2) float32, mean x and y of each object's visible pixels in units of the side.
        targets: (N, MOST_OBJECTS) bool, whether an object is of its split's compositions.
    """

    pictures: Tensor
    cells: Tensor
    values: Tensor
    centers: Tensor
    targets: Tensor


def draw_scenes(split: str, numbers: range, size: int, patch: int, seed: int) -> AttributeScenes:
    """Scenes of a split as the benchmark keeps them, compressed, with what is at each cell."""
    side = CELLS * (size // patch)
    middles = ((np.arange(side) + 0.5) * size / side).astype(int)
    pictures = torch.empty(len(numbers), size, size, 3, dtype=torch.uint8)
    cells = torch.full((len(numbers), side, side), MOST_OBJECTS, dtype=torch.uint8)
    values = torch.full((len(numbers), MOST_OBJECTS + 1, len(VALUES)), -1)
    centers = torch.zeros(len(numbers), MOST_OBJECTS + 1, 2)
    targets = torch.zeros(len(numbers), MOST_OBJECTS, dtype=torch.bool)
    for n, number in enumerate(tqdm(numbers, desc=f"scenes of {split}", unit="scene")):
        scene = draw_benchmark_scene(seed, split, number, size)
        file = io.BytesIO()
        Image.fromarray(scene.image).save(file, "JPEG", quality=scene.quality, subsampling=0)
        pictures[n] = torch.from_numpy(np.array(Image.open(file)))
        for i, item in enumerate(scene.objects):
            cells[n][torch.from_numpy(item.mask[np.ix_(middles, middles)])] = i
            values[n, i] = torch.tensor([names.index(getattr(item, name)) for name, names in VALUES.items()])
            centers[n, i] = torch.tensor(item.center) / size
        targets[n, list(scene.targets)] = True
    return AttributeScenes(pictures, cells, values, centers, targets)


class AttributeReader(nn.Module):
    """A vision tower and the layer that names what is at each of its patches' cells."""

    def __init__(self, model: SeraForReferringSegmentation, processor: SeraProcessor):
        super().__init__()
        self.tower, self.num_prefix = model.model.vision.tower, model.model.vision.num_prefix
        self.widths = [1, *(len(names) for names in VALUES.values()), 2]
        self.read = nn.Linear(model.config.vision_config.hidden_size, CELLS**2 * sum(self.widths))
        for name in ("mean", "std"):
            of_channels = torch.tensor(getattr(processor.image_processor, f"image_{name}"))[:, None, None]
            self.register_buffer(name, of_channels, persistent=False)

    def forward(self, pictures: Tensor) -> tuple[Tensor, ...]:
        """(B, 3, S, S) in [0, 1] to the logits of an object being there, of shape, color, texture and size, and the offset to its
        middle, all (B, ·, C, C)."""
        tokens = self.tower((pictures - self.mean) / self.std).last_hidden_state[:, self.num_prefix :]
        side = math.isqrt(tokens.shape[1])
        grid = self.read(tokens).unflatten(1, (side, side)).unflatten(3, (CELLS, CELLS, -1))
        return grid.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3).split(self.widths, dim=1)


class Batches:
    """Draws training batches: scenes turned and mirrored, some of them faded."""

    def __init__(self, scenes: AttributeScenes):
        self.scenes = scenes
        self.side = scenes.cells.shape[1]
        middles = (torch.arange(self.side) + 0.5) / self.side
        self.middles = torch.stack(torch.meshgrid(middles, middles, indexing="xy"))  # (2, C, C), of the cells

    def __len__(self) -> int:
        return len(self.scenes.pictures)

    def take(self, numbers: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Pictures (B, 3, S, S) in [0, 1], values of the object at each cell (B, 4, C, C), offsets to its middle (B, 2, C, C) in
        units of the side, and weights (B, C, C): less for a cell of a larger object. Values are -1 where no object is."""
        pictures = self.scenes.pictures[numbers].permute(0, 3, 1, 2).float() / 255
        cells = self.scenes.cells[numbers].long()
        rows = torch.arange(len(numbers))[:, None, None]
        values = self.scenes.values[numbers][rows, cells].permute(0, 3, 1, 2)
        offsets = self.scenes.centers[numbers][rows, cells].permute(0, 3, 1, 2) - self.middles
        areas = torch.zeros(len(numbers), MOST_OBJECTS + 1).scatter_add_(
            1, cells.flatten(1), torch.ones(len(numbers), self.side**2)
        )
        # 1 for an object of a sixteenth of the picture
        weights = (areas.clamp(min=1).rsqrt() * self.side / 4)[rows, cells]
        weights[cells == MOST_OBJECTS] = 1.0
        return pictures, values, offsets, weights

    def vary(self, batch: tuple[Tensor, ...], generator: torch.Generator) -> tuple[Tensor, ...]:
        """The batch turned or mirrored as one, some of its pictures faded; and whether a picture's colors are named, (B,) bool."""
        pictures, values, offsets, weights = batch
        if torch.rand((), generator=generator) < 0.5:
            pictures, values, offsets, weights = (part.flip(-1) for part in batch)
            offsets = offsets * torch.tensor([-1.0, 1.0])[:, None, None]
        for _ in range(int(torch.randint(4, (), generator=generator))):
            pictures, values, offsets, weights = (
                part.rot90(1, (-2, -1)) for part in (pictures, values, offsets, weights)
            )
            offsets = torch.stack([offsets[:, 1], -offsets[:, 0]], dim=1)  # a turn to the left: right becomes up
        count = len(pictures)
        saturation = torch.rand(count, generator=generator)
        saturation[torch.rand(count, generator=generator) >= FADED_SHARE] = 1.0
        mixture = torch.rand(count, 3, 1, 1, generator=generator) + 0.2  # how light a color is must not give it away
        gray = (pictures * mixture / mixture.sum(dim=1, keepdim=True)).sum(dim=1, keepdim=True)
        pictures = gray.lerp(pictures, saturation[:, None, None, None])
        return pictures, values, offsets, weights, saturation >= NAMED_SATURATION


def shown_in_training() -> Tensor:
    """Which shape, color and texture training shows together, bool; the last place along each axis, which -1 names, is any."""
    shown = torch.zeros(len(SHAPES) + 1, len(COLOR_NAMES) + 1, len(TEXTURES) + 1, dtype=torch.bool)
    for shape, color, texture in compositions("train"):
        shown[SHAPES.index(shape), COLOR_NAMES.index(color), TEXTURES.index(texture)] = True
    shown[-1] = shown[:-1].any(dim=0)
    shown[:, -1] = shown[:, :-1].any(dim=1)
    shown[:, :, -1] = shown[:, :, :-1].any(dim=2)
    return shown


def competing(logits: Sequence[Tensor], values: Tensor, shown: Tensor) -> list[Tensor]:
    """Logits of shape, color, texture and size, -inf where training never shows the answer with the object's other attributes.

    Without this, the color of a thing, or what is left of it in a faded picture, would tell which shapes it cannot have, and the
    tower would learn that.
    """
    shape, color, texture, _ = values.unbind(1)
    open_to = [shown[:-1, color, texture].transpose(0, 1)]
    open_to += [mask.permute(0, 3, 1, 2) for mask in (shown[shape, :-1, texture], shown[shape, color, :-1])]
    return [part.masked_fill(~mask, -math.inf) for part, mask in zip(logits[:3], open_to, strict=True)] + [logits[3]]


def attribute_loss(
    outputs: tuple[Tensor, ...], values: Tensor, offsets: Tensor, weights: Tensor, colored: Tensor, shown: Tensor
) -> Tensor:
    """Weighted mean cross-entropies of whether an object is at a cell and of its attributes, summed, and the weighted distance to
    its middle. Whether something is there is asked by itself: a logit of "nothing" among the shapes would be outweighed by the
    shapes alone that training shows in a color, which would tell them from the others again."""
    there = (values[:, 0] >= 0).float()
    losses = binary_cross_entropy_with_logits(outputs[0][:, 0], there, reduction="none")
    loss = (losses * weights).sum() / weights.sum()
    for name, part, wanted in zip(VALUES, competing(outputs[1:-1], values, shown), values.unbind(1), strict=True):
        named = weights * (wanted >= 0)
        if name == "color":
            named = named * colored[:, None, None]
        losses = cross_entropy(part, wanted, ignore_index=-1, reduction="none")
        loss = loss + (losses * named).sum() / named.sum().clamp(min=1)
    on_objects = weights * there
    distances = (outputs[-1] - offsets).abs().sum(dim=1)
    return loss + CENTER_WEIGHT * (distances * on_objects).sum() / on_objects.sum().clamp(min=1)


@torch.no_grad()
def measure(reader: nn.Module, batches: Batches, batch_size: int, device: torch.device) -> dict[str, dict[str, float]]:
    """How often an object's cells name it rightly when they vote: each attribute and all four, for objects of the split's own
    compositions ("targets") and for the others; the mean distance to the middle, in units of the side; IoU of figure and ground."""
    reader.eval()
    right: dict[str, list[Tensor]] = {"targets": [], "others": []}
    overlap, distances = torch.zeros(2), []
    for start in range(0, len(batches), batch_size):
        numbers = torch.arange(start, min(start + batch_size, len(batches)))
        pictures, values, offsets, _ = batches.take(numbers)
        figure, *logits, pointed = (part.cpu() for part in reader(pictures.to(device)))
        there, found = values[:, 0] >= 0, figure[:, 0] > 0
        overlap += torch.stack([(there & found).sum(), (there | found).sum()])
        distances.append((pointed - offsets).norm(dim=1)[there])
        for row, number in enumerate(numbers):
            for i in range(MOST_OBJECTS):
                cells = batches.scenes.cells[number] == i
                if cells.any():
                    voted = torch.stack([one[row][:, cells].mean(dim=1).argmax() for one in logits])
                    of = "targets" if batches.scenes.targets[number, i] else "others"
                    right[of].append(voted == batches.scenes.values[number, i])
    told = {}
    for of, votes in right.items():
        if votes:
            correct = torch.stack(votes)
            told[of] = dict(zip(VALUES, correct.float().mean(dim=0).tolist(), strict=True))
            told[of] |= {"all": correct.all(dim=1).float().mean().item(), "objects": len(correct)}
    told["cells"] = {"figure_IoU": (overlap[0] / overlap[1]).item(), "distance": torch.cat(distances).mean().item()}
    return told


def teach(settings: AttributeSettings) -> None:
    """Train the tower and save its model with the processor and what was measured.

    Raises:
        ValueError: Where the pictures' side is no multiple of the patch, or the scenes are fewer than a batch.
    """
    set_seed(settings.seed)
    model, processor = load_whole(settings.model, torch.float32)
    patch = model.config.patch_size
    if settings.size % patch:
        raise ValueError(f"size is {settings.size}; it must be a multiple of the patch, {patch}.")
    accelerator = Accelerator()
    process, processes = accelerator.process_index, accelerator.num_processes
    if settings.num_scenes < processes * settings.batch_size:
        raise ValueError(f"num_scenes is {settings.num_scenes}; it must be {processes * settings.batch_size} or more.")
    share = range(process, settings.num_scenes // processes * processes, processes)
    batches = Batches(draw_scenes("train", share, settings.size, patch, settings.scene_seed))
    to_measure = range(settings.num_val_scenes if accelerator.is_main_process else 0)
    val = Batches(draw_scenes("val", to_measure, settings.size, patch, settings.scene_seed))
    apply_tuning(model, vision="full", text="frozen")
    reader = AttributeReader(model, processor)
    steps_per_epoch = len(batches) // settings.batch_size
    steps = settings.epochs * steps_per_epoch
    optimizer = build_optimizer(reader, OptimizationSettings(optimizer="muon", learning_rate=settings.learning_rate))
    schedule = cosine_schedule(optimizer, steps)
    trained, optimizer = accelerator.prepare(reader, optimizer)
    shown = shown_in_training().to(accelerator.device)
    generator = torch.Generator().manual_seed(settings.seed + process)
    began, total, history = time.monotonic(), 0.0, []
    for step, numbers in enumerate(_numbers(len(batches), settings.batch_size, settings.epochs, generator)):
        trained.train()
        pictures, *wanted = (part.to(accelerator.device) for part in batches.vary(batches.take(numbers), generator))
        loss = attribute_loss(trained(pictures), *wanted, shown)
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(trained.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        total += loss.item()
        if (step + 1) % LOG_EVERY == 0:
            if accelerator.is_main_process:
                logger.info(
                    f"step {step + 1} of {steps}: loss {total / LOG_EVERY:.3f}, {time.monotonic() - began:.0f} s"
                )
            total = 0.0
        if (step + 1) % steps_per_epoch == 0 and accelerator.is_main_process:
            history.append(measure(reader, val, settings.batch_size, accelerator.device))
            logger.info(f"val: {json.dumps(history[-1])}")
    if accelerator.is_main_process:
        output = Path(settings.output)
        save_model(model, processor, output)
        write_text(output / "attributes.json", json.dumps(history, indent=2))


def _numbers(count: int, batch_size: int, epochs: int, generator: torch.Generator) -> Iterator[Tensor]:
    for _ in range(epochs):
        order = torch.randperm(count, generator=generator)
        yield from order[: count // batch_size * batch_size].split(batch_size)


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    teach(read_settings_of(AttributeSettings, arguments))


if __name__ == "__main__":
    run_command(main)

"""Training images drawn once, with all that a frozen vision tower makes of them kept on disk (ours).

Where nothing below the first adapter is trained, the tower gives the same for the same image in every epoch of every run. So a
few views of each image, and made-up images, are drawn once for all runs; their hidden states (float16) and masks stand in a
folder named after everything that they depend on, and training reads them from there. What is drawn anew in each epoch are the
view, the sentences and the words that drop out.
"""

import fcntl
import hashlib
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import tqdm
from torch.utils.data import Dataset
from transformers import BatchFeature

from modeling_sera import SeraForReferringSegmentation
from processing_sera import SeraProcessor
from training.augmentation import drop_words
from training.batches import Collator, ImageExample, draw_example, group_by_image
from training.checkpoints import checksum
from training.composites import Composites
from training.configuration import AugmentationSettings, TrainingSettings
from training.files import partial_folder, recover_folder, replace_folder, sha256_of, write_text, writing
from training.splits import HIDDEN, load_training_splits

logger = logging.getLogger(__name__)

VERSION = 3  # of what is drawn and how it is kept; a change makes new folders
SEED = 20_240  # of the views: they are the same for all runs, whatever these runs' seeds
SAMPLE = 128  # views, about, that stand for all of them
BATCH = 8  # images that the tower takes at once


@dataclass
class View:
    """An image as it was kept.

    Attributes:
        states: (states, num_prefix + H·W, hidden_size) float16, of `SeraVisionEncoder.encode_states`.
        labels: (N, H, W) uint8, 255 where a pixel is the object's, one per expression.
        text: The expressions.
        sources: (row, sentence) number of each; row -1 for those of a made-up image.
    """

    states: np.ndarray
    labels: np.ndarray
    text: list[str]
    sources: list[tuple[int, int]]


def _drawings(rows: datasets.Dataset, settings: TrainingSettings) -> list["_Drawing"]:
    """What is to be kept: every view of every group of an image's objects, then as many drawings of every made-up image."""
    groups = group_by_image(rows, settings.data.objects_per_image)
    composites = Composites(rows) if settings.data.composites else None
    drawings = [
        _Drawing(rows, group, view, settings.augmentation) for group in groups for view in range(settings.data.views)
    ]
    return drawings + [
        _Drawing(rows, [], number, settings.augmentation, composites)
        for number in range(settings.data.composites * settings.data.views)
    ]


@dataclass
class _Drawing:
    rows: datasets.Dataset
    group: list[int]
    number: int
    augmentation: AugmentationSettings
    composites: Composites | None = None

    def draw(self) -> ImageExample:
        """An image with all sentences of its objects, no word dropped."""
        if self.composites is not None:
            return self.composites.draw(np.random.default_rng((SEED, 1, self.number)))
        # the image, its mirror image where there is one, and from then on what augmentation makes of these
        whole = 2 if self.augmentation.flip > 0 else 1
        mirrored = float(self.number % whole == 1)
        varied = self.augmentation if self.number >= whole else AugmentationSettings()
        rows = [self.rows[number] for number in self.group]
        return draw_example(
            rows,
            self.group,
            max(len(row["sentences"]) for row in rows),
            replace(varied, flip=mirrored, word_dropout=0.0),
            np.random.default_rng((SEED, 0, self.group[0], self.number)),
        )


class ViewStore:
    """The folder of the kept views; made where it is absent."""

    def __init__(
        self,
        settings: TrainingSettings,
        rows: datasets.Dataset,
        model: SeraForReferringSegmentation,
        processor: SeraProcessor,
        accelerator: Accelerator,
    ):
        """
        Args:
            settings: Which views are kept, and of what.
            rows: The training rows. Where their sentences are hidden they are read again: one folder serves both kinds of run.
            model: Its vision tower is run, in the run's precision, where the folder is absent.
            processor: Makes pixels of images.
            accelerator: Its device runs the tower; the process that comes first makes the folder.

        Raises:
            ValueError: Where the settings would have the tower change, stream the rows or leave pixels out.
        """
        if settings.model.vision_tuning != "frozen":
            raise ValueError(
                f"data.views keeps what a frozen vision tower gives; model.vision_tuning is {settings.model.vision_tuning!r}."
            )
        if settings.data.streaming:
            raise ValueError("data.views and data.streaming exclude each other: views are drawn of all rows at once.")
        if settings.data.hide_sentences:
            rows, _ = load_training_splits(replace(settings.data, hide_sentences=False))
        key = _key(rows, model, processor, settings)
        self.folder = Path(settings.cache_dir) / f"views-{key}"
        with _alone(self.folder):  # processes of this run and of others; a barrier would time out on a large set
            if not recover_folder(self.folder):
                _write(self.folder, _drawings(rows, settings), model, processor, accelerator)
        # (views, states, num_prefix + H·W, hidden_size); those that stand for each other in an epoch follow each other
        self.states = np.load(self.folder / "states.npy", mmap_mode="r")
        self.labels = np.load(self.folder / "labels.npy", mmap_mode="r")  # (masks, H, W) uint8
        self.examples = json.loads((self.folder / "examples.json").read_text(encoding="utf-8"))

    def __getitem__(self, index: int) -> View:
        example = self.examples[index]
        return View(
            states=self.states[index],
            labels=self.labels[example["labels"]],
            text=example["text"],
            sources=[tuple(source) for source in example["sources"]],
        )

    def sample(self) -> torch.Tensor:
        """States of some of the views, from everywhere among them: (M, states, num_prefix + H·W, hidden_size) float16."""
        return torch.from_numpy(self.states[:: max(len(self.states) // SAMPLE, 1)].copy())


class ViewExamples(Dataset):
    """Kept views with freshly drawn sentences: in an epoch one view of every group of objects and of every made-up image.

    What is drawn depends on (seed, epoch, index) alone: not on the order of access, the worker or the process.
    """

    def __init__(self, store: ViewStore, settings: TrainingSettings):
        if settings.augmentation.feature_dropout >= 1:
            raise ValueError("augmentation.feature_dropout is 1: nothing of the images would be left.")
        self.store = store
        self.settings = settings
        self.num_groups = len(store.examples) // settings.data.views - settings.data.composites
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose views and sentences are drawn."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.num_groups + self.settings.data.composites

    def __getitem__(self, index: int) -> View:
        data, varied = self.settings.data, self.settings.augmentation
        rng = np.random.default_rng((self.settings.seed, self.epoch, index))
        is_photograph = index < self.num_groups
        view = self.store[index * data.views + rng.integers(data.views)]
        chosen, taken = [], {}
        for k in rng.permutation(len(view.text)).tolist():
            place = view.sources[k][0]  # sentences are counted by object, those of a made-up image all together
            limit = data.sentences_per_object * (1 if is_photograph else data.objects_per_image)
            if taken.setdefault(place, 0) < limit:
                taken[place] += 1
                chosen.append(k)
        text = [HIDDEN if data.hide_sentences else view.text[k] for k in chosen]
        states = view.states
        if varied.feature_dropout:  # the same channels at every position and depth
            kept = rng.random(states.shape[-1]) >= varied.feature_dropout
            states = states * (kept / (1 - varied.feature_dropout)).astype(np.float16)
        return View(
            states=states,
            labels=view.labels[chosen],
            text=[drop_words(sentence, varied.word_dropout, rng) for sentence in text] if varied.word_dropout else text,
            sources=[view.sources[k] for k in chosen],
        )


class ViewCollator:
    """Views to model inputs: `image_states` float32 (B, …) in the place of pixels, `labels` float32 (N, H, W) in [0, 1]."""

    def __init__(self, processor: SeraProcessor):
        self.processor = processor

    def __call__(self, views: list[View]) -> tuple[BatchFeature, list[View]]:
        """Model inputs and the views they come from."""
        inputs = self.processor(text=[view.text for view in views], return_tensors="pt")
        inputs["image_index"] = torch.tensor([i for i, view in enumerate(views) for _ in view.text])
        inputs["labels"] = torch.from_numpy(np.concatenate([view.labels for view in views])).float() / 255
        inputs["image_states"] = torch.from_numpy(np.stack([view.states for view in views])).float()
        inputs["pixel_values"] = torch.zeros(1, 1, 1, 1).expand(
            len(views), 3, *inputs["labels"].shape[-2:]
        )  # the size alone
        return inputs, views


def _write(
    folder: Path,
    drawings: list[_Drawing],
    model: SeraForReferringSegmentation,
    processor: SeraProcessor,
    accelerator: Accelerator,
) -> None:
    """Draw, encode and keep; the folder is there when all of it is."""
    collator, vision = Collator(processor, with_labels=True), model.model.vision
    device = accelerator.device
    home, was_training = next(vision.parameters()).device, vision.training
    vision.to(device).eval()
    logger.info(f"drawing {len(drawings)} training images once, into {folder}")
    examples, labels, states, kept = [], [], None, 0
    with writing(folder):
        partial = partial_folder(folder)
        for start in tqdm(range(0, len(drawings), BATCH), desc="encoding", unit="batch"):
            inputs, drawn = collator([drawing.draw() for drawing in drawings[start : start + BATCH]])
            with torch.inference_mode(), accelerator.autocast():
                encoded = vision.encode_states(inputs["pixel_values"].to(device)).half().cpu().numpy()
            if states is None:
                shape = (len(drawings), *encoded.shape[1:])
                states = np.lib.format.open_memmap(partial / "states.npy", "w+", np.float16, shape)
            states[start : start + len(encoded)] = encoded
            masks = (inputs["labels"] * 255).round().to(torch.uint8).numpy()
            position = 0
            for example in drawn:
                numbers, seen = [], {}
                for mask, truth in zip(
                    masks[position:], example.masks, strict=False
                ):  # sentences of an object share its mask
                    if id(truth) not in seen:
                        seen[id(truth)] = kept
                        labels.append(mask)
                        kept += 1
                    numbers.append(seen[id(truth)])
                position += len(example.masks)
                examples.append({"labels": numbers, "text": example.text, "sources": example.sources})
        states.flush()
        np.save(partial / "labels.npy", np.stack(labels))
        write_text(partial / "examples.json", json.dumps(examples))
        replace_folder(folder)
    vision.to(home).train(was_training)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Waits until no other process makes the folder."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_name(f".{folder.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _key(
    rows: datasets.Dataset, model: SeraForReferringSegmentation, processor: SeraProcessor, settings: TrainingSettings
) -> str:
    """Names everything that the kept views depend on."""
    vision = model.model.vision
    data = settings.data
    what: dict[str, Any] = {
        "version": VERSION,
        "rows": [rows[name] for name in ("image_id", "ref_id", "sentences", "mask", "category", "ann_ids")],
        "images": _checksums(rows),
        "augmentation": asdict(replace(settings.augmentation, word_dropout=0.0, feature_dropout=0.0)),
        "drawn": [data.views, data.composites, data.objects_per_image],
        "processor": processor.image_processor.to_dict(),
        "shared": [vision.first_adapted, *vision.tap_layers],
        "tower": checksum(dict(vision.tower.named_parameters())),
    }
    if settings.mixed_precision != "no":
        what["precision"] = settings.mixed_precision
    return hashlib.sha256(json.dumps(what, sort_keys=True, default=list).encode()).hexdigest()[:16]


def _checksums(rows: datasets.Dataset) -> list[str]:
    """SHA-256 of every row's image."""
    of_file = cache(sha256_of)  # rows share their images' files
    return [
        of_file(Path(image["path"])) if image["bytes"] is None else hashlib.sha256(image["bytes"]).hexdigest()
        for image in rows["image"]
    ]


__all__ = ["View", "ViewCollator", "ViewExamples", "ViewStore"]

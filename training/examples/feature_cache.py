"""The feature cache: training images drawn once, with the hidden states of a frozen vision tower on disk (ours).

Where nothing below the first adapter is trained, the tower gives the same states for the same image in every epoch of every run. So
a few versions of each image, and copy-paste images, are drawn once for all runs. Their hidden states (float16) and masks lie in a
folder, one after the other, since images without padding have sizes of their own. Its name is a hash of everything that they depend
on. In each epoch, training draws the version, the sentences and the dropped words anew.
"""

import fcntl
import hashlib
import json
import logging
import math
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
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
from training.configuration import AugmentationSettings, TrainingSettings
from training.examples.augmentation import drop_words
from training.examples.batches import Collator, ImageExample, draw_example, group_by_image
from training.examples.copy_paste import CopyPaste
from training.examples.draws import SET_COLUMN, WeightedDraws, weighted_draws
from training.examples.splits import HIDDEN, load_training_splits
from training.learning.checkpoints import checksum
from training.sources.images import content_hash
from training.support.files import partial_folder, recover_folder, replace_folder, write_text, writing

logger = logging.getLogger(__name__)

VERSION = 5  # of what is drawn and how it is kept; a change makes new folders
SEED = 20_240  # of the versions: they are the same for all runs, whatever these runs' seeds
SAMPLE = 128  # about this many versions stand for all of them
BATCH = 8  # images that the tower takes at once
STATES, LABELS = "states.float16", "labels.uint8"  # numbers alone, as the machine has them


@dataclass
class CachedImage:
    """An image of the cache.

    Attributes:
        states: (states, num_prefix + H·W, hidden_size) float16, of `SeraVisionEncoder.encode_states`.
        labels: (N, H, W) uint8, 255 where a pixel is the object's, one per expression.
        text: The expressions.
        sources: (row, sentence) number of each; row -1 for those of a copy-paste image.
    """

    states: np.ndarray
    labels: np.ndarray
    text: list[str]
    sources: list[tuple[int, int]]


def _drawings(rows: datasets.Dataset, settings: TrainingSettings) -> list["_Drawing"]:
    """What is kept: every version of every group of an image's objects, then as many of every copy-paste image."""
    groups = group_by_image(rows, settings.data.objects_per_image)
    copy_paste = CopyPaste(rows) if settings.data.copy_paste else None
    drawings = [
        _Drawing(rows, group, number, settings.augmentation)
        for group in groups
        for number in range(settings.data.cached_versions)
    ]
    return drawings + [
        _Drawing(rows, [], number, settings.augmentation, copy_paste)
        for number in range(settings.data.copy_paste * settings.data.cached_versions)
    ]


@dataclass
class _Drawing:
    rows: datasets.Dataset
    group: list[int]
    number: int
    augmentation: AugmentationSettings
    copy_paste: CopyPaste | None = None

    def draw(self) -> ImageExample:
        """An image with all sentences of its objects, no word dropped."""
        if self.copy_paste is not None:
            return self.copy_paste.draw(np.random.default_rng((SEED, 1, self.number)))
        # the image, its flipped image where there is one, and from then on what augmentation makes of these
        whole = 2 if self.augmentation.flip > 0 else 1
        flipped = float(self.number % whole == 1)
        varied = self.augmentation if self.number >= whole else AugmentationSettings()
        rows = [self.rows[number] for number in self.group]
        return draw_example(
            rows,
            self.group,
            max(len(row["sentences"]) for row in rows),
            replace(varied, flip=flipped, word_dropout=0.0),
            np.random.default_rng((SEED, 0, self.group[0], self.number)),
        )


class FeatureCache:
    """The folder of the cache. It is made where it is absent."""

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
            settings: What is cached.
            rows: The training rows. Rows with hidden sentences are read again without hiding: one folder serves both.
            model: Its vision tower is run, in the run's precision, where the folder is absent.
            processor: Makes pixels of images.
            accelerator: Its device runs the tower; the process that comes first makes the folder.

        Raises:
            ValueError: Where the tower is tuned or the rows are streamed.
        """
        if settings.model.vision_tuning != "frozen":
            raise ValueError(
                "data.cached_versions needs a frozen vision tower; "
                f"model.vision_tuning is {settings.model.vision_tuning!r}."
            )
        if settings.data.streaming:
            raise ValueError(
                "data.cached_versions and data.streaming exclude each other: the feature cache needs all rows at once."
            )
        self._rows, self._groups = rows, group_by_image(rows, settings.data.objects_per_image)
        if settings.data.hide_sentences:
            rows, _ = load_training_splits(replace(settings.data, hide_sentences=False))
        key = _key(rows, model, processor, settings)
        self.folder = Path(settings.cache_dir) / f"features-{key}"
        with _alone(self.folder):  # processes of this run and of others; a barrier would time out on a large set
            if not recover_folder(self.folder):
                _write(self.folder, _drawings(rows, settings), model, processor, accelerator)
        # one entry per version; the versions of one group of objects follow each other
        self.examples = json.loads((self.folder / "examples.json").read_text(encoding="utf-8"))
        self.frames = [tuple(example["frame"]) for example in self.examples]
        self._states = np.memmap(self.folder / STATES, np.float16, "r")
        self._labels = np.memmap(self.folder / LABELS, np.uint8, "r")

    def __getitem__(self, index: int) -> CachedImage:
        example = self.examples[index]
        pixels = math.prod(example["frame"])
        masks = [self._labels[start : start + pixels].reshape(example["frame"]) for start in example["labels"]]
        return CachedImage(
            states=self._states_of(example),
            labels=np.stack(masks),
            text=example["text"],
            sources=[tuple(source) for source in example["sources"]],
        )

    def _states_of(self, example: dict[str, Any]) -> np.ndarray:
        start, shape = example["start"], example["shape"]
        return self._states[start : start + math.prod(shape)].reshape(shape)

    def draws(self, seed: int) -> WeightedDraws | None:
        """The draws of its groups of objects in each epoch; None where the rows are no weighted mixture."""
        return weighted_draws(self._rows, self._groups, seed)

    def sample(self) -> Iterator[tuple[torch.Tensor, tuple[int, int]]]:
        """Some of the versions, from everywhere among them: states (1, states, num_prefix + H·W, hidden_size), and (H, W)."""
        for number in range(0, len(self.examples), max(len(self.examples) // SAMPLE, 1)):
            yield torch.from_numpy(self._states_of(self.examples[number]).copy())[None], self.frames[number]


class CachedExamples(Dataset):
    """Cached images with freshly drawn sentences.

    An epoch has one version of every group of objects and of every copy-paste image. Of a weighted mixture the groups are drawn by
    weight, see [`WeightedDraws`]. What is drawn depends on (seed, epoch, index) alone: not on the order of access, the worker or
    the process.
    """

    def __init__(self, store: FeatureCache, settings: TrainingSettings):
        if settings.augmentation.feature_dropout >= 1:
            raise ValueError("augmentation.feature_dropout is 1: nothing of the images would be left.")
        self.store = store
        self.settings = settings
        self.num_groups = len(store.examples) // settings.data.cached_versions - settings.data.copy_paste
        self.draws = store.draws(settings.seed)
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose versions and sentences are drawn and, of a weighted mixture, whose images."""
        self.epoch = epoch
        groups = np.arange(self.num_groups) if self.draws is None else self.draws.epoch(epoch)
        number = self.settings.data.cached_versions
        versions = np.random.default_rng((self.settings.seed, epoch)).integers(number, size=len(self))
        self.drawn = (np.r_[groups, self.num_groups : len(self)] * number + versions).tolist()
        self.frames = [self.store.frames[version] for version in self.drawn]

    def __len__(self) -> int:
        return self.num_groups + self.settings.data.copy_paste

    def __getitem__(self, index: int) -> CachedImage:
        data, varied = self.settings.data, self.settings.augmentation
        rng = np.random.default_rng((self.settings.seed, self.epoch, index))
        is_photograph = index < self.num_groups
        version = self.store[self.drawn[index]]
        chosen, taken = [], {}
        for k in rng.permutation(len(version.text)).tolist():
            place = version.sources[k][0]  # sentences are counted by object, those of a copy-paste image all together
            limit = data.sentences_per_object * (1 if is_photograph else data.objects_per_image)
            if taken.setdefault(place, 0) < limit:
                taken[place] += 1
                chosen.append(k)
        text = [HIDDEN if data.hide_sentences else version.text[k] for k in chosen]
        states = version.states
        if varied.feature_dropout:  # the same channels at every position and depth
            kept = rng.random(states.shape[-1]) >= varied.feature_dropout
            states = states * (kept / (1 - varied.feature_dropout)).astype(np.float16)
        return CachedImage(
            states=states,
            labels=version.labels[chosen],
            text=[drop_words(sentence, varied.word_dropout, rng) for sentence in text] if varied.word_dropout else text,
            sources=[version.sources[k] for k in chosen],
        )


class CachedCollator:
    """Cached images to model inputs: `image_states` float32 (B, …) in the place of pixels, `labels` float32 (N, H, W) in [0, 1]."""

    def __init__(self, processor: SeraProcessor):
        self.processor = processor

    def __call__(self, versions: list[CachedImage]) -> tuple[BatchFeature, list[CachedImage]]:
        """Model inputs and the cached images they come from."""
        inputs = self.processor(text=[version.text for version in versions], return_tensors="pt")
        inputs["image_index"] = torch.tensor([i for i, version in enumerate(versions) for _ in version.text])
        inputs["labels"] = torch.from_numpy(np.concatenate([version.labels for version in versions])).float() / 255
        inputs["image_states"] = torch.from_numpy(np.stack([version.states for version in versions])).float()
        inputs["pixel_values"] = torch.zeros(1, 1, 1, 1).expand(
            len(versions), 3, *inputs["labels"].shape[-2:]
        )  # the size alone
        return inputs, versions


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
    examples: list[dict[str, Any]] = [{} for _ in drawings]
    waiting: dict[tuple[int, int], list[tuple[int, ImageExample]]] = defaultdict(list)  # by frame: a batch has one
    with writing(folder):
        partial = partial_folder(folder)
        with (partial / STATES).open("wb") as states_file, (partial / LABELS).open("wb") as labels_file:

            def encode(batch: list[tuple[int, ImageExample]]) -> None:
                inputs, drawn = collator([example for _, example in batch])
                with torch.inference_mode(), accelerator.autocast():
                    states = vision.encode_states(inputs["pixel_values"].to(device)).half().cpu().numpy()
                masks = iter((inputs["labels"] * 255).round().to(torch.uint8).numpy())
                for (number, _), example, own in zip(batch, drawn, states, strict=True):
                    start, labels, seen = states_file.tell() // own.itemsize, [], {}
                    states_file.write(own.tobytes())
                    for truth in example.masks:  # sentences of an object share its mask
                        mask = next(masks)
                        if id(truth) not in seen:
                            seen[id(truth)] = labels_file.tell()
                            labels_file.write(mask.tobytes())
                        labels.append(seen[id(truth)])
                    kept = {
                        "frame": tuple(inputs["labels"].shape[1:]),
                        "start": start,
                        "shape": own.shape,
                        "labels": labels,
                    }
                    examples[number] = kept | {"text": example.text, "sources": example.sources}

            for number, drawing in enumerate(tqdm(drawings, desc="encoding", unit="image")):
                drawn = drawing.draw()
                frame = processor.image_processor.frame_of([drawn.image.size[::-1]])
                waiting[frame].append((number, drawn))
                if len(waiting[frame]) == BATCH:
                    encode(waiting.pop(frame))
            for rest in waiting.values():
                encode(rest)
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
    """A name made of everything that the cache depends on."""
    vision = model.model.vision
    data = settings.data
    chosen = [name for name in ("upright", SET_COLUMN) if name in rows.column_names]  # they change images and groups
    what: dict[str, Any] = {
        "version": VERSION,
        "rows": [rows[name] for name in ("image_id", "ref_id", "sentences", "mask", "category", "ann_ids")],
        "chosen": {name: rows[name] for name in chosen},
        "images": [content_hash(image) for image in rows["image"]],
        "augmentation": asdict(replace(settings.augmentation, word_dropout=0.0, feature_dropout=0.0)),
        "drawn": [data.cached_versions, data.copy_paste, data.objects_per_image],
        "processor": processor.image_processor.to_dict(),
        "shared": [vision.first_adapted, *vision.tap_layers],
        "tower": checksum(dict(vision.tower.named_parameters())),
    }
    if settings.mixed_precision != "no":
        what["precision"] = settings.mixed_precision
    return hashlib.sha256(json.dumps(what, sort_keys=True, default=list).encode()).hexdigest()[:16]


__all__ = ["CachedCollator", "CachedExamples", "CachedImage", "FeatureCache"]

"""What several tests build: a tokenizer, pictures and masks to measure, and a REFER dataset on disk."""

import io
import json
import pickle
from pathlib import Path

import datasets
import numpy as np
import PIL.Image
from transformers import CLIPTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from training.data import load_refer

WORDS = ["left", "right", "zebra", "cup", "the"]
# (picture, frame), heights first: down and up, both orientations, odd paddings, frames that are not square
GEOMETRIES = [
    ((480, 640), (448, 448)),
    ((640, 480), (448, 448)),
    ((333, 500), (448, 448)),
    ((500, 375), (224, 448)),
    ((375, 500), (448, 210)),
    ((61, 37), (112, 112)),
    ((1000, 1500), (112, 112)),
]


def tiny_tokenizer() -> CLIPTokenizer:
    """Every byte, with and without the end-of-word mark, and a handful of whole words."""
    symbols = list(bytes_to_unicode().values())
    symbols += [symbol + "</w>" for symbol in symbols]
    merges = []
    for word in WORDS:
        parts = [*word[:-1], word[-1] + "</w>"]
        while len(parts) > 1:
            merges.append((parts[0], parts[1]))
            parts[:2] = [parts[0] + parts[1]]
    merges = list(dict.fromkeys(merges))
    symbols += ["".join(merge) for merge in merges] + ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {symbol: i for i, symbol in enumerate(symbols)}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=77)


def disc(size: tuple[int, int], centre: tuple[float, float], radius: float) -> np.ndarray:
    """The pixels of an image of size (height, width) whose centres lie in a disc around (row, column)."""
    rows, columns = np.mgrid[0 : size[0], 0 : size[1]] + 0.5
    return (rows - centre[0]) ** 2 + (columns - centre[1]) ** 2 < radius**2


def centroid(weights: np.ndarray) -> np.ndarray:
    """(row, column) of the centre of mass of an image (H, W), in pixels."""
    rows, columns = np.mgrid[0 : weights.shape[0], 0 : weights.shape[1]] + 0.5
    return np.array([(rows * weights).sum(), (columns * weights).sum()]) / weights.sum()


def iou(a: np.ndarray, b: np.ndarray) -> float:
    """Intersection over union of two bool masks."""
    return (a & b).sum() / (a | b).sum()


def picture_bytes(format_name: str, mode: str = "RGB", **options) -> bytes:
    """A file of noise, 40 high and 60 wide."""
    pixels = np.random.default_rng(3).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    picture = PIL.Image.fromarray(pixels)
    if mode == "I;16":
        picture = PIL.Image.fromarray(pixels[..., 0].astype(np.uint16) * 257)
    buffer = io.BytesIO()
    picture.convert(mode).save(buffer, format_name, **options)
    return buffer.getvalue()


class Folder:
    """A small REFER dataset whose records a test may spoil before it is written and loaded."""

    def __init__(self, root: Path, images: str = "images/train2014", dataset: str = "refcoco", split_by: str = "unc"):
        self.root, self.images, self.dataset, self.split_by = root, images, dataset, split_by
        splits = ("train", "val", "testA", "testB", "train")
        self.refs = [
            {
                "ref_id": 100 + i,
                "ann_id": 500 + i,
                "image_id": 10 + i % 2,
                "split": split,
                "file_name": "COCO_wrong_name.jpg",
                "category_id": 3,
                "sent_ids": [1000 + 2 * i, 1001 + 2 * i],
                "sentences": [
                    {"sent_id": 1000 + 2 * i, "sent": f" the zebra {i} ", "raw": "The Zebra!", "tokens": []},
                    {"sent_id": 1001 + 2 * i, "sent": f"striped one {i}", "raw": "STRIPED", "tokens": []},
                ],
            }
            for i, split in enumerate(splits)
        ]
        square = [4, 4, 14, 4, 14, 14, 4, 14]
        forms = [[square], [square], {"size": [40, 60], "counts": [5, 7, 2388]}]
        self.annotations = [
            {
                "id": 500 + i,
                "image_id": 10 + i % 2,
                "category_id": 3,
                "bbox": [4, 4, 10, 10],
                "segmentation": forms[i % 3],
            }
            for i in range(5)
        ]
        self.pictures = [{"id": 10 + i, "file_name": f"COCO_{i}.png", "height": 40, "width": 60} for i in range(2)]
        self.categories = [{"id": 3, "name": "zebra"}]
        self.folder, self.picture_folder = root / dataset, root / images
        self.picture_folder.mkdir(parents=True)
        self.folder.mkdir(parents=True, exist_ok=True)
        for picture in self.pictures:
            (self.picture_folder / picture["file_name"]).write_bytes(picture_bytes("PNG"))

    def load(self, **options) -> datasets.DatasetDict:
        instances = {"images": self.pictures, "annotations": self.annotations, "categories": self.categories}
        (self.folder / f"refs({self.split_by}).p").write_bytes(pickle.dumps(self.refs, 2))
        (self.folder / "instances.json").write_text(json.dumps(instances))
        return load_refer(self.root, dataset=self.dataset, split_by=self.split_by, **options)

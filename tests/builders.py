"""What several tests build: a tokenizer, images and masks to measure, REFER datasets on disk and the Hub's copies of them."""

import io
import json
import pickle
from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
import PIL.Image
from transformers import CLIPTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from training.sources.masks import segmentation_to_rle
from training.sources.refer import load_refer

WORDS = ["left", "right", "zebra", "cup", "the"]
# (image, frame), heights first: down and up, both orientations, odd paddings, frames that are not square
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


def special_ids(tokenizer: CLIPTokenizer) -> dict[str, int]:
    """What a text tower's configuration must know of its tokenizer beside the number of its tokens."""
    return {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}


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


def image_bytes(format_name: str, mode: str = "RGB", **options) -> bytes:
    """A file of noise, 40 high and 60 wide."""
    pixels = np.random.default_rng(3).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    image = PIL.Image.fromarray(pixels)
    if mode == "I;16":
        image = PIL.Image.fromarray(pixels[..., 0].astype(np.uint16) * 257)
    buffer = io.BytesIO()
    image.convert(mode).save(buffer, format_name, **options)
    return buffer.getvalue()


class Folder:
    """A small REFER dataset whose records a test may spoil before it is written and loaded."""

    def __init__(
        self, root: Path, image_dir: str = "images/train2014", dataset: str = "refcoco", split_by: str = "unc"
    ):
        self.root, self.image_dir, self.dataset, self.split_by = root, image_dir, dataset, split_by
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
        run, of_run = {"size": [40, 60], "counts": [5, 7, 2388]}, [0, 5, 1, 7]
        forms = [([square], [4, 4, 10, 10]), ([square], [4, 4, 10, 10]), (run, of_run)]
        self.annotations = [
            {
                "id": 500 + i,
                "image_id": 10 + i % 2,
                "category_id": 3,
                "bbox": forms[i % 3][1],
                "segmentation": forms[i % 3][0],
            }
            for i in range(5)
        ]
        self.images = [{"id": 10 + i, "file_name": f"COCO_{i}.png", "height": 40, "width": 60} for i in range(2)]
        self.categories = [{"id": 3, "name": "zebra"}]
        self.folder, self.image_folder = root / dataset, root / image_dir
        self.image_folder.mkdir(parents=True, exist_ok=True)
        self.folder.mkdir(parents=True, exist_ok=True)
        for image in self.images:
            (self.image_folder / image["file_name"]).write_bytes(image_bytes("PNG"))

    def write(self) -> None:
        instances = {"images": self.images, "annotations": self.annotations, "categories": self.categories}
        if self.dataset == "grefcoco":
            (self.folder / f"grefs({self.split_by}).json").write_text(json.dumps(self.refs))
        else:
            (self.folder / f"refs({self.split_by}).p").write_bytes(pickle.dumps(self.refs, 2))
        (self.folder / "instances.json").write_text(json.dumps(instances))

    def load(self, **options) -> datasets.DatasetDict:
        self.write()
        return load_refer(self.root, dataset=self.dataset, split_by=self.split_by, **options)

    def fill(self, images: dict[str, list[int]]) -> "Folder":
        """One to three refs, each to a polygon of its own, in every image of the splits, by COCO id."""
        self.refs, self.annotations, self.images = [], [], []
        self.categories = [{"id": 3, "name": "zebra"}, {"id": 4, "name": "cup"}]
        for split, image_ids in images.items():
            for image_id in image_ids:
                self._fill_image(split, image_id)
        self.refs.sort(key=lambda ref: ref["ref_id"] % 10)  # in real files, too, an image's refs stand apart
        self.write()
        return self

    def _fill_image(self, split: str, image_id: int) -> None:
        rng = np.random.default_rng(image_id)  # the same image in every dataset
        height, width = int(rng.integers(30, 50)), int(rng.integers(30, 50))
        name = f"COCO_train2014_{image_id:012d}.png"
        pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        PIL.Image.fromarray(pixels).save(self.image_folder / name)
        self.images.append({"id": image_id, "file_name": name, "height": height, "width": width})
        for i in range(1 + image_id % 3):
            ref_id, (left, top) = 10 * image_id + i, rng.integers(1, 15, 2).tolist()
            right, bottom = left + 6 + i, top + 9
            texts = [f"{self.dataset} {ref_id} {j}" for j in range(1 + (image_id + i) % 3)]
            sentences = [{"sent_id": 10 * ref_id + j, "sent": text, "raw": text} for j, text in enumerate(texts)]
            polygon = [left, top, right, top, right, bottom, left, bottom]
            box = [left, top, right - left, bottom - top]
            record = {"image_id": image_id, "category_id": 3 + i % 2}
            self.annotations.append(record | {"id": ref_id, "bbox": box, "segmentation": [polygon]})
            sent_ids = [sentence["sent_id"] for sentence in sentences]
            ref = {"ref_id": ref_id, "ann_id": ref_id, "split": split, "sent_ids": sent_ids, "sentences": sentences}
            self.refs.append(record | ref)


def write_hub_copy(folder: Folder, layout: str, target: Path, splits: dict[str, str], shards: int = 1) -> Path:
    """A filled folder's splits in the layout of one of the Hub's copies, under the names that `splits` gives them."""
    (target / "data").mkdir(parents=True)
    images = {image["id"]: image for image in folder.images}
    annotations = {annotation["id"]: annotation for annotation in folder.annotations}
    for split, name in splits.items():
        joined = [
            (ref, annotations[ref["ann_id"]], images[ref["image_id"]], [s["sent"] for s in ref["sentences"]])
            for ref in folder.refs
            if ref["split"] == split
        ]
        copy = datasets.Dataset.from_list(HUB_LAYOUTS[layout](folder, joined))
        if "image" in copy.column_names:
            copy = copy.cast_column("image", datasets.Image())
        for i in range(shards):
            copy.shard(shards, i).to_parquet(target / "data" / f"{name}-{i:05d}-of-{shards:05d}.parquet")
    return target


def _image_file(folder: Folder, image: dict) -> dict:
    return {"path": None, "bytes": (folder.image_folder / image["file_name"]).read_bytes()}


def _lmms_lab_rows(folder: Folder, joined: list[tuple]) -> list[dict]:
    return [
        {
            "question_id": str(ref["ref_id"]),
            "image": _image_file(folder, image),
            "question": "Please carefully observe the area.",
            "answer": sentences,
            "segmentation": [float(number) for number in annotation["segmentation"][0]],
            "bbox": [float(number) for number in annotation["bbox"]],
            "iscrowd": 0,
            "file_name": image["file_name"].replace(".png", "_3.jpg"),
        }
        for ref, annotation, image, sentences in joined
    ]


def _jxu124_rows(folder: Folder, joined: list[tuple]) -> list[dict]:
    rows = []
    for ref, annotation, image, _ in joined:
        left, top, width, height = annotation["bbox"]
        rows.append(
            {key: ref[key] for key in ("ref_id", "image_id", "split")}
            | {
                "sentences": json.dumps(ref["sentences"]),
                "raw_anns": json.dumps(annotation),
                "image_path": f"coco/{folder.image_folder.name}/{image['file_name']}",
                "bbox": [float(left), float(top), float(left + width), float(top + height)],
            }
        )
    return rows


def _moondream_rows(folder: Folder, joined: list[tuple]) -> list[dict]:
    by_image: dict[int, dict] = {}
    for _, annotation, image, sentences in joined:
        row = by_image.setdefault(image["id"], {"image": _image_file(folder, image), "samples": []})
        mask = segmentation_to_rle(annotation["segmentation"], image["height"], image["width"])
        row["samples"].append({"sentences": sentences, "bbox": [0.25, 0.25, 0.5, 0.5], "mask": mask})
    return list(by_image.values())


HUB_LAYOUTS = {"lmms_lab": _lmms_lab_rows, "jxu124": _jxu124_rows, "moondream": _moondream_rows}


def spoil(**changes: dict) -> Callable[[Folder], None]:
    """Changes fields of one record, by record list and index; None removes a field."""

    def apply(folder: Folder) -> None:
        for where, fields in changes.items():
            records, index = where.rsplit("_", 1)
            for key, value in fields.items():
                record = getattr(folder, records)[int(index)]
                record.pop(key) if value is None else record.update({key: value})

    return apply

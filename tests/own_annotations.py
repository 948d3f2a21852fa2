"""The same annotated images in each form that people bring: COCO's JSON, labelme, CVAT's XML, masks with a table, `datasets`."""

import csv
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image

from training.preparation import main
from training.sources.hub_layouts import RowFolder
from training.sources.masks import decode_mask

HEIGHT, WIDTH = 40, 60


@dataclass
class Thing:
    """A rectangle of pixels left <= x < right, top <= y < bottom."""

    left: int
    top: int
    right: int
    bottom: int
    phrase: str
    color: str = "red"
    category: str = "traffic_light"

    @property
    def mask(self) -> np.ndarray:
        mask = np.zeros((HEIGHT, WIDTH), dtype=bool)
        mask[self.top : self.bottom, self.left : self.right] = True
        return mask

    @property
    def polygon(self) -> list[float]:
        return [self.left, self.top, self.right, self.top, self.right, self.bottom, self.left, self.bottom]


@dataclass
class Photo:
    name: str
    things: list[Thing] = field(default_factory=list)


def photos(number: int = 10) -> list[Photo]:
    """Images with two things each."""
    return [
        Photo(
            f"photo{i}.png",
            [
                Thing(2 + i, 3, 20 + i, 15, f"left thing {i}"),
                Thing(30, 18, 55, 30 + i % 8, f"right thing {i}", "green"),
            ],
        )
        for i in range(number)
    ]


def write_images(folder: Path, made: list[Photo]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for number, photo in enumerate(made):
        pixels = np.random.default_rng(number).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / photo.name)


def every(made: list[Photo]) -> Iterator[tuple[int, Photo, Thing]]:
    """Each thing with its number from 1 on."""
    things = [(photo, thing) for photo in made for thing in photo.things]
    yield from ((number, *pair) for number, pair in enumerate(things, start=1))


def coco_content(made: list[Photo]) -> dict:
    ids = {photo.name: number for number, photo in enumerate(made, start=1)}
    return {
        "images": [
            {"id": ids[photo.name], "file_name": photo.name, "height": HEIGHT, "width": WIDTH} for photo in made
        ],
        "annotations": [
            {
                "id": number,
                "image_id": ids[photo.name],
                "category_id": 7,
                "segmentation": [thing.polygon],
                "bbox": [thing.left, thing.top, thing.right - thing.left, thing.bottom - thing.top],
                "area": float(thing.mask.sum()),
                "caption": thing.phrase,
                "attributes": {"color": thing.color, "occluded": False},
            }
            for number, photo, thing in every(made)
        ],
        "categories": [{"id": 7, "name": "traffic_light"}],
    }


def write_coco(folder: Path, made: list[Photo], content: dict | None = None) -> str:
    write_images(folder / "images", made)
    (folder / "instances.json").write_text(json.dumps(coco_content(made) if content is None else content))
    return str(folder / "instances.json")


def labelme_content(photo: Photo) -> dict:
    shapes = [
        {
            "label": thing.category,
            "description": thing.phrase,
            "points": [thing.polygon[i : i + 2] for i in (0, 2, 4, 6)],
            "shape_type": "polygon",
            "group_id": None,
            "flags": {},
        }
        for thing in photo.things
    ]
    return {
        "version": "5.5.0",
        "flags": {},
        "shapes": shapes,
        "imagePath": photo.name,
        "imageData": None,
        "imageHeight": HEIGHT,
        "imageWidth": WIDTH,
    }


def write_labelme(folder: Path, made: list[Photo]) -> str:
    write_images(folder, made)
    for photo in made:
        (folder / photo.name).with_suffix(".json").write_text(json.dumps(labelme_content(photo), indent=2))
    return str(folder)


def cvat_text(made: list[Photo]) -> str:
    lines = ['<?xml version="1.0" encoding="utf-8"?>', "<annotations>", "<version>1.1</version>", "<meta></meta>"]
    for number, photo in enumerate(made):
        lines.append(f'<image id="{number}" name="{photo.name}" width="{WIDTH}" height="{HEIGHT}">')
        for thing in photo.things:
            points = ";".join(f"{x},{y}" for x, y in zip(thing.polygon[::2], thing.polygon[1::2], strict=True))
            lines += [
                f'<polygon label="{thing.category}" occluded="0" points="{points}" z_order="0">',
                f'<attribute name="phrase">{thing.phrase}</attribute>',
                f'<attribute name="color">{thing.color}</attribute>',
                "</polygon>",
            ]
        lines.append("</image>")
    return "\n".join([*lines, "</annotations>\n"])


def write_cvat(folder: Path, made: list[Photo], text: str | None = None) -> str:
    write_images(folder / "images", made)
    (folder / "annotations.xml").write_text(cvat_text(made) if text is None else text)
    return str(folder / "annotations.xml")


def write_masks(folder: Path, made: list[Photo]) -> str:
    """One PNG of numbers for each image."""
    write_images(folder / "images", made)
    (folder / "masks").mkdir()
    for photo in made:
        numbers = np.zeros((HEIGHT, WIDTH), dtype=np.uint8)
        for i, thing in enumerate(photo.things, start=1):
            numbers[thing.mask] = i
        Image.fromarray(numbers).save(folder / "masks" / photo.name)
    rows = [
        {"image": photo.name, "object": i, "phrase": thing.phrase}
        for photo in made
        for i, thing in enumerate(photo.things, start=1)
    ]
    write_table(folder / "phrases.csv", rows)
    return str(folder)


def write_table(path: Path, rows: list[dict]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def write_datasets(folder: Path, made: list[Photo], split: str = "train") -> str:
    write_images(folder / "files", made)
    rows = [
        {
            "image": {"path": photo.name, "bytes": (folder / "files" / photo.name).read_bytes()},
            "mask": Image.fromarray(thing.mask.astype(np.uint8) * 255),
            "text": thing.phrase,
        }
        for photo in made
        for thing in photo.things
    ]
    features = datasets.Features(
        {"image": datasets.Image(), "mask": datasets.Image(), "text": datasets.Value("string")}
    )
    table = datasets.Dataset.from_list(rows, features=features)
    (folder / "data").mkdir(exist_ok=True)
    table.to_parquet(folder / "data" / f"{split}-00000-of-00001.parquet")
    for file in (folder / "files").iterdir():
        file.unlink()
    (folder / "files").rmdir()
    return str(folder)


def prepare(form: str, data: str, output: Path, *options: str) -> dict[str, list[dict]]:
    """The rows that the command makes, by split."""
    main([form, data, "--output", str(output), *options])
    folder = RowFolder(str(output))
    return {split: list(folder.read(split)) for split in folder.splits}


def by_phrase(splits: dict[str, list[dict]]) -> dict[str, np.ndarray]:
    """The mask that each phrase means."""
    return {
        sentence: decode_mask(row["mask"]) for rows in splits.values() for row in rows for sentence in row["sentences"]
    }


def refusal(form: str, data: str, output: Path, *options: str) -> str:
    """What the command says about annotations that it refuses; nothing is left of its work."""
    with pytest.raises(ValueError) as error:
        main([form, data, "--output", str(output), *options])
    assert not output.exists() and not [path for path in output.parent.iterdir() if path.name.startswith(".out")]
    return str(error.value)

"""Masks in image files with a table of phrases: what is understood, and what is refused with the line."""

import re
from pathlib import Path

import numpy as np
import pytest
from own_annotations import (
    HEIGHT,
    WIDTH,
    Photo,
    by_phrase,
    photos,
    prepare,
    refusal,
    write_images,
    write_masks,
    write_table,
)
from PIL import Image

from training.sources.masks import decode_mask


def folder_of(root: Path, pixels: np.ndarray | Image.Image, suffix: str = ".png", **cells: str) -> str:
    """One image with one mask file and one line."""
    write_images(root / "images", [Photo("a.png")])
    (root / "masks").mkdir()
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    image.save(root / "masks" / f"a{suffix}")
    write_table(root / "phrases.csv", [{"image": "a.png", "phrase": "it"} | cells])
    return str(root)


def numbered() -> np.ndarray:
    pixels = np.zeros((HEIGHT, WIDTH), dtype=np.uint8)
    pixels[3:9, 5:20], pixels[20:30, 30:50] = 1, 7
    return pixels


def palette_image() -> Image.Image:
    image = Image.fromarray(numbered()).convert("P")
    image.putdata(numbered().ravel().tolist())
    image.putpalette([0, 0, 0, 255, 0, 0] + [0] * 15 + [0, 255, 0])
    return image


def colours() -> np.ndarray:
    pixels = np.zeros((HEIGHT, WIDTH, 3), dtype=np.uint8)
    pixels[numbered() == 1], pixels[numbered() == 7] = (255, 0, 0), (0, 255, 0)
    return pixels


SEVEN = numbered() == 7
UNDERSTOOD = {
    "0 and 1": (SEVEN.astype(np.uint8), {}),
    "0 and 255": (SEVEN.astype(np.uint8) * 255, {}),
    "0 and 7": (SEVEN.astype(np.uint8) * 7, {}),
    "one bit": (SEVEN, {}),
    "16 bits": (SEVEN.astype(np.uint16) * 65535, {}),
    "grey as colours": (np.repeat(SEVEN[..., None].astype(np.uint8) * 255, 3, axis=2), {}),
    "one colour": (np.where(SEVEN[..., None], np.uint8([9, 200, 30]), np.uint8(0)), {}),
    "transparent": (np.dstack([np.full((HEIGHT, WIDTH, 3), 90, np.uint8), SEVEN.astype(np.uint8) * 255]), {}),
    "a number": (numbered(), {"object": "7"}),
    "a number of a palette": (palette_image(), {"object": "7"}),
    "a colour of a palette": (palette_image(), {"object": "#00ff00"}),
    "a colour": (colours(), {"object": "#00FF00"}),
    "a colour in numbers": (colours(), {"object": "0, 255, 0"}),
}


@pytest.mark.parametrize("name", UNDERSTOOD)
def test_masks_that_are_understood(tmp_path, name):
    pixels, cells = UNDERSTOOD[name]
    ((row,),) = prepare("folder", folder_of(tmp_path / "mine", pixels, **cells), tmp_path / "out").values()
    assert np.array_equal(decode_mask(row["mask"]), SEVEN)


REFUSED = {
    "several numbers": (
        numbered(),
        {},
        r"holds the values 0, 1, 7. Where each is an object, name its number in the column",
    ),
    "several colours": (colours(), {}, r"has the colours #000000, #00ff00, #ff0000: name the object's"),
    "another number": (numbered(), {"object": "3"}, r"no pixel has the value 3; there are 0, 1, 7"),
    "another colour": (colours(), {"object": "#123456"}, r"no pixel has the colour #123456; there are #000000"),
    "a number of colours": (colours(), {"object": "1"}, r"it has colours.*: name the object by its colour"),
    "no object": (numbered(), {"object": "car"}, r"a number or a colour such as #ff8800, got 'car'"),
    "empty": (np.zeros((HEIGHT, WIDTH), np.uint8), {}, r"mask has no pixel and no_target is False"),
    "pixels of nothing": (SEVEN, {"mask": "a.png", "no_target": "1"}, r"mask has pixels and no_target is True"),
    "transposed": (
        SEVEN.T.copy(),
        {},
        r"its mask 40×60 pixels. Height and width look swapped: the mask may be transposed",
    ),
    "resized": (np.kron(SEVEN, np.ones((2, 2), bool)), {}, r"The image looks resized: the mask is 2 times as large"),
    "another size": (SEVEN[:30].copy(), {}, r"a.png is 60×40, its mask 60×30 pixels"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_masks_that_are_refused(tmp_path, name):
    pixels, cells, reason = REFUSED[name]
    said = refusal("folder", folder_of(tmp_path / "mine", pixels, **cells), tmp_path / "out")
    assert re.search(reason, said) and "phrases.csv, line 2" in said, said


def test_grey_masks_are_refused_or_cut_at_half(tmp_path):
    noisy = Image.fromarray(SEVEN.astype(np.uint8) * 255).resize((WIDTH, HEIGHT), Image.Resampling.BILINEAR)
    data = folder_of(tmp_path / "mine", noisy, suffix=".jpg")
    assert "are the grey edge of one object, give --cut_grey" in refusal("folder", data, tmp_path / "out")
    ((row,),) = prepare("folder", data, tmp_path / "out", "--cut_grey").values()
    mask = decode_mask(row["mask"])
    assert (mask & SEVEN).sum() / (mask | SEVEN).sum() > 0.95


def test_a_phrase_may_mean_nothing(tmp_path):
    data = folder_of(tmp_path / "mine", SEVEN)
    rows = [{"image": "a.png", "mask": "a.png", "phrase": "it", "no_target": ""}]
    write_table(
        Path(data) / "phrases.csv", [*rows, {"image": "a.png", "mask": "", "phrase": "the moon", "no_target": "1"}]
    )
    (made,) = prepare("folder", data, tmp_path / "out").values()
    assert [(row["sentences"], row["no_target"]) for row in made] == [(["it"], False), (["the moon"], True)]
    write_table(Path(data) / "phrases.csv", [*rows, {"image": "a.png", "mask": "", "phrase": "It", "no_target": "1"}])
    assert "line 3: the phrase 'it' means nothing in the image, and it means something in" in refusal(
        "folder", data, tmp_path / "out2"
    )
    write_table(Path(data) / "phrases.csv", [*rows, {"image": "a.png", "mask": "", "phrase": "It", "no_target": "no"}])
    assert "line 3: it names no mask" in refusal("folder", data, tmp_path / "out2")


TABLES = {
    "a comma in a phrase": (
        "image,phrase\na.png,left, red one\n",
        r"line 2: it has 3 cells, the first line 2; .*double quotes",
    ),
    "no such image": ("image,phrase\nb.png,it\n", r"line 2: the image .*b.png does not exist"),
    "no image": ("image,phrase\n,it\n", r"line 2: it names no image"),
    "no phrase": (
        "image,phrase\na.png,it\na.png, \n",
        r"line 3: its sentences must be texts, one or more, got \[''|\[' '",
    ),
    "no column": (
        "image,words\na.png,it\n",
        r"phrases.csv has no column that is known to hold the phrases; it has image, words",
    ),
    "one column twice": ("image,phrase,phrase\na.png,it,it\n", r"line 1: two columns have one name"),
    "two splits": (
        "image,phrase,split\na.png,it,train\na.png,x,val\n",
        r"line 3: the image .*a.png has the split 'val'",
    ),
    "two images in one": (
        "image,phrase\nx/a.png,it\ny/a.png,x\n",
        r"line 3: its image y/a.png is the file .*, and so is x/a.png",
    ),
    "empty": ("", r"phrases.csv is empty"),
}


@pytest.mark.parametrize("name", TABLES)
def test_tables_that_are_refused(tmp_path, name):
    text, reason = TABLES[name]
    data = folder_of(tmp_path / "mine", SEVEN)
    (tmp_path / "mine" / "phrases.csv").write_text(text)
    said = refusal("folder", data, tmp_path / "out")
    assert re.search(reason, said), said


@pytest.mark.parametrize(
    "text",
    [
        "\ufeffimage;phrase\r\na.png;left, red one\r\n",
        'image,phrase\na.png,"left, red one"\n\n',
    ],
)
def test_tables_as_spreadsheets_write_them(tmp_path, text):
    data = folder_of(tmp_path / "mine", SEVEN)
    (tmp_path / "mine" / "phrases.csv").write_text(text, encoding="utf-8", newline="")
    assert list(by_phrase(prepare("folder", data, tmp_path / "out"))) == ["left, red one"]
    (tmp_path / "mine" / "phrases.csv").write_text("image,phrase\na.png,Löwe\n", encoding="latin-1")
    assert "phrases.csv is no UTF-8 text" in refusal("folder", data, tmp_path / "out2")


def test_a_mask_belongs_to_one_image(tmp_path):
    data = write_masks(tmp_path / "mine", photos(2))
    write_table(
        tmp_path / "mine" / "phrases.csv",
        [{"image": f"photo{i}.png", "mask": "photo0.png", "object": i + 1, "phrase": f"p{i}"} for i in range(2)],
    )
    assert re.search(
        r"line 3: its mask \S+photo0.png is also that of the image \S+photo0.png",
        refusal("folder", data, tmp_path / "out"),
    )

"""Annotations of one's own become prepared rows: the same from every form, and every mistake is understood or named."""

import base64
import io
import json
import logging
import os
import re

import datasets
import numpy as np
import pytest
from own_annotations import (
    HEIGHT,
    WIDTH,
    Photo,
    Thing,
    by_phrase,
    coco_content,
    cvat_text,
    labelme_content,
    photos,
    prepare,
    refusal,
    write_coco,
    write_cvat,
    write_datasets,
    write_images,
    write_labelme,
    write_masks,
)
from PIL import ExifTags, Image

from training.configuration import DataSettings
from training.examples.batches import image_as_annotated
from training.examples.splits import load_splits
from training.preparation import main
from training.sources.hub_layouts import RowFolder
from training.sources.masks import decode_mask, encode_mask

FORMS = {
    "coco": (write_coco, ["--phrase_field", "caption"]),
    "labelme": (write_labelme, []),
    "cvat": (write_cvat, ["--phrase_field", "phrase"]),
    "folder": (write_masks, []),
    "hub": (write_datasets, []),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_rows(tmp_path, form):
    write, options = FORMS[form]
    made = photos()
    splits = prepare(form, write(tmp_path / "mine", made), tmp_path / "out", *options)
    assert {split: len({row["image_id"] for row in rows}) for split, rows in splits.items()} == {"train": 9, "val": 1}
    found = by_phrase(splits)
    assert len(found) == 20
    for photo in made:
        for thing in photo.things:
            assert np.array_equal(found[thing.phrase], thing.mask), thing
    rows = [row for rows in splits.values() for row in rows]
    for row in rows:
        assert image_as_annotated(row).size == (WIDTH, HEIGHT)
        assert row["image"]["path"] == f"photo{row['sentences'][0][-1]}.png"
    assert len({row["ref_id"] for row in rows}) == 20
    assert len({i for row in rows for i in row["sentence_ids"]}) == 20
    with Image.open(tmp_path / "out" / "examples.png") as sheet:
        assert min(sheet.size) > 500
    text = (tmp_path / "out" / "README.md").read_text()
    assert "| train | 18 | 18 | 9 | 0 |" in text and "9 images for train and 1 images for val" in text
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_the_settings_train_on_what_was_prepared(tmp_path):
    prepare("labelme", write_labelme(tmp_path / "mine", photos()), tmp_path / "out")
    (rows,) = load_splits(DataSettings(source="folder", root=str(tmp_path / "out")), ["train"])
    assert len(rows) == 18


# Splits


def test_the_split_goes_by_the_images_content_alone(tmp_path):
    made = photos()
    first = prepare("labelme", write_labelme(tmp_path / "a", made), tmp_path / "out", "--val_share", "0.3")
    renamed = [Photo(f"x{9 - i}.png", photo.things) for i, photo in enumerate(made)]
    second = prepare("folder", write_masks(tmp_path / "b", renamed), tmp_path / "again", "--val_share", "0.3")
    held_out = [{sentence for row in splits["val"] for sentence in row["sentences"]} for splits in (first, second)]
    assert held_out[0] == held_out[1] and len(held_out[0]) == 6


def test_splits_are_those_that_the_data_name(tmp_path):
    made = photos(4)
    content = coco_content(made)
    for image, split in zip(content["images"], ("Train", "validation", "test", "train"), strict=True):
        image["split"] = split
    rows = prepare("coco", write_coco(tmp_path / "a", made, content), tmp_path / "out", "--template", "{category}")
    assert {split: len(members) for split, members in rows.items()} == {"train": 2, "val": 1, "test": 1}

    text = cvat_text(made).replace('name="photo1.png"', 'name="photo1.png" subset="val"')
    data = write_cvat(tmp_path / "b", made, text)
    said = refusal("cvat", data, tmp_path / "out2", "--phrase_field", "phrase")
    assert "has no split, and other images have one" in said
    (tmp_path / "b" / "annotations.xml").write_text(re.sub(r'(name="photo[023].png")', r'\1 subset="Train"', text))
    assert set(prepare("cvat", data, tmp_path / "out2", "--phrase_field", "phrase")) == {"train", "val"}


def test_a_split_is_named_before_each_source(tmp_path):
    made = photos(6)
    train, val = write_labelme(tmp_path / "a", made[:4]), write_labelme(tmp_path / "b", made[4:])
    main(["labelme", f"train={train}", f"val={val}", "--output", str(tmp_path / "out")])
    folder = RowFolder(str(tmp_path / "out"))
    assert [len(folder.read(split)) for split in ("train", "val")] == [8, 4]
    with pytest.raises(ValueError, match="Name a split for each or for none"):
        main(["labelme", f"train={train}", val, "--output", str(tmp_path / "x")])
    with pytest.raises(ValueError, match="exclude each other"):
        main(["labelme", f"train={train}", "--val_share", "0.2", "--output", str(tmp_path / "x")])


def test_an_image_of_two_splits_is_said(tmp_path, caplog):
    made = photos(4)
    train, val = write_labelme(tmp_path / "a", made), write_labelme(tmp_path / "b", made[:1])
    with caplog.at_level(logging.WARNING):
        main(["labelme", f"train={train}", f"val={val}", "--output", str(tmp_path / "out")])
    assert "1 images stand in two splits" in caplog.text and "photo0.png" in caplog.text


# Phrases


def test_objects_with_one_phrase_are_one_row(tmp_path, caplog):
    made = [
        Photo("a.png", [Thing(0, 0, 9, 9, "the lamp"), Thing(20, 20, 30, 30, "The  Lamp"), Thing(40, 0, 50, 9, "x")])
    ]
    with caplog.at_level(logging.WARNING):
        (rows,) = prepare("labelme", write_labelme(tmp_path / "mine", made), tmp_path / "out").values()
    masks = {row["sentences"][0]: decode_mask(row["mask"]) for row in rows}
    assert list(masks) == ["the lamp", "x"]
    assert np.array_equal(masks["the lamp"], made[0].things[0].mask | made[0].things[1].mask)
    assert len(rows[0]["boxes"]) == 2 and "1 phrases mean several objects" in caplog.text
    assert "There is no split val; training needs both." in caplog.text


def test_phrases_are_made_of_category_and_attributes(tmp_path):
    made = photos(3)
    options = ("--template", "the {color} {category} {occluded}")
    found = by_phrase(prepare("coco", write_coco(tmp_path / "a", made), tmp_path / "out", *options))
    assert set(found) == {"the red traffic light", "the green traffic light"}
    data = write_cvat(tmp_path / "b", made)
    assert set(by_phrase(prepare("cvat", data, tmp_path / "out2", "--template", "{color} light"))) == {
        "red light",
        "green light",
    }
    said = refusal("cvat", data, tmp_path / "out3", "--template", "{colour} light")
    assert "no annotation has the field or attribute 'colour'; they have phrase, color" in said


@pytest.mark.parametrize(("form", "name"), [("coco", "caption"), ("cvat", "phrase")])
def test_phrases_that_nobody_named_are_not_passed_over(tmp_path, form, name):
    said = refusal(form, FORMS[form][0](tmp_path / "mine", photos(2)), tmp_path / "out")
    assert f"its annotations have the field '{name}': use it with --phrase_field {name}" in said


def test_shapes_of_one_group_are_one_object(tmp_path):
    photo = photos(1)[0]
    content = labelme_content(photo)
    for shape in content["shapes"]:
        shape |= {"group_id": 4}
    write_labelme(tmp_path / "mine", [photo])
    (tmp_path / "mine" / "photo0.json").write_text(json.dumps(content))
    ((row,),) = prepare("labelme", str(tmp_path / "mine"), tmp_path / "out").values()
    assert row["sentences"] == ["left thing 0", "right thing 0"]
    assert np.array_equal(decode_mask(row["mask"]), photo.things[0].mask | photo.things[1].mask)


# Shapes


def test_labelmes_shapes(tmp_path):
    write_images(tmp_path / "mine", [photo := Photo("photo0.png")])
    cut = np.zeros((10, 12), dtype=np.uint8)
    cut[2:, 3:] = 1
    shapes = {
        "rectangle": [[20, 15], [2, 3]],
        "circle": [[30, 20], [30, 28]],
        "mask": [[40, 5], [51, 14]],
    }
    content = labelme_content(photo) | {
        "shapes": [
            {"label": kind, "points": points, "shape_type": kind, "mask": encoded(cut) if kind == "mask" else None}
            for kind, points in shapes.items()
        ]
    }
    (tmp_path / "mine" / "photo0.json").write_text(json.dumps(content))
    found = by_phrase(prepare("labelme", str(tmp_path / "mine"), tmp_path / "out"))
    assert np.array_equal(found["rectangle"], Thing(2, 3, 20, 15, "").mask)
    rows, columns = np.mgrid[0:HEIGHT, 0:WIDTH] + 0.5
    disc = (rows - 20) ** 2 + (columns - 30) ** 2 < 64
    assert (found["circle"] & disc).sum() / (found["circle"] | disc).sum() > 0.95
    assert np.array_equal(found["mask"], Thing(43, 7, 52, 15, "").mask)


def encoded(pixels: np.ndarray) -> str:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def test_cvats_shapes(tmp_path):
    shapes = (
        '<box label="box" xtl="2" ytl="3" xbr="20" ybr="15"/>'
        '<box label="turned" xtl="22" ytl="10" xbr="42" ybr="20" rotation="90"/>'
        '<ellipse label="ellipse" cx="30" cy="20" rx="10" ry="5"/>'
        '<mask label="mask" rle="2, 3, 1, 2" left="50" top="30" width="4" height="2"/>'
        '<tag label="night"/>'
    )
    text = cvat_text([Photo("photo0.png")]).replace("</image>", f"{shapes}</image>")
    found = by_phrase(prepare("cvat", write_cvat(tmp_path / "mine", [Photo("photo0.png")], text), tmp_path / "out"))
    assert np.array_equal(found["box"], Thing(2, 3, 20, 15, "").mask)
    assert np.array_equal(found["turned"], Thing(27, 5, 37, 25, "").mask)
    assert found["ellipse"].sum() == pytest.approx(np.pi * 50, rel=0.05)
    mask = np.zeros((HEIGHT, WIDTH), dtype=bool)
    mask[30:32, 50:54] = [[0, 0, 1, 1], [1, 0, 1, 1]]
    assert np.array_equal(found["mask"], mask)


@pytest.mark.parametrize("turn", [30, 90, 200])
def test_cvats_rotation_is_clockwise(tmp_path, turn):
    box = f'<box label="box" xtl="20" ytl="10" xbr="40" ybr="30" rotation="{turn}"/>'
    mark = '<polygon label="ell" points="20,10;40,10;40,12;20,12"/>'  # the upper edge
    text = cvat_text([Photo("photo0.png")]).replace("</image>", f"{box}{mark}</image>")
    found = by_phrase(prepare("cvat", write_cvat(tmp_path / "mine", [Photo("photo0.png")], text), tmp_path / "out"))
    plain = np.zeros((HEIGHT, WIDTH), dtype=np.uint8)
    plain[10:30, 20:40] = 255
    turned = np.asarray(Image.fromarray(plain).rotate(-turn, center=(30, 20))) > 0
    assert (found["box"] & turned).sum() / (found["box"] | turned).sum() > 0.9


# Mistakes in the other forms


def spoil_coco(content: dict, mistake: str) -> None:
    first, second = content["annotations"][:2]
    changes = {
        "an id twice": lambda: first.update(id=2),
        "an image id twice": lambda: content["images"][0].update(id=2),
        "no image": lambda: first.update(image_id=77),
        "no category": lambda: first.update(category_id=8),
        "an empty phrase": lambda: first.update(caption=" "),
        "no phrase": lambda: first.pop("caption"),
        "no file": lambda: content["images"][0].update(file_name="gone.png"),
        "one file twice": lambda: content["images"][0].update(file_name="photo1.png"),
        "sides swapped": lambda: content["images"][0].update(height=WIDTH, width=HEIGHT),
        "x and y swapped": lambda: second.update(segmentation=[[y for pair in pairs(second) for y in pair[::-1]]]),
        "shares": lambda: (first.update(segmentation=[[0.1, 0.1, 0.9, 0.1, 0.9, 0.8]]), first.pop("bbox")),
        "two points": lambda: first.update(segmentation=[[1, 2, 3, 4]]),
        "a wrong box": lambda: first.update(bbox=[1, 2, 3]),
    }
    changes[mistake]()


def pairs(annotation: dict) -> list[list[float]]:
    (polygon,) = annotation["segmentation"]
    return [polygon[i : i + 2] for i in range(0, len(polygon), 2)]


COCO_MISTAKES = {
    "an id twice": r"instances.json: two of the annotations have the id 2",
    "an image id twice": r"instances.json: two of the images have the id 2: file_name 'photo0.png' and file_name 'photo1.png'",
    "no image": r"instances.json, annotation 1: its image 77 is missing in instances.json",
    "no category": r"annotation 1: its category 8 is missing in instances.json",
    "an empty phrase": r"annotation 1: its sentences must be texts, one or more, got \[' '\]",
    "no phrase": r"annotation 1: its sentences must be texts, one or more, got \[\]",
    "no file": r"image 1: the image \S+gone.png does not exist",
    "one file twice": r"image 2: it has the file \S+photo1.png, and so does \S+ image 1",
    "sides swapped": r"image 1: the image \S+ is 60×40, its annotation 40×60 pixels. Height and width look swapped",
    "x and y swapped": r"annotation 2 contradicts itself: its mask has the box .* Its x and y look swapped",
    "shares": r"annotation 1 is malformed: its coordinates all lie between 0 and 1. They look like shares",
    "two points": r"annotation 1 is malformed: the segmentation has no polygon of at least 3 points",
    "a wrong box": r"annotation 1: the bbox must be 4 finite numbers",
}


@pytest.mark.parametrize("mistake", COCO_MISTAKES)
def test_mistakes_in_coco_files_are_named(tmp_path, mistake):
    content = coco_content(made := photos(3))
    spoil_coco(content, mistake)
    said = refusal("coco", write_coco(tmp_path / "mine", made, content), tmp_path / "out", "--phrase_field", "caption")
    assert re.search(COCO_MISTAKES[mistake], said), said


LABELME_MISTAKES = {
    "no JSON": ("{", r"photo0.json is not JSON: .*line 1 column 2"),
    "another file": ({"shapes": 3}, r"photo0.json is no file of labelme's: it must hold a list of shapes"),
    "no image": ({"imagePath": "gone.png"}, r"photo0.json: the image \S+gone.png does not exist"),
    "another image": (
        {"imagePath": "photo1.png"},
        r"photo1.json: it is about \S+photo1.png, and so does \S+photo0.json",
    ),
    "another size": (
        {"imageHeight": 80, "imageWidth": 120},
        r"photo0.json: .* is 60×40, its annotation 120×80 pixels. The image looks",
    ),
    "a line": (
        {"shape_type": "line"},
        r"photo0.json, shape 1: its shape_type 'line' encloses nothing; polygon, rectangle",
    ),
    "a point": ({"points": [[1, 2], [3, 4]]}, r"photo0.json, shape 1 is malformed: .* at least 3 points"),
    "outside": ({"points": [[100, 2], [103, 4], [105, 9]]}, r"photo0.json, shape 1: its mask has no pixel"),
    "no number": (
        {"points": [["1", 2], [3, 4], [5, 6]]},
        r"photo0.json, shape 1: its points must be \[x, y\] in pixels",
    ),
    "no phrase": ({"label": "", "description": ""}, r"photo0.json, shape 1: its sentences must be texts"),
}


@pytest.mark.parametrize("mistake", LABELME_MISTAKES)
def test_mistakes_in_labelme_files_are_named(tmp_path, mistake):
    change, reason = LABELME_MISTAKES[mistake]
    data = write_labelme(tmp_path / "mine", made := photos(2))
    content = labelme_content(made[0])
    if isinstance(change, dict):
        target = content if set(change) & set(content) else content["shapes"][0]
        target.update(change)
    text = change if isinstance(change, str) else json.dumps(content)
    (tmp_path / "mine" / "photo0.json").write_text(text)
    said = refusal("labelme", data, tmp_path / "out")
    assert re.search(reason, said), said


BOMB = '<!DOCTYPE a [<!ENTITY a "ha"><!ENTITY b "&a;&a;&a;&a;">]>\n'
CVAT_MISTAKES = {
    "entities": (
        lambda text: text.replace("<annotations>", f"{BOMB}<annotations>", 1),
        r"line 2: a document type is refused",
    ),
    "no XML": (lambda text: text.replace("</polygon>", "", 1), r"annotations.xml is not XML: mismatched tag: line \d+"),
    "another root": (
        lambda text: text.replace("annotations>", "things>"),
        r"line 2: CVAT's file begins with <annotations>",
    ),
    "video": (lambda text: text.replace("<meta>", "<track></track><meta>"), r'line 4: this is "CVAT for video"'),
    "no image": (lambda text: text.replace("photo0.png", "gone.png"), r"line 5: the image \S+gone.png does not exist"),
    "a line": (lambda text: text.replace("polygon", "polyline"), r"line 6: a polyline encloses nothing"),
    "no points": (lambda text: text.replace(",3;", ";", 1), r"line 6: its points must be x,y in pixels"),
    "no width": (lambda text: text.replace('width="60"', "", 1), r"line 5: its width must be a number, got None"),
    "no phrase": (lambda text: text.replace("left thing 0", ""), r"line 6: its sentences must be texts"),
}


@pytest.mark.parametrize("mistake", CVAT_MISTAKES)
def test_mistakes_in_cvat_files_are_named(tmp_path, mistake):
    spoil, reason = CVAT_MISTAKES[mistake]
    data = write_cvat(tmp_path / "mine", photos(2), spoil(cvat_text(photos(2))))
    said = refusal("cvat", data, tmp_path / "out", "--phrase_field", "phrase")
    assert re.search(reason, said), said


# What is left out, and what is turned


def test_what_cannot_be_used_is_left_out_where_that_is_asked(tmp_path, caplog):
    content = coco_content(made := photos(3))
    spoil_coco(content, "no image")
    data = write_coco(tmp_path / "mine", made, content)
    with caplog.at_level(logging.WARNING):
        rows = prepare("coco", data, tmp_path / "out", "--phrase_field", "caption", "--skip_unusable")
    assert len(by_phrase(rows)) == 5
    assert "1 annotations or images cannot be used and are left out" in caplog.text
    assert "annotation 1: its image 77" in (tmp_path / "out" / "left-out.txt").read_text()


@pytest.mark.parametrize("form", ["coco", "labelme", "cvat", "folder"])
def test_images_without_an_annotation_are_counted(tmp_path, form):
    write, options = FORMS[form]
    made = photos(4)
    made[3].things.clear()
    data = write(tmp_path / "mine", made)
    if form == "labelme":
        (tmp_path / "mine" / "photo3.json").unlink()
    prepare(form, data, tmp_path / "out", *options)
    assert (
        "1 images have no annotation and are left out; the first is photo3.png."
        in (tmp_path / "out" / "README.md").read_text()
    )


@pytest.mark.parametrize("orientation", ["by_source", "stored"])
def test_masks_are_drawn_on_the_upright_image_unless_said_otherwise(tmp_path, orientation):
    """Own photographs on their side: their masks have the size that annotation programs show."""
    photo = photos(1)[0]
    write_labelme(tmp_path / "mine", [photo])
    upright = np.asarray(Image.open(tmp_path / "mine" / "photo0.png"))
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    Image.fromarray(np.rot90(upright)).save(tmp_path / "mine" / "photo0.png", exif=exif)
    if orientation == "stored":
        said = refusal("labelme", str(tmp_path / "mine"), tmp_path / "out", "--orientation", "stored")
        assert "Its orientation tag is 6: data.orientation upright would make them fit." in said
        return
    (rows,) = prepare("labelme", str(tmp_path / "mine"), tmp_path / "out").values()
    assert np.array_equal(np.asarray(image_as_annotated(rows[0])), upright)
    assert "1 images have an orientation tag other than 1" in (tmp_path / "out" / "README.md").read_text()


def test_labelmes_own_copy_of_an_image_is_taken_where_its_file_is_missing(tmp_path):
    write_labelme(tmp_path / "mine", [photo := photos(1)[0]])
    content = labelme_content(photo)
    pixels = np.asarray(Image.open(tmp_path / "mine" / "photo0.png"))
    content |= {"imageData": encoded(pixels), "imagePath": "..\\pictures\\photo0.png"}
    (tmp_path / "mine" / "photo0.json").write_text(json.dumps(content))
    os.remove(tmp_path / "mine" / "photo0.png")
    (rows,) = prepare("labelme", str(tmp_path / "mine"), tmp_path / "out").values()
    assert np.array_equal(np.asarray(image_as_annotated(rows[0])), pixels)
    assert rows[0]["image"]["path"] == "photo0.png"


def test_hub_columns_of_any_name_and_kind(tmp_path):
    photo = photos(1)[0]
    write_images(tmp_path, [photo])
    data = (tmp_path / "photo0.png").read_bytes()
    one, other = (thing.mask for thing in photo.things)
    kinds = {
        "rle": [encode_mask(one), encode_mask(other)],
        "json": [json.dumps(encode_mask(one)), json.dumps(encode_mask(other))],
        "polygons": [[thing.polygon] for thing in photo.things],
        "numbers": [one.astype(np.uint8).tolist(), other.astype(np.uint8).tolist()],
    }
    for kind, masks in kinds.items():
        rows = [
            {
                "picture": {"path": None, "bytes": data},
                "truth": mask,
                "said": {"en": [thing.phrase, f"{thing.phrase}!"]},
            }
            for mask, thing in zip(masks, photo.things, strict=True)
        ]
        datasets.Dataset.from_list(rows).save_to_disk(tmp_path / kind)
        options = ["--image_column", "picture", "--mask_column", "truth", "--text_column", "said.en"]
        (made,) = prepare("hub", str(tmp_path / kind), tmp_path / f"out-{kind}", *options).values()
        assert {row["image_id"] for row in made} == {1}
        assert made[0]["sentences"] == ["left thing 0", "left thing 0!"]
        for row, thing in zip(made, photo.things, strict=True):
            assert np.array_equal(decode_mask(row["mask"]), thing.mask), kind
    said = refusal("hub", str(tmp_path / "rle"), tmp_path / "x")
    assert (
        "no column that is known to hold the image; it has picture, truth, said. Name one with --image_column" in said
    )


def test_what_stands_at_the_output_is_left_alone(tmp_path):
    data = write_labelme(tmp_path / "mine", photos(2))
    with pytest.raises(FileExistsError, match="is there already"):
        main(["labelme", data, "--output", data])

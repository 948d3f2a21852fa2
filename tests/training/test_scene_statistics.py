"""The statistics of the benchmark's scenes agree with the rows of the data sets."""

import PIL.Image
import pytest

from training.scene_statistics import main
from training.sources.scenes.benchmark import COLOR_NAMES, LEVELS, SHAPES, SPLITS, TEXTURES
from training.sources.scenes.dataset import generate_scenes
from training.sources.scenes.semantics import KINDS


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("statistics")
    options = ["--num_scenes", "[6,9]", "--scene_seed", "3", "--scene_size", "80"]
    main([*options, "--output", str(folder / "a.md"), "--sheet", str(folder / "a.png")])
    return folder


def tables(page):
    """Per title the rows of its table, header first."""
    found = {}
    for part in page.split("\n## ")[1:]:
        lines = [line for line in part.splitlines() if line.startswith("|")]
        found[part.splitlines()[0]] = [
            [cell.strip() for cell in line[1:-1].split("|")] for line in lines if "---" not in line
        ]
    return found


def test_the_tables_agree_with_the_rows(written):
    found = tables((written / "a.md").read_text(encoding="utf-8"))
    rows = {
        split: generate_scenes(6 if split == "train" else 9, 3, 80, split=split, scene_set="mixed", no_target=True)
        for split in SPLITS
    }
    numbers = {line[0]: line for line in found["Splits"][1:]}
    for split, split_rows in rows.items():
        absent = sum(len(row["sentences"]) for row in split_rows if row["no_target"])
        assert (numbers[split][1], numbers[split][8]) == (str(len(set(split_rows["image_id"]))), str(absent))
        assert int(numbers[split][4]) >= sum(not absent for absent in split_rows["no_target"])
    for kind, split, sentences, _, words, distinct, vocabulary, new, _ in found["Sentences"][1:]:
        texts, known = (
            [
                text
                for row in rows[name]
                for text, label in zip(row["sentences"], row["sentence_kinds"], strict=True)
                if label.startswith(kind) and not row["no_target"]
            ]
            for name in (split, "train")
        )
        lengths = [len(text.split()) for text in texts]
        assert words == f"{sum(lengths) / len(texts):.1f} ({min(lengths)}–{max(lengths)})"
        vocabularies = [{word for text in group for word in text.split()} for group in (texts, known)]
        counted = len(texts), len(set(texts)), len(vocabularies[0]), len(vocabularies[0] - vocabularies[1])
        assert (int(sentences), int(distinct), int(vocabulary), int(new)) == counted
    for kind in KINDS:
        shares = [float(line[2][:-2]) for line in found["Relations"] if line[0] == kind and not line[1].startswith("(")]
        assert sum(shares) == pytest.approx(100, abs=0.5)
    assert [line[0] for line in found["Levels of difficulty"][1:]] == list(LEVELS)


def test_the_table_of_compositions_follows_the_rule(written):
    header, *lines = tables((written / "a.md").read_text(encoding="utf-8"))["Held-out compositions"]
    assert header[1:] == [*COLOR_NAMES, *TEXTURES] and [line[0] for line in lines] == list(SHAPES)
    for i, (shape, *marks) in enumerate(lines):
        expected = ["tooxoo"[(i - j) % 6].replace("x", "v").replace("o", "·") for j in range(len(COLOR_NAMES))]
        expected += ["·", *("tooxoo"[(i - j) % 6].replace("x", "v").replace("o", "·") for j in (1, 2, 3))]
        if shape in ("ring", "frame", "bar", "arch"):
            expected[-2:] = ["–", "–"]
        assert marks == expected


def test_the_sheet_is_a_small_image(written):
    with PIL.Image.open(written / "a.png") as sheet:
        assert sheet.format == "PNG" and sheet.width > 600
    assert (written / "a.png").stat().st_size < 400_000

"""Figures of results: overlays, and sheets that show every expression above its own images."""

import itertools
import warnings

import datasets
import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox
from PIL import Image
from stand_ins import make_processor, make_rows, tiny_model

from training.examples.batches import image_as_annotated
from training.scoring.figures import draw_report, draw_sheet, evenly_ranked, fit_lines, overlay, sheet_figure
from training.scoring.metric import SentenceScore, summarize


@pytest.fixture(scope="module")
def rows() -> datasets.Dataset:
    return make_rows(3)


@pytest.fixture(scope="module")
def processor():
    return make_processor()


def score(row: int, sentence: int = 0, iou: int = 1) -> SentenceScore:
    return SentenceScore(row, sentence, "any", iou, 4, 4, 0.5)


def asking(rows: datasets.Dataset, texts: list[str]) -> datasets.Dataset:
    """The first rows, each with one given expression."""
    chosen = rows.select(range(len(texts)))
    for name, value in (("sentences", [[text] for text in texts]), ("sentence_kinds", [["any"]] * len(texts))):
        chosen = chosen.remove_columns(name).add_column(name, value)
    return chosen


def test_an_overlay_changes_only_the_masks(rows):
    photograph = image_as_annotated(rows[0]).crop((0, 0, 64, 40))
    masks = [np.zeros((40, 64), bool) for _ in range(3)]
    masks[0][5:15, 5:25] = True
    masks[1][20:38, 40:60] = True  # the third is empty
    before = photograph.tobytes()
    result = np.asarray(overlay(photograph, masks))
    assert photograph.tobytes() == before and result.shape == (40, 64, 3)
    covered = masks[0] | masks[1]
    assert np.array_equal(result[~covered], np.asarray(photograph)[~covered])
    changed = (result != np.asarray(photograph)).any(axis=-1)
    assert changed[covered].mean() > 0.95
    shift = [(result[m].astype(float) - np.asarray(photograph)[m]).mean(axis=0) for m in masks[:2]]
    assert np.abs(shift[0] - shift[1]).max() > 10  # each has its own colour


@pytest.mark.parametrize(("taps", "adapters"), [([4], []), ([1, 2, 3, 4], [0, 1, 2, 3])])
def test_a_sheet_shows_every_expert_of_any_model(rows, processor, tmp_path, taps, adapters):
    model = tiny_model(tap_layers=taps, adapter_layers=adapters)
    path = tmp_path / "new" / "sheet.png"
    draw_sheet(model, processor, rows, [score(row) for row in range(3)], path)
    assert np.asarray(Image.open(path).convert("L")).std() > 5


EXPRESSIONS = [
    "a man in a blue coat standing behind a bench " * 12,
    "the $5_$ note",
    "w" * 400,
    "left zebra",
    r"$\frac{1}{0}$ and ${ $ % # & ~ ^",
    "the second from the left, no, the third, " * 4,
    "zebra",
]


def extents(figure: Figure) -> tuple[dict[str, Bbox], list[list[Bbox]]]:
    """The boxes of the drawn expressions and, per example, of its images."""
    figure.canvas.draw()
    renderer = figure.canvas.get_renderer()
    titles = {text.get_text(): text.get_window_extent(renderer) for text in figure.texts if "“" in text.get_text()}
    drawn = [axis.images[0].get_window_extent(renderer) for axis in figure.axes if axis.images]
    return titles, [drawn[i : i + 3] for i in range(0, len(drawn), 3)]


def overlap(a: Bbox, b: Bbox) -> bool:
    return a.x0 < b.x1 and b.x0 < a.x1 and a.y0 < b.y1 and b.y0 < a.y1


@pytest.mark.filterwarnings("ignore:The expression .* is cut to 77")
def test_every_expression_is_above_its_own_images(rows, processor):
    rows = asking(rows, EXPRESSIONS)
    figure = sheet_figure(tiny_model(), processor, rows, [score(row) for row in range(len(EXPRESSIONS))])
    titles, images = extents(figure)
    assert len(titles) == len(images) == len(EXPRESSIONS)
    for (text, title), own, expression in zip(titles.items(), images, EXPRESSIONS, strict=True):
        shown = text.replace("\n", " ").strip("“” ")
        whole = " ".join(expression.split())
        beginning = shown.rstrip("…").replace(" ", "")
        assert whole.replace(" ", "").startswith(beginning) and len(beginning) >= min(len(whole.replace(" ", "")), 40)
        assert shown == whole or shown.endswith("…")
        assert abs(title.x0 - own[0].x0) < 5
        assert 0 < title.y0 - max(box.y1 for box in own) < 60  # just above them
    boxes = list(titles.values())
    assert not any(overlap(a, b) for a, b in itertools.combinations(boxes, 2))
    assert not any(overlap(title, box) for title in boxes for own in images for box in own)
    renderer = figure.canvas.get_renderer()
    captions = [text.get_window_extent(renderer) for axis in figure.axes for text in axis.texts if text.get_text()]
    assert len(captions) == 2 * len(EXPRESSIONS)
    assert not any(overlap(title, caption) for title in boxes for caption in captions)
    page = figure.bbox
    assert all(page.x0 <= box.x0 and box.x1 <= page.x1 and page.y0 <= box.y0 and box.y1 <= page.y1 for box in boxes)
    short = [text for text in titles if "\n" not in text]
    assert "“the $5_$ note”" in short and "“left zebra”" in short


def test_no_label_of_the_experts_overlaps_an_image(rows, processor):
    figure = sheet_figure(tiny_model(), processor, rows, [score(row) for row in range(3)])
    _, images = extents(figure)
    renderer = figure.canvas.get_renderer()
    bars = [axis for axis in figure.axes if not axis.images]
    labels = [label.get_window_extent(renderer) for axis in bars for label in axis.get_yticklabels()]
    assert len(bars) == 3 and len(labels) == 18
    assert not any(overlap(label, box) for label in labels for own in images for box in own)


@pytest.mark.parametrize("text", [*EXPRESSIONS, "", "a", "two words", "x " * 90])
@pytest.mark.parametrize("max_lines", [1, 2, 3])
def test_lines_fit_and_are_full(text, max_lines):
    width = 30
    fitted = fit_lines(text, width, len, max_lines)
    lines, whole = fitted.split("\n"), " ".join(text.split())
    assert len(lines) <= max_lines and all(len(line) <= width for line in lines)
    assert fitted.count("…") == (1 if fitted.endswith("…") else 0)
    if fitted.endswith("…"):
        assert len(whole) > width * (max_lines - 1) / 2 and len(lines) == max_lines
        assert whole.replace(" ", "").startswith(fitted[:-1].replace("\n", "").replace(" ", ""))
        assert len(lines[-1]) >= width - 1
    else:
        assert fitted.replace("\n", "").replace(" ", "") == whole.replace(" ", "")
    for before, after in itertools.pairwise(lines):  # a line ends only if the next word does not fit
        assert len(before) + 1 + len(after.split(" ")[0]) > width


@pytest.mark.filterwarnings("ignore:The expression .* is cut to 77")
@pytest.mark.parametrize("candidates", [None, {"0.25": 0.1, "0.5": 0.2}])
def test_the_report_takes_any_expression_and_any_number_of_cases(rows, processor, tmp_path, candidates):
    rows = asking(rows, EXPRESSIONS)
    scores = [score(row, iou=row % 5) for row in range(len(EXPRESSIONS))]
    group = {"num_expressions": 7, "mIoU": 0.4, "intervals": {"mIoU": (0.3, 0.6)}}
    record = {
        "model": "$a_b$",
        "split": "val",
        "summary": {"as written": summarize(scores)},
        "slices": {"size": {"small": group}, "wording": {"location": group | {"intervals": {}}}},
        "bootstrap": {"level": 0.95},
        "threshold": {"value": 0.5, "source": "given", "candidates": candidates},
        "tta": "flip" if candidates else None,
        "largest_component": candidates is not None,
    }
    path = tmp_path / "new" / "report.png"
    with warnings.catch_warnings():
        warnings.filterwarnings("error", module="matplotlib")  # matplotlib only warns of text that it cannot draw
        draw_report(tiny_model(), processor, rows, scores, scores, record, path)
    image = Image.open(path)
    assert image.width > 800 and np.asarray(image.convert("L")).std() > 5


def test_examples_are_taken_evenly_from_each_kind():
    scores = [SentenceScore(n, 0, "ab"[n % 2], n, 100, 100, 0.0) for n in range(20)]
    chosen = evenly_ranked(scores, 6)
    assert [score.kind for score in chosen] == ["a"] * 3 + ["b"] * 3
    assert [score.row for score in chosen[:3]] == [2, 10, 16]
    assert [score.row for score in evenly_ranked(scores[::2], 1)] == [10]
    assert len(evenly_ranked(scores[:3], 12)) == 3

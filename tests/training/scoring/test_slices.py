"""Slices, bootstrap intervals and the boundary score equal plain implementations and have the expected properties."""

import math

import datasets
import numpy as np
import pytest
from builders import disc

from training.scoring.boundary import boundary_f_score, dilate, mask_outline
from training.scoring.intervals import bootstrap_intervals
from training.scoring.metric import SentenceScore, score_terms
from training.scoring.slices import length_of, relation_of, size_of, slice_scores, wording_of
from training.sources.masks import encode_mask
from training.sources.refer import REFER_FEATURES

# Boundary


def outline_by_pixel(mask: np.ndarray) -> set[tuple[int, int]]:
    """Mask pixels with a side towards the outside, found pixel by pixel."""
    inside = {tuple(place) for place in np.argwhere(mask).tolist()}
    sides = ((0, 1), (1, 0), (0, -1), (-1, 0))
    return {(r, c) for r, c in inside if any((r + dr, c + dc) not in inside for dr, dc in sides)}


def boundary_f_by_distance(predicted: np.ndarray, truth: np.ndarray) -> float:
    """The boundary F-score from all distances between outline pixels."""
    a, b = (np.array(sorted(outline_by_pixel(mask)), dtype=float).reshape(-1, 2) for mask in (predicted, truth))
    if not len(a) or not len(b):
        return 1.0 if len(a) == len(b) else 0.0
    tolerance = math.ceil(0.008 * math.sqrt(truth.shape[0] ** 2 + truth.shape[1] ** 2))
    distances = np.sqrt(((a[:, None] - b[None]) ** 2).sum(axis=-1))
    precision, recall = (distances.min(axis=1) <= tolerance).mean(), (distances.min(axis=0) <= tolerance).mean()
    return 0.0 if precision + recall == 0 else 2 * precision * recall / (precision + recall)


@pytest.mark.parametrize("seed", range(6))
def test_the_boundary_score_equals_one_from_all_distances(seed):
    rng = np.random.default_rng(seed)
    size = tuple(rng.integers(20, 260, size=2).tolist())
    truth = disc(size, rng.uniform(0, size), rng.uniform(5, 60))
    for change in (truth, np.roll(truth, 2, 1), disc(size, rng.uniform(0, size), 20), rng.random(size) < 0.02):
        for pair in ((change, truth), (truth, change), (change, ~truth)):
            assert boundary_f_score(*pair) == pytest.approx(boundary_f_by_distance(*pair), abs=1e-12)


def test_the_boundary_score_of_empty_and_full_masks():
    empty, full = np.zeros((40, 60), bool), np.ones((40, 60), bool)
    assert boundary_f_score(empty, empty) == boundary_f_score(full, full) == 1.0
    assert boundary_f_score(empty, full) == boundary_f_score(full, empty) == 0.0
    point = empty.copy()
    point[20, 30] = True
    assert boundary_f_score(point, point) == 1.0


def test_a_shift_within_the_tolerance_costs_nothing_and_a_larger_one_does():
    square = np.zeros((300, 400), bool)  # diagonal 500, tolerance 4
    square[100:200, 100:200] = True
    assert boundary_f_score(np.roll(square, 4, axis=1), square) == 1.0
    assert boundary_f_score(np.roll(square, 5, axis=1), square) < 0.6


@pytest.mark.parametrize("radius", [0, 1, 2, 5, 12])
def test_dilation_reaches_exactly_its_radius(radius):
    rng = np.random.default_rng(radius)
    for size in ((1, 1), (9, 4), (30, 41)):
        mask = rng.random(size) < 0.04
        reached = np.zeros(size, bool)
        for row, column in np.argwhere(mask):
            rows, columns = np.mgrid[: size[0], : size[1]]
            reached |= (rows - row) ** 2 + (columns - column) ** 2 <= radius**2
        assert np.array_equal(dilate(mask, radius), reached)


def test_an_outline_equals_one_found_pixel_by_pixel():
    mask = np.random.default_rng(0).random((25, 31)) < 0.7
    assert {tuple(place) for place in np.argwhere(mask_outline(mask)).tolist()} == outline_by_pixel(mask)


# Slices


@pytest.mark.parametrize(
    ("area", "size"),
    [
        *((1, "small"), (1023, "small"), (1024, "medium"), (9215, "medium"), (9216, "large"), (10**6, "large")),
        (0, "no target"),
    ],
)
def test_sizes_are_cocos(area, size):
    assert size_of(area) == size


@pytest.mark.parametrize(
    ("words", "length"),
    [
        *((1, "1-2 words"), (2, "1-2 words"), (3, "3-5 words"), (5, "3-5 words"), (6, "6-10 words")),
        *((10, "6-10 words"), (11, "11 words or more"), (60, "11 words or more")),
    ],
)
def test_lengths_count_words(words, length):
    assert length_of("  ".join(["zebra"] * words)) == length


@pytest.mark.parametrize(
    ("sentence", "wording"),
    [
        ("Left zebra", "location"),
        ("guy on the far right", "location"),
        ("leftmost one", "location"),
        ("second from top", "location"),
        ("zebra drinking", "neither"),
        ("man in red with hat", "neither"),
        ("bright shirt", "neither"),  # has "right" inside a word
        ("cup next to the plate", "relation"),
        ("man in front of the bus", "relation"),
        ("cup left of the plate", "relation"),
        ("the bigger one than the other", "relation"),
        ("left cup behind the plate", "location and relation"),
        ("person in front, left of the tree", "location and relation"),
    ],
)
def test_wordings(sentence, wording):
    assert wording_of(sentence) == wording


@pytest.mark.parametrize(
    ("sentence", "relation"),
    [
        ("the disc closest to the bar left of the moon", "nearest or farthest"),  # the first of several
        ("ring that is farthest away from the star", "nearest or farthest"),
        ("man In Front Of the bus", "in front or behind"),
        ("cross partly hidden by the frame", "in front or behind"),
        ("shape higher than the ring", "above or below"),
        ("cup left of the plate", "left or right of"),
        ("woman holding the umbrella", "another relation"),
        ("front left zebra", "no relation"),
        ("the underwater one", "no relation"),
    ],
)
def test_relations(sentence, relation):
    assert relation_of(sentence) == relation


def rows_of(targets: list[int], sentences: list[list[str]]) -> datasets.Dataset:
    """Rows with the given numbers of targets, on images of 100 × 120 pixels."""
    rows = []
    for n, (count, asked) in enumerate(zip(targets, sentences, strict=True)):
        mask = np.zeros((100, 120), bool)
        mask[:, : 30 * count] = True
        rows.append(
            {
                "image": {"path": None, "bytes": b""},
                "image_id": n // 2,
                "ref_id": n,
                "ann_ids": list(range(count)),
                "no_target": count == 0,
                "category": ["zebra", "cup", ""][n % 3],
                "sentences": asked,
                "sentence_ids": list(range(len(asked))),
                "sentence_kinds": ["any"] * len(asked),
                "mask": encode_mask(mask),
                "boxes": [],
            }
        )
    columns = {name: [row[name] for row in rows] for name in REFER_FEATURES}
    return datasets.Dataset.from_dict(columns, features=REFER_FEATURES)


SENTENCES = [
    ["left zebra", "the zebra that stands behind the other one"],
    ["cup"],
    ["top left", "a b c d e f"],
    ["none"],
]


def scores_of(targets: list[int]) -> list[SentenceScore]:
    return [
        SentenceScore(row, i, "any", 100 * count, 4000, 3000 * count, 0.5)
        for row, (count, group) in enumerate(zip(targets, SENTENCES, strict=True))
        for i in range(len(group))
    ]


def test_every_dimension_holds_every_score_once():
    targets = [1, 2, 1, 0]
    scores = scores_of(targets)
    sliced = slice_scores(rows_of(targets, SENTENCES), scores)
    assert list(sliced) == ["size", "length", "wording", "relation", "targets", "category"]
    for groups in sliced.values():
        held = [score for group in groups.values() for score in group]
        assert sorted(map(id, held)) == sorted(map(id, scores)) and all(groups.values())
    assert list(sliced["targets"]) == ["one target", "several targets", "no target"]
    assert [len(group) for group in sliced["targets"].values()] == [4, 1, 1]
    assert {label: len(group) for label, group in sliced["size"].items()} == {"medium": 5, "no target": 1}
    assert {label: len(group) for label, group in sliced["category"].items()} == {"(none)": 2, "cup": 1, "zebra": 3}
    assert {label: len(group) for label, group in sliced["relation"].items()} == {
        "in front or behind": 1,
        "no relation": 5,
    }
    assert [score.sentence for score in sliced["length"]["6-10 words"]] == [1, 1]


def test_targets_are_a_dimension_only_if_they_differ():
    assert "targets" not in slice_scores(rows_of([1, 1, 1, 1], SENTENCES), scores_of([1, 1, 1, 1]))


# Intervals


def random_scores(seed: int, number: int, no_target: float = 0.0) -> tuple[list[SentenceScore], list[int]]:
    """Scores, and the image of each."""
    rng = np.random.default_rng(seed)
    scores = []
    for n in range(number):
        truth = 0 if rng.random() < no_target else int(rng.integers(1, 1000))
        predicted = 0 if rng.random() < 0.3 else int(rng.integers(0, 1000))
        intersection = int(rng.integers(0, min(truth, predicted) + 1))
        scores.append(SentenceScore(n, 0, "any", intersection, predicted, truth, float(rng.random())))
    return scores, (rng.integers(0, max(number // 3, 1), size=number) * 7 - 5).tolist()


def naive_metrics(scores: list[SentenceScore]) -> dict[str, float | None]:
    """Metrics of a list of scores by plain loops; `None` if there is nothing to count."""
    ious = [s.intersection / s.union if s.union else 1.0 for s in scores]
    unions = sum(s.union for s in scores)
    absent, present = [s for s in scores if s.truth == 0], [s for s in scores if s.truth > 0]
    overall = sum(s.intersection for s in scores) / unions if unions else None
    return {
        "mIoU": sum(ious) / len(ious),
        "gIoU": sum(ious) / len(ious),
        "oIoU": overall,
        "cIoU": overall,
        "Pr@0.5": sum(iou > 0.5 for iou in ious) / len(ious),
        "N-acc": sum(s.predicted == 0 for s in absent) / len(absent) if absent else None,
        "T-acc": sum(s.predicted > 0 for s in present) / len(present) if present else None,
        "boundary_F": sum(s.boundary_f for s in scores) / len(scores),
    }


@pytest.mark.parametrize("no_target", [0.0, 0.15])
def test_intervals_equal_a_plain_loop_over_resampled_images(no_target):
    scores, images = random_scores(3, 14, no_target)
    names = sorted(set(images))
    rng = np.random.default_rng(5)
    values: dict[str, list[float]] = {}
    for _ in range(60):
        resampled = [names[i] for i in rng.integers(len(names), size=len(names))]
        chosen = [s for name in resampled for s, image in zip(scores, images, strict=True) if image == name]
        for metric, value in naive_metrics(chosen).items():
            if value is not None:
                values.setdefault(metric, []).append(value)
    terms = score_terms(scores)
    got = bootstrap_intervals(terms, images, resamples=60, level=0.9, seed=5)
    assert ("N-acc" in got) == (no_target > 0) and got.keys() == terms.keys()
    for metric in got.keys() & values.keys():
        expected = np.quantile(values[metric], [0.05, 0.95])
        assert got[metric] == pytest.approx(tuple(expected), abs=1e-9), metric


def test_intervals_do_not_depend_on_the_size_of_chunks(monkeypatch):
    scores, images = random_scores(0, 60)
    expected = bootstrap_intervals(score_terms(scores), images, resamples=50)
    monkeypatch.setattr("training.scoring.intervals._CHUNK", 3 * len(set(images)))
    assert bootstrap_intervals(score_terms(scores), images, resamples=50) == expected


def test_intervals_contain_the_score_and_are_reproducible():
    scores, images = random_scores(1, 200, 0.2)
    terms = score_terms(scores)
    first, second = (bootstrap_intervals(terms, images) for _ in range(2))
    assert first == second != bootstrap_intervals(terms, images, seed=1)
    for name, (low, high) in first.items():
        numerators, denominators = terms[name]
        assert 0 <= low <= numerators.sum() / denominators.sum() <= high <= 1, name
    narrower = bootstrap_intervals(terms, images, level=0.5)
    assert all(first[name][0] <= low <= high <= first[name][1] for name, (low, high) in narrower.items())


def test_intervals_narrow_with_more_images():
    widths = []
    for number in (60, 960):
        scores, images = random_scores(2, number)
        low, high = bootstrap_intervals(score_terms(scores), images)["mIoU"]
        widths.append(high - low)
    assert 2.5 < widths[0] / widths[1] < 6.5  # 16 times as many: about a quarter as wide


def test_expressions_of_one_image_are_not_independent():
    scores, _ = random_scores(4, 40)
    copies = [s for s in scores for _ in range(10)]
    together = bootstrap_intervals(score_terms(copies), [s.row for s in copies])
    once = bootstrap_intervals(score_terms(scores), [s.row for s in scores])
    for name, ends in once.items():
        assert together[name] == pytest.approx(ends), name


def test_correctly_empty_masks_have_an_interval_of_one_point():
    scores = [SentenceScore(n, 0, "any", 0, 0, 0, 1.0) for n in range(5)]
    intervals = bootstrap_intervals(score_terms(scores), list(range(5)))
    assert all(ends == (1.0, 1.0) for ends in intervals.values()) and "T-acc" not in intervals

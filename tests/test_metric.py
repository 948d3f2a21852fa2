"""The metric: against a count pixel by pixel, in any order, at the edges, and what it refuses."""

from fractions import Fraction

import evaluate
import numpy as np
import pytest

from training.metric import METRIC, SentenceScore, format_table, summarize

THRESHOLDS = (0.5, 0.6, 0.7, 0.8, 0.9)


@pytest.fixture(scope="module")
def metric() -> evaluate.Metric:
    return evaluate.load(str(METRIC), keep_in_memory=True)


def random_masks(seed: int, number: int = 40) -> list[tuple[np.ndarray, np.ndarray]]:
    """Pairs of masks of several sizes, from disjoint to equal, some of them empty."""
    rng = np.random.default_rng(seed)
    pairs = []
    for i in range(number):
        truth = rng.random(rng.integers(1, 9, size=2)) < rng.choice([0.0, 0.3, 0.8])
        flipped = rng.random(truth.shape) < rng.choice([0.0, 0.05, 0.2, 0.6])
        pairs.append((truth ^ flipped if i % 5 else truth, truth))
    return pairs


def count_by_pixel(predicted: np.ndarray, truth: np.ndarray) -> tuple[int, int]:
    """Intersection and union, one pixel after the other."""
    intersection = union = 0
    for p, t in zip(predicted.ravel().tolist(), truth.ravel().tolist(), strict=True):
        intersection += 1 if p and t else 0
        union += 1 if p or t else 0
    return intersection, union


@pytest.mark.parametrize("seed", range(5))
def test_it_equals_a_count_by_pixel(metric, seed):
    counts = [count_by_pixel(*pair) for pair in random_masks(seed)]
    assert any(union == 0 for _, union in counts)  # the empty case is among them
    ious = [Fraction(i, u) if u else Fraction(1) for i, u in counts]
    got = metric.compute(intersections=[i for i, _ in counts], unions=[u for _, u in counts])
    assert set(got) == {"mIoU", "oIoU", "num_expressions", *(f"Pr@{x}" for x in THRESHOLDS)}
    assert got["num_expressions"] == len(counts)
    assert got["mIoU"] == pytest.approx(float(sum(ious) / len(ious)), abs=1e-12)
    assert got["oIoU"] == pytest.approx(
        float(Fraction(sum(i for i, _ in counts), sum(u for _, u in counts))), abs=1e-12
    )
    for x in THRESHOLDS:
        hits = [iou for iou in ious if iou > Fraction(str(x))]
        assert got[f"Pr@{x}"] == pytest.approx(len(hits) / len(ious), abs=1e-12)


@pytest.mark.parametrize("seed", range(5))
def test_order_and_batching_change_nothing_at_all(metric, seed):
    rng = np.random.default_rng(seed)
    unions = rng.integers(1, 100_000, 500)
    intersections = (unions * rng.random(500)).astype(int)
    expected = metric.compute(intersections=intersections, unions=unions)
    for _ in range(6):
        order = rng.permutation(500)
        for part in np.split(order, np.sort(rng.integers(1, 500, 6))):
            if part.size == 1:
                metric.add(intersections=int(intersections[part[0]]), unions=int(unions[part[0]]))
            elif part.size:
                metric.add_batch(intersections=intersections[part], unions=unions[part])
        assert metric.compute() == expected


def test_a_precision_counts_what_is_greater_not_equal(metric):
    got = metric.compute(intersections=[5, 6, 7, 8, 9], unions=[10] * 5)
    assert [got[f"Pr@{x}"] for x in THRESHOLDS] == [0.8, 0.6, 0.4, 0.2, 0.0]


def test_an_empty_union_is_a_perfect_answer_without_weight(metric):
    assert metric.compute(intersections=[0], unions=[0]) == {
        **{"mIoU": 1.0, "oIoU": 1.0, "num_expressions": 1},
        **{f"Pr@{x}": 1.0 for x in THRESHOLDS},
    }
    got = metric.compute(intersections=[0, 1], unions=[0, 4])
    assert got["mIoU"] == 0.625 and got["oIoU"] == 0.25
    assert SentenceScore(0, 0, "all", 0, 0).iou == 1.0


def test_large_counts_do_not_overflow(metric):
    got = metric.compute(intersections=[2**40] * 3, unions=[2**41] * 3)
    assert got["mIoU"] == got["oIoU"] == 0.5


@pytest.mark.parametrize(("intersection", "union"), [(3, 2), (-1, 4), (-2, -1), (1, 0)])
def test_impossible_counts_are_refused_with_their_place(intersection, union):
    with pytest.raises(ValueError, match=f"Expression 1 has intersection {intersection} and union {union}"):
        evaluate.load(str(METRIC), keep_in_memory=True).compute(intersections=[1, intersection], unions=[2, union])


def scores(kinds: list[str], ious: list[tuple[int, int]]) -> list[SentenceScore]:
    return [SentenceScore(row, 0, kind, *iou) for row, (kind, iou) in enumerate(zip(kinds, ious, strict=True))]


def test_summaries_are_over_all_and_per_kind():
    listed = scores(["a", "b", "a", "c"], [(1, 2), (4, 4), (1, 4), (0, 9)])
    summary = summarize(listed)
    assert set(summary) == {"all", "a", "b", "c"}
    assert {name: part["num_expressions"] for name, part in summary.items()} == {"all": 4, "a": 2, "b": 1, "c": 1}
    assert summary["a"]["mIoU"] == 0.375 and summary["a"]["oIoU"] == 2 / 6
    assert summary["all"]["mIoU"] == (0.5 + 1 + 0.25 + 0) / 4 and summary["all"]["oIoU"] == 6 / 19


def test_a_single_kind_is_summarised_once():
    assert set(summarize(scores(["a", "a"], [(1, 2), (2, 2)]))) == {"all"}


def test_the_table_shows_each_group_as_asked_both_ways():
    written = summarize(scores(["a", "b"], [(1, 2), (4, 4)]))
    shuffled = summarize(scores(["a", "b"], [(0, 2), (1, 4)]))
    table = format_table({"as written": written, "shuffled": shuffled})
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    assert len({len(row) for row in cells}) == 1
    assert cells[0][3:] == ["mIoU", "oIoU", "Pr@0.5", "Pr@0.7", "Pr@0.9"]
    body = {(row[0], row[2]): row for row in cells[2:]}
    assert set(body) == {(group, asked) for group in ("all", "a", "b") for asked in ("as written", "shuffled")}
    assert body["all", "as written"][1:] == ["2", "as written", "75.0", "83.3", "50.0", "50.0", "50.0"]
    assert body["b", "shuffled"][1:] == ["1", "shuffled", "25.0", "25.0", "0.0", "0.0", "0.0"]

"""The metric equals a count pixel by pixel, in any order and for extreme counts; impossible counts are refused."""

from fractions import Fraction

import evaluate
import numpy as np
import pytest

from training.scoring.metric import METRIC, SentenceScore, format_table, summarize

THRESHOLDS = (0.5, 0.6, 0.7, 0.8, 0.9)


@pytest.fixture(scope="module")
def metric() -> evaluate.Metric:
    return evaluate.load(str(METRIC), keep_in_memory=True)


def random_masks(seed: int, number: int = 40) -> list[tuple[np.ndarray, np.ndarray]]:
    """Pairs of masks of several sizes, from disjoint to equal; some are empty."""
    rng = np.random.default_rng(seed)
    pairs = []
    for i in range(number):
        truth = rng.random(rng.integers(1, 9, size=2)) < rng.choice([0.0, 0.3, 0.8])
        flipped = rng.random(truth.shape) < rng.choice([0.0, 0.05, 0.2, 0.6])
        pairs.append((truth ^ flipped if i % 5 else truth, truth))
    return pairs


def count_by_pixel(predicted: np.ndarray, truth: np.ndarray) -> tuple[int, int, int]:
    """Intersection, predicted and true area, counted pixel by pixel."""
    pairs = list(zip(predicted.ravel().tolist(), truth.ravel().tolist(), strict=True))
    return sum(p and t for p, t in pairs), sum(p for p, _ in pairs), sum(t for _, t in pairs)


def compute(metric: evaluate.Metric, counts: list[tuple[int, int, int]]) -> dict[str, float]:
    """The metric of counts (intersection, predicted area, true area)."""
    intersections, predicted, truths = zip(*counts, strict=True)
    return metric.compute(intersections=intersections, predicted_areas=predicted, truth_areas=truths)


@pytest.mark.parametrize("seed", range(5))
def test_it_equals_a_count_by_pixel(metric, seed):
    counts = [count_by_pixel(*pair) for pair in random_masks(seed)]
    unions = [p + t - i for i, p, t in counts]
    assert 0 in unions  # the empty case is among them
    ious = [Fraction(i, u) if u else Fraction(1) for (i, _, _), u in zip(counts, unions, strict=True)]
    got = compute(metric, counts)
    generalised = {"gIoU", "cIoU", "N-acc", "T-acc"}
    assert set(got) == {"mIoU", "oIoU", "num_expressions", *(f"Pr@{x}" for x in THRESHOLDS)} | generalised
    assert got["num_expressions"] == len(counts)
    assert got["mIoU"] == pytest.approx(float(sum(ious) / len(ious)), abs=1e-12)
    assert got["oIoU"] == pytest.approx(float(Fraction(sum(i for i, _, _ in counts), sum(unions))), abs=1e-12)
    for x in THRESHOLDS:
        hits = [iou for iou in ious if iou > Fraction(str(x))]
        assert got[f"Pr@{x}"] == pytest.approx(len(hits) / len(ious), abs=1e-12)


@pytest.mark.parametrize("seed", range(5))
def test_expressions_without_a_target_are_scored_as_gres_defines(metric, seed):
    """gIoU, cIoU, N-acc and T-acc step by step as defined, first over the samples without a target, then over the others."""
    pairs = random_masks(seed)
    ious, intersection, union = [], 0, 0
    hits = {"N": 0, "T": 0}
    totals = {"N": 0, "T": 0}
    for predicted, truth in pairs:
        kind = "T" if truth.any() else "N"
        totals[kind] += 1
        hits[kind] += bool(predicted.any()) == bool(truth.any())
        union += int((predicted | truth).sum())
        if kind == "N":
            ious.append(0 if predicted.any() else 1)
        else:
            intersection += int((predicted & truth).sum())
            ious.append(float((predicted & truth).sum() / (predicted | truth).sum()))
    assert min(totals.values()) > 0 and 0 < hits["N"] < totals["N"]
    got = compute(metric, [count_by_pixel(*pair) for pair in pairs])
    expected = {"gIoU": np.mean(ious), "cIoU": intersection / union}
    expected |= {f"{kind}-acc": hits[kind] / totals[kind] for kind in "NT"}
    assert {name: got[name] for name in expected} == pytest.approx(expected, abs=1e-12)


def test_the_generalised_scores_need_expressions_without_a_target(metric):
    assert "gIoU" not in compute(metric, [(1, 2, 3)]) and "N-acc" not in compute(metric, [(1, 2, 3)])
    absent = compute(metric, [(0, 0, 0), (0, 7, 0)])
    assert absent["N-acc"] == absent["gIoU"] == 0.5 and absent["cIoU"] == 0.0 and "T-acc" not in absent


@pytest.mark.parametrize("seed", range(5))
def test_order_and_batches_change_no_bit(metric, seed):
    rng = np.random.default_rng(seed)
    areas = {name: rng.integers(0, 100_000, 500) for name in ("predicted_areas", "truth_areas")}
    areas["truth_areas"][::50] = 0
    smaller = np.minimum(*areas.values())
    counts = areas | {"intersections": (smaller * rng.random(500)).astype(int)}
    expected = metric.compute(**counts)
    for _ in range(6):
        order = rng.permutation(500)
        for part in np.split(order, np.sort(rng.integers(1, 500, 6))):
            if part.size == 1:
                metric.add(**{name: int(values[part[0]]) for name, values in counts.items()})
            elif part.size:
                metric.add_batch(**{name: values[part] for name, values in counts.items()})
        assert metric.compute() == expected


def test_pr_counts_only_a_greater_iou_not_an_equal_one(metric):
    got = compute(metric, [(same, same, 10) for same in (5, 6, 7, 8, 9)])
    assert [got[f"Pr@{x}"] for x in THRESHOLDS] == [0.8, 0.6, 0.4, 0.2, 0.0]


def test_an_empty_union_is_a_perfect_answer_without_weight(metric):
    assert compute(metric, [(0, 0, 0)]) == {
        **dict.fromkeys(("mIoU", "oIoU", "gIoU", "cIoU", "N-acc"), 1.0),
        **{f"Pr@{x}": 1.0 for x in THRESHOLDS},
        "num_expressions": 1,
    }
    got = compute(metric, [(0, 0, 0), (1, 2, 3)])
    assert got["mIoU"] == 0.625 and got["oIoU"] == 0.25
    assert SentenceScore(0, 0, "all", 0, 0, 0, 1.0).iou == 1.0


def test_large_counts_do_not_overflow(metric):
    got = compute(metric, [(2**40, 2**40, 2**41)] * 3)
    assert got["mIoU"] == got["oIoU"] == 0.5


@pytest.mark.parametrize("counts", [(3, 2, 9), (3, 9, 2), (-1, 4, 4), (-2, -1, -1), (1, 0, 0)])
def test_impossible_counts_are_refused_with_their_index(counts):
    metric = evaluate.load(str(METRIC), keep_in_memory=True)
    message = f"Expression 1 has intersection {counts[0]}, predicted area {counts[1]} and true area {counts[2]}"
    with pytest.raises(ValueError, match=message):
        compute(metric, [(1, 2, 2), counts])


def scores(kinds: list[str], counts: list[tuple[int, int]]) -> list[SentenceScore]:
    """Scores with the given intersections and unions. The truth is the union, the prediction the intersection."""
    return [
        SentenceScore(row, 0, kind, intersection, intersection, union, row / 4)
        for row, (kind, (intersection, union)) in enumerate(zip(kinds, counts, strict=True))
    ]


def test_summaries_are_over_all_and_per_kind():
    listed = scores(["a", "b", "a", "c"], [(1, 2), (4, 4), (1, 4), (0, 9)])
    summary = summarize(listed)
    assert set(summary) == {"all", "a", "b", "c"}
    assert {name: part["num_expressions"] for name, part in summary.items()} == {"all": 4, "a": 2, "b": 1, "c": 1}
    assert summary["a"]["mIoU"] == 0.375 and summary["a"]["oIoU"] == 2 / 6
    assert summary["all"]["mIoU"] == (0.5 + 1 + 0.25 + 0) / 4 and summary["all"]["oIoU"] == 6 / 19
    assert summary["all"]["boundary_F"] == 0.375 and summary["a"]["boundary_F"] == 0.25


def test_a_single_kind_is_summarised_once():
    assert set(summarize(scores(["a", "a"], [(1, 2), (2, 2)]))) == {"all"}


def test_no_scores_are_refused():
    with pytest.raises(ValueError, match="no expressions"):
        summarize([])


def cells_of(table: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]


def test_the_table_shows_each_group_with_both_kinds_of_sentences():
    written = summarize(scores(["a", "b"], [(1, 2), (4, 4)]))
    shuffled = summarize(scores(["a", "b"], [(0, 2), (1, 4)]))
    cells = cells_of(format_table({"as written": written, "shuffled": shuffled}))
    assert len({len(row) for row in cells}) == 1
    assert cells[0][3:] == ["mIoU", "oIoU", *(f"Pr@{x}" for x in THRESHOLDS), "boundary_F"]
    body = {(row[0], row[2]): row for row in cells[2:]}
    assert set(body) == {(group, asked) for group in ("all", "a", "b") for asked in ("as written", "shuffled")}
    assert body["all", "as written"][1:] == ["2", "as written", "75.0", "83.3", *["50.0"] * 5, "12.5"]
    assert body["b", "shuffled"][1:] == ["1", "shuffled", "25.0", "25.0", *["0.0"] * 5, "25.0"]


def test_the_table_has_intervals_for_the_first_summary_and_a_dash_for_undefined_values():
    some = summarize([SentenceScore(0, 0, "a", 1, 1, 2, 0.5), SentenceScore(1, 0, "b", 0, 0, 0, 1.0)])
    ends = {group: dict.fromkeys(summary, (0.25, 0.5)) for group, summary in some.items()}
    cells = cells_of(format_table({"as written": some, "shuffled": some}, ends))
    assert cells[0][-5:] == ["gIoU", "cIoU", "N-acc", "T-acc", "boundary_F"]
    rows = {(row[0], row[2]): dict(zip(cells[0], row, strict=True)) for row in cells[2:]}
    assert rows["all", "as written"]["N-acc"] == "100.0 [25.0, 50.0]" and rows["all", "shuffled"]["N-acc"] == "100.0"
    assert rows["a", "as written"]["N-acc"] == "–" and rows["b", "shuffled"]["T-acc"] == "–"

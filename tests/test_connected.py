"""Masks cut down to their most probable connected part."""

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from test_evaluation import counts_of, make_processor, make_rows
from test_mirroring import Lopsided, probabilities_of

from training.batches import picture_as_annotated
from training.connected import most_probable_part
from training.data import decode_mask
from training.evaluation import score_sentences, threshold_curve


class Patchy(Lopsided):
    """A stand-in whose answers fall apart: every other band of columns is refused."""

    def forward(self, **inputs):
        outputs = super().forward(**inputs)
        outputs.logits[..., 1::3] = -9.0
        return outputs


def parts_of(mask: np.ndarray) -> list[set[tuple[int, int]]]:
    """The connected parts of a mask, each found by walking from pixel to neighbouring pixel."""
    left, parts = set(zip(*np.nonzero(mask), strict=True)), []
    while left:
        part, border = set(), [left.pop()]
        while border:
            y, x = border.pop()
            part.add((y, x))
            for neighbour in ((y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)):
                if neighbour in left:
                    left.remove(neighbour)
                    border.append(neighbour)
        parts.append(part)
    return parts


def expected_part(probabilities: np.ndarray, threshold: float) -> np.ndarray:
    mask = probabilities > np.float32(threshold)
    kept = np.zeros_like(mask)
    if parts := parts_of(mask):
        best = max(parts, key=lambda part: sum(float(probabilities[place]) for place in part))
        kept[tuple(zip(*best, strict=True))] = True
    return kept


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.7, 0.999999])
def test_the_part_is_the_one_that_holds_most(threshold):
    probabilities = np.random.default_rng(0).random((23, 31), dtype=np.float32)
    probabilities = np.repeat(np.repeat(probabilities, 2, axis=0), 3, axis=1)
    mask = probabilities > np.float32(threshold)
    kept = most_probable_part(torch.from_numpy(mask), torch.from_numpy(probabilities))
    assert np.array_equal(kept, expected_part(probabilities, threshold))


def test_a_small_sure_part_yields_to_a_large_one_and_corners_do_not_connect():
    probabilities = torch.tensor([[0.9, 0.0, 0.0], [0.0, 0.6, 0.6], [0.0, 0.0, 0.0]])
    kept = most_probable_part(probabilities > 0.5, probabilities)
    assert kept.tolist() == [[False, False, False], [False, True, True], [False, False, False]]


@pytest.fixture(scope="module")
def rows():
    return make_rows(2)


@pytest.fixture(scope="module")
def processor():
    return make_processor()


def test_scores_are_those_of_the_parts(rows, processor):
    options = {"batch_size": 2, "max_expressions": 5, "threshold": 0.45}
    cpu = Accelerator(cpu=True)
    scores = score_sentences(Patchy(), processor, rows, cpu, connected=True, **options)
    for score in scores[::3]:
        row = rows[score.row]
        probabilities, _ = probabilities_of(
            Patchy(), processor, picture_as_annotated(row), row["sentences"][score.sentence]
        )
        kept, truth = expected_part(probabilities, 0.45), decode_mask(row["mask"])
        assert counts_of(score) == ((kept & truth).sum(), kept.sum(), truth.sum())
    whole = score_sentences(Patchy(), processor, rows, cpu, **options)
    fewer = [part.predicted < all_parts.predicted for part, all_parts in zip(scores, whole, strict=True)]
    assert sum(fewer) > len(fewer) / 2


@pytest.mark.parametrize("mirror", [False, True])
def test_a_threshold_is_chosen_for_the_parts(rows, processor, mirror):
    options = {"mirror": mirror, "connected": True, "batch_size": 2, "max_expressions": 5}
    curve = threshold_curve(Patchy(), processor, rows, Accelerator(cpu=True), **options)
    for threshold in (0.3, 0.6):
        scores = score_sentences(Patchy(), processor, rows, Accelerator(cpu=True), threshold=threshold, **options)
        assert np.mean([score.iou for score in scores]) == pytest.approx(curve[threshold], abs=1e-9)

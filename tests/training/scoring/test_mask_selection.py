"""Mask selection: the expected-IoU threshold and the largest connected component."""

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from stand_ins import Lopsided, LopsidedPresence, counts_of, make_processor, make_rows, probabilities_of, swapped

from training.evaluation import score_sentences, threshold_curve
from training.examples.batches import image_as_annotated
from training.scoring.mask_selection import MaskSelection, expected_iou_mask, largest_component
from training.sources.masks import decode_mask


class Patchy(Lopsided):
    """A stand-in whose masks have several components: every other band of columns is empty."""

    def forward(self, **inputs):
        outputs = super().forward(**inputs)
        outputs.logits[..., 1::3] = -9.0
        return outputs


def parts_of(mask: np.ndarray) -> list[set[tuple[int, int]]]:
    """The connected components of a mask, found pixel by neighbouring pixel."""
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


def expected_component(probabilities: np.ndarray, threshold: float) -> np.ndarray:
    mask = probabilities > np.float32(threshold)
    kept = np.zeros_like(mask)
    if parts := parts_of(mask):
        best = max(parts, key=lambda part: sum(float(probabilities[place]) for place in part))
        kept[tuple(zip(*best, strict=True))] = True
    return kept


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.7, 0.999999])
def test_the_component_with_the_largest_sum_is_kept(threshold):
    probabilities = np.random.default_rng(0).random((23, 31), dtype=np.float32)
    probabilities = np.repeat(np.repeat(probabilities, 2, axis=0), 3, axis=1)
    mask = probabilities > np.float32(threshold)
    kept = largest_component(torch.from_numpy(mask), torch.from_numpy(probabilities))
    assert np.array_equal(kept, expected_component(probabilities, threshold))


def test_a_large_component_beats_a_small_sure_one_and_corners_do_not_connect():
    probabilities = torch.tensor([[0.9, 0.0, 0.0], [0.0, 0.6, 0.6], [0.0, 0.0, 0.0]])
    kept = largest_component(probabilities > 0.5, probabilities)
    assert kept.tolist() == [[False, False, False], [False, True, True], [False, False, False]]


@pytest.fixture(scope="module")
def rows():
    return make_rows(2)


@pytest.fixture(scope="module")
def processor():
    return make_processor()


def test_scores_are_those_of_the_largest_component(rows, processor):
    options = {"batch_size": 2, "max_expressions": 5}
    cpu = Accelerator(cpu=True)
    scores = score_sentences(Patchy(), processor, rows, cpu, MaskSelection(0.45, largest_component=True), **options)
    for score in scores[::3]:
        row = rows[score.row]
        probabilities, _ = probabilities_of(
            Patchy(), processor, image_as_annotated(row), row["sentences"][score.sentence]
        )
        kept, truth = expected_component(probabilities, 0.45), decode_mask(row["mask"])
        assert counts_of(score) == ((kept & truth).sum(), kept.sum(), truth.sum())
    whole = score_sentences(Patchy(), processor, rows, cpu, MaskSelection(0.45), **options)
    fewer = [part.predicted < all_parts.predicted for part, all_parts in zip(scores, whole, strict=True)]
    assert sum(fewer) > len(fewer) / 2


@pytest.mark.parametrize("flip", [False, True])
def test_a_threshold_is_chosen_for_the_largest_component(rows, processor, flip):
    options = {"batch_size": 2, "max_expressions": 5}
    cpu = Accelerator(cpu=True)
    curve = threshold_curve(Patchy(), processor, rows, cpu, MaskSelection(flip=flip, largest_component=True), **options)
    for threshold in (0.3, 0.6):
        selection = MaskSelection(threshold, flip=flip, largest_component=True)
        scores = score_sentences(Patchy(), processor, rows, cpu, selection, **options)
        assert np.mean([score.iou for score in scores]) == pytest.approx(curve[threshold], abs=1e-9)


def expected_iou(mask: np.ndarray, probabilities: np.ndarray) -> float:
    """Expected intersection over expected union, in numpy's double precision."""
    probabilities = probabilities.astype(np.float64)
    return probabilities[mask].sum() / (mask.sum() + probabilities[~mask].sum())


def test_no_mask_has_a_larger_expected_iou():
    probabilities = np.random.default_rng(0).random((3, 4), dtype=np.float32) ** 2
    found = expected_iou(expected_iou_mask(torch.from_numpy(probabilities)).numpy(), probabilities)
    every_mask = ((np.arange(1, 2**12)[:, None] >> np.arange(12)) & 1).astype(bool).reshape(-1, 3, 4)
    assert found == pytest.approx(max(expected_iou(mask, probabilities) for mask in every_mask))


@pytest.mark.parametrize("power", [0.3, 1, 4])
def test_the_mask_lies_above_one_threshold_of_at_most_a_half(power):
    probabilities = np.random.default_rng(1).random((40, 50), dtype=np.float32) ** np.float32(power)
    probabilities = probabilities.round(2)  # many are equal
    mask = expected_iou_mask(torch.from_numpy(probabilities)).numpy()
    greatest = expected_iou(mask, probabilities)
    assert np.array_equal(mask, probabilities > greatest / (1 + greatest))
    assert greatest / (1 + greatest) <= 0.5


def test_sure_probabilities_are_the_mask_and_zeros_give_no_mask():
    sure = torch.rand(20, 30) > 0.7
    assert torch.equal(expected_iou_mask(sure.float()), sure)
    assert not expected_iou_mask(torch.zeros(20, 30)).any()
    assert expected_iou_mask(torch.full((2, 2), 0.01)).all()


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("component", [False, True])
def test_scores_are_those_of_the_expected_iou_threshold(rows, processor, flip, component):
    model = LopsidedPresence()
    selection = MaskSelection(expected_iou=True, flip=flip, largest_component=component)
    scores = score_sentences(model, processor, rows, Accelerator(cpu=True), selection, batch_size=2, max_expressions=5)
    found_absent = 0
    for score in scores:
        row = rows[score.row]
        image, sentence = image_as_annotated(row), row["sentences"][score.sentence]
        probabilities, absent = probabilities_of(model, processor, image, sentence)
        if flip:
            there, absent_there = probabilities_of(
                model, processor, Image.fromarray(np.asarray(image)[:, ::-1]), swapped(sentence)
            )
            probabilities, absent = (probabilities + there[:, ::-1]) / 2, (absent + absent_there) / 2
        edges = np.unique(probabilities)
        edge = edges[np.argmax([expected_iou(probabilities >= edge, probabilities) for edge in edges])]
        mask = probabilities >= edge
        if component:
            mask = expected_component(probabilities, np.nextafter(edge, np.float32(0)))
        if absent > 0.5:
            found_absent += 1
            mask[:] = False
        truth = decode_mask(row["mask"])
        assert counts_of(score) == ((mask & truth).sum(), mask.sum(), truth.sum())
    assert 0 < found_absent < len(scores)


def test_a_threshold_together_with_expected_iou_is_refused():
    with pytest.raises(ValueError, match=r"threshold is 0\.4, but expected_iou"):
        MaskSelection(0.4, expected_iou=True)

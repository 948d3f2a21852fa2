"""Test-time augmentation with a horizontal flip."""

import numpy as np
import pytest
from accelerate import Accelerator
from PIL import Image
from stand_ins import (
    Lopsided,
    LopsidedPresence,
    counts_of,
    make_processor,
    make_rows,
    places,
    probabilities_of,
    swapped,
)

from training.evaluation import score_sentences, threshold_curve
from training.examples.batches import image_as_annotated
from training.scoring.mask_selection import MaskSelection
from training.sources.masks import decode_mask


@pytest.fixture(scope="module")
def rows():
    return make_rows(3)


@pytest.fixture(scope="module")
def processor():
    return make_processor()


@pytest.mark.parametrize("model", [Lopsided(), LopsidedPresence()], ids=["masks alone", "with presence"])
@pytest.mark.parametrize("threshold", [None, 0.45])
def test_a_mask_comes_from_the_mean_of_both_answers(rows, processor, model, threshold):
    options = {"batch_size": 2, "max_expressions": 5}
    scores = score_sentences(
        model, processor, rows, Accelerator(cpu=True), MaskSelection(threshold, flip=True), **options
    )
    assert [(score.row, score.sentence, score.kind) for score in scores] == places(rows)
    for score in scores[::2]:
        row = rows[score.row]
        image, sentence = image_as_annotated(row), row["sentences"][score.sentence]
        flipped_image = Image.fromarray(np.asarray(image)[:, ::-1])
        here, absent_here = probabilities_of(model, processor, image, sentence)
        there, absent_there = probabilities_of(model, processor, flipped_image, swapped(sentence))
        truth = decode_mask(row["mask"])
        mask = (here + there[:, ::-1]) / 2 > np.float32(0.5 if threshold is None else threshold)
        if (absent_here + absent_there) / 2 > 0.5:
            mask[:] = False
        assert counts_of(score) == ((mask & truth).sum(), mask.sum(), truth.sum())
        assert (score.no_target or 0) == pytest.approx((absent_here + absent_there) / 2)
    plain = score_sentences(model, processor, rows, Accelerator(cpu=True), MaskSelection(threshold))
    assert sum(one.iou != other.iou for one, other in zip(scores, plain, strict=True)) > len(scores) / 2


def test_a_threshold_is_chosen_for_the_mean(rows, processor):
    curve = threshold_curve(
        Lopsided(), processor, rows, Accelerator(cpu=True), MaskSelection(flip=True), batch_size=2, max_expressions=5
    )
    for threshold in (0.3, 0.6):
        scores = score_sentences(
            Lopsided(), processor, rows, Accelerator(cpu=True), MaskSelection(threshold, flip=True)
        )
        assert np.mean([score.iou for score in scores]) == pytest.approx(curve[threshold], abs=1e-9)

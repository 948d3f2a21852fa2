"""Answers averaged with those about the flipped image."""

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from test_evaluation import Presence, StandIn, counts_of, make_processor, make_rows, places

from training.evaluation import score_sentences, threshold_curve
from training.examples.batches import image_as_annotated
from training.scoring.mask_selection import MaskSelection
from training.sources.masks import decode_mask


class Lopsided(StandIn):
    """A stand-in that sees more at the right, so that a flipped image's answer is not the answer mirrored."""

    def forward(self, **inputs):
        outputs = super().forward(**inputs)
        outputs.logits += torch.linspace(-1, 1, outputs.logits.shape[-1])
        return outputs


class LopsidedPresence(Lopsided, Presence):
    """The same with an opinion on whether the thing meant is there."""


@pytest.fixture(scope="module")
def rows():
    return make_rows(3)


@pytest.fixture(scope="module")
def processor():
    return make_processor()


def probabilities_of(model, processor, image: Image.Image, sentence: str) -> tuple[np.ndarray, float]:
    """What is answered to one sentence asked alone: probabilities (H, W), and that of nothing being meant (or 0)."""
    inputs = processor(images=[image], text=[[sentence]], return_tensors="pt")
    (result,) = processor.post_process_referring_segmentation(model(**inputs), inputs, return_probabilities=True)
    return result["probabilities"].numpy(), result.get("no_target", 0.0)


def swapped(sentence: str) -> str:
    """Left for right and right for left, where the scenes' sentences say them."""
    return sentence.replace("left", "#").replace("right", "left").replace("#", "right")


@pytest.mark.parametrize("model", [Lopsided(), LopsidedPresence()], ids=["masks alone", "with presence"])
@pytest.mark.parametrize("threshold", [None, 0.45])
def test_a_mask_is_that_of_the_mean_of_both_answers(rows, processor, model, threshold):
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

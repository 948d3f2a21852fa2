"""Mask selection in an evaluation: the processor's own, what takes its place, and the mean with the flipped image."""

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from stand_ins import Lopsided, LopsidedPresence, counts_of, make_processor, make_rows, places, swapped

from processing_sera.flip_averaging_sera import average_answers
from training.evaluation import score_sentences, threshold_curve
from training.examples.batches import image_as_annotated
from training.scoring.mask_selection import MaskSelection
from training.sources.masks import decode_mask

OPTIONS = {"batch_size": 2, "max_expressions": 5}
SELECTIONS = {
    "the processor's": MaskSelection(),
    "threshold": MaskSelection(0.45),
    "component": MaskSelection(0.45, keep_largest_component=True),
    "expected IoU": MaskSelection("expected_iou"),
    "both": MaskSelection("expected_iou", keep_largest_component=True),
    "flip": MaskSelection(flip=True),
    "all": MaskSelection("expected_iou", keep_largest_component=True, flip=True),
}


class Patchy(LopsidedPresence):
    """A stand-in whose masks have several components: every third column is empty."""

    def forward(self, **inputs):
        outputs = super().forward(**inputs)
        outputs.logits[..., 1::3] = -9.0
        return outputs


@pytest.fixture(scope="module")
def rows():
    return make_rows(2)


@pytest.fixture(scope="module")
def processor():
    return make_processor()


@pytest.mark.parametrize("selection", SELECTIONS.values(), ids=SELECTIONS)
def test_scores_are_those_of_the_processors_masks(rows, processor, selection):
    """Each sentence is asked alone, and the processor is told what the selection says."""
    model = Patchy()
    scores = score_sentences(model, processor, rows, Accelerator(cpu=True), selection, **OPTIONS)
    assert [(score.row, score.sentence, score.kind) for score in scores] == places(rows)
    for score in scores[::2]:
        row = rows[score.row]
        image, sentence = image_as_annotated(row), row["sentences"][score.sentence]
        inputs = processor(images=[image], text=[[sentence]], return_tensors="pt")
        outputs = dict(model(**inputs))
        if selection.flip:
            there = processor(images=[image], text=[[swapped(sentence)]], return_tensors="pt")
            there["pixel_values"] = there["pixel_values"].flip(-1)
            outputs = average_answers(outputs, dict(model(**there)))
        (result,) = processor.post_process_referring_segmentation(
            outputs,
            inputs,
            0.5 if selection.threshold is None else selection.threshold,
            keep_largest_component=bool(selection.keep_largest_component),
        )
        mask, truth = result["mask"].numpy(), decode_mask(row["mask"])
        assert counts_of(score) == ((mask & truth).sum(), mask.sum(), truth.sum())
        assert (score.score, score.no_target) == (
            pytest.approx(result["score"], abs=1e-6),
            pytest.approx(result["no_target"], abs=1e-6),
        )
    absent = [score.no_target > 0.5 for score in scores]
    assert 0 < sum(absent) < len(scores)
    assert not any(score.predicted for score, is_absent in zip(scores, absent, strict=True) if is_absent)


def test_every_part_of_the_selection_changes_masks(rows, processor):
    scored = {
        name: [
            score.predicted for score in score_sentences(Patchy(), processor, rows, Accelerator(cpu=True), selection)
        ]
        for name, selection in SELECTIONS.items()
    }
    for one, other in (
        ("the processor's", "threshold"),
        ("threshold", "component"),
        ("expected IoU", "both"),
        ("the processor's", "expected IoU"),
        ("the processor's", "flip"),
        ("both", "all"),
    ):
        assert scored[one] != scored[other]


def test_the_processors_own_selection_is_the_default(rows):
    plain, own = make_processor(), make_processor()
    own.mask_threshold, own.keep_largest_component = "expected_iou", True
    cpu = Accelerator(cpu=True)
    asked = score_sentences(Patchy(), plain, rows, cpu, SELECTIONS["both"])
    assert score_sentences(Patchy(), own, rows, cpu) == asked
    assert score_sentences(Patchy(), own, rows, cpu, MaskSelection(0.45)) == score_sentences(
        Patchy(), plain, rows, cpu, SELECTIONS["component"]
    )
    assert MaskSelection(flip=True).completed(own) == SELECTIONS["all"]
    assert MaskSelection(0.3, keep_largest_component=False).completed(own) == MaskSelection(0.3, False)


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("component", [False, True])
def test_a_threshold_is_chosen_for_the_selection(rows, processor, flip, component):
    cpu = Accelerator(cpu=True)
    selection = MaskSelection(keep_largest_component=component, flip=flip)
    curve = threshold_curve(Patchy(), processor, rows, cpu, selection, **OPTIONS)
    for threshold in (0.3, 0.6):
        selection = MaskSelection(threshold, keep_largest_component=component, flip=flip)
        scores = score_sentences(Patchy(), processor, rows, cpu, selection, **OPTIONS)
        assert np.mean([score.iou for score in scores]) == pytest.approx(curve[threshold], abs=1e-9)


def test_a_model_without_presence_is_averaged_too(rows, processor):
    scores = score_sentences(Lopsided(), processor, rows, Accelerator(cpu=True), MaskSelection(flip=True), **OPTIONS)
    assert all(score.no_target is None for score in scores)


def test_the_whole_output_is_that_for_the_unflipped_images(processor):
    row = make_rows(1)[0]
    inputs = processor(images=[image_as_annotated(row)], text=[["left one"]], return_tensors="pt")
    answers, outputs = MaskSelection(flip=True).ask(Lopsided(), processor, inputs, ["left one"])
    assert torch.equal(outputs.logits, Lopsided()(**inputs).logits)
    assert not torch.equal(answers["logits"], outputs.logits)

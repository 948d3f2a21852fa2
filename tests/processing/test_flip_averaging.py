"""Test-time augmentation with a horizontal flip: the words of a flipped image, and the mean of both answers."""

import re
from collections import Counter

import numpy as np
import pytest
import torch
from builders import special_ids
from conftest import REFER_MINI, make_model, needs_refer_mini
from PIL import Image, ImageOps

from processing_sera import ReferringImageSegmentationPipeline, SeraImageProcessor
from processing_sera.flip_averaging_sera import average_answers, swap_left_right
from training.sources.refer import load_refer

# Words of a flipped image


@pytest.mark.parametrize(
    ("sentence", "flipped"),
    [
        ("left zebra", "right zebra"),
        ("the leftmost cup", "the rightmost cup"),
        ("left hand of the man on the right", "right hand of the man on the left"),
        ("lefthand side, rightside", "righthand side, leftside"),
        ("left-most (right)", "right-most (left)"),
        ("cup second from left.", "cup second from right."),
        ("zebra's left's neighbour", "zebra's right's neighbour"),
        ("girl on rights umbrella", "girl on lefts umbrella"),
        ("the leftest dog", "the rightest dog"),
        ("middleright, bottomright", "middleleft, bottomleft"),
        ("mostleft cup", "mostright cup"),
        ("righthanded batter", "lefthanded batter"),
        ("2nd from theleft", "2nd from theright"),
        ("3left", "3right"),
        ("right of the lamp", "left of the lamp"),
        ("the one on the right behind the cup", "the one on the left behind the cup"),
        ("far right next to the wall", "far left next to the wall"),
        ("top-right above the cup", "top-left above the cup"),
        ("right, next to the man", "left, next to the man"),
        ("man looking right near the wall", "man looking left near the wall"),
        ("right out of view", "left out of view"),
        ("top of the bottom one", "top of the bottom one"),
    ],
)
def test_left_and_right_change_places(sentence, flipped):
    assert swap_left_right(sentence) == flipped
    assert swap_left_right(flipped) == sentence


@pytest.mark.parametrize(
    ("sentence", "flipped"),
    [
        ("black luggage bottom lef", "black luggage bottom right"),
        ("rigth zebra", "left zebra"),
        ("lefside", "rightside"),
        ("bottomrigth", "bottomleft"),
    ],
)
def test_misspelt_sides_change_places_too(sentence, flipped):
    assert swap_left_right(sentence) == flipped


@pytest.mark.parametrize(
    "sentence",
    [
        "bright cup on an upright shelf beside the cleft",
        "leftovers, copyright, elefant, straight, slightly, downright",
        "the chair right above the dog",
        "zebra right behind the cup",
        "chick right next to the girl",
        "cup right in front of the bowl",
        "RIGHT Below the lamp",
        "the box that is right side up",
    ],
)
def test_what_is_no_side_stays(sentence):
    assert swap_left_right(sentence) == sentence


@needs_refer_mini
def test_few_sides_of_real_sentences_stay():
    sentences = [text for rows in load_refer(REFER_MINI).values() for group in rows["sentences"] for text in group]
    like_a_side = re.compile(r"[a-z]*(?:lef|rig[ht]|rihg)[a-z]*", re.IGNORECASE)
    words = Counter(word for text in sentences for word in like_a_side.findall(text))
    stay = Counter({word: number for word, number in words.items() if swap_left_right(word) == word})
    other = {word for word in stay if re.fullmatch("b?rights?ly|bright(er|est)?|elefants?|upright", word)}
    assert sum(words.values()) > 900
    assert sum(number for word, number in stay.items() if word not in other) <= 2  # other misspellings, one of each


def test_upper_case_sides_change_too():  # the tokenizer lower-cases, so case itself is free
    assert swap_left_right("Right zebra, LEFT cup, Leftmost").lower() == "left zebra, right cup, rightmost"


# The mean of both answers


def test_the_mean_is_that_of_the_probabilities_on_the_turned_grid():
    generator = torch.Generator().manual_seed(0)
    answer, flipped = (
        {
            "logits": 5 * torch.randn(2, 6, 8, generator=generator),
            "presence_logits": torch.randn(2, generator=generator),
        }
        for _ in range(2)
    )
    averaged = average_answers(answer, flipped)
    probabilities = (answer["logits"].sigmoid() + flipped["logits"].sigmoid().flip(-1)) / 2
    assert torch.allclose(averaged["logits"].sigmoid(), probabilities, atol=1e-6)
    presence = (answer["presence_logits"].sigmoid() + flipped["presence_logits"].sigmoid()) / 2
    assert torch.allclose(averaged["presence_logits"].sigmoid(), presence, atol=1e-6)
    assert set(average_answers({"logits": answer["logits"]}, {"logits": flipped["logits"]})) == {"logits"}


def test_sure_answers_stay_finite():
    sure = torch.tensor([[[200.0, -200.0], [40.0, -40.0]]])
    assert torch.equal(average_answers({"logits": sure}, {"logits": sure.flip(-1)})["logits"], sure)
    mixed = average_answers({"logits": sure}, {"logits": -sure.flip(-1)})["logits"]
    assert torch.allclose(mixed, torch.zeros_like(mixed), atol=1e-4)


@pytest.mark.parametrize("size", [(40, 30), (30, 40), (33, 47)])
def test_the_flipped_inputs_are_those_of_the_flipped_image(processor, size):
    """Up to a pixel of the frame where the padding is odd."""
    processor.image_processor = SeraImageProcessor(size={"height": 56, "width": 56})
    rows, columns = np.mgrid[0 : size[0], 0 : size[1]]
    image = Image.fromarray(np.stack([5 * rows, 5 * columns, rows + columns], -1).astype(np.uint8))
    text = ["left zebra", "the cup"]
    flipped = processor.flipped_inputs(processor(images=[image], text=[text], return_tensors="pt"), text)
    expected = processor(images=[ImageOps.mirror(image)], text=[["right zebra", "the cup"]], return_tensors="pt")
    assert set(flipped) == set(expected)
    for name in ("input_ids", "attention_mask", "image_index", "original_sizes"):
        assert torch.equal(flipped[name], expected[name])
    pairs = [(flipped["pixel_values"].roll(shift, -1), expected["pixel_values"]) for shift in (-1, 0, 1)]
    assert min(float((one - other).abs().max()) for one, other in pairs) < 0.05


@pytest.mark.parametrize("options", [{}, {"batch_size": 2}])
def test_the_pipeline_averages_over_the_flip(processor, image, options):
    tokenizer = processor.tokenizer
    model = make_model(predict_presence=True, text_config={"vocab_size": len(tokenizer), **special_ids(tokenizer)})
    text = ["left zebra", "the right cup"]
    inputs = processor(images=[image], text=[text], return_tensors="pt")
    there = processor(images=[image], text=[["right zebra", "the left cup"]], return_tensors="pt")
    there["pixel_values"] = there["pixel_values"].flip(-1)
    with torch.no_grad():
        answer, flipped = dict(model(**inputs)), dict(model(**there))
    expected = processor.post_process_referring_segmentation(average_answers(answer, flipped), inputs)
    plain = processor.post_process_referring_segmentation(answer, inputs)
    pipe = ReferringImageSegmentationPipeline(model=model, processor=processor, tta="flip")
    given = [{"image": image, "text": text}, {"image": image, "text": text[:1]}]
    for found in pipe(given, **options):
        for result, reference, other in zip(found, expected, plain, strict=False):
            assert result["score"] == pytest.approx(reference["score"], abs=1e-5)
            assert result["no_target"] == pytest.approx(reference["no_target"], abs=1e-5)
            assert result["no_target"] != pytest.approx(other["no_target"], abs=1e-5)
            assert (np.asarray(result["mask"]) == 255 * reference["mask"].numpy()).mean() > 0.999
    with pytest.raises(ValueError, match="tta must be \"flip\" or None, got 'both'"):
        pipe(image, "cup", tta="both")

"""The presence head: there only when configured; trained, saved, batched and used like the rest of the model."""

import numpy as np
import pytest
import torch
from builders import disc, special_ids
from conftest import make_inputs, make_model

from modeling_sera import SeraConfig, SeraForReferringSegmentation
from modeling_sera.loss_sera import mask_segmentation_loss
from modeling_sera.outputs_sera import SeraReferringSegmentationOutput


def is_presence(name: str) -> bool:
    return "presence" in name


def test_without_it_nothing_is_added():
    plain, asked = make_model(), make_model(predict_presence=True)
    added = [name for name in asked.state_dict() if is_presence(name)]
    assert added and set(asked.state_dict()) - set(added) == set(plain.state_dict())
    assert not any(is_presence(name) for name in plain.state_dict())
    outputs = plain(**make_inputs(2), labels=torch.ones(2, 56, 56))
    assert outputs.presence_logits is None and outputs.presence_loss is None
    assert not any(is_presence(name) for name in outputs)


def test_the_mask_logits_are_those_of_the_same_weights_without_it():
    plain, asked = make_model(), make_model(predict_presence=True)
    asked.load_state_dict(plain.state_dict(), strict=False)
    inputs = make_inputs(2, [0, 0, 1])
    with torch.no_grad():
        expected, got = plain(**inputs), asked(**inputs)
    assert torch.equal(got.logits, expected.logits)
    assert got.presence_logits.shape == (3,)


def test_the_loss_is_the_cross_entropy_of_an_empty_label():
    model = make_model(predict_presence=True)
    labels = torch.zeros(3, 56, 56)
    labels[1, 30, 17] = 0.01  # a fraction of a single pixel is still an object
    labels[2] = 1.0
    outputs = model(**make_inputs(2, [0, 0, 1]), labels=labels)
    probability = 1 / (1 + np.exp(-outputs.presence_logits.detach().numpy().astype(np.float64)))
    expected = -(np.log(1 - probability[0]) + np.log(probability[1]) + np.log(probability[2])) / 3
    assert outputs.presence_loss.item() == pytest.approx(expected, abs=1e-6)
    assert outputs.loss.item() == pytest.approx((outputs.mask_loss + outputs.presence_loss).item())
    whole = model.train()(**make_inputs(2, [0, 0, 1]), labels=labels)
    assert whole.loss.item() == pytest.approx((whole.mask_loss + whole.presence_loss + whole.router_aux_loss).item())


@pytest.mark.parametrize("present", [True, False])
def test_every_parameter_of_it_receives_a_gradient(present):
    model = make_model(predict_presence=True).train()
    labels = torch.full((2, 56, 56), float(present))
    model(**make_inputs(2), labels=labels).presence_loss.backward()
    head = {name: parameter for name, parameter in model.named_parameters() if is_presence(name)}
    assert head and all(parameter.grad.abs().max() > 0 for parameter in head.values())


def test_it_is_saved_and_loaded(tmp_path):
    model, inputs = make_model(predict_presence=True), make_inputs(2, [0, 1, 1])
    model.save_pretrained(tmp_path)
    loaded, info = SeraForReferringSegmentation.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()) and loaded.config.predict_presence
    weights = loaded.state_dict()
    assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())
    with torch.no_grad():  # how a product with one column rounds depends on the memory layout of the weights
        assert torch.allclose(loaded(**inputs).presence_logits, model(**inputs).presence_logits, atol=1e-6)


def test_it_does_not_depend_on_the_rest_of_the_batch():
    model, index = make_model(predict_presence=True), [0, 0, 1, 2, 2]
    inputs = make_inputs(3, index)
    with torch.no_grad():
        together = model(**inputs).presence_logits
        for n, image in enumerate(index):
            alone = model(
                pixel_values=inputs["pixel_values"][image : image + 1],
                input_ids=inputs["input_ids"][n : n + 1],
                attention_mask=inputs["attention_mask"][n : n + 1],
            ).presence_logits
            assert torch.allclose(alone, together[n : n + 1], atol=2e-5)
    assert together.std() > 1e-3


def test_a_small_model_learns_who_is_there():
    """Two words and two images: each word names a thing that one image holds and the other does not."""
    torch.manual_seed(0)
    model = SeraForReferringSegmentation(SeraConfig.tiny(predict_presence=True, decoder_dropout=0.0)).train()
    images = torch.zeros(2, 3, 56, 56)
    objects = torch.tensor(np.stack([disc((56, 56), (20, 20), 12), disc((56, 56), (36, 32), 12)]))
    images[0, 0], images[1, 2] = 3.0 * objects[0], 3.0 * objects[1]  # red, blue
    ids = torch.tensor([[998, 1, 999], [998, 2, 999]])
    inputs = {
        "pixel_values": images,
        "input_ids": ids[[0, 1, 0, 1]],
        "image_index": torch.tensor([0, 0, 1, 1]),
    }
    labels = torch.stack([objects[0], torch.zeros(56, 56), torch.zeros(56, 56), objects[1]])
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(80):
        optimizer.zero_grad()
        model(**inputs, labels=labels).loss.backward()
        optimizer.step()
    with torch.no_grad():
        found = model(**inputs).presence_logits.sigmoid()
    assert found[[0, 3]].min() > 0.8 and found[[1, 2]].max() < 0.2


def test_the_dice_loss_of_an_empty_target_falls_with_what_is_predicted():
    config = SeraConfig.tiny(bce_loss_weight=0.0)
    losses = [
        float(mask_segmentation_loss(torch.full((1, 16, 16), value), torch.zeros(1, 64, 64), config))
        for value in (-30.0, -5.0, 0.0, 5.0)
    ]
    assert losses[0] == pytest.approx(0.0, abs=1e-6)  # an empty prediction for an empty target
    assert losses == sorted(losses) and 0.9 < losses[-1] < 1.0
    logits = torch.zeros(1, 16, 16, requires_grad=True)
    mask_segmentation_loss(logits, torch.zeros(1, 64, 64), config).backward()
    assert (logits.grad > 0).all()  # every pixel is pushed down


# Post-processing


@pytest.fixture
def inputs(processor, image):
    return processor(images=[image], text=[["left zebra", "the cup", "right cup"]], return_tensors="pt")


def answers(presence: list[float] | None) -> SeraReferringSegmentationOutput:
    logits = torch.linspace(-2, 6, 3 * 16 * 16).reshape(3, 16, 16)
    return SeraReferringSegmentationOutput(
        logits=logits, presence_logits=None if presence is None else torch.tensor(presence)
    )


def test_a_mask_is_left_empty_where_absence_is_more_likely_than_not(processor, inputs):
    plain = processor.post_process_referring_segmentation(answers(None), inputs)
    assert all("no_target" not in result for result in plain) and plain[1]["mask"].any()
    logits = [3.0, 0.0, -3.0]
    results = processor.post_process_referring_segmentation(answers(logits), inputs)
    for result, reference, logit in zip(results, plain, logits, strict=True):
        assert result["no_target"] == pytest.approx(1 / (1 + np.exp(logit)), abs=1e-6)
        assert result["mask"].shape == reference["mask"].shape and result["mask"].dtype == torch.bool
        if logit < 0:
            assert not result["mask"].any()
        else:  # a probability of one half keeps the mask
            assert torch.equal(result["mask"], reference["mask"]) and result["score"] == reference["score"]
        assert 0 <= result["score"] <= 1


def test_the_no_target_threshold_can_be_moved(processor, inputs):
    strict = processor.post_process_referring_segmentation(answers([3.0, 0.0, -3.0]), inputs, no_target_threshold=0.04)
    lenient = processor.post_process_referring_segmentation(answers([3.0, 0.0, -3.0]), inputs, no_target_threshold=0.96)
    assert not any(result["mask"].any() for result in strict)
    assert all(result["mask"].any() for result in lenient)
    for threshold in (0.0, 1.0, float("nan")):
        with pytest.raises(ValueError, match="no-target threshold must lie between 0 and 1"):
            processor.post_process_referring_segmentation(answers(None), inputs, no_target_threshold=threshold)


def test_dictionaries_are_taken_too(processor, inputs):
    outputs = answers([3.0, 0.0, -3.0])
    expected = processor.post_process_referring_segmentation(outputs, inputs)
    got = processor.post_process_referring_segmentation(dict(outputs), inputs)
    assert [result["no_target"] for result in got] == [result["no_target"] for result in expected]


def test_the_models_own_output_is_taken(processor, image):
    tokenizer = processor.tokenizer
    special = special_ids(tokenizer)
    model = make_model(predict_presence=True, text_config={"vocab_size": len(tokenizer), **special})
    inputs = processor(images=[image], text=[["left zebra", "the cup"]], return_tensors="pt")
    with torch.no_grad():
        outputs = model(**inputs)
    results = processor.post_process_referring_segmentation(outputs, inputs)
    expected = (1 - outputs.presence_logits.sigmoid()).tolist()
    assert [result["no_target"] for result in results] == pytest.approx(expected, abs=1e-6)

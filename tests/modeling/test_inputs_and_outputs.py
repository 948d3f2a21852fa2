"""What the model takes, what it refuses by name, and what it returns."""

import numpy as np
import pytest
import torch
from conftest import make_inputs, make_model

from modeling_sera import SeraForReferringSegmentation, SeraModel


def save_and_load(model: SeraForReferringSegmentation, folder, **options) -> SeraForReferringSegmentation:
    model.save_pretrained(folder)
    return SeraForReferringSegmentation.from_pretrained(folder, **options).eval()


# Inputs


@pytest.mark.parametrize("options", [{}, {"max_expressions": 1}])
@pytest.mark.parametrize(("index", "unused"), [([0, 0, 2], 1), ([1, 1, 1], 0), ([0, 1, 1], 2)])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_an_image_without_an_expression_is_refused(model, options, index, unused, dtype):
    inputs = make_inputs(3, index)
    inputs["image_index"] = inputs["image_index"].to(dtype)
    with pytest.raises(ValueError, match=f"no expression to image {unused} of 3"):
        model(**inputs, **options)


def test_rows_stored_with_the_index_of_their_first_batch_are_refused(model):
    """Such rows, in another batch, would be answered about each other's images."""
    inputs = make_inputs(4)
    rows = [{name: values[i] for name, values in inputs.items()} for i in (1, 3)]
    batch = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    with pytest.raises(ValueError, match="image_index holds 3; there are 2 images"):
        model(**batch)
    batch["image_index"] = torch.tensor([1, 1])
    with pytest.raises(ValueError, match=r"no expression to image 0 of 2.*only in the batch"):
        model(**batch)


def test_every_image_may_have_several_expressions_in_any_order(model):
    with torch.no_grad():
        assert model(**make_inputs(3, [2, 0, 1, 0, 2])).logits.shape == (5, 16, 16)


@pytest.mark.parametrize("name", ["pixel_values", "input_ids", "attention_mask", "image_index", "labels"])
@pytest.mark.parametrize("container", [list, tuple, np.asarray])
def test_a_container_that_is_no_tensor_is_named(model, name, container):
    inputs = make_inputs(2) | {"labels": torch.zeros(2, 56, 56)}
    given = container(inputs[name].numpy())
    with pytest.raises(ValueError, match=f"{name} is a {type(given).__name__}; the model takes torch tensors"):
        model(**(inputs | {name: given}))


# Outputs


@pytest.mark.parametrize("kind", [SeraForReferringSegmentation, SeraModel])
@pytest.mark.parametrize("how", ["argument", "configuration", "loading"])
def test_without_a_dictionary_the_outputs_are_a_tuple(tmp_path, kind, how):
    model, inputs = make_model(), make_inputs(2)
    part = model if kind is SeraForReferringSegmentation else model.model
    with torch.no_grad():
        expected = part(**inputs).to_tuple()
        if how == "argument":
            got = part(**inputs, return_dict=False)
        elif how == "configuration":
            model.config.return_dict = False
            got = part(**inputs)
        else:
            loaded = save_and_load(model, tmp_path, return_dict=False)
            got = (loaded if part is model else loaded.model)(**inputs)
    assert type(got) is tuple and len(got) == len(expected)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True) if isinstance(a, torch.Tensor))
    assert isinstance(part(**inputs, return_dict=True), dict)


def test_towers_configured_to_return_tuples_change_nothing():
    model, inputs = make_model(text_config={"return_dict": False}, vision_config={"return_dict": False}), make_inputs(2)
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, make_model()(**inputs).logits)


@pytest.mark.parametrize("name", ["output_hidden_states", "output_attentions"])
@pytest.mark.parametrize("options", [{}, {"max_expressions": 1}])
def test_outputs_that_do_not_exist_are_refused(tmp_path, name, options):
    model, inputs = make_model(), make_inputs(2) | options
    configured = save_and_load(model, tmp_path, attn_implementation="eager", **{name: True})
    message = f"{name} is True, but SERA does not return them"
    with pytest.raises(ValueError, match=message):
        model(**inputs, **{name: True})
    with pytest.raises(ValueError, match=message):
        configured(**inputs)
    for accepted in (False, None):
        assert model(**inputs, **{name: accepted}).logits is not None
    assert configured(**inputs, **{name: False}).logits is not None


@pytest.mark.parametrize("name", ["output_hidden_states", "output_attentions"])
def test_the_model_without_a_decoder_refuses_them_too(model, name):
    with pytest.raises(ValueError, match=f"{name} is True"):
        model.model(**make_inputs(2), **{name: True})


@pytest.mark.parametrize("options", [{}, {"max_expressions": 1}])
def test_logits_that_are_not_finite_are_refused_with_their_cause(options):
    inputs = make_inputs(2)
    diverged = make_model()
    weight = diverged.decoder.projector.reduce[0].weight
    with torch.no_grad():
        weight[0, 0] = float("nan")
        with pytest.raises(
            ValueError, match=r"2 of 2 expressions are not finite.*'decoder\.projector\.reduce\.0\.weight'"
        ):
            diverged(**inputs, **options)
        inputs["pixel_values"][1, 0, 3, 3] = float("inf")
        with pytest.raises(ValueError, match=r"1 of 2 expressions are not finite.*pixel_values are not finite"):
            make_model()(**inputs, **options)


def test_numbers_that_overflow_are_told_from_weights_that_diverged():
    model = make_model(predict_presence=True)
    with torch.no_grad():
        model.decoder.presence_head.score.bias.fill_(3e38)
        model.decoder.presence_head.score.weight.fill_(1e38)
        with pytest.raises(ValueError, match=r"The weights and the inputs are finite.*torch\.float32"):
            model(**make_inputs(2))


def test_in_training_it_is_the_loss_that_says_so():
    model = make_model().train()
    with torch.no_grad():
        model.decoder.projector.reduce[0].weight.fill_(float("nan"))
    assert not model(**make_inputs(2), labels=torch.ones(2, 56, 56)).loss.isfinite()

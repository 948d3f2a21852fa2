"""What transformers does with every model: predictions of its Trainer, another vocabulary, its classes for segmentation."""

import numpy as np
import pytest
import torch
from conftest import make_inputs, make_model
from transformers import AutoModelForImageSegmentation, AutoModelForUniversalSegmentation, Trainer, TrainingArguments

from modeling_sera import SeraForReferringSegmentation


@pytest.mark.parametrize("predict_presence", [False, True])
def test_predictions_of_the_trainer_hold_no_losses(tmp_path, predict_presence):
    inputs = make_inputs(4)
    rows = [{name: inputs[name][i] for name in inputs if name != "image_index"} for i in range(4)]
    rows = [row | {"labels": torch.ones(56, 56)} for row in rows]
    model = make_model(predict_presence=predict_presence)
    arguments = TrainingArguments(str(tmp_path), per_device_eval_batch_size=2, report_to="none", use_cpu=True)
    found = Trainer(model, arguments).predict(rows)
    with torch.no_grad():
        expected = model(**inputs)
    predictions = found.predictions if predict_presence else (found.predictions,)
    assert len(predictions) == 1 + predict_presence
    assert np.allclose(predictions[0], expected.logits, atol=1e-5)
    if predict_presence:
        assert np.allclose(predictions[1], expected.presence_logits, atol=1e-5)
    assert np.isfinite(found.metrics["test_loss"])


@pytest.mark.parametrize("size", [1010, 1005])
def test_the_vocabulary_can_be_resized_saved_and_loaded(tmp_path, size):
    model, inputs = make_model(), make_inputs(2)
    with torch.no_grad():
        before = model(**inputs).logits
        embedding = model.resize_token_embeddings(size)
        assert embedding is model.get_input_embeddings() and embedding.num_embeddings == size
        assert torch.equal(model(**inputs).logits, before)
        model.save_pretrained(tmp_path)
        loaded = SeraForReferringSegmentation.from_pretrained(tmp_path)
        assert loaded.config.text_config.vocab_size == loaded.model.text_tower.config.vocab_size == size
        inputs["input_ids"][0, 1] = size - 1  # a new token, which is not the end of the text
        assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)
        assert not torch.equal(model(**inputs).logits, before)


def test_a_new_token_that_would_end_the_text_is_refused():
    model = make_model(text_config={"eos_token_id": 2})
    with pytest.raises(ValueError, match=r"text_config\.eos_token_id is 2"):
        model.resize_token_embeddings(1001)
    assert model.config.text_config.vocab_size == model.get_input_embeddings().num_embeddings == 1000
    assert model.resize_token_embeddings(pad_to_multiple_of=64).num_embeddings == 1024  # no new token is meant


@pytest.mark.parametrize("auto_class", [AutoModelForImageSegmentation, AutoModelForUniversalSegmentation])
def test_the_classes_for_segmentation_load_a_saved_folder(tmp_path, auto_class):
    model, inputs = make_model(), make_inputs(2)
    model.save_pretrained(tmp_path)
    loaded = auto_class.from_pretrained(tmp_path)
    assert type(loaded) is SeraForReferringSegmentation
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)

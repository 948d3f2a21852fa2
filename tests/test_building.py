"""Building: a saved SERA goes on at another size and in whole precision, a fresh one fits its tokenizer."""

from dataclasses import replace

import pytest
import torch
from builders import tiny_tokenizer
from test_training import TINY

from modeling_sera import SeraForReferringSegmentation
from processing_sera import SeraProcessor
from training.building import build_model, build_processor
from training.configuration import ModelSettings
from training.files import save_model
from training.scenes import generate_scenes


def test_a_model_goes_on_at_another_picture_size(tmp_path):
    rows = generate_scenes(2, 0, 64)
    settings = replace(
        TINY, data=replace(TINY.data, image_size=(48, 48)), model=ModelSettings(config=TINY.model.config)
    )
    processor = build_processor(settings, rows)
    first = build_model(settings, processor)
    save_model(first, processor, tmp_path / "first")
    for given, expected in (((64, 32), (64, 32)), (None, (48, 48))):
        data = replace(settings.data, image_size=given)
        again = replace(settings, data=data, model=ModelSettings(pretrained=str(tmp_path / "first")))
        processor = build_processor(again, rows)
        model = build_model(again, processor)
        save_model(model, processor, tmp_path / "second")
        size = SeraProcessor.from_pretrained(tmp_path / "second").image_processor.size
        assert (size["height"], size["width"]) == expected
        assert SeraForReferringSegmentation.from_pretrained(tmp_path / "second").config.image_size == max(expected)
        for key, value in first.state_dict().items():
            assert torch.equal(model.state_dict()[key], value), key
    with pytest.raises(ValueError, match=r"\[60, 64\].*multiples of the patch"):
        data = replace(settings.data, image_size=(60, 64))
        again = replace(settings, data=data, model=ModelSettings(pretrained=str(tmp_path / "first")))
        build_model(again, build_processor(again, rows))


def test_a_model_saved_in_half_precision_is_trained_in_whole(tmp_path):
    rows = generate_scenes(2, 0, 64)
    settings = replace(TINY, model=ModelSettings(config=TINY.model.config))
    processor = build_processor(settings, rows)
    save_model(build_model(settings, processor).bfloat16(), processor, tmp_path / "half")
    again = replace(settings, model=ModelSettings(pretrained=str(tmp_path / "half")))
    assert {p.dtype for p in build_model(again, processor).parameters()} == {torch.float32}


def test_a_tokenizer_without_a_length_has_clips(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.model_max_length = int(1e30)  # what transformers sets where nothing is said
    tokenizer.save_pretrained(tmp_path)
    settings = replace(TINY, model=ModelSettings(tokenizer=str(tmp_path), config=TINY.model.config))
    processor = build_processor(settings, generate_scenes(2, 0, 64))
    assert build_model(settings, processor).config.text_config.max_position_embeddings == 77

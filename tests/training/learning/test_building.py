"""Building: a saved SERA goes on at another size and in whole precision, a fresh one fits its tokenizer."""

import json
from dataclasses import replace

import pytest
import torch
from builders import tiny_tokenizer
from runs import SMALL, TEXT, TINY
from safetensors.torch import load_file, save_file
from towers import save_bert, save_dinov3, save_siglip, word_tokenizer

from modeling_sera import SeraForReferringSegmentation
from processing_sera import SeraProcessor
from training.configuration import ModelSettings
from training.learning.building import build_model, build_processor, load_whole
from training.sources.scenes.dataset import generate_scenes
from training.support.files import save_model


def test_a_model_goes_on_at_another_image_size(tmp_path):
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


def test_settings_choose_how_masks_are_selected(tmp_path):
    rows = generate_scenes(2, 0, 64)
    own = {"mask_threshold": "expected_iou", "keep_largest_component": True}
    settings = replace(TINY, model=ModelSettings(config=TINY.model.config, processor=own))
    processor = build_processor(settings, rows)
    save_model(build_model(settings, processor), processor, tmp_path / "first")
    saved = SeraProcessor.from_pretrained(tmp_path / "first")
    assert saved.mask_threshold == "expected_iou" and saved.keep_largest_component
    later = ModelSettings(pretrained=str(tmp_path / "first"), processor={"mask_threshold": 0.4})
    processor = build_processor(replace(settings, model=later), rows)
    assert processor.mask_threshold == 0.4 and processor.keep_largest_component
    with pytest.raises(ValueError, match=r"model\.processor has 'size'"):
        build_processor(replace(settings, model=ModelSettings(processor={"size": 3})), rows)


def test_a_model_saved_in_half_precision_is_trained_in_whole(tmp_path):
    rows = generate_scenes(2, 0, 64)
    settings = replace(TINY, model=ModelSettings(config=TINY.model.config))
    processor = build_processor(settings, rows)
    save_model(build_model(settings, processor).bfloat16(), processor, tmp_path / "half")
    again = replace(settings, model=ModelSettings(pretrained=str(tmp_path / "half")))
    assert {p.dtype for p in build_model(again, processor).parameters()} == {torch.float32}


def test_a_saved_model_gains_parts_that_begin_without_effect(tmp_path):
    rows = generate_scenes(2, 0, 64)
    settings = replace(TINY, model=ModelSettings(config=TINY.model.config))
    processor = build_processor(settings, rows)
    first = build_model(settings, processor)
    for parameter in first.parameters():  # zero starts would hide what is added to them
        parameter.data += 0.02 * torch.randn_like(parameter)
    save_model(first, processor, tmp_path / "first")
    inputs = processor(images=torch.rand(3, 64, 64), text=[[rows[0]["sentences"][0], "a ring"]], return_tensors="pt")

    def go_on(**config):
        return build_model(
            replace(settings, model=ModelSettings(pretrained=str(tmp_path / "first"), config=config)), processor
        )

    gains = {
        "decoder_num_layers": 3,
        "expression_aware_routing": True,
        "predict_presence": True,
        "adapter_layers": [0, 1],
    }
    assert set(first.config.adapter_layers) < {0, 1}
    grown = go_on(**gains)
    assert len(grown.decoder.layers) == 3 and {name: getattr(grown.config, name) for name in gains} == gains
    with torch.no_grad():
        expected, answer = (model.eval()(**inputs) for model in (first, grown))
    assert expected.logits.std() > 0.01
    torch.testing.assert_close(answer.logits, expected.logits)
    before, after = (processor.post_process_referring_segmentation(outputs, inputs) for outputs in (expected, answer))
    assert all(torch.equal(one["mask"], other["mask"]) for one, other in zip(before, after, strict=True))

    # nor do they stay without it: every matrix of a new layer learns, once the last one of its branch has moved
    grown.train()
    for _ in range(2):
        grown.zero_grad()
        outputs = grown(**inputs)
        (outputs.logits.square().mean() + outputs.presence_logits.sum()).backward()
        for parameter in grown.parameters():
            parameter.data -= 0 if parameter.grad is None else 0.1 * parameter.grad
    added = [*grown.decoder.layers[1:].named_parameters()]
    added += [(name, p) for name, p in grown.named_parameters() if "sentence" in name.split(".")[-2]]
    added += grown.decoder.presence_head.named_parameters()
    assert len(added) > 40
    # keys' biases shift all of a query's scores alike
    still = [name for name, p in added if not p.grad.any() and not name.endswith("k_proj.bias")]
    assert not still

    save_model(grown, processor, tmp_path / "second")
    assert SeraForReferringSegmentation.from_pretrained(tmp_path / "second").config.decoder_num_layers == 3


@pytest.mark.parametrize(
    "config, said",
    [
        ({"decoder_layers": 3}, "'decoder_layers'.*decoder_num_layers"),
        ({"vision_config": {}}, "'vision_config'"),
        ({"tap_layers": [0, 1, 2]}, "'tap_layers'"),
        ({"decoder_dim": 16}, "decoder.*do not fit"),
        ({"fusion_experts": False}, "fusions.*do not fit"),
    ],
)
def test_a_saved_model_keeps_all_that_it_has(tmp_path, config, said):
    settings = replace(TINY, model=ModelSettings(config=TINY.model.config))
    processor = build_processor(settings, generate_scenes(2, 0, 64))
    save_model(build_model(settings, processor), processor, tmp_path / "first")
    again = replace(settings, model=ModelSettings(pretrained=str(tmp_path / "first"), config=config))
    with pytest.raises(ValueError, match=said):
        build_model(again, processor)


def test_weights_that_a_saved_model_lacks_are_not_made_up(tmp_path):
    settings = replace(TINY, model=ModelSettings(config=TINY.model.config))
    processor = build_processor(settings, generate_scenes(2, 0, 64))
    save_model(build_model(settings, processor), processor, tmp_path)
    file, gone = tmp_path / "model.safetensors", "decoder.projector.predict_kernel.weight"
    save_file({name: tensor for name, tensor in load_file(file).items() if name != gone}, file, {"format": "pt"})
    for config in ({}, {"decoder_num_layers": 3}):
        with pytest.raises(ValueError, match=gone):
            build_model(replace(settings, model=ModelSettings(pretrained=str(tmp_path), config=config)), processor)
    with pytest.raises(ValueError, match=gone):
        load_whole(tmp_path)


def test_a_tokenizer_without_a_length_has_clips(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.model_max_length = int(1e30)  # what transformers sets where nothing is said
    tokenizer.save_pretrained(tmp_path)
    settings = replace(TINY, model=ModelSettings(tokenizer=str(tmp_path), config=TINY.model.config))
    processor = build_processor(settings, generate_scenes(2, 0, 64))
    assert build_model(settings, processor).config.text_config.max_position_embeddings == 77


@pytest.mark.parametrize("text", ["siglip", "bert"])
def test_towers_of_other_families_are_built_with_a_processor_that_fits(tmp_path, text):
    save_dinov3(tmp_path / "vision")
    save_siglip(tmp_path / "text") if text == "siglip" else save_bert(tmp_path / "text")
    model = ModelSettings(vision_model=str(tmp_path / "vision"), text_model=str(tmp_path / "text"), config=dict(SMALL))
    settings = replace(TINY, model=model, data=replace(TINY.data, image_size=(48, 64)))
    processor = build_processor(settings, generate_scenes(2, 0, 64))
    built = build_model(settings, processor)
    save_model(built, processor, tmp_path / "sera")
    loaded, again = load_whole(tmp_path / "sera")
    described = json.loads((tmp_path / "sera" / "processor_config.json").read_text())
    assert described["image_processor"]["patch_size"] == again.image_processor.patch_size == 16
    assert described["text_padding"] == ("max_length" if text == "siglip" else "longest")
    assert again.max_tokens == {"siglip": 16, "bert": 24}[text]  # the tower's, where the tokenizer's is larger
    inputs = again(images=torch.rand(3, 50, 60), text=[["left zebra", "a cup"]], return_tensors="pt")
    assert inputs["input_ids"].shape == ((2, 16) if text == "siglip" else (2, 3))
    with torch.inference_mode():
        assert torch.equal(loaded(**inputs).logits, built.eval()(**inputs).logits)

    sized = replace(settings, data=replace(settings.data, image_size=(48, 56)))
    with pytest.raises(ValueError, match=r"\[48, 56\].*multiples of the patch, 16"):
        build_model(sized, build_processor(sized, generate_scenes(2, 0, 64)))
    other = replace(settings, model=replace(model, tokenizer=str(tmp_path / "clip")))
    tiny_tokenizer().save_pretrained(tmp_path / "clip")
    with pytest.raises(ValueError, match=r"tokenizer has \d+ tokens.*knows 309"):
        build_model(other, build_processor(other, generate_scenes(2, 0, 64)))


def test_a_new_tower_of_another_family_takes_its_tokenizer(tmp_path):
    tokenizer = word_tokenizer(is_siglip=True, model_max_length=int(1e30))
    tokenizer.save_pretrained(tmp_path)
    text = TEXT | {"model_type": "siglip_text_model", "max_position_embeddings": 12}
    config = TINY.model.config | {"text_config": text}
    settings = replace(TINY, model=ModelSettings(tokenizer=str(tmp_path), config=config))
    processor = build_processor(settings, generate_scenes(2, 0, 64))
    built = build_model(settings, processor)
    assert processor.max_tokens == built.model.text_family.fixed_length == 12
    assert built.config.text_config.vocab_size == len(tokenizer) and built.config.text_config.pad_token_id == 0

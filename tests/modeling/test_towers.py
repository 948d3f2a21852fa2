"""Towers of every family: what SERA reads of them, training, saving, loading from checkpoints, and what is refused."""

import copy

import pytest
import torch
from conftest import REPOSITORY, make_model
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from towers import save_bert, save_dinov3, save_siglip, text_values, tokenizer_for

from modeling_sera import SeraConfig, SeraForReferringSegmentation
from modeling_sera.layers_sera import SeraSampleStatistics
from modeling_sera.text_towers_sera import TEXT_FAMILIES
from modeling_sera.vision_towers_sera import VISION_FAMILIES
from processing_sera import SeraImageProcessor, SeraProcessor
from training.export import sample_inputs
from training.learning.tuning import apply_tuning, checkpoint_activations
from training.support.files import save_model

CHECKPOINT = REPOSITORY / "checkpoints" / "sera-scenes"
SMALL = {"adapter_dim": 16, "adapter_num_heads": 4, "fusion_dim": 16, "fusion_num_heads": 4, "router_hidden_dim": 8}
SMALL |= {"decoder_dim": 32, "decoder_num_layers": 1, "decoder_num_heads": 4, "decoder_ffn_dim": 32, "image_size": 64}
PAIRS = [("dinov3_vit", text) for text in TEXT_FAMILIES]
PAIRS += [(vision, "siglip_text_model") for vision in VISION_FAMILIES if vision != "dinov3_vit"]
EXPRESSIONS = [["left zebra", "the cup"], ["a zebra right"]]

every_pair = pytest.mark.parametrize(("vision", "text"), PAIRS)


def tiny(vision: str, text: str, **overrides) -> SeraForReferringSegmentation:
    vision_config = {"model_type": vision, "patch_size": 16, "image_size": 64}
    return make_model(vision_config=vision_config, text_config=text_values(text), image_size=64, **overrides)


def processor_for(text: str) -> SeraProcessor:
    return SeraProcessor(SeraImageProcessor(size={"height": 48, "width": 64}), tokenizer_for(text))


def inputs_for(text: str) -> dict[str, torch.Tensor]:
    images = [Image.new("RGB", (40, 30), colour) for colour in ("red", "blue")]
    return dict(processor_for(text)(images=images, text=EXPRESSIONS, return_tensors="pt"))


def assert_same(found: nn.Module, expected: nn.Module) -> None:
    weights, others = found.state_dict(), expected.state_dict()
    assert [name for name in weights if not torch.equal(weights[name], others[name])] == []
    assert {name for name in others if name not in weights} <= {"pooler.dense.weight", "pooler.dense.bias"}


# The towers of before


def test_the_checkpoint_gives_what_it_gave_before_there_was_an_interface(tmp_path):
    """Recorded with the code that reached into DINOv2. On the machine of the record all bits were the same."""
    model, info = SeraForReferringSegmentation.from_pretrained(CHECKPOINT, output_loading_info=True)
    assert not any(info.values())
    model.save_pretrained(tmp_path)
    with (
        safe_open(CHECKPOINT / "model.safetensors", "pt") as before,
        safe_open(tmp_path / "model.safetensors", "pt") as now,
    ):
        assert set(now.keys()) == set(before.keys())
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randn(2, 3, 64, 64, generator=generator)
    ids = torch.randint(0, 817, (4, 9), generator=generator)
    mask = torch.ones_like(ids)
    for row in range(4):
        ids[row, 8 - row :], mask[row, 9 - row :] = 819, 0
    recorded = load_file(REPOSITORY / "tests" / "modeling" / "sera_scenes_before.safetensors")
    with torch.inference_mode():
        logits = model(pixels, ids, mask, image_index=torch.tensor([0, 0, 1, 1])).logits
        states = model.model.vision.encode_states(pixels)
    assert (logits - recorded["logits"]).abs().max() < 1e-4 * recorded["logits"].abs().max()
    assert (states[:, :, ::9] - recorded["states"]).abs().max() < 1e-4 * recorded["states"].abs().max()


# Every family


@every_pair
def test_forward_training_and_freezing(vision, text):
    model, inputs = tiny(vision, text), inputs_for(text)
    with torch.inference_mode():
        logits = model(**inputs).logits
    assert logits.shape == (3, 12, 16) and logits.isfinite().all()
    assert not torch.equal(logits[0], logits[1])  # two expressions about one image
    model.train()
    for mode in ("full", "norm_bias"):
        apply_tuning(model, vision=mode, text=mode)
        model.zero_grad()
        model(**inputs, labels=torch.rand(3, 48, 64)).loss.backward()
        assert [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None] == []
    for tower in (model.model.vision.tower, model.model.text_tower):
        norms = {f"{place}.weight" for place, module in tower.named_modules() if isinstance(module, nn.LayerNorm)}
        trained = {name for name, p in tower.named_parameters() if p.requires_grad}
        assert trained == norms | {name for name, _ in tower.named_parameters() if name.endswith("bias")}


@every_pair
def test_saving_and_loading_with_the_processor(vision, text, tmp_path):
    model, processor = tiny(vision, text), processor_for(text)
    save_model(model, processor, tmp_path)
    loaded, info = SeraForReferringSegmentation.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    again = SeraProcessor.from_pretrained(tmp_path)
    assert again.text_padding == processor.text_padding and again.max_tokens == processor.max_tokens
    images = [Image.new("RGB", (40, 30), "red")] * 2
    inputs, others = (one(images=images, text=EXPRESSIONS, return_tensors="pt") for one in (processor, again))
    assert torch.equal(inputs["input_ids"], others["input_ids"])
    with torch.inference_mode():
        assert torch.equal(loaded.eval()(**others).logits, model(**inputs).logits)


@pytest.mark.parametrize("vision", VISION_FAMILIES)
def test_a_fresh_sera_taps_the_bare_towers_features(vision):
    config = {"model_type": vision, "patch_size": 16, "image_size": 64}
    model = SeraForReferringSegmentation(SeraConfig.tiny(vision_config=config, image_size=64)).eval()
    encoder, tapped = model.model.vision, []
    for fusion in model.model.fusions:
        fusion.project.register_forward_pre_hook(lambda module, args: tapped.append(args[0]))
    pixels = torch.randn(2, 3, 32, 80, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        bare = encoder.tower(pixels, output_hidden_states=True)
        model(pixels, torch.tensor([[998, 5, 999], [998, 7, 999]]))
    expected = [bare.hidden_states[depth] for depth in model.config.tap_layers[:-1]] + [bare.last_hidden_state]
    for found, states in zip(tapped, expected, strict=True):
        assert torch.equal(found, states[:, encoder.num_prefix :])


# What each family needs


@pytest.mark.parametrize("training", [False, True])
def test_cached_states_of_a_dinov3_stand_for_the_images(training):
    """Also in training: no random scale of the rotary positions, which DINOv3's configuration asks for."""
    model = tiny("dinov3_vit", "bert", router_noise_std=0.0, decoder_dropout=0.0)
    assert model.config.vision_config.pos_embed_rescale == 2.0
    inputs = inputs_for("bert")
    with torch.no_grad():
        states = model.model.vision.encode_states(inputs["pixel_values"])
        model.train(training)
        model.model.text_tower.eval()  # BERT's dropout
        for module in model.modules():
            if isinstance(module, SeraSampleStatistics):
                module.is_kept = True
        expected = model(**inputs).logits
        blank = inputs | {"pixel_values": torch.zeros_like(inputs["pixel_values"])}
        assert torch.equal(model(**blank, image_states=states).logits, expected)


def test_image_features_of_a_dinov3_stand_for_the_images():
    """The rotary positions of the blocks after them are those of the images' size."""
    model, inputs = tiny("dinov3_vit", "bert"), inputs_for("bert")
    text = {name: value for name, value in inputs.items() if name != "pixel_values"}
    with torch.no_grad():
        features = model.get_image_features(inputs["pixel_values"])
        assert torch.equal(model(image_features=features, **text).logits, model(**inputs).logits)


def test_activation_checkpointing_keeps_a_dinov3s_gradients():
    inputs, gradients = inputs_for("siglip_text_model"), []
    for checkpointed in (False, True):
        model = tiny("dinov3_vit", "siglip_text_model").train()
        if checkpointed:
            checkpoint_activations(model)
        torch.manual_seed(0)
        model(**inputs, labels=torch.ones(3, 48, 64)).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


def test_siglip_reads_its_padding_and_sera_does_not():
    model, inputs = tiny("dinov2", "siglip_text_model"), inputs_for("siglip_text_model")
    assert inputs["input_ids"].shape == (3, 16) and inputs["attention_mask"].sum(1).tolist() == [3, 3, 4]
    with torch.inference_mode():
        states, sentence = model.model.encode_text(inputs["input_ids"], inputs["attention_mask"])
        whole = model.model.text_tower(inputs["input_ids"])
        assert torch.equal(states, whole.last_hidden_state)
        assert torch.equal(sentence, model.model.text_projection(whole.pooler_output))
        assert not torch.equal(model(**inputs | {"attention_mask": None}).logits, model(**inputs).logits)
    with pytest.raises(ValueError, match=r"input_ids have 5 tokens.*padded to 16.*text_padding='max_length'"):
        model(**inputs | {"input_ids": inputs["input_ids"][:, :5], "attention_mask": inputs["attention_mask"][:, :5]})


def test_the_mean_over_a_berts_tokens_leaves_the_padding_out():
    model, inputs = tiny("dinov2", "bert"), inputs_for("bert")
    with torch.inference_mode():
        _, together = model.model.encode_text(inputs["input_ids"], inputs["attention_mask"])
        for row, length in enumerate((3, 3, 4)):
            states, alone = model.model.encode_text(inputs["input_ids"][row : row + 1, :length])
            assert torch.allclose(alone, together[row], atol=1e-5)
            assert torch.allclose(alone, model.model.text_projection(states.mean(1)), atol=1e-6)


@pytest.mark.parametrize("text", TEXT_FAMILIES)
def test_token_embeddings_are_resized_and_copies_are_whole(text):
    model = tiny("dinov2", text)
    twin = copy.deepcopy(model)
    size = model.config.text_config.vocab_size
    twin.resize_token_embeddings(size + 3)
    assert twin.get_input_embeddings().num_embeddings == twin.config.text_config.vocab_size == size + 3
    assert model.get_input_embeddings().num_embeddings == model.config.text_config.vocab_size == size
    inputs = sample_inputs(twin.config, [0], (2, 3), 4)
    with torch.inference_mode():
        assert twin(**inputs).logits.isfinite().all()


# Checkpoints


@pytest.mark.parametrize(
    ("text", "save"),
    [
        ("siglip", lambda folder: save_siglip(folder).text_model),
        ("siglip2", lambda folder: save_siglip(folder, "siglip2").text_model),
        ("siglip-text", lambda folder: save_siglip(folder, "text")),
        ("bert", save_bert),
    ],
)
def test_pretrained_towers_arrive_whole(tmp_path, text, save):
    vision, pretrained = save_dinov3(tmp_path / "vision"), save(tmp_path / "text")
    model = SeraForReferringSegmentation.from_vision_text_pretrained(tmp_path / "vision", tmp_path / "text", **SMALL)
    assert_same(model.model.vision.tower, vision)
    assert_same(model.model.text_tower, pretrained)
    assert model.config.patch_size == 16 and model.config.projection_dim == 32
    ids = torch.randint(3, 300, (2, 16), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        _, sentence = model.model.encode_text(ids)
        found = pretrained(input_ids=ids)
    own = found.last_hidden_state.mean(1) if text == "bert" else found.pooler_output
    assert torch.equal(sentence, own)  # the projection starts as the identity

    model.save_pretrained(tmp_path / "sera")
    second = SeraForReferringSegmentation.from_vision_text_pretrained(tmp_path / "sera", tmp_path / "sera", **SMALL)
    assert_same(second.model.vision.tower, vision)
    assert_same(second.model.text_tower, pretrained)
    assert torch.equal(second.model.text_projection.weight, torch.eye(32))


def test_another_projection_dim_starts_a_fresh_projection(tmp_path):
    save_dinov3(tmp_path / "vision")
    save_bert(tmp_path / "text")
    model = SeraForReferringSegmentation.from_vision_text_pretrained(
        tmp_path / "vision", tmp_path / "text", projection_dim=20, **SMALL
    )
    assert model.model.text_projection.weight.shape == (20, 32)
    assert 0.7 < model.model.text_projection.weight.std().item() * 32**0.5 < 1.3


@pytest.mark.parametrize(("tower", "part"), [("vision", "layer.1.mlp.up_proj"), ("text", "layers.1.mlp.fc2.bias")])
def test_a_checkpoint_that_lacks_weights_is_refused(tmp_path, tower, part):
    save_dinov3(tmp_path / "vision")
    save_siglip(tmp_path / "text", "text")
    file = tmp_path / tower / "model.safetensors"
    weights = load_file(file)
    del weights[next(name for name in weights if part in name)]
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"{tmp_path / tower} lacks weights of the (DINOv3|SigLIP).*{part}"):
        SeraForReferringSegmentation.from_vision_text_pretrained(tmp_path / "vision", tmp_path / "text", **SMALL)


# What is refused


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"image_size": 60}, "image_size is 60.*patch, 14"),
        ({"vision_config": {"model_type": "dinov3_vit", "patch_size": [16, 8]}}, r"patch_size is \[16, 8\].*square"),
        ({"vision_config": {"num_channels": 1}}, "num_channels is 1.*3 channels"),
        ({"vision_config": {"model_type": "dinov3_convnext"}}, "'dinov3_convnext'.*'dinov3_vit'"),
        ({"text_config": {"model_type": "siglip"}}, "'siglip'.*'siglip_text_model'"),
        ({"text_config": {"model_type": "bert", "is_decoder": True}}, "is_decoder is True.*encoder"),
        ({"vision_config": {"model_type": "dinov3_vit"}, "adapter_layers": [1, 4]}, r"\[1, 4\].*4 blocks"),
    ],
)
def test_a_combination_that_cannot_work_is_refused(fields, message):
    with pytest.raises(Exception, match=message):
        SeraConfig.tiny(**fields)

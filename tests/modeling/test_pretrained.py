"""Pretrained towers: folders as transformers saves them, of every accepted kind, and what is refused."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import (
    BertConfig,
    BertModel,
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    ViTConfig,
    ViTModel,
)

from modeling_sera import SeraForReferringSegmentation

VISION = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "mlp_ratio": 2, "image_size": 56}
VISION |= {"patch_size": 14, "layerscale_value": 0.7}
TEXT = {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 120}
TEXT |= {"bos_token_id": 118, "eos_token_id": 119, "pad_token_id": 119, "projection_dim": 20}
SMALL = {"adapter_dim": 16, "adapter_num_heads": 4, "fusion_dim": 16, "fusion_num_heads": 4, "router_hidden_dim": 8}
SMALL |= {"decoder_dim": 32, "decoder_num_layers": 1, "decoder_num_heads": 4, "decoder_ffn_dim": 32}
TAPS = {"tap_layers": [1, 3, 4]}


def randomised(model: torch.nn.Module, seed: int) -> torch.nn.Module:
    """The model with random weights: the same in every call, and no weight has the value of a fresh model."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            is_gain = "norm" in name and name.endswith("weight")
            parameter.copy_(is_gain + 0.2 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def dinov2(registers: bool) -> torch.nn.Module:
    if registers:
        return randomised(Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**VISION, num_register_tokens=3)), 1)
    return randomised(Dinov2Model(Dinov2Config(**VISION)), 1)


def clip(projection_dim: int = 20, **text) -> CLIPModel:
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    vision |= {"image_size": 32, "patch_size": 16}
    config = CLIPConfig(text_config=TEXT | text, vision_config=vision, projection_dim=projection_dim)
    return randomised(CLIPModel(config), 2)


def saved(model: torch.nn.Module, folder: Path) -> Path:
    model.save_pretrained(folder)
    return folder


def load(vision: Path | None, text: Path | None, **overrides) -> SeraForReferringSegmentation:
    return SeraForReferringSegmentation.from_vision_text_pretrained(vision, text, **(SMALL | overrides)).eval()


def saved_without(folder: Path, part: str, target: Path) -> Path:
    """A copy of a folder whose weights lack one of those with `part` in their names."""
    weights = load_file(folder / "model.safetensors")
    weights.pop(next(name for name in weights if part in name))
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    (target / "config.json").write_text((folder / "config.json").read_text())
    return target


def assert_same_weights(tower: torch.nn.Module, pretrained: torch.nn.Module) -> None:
    expected = pretrained.state_dict()
    got = tower.state_dict()
    assert got.keys() == expected.keys()
    assert [name for name in got if not torch.equal(got[name], expected[name])] == []


def tokens() -> dict[str, torch.Tensor]:
    ids = torch.randint(0, 118, (3, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    for row, length in enumerate((9, 5, 3)):
        ids[row, 0], ids[row, length - 1 :] = 118, 119
        mask[row, length:] = 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    """One folder of each kind."""
    folder = tmp_path_factory.mktemp("towers")
    saved(dinov2(False), folder / "dinov2")
    saved(dinov2(True), folder / "dinov2-registers")
    saved(clip(), folder / "clip")
    saved(randomised(CLIPTextModelWithProjection(CLIPTextConfig(**TEXT)), 3), folder / "clip-text-projection")
    saved(randomised(CLIPTextModel(CLIPTextConfig(**TEXT)), 4), folder / "clip-text")
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    saved(ViTModel(ViTConfig(**small, image_size=32, patch_size=16)), folder / "vit")
    saved(BertModel(BertConfig(**small, vocab_size=50)), folder / "bert")
    return folder


# Vision towers


@pytest.mark.parametrize("registers", [False, True])
def test_a_vision_tower_arrives_whole(folders, registers):
    pretrained = dinov2(registers)
    model = load(folders / ("dinov2-registers" if registers else "dinov2"), folders / "clip")
    assert type(model.model.vision.tower) is type(pretrained)
    assert_same_weights(model.model.vision.tower, pretrained)


@pytest.mark.parametrize("registers", [False, True])
@pytest.mark.parametrize("size", [(56, 56), (28, 70)])
def test_a_fresh_sera_taps_the_bare_towers_features_bit_for_bit(folders, registers, size):
    bare = dinov2(registers)
    model = load(folders / ("dinov2-registers" if registers else "dinov2"), folders / "clip", **TAPS)
    assert len(model.model.vision.adapted_blocks) >= 2
    tapped = []
    for fusion in model.model.fusions:
        fusion.project.register_forward_pre_hook(lambda module, args: tapped.append(args[0]))
    pixel_values = torch.randn(3, 3, *size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        model(pixel_values, **tokens())
        outputs = bare(pixel_values, output_hidden_states=True)
    prefix = 4 if registers else 1
    expected = [outputs.hidden_states[1], outputs.hidden_states[3], outputs.last_hidden_state]
    assert len(tapped) == 3
    for got, states in zip(tapped, expected, strict=True):
        assert torch.equal(got, states[:, prefix:])


@pytest.mark.parametrize("registers", [False, True])
def test_the_key_names_of_published_checkpoints_lose_nothing(folders, tmp_path, registers):
    folder = folders / ("dinov2-registers" if registers else "dinov2")
    published = tmp_path / "published"
    published.mkdir()
    # the names in the published files, which may differ from those that this version of transformers writes
    renamed = {}
    for name, value in dinov2(registers).state_dict().items():
        for now, then in (
            ("attention.q_proj", "attention.attention.query"),
            ("attention.k_proj", "attention.attention.key"),
            ("attention.v_proj", "attention.attention.value"),
            ("attention.o_proj", "attention.output.dense"),
        ):
            name = name.replace(now, then)
        renamed[name] = value.contiguous()
    for name in ("attention.attention.query.weight", "attention.output.dense.bias", "layer_scale1.lambda1"):
        assert f"encoder.layer.0.{name}" in renamed
    save_file(renamed, published / "model.safetensors", metadata={"format": "pt"})
    (published / "config.json").write_text((folder / "config.json").read_text())
    model = load(published, folders / "clip")
    assert_same_weights(model.model.vision.tower, dinov2(registers))


@pytest.mark.parametrize("vision", ["dinov2", "dinov2-registers"])
@pytest.mark.parametrize("text", ["clip", "clip-text"])
def test_save_and_load_lose_no_weight(folders, tmp_path, vision, text):
    model = load(folders / vision, folders / text)
    model.save_pretrained(tmp_path)
    loaded, info = SeraForReferringSegmentation.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert_same_weights(loaded, model)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert len(file.keys()) == len(model.state_dict())


def test_a_checkpoint_that_lacks_vision_weights_is_refused(folders, tmp_path):
    with pytest.raises(ValueError, match=r"lacks weights.*mlp\.fc1\.weight"):
        load(saved_without(folders / "dinov2", "mlp.fc1.weight", tmp_path), folders / "clip")


# Text towers


@pytest.mark.parametrize("name", ["clip", "clip-text-projection", "clip-text"])
def test_a_text_tower_arrives_whole_and_its_projection_with_it(folders, name, caplog):
    pretrained = {
        "clip": clip(),
        "clip-text-projection": randomised(CLIPTextModelWithProjection(CLIPTextConfig(**TEXT)), 3),
        "clip-text": randomised(CLIPTextModel(CLIPTextConfig(**TEXT)), 4),
    }[name]
    model = load(folders / "dinov2", folders / name)
    tower = pretrained if name == "clip-text" else pretrained.text_model
    assert_same_weights(model.model.text_tower, tower)
    projection = model.model.text_projection.weight
    assert model.config.projection_dim == 20 and projection.shape == (20, 48)
    if name == "clip-text":  # fresh: the standard deviation of such a layer at the start
        assert 0.7 < float(projection.std()) * 48**0.5 < 1.3
    else:
        assert torch.equal(projection, pretrained.text_projection.weight)


# older CLIP files hold 2; the end of the text is then the token with the highest id
@pytest.mark.parametrize("eos_token_id", [119, 2])
def test_the_sentence_feature_is_clips_own(tmp_path, folders, eos_token_id):
    pretrained = clip(eos_token_id=eos_token_id)
    model = load(folders / "dinov2", saved(pretrained, tmp_path / "clip"))
    with torch.no_grad():
        features = pretrained.get_text_features(**tokens())
        states, sentence = model.model.encode_text(**tokens())
        expected = pretrained.text_model(**tokens()).last_hidden_state
    assert torch.equal(sentence, getattr(features, "pooler_output", features))
    assert torch.equal(states, expected)
    assert sentence.std(dim=0).min() > 1e-3  # expressions differ


def test_a_sera_gives_its_towers_to_another(folders, tmp_path):
    """All other parts of the new model are fresh, with sizes of its own configuration."""
    first = randomised(load(folders / "dinov2", folders / "clip"), 5)
    saved(first, tmp_path / "sera")
    second = load(tmp_path / "sera", tmp_path / "sera", adapter_layers=[], fusion_dim=32)
    assert_same_weights(second.model.vision.tower, first.model.vision.tower)
    assert_same_weights(second.model.text_tower, first.model.text_tower)
    assert torch.equal(second.model.text_projection.weight, first.model.text_projection.weight)
    assert second.config.fusion_dim == 32 and not second.model.vision.adapted_blocks
    mixed = load(folders / "dinov2-registers", tmp_path / "sera")
    assert mixed.config.vision_config.model_type == "dinov2_with_registers"
    assert_same_weights(mixed.model.text_tower, first.model.text_tower)


@pytest.mark.parametrize("prefix", ["", "text_model."])
def test_a_text_tower_is_found_under_its_older_names_too(folders, tmp_path, prefix):
    pretrained = randomised(CLIPTextModel(CLIPTextConfig(**TEXT)), 4)
    weights = {prefix + name: value for name, value in pretrained.state_dict().items()}
    assert prefix + "encoder.layers.0.self_attn.q_proj.weight" in weights
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text((folders / "clip-text" / "config.json").read_text())
    assert_same_weights(load(folders / "dinov2", tmp_path).model.text_tower, pretrained)


def test_a_whole_clip_says_itself_how_long_its_text_feature_is(folders, tmp_path):
    pretrained = clip(projection_dim=24)  # text_config.projection_dim is 20: a CLIP ignores it
    assert pretrained.text_projection.weight.shape == (24, 48)
    model = load(folders / "dinov2", saved(pretrained, tmp_path / "clip"))
    assert model.config.projection_dim == 24
    assert torch.equal(model.model.text_projection.weight, pretrained.text_projection.weight)


def test_a_fresh_projection_may_have_any_length_a_pretrained_one_its_own(folders):
    assert load(folders / "dinov2", folders / "clip-text", projection_dim=12).config.projection_dim == 12
    with pytest.raises(ValueError, match=r"projection_dim is 12.*gives 20"):
        load(folders / "dinov2", folders / "clip", projection_dim=12)


def test_a_checkpoint_that_lacks_text_weights_is_refused(folders, tmp_path):
    with pytest.raises(ValueError, match=r"lacks weights.*layers\.1\.mlp\.fc2\.bias"):
        load(folders / "dinov2", saved_without(folders / "clip-text", "layers.1.mlp.fc2.bias", tmp_path))


# Towers left out, and options


def test_a_tower_left_out_starts_fresh(folders):
    text_config = TEXT | {"model_type": "clip_text_model", "vocab_size": 77}
    fresh_text = load(folders / "dinov2", None, text_config=text_config)
    assert_same_weights(fresh_text.model.vision.tower, dinov2(False))
    assert fresh_text.model.text_tower.embeddings.token_embedding.num_embeddings == 77
    fresh_vision = load(None, folders / "clip", vision_config=VISION | {"model_type": "dinov2"})
    assert_same_weights(fresh_vision.model.text_tower, clip().text_model)
    assert torch.equal(fresh_vision.model.text_projection.weight, clip().text_projection.weight)
    assert fresh_vision.config.vision_config.hidden_size == 32


def test_overrides_dtype_and_kernel_reach_every_part(folders):
    model = load(folders / "dinov2", folders / "clip", fusion_dim=24, dtype=torch.bfloat16, attn_implementation="eager")
    assert model.config.fusion_dim == 24
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16} and not model.training
    assert load(folders / "dinov2", folders / "clip", dtype="bfloat16").dtype == torch.bfloat16
    assert model.model.text_tower.config._attn_implementation == "eager"
    assert model.model.vision.tower.config._attn_implementation == "eager"


# What is refused


@pytest.mark.parametrize(
    ("vision", "text", "overrides", "message"),
    [
        ("vit", "clip", {}, "'vit'.*'dinov2'"),
        ("clip", "clip", {}, "'clip_vision_model'.*'dinov2'"),
        ("bert", "clip", {}, "'bert'.*'dinov2'"),
        ("dinov2", "vit", {}, "'vit'.*'clip_text_model'.*'bert'"),
        ("dinov2", "dinov2", {}, "'dinov2'.*'clip_text_model'"),
        ("clip-text", "clip", {}, "'clip_text_model'.*'dinov2'"),
        ("dinov2", "clip", {"fusion_dims": 3}, "'fusion_dims'.*fusion_dim"),
        ("dinov2", "clip", {"vision_config": {}}, "vision_config.*dinov2"),
        ("dinov2", "clip", {"text_config": TEXT}, "text_config.*clip"),
    ],
)
def test_a_wrong_checkpoint_or_field_is_named(folders, vision, text, overrides, message):
    with pytest.raises(ValueError, match=message):
        load(folders / vision, folders / text, **overrides)


@pytest.mark.parametrize("missing", ["vision", "text"])
def test_a_folder_that_does_not_exist_is_named(folders, tmp_path, missing):
    nowhere = tmp_path / "nowhere"
    with pytest.raises(OSError, match=str(nowhere)):
        load(*((nowhere, folders / "clip") if missing == "vision" else (folders / "dinov2", nowhere)))


def test_a_folder_without_weights_is_named(folders, tmp_path):
    (tmp_path / "config.json").write_text((folders / "dinov2" / "config.json").read_text())
    with pytest.raises(OSError, match=str(tmp_path)):
        load(tmp_path, folders / "clip")

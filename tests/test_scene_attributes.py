"""A vision tower that learns what the scenes' things are: what it is taught, how pictures are varied, and a whole run."""

import json
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import REPOSITORY, save_tiny_model

from modeling_sera import SeraForReferringSegmentation
from processing_sera import SeraProcessor
from training.scene_attributes import (
    CELLS,
    MOST_OBJECTS,
    NAMED_SATURATION,
    VALUES,
    AttributeReader,
    Batches,
    attribute_loss,
    competing,
    draw_scenes,
    shown_in_training,
)
from training.scene_benchmark import (
    COLOR_NAMES,
    SHAPES,
    TEXTURES,
    composition_split,
    draw_benchmark_scene,
    held_out_for,
)
from training.scene_shapes import FORMS

SIZE, PATCH = 70, 14
SIDE = CELLS * SIZE // PATCH


@pytest.fixture(scope="module")
def scenes():
    return draw_scenes("train", range(12), SIZE, PATCH, seed=0)


def test_cells_hold_the_attributes_of_the_object_drawn_there(scenes):
    _, values, offsets, weights = Batches(scenes).take(torch.arange(12))
    names = list(VALUES)
    for n in range(12):
        scene = draw_benchmark_scene(0, "train", n, SIZE)
        for row in range(0, SIDE, 3):
            for column in range(SIDE):
                y, x = (int((k + 0.5) * SIZE / SIDE) for k in (row, column))
                here = [item for item in scene.objects if item.mask[y, x]]
                told = values[n, :, row, column].tolist()
                if not here:
                    assert told == [-1] * len(names) and weights[n, row, column] == 1
                    continue
                (item,) = here
                assert [VALUES[name][value] for name, value in zip(names, told, strict=True)] == [
                    getattr(item, name) for name in names
                ]
                pointed = (np.array([column, row]) + 0.5) / SIDE + offsets[n, :, row, column].numpy()
                assert pointed == pytest.approx(np.array(item.center) / SIZE, abs=1e-5)


def test_no_composition_of_another_split_is_shown(scenes):
    shape, color, texture = (list(VALUES).index(name) for name in ("shape", "color", "texture"))
    shown = scenes.values[scenes.values[..., 0] >= 0].tolist()
    assert len(shown) > 48
    for values in shown:
        named = (VALUES[name][values[i]] for name, i in (("shape", shape), ("color", color), ("texture", texture)))
        assert composition_split(*named) == "train"
    assert scenes.targets.sum() == len(shown)
    unseen = draw_scenes("val", range(6), SIZE, PATCH, seed=0)
    assert 12 <= unseen.targets.sum() < (unseen.values[..., 0] >= 0).sum()


def test_turned_and_mirrored_pictures_still_point_at_their_objects(scenes):
    batches, generator = Batches(scenes), torch.Generator().manual_seed(0)
    middles = (torch.arange(SIDE) + 0.5) / SIDE
    here = torch.stack(torch.meshgrid(middles, middles, indexing="xy"))
    turned = 0
    for _ in range(8):
        before = batches.take(torch.arange(12))
        _, values, offsets, _, _ = batches.vary(before, generator)
        turned += not torch.equal(values[:, 0], before[1][:, 0])
        pointed = (here + offsets)[0][:, values[0, 0] >= 0].T
        objects = torch.unique((1e4 * pointed).round(), dim=0)
        assert len(objects) == int((scenes.values[0, :, 0] >= 0).sum())  # every cell of an object names one place
        for place in objects / 1e4:
            of = ((here + offsets)[0] - place[:, None, None]).abs().sum(dim=0) < 1e-3
            of &= values[0, 0] >= 0
            assert here[:, of].mean(dim=1) == pytest.approx(place, abs=0.02)  # and that is their own middle
    assert turned >= 6


def test_a_faded_picture_has_no_name_for_its_colors(scenes):
    batches, generator = Batches(scenes), torch.Generator().manual_seed(0)
    before = batches.take(torch.arange(12))
    pictures, *wanted, colored = batches.vary(before, generator)
    kept, whole = (part.std(dim=1).mean(dim=(1, 2)) for part in (pictures, before[0]))
    assert 0 < colored.sum() < 12
    assert torch.equal(colored, kept / whole > NAMED_SATURATION - 1e-3)
    outputs = [torch.zeros(12, width, SIDE, SIDE, requires_grad=True) for width in (1, 12, 8, 4, 3, 2)]
    attribute_loss(outputs, *wanted, colored, shown_in_training()).backward()
    taught = [part.grad.abs().amax(dim=(1, 2, 3)) > 0 for part in outputs]
    assert torch.equal(taught[2], colored) and all(part.all() for part in (*taught[:2], *taught[3:]))


def test_what_training_never_shows_together_does_not_compete(scenes):
    shown = shown_in_training()
    for i, shape in enumerate(SHAPES):
        for j, color in enumerate(COLOR_NAMES):
            assert shown[i, j, -1] == (held_out_for(shape, color) is None)
            assert shown[i, j, 0] == (composition_split(shape, color) == "train")
    _, values, _, _ = Batches(scenes).take(torch.arange(12))
    logits = [torch.zeros(12, width, SIDE, SIDE) for width in (12, 8, 4, 3)]
    shapes, colors, textures, sizes = competing(logits, values, shown)
    assert not sizes.isinf().any()
    for n in (0, 7):
        for row in range(0, SIDE, 2):
            for column in range(0, SIDE, 2):
                shape, color, texture, _ = values[n, :, row, column].tolist()
                open_to = [name for name, logit in zip(SHAPES, shapes[n, :, row, column], strict=True) if logit == 0]
                if shape < 0:
                    assert open_to == list(SHAPES)
                    continue
                for other in SHAPES:
                    kept_apart = held_out_for(other, TEXTURES[texture]) or (not FORMS[other].solid and texture > 1)
                    kept_apart = kept_apart or held_out_for(other, COLOR_NAMES[color])
                    assert (other in open_to) == (not kept_apart)
                right = shapes[n, shape], colors[n, color], textures[n, texture]
                assert all(logit[row, column] == 0 for logit in right)


def test_the_loss_is_zero_for_right_answers_alone(scenes):
    shown = torch.ones_like(shown_in_training())
    _, values, offsets, weights = Batches(scenes).take(torch.arange(4))
    colored = torch.ones(4, dtype=torch.bool)
    there = (values[:, :1] >= 0).float()
    classes = [torch.nn.functional.one_hot(values[:, i].clamp(min=0), len(n)) for i, n in enumerate(VALUES.values())]
    right = [80 * there - 40, *(40.0 * one.permute(0, 3, 1, 2) for one in classes)]
    assert attribute_loss((*right, offsets), values, offsets, weights, colored, shown) < 1e-5
    for i in range(len(right)):
        wrong = [(-part if i == 0 else part.roll(1, dims=1)) if i == j else part for j, part in enumerate(right)]
        assert attribute_loss((*wrong, offsets), values, offsets, weights, colored, shown) > 10
    assert attribute_loss((*right, offsets + 0.1), values, offsets, weights, colored, shown) == pytest.approx(
        0.8, rel=1e-3
    )


def test_a_color_of_training_tells_nothing_about_shapes_it_never_had(scenes):
    """The gradient leaves such shapes alone, and its sum over the others is zero: none of them rises against those."""
    _, values, offsets, weights = Batches(scenes).take(torch.arange(12))
    outputs = [torch.zeros(12, width, SIDE, SIDE, requires_grad=True) for width in (1, 12, 8, 4, 3, 2)]
    attribute_loss(outputs, values, offsets, weights, torch.rand(12) < 0.5, shown_in_training()).backward()
    gradient = outputs[1].grad
    _, color, texture, _ = values.unbind(1)
    never = ~shown_in_training()[:-1, color, texture].transpose(0, 1)
    assert never.any() and not gradient[never].any() and gradient.any()
    assert gradient.sum(dim=1).abs().max() < 1e-6


class GivenTokens(torch.nn.Module):
    """A tower whose tokens are its input."""

    def forward(self, tokens):
        return SimpleNamespace(last_hidden_state=tokens)


def test_a_cell_is_read_from_its_own_patch(model, processor):
    reader = AttributeReader(model, processor)
    reader.mean, reader.std = torch.tensor(0.0), torch.tensor(1.0)
    grid = torch.randn(1, (SIZE // PATCH) ** 2, model.config.vision_config.hidden_size)
    tokens = torch.cat([torch.zeros(1, reader.num_prefix, grid.shape[2]), grid], dim=1)
    reader.tower = GivenTokens()
    before = reader(tokens)
    tokens[0, reader.num_prefix + 5 + 2] += 1  # the patch in row 1, column 2
    after = reader(tokens)
    assert [part.shape[1:] for part in before] == [(width, SIDE, SIDE) for width in (1, 12, 8, 4, 3, 2)]
    for one, other in zip(before, after, strict=True):
        changed = (one != other).any(dim=1)[0].nonzero()
        assert changed.min(dim=0).values.tolist() == [CELLS, 2 * CELLS]
        assert changed.max(dim=0).values.tolist() == [2 * CELLS - 1, 3 * CELLS - 1]


def run(*arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, "training/scene_attributes.py", *map(str, arguments)]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)


def test_a_run_changes_the_vision_tower_and_nothing_else(tmp_path):
    folder = save_tiny_model(tmp_path / "model")
    few = ["--size", SIZE, "--num_scenes", 8, "--num_val_scenes", 3, "--epochs", 2, "--batch_size", 4]
    done = run("--model", folder, "--output", tmp_path / "taught", *few)
    assert done.returncode == 0, done.stderr
    before = SeraForReferringSegmentation.from_pretrained(folder).state_dict()
    model, info = SeraForReferringSegmentation.from_pretrained(tmp_path / "taught", output_loading_info=True)
    assert not any(info.values())
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed and all(name.startswith("model.vision.tower.") for name in changed)
    SeraProcessor.from_pretrained(tmp_path / "taught")
    history = json.loads((tmp_path / "taught" / "attributes.json").read_text())
    assert len(history) == 2 and all(0 <= epoch["targets"]["shape"] <= 1 for epoch in history)
    assert history[0]["targets"]["objects"] >= 6 and history[0]["targets"]["objects"] <= 3 * MOST_OBJECTS


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--size", 72], "size is 72; it must be a multiple of the patch, 14."),
        (["--size", 70, "--num_scenes", 2], "num_scenes is 2; it must be 16 or more."),
    ],
)
def test_what_does_not_fit_is_said_before_anything_is_drawn(tmp_path, options, told):
    folder = save_tiny_model(tmp_path / "model")
    done = run("--model", folder, "--output", tmp_path / "taught", *options)
    assert done.returncode != 0 and told in done.stderr and not (tmp_path / "taught").exists()

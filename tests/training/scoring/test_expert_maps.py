"""The effect of the experts: without each of them, as maps, and by kind of expression."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import make_inputs, make_model, save_tiny_model
from PIL import Image
from reference import softmax
from segmenting import check_files, refusal, segment, smooth_image
from stand_ins import make_processor, make_rows, tiny_model

from modeling_sera.fusion_sera import EXPERT_NAMES
from training.configuration import DataSettings, TrainingSettings, dump_settings
from training.examples.batches import image_as_annotated
from training.examples.splits import load_splits
from training.experts import groups_of, main, route
from training.learning.routing_health import named_routers
from training.scoring.expert_maps import draw_expert_maps, expert_maps, without_expert
from training.scoring.routing_exchange import EXCHANGES
from training.scoring.routing_words import mean_weights
from training.support.files import save_model


def routings(model) -> list:
    found = []
    hooks = [f.router.register_forward_hook(lambda module, args, out: found.append(out)) for f in model.model.fusions]
    with torch.inference_mode():
        model(**make_inputs(3))
    for hook in hooks:
        hook.remove()
    return found


@pytest.mark.parametrize("k", [1, 2, 3, 4])
@pytest.mark.parametrize("name", EXPERT_NAMES)
def test_without_an_expert_the_others_are_routed_alone(k, name):
    model = make_model(num_selected_experts=k)
    place = EXPERT_NAMES.index(name)
    before = routings(model)
    with without_expert(model, name):
        changed = routings(model)
    for was, now in zip(before, changed, strict=True):
        logits = was.logits.double().numpy()
        for row in range(3):
            others = [i for i in np.argsort(-logits[row]) if i != place][: min(k, 3)]
            expected = np.zeros(4)
            expected[others] = softmax(logits[row, others])
            assert np.abs(now.weights[row].numpy() - expected).max() < 1e-6
            assert set(np.flatnonzero(now.selected[row])) == set(others)
    assert all(torch.equal(a.weights, b.weights) for a, b in zip(routings(model), before, strict=True))


def test_leaving_out_an_expert_that_is_never_chosen_changes_nothing():
    model = make_model(num_selected_experts=1)
    with torch.no_grad():
        for fusion in model.model.fusions:
            fusion.router.score.weight.zero_()
            fusion.router.score.bias.copy_(torch.tensor([0.0, 9.0, 1.0, 2.0]))
    inputs = make_inputs(2)
    with torch.inference_mode():
        whole = model(**inputs).logits
        for name in EXPERT_NAMES:
            with without_expert(model, name):
                assert torch.equal(model(**inputs).logits, whole) == (name != "context")


@pytest.mark.parametrize(
    ("model", "name", "message"),
    [
        (make_model(), "edges", "no fusion expert 'edges'; there are spatial"),
        (make_model(fusion_experts=False), "shape", "has no"),
    ],
)
def test_an_expert_that_is_not_there_is_refused(model, name, message):
    with pytest.raises(ValueError, match=message), without_expert(model, name):
        pass


def test_maps_are_differences_of_two_answers(image):
    model, processor, texts = tiny_model(), make_processor(), ["left zebra", "the cup"]
    maps = list(expert_maps(model, processor, image, texts, threshold=0.4))
    assert [found.text for found in maps] == texts
    for found in maps:
        inputs = processor(images=[image], text=[[found.text]], return_tensors="pt")

        def probabilities(inputs=inputs):
            with torch.inference_mode():
                outputs = model(**inputs)
            done = processor.post_process_referring_segmentation(outputs, inputs, return_probabilities=True)
            return done[0]["probabilities"].numpy()

        whole = probabilities()
        assert np.array_equal(found.mask, whole > 0.4) and sum(found.shares.values()) == pytest.approx(1)
        for name in EXPERT_NAMES:
            with without_expert(model, name):
                assert np.allclose(found.changes[name], whole - probabilities(), atol=1e-6)
            assert found.changes[name].shape == (40, 30) and np.abs(found.changes[name]).max() > 0
    sheets = [draw_expert_maps(image, maps[:count]) for count in (1, 2)]
    assert sheets[0].width == sheets[1].width and sheets[0].height < sheets[1].height < 2 * sheets[0].height
    assert np.array_equal(np.asarray(sheets[0]), np.asarray(sheets[1])[: sheets[0].height])


def test_the_command_for_prediction_draws_the_maps_on_request(tmp_path, capsys):
    photo = tmp_path / "photo.png"
    smooth_image().save(photo)
    model = save_tiny_model(tmp_path / "model")
    texts = ["left zebra", "the $5 cup — " * 12]
    segment(photo, *texts, "--model", model, "--out", tmp_path / "out", "--experts")
    assert str(tmp_path / "out" / "experts.png") in capsys.readouterr().out
    assert np.asarray(Image.open(tmp_path / "out" / "experts.png").convert("L")).std() > 5
    (tmp_path / "out" / "experts.png").unlink()
    check_files(tmp_path / "out", (64, 40), texts)  # the option changes no other file
    bare = save_tiny_model(tmp_path / "bare", fusion_experts=False)
    said = refusal(capsys, photo, "cup", "--model", bare, "--out", tmp_path / "none", "--experts")
    assert "has no fusion experts" in said and not (tmp_path / "none").exists()


def test_weights_are_averaged_over_each_kind():
    model, processor, rows = tiny_model(expression_aware_routing=True), make_processor(), make_rows(3)
    routed = route(model, processor, rows, batch_size=2)
    groups = groups_of(rows, routed.scores)
    found = mean_weights(routed.weights, groups)
    means = found["all"] | found["kind"]
    kinds, expected = [], []
    for row in rows:
        image = image_as_annotated(row)
        inputs = processor(images=[image], text=[row["sentences"]], return_tensors="pt")
        with torch.inference_mode():
            outputs = model(**inputs, output_router_weights=True)
        kinds += row["sentence_kinds"]
        decided = [*outputs.fusion_router_weights, *outputs.adapter_router_weights]
        expected += torch.cat(decided, dim=1).double().tolist()
    kinds, expected = np.array(kinds), np.array(expected)
    assert set(means) == {"all", *kinds} and len(set(kinds)) > 1
    for kind, weights in means.items():
        found = [value for router in weights.values() for value in router.values()]
        chosen = expected if kind == "all" else expected[kinds == kind]
        assert np.abs(chosen.mean(axis=0) - found).max() < 1e-5
    for name, figures in named_routers(routed.health).items():
        assert figures["shares"] == pytest.approx(means["all"][name], abs=1e-5)
    assert all(len(labels) == len(kinds) for labels in groups.values())
    for score, size in zip(routed.scores, groups["size"], strict=True):
        scaled = score.truth * (640 * 480) / 64**2
        assert size == ("small" if scaled < 32**2 else "medium" if scaled < 96**2 else "large")


def test_the_command_for_experts_writes_tables_and_figures(tmp_path, capsys):
    save_model(tiny_model(), make_processor(), tmp_path / "model")
    data = DataSettings(source="scenes", num_scenes=(1, 1, 9), scene_size=64, image_size=(56, 56))
    (tmp_path / "settings.yaml").write_text(dump_settings(TrainingSettings(data=data)))
    main([str(tmp_path / "model"), "--output", str(tmp_path / "out"), "--data.num_scenes", "[1,1,2]"])
    (rows,) = load_splits(replace(data, num_scenes=(1, 1, 2)), ["test"])
    record = json.loads((tmp_path / "out" / "experts.json").read_text())
    assert set(record["without"]) == set(EXPERT_NAMES)
    assert record["expressions"] == sum(map(len, rows["sentences"]))
    for found in record["without"].values():
        low, high = found["mIoU"]["interval"]
        assert low <= found["mIoU"]["difference"] <= high
    assert set(record["exchange"]) == set(EXCHANGES) and set(record["explained"]) == {"kind", "words"}
    assert set(record["routing"]) == {"all", "kind", "size", "thickness"} and set(record["health"]) == {
        "taps",
        "adapters",
    }
    routers = [*named_routers(record["health"])]
    assert all(set(found["effects"]) == set(routers) for found in record["words"].values()) and "the" in record["words"]
    text = (tmp_path / "out" / "experts.md").read_text()
    assert all(f"| {name} |" in text for name in (*EXCHANGES, *routers, "as decided"))
    assert (
        all(f"| {name} |" in text for name in ("all", "with all experts", *EXPERT_NAMES)) and str(tmp_path) not in text
    )
    for name in ("routing", "words", "pairs", "maps"):
        assert np.asarray(Image.open(tmp_path / "out" / f"experts-{name}.png").convert("L")).std() > 5

    save_model(tiny_model(fusion_experts=False, adapter_experts=False), make_processor(), tmp_path / "model")
    with pytest.raises(ValueError, match="has no experts"):
        main([str(tmp_path / "model")])

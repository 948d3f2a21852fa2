"""The paper's grid trains every variant, on a made-up REFER folder with small towers; its cost is counted."""

import json
from dataclasses import replace

import pytest
from conftest import REPOSITORY
from runs import SMALL, refer_settings, write_grid

from modeling_sera import SeraConfig, SeraForReferringSegmentation
from training.ablations.grid import read_grid
from training.train import start_accelerator, train

GRID = REPOSITORY / "training" / "configs" / "ablations" / "refcoco.yaml"


def test_the_variants_are_the_papers():
    runs = read_grid(GRID).variants
    configs = {name: run.settings.model.config for name, run in runs.items()}
    assert configs["both"] == {} and configs["adapter"] == {"fusion_experts": False}
    assert configs["none"] == {"adapter_experts": False, "fusion_experts": False}
    assert configs["equal-weights"] == {"routing": "uniform"} and SeraConfig().num_selected_experts == 4
    assert [configs[f"k{k}"] for k in (1, 2, 3)] == [{"num_selected_experts": k} for k in (1, 2, 3)]
    recipe = runs["detris-recipe"].settings.optimization
    assert [round(share * recipe.epochs) for share in recipe.milestones] == [35, 55] and recipe.batch_size == 32
    assert len({run.recipe for run in runs.values()}) == len(runs)


def test_every_variant_trains(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    settings = refer_settings(tmp_path / "refer")
    small = [f"--model.config.{name}={value}" for name, value in SMALL.items() if name != "decoder_ffn_dim"]
    towers = [f"--model.vision_model={settings.model.vision_model}", f"--model.text_model={settings.model.text_model}"]
    brief = ["--optimization.epochs=1", "--data.image_size=[42,56]", "--num_workers=0", "--mixed_precision=no"]
    grid = read_grid(GRID, ["--data.root", str(tmp_path / "refer"), *small, *towers, *brief])
    for name, run in grid.variants.items():
        output = tmp_path / name
        settings = replace(run.settings, output_dir=str(output))
        train(settings, start_accelerator(settings))
        model = SeraForReferringSegmentation.from_pretrained(output / "model")
        for field, value in run.settings.model.config.items():
            assert getattr(model.config, field) == value, name
        (epoch,) = json.loads((output / "history.json").read_text())
        assert 0 <= epoch["val"]["mIoU"] <= 1


def test_the_cost_is_that_of_steps_and_passes(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(REPOSITORY / "benchmarks")
    from grid_cost import cost_of, format_costs, main

    path = write_grid(tmp_path, options={"optimization.epochs": 6, "evaluate_every": 2, "data.sentences_per_object": 3})
    grid = read_grid(path)
    costs = {name: cost_of(grid.variants[name], 1000, 200) for name in ("baseline", "full")}
    full = costs["full"]
    assert 1.5 * full.forward < full.step < 3.5 * full.forward and costs["baseline"].step < full.step
    assert (full.training, full.validation) == (6 * 1000 * 3, (6 / 2 + 2) * 200)
    assert full.total == full.step * full.training + full.forward * full.validation
    hours = 2 * sum(cost.total for cost in costs.values()) / 1e6 / 3600  # two seeds
    assert f"All runs: {hours:.0f} hours of one GPU" in format_costs(grid, costs, 1e-6)
    with pytest.raises(ValueError, match="give --objects and --validation"):
        main([str(path)])

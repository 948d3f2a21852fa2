"""Training: settings, schedule, and real runs of the command: scenes, a REFER folder, an interruption, and bad input."""

import json
import pickle
import re
import runpy
import signal
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from builders import Folder, tiny_tokenizer
from conftest import REPOSITORY, make_inputs, make_model
from runs import LAUNCH, ON_CPU, TINY, TRAIN, finished, history_of, refer_settings, run, written
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import CLIPTextModel, Dinov2Model

from modeling_sera import SeraForReferringSegmentation
from processing_sera import SeraImageProcessor, SeraProcessor
from training import train
from training.configuration import (
    DataSettings,
    ModelSettings,
    OptimizationSettings,
    TrainingSettings,
    check_settings,
    dump_settings,
    load_settings,
    read_settings,
    read_settings_of,
)
from training.distil_text import DistillationSettings
from training.evaluation import score_sentences
from training.examples import splits
from training.examples.splits import load_splits
from training.learning.tuning import apply_tuning, checkpoint_activations
from training.scoring.metric import summarize
from training.support.commands import run_command
from training.support.files import writing

# Settings


@pytest.mark.parametrize(
    "settings",
    [
        TrainingSettings(),
        TINY,
        TrainingSettings(
            output_dir="a b/c: d",
            model=ModelSettings(pretrained="x", tokenizer="y", config={"adapter_layers": [], "decoder_dropout": 1e-5}),
            data=DataSettings(root="~/no", dataset="refcoco+", train_split="testA", image_size=(224, 448)),
            optimization=OptimizationSettings(
                learning_rate=3e-7, milestones=[0.5, 0.75], gradient_accumulation_steps=4
            ),
            mixed_precision="bf16",
            seed=7,
            activation_checkpointing=True,
            checkpoint_every=100,
            checkpoint_contents="all",
            tracker="tensorboard",
        ),
    ],
)
def test_settings_survive_being_written(settings, tmp_path):
    loaded = load_settings(written(settings, tmp_path / "settings.yaml"))
    assert loaded == settings
    assert dump_settings(loaded) == dump_settings(settings)


def test_options_override_the_file_one_by_one(tmp_path):
    path = written(TINY, tmp_path / "settings.yaml")
    options = ["--optimization.epochs", "9", "--data.image_size", "[32,64]", "--model.text_tuning", "frozen"]
    expected = replace(
        TINY,
        optimization=replace(TINY.optimization, epochs=9),
        data=replace(TINY.data, image_size=(32, 64)),
        model=replace(TINY.model, text_tuning="frozen"),
    )
    assert read_settings(["--config", path, *options]) == expected


def test_fields_of_the_models_configuration_can_be_overridden_one_by_one(tmp_path):
    path = written(TINY, tmp_path / "settings.yaml")
    vision = TINY.model.config["vision_config"] | {"hidden_size": 48}
    options = ["--model.config.fusion_dim", "32", "--model.config.vision_config", json.dumps(vision)]
    options += ["--model.config.adapter_layers", "[0,1]", "--model.config.decoder_dropout", "0.25"]
    config = read_settings(["--config", path, *options]).model.config
    changed = {"fusion_dim": 32, "vision_config": vision, "adapter_layers": [0, 1], "decoder_dropout": 0.25}
    assert config == TINY.model.config | changed


CONFIGS = sorted(path.name for path in (REPOSITORY / "training" / "configs").glob("*.yaml"))


@pytest.mark.parametrize("name", CONFIGS)
def test_the_configurations_of_the_project_can_be_read(name):
    path = REPOSITORY / "training" / "configs" / name
    if name == "photos-text.yaml":  # of the other command that reads such files
        assert read_settings_of(DistillationSettings, ["--config", str(path)]).vocabulary > 0
    else:
        assert load_settings(path).optimization.epochs > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data.nope", "3"], "--data.nope"),
        (["stray"], "stray"),
        (["--config", "/no/such/file.yaml"], "/no/such/file.yaml"),
        (["--optimization.schedule", "linear"], "multistep.*cosine.*linear"),
        (["--model.vision_tuning", "some"], "frozen.*norm_bias.*full.*some"),
        (["--mixed_precision", "int8"], "bf16.*int8|int8.*bf16"),
        (["--optimization.epochs", "many"], "optimization.epochs.*many"),
        (["--data.num_scenes", "[1,2]"], "data.num_scenes.*3.*[1, 2]"),
        (["--data.image_size", "64"], "data.image_size.*64"),
        (["--optimization.epochs", "0"], "epochs.*0"),
        (["--optimization.batch_size", "0"], "batch_size.*0"),
        (["--optimization.gradient_accumulation_steps", "0"], "gradient_accumulation_steps.*0"),
        (["--optimization.warmup", "1.5"], "warmup.*1.5"),
        (["--optimization.learning_rate", "-1"], "learning_rate.*-1"),
        (["--evaluate_every", "0"], "evaluate_every.*0"),
        (["--data.sentences_per_object", "0"], "sentences_per_object.*0"),
        (["--data.objects_per_image", "0"], "objects_per_image.*0"),
        (["--augmentation.flip", "2"], "flip.*2"),
        (["--augmentation.min_crop", "-0.1"], "min_crop.*-0.1"),
        (["--seed", "-1"], "seed.*-1"),
        (["--checkpoint_every", "-1"], "checkpoint_every.*-1"),
        (["--checkpoint_contents", "none"], "trained.*all.*none"),
        (["--log_every", "0"], "log_every.*0"),
        (["--tracker", "paper"], "tensorboard.*paper"),
    ],
)
def test_an_option_that_is_not_accepted_ends_the_command_with_its_name(options, message, capsys):
    with pytest.raises(SystemExit) as exit_:
        read_settings(options)
    assert exit_.value.code not in (None, 0)
    said = " ".join(capsys.readouterr().err.split("error:")[-1].split())
    assert re.search(message, said), said


def test_an_unknown_key_in_a_file_is_named(tmp_path, capsys):
    (tmp_path / "a.yaml").write_text("optimization: {epoch: 3}\n")
    with pytest.raises(SystemExit):
        load_settings(tmp_path / "a.yaml")
    assert "epoch" in capsys.readouterr().err.split("error:")[-1]


# Schedule


@pytest.mark.parametrize("schedule", ["multistep", "cosine"])
def test_the_rate_rises_in_the_warm_up_and_falls_after_it(schedule):
    optimization = OptimizationSettings(schedule=schedule, warmup=0.2, milestones=[0.5, 0.9])
    done = np.linspace(0, 1, 101)
    factors = np.array([train.learning_rate_factor(share, optimization) for share in done.tolist()])
    assert factors.min() >= 0 and factors.max() == 1.0
    rising, falling = factors[done < 0.2], factors[done >= 0.2]
    assert (np.diff(rising) > 0).all() and np.ptp(np.diff(rising[1:])) < 1e-12
    assert falling[0] == 1.0 and (np.diff(falling) <= 0).all()
    if schedule == "cosine":
        assert factors[60] == pytest.approx(0.5) and factors[-1] == pytest.approx(0.0)
    else:
        assert factors[[49, 51, 89, 91]].tolist() == pytest.approx([1.0, 0.1, 0.1, 0.01])


@pytest.mark.parametrize("schedule", ["multistep", "cosine"])
@pytest.mark.parametrize("warmup", [0.0, 1.0])
def test_a_warm_up_may_be_absent_or_all_there_is(schedule, warmup):
    optimization = OptimizationSettings(schedule=schedule, warmup=warmup)
    factors = [train.learning_rate_factor(share, optimization) for share in (0.0, 0.4, 1.0)]
    assert all(0 <= factor <= 1 for factor in factors)
    assert (factors[0] < factors[1]) == (warmup == 1.0)


# Runs


# a run that ends in the midst of its second epoch, as if the machine had failed
INTERRUPTED = """
import os, signal
from training.examples import batches
from training import train

asked, original = [], batches.TrainingExamples.__getitem__

def getitem(self, index):
    asked.append(self.epoch)
    if asked.count(1) == 7:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(self, index)

batches.TrainingExamples.__getitem__ = getitem
train.main()
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, tuple[Path, TrainingSettings, str]]:
    """Folder, settings and printed text of each run; they run side by side."""
    base = tmp_path_factory.mktemp("runs")
    refer = refer_settings(base / "refer-data")
    script = base / "interrupted.py"
    script.write_text(INTERRUPTED)
    tiny, refer_file = written(TINY, base / "tiny.yaml"), written(refer, base / "refer.yaml")

    def options(config: str, name: str) -> list[str]:
        return ["--config", config, "--output_dir", str(base / name)]

    whole = run([*LAUNCH, "training/train.py", *options(tiny, "whole")])
    killed = run([sys.executable, str(script), *options(tiny, "resumed")], **ON_CPU)
    killed.communicate()
    assert killed.returncode == -signal.SIGKILL
    assert len(json.loads((base / "resumed" / "history.json").read_text())) == 1
    resumed = run([*TRAIN, *options(tiny, "resumed")], **ON_CPU)
    referred = run([*TRAIN, *options(refer_file, "refer")], **ON_CPU)
    return {
        "whole": (base / "whole", TINY, finished(whole)),
        "resumed": (base / "resumed", TINY, finished(resumed)),
        "refer": (base / "refer", refer, finished(referred)),
    }


@pytest.mark.parametrize("name", ["whole", "resumed", "refer"])
def test_a_run_writes_what_it_did(runs, name):
    folder, settings, output = runs[name]
    assert load_settings(folder / "settings.yaml") == replace(settings, output_dir=str(folder))
    history = history_of(folder)
    assert [record["epoch"] for record in history] == list(range(1, settings.optimization.epochs + 1))
    assert all(np.isfinite(record["loss"]) for record in history)
    assert ["val" in record for record in history] == [
        i % settings.evaluate_every == 0 for i in range(1, len(history) + 1)
    ]
    assert "training" in output and f"/{settings.optimization.epochs * (4 if name != 'refer' else 2)} " in output
    assert {path.name for path in folder.iterdir()} == {
        *("settings.yaml", "history.json", "losses.jsonl", "tuning.json", "model", "checkpoint")
    }


@pytest.mark.parametrize("name", ["whole", "resumed", "refer"])
def test_the_saved_model_reproduces_the_best_validation_score(runs, name):
    folder, settings, _ = runs[name]
    model = SeraForReferringSegmentation.from_pretrained(folder / "model")
    processor = SeraProcessor.from_pretrained(folder / "model")
    (rows,) = load_splits(settings.data, ["val"])
    summary = summarize(score_sentences(model, processor, rows, Accelerator(cpu=True)))["all"]
    best = max((record["val"] for record in history_of(folder) if "val" in record), key=lambda val: val["mIoU"])
    assert summary == pytest.approx(best, abs=1e-3)
    assert best["num_expressions"] == sum(len(sentences) for sentences in rows["sentences"])
    assert best["oIoU"] > 0


def test_training_lowers_the_loss_and_finds_large_objects(runs):
    history = history_of(runs["refer"][0])
    assert history[-1]["loss"] < 0.8 * history[0]["loss"]
    assert history[-1]["val"]["mIoU"] > 0.5


def test_an_interrupted_run_ends_as_if_it_had_not_been(runs):
    assert history_of(runs["resumed"][0]) == history_of(runs["whole"][0])  # losses to the last bit
    weights = [load_file(runs[name][0] / "model" / "model.safetensors") for name in ("resumed", "whole")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0].keys() | weights[1].keys())
    assert "after epoch 1 of 3" in runs["resumed"][2]


@pytest.mark.parametrize("name", ["whole", "resumed", "refer"])
def test_every_step_and_the_routing_are_logged(runs, name):
    folder, settings, _ = runs[name]
    steps = [json.loads(line) for line in (folder / "losses.jsonl").read_text().splitlines()]
    assert [step["step"] for step in steps] == list(range(1, len(steps) + 1))
    assert steps[0]["learning_rate"] <= settings.optimization.learning_rate
    for record in history_of(folder):
        losses = [step["loss"] for step in steps if step["epoch"] == record["epoch"]]
        assert record["loss"] == pytest.approx(np.mean(losses), rel=1e-9)
        assert ("routing" in record) == ("val" in record)
        for tap in record.get("routing", {"taps": {}})["taps"].values():
            assert sum(tap["shares"].values()) == pytest.approx(1, abs=1e-5) and 0 <= tap["entropy"] <= np.log(4) + 1e-6
            assert (
                0 <= tap["mutual_information"] <= np.log(4) and 0 <= tap["dead_units"] <= 1 and len(tap["added"]) == 4
            )


def test_the_schedule_is_stepped_after_the_optimizer(runs):
    assert "lr_scheduler.step()" not in runs["whole"][2]  # torch warns where the first rate of a schedule is lost


def test_the_tuning_report_counts_the_models_parameters(runs):
    for name in ("whole", "refer"):
        folder, _, output = runs[name]
        report = json.loads((folder / "tuning.json").read_text())
        model = SeraForReferringSegmentation.from_pretrained(folder / "model")
        assert report["vision_total"] == sum(p.numel() for p in model.model.vision.tower.parameters())
        assert report["text_total"] == sum(p.numel() for p in model.model.text_tower.parameters())
        total = report["vision_total"] + report["text_total"]
        assert report["added"] == sum(p.numel() for p in model.parameters()) - total
        assert report["tower_share"] == (report["vision_trained"] + report["text_trained"]) / total
        assert f"{report['tower_share']:.3%}" in output


def test_norm_and_bias_tuning_keeps_the_pretrained_matrices(runs):
    folder, settings, _ = runs["refer"]
    trained = SeraForReferringSegmentation.from_pretrained(folder / "model").model
    before = {
        trained.vision.tower: Dinov2Model.from_pretrained(settings.model.vision_model),
        trained.text_tower: CLIPTextModel.from_pretrained(settings.model.text_model),
    }
    for tower, pretrained in before.items():
        expected = pretrained.state_dict()
        moved = {name for name, value in tower.state_dict().items() if not torch.equal(value, expected[name])}
        assert moved and all("norm" in name or name.endswith("bias") for name in moved)


# Switches


def loss_and_state(
    checkpointed: bool, synchronised: bool = False, cached: bool = False, **tuning: str
) -> tuple[float, dict, dict, int]:
    """Loss, gradients, state and bytes kept for the backward pass of one training step."""
    model = make_model(decoder_dropout=0.3, router_noise_std=0.5).train()
    apply_tuning(model, **{"vision": "full", "text": "full"} | tuning)
    if synchronised:  # as on several GPUs; a single process computes the same with it
        model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
    if checkpointed:
        checkpoint_activations(model)
    kept = []

    def keep(tensor):
        kept.append(tensor)
        return tensor

    inputs = make_inputs(3)
    if cached:  # as the feature cache gives them
        with torch.no_grad():
            inputs["image_states"] = model.model.vision.encode_states(inputs["pixel_values"])
    torch.manual_seed(0)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(**inputs, labels=torch.rand(3, 56, 56)).loss
    size = sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept}.values())
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return loss.item(), gradients, model.state_dict(), size


@pytest.mark.parametrize(
    ("synchronised", "tuning"),
    [
        (False, {}),
        (True, {}),
        (False, {"vision": "norm_bias", "text": "norm_bias"}),
        (False, {"vision": "frozen", "text": "frozen"}),
        (False, {"vision": "frozen"}),
        (False, {"vision": "frozen", "cached": True}),
    ],
)
def test_activation_checkpointing_changes_memory_alone(synchronised, tuning):
    loss, gradients, state, size = loss_and_state(checkpointed=False, **tuning)
    other_loss, other_gradients, other_state, other_size = loss_and_state(True, synchronised, **tuning)
    assert other_loss == loss and other_gradients.keys() == gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(other_gradients[name], gradient, msg=name)
    assert any("running_mean" in name for name in state)
    assert all(torch.equal(other_state[name], value) for name, value in state.items())  # batch norm moved once
    assert other_size < 0.8 * size


def test_trackers_are_given_names_that_each_of_them_takes():
    named = train.flat({"val": {"mIoU": 0.3, "Pr@0.5": 0.2}, "routing": {"taps": {"4": {"entropy": 1.0}}}})
    assert named == {"val/mIoU": 0.3, "val/Pr_at_0.5": 0.2, "routing/taps/4/entropy": 1.0}
    assert all(re.fullmatch(r"[/\w. :-]+", name) for name in named)  # MLflow's rule, the narrowest


def test_only_what_went_wrong_in_writing_is_told_as_such(tmp_path):
    with pytest.raises(RuntimeError, match=r"^Expected all tensors"), writing(tmp_path / "folder"):
        raise RuntimeError("Expected all tensors to be on the same device")
    with pytest.raises(OSError, match=r"folder could not be written.*No space left"), writing(tmp_path / "folder"):
        raise OSError("No space left on device")


def test_a_full_gpu_is_told_with_what_to_lower():
    said = train.message(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nmore"))
    assert "CUDA out of memory" in said and "optimization.batch_size" in said and "\n" not in said
    assert train.message(RuntimeError("Expected all tensors to be on the same device")) is None


def test_a_run_with_a_tracker_and_activation_checkpointing(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    settings = replace(TINY, activation_checkpointing=True, tracker="tensorboard", log_every=3)
    path, folder = written(settings, tmp_path / "tiny.yaml"), tmp_path / "run"
    finished(run([*TRAIN, "--config", path, "--output_dir", str(folder)], **ON_CPU))
    events = EventAccumulator(str(folder / "logs" / "sera")).Reload()
    logged = {event.step: event.value for event in events.Scalars("train/loss")}
    steps = [json.loads(line) for line in (folder / "losses.jsonl").read_text().splitlines()]
    assert logged == pytest.approx({step["step"]: step["loss"] for step in steps})
    scores = [event.value for event in events.Scalars("val/mIoU")]
    assert scores == pytest.approx([record["val"]["mIoU"] for record in history_of(folder)])
    figures = ("entropy", "deviation", "mutual_information", "dead_units", "added/shape", "shares/shape")
    assert {f"routing/taps/{tap}/{name}" for tap in ("1", "2") for name in figures} <= set(events.Tags()["scalars"])


def test_a_compiled_run_trains_and_saves_as_any_other(tmp_path, monkeypatch):
    """Compiled by the tracing part of torch.compile alone: what the compiler behind it makes of the graph is not ours."""
    compiled, original = [], torch.nn.Module.compile

    def compile_(self, *arguments, **options):
        compiled.append(self)
        original(self, *arguments, **options, backend="eager")

    monkeypatch.setattr(torch.nn.Module, "compile", compile_)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    path = written(replace(TINY, optimization=replace(TINY.optimization, epochs=1)), tmp_path / "tiny.yaml")
    for name, switch in (("plain", "false"), ("compiled", "true")):
        arguments = ["train.py", "--config", path, "--output_dir", str(tmp_path / name), "--compile", switch]
        monkeypatch.setattr(sys, "argv", arguments)
        train.main()
    assert len(compiled) == 1 and isinstance(compiled[0], SeraForReferringSegmentation)
    plain, other = (history_of(tmp_path / name)[0] for name in ("plain", "compiled"))
    assert other["loss"] == pytest.approx(plain["loss"], abs=1e-3)
    assert other["val"]["num_expressions"] == plain["val"]["num_expressions"]
    names = [load_file(tmp_path / name / "model" / "model.safetensors").keys() for name in ("plain", "compiled")]
    assert names[0] == names[1]


# Going on under other settings


def test_a_run_does_not_go_on_under_other_settings():
    free = {"output_dir": "elsewhere", "num_workers": 3, "checkpoint_every": 7, "checkpoint_contents": "all"}
    train.check_same_run(replace(TINY, **free, activation_checkpointing=True, tracker="tensorboard"), TINY)
    for changed in (
        replace(TINY, seed=1),
        replace(TINY, model=replace(TINY.model, text_tuning="frozen")),
        replace(TINY, optimization=replace(TINY.optimization, epochs=4)),
    ):
        field = next(name for name, value in asdict(changed).items() if value != asdict(TINY)[name])
        with pytest.raises(ValueError, match=f"{TINY.output_dir}.*{field}"):
            train.check_same_run(changed, TINY)


# Bad input


@pytest.fixture
def say(tmp_path, monkeypatch, capsys):
    """Runs the command in this process; returns its one message, having seen that nothing was written."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    path = written(TINY, tmp_path / "tiny.yaml")

    def say(*options: object) -> str:
        arguments = ["train.py", "--config", path, "--output_dir", tmp_path / "out", *options]
        monkeypatch.setattr(sys, "argv", [str(argument) for argument in arguments])
        with pytest.raises(SystemExit) as error:
            run_command(train.main, train.message)
        assert not (tmp_path / "out").exists()
        assert error.value.code not in (None, 0)
        return capsys.readouterr().err + str(error.value)

    return say


def test_what_a_run_cannot_use_is_said_before_any_work(say, tmp_path, monkeypatch):
    assert "data.root" in say("--data.source", "refer")
    assert str(tmp_path / "no-root") in say("--data.source", "refer", "--data.root", tmp_path / "no-root")
    with monkeypatch.context() as patch:  # the names are looked at before the first scene is drawn
        patch.setattr(splits, "generate_scenes", lambda *args, **options: pytest.fail("a split was drawn"))
        assert "'nope'" in say("--data.val_split", "nope")
        assert "'nope'" in say("--data.train_split", "nope")
    (tmp_path / "vision").mkdir()
    assert "model_type" in say("--model.vision_model", tmp_path / "vision")
    config = json.dumps(TINY.model.config | {"fusion_dims": 3})
    assert "'fusion_dims'" in say("--model.config", config)
    assert "five" in say("--model.config", json.dumps(TINY.model.config | {"decoder_num_layers": "five"}))
    assert "60" in say("--data.image_size", "[60,64]")  # no multiple of the patch
    assert "cannot be combined" in say("--compile", "true", "--activation_checkpointing", "true")
    assert "model.tokenizer is for a fresh model" in say("--model.pretrained", tmp_path, "--model.tokenizer", "x")
    assert "wandb" in say("--tracker", "wandb")  # which is not installed
    if not torch.cuda.is_available():
        assert "fp16" in say("--mixed_precision", "fp16")
    with monkeypatch.context() as patch:  # a launcher whose processes do not find each other
        patch.setenv("WORLD_SIZE", "2")
        assert "ACCELERATE_USE_CPU" in say()


@pytest.mark.parametrize("option", ["pretrained", "vision_model", "text_model", "tokenizer"])
@pytest.mark.parametrize("folder", ["/no/such/folder", "./no-such-folder", "outputs/no/folder"])
def test_a_folder_that_is_not_there_is_named_before_any_work(say, option, folder, monkeypatch):
    monkeypatch.setattr(train, "load_training_splits", lambda data: pytest.fail("the data were read"))
    assert f"model.{option}: There is no folder {folder}." in say(f"--model.{option}", folder)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"optimization": {"learning_rate": float("inf")}}, "learning_rate is inf"),
        ({"optimization": {"max_grad_norm": float("inf")}}, "max_grad_norm is inf"),
        ({"optimization": {"milestones": [0.5, 70]}}, "milestones are .*70.*from 0 to 1"),
        ({"data": {"image_size": (0, 64)}}, r"image_size is \[0, 64\]"),
        ({"data": {"copy_paste": 3}}, "data.copy_paste needs the feature cache"),
        ({"data": {"cached_versions": 2}}, "frozen vision tower, but model.vision_tuning is 'full'"),
        (
            {"data": {"cached_versions": 2, "streaming": True}, "model": {"vision_tuning": "frozen"}},
            "exclude each other",
        ),
        ({"augmentation": {"feature_dropout": 1.0}}, "feature_dropout is 1"),
    ],
)
def test_settings_that_make_no_sense_are_refused(options, message):
    groups = {name: replace(getattr(TINY, name), **changes) for name, changes in options.items()}
    with pytest.raises(ValueError, match=message):
        check_settings(replace(TINY, **groups))


def test_settings_that_make_sense_are_kept(tmp_path, monkeypatch):
    assert check_settings(TINY) == TINY
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "text").mkdir()
    given = replace(TINY, model=replace(TINY.model, text_model="~/text"))
    assert check_settings(given).model.text_model == str(tmp_path / "text")
    (tmp_path / "out").touch()
    with pytest.raises(ValueError, match=r"output_dir is .*out, a file"):
        check_settings(replace(TINY, output_dir=str(tmp_path / "out")))


def test_a_refer_folder_without_a_tokenizer_or_split_is_named(say, tmp_path):
    folder = Folder(tmp_path / "data")
    folder.load()
    root = ["--data.source", "refer", "--data.root", tmp_path / "data", "--data.image_size", "[48,64]"]
    assert "tokenizer" in say(*root)
    assert "'nope'" in say(*root, "--data.val_split", "nope")
    (folder.image_folder / "COCO_1.png").unlink()
    assert "COCO_1.png" in say(*root)


def test_the_script_ends_with_a_message_alone(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    nowhere = str(tmp_path / "nowhere")
    monkeypatch.setattr(sys, "argv", ["train.py", "--output_dir", str(tmp_path / "out"), "--data.root", nowhere])
    with pytest.raises(SystemExit) as error:  # any other exception would print a traceback
        runpy.run_path(str(REPOSITORY / "training" / "train.py"), run_name="__main__")
    assert error.value.code not in (None, 0)
    assert nowhere in capsys.readouterr().err + str(error.value)


@pytest.mark.parametrize("script", ["train.py", "evaluation.py", "preparation.py"])
def test_a_pickle_that_names_code_ends_every_command_with_one_sentence(script, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    root, output, model = (str(tmp_path / name) for name in ("data", "out", "model"))
    Folder(tmp_path / "data").load()
    (refs,) = (tmp_path / "data").rglob("refs(*).p")
    refs.write_bytes(pickle.dumps([{"ref_id": Path("x")}]))
    make_model().save_pretrained(model)
    tokenizer = tiny_tokenizer()
    SeraProcessor(SeraImageProcessor(size={"height": 56, "width": 56}), tokenizer).save_pretrained(model)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    options = {
        "train.py": ["--data.root", root, "--model.tokenizer", str(tmp_path / "tokenizer"), "--output_dir", output],
        "evaluation.py": [model, "--data.root", root, "--split", "val"],
        "preparation.py": ["refer", root, "--output", output],
    }
    monkeypatch.setattr(sys, "argv", [script, *options[script]])
    with pytest.raises(SystemExit, match=r"^error: .*refs\(unc\)\.p.* names .*pathlib"):
        runpy.run_path(str(REPOSITORY / "training" / script), run_name="__main__")

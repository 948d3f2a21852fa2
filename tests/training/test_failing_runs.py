"""Runs that must not go on: numbers that are not finite, a second run in one folder, a folder that holds another run."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from conftest import make_inputs
from restarts import NOISY, printed, start, wait_for_step
from runs import TINY, written

from modeling_sera import SeraForReferringSegmentation
from training.configuration import TrainingSettings, dump_settings
from training.learning.checkpoints import Progress, clear_output
from training.learning.losses import FiniteLogits, LossLog, advice
from training.support.files import write_json

SHORT = replace(TINY, optimization=replace(TINY.optimization, epochs=1))


def refused(process, folder: Path) -> str:
    """The one sentence with which a run ended."""
    process.join()
    assert process.exitcode == 1, printed(folder)
    assert "Traceback" not in printed(folder)
    return printed(folder).split("error: ")[1]


def read_strictly(text: str):
    """JSON as other programs read it."""
    return json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))


# Numbers that are not finite


def answer_nothing_finite() -> None:
    """Training goes well, but the model's answers are not finite."""
    forward = SeraForReferringSegmentation.forward

    def broken(self, *arguments, **options):
        outputs = forward(self, *arguments, **options)
        return outputs if self.training else replace(outputs, logits=outputs.logits * float("nan"))

    SeraForReferringSegmentation.forward = broken


def test_a_run_whose_loss_is_not_finite_stops_and_keeps_nothing_of_it(tmp_path):
    folder = tmp_path / "run"
    said = refused(start(SHORT, folder, "--optimization.learning_rate", "1e30", "--log_every", "1"), folder)
    assert "at step 2 (epoch 1), and training has stopped" in said
    assert "row " in said and "(image " in said and "optimization.learning_rate (it is 1e+30)" in said
    assert not (folder / "model").exists() and not (folder / "checkpoint").exists()
    lines = [read_strictly(line) for line in (folder / "losses.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1]


def test_a_model_whose_answers_are_not_finite_is_never_kept(tmp_path):
    folder = tmp_path / "run"
    said = refused(start(SHORT, folder, prepare=answer_nothing_finite), folder)
    assert "after epoch 1 (step 4) the logits of " in said and "validation expressions are not finite" in said
    assert not (folder / "model").exists() and not (folder / "checkpoint").exists()


def log_of(folder: Path, numbers: list[tuple[float, float]], accelerator: Accelerator | None = None) -> LossLog:
    """A log of steps with these losses and norms of the gradients."""
    log = LossLog(accelerator or Accelerator(cpu=True), folder / "losses.jsonl", TrainingSettings())
    for step, (loss, norm) in enumerate(numbers, start=1):
        log.add(
            {"step": step, "epoch": 1}, torch.tensor([loss, 0.0]), torch.tensor(norm), [(10 * step, "the zebra")] * 9
        )
    return log


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
@pytest.mark.parametrize("of", ["the loss became", "the gradients are no longer finite"])
def test_the_first_step_that_is_not_finite_is_named_with_its_rows(tmp_path, number, of):
    wrong = (number, 1.0) if of == "the loss became" else (0.5, number)
    log, progress = log_of(tmp_path, [(0.5, 1.0), (0.25, 1.0), wrong, (float("nan"), 1.0)]), Progress()
    with pytest.raises(FloatingPointError) as error:
        log.write(progress)
    said = str(error.value)
    assert said.startswith(of) and "at step 3 (epoch 1)" in said
    assert said.count("row 30 'the zebra'") == 6 and "and 3 more" in said
    records = [read_strictly(line) for line in log.path.read_text().splitlines()]
    assert [record["loss"] for record in records] == [0.5, 0.25] and progress.epoch_steps == 2


def test_a_step_that_the_scaler_of_fp16_skips_is_no_failure(tmp_path):
    accelerator = Accelerator(cpu=True)
    accelerator.scaler = object()
    log = log_of(tmp_path, [(0.5, float("inf")), (0.4, 1.0)], accelerator)
    assert [record["loss"] for record in log.write(Progress())] == pytest.approx([0.5, 0.4])
    accelerator.scaler = None


def test_answers_are_looked_at_without_changing_them(model):
    accelerator, logits = Accelerator(cpu=True), FiniteLogits(model)
    with torch.no_grad(), logits.watch():
        expected = model(**make_inputs(3)).logits
    assert torch.equal(model(**make_inputs(3)).logits, expected) and logits.counts.tolist() == [0, 3]
    logits.check(accelerator, TrainingSettings(), Progress())
    model.train()  # in inference on a CPU the model itself refuses
    with torch.no_grad(), logits.watch():
        model.decoder.register_forward_hook(lambda module, args, out: (out[0] * float("inf"), *out[1:]))
        model(**make_inputs(2))
    with pytest.raises(FloatingPointError, match="the logits of 2 of 5 validation expressions"):
        logits.check(accelerator, TrainingSettings(), Progress())


def test_the_advice_fits_the_settings():
    settings = TrainingSettings(mixed_precision="fp16")
    assert "bf16" in advice(settings, 5) and "max_grad_norm" not in advice(settings, 5)
    settings.optimization.max_grad_norm = 0.0
    assert "max_grad_norm" in advice(settings, 5)
    assert "Look at the images" in advice(settings, 1) and "Look at the images" not in advice(settings, 5)


def test_no_file_holds_a_number_that_json_does_not_know(tmp_path):
    with pytest.raises(ValueError, match=r"a\.json is not written: a number in it is not finite"):
        write_json(tmp_path / "a.json", {"loss": float("nan")})
    assert list(tmp_path.iterdir()) == []


# One folder, one run


def test_a_second_run_in_one_folder_is_refused_and_the_first_goes_on_after_its_end(tmp_path):
    folder = tmp_path / "run"
    long = replace(NOISY, optimization=replace(NOISY.optimization, epochs=100))
    first = start(long, folder)
    wait_for_step(first, folder, 4, None)
    second = start(long, tmp_path / "second", "--output_dir", str(folder))
    said = refused(second, tmp_path / "second")
    assert f"{folder}: another command is at work there; choose another output_dir" in said
    assert first.is_alive()
    first.kill()
    first.join()
    before = (folder / "losses.jsonl").stat().st_mtime_ns
    third = start(long, folder)
    wait_for_step(third, folder, 5, before)
    assert "going on" in printed(folder)
    third.kill()
    third.join()


def leave_behind(folder: Path, settings: TrainingSettings, *names: str) -> None:
    """What a run leaves that was stopped before its first checkpoint."""
    folder.mkdir()
    (folder / "settings.yaml").write_text(dump_settings(settings))
    for name in ("losses.jsonl", "history.json", "tuning.json", "logs/sera/events", ".model.partial/half", *names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("of the first run")


def test_a_folder_that_is_written_a_second_time_holds_nothing_of_the_first(tmp_path):
    folder = tmp_path / "run"
    leave_behind(folder, replace(SHORT, seed=5))
    (folder / "notes.txt").write_text("the user's own")
    clear_output(replace(SHORT, output_dir=str(folder)), Accelerator(cpu=True))
    assert os.listdir(folder) == ["notes.txt"]


def test_a_model_is_removed_only_by_the_run_that_makes_it_again(tmp_path):
    folder = tmp_path / "run"
    settings = replace(SHORT, output_dir=str(folder))
    leave_behind(folder, replace(settings, seed=5), "model/model.safetensors")
    held = sorted(os.listdir(folder))
    with pytest.raises(ValueError, match="holds a run with other settings: seed was 5, now it is 0"):
        clear_output(settings, Accelerator(cpu=True))
    assert sorted(os.listdir(folder)) == held
    (folder / "settings.yaml").unlink()
    with pytest.raises(ValueError, match=r"model is there already, and no .*settings\.yaml says of which run"):
        clear_output(settings, Accelerator(cpu=True))
    written(settings, folder / "settings.yaml")
    clear_output(settings, Accelerator(cpu=True))
    assert os.listdir(folder) == []

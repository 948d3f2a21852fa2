"""Two processes on one machine: one model at every evaluation, one run after a restart, the figures of a single process."""

import gc
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from conftest import REPOSITORY
from restarts import NOISY, assert_same_run, printed, start, wait_for_step
from runs import ENVIRONMENT, written
from torch.nn.parallel import DistributedDataParallel

from modeling_sera import SeraForReferringSegmentation
from processing_sera import SeraProcessor
from training.configuration import TrainingSettings
from training.evaluation import score_sentences
from training.examples.splits import load_splits
from training.scoring.metric import summarize
from training.support.locks import locked_folder

# 31 images are no multiple of two processes' batches of one, and three to score leave one process with less to do
SETTINGS = replace(NOISY, data=replace(NOISY.data, num_scenes=(31, 3, 1)), num_workers=0)

# the script itself, but the processes compare what they are about to score with: weights, batch-norm statistics, vocabulary
COMPARING = """
import os
import runpy
from accelerate.utils import gather_object
from training import evaluation

os.cpu_count = lambda: 1
original = evaluation.score_sentences

def score(model, processor, rows, accelerator, **options):
    state = {name: value.double().sum().item() for name, value in model.state_dict().items()}
    state["vocabulary"] = processor.tokenizer.backend_tokenizer.to_str()
    first, second = gather_object([state])
    differing = [name for name in first if first[name] != second[name]]
    assert not differing, f"{len(differing)} differ, the first being {differing[0]}"
    print("compared")
    return original(model, processor, rows, accelerator, **options)

evaluation.score_sentences = score
runpy.run_path("training/train.py", run_name="__main__")
"""


# two processes, each with its own uneven batches, make the gradients of one process with all of them as one batch
WEIGHING = """
import sys
from pathlib import Path
import torch
from accelerate import Accelerator
from training.learning.steps import accumulate_gradients
from weighing import *

every = uneven_batches((1, 4, 2, 3))
expected, loss = expected_gradients(every)
accelerator = Accelerator(cpu=True)
mine = every[accelerator.process_index :: 2]
model = accelerator.prepare(resting_model())
losses = accumulate_gradients(model, mine, accelerator)
assert_same_gradients(gradients_of(accelerator.unwrap_model(model)), expected)
torch.testing.assert_close(accelerator.reduce(losses, "sum")[0], loss)
# its sampler deals the rows out in turn, in an order of its own
assert_same_gradients(gradients_of_trainer(resting_model(), every, Path(sys.argv[1]), processes=2), expected)
print("weighed")
"""


def launch(script: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    """Two processes of a script, started by torchrun, that ended well."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--rdzv_backend", "c10d"]
    command += ["--rdzv_endpoint", "localhost:0", str(script), *arguments]
    environment = ENVIRONMENT | {"ACCELERATE_USE_CPU": "true"} | environment
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """The folder of a run of two processes that nothing interrupts, started by torchrun."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    script = folder.with_suffix(".py")
    script.write_text(COMPARING)
    options = ["--config", written(SETTINGS, folder.with_suffix(".yaml")), "--output_dir", str(folder)]
    done = launch(script, *options)
    assert done.stdout.count("compared") == 2 * SETTINGS.optimization.epochs
    assert "cannot synchronise" in done.stderr
    return folder


def start_pair(folder: Path, settings: TrainingSettings = SETTINGS, prepare: Callable | None = None) -> list:
    """Two processes of one run, as a launcher would start them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    ranks = ({"RANK": rank, "LOCAL_RANK": rank} for rank in ("0", "1"))
    return [start(settings, folder, prepare=prepare, **rank, **common) for rank in ranks]


def test_every_expression_weighs_the_same_in_two_processes(tmp_path):
    script = tmp_path / "weigh.py"
    script.write_text(WEIGHING)
    places = [REPOSITORY, REPOSITORY / "tests"]
    done = launch(script, str(tmp_path / "trainer"), PYTHONPATH=os.pathsep.join(map(str, places)))
    assert done.stdout.count("weighed") == 2


def check_what_outlives_the_group() -> None:
    """Let the end of the group of processes fail while a model lives that averages its gradients."""
    destroy = torch.distributed.destroy_process_group

    def checked(*arguments) -> None:
        print("the group ends", flush=True)
        assert not [thing for thing in gc.get_objects() if isinstance(thing, DistributedDataParallel)]
        destroy(*arguments)

    torch.distributed.destroy_process_group = checked


def test_a_killed_pair_goes_on_to_the_last_bit(whole, tmp_path):
    folder = tmp_path / "run"
    for process, step in zip(pair := start_pair(folder), (5, 5), strict=True):
        wait_for_step(pair[0], folder, step, None)
        process.kill()
    for process in pair:
        process.join()
        assert process.exitcode in (-signal.SIGKILL, 1)  # the second may have missed the first before it was killed
    assert (folder / "checkpoint" / "random_states_1.pkl").is_file()
    for rank, process in enumerate(start_pair(folder)):
        process.join()
        assert process.exitcode == 0, printed(folder, rank)
    assert "going on" in printed(folder)
    assert_same_run(folder, whole)


def test_a_set_smaller_than_a_batch_of_each_is_trained_on(tmp_path):
    optimization = replace(SETTINGS.optimization, batch_size=2, epochs=1)
    few = replace(SETTINGS, data=replace(SETTINGS.data, num_scenes=(3, 2, 1)), optimization=optimization)
    # the last to hold the group could wait for its thread, and that for the interpreter's lock, for ever
    for rank, process in enumerate(start_pair(tmp_path / "run", few, check_what_outlives_the_group)):
        process.join()
        assert process.exitcode == 0, printed(tmp_path / "run", rank)
        assert "the group ends" in printed(tmp_path / "run", rank)
    assert len((tmp_path / "run" / "losses.jsonl").read_text().splitlines()) == 1


def lose_the_loss_of_one() -> None:
    """The third batch of the second process has a loss that is not finite."""
    check_what_outlives_the_group()
    forward, calls = SeraForReferringSegmentation.forward, []

    def broken(self, *arguments, **options):
        calls.append(1)
        outputs = forward(self, *arguments, **options)
        is_lost = os.environ["RANK"] == "1" and len(calls) == 3
        return replace(outputs, loss=outputs.loss * float("nan")) if is_lost else outputs

    SeraForReferringSegmentation.forward = broken


def test_both_stop_where_one_has_a_loss_that_is_not_finite(tmp_path):
    said = []
    for rank, process in enumerate(start_pair(tmp_path / "run", prepare=lose_the_loss_of_one)):
        process.join()
        output = printed(tmp_path / "run", rank)
        assert process.exitcode == 1 and "Traceback" not in output and "the group ends" in output, output
        said.append(output.split("error: ")[1].splitlines()[0])
    assert said[0] == said[1] and "the loss became nan at step 2 (epoch 1)" in said[0]
    assert len((tmp_path / "run" / "losses.jsonl").read_text().splitlines()) == 1


def test_both_are_refused_where_another_run_is_at_work(tmp_path):
    with locked_folder(tmp_path / "run", "wait"):
        pair = start_pair(tmp_path / "run")
        for rank, process in enumerate(pair):
            process.join()
            assert process.exitcode == 1 and "another command is at work there" in printed(tmp_path / "run", rank)


def test_one_process_does_not_go_on_for_two(whole, tmp_path):
    process = start(SETTINGS, tmp_path / "run", "--output_dir", str(whole))
    process.join()
    assert process.exitcode == 1 and "2 processes, now there are 1" in printed(tmp_path / "run")


def test_one_process_scores_the_model_of_two_as_they_did(whole):
    model = SeraForReferringSegmentation.from_pretrained(whole / "model")
    processor = SeraProcessor.from_pretrained(whole / "model")
    (rows,) = load_splits(SETTINGS.data, ["val"])
    summary = summarize(score_sentences(model, processor, rows, Accelerator(cpu=True)))["all"]
    history = json.loads((whole / "history.json").read_text())
    best = max((record["val"] for record in history), key=lambda val: val["mIoU"])
    assert summary.keys() == best.keys() and summary["num_expressions"] == best["num_expressions"]
    assert summary == pytest.approx(best, abs=1e-6)

"""Train and score every variant of an ablation: `python training/ablation.py GRID.yaml [--jobs N] [--minutes M] [--only NAME …]`.

Each run is `training/train.py` and then `training/evaluation.py`, each in its own process. A finished run is one line of
`runs.jsonl`. After an interruption, the same command continues the other runs from their last checkpoints. Tables and figures show
the finished runs. (Ours.)
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections import deque
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from training.ablations.grid import Grid, Records, Run, read_grid
from training.ablations.tables import write_results
from training.configuration import dump_settings
from training.examples.splits import check_split
from training.scoring.reports import SELECTION_FIELDS
from training.support.commands import run_command
from training.support.environment import describe_hardware, library_versions, without_folders, without_paths
from training.support.files import write_text
from training.support.locks import locked_folder

logger = logging.getLogger(__name__)

REPOSITORY = Path(__file__).resolve().parents[1]
# in the last seconds, a run is stopped once it has saved a checkpoint, and no run is started
LAST_SECONDS = 30.0
HEARTBEAT = 5.0  # seconds between notes of the time that a run has taken
LOSSES_KEPT = 100  # points of the loss curve in a record
SCRIPTS = {"training": REPOSITORY / "training" / "train.py", "evaluation": REPOSITORY / "training" / "evaluation.py"}
PHASES = tuple(SCRIPTS)
OK, FAILED, UNFINISHED = 0, 1, 3  # exit codes

# As in `make demo`: memory that a step frees is kept for the next step. It saves a sixth of the time of small models.
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": str(2**30), "MALLOC_TRIM_THRESHOLD_": str(2**32)}


def main(arguments: list[str] | None = None) -> int:
    """The command line. Exit codes: 0 all runs are done, 1 a run failed, 3 the time is over and runs are left."""
    options, extra = _parser().parse_known_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if options.minutes and 60 * options.minutes <= LAST_SECONDS:
        raise ValueError(
            f"--minutes {options.minutes:g} is too short: no run is started in the last {LAST_SECONDS:g} seconds."
        )
    grid = read_grid(Path(options.grid), extra)
    if options.against:
        if options.against not in grid.variants:
            raise ValueError(f"--against is {options.against!r}; the variants are {', '.join(grid.variants)}.")
        grid = replace(grid, baseline=options.against)
    output = Path(options.output or Path("outputs", "ablation", grid.path.stem))
    runs = grid.runs(options.only, options.seeds)
    checked = []
    for run in runs:
        if run.settings.data not in checked:
            check_split(run.settings.data, grid.split)
            checked.append(run.settings.data)
    with locked_folder(output, "name another folder with --output") as lock:
        work = Work(grid, output, Machine(options.jobs, lock))
        deadline = time.monotonic() + 60 * options.minutes if options.minutes else float("inf")
        try:
            failed = work.do(runs, deadline)
        finally:
            finished = grid.finished(work.records.read())
            write_results(grid, list(finished.values()), output, command_of(grid))
    missing = [run.key for run in runs if run.key not in finished]
    logger.info(f"{len(runs) - len(missing)} of {len(runs)} runs are done; tables: {output / 'results.md'}")
    for key in failed:
        logger.error(f"failed: {output / 'runs' / key / 'log.txt'}")
    return FAILED if failed else UNFINISHED if missing else OK


@dataclass
class Machine:
    """The machine that runs share. Each run has its part of the cores and, if there are GPUs, one of them.

    Attributes:
        jobs: Number of runs at the same time.
        lock: File descriptor of the output's lock. Every process of a run holds it.
        threads: Number of threads of each run: OMP_NUM_THREADS if it is set.
        gpus: Names of the GPUs. A run sees one of them.
    """

    jobs: int
    lock: int
    threads: int = field(init=False)
    gpus: list[str] = field(init=False)

    def __post_init__(self):
        wanted = os.environ.get("OMP_NUM_THREADS", "")
        self.threads = int(wanted) if wanted.isdigit() else max(describe_hardware()["cores"] // self.jobs, 1)
        named = os.environ.get("CUDA_VISIBLE_DEVICES")
        self.gpus = [name for name in (named or "").split(",") if name]
        if named is None:
            self.gpus = [str(i) for i in range(torch.cuda.device_count())]

    def start(self, command: list[str], slot: int, log: Path) -> subprocess.Popen:
        """Start a script of `training/`. Its output is added to a file."""
        environment = ALLOCATOR | os.environ | {"OMP_NUM_THREADS": str(self.threads), "TOKENIZERS_PARALLELISM": "false"}
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))
        if self.gpus:
            environment["CUDA_VISIBLE_DEVICES"] = self.gpus[slot % len(self.gpus)]
        with log.open("ab") as file:
            return subprocess.Popen(
                [sys.executable, str(REPOSITORY / "training" / "support" / "child.py"), str(os.getpid()), *command],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env=environment,
                pass_fds=(self.lock,),
                start_new_session=True,
            )


@dataclass
class Job:
    """A process that computes one phase of a run."""

    run: Run
    folder: Path
    slot: int
    process: subprocess.Popen
    phase: str
    state: dict[str, Any]  # stored in the folder: the seconds of each phase, and the phases that are done
    noted: float
    checkpoint: int  # time of its last checkpoint, when it was last checked


class Work:
    """The runs that are being computed."""

    def __init__(self, grid: Grid, output: Path, machine: Machine):
        self.grid, self.output, self.machine = grid, output, machine
        self.records = Records(output / "runs.jsonl")
        self.jobs: list[Job] = []

    def do(self, runs: list[Run], deadline: float) -> list[str]:
        """Compute the unfinished runs until the deadline (of `time.monotonic`). Returns the keys of the runs that failed."""
        finished = self.grid.finished(self.records.read())
        waiting = deque(run for run in runs if run.key not in finished)
        failed = []
        try:
            while waiting or self.jobs:
                left = deadline - time.monotonic()
                while waiting and len(self.jobs) < self.machine.jobs and left > LAST_SECONDS:
                    self._begin(waiting.popleft())
                for job in list(self.jobs):
                    if job.process.poll() is not None:
                        self._note_time(job)
                        self.jobs.remove(job)
                        if job.process.returncode:
                            failed.append(job.run.key)
                            logger.error(f"{job.run.key}: the {job.phase} failed, see {job.folder / 'log.txt'}")
                        else:
                            self._go_on(job, left)
                    elif left < 0 or (left < LAST_SECONDS and _written(job.folder / "checkpoint") > job.checkpoint):
                        self._stop(job)
                    else:
                        if time.monotonic() - job.noted > HEARTBEAT:
                            self._note_time(job)
                        if left > LAST_SECONDS:
                            job.checkpoint = _written(job.folder / "checkpoint")
                if left <= LAST_SECONDS and not self.jobs:
                    break
                time.sleep(0.1)
        finally:
            for job in list(self.jobs):
                self._stop(job)
        return failed

    def _begin(self, run: Run) -> None:
        folder = self.output / "runs" / run.key
        folder.mkdir(parents=True, exist_ok=True)
        state_file = folder / "ablation.json"
        state = {"seconds": dict.fromkeys(PHASES, 0.0), "done": [], "threads": self.machine.threads}
        if state_file.exists():
            state |= json.loads(state_file.read_text(encoding="utf-8"))
        slot = min(set(range(self.machine.jobs)) - {job.slot for job in self.jobs})
        self._start(run, folder, slot, state)

    def _start(self, run: Run, folder: Path, slot: int, state: dict[str, Any]) -> None:
        """Start the first phase that is not done."""
        phase = next(phase for phase in PHASES if phase not in state["done"])
        if phase == "training":
            config = folder / "config.yaml"
            write_text(config, dump_settings(replace(run.settings, output_dir=str(folder))))
            arguments = ["--config", str(config)]
        else:
            arguments = [str(folder / "model"), "--split", self.grid.split, "--output", str(self._evaluation(run))]
            if run.settings.mixed_precision != "no":
                arguments += ["--mixed_precision", run.settings.mixed_precision]
            for name, value in run.evaluation.items():
                arguments += [f"--{name}"] if value is True else [f"--{name}", str(value)]
        process = self.machine.start([str(SCRIPTS[phase]), *arguments], slot, folder / "log.txt")
        job = Job(run, folder, slot, process, phase, state, time.monotonic(), _written(folder / "checkpoint"))
        self.jobs.append(job)

    def _go_on(self, job: Job, left: float) -> None:
        """After a phase: start the next one, or write the run's line. Only that line says that the last phase is done."""
        if job.phase != PHASES[-1]:
            job.state["done"].append(job.phase)
            self._write_state(job)
            if left > LAST_SECONDS:
                self._start(job.run, job.folder, job.slot, job.state)
            return
        record = self._record(job)
        self.records.add(record)
        shutil.rmtree(job.folder / "checkpoint", ignore_errors=True)  # no run will continue from it
        score = record["summary"]["as written"]["all"]["mIoU"]
        logger.info(f"{job.run.key}: mIoU {100 * score:.1f}, {sum(record['seconds'].values()):.0f} s")

    def _record(self, job: Job) -> dict[str, Any]:
        """The results of a run and its settings, as plain values."""
        run, folder, evaluation = job.run, job.folder, self._evaluation(job.run)
        scored = json.loads(evaluation.read_text(encoding="utf-8"))
        lines = (folder / "losses.jsonl").read_text(encoding="utf-8").splitlines()
        losses = [json.loads(line) for line in lines]
        each = -(-len(losses) // LOSSES_KEPT)
        thinned = [losses[start : start + each] for start in range(0, len(losses), each)]
        return {
            "key": run.key,
            "recipe": run.recipe,
            "variant": run.variant,
            "seed": run.seed,
            "overrides": without_paths(run.overrides),
            "settings": without_paths(asdict(run.settings)),
            "tuning": json.loads((folder / "tuning.json").read_text(encoding="utf-8")),
            "curve": json.loads((folder / "history.json").read_text(encoding="utf-8")),
            "losses": [[part[-1]["step"], sum(one["loss"] for one in part) / len(part)] for part in thinned],
            **{name: scored[name] for name in ("split", "counts", *SELECTION_FIELDS, "summary", "intervals", "slices")},
            "evaluation": str(evaluation.relative_to(self.output)),
            "seconds": job.state["seconds"],
            "threads": job.state["threads"],
            "jobs": self.machine.jobs,
            "command": f"{command_of(self.grid)} --only {shlex.quote(run.variant)} --seeds {run.seed}",
            "hardware": describe_hardware(),
            "versions": library_versions(),
        }

    def _evaluation(self, run: Run) -> Path:
        return self.output / "evaluations" / f"{run.key}.json"

    def _stop(self, job: Job) -> None:
        with suppress(ProcessLookupError):
            os.killpg(job.process.pid, signal.SIGKILL)
        job.process.wait()
        self._note_time(job)
        self.jobs.remove(job)

    def _note_time(self, job: Job) -> None:
        now = time.monotonic()
        job.state["seconds"][job.phase] += now - job.noted
        job.noted = now
        self._write_state(job)

    def _write_state(self, job: Job) -> None:
        write_text(job.folder / "ablation.json", json.dumps(job.state))


def command_of(grid: Grid) -> str:
    """The command that computes a whole grid, without a path of this machine."""
    path = grid.path.resolve()
    path = path.relative_to(REPOSITORY) if path.is_relative_to(REPOSITORY) else path.name
    return shlex.join(["python", "training/ablation.py", str(path), *map(without_folders, grid.extra)])


def _written(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:
        return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Train and score every variant of an ablation with every seed. After an interruption, the same command "
        "continues.",
        epilog="Other options are passed to train.py, for every variant: --data.root refer, --optimization.epochs 8, …",
        allow_abbrev=False,
    )
    parser.add_argument("grid", help="YAML file of the ablation, such as training/configs/ablations/scenes.yaml")
    parser.add_argument("--jobs", type=_positive(int), default=1, help="runs at the same time (default: %(default)s)")
    parser.add_argument(
        "--minutes", type=_positive(float), help="stop after this time; unfinished runs keep their checkpoints"
    )
    parser.add_argument("--only", nargs="+", metavar="NAME", help="variants to run (default: all)")
    parser.add_argument(
        "--against", metavar="NAME", help="variant that the tables compare with (default: the grid's baseline)"
    )
    parser.add_argument("--seeds", nargs="+", type=int, metavar="SEED", help="seeds (default: the grid's)")
    parser.add_argument(
        "--output", metavar="DIR", help="folder for everything (default: outputs/ablation/ and the grid's name)"
    )
    return parser


def _positive(kind: type) -> Any:
    def number(text: str) -> float:
        if (value := kind(text)) <= 0:
            raise ValueError
        return value

    number.__name__ = f"positive {kind.__name__}"
    return number


if __name__ == "__main__":
    run_command(lambda: sys.exit(main()))

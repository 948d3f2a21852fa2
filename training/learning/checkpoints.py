"""The checkpoint of a run. With it the same command continues a run that was stopped at any moment (ours).

A checkpoint is a folder. Accelerate writes the optimizer, the schedule and the random states of every process to it; the
weights that training changes and `run.json` are added. The optimizer's file is a pickle of tensors and plain values;
`weights_only=True` reads it.
"""

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from training.configuration import TrainingSettings, load_settings
from training.support.files import (
    partial_folder,
    partial_path,
    previous_path,
    recover_folder,
    replace_folder,
    write_json,
    writing,
)

WEIGHTS = "model.safetensors"
WRITTEN = (
    "settings.yaml",
    "tuning.json",
    "losses.jsonl",
    "history.json",
    "model",
    "logs",
)  # by a run, beside its checkpoint
# settings that may change when a run goes on: its folder, and what changes only its speed, its memory or what it keeps
FREE = {"output_dir", "num_workers", "activation_checkpointing", "compile"}
FREE |= {"checkpoint_every", "checkpoint_contents", "log_every", "cache_dir", "tracker"}


@dataclass
class Progress:
    """How far a run has come.

    Attributes:
        epoch: Whole epochs done.
        batch: Batches done in the present epoch, in each process.
        step: Steps of the optimizer done.
        loss_sum: Sum of the losses of all steps in the present epoch.
        aux_loss_sum: Sum of the routers' auxiliary losses of these steps.
        epoch_steps: Number of these steps.
        best_miou: Best mIoU on the validation split so far; -1 before the first evaluation.
        history: One record per whole epoch.
    """

    epoch: int = 0
    batch: int = 0
    step: int = 0
    loss_sum: float = 0.0
    aux_loss_sum: float = 0.0
    epoch_steps: int = 0
    best_miou: float = -1.0
    history: list[dict] = field(default_factory=list)

    def end_epoch(self) -> dict:
        """The record of the epoch that has just ended. The counters of the epoch return to zero."""
        record = {
            "epoch": self.epoch + 1,
            "loss": self.loss_sum / self.epoch_steps,
            "router_aux_loss": self.aux_loss_sum / self.epoch_steps,
        }
        self.epoch, self.batch = self.epoch + 1, 0
        self.loss_sum, self.aux_loss_sum, self.epoch_steps = 0.0, 0.0, 0
        return record


def check_same_run(now: TrainingSettings, before: TrainingSettings) -> None:
    """Refuse to continue a run with other settings than it began with. Only the settings in `FREE` may change.

    Raises:
        ValueError: Names the setting.
    """
    for name, value in asdict(now).items():
        if name not in FREE and value != asdict(before)[name]:
            raise ValueError(
                f"{now.output_dir} holds a run with other settings: {name} was {asdict(before)[name]}, now it is {value}. "
                "Choose another output_dir, or remove this folder."
            )


def clear_output(settings: TrainingSettings, accelerator: Accelerator) -> None:
    """Remove what an earlier run left in a folder that has no checkpoint. A new run then finds nothing of it there.

    A model in the folder, or scores of one, must be of a run with the same settings: the new run makes them again. Every process
    calls this.

    Raises:
        ValueError: Where the folder holds a model, or scores of one, of another run. Then nothing is removed.
    """
    output = Path(settings.output_dir)
    results = [path for path in (output / "model", *sorted(output.glob("evaluation-*"))) if path.exists()]
    if results:
        written = output / "settings.yaml"
        if not written.is_file():
            raise ValueError(
                f"{results[0]} is there already, and no {written} says of which run. Choose another output_dir."
            )
        check_same_run(settings, load_settings(written))
    accelerator.wait_for_everyone()  # all have looked
    if accelerator.is_main_process:
        for path in (output / name for name in WRITTEN):
            for place in (path, partial_path(path), previous_path(path)):
                if place.is_dir():
                    shutil.rmtree(place)
                else:
                    place.unlink(missing_ok=True)


class Checkpoints:
    """Saves and loads the state of a run in `folder`. A checkpoint is complete or absent.

    With `checkpoint_contents` "trained", a checkpoint holds the trained parameters and all buffers. The frozen parameters come from
    the towers that the settings name. The checkpoint holds a checksum of them, and a run does not go on with others.
    """

    def __init__(self, accelerator: Accelerator, model: nn.Module, folder: Path, settings: TrainingSettings):
        """
        Args:
            accelerator: Knows the optimizer and everything else that is to be saved.
            model: The model before `accelerator.prepare`, with `requires_grad` set.
            folder: The folder of the checkpoint. In a run on several machines, all of them must see it.
            settings: The settings of the run.
        """
        self.accelerator, self.model, self.folder = accelerator, model, folder
        self.contents = settings.checkpoint_contents
        self.frozen = {name: p for name, p in model.named_parameters() if not p.requires_grad}
        sources = ("pretrained", "vision_model", "text_model")
        self.towers = {name: getattr(settings.model, name) for name in sources} | {"sha256": checksum(self.frozen)}
        # Accelerate itself would write every weight, under names that change with the number of processes
        accelerator.register_save_state_pre_hook(self._save_weights)
        accelerator.register_load_state_pre_hook(self._load_weights)

    def save(self, progress: Progress) -> None:
        """Write a checkpoint in place of the last one. Every process calls this.

        Raises:
            OSError: Where it cannot be written. The last checkpoint is then still whole.
        """
        accelerator = self.accelerator
        with writing(self.folder):
            if accelerator.is_main_process:
                partial_folder(self.folder)
            accelerator.wait_for_everyone()
            partial = partial_path(self.folder)
            if not partial.is_dir():
                raise OSError(
                    "another machine does not see this folder: all machines of a run must share its output_dir"
                )
            accelerator.save_state(str(partial))  # every process adds its random states
            if accelerator.is_main_process:
                run = {"processes": accelerator.num_processes, "contents": self.contents, "towers": self.towers}
                write_json(partial / "run.json", run | {"progress": asdict(progress)})
            accelerator.wait_for_everyone()
            if accelerator.is_main_process:
                replace_folder(self.folder)

    def exist(self) -> bool:
        """Whether there is a checkpoint. A replacement that was interrupted is undone before. Every process calls this."""
        if self.accelerator.is_main_process:
            recover_folder(self.folder)
        self.accelerator.wait_for_everyone()
        return self.folder.is_dir()

    def load(self) -> Progress:
        """Load the last checkpoint. Every process calls this.

        Raises:
            ValueError: Where it was made by another number of processes, or with other frozen weights.
        """
        run = json.loads((self.folder / "run.json").read_text(encoding="utf-8"))
        if run["processes"] != self.accelerator.num_processes:
            raise ValueError(
                f"{self.folder} was made by {run['processes']} processes, now there are {self.accelerator.num_processes}. Start as "
                "many as before, or choose another output_dir."
            )
        if run["contents"] == "trained" and run["towers"]["sha256"] != self.towers["sha256"]:
            raise ValueError(
                f"{self.folder} belongs to the frozen weights of {run['towers']}. The frozen weights of {self.towers} are "
                "not the same."
            )
        self.accelerator.load_state(str(self.folder))
        return Progress(**run["progress"])

    def _save_weights(self, models: list[nn.Module], weights: list[dict], output_dir: str) -> None:
        weights.clear()
        if self.accelerator.is_main_process:
            left_out = self.frozen if self.contents == "trained" else {}
            state = {name: t.contiguous() for name, t in self.model.state_dict().items() if name not in left_out}
            save_file(state, Path(output_dir) / WEIGHTS)

    def _load_weights(self, models: list[nn.Module], input_dir: str) -> None:
        models.clear()
        found = self.model.load_state_dict(load_file(Path(input_dir) / WEIGHTS), strict=False)
        missing = set(found.missing_keys) - set(self.frozen)
        if missing or found.unexpected_keys:
            raise ValueError(
                f"{input_dir} does not fit the model: it lacks {sorted(missing)[:3]} and has {found.unexpected_keys[:3]} in excess."
            )


def checksum(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of the names, types, shapes and bytes of tensors, in hexadecimal."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()

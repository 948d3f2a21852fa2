"""The losses of a run: its log, and the stop at the first number that is not finite (ours)."""

import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from modeling_sera import SeraForReferringSegmentation
from training.configuration import TrainingSettings
from training.learning.checkpoints import Progress
from training.support.files import write_text

NAMED = 6  # expressions that a message names


class LossLog:
    """`losses.jsonl`: one line per step of the optimizer, with the loss over all processes.

    A line that a killed run left half-written is dropped when the run goes on, with all lines after the checkpoint's step.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        path: Path,
        settings: TrainingSettings,
        name_row: Callable[[int], str] = "row {}".format,
    ):
        """
        Args:
            accelerator: Knows the processes.
            path: The file.
            settings: Of the run, for the advice where it fails.
            name_row: What a message calls the row of a number.
        """
        self.accelerator, self.path, self.settings, self.name_row = accelerator, path, settings, name_row
        self.pending: list[tuple[dict, Tensor, Sequence[tuple[int, str]]]] = []

    def go_on_after(self, step: int) -> None:
        """Keep the lines of the first `step` steps."""
        if self.accelerator.is_main_process and self.path.exists():
            lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True)[:step]
            write_text(self.path, "".join(lines))

    def add(self, record: dict, losses: Tensor, gradient_norm: Tensor, expressions: Sequence[tuple[int, str]]) -> None:
        """Remember a step, without waiting for the device.

        Args:
            record: What the line holds beside the losses, with "step" and "epoch".
            losses: (2,) this process's part of the loss and of the routers' auxiliary loss; the parts add up.
            gradient_norm: Scalar, the norm of all gradients.
            expressions: This process's expressions of the step: the number of the row and the text of each.
        """
        self.pending.append((record, torch.cat([losses.float(), gradient_norm.float().reshape(1)]), expressions))

    def write(self, progress: Progress) -> list[dict]:
        """Append what was added since the last call, count it in `progress`, and return its records. Every process calls this.

        Raises:
            FloatingPointError: In every process, at the first step whose loss or gradient is not finite. The steps before it are
                written. Where gradients are scaled (fp16), those that are not finite make the scaler skip the step; they are no
                failure.
        """
        if not self.pending:
            return []
        numbers = torch.stack([numbers for _, numbers, _ in self.pending])
        of_processes = self.accelerator.gather(numbers[None])  # (processes, steps, 3)
        sums = of_processes.sum(dim=0).tolist()
        records, failure = [], None
        for step, ((record, *_), (loss, aux_loss, gradient_norm)) in enumerate(zip(self.pending, sums, strict=True)):
            if not math.isfinite(loss + aux_loss):
                failure = step, f"the loss became {loss}"
            elif not math.isfinite(gradient_norm) and self.accelerator.scaler is None:
                failure = step, "the gradients are no longer finite"
            if failure:
                break
            records.append(record | {"loss": loss, "router_aux_loss": aux_loss})
            progress.loss_sum += loss
            progress.aux_loss_sum += aux_loss
            progress.epoch_steps += 1
        if self.accelerator.is_main_process:
            with self.path.open("a", encoding="utf-8") as file:
                file.write("".join(json.dumps(record, allow_nan=False) + "\n" for record in records))
        if failure:
            step, what = failure
            raise FloatingPointError(
                self._explain(step, what, of_processes[:, step, :2].isfinite().all(dim=1).tolist())
            )
        self.pending.clear()
        return records

    def _explain(self, step: int, what: str, is_finite: list[bool]) -> str:
        """What to say about the step of this number in `pending`. Every process calls this.

        Args:
            step: The number.
            what: What is not finite.
            is_finite: Of each process, whether its own part of the loss is.
        """
        record, _, expressions = self.pending[step]
        mine = [(self.accelerator.process_index, number, text) for number, text in expressions]
        everyones = gather_object(mine)
        concerned = [one for one in everyones if not is_finite[one[0]]] or everyones
        named = [f"{self.name_row(number)} {text!r}" for _, number, text in concerned[:NAMED]]
        more = f" and {len(concerned) - NAMED} more" if len(concerned) > NAMED else ""
        return (
            f"{what} at step {record['step']} (epoch {record['epoch']}), and training has stopped. "
            f"The expressions of this step: {'; '.join(named)}{more}. {advice(self.settings, record['step'])}"
        )


class FiniteLogits:
    """Counts the expressions whose logits are not finite, while [`watch`] lasts. Such a model must not be kept."""

    def __init__(self, model: SeraForReferringSegmentation):
        self.model = model
        self.counts = torch.zeros(2, device=model.device)  # of those that are not, and of all

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Look at everything that the model answers meanwhile, without waiting for the device."""

        def look(module, args, outputs) -> None:
            is_finite = outputs.logits.isfinite().flatten(1).all(dim=1)
            self.counts += torch.stack([(~is_finite).sum(), is_finite.new_ones(len(is_finite)).sum()])

        hook = self.model.register_forward_hook(look)
        try:
            yield
        finally:
            hook.remove()

    def check(self, accelerator: Accelerator, settings: TrainingSettings, progress: Progress) -> None:
        """Every process calls this.

        Raises:
            FloatingPointError: In every process, where the logits of any expression in any process were not finite.
        """
        wrong, asked = (int(count) for count in accelerator.reduce(self.counts, "sum").tolist())
        if wrong:
            raise FloatingPointError(
                f"after epoch {progress.epoch} (step {progress.step}) the logits of {wrong} of {asked} validation expressions are "
                f"not finite, and training has stopped. This model is not kept. {advice(settings, progress.step)}"
            )


def advice(settings: TrainingSettings, step: int) -> str:
    """What to change where the numbers of a run are no longer finite at a step."""
    optimization = settings.optimization
    said = (
        ["Look at the images and masks of these rows, and at the weights that the run began with."] if step == 1 else []
    )
    said.append(
        "Begin again in another output_dir with a lower optimization.learning_rate "
        f"(it is {float(optimization.learning_rate):g}) or a longer optimization.warmup (it is {float(optimization.warmup):g})."
    )
    if not optimization.max_grad_norm:
        said.append("Set optimization.max_grad_norm, such as 1.")
    if settings.mixed_precision == "fp16":
        said.append("mixed_precision bf16 has the range of float32; fp16 has not.")
    return " ".join(said)


__all__ = ["FiniteLogits", "LossLog", "advice"]

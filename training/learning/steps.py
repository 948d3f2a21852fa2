"""One step of training: the gradients of several batches in several processes (ours)."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from itertools import islice
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from torch import Tensor, nn

Batch = TypeVar("Batch")


def batches_of_steps(batches: Iterable[Batch], number: int) -> Iterator[list[Batch]]:
    """Lists of `number` batches, one list for each step; the last list may be shorter."""
    iterator = iter(batches)
    while step := list(islice(iterator, number)):
        yield step


def accumulate_gradients(model: nn.Module, batches: Sequence[Mapping[str, Any]], accelerator: Accelerator) -> Tensor:
    """Add the gradients of one step, in which every expression weighs the same.

    A batch's loss is a mean over its expressions. It is weighted by the batch's share of all expressions of the step, in all
    processes. So the gradients are those of one large batch, but for what depends on a batch's other members: batch norms in
    training mode and the routers' auxiliary losses. Every process calls this, with as many batches.

    Args:
        model: The model, as `accelerator.prepare` returned it.
        batches: Inputs of the model with labels, on its device.
        accelerator: Knows the processes and the precision.

    Returns:
        (2,) float32: this process's part of the step's loss and of the routers' auxiliary loss. The parts of all processes add up
        to the means over all expressions of the step.
    """
    counts = [len(inputs["input_ids"]) for inputs in batches]
    total: float | Tensor = sum(counts)
    if accelerator.num_processes > 1:  # the sum stays on the device, so that nothing waits for it
        total = accelerator.reduce(torch.tensor(float(total), device=accelerator.device), "sum")
    losses = torch.zeros(2, device=accelerator.device)
    for number, (inputs, count) in enumerate(zip(batches, counts, strict=True), start=1):
        share = count / total
        with nullcontext() if number == len(batches) else accelerator.no_sync(model):
            outputs = model(**inputs)
            # data parallelism takes the mean of the processes' gradients, where the sum is meant
            accelerator.backward(outputs.loss * (share * accelerator.num_processes))
        losses += torch.stack([outputs.loss.detach(), outputs.router_aux_loss.detach()]).float() * share
    return losses


__all__ = ["accumulate_gradients", "batches_of_steps"]

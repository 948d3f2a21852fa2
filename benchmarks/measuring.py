"""What the benchmarks share: times in turns, peak memory, how fast the machine multiplies matrices."""

import multiprocessing
import re
import resource
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch


def measure(
    calls: dict[str, Callable[[], object]], repeats: int, device: torch.device, warm_up: int
) -> dict[str, dict[str, float]]:
    """Seconds of each call: median and quartiles over `repeats`, after warm-up, the device's queue empty at both ends.

    The calls take turns, so that what else the machine does hits all of them alike.
    """
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for i in range(warm_up + repeats):  # first calls allocate, compile and choose kernels
        for name, call in calls.items():
            wait(device)
            start = time.perf_counter()
            call()
            wait(device)
            if i >= warm_up:
                seconds[name].append(time.perf_counter() - start)
    return {name: _summary(values) for name, values in seconds.items()}


def wait(device: torch.device) -> None:
    """Until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def reset_memory(device: torch.device) -> None:
    """Begin [`memory`] anew, where that can be done."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def memory(device: torch.device) -> int:
    """Peak bytes: allocated on the GPU since the last reset, or, without one, resident of this process since it began."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.exists():  # what getrusage says on Linux, a process inherits from the one that started it
        return int(re.search(r"VmHWM:\s+(\d+) kB", status.read_text())[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def memory_alone(work: Callable[..., None], *arguments: object) -> int:
    """Peak resident bytes of a fresh process that does nothing but `work(*arguments)`: Python and the libraries are in it."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_report_memory, args=(sender, torch.get_num_threads(), work, arguments))
    process.start()
    sender.close()  # so that the end of the process ends the waiting
    try:
        return receiver.recv()
    except EOFError:
        raise OSError(
            f"the process that measures memory ended before it was done (exit code {process.exitcode})."
        ) from None
    finally:
        process.join()


def matrix_rate(dtype: torch.dtype, device: torch.device, side: int = 4096) -> float:
    """FLOP/s of one large matrix product, the most that can be hoped for: the best of three."""
    side = side if device.type == "cuda" else side // 2
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    seconds = measure({"product": lambda: a @ b}, 3, device, warm_up=2)["product"]["low"]
    return 2 * side**3 / seconds


def _report_memory(sender, threads: int, work: Callable[..., None], arguments: tuple) -> None:
    torch.set_num_threads(threads)
    work(*arguments)
    sender.send(memory(torch.device("cpu")))


def _summary(seconds: list[float]) -> dict[str, float]:
    low, _, high = statistics.quantiles(seconds, n=4, method="inclusive") if len(seconds) > 1 else seconds * 3
    return {"median": statistics.median(seconds), "low": low, "high": high}

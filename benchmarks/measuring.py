"""Measurements that the benchmarks share: times of calls in turns, peak memory, the rate of matrix products."""

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
    """Seconds of each call after a warm-up: median and quartiles over `repeats`. The device is idle before and after a call.

    The calls take turns, so other work on the machine slows all of them equally.
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
    """Wait until the device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def reset_memory(device: torch.device) -> None:
    """Reset [`memory`] if the device can."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def memory(device: torch.device) -> int:
    """Peak bytes: allocated on the GPU since the last reset; without a GPU, resident in this process since its start."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.exists():  # on Linux, the value of getrusage is inherited from the parent process
        return int(re.search(r"VmHWM:\s+(\d+) kB", status.read_text())[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def memory_alone(work: Callable[..., None], *arguments: object) -> int:
    """Peak resident bytes of a new process that only calls `work(*arguments)`. They include Python and the libraries."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_report_memory, args=(sender, torch.get_num_threads(), work, arguments))
    process.start()
    sender.close()  # so that `recv` returns when the process ends
    try:
        return receiver.recv()
    except EOFError:
        raise OSError(
            f"the process that measures memory ended before it was done (exit code {process.exitcode})."
        ) from None
    finally:
        process.join()


def matrix_rate(dtype: torch.dtype, device: torch.device, side: int = 4096) -> float:
    """FLOP/s of one large matrix product, as an upper bound for any model: the best of three."""
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

"""The command, hardware and library versions of a measurement, without paths of the machine (ours)."""

import importlib.metadata
import os
import platform
import shlex
import sys
from pathlib import Path
from typing import Any

import torch

LIBRARIES = ("torch", "transformers", "accelerate", "datasets", "evaluate", "numpy", "pillow", "pycocotools")


def describe_hardware() -> dict[str, Any]:
    """The processor, the number of cores that this process may use, the GPUs and the operating system."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {"processor": _processor_name(), "cores": usable, "gpus": gpus, "system": platform.system()}


def counted(number: int, noun: str) -> str:
    """A number with its noun: "1 core", "2 cores", "2 processes"."""
    return f"{number} {noun}" + ("" if number == 1 else "es" if noun.endswith("s") else "s")


def library_versions() -> dict[str, str]:
    """Versions of Python and of the libraries that results depend on."""
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in LIBRARIES}


def command_line(script: str, arguments: list[str] | None = None) -> str:
    """The command line of `script`, a path in the repository, with `arguments` (`None`: those of this process)."""
    arguments = sys.argv[1:] if arguments is None else arguments
    return shlex.join(["python", script, *(without_folders(argument) for argument in arguments)])


def without_folders(value: Any) -> Any:
    """A setting or an argument (also `--name=value`) whose absolute paths are shortened to their last part; lists item by item.

    Every run calls its model "model". The name of the run's folder stays in these paths.
    """
    if isinstance(value, (list, tuple)):
        return [without_folders(item) for item in value]
    if not isinstance(value, str):
        return value
    name, equals, rest = value.partition("=")
    if equals and name.startswith("--"):
        return name + equals + without_folders(rest)
    path = Path(value)
    if not path.is_absolute():
        return value
    return f"{path.parent.name}/model" if path.name == "model" else path.name


def without_paths(tree: Any) -> Any:
    """Settings as dicts and lists, with all absolute paths in them shortened to their last part."""
    if isinstance(tree, dict):
        return {name: without_paths(value) for name, value in tree.items()}
    return [without_paths(item) for item in tree] if isinstance(tree, (list, tuple)) else without_folders(tree)


def _processor_name() -> str:
    information = Path("/proc/cpuinfo")
    if information.is_file():
        for line in information.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


__all__ = ["command_line", "describe_hardware", "library_versions", "without_folders", "without_paths"]

"""Virtual environments that hold chosen libraries and nothing else, made without a download."""

import importlib.metadata
import os
import subprocess
import venv
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name


def needed_distributions(requirements: list[str]) -> dict[str, importlib.metadata.Distribution]:
    """The distributions installed here that the requirements and, in turn, theirs ask for; by normalised name."""
    found, seen, waiting = {}, set(), [Requirement(line) for line in requirements]
    while waiting:
        wanted = waiting.pop()
        if str(wanted) in seen:
            continue
        seen.add(str(wanted))
        distribution = importlib.metadata.distribution(wanted.name)
        found[canonicalize_name(wanted.name)] = distribution
        for line in distribution.requires or []:
            further = Requirement(line)
            extras = ("", *wanted.extras)
            if further.marker is None or any(further.marker.evaluate({"extra": extra}) for extra in extras):
                waiting.append(further)
    return found


def make_environment(place: Path, requirements: list[str]) -> Path:
    """Python of a new virtual environment with the requirements, linked from here where pip would copy them."""
    venv.create(place, symlinks=True)
    python = place / "bin" / "python"
    ask = [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    packages = Path(subprocess.run(ask, capture_output=True, text=True, check=True).stdout.strip())
    assert packages.is_relative_to(place) and not list(packages.iterdir())
    for distribution in needed_distributions(requirements).values():
        for name in {file.parts[0] for file in distribution.files} - {"..", "__pycache__"}:
            link = packages / name
            if not link.exists():  # packages of one namespace share its folder
                link.symlink_to(distribution.locate_file(name))
    return python


def run_elsewhere(python: Path, place: Path, *arguments: object) -> str:
    """The output of a script that runs in an empty folder, without the network and with no setting of this process."""
    (place / "empty").mkdir(exist_ok=True)
    settings = {"HF_HOME": str(place / "home"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "PYTHON", "VIRTUAL"))}
    done = subprocess.run(
        [python, "-B", *map(str, arguments)],  # -B: nothing is written into what is linked
        cwd=place / "empty",
        env=inherited | settings,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout

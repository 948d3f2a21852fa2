"""The wheel holds every package and every configuration, and its command runs with the declared dependencies alone."""

import importlib.metadata
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from conftest import REPOSITORY
from environments import make_environment, run_elsewhere

# by their metadata: a mere search for pip's module switches setuptools' distutils off in this process
INSTALLED = {distribution.name for distribution in importlib.metadata.distributions()}
PACKAGES = ("modeling_sera", "processing_sera", "training")
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]

pytestmark = [
    pytest.mark.skipif(name not in INSTALLED, reason=f"{name}, which builds the wheel, is not installed")
    for name in ("setuptools", "pip")
]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel of a copy of the sources: an old `build/` in the repository would add its files."""
    source = tmp_path_factory.mktemp("source")
    for name in PACKAGES:
        shutil.copytree(REPOSITORY / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, source)
    target = tmp_path_factory.mktemp("wheel")
    command = [*PIP, "wheel", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", target, source]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (found,) = target.iterdir()
    return found


def test_it_holds_every_package_and_configuration_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        held = {name: archive.read(name) for name in archive.namelist() if ".dist-info/" not in name}
    files = [path for name in PACKAGES for path in (REPOSITORY / name).rglob("*") if path.suffix in {".py", ".yaml"}]
    assert held == {path.relative_to(REPOSITORY).as_posix(): path.read_bytes() for path in files}


def test_its_command_runs_in_an_environment_with_its_dependencies(wheel, tmp_path):
    declared = re.search(
        r"^dependencies = \[(.*?)^\]", (REPOSITORY / "pyproject.toml").read_text(), re.DOTALL | re.MULTILINE
    )
    python = make_environment(tmp_path / "environment", re.findall(r'"(.+?)"', declared[1]))
    command = [*PIP, "--python", python, "install", "--no-deps", "--no-index", "--no-compile", wheel]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "usage: sera-segment" in run_elsewhere(python, tmp_path, python.with_name("sera-segment"), "--help")
    assert run_elsewhere(python, tmp_path, "-c", "import training; print(training.__file__)").startswith(str(tmp_path))

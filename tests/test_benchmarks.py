"""The benchmark of training runs on a small configuration, and its figures fit each other."""

import json
import os
import subprocess
import sys

import pytest
from conftest import REPOSITORY


def test_training_speed(tmp_path):
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    command = [
        sys.executable,
        "benchmarks/training_speed.py",
        "--repeats",
        "2",
        "--output",
        str(tmp_path / "speed.json"),
    ]
    command += ["--config", "training/configs/demo.yaml", "--data.num_scenes", "[8,1,1]"]
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "speed.json").read_text())
    figures, batch = record["figures"], record["batch"]
    assert set(figures) == {"pipeline", "tower_forward", "training_step"}
    for figure in figures.values():
        assert 0 < figure["low"] <= figure["median"] <= figure["high"]
        assert figure["images_per_second"] == pytest.approx(batch["pictures"] / figure["median"])
    tower, step = figures["tower_forward"], figures["training_step"]
    assert record["step_per_tower_forward"] == pytest.approx(step["median"] / tower["median"]) and record["hardware"]
    assert batch["expressions"] > batch["pictures"] == 6  # the demo asks about every object of a picture
    assert "training step" in done.stdout + done.stderr

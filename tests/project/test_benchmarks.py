"""The benchmarks run on small configurations with consistent figures, and SERA-B stays within its budget of operations."""

import json
import os
import subprocess
import sys

import pytest
from conftest import REPOSITORY

ENVIRONMENT = os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}


def test_training_speed(tmp_path):
    command = [
        sys.executable,
        "benchmarks/training_speed.py",
        "--repeats",
        "2",
        "--output",
        str(tmp_path / "speed.json"),
    ]
    command += ["--config", "training/configs/demo.yaml", "--data.num_scenes", "[8,1,1]"]
    done = subprocess.run(command, cwd=REPOSITORY, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "speed.json").read_text())
    figures, batch = record["figures"], record["batch"]
    assert set(figures) == {"pipeline", "tower_forward", "training_step"}
    for figure in figures.values():
        assert 0 < figure["low"] <= figure["median"] <= figure["high"]
        assert figure["images_per_second"] == pytest.approx(batch["images"] / figure["median"])
    tower, step = figures["tower_forward"], figures["training_step"]
    assert record["step_per_tower_forward"] == pytest.approx(step["median"] / tower["median"]) and record["hardware"]
    assert batch["expressions"] > batch["images"] == 6  # the demo has expressions for every object of an image
    assert "training step" in done.stdout + done.stderr


def test_inference_speed(tmp_path):
    command = [sys.executable, "benchmarks/inference_speed.py", "--tiny", "--repeats", "2", "--no-memory", "--curves"]
    command += ["--only", "float32)", "training", "--output", str(tmp_path / "speed.json")]
    done = subprocess.run(command, cwd=REPOSITORY, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "speed.json").read_text())
    assert record["hardware"] and record["versions"]["torch"] and record["skipped"] == {} and record["tiny"]
    for name, figures in record["entries"].items():
        assert 0 < figures["low"] <= figures["median"] <= figures["high"]
        assert figures["expressions_per_second"] == pytest.approx(figures["expressions"] / figures["median"])
        assert "float32)" in name and name in done.stdout + done.stderr
    flops = {name: figures["flops"] for name, figures in record["entries"].items()}
    assert flops["SERA-B (float32)"] == flops["SERA-B, fused for inference (float32)"]
    assert flops["SERA-B, 4 images (float32)"] == pytest.approx(4 * flops["SERA-B (float32)"], rel=0.01)
    assert flops["SERA-B, 4 expressions (float32)"] < 0.99 * flops["SERA-B, 4 images (float32)"]
    assert flops["bare DINOv2-B/14, 4 registers (float32)"] < flops["SERA-B, late adapters (float32)"]
    assert len(record["training"]) == 2 and all(figures["batch"] == 2 for figures in record["training"].values())
    (operators,) = record["operators"].values()
    assert all(0 < share < 1 for share in operators.values()) and sum(operators.values()) <= 1 + 1e-6
    assert list(operators.values()) == sorted(operators.values(), reverse=True)
    assert len(operators) == 8 and "addmm" in operators  # the other slow operators depend on the machine and its load
    (parts,) = record["parts"].values()
    assert min(parts.values()) > 0 and set(parts) == {
        "text",
        "backbone",
        "adapters",
        "fusion",
        "decoder",
        "projector",
        "all",
    }
    assert list(record["processing"]) == ["decode the JPEG", "pre-processing", "post-processing"]
    assert set(record["curves"]["expressions"]) == {"sera", "late"} and len(record["curves"]["side"]) == 5
    assert (tmp_path / "speed.png").read_bytes().startswith(b"\x89PNG")


def test_dataset_segmentation(tmp_path):
    command = [sys.executable, "benchmarks/dataset_segmentation.py", "--images", "120", "--forms", "folder"]
    command += ["--output", str(tmp_path / "segmentation.json"), "--limit_mib", "500"]
    done = subprocess.run(command, cwd=REPOSITORY, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    figures = json.loads((tmp_path / "segmentation.json").read_text())["forms"]["folder"]
    assert figures["images"] == 120 and sum(figures["shares"].values()) == pytest.approx(1)
    assert figures["images_per_second_per_core"] == pytest.approx(120 / figures["seconds"])
    first, last = figures["memory_mib"].values()
    assert first > 100 and last - first == pytest.approx(figures["growth_mib"]) and "| folder | 120 |" in done.stderr


def test_sera_b_computes_no_more_than_its_budget(monkeypatch):
    monkeypatch.syspath_prepend(REPOSITORY / "benchmarks")
    from subjects import count_flops

    backbone, alone = (count_flops(kind, 1, 1, False) for kind in ("backbone", "sera"))
    patches, width = 32 * 32, 768
    tokens = patches + 5
    linear = 12 * 2 * tokens * 12 * width**2  # query, key, value, output: 4 width²; feed-forward: 8 width²
    attention = 12 * 4 * tokens**2 * width
    embedding = 2 * patches * 3 * 14 * 14 * width
    assert backbone == pytest.approx(linear + attention + embedding, rel=1e-3)
    assert alone <= 275e9
    assert count_flops("sera", 1, 16, False) <= 0.88 * 16 * alone
    assert count_flops("late", 1, 16, False) <= 0.55 * 16 * count_flops("late", 1, 1, False)


LARGE_PARENT = """
from measuring import memory_alone

def work(size):
    held = bytearray(size)

if __name__ == "__main__":
    large = bytearray(3 * 2**30)
    small, larger = memory_alone(work, 0), memory_alone(work, 2**28)
    assert 0.9 * 2**28 < larger - small < 1.1 * 2**28, (small, larger)
    assert small < 2**30, small
"""


def test_memory_is_the_new_processs_own_and_not_its_parents(tmp_path):
    script = tmp_path / "parent.py"  # a file, which the new process imports
    script.write_text(LARGE_PARENT)
    subprocess.run(
        [sys.executable, script], check=True, cwd=REPOSITORY, env=os.environ | {"PYTHONPATH": "benchmarks:."}
    )


def test_row_checks(tmp_path):
    command = [sys.executable, "benchmarks/row_checks.py", "--rows", "30", "--output", str(tmp_path / "checks.json")]
    done = subprocess.run(command, cwd=REPOSITORY, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "checks.json").read_text())
    assert record["rows"] == 30 and record["hardware"] and record["checks_s"] > 0 < record["decoding_s"]
    assert record["share"] == pytest.approx(record["checks_s"] / record["decoding_s"])

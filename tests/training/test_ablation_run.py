"""A real run of an ablation: training, scoring, its record, and the table."""

import json

import numpy as np
import pytest
from runs import write_grid

from training.ablation import OK, main
from training.ablations.grid import Records


def test_a_real_ablation(tmp_path):
    grid, output = write_grid(tmp_path), tmp_path / "out"
    command = [str(grid), "--only", "baseline", "--seeds", "3", "--output", str(output), "--data.num_scenes", "[6,2,2]"]
    assert main(command) == OK
    (record,) = Records(output / "runs.jsonl").read().values()
    evaluation = json.loads((output / record["evaluation"]).read_text())
    union = [score["predicted"] + score["truth"] - score["intersection"] for score in evaluation["scores"]]
    inside = [score["intersection"] for score in evaluation["scores"]]
    miou = np.mean(np.array(inside) / np.maximum(union, 1))
    assert record["summary"]["as written"]["all"]["mIoU"] == pytest.approx(miou)
    row = next(line for line in (output / "results.md").read_text().splitlines() if line.startswith("| baseline |"))
    assert f"| {100 * miou:.1f} |" in row
    assert {"mIoU", "boundary_F"} <= set(record["summary"]["shuffled"]["all"]) and record["slices"]["size"]
    assert record["losses"][0][0] >= 1 and record["curve"][0]["val"]["mIoU"] >= 0
    assert record["curve"][-1]["routing"] == {"taps": {}, "adapters": {}}
    assert record["command"].endswith("grid.yaml --data.num_scenes '[6,2,2]' --only baseline --seeds 3")
    assert str(tmp_path) not in json.dumps(record)
    assert all(record["seconds"][phase] > 0 for phase in ("training", "evaluation"))
    assert (output / "figures" / "bars.png").is_file() and (output / "figures" / "curves.png").is_file()

"""`sera-segment`, run in the test's own process, and the files that it writes."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from training.prediction import main


def smooth_image() -> Image.Image:
    """An image of smooth waves, 40 high and 64 wide."""
    rows, columns = np.mgrid[0:40, 0:64]
    wave = 127 + 120 * np.sin(rows / 7)[..., None] * np.cos(columns[..., None] / np.array([5, 9, 14]))
    return Image.fromarray(wave.astype(np.uint8))


def segment(*arguments: object) -> None:
    """Run the command."""
    main([str(argument) for argument in arguments])


def refusal(capsys, *arguments: object) -> str:
    """The one line that the command prints when it ends with exit code 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as error:
        segment(*arguments)
    out, err = capsys.readouterr()
    assert error.value.code == 2 and out == ""
    assert err.startswith("sera-segment: error: ") and err.count("\n") == 1 and err.endswith("\n")
    return err


def check_files(folder: Path, size: tuple[int, int], expressions: list[str]) -> list[np.ndarray]:
    """Check that the files agree with each other; return the masks."""
    records = json.loads((folder / "prediction.json").read_text(encoding="utf-8"))
    assert [record["expression"] for record in records] == expressions
    masks = []
    for record in records:
        written = Image.open(folder / record["mask"])
        assert written.mode == "L" and written.size == size
        mask = np.asarray(written)
        assert set(np.unique(mask)) <= {0, 255}
        assert np.array_equal(coco_mask.decode(record["rle"]) == 1, mask == 255)
        assert 0 <= record["score"] <= 1
        masks.append(mask == 255)
    assert Image.open(folder / "overlay.png").size == size
    names = {record["mask"] for record in records}
    assert len(names) == len(records)
    assert {path.name for path in folder.iterdir()} == names | {"overlay.png", "prediction.json"}
    return masks

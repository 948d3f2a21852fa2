"""Kept predictions: what is written is what is read, parts are whole or absent, and a folder with a row twice is refused."""

from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from builders import disc

from training.scoring.predictions import (
    Part,
    Prediction,
    describe_mask,
    list_parts,
    read_predictions,
    write_part,
)
from training.sources.masks import decode_mask


def make_predictions(first: int, stop: int) -> list[Prediction]:
    """Two answers about each image, one of them an error of every third."""
    made = []
    for row in range(first, stop):
        mask = describe_mask(disc((20, 30), (row % 20, 12), 5))
        made.append(Prediction(f"{row}.png", 0, row, 0, "löwe", score=0.5, no_target=0.25, **mask))
        fault = {"error": "damaged"} if row % 3 == 0 else {"score": 1.0, **describe_mask(np.zeros((20, 30), bool))}
        made.append(Prediction(f"{row}.png", 0, row, 1, None, **fault))
    return made


def test_what_is_written_is_read_in_the_order_of_the_input(tmp_path):
    for first, stop in ((4, 8), (0, 4), (8, 9)):
        write_part(tmp_path, Part(0, first, stop), make_predictions(first, stop))
    write_part(tmp_path, Part(1, 0, 0), [])
    assert list_parts(tmp_path) == [(0, 0, 4), (0, 4, 8), (0, 8, 9), (1, 0, 0)]
    assert list(read_predictions(tmp_path)) == make_predictions(0, 9)
    rows = datasets.load_dataset("parquet", data_dir=str(tmp_path / "parts"), split="train")
    assert len(rows) == 18 and np.array_equal(decode_mask(rows[4]["rle"]), disc((20, 30), (2, 12), 5))
    assert rows[1]["error"] == "damaged" and rows[1]["rle"] is None


def test_box_and_area_are_the_masks():
    mask = np.zeros((20, 30), bool)
    mask[3:7, 10:12] = True
    described = describe_mask(mask)
    assert described["box"] == [10, 3, 2, 4] and described["area"] == 8
    assert np.array_equal(decode_mask(described["rle"]), mask)
    assert describe_mask(np.zeros((5, 4), bool)) | {"rle": None} == {"rle": None, "box": None, "area": 0}


def test_a_part_that_is_not_whole_is_absent(tmp_path, monkeypatch):
    write_part(tmp_path, Part(0, 0, 2), make_predictions(0, 2))

    def fail(path: Path, schema: pa.Schema) -> None:
        path.write_bytes(b"PAR1")
        raise OSError("no space left")

    monkeypatch.setattr(pq, "ParquetWriter", fail)
    for stop in (2, 4):
        with pytest.raises(OSError, match="no space"):
            write_part(tmp_path, Part(0, stop - 2, stop), make_predictions(stop - 2, stop))
    assert list(read_predictions(tmp_path)) == make_predictions(0, 2)
    assert len(list((tmp_path / "parts").iterdir())) == 1


def test_a_folder_that_is_none_of_ours_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no predictions"):
        list(read_predictions(tmp_path))
    write_part(tmp_path, Part(0, 0, 4), make_predictions(0, 4))
    write_part(tmp_path, Part(0, 3, 4), make_predictions(3, 4))
    with pytest.raises(
        ValueError, match="holds rows twice: in part-00000-000000000-000000004 and in part-00000-000000003"
    ):
        list(read_predictions(tmp_path))
    (tmp_path / "parts" / f"{Part(0, 3, 4).name}.parquet").unlink()
    pq.write_table(pa.table({"image": ["a"]}), tmp_path / "parts" / f"{Part(0, 0, 4).name}.parquet")
    with pytest.raises(ValueError, match="has other columns than predictions have: image"):
        list(read_predictions(tmp_path))

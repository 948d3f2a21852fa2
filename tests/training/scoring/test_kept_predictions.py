"""Predictions of a split: scored as the masks that they keep, whole, and about the sentences that they say."""

from dataclasses import replace

import numpy as np
import pytest
from builders import Folder, disc

from training.scoring.kept_predictions import (
    as_kept,
    prediction_of,
    read_split,
    score_answer,
    score_predictions,
    write_split,
)
from training.scoring.predictions import Part, Prediction, list_parts, write_part
from training.sources.masks import decode_mask


@pytest.fixture
def rows(tmp_path):
    """Rows of several images, with one to three sentences each."""
    folder = Folder(tmp_path / "refer").fill({"val": [1, 2, 3, 4]})
    return folder.load()["val"]


def answers(rows) -> list[tuple[int, int, np.ndarray]]:
    """(row, sentence, mask) for every sentence: discs, and some empty masks."""
    made = []
    for row, example in enumerate(rows):
        for sentence in range(len(example["sentences"])):
            mask = disc(tuple(example["mask"]["size"]), (9 + row, 9 + sentence), (row + sentence) % 4 * 3)
            made.append((row, sentence, mask))
    return made


def predictions_of(rows, numbers=None) -> list[Prediction]:
    return [
        prediction_of(
            "a.png", numbers[row] if numbers else row, sentence, rows[row]["sentences"][sentence], mask, RESULT
        )
        for row, sentence, mask in answers(rows)
    ]


RESULT = {"score": 1 / 3, "no_target": 0.1}


def test_kept_masks_give_the_scores_of_the_masks(rows, tmp_path):
    expected = [
        score_answer(row, sentence, "refcoco", mask, decode_mask(rows[row]["mask"]), RESULT)
        for row, sentence, mask in answers(rows)
    ]
    assert {score.predicted for score in expected} > {0} and any(score.intersection for score in expected)
    write_split(tmp_path / "kept", predictions_of(rows), len(rows))
    assert score_predictions(rows, read_split(tmp_path / "kept")) == expected
    halves = [score_predictions(rows, read_split(tmp_path / "kept"), share=(i, 2)) for i in (0, 1)]
    assert sorted(halves[0] + halves[1], key=lambda score: (score.row, score.sentence)) == expected
    assert expected[0].no_target == as_kept(0.1) == float(np.float32(0.1))


def test_rows_may_be_some_of_a_split(rows, tmp_path):
    numbers = (1, 3, 4)
    some = rows.select(numbers)
    write_split(tmp_path, predictions_of(some, numbers), len(rows))
    assert next((p.row, p.index) for p in read_split(tmp_path)) == (1, 0)
    scores = score_predictions(some, read_split(tmp_path), numbers)
    assert {score.row for score in scores} == {0, 1, 2}
    with pytest.raises(ValueError, match=r"sentences have no prediction; the first is sentence 0 of row 0"):
        score_predictions(rows, read_split(tmp_path))
    with pytest.raises(ValueError, match="row 3, sentence 0, is about no sentence that is scored here"):
        score_predictions(rows.select([1]), read_split(tmp_path), [1])


def test_the_last_part_says_where_the_split_ends(rows, tmp_path, monkeypatch):
    for size, parts in ((3, 3), (len(rows), 2), (100, 1)):
        monkeypatch.setattr("training.scoring.kept_predictions.PART_ROWS", size)
        write_split(tmp_path / str(size), predictions_of(rows), len(rows))
        found = list_parts(tmp_path / str(size))
        assert len(found) == parts and found[-1].stop == len(rows) and found[-1].stop - found[-1].first < size


def test_rows_of_several_files_are_counted_on(rows, tmp_path):
    predictions = predictions_of(rows)
    for shard, (first, stop) in enumerate(((0, 3), (3, len(rows)))):
        own = [replace(p, shard=shard, row=p.row - first) for p in predictions if first <= p.row < stop]
        write_part(tmp_path, Part(shard, 0, stop - first), own)
    assert list(read_split(tmp_path)) == predictions


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"expression": "another"}, "row 0, sentence 0, is about 'another'; the split has"),
        ({"rle": None, "error": "damaged"}, "row 0, sentence 0, has no mask: damaged"),
        ({"rle": {"size": [5, 4], "counts": "d0"}}, "has a mask of 4×5 pixels; the true one has"),
        ({"row": 99}, "row 99, sentence 0, is about no sentence"),
        ({"index": 9}, "row 0, sentence 9, is about no sentence"),
        (None, "row 0, sentence 0, is there twice"),
    ],
)
def test_a_prediction_about_something_else_is_named(rows, change, said):
    predictions = predictions_of(rows)
    predictions.insert(0, replace(predictions[0], **(change or {})))
    with pytest.raises(ValueError, match=said):
        score_predictions(rows, predictions)

"""Predictions of a whole split: kept as Parquet parts, and scored again by whoever has the split (ours).

`training/evaluation.py` scores its answers, and `training/papers_table.py` scores what it kept, with `score_answer`. So the same
masks give the same digits. A prediction's `row` is the row of the split, and its `index` the number of the sentence in that row:
`training/segment.py` numbers the rows of a prepared split alike, so its predictions are scored too.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np

from training.scoring.boundary import boundary_f_score
from training.scoring.metric import SentenceScore
from training.scoring.predictions import Part, Prediction, describe_mask, list_parts, read_predictions, write_part
from training.sources.masks import decode_mask

PART_ROWS = 2048  # rows of the split in a part


def score_answer(
    row: int, sentence: int, kind: str, predicted: np.ndarray, truth: np.ndarray, answer: dict[str, Any]
) -> SentenceScore:
    """The score of one mask.

    Args:
        row: Row of the split.
        sentence: Number of the sentence in that row.
        kind: Kind of the sentence.
        predicted: The predicted mask, bool (H, W).
        truth: The true mask, bool (H, W).
        answer: Its "score" in [0, 1]; absent or `None` if it is not known. Its "no_target" is the model's probability of no target,
            in [0, 1]; absent or `None` if the model predicts none.
    """
    absence, score = answer.get("no_target"), answer.get("score")
    return SentenceScore(
        row=row,
        sentence=sentence,
        kind=kind,
        intersection=int(np.count_nonzero(predicted & truth)),
        predicted=int(np.count_nonzero(predicted)),
        truth=int(np.count_nonzero(truth)),
        boundary_f=boundary_f_score(predicted, truth),
        no_target=None if absence is None else as_kept(absence),
        score=None if score is None else as_kept(score),
    )


def as_kept(value: float) -> float:
    """A number with the precision in which predictions keep it, that of float32."""
    return float(np.float32(value))


def prediction_of(
    image: str, row: int, sentence: int, expression: str, predicted: np.ndarray, answer: dict[str, Any]
) -> Prediction:
    """What is kept of one answer.

    Args:
        image: The image's key, such as its file name.
        row: Row of the split.
        sentence: Number of the sentence in that row.
        expression: The sentence.
        predicted: The predicted mask, bool (H, W).
        answer: Its "score" in [0, 1] and, if the model predicts presence, its "no_target".
    """
    absence = answer.get("no_target")
    known = {
        "score": as_kept(answer["score"]),
        "no_target": None if absence is None else as_kept(absence),
        **describe_mask(predicted),
    }
    return Prediction(image, 0, row, sentence, expression, **known)


def write_split(folder: Path, predictions: Iterable[Prediction], num_rows: int) -> None:
    """Write the predictions of a split as parts, in an empty folder.

    Args:
        folder: The folder of predictions.
        predictions: Of one shard, in the order of (row, index). Rows may be missing.
        num_rows: Rows of the split.
    """
    groups: dict[int, list[Prediction]] = {first: [] for first in range(0, num_rows + 1, PART_ROWS)}
    for prediction in predictions:
        groups[prediction.row - prediction.row % PART_ROWS].append(prediction)
    for first, group in groups.items():  # the last part is shorter than the others, or empty: so a split ends
        write_part(folder, Part(0, first, min(first + PART_ROWS, num_rows)), group)


def read_split(folder: Path) -> Iterator[Prediction]:
    """The predictions of a split, numbered by the rows of the split, whatever shards they come in.

    Raises:
        FileNotFoundError: Where there are none.
        ValueError: Where a part is not one of predictions, or two parts hold the same row.
    """
    ends: dict[int, int] = {}
    for part in list_parts(folder):
        ends[part.shard] = part.stop
    before = {shard: sum(end for other, end in ends.items() if other < shard) for shard in ends}
    for prediction in read_predictions(folder):
        yield replace(prediction, shard=0, row=before[prediction.shard] + prediction.row)


def score_predictions(
    rows: datasets.Dataset,
    predictions: Iterable[Prediction],
    numbers: Sequence[int] | None = None,
    share: tuple[int, int] = (0, 1),
) -> list[SentenceScore]:
    """Score the predictions of a split.

    Args:
        rows: Rows of REFER_FEATURES.
        predictions: Exactly one for every sentence of the rows.
        numbers: What predictions call each row. `None`: its place.
        share: Every how many-th sentence is scored, and from which on: (process, processes). All are checked.

    Returns:
        The scores in the order of the rows. Their `row` is the place in `rows`.

    Raises:
        ValueError: Where a sentence has no prediction or several, or a prediction is about something else, has an error, or has a
            mask of another size.
    """
    places = {number: place for place, number in enumerate(range(len(rows)) if numbers is None else numbers)}
    sentences, kinds, masks = rows["sentences"][:], rows["sentence_kinds"][:], rows["mask"][:]
    found: dict[tuple[int, int], Prediction] = {}
    for prediction in predictions:
        place, name = (
            places.get(prediction.row),
            f"The prediction for row {prediction.row}, sentence {prediction.index}",
        )
        if place is None or not 0 <= prediction.index < len(sentences[place]):
            raise ValueError(f"{name}, is about no sentence that is scored here.")
        if (place, prediction.index) in found:
            raise ValueError(f"{name}, is there twice.")
        if prediction.expression != sentences[place][prediction.index]:
            expected = sentences[place][prediction.index]
            raise ValueError(f"{name}, is about {prediction.expression!r}; the split has {expected!r} there.")
        if prediction.rle is None:
            raise ValueError(f"{name}, has no mask: {prediction.error}")
        if list(prediction.rle["size"]) != list(masks[place]["size"]):
            sizes = ["×".join(map(str, reversed(rle["size"]))) for rle in (prediction.rle, masks[place])]
            raise ValueError(f"{name}, has a mask of {sizes[0]} pixels; the true one has {sizes[1]}.")
        found[place, prediction.index] = prediction
    wanted = [(place, index) for place, texts in enumerate(sentences) for index in range(len(texts))]
    missing = [key for key in wanted if key not in found]
    if missing:
        place, index = missing[0]
        number = place if numbers is None else numbers[place]
        raise ValueError(
            f"{len(missing)} of {len(wanted)} sentences have no prediction; the first is sentence {index} of row {number}."
        )
    return [
        score_answer(
            place,
            index,
            kinds[place][index],
            decode_mask(found[place, index].rle),
            decode_mask(masks[place]),
            {"score": found[place, index].score, "no_target": found[place, index].no_target},
        )
        for place, index in wanted[share[0] :: share[1]]
    ]


__all__ = ["as_kept", "prediction_of", "read_split", "score_answer", "score_predictions", "write_split"]

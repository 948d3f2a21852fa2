"""Evaluation files with made-up answers."""

import json
from dataclasses import asdict
from functools import cache
from pathlib import Path

from training.configuration import DataSettings
from training.scoring.mask_selection import MaskSelection
from training.scoring.metric import SentenceScore
from training.scoring.reports import Threshold, evaluation_record
from training.sources.scenes.dataset import generate_scenes
from training.support.files import write_text

SCENES = DataSettings(source="scenes", num_scenes=(40, 2, 3), scene_size=64)


@cache
def made_up_record(shift: int) -> str:
    """The JSON of an evaluation with made-up answers to the sentences of two scenes."""
    rows = generate_scenes(2, 0, 64, split="test")
    scores = [
        SentenceScore(
            i, j, kind, intersection=40 + 7 * (i % 5) + shift, predicted=100 + j, truth=90, boundary_f=0.5, score=0.4
        )
        for i, kinds in enumerate(rows["sentence_kinds"])
        for j, kind in enumerate(kinds)
    ]
    record = evaluation_record(
        model="trial",
        data=SCENES,
        split="test",
        rows=rows,
        scores=scores,
        shuffled=scores,
        threshold=Threshold(0.35, "chosen on val for the highest mIoU"),
        selection=MaskSelection(0.35, keep_largest_component=False),
        command="python training/evaluation.py model --split test",
        processes=1,
    )
    return json.dumps(record)


def write_evaluation(path: Path, data: DataSettings = SCENES, split: str = "test", shift: int = 0) -> Path:
    """Write such a record under the name of other data and another split."""
    write_text(path, json.dumps(json.loads(made_up_record(shift)) | {"data": asdict(data), "split": split}))
    return path

"""The files of evaluation results for the Hub hold the figures of the records, in the form that huggingface_hub defines."""

import json

import pytest
import yaml
from evaluations import made_up_record, write_evaluation
from huggingface_hub import EvalResultEntry, parse_eval_result_entries

from training.configuration import DataSettings
from training.publishing.eval_results import HUB_SPLITS, eval_result_files
from training.sources.published_counts import PUBLISHED_REFS

REFCOCO = DataSettings(root="refer")


def record_of(tmp_path, split: str, data: DataSettings = REFCOCO, objects: int | None = None) -> dict:
    """A made-up record that says it is of a split of RefCOCO."""
    record = json.loads(write_evaluation(tmp_path / f"{split}.json", data, split).read_text())
    published = PUBLISHED_REFS["refcoco", "unc"].get(split, 0)
    record["counts"]["objects"] = published if objects is None else objects
    return record


def test_every_split_is_an_entry_with_its_figure(tmp_path):
    records = [record_of(tmp_path, split) for split in ("val", "testA")]
    ((path, text),) = eval_result_files(records).items()
    assert path == ".eval_results/jxu124--refcoco.yaml"
    entries = parse_eval_result_entries(yaml.safe_load(text))
    assert all(isinstance(entry, EvalResultEntry) for entry in entries)
    assert [(entry.dataset_id, entry.task_id) for entry in entries] == [
        ("jxu124/refcoco", "val_mIoU"),
        ("jxu124/refcoco", "testA_mIoU"),
    ]
    value = records[0]["summary"]["as written"]["all"]["mIoU"]
    assert [entry.value for entry in entries] == [round(100 * value, 2)] * 2
    assert all("RefCOCO (unc)" in entry.notes and "Threshold 0.35" in entry.notes for entry in entries)


@pytest.mark.parametrize("other", ["scenes", "a part of it", "prepared", "another split"])
def test_other_data_have_no_file(tmp_path, other):
    if other == "scenes":
        records = [json.loads(made_up_record(0))]
    elif other == "a part of it":  # refer-mini, or a split without the images of training
        records = [record_of(tmp_path, "val", objects=84)]
    elif other == "prepared":
        records = [record_of(tmp_path, "val", DataSettings(source="folder", root="prepared/refcoco"))]
    else:
        records = [record_of(tmp_path, "test")]
    assert eval_result_files(records) == {}


def test_ids_are_of_splits_whose_size_is_known():
    for (dataset, split_by, split), found in HUB_SPLITS.items():
        assert (
            split in PUBLISHED_REFS[dataset, split_by] and found.dataset_id.count("/") == 1 and split in found.task_id
        )

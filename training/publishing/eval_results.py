"""The files `.eval_results/*.yaml` of a model on the Hub: figures on data sets that have an id there (ours).

The form is huggingface_hub's `EvalResultEntry`. It needs the data set's id and the id of a task. The Hub shows an entry beside the
data set once that data set's own `eval.yaml` names the task. All other data have their figures in the card's `model-index` alone.
"""

from typing import Any, NamedTuple

import yaml
from huggingface_hub import EvalResultEntry, eval_result_entries_to_yaml, parse_eval_result_entries

from training.scoring.reports import data_name, selection_note
from training.sources.published_counts import is_part

FOLDER = ".eval_results"
METRIC = "mIoU"


class HubSplit(NamedTuple):
    """A split of a data set on the Hub.

    Attributes:
        dataset_id: "owner/name".
        task_id: The split and the metric; `METRIC` is its value.
    """

    dataset_id: str
    task_id: str


# By (dataset, split_by, split). Only data sets whose splits are the published ones: lmms-lab/RefCOCO has two joined in its "val".
HUB_SPLITS = {
    ("refcoco", "unc", split): HubSplit("jxu124/refcoco", f"{split}_{METRIC}") for split in ("val", "testA", "testB")
}


def eval_result_files(evaluations: list[dict[str, Any]]) -> dict[str, str]:
    """The files of a model's evaluations, by path. There is one for each data set that is in HUB_SPLITS.

    A split of another size than the published one is left out: it is not the data set that the id names.

    Args:
        evaluations: Records of `training/evaluation.py` or `training/papers_table.py`.
    """
    entries: dict[str, list[EvalResultEntry]] = {}
    for record in evaluations:
        data = record["data"]
        key = (data.get("dataset"), data.get("split_by"), record["split"])
        if data["source"] != "refer" or key not in HUB_SPLITS:
            continue
        if is_part(*key, record["counts"]["objects"]):
            continue
        found = HUB_SPLITS[key]
        entry = EvalResultEntry(
            dataset_id=found.dataset_id,
            task_id=found.task_id,
            value=round(100 * record["summary"]["as written"]["all"][METRIC], 2),
            notes=f"{METRIC} in percent, {data_name(record)}, {record['split']}. {selection_note(record)}",
        )
        entries.setdefault(found.dataset_id, []).append(entry)
    files = {f"{FOLDER}/{name.replace('/', '--')}.yaml": _to_yaml(found) for name, found in entries.items()}
    for path, text in files.items():
        check_eval_results(path, text)
    return files


def check_eval_results(path: str, text: str) -> None:
    """`ValueError` where a file changes when huggingface_hub reads and writes it again."""
    written = yaml.safe_load(text)
    if eval_result_entries_to_yaml(parse_eval_result_entries(written)) != written:
        raise ValueError(f"{path} changes when it is written and parsed again.")


def _to_yaml(entries: list[EvalResultEntry]) -> str:
    return yaml.safe_dump(eval_result_entries_to_yaml(entries), sort_keys=False, allow_unicode=True)


__all__ = ["FOLDER", "HUB_SPLITS", "eval_result_files"]

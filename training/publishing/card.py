"""The model card of a model that is pushed: `model_card.md`, filled from the files of its run and of its evaluations (ours).

Every figure on the card comes from `evaluation-*.json`, `history.json`, `tuning.json` or `settings.yaml`.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.repocard_data import eval_results_to_model_index, model_index_to_eval_results
from huggingface_hub.utils import validate_repo_id

from training.configuration import DataSettings, MixedSet, TrainingSettings, dump_settings, load_settings
from training.learning.building import IMAGE_SIZE
from training.learning.routing_health import named_routers, routing_warnings
from training.scoring.metric import SentenceScore, summarize
from training.scoring.reports import data_name, format_report, model_index
from training.support.environment import without_folders, without_paths
from training.support.model_location import locate_model

TEMPLATE = Path(__file__).resolve().parents[2] / "model_card.md"
NO_RESULTS = "There are no results: this model was published without an evaluation."
CHOSEN = "The publisher of the model chose the images and the expressions."
NOT_CHOSEN = "The first held-out scenes, each with its first expression. They were not chosen by their results."
METADATA = {
    "license": "apache-2.0",
    "library_name": "transformers",
    "pipeline_tag": "image-segmentation",
    "language": "en",
    "tags": ["referring-image-segmentation", "mixture-of-experts"],
}


@dataclass
class TrainingRun:
    """A run's folder, its settings, and the content of `tuning.json` and `history.json` if they exist."""

    folder: Path
    settings: TrainingSettings
    tuning: dict[str, Any] | None
    history: list[dict[str, Any]]


def read_run(model_folder: Path) -> TrainingRun | None:
    """The run that a model comes from; `None` where no settings lie with the model.

    Args:
        model_folder: The run's folder, or the model's own.

    Raises:
        ValueError: The folder holds no model.
    """
    location = locate_model(model_folder)
    if location.settings is None or not location.settings.is_file():
        return None
    folder = location.home.absolute()
    tuning, history = folder / "tuning.json", folder / "history.json"
    return TrainingRun(
        folder,
        load_settings(folder / "settings.yaml"),
        _read_json(tuning) if tuning.is_file() else None,
        _read_json(history) if history.is_file() else [],
    )


def read_evaluation(path: Path, models: set[str]) -> dict[str, Any]:
    """Read a record that `training/evaluation.py` or `training/papers_table.py` wrote about a model with one of the names `models`.

    Raises:
        ValueError: The file is no such record, is about another model, or its figures do not follow from its scores.
        OSError: The file cannot be read.
    """
    record = _read_json(path)
    try:
        name = record["model"]
        scores = [SentenceScore(**score) for score in record["scores"]]
        changed = record["summary"]["as written"] != summarize(scores)
        format_report(record), model_index(record)
    except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
        raise ValueError(f"{path} is not an evaluation by training/evaluation.py ({error!r}).") from error
    if name not in models:
        raise ValueError(f"{path} is an evaluation of {name!r}, not of {' or '.join(sorted(models))}.")
    if changed:
        raise ValueError(f"{path} was changed: its figures do not follow from its scores; evaluate again.")
    return record


def model_card(
    repo_id: str,
    *,
    run: TrainingRun | None,
    evaluations: list[dict[str, Any]],
    examples: list[tuple[str, str]],
    chosen: bool,
    predicts_presence: bool,
    towers: tuple[str, str],
) -> str:
    """The card as text.

    Args:
        repo_id: "user/name", the repository of the model.
        run: The run that trained it, if known.
        evaluations: Records of [`read_evaluation`]. If there are none, the card says so.
        examples: (expression, path of the image in the repository) of the gallery. "1.png" shows the answer; "1-image.png" in the
            same folder is the image without it.
        chosen: Whether somebody chose the examples. If not, they are the first held-out scenes.
        predicts_presence: Whether the model has a presence head.
        towers: Families of the vision tower and of the text tower, such as ("DINOv2", "CLIP").

    Raises:
        ValueError: Two evaluations are of the same split.
    """
    name = repo_id.partition("/")[2]
    metadata = METADATA | {"tags": [*METADATA["tags"], *(tower.lower() for tower in towers)]}
    if run is not None:
        ids = {"datasets": _dataset_ids(run), "base_model": _base_models(run)}
        metadata |= {key: found for key, found in ids.items() if found}
        if ids["base_model"]:
            metadata["base_model_relation"] = "finetune"
    if examples:
        metadata["widget"] = [{"text": text, "output": {"url": path}} for text, path in examples]
    if evaluations:
        index = [{"name": name, "results": _index_results(evaluations)}]
        metadata |= {"model_name": name, "eval_results": model_index_to_eval_results(index)[1]}
    drawn_scenes = run is not None and run.settings.data.source == "scenes"
    expression, image = "the red circle" if drawn_scenes else "left zebra", "image.png"
    if examples:
        expression, path = examples[0]
        image = f"https://huggingface.co/{repo_id}/resolve/main/{path.removesuffix('.png')}-image.png"
    card = ModelCard.from_template(
        ModelCardData(**metadata),
        template_path=str(TEMPLATE),
        name=name,
        repo_id=repo_id,
        image=image,
        expression=json.dumps(expression, ensure_ascii=False),
        examples=examples,
        examples_note=CHOSEN if chosen else NOT_CHOSEN,
        predicts_presence=predicts_presence,
        towers=towers,
        drawn_scenes=drawn_scenes,
        pretrained=without_folders(run.settings.model.pretrained) if run and run.settings.model.pretrained else None,
        pretrained_is_published=run is not None and run.settings.model.pretrained in _base_models(run),
        training=_describe_training(run),
        results="\n".join(_demoted(format_report(record)) for record in evaluations) or NO_RESULTS,
    )
    return str(card).rstrip() + "\n"


def check_card(text: str, folder: Path) -> None:
    """Check a card without the Hub. `ModelCard.validate` asks the Hub; a push does so before it sends anything.

    Args:
        text: The card.
        folder: The folder that is sent with it.

    Raises:
        ValueError: The metadata change when they are written and parsed, or the card shows an image that is not sent.
    """
    metadata = ModelCard(text).data.to_dict()  # raises if the model-index is not valid
    written = yaml.safe_load(text.split("---\n")[1])
    if written != metadata:
        raise ValueError("The card's metadata change when they are written and parsed again.")
    if "model-index" in written:
        results = model_index_to_eval_results(written["model-index"])
        if eval_results_to_model_index(*results) != written["model-index"]:
            raise ValueError("The card's model-index changes when it is written and parsed again.")
    for example in written.get("widget", []):
        if not (folder / example["output"]["url"]).is_file():
            raise ValueError(f"The card shows {example['output']['url']}, which is not sent.")


def _index_results(evaluations: list[dict[str, Any]]) -> list[dict[str, Any]]:
    results, seen = [], set()
    for record in evaluations:
        (result,) = yaml.safe_load(model_index(record))["model-index"][0]["results"]
        place = tuple(result["dataset"].get(key) for key in ("type", "config", "split"))
        if place in seen:
            raise ValueError(
                f"Two of the evaluations are of {data_name(record)}, split {record['split']}; give only one of them."
            )
        seen.add(place)
        results.append(result)
    return results


def _describe_training(run: TrainingRun | None) -> str:
    if run is None:
        return "There is no record of this model's training."
    settings, optimization = run.settings, run.settings.optimization
    data, model = settings.data, settings.model
    sets = ", ".join(_set_name(part, data) for part in (data, *data.mix))
    start = {"vision tower": model.vision_model, "text tower": model.text_model}
    if model.pretrained:
        start = {"whole model": model.pretrained}
    origins = ", ".join(
        f"{part} from {f'`{without_folders(source)}`' if source else 'random weights'}"
        for part, source in start.items()
    )
    size = "the size of the starting model"
    if data.image_size or not model.pretrained:
        size = " x ".join(map(str, data.image_size or IMAGE_SIZE)) + " pixels"
    lines = [f"- Data: {sets}, split {data.train_split}; images letterboxed to {size}."]
    if data.source == "scenes":
        lines[0] += f" {data.num_scenes[0]} scenes of {data.scene_size} pixels, seed {data.scene_seed}."
    lines.append(f"- Start: {origins}.")
    tuned = f"- Tuned: vision tower {model.vision_tuning}, text tower {model.text_tuning}"
    if run.tuning:
        counts = run.tuning
        tuned += f"; {counts['vision_trained']:,} of {counts['vision_total']:,} and {counts['text_trained']:,} of "
        tuned += f"{counts['text_total']:,} parameters, and all {counts['added']:,} that SERA adds"
    lines.append(tuned + ".")
    lines.append(
        f"- Recipe: {optimization.optimizer}, learning rate {optimization.learning_rate:g}, {optimization.schedule} schedule, "
        f"{optimization.epochs} epochs, {optimization.batch_size} images per batch and process, seed {settings.seed}, mixed "
        f"precision {settings.mixed_precision}."
    )
    scored = [record for record in run.history if "val" in record]
    if scored:
        best = max(scored, key=lambda record: record["val"]["mIoU"])
        lines.append(
            f"- Kept: epoch {best['epoch']} of {len(run.history)}, the best mIoU on {data.val_split} of {len(scored)} evaluated: "
            f"{100 * best['val']['mIoU']:.1f} %."
        )
        lines += _describe_routing(best.get("routing", {}), data.val_split)
    lines.append("- Hardware: the run does not record it. The hardware of each evaluation stands under Results.")
    written = yaml.safe_dump(without_paths(yaml.safe_load(dump_settings(settings))), sort_keys=False)
    lines += [
        "- Command: `accelerate launch training/train.py --config settings.yaml`, with this file:",
        "",
        f"<details><summary>settings.yaml</summary>\n\n```yaml\n{written}```\n\n</details>",
    ]
    return "\n".join(lines)


def _describe_routing(summary: dict[str, Any], split: str) -> list[str]:
    """How the routers of the kept model decide, with the faults; nothing for a run that has no such figures."""
    routers = {name: figures for name, figures in named_routers(summary).items() if "deviation" in figures}
    if not routers:
        return []
    listed = ", ".join(
        f"{name} {100 * figures['deviation']:.1f} % ({figures['mutual_information']:.2f})"
        for name, figures in routers.items()
    )
    line = (
        f"- Routing on {split}, standard deviation of the weights between samples (mutual information of sample and expert in "
        f"nats): {listed}."
    )
    return [" ".join([line, *routing_warnings(summary)])]


def _set_name(part: DataSettings | MixedSet, data: DataSettings) -> str:
    """A set of a mixture, with its folder where that is not the first set's, and its weight."""
    name = data_name({"data": asdict(part) | {"root": part.root or data.root}})
    if part.source == "refer" and part.root not in (None, data.root):
        name += f" in {Path(part.root).name}"
    return name + (f", weight {part.weight:g}" if part.weight else "")


def _dataset_ids(run: TrainingRun) -> list[str]:
    data = run.settings.data
    parts = [data, *data.mix]
    names = [
        part.dataset if part.source == "refer" else part.root or data.root for part in parts if part.source != "scenes"
    ]
    folders = {part.root or data.root for part in parts if part.source == "folder"}
    return [name for name in dict.fromkeys(names) if name not in folders or _is_hub_id(name, run)]


def _base_models(run: TrainingRun) -> list[str]:
    model = run.settings.model
    sources = [model.pretrained] if model.pretrained else [model.vision_model, model.text_model]
    return [source for source in dict.fromkeys(sources) if _is_hub_id(source, run)]


def _is_hub_id(name: str | None, run: TrainingRun) -> bool:
    """Whether a setting is a Hub id and not a folder. Folders are looked for here and in every folder above the run.

    A folder may be gone by now: a name that begins like the run's own output, such as "outputs/first", was a run too.
    """
    if name is None or "/" not in name:
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    if Path(name).parts[0] == Path(run.settings.output_dir).parts[0]:
        return False
    return not any((parent / name).exists() for parent in [Path(), *run.folder.parents])


def _demoted(report: str) -> str:
    """A report as a section of a card, with its heading two levels lower."""
    return f"##{report}"


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # also for wrong UTF-8
        raise ValueError(f"{path} is not JSON: {error}.") from error

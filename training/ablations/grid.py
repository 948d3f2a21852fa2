"""The grid of an ablation: a base configuration, its named variants and seeds; and the records of finished runs (ours)."""

import hashlib
import json
import re
import tempfile
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from modeling_sera import SeraConfig
from training.configuration import TrainingSettings, read_settings
from training.learning.checkpoints import FREE
from training.support.environment import without_paths
from training.support.files import write_text

NAME = r"\w[\w.-]*"  # also names folders
FIELDS = {"config", "split", "baseline", "seeds", "variants"}
OPTIONAL_FIELDS = {"options", "evaluation"}
EVALUATION_OPTIONS = {
    "tta": str,
    "expected_iou": bool,
    "largest_component": bool,
    "threshold": float,
}  # options of evaluation.py


@dataclass(frozen=True)
class Run:
    """One training of an ablation.

    Attributes:
        variant: Name of its variant.
        overrides: The settings that the variant changes, by dotted name.
        settings: All of its settings. `output_dir` keeps its default.
        evaluation: How masks are selected: options of `evaluation.py`, without their dashes.
    """

    variant: str
    overrides: dict[str, Any]
    settings: TrainingSettings
    evaluation: dict[str, Any] = field(default_factory=dict)

    @property
    def seed(self) -> int:
        """Seed of its training."""
        return self.settings.seed

    @property
    def recipe(self) -> str:
        """A name for everything that is trained and scored, except for the seed. Runs of equal recipes may be averaged.

        It depends only on settings that differ from the defaults, so a setting that is added later does not change old names.
        """
        chosen = _difference(asdict(self.settings), asdict(TrainingSettings()))
        chosen = {name: value for name, value in chosen.items() if name not in FREE | {"seed"}}
        if self.evaluation:
            chosen["evaluation"] = self.evaluation
        text = json.dumps(without_paths(chosen), sort_keys=True)
        return f"{self.variant}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"

    @property
    def key(self) -> str:
        """The name of the run, of its folder and of its record."""
        return f"{self.recipe}-seed{self.seed}"


@dataclass(frozen=True)
class Grid:
    """An ablation.

    Attributes:
        path: The file that it was read from.
        extra: Further options of `train.py` for every variant.
        split: Split that finished models are scored on.
        baseline: Variant that the others are compared with.
        seeds: Seeds of every variant.
        variants: One run per variant, with the first seed.
    """

    path: Path
    extra: tuple[str, ...]
    split: str
    baseline: str
    seeds: tuple[int, ...]
    variants: dict[str, Run]

    def runs(self, only: list[str] | None = None, seeds: list[int] | None = None) -> list[Run]:
        """The runs, seed by seed: the first seed of all variants comes first. Raises a `ValueError` for an unknown variant."""
        for name in only or []:
            if name not in self.variants:
                raise ValueError(f"{self.path} has no variant {name!r}; it has {', '.join(self.variants)}.")
        chosen = [run for name, run in self.variants.items() if only is None or name in only]
        return [
            replace(run, settings=replace(run.settings, seed=seed)) for seed in seeds or self.seeds for run in chosen
        ]

    def finished(self, records: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        """The records that were scored on the grid's split."""
        return {key: record for key, record in records.items() if record["split"] == self.split}


def read_grid(path: Path, extra: list[str] | None = None) -> Grid:
    """Read an ablation and check every variant's settings.

    The file must hold `config`, a file of training settings, relative to the grid's own folder; `variants`, which maps names to the
    settings that they change (`{model.config.num_selected_experts: 2}`); `baseline`, one of the names; `seeds`; and `split`, the
    split that models are scored on. It may hold `options`, changes for all variants, and `evaluation`, options of `evaluation.py`
    that select masks (`{tta: flip, threshold: 0.4}`).

    Args:
        path: The file.
        extra: Options of `train.py` for every variant, such as `["--data.root", "refer"]`. They override the file.

    Raises:
        ValueError, OSError: The file is not a grid, or a variant's settings are not accepted.
    """
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict) or set(content) - FIELDS - OPTIONAL_FIELDS or FIELDS - set(content):
        raise ValueError(
            f"{path} must hold the fields {', '.join(sorted(FIELDS))}, and may hold {', '.join(sorted(OPTIONAL_FIELDS))}."
        )
    names, seeds, evaluation = content["variants"], content["seeds"], content.get("evaluation") or {}
    if not isinstance(names, dict) or not names or not all(re.fullmatch(NAME, str(name)) for name in names):
        raise ValueError(
            f"{path}: variants must map names of letters, digits, '-', '_' and '.' to the settings that they change."
        )
    if content["baseline"] not in names:
        raise ValueError(f"{path}: baseline is {content['baseline']!r}; the variants are {', '.join(names)}.")
    if not isinstance(seeds, list) or not seeds or not all(type(seed) is int and seed >= 0 for seed in seeds):
        raise ValueError(f"{path}: seeds is {seeds!r}; it must be a list of whole numbers that are 0 or more.")
    if not isinstance(content["split"], str):
        raise ValueError(f"{path}: split is {content['split']!r}; it must be the name of a split.")
    _check_evaluation(path, evaluation)
    base = path.parent / content["config"]
    if not base.is_file():
        raise FileNotFoundError(f"{path}: there is no configuration {base}.")
    variants = {}
    for name, changes in names.items():
        settings = _settings(path, name, base, (content.get("options") or {}) | (changes or {}), extra or [])
        variants[name] = Run(name, changes or {}, replace(settings, output_dir="", seed=seeds[0]), evaluation)
    return Grid(path, tuple(extra or []), content["split"], content["baseline"], tuple(seeds), variants)


def _check_evaluation(path: Path, evaluation: Any) -> None:
    if not isinstance(evaluation, dict):
        raise ValueError(f"{path}: evaluation is {evaluation!r}; it must map names of options to values.")
    for name, value in evaluation.items():
        if name not in EVALUATION_OPTIONS:
            raise ValueError(f"{path}: evaluation has {name!r}; it may have {', '.join(EVALUATION_OPTIONS)}.")
        kind = EVALUATION_OPTIONS[name]
        is_legal = {bool: value is True, str: value == "flip", float: type(value) is float and 0 < value < 1}[kind]
        if not is_legal:
            accepted = {bool: "true", str: "flip", float: "a number between 0 and 1"}[kind] + ", or be left out"
            raise ValueError(f"{path}: evaluation.{name} is {value!r}; it must be {accepted}.")
    if {"expected_iou", "threshold"} <= set(evaluation):
        raise ValueError(
            f"{path}: evaluation has a threshold and expected_iou, which exclude each other; leave one of them out."
        )


def _settings(path: Path, variant: str, base: Path, changes: dict[str, Any], extra: list[str]) -> TrainingSettings:
    tree = yaml.safe_load(base.read_text(encoding="utf-8"))
    for dotted, value in changes.items():
        *parents, last = dotted.split(".")
        place = tree
        for parent in parents:
            place = place.setdefault(parent, {})
        place[last] = value
    with tempfile.TemporaryDirectory() as folder:
        merged = Path(folder, f"{variant}.yaml")
        merged.write_text(yaml.safe_dump(tree))
        try:
            settings = read_settings(["--config", str(merged), *extra])
        except SystemExit as error:  # the parser has printed the reason
            raise ValueError(f"{path}: the settings of the variant {variant!r} are not accepted, see above.") from error
    unknown = sorted(set(settings.model.config) - set(SeraConfig.__annotations__))
    if unknown:
        raise ValueError(f"{path}: variant {variant!r} sets model.config.{unknown[0]}, which SeraConfig does not have.")
    return settings


def _difference(tree: dict, default: dict) -> dict:
    """The part of nested settings that differs from the defaults."""
    changed = {name: value for name, value in tree.items() if name not in default or value != default[name]}
    return {
        name: _difference(value, default[name])
        if isinstance(value, dict) and isinstance(default.get(name), dict)
        else value
        for name, value in changed.items()
    }


class Records:
    """The finished runs of an ablation, one JSON object per line of a file."""

    def __init__(self, path: Path):
        self.path = path

    def read(self) -> dict[str, dict[str, Any]]:
        """The records by the keys of their runs, in the order in which the runs finished."""
        lines = self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else []
        return {record["key"]: record for record in map(json.loads, lines)}

    def add(self, record: dict[str, Any]) -> None:
        """Add a run. A reader always finds whole lines, with or without it."""
        records = self.read() | {record["key"]: record}
        write_text(self.path, "".join(json.dumps(each) + "\n" for each in records.values()))


__all__ = ["Grid", "Records", "Run", "read_grid"]

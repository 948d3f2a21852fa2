"""Tables and figures of an ablation's finished runs: means over seeds, paired comparisons with the baseline, curves (ours)."""

from __future__ import annotations

import json
import math
import shlex
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from training.ablations.grid import Grid
from training.scoring.figures import new_figure
from training.scoring.intervals import LEVEL, RESAMPLES, paired_intervals
from training.scoring.metric import SentenceScore, format_value, score_terms
from training.scoring.referring_iou.referring_iou import Terms
from training.scoring.reports import selection_note
from training.support.environment import counted
from training.support.files import write_binary, write_text

Record = dict[str, Any]
METRICS = ("mIoU", "oIoU", "Pr@0.5", "Pr@0.7", "boundary_F")
SIZES = ("small", "medium", "large")
# Student's t for the middle 95 %, for 1, 2, … degrees of freedom
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)


def write_results(grid: Grid, records: Sequence[Record], output: Path, command: str) -> None:
    """Write `results.md`, `figures/bars.png` and `figures/curves.png` for the finished runs. Without any, nothing is written.

    Args:
        grid: The ablation. Records of other recipes are left out, for example if the file was changed since.
        records: Its finished runs.
        output: Folder that holds their evaluations and takes the results.
        command: The command of the ablation.
    """
    runs = {
        name: [record for record in records if record["recipe"] == run.recipe] for name, run in grid.variants.items()
    }
    runs = {name: sorted(found, key=lambda record: record["seed"]) for name, found in runs.items() if found}
    if runs:
        compared = {name: compare(found, runs.get(grid.baseline, []), output) for name, found in runs.items()}
        write_text(output / "results.md", format_results(grid, runs, compared, command))
        _draw_bars(runs, output / "figures" / "bars.png")
        _draw_curves(runs, output / "figures" / "curves.png")


def mean_and_error(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and its standard error. The error of a single value is `None`."""
    mean = math.fsum(values) / len(values)
    if len(values) < 2:
        return mean, None
    variance = math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return mean, math.sqrt(variance / len(values))


def fresh_seed_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """The score of one more seed lies in this interval in 95 of 100 cases (Student's prediction interval). `None` for one value."""
    mean, error = mean_and_error(values)
    if error is None:
        return None
    freedom = len(values) - 1
    # beyond the table: the normal quantile with a correction (Cornish and Fisher)
    quantile = STUDENT[freedom - 1] if freedom <= len(STUDENT) else 1.96 + 2.37 / freedom + 2.82 / freedom**2
    half = quantile * error * math.sqrt(len(values) + 1)
    return mean - half, mean + half


def compare(runs: Sequence[Record], baseline: Sequence[Record], output: Path) -> Record | None:
    """The differences between a variant's metrics and the baseline's, over the seeds that both have. `None` if they share no seed.

    Returns:
        Per metric of METRICS: "difference", the mean over seeds; "error", its standard error over seeds (`None` for one seed); and
        "interval", which holds LEVEL of the differences of the means over seeds in resamples of images.
    """
    shared = sorted({record["seed"] for record in runs} & {record["seed"] for record in baseline})
    if not shared or list(runs) == list(baseline):
        return None
    chosen = [{record["seed"]: record for record in group} for group in (runs, baseline)]
    mine, theirs = ([_terms(group[seed], output) for seed in shared] for group in chosen)
    images = np.concatenate([images for _, images in mine])
    if not np.array_equal(images, np.concatenate([images for _, images in theirs])):
        return None  # scored on other sentences, so they cannot be paired
    joined = [
        {
            name: tuple(np.concatenate(sides) for sides in zip(*(t[name] for t, _ in group), strict=True))
            for name in METRICS
        }
        for group in (mine, theirs)
    ]
    intervals = paired_intervals(*joined, images) if len(set(images.tolist())) > 1 else {}
    compared = {}
    for name in METRICS:
        values = [_score(chosen[0][seed], name) - _score(chosen[1][seed], name) for seed in shared]
        difference, error = mean_and_error(values)
        compared[name] = {"difference": difference, "error": error, "interval": intervals.get(name)}
    return compared


def format_results(grid: Grid, runs: dict[str, list[Record]], compared: dict[str, Record | None], command: str) -> str:
    """The whole result as Markdown."""
    first = next(iter(runs.values()))[0]
    counts = first["counts"]
    lines = [
        f"# Ablation {grid.path.stem}",
        "",
        f"Split {grid.split}: {counts['expressions']} expressions about {counts['objects']} objects in {counts['images']} "
        f"images. {selection_note(first)} All values are percentages. "
        "±: standard error over seeds of training, on the same data. "
        f"Δ: difference from {grid.baseline} with the same seeds. In brackets: "
        f"{LEVEL:.0%} of the differences of means over seeds in {RESAMPLES} paired resamples of images. Fresh seed: the mIoU of "
        "one more seed lies in this interval in 95 of 100 cases. Shuffled: mIoU with each object given the sentences of another.",
        "",
        _table(
            [
                "variant",
                "seeds",
                "trained",
                *METRICS,
                "fresh seed",
                "Δ mIoU over images",
                "Δ mIoU over seeds",
                "Δ boundary_F",
                "shuffled",
            ],
            {name: _main_row(found, compared[name]) for name, found in runs.items()},
        ),
        "",
        "mIoU of parts:",
        "",
        _slices(runs),
    ]
    if any(
        record["curve"][-1]["routing"]["taps"] or record["curve"][-1]["routing"]["adapters"]
        for f in runs.values()
        for record in f
    ):
        lines += [
            "",
            "Routing at the end of training, on the validation split. Least and greatest: the smallest and the largest mean share "
            "of any fusion expert at any tap. Entropy: mean over samples and taps, as a share of the entropy of equal weights. "
            "Adapter boundary: mean share of the boundary expert in each adapter.",
            "",
            _routing(runs),
        ]
    lines += ["", "To reproduce a row:", ""]
    for name, found in runs.items():
        changed = (
            ", ".join(f"{key} {json.dumps(value)}" for key, value in found[0]["overrides"].items()) or "as configured"
        )
        seeds = " ".join(str(record["seed"]) for record in found)
        lines.append(f"- {name} ({changed}): `{command} --only {shlex.quote(name)} --seeds {seeds}`")
    lines += ["", "Measured on:", ""]
    lines += [f"- {line}" for line in sorted({_machine(record) for found in runs.values() for record in found})]
    return "\n".join(lines) + "\n"


def _main_row(runs: list[Record], compared: Record | None) -> list[str]:
    tuning = runs[0]["tuning"]
    trained = tuning["vision_trained"] + tuning["text_trained"] + tuning["added"]
    values = [_score(record, "mIoU") for record in runs]
    ends = fresh_seed_interval(values)
    cells = [str(len(runs)), f"{trained:,}"]
    cells += [_cell(runs, lambda record, name=name: _score(record, name)) for name in METRICS]
    cells.append("–" if ends is None else f"{100 * ends[0]:.1f} to {100 * ends[1]:.1f}")
    if compared is None:
        cells += ["–"] * 3
    else:
        miou, boundary = compared["mIoU"], compared["boundary_F"]
        cells += [_difference(miou["difference"], interval=miou["interval"])]
        cells += [_difference(miou["difference"], error=miou["error"])]
        cells += [_difference(boundary["difference"], interval=boundary["interval"])]
    return [*cells, _cell(runs, lambda record: record["summary"]["shuffled"]["all"]["mIoU"])]


def _slices(runs: dict[str, list[Record]]) -> str:
    first = next(iter(runs.values()))[0]
    parts: dict[str, Callable[[Record], float]] = {}
    for kind in first["summary"]["as written"]:
        if kind != "all":
            parts[kind] = lambda record, kind=kind: record["summary"]["as written"][kind]["mIoU"]
    for dimension, groups in first["slices"].items():
        if dimension in ("size", "targets") or (dimension == "wording" and not parts):
            for label in groups:
                parts[label] = lambda record, d=dimension, label=label: record["slices"][d][label]["mIoU"]
    sizes = [label for label in SIZES if label in first["slices"].get("size", {})]
    for label in sizes:
        parts[f"{label}, boundary_F"] = lambda record, label=label: record["slices"]["size"][label]["boundary_F"]
    numbers = {"expressions": [""] * len(parts)}
    for i, name in enumerate(parts):
        label = name.removesuffix(", boundary_F")
        group = next(
            (g[label] for g in first["slices"].values() if label in g), first["summary"]["as written"].get(label)
        )
        numbers["expressions"][i] = str(group["num_expressions"])
    rows = {name: [_cell(found, value) for value in parts.values()] for name, found in runs.items()}
    return _table(["variant", *parts], numbers | rows)


def _routing(runs: dict[str, list[Record]]) -> str:
    rows = {}
    for name, found in runs.items():
        routing = [record["curve"][-1]["routing"] for record in found]
        shares = [[share for tap in one["taps"].values() for share in tap["shares"].values()] for one in routing]
        entropy = [[tap["entropy"] / math.log(4) for tap in one["taps"].values()] for one in routing]
        boundary: dict[str, list[float]] = defaultdict(list)
        for one in routing:
            for block, adapter in one["adapters"].items():
                boundary[block].append(adapter["shares"]["boundary"])
        fused = ["–"] * 3
        if all(shares):
            values = ([min(s) for s in shares], [max(s) for s in shares], [sum(e) / len(e) for e in entropy])
            fused = [_value(*mean_and_error(each)) for each in values]
        adapters = "; ".join(f"{block}: {_value(*mean_and_error(each))}" for block, each in boundary.items())
        rows[name] = [*fused, adapters or "–"]
    return _table(["variant", "least", "greatest", "entropy", "adapter boundary"], rows)


def _terms(record: Record, output: Path) -> tuple[Terms, np.ndarray]:
    evaluation = json.loads((output / record["evaluation"]).read_text(encoding="utf-8"))
    scores = [SentenceScore(**score) for score in evaluation["scores"]]
    image_ids = evaluation["image_ids"]
    return score_terms(scores), np.array([image_ids[score.row] for score in scores])


def _score(record: Record, metric: str) -> float:
    return record["summary"]["as written"]["all"][metric]


def _cell(runs: list[Record], value: Callable[[Record], float]) -> str:
    try:
        return _value(*mean_and_error([value(record) for record in runs]))
    except KeyError:  # a part that these runs were not scored on
        return "–"


def _value(mean: float, error: float | None) -> str:
    return format_value(mean) + ("" if error is None else f" ± {100 * error:.1f}")


def _difference(value: float, error: float | None = None, interval: Sequence[float] | None = None) -> str:
    text = f"{100 * value:+.1f}"
    if interval is not None:
        text += f" [{100 * interval[0]:+.1f}, {100 * interval[1]:+.1f}]"
    return text + ("" if error is None else f" ± {100 * error:.1f}")


def _table(header: list[str], rows: dict[str, list[str]]) -> str:
    lines = ["| " + " | ".join(header) + " |", "|---|" + "--:|" * (len(header) - 1)]
    return "\n".join(lines + ["| " + " | ".join([name, *cells]) + " |" for name, cells in rows.items()])


def _machine(record: Record) -> str:
    hardware, versions = record["hardware"], record["versions"]
    devices = ", ".join(hardware["gpus"]) or "no GPU"
    libraries = ", ".join(f"{name} {versions[name]}" for name in ("python", "torch", "transformers"))
    cores, jobs = counted(hardware["cores"], "core"), counted(record["jobs"], "run")
    return f"{hardware['processor']}, {cores}, {devices}; {jobs} at once; {libraries}"


def _draw_bars(runs: dict[str, list[Record]], path: Path) -> None:
    """mIoU and boundary F of each variant: mean, standard error, and a dot per seed."""
    figure = new_figure(13, 0.4 * len(runs) + 1.4)
    for place, name in enumerate(("mIoU", "boundary_F")):
        axis = figure.add_subplot(1, 2, place + 1)
        for line, found in enumerate(runs.values()):
            values = [_score(record, name) for record in found]
            mean, error = mean_and_error(values)
            axis.barh(line, mean, xerr=error, color=_color(line), height=0.7, alpha=0.6)
            axis.plot(values, [line] * len(values), ".", color="black", markersize=4)
        lowest = min(_score(record, name) for found in runs.values() for record in found)
        axis.set_xlim(left=max(lowest - 0.1, 0))
        axis.set_yticks(range(len(runs)), list(runs) if place == 0 else [""] * len(runs))
        axis.invert_yaxis()
        axis.set(title=f"{name}: mean, standard error, seeds (axis does not start at 0)" if lowest > 0.1 else name)
        axis.title.set_fontsize(10)
    figure.tight_layout()
    write_binary(path, lambda partial: figure.savefig(partial, format="png"))


def _draw_curves(runs: dict[str, list[Record]], path: Path) -> None:
    """Training loss over steps, and validation mIoU over epochs if a run has several of them. Means over seeds."""
    scored = {
        name: [
            [(epoch["epoch"], epoch["val"]["mIoU"]) for epoch in record["curve"] if "val" in epoch] for record in found
        ]
        for name, found in runs.items()
    }
    panels = 2 if any(len(points) > 1 for found in scored.values() for points in found) else 1
    figure = new_figure(1.5 + 6.75 * panels, 5.5)
    axes = figure.subplots(1, panels, squeeze=False)[0]
    for line, (name, found) in enumerate(runs.items()):
        style = {"color": _color(line), "linestyle": "-" if line < 10 else "--", "label": name}
        length = min(len(record["losses"]) for record in found)
        losses = np.mean([record["losses"][:length] for record in found], axis=0)
        axes[0].plot(*losses.T, **style)
        if panels > 1:
            axes[1].plot(*np.mean(scored[name], axis=0).T, marker="o", markersize=3, **style)
    for axis, title, unit in zip(axes, ("training loss", "validation mIoU"), ("step", "epoch"), strict=False):
        axis.set(title=title, xlabel=unit)
    axes[-1].legend(fontsize=7, loc="center left", bbox_to_anchor=(1.01, 0.5))
    figure.tight_layout()
    write_binary(path, lambda partial: figure.savefig(partial, format="png"))


def _color(line: int) -> str:
    return f"C{line % 10}"


__all__ = ["compare", "fresh_seed_interval", "mean_and_error", "write_results"]

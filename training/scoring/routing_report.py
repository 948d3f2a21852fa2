"""The report on the experts of a model: tables in Markdown, and figures of the routing weights and of the words (ours)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from training.learning.routing_health import SATURATED_PROBABILITY, experts_of, named_routers, routing_warnings
from training.scoring.figures import new_figure
from training.scoring.intervals import LEVEL, RESAMPLES
from training.scoring.metric import format_value
from training.scoring.routing_words import LEAST_OCCURRENCES, Weights, top_words
from training.support.files import write_binary

COMPARED = ("mIoU", "oIoU", "boundary_F")
WORDS_LISTED, WORDS_DRAWN = 5, 3  # per expert
Comparison = dict[str, dict[str, dict[str, Any]]]  # per change and metric: "value", "difference", "interval"


def format_health(summary: dict[str, dict[str, dict]]) -> str:
    """The figures of `RoutingHealth.summary` as a Markdown table with one line per router, then the warnings."""
    lines = [
        "| router | deviation | information | saturated | dead units | mean weight (adds to the map's norm) of each expert |",
        "|---|--:|--:|--:|--:|---|",
    ]
    for router, figures in named_routers(summary).items():
        experts = []
        for name, share in figures["shares"].items():
            experts.append(f"{name} {format_value(share)} ({format_value(figures['added'].get(name))})")
        cells = [format_value(figures["deviation"]), f"{figures['mutual_information']:.2f}"]
        cells += [format_value(figures.get(field)) for field in ("saturated", "dead_units")]
        lines.append(f"| {router} | " + " | ".join([*cells, ", ".join(experts)]) + " |")
    warnings = [f"**{warning}**" for warning in routing_warnings(summary)]
    return "\n\n".join(["\n".join(lines), *warnings])


def format_experts(record: dict[str, Any]) -> str:
    """The record of `training/experts.py` as Markdown."""
    lines = [f"# Experts of {record['model']}, split {record['split']}", "", f"{record['expressions']} expressions."]
    lines += [
        "",
        "## Health",
        "",
        "All but the information in percent. Deviation: standard deviation of the weights between samples, of the expert that has "
        "the greatest. Information: mutual information of sample and expert in nats. Saturated: samples that give one expert more "
        f"than {100 * SATURATED_PROBABILITY:.0f} %. Dead units: hidden units whose output does not vary. Adds: norm of what the "
        "expert adds before its weight, as a share of its map's norm.",
        "",
        format_health(record["health"]),
        "",
        "## Other weights",
        "",
        "Scores with other routing weights at all routers. Weights of another sentence: each expression gets those of one about "
        f"another image. {_resampled()}",
        "",
        *_format_comparison("as decided", record["exchange"]),
    ]
    if record["without"]:
        lines += [
            "",
            "## Without an expert",
            "",
            "Scores without one fusion expert at every tap. The other experts are routed as before. A model that is trained "
            f"without the expert may be better. {_resampled()}",
            "",
            *_format_comparison("with all experts", record["without"]),
        ]
    lines += [
        "",
        "## Groups of expressions",
        "",
        "Mean routing weight in percent.",
        "",
        *_format_routing(record["routing"]),
    ]
    lines += ["", "## Words", "", *_format_words(record)]
    return "\n".join([*lines, "", f"`{record['command']}`"]) + "\n"


def _resampled() -> str:
    return f"In brackets: {LEVEL:.0%} of the differences in {RESAMPLES} paired resamples of images."


def _format_comparison(first: str, found: Comparison) -> list[str]:
    """A table of scores under several changes, and of their differences from the unchanged model's, which come first."""
    lines = [
        "| | " + " | ".join(f"{metric} | Δ" for metric in COMPARED) + " |",
        "|---|" + "--:|--:|" * len(COMPARED),
    ]
    whole = next(iter(found.values()))
    values = [format_value(whole[metric]["value"] - whole[metric]["difference"]) for metric in COMPARED]
    lines.append(f"| {first} | " + " | ".join(f"{value} | " for value in values) + "|")
    for name, scores in found.items():
        cells = []
        for metric in COMPARED:
            low, high = (100 * end for end in scores[metric]["interval"])
            difference = f"{100 * scores[metric]['difference']:+.2f} [{low:+.2f}, {high:+.2f}]"
            cells += [format_value(scores[metric]["value"]), difference]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def _format_routing(routing: dict[str, dict[str, Weights]]) -> list[str]:
    columns = [(router, expert) for router, weights in routing["all"]["all"].items() for expert in weights]
    lines = ["| | | " + " | ".join(f"{router}: {expert}" for router, expert in columns) + " |"]
    lines.append("|---|---|" + "--:|" * len(columns))
    for dimension, groups in routing.items():
        for label, weights in groups.items():
            cells = [format_value(weights[router][expert]) for router, expert in columns]
            lines.append(f"| {dimension} | {label} | " + " | ".join(cells) + " |")
    return lines


def _format_words(record: dict[str, Any]) -> list[str]:
    effects = record["words"]
    lines = [
        "The words that send most weight to each expert: the mean weight over the sentences with the word minus the mean over all "
        "sentences, in standard deviations of the weight, and the number of sentences. Words in fewer than "
        f"{LEAST_OCCURRENCES} sentences do not count.",
        "",
        "| router | expert | words |",
        "|---|---|---|",
    ]
    routers = list(record["routing"]["all"]["all"])
    for router in routers:
        for expert in experts_of(router):
            words = [
                f"{word} {effects[word]['effects'][router][expert]:+.2f} ({effects[word]['sentences']})"
                for word in top_words(effects, router, expert, WORDS_LISTED)
            ]
            lines.append(f"| {router} | {expert} | {', '.join(words) or '–'} |")
    lines += [
        "",
        "Share of the weights' variance between sentences that these words explain, and that the kind of expression explains, in "
        "percent (adjusted R²).",
        "",
        "| | " + " | ".join(routers) + " |",
        "|---|" + "--:|" * len(routers),
    ]
    for name, shares in record["explained"].items():
        lines.append(f"| {name} | " + " | ".join(format_value(shares[router]) for router in routers) + " |")
    return lines


def draw_routing(routing: dict[str, dict[str, Weights]], path: Path) -> None:
    """One panel per router. Rows are groups of expressions, columns are experts; numbers and shades show the mean weights."""
    rows = {
        label if dimension == "all" else f"{dimension}: {label}": weights
        for dimension, groups in routing.items()
        for label, weights in groups.items()
    }
    tables = {
        router: np.array([list(weights[router].values()) for weights in rows.values()])
        for router in routing["all"]["all"]
    }
    _draw_tables(tables, {router: list(rows) for router in tables}, path, share_rows=True)


def draw_words(effects: Mapping[str, dict[str, Any]], routers: list[str], path: Path) -> None:
    """One panel per router. Rows are the words that send most weight to an expert, by expert; red is more weight, blue is less."""
    names, tables = {}, {}
    for router in routers:
        chosen = [word for expert in experts_of(router) for word in top_words(effects, router, expert, WORDS_DRAWN)]
        names[router] = list(dict.fromkeys(chosen)) or ["(none)"]
        tables[router] = np.array(
            [
                [effects[word]["effects"][router][expert] if word in effects else 0.0 for expert in experts_of(router)]
                for word in names[router]
            ]
        )
    _draw_tables(tables, names, path, share_rows=False)


def _draw_tables(tables: dict[str, np.ndarray], names: dict[str, list[str]], path: Path, *, share_rows: bool) -> None:
    """A panel of numbers and shades per router. Where the panels share their rows, values are weights, else effects of words."""
    most = max(map(len, names.values()))
    margin = 1.5 if share_rows else 1.2 * len(tables)
    figure = new_figure(margin + sum(0.9 * table.shape[1] for table in tables.values()), 1.6 + 0.35 * most)
    widths = [table.shape[1] for table in tables.values()]
    panels = figure.subplots(1, len(tables), squeeze=False, width_ratios=widths)[0]
    scale = max(max(np.abs(table).max() for table in tables.values()), 1e-3)
    colours = (
        {"cmap": "Blues", "vmin": 0, "vmax": 1} if share_rows else {"cmap": "RdBu_r", "vmin": -scale, "vmax": scale}
    )
    for axis, (router, table) in zip(panels, tables.items(), strict=True):
        axis.imshow(table, aspect="auto", **colours)
        dark = 0.6 if share_rows else 0.6 * scale
        for place, value in np.ndenumerate(table):
            text = f"{value:.2f}" if share_rows else f"{value:+.2f}"
            axis.text(*place[::-1], text, ha="center", va="center", color="white" if abs(value) > dark else "black")
        axis.set_title(router, fontsize=10)
        axis.set_xticks(range(table.shape[1]), experts_of(router), rotation=30, ha="right", fontsize=9)
        shown = names[router] if axis is panels[0] or not share_rows else [""] * len(table)
        axis.set_yticks(range(len(table)), shown, fontsize=9)
        for label in axis.get_yticklabels():
            label.set_parse_math(False)  # a dollar sign does not begin a formula
    figure.tight_layout()
    write_binary(path, lambda partial: figure.savefig(partial, format="png"))


__all__ = ["COMPARED", "Comparison", "draw_routing", "draw_words", "format_experts", "format_health"]

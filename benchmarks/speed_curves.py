"""Measure and draw the cost of inference over the image's side and over the number of expressions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from measuring import measure, memory_alone
from subjects import KINDS, Entry, Models, run_once

from training.scoring.overlay import COLORS
from training.support.files import write_binary

SIDES = (224, 448, 672, 896, 1022)  # multiples of the patch
EXPRESSIONS = (1, 4, 16, 64)
AT_ONCE = 4  # expressions that are computed at once
DPI = 90


def measure_curves(models: Models, with_memory: bool) -> dict[str, Any]:
    """Seconds of one call, for each side with one expression and for each number of expressions at 448×448. A small call warms up.

    With memory, on the CPU, also the peak resident memory for several numbers of expressions, all at once and in parts. A new
    process measures each.
    """
    scale = 8 if models.tiny else 1  # the tiny model takes smaller images
    sides = {}
    for side in SIDES:
        entry = Entry("sera")
        models.forward(entry)()
        call = models.forward(entry, side=side // scale // 14 * 14)
        sides[str(side // scale // 14 * 14)] = measure({"call": call}, 1, models.device, warm_up=0)["call"]["median"]
    expressions: dict[str, dict[str, float]] = {}
    for kind in ("sera", "late"):
        models.forward(Entry(kind))()
        calls = {str(n): models.forward(Entry(kind, expressions=n), max_expressions=AT_ONCE) for n in EXPRESSIONS}
        measured = measure(calls, 1, models.device, warm_up=0)
        expressions[kind] = {name: figures["median"] for name, figures in measured.items()}
    curves = {"side": sides, "expressions": expressions, "expressions_at_once": AT_ONCE}
    if with_memory and models.device.type == "cpu":
        curves["peak_memory"] = {
            f"{n} expressions, {at_once or n} at once": memory_alone(
                run_once, Entry("sera", expressions=n), models.tiny, at_once
            )
            for n, at_once in ((1, None), (16, None), (16, 4), (64, AT_ONCE))
        }
    return curves


def draw_curves(record: dict[str, Any], path: Path) -> None:
    """Draw a PNG of the curves: seconds over the side, and milliseconds per expression over the number of expressions."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # slow to import; only the curves need it
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.8), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    curves = record["curves"]
    left.plot([int(side) for side in curves["side"]], list(curves["side"].values()), marker="o", color=COLORS[1])
    left.set(title="One image, one expression", xlabel="side, pixels", ylabel="seconds")
    for color, (kind, seconds) in zip(COLORS[1:], curves["expressions"].items(), strict=False):
        numbers = [int(number) for number in seconds]
        each = [1000 * value / number for number, value in zip(numbers, seconds.values(), strict=True)]
        right.plot(numbers, each, marker="o", color=color, label=KINDS[kind])
    right.set_xscale("log", base=2)
    right.set_xticks(numbers, [str(number) for number in numbers])
    right.set(title=f"One image, {curves['expressions_at_once']} expressions at once", xlabel="expressions")
    right.set(ylabel="milliseconds per expression", ylim=(0, None))
    right.legend()
    for axis in (left, right):
        axis.grid(alpha=0.3)
    left.set_ylim(0, None)
    write_binary(path, lambda partial: figure.savefig(partial, format="png"))

"""The papers' table of a model, beside published figures, as Markdown and as LaTeX (ours)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from training.scoring.metric import format_value
from training.scoring.published import (
    COLUMNS,
    GENERALIZED,
    MEANS,
    MEANS_NOTE,
    NINE,
    PUBLISHED,
    Column,
    PublishedRow,
)
from training.scoring.reports import SET_NAMES, selection_note
from training.sources.published_counts import PUBLISHED_REFS, is_part

Record = dict[str, Any]
ZERO_SHOT, OTHER_SPLIT = "†", "*"
TABLE_METRICS = ("mIoU", "oIoU")
GENERALIZED_METRICS = ("gIoU", "cIoU", "N-acc", "T-acc")
DETAILS = ("mIoU", "oIoU", "Pr@0.5", "Pr@0.7", "Pr@0.9")
SOURCE_NOTE = (
    "Published figures: from public notes on the papers, not from the papers themselves; a cell without a figure there is empty. A "
    "mean is the one that the notes state or, where they state all its columns alone, the mean of these."
)
TEX = {"&": r"\&", "%": r"\%", "_": r"\_", "#": r"\#", "$": r"\$", "{": r"\{", "}": r"\}", "~": r"\textasciitilde{}"}
TEX |= {"^": r"\textasciicircum{}", "\\": r"\textbackslash{}", ZERO_SHOT: r"$^{\dagger}$", OTHER_SPLIT: r"$^{*}$"}
TEX |= {"≥": r"$\geq$", "–": "--"}


@dataclass(frozen=True)
class Table:
    """A table of texts.

    Attributes:
        caption: What it shows, in whole sentences.
        header: Names of the columns.
        rows: Cells, as many in each row as in the header. An empty text is an empty cell.
        texts: How many columns from the left are texts; the others are numbers.
    """

    caption: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    texts: int

    def markdown(self) -> str:
        """The table in Markdown, below its caption."""
        numbers = len(self.header) - self.texts
        lines = [_markdown_row(self.header), "|" + "---|" * self.texts + "--:|" * numbers]
        return "\n".join([self.caption, "", *lines, *map(_markdown_row, self.rows)])

    def latex(self) -> str:
        r"""The table in LaTeX, for `\usepackage{booktabs}`."""
        columns = "l" * self.texts + "r" * (len(self.header) - self.texts)
        lines = [r"\begin{table}", r"\centering", rf"\caption{{{_tex(self.caption)}}}"]
        lines += [rf"\begin{{tabular}}{{{columns}}}", r"\toprule", _tex_row(self.header), r"\midrule"]
        lines += [*map(_tex_row, self.rows), r"\bottomrule", r"\end{tabular}", r"\end{table}"]
        return "\n".join(lines)


def papers_tables(records: Mapping[Column, Record], zero_shot: bool = False) -> list[Table]:
    """The tables of one model.

    Args:
        records: Its evaluations. Each also has "left_out" (numbers of images, objects and expressions) and "zero_shot" (whether the
            model was trained on other sets; `None` where that is not known).
        zero_shot: Whether the tables are about transfer alone. They have no published rows: none of the sources states any.
    """
    first = next(iter(records.values()))
    published = () if zero_shot else PUBLISHED
    tables = [_main_table(records, published, first["model"])]
    generalized = [column for column in GENERALIZED if column in records]
    if generalized:
        tables.append(_generalized_table(records, published, first["model"]))
    return [*tables, _details(records)]


def format_markdown(tables: Sequence[Table], records: Mapping[Column, Record], command: str, zero_shot: bool) -> str:
    """All of it as a Markdown page."""
    first = next(iter(records.values()))
    title = f"# {first['model']}: {'zero-shot transfer' if zero_shot else 'the table of the papers'}"
    parts = [title, *(table.markdown() for table in tables), *_notes(records, zero_shot), f"`{command}`"]
    return "\n\n".join(parts) + "\n"


def format_latex(tables: Sequence[Table], records: Mapping[Column, Record], zero_shot: bool) -> str:
    """All of it in LaTeX."""
    notes = [f"% {_tex(note)}" for note in _notes(records, zero_shot)]
    return "\n\n".join(["\n".join(notes), *(table.latex() for table in tables)]) + "\n"


def _main_table(records: Mapping[Column, Record], published: Sequence[PublishedRow], model: str) -> Table:
    rows = []
    for row in published:
        for metric in TABLE_METRICS:
            cells = [_percent(row.figures.get(metric, {}).get(column)) for column in NINE]
            cells += [_percent(row.mean(metric, name)) for name in MEANS]
            if any(cells):
                rows.append((row.name, metric, _yes_or_no(row.on_mixture), *cells))
    for metric in TABLE_METRICS:
        values = {column: _value(record, metric) for column, record in records.items()}
        cells = [_own_cell(records, column, values) for column in NINE]
        for columns in MEANS.values():
            found = [values.get(column) for column in columns]
            mark = _marks([records[column] for column in columns if column in records])
            cells.append("" if None in found else _percent(100 * sum(found) / len(found)) + mark)
        rows.append((model, metric, _trained_on(records), *cells))
    header = ("model", "metric", "trained on a mixture", *(column.label for column in NINE), *MEANS)
    return Table(f"In percent. {MEANS_NOTE}", header, tuple(rows), 3)


def _generalized_table(records: Mapping[Column, Record], published: Sequence[PublishedRow], model: str) -> Table:
    rows = []
    for row in published:
        cells = [
            _percent(row.figures.get(metric, {}).get(column))
            for column in GENERALIZED
            for metric in GENERALIZED_METRICS
        ]
        if any(cells):
            rows.append((row.name, _yes_or_no(row.on_mixture), *cells))
    cells = []
    for column in GENERALIZED:
        for metric in GENERALIZED_METRICS:
            values = {column: _value(records[column], metric)} if column in records else {}
            cells.append(_own_cell(records, column, values))
    rows.append((model, _trained_on(records), *cells))
    names = [f"{column.split} {metric}" for column in GENERALIZED for metric in GENERALIZED_METRICS]
    return Table("gRefCOCO, in percent.", ("model", "trained on a mixture", *names), tuple(rows), 2)


def _details(records: Mapping[Column, Record]) -> Table:
    rows = []
    for column in in_order(records):
        record = records[column]
        counts, left_out = record["counts"], record["left_out"]
        summary, intervals = record["summary"]["as written"]["all"], record["intervals"]["all"]
        cells = [format_value(summary.get(metric), intervals.get(metric)) for metric in DETAILS]
        numbers = [str(counts["expressions"]), str(counts["images"])]
        numbers += [str(left_out["expressions"]), str(left_out["images"])]
        rows.append((column.label + _marks([record]), *numbers, *cells))
    header = ("split", "expressions", "images", "expressions left out", "images left out", *DETAILS)
    caption = "How each split was scored, in percent; in brackets 95 % bootstrap intervals over images."
    return Table(caption, header, tuple(rows), 1)


def _notes(records: Mapping[Column, Record], zero_shot: bool) -> list[str]:
    first = next(iter(records.values()))
    notes = [
        "mIoU is the mean over expressions. oIoU is total intersection / total union. Pr@X is the share of expressions with "
        f"IoU > X. gIoU and cIoU are mIoU and oIoU by the rule that two empty masks have IoU 1. {selection_note(first)}",
        _guard_note(records, first),
    ]
    if any(is_other_split(column, record) for column, record in records.items()):
        notes.append(
            f"{OTHER_SPLIT}: not all of the published split, so the figure compares with no published one. "
            + " ".join(filter(None, map(_size_note, in_order(records), map(records.get, in_order(records)))))
        )
    if any(record["zero_shot"] for record in records.values()):
        notes.append(f"{ZERO_SHOT}: the model was trained on other sets.")
    return notes if zero_shot else [*notes, SOURCE_NOTE]


def _guard_note(records: Mapping[Column, Record], first: Record) -> str:
    if first["trained_on"] is None:
        return "What the model was trained on is not known, so no image was left out."
    sets = ", ".join(sorted(SET_NAMES.get(name, name) for name in first["trained_on"]))
    images = sum(record["left_out"]["images"] for record in records.values())
    expressions = sum(record["left_out"]["expressions"] for record in records.values())
    return (
        f"Trained on: {sets}. Images of that training were not scored: {images} images with {expressions} expressions were left "
        "out, counted split by split."
    )


def _size_note(column: Column, record: Record) -> str:
    published = PUBLISHED_REFS.get((column.dataset, column.split_by), {}).get(column.split)
    if published is None or not is_other_split(column, record):
        return ""
    return f"{column.label}: {record['counts']['objects']} of {published} published objects."


def is_other_split(column: Column, record: Record) -> bool:
    """Whether a record is about other objects than those of the published split, as far as the numbers tell."""
    return bool(record["left_out"]["images"]) or is_part(*column, record["counts"]["objects"])


def in_order(columns: Mapping[Column, Any] | Sequence[Column]) -> list[Column]:
    """Columns in the order of the papers, others behind them."""
    return [column for column in COLUMNS if column in columns] + [column for column in columns if column not in COLUMNS]


def _own_cell(records: Mapping[Column, Record], column: Column, values: Mapping[Column, float | None]) -> str:
    value = values.get(column)
    return "" if value is None else _percent(100 * value) + _marks([records[column]])


def _marks(records: Sequence[Record]) -> str:
    marks = OTHER_SPLIT if any(is_other_split(Column(*record["column"]), record) for record in records) else ""
    return marks + (ZERO_SHOT if any(record["zero_shot"] for record in records) else "")


def _trained_on(records: Mapping[Column, Record]) -> str:
    trained_on = next(iter(records.values()))["trained_on"]
    return "" if trained_on is None else _yes_or_no(len(trained_on) > 1)


def _yes_or_no(value: bool | None) -> str:
    return "" if value is None else "yes" if value else "no"


def _value(record: Record, metric: str) -> float | None:
    """A metric; gIoU and cIoU also where every expression has a target: they are then mIoU and oIoU."""
    summary = record["summary"]["as written"]["all"]
    return summary.get(metric, summary.get({"gIoU": "mIoU", "cIoU": "oIoU"}.get(metric, metric)))


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"


def _markdown_row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _tex_row(cells: Sequence[str]) -> str:
    return " & ".join(map(_tex, cells)) + r" \\"


def _tex(text: str) -> str:
    return "".join(TEX.get(letter, letter) for letter in text)


__all__ = ["Table", "format_latex", "format_markdown", "in_order", "is_other_split", "papers_tables"]

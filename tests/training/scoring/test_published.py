"""The published figures agree with each other, and tables show them as they are."""

import pytest

from training.scoring.paper_tables import Table
from training.scoring.published import COLUMNS, EIGHT, MEANS, NINE, PUBLISHED


def test_stated_means_are_the_means_of_the_stated_figures():
    checked = 0
    for row in PUBLISHED:
        for name, stated in row.means.get("mIoU", {}).items():
            values = [row.figures.get("mIoU", {}).get(column) for column in MEANS[name]]
            if None not in values:
                assert sum(values) / len(values) == pytest.approx(stated, abs=0.05)
                checked += 1
    assert checked == 2


def test_a_mean_of_figures_that_are_not_known_is_blank():
    sera, amlris = PUBLISHED[0], PUBLISHED[2]
    assert sera.mean("mIoU", "mean of 9") == pytest.approx((8 * 71.7125 + 66.6) / 9)
    assert sera.mean("oIoU", "mean of 8") is None
    assert amlris.mean("mIoU", "mean of 8") == 72.9 and amlris.mean("mIoU", "mean of 9") is None


def test_columns_have_names_of_their_own():
    assert len(EIGHT) == 8 and len(NINE) == 9
    assert len({column.key for column in COLUMNS}) == len({column.label for column in COLUMNS}) == 12
    assert [column.label for column in NINE[6:]] == ["RefCOCOg val(u)", "RefCOCOg test(u)", "RefCOCOg val(g)"]


def test_a_table_says_the_same_in_markdown_and_latex():
    table = Table("50 % of a_b.", ("model", "mIoU"), (("x|y & z", "1.0*†"), ("", "")), 1)
    assert table.markdown().splitlines() == [
        *("50 % of a_b.", "", "| model | mIoU |", "|---|--:|", "| x\\|y & z | 1.0*† |", "|  |  |")
    ]
    latex = table.latex()
    assert r"\caption{50 \% of a\_b.}" in latex and r"\begin{tabular}{lr}" in latex
    assert r"x|y \& z & 1.0$^{*}$$^{\dagger}$ \\" in latex

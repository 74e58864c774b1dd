"""Tables for notebooks."""

import re

import pytest
import torch
from torch import nn

import fxmerge
from fxmerge.comparison import Comparison, Row
from fxmerge.html import folded, lines, table
from fxmerge.interpolation import Interpolation
from fxmerge.reporting import Report

HOSTILE = "</script><img src=x onerror=alert(1)>"


def plain(html: str) -> str:
    """What a browser shows of HTML without entities."""
    return re.sub(r"<[^>]*>", "\n", html)


def test_everything_is_escaped() -> None:
    for text in (table(HOSTILE, [HOSTILE], [[HOSTILE]]), folded(HOSTILE, ""), lines(HOSTILE)):
        assert "<img" not in text and "&lt;img" in text


def test_a_symmetry_is_a_table_of_its_classes_and_pinned_axes() -> None:
    net = nn.Sequential(nn.Conv2d(3, 6, 1), nn.GroupNorm(3, 6), nn.ReLU(), nn.Conv2d(6, 2, 1))
    symmetry = fxmerge.find_symmetry(net, (torch.zeros(1, 3, 8, 8),))
    text = plain(symmetry._repr_html_())
    cells = [line for line in text.splitlines() if line]
    assert cells[:7] == ["2 classes of units", "class", "units", "inside of", "group", "axes", "a"]
    for group in re.findall(r"(\d!(?:\^\d)?)", str(symmetry)):
        assert group in {own for cell in cells for own in cell.split(", ")}
    assert [c.why for c in symmetry.classes if c.why] == cells[-7::3]
    assert 'scope="col"' in symmetry._repr_html_() and "<script" not in symmetry._repr_html_()


def test_a_comparison_is_a_table_of_its_rows() -> None:
    rows = (Row(HOSTILE, 0.1, 0.01, 0.9), Row("model A", 0.3, float("nan"), 0.8))
    html = Comparison(rows)._repr_html_()
    assert "<img" not in html
    assert [line for line in plain(html).splitlines() if line][-3:] == ["model A", "0.3000", "0.800"]
    unscored = Comparison((Row("model A", 0.3, 0.1),))._repr_html_()
    assert "score" not in unscored and "0.3000 ± 0.100" in unscored


def test_a_report_has_its_fits_and_what_was_left() -> None:
    report = Report(2, route="kept", layers={HOSTILE: {"before": 0.5, "after": 0.25}}, left={"w": "no reason & none"})
    html = report._repr_html_()
    assert "<img" not in html and "no reason &amp; none" in html
    assert [line for line in plain(html).splitlines() if line][:1] == ["2 models, aligned; captured by kept"]
    assert "0.25" in html and html.count("<details>") == 2
    assert "<details>" not in Report(2)._repr_html_()


def test_networks_on_a_line_are_a_table() -> None:
    line = Interpolation((0.0, 1.0), (0.5, 0.25), (0.5, 0.125), "distance", 1.0)
    assert [line for line in plain(line._repr_html_()).splitlines() if line][-3:] == ["1.000", "0.2500", "0.1250"]
    assert str(line).splitlines()[-1].split() == ["1.000", "0.2500", "0.1250"]


@pytest.mark.parametrize("make", [lambda: Report(1), lambda: Comparison((Row("a", 0.1, 0.0),))])
def test_tables_take_the_colours_of_the_page(make: object) -> None:
    html = make()._repr_html_()  # type: ignore[operator]
    assert not re.search(r"(?<!-)color:(?!inherit)", html) and "background:#" not in html

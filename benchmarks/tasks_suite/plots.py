"""Pictures of what was measured: accuracy over alpha, loss between parents and on a plane, one task for another.

And accuracy over the share of the parameters that the trunk of two networks has.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import numpy as np
from matplotlib import pyplot as plt
from models.processes import Row

from tasks_suite.methods import BY_ALPHA, DEFAULTS, PLAIN, WEIGHTED
from tasks_suite.page import PICTURES
from tasks_suite.partial import Point
from tasks_suite.report import Results

PARTIAL = "tasks-partial.svg"
COLUMNS = 4
LEVELS = 14
LINES = {PLAIN: "tab:gray", "Git Re-Basin": "tab:orange", "activation align": "tab:green", BY_ALPHA[0.5]: "tab:blue"}
"""The methods whose ways from one parent to the other are drawn, and their colours."""


def draw(rows: Sequence[Row], folder: Path) -> None:
    """Draws all pictures of which there are numbers; others are left as they are."""
    results = Results(rows)
    planes = [row for row in rows if row["measure"] == "plane" and row["stage"] == "done"]
    trades = [row for row in rows if row["measure"] == "tradeoff" and row["stage"] == "done"]
    figures = (_alpha(results), _barrier(results), _planes(planes), _tradeoffs(results, trades))
    for figure, (_, name) in zip(figures, PICTURES, strict=True):
        if figure is not None:
            _save(figure, folder / name)


def draw_partial(points: Sequence[Point], folder: Path) -> None:
    """Draws accuracy over the trunk's share of the parameters, with a mark for the parents of each network."""
    figure, panel = plt.subplots(figsize=(7, 4.6), layout="constrained")
    for name in dict.fromkeys(point.network for point in points):
        parents, *merged = (point for point in points if point.network == name)
        shares = [100 * point.parameters for point in merged]
        (line,) = panel.plot(shares, [100 * point.own_data for point in merged], "o-", label=name, markersize=3)
        panel.plot(shares, [100 * point.one_loader for point in merged], ":", color=line.get_color())
        panel.plot(0, 100 * parents.own_data, "_", color=line.get_color(), markersize=14, markeredgewidth=2)
    for style, label in (("o-", "data of their own"), (":", "one loader"), ("_", "parents")):
        panel.plot([], [], style, color="black", label=label, markersize=3 if style == "o-" else 10)
    panel.set_xlabel("share of a parent's parameters in the trunk, %")
    panel.set_ylabel("mean accuracy of both tasks, %")
    panel.legend(fontsize=8, ncols=2)
    _save(figure, folder / PARTIAL)


def _save(figure: Any, path: Path) -> None:
    matplotlib.rcParams["svg.hashsalt"] = "fxmerge"  # The same numbers give the same file.
    metadata = {"Date": None} if path.suffix == ".svg" else {}
    figure.savefig(path, dpi=110, bbox_inches="tight", metadata=metadata)
    plt.close(figure)


def _panels(names: Sequence[str], y: str, x: str) -> Iterator[tuple[str, Any]]:
    """An empty panel for each name, in one new figure."""
    height = -(-len(names) // COLUMNS)
    figure, grid = plt.subplots(
        height, COLUMNS, figsize=(3 * COLUMNS, 2.4 * height), squeeze=False, layout="constrained"
    )
    for panel in grid.flat[len(names) :]:
        panel.set_axis_off()
    figure.supylabel(y)
    figure.supxlabel(x)
    for name, panel in zip(names, grid.flat, strict=False):
        panel.set_title(name, fontsize=9)
        yield name, panel
    handles, labels = grid.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=6, fontsize=8)


def _alpha(results: Results) -> Any:
    """Accuracy per task of alignment over alpha, with what does not depend on it as level lines."""
    names = [n for n in results.networks if results.numbers(n, "disjoint", BY_ALPHA[0.5], "per_task")]
    if not names:
        return None
    for name, panel in _panels(names, "accuracy per task, %", "alpha: weight of the weight-space similarity"):
        found = results.side_by_side(name, "disjoint", BY_ALPHA.values(), "per_task")
        points = {a: [100 * v for v in found[m]] for a, m in BY_ALPHA.items() if found[m]}
        means = [statistics.fmean(v) for v in points.values()]
        panel.plot(list(points), means, "o-", color="tab:purple", label="align", markersize=3)
        low, high = ([edge(v) for v in points.values()] for edge in (min, max))
        panel.fill_between(list(points), low, high, color="tab:purple", alpha=0.2, linewidth=0)
        for method, colour in (
            ("ensemble", "black"),
            (PLAIN, LINES[PLAIN]),
            ("MuDSC zip", "tab:red"),
            (DEFAULTS, "tab:blue"),
        ):
            mean = results.mean(name, "disjoint", method, "per_task")
            if mean is not None:
                panel.axhline(100 * mean, color=colour, linestyle=":", label=method)
    return plt.gcf()


def _barrier(results: Results) -> Any:
    """The losses on the way from one parent to the other, for each method; thin lines are single pairs."""
    curves: dict[tuple[str, str], list[list[float]]] = {}
    for row in results.rows.values():
        if "curve" in row:
            curves.setdefault((row["network"], row["method"]), []).append(row["curve"])
    names = [n for n in results.networks if any(network == n for network, _ in curves)]
    if not names:
        return None
    for name, panel in _panels(names, "test loss", "from one parent to the other"):
        for method, colour in LINES.items():
            found = curves.get((name, method), [])
            for one in found:
                panel.plot(np.linspace(0, 1, len(one)), one, color=colour, alpha=0.25, linewidth=0.7)
            if found:
                mean = np.mean(found, axis=0)
                panel.plot(np.linspace(0, 1, len(mean)), mean, color=colour, label=method)
    return plt.gcf()


def _planes(rows: Sequence[Row]) -> Any:
    """The losses on planes through two parents and what the defaults make of them."""
    if not rows:
        return None
    figure, panels = plt.subplots(1, len(rows), figsize=(4.6 * len(rows), 4.2), squeeze=False, layout="constrained")
    for row, panel in zip(rows, panels.flat, strict=True):
        losses = np.log10(row["losses"])
        drawn = panel.contourf(row["columns"], row["rows"], losses, LEVELS, cmap="viridis")
        figure.colorbar(drawn, ax=panel, label="log10 of the test loss", location="bottom")
        for (x, y), text in zip(row["places"], ("parent A", "parent B", "merge"), strict=True):
            panel.plot(x, y, "o", color="white", markeredgecolor="black")
            panel.annotate(text, (x, y), (0, 6), textcoords="offset points", color="white", ha="center")
        panel.set_title(f"{row['network']}, distances in parameter space", fontsize=9)
        panel.set_aspect("equal")
    return figure


def _tradeoffs(results: Results, rows: Sequence[Row]) -> Any:
    """Accuracy on one task over that on the other, for weights of the parents."""
    names = list(dict.fromkeys(row["network"] for row in rows))
    if not names:
        return None
    colours = dict(zip(WEIGHTED, ("tab:red", "tab:blue", "tab:green"), strict=True))
    for name, panel in _panels(names, "accuracy on task B, %", "accuracy on task A, %"):
        for row in (row for row in rows if row["network"] == name):
            a, b = 100 * np.array(row["tasks"]).T
            panel.plot(a, b, "o-", color=colours[row["method"]], label=row["method"], markersize=3)
        for method, mark in (("parent A", "<"), ("parent B", "^"), ("ensemble", "*")):
            a, b = (results.mean(name, "disjoint", method, task) for task in ("task_a", "task_b"))
            if a is not None and b is not None:
                panel.plot(100 * a, 100 * b, mark, color="black", label=method, markersize=5)
    return plt.gcf()

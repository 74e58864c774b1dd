"""The pictures of a report as matplotlib figures, for notebooks. It needs `pip install 'fxmerge[plot]'`.

Every function draws into new axes, or into those that are given, and returns them.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any

from torch import fx

from fxmerge.errors import OptionError
from fxmerge.evidence.sampled import SampledSimilarity
from fxmerge.interpolation import Interpolation
from fxmerge.reporting import made_with, report

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BEFORE, AFTER, BETWEEN = "#9aa3ad", "#0b62c4", "#c9ced4"
"""The colours of what was before, of what is after, and of the line between them."""

ROW = 0.24
"""Inches of height for a row of a figure."""


def similarity(
    merged: fx.GraphModule, name: str, *, model: str | None = None, axes: Sequence[Axes] | None = None
) -> tuple[Axes, Axes]:
    """How alike the units of a class are in two models, before and after they are matched.

    At most 64 units of a class are kept, evenly spaced. Rows are units of the reference, columns those of the model.

    Arguments:
        merged: what `merge`, `merge_many` or `align` returned, in the same process.
        name: the class.
        model: what the model is called, if there are several beside the reference: "model B" and so on.
        axes: where to draw, before and after.

    Raises:
        OptionError: if there are no similarities of that class and model, or matplotlib is not installed.

    Example:
        >>> import torch, fxmerge, fxmerge.plot
        >>> def mlp():
        ...     return torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> merged = fxmerge.merge(mlp(), mlp(), [torch.randn(16, 4)])
        >>> before, after = fxmerge.plot.similarity(merged, "0.weight[0]")
        >>> before.get_title(), before.get_ylabel()
        ('before', 'model A')
    """
    found = _similarities(merged)
    own = [one for one in found if one.name == name and model in (None, one.model)]
    if not own:
        raise OptionError(
            f"There are no similarities of class {name!r}{f' and {model}' if model else ''}; there are such of "
            f"{', '.join(repr(one.name) for one in found)}."
        )
    one = own[0]
    first, second = axes if axes is not None else _new(8, 3.8, 2)
    most = max(float(abs(values).max()) for values in (one.before, one.after))
    for ax, title, values in ((first, "before", one.before), (second, "after", one.after)):
        image = ax.imshow(values, cmap="RdBu", vmin=-most, vmax=most, interpolation="nearest")
        ax.set(title=title, xlabel=one.model, ylabel=one.reference, xticks=[], yticks=[])
    second.figure.colorbar(image, ax=[first, second], label=f"similarity of {one.space}", shrink=0.8)
    return first, second


def classes(merged: fx.GraphModule, *, ax: Axes | None = None) -> Axes:
    """For every class, how alike a unit and the one in its place are on average, before and after matching.

    Arguments:
        merged: what `merge`, `merge_many` or `align` returned, in the same process.
        ax: where to draw.

    Raises:
        OptionError: if there are no similarities, or matplotlib is not installed.
    """
    found = _similarities(merged)
    several = len({one.model for one in found}) > 1
    names = [f"{one.name} ({one.size}){f', {one.model}' if several else ''}" for one in found]
    before, after = zip(*(one.means for one in found), strict=True)
    drawn = _pairs(names, before, after, ax)
    drawn.set(title="classes", xlabel="mean similarity of matched units")
    return drawn


def layers(merged: fx.GraphModule, *, ax: Axes | None = None) -> Axes:
    """For every fitted layer, the squared error of its outputs before and after the fit, as a share of the square of
    the targets.

    Arguments:
        merged: what fxmerge made.
        ax: where to draw.

    Raises:
        OptionError: if no layer was fitted, or matplotlib is not installed.
    """
    fits = {name: own for name, own in report(merged).layers.items() if {"before", "after"} <= set(own)}
    if not fits:
        raise OptionError("No layer was fitted, so there are no errors to draw: merge with data, and Recipe(fit=...).")
    before, after = ([own[key] for own in fits.values()] for key in ("before", "after"))
    drawn = _pairs(list(fits), before, after, ax)
    drawn.set(title="layers", xlabel="squared error, as a share of the square of the targets")
    drawn.set_xlim(left=0)
    return drawn


def line(interpolation: Interpolation, *, ax: Axes | None = None) -> Axes:
    """Networks on the line between two networks, before and after alignment.

    Arguments:
        interpolation: what `interpolate` measured.
        ax: where to draw.

    Raises:
        OptionError: if matplotlib is not installed.
    """
    drawn: Axes = ax if ax is not None else _new(6, 3.6, 1)[0]
    drawn.plot(interpolation.fractions, interpolation.before, "o-", color=BEFORE, mfc="none", label="units as they are")
    drawn.plot(interpolation.fractions, interpolation.after, "o-", color=AFTER, label="units aligned")
    drawn.set(xlabel="from the first network to the second", ylabel=interpolation.what)
    drawn.legend(frameon=False)
    return drawn


def _similarities(merged: fx.GraphModule) -> tuple[SampledSimilarity, ...]:
    found = made_with(merged).similarities
    if not found:
        raise OptionError("There are no similarities to draw: no units of two models were matched one by one.")
    return found


def _pairs(names: Sequence[str], before: Sequence[float], after: Sequence[float], ax: Axes | None) -> Axes:
    """Two dots for every name, and a line between them."""
    drawn: Axes = ax if ax is not None else _new(7, 1.4 + ROW * len(names), 1)[0]
    rows = range(len(names))
    drawn.hlines(rows, before, after, color=BETWEEN, linewidth=2, zorder=1)
    drawn.scatter(before, rows, facecolors="none", edgecolors=BEFORE, linewidths=1.8, label="before", zorder=2)
    drawn.scatter(after, rows, color=AFTER, label="after", zorder=3)
    drawn.set_yticks(list(rows), names, fontsize="small")
    drawn.invert_yaxis()
    drawn.grid(axis="x", alpha=0.3)
    drawn.legend(frameon=False, fontsize="small")
    return drawn


def _new(width: float, height: float, columns: int) -> list[Any]:
    """New axes side by side, in a figure of this size in inches.

    Raises:
        OptionError: if matplotlib is not installed.
    """
    try:
        pyplot = import_module("matplotlib.pyplot")
    except ImportError as error:
        raise OptionError("Plots need matplotlib: pip install 'fxmerge[plot]'.") from error
    _, axes = pyplot.subplots(1, columns, figsize=(width, height), layout="constrained", squeeze=False)
    return list(axes[0])

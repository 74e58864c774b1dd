"""Pictures in notebooks."""

import sys
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import fx, nn

import fxmerge
from fxmerge import plot
from fxmerge.errors import OptionError
from fxmerge.interpolation import Interpolation
from fxmerge.reporting import made_with

matplotlib = pytest.importorskip("matplotlib")
matplotlib.use("agg")


@pytest.fixture(autouse=True)
def closed() -> Iterator[None]:
    yield
    from matplotlib import pyplot

    pyplot.close("all")


def net(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))


X = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
LINE = Interpolation((0.0, 0.5, 1.0), (0.1, 0.9, 0.1), (0.1, 0.2, 0.1), "distance", 1.0)


@pytest.fixture(scope="module")
def merged() -> fx.GraphModule:
    return fxmerge.merge(net(0), net(1), [X])


def test_similarities_are_two_images_of_the_kept_numbers(merged: fx.GraphModule) -> None:
    one = made_with(merged).similarities[1]
    before, after = plot.similarity(merged, one.name)
    for ax, values in ((before, one.before), (after, one.after)):
        assert np.array_equal(ax.images[0].get_array(), values)
    before.figure.canvas.draw()


def test_every_class_and_every_layer_has_its_two_numbers(merged: fx.GraphModule) -> None:
    found = made_with(merged).similarities
    ax = plot.classes(merged)
    assert [text.get_text() for text in ax.get_yticklabels()] == [f"{one.name} (8)" for one in found]
    before, after = (dots.get_offsets()[:, 0] for dots in ax.collections[1:3])
    assert np.allclose(np.stack([before, after], 1), [one.means for one in found])
    fits = fxmerge.report(merged).layers
    ax = plot.layers(merged)
    assert [text.get_text() for text in ax.get_yticklabels()] == list(fits)
    before, after = (dots.get_offsets()[:, 0] for dots in ax.collections[1:3])
    assert np.allclose(before, [own["before"] for own in fits.values()])
    assert np.allclose(after, [own["after"] for own in fits.values()])
    ax.figure.canvas.draw()


def test_figures_can_be_drawn_into_given_axes(merged: fx.GraphModule) -> None:
    from matplotlib import pyplot

    _, axes = pyplot.subplots(1, 5)
    assert plot.similarity(merged, "0.weight[0]", axes=axes[:2]) == (axes[0], axes[1])
    assert plot.classes(merged, ax=axes[2]) is axes[2] and plot.layers(merged, ax=axes[3]) is axes[3]
    assert plot.line(LINE, ax=axes[4]) is axes[4]
    assert [tuple(own.get_ydata()) for own in axes[4].lines] == [LINE.before, LINE.after]


def test_what_was_not_computed_is_refused(merged: fx.GraphModule) -> None:
    with pytest.raises(OptionError, match=r"no similarities of class 'c'; there are such of '0.weight\[0\]', '2.weig"):
        plot.similarity(merged, "c")
    with pytest.raises(OptionError, match=r"no similarities of class '0.weight\[0\]' and model C"):
        plot.similarity(merged, "0.weight[0]", model="model C")
    still = fxmerge.merge(net(0), net(1), None, fxmerge.Recipe(match=None, fit=None), example=X)
    with pytest.raises(OptionError, match="no units of two models were matched"):
        plot.classes(still)
    with pytest.raises(OptionError, match="No layer was fitted"):
        plot.layers(still)


def test_matplotlib_is_asked_for_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(OptionError, match=r"Plots need matplotlib: pip install 'fxmerge\[plot\]'"):
        plot.line(LINE)

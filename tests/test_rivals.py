"""A parent in place of the merged network, where that knows less."""

import logging
import math
from functools import cache

import pytest
import torch
from torch import Tensor, nn

import fxmerge
from fxmerge.capture import capture_program
from fxmerge.decide import warn_of_parent
from fxmerge.program import Program
from fxmerge.refitting.gather import Teacher
from fxmerge.refitting.layers import find_layers
from fxmerge.refitting.refit import last_layers
from fxmerge.refitting.rivals import Refitted, Rivals
from tests.networks import mlp, muted, vectors


@pytest.mark.parametrize("numbers", [(0, 1), (1, 0)])
def test_a_parent_that_says_all_there_is_to_say_is_returned(
    numbers: tuple[int, int], caplog: pytest.LogCaptureFixture
) -> None:
    telling, silent = mlp(0), muted(mlp(1))
    pair = [(telling, silent)[n] for n in numbers]
    data = [torch.randn(500, 1, 8, 8, generator=torch.Generator().manual_seed(k)) for k in range(2)]
    with caplog.at_level(logging.WARNING):
        merged = fxmerge.merge(*pair, data)
    told, parent = merged.meta["fxmerge"], numbers.index(0)
    assert told["parent"] == parent
    assert f"model {'AB'[parent]} is returned with its last layers refitted" in caplog.text
    assert set(told["layers"]) == {"5.weight"}
    assert set(told["errors"]) == {None, 0, 1}
    assert told["compared"] == "last layers"
    assert told["errors"][parent] == told["layers"]["5.weight"]["held_out"] < 0.1 * told["errors"][None]
    x = torch.randn(50, 1, 8, 8, generator=torch.Generator().manual_seed(9))
    mean = (telling(x) + silent(x)) / 2
    assert (merged(x) - mean).square().mean() < 1e-4 * mean.square().mean()


@pytest.mark.parametrize(
    ("disagreement", "error", "parent", "as_it_is"),
    [
        (1.2, 0.8, None, False),
        (1.2, 0.7, 0, False),
        (0.6, 0.8, None, False),
        (0.4, 0.8, 0, True),
        (0.1, 1.9, 0, True),
        (0.1, 2.1, None, False),
        (0.15, 0.1, 0, True),
        (0.16, 0.1, 0, False),
    ],
)
def test_what_is_returned_depends_on_whether_the_parents_answer_alike(
    disagreement: float, error: float, parent: int | None, as_it_is: bool
) -> None:
    rivals = told_rivals([(0.5, 0.5)], disagreement, error)
    chosen = rivals.choose(Refitted({}, {}, {}, error=1.0))
    assert chosen.parent == parent
    assert chosen.errors == {None: 1.0, 0: error, 1: 3.0}
    if parent is not None:
        assert chosen.state.keys() == rivals.parents[0].keys()
        own = all(torch.equal(chosen.state[n], x) for n, x in rivals.parents[0].items())
        assert own == as_it_is
        assert bool(chosen.layers) != as_it_is
        assert chosen.alike == (disagreement < 0.5)


@pytest.mark.parametrize(
    ("shares", "as_it_is"),
    [
        ([(0.5, 0.5)], True),
        ([(0.9, 0.1)], False),
        ([(0.75, 0.25), (0.25, 0.75)], False),
    ],
)
def test_models_that_do_not_count_equally_are_not_said_to_answer_alike(
    shares: list[tuple[float, float]], as_it_is: bool
) -> None:
    """Near to the mean of all is then who counts most."""
    chosen = told_rivals(shares, disagreement=0.01, error=0.1).choose(Refitted({}, {}, {}, error=1.0))
    assert chosen.parent == 0
    assert bool(chosen.layers) != as_it_is


@pytest.mark.parametrize(
    ("merged", "parent", "chosen"), [(math.nan, 0.1, 0), (1.0, math.nan, None), (math.nan, math.nan, 1)]
)
def test_what_has_no_error_wins_nothing(merged: float, parent: float, chosen: int | None) -> None:
    rivals = told_rivals([(0.5, 0.5)], disagreement=1.0, error=parent)
    assert rivals.choose(Refitted({}, {}, {}, error=merged)).parent == chosen


def test_it_is_told_that_models_answer_alike(caplog: pytest.LogCaptureFixture) -> None:
    chosen = told_rivals([(0.5, 0.5)], disagreement=0.16, error=0.1).choose(Refitted({}, {}, {}, error=0.15))
    with caplog.at_level(logging.WARNING):
        warn_of_parent("model A", chosen, "mean", [])
    assert caplog.messages[-1] == (
        "model A is returned with its last layers refitted, since the models answer alike. Its last layers, refitted, "
        "miss 0.1 of the square of all models' mean outputs, and those of the merged network 0.15, which is more than "
        "half of that. Pass or_parent=False for the merged network."
    )


@cache
def captured() -> Program:
    return capture_program(mlp(0), (vectors()[0],))


def told_rivals(shares: list[tuple[float, float]], disagreement: float, error: float) -> Rivals:
    """Two parents, of which the second has the greater error."""
    program = captured()
    layers = find_layers(program)
    states = [mlp(k).state_dict() for k in range(2)]
    last = last_layers(program, layers)
    rivals = Rivals(last, states, [Teacher(own, {}) for own in states], shares)
    (name,) = (layer.name for layer in last)
    rivals.states[0][name] = rivals.states[0][name] + 1
    rivals.told = {j: {name: {"before": disagreement, "held_out": e}} for j, e in enumerate((error, 3.0))}
    return rivals


def alike(width: int) -> tuple[nn.Module, nn.Module, list[Tensor]]:
    """Two networks, of which the second has learnt the answers of the first with features of its own, and the data."""
    first, second = mlp(0, width), mlp(1, width)
    assert isinstance(second, nn.Sequential)
    data = [torch.randn(500, 1, 8, 8, generator=torch.Generator().manual_seed(k)) for k in range(2)]
    x = torch.cat(data)
    with torch.no_grad():
        features = second[:-1](x)
        second[-1].weight.copy_(torch.linalg.lstsq(features, first(x) - second[-1].bias).solution.T)
    return first, second, data


def test_of_models_that_answer_alike_one_is_returned_as_it_is(caplog: pytest.LogCaptureFixture) -> None:
    first, second, data = alike(500)
    x = torch.cat(data)
    with caplog.at_level(logging.WARNING):
        merged = fxmerge.merge(first, second, data)
    told = merged.meta["fxmerge"]
    assert f"model {'AB'[told['parent']]} is returned as it is" in caplog.text
    assert told["layers"] == {}
    torch.testing.assert_close(merged(x), (first, second)[told["parent"]](x))
    with caplog.at_level(logging.WARNING):
        merged = fxmerge.merge(first, second, data, outputs="standardized")
    assert "is returned with its outputs standardized, since the models answer alike" in caplog.text
    torch.testing.assert_close(merged(x).mean(0), torch.zeros(10), atol=1e-5, rtol=0)


def test_one_whose_last_layers_come_nearer_is_returned_with_these(caplog: pytest.LogCaptureFixture) -> None:
    """What the models answer alike in the mean is taken away, and of the rest a new readout learns a good part."""
    first, second, data = alike(60)
    with caplog.at_level(logging.WARNING):
        told = fxmerge.merge(first, second, data, outputs="standardized").meta["fxmerge"]
    (readout,) = told["layers"].values()
    assert f"model {'AB'[told['parent']]} is returned with its last layers refitted, since the" in caplog.text
    assert readout["held_out"] == told["errors"][told["parent"]] <= readout["before"] - 0.055


def test_the_merged_network_can_be_asked_for() -> None:
    told = fxmerge.merge(mlp(0), muted(mlp(1)), vectors(), or_parent=False).meta["fxmerge"]
    assert told["parent"] is None
    assert told["errors"] == {}
    assert len(told["layers"]) == 3


def test_a_merged_network_that_is_as_good_is_kept() -> None:
    told = fxmerge.merge(mlp(0), mlp(0), vectors()).meta["fxmerge"]
    assert told["parent"] is None
    assert max(told["errors"].values()) < 1e-6


def test_a_model_that_does_not_count_is_no_rival() -> None:
    told = fxmerge.merge(mlp(0), mlp(1), vectors(), weights=(1, 0)).meta["fxmerge"]
    assert set(told["errors"]) == {None, 0}


def test_last_layers_beside_each_other_are_compared_by_what_they_give() -> None:
    """What one last layer of a parent makes up for, another one must not make up for again."""

    class Wide(nn.Module):
        def __init__(self, seed: int) -> None:
            super().__init__()
            torch.manual_seed(seed)
            self.wide, self.first, self.second = nn.Linear(6, 3), nn.Linear(6, 16), nn.Linear(16, 3)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.wide(x) + self.second(torch.tanh(self.first(x)))
            return out

    a, b = Wide(0), Wide(1)
    with torch.no_grad():
        b.second.weight *= 0.05
        a.first.weight *= 2
        a.second.weight *= 3
    data = [torch.randn(256, 6, generator=torch.Generator().manual_seed(k)) for k in range(4)]
    merged = fxmerge.merge(a, b, data)
    assert merged.meta["fxmerge"]["parent"] == 0
    x = torch.cat(data)
    mean = (a(x) + b(x)) / 2
    assert (merged(x) - mean).square().sum() < 1e-4 * mean.square().sum()

"""A parent with a new readout, where the merged network knows less."""

import logging

import pytest
import torch
from torch import Tensor, nn

import fxmerge
from fxmerge.capture import capture_program
from fxmerge.refitting.gather import Teacher
from fxmerge.refitting.layers import find_layers
from fxmerge.refitting.refit import last_layers
from fxmerge.refitting.rivals import Refitted, Rivals
from tests.test_universe import mlp, vectors


def muted(net: nn.Module) -> nn.Module:
    """A network whose outputs are next to nothing."""
    with torch.no_grad():
        for parameter in list(net.parameters())[-2:]:
            parameter.mul_(1e-3)
    return net


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
    assert f"model {'AB'[parent]} with its last layers refitted" in caplog.text
    assert set(told["layers"]) == {"5.weight"}
    assert set(told["errors"]) == {None, 0, 1}
    assert told["errors"][parent] == told["layers"]["5.weight"]["held_out"] < 0.1 * told["errors"][None]
    x = torch.randn(50, 1, 8, 8, generator=torch.Generator().manual_seed(9))
    mean = (telling(x) + silent(x)) / 2
    assert (merged(x) - mean).square().mean() < 1e-4 * mean.square().mean()


@pytest.mark.parametrize(("disagreement", "parent"), [(1.2, None), (0.5, None), (0.1, 0)])
def test_how_much_nearer_a_parent_must_be_depends_on_how_far_parents_disagree(
    disagreement: float, parent: int | None
) -> None:
    program = capture_program(mlp(0), (vectors()[0],))
    layers = find_layers(program)
    states = [mlp(k).state_dict() for k in range(2)]
    last = last_layers(program, layers)
    teachers = [Teacher(own, {}) for own in states]
    rivals = Rivals(program, last, layers.all, states, teachers, [(0.5, 0.5)])
    (name,) = (layer.name for layer in last)
    rivals.told = {j: {name: {"before": disagreement, "held_out": error}} for j, error in enumerate((0.95, 1.5))}
    assert rivals.choose(Refitted({}, {}, {}, error=1.0)).parent == parent


def test_the_merged_network_can_be_asked_for() -> None:
    told = fxmerge.merge(mlp(0), muted(mlp(1)), vectors(), or_parent=False).meta["fxmerge"]
    assert told["parent"] is None
    assert told["errors"] == {}
    assert len(told["layers"]) == 3


def test_a_merged_network_that_is_as_good_is_kept() -> None:
    told = fxmerge.merge(mlp(0), mlp(0), vectors()).meta["fxmerge"]
    assert told["parent"] is None
    assert max(told["errors"].values()) < 1e-6


class Gained(nn.Module):
    """A parameter after the last layer, whose outputs are therefore in units of the network's own."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.net = mlp(seed)
        self.gain = nn.Parameter(torch.rand(10) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        scaled: Tensor = self.net(x) * self.gain
        return scaled


def test_outputs_in_units_of_a_networks_own_are_not_compared() -> None:
    told = fxmerge.merge(Gained(0), muted(Gained(1)), vectors()).meta["fxmerge"]
    assert told["parent"] is None
    assert told["errors"] == {}


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

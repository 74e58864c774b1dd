"""Scales of units with the least sum of squares, against closed forms and another minimiser."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.optimize import minimize
from torch import Tensor, nn

from fxmerge import Symmetry, find_symmetry
from fxmerge.matching.scales import least_scales
from fxmerge.units.scaling import Scaling

pytestmark = pytest.mark.usefixtures("one_thread")


def chain(depth: int, width: int = 5, *, bias: bool = False) -> nn.Sequential:
    torch.manual_seed(0)
    layers = [layer for _ in range(depth) for layer in (nn.Linear(width, width, bias=bias), nn.ReLU())]
    return nn.Sequential(*layers, nn.Linear(width, 3, bias=bias)).double()


def symmetry_of(net: nn.Sequential) -> Symmetry:
    return find_symmetry(net, (torch.randn(2, net[0].in_features, dtype=torch.float64),))


def least(symmetry: Symmetry, net: nn.Module) -> dict[int, Tensor]:
    return least_scales(symmetry, net.state_dict(), [n for n, own in enumerate(symmetry.kinds) if own.stretches])


def test_one_hidden_layer_has_the_fourth_root_of_the_ratio_of_both_sides() -> None:
    net = chain(1, bias=True)
    first, second = net[0], net[2]
    writes = first.weight.square().sum(1) + first.bias.square()
    reads = second.weight.square().sum(0)
    torch.testing.assert_close(least(symmetry_of(net), net)[0][0], (reads / writes) ** 0.25)


def test_many_layers_have_the_least_sum_that_another_minimiser_finds() -> None:
    net, width = chain(3, 3), 3
    symmetry = symmetry_of(net)

    def squares(factors: dict[int, Tensor]) -> float:
        return sum(
            float(own.square().sum()) for own in Scaling(symmetry.scaled, factors).apply(net.state_dict()).values()
        )

    def total(logs: NDArray[np.float64]) -> float:
        return squares(dict(enumerate(torch.from_numpy(np.exp(logs)).reshape(3, 1, width))))

    found, other = squares(least(symmetry, net)), minimize(total, np.zeros(3 * width), method="L-BFGS-B", tol=1e-14)
    assert found == pytest.approx(other.fun, rel=1e-9)
    assert found <= other.fun * (1 + 1e-12)
    assert found < 0.99 * total(np.zeros(3 * width))


def test_what_is_balanced_once_stays() -> None:
    net = chain(6, bias=True)
    symmetry = symmetry_of(net)
    net.load_state_dict(Scaling(symmetry.scaled, least(symmetry, net)).apply(net.state_dict()))
    for factors in least(symmetry, net).values():
        torch.testing.assert_close(factors, torch.ones_like(factors), rtol=0, atol=1e-9)


def test_units_that_nothing_reads_are_not_scaled() -> None:
    net = chain(1, bias=True)
    with torch.no_grad():
        net[2].weight[:, 1] = 0
        net[0].weight[2], net[0].bias[2] = 0, 0
    factors = least(symmetry_of(net), net)[0][0]
    assert factors[1] == factors[2] == 1
    assert (factors[[0, 3, 4]] != 1).all()

"""The dimension of the continuous symmetry of tiny networks: closed forms against the nullity of the Jacobian."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import nn

from tests.oracle.continuous_networks import NETWORKS, dimension
from tests.oracle.generator import Recipe
from tests.oracle.nullity import GAP, nullity, recipe_nullity


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("name", NETWORKS)
def test_nullity(name: str) -> None:
    network = NETWORKS[name]
    found = nullity(network.model(), network.args, network.seed)
    assert found.gap > GAP, found
    expected = {"changes of basis": dimension(network.kinds), **network.redundancies}
    assert found.dimension == sum(expected.values()), (found, expected)


def test_buffers_and_frozen_parameters_are_constants() -> None:
    layers = nn.Linear(5, 2, bias=False), nn.BatchNorm1d(2, affine=False), nn.Linear(2, 4)
    model, args = nn.Sequential(*layers), (torch.randn(4, 5),)
    assert nullity(model, args).dimension == 4
    layers[0].requires_grad_(False)
    assert nullity(model, args).dimension == 0


def test_nullity_of_a_recipe() -> None:
    steps = ("linear", (0,), ("a", 2, False)), ("linear", (1,), ("b", 4, True))
    found = recipe_nullity(Recipe(((4, 3),), steps, (2,)))
    assert found.gap > GAP, found
    assert found.dimension == 4

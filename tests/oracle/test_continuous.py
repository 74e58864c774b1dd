"""The dimension of the continuous symmetry of tiny networks: closed forms against the nullity of the Jacobian."""

from __future__ import annotations

from random import Random

import pytest
import torch
from torch import nn

from fxmerge import find_symmetry
from tests.oracle.continuous_networks import NETWORKS, dimension
from tests.oracle.generator import Recipe, build, random_recipe
from tests.oracle.nullity import GAP, generic, nullity, orbit, recipe_nullity
from tests.slow import examples

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("name", NETWORKS)
def test_nullity(name: str) -> None:
    network = NETWORKS[name]
    found = nullity(network.model(), network.args, network.seed)
    assert found.gap > GAP, found
    expected = {"changes of basis": dimension(network.kinds), **network.redundancies}
    assert found.dimension == sum(expected.values()), (found, expected)


INCOMPLETE = {
    "rotary, planes of one frequency": "planes of one frequency are not mixed with each other",
    "Fourier mixing of tokens": "the rule for a Fourier transform says nothing of changes of basis",
    "LSTM with a projection": "the rule for an LSTM says nothing of changes of basis",
}
"""The networks of which not all changes of basis are found, and why."""


@pytest.mark.parametrize("name", NETWORKS)
def test_all_changes_of_basis_are_found_and_proven(name: str) -> None:
    network = NETWORKS[name]
    model, args = generic(network.model(), network.args, network.seed)
    symmetry = find_symmetry(model, args)
    expected = dimension(network.kinds)
    assert symmetry.dimension() < expected if name in INCOMPLETE else symmetry.dimension() == expected, symmetry
    proven = symmetry.verify(model, args)
    assert proven.demoted == () and proven.kinds == symmetry.kinds, proven
    assert proven.error is not None and proven.error < 1e-9


def test_the_incomplete_are_networks() -> None:
    assert NETWORKS.keys() >= INCOMPLETE.keys()


@pytest.mark.parametrize("seed", examples(range, quick=25, count=200))
def test_changes_of_basis_of_random_architectures(seed: int) -> None:
    recipe = random_recipe(Random(seed))
    model, args = generic(*build(recipe, seed), seed)
    symmetry = find_symmetry(model, args)
    proven = symmetry.verify(model, args)
    assert proven.demoted == () and proven.kinds == symmetry.kinds, f"{recipe}\n{symmetry}\n{proven}"
    assert proven.error is not None and proven.error < 1e-8
    if symmetry.dimension():
        most = recipe_nullity(recipe, seed)
        assert most.gap < GAP or orbit(symmetry, model) <= most.dimension, f"{recipe}\n{symmetry}"


def test_an_orbit_has_fewer_directions_where_units_are_dead() -> None:
    narrow = nn.Sequential(nn.Linear(5, 3, bias=False), nn.Linear(3, 4))
    wide = nn.Sequential(nn.Linear(2, 3, bias=False), nn.Linear(3, 2))
    for model, inputs, directions in ((narrow, 5, 9), (wide, 2, 9 - 1)):
        symmetry = find_symmetry(model.double(), (torch.zeros(1, inputs, dtype=torch.float64),))
        assert (symmetry.dimension(), orbit(symmetry, model)) == (9, directions)


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

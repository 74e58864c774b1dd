"""Balanced bases: what gives units is as large as what reads them, whatever basis a network comes in."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from fxmerge import Symmetry, find_symmetry
from fxmerge.matching.balance import balance
from fxmerge.units.basis import Basis, gathered
from fxmerge.units.kind import Kind
from tests.oracle.continuous_networks import NETWORKS
from tests.oracle.nullity import generic

TABLE = [
    "linear bottleneck",
    "two bottlenecks of one width in a row",
    "residual without norms",
    "attention, packed, biases",
    "grouped queries",
    "bilinear layer on two maps",
    "keys and values of a latent",
    "linear recurrence",
    "conv bottleneck",
]
"""Networks with general linear classes, some of which meet in one weight."""


def planted(name: str) -> tuple[nn.Module, tuple[Tensor, ...], Symmetry]:
    model, args = generic(NETWORKS[name].model(), NETWORKS[name].args)
    return model, args, find_symmetry(model, args)


def sums(symmetry: Symmetry, number: int, state: dict[str, Tensor], *, inverse: bool) -> Tensor:
    """The sum of the outer products of what gives units, or of what reads them."""
    entries = [gathered(state[own.axis.parameter], own) for own in symmetry.mixed[number] if own.inverse == inverse]
    return torch.stack([e @ e.mT for e in entries]).sum(0)


@pytest.mark.parametrize("name", TABLE)
def test_both_sides_of_a_class_are_alike_and_the_function_stays(name: str) -> None:
    model, args, symmetry = planted(name)
    state = balance(symmetry, model.state_dict()).apply(model.state_dict())
    numbers = [n for n in range(len(symmetry.units)) if symmetry.kind(n) == Kind.GENERAL_LINEAR]
    assert numbers
    for n in numbers:
        gives, reads = (sums(symmetry, n, state, inverse=inverse) for inverse in (False, True))
        assert torch.allclose(gives, reads, rtol=0, atol=1e-6 * float(gives.abs().max())), symmetry.names[n]
    with torch.no_grad():
        expected = model(*args)
        model.load_state_dict(state)
        assert torch.allclose(model(*args), expected, rtol=0, atol=1e-9 * float(expected.abs().max()))


@pytest.mark.parametrize("name", TABLE)
def test_what_is_left_of_an_invertible_matrix_is_an_orthogonal_one(name: str) -> None:
    model, _, symmetry = planted(name)
    state = model.state_dict()
    moved = symmetry.sample(torch.Generator().manual_seed(3)).basis.apply(state)
    first, second = balance(symmetry, state).apply(state), balance(symmetry, moved).apply(moved)
    for n in range(len(symmetry.units)):
        if symmetry.kind(n) == Kind.GENERAL_LINEAR:
            own = symmetry.mixed[n][0]
            a, b = (gathered(s[own.axis.parameter], own) for s in (first, second))
            lengths, others = torch.linalg.svdvals(a), torch.linalg.svdvals(b)
            assert torch.allclose(lengths, others, rtol=1e-6), symmetry.names[n]


def test_planes_are_balanced_by_their_scales() -> None:
    model, args, symmetry = planted("rotary")
    basis = symmetry.sample(torch.Generator().manual_seed(3)).basis
    for state in (model.state_dict(), basis.apply(model.state_dict())):
        state = balance(symmetry, state).apply(state)
        (number,) = [n for n in range(len(symmetry.units)) if symmetry.kind(n) == Kind.COMPLEX]
        gives, reads = (sums(symmetry, number, state, inverse=inverse) for inverse in (False, True))
        sizes, others = (s.diagonal(dim1=-2, dim2=-1).sum(-1) for s in (gives, reads))
        assert sizes.shape == (4,) and torch.allclose(sizes, others, rtol=1e-9)
        with torch.no_grad():
            expected = model(*args)
            changed = copy.deepcopy(model)
            changed.load_state_dict(state)
            assert torch.allclose(changed(*args), expected, rtol=0, atol=1e-9 * float(expected.abs().max()))


def test_names_dtypes_and_what_does_not_change_are_kept() -> None:
    model, _, symmetry = planted("attention, packed, biases")
    state = {name: tensor.bfloat16() for name, tensor in model.state_dict().items()}
    made = balance(symmetry, state).apply(state)
    assert list(made) == list(state) and all(made[n].dtype == torch.bfloat16 for n in made)
    linear = {
        own.axis.parameter
        for n in range(len(symmetry.units))
        if symmetry.kind(n) == Kind.GENERAL_LINEAR
        for own in symmetry.mixed[n]
    }
    assert {name for name in state if made[name] is not state[name]} == linear


def test_orthogonal_classes_stay_as_they_are() -> None:
    model, _, symmetry = planted("tied linear autoencoder")
    state = model.state_dict()
    assert symmetry.kind(0) == Kind.ORTHOGONAL
    assert all(tensor is state[name] for name, tensor in balance(symmetry, state).apply(state).items())


def test_directions_that_nothing_reads_stay_finite() -> None:
    model, _, symmetry = planted("linear bottleneck")
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state["1.weight"][:, 0] = 0
    assert all(torch.isfinite(tensor).all() for tensor in balance(symmetry, state).apply(state).values())
    assert isinstance(symmetry.identity_basis(), Basis)

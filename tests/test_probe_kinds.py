"""By which matrices ops without a rule let units be mixed, against what their definitions say."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fxmerge import Symmetry, find_symmetry
from fxmerge.units.kind import Kind
from tests.oracle.nullity import GAP, generic, nullity, orbit

pytestmark = pytest.mark.usefixtures("one_thread")


def halved(x: Tensor) -> Tensor:
    return x / 2


def unit(x: Tensor) -> Tensor:
    return x / x.square().sum(-1, keepdim=True).sqrt()


def central(x: Tensor) -> Tensor:
    return x - x.mean(-1, keepdim=True)


def rectified(x: Tensor) -> Tensor:
    return x.relu()


def limited(x: Tensor) -> Tensor:
    """Linear for all numbers of the example."""
    return x.clamp(-100, 100)


def length(x: Tensor) -> Tensor:
    return x.square().sum(-1, keepdim=True)


def applied(x: Tensor, w: Tensor) -> Tensor:
    return x @ w.T


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v)


FAKE: dict[Callable[..., Tensor], Callable[..., Tensor]] = {
    **dict.fromkeys((halved, unit, central, rectified, limited), torch.empty_like),
    length: lambda x: x.new_empty((*x.shape[:-1], 1)),
    applied: lambda x, w: x.new_empty((*x.shape[:-1], w.shape[0])),
    attention: lambda q, k, v: torch.empty_like(v),
}
"""For every function the shape of what it gives."""

for _op, _fake in FAKE.items():
    torch.library.custom_op(f"fxmerge_kinds::{_op.__name__}", _op, mutates_args=()).register_fake(_fake)

Op = Callable[..., Any]

PROBED: dict[Op, Op] = {op: getattr(torch.ops.fxmerge_kinds, op.__name__).default for op in FAKE}
"""The same functions as ops without rules."""


class Between(nn.Module):
    """An op between two layers."""

    def __init__(self, op: Op, width: int = 6) -> None:
        super().__init__()
        self.op, self.a, self.b = op, nn.Linear(5, 6), nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.op(self.a(x)))  # type: ignore[no-any-return]


class WithMatrix(Between):
    """An op between two layers that takes a matrix, which is a parameter or a constant."""

    def __init__(self, op: Op, matrix: Tensor) -> None:
        super().__init__(op, len(matrix))
        if isinstance(matrix, nn.Parameter):
            self.matrix = matrix
        else:
            self.register_buffer("matrix", matrix, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.op(self.a(x), self.matrix))  # type: ignore[no-any-return]


class Attention(nn.Module):
    def __init__(self, op: Op, features: int = 13, heads: int = 3, size: int = 4) -> None:
        super().__init__()
        self.op, self.heads = op, heads
        self.qkv, self.out = nn.Linear(features, 3 * heads * size), nn.Linear(heads * size, features)

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q, k, v = self.qkv(x).reshape(b, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        return self.out(self.op(q, k, v).transpose(1, 2).reshape(b, t, -1))  # type: ignore[no-any-return]


GL, ORTHOGONAL, CENTRED, ALONE = Kind.GENERAL_LINEAR, Kind.ORTHOGONAL, Kind.CENTRED, Kind.PERMUTATION

CASES: dict[Op, tuple[Callable[[Op], nn.Module], list[tuple[int, Kind]]]] = {
    # How a network with the op is made, and the sizes and kinds of its classes.
    halved: (Between, [(6, GL)]),
    unit: (Between, [(6, ORTHOGONAL)]),
    length: (lambda op: Between(op, 1), [(6, ORTHOGONAL)]),
    central: (Between, [(6, CENTRED)]),
    rectified: (Between, [(6, ALONE)]),
    limited: (Between, [(6, ALONE)]),
    applied: (lambda op: WithMatrix(op, nn.Parameter(torch.randn(7, 6))), [(6, GL), (7, GL)]),
    attention: (Attention, [(3, ALONE), (12, GL), (12, GL)]),
}


def example(op: Op) -> tuple[Tensor]:
    return (torch.randn(3, 9, 13 if op is attention else 5, generator=torch.Generator().manual_seed(0)),)


def kinds(symmetry: Symmetry) -> list[tuple[int, Kind]]:
    return sorted((symmetry.units[n].size, symmetry.kind(n)) for n in symmetry.choices)


@pytest.mark.parametrize("op", CASES, ids=lambda op: op.__name__)
def test_what_commutes_with_an_op_is_found(op: Op) -> None:
    make, expected = CASES[op]
    model, x = make(PROBED[op]), example(op)
    symmetry = find_symmetry(model, x)
    assert len(symmetry.probed) == 1
    assert kinds(symmetry) == expected
    assert symmetry.verify(model, x, trials=3).demoted == ()


@pytest.mark.parametrize("op", CASES, ids=lambda op: op.__name__)
def test_no_more_is_found_than_the_jacobian_allows(op: Op) -> None:
    make, _ = CASES[op]
    symmetry = find_symmetry(make(PROBED[op]), example(op))
    plain, args = generic(make(op), example(op))
    most = nullity(plain, args)
    assert most.gap > GAP
    # Where a class has more units than reach it or read it, some of its matrices change nothing.
    assert orbit(symmetry, plain) <= most.dimension
    if op is attention:
        # Biases of keys add the same to all scores of a query, and those of values go through to the output.
        assert symmetry.dimension() == most.dimension - 2 * 12


def test_a_matrix_that_is_no_parameter_mixes_nothing() -> None:
    """What meets numbers that stay as they are cannot be mixed, though the op would allow it."""
    model, x = WithMatrix(PROBED[applied], torch.arange(36.0).sin().reshape(6, 6)), example(applied)
    symmetry = find_symmetry(model, x)
    assert symmetry.dimension() == 0
    assert symmetry.verify(model, x).demoted == ()


@pytest.mark.slow
def test_heads_of_full_size() -> None:
    torch.manual_seed(0)
    model, x = Attention(PROBED[attention], 768, 12, 64), (torch.randn(2, 50, 768),)
    symmetry = find_symmetry(model, x)
    assert kinds(symmetry) == [(12, ALONE), (768, GL), (768, GL)]
    proven = symmetry.verify(model, x)
    assert proven.demoted == () and proven.kinds == symmetry.kinds
    assert proven.error is not None and proven.error < 1e-9

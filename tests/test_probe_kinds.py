"""By which matrices ops without a rule let units be mixed, against what their definitions say."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fxmerge
from fxmerge.units.kind import Kind


@torch.library.custom_op("fxmerge_kinds::halved", mutates_args=())
def halved(x: Tensor) -> Tensor:
    return x / 2


@torch.library.custom_op("fxmerge_kinds::unit", mutates_args=())
def unit(x: Tensor) -> Tensor:
    return x / x.square().sum(-1, keepdim=True).sqrt()


@torch.library.custom_op("fxmerge_kinds::central", mutates_args=())
def central(x: Tensor) -> Tensor:
    return x - x.mean(-1, keepdim=True)


@torch.library.custom_op("fxmerge_kinds::rectified", mutates_args=())
def rectified(x: Tensor) -> Tensor:
    return x.relu()


@torch.library.custom_op("fxmerge_kinds::limited", mutates_args=())
def limited(x: Tensor) -> Tensor:
    """Linear for all numbers of the example."""
    return x.clamp(-100, 100)


@torch.library.custom_op("fxmerge_kinds::length", mutates_args=())
def length(x: Tensor) -> Tensor:
    return x.square().sum(-1, keepdim=True)


@torch.library.custom_op("fxmerge_kinds::applied", mutates_args=())
def applied(x: Tensor, w: Tensor) -> Tensor:
    return x @ w.T


@torch.library.custom_op("fxmerge_kinds::attention", mutates_args=())
def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v)


for op in (halved, unit, central, rectified, limited):
    op.register_fake(torch.empty_like)
length.register_fake(lambda x: x.new_empty((*x.shape[:-1], 1)))
applied.register_fake(lambda x, w: x.new_empty((*x.shape[:-1], w.shape[0])))
attention.register_fake(lambda q, k, v: torch.empty_like(v))


class Between(nn.Module):
    """An op between two layers."""

    def __init__(self, op: str, width: int = 6) -> None:
        super().__init__()
        self.op, self.a, self.b = op, nn.Linear(5, 6), nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(getattr(torch.ops.fxmerge_kinds, self.op)(self.a(x)))  # type: ignore[no-any-return]


class Applied(nn.Module):
    """An op that contracts its operand with a matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(5, 6), nn.Linear(7, 3)
        self.weight = nn.Parameter(torch.randn(7, 6))

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.ops.fxmerge_kinds.applied(self.a(x), self.weight))  # type: ignore[no-any-return]


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(5, 36), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q, k, v = self.qkv(x).reshape(b, t, 3, 3, 4).permute(2, 0, 3, 1, 4)
        heads = torch.ops.fxmerge_kinds.attention(q, k, v)
        return self.out(heads.transpose(1, 2).reshape(b, t, 12))  # type: ignore[no-any-return]


GL, ORTHOGONAL, CENTRED, ALONE = Kind.GENERAL_LINEAR, Kind.ORTHOGONAL, Kind.CENTRED, Kind.PERMUTATION


@pytest.mark.parametrize(
    ("model", "kinds"),
    [
        (Between("halved"), [(6, GL)]),
        (Between("unit"), [(6, ORTHOGONAL)]),
        (Between("length", 1), [(6, ORTHOGONAL)]),
        (Between("central"), [(6, CENTRED)]),
        (Between("rectified"), [(6, ALONE)]),
        (Between("limited"), [(6, ALONE)]),
        (Applied(), [(6, GL), (7, GL)]),
        (Attention(), [(3, ALONE), (12, GL), (12, GL)]),
    ],
    ids=lambda x: getattr(x, "op", type(x).__name__) if isinstance(x, nn.Module) else "",
)
def test_what_commutes_with_an_op_is_found(model: nn.Module, kinds: list[tuple[int, Kind]]) -> None:
    x = (torch.randn(2, 7, 5),)
    symmetry = fxmerge.find_symmetry(model, x)
    assert len(symmetry.probed) == 1
    assert sorted((symmetry.units[n].size, symmetry.kind(n)) for n in symmetry.choices) == kinds
    assert symmetry.verify(model, x, trials=3).demoted == ()


def test_probed_ops_get_the_dimension_of_ops_with_rules() -> None:
    class Known(Attention):
        def forward(self, x: Tensor) -> Tensor:
            b, t, _ = x.shape
            q, k, v = self.qkv(x).reshape(b, t, 3, 3, 4).permute(2, 0, 3, 1, 4)
            heads = F.scaled_dot_product_attention(q, k, v)
            return self.out(heads.transpose(1, 2).reshape(b, t, 12))  # type: ignore[no-any-return]

    x = (torch.randn(2, 7, 5),)
    dimensions = [fxmerge.find_symmetry(model, x).dimension() for model in (Known(), Attention())]
    assert dimensions == [96, 96]


def test_a_matrix_that_is_no_parameter_mixes_nothing() -> None:
    """What meets numbers that stay as they are cannot be mixed, though the op would allow it."""

    class Constant(Between):
        def forward(self, x: Tensor) -> Tensor:
            return self.b(torch.ops.fxmerge_kinds.applied(self.a(x), torch.arange(36.0).sin().reshape(6, 6)))  # type: ignore[no-any-return]

    x = (torch.randn(4, 5),)
    symmetry = fxmerge.find_symmetry(Constant(""), x)
    assert symmetry.dimension() == 0
    assert symmetry.verify(Constant(""), x).demoted == ()

"""What each op says of changes of basis: a network of one op and its classes, with the matrices that they allow.

Classes that may only be permuted are not listed. Every network is verified, so none of these groups is too large.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fxmerge import find_symmetry
from tests.networks import groups

Shape = tuple[int, ...]
lin = F.linear


class Net(nn.Module):
    """A function of parameters that are given by their shapes, or as they are."""

    def __init__(self, function: Callable[..., Tensor], parameters: Mapping[str, Shape | Tensor]) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.function = function
        for name, given in parameters.items():
            value = given if isinstance(given, Tensor) else torch.randn(given, generator=generator)
            setattr(self, name, nn.Parameter(value.double()))

    def forward(self, *inputs: Tensor) -> Tensor:
        y: Tensor = self.function(self, *inputs)
        return y


def uniform(value: float, *shape: int) -> Tensor:
    return torch.full(shape, value)


ROWS: tuple[Shape, ...] = ((6, 5),)
IMAGES: tuple[Shape, ...] = ((2, 3, 4, 4),)
WORDS = torch.tensor([[0, 1, 2, 3, 4]])

WV: dict[str, Any] = {"w": (4, 5), "v": (3, 4)}
"""Two layers: from 5 features to 4 units, and to 3 outputs."""
TWO: dict[str, Any] = {**WV, "u": (4, 5)}
"""A second layer beside the first."""


def between(op: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    """An op between two layers."""
    return lambda m, x: lin(op(lin(x, m.w)), m.v)


def beside(op: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    """An op on units that another layer reads as they are."""
    return lambda m, x: lin(lin(x, m.w), m.v) + op(lin(x, m.w))


def both(op: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    """An op of the units of two layers, read by a third."""
    return lambda m, x: lin(op(lin(x, m.w), lin(x, m.u)), m.v)


def compared(op: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    """An op of the units of two layers that is an output."""
    return lambda m, x: op(lin(x, m.w), lin(x, m.u))


def gained(op: Callable[[Any, Tensor], Tensor]) -> Callable[..., Tensor]:
    """An op of units and further parameters between two layers."""
    return lambda m, x: lin(op(m, lin(x, m.w)), m.v)


def image(op: Callable[[Tensor], Tensor], *, last: Callable[..., Tensor] = F.conv2d) -> Callable[..., Tensor]:
    """An op between two convolutions."""
    return lambda m, x: last(op(F.conv2d(x, m.w)), m.v)


CONV: dict[str, Any] = {"w": (4, 3, 1, 1), "v": (2, 4, 1, 1)}


def heads(x: Tensor, n: int = 2) -> Tensor:
    y: Tensor = x.unflatten(-1, (n, -1)).transpose(-2, -3)
    return y


def attention(m: Any, x: Tensor, *, fused: bool) -> Tensor:
    q, k, v = (heads(part) for part in lin(x[None], m.w).chunk(3, -1))
    y = F.scaled_dot_product_attention(q, k, v) if fused else (q @ k.mT).softmax(-1) @ v
    z: Tensor = lin(y.transpose(1, 2).flatten(2), m.v)
    return z


def grouped(m: Any, x: Tensor) -> Tensor:
    q, k, v = (heads(lin(x[None], w), n) for w, n in ((m.q, 4), (m.k, 2), (m.u, 2)))
    y: Tensor = lin(F.scaled_dot_product_attention(q, k, v, enable_gqa=True).transpose(1, 2).flatten(2), m.o)
    return y


def fill_first(y: Tensor) -> Tensor:
    y[:, 0] = 0.0
    return y


G = uniform(0.5, 4)

Case = tuple[Callable[..., Tensor], Mapping[str, Shape | Tensor], list[str]]

OPS: dict[str, Case] = {
    # Sums.
    "two layers": (between(lambda y: y), WV, ["GL(4)"]),
    "add": (both(lambda y, z: y + z), TWO, ["GL(4)"]),
    "add, times a number": (both(lambda y, z: torch.add(y, z, alpha=3)), TWO, ["GL(4)"]),
    "sub": (both(lambda y, z: y - z), TWO, ["GL(4)"]),
    "in place": (both(lambda y, z: y.add_(z)), TWO, ["GL(4)"]),
    "a number is added": (between(lambda y: y + 1), WV, ["O1(4)"]),
    "a number per row is added": (both(lambda y, z: y + z.mean(-1, keepdim=True)), TWO, ["O1(4)", "O1(4)"]),
    "a vector is added": (gained(lambda m, y: y + m.b), {**WV, "b": (4,)}, ["GL(4)"]),
    "units are added in another order": (between(lambda y: y + y.roll(1, -1)), WV, []),
    # Products.
    "mul by a number": (between(lambda y: 3 * y), WV, ["GL(4)"]),
    "div by a number": (between(lambda y: y / 3), WV, ["GL(4)"]),
    "div, rounded": (between(lambda y: torch.div(y, 0.1, rounding_mode="floor")), WV, []),
    "neg": (between(lambda y: -y), WV, ["GL(4)"]),
    "mul by a gate per row": (both(lambda y, z: y * z[:, :1].sigmoid()), TWO, ["GL(3)", "GL(4)"]),
    "mul by a constant vector": (between(lambda y: y * torch.arange(1.0, 5.0)), WV, []),
    "mul by a constant mask": (between(lambda y: y * torch.tensor([1.0, 0.0, 1.0, 1.0])), WV, []),
    "gains": (gained(lambda m, y: y * m.g), {**WV, "g": (4,)}, []),
    "mul of units": (both(lambda y, z: y * z), TWO, []),
    "square": (between(lambda y: y.square()), WV, []),
    "x * x summed": (compared(lambda y, z: (y * y).sum(-1) + 0 * z.sum()), {"w": (4, 5), "u": (4, 5)}, ["O(4)"]),
    "x * x summed in part": (beside(lambda y: (y * y).unflatten(-1, (2, 2)).sum((-1, -2))[:, None]), WV, []),
    "x * y summed": (compared(lambda y, z: (y * z).sum(-1)), {"w": (4, 5), "u": (4, 5)}, ["GL(4)"]),
    "x * y summed, read otherwise": (
        compared(lambda y, z: (lambda p: p.sum(-1) + p.amax(-1))(y * z)),
        {"w": (4, 5), "u": (4, 5)},
        [],
    ),
    "x * y summed over rows": (compared(lambda y, z: (y * z).sum(0)), {"w": (4, 5), "u": (4, 5)}, []),
    "x * y * z summed": (compared(lambda y, z: (y * z * z).sum(-1)), {"w": (4, 5), "u": (4, 5)}, []),
    # Reductions over the units.
    "mean": (beside(lambda y: y.mean(-1, keepdim=True)), WV, ["O1(4)"]),
    "mean over rows": (between(lambda y: y - y.mean(0)), WV, ["GL(4)"]),
    "sum in whole numbers": (between(lambda y: (8 * y).sum(0, dtype=torch.int64).double()), WV, []),
    "std": (beside(lambda y: y.std(-1, keepdim=True)), WV, ["O1(4)"]),
    "norm": (beside(lambda y: y.norm(dim=-1, keepdim=True)), WV, ["O(4)"]),
    "norm of all": (beside(lambda y: y.norm()), WV, ["O(4)"]),
    "norm, absolute values": (beside(lambda y: torch.linalg.vector_norm(y, 1, -1, keepdim=True)), WV, []),
    "max": (beside(lambda y: y.amax(-1, keepdim=True)), WV, []),
    "cumsum": (between(lambda y: y.cumsum(-1)), WV, []),
    "sort": (between(lambda y: y.sort(-1).values), WV, []),
    # Normalizations.
    "rms_norm": (between(lambda y: F.rms_norm(y, (4,))), WV, ["O(4)"]),
    "rms_norm, gains": (gained(lambda m, y: F.rms_norm(y, (4,), m.g)), {**WV, "g": (4,)}, []),
    "rms_norm, uniform gains": (gained(lambda m, y: F.rms_norm(y, (4,), m.g)), {**WV, "g": G}, ["O(4)"]),
    "layer_norm": (between(lambda y: F.layer_norm(y, (4,))), WV, ["O1(4)"]),
    "layer_norm, gains": (gained(lambda m, y: F.layer_norm(y, (4,), m.g)), {**WV, "g": (4,)}, []),
    "layer_norm, shift": (
        gained(lambda m, y: F.layer_norm(y, (4,), m.g, m.b)),
        {**WV, "g": G, "b": (4,)},
        ["O1(4)"],
    ),
    "group_norm": (between(lambda y: F.group_norm(y, 2)), {"w": (8, 5), "v": (3, 8)}, ["O1(4)^2"]),
    "normalize": (between(lambda y: F.normalize(y, dim=-1)), WV, ["O(4)"]),
    "normalize over rows": (between(lambda y: F.normalize(y, dim=0)), WV, []),
    "cosine_similarity": (
        compared(lambda y, z: F.cosine_similarity(y, z, -1)),
        {"w": (4, 5), "u": (4, 5)},
        ["O(4)"],
    ),
    "softmax": (between(lambda y: y.softmax(-1)), WV, []),
    "relu": (between(torch.relu), WV, []),
    "batch_norm of the batch": (between(lambda y: F.batch_norm(y, None, None, training=True)), WV, []),
    # Movements.
    "cat": (both(lambda y, z: torch.cat([y, z], -1)), {**TWO, "v": (3, 8)}, ["GL(4)", "GL(4)"]),
    "cat of rows": (both(lambda y, z: torch.cat([y, z], 0)), TWO, ["GL(4)"]),
    "cat of rows with zeros": (between(lambda y: F.pad(y, (0, 0, 0, 1))), WV, ["GL(4)"]),
    "cat of rows with ones": (between(lambda y: F.pad(y, (0, 0, 0, 1), value=1.0)), WV, []),
    "stack": (both(lambda y, z: torch.stack([y, z], 0)), TWO, ["GL(4)"]),
    "flip": (between(lambda y: y.flip(-1)), WV, ["GL(4)"]),
    "slice": (beside(lambda y: y[:, :2].amax(-1, keepdim=True)), WV, ["GL(2)"]),
    "slice read beside": (
        lambda m, x: torch.cat([lin(lin(x, m.w), m.v), lin(lin(x, m.w)[:, :2], m.u)], -1),
        {**WV, "u": (3, 2)},
        ["GL(2)", "GL(2)"],
    ),
    "slice of rows": (between(lambda y: y[2:]), WV, ["GL(4)"]),
    "overlapping windows": (between(lambda y: y.unfold(-1, 3, 1).flatten(1)), {**WV, "v": (3, 6)}, ["GL(2)"]),
    "chunk, added": (between(lambda y: sum(y.chunk(2, -1))), {"w": (8, 5), "v": (3, 4)}, ["GL(4)"]),  # type: ignore[arg-type, return-value]
    "chunk, multiplied": (between(lambda y: y[:, :4] * y[:, 4:]), {"w": (8, 5), "v": (3, 4)}, []),
    "flatten of heads": (between(lambda y: y.unflatten(-1, (2, 2)).flatten(1)), WV, ["GL(4)"]),
    "index_select": (between(lambda y: y.index_select(0, torch.tensor([2, 1]))), WV, ["GL(4)"]),
    "index_select of all units": (between(lambda y: y[:, [3, 1, 2, 0]]), WV, ["GL(4)"]),
    "dropout in eval": (between(lambda y: F.dropout(y, 0.5, training=False)), WV, ["GL(4)"]),
    "write in place": (between(fill_first), WV, []),
    "where": (both(lambda y, z: torch.where(y[:, :1] > 0, y, z)), TWO, []),
    "masked_fill": (between(lambda y: y.masked_fill(torch.eye(6)[:, :1] > 0, 0.0)), WV, []),
    "cast": (between(lambda y: y.float().double()), WV, ["GL(4)"]),
    "cast to whole numbers": (between(lambda y: (8 * y).to(torch.int32).double()), WV, []),
    "cast to truth values": (between(lambda y: y.bool().double()), WV, []),
    # Contractions.
    "einsum": (lambda m, x: torch.einsum("bi,oi->bo", lin(x, m.w), m.v), WV, ["GL(4)"]),
    "einsum of two": (
        lambda m, x: torch.einsum("bi,bj,oij->bo", lin(x, m.w), lin(x, m.u), m.v),
        {"w": (4, 5), "u": (2, 5), "v": (3, 4, 2)},
        ["GL(2)", "GL(4)"],
    ),
    "einsum, place by place": (both(lambda y, z: torch.einsum("bi,bi->bi", y, z)), TWO, []),
    "bilinear": (
        lambda m, x: F.bilinear(lin(x, m.w), lin(x, m.u), m.v),
        {"w": (3, 5), "u": (2, 5), "v": (7, 3, 2)},
        ["GL(2)", "GL(3)"],
    ),
    "bmm": (
        lambda m, x: torch.bmm(torch.bmm(x.expand(2, 6, 5), m.w), m.v),
        {"w": (2, 5, 4), "v": (2, 4, 3)},
        ["GL(4)^2"],
    ),
    "a matrix of units": (gained(lambda m, y: lin(y, m.a)), {**WV, "a": (4, 4)}, ["GL(4)", "GL(4)"]),
    "a matrix of units, twice": (gained(lambda m, y: lin(lin(y, m.a), m.a)), {**WV, "a": (4, 4)}, ["GL(4)"]),
    "a matrix of units and its transpose": (
        gained(lambda m, y: lin(lin(y, m.a), m.a.T)),
        {**WV, "a": (4, 4)},
        ["GL(4)", "O(4)"],
    ),
    "a matrix of units beside the identity": (gained(lambda m, y: lin(y, m.a + torch.eye(4))), {**WV, "a": (4, 4)}, []),
    "tied": (lambda m, x: lin(lin(x, m.w), m.w.T), {"w": (4, 5)}, ["O(4)"]),
    "products of units": (lambda m, x: lin(x, m.w) @ lin(x, m.w).T, {"w": (4, 5)}, ["O(4)"]),
    "covariance": (
        lambda m, x: lin(lin(lin(x, m.w).T @ lin(x, m.w), m.v).T, m.u),
        {**WV, "u": (2, 4)},
        ["GL(4)"],
    ),
    "attention, packed": (
        lambda m, x: attention(m, x, fused=False),
        {"w": (12, 5), "v": (3, 4)},
        ["GL(2)^2", "GL(2)^2"],
    ),
    "attention, fused": (lambda m, x: attention(m, x, fused=True), {"w": (12, 5), "v": (3, 4)}, ["GL(2)^2", "GL(2)^2"]),
    "attention, grouped queries": (
        grouped,
        {"q": (8, 5), "k": (4, 5), "u": (4, 5), "o": (3, 8)},
        ["GL(2)^2", "GL(2)^2"],
    ),
    # Vectors of one number.
    "uniform gain": (gained(lambda m, y: y * m.g), {**WV, "g": G}, ["GL(4)"]),
    "uniform gain plus one": (gained(lambda m, y: y * (1 + m.g)), {**WV, "g": G}, ["GL(4)"]),
    "uniform gain of a column": (gained(lambda m, y: y * m.g), {**WV, "g": uniform(0.5, 1, 4)}, ["GL(4)"]),
    "uniform divisor": (gained(lambda m, y: y / m.g), {**WV, "g": G}, ["GL(4)"]),
    "uniform vector over a number per row": (
        lambda m, x: lin(lin(x, m.w) + x[:, :1] / m.g, m.v),
        {**WV, "g": G},
        [],
    ),
    "uniform shift": (gained(lambda m, y: y + m.g), {**WV, "g": G}, ["GL(4)"]),
    "uniform shift, scaled": (gained(lambda m, y: y + 2 * m.g), {**WV, "g": G}, ["GL(4)"]),
    "uniform shift, scaled by row": (lambda m, x: lin(lin(x, m.w) + x[:, :1] * m.g, m.v), {**WV, "g": G}, ["GL(4)"]),
    "uniform shift, inverted": (gained(lambda m, y: y + 1 / m.g), {**WV, "g": G}, []),
    "uniform shift plus one": (gained(lambda m, y: y + (m.g + 1)), {**WV, "g": G}, []),
    "sum of two uniform shifts": (gained(lambda m, y: y + (m.g + m.b)), {**WV, "g": G, "b": 2 * G}, []),
    "uniform gain and shift": (gained(lambda m, y: y * m.g + m.g), {**WV, "g": G}, []),
    "uniform gain and readout": (
        lambda m, x: lin(lin(x, m.w) * m.g, m.v) + (lin(x, m.w) @ m.g)[:, None],
        {**WV, "g": G},
        [],
    ),
    "uniform gain and row": (gained(lambda m, y: torch.cat([y * m.g, m.g[None]])), {**WV, "g": G}, []),
    "uniform gain of two classes": (
        lambda m, x: torch.cat([lin(lin(x, m.w) * m.g, m.v), lin(lin(x, m.u) * m.g, m.t)], -1),
        {"v": (3, 4), "w": (4, 5), "u": (4, 5), "t": (2, 4), "g": G},
        ["GL(4)"],
    ),
    # Blocks, which are units under other names.
    "a matrix in a vector": (lambda m, x: lin(lin(x, m.w.view(4, 5)), m.v), {"v": (3, 4), "w": (20,)}, ["GL(4)"]),
    "a weighted sum of parts": (
        lambda m, x: lin((lin(x, m.w).unflatten(-1, (4, 2)) * torch.tensor([1.0, 2.0])).sum(-1), m.v),
        {"v": (3, 4), "w": (8, 5)},
        ["GL(4)"],
    ),
}

CONVOLUTIONS: dict[str, Case] = {
    "1x1": (image(lambda y: y), CONV, ["GL(4)"]),
    "3x3": (image(lambda y: y), {**CONV, "v": (2, 4, 3, 3)}, ["GL(4)"]),
    "3x3, padded": (image(lambda y: F.pad(y, (1, 1, 1, 1))), {**CONV, "v": (2, 4, 3, 3)}, ["GL(4)"]),
    "3x3, padded with ones": (image(lambda y: F.pad(y, (1, 1, 1, 1), value=1.0)), {**CONV, "v": (2, 4, 3, 3)}, []),
    "patches": (image(lambda y: y, last=lambda y, v: F.conv2d(y, v, stride=2)), {**CONV, "v": (2, 4, 2, 2)}, ["GL(4)"]),
    "groups": (
        image(lambda y: y, last=lambda y, v: F.conv2d(y, v, groups=2)),
        {**CONV, "v": (2, 2, 1, 1)},
        ["GL(2)^2"],
    ),
    "depthwise": (
        lambda m, x: F.conv2d(F.conv2d(F.conv2d(x, m.w), m.k, groups=4), m.v),
        {**CONV, "k": (4, 1, 3, 3)},
        [],
    ),
    "transposed": (image(lambda y: y, last=F.conv_transpose2d), {**CONV, "v": (4, 2, 2, 2)}, ["GL(4)"]),
    "avg_pool2d": (image(lambda y: F.avg_pool2d(y, 2)), CONV, ["GL(4)"]),
    "adaptive_avg_pool2d": (image(lambda y: F.adaptive_avg_pool2d(y, 1)), CONV, ["GL(4)"]),
    "max_pool2d": (image(lambda y: F.max_pool2d(y, 2)), CONV, []),
    "interpolate": (image(lambda y: F.interpolate(y, scale_factor=2, mode="bilinear")), CONV, ["GL(4)"]),
    "instance_norm": (image(F.instance_norm), CONV, []),
    "flatten of channels and pixels": (
        lambda m, x: lin(F.conv2d(x, m.w).flatten(1), m.v),
        {"w": (2, 3, 1, 1), "v": (3, 32)},
        ["GL(2)"],
    ),
    "pixel_shuffle": (image(lambda y: F.pixel_shuffle(y, 2)), {"w": (8, 3, 1, 1), "v": (3, 2, 1, 1)}, ["GL(2)"]),
    "channel gate": (image(lambda y: y * y.mean((2, 3), keepdim=True).sigmoid()), CONV, []),
    "uniform gain of pixels": (
        lambda m, x: F.conv2d(F.conv2d(x, m.w) * m.g, m.v),
        {**CONV, "g": uniform(0.5, 4, 1, 1)},
        ["GL(4)"],
    ),
}

LOOKUPS: dict[str, Case] = {
    "embedding": (lambda m, i: lin(F.embedding(i, m.w), m.v), {"w": (5, 4), "v": (3, 4)}, ["GL(4)"]),
    "index by data": (lambda m, i: lin(m.w[i], m.v), {"w": (5, 4), "v": (3, 4)}, ["GL(4)"]),
    "tied embedding": (lambda m, i: lin(F.embedding(i, m.w), m.w), {"w": (5, 4)}, ["O(4)"]),
}


def check(case: Case, args: tuple[Tensor, ...]) -> None:
    function, parameters, expected = case
    net = Net(function, parameters)
    symmetry = find_symmetry(net, args)
    assert groups(symmetry) == sorted(expected), symmetry
    proven = symmetry.verify(net, args)
    assert proven.kinds == symmetry.kinds and proven.demoted == (), proven
    assert proven.error is not None and proven.error < 1e-9


def drawn(*shapes: Shape) -> tuple[Tensor, ...]:
    return tuple(torch.randn(s, generator=torch.Generator().manual_seed(1), dtype=torch.float64) for s in shapes)


@pytest.mark.parametrize("name", OPS)
def test_kind_of_an_op(name: str) -> None:
    check(OPS[name], drawn(*ROWS))


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_kind_of_an_op_on_images(name: str) -> None:
    check(CONVOLUTIONS[name], drawn(*IMAGES))


@pytest.mark.parametrize("name", LOOKUPS)
def test_kind_of_a_look_up(name: str) -> None:
    check(LOOKUPS[name], (WORDS,))


@torch.library.custom_op("fxmerge_test_mixing::double", mutates_args=())
def double(x: Tensor) -> Tensor:
    return 2 * x


@double.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


def test_a_rule_says_nothing_of_changes_of_basis_by_itself_and_trials_do() -> None:
    net, args = Net(between(double), WV), drawn(*ROWS)
    assert groups(find_symmetry(net, args)) == ["GL(4)"]
    ruled = find_symmetry(net, args, rules={"fxmerge_test_mixing::double": lambda at, x: x})
    assert groups(ruled) == [] and len(ruled.units) == 1, ruled
    assert "double" in ruled.kinds[0].why


def test_a_users_rule_for_a_known_op_says_nothing_of_changes_of_basis() -> None:
    net, args = Net(between(lambda y: -y), WV), drawn(*ROWS)
    assert groups(find_symmetry(net, args)) == ["GL(4)"]
    assert groups(find_symmetry(net, args, rules={"aten::neg": lambda at, x: x})) == []


def test_free_outputs_are_permuted_only() -> None:
    net, args = Net(lambda m, x: lin(x, m.w), {"w": (4, 5)}), drawn(*ROWS)
    symmetry = find_symmetry(net, args, free="output")
    assert len(symmetry.units) == 1 and groups(symmetry) == []

"""Symmetric reductions, and ops that work along a dimension in order."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from fxmerge.symmetry import mixing, weighing
from fxmerge.symmetry.columns import core, support
from fxmerge.symmetry.deferred import Counts, Deferred, Index, Order
from fxmerge.symmetry.deferred import sort as sort_index
from fxmerge.symmetry.labels import Labels, inert, join, pin, reduce, sum_over
from fxmerge.symmetry.relate import relate
from fxmerge.symmetry.rules import ties
from fxmerge.symmetry.rules.registry import Site, normalize_dims, rule, summed_over
from fxmerge.symmetry.units import distinct
from fxmerge.units.kind import Kind

Dims = int | Sequence[int] | None


def reduce_to(at: Site, x: Labels, dims: Dims, shape: tuple[int, ...]) -> Labels:
    """x reduced over `dims`, which the result keeps with size 1 where its shape says so."""
    gone = normalize_dims(dims, x.ndim)
    name = at.target._schema.name
    if name in _LENGTHS:
        at.mix(mixing.measured, x, dims=gone, kind=Kind.CENTRED if name in _DEVIATIONS else Kind.ORTHOGONAL)
    elif at.node is None or summed_over(at.node.args[0]) is None:
        at.mix(mixing.averaged, x, dims=gone)
    at.weigh(weighing.fixed, x, dims=gone)
    if name in ("aten::amax", "aten::amin"):
        at.weigh(weighing.positive, x)
    sum_over(at.units, x, set(gone))
    result = reduce(at.units, x, gone, at.name, keepdim=True)
    at.mix(mixing.passed, x, result)
    return result.reshape(shape)


_DEVIATIONS = ("aten::var", "aten::std", "aten::var_mean", "aten::std_mean")
_LENGTHS = (*_DEVIATIONS, "aten::norm", "aten::linalg_vector_norm")
"""The ops that give the length of a vector, as it is or around its mean."""


@rule(
    "sum",
    "mean",
    "nansum",
    "nanmean",
    "amax",
    "amin",
    "logsumexp",
    "prod",
    "any",
    "all",
    mixes=("sum", "mean"),
    weighs=("sum", "mean", "amax", "amin"),
)
def reduction(at: Site, x: Labels, dims: Dims = None, *args: Any, dim: Dims = None, **kwargs: Any) -> Any:
    dims = dim if dims is None else dims
    if isinstance(at.shape, list):
        return [reduce_to(at, x, dims, shape) for shape in at.shape]
    return reduce_to(at, x, dims, at.shape)


@rule("var", "std", "var_mean", "std_mean", mixes=True)
def moments(at: Site, x: Labels, dims: Dims | bool = None, *args: Any, dim: Dims = None, **kwargs: Any) -> Any:
    return reduction(at, x, dim if isinstance(dims, bool) or dims is None else dims)


@rule("norm", "linalg_vector_norm", mixes=True)
def norm(at: Site, x: Labels, order: Any = 2, dims: Dims = None, *args: Any, dim: Dims = None, **kwargs: Any) -> Labels:
    if order not in (None, 2):
        at.mix(mixing.separate, x)
    return reduce_to(at, x, dim if dims is None else dims, at.shape)


@rule("max", "min", "median", "nanmedian", "mode", "kthvalue")
def extremum(at: Site, x: Labels, *args: Any, **kwargs: Any) -> Any:
    """Of the pair (values, indices), the indices tell positions along the dimension apart."""
    if not isinstance(at.shape, list):
        return at.join(x.expand(at.shape), args[0]) if args else reduce_to(at, x, None, at.shape)
    if at.target._schema.name == "aten::kthvalue":
        args = args[1:]
    dims = args[0] if args else kwargs.get("dim", -1)
    if 1 not in at.used:
        return [reduce_to(at, x, dims, shape) for shape in at.shape]
    if at.target._schema.name == "aten::mode":
        x = pin(at.units, x, f"{at.name}: index along the dimension", normalize_dims(dims, x.ndim))
        return [reduce_to(at, x, dims, shape) for shape in at.shape]
    values = reduce(at.units, x, normalize_dims(dims, x.ndim), at.name, keepdim=True).reshape(at.shape[0])
    return [values, argument(replace(at, shape=at.shape[1]), x, dims)]


@rule("argmax", "argmin")
def argument(at: Site, x: Labels, dim: int | None = None, *args: Any, **kwargs: Any) -> Labels | Index:
    """A number that names the unit at which the extremum is."""
    if x.ndim == 0:
        return x
    flat, along = (x.reshape((math.prod(x.shape),)), 0) if dim is None else (x, dim % x.ndim)
    name = at.target._schema.name.removeprefix("aten::")
    count = 1 if name in ("argmax", "argmin", "max", "min") else flat.shape[along]
    tied = ties.possible(at.node, None if dim is None else along, count, largest="max" in name)
    return _named(at, flat, along, lambda hot: hot.reshape((hot.shape[0], *at.shape)), tied=tied)


def _named(at: Site, x: Labels, dim: int, arrange: Callable[[Labels], Labels], *, tied: bool) -> Labels | Index:
    """Numbers that name units along a dimension of x by their values, if these are not `tied`; `arrange` gives one-hot
    vectors, of which it gets the units as the first dimension, the shape of the numbers."""
    along = [c for c in x.columns if dim in support(c)]
    if not along or not all(_differ(c, dim) for c in along) or tied:
        x = pin(at.units, x, f"{at.name}: index along the dimension", [dim])
        reduced = reduce(at.units, x, [dim], at.name)
        return arrange(reduced.reshape((1, *reduced.shape))).reshape(at.shape)
    for a, b in combinations(along, 2):
        relate(at.units, a, b, at.name)
    hot = at.join(x, reduce(at.units, x, [dim], at.name, keepdim=True), x.shape)
    return Index.of(arrange(hot.map(lambda c: c.movedim(dim, 0), (x.shape[dim], *x.shape[:dim], *x.shape[dim + 1 :]))))


def _differ(column: Tensor, dim: int) -> bool:
    """Whether no unit is there twice along a dimension."""
    ids = core(column, [*(d for d in support(column) if d != dim), dim]).sort(-1)[0]
    return not bool((ids.diff(dim=-1) == 0).any())


@rule("topk", "sort", "msort", "argsort", takes=True)
def order(at: Site, x: Labels | Deferred, *args: Any, dim: int = -1, **kwargs: Any) -> Any:
    """Sorted values forget where they were, which the indices tell."""
    name, shapes = at.target._schema.name, at.shape if isinstance(at.shape, list) else [at.shape]
    whole = [a for a in args[name == "aten::topk" :] if isinstance(a, int) and not isinstance(a, bool)]
    dim = (0 if name == "aten::msort" else whole[0] if whole else dim) % max(x.ndim, 1)
    if name == "aten::argsort" and isinstance(x, Order):
        return x.inverse()
    if name in ("aten::sort", "aten::argsort") and isinstance(x, Index) and x.ndim == 1 and x.names_alike:
        flags = [a for a in (*args, kwargs.get("descending", False)) if isinstance(a, bool)]
        ordered, places = sort_index(at.units, x, ascending=not any(flags))
        return [ordered, places] if isinstance(at.shape, list) else places
    x = at.labels(x)
    indexed = name == "aten::argsort" or 1 in at.used
    reduced = reduce(at.units, x, [dim], at.name, keepdim=True)
    ranks = inert(shapes[0], [dim] if x.ndim else [])
    unsorted = name == "aten::topk" and kwargs.get("sorted", args[3] if len(args) > 3 else True) is False
    if unsorted and any(dim in support(c) for c in x.columns):
        ranks = _unsorted(at, x, dim, shapes[0])
    values = at.join(reduced, ranks, shapes[0])
    if not indexed or x.ndim == 0:
        return [values] * len(shapes) if isinstance(at.shape, list) else values

    def ranked(hot: Labels) -> Labels:
        one = hot.reshape((*hot.shape[: dim + 1], 1, *hot.shape[dim + 1 :]))
        return at.join(one, ranks, (hot.shape[0], *shapes[-1]))

    largest = bool(kwargs.get("largest", args[2] if name == "aten::topk" and len(args) > 2 else True))
    tied = ties.possible(at.node, dim, shapes[-1][dim], largest=largest)
    indices = _named(replace(at, shape=shapes[-1]), x, dim, ranked, tied=tied)
    return [values, indices] if isinstance(at.shape, list) else indices


def _unsorted(at: Site, x: Labels, dim: int, shape: tuple[int, ...]) -> Labels:
    """What tells the chosen values apart where their order is not told: each set of them has places of its own."""
    if shape[dim] < 2:
        return Labels(shape)
    along = [c for c in x.columns if dim in support(c)]
    ids = torch.from_numpy(at.units.fresh(math.prod(shape), ("places", at.name))).reshape(shape)
    row = torch.arange(math.prod(shape) // shape[dim]).reshape(*shape[:dim], 1, *shape[dim + 1 :]).expand(shape)
    at.units.follow(
        ids.reshape(-1).numpy(),
        [distinct(core(c, support(c)).contiguous().numpy()) for c in along],
        row.reshape(-1).numpy(),
    )
    return Labels(shape, (ids,))


@rule("aminmax")
def extremes(at: Site, x: Labels, dim: Dims = None, keepdim: bool = False) -> list[Labels]:
    return [reduce_to(at, x, dim, shape) for shape in at.shape]


@rule("histc", "bincount", "nonzero", "_unique2", "unique_consecutive", takes=True)
def unordered(at: Site, *args: Any, **kwargs: Any) -> Any:
    """Values become places: nothing moves on. Of numbers that name units, each unit has a place."""
    if isinstance(args[0], Index) and _each_has_its_place(at, *args, **kwargs):
        counts = reduce(at.units, args[0].hot, range(1, args[0].hot.ndim), at.name)
        return Counts(counts, args[0].source) if args[0].is_complete else counts
    for x in (*args, *kwargs.values()):
        if isinstance(x, (Labels, Deferred)):
            x = at.labels(x)
            pin(at.units, x, f"{at.name}: values become places")
    return [inert(s) for s in at.shape] if isinstance(at.shape, list) else inert(at.shape)


def _each_has_its_place(at: Site, x: Index, *args: Any, **kwargs: Any) -> bool:
    """Whether a histogram has one place for each unit that is named, in order."""
    others = any(isinstance(a, (Labels, Deferred, Tensor)) for a in (*args, *kwargs.values()))
    if others or at.target._schema.name not in ("aten::histc", "aten::bincount") or at.shape != (x.count,):
        return False
    kind = torch.float32 if at.target._schema.name == "aten::histc" else torch.int64
    rows = [at.target(torch.tensor([number], dtype=kind), *args, **kwargs) for number in range(x.count)]
    return all(r.shape == at.shape for r in rows) and torch.equal(torch.stack(rows).long(), torch.eye(x.count).long())


def _in_order(at: Site, x: Labels, dims: Sequence[int], shape: tuple[int, ...]) -> Labels:
    """Of dimensions along which the order matters, it is only known that the result differs.

    Units that lie along them and along others are told apart by their places, and move with the blocks that are left.
    """
    dims = normalize_dims(dims, x.ndim)
    placed = join(at.units, x, inert(x.shape, dims), f"{at.name}: order along the dimension")
    return at.join(reduce(at.units, placed, dims, at.name, keepdim=True), inert(shape, dims), shape)


@rule("cumsum", "cumprod", "logcumsumexp", "cummax", "cummin", "diff", takes=True)
def cumulative(at: Site, x: Labels | Deferred, *args: Any, dim: int = -1, **kwargs: Any) -> Any:
    position = int(at.target._schema.name == "aten::diff")
    dim = args[position] if len(args) > position else dim
    if isinstance(x, Counts) and not x.ends and at.target._schema.name == "aten::cumsum":
        return replace(x, ends=True)
    x = at.labels(x)
    if isinstance(at.shape, list):
        return [_in_order(at, x, [dim], shape) for shape in at.shape]
    return _in_order(at, x, [dim], at.shape)


@rule(
    *("_fft_c2c", "_fft_r2c", "_fft_c2r", "prims::fft_c2c", "prims::fft_r2c", "prims::fft_c2r"),
    *("fft_fft", "fft_ifft", "fft_rfft", "fft_irfft", "fft_hfft", "fft_ihfft"),
    *("fft_fft2", "fft_ifft2", "fft_rfft2", "fft_irfft2", "fft_fftn", "fft_ifftn", "fft_rfftn", "fft_irfftn"),
)
def fourier(at: Site, x: Labels, *args: Any, **kwargs: Any) -> Labels:
    """Every frequency has a place of its own, and so has every place after a transform back."""
    parameters = at.target._schema.arguments
    given = {a.name: a.default_value for a in parameters} | kwargs
    given |= dict(zip((a.name for a in parameters[1:]), args, strict=False))
    dims = given["dim"]
    if dims is None and given["s"] is not None:  # The last dimensions, as many as there are sizes.
        dims = range(-len(given["s"]), 0)
    return _in_order(at, x, dims, at.shape)


@rule("view_as_real", "view_as_complex")
def complex_parts(at: Site, x: Labels) -> Labels:
    """The real and the imaginary part lie along a last dimension, and stay there."""
    if len(at.shape) > x.ndim:
        return at.join(x.reshape((*x.shape, 1)), inert(at.shape, [-1 % len(at.shape)]), at.shape)
    return reduce(at.units, pin(at.units, x, f"{at.name}: complex parts", [-1]), [-1], at.name)

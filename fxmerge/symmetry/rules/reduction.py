"""Symmetric reductions, and ops that work along a dimension in order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fxmerge.symmetry.labels import Labels, inert, pin, reduce
from fxmerge.symmetry.rules.registry import Site, normalize_dims, rule

Dims = int | Sequence[int] | None


def reduce_to(at: Site, x: Labels, dims: Dims, shape: tuple[int, ...]) -> Labels:
    """x reduced over `dims`, which the result keeps with size 1 where its shape says so."""
    gone = normalize_dims(dims, x.ndim)
    return reduce(at.units, x, gone, at.name, keepdim=True).reshape(shape)


@rule("sum", "mean", "nansum", "nanmean", "amax", "amin", "logsumexp", "prod", "any", "all")
def reduction(at: Site, x: Labels, dims: Dims = None, *args: Any, dim: Dims = None, **kwargs: Any) -> Any:
    dims = dim if dims is None else dims
    if isinstance(at.shape, list):
        return [reduce_to(at, x, dims, shape) for shape in at.shape]
    return reduce_to(at, x, dims, at.shape)


@rule("var", "std", "var_mean", "std_mean")
def moments(at: Site, x: Labels, dims: Dims | bool = None, *args: Any, dim: Dims = None, **kwargs: Any) -> Any:
    return reduction(at, x, dim if isinstance(dims, bool) or dims is None else dims)


@rule("norm", "linalg_vector_norm")
def norm(at: Site, x: Labels, order: Any = 2, dims: Dims = None, *args: Any, dim: Dims = None, **kwargs: Any) -> Labels:
    return reduce_to(at, x, dim if dims is None else dims, at.shape)


@rule("max", "min", "median", "nanmedian", "mode", "kthvalue")
def extremum(at: Site, x: Labels, *args: Any, **kwargs: Any) -> Any:
    """Of the pair (values, indices), the indices tell positions along the dimension apart."""
    if not isinstance(at.shape, list):
        return at.join(x.expand(at.shape), args[0]) if args else reduce_to(at, x, None, at.shape)
    if at.target._schema.name == "aten::kthvalue":
        args = args[1:]
    dims = args[0] if args else kwargs.get("dim", -1)
    if 1 in at.used:
        pin(at.units, x, f"{at.name}: index along the dimension", normalize_dims(dims, x.ndim))
    return [reduce_to(at, x, dims, at.shape[0]), inert(at.shape[1])]


@rule("argmax", "argmin")
def argument(at: Site, x: Labels, dim: int | None = None, *args: Any, **kwargs: Any) -> Labels:
    pin(at.units, x, f"{at.name}: index along the dimension", normalize_dims(dim, x.ndim))
    return inert(at.shape)


@rule("cumsum", "cumprod", "logcumsumexp", "diff")
def in_order(at: Site, x: Labels, *args: Any, **kwargs: Any) -> Labels:
    """The result depends on the order along the dimension."""
    if at.target._schema.name == "aten::diff":
        dim = args[1] if len(args) > 1 else kwargs.get("dim", -1)
    else:
        dim = args[0] if args else kwargs["dim"]
    pinned = pin(at.units, x, f"{at.name}: order along the dimension", [dim])
    index = (slice(None),) * (dim % x.ndim) + (slice(0, at.shape[dim]),)
    return at.join(pinned.map(lambda c: c[index], at.shape), inert(at.shape, [dim % x.ndim]))

"""Symmetric reductions, and ops that work along a dimension in order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fxmerge.symmetry.labels import Labels, inert, join, pin, reduce, sum_over
from fxmerge.symmetry.rules.registry import Site, normalize_dims, rule

Dims = int | Sequence[int] | None


def reduce_to(at: Site, x: Labels, dims: Dims, shape: tuple[int, ...]) -> Labels:
    """x reduced over `dims`, which the result keeps with size 1 where its shape says so."""
    gone = normalize_dims(dims, x.ndim)
    sum_over(at.units, x, set(gone))
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
        x = pin(at.units, x, f"{at.name}: index along the dimension", normalize_dims(dims, x.ndim))
    return [reduce_to(at, x, dims, shape) for shape in at.shape]


@rule("argmax", "argmin")
def argument(at: Site, x: Labels, dim: int | None = None, *args: Any, **kwargs: Any) -> Labels:
    x = pin(at.units, x, f"{at.name}: index along the dimension", normalize_dims(dim, x.ndim))
    return reduce_to(at, x, dim, at.shape)


@rule("topk", "sort", "msort", "argsort")
def order(at: Site, x: Labels, *args: Any, dim: int = -1, **kwargs: Any) -> Any:
    """Sorted values forget where they were, which the indices tell."""
    name, shapes = at.target._schema.name, at.shape if isinstance(at.shape, list) else [at.shape]
    dim = 0 if name == "aten::msort" else dim
    dim = next((a for a in args[name == "aten::topk" :] if isinstance(a, int) and not isinstance(a, bool)), dim) % max(
        x.ndim, 1
    )
    if 1 in at.used or name == "aten::argsort":
        x = pin(at.units, x, f"{at.name}: index along the dimension", [dim])
    ordered = at.join(reduce(at.units, x, [dim], at.name, keepdim=True), inert(shapes[0], [dim]), shapes[0])
    return [ordered] * len(shapes) if isinstance(at.shape, list) else ordered


@rule("aminmax")
def extremes(at: Site, x: Labels, dim: Dims = None, keepdim: bool = False) -> list[Labels]:
    return [reduce_to(at, x, dim, shape) for shape in at.shape]


@rule("histc", "bincount", "nonzero", "_unique2", "unique_consecutive")
def unordered(at: Site, *args: Any, **kwargs: Any) -> Any:
    """Values become places: nothing moves on."""
    for x in (*args, *kwargs.values()):
        if isinstance(x, Labels):
            pin(at.units, x, f"{at.name}: values become places")
    return [inert(s) for s in at.shape] if isinstance(at.shape, list) else inert(at.shape)


def _in_order(at: Site, x: Labels, dims: Sequence[int], shape: tuple[int, ...]) -> Labels:
    """Of dimensions along which the order matters, it is only known that the result differs.

    Units that lie along them and along others are told apart by their places, and move with the blocks that are left.
    """
    dims = normalize_dims(dims, x.ndim)
    placed = join(at.units, x, inert(x.shape, dims), f"{at.name}: order along the dimension")
    return at.join(reduce(at.units, placed, dims, at.name, keepdim=True), inert(shape, dims), shape)


@rule("cumsum", "cumprod", "logcumsumexp", "cummax", "cummin", "diff")
def cumulative(at: Site, x: Labels, *args: Any, dim: int = -1, **kwargs: Any) -> Any:
    position = int(at.target._schema.name == "aten::diff")
    dim = args[position] if len(args) > position else dim
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

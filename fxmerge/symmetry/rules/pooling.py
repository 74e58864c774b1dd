"""Pooling, interpolation and other ops with windows over space: space is pinned, channels pass."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fxmerge.symmetry.labels import Labels, inert, pin, reduce
from fxmerge.symmetry.rules.reduction import reduce_to
from fxmerge.symmetry.rules.registry import Site, rule


def _over_space(at: Site, x: Labels, shape: tuple[int, ...], spatial: int) -> Labels:
    """Every place of the output sees some places of the input: of space it is only known that places differ."""
    space = range(len(shape) - spatial, len(shape))
    over = range(x.ndim - spatial, x.ndim)
    flat = reduce(at.units, pin(at.units, x, f"{at.name}: space", over), over, at.name, keepdim=True)
    return at.join(flat, inert(shape, space), shape)


def _windows(spatial: int) -> Any:
    def apply(at: Site, x: Labels, *args: Any, **kwargs: Any) -> Any:
        if isinstance(at.shape, list):
            return [_over_space(at, x, shape, spatial) for shape in at.shape]
        return _over_space(at, x, at.shape, spatial)

    return apply


rule("avg_pool1d", "max_pool1d", "max_pool1d_with_indices", "upsample_nearest1d", "upsample_linear1d")(_windows(1))
rule(
    *("avg_pool2d", "max_pool2d", "max_pool2d_with_indices"),
    *("upsample_nearest2d", "upsample_bilinear2d", "upsample_bicubic2d", "_upsample_nearest_exact2d"),
    *("_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa"),
)(_windows(2))
rule("avg_pool3d", "max_pool3d", "max_pool3d_with_indices", "upsample_nearest3d", "upsample_trilinear3d")(_windows(3))


@rule("fractional_max_pool2d")
def fractional(at: Site, x: Labels, kernel: Any, size: Any, samples: Labels | Tensor) -> list[Labels]:
    """Every channel has windows of its own, told by random samples of shape (batch, channels, 2)."""
    own = reduce(at.units, at.labels(samples), [-1], at.name).reshape((*x.shape[:-2], 1, 1))
    return [_over_space(at, at.join(x, own, x.shape), shape, 2) for shape in at.shape]


@rule("max_unpool2d")
def unpool(at: Site, x: Labels, indices: Labels | Tensor, *args: Any) -> Labels:
    """Every channel is spread out by indices of its own."""
    return _over_space(at, at.join(x, indices), at.shape, 2)


def _adaptive(spatial: int) -> Any:
    def apply(at: Site, x: Labels, size: Any, *args: Any) -> Any:
        several = isinstance(at.shape, list)
        shape = at.shape[0] if several else at.shape
        if 1 in at.used:  # The second output is an index into space.
            x = pin(at.units, x, f"{at.name}: index into space", range(-spatial, 0))
        if shape == x.shape:
            y = x
        elif all(n == 1 for n in shape[-spatial:]):
            y = reduce_to(at, x, list(range(-spatial, 0)), shape)
        else:
            y = _over_space(at, x, shape, spatial)
        return [y, y] if several else y

    return apply


rule("adaptive_avg_pool1d", "adaptive_max_pool1d")(_adaptive(1))
rule("adaptive_avg_pool2d", "_adaptive_avg_pool2d", "adaptive_max_pool2d")(_adaptive(2))
rule("adaptive_avg_pool3d", "_adaptive_avg_pool3d", "adaptive_max_pool3d")(_adaptive(3))

"""Pooling, interpolation and other ops with windows over space: channels pass, places where no windows overlap."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fxmerge.symmetry import mixing, weighing
from fxmerge.symmetry.columns import spread, support
from fxmerge.symmetry.labels import Labels, join, move, pin, reduce, reduces_evenly
from fxmerge.symmetry.rules.reduction import reduce_to
from fxmerge.symmetry.rules.registry import Site, rule
from fxmerge.symmetry.units import NOTHING, Ids


def apart(at: Site, x: Labels, kernel: Sequence[int], stride: Any, places: Sequence[int]) -> Labels | None:
    """x seen through windows that do not overlap: (..., *places, *kernel).

    None where windows overlap, and where the units in windows are not blocks.
    """
    first = x.ndim - len(kernel)
    windows = list(zip(x.shape[first:], kernel, np.broadcast_to(stride, len(kernel)).tolist(), places, strict=True))
    if any(n != (size - k) // step + 1 or (n > 1 and step < k) for size, k, step, n in windows):
        return None

    def see(column: Tensor) -> Tensor:
        for d, (_, k, step, _) in enumerate(windows, start=first):
            column = column.unfold(d, k, step)
        return column

    taps = range(x.ndim, x.ndim + len(kernel))
    if any(k > 1 for k in kernel) and not all(reduces_evenly(see(c), taps) for c in x.columns):
        return None
    return move(at.units, x, see, (*x.shape[:first], *places, *kernel), at.name)


def lies_in_space(x: Labels, spatial: int) -> bool:
    """Whether units lie along the last dimensions, as those of a linear layer over space do."""
    return any(d >= x.ndim - spatial for c in x.columns for d in support(c))


def facing(at: Site, x: Labels, dims: Sequence[int], ends: Sequence[Ids | None]) -> Labels:
    """x, with the places along `dims` told apart; where a dimension has two `ends`, up to a reversal that goes with an
    exchange of these ends."""
    plain = [d for d, end in zip(dims, ends, strict=True) if end is None]
    x = pin(at.units, x, f"{at.name}: space", plain)
    for d, end in zip(dims, ends, strict=True):
        if end is not None and x.shape[d] > 1:
            place = np.arange(x.shape[d])
            nearest = np.minimum(place, place[::-1])
            side = np.where(place == place[::-1], NOTHING, end[(place > place[::-1]).astype(int)])
            column, pair = (spread(torch.from_numpy(ids), x.shape, (d,)) for ids in (side, nearest))
            x = join(at.units, x, Labels(x.shape, (column,), (pair,)), f"{at.name}: space")
    return x


def two_ends(at: Site, x: Labels, spatial: int) -> list[Ids | None]:
    """For each of the last dimensions of x a new unit for each of its ends, None where no units lie along it alone.

    The ends stay apart: a place and its mirror image are in windows with others.
    """
    ends: list[Ids | None] = []
    for d in range(x.ndim - spatial, x.ndim):
        if {support(c) for c in x.columns if d in support(c)} == {(d,)}:
            end = at.units.fresh(2, ("block", at.name))
            at.units.stay_apart(end)
            ends.append(end)
        else:
            ends.append(None)
    return ends


def _over_space(
    at: Site, x: Labels, shape: tuple[int, ...], spatial: int, ends: Sequence[Ids | None] | None = None
) -> Labels:
    """Every place of the output sees some places of the input: of space it is only known that places differ.

    Arguments:
        ends: as of `two_ends`, where the output is reversed if the input is.
    """
    at.mix(mixing.looked_up, x, dims=range(x.ndim - spatial, x.ndim))
    at.weigh(weighing.fixed, x, dims=range(x.ndim - spatial, x.ndim))
    ends = [None] * spatial if ends is None else ends
    space = range(len(shape) - spatial, len(shape))
    over = range(x.ndim - spatial, x.ndim)
    flat = reduce(at.units, facing(at, x, over, ends), over, at.name, keepdim=True)
    return at.join(flat, facing(at, Labels(shape), space, ends), shape)


def _pooled(at: Site, x: Labels, kernel: Any, stride: Any, shape: tuple[int, ...], spatial: int) -> Labels:
    """A reduction of every window."""
    if not lies_in_space(x, spatial):
        return _over_space(at, x, shape, spatial)
    size, steps = ([int(k) for k in np.broadcast_to(v, spatial)] for v in (kernel, stride))
    at.mix(mixing.looked_up, x, dims=range(x.ndim - spatial, x.ndim))
    at.weigh(weighing.fixed, x, dims=range(x.ndim - spatial, x.ndim))
    seen = apart(at, x, size, stride, shape[-spatial:])
    if seen is not None:
        return reduce(at.units, seen, range(-spatial, 0), at.name)
    geometry = zip(two_ends(at, x, spatial), x.shape[-spatial:], shape[-spatial:], size, steps, strict=True)
    ends = [end if (out - 1) * step + k == n else None for end, n, out, k, step in geometry]
    return _over_space(at, x, shape, spatial, ends)


def _of_maxima(at: Site, x: Labels) -> None:
    """A maximum is the same one as long as all numbers have positive scales; the second output tells where it is."""
    if "max" in at.target._schema.name:
        at.weigh(weighing.still if 1 in at.used else weighing.positive, x)


def _pool(spatial: int) -> Any:
    def apply(at: Site, x: Labels, kernel: Any, stride: Any = (), padding: Any = 0, *more: Any) -> Any:
        shapes = at.shape if isinstance(at.shape, list) else [at.shape]
        dilation = more[0] if more and "max" in at.target._schema.name else 1
        _of_maxima(at, x)
        if 1 in at.used or np.any(padding) or np.any(np.not_equal(dilation, 1)):
            y = _over_space(at, x, shapes[0], spatial)
        else:
            y = _pooled(at, x, kernel, stride or kernel, shapes[0], spatial)
        return [y for _ in shapes] if isinstance(at.shape, list) else y

    return apply


def _resample(spatial: int) -> Any:
    def apply(at: Site, x: Labels, *args: Any) -> Labels:
        return _over_space(at, x, at.shape, spatial)

    return apply


rule("avg_pool1d", "max_pool1d", "max_pool1d_with_indices", mixes=("avg_pool1d",), weighs=True)(_pool(1))
rule("avg_pool2d", "max_pool2d", "max_pool2d_with_indices", mixes=("avg_pool2d",), weighs=True)(_pool(2))
rule("avg_pool3d", "max_pool3d", "max_pool3d_with_indices", mixes=("avg_pool3d",), weighs=True)(_pool(3))
rule("upsample_nearest1d", "upsample_linear1d", mixes=True, weighs=True)(_resample(1))
rule(
    *("upsample_nearest2d", "upsample_bilinear2d", "upsample_bicubic2d", "_upsample_nearest_exact2d"),
    *("_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa"),
    mixes=True,
    weighs=True,
)(_resample(2))
rule("upsample_nearest3d", "upsample_trilinear3d", mixes=True, weighs=True)(_resample(3))


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
        at.weigh(weighing.fixed, x, dims=range(x.ndim - spatial, x.ndim))
        _of_maxima(at, x)
        if 1 in at.used:  # The second output is an index into space.
            x = pin(at.units, x, f"{at.name}: index into space", range(-spatial, 0))
        if shape == x.shape:
            y = x
        elif all(n == 1 for n in shape[-spatial:]):
            y = reduce_to(at, x, list(range(-spatial, 0)), shape)
        elif 1 not in at.used and all(n % m == 0 for n, m in zip(x.shape[-spatial:], shape[-spatial:], strict=True)):
            size = [n // m for n, m in zip(x.shape[-spatial:], shape[-spatial:], strict=True)]
            y = _pooled(at, x, size, size, shape, spatial)
        else:
            y = _over_space(at, x, shape, spatial)
        return [y, y] if several else y

    return apply


_MEANS = ("adaptive_avg_pool2d", "_adaptive_avg_pool2d", "adaptive_avg_pool3d", "_adaptive_avg_pool3d")
rule("adaptive_avg_pool1d", "adaptive_max_pool1d", mixes=("adaptive_avg_pool1d",), weighs=True)(_adaptive(1))
rule("adaptive_avg_pool2d", "_adaptive_avg_pool2d", "adaptive_max_pool2d", mixes=_MEANS, weighs=True)(_adaptive(2))
rule("adaptive_avg_pool3d", "_adaptive_avg_pool3d", "adaptive_max_pool3d", mixes=_MEANS, weighs=True)(_adaptive(3))

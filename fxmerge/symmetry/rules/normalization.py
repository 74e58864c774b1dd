"""Normalizations and softmax: a reduction joined back to its input, then an affine map."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from fxmerge.symmetry import mixing, weighing
from fxmerge.symmetry.labels import Labels, reduce
from fxmerge.symmetry.rules.registry import Site, is_zero, normalize_dims, rule
from fxmerge.units.kind import Kind

Operand = Labels | Tensor


def normalize(at: Site, x: Labels, dims: Sequence[int]) -> Labels:
    return at.join(x, reduce(at.units, x, dims, at.name, keepdim=True), x.shape)


def _affine(
    at: Site, x: Labels, scale: Operand | None, shift: Operand | None, dim: int = 1, *, still: bool = False
) -> Labels:
    """x times one vector and plus another one, which lie along `dim`; `still` if the former must not change, such as a
    variance to which a number is added."""
    for vector in (scale, shift):
        if vector is None:
            continue
        along = vector.reshape((*vector.shape, *(1,) * (x.ndim - dim - 1)))
        before, whole = x, along.expand(x.shape)
        x = at.join(x, along)
        if vector is scale:
            at.mix(mixing.multiplied, before, whole)
            power = None if still else 1
            x = at.product(x, before, whole, signs=(1, power), scales=(1, power))
        elif not is_zero(along):
            at.mix(mixing.summed, before, whole)
            at.weigh(weighing.tied, before, whole)
    return x


@rule("softmax", "log_softmax", "_softmax", "_log_softmax", "_safe_softmax")
def softmax(at: Site, x: Labels, dim: int, *args: Any, **kwargs: Any) -> Labels:
    return normalize(at, x, [dim])


@rule("layer_norm", "rms_norm", mixes=True, weighs=True)
def layer_norm(
    at: Site, x: Labels, shape: Sequence[int], weight: Any = None, bias: Any = None, *args: Any, **kwargs: Any
) -> Labels:
    kind = Kind.ORTHOGONAL if "rms" in at.target._schema.name else Kind.CENTRED
    over = range(x.ndim - len(shape), x.ndim)
    at.weigh(weighing.fixed, x, dims=range(x.ndim if kind == Kind.CENTRED else x.ndim - len(shape)))
    at.weigh(weighing.odd, x)
    at.mix(mixing.measured, x, dims=over, kind=kind)
    y = normalize(at, x, range(-len(shape), 0))
    return _affine(at, y, weight, bias if isinstance(bias, (Labels, Tensor)) else None, x.ndim - 1)


@rule("native_layer_norm", "_fused_rms_norm", mixes=True, weighs=True)
def native_layer_norm(at: Site, x: Labels, shape: Sequence[int], *affine: Any, **kwargs: Any) -> list[Labels]:
    statistics = reduce(at.units, x, range(-len(shape), 0), at.name, keepdim=True)
    y = Site(at.units, at.name, at.target, at.shape[0])
    return [layer_norm(y, x, shape, *affine), *(statistics for _ in at.shape[1:])]


@rule("group_norm", mixes=True, weighs=True)
def group_norm(
    at: Site, x: Labels, groups: int, weight: Operand | None = None, bias: Operand | None = None, *args: Any
) -> Labels:
    batch, channels, *space = x.shape
    grouped = x.reshape((batch, groups, channels // groups, *space))
    at.mix(mixing.measured, grouped, dims=range(2, grouped.ndim), kind=Kind.CENTRED)
    at.weigh(weighing.still, grouped)
    y = normalize(at, grouped, range(2, grouped.ndim)).reshape(x.shape)
    return _affine(at, y, weight, bias)


@rule("native_group_norm", mixes=True, weighs=True)
def native_group_norm(
    at: Site, x: Labels, weight: Any, bias: Any, n: int, c: int, s: int, groups: int, *args: Any
) -> list[Labels]:
    y = group_norm(at, x, groups, weight, bias)
    grouped = x.reshape((n, groups, c // groups, s))
    statistics = reduce(at.units, grouped, (2, 3), at.name)
    return [y, statistics, statistics]


@rule("instance_norm")
def instance_norm(
    at: Site, x: Labels, weight: Any, bias: Any, mean: Any, var: Any, from_input: bool, *args: Any
) -> Labels:
    y = normalize(at, x, range(2, x.ndim)) if from_input else _affine(at, x, var, mean)
    return _affine(at, y, weight, bias)


@rule(
    "batch_norm",
    "_native_batch_norm_legit_no_training",
    "cudnn_batch_norm",
    "native_batch_norm",
    mixes=True,
    weighs=True,
)
def batch_norm(at: Site, x: Labels, weight: Any, bias: Any, mean: Any, var: Any, training: Any, *args: Any) -> Any:
    if training is True:
        at.mix(mixing.separate, x)
        at.weigh(weighing.still, x)
    if training is True and isinstance(at.shape, list):
        return batch_norm_of_batch(at, x, weight, bias)
    y = normalize(at, x, [0, *range(2, x.ndim)]) if training is True else _affine(at, x, var, mean, still=True)
    y = _affine(at, y, weight, bias)
    return [y, *(Labels(shape) for shape in at.shape[1:])] if isinstance(at.shape, list) else y


@rule("_native_batch_norm_legit")
def batch_norm_of_batch(at: Site, x: Labels, weight: Any, bias: Any, *args: Any) -> list[Labels]:
    over = [0, *range(2, x.ndim)]
    statistics = reduce(at.units, x, over, at.name)
    y = _affine(at, normalize(at, x, over), weight, bias)
    return [y, *(statistics if shape == statistics.shape else Labels(shape) for shape in at.shape[1:])]


@rule("_weight_norm", "_weight_norm_interface")
def weight_norm(at: Site, v: Labels, g: Labels, dim: int = 0) -> Any:
    """v scaled to the norms g, which are taken over every dimension but `dim`."""
    others = [d for d in normalize_dims(None, v.ndim) if d != dim % v.ndim]
    y = at.join(normalize(at, v, others), g, v.shape)
    return [y, g] if isinstance(at.shape, list) else y

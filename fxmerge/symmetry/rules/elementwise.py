"""Ops that act on every position by itself, with broadcasting."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fxmerge.symmetry.deferred import Deferred
from fxmerge.symmetry.labels import Labels
from fxmerge.symmetry.rules.registry import Site, rule


@rule(
    *("pointwise", "where", "masked_fill", "floor_divide", "__and__", "__or__", "__xor__", "multiply", "divide"),
    *("subtract", "true_divide", "absolute", "negative", "square", "polar", "log_sigmoid", "hardswish"),
    *("_prelu_kernel", "complex"),
    lifts="joins",
)
def pointwise(at: Site, *args: Any, **kwargs: Any) -> Labels:
    """Joins all operands. Serves every op that torch tags as pointwise."""
    if at.target._schema.name in _PRODUCTS and at.is_zero(args):
        return Labels(at.shape, is_zero=True)
    operands = [at.labels(a) for a in (*args, *kwargs.values()) if isinstance(a, (Labels, Tensor))]
    result = operands[0].expand(at.shape)
    for operand in operands[1:]:
        result = at.join(result, operand)
    return result


_PRODUCTS = ("aten::mul", "aten::multiply")


@rule("prelu")
def prelu(at: Site, x: Labels | Tensor, slope: Labels | Tensor) -> Labels:
    """One slope, or one for every channel: these lie along the second dimension, or the only one."""
    return at.join(at.labels(x), slope.reshape((math.prod(slope.shape), *(1,) * (len(x.shape) - 2))))


@rule(
    *("_to_copy", "to", "clone", "alias", "detach", "contiguous", "lift_fresh_copy", "lift_fresh", "type_as"),
    *("_conj", "resolve_conj", "_conj_physical", "resolve_neg", "_neg_view"),
    lifts="copies",
)
def identity(at: Site, x: Labels, *args: Any, **kwargs: Any) -> Labels:
    """Copies and casts."""
    return x


@rule("copy")
def copy(at: Site, x: Labels | Tensor, source: Labels | Tensor, *args: Any, **kwargs: Any) -> Labels:
    return at.labels(source).expand(at.shape)


@rule(
    *("zero", "zeros_like", "ones_like", "full_like", "empty_like", "new_zeros", "new_ones", "new_full", "new_empty"),
    takes=True,
)
def filled(at: Site, x: Labels | Deferred, *args: Any, **kwargs: Any) -> Labels | Tensor:
    """A constant in the shape, not with the values, of its operand."""
    values = [at.labels(a) for a in (*args, *kwargs.values()) if isinstance(a, (Labels, Deferred))]
    if values:
        return Labels(at.shape)
    filled: Tensor = at.target(torch.zeros(x.shape), *args, **kwargs)
    return torch.zeros_like(filled) if "empty" in at.target._schema.name else filled


@rule("fill")
def fill(at: Site, x: Labels, value: Labels | Tensor | float) -> Labels:
    return at.labels(value).expand(at.shape)

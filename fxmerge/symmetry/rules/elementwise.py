"""Ops that act on every position by itself, with broadcasting."""

from __future__ import annotations

import math
import string
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fxmerge.symmetry import mixing
from fxmerge.symmetry.deferred import Deferred
from fxmerge.symmetry.labels import Labels
from fxmerge.symmetry.rules.registry import Site, is_square, is_zero, rule, summed_over
from fxmerge.units.kind import Kind


@rule(
    *("pointwise", "where", "masked_fill", "floor_divide", "__and__", "__or__", "__xor__", "multiply", "divide"),
    *("subtract", "true_divide", "absolute", "negative", "square", "polar", "log_sigmoid", "hardswish"),
    *("_prelu_kernel", "complex"),
    lifts="joins",
    mixes=(
        *("add", "sub", "subtract", "mul", "multiply", "div", "divide", "true_divide", "neg", "negative", "pow"),
        "square",
    ),
)
def pointwise(at: Site, *args: Any, **kwargs: Any) -> Labels:
    """Joins all operands. Serves every op that torch tags as pointwise."""
    if at.target._schema.name in _PRODUCTS and at.is_zero(args):
        return Labels(at.shape, is_zero=True)
    _mix(at, args, rounds=kwargs.get("rounding_mode") is not None)
    # What scales all units alike comes last: units are called by the names that they have in the other operand.
    args = tuple(sorted(args, key=lambda a: isinstance(a, Labels) and a.uniform is not None))
    operands = [at.labels(a) for a in (*args, *kwargs.values()) if isinstance(a, (Labels, Tensor))]
    result = operands[0].expand(at.shape)
    for operand in operands[1:]:
        result = at.join(result, operand)
    return replace(result, uniform=_uniform(args))


def _uniform(args: Sequence[Any]) -> frozenset[str] | None:
    """The parameters of one number each that an op is computed from, if it is from nothing else."""
    known = [a.uniform for a in args if isinstance(a, Labels)]
    if any(isinstance(a, Tensor) for a in args) or any(names is None for names in known):
        return None
    return frozenset[str]().union(*(names for names in known if names is not None))


_PRODUCTS = ("aten::mul", "aten::multiply")
_SUMS = ("aten::add", "aten::sub", "aten::subtract")
_SIGNS = ("aten::neg", "aten::negative")
_QUOTIENTS = ("aten::div", "aten::divide", "aten::true_divide")


def _mix(at: Site, args: Sequence[Any], *, rounds: bool) -> None:
    """Records which units may be mixed: those of sums, of products with what is the same for all, and of products that
    are summed."""
    name, dims = at.target._schema.name, summed_over(at.node)
    operands = [x.expand(at.shape) if isinstance(x, Labels | Tensor) else x for x in args[:2] if not is_zero(x)]
    if dims is not None and is_square(at.node):
        at.mix(mixing.measured, operands[0], dims=dims, kind=Kind.ORTHOGONAL)
    elif dims is not None and len(operands) == 2:
        letters = string.ascii_letters[: len(at.shape)]
        out = "".join(letter for d, letter in enumerate(letters) if d not in dims)
        at.mix(mixing.contracted, *operands, terms=(letters, letters), out=out)
    elif name in _SUMS:
        at.mix(mixing.summed, *operands)
    elif name in _PRODUCTS or (name in _QUOTIENTS and not rounds):
        at.mix(mixing.multiplied, *operands)
        if name in _QUOTIENTS:
            at.mix(mixing.divides, operands[-1], operands[0])
    elif name not in _SIGNS:
        at.mix(mixing.separate, *operands)


@rule("prelu")
def prelu(at: Site, x: Labels | Tensor, slope: Labels | Tensor) -> Labels:
    """One slope, or one for every channel: these lie along the second dimension, or the only one."""
    return at.join(at.labels(x), slope.reshape((math.prod(slope.shape), *(1,) * (len(x.shape) - 2))))


@rule(
    *("_to_copy", "to", "clone", "alias", "detach", "contiguous", "lift_fresh_copy", "lift_fresh", "type_as"),
    *("_conj", "resolve_conj", "_conj_physical", "resolve_neg", "_neg_view"),
    lifts="copies",
    mixes=True,
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

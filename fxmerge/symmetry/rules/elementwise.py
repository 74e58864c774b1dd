"""Ops that act on every position by itself, with broadcasting."""

from __future__ import annotations

import math
import string
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fxmerge.symmetry import mixing, weighing
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
    weighs=True,
)
def pointwise(at: Site, *args: Any, **kwargs: Any) -> Labels:
    """Joins all operands. Serves every op that torch tags as pointwise."""
    if at.target._schema.name in _PRODUCTS and at.is_zero(args):
        return Labels(at.shape, is_zero=True)
    rounds = kwargs.get("rounding_mode") is not None
    terms = [x.expand(at.shape) if isinstance(x, Labels | Tensor) else x for x in args[:2] if not is_zero(x)]
    _mix(at, terms, rounds=rounds)
    given = args
    # What scales all units alike comes last: units are called by the names that they have in the other operand.
    args = tuple(sorted(args, key=lambda a: isinstance(a, Labels) and a.uniform is not None))
    operands = [at.labels(a) for a in (*args, *kwargs.values()) if isinstance(a, (Labels, Tensor))]
    result = operands[0].expand(at.shape)
    for operand in operands[1:]:
        result = at.join(result, operand)
    return replace(_weighed(at, result, terms, given, kwargs, rounds=rounds), uniform=_uniform(args))


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


def _mix(at: Site, operands: Sequence[Any], *, rounds: bool) -> None:
    """Records which units may be mixed: those of sums, of products with what is the same for all, and of products that
    are summed."""
    name, dims = at.target._schema.name, summed_over(at.node)
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


_ODD = frozenset(
    f"aten::{name}"
    for name in (
        *("tanh", "sin", "tan", "asin", "arcsin", "atan", "arctan", "sinh", "asinh", "arcsinh", "atanh", "arctanh"),
        *("erf", "erfinv", "sign", "sgn", "trunc", "fix", "round", "hardshrink", "softshrink"),
    )
)
_BOUNDED = ("aten::hardtanh", "aten::clamp", "aten::clip")
"""Odd if their bounds are; of these a lower bound of zero alone is positively homogeneous."""
_EVEN = ("aten::cos", "aten::cosh")
_HOMOGENEOUS = ("aten::relu", "aten::leaky_relu", "aten::prelu", "aten::_prelu_kernel")
"""Positively homogeneous ops; what else these take, such as slopes, does not change."""
_POWERS = {"aten::abs": 1, "aten::absolute": 1, "aten::sqrt": 0.5, "aten::rsqrt": -0.5, "aten::square": 2}
_INVERSES = ("aten::reciprocal",)


def _weighed(
    at: Site, result: Labels, terms: Sequence[Any], args: Sequence[Any], kwargs: dict[str, Any], *, rounds: bool
) -> Labels:
    """Records how the result changes with the signs and positive scales of the operands.

    Arguments:
        terms: the first two operands, but for zeros, in the shape of the result.
    """
    name = at.target._schema.name
    operands = [a for a in (*args, *kwargs.values()) if isinstance(a, Labels | Tensor)]
    if name in _SUMS and len(args) > 1:
        at.weigh(weighing.tied, *terms)
        return result
    if name == "aten::where" and len(args) == 3:
        values = [x.expand(at.shape) if isinstance(x, Labels | Tensor) else x for x in args[1:] if not is_zero(x)]
        at.weigh(weighing.tied, *values)
        powers = (None, 1)[: 1 + len(values)]
        return at.product(result, args[0].expand(at.shape), *values[:1], signs=powers, scales=powers)
    exponents = _exponents(name, args, kwargs, rounds=rounds)
    if exponents is None:
        at.weigh(weighing.still, *operands)
        return result
    signs, scales = exponents
    rest: list[None] = [None] * (len(operands) - len(signs))
    spread = (x.expand(at.shape) for x in operands)
    return at.product(result, *spread, signs=[*signs, *rest], scales=[*scales, *rest])


def _exponents(
    name: str, args: Sequence[Any], kwargs: dict[str, Any], *, rounds: bool
) -> tuple[weighing.Coefficients, weighing.Coefficients] | None:
    """What the exponents of tensors count in that of a result, for signs and for scales; None if it is not known."""
    tensors = [isinstance(a, Labels | Tensor) for a in args]
    if name in _PRODUCTS:
        return (1,) * sum(tensors), (1,) * sum(tensors)
    if name in _QUOTIENTS and not rounds:
        inverse = [1, -1] if all(tensors[:2]) else [1] if tensors[0] else [-1]
        return (1,) * len(inverse), inverse
    if name in _SIGNS:
        return (1,), (1,)
    if name in _INVERSES:
        return (1,), (-1,)
    if (name in _ODD and len(args) + len(kwargs) == 1) or name in ("aten::hardshrink", "aten::softshrink"):
        return (1,), (None,)
    if name in _EVEN:
        return (0,), (None,)
    if name in _HOMOGENEOUS:
        return (None,), (1,)
    if name in _POWERS:
        return (0,) if name in ("aten::abs", "aten::absolute", "aten::square") else (None,), (_POWERS[name],)
    if name == "aten::pow" and tensors[0] and len(args) == 2 and isinstance(args[1], int | float):
        whole = float(args[1]).is_integer()
        return (int(args[1]) % 2 if whole else None,), (args[1],)
    return _bounded(name, args, kwargs)


def _bounded(
    name: str, args: Sequence[Any], kwargs: dict[str, Any]
) -> tuple[weighing.Coefficients, weighing.Coefficients] | None:
    if name in ("aten::clamp_min", "aten::threshold") and args[1:] in ((0,), (0, 0)):
        return (None,), (1,)
    if name not in _BOUNDED:
        return None
    default: tuple[Any, Any] = (-1, 1) if name == "aten::hardtanh" else (None, None)
    low, high = [*args[1:], *default[len(args) - 1 :]]
    low, high = kwargs.get("min", low), kwargs.get("max", high)
    if not all(bound is None or isinstance(bound, int | float) for bound in (low, high)):
        return None
    if low is not None and high is not None and low == -high:
        return (1,), (None,)
    return ((None,), (1,)) if low == 0 and high is None else None


@rule("prelu", weighs=True)
def prelu(at: Site, x: Labels | Tensor, slope: Labels | Tensor) -> Labels:
    """One slope, or one for every channel: these lie along the second dimension, or the only one."""
    values, slopes = at.labels(x), at.labels(slope.reshape((math.prod(slope.shape), *(1,) * (len(x.shape) - 2))))
    slopes = slopes.expand(values.shape)
    return at.product(at.join(values, slopes), values, slopes, signs=(None, None), scales=(1, None))


@rule(
    *("_to_copy", "to", "clone", "alias", "detach", "contiguous", "lift_fresh_copy", "lift_fresh", "type_as"),
    *("_conj", "resolve_conj", "_conj_physical", "resolve_neg", "_neg_view"),
    lifts="copies",
    mixes=True,
    weighs=True,
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

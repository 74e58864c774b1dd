"""Whether values along a dimension may be equal for more than single inputs, so that their order is one of places."""

from __future__ import annotations

import math
import operator
from typing import Any

import torch
from torch import Tensor, fx

from fxmerge.symmetry.rules.registry import LIFTS, contracts, find_rule

_SMOOTH = frozenset(
    (
        *("add", "sub", "rsub", "mul", "div", "neg", "multiply", "divide", "subtract", "true_divide", "negative"),
        *("exp", "exp2", "expm1", "log", "log2", "log10", "log1p", "log_sigmoid", "log_sigmoid_forward", "logit"),
        *("sigmoid", "tanh", "sinh", "cosh", "atan", "asinh", "erf", "erfc", "sin", "cos", "sqrt", "rsqrt", "square"),
        *("reciprocal", "pow", "softplus", "silu", "gelu", "mish", "elu", "leaky_relu", "_prelu_kernel", "abs"),
    )
)
"""Pointwise functions that are constant on no interval."""

_POSITIVE = frozenset(("softmax", "_softmax", "sigmoid", "exp", "exp2", "softplus"))
"""Functions that give positive numbers only."""

_MIXING = frozenset(
    (
        *("softmax", "log_softmax", "_softmax", "_log_softmax", "sum", "mean", "norm", "linalg_vector_norm", "var"),
        *(
            "std",
            "logsumexp",
            "layer_norm",
            "rms_norm",
            "native_layer_norm",
            "_fused_rms_norm",
            "group_norm",
            "batch_norm",
        ),
        *("topk", "sort", "msort", "max", "min", "amax", "amin", "median", "kthvalue"),
        *("cdist", "_cdist_forward", "_euclidean_dist", "pairwise_distance", "cosine_similarity"),
    )
)
"""Functions of many values that differ where these do."""

_COPIES = ("copies", "views", "moves", "aligns")


def possible(node: fx.Node | None, dim: int | None, count: int, *, largest: bool) -> bool:
    """Whether the extreme values along a dimension of a node's operand may be equal, other than for single inputs.

    Arguments:
        node: an op that finds the extreme values.
        dim: the dimension, None for all of them.
        count: of how many values along it the order matters.
        largest: whether these are the largest; else the smallest.
    """
    if node is None or not isinstance(node.args[0], fx.Node):
        return True
    source = node.args[0]
    filled = None if dim is None else _filled(source, dim, largest=largest)
    if filled is None:
        return _may_be_equal(source)
    values, kept = filled
    return kept < count or _may_be_equal(values)


def _may_be_equal(source: fx.Node) -> bool:
    todo, seen = [source], set[fx.Node]()
    while todo:
        n = todo.pop()
        if n in seen:
            continue
        seen.add(n)
        value = n.meta.get("val")
        if isinstance(value, Tensor) and not value.is_floating_point():
            return True
        if n.op == "placeholder":
            continue
        name = _name(n)
        if contracts(n.target):
            continue
        moves = getattr(find_rule(n.target), LIFTS, "") in _COPIES
        if name in _SMOOTH or name in _MIXING or moves or n.target is operator.getitem:
            todo += [a for a in n.all_input_nodes if isinstance(a.meta.get("val"), (Tensor, tuple, list))]
        else:
            return True
    return False


def _name(n: Any) -> str:
    name: str = getattr(getattr(getattr(n, "target", None), "_schema", None), "name", "")
    return name.removeprefix("aten::")


# ------------------------------------------------------------------------------------ values that are masked


def _filled(n: fx.Node, dim: int, *, largest: bool) -> tuple[fx.Node, int] | None:
    """Where a node fills in a constant that is never among the extreme values as long as there are others: the node
    that it fills, and how many places along a dimension it leaves, the same number everywhere. None for other nodes."""
    while _is_copy(n):
        n = n.all_input_nodes[0]
    if not isinstance(n.meta.get("val"), Tensor) or not n.meta["val"].ndim:
        return None
    size = _shape(n)[dim]
    if _name(n) == "masked_fill":
        values, mask, fill = n.args[:3]
        ones = _ones(mask, dim)
    elif _name(n) == "scatter":
        values, along, index, fill = n.args[:4]
        ones = _distinct(index, dim) if _is_along(along, n, dim) else None
    elif _name(n) == "where":
        mask, values, fill = n.args[:3]
        kept = _ones(mask, dim)
        ones = None if kept is None else size - kept
    else:
        return None
    number = _number(fill)
    if not isinstance(values, fx.Node) or ones is None or number is None:
        return None
    worst = number == (-math.inf if largest else math.inf) or number == _worst_finite(n, largest)
    below = largest and number == 0 and _is_positive(values)
    return (values, size - ones) if worst or below else None


def _worst_finite(n: fx.Node, largest: bool) -> float:
    limits = torch.finfo(n.meta["val"].dtype)
    return limits.min if largest else limits.max


def _is_positive(n: fx.Node) -> bool:
    while _is_copy(n) or getattr(find_rule(n.target), LIFTS, "") in ("views", "aligns"):
        n = n.all_input_nodes[0]
    return _name(n) in _POSITIVE


def _is_copy(n: fx.Node) -> bool:
    rule = find_rule(n.target)
    return n.op == "call_function" and getattr(rule, LIFTS, "") == "copies" and len(n.all_input_nodes) == 1


def _number(value: Any) -> float | None:
    """The one number that a constant is filled with, None for all else."""
    if isinstance(value, fx.Node):
        if _name(value) in ("full", "full_like", "scalar_tensor", "new_full"):
            given = [a for a in value.args if isinstance(a, (int, float)) and not isinstance(a, bool)]
            return float(given[-1]) if given else None
        if _name(value) in ("zeros", "zeros_like", "new_zeros"):
            return 0.0
        if _name(value) in ("ones", "ones_like", "new_ones"):
            return 1.0
        return _number(value.all_input_nodes[0]) if _is_copy(value) else None
    return float(value) if isinstance(value, (int, float)) else None


def _ones(n: Any, dim: int) -> int | None:
    """How many numbers other than zero there are along a dimension of a mask, if everywhere as many; else None."""
    if not isinstance(n, fx.Node) or not isinstance(n.meta.get("val"), Tensor):
        return None
    shape = _shape(n)
    lifts = getattr(find_rule(n.target), LIFTS, "")
    if lifts == "copies":
        return _ones(n.args[0], dim)
    if _name(n) in ("logical_not", "bitwise_not") and n.meta["val"].dtype == torch.bool:
        kept = _ones(n.args[0], dim)
        return None if kept is None else shape[dim] - kept
    if _name(n) in ("eq", "ne") and _number(n.args[1]) == 0:
        kept = _ones(n.args[0], dim)
        return kept if kept is None or _name(n) == "ne" else shape[dim] - kept
    if _name(n) == "scatter" and _number(n.args[0]) == 0 and _number(n.args[3]) not in (None, 0.0):
        return _distinct(n.args[2], dim) if _is_along(n.args[1], n, dim) else None
    if lifts in ("views", "aligns"):
        return _repeated(n, dim)
    return None


def _repeated(n: fx.Node, dim: int) -> int | None:
    """As `_ones`, of a mask each of whose rows is one of another mask, all of its entries as often."""
    path = [n]
    while getattr(find_rule(path[-1].target), LIFTS, "") in ("views", "aligns", "copies"):
        path.append(path[-1].all_input_nodes[0])
    source = path.pop()
    before = _shape(source)
    numbers = torch.arange(math.prod(before)).reshape(before)
    for step in reversed(path):
        is_wider = getattr(find_rule(step.target), LIFTS, "") == "aligns"
        numbers = numbers.expand(_shape(step)) if is_wider else numbers.reshape(_shape(step))
    rows = numbers.movedim(dim, -1).reshape(-1, numbers.shape[dim]).sort(-1)[0]
    for own in range(len(before)):
        wide = torch.arange(math.prod(before)).reshape(before).movedim(own, -1).reshape(-1, before[own])
        times, rest = divmod(rows.shape[1], wide.shape[1])
        whole = wide.sort(-1)[0].repeat_interleave(max(times, 1), 1)
        if rest == 0 and bool(torch.isin(rows[:, 0], whole[:, 0]).all()):
            at = torch.searchsorted(whole[:, 0].contiguous(), rows[:, 0].contiguous())
            if torch.equal(whole[at], rows):
                ones = _ones(source, own)
                return None if ones is None else times * ones
    return None


def _distinct(n: Any, dim: int) -> int | None:
    """How many numbers an index holds along a dimension, if no two of them are equal, as those that topk gives."""
    if not isinstance(n, fx.Node) or not isinstance(n.meta.get("val"), Tensor):
        return None
    if _is_copy(n):
        return _distinct(n.args[0], dim)
    if n.target is operator.getitem and n.args[1] == 1:
        found: Any = n.args[0]
        name, ndim = _name(found), found.args[0].meta["val"].ndim
        own = found.args[2] if name == "topk" and len(found.args) > 2 else found.kwargs.get("dim", -1)
        if name in ("topk", "sort") and own % ndim == dim:
            return _shape(n)[dim]
    return 1 if _shape(n)[dim] == 1 else None


def _is_along(value: Any, n: fx.Node, dim: int) -> bool:
    return bool(value % n.meta["val"].ndim == dim)


def _shape(n: fx.Node) -> list[int]:
    """The sizes of a node's output, those of the example where they are open."""
    shape: Any = n.meta["val"].shape
    sizes: list[Any] = [s.node.hint if isinstance(s, torch.SymInt) else s for s in shape]
    return sizes

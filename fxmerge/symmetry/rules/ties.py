"""Whether values along a dimension may be equal for more than single inputs, so that their order is one of places."""

from __future__ import annotations

import operator

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
        *("cdist", "_cdist_forward", "_euclidean_dist", "pairwise_distance", "cosine_similarity"),
    )
)
"""Functions of many values that differ where these do."""


def possible(node: fx.Node | None) -> bool:
    """Whether the operand of a node may hold equal values along a dimension, other than for single inputs."""
    if node is None:
        return True
    todo, seen = [node.args[0]], set()
    while todo:
        n = todo.pop()
        if not isinstance(n, fx.Node) or n in seen:
            continue
        seen.add(n)
        value = n.meta.get("val")
        if isinstance(value, Tensor) and not value.is_floating_point():
            return True
        if n.op == "placeholder":
            continue
        name = getattr(getattr(n.target, "_schema", None), "name", "").removeprefix("aten::")
        if contracts(n.target):
            continue
        moves = getattr(find_rule(n.target), LIFTS, "") in ("copies", "views", "moves", "aligns")
        if name in _SMOOTH or name in _MIXING or moves or n.target is operator.getitem:
            todo += [a for a in n.all_input_nodes if isinstance(a.meta.get("val"), (Tensor, tuple, list))]
        else:
            return True
    return False

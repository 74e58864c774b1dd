"""What the output of a layer is added to, such as a residual stream."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, fx

from fxmerge.program.forms import bind

_Step = tuple[Literal["permute", "reshape"], tuple[int, ...]]
"""Dimensions, or sizes; of these -1 is what is left, and -2 - d the size of dimension d of what is reshaped."""

_VIEWS = ("aten::view", "aten::_unsafe_view", "aten::reshape")
_COPIES = ("aten::clone", "aten::contiguous", "aten::alias")


@dataclass(frozen=True)
class Summand:
    """What the output of a node is added to, if it goes nowhere else.

    Attributes:
        node: the other summand.
        back: how a tensor like the sum is brought into the shape of the node's output, step by step.
    """

    node: fx.Node
    back: tuple[_Step, ...] = ()

    def placed(self, value: Tensor) -> Tensor:
        """A tensor like the sum in the shape of the node's output."""
        for kind, sizes in self.back:
            if kind == "permute":
                value = value.permute(sizes)
            else:
                value = value.reshape([value.shape[-2 - size] if size < -1 else size for size in sizes])
        return value


def summand_of(node: fx.Node, learnt: Collection[fx.Node]) -> Summand | None:
    """What a node's output is added to, straight or after its dimensions were reordered, split or joined.

    Arguments:
        node: the node.
        learnt: the activations that depend on parameters; what is no such activation of the same shape and dtype is
            the same in every network, or of another kind, and no summand.
    """
    last, back = node, list[_Step]()
    while len(last.users) == 1:
        (user,) = last.users
        name = getattr(getattr(user.target, "_schema", None), "name", "")
        call = bind(user) if name else {}
        value = last.meta["val"]
        if name == "aten::add":
            others = [n for n in (call["self"], call["other"]) if n is not last]
            return Summand(others[0], tuple(reversed(back))) if _fits(others, last, call, learnt) else None
        if name in ("aten::transpose", "aten::permute"):
            back.append(("permute", _back(call, value.ndim)))
        elif name in _VIEWS:
            sizes = tuple(_size(n, user.meta["val"].shape) for n in value.shape)
            if sizes.count(-1) > 1:
                return None
            back.append(("reshape", sizes))
        elif name not in _COPIES:
            return None
        last = user
    return None


def _size(size: int | torch.SymInt, known: Sequence[int | torch.SymInt]) -> int:
    """A size as a step has it, where some sizes are known as they are."""
    if isinstance(size, int):
        return size
    same = (d for d, n in enumerate(known) if isinstance(n, torch.SymInt) and n.node.expr == size.node.expr)
    return next((-2 - d for d in same), -1)


def _fits(others: list[object], last: fx.Node, call: dict[str, object], learnt: Collection[fx.Node]) -> bool:
    """Whether the other operand of a sum is a summand."""
    if len(others) != 1 or call["alpha"] != 1 or others[0] not in learnt:
        return False
    (other,) = others
    assert isinstance(other, fx.Node)
    mine, its = last.meta["val"], other.meta.get("val")
    if not isinstance(its, Tensor) or not its.is_floating_point():
        return False
    return bool(its.shape == mine.shape and its.dtype == mine.dtype)


def _back(call: dict[str, object], ndim: int) -> tuple[int, ...]:
    """The permutation that undoes a reordering of dimensions."""
    order = list(range(ndim))
    if "dims" in call:
        order = [d % ndim for d in call["dims"]]  # type: ignore[attr-defined]
    else:
        a, b = call["dim0"], call["dim1"]
        order[a], order[b] = order[b], order[a]  # type: ignore[call-overload]
    return tuple(order.index(d) for d in range(ndim))

"""What the output of a layer is added to, such as a residual stream."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from torch import Tensor, fx

from fxmerge.refitting.forms import bind


@dataclass(frozen=True)
class Summand:
    """What the output of a node is added to, if it goes nowhere else.

    Attributes:
        node: the other summand.
        order: for every dimension of the node's output, where it is in the sum.
    """

    node: fx.Node
    order: tuple[int, ...]

    def placed(self, value: Tensor) -> Tensor:
        """A value of the other summand, its dimensions in the order of the node's output."""
        return value.permute(self.order)


def summand_of(node: fx.Node, derived: Collection[fx.Node]) -> Summand | None:
    """What a node's output is added to, directly or with its dimensions reordered; None if that is no activation of
    its shape, or if the output is used in any other way."""
    last, order = node, list(range(node.meta["val"].ndim))
    while len(last.users) == 1:
        (user,) = last.users
        call = bind(user) if hasattr(user.target, "_schema") else {}
        match getattr(getattr(user.target, "_schema", None), "name", ""):
            case "aten::add":
                (other,) = [n for n in (call["self"], call["other"]) if n is not last] or (None,)
                if not isinstance(other, fx.Node) or other in derived or call["alpha"] != 1:
                    return None
                alike = other.meta["val"].shape == last.meta["val"].shape
                return Summand(other, tuple(order)) if alike else None
            case "aten::transpose":
                moved = list(range(len(order)))
                moved[call["dim0"]], moved[call["dim1"]] = moved[call["dim1"]], moved[call["dim0"]]
            case "aten::permute":
                moved = [d % len(order) for d in call["dims"]]
            case _:
                return None
        order = [moved.index(d) for d in order]
        last = user
    return None

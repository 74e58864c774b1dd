"""The tools that `rivals.py` compares: what each says may be permuted, in one form."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

Axis = tuple[str, int]
"""A parameter and one of its dimensions."""

State = dict[str, Tensor]


@dataclass(frozen=True)
class Found:
    """What a tool says of a model.

    Attributes:
        classes: how many sets of units may be permuted, each by a permutation of its own.
        axes: the parameter axes on which some index moves.
        permute: a state dict after one random permutation of each of the classes given (numbers below `classes`).
        carry: moves the running statistics of normalisations as well, if the tool does not by itself.
    """

    classes: int
    axes: frozenset[Axis]
    permute: Callable[[Mapping[str, Tensor], Collection[int]], State]
    carry: Callable[[State], State] | None = None


def parameter_names(model: nn.Module) -> dict[int, str]:
    """The first name of every parameter, by the identity of the tensor."""
    return {id(p): name for name, p in model.named_parameters()}

"""Choosing by a score of the user's own, such as the accuracy on labelled data, between what could be returned."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, fx

from fxmerge.errors import OptionError

Score = Callable[[fx.GraphModule], float | Tensor]
"""How good a network is: larger is better."""


def judged(score: Score, network: fx.GraphModule, name: str) -> float:
    """The score of a network.

    Raises:
        OptionError: if it is no finite number.

    Example:
        >>> gained = fx.symbolic_trace(torch.nn.ReLU())
        >>> judged(lambda network: network(torch.ones(3)).sum(), gained, "the merged network")
        3.0
    """
    with torch.no_grad():
        value = score(network)
    try:
        number = float(value)
    except (TypeError, ValueError, RuntimeError):
        number = math.nan
    if not math.isfinite(number):
        raise OptionError(
            f"score gave {value!r} for {name}; it must give a finite number, larger for a better network."
        )
    return number

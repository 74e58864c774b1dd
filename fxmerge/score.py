"""A score of the user's own, such as the accuracy on labelled data, by which to choose what is returned."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, fx

from fxmerge.compare import score_of
from fxmerge.errors import OptionError

Score = Callable[[fx.GraphModule], float | Tensor]
"""How good a network is: larger is better."""


def judged(score: Score, network: fx.GraphModule, name: str) -> float:
    """The score of a network, without gradients; NaN is the lowest there is.

    Raises:
        OptionError: if it is no number.

    Example:
        >>> merged = fx.symbolic_trace(torch.nn.ReLU())
        >>> judged(lambda network: network(torch.ones(3)).sum(), merged, "the merged network")
        3.0
    """
    with torch.no_grad():
        value = score(network)
    try:
        number = float(value.detach() if isinstance(value, Tensor) else value)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise OptionError(
            f"score gave {value!r} for {name}; it must give a number, larger for a better network."
        ) from error
    return score_of(number)

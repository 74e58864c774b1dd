"""How far what networks answer is from what all parents answer together."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from functools import reduce

import torch
from torch import Tensor, fx

from fxmerge.program import Program
from fxmerge.refitting.gather import Shares, Values


class Answers:
    """The squared errors of outputs, relative to the squares of the parents' weighted mean.

    Arguments:
        program: the program; all its answers count alike.
    """

    def __init__(self, program: Program) -> None:
        self.nodes = program.answers
        self.missed: defaultdict[tuple[int | None, fx.Node], float] = defaultdict(float)
        self.squares: defaultdict[fx.Node, float] = defaultdict(float)

    def add(self, values: Values, taught: Mapping[int, Values], shares: Shares, weight: float) -> None:
        """Takes in a batch; see `LayerFit.add`."""
        for node in self.nodes:
            mean = reduce(torch.add, (shares[j] * _wide(theirs[node]) for j, theirs in taught.items()))
            # Scores of what is ruled out are infinite in all networks.
            self.squares[node] += weight * _square(mean.where(mean.isfinite(), 0.0))
            for number, own in ((None, values), *taught.items()):
                off = torch.where(own[node] == mean, 0.0, _wide(own[node]) - mean)
                self.missed[number, node] += weight * _square(off)

    def error(self, number: int | None) -> float:
        """The mean over outputs of the errors of a parent, or of the merged network; NaN where all outputs are zero."""
        told = [self.missed[number, node] / square for node, square in self.squares.items() if square > 0]
        return sum(told) / len(told) if told else math.nan


def _wide(value: Tensor) -> Tensor:
    """At least in float32."""
    return value.float() if value.element_size() < 4 else value


def _square(value: Tensor) -> float:
    return float(value.square().sum(dtype=torch.float64))

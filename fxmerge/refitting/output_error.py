"""How far the outputs of the merged network and of each parent are from what is learnt: the mean of all parents'.

The error of the merged network is held out: each part of the data is predicted by last layers that were fitted on the
other parts. A parent is as it is, so that its error is held out anyway. All are shares of the variance of the mean.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from functools import reduce

import torch
from torch import Tensor

from fxmerge.evidence.moments import Moments
from fxmerge.processes import Processes
from fxmerge.program.captured import Program
from fxmerge.refitting.gather import Counted, Shares, Teacher, Values
from fxmerge.refitting.layers import Layer

OutputErrors = dict[int | None, float]
"""The error of every parent by its number, and at None that of the merged network."""


def asked(shares: Shares) -> list[int]:
    """The parents that count."""
    return [j for j, share in enumerate(shares) if share > 0]


def comparable(program: Program, last: Sequence[Layer], chosen: Collection[Layer], teachers: Sequence[Teacher]) -> bool:
    """Whether the outputs of last layers tell how near networks are: there are some, all are fitted, and all other
    parameters come before them. What other layers give would be in units of a network's own, or is not the output."""
    own_outputs = not any(
        teacher.places.moved(use.node, range(use.node.meta["val"].ndim))
        for layer in last
        for use in layer.uses
        for teacher in teachers
        if teacher.places is not None
    )
    return own_outputs and bool(last) and all(layer in chosen for layer in last) and not used_elsewhere(program, last)


def used_elsewhere(program: Program, last: Sequence[Layer]) -> bool:
    """Whether a parameter is used other than in some layers or on the way to them."""
    before = {use.node for layer in last for use in layer.uses}
    for node in reversed(program.graph.graph.nodes):
        if not before.isdisjoint(node.users):
            before.add(node)
    parameters = program.of_parameters & program.derived
    return any(
        not parameters.isdisjoint(node.all_input_nodes) for node in program.learnt - before if node.op != "output"
    )


def mean_errors(errors: Sequence[OutputErrors]) -> OutputErrors:
    """The mean of the errors of several outputs; NaN where none varies.

    Example:
        >>> mean_errors([{None: 0.1, 0: 0.5}, {None: 0.3, 0: math.nan}])
        {None: 0.2, 0: 0.5}
    """
    found: OutputErrors = {}
    for number in errors[0] if errors else ():
        # The error of an output that does not vary is NaN.
        own = [one[number] for one in errors if not math.isnan(one[number])]
        found[number] = sum(own) / len(own) if own else math.nan
    return found


class OutputDistance:
    """The squared distances of outputs to the parents' weighted mean, as shares of its variance.

    It is for programs whose last layers cannot be compared, as where the output layer is tied to the embedding.

    Arguments:
        program: the program; all its outputs count alike.
        numbers: the networks whose distances are to be known.
    """

    def __init__(self, program: Program, numbers: Sequence[int | None]) -> None:
        self.nodes = program.answers
        self.missed = {number: dict.fromkeys(self.nodes, 0.0) for number in numbers}
        self.moments = dict.fromkeys(self.nodes, Moments())

    def add(self, values: Values, taught: Mapping[int, Values], counted: Counted) -> None:
        """Takes in a batch; see `LayerFit.add`."""
        shares, weight = counted.shares, counted.weight
        for node in self.nodes:
            mean = reduce(torch.add, (shares[j] * _wide(theirs[node]) for j, theirs in taught.items()))
            # Scores of what is ruled out are infinite in all networks.
            self.moments[node] += Moments.of(feature_rows(mean.where(mean.isfinite(), 0.0)), weight)
            for number, missed in self.missed.items():
                own = (values if number is None else taught[number])[node]
                off = torch.where(own == mean, 0.0, _wide(own) - mean)
                missed[node] += weight * float(feature_rows(off).square().sum())

    def total(self, processes: Processes) -> None:
        """Makes these the distances over the batches of all processes."""
        self.missed, self.moments = processes.total("distances of outputs", (self.missed, self.moments))

    def error(self, number: int | None) -> float:
        """The mean over outputs of the errors of a parent, or of the merged network; NaN where no output varies."""
        spreads = {node: own.spread for node, own in self.moments.items()}
        told = [self.missed[number][node] / spread for node, spread in spreads.items() if spread > 0]
        return sum(told) / len(told) if told else math.nan


def feature_rows(value: Tensor) -> Tensor:
    """An output as rows of features, in float64: shape (rows, features).

    Features lie along the last dimension of outputs with up to three dimensions, such as tokens, and along the second
    one of others, such as images.

    Example:
        >>> feature_rows(torch.zeros(2, 3, 4, 4)).shape
        torch.Size([32, 3])
    """
    if value.is_complex():
        value = torch.view_as_real(value).flatten(-2)
    value = value.reshape(-1, 1) if value.ndim < 2 else value.movedim(1 if value.ndim > 3 else -1, -1)
    return value.reshape(-1, value.shape[-1]).double()


def _wide(value: Tensor) -> Tensor:
    """At least in float32."""
    return value.float() if value.element_size() < 4 else value

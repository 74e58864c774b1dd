"""Whether data are like those that running statistics were estimated on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

from torch import Tensor, fx

from fxmerge.combine.batch_norm import statistics_nodes
from fxmerge.evidence.moments import Moments
from fxmerge.processes import Processes
from fxmerge.program.captured import Program
from fxmerge.program.forms import bind

SHIFT, SCALE = 1.0, 2.0
"""Normalized by the statistics of its own data, a channel has mean 0 and deviation 1. With a mean beyond this shift,
most values are on one side of where those of training were; with a deviation that differs by this factor, they are
spread over another range. A channel with either is off."""

MANY = 0.5
"""Statistics of which more than this share of the channels are off are of other data."""

ROWS = 8
"""Means of fewer rows of data differ too much by chance: those of 8 rows by 0.35 deviations."""


@dataclass(frozen=True)
class Off:
    """Running statistics that are not of the data.

    Attributes:
        name: of the running mean.
        channels: how many channels are off.
        of: how many there are.
    """

    name: str
    channels: int
    of: int


class RunningStatistics:
    """Gathers the moments of what several models normalize by running statistics.

    Arguments:
        program: the program of the models.
        states: their parameters and buffers.
        numbers: what their data and heads are numbered by.
        owner: for tensors that are of one model alone, its number.
    """

    def __init__(
        self,
        program: Program,
        states: Sequence[Mapping[str, Tensor]],
        numbers: Sequence[int],
        owner: Mapping[str, int],
    ) -> None:
        self.states, self.numbers, self.owner = states, numbers, owner
        self.nodes = {names: nodes[0] for names, nodes in statistics_nodes(program).items() if len(nodes) == 1}
        self.names = {cast(fx.Node, node.args[0]): names for names, node in self.nodes.items()}
        keys = [(model, names[0]) for model in range(len(states)) for names in self.nodes]
        self.moments, self.rows = dict.fromkeys(keys, Moments()), dict.fromkeys(keys, 0)

    def take(self, model: int, owner: int | None, node: fx.Node, value: Tensor) -> None:
        """Takes in what a node computes in a model, on data that are of all models, or of one."""
        number = self.numbers[model]
        if node not in self.names or owner not in (None, number):
            return
        name = self.names[node][0]
        if self.owner.get(name, number) != number:
            return
        dims = [d for d in range(value.ndim) if d != 1]
        value = value.float() if value.element_size() < 4 else value
        centre = value.mean(dims, keepdim=True)  # Two passes take an eighth of the time of var_mean.
        variance = (value - centre).square_().mean(dims).double()
        count, mean = value.numel() // value.shape[1], centre.flatten().double()
        own = Moments(count, count, count * mean, count * (variance + mean**2))
        self.moments[model, name] += own
        self.rows[model, name] += len(value)

    def total(self, processes: Processes) -> None:
        """Makes these the moments over the data of all processes."""
        self.moments, self.rows = processes.total("running statistics", (self.moments, self.rows))

    def off(self, model: int) -> list[Off]:
        """The statistics of a model that are not of its data, in graph order. Those that were never estimated, zeros
        and ones, are not among them, nor are those of layers that are used again and again."""
        found = []
        for names, node in self.nodes.items():
            if self.rows[model, names[0]] < ROWS:
                continue
            mean, variance = (self.states[model][name].double() for name in names)
            if not mean.any() and bool((variance == 1).all()):
                continue
            moments, least = self.moments[model, names[0]], float(bind(node)["eps"])
            scale = (variance + least).sqrt()
            shift, spread = (moments.mean - mean) / scale, (moments.variance + least).sqrt() / scale
            off = int(((shift.abs() > SHIFT) | (spread > SCALE) | (spread < 1 / SCALE)).sum())
            if off > MANY * len(mean):
                found.append(Off(names[0], off, len(mean)))
        return found

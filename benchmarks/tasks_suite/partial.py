"""Networks of different classes on one trunk, over where the trunk ends.

The parents are those of `benchmarks/heads.py`: one learns the first and the other the last five classes, each with a
head of five outputs. The earlier the trunk ends, the more layers each head has.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

from heads import QUIET, Networks, Row, accuracies, heads, percent, train
from torch import fx, nn

import fxmerge
from fxmerge import Recipe
from fxmerge.demo import count_parameters
from tasks_suite.images import ImageProblem
from tasks_suite.suite import NETWORKS, PROBLEMS

DEPTHS = tuple(sixth / 6 for sixth in range(1, 6))
"""Up to which shares of its layers a network goes into the trunk. In the end all but its last layers do."""

IMAGES = ("fashion", "digits")
"""The data that are classified."""


@dataclass(frozen=True)
class Point:
    """What is left of two networks on one trunk.

    Attributes:
        network: the name of the network.
        parameters: the trunk's share of a parent's parameters; 0 for the parents themselves.
        layers: the trunk's share of a parent's layers.
        one_loader: the mean accuracy of both tasks, where all learn from all images.
        own_data: the same, where each network has the images of its own task.
    """

    network: str
    parameters: float
    layers: float
    one_loader: float
    own_data: float

    def row(self) -> Row:
        return {
            "network": self.network,
            "parameters in the trunk": f"{self.parameters:.0%}" if self.parameters else "- (parents)",
            "layers in the trunk": f"{self.layers:.0%}" if self.layers else "-",
            "one loader": percent([self.one_loader]),
            "data of their own": percent([self.own_data]),
        }


def measure(networks: Sequence[str], depths: Sequence[float], cache: Path) -> Iterator[Point]:
    """The parents of each network, and then one trunk after the other, from short to long."""
    for network in networks:
        problem = PROBLEMS[NETWORKS[network].data]()
        assert isinstance(problem, ImageProblem)
        a, b = (train(network, task, 0, problem, cache) for task in range(2))
        parents = _mean((a, b), problem)
        yield Point(network, 0.0, 0.0, parents, parents)
        seen = set()
        for share in shares(a, depths):
            try:
                merged = fxmerge.merge(a, b, problem.calibration(), Recipe(share=share), run=QUIET)
            except fxmerge.OptionError:
                continue  # The first layers have more parameters.
            if (size := trunk(merged)) in seen:
                continue
            seen.add(size)
            apart = fxmerge.merge(a, b, loaders=problem.apart(), recipe=Recipe(share=share), run=QUIET)
            in_trunk = size[0] / count_parameters(a), size[1] / layers(a.named_parameters())
            yield Point(network, *in_trunk, _mean(heads(merged), problem), _mean(heads(apart), problem))


def shares(model: nn.Module, depths: Sequence[float]) -> list[float | str]:
    """The share of the parameters that lies before each share of the layers, and in the end all but the last layers."""
    counts = [p.numel() for p in model.parameters()]
    numbers = list(accumulate(p.ndim > 1 for p in model.parameters()))
    before = [
        sum(count for count, number in zip(counts, numbers, strict=True) if number <= depth * numbers[-1])
        for depth in depths
    ]
    return [*(count / sum(counts) for count in before), "trunk"]


def trunk(merged: fx.GraphModule) -> tuple[int, int]:
    """How many parameters and how many layers the trunk has."""
    common = [(name, p) for name, p in merged.named_parameters() if not name.startswith("heads.")]
    return sum(p.numel() for _, p in common), layers(common)


def layers(parameters: Iterable[tuple[str, nn.Parameter]]) -> int:
    """How many parameters are weights of a layer, which have two dimensions or more."""
    return sum(p.ndim > 1 for _, p in parameters)


def _mean(networks: Networks, problem: ImageProblem) -> float:
    return statistics.mean(accuracies(networks, problem))

"""What networks are trained and judged on: two tasks, and both together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

Part = Literal["a", "b", "both"]
"""Task A, task B, or both as one."""

Learnt = Literal["a", "b", "both", "own"]
"""What a parent is trained on: the data of a part, or its own share of the data of both tasks."""

Scores = dict[str, float]

CHUNK = 250
"""How many inputs go through a network at a time where nothing is learnt."""


class Course(Protocol):
    """What a network is trained on."""

    def batch(self, part: Part, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Random training inputs of a part, and their targets."""

    def objective(self, outputs: Tensor, targets: Tensor, part: Part) -> Tensor:
        """The loss to be trained on."""


class Problem(Course, Protocol):
    """Two tasks with training, calibration and test data.

    A network's outputs are embeddings of images, or scores of characters. Several networks are judged
    together by the mean of their scores.
    """

    def calibration(self) -> list[Tensor]:
        """Batches of inputs of both tasks, always the same, without targets."""

    def apart(self) -> tuple[list[Tensor], list[Tensor]]:
        """The same inputs by the task that they are of."""

    def evaluate(self, networks: Sequence[nn.Module]) -> Scores:
        """On test data: `task_a`, `task_b`, `per_task`, `joint` (accuracies), `loss_a`, `loss_b`, `loss`."""

    def validate(self, network: nn.Module) -> float:
        """The joint accuracy on labelled data that are not for testing, to choose networks by."""

    def recognize(self, network: nn.Module) -> float:
        """The same on the calibration inputs, were their labels known."""

    def loss(self, network: nn.Module) -> float:
        """The loss on some test data of both tasks, for curves of many points."""


def mean_scores(networks: Sequence[nn.Module], inputs: Tensor) -> Tensor:
    """The mean of the networks' outputs."""
    return torch.stack([network(inputs) for network in networks]).mean(0)

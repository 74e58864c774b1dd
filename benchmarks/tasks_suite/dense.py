"""Values for every pixel of noisy images: task A is the image without the noise, task B its edges.

The images are those of Fashion-MNIST. A network gives one map for each task. One that has learnt a single task gives
zeros for the other, so that the mean of two parents holds both maps, each at half its size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tasks_suite.images import CALIBRATION, CURVE, fashion
from tasks_suite.problem import CHUNK, Part, Scores, mean_scores

NOISE = 0.5
"""The deviation of the noise; pixels without it lie between 0 and 1."""
TEST = 2_000
MAPS = 2


@dataclass(frozen=True)
class DenseProblem:
    """Images without noise, and the maps that are learnt of them. A `Problem`.

    Scores are shares of the variance over all pixels that a map explains, up to its scale: squared correlations. The
    joint score is that of both tasks, and the loss is what is left unexplained.
    """

    train: Tensor
    validation: Tensor
    test: Tensor

    def batch(self, part: Part, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        clean = self.train[torch.randint(len(self.train), (size,), generator=generator)]
        return noisy(clean, generator), maps(clean)

    def objective(self, outputs: Tensor, targets: Tensor, part: Part) -> Tensor:
        learnt = torch.tensor([part != "b", part != "a"])
        return F.mse_loss(outputs, targets * learnt[:, None, None])

    def calibration(self) -> list[Tensor]:
        return list(noisy(self.train[:CALIBRATION], torch.Generator().manual_seed(0)).split(CHUNK))

    def apart(self) -> tuple[list[Tensor], list[Tensor]]:
        """Every input is of both tasks."""
        return self.calibration(), self.calibration()

    def evaluate(self, networks: Sequence[nn.Module]) -> Scores:
        return self._scores(networks, self.test)

    def validate(self, network: nn.Module) -> float:
        return self._scores([network], self.validation)["joint"]

    def recognize(self, network: nn.Module) -> float:
        return self._scores([network], self.train[:CALIBRATION], seed=0)["joint"]

    def loss(self, network: nn.Module) -> float:
        return self._scores([network], self.test[:CURVE])["loss"]

    @torch.no_grad()
    def _scores(self, networks: Sequence[nn.Module], clean: Tensor, seed: int = 1) -> Scores:
        inputs = noisy(clean, torch.Generator().manual_seed(seed))
        given = torch.cat([mean_scores(networks, chunk) for chunk in inputs.split(CHUNK)])
        a, b = (explained(given[:, n], maps(clean)[:, n]) for n in range(MAPS))
        both = (a + b) / 2
        return {
            "task_a": a,
            "task_b": b,
            "per_task": both,
            "joint": both,
            "loss_a": 1 - a,
            "loss_b": 1 - b,
            "loss": 1 - both,
        }


def dense() -> DenseProblem:
    """The images of Fashion-MNIST: 28 by 28 pixels."""
    problem = fashion()
    return DenseProblem(problem.train.images, problem.validation.images[:TEST], problem.test.images[:TEST])


def noisy(clean: Tensor, generator: torch.Generator) -> Tensor:
    """Images with noise."""
    return clean + NOISE * torch.randn(clean.shape, generator=generator)


def maps(clean: Tensor) -> Tensor:
    """What is learnt of images of shape (n, 1, height, width): themselves, and the length of their gradient by
    Sobel's filter, shape (n, 2, height, width)."""
    across = torch.tensor([[1.0, 0.0, -1.0], [2.0, 0.0, -2.0], [1.0, 0.0, -1.0]]) / 4
    gradient = F.conv2d(clean, torch.stack([across, across.T])[:, None], padding=1)
    return torch.cat([clean, gradient.norm(dim=1, keepdim=True)], dim=1)


def explained(given: Tensor, target: Tensor) -> float:
    """The share of a map's variance that is explained, up to scale and shift; 0 by a constant."""
    x, y = (t.double().flatten() - t.double().mean() for t in (given, target))
    size = float(x.square().sum() * y.square().sum())
    return float(x @ y) ** 2 / size if size > 0 else 0.0

"""Sums over rows of data, from which means, deviations and variances follow."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

TINY = torch.finfo(torch.float64).tiny


@dataclass(frozen=True)
class Moments:
    """How many rows there are, their sum, and the sum of their squares, for every feature.

    It is fed batch by batch, and `+` joins those of two sets of rows, such as of two processes.

    Attributes:
        rows: the number of rows.
        count: how much all rows count together.
        sums: shape (..., features), float64. Zero where no row was seen.
        squares: likewise.

    Example:
        >>> both = Moments.of(torch.tensor([[1.0, 5.0]])) + Moments.of(torch.tensor([[3.0, 5.0]]))
        >>> both.mean, both.variance, both.spread
        (tensor([2., 5.], dtype=torch.float64), tensor([1., 0.], dtype=torch.float64), 2.0)
    """

    rows: int = 0
    count: float = 0.0
    sums: Tensor | float = 0.0
    squares: Tensor | float = 0.0

    @staticmethod
    def of(x: Tensor, weight: float = 1.0) -> Moments:
        """The moments of one batch.

        Arguments:
            x: shape (..., rows, features), real; the dimensions before rows are kept apart.
            weight: how much each row counts.
        """
        rows, x = x.shape[-2], x.double()  # Squares are exact then, and a constant has no variance.
        return Moments(rows, weight * rows, weight * x.sum(-2), weight * x.square().sum(-2))

    def __add__(self, other: Moments) -> Moments:
        return Moments(
            self.rows + other.rows,
            self.count + other.count,
            self.sums + other.sums,
            self.squares + other.squares,
        )

    @property
    def mean(self) -> Tensor:
        """The mean of every feature; 0 where there are no rows."""
        return torch.as_tensor(self.sums, dtype=torch.float64) / max(self.count, TINY)

    @property
    def variance(self) -> Tensor:
        """The mean square of every feature around its mean; rounding leaves it no less than zero."""
        return (torch.as_tensor(self.squares, dtype=torch.float64) / max(self.count, TINY) - self.mean**2).clamp(min=0)

    @property
    def deviation(self) -> Tensor:
        """The root of the variance."""
        return self.variance.sqrt()

    @property
    def square(self) -> float:
        """The sum of squares of all features."""
        return float(torch.as_tensor(self.squares).sum())

    @property
    def spread(self) -> float:
        """The sum of squares of all features around their means; rounding leaves it no less than zero."""
        around = torch.as_tensor(self.sums, dtype=torch.float64).square() / max(self.count, TINY)
        return max(self.square - float(around.sum()), 0.0)


pytree.register_dataclass(Moments)  # So that `Processes.total` finds the sums in it.

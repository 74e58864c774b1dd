"""What pairs of units gain from each other, without a matrix of all pairs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fxmerge.matching.agglomerate import Links
from fxmerge.matching.assignment import Scores
from fxmerge.symmetry.units import Ids


@dataclass(frozen=True, eq=False)
class Gains:
    """What pairs of units of a class gain from each other, of one model; found for those that are asked for.

    Attributes:
        rows: of norm 1, or 0, so that their products are the cosines of the units' weights; shape (units, entries).
            None if weights do not count.
        correlation: of the units' activations, above the diagonal; None if these do not count.
        alpha: how much the cosines count, and activations the rest.
        weight: what a unit gains from itself.

    Example:
        >>> rows = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]])
        >>> Gains(rows, None, 1.0, 10.0)[np.ix_([0, 2], [1, 2])].round(3)
        array([[ 0.,  6.],
               [ 8., 10.]])
    """

    rows: Tensor | None
    correlation: Links | None
    alpha: float
    weight: float

    def __getitem__(self, pairs: tuple[Ids, ...]) -> Scores:
        """The gains of some units from some others, by an index as of `np.ix_`."""
        one, other = (own.reshape(-1) for own in pairs)
        gain = np.zeros((len(one), len(other)))
        if self.rows is not None:
            gain += self.alpha * (self.rows[torch.from_numpy(one)] @ self.rows[torch.from_numpy(other)].T).cpu().numpy()
        if self.correlation is not None:
            first, last = np.minimum(one[:, None], other), np.maximum(one[:, None], other)
            gain += (1 - self.alpha) * self.correlation[first, last]
        gain[one[:, None] == other] = 1
        return self.weight * gain


Known = Mapping[int, Gains | Scores]
"""The gains of all pairs of units of some classes, or what finds them."""

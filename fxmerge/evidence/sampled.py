"""How alike some units of two models are, before and after they are matched: few enough numbers to keep and to draw."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fxmerge.evidence.weights import Slices, real
from fxmerge.symmetry.units import Ids

ENTRIES = 2**19
"""About how many numbers are kept for one merge, of all classes and pairs of models."""

LEAST, MOST = 8, 64
"""How many units of a class are kept at least and at most, if it has as many."""

Matrix = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class SampledSimilarity:
    """How alike units of one class are in a model and in the reference, in whose units the result is.

    Attributes:
        name: the class.
        reference: what the reference is called.
        model: what the model is called.
        space: "activations" for correlations (or cosines, if the recipe says so), "weights" for cosines of the units'
            parameters, as the search counts these.
        size: how many units the class has.
        units: the numbers of the reference's units that are kept, evenly spaced; shape (k,).
        before: shape (k, k): rows are units of the reference, columns the model's units with the same numbers.
        after: the same with the model's units that were matched with those of the reference.
    """

    name: str
    reference: str
    model: str
    space: str
    size: int
    units: Ids
    before: Matrix
    after: Matrix

    @property
    def means(self) -> tuple[float, float]:
        """The mean similarity of a unit to the one in its place, before and after."""
        return float(self.before.diagonal().mean()), float(self.after.diagonal().mean())


@dataclass(frozen=True, eq=False)
class Sample:
    """The units that are kept of one class in two models.

    Attributes:
        units: those of the reference.
        matched: for each of these, the unit of the model that is matched with it.
    """

    units: Ids
    matched: Ids

    @staticmethod
    def of(reference: Ids, model: Ids, count: int) -> Sample:
        """Units of a class, evenly spaced.

        Arguments:
            reference: where each unit of the reference goes.
            model: the same of the model.
            count: how many units to keep at most.

        Example:
            >>> sample = Sample.of(np.arange(4), np.array([3, 2, 1, 0]), 2)
            >>> sample.units.tolist(), sample.matched.tolist()
            ([0, 3], [3, 0])
        """
        units = np.linspace(0, len(reference) - 1, min(count, len(reference))).round().astype(np.int64)
        return Sample(units, np.argsort(model)[reference[units]])

    def of_correlations(self, correlation: Tensor) -> tuple[Matrix, Matrix]:
        """Before and after, from the correlations of all units: shape (units of the reference, units of the model)."""
        rows = correlation[torch.from_numpy(self.units)]
        before, after = rows[:, torch.from_numpy(self.units)], rows[:, torch.from_numpy(self.matched)]
        return _matrix(before), _matrix(after)

    def of_weights(
        self, where: Sequence[Slices], a: Mapping[str, Tensor], b: Mapping[str, Tensor], aligned: Mapping[str, Tensor]
    ) -> tuple[Matrix, Matrix]:
        """Before and after, from parameters.

        Arguments:
            where: the parameter slices of the class.
            a: the parameters of the reference, in the units of the result.
            b: those of the model as they were.
            aligned: those of the model in the units of the result.
        """
        return _matrix(_cosines(where, self.units, a, b)), _matrix(_cosines(where, self.units, a, aligned))


def units_kept(classes: int, pairs: int) -> int:
    """How many units of each class are kept.

    Example:
        >>> units_kept(37, 1), units_kept(500, 11)
        (64, 8)
    """
    return min(max(math.isqrt(ENTRIES // max(2 * classes * pairs, 1)), LEAST), MOST)


def _cosines(where: Sequence[Slices], units: Ids, a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> Tensor:
    """The cosines of all pairs of some units, with every parameter counted by its number of entries."""
    rows = []
    for state in (a, b):
        parts = []
        for s in where:
            tensor = real(state[s.axis.parameter])
            own = replace(s, slots=s.slots[units]).of(tensor).double()
            norm = float(tensor.norm(dtype=torch.float64))
            parts.append(own * math.sqrt(tensor.numel()) / norm if norm > 0 else own)
        row = torch.cat(parts, dim=1)
        rows.append(row / row.norm(dim=1, keepdim=True).clamp(min=1e-12))
    cosines: Tensor = rows[0] @ rows[1].T
    return cosines


def _matrix(values: Tensor) -> Matrix:
    matrix: Matrix = values.detach().float().cpu().numpy().copy()
    return matrix

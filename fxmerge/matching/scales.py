"""The positive scales of units for which the squares of a network's weights have the least sum."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import csr_array, diags_array, vstack
from scipy.sparse.linalg import LinearOperator, cg
from torch import Tensor

from fxmerge.symmetry.base import Group
from fxmerge.units.layout import AxisLayout, Ids, along_axis
from fxmerge.units.scaling import Scaled

Numbers = NDArray[np.float64]

STEPS = 100
TOLERANCE = 1e-12
LONGEST = 1.0
"""No logarithm of a scale changes by more in one step."""
ACCURACY, MOST_PRODUCTS = 1e-3, 200
"""How far conjugate gradients reduce the error of a step, and by how many products with the Hessian at most."""
PIECE = 1 << 22
"""How many entries are summed at a time."""

SMALLEST = 1e-6
"""A unit is not scaled if what a scale multiplies is smaller than this share of what it divides, or the other way
round: no scale would make both equal."""


def least_scales(symmetry: Group, state: Mapping[str, Tensor], numbers: Collection[int]) -> dict[int, Tensor]:
    """For some classes the positive scales of each unit that make the sum of the squares of all weights the least.

    The sum is convex in the logarithms of the scales. Steps are those of Newton, by conjugate gradients, so that chains
    of layers are solved as one. A unit of which a scale nowhere multiplies, or nowhere divides, has no least sum, and
    is not scaled by it.

    Arguments:
        symmetry: the group.
        state: the parameters on which the classes lie, by name, float64.
        numbers: the classes.

    Returns:
        Factors as in `fxmerge.units.scaling.Scaling`, one for signs.
    """
    starts, count = {}, 0
    for n in numbers:
        starts[n], count = count, count + len(symmetry.kinds[n].stretches) * symmetry.units[n].size
    logs = _minimum(_Problem.of(symmetry, state, starts, count))
    factors = {}
    for n, start in starts.items():
        shape = len(symmetry.kinds[n].stretches), symmetry.units[n].size
        own = torch.from_numpy(np.exp(logs[start : start + shape[0] * shape[1]])).reshape(shape)
        factors[n] = torch.cat([torch.ones(len(symmetry.kinds[n].signs), shape[1], dtype=torch.float64), own])
    return factors


@dataclass(frozen=True)
class _Problem:
    """A sum of squares as a function of the logarithms of scales.

    Attributes:
        squares: for every parameter the sums of the squares of its entries that all scales multiply alike, with a
            dimension for each axis.
        places: for every parameter the rows of `powers` that are of each axis.
        powers: the power of what lies at each place of each axis in each scale.
    """

    squares: tuple[Numbers, ...]
    places: tuple[tuple[slice, ...], ...]
    powers: csr_array

    @classmethod
    def of(cls, symmetry: Group, state: Mapping[str, Tensor], starts: Mapping[int, int], count: int) -> _Problem:
        """The problem of some parameters, with scales numbered by class from `starts` on."""
        by_parameter: dict[str, dict[int, list[tuple[int, Scaled]]]] = {}
        for n in starts:
            for own in symmetry.scaled[n]:
                by_parameter.setdefault(own.axis.parameter, {}).setdefault(own.axis.dim, []).append((n, own))
        squares, places, powers = [], [], [csr_array((0, count))]
        end = 0
        for name, by_dim in by_parameter.items():
            groups, own_places = [], []
            for owns in by_dim.values():
                axis = owns[0][1].axis
                group, units = _alike(axis, [own for _, own in owns])
                groups.append(along_axis(torch.from_numpy(group[axis.slot]), axis))
                own_places.append(slice(end, end + units.shape[1]))
                end += units.shape[1]
                of_axis = csr_array((units.shape[1], count))
                for (n, own), unit in zip(owns, units, strict=True):
                    (here,) = np.nonzero(unit >= 0)
                    for k, power in enumerate(own.powers[len(symmetry.kinds[n].signs) :]):
                        where = here, starts[n] + k * symmetry.units[n].size + unit[here]
                        of_axis = of_axis + csr_array((np.full(len(here), float(power)), where), of_axis.shape)
                powers.append(of_axis)
            squares.append(_sums(state[name].abs().square(), groups, [at.stop - at.start for at in own_places]))
            places.append(tuple(own_places))
        whole = cls(tuple(squares), tuple(places), vstack(powers).tocsr())
        sums = _Point.of(whole, np.zeros(count)).sums
        up, down = (csr_array((side * whole.powers).maximum(0)).T @ sums for side in (1, -1))
        free = (up > SMALLEST * down) & (down > SMALLEST * up)
        return replace(whole, powers=csr_array(whole.powers @ diags_array(free.astype(np.float64))))

    def scaled(self, logs: Numbers) -> Iterator[Numbers]:
        """The squares of every parameter after scales."""
        factors = np.exp(2 * (self.powers @ logs))
        for squares, places in zip(self.squares, self.places, strict=True):
            for i, at in enumerate(places):
                squares = squares * factors[at].reshape([-1 if j == i else 1 for j in range(squares.ndim)])
            yield squares


@dataclass(frozen=True)
class _Point:
    """The sum of squares around some scales.

    Attributes:
        sums: of the squares, for every place of every axis; `pairs`, for the places of every two axes of a parameter.
        powers, turned: those of the problem, and their transpose.
    """

    sums: Numbers
    pairs: tuple[tuple[slice, slice, Numbers], ...]
    powers: csr_array
    turned: csr_array

    @classmethod
    def of(cls, problem: _Problem, logs: Numbers) -> _Point:
        sums, pairs = np.zeros(problem.powers.shape[0]), []
        for squares, places in zip(problem.scaled(logs), problem.places, strict=True):
            axes = range(len(places))
            for i, at in enumerate(places):
                sums[at] = squares.sum(tuple(k for k in axes if k != i))
                for j in range(i):
                    pairs.append((places[j], at, squares.sum(tuple(k for k in axes if k not in (i, j)))))
        return cls(sums, tuple(pairs), problem.powers, problem.powers.T.tocsr())

    @property
    def gradient(self) -> Numbers:
        gradient: Numbers = 2 * (self.turned @ self.sums)
        return gradient

    @property
    def curvature(self) -> Numbers:
        """The diagonal of the Hessian, with ones for zeros."""
        curvature = 4 * (self.turned.power(2) @ self.sums)
        return np.where(curvature > 0, curvature, 1.0)

    def hessian(self, direction: Numbers) -> Numbers:
        """The product of the Hessian with a direction."""
        along = self.powers @ direction
        changes = self.sums * along
        for one, other, both in self.pairs:
            changes[one] += both @ along[other]
            changes[other] += along[one] @ both
        product: Numbers = 4 * (self.turned @ changes)
        return product


def _minimum(problem: _Problem) -> Numbers:
    """The logarithms of the scales that give the least sum."""
    count = problem.powers.shape[1]
    logs, total = np.zeros(count), sum(float(own.sum()) for own in problem.squares)
    for _ in range(STEPS):
        point = _Point.of(problem, logs)
        gradient, curvature = point.gradient, point.curvature
        if np.abs(gradient / curvature).max(initial=0.0) < TOLERANCE:
            break
        hessian = LinearOperator((count, count), point.hessian)
        step, _ = cg(hessian, -gradient, rtol=ACCURACY, M=diags_array(1 / curvature), maxiter=MOST_PRODUCTS)
        step *= min(1.0, LONGEST / np.abs(step).max())
        while True:
            after = sum(float(own.sum()) for own in problem.scaled(logs + step))
            # Near the least sum, rounding decides whether it falls.
            if after <= total * (1 + TOLERANCE) or np.abs(step).max() < TOLERANCE:
                break
            step /= 2
        logs, total = logs + step, after
    return logs


def _alike(axis: AxisLayout, owns: list[Scaled]) -> tuple[Ids, Ids]:
    """For every slot of an axis, the group of those that all scales multiply alike; and for every class the unit that a
    group shows, -1 for none: shape (classes, groups)."""
    unit_at = np.full((len(owns), len(axis.index)), -1)
    for at, own in zip(unit_at, owns, strict=True):
        at[own.slots] = np.arange(len(own.slots))[:, None]
    units, group = np.unique(unit_at, axis=1, return_inverse=True)
    return group.reshape(-1), units


def _sums(squares: Tensor, groups: list[Tensor], sizes: list[int]) -> Numbers:
    """The sums of entries by the groups that they are in along each axis, shape `sizes`."""
    total = torch.zeros(int(np.prod(sizes)), dtype=torch.float64)
    rows = max(PIECE // max(squares[0].numel(), 1), 1)
    for start in range(0, len(squares), rows):
        part, index = squares[start : start + rows], torch.zeros((), dtype=torch.int64)
        for group, size in zip(groups, sizes, strict=True):
            index = index * size + (group[start : start + rows] if len(group) > 1 else group)
        total.index_add_(0, index.expand(part.shape).reshape(-1), part.reshape(-1))
    summed: Numbers = total.reshape(sizes).numpy()
    return summed

"""The normal equations of a layer's features and targets, gathered in pieces, and the ridge regression they give."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from operator import itemgetter

import torch
from torch import Tensor

from fxmerge.evidence.moments import Moments
from fxmerge.ordering import error_of
from fxmerge.processes import ALONE, Processes
from fxmerge.refitting.strength import CERTAIN, RIDGES, Search, limit_of

FOLDS, LEAST_FOLDS = 5, 2
FOLD_MEMORY = 2**28
"""Into how many parts the data go of which each is predicted from the others: fewer where their moments would take
more bytes than this, but no less than two."""

BLOCK = 256
"""Features of which products with the features after them are taken together; those before are the same again."""


@dataclass(frozen=True)
class Solution:
    """A ridge regression.

    Attributes:
        step: what to add to the coefficients, shape (groups, features, outputs).
        factor: the Cholesky factor of the products of all features or all rows, with what the ridge adds.
        scale: what it adds, shape (groups).
    """

    step: Tensor
    factor: Tensor
    scale: Tensor

    @property
    def rank(self) -> float:
        """How many directions the ridge leaves free, the mean over groups: the trace of the hat matrix."""
        inverse = torch.cholesky_inverse(self.factor).diagonal(dim1=1, dim2=2)
        return float((inverse.shape[1] - self.scale * inverse.sum(1)).mean())


@dataclass(frozen=True)
class Few:
    """Fewer rows than there are features: a fit costs the cube of their number.

    Attributes:
        x: features, shape (groups, rows, features).
        rest: what is to be explained, shape (groups, rows, outputs).
    """

    x: Tensor
    rest: Tensor

    def error(self, step: Tensor) -> float:
        """The sum of squares of what a step leaves over."""
        return float((self.rest - self.x @ step).square().sum())

    def solve(self, ridge: float) -> Solution | None:
        """The step of a ridge, in the dual form: x' (x x' + ridge)^-1 rest."""
        found = self.dual(ridge)
        return None if found is None else Solution(self.x.transpose(1, 2) @ found[0], *found[1:])

    def dual(self, ridge: float) -> tuple[Tensor, Tensor, Tensor] | None:
        """How much each row counts in the step of a ridge, shape (groups, rows, outputs); with the Cholesky factor and
        what the ridge adds."""
        scale = _scale(self.x.square().sum(1), ridge)
        factor = _factor(self._products, scale)
        return None if factor is None else (torch.cholesky_solve(self.rest, factor), factor, scale)

    @cached_property
    def _products(self) -> Tensor:
        return self.x @ self.x.transpose(1, 2)

    def many(self) -> Many:
        """The same as sums."""
        turned = self.x.transpose(1, 2)
        return Many(turned @ self.x, turned @ self.rest, float(self.rest.square().sum()))


@dataclass(frozen=True)
class Many:
    """Sums over rows: a fit costs the cube of the number of features.

    Attributes:
        features: of products of features, shape (groups, features, features).
        cross: of features with what is to be explained, shape (groups, features, outputs).
        squares: of squares of what is to be explained.
    """

    features: Tensor
    cross: Tensor
    squares: float

    def __add__(self, other: Many) -> Many:
        return Many(self.features + other.features, self.cross + other.cross, self.squares + other.squares)

    def error(self, step: Tensor) -> float:
        """The sum of squares of what a step leaves over; rounding may not leave less than nothing."""
        return max(self.squares + float((step * (self.features @ step - 2 * self.cross)).sum()), 0.0)

    def solve(self, ridge: float) -> Solution | None:
        """The step of a ridge: (x' x + ridge)^-1 x' rest."""
        scale = _scale(self.features.diagonal(dim1=1, dim2=2), ridge)
        factor = _factor(self.features, scale)
        return None if factor is None else Solution(torch.cholesky_solve(self.cross, factor), factor, scale)


class NormalEquations:
    """What is gathered of rows, for ridge regressions: the rows themselves while they are few, then sums of products.

    Arguments:
        groups, features, outputs: how many there are.
        device: where sums are kept.
        few: up to how many rows are kept.

    Attributes:
        targets: the moments of the targets, shape (groups, outputs).
    """

    def __init__(self, groups: int, features: int, outputs: int, device: torch.device, few: int = 0) -> None:
        self.shape, self.device, self.few = (groups, features, outputs), device, few
        self.targets = Moments()
        self._rows: list[tuple[int, Tensor, Tensor, float]] = []
        self._sums: Many | None = None
        self._half = False  # Whether the products of features are up to date on the diagonal and above only.

    @classmethod
    def folds(cls, groups: int, features: int, outputs: int, device: torch.device) -> list[NormalEquations]:
        """One for each part of the data, still empty."""
        count = cls.parts(groups, features, outputs)
        return [cls(groups, features, outputs, device, features // count) for _ in range(count)]

    @staticmethod
    def parts(groups: int, features: int, outputs: int) -> int:
        """Into how many parts the data go."""
        size = groups * features * (features + outputs) * torch.float64.itemsize
        return min(max(FOLD_MEMORY // max(size, 1), LEAST_FOLDS), FOLDS)

    def add(self, x: Tensor, y: Tensor, centre: Tensor, weight: float, batch: int = 0) -> None:
        """Adds rows of a batch: features of shape (groups, rows, features), targets of shape (groups, rows,
        outputs)."""
        rest = y - x @ centre
        self.targets += Moments.of(y, weight)
        self._rows.append((batch, x, rest, weight))
        if self.targets.rows > self.few:
            self._sums = self._summed()
        else:
            self._rows[-1] = batch, x.clone(), rest, weight  # Features may be a view of far more.

    def _summed(self) -> Many:
        """All rows as sums, of which none is left. Each batch has a product of its own, so that rounding does not
        depend on when this is done."""
        sums = self._sums or self._empty()
        for _, x, rest, weight in self._rows:
            sums = self._added(sums, x, rest, weight)
        self._half, self._rows = True, []
        return sums

    @staticmethod
    def _added(sums: Many, x: Tensor, rest: Tensor, weight: float) -> Many:
        turned = x.transpose(1, 2)
        squares = float(rest.square().sum(dtype=torch.float64))
        for start in range(0, x.shape[2], BLOCK):
            end = start + BLOCK
            sums.features[:, start:end, start:].add_((turned[:, start:end] @ x[..., start:]).double(), alpha=weight)
        sums.cross.add_((turned @ rest).double(), alpha=weight)
        return Many(sums.features, sums.cross, sums.squares + squares * weight)

    @staticmethod
    def total(all_: Sequence[NormalEquations], processes: Processes) -> None:
        """Makes some equations those of the rows of all processes."""
        if processes.size == 1:
            return
        for own, targets in zip(all_, processes.total("targets", [own.targets for own in all_]), strict=True):
            own.targets = targets
        few = [own for own in all_ if own.targets.rows <= own.few]
        if few:
            for own, *rows in zip(few, *processes.gather("rows", [own._rows for own in few]), strict=True):
                own._rows = sorted((row for of_one in rows for row in of_one), key=itemgetter(0))
        many = [own for own in all_ if own.targets.rows > own.few]
        summed = [own._summed() for own in many]
        sums = processes.total("sums", [(own.features, own.cross, own.squares) for own in summed])
        for own, found in zip(many, sums, strict=True):
            own._sums, own._half = Many(*found), True

    def rows(self) -> Few | None:
        """The rows, in float64; None if they are more than few."""
        if self._sums is not None or not self._rows:
            return None
        scaled = ((x * math.sqrt(weight), rest * math.sqrt(weight)) for _, x, rest, weight in self._rows)
        x, rest = (torch.cat(own, 1).double() for own in zip(*scaled, strict=True))
        return Few(x, rest)

    def sums(self) -> Many:
        """The rows as sums."""
        if self._sums is not None:
            if self._half:
                _fill_below(self._sums.features)
                self._half = False
            return self._sums
        rows = self.rows()
        if rows is not None:
            return rows.many()
        return self._empty()

    def _empty(self) -> Many:
        groups, features, outputs = self.shape
        empty = torch.zeros(groups, features, features + outputs, dtype=torch.float64, device=self.device)
        return Many(empty[..., :features].contiguous(), empty[..., features:].contiguous(), 0.0)

    @property
    def is_finite(self) -> bool:
        """Whether no sum has overflowed, and no value was infinite or NaN."""
        found = [self._sums.features, self._sums.cross] if self._sums else [t for row in self._rows for t in row[1:3]]
        return all(bool(torch.isfinite(t).all()) for t in found)


def _fill_below(products: Tensor) -> None:
    """Completes symmetric matrices of shape (groups, features, features), in place, of which the blocks below the
    diagonal are not known."""
    for start in range(0, products.shape[1], BLOCK):
        end = start + BLOCK
        products[:, end:, start:end] = products[:, start:end, end:].transpose(1, 2)


def joined(folds: Sequence[NormalEquations]) -> Few | Many:
    """The equations of some folds together: rows if there are fewer than features."""
    rows = [fold.rows() for fold in folds]
    if all(own is not None for own in rows) and sum(fold.targets.rows for fold in folds) <= folds[0].shape[1]:
        kept = [own for own in rows if own is not None]
        return Few(torch.cat([own.x for own in kept], 1), torch.cat([own.rest for own in kept], 1))
    total = folds[0].sums()
    for fold in folds[1:]:
        total = total + fold.sums()
    return total


@dataclass(frozen=True)
class Fit:
    """A layer's step from its centre and how it was found.

    Attributes:
        step: what to add to the coefficients, shape (groups, features, outputs), float64.
        ridge: the chosen strength, relative to the mean square of a feature.
        before, after: squared error of the centre and of the fit, relative to the square of the targets.
        held_out: the same of fits on rows that the fit was not made of.
        rank: how many of the features' directions the ridge leaves free, the mean over groups.
    """

    step: Tensor
    ridge: float
    before: float
    after: float
    held_out: float
    rank: float


def fit(layers: Sequence[Sequence[NormalEquations]], processes: Processes = ALONE) -> list[Fit]:
    """Ridge regressions around centres; the strength of each is the one that predicts each fold best from the others.

    Minimises  sum of |residual - x step|^2 + ridge * scale * |step|^2, where scale is the mean of the features' sums
    of squares: where the data say nothing, there is no step.

    Arguments:
        layers: the folds of each regression, which are the same in all processes.
        processes: among these, the folds are dealt out, and then the regressions.
    """
    layers = [[fold for fold in folds if fold.targets.rows] or folds[:1] for folds in layers]
    totals = [max(sum(f.targets.square for f in folds), torch.finfo(torch.float64).tiny) for folds in layers]
    errors = _held_out(layers, totals, processes)
    problems = list(zip(layers, totals, errors, strict=True))
    owners = processes.deal([_cost(folds) for folds in layers])
    return processes.solve("fits", problems, lambda problem: _chosen(*problem), owners)


def _chosen(folds: Sequence[NormalEquations], total: float, errors: Mapping[float, float]) -> Fit:
    """The fit with the strongest ridge whose held-out error is about the least."""
    limit = limit_of(errors, total)
    whole = joined(folds)
    before = whole.error(torch.zeros(folds[0].shape, dtype=torch.float64, device=folds[0].device)) / total
    for ridge in (r for r, error in errors.items() if error <= limit):
        found = whole.solve(ridge)
        if found is not None and bool(torch.isfinite(found.step).all()):
            after = whole.error(found.step) / total
            held_out = errors[ridge] / total if len(folds) > 1 else after
            return Fit(found.step, ridge, before, after, held_out, found.rank)
    none = torch.zeros(folds[0].shape, dtype=torch.float64, device=folds[0].device)
    return Fit(none, math.inf, before, before, before, 0.0)


@dataclass(frozen=True, eq=False)
class _HeldOut:
    """A fold that the others are to predict, of a layer by its number."""

    layer: int
    fold: NormalEquations
    rest: Sequence[NormalEquations]

    @cached_property
    def rows(self) -> Few | Many:
        return joined([self.fold])

    @cached_property
    def others(self) -> Few | Many:
        return joined(self.rest)

    def missed(self, ridge: float) -> float:
        """The error on the fold of what the others give; infinite where rounding does not let the fit be found."""
        if isinstance(self.rows, Few) and isinstance(self.others, Few):
            # By products of rows with rows, so that there is no step, which is as large as the layer.
            dual = self.others.dual(ridge)
            return math.inf if dual is None else float((self.rows.rest - self._across @ dual[0]).square().sum())
        found = self.others.solve(ridge)
        return math.inf if found is None else error_of(self.rows.error(found.step))

    @cached_property
    def _across(self) -> Tensor:
        assert isinstance(self.rows, Few) and isinstance(self.others, Few)
        return self.rows.x @ self.others.x.transpose(1, 2)


def _held_out(
    layers: Sequence[Sequence[NormalEquations]], totals: Sequence[float], processes: Processes
) -> list[dict[float, float]]:
    """For every layer the sums of errors on all folds of what the others give, by ridges from the strongest on."""
    errors: list[dict[float, float]] = [dict.fromkeys(RIDGES, 0.0) for _ in layers]
    open_ = {
        n: Search(total, in_one_minimum=_rows_each(layers[n]) >= CERTAIN)
        for n, total in enumerate(totals)
        if len(layers[n]) > 1
    }
    tasks = [_HeldOut(n, own, [other for other in layers[n] if other is not own]) for n in open_ for own in layers[n]]
    while open_:
        # With several processes, as many ridges at a time, so that these have equally much to do.
        now = [(t, r) for t in tasks if t.layer in open_ for r in open_[t.layer].nearest(processes.size)]
        owners = processes.split([_cost(task.rest) for task, _ in now])
        missed = processes.solve("held-out errors", now, lambda one: one[0].missed(one[1]), owners)
        found: dict[int, dict[float, float]] = {n: {} for n in open_}
        for (task, ridge), error in zip(now, missed, strict=True):
            found[task.layer][ridge] = found[task.layer].get(ridge, 0.0) + error
        for n, own in found.items():
            if open_[n].go_on(own):
                errors[n] = open_.pop(n).errors
    return errors


def _rows_each(folds: Sequence[NormalEquations]) -> float:
    """How many rows there are for each feature, at least, to predict a fold from."""
    rows = [fold.targets.rows for fold in folds]
    return (sum(rows) - max(rows)) / folds[0].shape[1]


def _cost(folds: Sequence[NormalEquations]) -> float:
    """About what a solve costs: the cube of the rows or of the features."""
    groups, features, _ = folds[0].shape
    return float(groups * min(sum(fold.targets.rows for fold in folds), features) ** 3)


def step_without(own: NormalEquations, folds: Sequence[NormalEquations], ridge: float) -> Tensor | None:
    """The step that all folds but one give, where rounding lets it be found."""
    found = joined([fold for fold in folds if fold is not own]).solve(ridge)
    return None if found is None else found.step


def _scale(squares: Tensor, ridge: float) -> Tensor:
    """What the ridge adds for each group, of the sums of squares of every feature."""
    scale = squares.mean(1)
    return torch.where(scale > 0, scale * ridge, 1.0)


def _factor(products: Tensor, scale: Tensor) -> Tensor | None:
    """The Cholesky factor of products with what a ridge adds; None where rounding has left them indefinite."""
    shifted = products.clone()
    shifted.diagonal(dim1=1, dim2=2).add_(scale[:, None])
    factor, failed = torch.linalg.cholesky_ex(shifted)
    return None if bool(failed.any()) else factor

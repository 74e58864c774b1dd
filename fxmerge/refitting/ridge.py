"""The normal equations of a layer's features and targets, gathered in pieces, and the ridge regression they give."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fxmerge.evidence.moments import Moments
from fxmerge.ordering import error_of

RIDGES = tuple(10.0**power for power in range(1, -6, -1))
"""The strengths to choose from, relative to the mean square of a feature, strongest first. Below them, rounding in
the moments would count."""

FOLDS, LEAST_FOLDS = 5, 2
FOLD_MEMORY = 2**28
"""Into how many parts the data go of which each is predicted from the others: fewer where their moments would take
more bytes than this, but no less than two."""

MARGIN, NEGLIGIBLE = 0.01, 1e-10
"""A stronger ridge is preferred if its error is greater by no more than this share, and this share of the targets."""


@dataclass
class NormalEquations:
    """Sums over rows of products of features, and of features with what is to be explained.

    Attributes:
        features: shape (groups, features, features).
        cross: features with residuals, shape (groups, features, outputs).
        residuals: sum of squares of what the centre leaves over.
        targets: the moments of the targets, shape (groups, outputs).
    """

    features: Tensor
    cross: Tensor
    residuals: float = 0.0
    targets: Moments = field(default_factory=Moments)

    @classmethod
    def folds(cls, groups: int, features: int, outputs: int, device: torch.device) -> list[NormalEquations]:
        """One for each part of the data, still empty."""
        return [cls.none(groups, features, outputs, device) for _ in range(cls.parts(groups, features, outputs))]

    @staticmethod
    def parts(groups: int, features: int, outputs: int) -> int:
        """Into how many parts the data go."""
        size = groups * features * (features + outputs) * torch.float64.itemsize
        return min(max(FOLD_MEMORY // max(size, 1), LEAST_FOLDS), FOLDS)

    @classmethod
    def none(cls, groups: int, features: int, outputs: int, device: torch.device) -> NormalEquations:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=device)

        return cls(zeros(groups, features, features), zeros(groups, features, outputs))

    def add(self, x: Tensor, y: Tensor, centre: Tensor, weight: float) -> None:
        """Adds rows: features of shape (groups, rows, features), targets of shape (groups, rows, outputs)."""
        rest = y - x @ centre
        self.features += (x.transpose(1, 2) @ x).double() * weight
        self.cross += (x.transpose(1, 2) @ rest).double() * weight
        self.residuals += float(rest.square().sum(dtype=torch.float64)) * weight
        self.targets += Moments.of(y, weight)

    def __add__(self, other: NormalEquations) -> NormalEquations:
        return NormalEquations(
            self.features + other.features,
            self.cross + other.cross,
            self.residuals + other.residuals,
            self.targets + other.targets,
        )

    def error(self, step: Tensor) -> float:
        """The sum of squared errors once a step is added to the centre; rounding may not leave less than nothing."""
        return max(self.residuals + float((step * (self.features @ step - 2 * self.cross)).sum()), 0.0)


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


def fit(folds: Sequence[NormalEquations]) -> Fit:
    """Ridge regression around a centre; its strength is the one that predicts each fold best from the others.

    Minimises  sum of |residual - x step|^2 + ridge * scale * |step|^2, where scale is the mean of the features' sums
    of squares: where the data say nothing, there is no step.
    """
    folds = [f for f in folds if f.targets.rows] or folds[:1]
    whole = _sum(folds)
    total = max(whole.targets.square, torch.finfo(torch.float64).tiny)
    errors: dict[float, float] = {}
    for ridge in RIDGES:
        errors[ridge] = sum(_missed(own, folds, ridge) for own in folds) if len(folds) > 1 else 0.0
        if errors[ridge] > 2 * min(errors.values()) + NEGLIGIBLE * total:
            break  # It only gets worse from here.
    limit = min(errors.values()) * (1 + MARGIN) + NEGLIGIBLE * total
    for ridge in (r for r, error in errors.items() if error <= limit):
        factor, scale = _factor(whole, ridge)
        if factor is not None:
            step = torch.cholesky_solve(whole.cross, factor)
            if not bool(torch.isfinite(step).all()):
                continue
            inverse = torch.cholesky_inverse(factor).diagonal(dim1=1, dim2=2)
            rank = float((inverse.shape[1] - scale * inverse.sum(1)).mean())
            before, after, held_out = (e / total for e in (whole.residuals, whole.error(step), errors[ridge]))
            return Fit(step, ridge, before, after, held_out if len(folds) > 1 else after, rank)
    before = whole.residuals / total
    return Fit(torch.zeros_like(whole.cross), math.inf, before, before, before, 0.0)


def _missed(own: NormalEquations, folds: Sequence[NormalEquations], ridge: float) -> float:
    """The error on one fold of what the others give."""
    step = step_without(own, folds, ridge)
    return error_of(own.error(step)) if step is not None else math.inf


def step_without(own: NormalEquations, folds: Sequence[NormalEquations], ridge: float) -> Tensor | None:
    """The step that all folds but one give, where rounding lets it be found."""
    rest = _sum([f for f in folds if f is not own])
    factor, _ = _factor(rest, ridge)
    return None if factor is None else torch.cholesky_solve(rest.cross, factor)


def _sum(folds: Sequence[NormalEquations]) -> NormalEquations:
    total = folds[0]
    for other in folds[1:]:
        total = total + other
    return total


def _factor(moments: NormalEquations, ridge: float) -> tuple[Tensor | None, Tensor]:
    """The Cholesky factor of the features' moments with the ridge, None where rounding has left them indefinite; and
    what the ridge adds for each group."""
    gram = moments.features
    scale = gram.diagonal(dim1=1, dim2=2).mean(1)
    scale = torch.where(scale > 0, scale * ridge, 1.0)
    eye = torch.eye(gram.shape[1], dtype=gram.dtype, device=gram.device)
    factor, failed = torch.linalg.cholesky_ex(gram + scale[:, None, None] * eye)
    return (None if bool(failed.any()) else factor), scale

"""The fit of a layer that writes scores of classes: the least cross-entropy to given distributions, by Newton's method.

The problem is convex. Its ridge pulls towards the coefficients of the squared-error fit, so that it has one minimum.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from operator import itemgetter

import torch
from torch import Tensor

from fxmerge.processes import Processes
from fxmerge.refitting.strength import MARGIN, RIDGES

SAMPLE_MEMORY = 2**29
"""How many bytes the rows of a fit take at most: features, target probabilities and the network's probabilities. Of
more rows, a random sample is kept."""

TOLERANCE = 1e-8
"""The minimum is found if a Newton step would lower the objective by less, in nats."""

NEGLIGIBLE = 1e-6
"""A difference in cross-entropy, in nats, that counts as none. Rounding of float32 logits changes it by far less."""

STEPS, INNER_STEPS, HALVINGS = 50, 50, 30
"""How many Newton steps are taken at most, how many steps of conjugate gradients for each, and how often one is
halved."""

SUFFICIENT = 1e-4
"""The share of the fall that the slope promises which a step must bring."""

_ENTRIES = 2**22
"""How many scores are computed at a time."""

Evaluation = tuple[float, Tensor, Tensor]
"""An objective, its gradient, and the network's probabilities."""


@dataclass(frozen=True)
class Rows:
    """Inputs of a layer, and the distributions over classes that it should give.

    Attributes:
        features: shape (rows, features).
        targets: the probability of every class, shape (rows, classes).
        weights: how much each row counts, shape (rows,).
    """

    features: Tensor
    targets: Tensor
    weights: Tensor

    def __len__(self) -> int:
        return len(self.features)

    def part(self, where: slice) -> Rows:
        """Some of the rows, not copied."""
        return Rows(self.features[where], self.targets[where], self.weights[where])

    @cached_property
    def shares(self) -> Tensor:
        """The weights, normalized to sum to one."""
        return self.weights.double() / self.weights.sum(dtype=torch.float64)

    @cached_property
    def pieces(self) -> list[slice]:
        """What of the rows is computed at a time."""
        size = max(_ENTRIES // self.targets.shape[1], 1)
        return [slice(i, i + size) for i in range(0, len(self), size)]

    @cached_property
    def basis(self) -> tuple[Tensor, Tensor]:
        """The eigenvalues and eigenvectors of the features' second moments, in float64."""
        moments = sum(
            self.features[i].double().T @ (self.features[i].double() * self.shares[i, None]) for i in self.pieces
        )
        assert isinstance(moments, Tensor)
        values, vectors = torch.linalg.eigh(moments)
        return values.clamp(min=0), vectors

    @cached_property
    def mean_square(self) -> float:
        """The mean square of a feature; 1 where all are zero."""
        return float(self.basis[0].mean()) or 1.0

    @property
    def entropy(self) -> float:
        """The mean entropy of the targets, in nats: no cross-entropy is less."""
        parts = (torch.special.entr(self.targets[i].double()).sum(1) @ self.shares[i] for i in self.pieces)
        return sum(map(float, parts))

    def cross_entropy(self, coefficients: Tensor) -> float:
        """The mean cross-entropy from the targets to what a layer gives, in nats.

        Arguments:
            coefficients: of the layer, shape (features, classes), float64.
        """
        total = 0.0
        for i in self.pieces:
            logs = (self.features[i].double() @ coefficients).log_softmax(1)
            total -= float((self.targets[i] * logs).sum(1) @ self.shares[i])
        return total

    def evaluate(self, coefficients: Tensor) -> Evaluation:
        """The mean cross-entropy, its gradient, and the probabilities that a layer gives."""
        total, gradient, found = 0.0, torch.zeros_like(coefficients), torch.empty_like(self.targets)
        for i in self.pieces:
            x, p, share = self.features[i].double(), self.targets[i].double(), self.shares[i]
            logs = (x @ coefficients).log_softmax(1)
            total -= float((p * logs).sum(1) @ share)
            q = logs.exp()
            gradient += x.T @ ((q - p) * share[:, None])
            found[i] = q.to(found)
        return total, gradient, found

    def curvature(self, probabilities: Tensor, step: Tensor) -> Tensor:
        """The Hessian of the cross-entropy, where a layer gives some probabilities, times a step."""
        found, step = torch.zeros_like(step), step.to(self.features)
        for i in self.pieces:
            x, q = self.features[i], probabilities[i]
            moved = q * (x @ step)
            moved -= q * moved.sum(1, keepdim=True)
            found += (x.T @ (moved * self.shares[i, None].to(x))).double()
        return found

    def spreads(self, probabilities: Tensor) -> Tensor:
        """For every class, the mean variance of whether it is drawn."""
        return sum(
            (
                (self.shares[i, None].to(probabilities) * probabilities[i] * (1 - probabilities[i])).sum(0)
                for i in self.pieces
            ),
            start=probabilities.new_zeros(probabilities.shape[1]),
        ).double()


@dataclass(frozen=True)
class Minimum:
    """Where a descent ended.

    Attributes:
        coefficients: shape (features, classes), float64.
        objectives: the objective at the start and after every step; each is less than the one before.
    """

    coefficients: Tensor
    objectives: tuple[float, ...]


def minimise(
    rows: Rows, centre: Tensor, ridge: float, start: Tensor | None = None, tolerance: float = TOLERANCE
) -> Minimum:
    """Coefficients of least cross-entropy plus ridge * scale / 2 * |coefficients - centre|^2, where scale is the mean
    square of a feature.

    A step solves the Newton equations approximately by conjugate gradients, so that no Hessian is stored. It is halved
    until the objective falls.

    Arguments:
        rows: what is to be learnt.
        centre: what the ridge pulls towards, shape (features, classes), float64.
        ridge: its strength, above zero.
        start: where to begin; None is the centre.
        tolerance: what a further step would lower the objective by, in nats.

    Example:
        >>> x, p = torch.eye(2, dtype=torch.float64), torch.tensor([[0.9, 0.1], [0.2, 0.8]], dtype=torch.float64)
        >>> found = minimise(Rows(x, p, torch.ones(2)), torch.zeros(2, 2, dtype=torch.float64), ridge=1e-9)
        >>> found.coefficients.softmax(1)
        tensor([[0.9000, 0.1000],
                [0.2000, 0.8000]], dtype=torch.float64)
    """
    strength = ridge * rows.mean_square

    def evaluate(coefficients: Tensor) -> Evaluation:
        value, gradient, probabilities = rows.evaluate(coefficients)
        off = coefficients - centre
        return value + strength / 2 * float(off.square().sum()), gradient + strength * off, probabilities

    at = centre if start is None else start
    value, gradient, probabilities = evaluate(at)
    objectives = [value]
    for _ in range(STEPS):
        step = _newton_step(rows, gradient, probabilities, strength)
        slope = float((gradient * step).sum())
        if not -slope / 2 > tolerance:
            break
        for halvings in range(HALVINGS):
            share = 0.5**halvings
            trial = evaluate(at + share * step)
            if trial[0] < value and trial[0] <= value + SUFFICIENT * share * slope:
                break
        else:
            break  # Rounding is all that is left.
        at = at + share * step
        value, gradient, probabilities = trial
        objectives.append(value)
    return Minimum(at, tuple(objectives))


def _newton_step(rows: Rows, gradient: Tensor, probabilities: Tensor, strength: float) -> Tensor:
    """A step that solves the Newton equations, the more exactly the nearer the minimum is."""
    prepared = _preconditioner(rows, probabilities, strength)
    step, rest = torch.zeros_like(gradient), -gradient
    towards = direction = prepared(rest)
    size = first = float((rest * towards).sum())
    accuracy = min(0.5, first**0.25)  # `first` is about twice what the step brings, in nats.
    for _ in range(INNER_STEPS):
        if not size > accuracy**2 * first:
            break
        bent = rows.curvature(probabilities, direction) + strength * direction
        along = float((direction * bent).sum())
        if not along > 0:  # By rounding.
            break
        step = step + size / along * direction
        rest = rest - size / along * bent
        towards = prepared(rest)
        before, size = size, float((rest * towards).sum())
        direction = towards + size / before * direction
    return step


def _preconditioner(rows: Rows, probabilities: Tensor, strength: float) -> Callable[[Tensor], Tensor]:
    """Solves the equations with a Hessian that has no entries for two classes, and in which every row has the mean
    variance of a class."""
    values, vectors = rows.basis
    divisors = values[:, None] * rows.spreads(probabilities) + strength
    return lambda right: vectors @ ((vectors.T @ right) / divisors)


@dataclass(frozen=True)
class ScoreFit:
    """A fit to distributions over classes, and how it was found.

    Attributes:
        coefficients: shape (features, classes), float64; None where the squared-error fit is kept.
        held_out: coefficients that were fitted without the rows that were held out.
        ridge: the chosen strength, relative to the mean square of a feature; infinite where the squared-error fit is
            kept.
        before, after: the cross-entropy on rows held out, in nats: of the squared-error fit and of this one, both made
            without these rows.
        entropy: the mean entropy of the targets on these rows.
    """

    coefficients: Tensor | None
    held_out: Tensor
    ridge: float
    before: float
    after: float
    entropy: float


def fit_scores(rows: Rows, held: int, whole_centre: Tensor, rest_centre: Tensor) -> ScoreFit:
    """The fit whose ridge predicts held-out rows best; a stronger ridge is preferred if it is about as good.

    Arguments:
        rows: what is to be learnt.
        held: how many rows, the first, are held out to choose the ridge.
        whole_centre: the squared-error fit of all rows, shape (features, classes), float64.
        rest_centre: that of the rest of the rows.
    """
    apart, rest = rows.part(slice(held)), rows.part(slice(held, None))
    entropy, before = apart.entropy, apart.cross_entropy(rest_centre)
    # The infinite ridge is the squared-error fit.
    best, found, last = before, {math.inf: (before, rest_centre)}, rest_centre
    for ridge in RIDGES:
        last = minimise(rest, rest_centre, ridge, last, tolerance=NEGLIGIBLE).coefficients  # It is compared only.
        error = apart.cross_entropy(last)
        best = min(best, error)
        limit = best + MARGIN * max(best - entropy, 0.0) + NEGLIGIBLE
        found = {r: one for r, one in (found | {ridge: (error, last)}).items() if one[0] <= limit}
        if not error <= limit:
            break  # It only gets worse from here.
    ridge, (after, chosen) = next(iter(found.items()))
    kept = ScoreFit(None, chosen, ridge, before, after, entropy)
    if math.isinf(ridge):
        return kept
    start = whole_centre + chosen - rest_centre
    return replace(kept, coefficients=minimise(rows, whole_centre, ridge, start).coefficients)


class ScoreRows:
    """A sample of the rows of a layer that writes scores of classes.

    Arguments:
        features: how many features a row has.
        classes: how many classes.
        batches: how many batches there will be, of which each has an equal share of the memory.
    """

    def __init__(self, features: int, classes: int, batches: int) -> None:
        self.row_size = features + 3 * classes
        self.batches = batches
        self.parts: list[tuple[int, int, Rows]] = []

    def add(
        self,
        fold: int,
        x: Tensor,
        p: Tensor,
        weight: float,
        generator: torch.Generator,
        parts: int = 1,
        batch: int = 0,
    ) -> None:
        """Takes in rows.

        Arguments:
            fold: the part of the data that the rows are of; those of part 0 are held out.
            x: features, shape (rows, features).
            p: probabilities of classes, shape (rows, classes).
            weight: how much each row counts.
            generator: of the choice of rows.
            parts: in how many such calls a batch comes.
            batch: the number of the batch.
        """
        limit = SAMPLE_MEMORY // (self.row_size * x.element_size() * self.batches * parts) + 1
        if len(x) > limit:
            chosen = torch.randperm(len(x), generator=generator)[:limit].sort().values.to(x.device)
            # What is left out is stood for by what is chosen.
            weight, x, p = weight * len(x) / limit, x[chosen], p[chosen]
        weights = torch.full((len(x),), weight, dtype=torch.float64, device=x.device)
        self.parts.append((fold, batch, Rows(x.clone(), p.to(x, copy=True), weights)))

    def total(self, processes: Processes) -> None:
        """Makes these the rows of all processes."""
        self.parts = [part for own in processes.gather("rows of scores", self.parts) for part in own]

    def gathered(self) -> tuple[Rows, int]:
        """All rows, those that are held out first, and how many these are."""
        parts = [rows for _, _, rows in sorted(self.parts, key=itemgetter(0, 1))]
        whole = Rows(*(torch.cat([getattr(r, n) for r in parts]) for n in ("features", "targets", "weights")))
        held = sum(len(rows) for fold, _, rows in self.parts if fold == 0)
        self.parts = []
        return whole, held

"""One permutation for each of many models, into units that they share.

Three models that are matched pair by pair disagree: from the first to the second and on to the third is not what
a match of the first and the third gives, and all results depend on which model comes first. Where every
model has one permutation into a common universe (C2M3, arXiv 2405.17897), the way from one model to another is there
and back, so that every circle of models closes; what is left is to search for the permutations. Here that is done
as in MergeMany of Git Re-Basin (arXiv 2209.04836, algorithm 3): again and again one model is
matched with the mean of all others. The mean is of permuted weights and of correlations of
activations, so that such a step can only raise the sum of what the pairs agree in.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from itertools import combinations

import numpy as np
import torch
from torch import Tensor

from fxmerge.evidence import weights
from fxmerge.matching.descent import descend, rises
from fxmerge.matching.mix import Mix
from fxmerge.matching.problem import Problem, floats, quality
from fxmerge.matching.search import Match, search
from fxmerge.symmetry.group import Symmetry
from fxmerge.symmetry.units import Ids
from fxmerge.units.permutation import Permutation

Pair = tuple[int, int]


def canonical_order(states: Sequence[Mapping[str, Tensor]]) -> list[int]:
    """The numbers of some models in an order that depends on their tensors only, not on the order that they come in.

    Example:
        >>> import torch
        >>> a, b, c = ({"w": torch.full((2,), value)} for value in (1.0, 2.0, 3.0))
        >>> [(a, b, c)[i] for i in canonical_order((a, b, c))] == [(c, a, b)[i] for i in canonical_order((c, a, b))]
        True
    """
    return sorted(range(len(states)), key=lambda i: _digest(states[i]))


def _digest(state: Mapping[str, Tensor]) -> bytes:
    digest = hashlib.sha256()
    for name in sorted(state):
        digest.update(name.encode())
        digest.update(state[name].detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.digest()


@dataclass(frozen=True)
class Alignment:
    """What brings several models into the units of one of them.

    Attributes:
        permutations: for every model, what is to be applied to it.
        home: the number of the model in whose units all are.
        traces: objectives, at the start of a search and after every accepted step; none ever falls. One for
            every model that was matched with `home`; or a single one, the sum over all pairs of models, where
            all were matched with each other.
        quality: for every model that was matched, by class, the mean similarity of its units to those
            of `home`, or of all others.
    """

    permutations: tuple[Permutation, ...]
    home: int
    traces: tuple[tuple[float, ...], ...]
    quality: tuple[Mapping[str, Mapping[str, float]], ...]


def to_reference(symmetry: Symmetry, matches: Mapping[int, Match], home: int) -> Alignment:
    """All models but one, each matched with that one."""
    numbers = range(len(matches) + 1)
    return Alignment(
        tuple(symmetry.identity() if i == home else matches[i].permutation for i in numbers),
        home,
        tuple(matches[i].trace for i in numbers if i != home),
        tuple(matches[i].quality for i in numbers if i != home),
    )


class Together:
    """Several models, permuted so far, and the sum of what their pairs agree in.

    Arguments:
        symmetry: the group to search.
        units: for every model, its parameters as they came, each scaled to norm one.
        correlation: for some classes, for every pair of models i < j, the correlations of the units'
            activations, (units of i, units of j).
        mix: how much weights and activations count.

    Attributes:
        permutations: for every model, where its units are.
    """

    def __init__(
        self,
        symmetry: Symmetry,
        units: Sequence[Mapping[str, Tensor]],
        correlation: Mapping[int, Mapping[Pair, Tensor]],
        mix: Mix,
    ) -> None:
        self.symmetry, self.units, self.correlation, self.mix = symmetry, units, correlation, mix
        self.slices = weights.slices(symmetry)
        self.permutations = [symmetry.identity() for _ in units]
        self._placed = list(units)

    def problem(self, m: int, others: Sequence[int]) -> Problem:
        """The match of one model with the mean of some others, where they are now.

        Its objective is the mean over the others of the objectives of the pairs: all parameters have norm
        one, so that the inner products of pairs count as their cosines do, and add up.
        """
        mean = {name: _mean([self._placed[i][name] for i in others]) for name in self.units[m]}
        correlation = {n: _mean([self._rows(n, i, m) for i in others]) for n in self.correlation}
        scales = {name: float(tensor.numel()) for name, tensor in mean.items()}
        images = self.permutations[m].images
        b = dict(self._placed[m])
        return Problem(self.symmetry, mean, b, correlation, self.mix, images, scales, self.slices)

    def _rows(self, number: int, i: int, m: int) -> Tensor:
        """The correlations of one class in two models: rows in the places that the units of i have, columns as
        the units of m came."""
        shown = self.correlation[number]
        return (shown[i, m] if i < m else shown[m, i].T)[_units(self.permutations[i].images[number])]

    def objective(self) -> float:
        """The sum over all pairs of models."""
        count = len(self.units)
        agreed = 0.0
        for name in self.units[0]:
            own = sum(weights.inner(u[name], u[name]) for u in self.units)
            total = reduce(torch.add, [p[name] for p in self._placed])
            together = weights.inner(total, total)
            agreed += self.units[0][name].numel() * (together - own) / 2
        agreed *= self.mix.weights
        for number, shown in self.correlation.items():
            at = [_units(p.images[number]) for p in self.permutations]
            pairs = sum(float(shown[i, j][at[i], at[j]].sum()) for i, j in combinations(range(count), 2))
            agreed += self.mix.activations[number] * (float(sum(s.entries for s in self.slices[number])) or 1.0) * pairs
        return agreed

    def place(self, m: int, permutation: Permutation) -> None:
        """Puts the units of one model where a permutation takes them."""
        self.permutations[m], self._placed[m] = permutation, permutation.apply(self.units[m])

    def start(self, seed: int, progress: bool | None) -> None:
        """Matches each model but the first with the mean of those before it."""
        for m in range(1, len(self.units)):
            problem = self.problem(m, range(m))
            search(problem, seed=seed, progress=progress)
            self.place(m, Permutation(self.symmetry.layout, problem.images))

    def improve(self, m: int, before: float, seed: int, progress: bool | None) -> float:
        """Matches one model on with all others; it stays where it was unless the objective rises.

        Arguments:
            m: the number of the model.
            before: the objective.
            seed, progress: as for `search`.

        Returns:
            The objective afterwards.
        """
        problem, at = self.problem(m, self.others(m)), self.permutations[m]
        trace = search(problem, afresh=False, seed=seed, progress=progress)
        if not rises(trace[0], trace[-1]):
            return before
        self.place(m, Permutation(self.symmetry.layout, problem.images))
        after = self.objective()
        if rises(before, after):
            return after
        self.place(m, at)
        return before

    def others(self, m: int) -> list[int]:
        """The numbers of all models but one."""
        return [i for i in range(len(self.units)) if i != m]


def find_universe(
    symmetry: Symmetry,
    states: Sequence[Mapping[str, Tensor]],
    correlation: Mapping[int, Mapping[Pair, Tensor]],
    *,
    alpha: float | Mapping[int, float],
    seed: int = 0,
    progress: bool | None = None,
) -> Alignment:
    """Finds for every model the element of the group by which all models are most similar to each other.

    Each model is matched with the mean of those before it, in their order. From there the models, in random order, are
    matched on with the mean of all others, until no step helps by more than a small share of it. So the number of
    searches grows as that of models does, and not as that of their pairs.

    Arguments:
        symmetry: the group to search.
        states: the parameters of two or more models. The result depends on their order unless they
            are in their `canonical_order`.
        correlation: for some classes, for every pair of models i < j, the correlations of the units' activations,
            (units of i, units of j).
        alpha: weight of the weight-space similarity, in [0, 1]: one for all classes, or one for each by its number.
        seed: seed of the random order.
        progress: whether to show a progress bar; None shows it on a terminal.

    Returns:
        The alignment, in the units of the first model.
    """
    symmetry = replace(symmetry, kinds=())
    models = range(len(states))
    units = [_unit_norms(floats(symmetry, state)) for state in states]
    together = Together(symmetry, units, correlation, Mix.of(alpha, correlation))
    together.start(seed, progress)
    reached = together.objective()

    def step(m: int) -> float:
        nonlocal reached
        reached = together.improve(m, reached, seed, progress)
        return reached

    trace = descend(models, reached, step, lambda m: set(models) - {m}, np.random.default_rng(seed))
    # The universe has no units of its own: any element of the group, applied to all models, is as good.
    home = together.permutations[0].inverse()
    for m in models:
        together.place(m, home @ together.permutations[m])
    found = tuple(quality(together.problem(m, together.others(m))) for m in models)
    return Alignment(tuple(together.permutations), 0, (trace,), found)


def _unit_norms(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Every tensor over its norm; zeros as they are."""
    norms = {name: float(tensor.norm()) for name, tensor in state.items()}
    return {name: tensor / norms[name] if norms[name] > 0 else tensor for name, tensor in state.items()}


def _mean(tensors: Sequence[Tensor]) -> Tensor:
    return reduce(torch.add, tensors) / len(tensors)


def _units(image: Ids) -> Tensor:
    """For every place, the unit that is there."""
    return torch.from_numpy(np.argsort(image))

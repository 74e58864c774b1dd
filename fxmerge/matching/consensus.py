"""The elements of the group that bring several models into one basis."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from fxmerge.evidence import weights
from fxmerge.evidence.activations import Pair
from fxmerge.matching import signs
from fxmerge.matching.descent import rises
from fxmerge.matching.mix import Mix
from fxmerge.matching.problem import Problem, floats
from fxmerge.matching.search import Match, match
from fxmerge.matching.universe import canonical_order
from fxmerge.symmetry.group import Symmetry

ROUNDS = 5
"""How often each of three or more models is matched with the mean of all others."""

State = Mapping[str, Tensor]
Correlations = Mapping[int, Mapping[Pair, Tensor]]


def match_all(
    symmetry: Symmetry,
    states: Sequence[State],
    correlations: Correlations,
    reference: int,
    *,
    alpha: float | Mapping[int, float],
    seed: int = 0,
    progress: bool | None = None,
) -> dict[int, Match]:
    """Matches all models with one of them, which stays as it is; three or more then with each other.

    Each is matched with the mean of all others, as they are now, as long as that makes it more similar to them
    (generalized Procrustes analysis, Gower 1975, doi 10.1007/BF02291478). So all pairs of models count.

    Arguments:
        symmetry: the group, of which classes are mixed where their kind allows that.
        states: the parameters of the models.
        correlations: for some classes and all pairs of models, the first of which has the smaller number, the
            similarities of their units' activations.
        reference: the number of the model that stays.
        alpha, seed, progress: as for `match`.

    Returns:
        What is to be done with every other model, by its number.
    """
    # The order of the models must not matter.
    others = [i for i in canonical_order(states) if i != reference]

    def mean_of(targets: Mapping[int, Match | None], i: int) -> tuple[State, dict[int, Tensor]]:
        """The mean of some models, each after its match, and the correlations of another model with it."""
        moved = [states[j] if step is None else _applied(step, states[j]) for j, step in targets.items()]
        mean = {name: torch.stack([state[name] for state in moved]).mean(0) for name in states[i]}
        correlation = {}
        for n, pairs in correlations.items():
            each = [_placed(symmetry, n, pairs[j, i] if j < i else pairs[i, j].T, step) for j, step in targets.items()]
            correlation[n] = torch.stack(each).mean(0)
        return mean, correlation

    def matched(i: int, mean: State, correlation: Mapping[int, Tensor]) -> Match:
        return match(symmetry, mean, states[i], correlation, alpha=alpha, continuous=True, seed=seed, progress=progress)

    matches = {i: matched(i, *mean_of({reference: None}, i)) for i in others}
    for _ in range(ROUNDS if len(others) > 1 else 0):
        rose = False
        for i in others:
            mean, correlation = mean_of({reference: None, **{j: matches[j] for j in others if j != i}}, i)
            again = matched(i, mean, correlation)
            if rises(_objective(symmetry, mean, states[i], correlation, matches[i], alpha), again.trace[-1]):
                matches[i], rose = again, True
        if not rose:
            break
    return matches


def _applied(step: Match, state: State) -> State:
    return step.scaling.apply(step.basis.apply(step.permutation.apply(state)))


def _placed(symmetry: Symmetry, number: int, correlation: Tensor, step: Match | None) -> Tensor:
    """Correlations of a class whose first model is permuted and mixed, and has signs."""
    if step is None:
        return correlation
    placed = correlation[np.argsort(step.permutation.images[number])]
    if number in step.basis.matrices:
        placed, matrix = placed.clone(), step.basis.matrices[number].to(placed)
        for units, block in zip(symmetry.by_block(number), matrix, strict=True):
            placed[units] = block @ placed[units]
    if number in step.scaling.factors:
        placed = placed * signs.shown(symmetry, number, step.scaling.factors[number]).to(placed)[:, None]
    return placed


def _objective(
    symmetry: Symmetry,
    mean: State,
    state: State,
    correlation: Mapping[int, Tensor],
    step: Match,
    alpha: float | Mapping[int, float],
) -> float:
    """How similar a model is to others after what was found for it."""
    a, b = floats(symmetry, mean), dict(floats(symmetry, _applied(step, state)))
    placed = {n: _placed(symmetry, n, c.T, step).T for n, c in correlation.items()}
    scales = {name: weights.scale(a[name], b[name]) for name in a}
    still = symmetry.identity().images
    return Problem(symmetry, a, b, placed, Mix.of(alpha, placed), still, scales, weights.slices(symmetry)).objective()

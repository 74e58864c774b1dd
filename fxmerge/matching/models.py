"""Which units of several models belong together: alignment first, then the zip."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import combinations, combinations_with_replacement

import torch
from torch import Tensor

from fxmerge.evidence.activations import Pair, whole
from fxmerge.evidence.sampled import Matrix
from fxmerge.matching.allot import Allotment
from fxmerge.matching.room import Room
from fxmerge.matching.search import match
from fxmerge.matching.universe import Alignment, find_universe, to_reference
from fxmerge.matching.zip_search import match_zip
from fxmerge.program.on_use import OnDemand
from fxmerge.progress import release_memory
from fxmerge.recipe import DEFAULT_ALPHA, Align, Zip
from fxmerge.symmetry.flow import Flow
from fxmerge.symmetry.group import Symmetry
from fxmerge.symmetry.propagation import Axis
from fxmerge.units.unit_map import UnitMap

Correlations = Mapping[int, Mapping[Pair, Tensor]]
"""For every class that an activation shows, by pair of models, the similarity of the activations of all pairs of
units."""


@dataclass(frozen=True)
class Matching:
    """Where the units of several models go, and how that was found.

    Attributes:
        alignment: one to one, from every model's units to those of the reference.
        merged: from aligned units to merged ones; it moves nothing where units are only aligned.
        reference: the number of the model in whose units the result is.
        quality: for every model that was matched, by class, the mean similarity of its units to those of the reference,
            or of all other models.
        objectives: the objectives of the alignment, at the start and after every accepted step.
        zip_objective: the same of the zip; empty without one.
        within: by zipped class, how many merged units have several members of one model.
        correlations: for classes and models by number, the similarities of the activations of some units to those of
            the reference, before and after the alignment.
    """

    alignment: UnitMap
    merged: UnitMap
    reference: int
    quality: tuple[Mapping[str, Mapping[str, float]], ...]
    objectives: tuple[tuple[float, ...], ...]
    zip_objective: tuple[float, ...]
    within: Mapping[str, int]
    correlations: Mapping[tuple[int, int], tuple[Matrix, Matrix]] = field(default_factory=dict, repr=False)

    @property
    def units(self) -> UnitMap:
        """From every model's units to merged ones."""
        return self.alignment.then(self.merged)


def pairs_to_correlate(part: Zip | Align, models: int, reference: int | None) -> list[Pair]:
    """The pairs of models of which correlations are needed."""
    if isinstance(part, Zip):
        return list(combinations_with_replacement(range(models), 2))
    return [pair for pair in combinations(range(models), 2) if reference is None or reference in pair]


def as_they_are(symmetry: Symmetry, flow: Mapping[Axis, Flow], models: int) -> Matching:
    """Units with equal numbers belong together, as in models that were fine-tuned from one."""
    consumed = frozenset(axis for axis, kind in flow.items() if kind is Flow.CONSUMES)
    still = UnitMap.of([symmetry.identity()] * models, symmetry.names, consumed)
    return Matching(still, still, 0, (), (), (), {})


def match_models(
    symmetry: Symmetry,
    flow: Mapping[Axis, Flow],
    states: Sequence[Mapping[str, Tensor]],
    correlations: Correlations,
    part: Zip | Align,
    reference: int | None,
    *,
    one_to_one: Collection[int] = (),
    room: Room | Allotment | None = None,
    seed: int = 0,
    progress: bool | None = None,
) -> Matching:
    """Matches the units of models inside of the group.

    Arguments:
        symmetry: the group.
        flow: what every parameter axis does with its units.
        states: the parameters of the models.
        correlations: of the pairs that `pairs_to_correlate` lists; empty to match by weights.
        part: how to match.
        reference: the number of the model to whose units each of the others is matched; None matches all with each
            other.
        one_to_one: the numbers of classes of which no units of one model are merged.
        room: how many merged units there are to be of each class, or what that is chosen from; None is as many as one
            model has.
        seed: seed of the random order of the searches.
        progress: whether to show progress bars.
    """
    alpha = alpha_by_class(part, symmetry)
    least = min(alpha.values(), default=1.0) if isinstance(alpha, Mapping) else alpha
    correlations = correlations if least < 1 else {}
    aligned = _align(symmetry, states, correlations, alpha, reference, seed, progress)
    consumed = frozenset(axis for axis, kind in flow.items() if kind is Flow.CONSUMES)
    alignment = UnitMap.of(aligned.permutations, symmetry.names, consumed)
    merged = UnitMap.of([symmetry.identity()] * len(states), symmetry.names, consumed)
    if isinstance(part, Align):
        return Matching(alignment, merged, aligned.home, aligned.quality, aligned.traces, (), {})
    release_memory()
    moved = [OnDemand(own, partial(alignment.apply_tensor, state=own, model=m)) for m, own in enumerate(states)]
    correlation = {}
    for n, own in correlations.items():
        at = [torch.from_numpy(units[n]).argsort() for units in alignment.maps]
        correlation[n] = whole({(i, j): c[at[i]][:, at[j]] for (i, j), c in own.items()}, len(states))
    zipped = match_zip(
        symmetry,
        moved,
        correlation,
        flow,
        alpha=alpha,
        budget=part.budget,
        damping=part.damping,
        one_to_one=one_to_one,
        room=room,
        seed=seed,
        progress=progress,
    )
    return Matching(alignment, zipped.units, aligned.home, aligned.quality, aligned.traces, zipped.trace, zipped.within)


def alpha_by_class(part: Zip | Align, symmetry: Symmetry) -> float | dict[int, float]:
    """One alpha, or one for each class by its number.

    Example:
        >>> from fxmerge.recipe import Align
        >>> alpha_by_class(Align(alpha=0.25), Symmetry((), (), {}))
        0.25
    """
    if isinstance(part.alpha, Mapping):
        return {number: part.alpha.get(name, DEFAULT_ALPHA) for number, name in enumerate(symmetry.names)}
    return part.alpha


def _align(
    symmetry: Symmetry,
    states: Sequence[Mapping[str, Tensor]],
    correlations: Correlations,
    alpha: float | Mapping[int, float],
    reference: int | None,
    seed: int,
    progress: bool | None,
) -> Alignment:
    """All models in the units of one."""
    if reference is None:
        across = {n: {p: c for p, c in own.items() if p[0] != p[1]} for n, own in correlations.items()}
        return find_universe(symmetry, states, across, alpha=alpha, seed=seed, progress=progress)
    matches = {}
    for i in range(len(states)):
        if i != reference:
            pair = (min(reference, i), max(reference, i))
            own = {n: c[pair] if reference < i else c[pair].T for n, c in correlations.items()}
            matches[i] = match(symmetry, states[reference], states[i], own, alpha=alpha, seed=seed, progress=progress)
    return to_reference(symmetry, matches, reference)

"""Models in bases in which they agree: the stage before units are matched one to one or merged."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence, Set
from dataclasses import replace
from functools import partial
from itertools import combinations
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fxmerge.combine.batch_norm import batch_norm_statistics
from fxmerge.job import Job
from fxmerge.keeping import changed
from fxmerge.matching.balance import gauge, sums_of
from fxmerge.matching.consensus import match_all
from fxmerge.matching.models import Correlations, alpha_by_class
from fxmerge.matching.problem import floats
from fxmerge.matching.universe import canonical_order
from fxmerge.prepared import Prepared
from fxmerge.program.canonicalize import plan_folds
from fxmerge.program.double import in_double
from fxmerge.recipe import Align, Recipe, Run, Zip
from fxmerge.shared import equal_names
from fxmerge.symmetry.flow import Flow
from fxmerge.symmetry.freeze import freeze, moving_together
from fxmerge.symmetry.group import Symmetry
from fxmerge.symmetry.kinds import is_uniform
from fxmerge.units.basis import Basis
from fxmerge.units.kind import Exponents, Kind, UnitKind
from fxmerge.units.permutation import Permutation
from fxmerge.units.scaling import Scaled, Scaling

logger = logging.getLogger(__name__)

IN_ONE_BASIS = "matched by a change of basis"
"""The reason given for units that no longer move, since all models have them in one basis."""


def with_gains_moved(job: Job) -> Job:
    """The job with gains of one wherever the graph allows it, in all models alike.

    The gains of batch norms stay: their statistics may be estimated anew, and then would no longer be those that the
    gains were moved with. So do gains whose move would change a tensor that all models share, such as a frozen base.
    """
    fixed = {name for pair in batch_norm_statistics(job.program) for name in pair}
    fixed |= {name for name in equal_names(job.states) if not is_uniform(job.states[0][name])}
    with job.timed("canonicalizing"):
        states, folds = plan_folds(job.program).apply_all(job.states, fixed)
    for fold in folds:
        logger.info("moved %s", fold)
    return replace(job, states=tuple(states))


def in_one_basis(
    job: Job, recipe: Recipe, run: Run, given: Symmetry | None, reference: int | None, *, merges: bool = True
) -> Prepared:
    """The models of a job and their symmetry; if the recipe matches classes by changes of basis, in one basis.

    Arguments:
        job: the checked models and data.
        recipe: without "auto".
        run: how to run.
        given: a symmetry to use in place of an inferred one.
        reference: the number of the model in whose basis all are; None for one that does not depend on their order.
        merges: whether parameters are merged afterwards, so that running statistics are estimated anew.
    """
    part = recipe.match
    assert not isinstance(part, str)
    wider = isinstance(part, Zip) and part.width == len(job.states)  # All units of all models: nothing is matched.
    if part is None or part.continuous is not True or wider:
        return Prepared.of(job, recipe, run, given)
    group = Prepared.of(with_gains_moved(job), recipe, run, given, continuous=True)
    group = replace(group, symmetry=_usable(group, part, merges))
    group, gains = _positive(group)
    if not mixing(group.symmetry) and not _single(group.symmetry, gains):
        if given is not None:
            logger.warning(
                "The symmetry that was given has no class that a change of basis may mix, so units are only permuted. "
                "It may be of a model with gains: pass find_symmetry(canonicalize(model, args), args)."
            )
        return Prepared.of(job if merges else group.job, recipe, run, given)
    return _rebased(group, gains, part, run, canonical_order(job.states)[0] if reference is None else reference)


def mixing(symmetry: Symmetry) -> set[int]:
    """The classes whose units a change of basis may mix."""
    return {n for n in range(len(symmetry.units)) if symmetry.kind(n) > Kind.PERMUTATION}


def _single(symmetry: Symmetry, gains: Sequence[Scaling]) -> dict[int, str]:
    """The classes whose units may have signs or positive scales, and which of these."""
    has = (
        (own.signs or any(n in scaling.factors for scaling in gains), own.stretches)
        for n, own in enumerate(symmetry.kinds)
    )
    told = (" and ".join(word for word, any_ in zip(("signs", "scales"), own, strict=True) if any_) for own in has)
    return {n: word for n, word in enumerate(told) if word}


MOST_SIGNS = 3
"""How many signs of one unit are matched, beside those of gains; all of their combinations are compared."""


def _usable(group: Prepared, part: Align | Zip, merges: bool) -> Symmetry:
    """The symmetry with those signs and positive scales by which units are matched.

    Tensors that all models share stay as they are, but for zeros, which any scale leaves as they are. Running
    statistics are not scaled before a merge: where they are estimated anew, they would no longer be those that the
    layers around were scaled with. Signs that change no parameter of several dimensions are left out. Units that are
    merged many to one have none of both, as each merged unit would need one of its own.
    """
    symmetry, job = group.symmetry, group.job
    shared = {name for name in equal_names(job.states) if job.states[0][name].any()}
    running = {name for pair in batch_norm_statistics(job.program) for name in pair} if merges else set[str]()
    shapes = {axis.parameter: axis.shape for axis in symmetry.layout}

    def kept(exponents: Sequence[Exponents], names: Set[str]) -> tuple[Exponents, ...]:
        return tuple(one for one in exponents if names.isdisjoint(name for name, *_ in one))

    def usable(own: UnitKind) -> UnitKind:
        if isinstance(part, Zip):
            return replace(own, signs=(), stretches=())
        signs = [
            one for one in kept(own.signs, shared) if not all(_is_vector(shapes.get(name, ())) for name, *_ in one)
        ]
        return replace(own, signs=tuple(signs), stretches=kept(own.stretches, shared | running))

    return replace(symmetry, kinds=tuple(map(usable, symmetry.kinds)))


MOSTLY = 0.9
"""The least share of gains of one sign in a model, less that of the other sign, from which signs are told by them."""


def _positive(group: Prepared) -> tuple[Prepared, list[Scaling]]:
    """The group without the signs of gains, and for every model the signs with which its gains are positive.

    A sign that no layer reads, such as that of a channel before a BatchNorm, changes what writes a unit and the gain
    behind it. Matched by similarity, the former would count far more than the latter, and the mean of a gain and one of
    the other sign is about zero. So gains are made positive in place of it, as they are in most networks.
    """
    symmetry, job = group.symmetry, group.job
    signs_of = [_with_gains_alone(group, n) for n in range(len(symmetry.kinds))]
    found = [{one: _gain(group, n, one) for one in own} for n, own in enumerate(signs_of)]
    gains = [{one: gain for one, gain in own.items() if gain is not None} for own in found]
    scaled = replace(symmetry, kinds=tuple(UnitKind(signs=tuple(own)) for own in gains)).scaled
    signs = {
        n: [torch.stack([_signs(state, gain) for gain in own.values()]) for state in job.states]
        for n, own in enumerate(gains)
        if own
    }
    changing = [n for n, own in signs.items() if any(bool((factors < 0).any()) for factors in own)]
    kinds = tuple(
        replace(own, signs=_beside(signs_of[n], gains[n])[:MOST_SIGNS]) for n, own in enumerate(symmetry.kinds)
    )
    scalings = [Scaling(scaled, {n: signs[n][m] for n in changing}) for m in range(len(job.states))]
    return replace(group, symmetry=replace(symmetry, kinds=kinds)), scalings


def _with_gains_alone(group: Prepared, number: int) -> list[Exponents]:
    """The signs of a class, where two that layers read are one of them and their product, if none reads that."""
    signs = list(group.symmetry.kinds[number].signs)
    for i in range(len(signs)):
        for other in signs[:i]:
            both = _product(signs[i], other)
            if _gain(group, number, signs[i]) is None and _gain(group, number, both) is not None:
                signs[i] = both
                break
    return signs


def _product(one: Exponents, other: Exponents) -> Exponents:
    """The sign that is two others in one."""
    changed = {at[:3] for at in one if at[3] % 2} ^ {at[:3] for at in other if at[3] % 2}
    return tuple((*at, 1) for at in sorted(changed))


def _beside(signs: Sequence[Exponents], gains: Mapping[Exponents, Scaled]) -> tuple[Exponents, ...]:
    """All signs but those of gains. Such as change a gain, too, are put together with its own, so that it stays."""
    others = []
    for sign in (one for one in signs if one not in gains):
        for own, gain in gains.items():
            if any((name, dim) == (gain.axis.parameter, gain.axis.dim) and power % 2 for name, dim, _, power in sign):
                sign = _product(sign, own)
        others.append(sign)
    return tuple(others)


def _gain(group: Prepared, number: int, sign: Exponents) -> Scaled | None:
    """The gain that a sign changes, if no layer reads the sign, and a model has gains of mostly one sign."""
    if any(group.flow[parameter, dim] is not Flow.PRODUCES for parameter, dim, *_ in sign):
        return None
    kinds = [UnitKind()] * len(group.symmetry.units)
    kinds[number] = UnitKind(signs=(sign,))
    axes = replace(group.symmetry, kinds=tuple(kinds)).scaled[number]
    states = group.job.states
    vectors = [own for own in axes if _is_vector(own.axis.shape) and not states[0][own.axis.parameter].is_complex()]
    alike = [max(abs(float(_sums(state, own).sign().mean())) for state in states) for own in vectors]
    best = max(range(len(vectors)), key=alike.__getitem__, default=0)
    return vectors[best] if vectors and alike[best] > MOSTLY else None


def _is_vector(shape: Sequence[int]) -> bool:
    """Whether a parameter has entries along one dimension at most."""
    return sum(n != 1 for n in shape) <= 1


def _signs(state: Mapping[str, Tensor], own: Scaled) -> Tensor:
    """For every unit the sign of its entries on one axis, positive for zeros."""
    sums = _sums(state, own)
    return torch.where(sums < 0, -1.0, 1.0).double()


def _sums(state: Mapping[str, Tensor], own: Scaled) -> Tensor:
    """For every unit the sum of its entries on one axis."""
    return sums_of(in_double(state[own.axis.parameter].to("cpu")), own)


def _rebased(group: Prepared, gains: Sequence[Scaling], part: Align | Zip, run: Run, reference: int) -> Prepared:
    """Models of which all classes that a change of basis may mix are in one basis, with the blocks that these lie in.
    Units that may have signs or scales have those of the units of the reference that they match, and are in the places
    of these.

    The reference stays as it is. The classes of which units are only permuted are matched along with these, but stay as
    they were.
    """
    job, symmetry, trunk = group.job, group.symmetry, group.trunk
    numbers, single = mixing(symmetry), _single(symmetry, gains)
    based = moving_together(symmetry, numbers)
    placed = moving_together(symmetry, numbers | single.keys())
    gauges = [(own, *gauge(symmetry, state)) for own, state in zip(gains, job.states, strict=True)]
    balanced = [dict(floats(symmetry, s)) for s in job.states]
    for own, steps in zip(balanced, gauges, strict=True):
        for step in steps:
            own |= step.apply(own)
    correlations: Correlations = {}
    if job.data is not None and part.alpha != 1:
        states = [transformed(symmetry, state, steps) for steps, state in zip(gauges, job.states, strict=True)]
        pairs = list(combinations(range(len(states)), 2))
        correlations = group.similarities(trunk, states, job.names, pairs, part.similarity, numbers, until="bases")
    alpha = alpha_by_class(part, trunk) if job.data is not None else 1.0

    def rebased() -> tuple[list[Mapping[str, Tensor]], Any]:
        states, images = list[Mapping[str, Tensor]](job.states), [symmetry.identity().images] * len(job.states)
        objectives = []
        found = match_all(trunk, balanced, correlations, reference, alpha=alpha, seed=run.seed, progress=run.progress)
        for i, matched in sorted(found.items()):
            moved = symmetry.restrict(Permutation(symmetry.layout, matched.permutation.images), placed)
            change = Basis(symmetry.mixed, matched.basis.matrices)
            signs = Scaling(symmetry.scaled, matched.scaling.factors)
            back = (step.inverse() for step in gauges[reference])
            states[i] = transformed(symmetry, job.states[i], (*gauges[i], moved, change, signs, *back))
            images[i] = moved.images
            objectives.append(matched.trace)
        return states, [[[ids.tolist() for ids in own] for own in images], objectives]

    with job.timed("matching bases"):
        once = partial(job.processes.once, "bases", rebased)
        moved, (images, objectives) = job.stages.remember("bases", once, changed(job.states))
    smaller, names = freeze(symmetry, based, lambda _: IN_ONE_BASIS)
    return replace(
        group,
        job=replace(job, states=tuple(map(dict, moved))),
        symmetry=smaller,
        unfrozen=symmetry,
        still=group.still | {*names},
        bases={symmetry.names[n]: str(symmetry.kind(n)) for n in sorted(numbers)},
        scaled={symmetry.names[n]: word for n, word in single.items()},
        placed=tuple({symmetry.names[n]: np.array(own[n], np.int64) for n in placed - numbers} for own in images),
        objectives=tuple(map(tuple, objectives)),
    )


def transformed(
    symmetry: Symmetry, state: Mapping[str, Tensor], steps: Sequence[Basis | Permutation | Scaling]
) -> dict[str, Tensor]:
    """A state dict after some changes of its units, in float64 and rounded once."""
    moved: Mapping[str, Tensor] = {
        axis.parameter: in_double(state[axis.parameter].to("cpu")) for axis in symmetry.layout
    }
    for step in steps:
        moved = step.apply(moved)
    changed = dict(state)
    for axis in symmetry.layout:
        before, after = state[axis.parameter], moved[axis.parameter]
        changed |= dict.fromkeys((axis.parameter, *axis.aliases), after.to(before.device, before.dtype))
    return {name: changed[name] for name in state}

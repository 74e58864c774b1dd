"""The stages between captured models and a network: prepare, match, combine, fit, emit."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor, fx

from fxmerge.combine.average import average
from fxmerge.combine.batch_norm import batch_norm_statistics, batches_seen, by_batches_seen
from fxmerge.combine.masks import voted
from fxmerge.combine.task_vectors import combine_task_vectors
from fxmerge.emit.bake import bake
from fxmerge.evidence import weights as by_weights
from fxmerge.evidence.sampled import Matrix, Sample, SampledSimilarity, units_kept
from fxmerge.evidence.usage import Usage, usage
from fxmerge.job import Job
from fxmerge.keeping import MATCHING, changed
from fxmerge.matching.allot import Allotment
from fxmerge.matching.mergeable import read_by_unit
from fxmerge.matching.models import Correlations, Matching, as_they_are, match_models, pairs_to_correlate
from fxmerge.matching.room import Room
from fxmerge.notices import warn_of_unused, warn_without_data
from fxmerge.prepared import Prepared
from fxmerge.program.captured import Program
from fxmerge.recipe import Average, Fit, LeastSquares, Readout, Recipe, Repair, Run
from fxmerge.refitting.class_scores import score_layers
from fxmerge.refitting.course import Lesson
from fxmerge.refitting.folding import folded
from fxmerge.refitting.gather import Teacher
from fxmerge.refitting.layers import find_layers
from fxmerge.refitting.places import Confined, Places
from fxmerge.refitting.refit import Refitted, refit, with_statistics, written_out
from fxmerge.refitting.selection import last_layers
from fxmerge.shared import agreed
from fxmerge.sizing import nothing_merged, resized
from fxmerge.symmetry.propagate import propagate
from fxmerge.symmetry.propagation import Propagation
from fxmerge.symmetry.shown import classes_along, units_along
from fxmerge.units.unit_map import UnitMap

logger = logging.getLogger(__name__)


def of_scores(recipe: Recipe) -> bool:
    """Whether a fit is to take outputs as scores of classes."""
    return isinstance(recipe.fit, LeastSquares) and recipe.fit.outputs == "logits"


def check_scores(job: Job) -> None:
    """The outputs of a model must be such as can be scores of classes.

    Raises:
        OptionError: if they are not.
    """
    program = written_out(job.program)
    layers = find_layers(program)
    score_layers(program, layers, last_layers(program, layers))


def match(
    group: Prepared,
    recipe: Recipe,
    run: Run,
    states: Sequence[Mapping[str, Tensor]],
    names: Sequence[str],
    reference: int | None,
    room: Room | Allotment | None = None,
) -> Matching:
    """Measures how alike units are, and matches them; without a part of the recipe for that, units are matched by
    their numbers. A zip goes into a room."""
    job, part = group.job, recipe.match
    assert not isinstance(part, str)
    if part is None:
        return as_they_are(group.symmetry, group.flow, len(states))
    correlations: Correlations = {}
    if job.data is not None and part.alpha != 1:
        pairs = pairs_to_correlate(part, len(states), reference)
        correlations = group.similarities(
            group.trunk, states, names, pairs, part.similarity, checks_statistics=True, until="matching"
        )
    part = part if job.data is not None else replace(part, alpha=1.0)
    search = partial(
        match_models,
        group.trunk,
        group.flow,
        states,
        correlations,
        part,
        reference,
        one_to_one=group.one_to_one,
        room=room,
        seed=run.seed,
        progress=run.progress,
    )

    def matched() -> Matching:
        found = search()
        return replace(found, correlations=_correlated(group, found, correlations))

    with job.timed("matching"):
        found = job.stages.remember("matching", partial(job.processes.once, "matching", matched), MATCHING)
    layout = group.symmetry.layout
    return replace(
        found, alignment=replace(found.alignment, layout=layout), merged=replace(found.merged, layout=layout)
    )


def _correlated(
    group: Prepared, matching: Matching, correlations: Correlations
) -> dict[tuple[int, int], tuple[Matrix, Matrix]]:
    """The similarities of activations that are kept, before and after the alignment."""
    home, found = matching.reference, {}
    for (n, m), sample in _samples(group, matching).items():
        if n in correlations:
            pair = correlations[n][min(home, m), max(home, m)]
            found[n, m] = sample.of_correlations(pair if home < m else pair.T)
    return found


def _samples(group: Prepared, matching: Matching) -> dict[tuple[int, int], Sample]:
    """For every class that was matched unit by unit, and every model but the reference, the units that are kept."""
    symmetry, maps, home = group.symmetry, matching.alignment.maps, matching.reference
    numbers = [n for n in symmetry.choices if symmetry.names[n] not in group.bases]
    others = [m for m in range(len(maps)) if m != home]
    count = units_kept(len(numbers), len(others))
    return {(n, m): Sample.of(maps[home][n], maps[m][n], count) for n in numbers for m in others}


def sampled(
    group: Prepared,
    matching: Matching,
    states: Sequence[Mapping[str, Tensor]],
    aligned: Sequence[Mapping[str, Tensor]],
    names: Sequence[str],
) -> tuple[SampledSimilarity, ...]:
    """How alike some units of every class are before and after the alignment: in their activations where these were
    compared, else in their weights. Nothing if units were not matched."""
    if not matching.quality:
        return ()
    slices, home, found = by_weights.slices(group.trunk), matching.reference, []
    with group.job.timed("matching"):
        for (n, m), sample in _samples(group, matching).items():
            known = matching.correlations.get((n, m))
            space = "weights" if known is None else "activations"
            if known is None and slices[n]:
                known = sample.of_weights(slices[n], aligned[home], states[m], aligned[m])
            if known is not None:
                size, name = group.symmetry.units[n].size, group.symmetry.names[n]
                found.append(SampledSimilarity(name, names[home], names[m], space, size, sample.units, *known))
    return tuple(found)


def usage_of(group: Prepared, units: UnitMap, states: Sequence[Mapping[str, Tensor]]) -> Usage:
    """How often units were chosen on the data, of classes of other widths. Those that never were are warned of."""
    job = group.job
    if job.data is None or not units.resized:
        return {}
    with job.timed("combining"):
        counts = usage(group.propagation, group.symmetry, units.resized, states, job.data, job.processes)
        warn_of_unused({group.symmetry.names[n]: own for n, own in counts.items()})
    return counts


def combine(
    group: Prepared,
    recipe: Recipe,
    units: UnitMap,
    states: Sequence[Mapping[str, Tensor]],
    weights: Sequence[float],
    order: Sequence[int],
) -> dict[str, Tensor]:
    """One state dict from those of aligned models, which come in an order; a base comes first."""
    job, part = group.job, recipe.combine
    statistics = batch_norm_statistics(job.program)
    unknown = job.data is None and bool(statistics) and recipe.match is not None and not nothing_merged(group, units)
    if unknown:
        warn_without_data(states, statistics)
    with job.timed("combining"):
        if isinstance(part, Average):
            special = {n: [float(i == number) for i in order] for n, number in job.owner.items()}
            if recipe.match is None and job.data is None:
                special = by_batches_seen(statistics, states, weights) | special
            state = voted(average(units, states, weights, statistics, special), job.masks)
            if unknown:

                def again(name: str, tensors: Sequence[Mapping[str, Tensor]]) -> Tensor:
                    return units.merge_tensor(name, tensors, special.get(name, weights))

                into = resized(group, job.program, group.propagation, units, state)
                state = folded(job.program, states, into, state, units, again)
            state |= _counted(job, statistics, states, order)
            return _rederived(job, state, states, weights)
        assert not isinstance(part, str)
        base, *tuned = states
        state = combine_task_vectors(part, base, tuned, weights, statistics)
        masks = [{name: own[name] for name in job.masks} for own in tuned]
        state |= average(UnitMap.still(len(tuned)), masks, weights, ())
        state |= _counted(job, statistics, tuned, ())
        return _rederived(job, voted(state, job.masks), tuned, weights)


def _counted(
    job: Job, statistics: Sequence[tuple[str, str]], states: Sequence[Mapping[str, Tensor]], order: Sequence[int]
) -> dict[str, Tensor]:
    """How many batches the statistics of a merged network are of."""
    owner = {name: order.index(number) for name, number in job.owner.items()}
    return batches_seen(statistics, states, owner, job.program.aliases)


def _rederived(
    job: Job, state: Mapping[str, Tensor], states: Sequence[Mapping[str, Tensor]], weights: Sequence[float]
) -> dict[str, Tensor]:
    """A state dict with derived buffers that fit its parameters."""
    return job.rederived(state, states[max(range(len(states)), key=weights.__getitem__)])


def fit(
    group: Prepared,
    recipe: Recipe,
    run: Run,
    into: Program,
    units: UnitMap,
    states: Sequence[Mapping[str, Tensor]],
    start: Mapping[str, Tensor],
    weights: Sequence[float],
    order: Sequence[int],
) -> Refitted:
    """Fits the layers of the merged network, which is of the program `into`, to what the models compute. Errors are by
    the numbers of the job."""
    job, part = group.job, recipe.fit
    assert isinstance(part, Fit)
    with job.timed("fitting"):
        program = written_out(group.propagation.program)
        same = program is group.propagation.program
        plain = not units.moving and not group.projections
        found = group.propagation if same or plain else propagate(program)
        into = into if same and units.resized else resized(group, program, found, units, start)
        refitted = refit(
            into,
            states,
            start,
            _lessons(job, weights, part.own, order),
            parents_program=program,
            teachers=None if plain else _teachers(group, found, units, states, order),
            only_last=isinstance(part, Readout),
            repair=isinstance(part, Repair),
            scores=of_scores(recipe),
            products=isinstance(part, LeastSquares) and part.products,
            shared=group.shared,
            agreed=_agreed(group, units, states),
            owner={name: order.index(number) for name, number in job.owner.items()},
            mixed=read_by_unit(group.symmetry, group.flow),
            max_memory=run.memory,
            seed=run.seed,
            progress=run.progress,
            stages=job.stages,
            processes=job.processes,
        )
        state = _rederived(job, refitted.state, states, [weights[i] for i in order])
    errors = {None if j is None else order[j]: error for j, error in refitted.errors.items()}
    return replace(refitted, state=state, errors=errors)


def _lessons(job: Job, weights: Sequence[float], own: float, order: Sequence[int]) -> Iterable[Lesson]:
    """Every batch, and how much each model counts in what is to be learnt on it."""
    assert job.data is not None
    for owner, call in job.data.owned("reading batches"):
        shares = [w if owner is None else own * (i == owner) + (1 - own) * w for i, w in enumerate(weights)]
        of = None if owner is None else order.index(owner)
        yield Lesson(call, tuple(shares[i] for i in order), 1.0 if owner is None else weights[owner], of)


def _teachers(
    group: Prepared,
    found: Propagation,
    units: UnitMap,
    states: Sequence[Mapping[str, Tensor]],
    order: Sequence[int],
) -> list[Teacher]:
    """The models as the layers of a network with merged units learn from them."""
    classes, along = classes_along(found, group.symmetry), units_along(found, group.symmetry)
    teachers = []
    for m, state in enumerate(states):
        confined, given = None, state
        if group.projections:
            own = group.projections[order[m]]
            confined = Confined(classes_along(found, own.symmetry), units_along(found, own.symmetry), own)
            given = own.project(state, produced_only=True)
        teachers.append(Teacher(*units.produce(given, m), Places(classes, along, units, m, confined)))
    return teachers


def _agreed(group: Prepared, units: UnitMap, states: Sequence[Mapping[str, Tensor]]) -> frozenset[str]:
    """The names of the tensors that are equal in all models, in units that match; BatchNorm alone needs them."""
    if not batch_norm_statistics(group.job.program):
        return group.shared
    return group.shared | agreed(units, states).difference(group.job.owner)


def calibrated(
    group: Prepared,
    run: Run,
    program: Program,
    units: UnitMap,
    states: Sequence[Mapping[str, Tensor]],
    state: Mapping[str, Tensor],
) -> Mapping[str, Tensor]:
    """Parameters of a program with BatchNorm statistics of the data; as they are if there are none, and where all
    models, which come aligned, have the same."""
    job = group.job
    if job.data is None:
        return state
    with job.timed("calibration"):
        lessons = (Lesson(call, (), 1.0, owner) for owner, call in job.data.owned("BatchNorm statistics"))
        same = _agreed(group, units, states)
        estimate = partial(
            with_statistics,
            program,
            state,
            lessons,
            agreed=same,
            owner=job.owner,
            max_memory=run.memory,
            processes=job.processes,
        )
        (found,), _ = job.stages.remember("calibration", lambda: ([estimate()], None), changed([state]))
        return found


def emit(group: Prepared, program: Program, state: Mapping[str, Tensor]) -> fx.GraphModule:
    """A GraphModule of a program with these parameters."""
    with group.job.timed("emitting"):
        return bake(program, state, group.job.states)


def renumbered(quality: Sequence[Mapping[str, Mapping[str, float]]], order: Collection[int]) -> tuple[Any, ...]:
    """What is told of every matched model as plain data, in another order if one is given; nothing where none was."""
    plain = [{name: dict(own) for name, own in each.items()} for each in quality]
    return tuple(plain[i] for i in order) if order and plain else tuple(plain)

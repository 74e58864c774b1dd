"""The stages between captured models and a network: prepare, match, combine, fit, emit."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from fxmerge import validate
from fxmerge.combine.average import average
from fxmerge.combine.batch_norm import batch_norm_statistics, by_batches_seen, recalibrate
from fxmerge.combine.masks import masked, pruned, voted
from fxmerge.combine.task_vectors import combine_task_vectors
from fxmerge.emit.bake import bake
from fxmerge.emit.config import config_for
from fxmerge.emit.resize import CannotResizeError, resize, rewritten, write
from fxmerge.errors import OptionError
from fxmerge.evidence.activations import similarities
from fxmerge.job import Job
from fxmerge.matching.models import Matching, as_they_are, match_models, pairs_to_correlate
from fxmerge.matching.room import Room, alike, may_change, wanted
from fxmerge.matching.zip_search import zipped_classes
from fxmerge.notices import warn_of_outputs, warn_without_data
from fxmerge.program.capture import capture_ops
from fxmerge.program.captured import Program
from fxmerge.program.run import Runner
from fxmerge.recipe import Average, Fit, Readout, Recipe, Repair, Run, Zip
from fxmerge.refitting.course import Lesson
from fxmerge.refitting.folding import folded
from fxmerge.refitting.gather import Teacher
from fxmerge.refitting.outputs import standardized
from fxmerge.refitting.places import Places
from fxmerge.refitting.refit import Refitted, refit, written_out
from fxmerge.reporting import Report, classes_of
from fxmerge.shared import staying, without_shared
from fxmerge.symmetry.flow import Flow, flows, never_merged
from fxmerge.symmetry.group import Symmetry
from fxmerge.symmetry.propagate import Axis, Propagation, propagate
from fxmerge.symmetry.shown import classes_along, units_along
from fxmerge.units.unit_map import UnitMap

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Prepared:
    """The symmetry of the models of a job.

    Attributes:
        job: the checked models and data.
        propagation: what the label calculus found.
        whole: all classes of the symmetry.
        symmetry: the symmetry without classes whose units are the same in all models.
        still: the names of these classes.
        flow: what every parameter axis does with its units.
    """

    job: Job
    propagation: Propagation
    whole: Symmetry
    symmetry: Symmetry
    still: frozenset[str]
    flow: Mapping[Axis, Flow]

    @staticmethod
    def of(job: Job, recipe: Recipe, run: Run, given: Symmetry | None) -> Prepared:
        """The symmetry that is given or else inferred; and the job with states that are ready to be matched."""
        propagation, whole = job.symmetry(given, recipe.free, verify=run.verify)
        assert not isinstance(recipe.match, str)
        flow = flows(propagation)
        if recipe.match is not None:
            validate.check_class_names(recipe.match.alpha, whole)
            warn_of_outputs(propagation, whole, flow)
        if recipe.targets == "standardized" and job.data is not None:
            with job.timed("standardizing"):
                job = replace(job, states=standardized(job.program, job.states, job.data))
        cut = masked(job.program, job.masks)
        symmetry, still = without_shared(whole, flow, job.states, cut.values(), job.owner)
        return Prepared(replace(job, states=pruned(job.states, cut)), propagation, whole, symmetry, still, flow)

    @cached_property
    def shared(self) -> frozenset[str]:
        """The names of the tensors that are equal in all models, and on which no unit moves."""
        return staying(self.symmetry, self.job.states).difference(self.job.owner)

    @cached_property
    def trunk(self) -> Symmetry:
        """The symmetry as it is on what the models share: by this, units are matched."""
        layout = tuple(axis for axis in self.symmetry.layout if axis.parameter not in self.job.owner)
        return replace(self.symmetry, layout=layout)

    @cached_property
    def one_to_one(self) -> frozenset[int]:
        """The classes of which no two units of a model are merged.

        These are the classes whose units stay apart. With heads apart they are also those that no layer of the trunk
        has, and those whose units a head writes: so each head stays as it is but for the order of its units.
        """
        apart, owner = never_merged(self.propagation), self.job.owner
        numbers = set(range(len(self.symmetry.units))) if owner else set()
        numbers -= {number for axis in self.trunk.layout for number, _ in axis.roles}
        for axis in self.symmetry.layout:
            place = axis.parameter, axis.dim
            if place in apart or (axis.parameter in owner and self.flow[place] is not Flow.CONSUMES):
                numbers |= {number for number, _ in axis.roles}
        return frozenset(numbers)

    @cached_property
    def ops(self) -> fx.GraphModule:
        """The model as a graph of ops, in which sizes can be changed."""
        job = self.job
        return capture_ops(job.model, *job.example, varying=set(job.varying))

    def images(self, own: Sequence[np.ndarray[Any, Any]]) -> dict[str, list[int]]:
        """For every class by name, the merged unit that each unit of one model goes into."""
        moved = iter(own)
        return {
            name: (np.arange(c.size) if name in self.still else next(moved)).tolist()
            for name, c in zip(self.whole.names, self.whole.units, strict=True)
        }

    def report(self, result: fx.GraphModule) -> Report:
        """What is told of any result."""
        first, after = self.job.states[0], result.state_dict()
        return Report(
            models=len(self.job.states),
            shared=tuple(n for n, own in first.items() if n in self.shared and torch.equal(own, after[n])),
            classes=classes_of(self.symmetry),
            demoted=self.symmetry.demoted,
            unknown_ops=dict(self.symmetry.unknown),
            verification_error=self.symmetry.error,
            route="torch.export" if self.job.heads else self.job.program.route,
            seconds=dict(self.job.seconds),
        )


def match(
    group: Prepared,
    recipe: Recipe,
    run: Run,
    states: Sequence[Mapping[str, Tensor]],
    names: Sequence[str],
    reference: int | None,
) -> Matching:
    """Measures how alike units are, and matches them; without a part of the recipe for that, units are matched by
    their numbers."""
    job, part = group.job, recipe.match
    assert not isinstance(part, str)
    if part is None:
        return as_they_are(group.symmetry, group.flow, len(states))
    room = _room(group, part, run, len(states)) if isinstance(part, Zip) and part.width != 1 else None
    correlations = {}
    if job.data is not None and part.alpha != 1:
        pairs = pairs_to_correlate(part, len(states), reference)
        with job.timed("activations"):
            correlations = similarities(
                group.propagation, group.trunk, states, job.data, names, pairs, part.similarity, job.owner
            )
    part = part if job.data is not None else replace(part, alpha=1.0)
    with job.timed("matching"):
        found = match_models(
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
    layout = group.symmetry.layout
    return replace(
        found, alignment=replace(found.alignment, layout=layout), merged=replace(found.merged, layout=layout)
    )


def _room(group: Prepared, part: Zip, run: Run, models: int) -> Room:
    """How many merged units there are to be of every class: as the recipe says, where the graph allows it.

    Raises:
        OptionError: if the recipe names a class for which it does not.
    """
    symmetry = group.symmetry
    if group.job.program.follows_path:
        raise OptionError(
            "Another width than 1 needs a model that torch.export can capture, and this one it cannot: "
            f"{group.job.program.why_fixed}. Leave the width at 1."
        )
    classes = zipped_classes(group.trunk, group.flow, group.one_to_one)
    widths = wanted(part, group.trunk, models, *may_change(symmetry, group.flow, classes))

    def leave(numbers: Collection[int], why: str) -> None:
        names = ", ".join(repr(symmetry.names[n]) for n in sorted(numbers))
        if isinstance(part.width, Mapping):
            raise OptionError(f"Zip.width cannot be had for {names}: {why} Leave these at 1.")
        logger.info("as many merged units as units: %s, since %s", names, why)
        for n in numbers:
            del widths[n]

    with group.job.timed("resizing"):
        while widths:
            try:
                _try(group, Room.of(symmetry, widths))
                break
            except CannotResizeError as error:
                leave(_blamed(symmetry, widths, error), str(error))
        counted = _counted(group, sorted(widths)) if run.verify else []
        if counted:
            leave(counted, "the network is another one when equal units become one, as if an op counted them.")
    return Room.of(symmetry, widths)


def _blamed(symmetry: Symmetry, numbers: Collection[int], error: CannotResizeError) -> list[int]:
    """The classes of some that an error is about; all if it is about none."""
    found = [n for n in numbers if not error.classes.isdisjoint(shown for shown, _ in symmetry.views[n])]
    return found or list(numbers)


def _counted(group: Prepared, numbers: Sequence[int]) -> list[int]:
    """The classes of some of which the network is not the same when equal units become one: what counts them is no
    layer that reads them, as a softmax along them."""
    symmetry, job = group.symmetry, group.job
    if not numbers:
        return []
    consumed = frozenset(axis for axis, kind in group.flow.items() if kind is Flow.CONSUMES)
    units = alike(symmetry, numbers, consumed)
    small = units.apply(_in_double(job.states[0]))
    try:
        into = _resized(group, group.propagation.program, group.propagation, units, small)
    except CannotResizeError as error:  # In pairs they cannot be looked at.
        return _counted(group, [n for n in numbers if n not in _blamed(symmetry, numbers, error)])
    call = pytree.tree_map(lambda v: _in_double({"": v})[""] if isinstance(v, Tensor) else v, job.example)
    expected = Runner(group.propagation.program).outputs(units.spread(small), *call)
    if validate.agree(expected, Runner(into).outputs(small, *call)):
        return []
    half = len(numbers) // 2
    return list(numbers) if not half else [*_counted(group, numbers[:half]), *_counted(group, numbers[half:])]


def _in_double(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors in which rounding does not hide that networks differ."""
    return {n: t.double() if t.is_floating_point() else t for n, t in state.items()}


def _try(group: Prepared, room: Room) -> None:
    """Looks whether the graph can be given the sizes that merged units need."""
    symmetry = group.symmetry
    maps = tuple(
        np.minimum(np.searchsorted(k, np.arange(c.size)), len(k) - 1)
        for k, c in zip(room.kept, symmetry.units, strict=True)
    )
    units = UnitMap(symmetry.names, symmetry.layout, frozenset(), (maps,), room.widths, room.kept)
    state = {n: t.new_empty(units.shape(n, t.shape)) for n, t in group.job.states[0].items()}
    resize(group.propagation, symmetry, units, state, group.job.example)
    rewritten(group.ops, group.job.program, group.propagation, symmetry, units)


def sized(group: Prepared, units: UnitMap, state: Mapping[str, Tensor]) -> Program:
    """The program with the sizes of merged units; it is as it was if these are those of a model."""
    job = group.job
    if not units.resized:
        return job.program
    with job.timed("resizing"):
        ops = group.ops
        for node, changes in rewritten(ops, job.program, group.propagation, group.symmetry, units).items():
            write(node, changes)
        ops.recompile()
        resized = _resized(group, job.program, group.propagation, units, state)
        program = replace(resized, module=ops, route="torch.export")
        validate.check_emitted(bake(program, state), program, state, job.example)
        return program


def _resized(
    group: Prepared, program: Program, found: Propagation, units: UnitMap, state: Mapping[str, Tensor]
) -> Program:
    """A labelled program with the sizes of merged units; the same one if these are those of a model."""
    if not units.resized:
        return program
    return replace(program, aten=resize(found, group.symmetry, units, state, group.job.example))


def nothing_merged(group: Prepared, units: UnitMap) -> bool:
    """Whether every unit of every model is there by itself, and all parameters of the trunk give units: then the result
    computes what each model does, and there is nothing to fit or to estimate."""
    if not units.widths or any(sum(len(own[n]) for own in units.maps) != w for n, w in enumerate(units.widths)):
        return False
    gives = {a.parameter for a in units.layout if group.flow[a.parameter, a.dim] is not Flow.CONSUMES}
    return gives.issuperset(group.job.program.parameters.keys() - group.job.owner.keys() - group.shared)


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
                again = partial(average, units, weights=weights, statistics=(), special=special)
                into = _resized(group, job.program, group.propagation, units, state)
                state = folded(job.program, states, into, state, units, again)
            return _rederived(job, state, states, weights)
        assert not isinstance(part, str)
        base, *tuned = states
        state = combine_task_vectors(part, base, tuned, weights, statistics)
        masks = [{name: own[name] for name in job.masks} for own in tuned]
        state |= average(UnitMap.still(len(tuned)), masks, weights, ())
        return _rederived(job, voted(state, job.masks), tuned, weights)


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
        found = group.propagation if same or not units.moving else propagate(program)
        into = into if same and units.resized else _resized(group, program, found, units, start)
        refitted = refit(
            into,
            states,
            start,
            _lessons(job, weights, part.own, order),
            parents_program=program,
            teachers=None if not units.moving else _teachers(found, group.symmetry, units, states),
            only_last=isinstance(part, Readout),
            repair=isinstance(part, Repair),
            shared=group.shared,
            owner={name: order.index(number) for name, number in job.owner.items()},
            max_memory=run.memory,
            seed=run.seed,
            progress=run.progress,
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
    found: Propagation, symmetry: Symmetry, units: UnitMap, states: Sequence[Mapping[str, Tensor]]
) -> list[Teacher]:
    """The models as the layers of a network with merged units learn from them."""
    classes, along = classes_along(found, symmetry), units_along(found, symmetry)
    return [Teacher(*units.produce(state, m), Places(classes, along, units, m)) for m, state in enumerate(states)]


def emit(group: Prepared, program: Program, state: Mapping[str, Tensor], *, calibrate: bool) -> fx.GraphModule:
    """A GraphModule of a program with these parameters, its BatchNorm statistics re-estimated."""
    job = group.job
    with job.timed("emitting"):
        module = bake(program, state)
    if job.data is not None and calibrate:
        with job.timed("calibration"):
            recalibrate(module, program, job.data, group.shared, job.owner)
    return module


def configured(group: Prepared, units: UnitMap, result: fx.GraphModule) -> dict[str, int] | None:
    """What to change in the configuration of the model's class for the sizes of the result."""
    if not units.resized or group.job.heads:
        return None
    widths = dict.fromkeys((len(units.maps[0][n]), units.widths[n]) for n in sorted(units.resized))
    return config_for(group.job.model, {name: tuple(t.shape) for name, t in result.state_dict().items()}, widths)


def renumbered(quality: Sequence[Mapping[str, Mapping[str, float]]], order: Collection[int]) -> tuple[Any, ...]:
    """What is told of every matched model as plain data, in another order if one is given."""
    plain = [{name: dict(own) for name, own in each.items()} for each in quality]
    return tuple(plain[i] for i in order) if order else tuple(plain)

"""Refitting a merged network layer by layer, in closed form, on what its own earlier layers give."""

from __future__ import annotations

import logging
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from torch import Tensor, fx
from tqdm.auto import tqdm

from fxmerge.combine.batch_norm import alike, statistics_nodes
from fxmerge.processes import ALONE, Processes
from fxmerge.program.captured import Program
from fxmerge.program.forms import form_of
from fxmerge.program.plain_norms import plain_norms
from fxmerge.progress import Ticker
from fxmerge.refitting.ahead import AheadFit
from fxmerge.refitting.boundaries import Boundaries
from fxmerge.refitting.course import Course, Lane, Lesson
from fxmerge.refitting.gather import LayerFit, Statistics, Teacher, Values
from fxmerge.refitting.layers import Layer
from fxmerge.refitting.mixed import MixedFit
from fxmerge.refitting.output_error import OutputDistance, OutputErrors, asked, comparable, mean_errors
from fxmerge.refitting.repair import Repair
from fxmerge.refitting.ridge import fit as ridge_fits
from fxmerge.refitting.selection import select
from fxmerge.refitting.staging import OUTCOME, LayerReport, Outcome, plan_stages
from fxmerge.refitting.tied import fit_tied
from fxmerge.stages import NO_STAGES, Stages
from fxmerge.symmetry import rules

logger = logging.getLogger(__name__)

ROUNDS = 3
"""How often a layer is fitted whose inputs depend on itself, as in a recurrent network."""


@dataclass(frozen=True)
class Refitted:
    """What a refit gives.

    Attributes:
        state: the new state dict.
        layers: for every refitted layer by name: `before` and `after`, the squared error relative to the square of the
            targets; `held_out`, the same on rows apart from those of the fit; `ridge`, relative to the mean square of
            a feature; `rank`, how many directions of the features it leaves free, of `features`; `rows`, the number
            of equations; `seconds`. Where scores of classes, or scores that a softmax reads, were fitted, these
            numbers are of the squared-error fit, and there are `cross_entropy_before` and `cross_entropy_after`, in
            nats on rows held out, of the squared-error fit and of the result; `entropy`, below which none can be; and
            `cross_entropy_ridge`, infinite where the squared-error fit was kept.
        left: for parameters that some op multiplies with data and that were left as they were, the reason; and for
            layers that write scores of classes and were fitted to squared errors only.
        errors: how much the outputs of the merged network, at None, and those of each parent by number miss of the
            variance of what is learnt; empty where that was not measured.
        held_out: whether the error of the merged network is on rows that its last layers were not fitted to.
    """

    state: dict[str, Tensor]
    layers: LayerReport
    left: Mapping[str, str]
    errors: OutputErrors
    held_out: bool


def refit(
    program: Program,
    parents: Sequence[Mapping[str, Tensor]],
    start: Mapping[str, Tensor],
    lessons: Iterable[Lesson],
    *,
    parents_program: Program | None = None,
    teachers: Sequence[Teacher] | None = None,
    only_last: bool = False,
    repair: bool = False,
    scores: bool = False,
    products: bool = False,
    shared: Collection[str] = (),
    agreed: Collection[str] = (),
    owner: Mapping[str, int] | None = None,
    mixed: Collection[str] = (),
    max_memory: float = math.inf,
    seed: int = 0,
    progress: bool | None = None,
    stages: Stages = NO_STAGES,
    processes: Processes = ALONE,
) -> Refitted:
    """Fits the layers of a merged network, in graph order, to what its parents compute there.

    Each layer is the ridge regression, around the coefficients that it starts with, from the features that the already
    refitted network has at the layer's input to the mean of the parents' outputs of the layer. Statistics of
    BatchNorm become those of the refitted network's activations as soon as these are final.

    Arguments:
        program: the captured program.
        parents: their state dicts, in units that match.
        start: the state dict to refit, such as the parents' average.
        lessons: the data.
        parents_program: the program of the parents, if it is of other sizes; it has the same nodes by name.
        teachers: what the parents' layers give to learn from, where units are merged; by default the parents' own.
        only_last: whether to refit only layers that no other layer comes after.
        repair: whether to shift and scale the outputs of the layers, in place of fitting them.
        scores: whether outputs are scores of classes: layers that write these are then fitted to the mean of the
            parents' probabilities, after the squared-error fit.
        products: whether layers whose outputs are multiplied with each other, as queries and keys are, are fitted
            together after their own fits, to what the next layer gives.
        shared: names of tensors that are equal in all parents and on which no unit moves: layers stay that are mostly
            made of these.
        agreed: names of tensors that are equal in all parents: BatchNorm statistics stay of activations that depend on
            these alone.
        owner: for parameters that are of one parent alone, its number. Layers of these learn from that parent alone, on
            all data or, where parents have data of their own, on its.
        mixed: names of parameters that may be fitted to a sum of what they give, as those of experts are.
        max_memory: GiB of activations to keep in memory between stages; the rest goes to a temporary folder.
        seed: seed of the choice of rows.
        progress: whether to show a progress bar; None shows it on a terminal.
        stages: keeps what is fitted, one stage after the other.
        processes: those that share the data and the fits; all get the result.

    Returns:
        The new state dict, and what is told of it.

    Raises:
        NonFiniteError: if an activation is NaN or infinite.
    """
    program = written_out(program)
    resized = parents_program is not None and parents_program is not program
    teachers = teachers or [Teacher(own, {}) for own in parents]
    places = [teacher.places for teacher in teachers if teacher.places is not None]
    owner = owner or {}
    selection = select(
        program,
        places,
        shared,
        () if owner else mixed,
        only_last=only_last,
        repair=repair,
        scores=scores,
        owned=bool(owner),
        resized=resized,
    )
    chosen, last, tied = selection.chosen, selection.last, selection.tied
    towards_sums = [] if repair else [layer for layer in chosen if layer not in last]
    only_parent = {layer: _only_parent(layer, owner) for layer in chosen}
    by_layers = not repair and not owner and comparable(program, last, chosen, teachers)
    state, normal = dict(start), _statistics(program, agreed)
    left = {name: why for name, why in selection.left.items() if not any(name in names for names in normal)}
    end = not (repair or by_layers or owner)
    plan = plan_stages(
        program,
        chosen,
        normal,
        towards_sums,
        places,
        selection.of_scores,
        selection.mixed,
        all_shown=resized,
        products=products,
        to_the_end=end,
    )
    lanes = [Lane(program, own, parents_program) for own in parents]
    layers_told, found_errors = LayerReport(), list[OutputErrors]()
    if tied:
        lessons = list(lessons)
        first = partial(fit_tied, program, tied, state, lanes, teachers, lessons, seed, processes)
        outcome = stages.remember("fitting", first, OUTCOME)
        state, layers_told = {**state, **outcome.tensors}, dict(outcome.layers)
    merged = Lane(program, state)
    disable = None if progress is None else not progress
    with Boundaries(max_memory * 2**30) as kept:
        course = Course(kept, merged, lanes, lessons, plan, all_parents=bool(owner), processes=processes)
        everywhere = [j for j in range(len(parents)) if all(j in asked(shares) for shares in course.alike(None))]
        bar = tqdm(total=len(plan) * len(course.there), desc="refitting", leave=False, disable=disable)
        ticker, due = Ticker(logger, "refitting: layer %d of %d"), sum(len(stage.layers) for stage in plan)

        def settled(number: int) -> Outcome:
            """Fits what is due in a stage."""
            stage, own, told = plan[number], dict(state), LayerReport()
            statistics = [Statistics(names, nodes) for names, nodes in stage.statistics.items()]
            distance = OutputDistance(program, (None, *everywhere)) if end and number == len(plan) - 1 else None
            errors: list[OutputErrors] = []
            for again in reversed(range(ROUNDS if stage.circular else 1)):
                fits: Sequence[LayerFit | Repair] = [
                    Repair(layer, own, teachers)
                    if repair
                    else LayerFit(
                        layer,
                        own,
                        teachers,
                        stage.summands,
                        stage.shown,
                        course.alike(only_parent[layer]),
                        seed,
                        everywhere if by_layers and layer in last else (),
                        scores=layer in selection.of_scores and not again,
                    )
                    for layer in stage.layers
                ]
                alike = course.alike(None)
                sums = [MixedFit(program, m, teachers, alike, summed=final) for m, final in stage.mixed.items()]
                ahead = None
                if stage.ahead is not None:
                    owned = only_parent[stage.ahead.layers[0]]
                    alike_there = course.alike(owned)
                    ahead = AheadFit(program, stage.ahead, own, teachers, stage.shown, alike_there, seed)
                for batch, values, taught in course.batches(number, onward=not again):
                    if ahead is not None and (counted := course.lesson(batch, owned)) is not None:
                        ahead.add(values, {j: given for j, given in taught.items() if counted.shares[j] > 0}, counted)
                    if sums and (counted := course.lesson(batch, None)) is not None:
                        theirs = {j: given for j, given in taught.items() if counted.shares[j] > 0}
                        for mixture in sums:
                            mixture.add(values, theirs, counted)
                    for fit in fits:
                        counted = course.lesson(batch, only_parent[fit.layer])
                        if counted is not None:
                            theirs = {j: given for j, given in taught.items() if counted.shares[j] > 0}
                            fit.add(values, theirs, counted)
                    _add(() if again else statistics, course, batch, values, owner)
                    if distance:
                        counted = course.lesson(batch, None)
                        assert counted is not None
                        distance.add(values, taught, counted)
                    del values, taught
                    bar.update(not again)
                    ticker.tick(min(len(layers_told) + 1, due), due)
                told |= _settled(fits, own, processes)
                told |= {mixture.mixed.parameter: mixture.settle(own, processes) for mixture in sums}
                for name, more in (ahead.settle(own) if ahead is not None else {}).items():
                    told[name] |= more
                if again:
                    merged.use(own)
            for one in statistics:
                one.total(processes)
                one.settle(own)
            if distance:
                distance.total(processes)
                errors.append({j: distance.error(j) for j in (None, *everywhere)})
            elif by_layers or owner:
                errors += [fit.output_errors() for fit in fits if isinstance(fit, LayerFit) and fit.layer in last]
            return Outcome({n: t for n, t in own.items() if t is not state[n]}, told, tuple(errors))

        for number in range(len(plan)):
            outcome = stages.remember("fitting", partial(settled, number), OUTCOME)
            state |= outcome.tensors
            layers_told |= outcome.layers
            found_errors += outcome.errors
            merged.use(state)
            bar.update((number + 1) * len(course.there) - bar.n)
        bar.close()
    errors = mean_errors(found_errors)
    if all(map(math.isnan, errors.values())):  # No output varies.
        errors = {}
    # A tensor that has several names is fitted under one of them.
    state = {name: state[program.aliases.get(name, name)] for name in state}
    return Refitted(state, layers_told, left, errors, held_out=not end and bool(errors))


def with_statistics(
    program: Program,
    state: Mapping[str, Tensor],
    lessons: Iterable[Lesson],
    *,
    agreed: Collection[str] = (),
    owner: Mapping[str, int] | None = None,
    max_memory: float = math.inf,
    processes: Processes = ALONE,
) -> dict[str, Tensor]:
    """Re-estimates the statistics of BatchNorm over data: the mean and variance (over n, not n - 1) of all that the
    network computes there, with the layers before it as they are when their own statistics are known.

    Arguments:
        program: the captured program.
        state: its parameters.
        lessons: the data.
        agreed: names of tensors that are equal in all models. Statistics among them stay, if all parameters before
            them are, too.
        owner: for statistics that are of one model alone, its number: of data that are of one model, they count its
            own only.
        max_memory: as for `refit`.
        processes: those that share the data.

    Returns:
        The state dict with new statistics.

    Raises:
        LoaderError: if the data have no more than one value for each channel.
    """
    normal = _statistics(program, agreed)
    state = dict(state)
    if not normal:
        return state
    merged = Lane(program, state)
    with Boundaries(max_memory * 2**30) as kept:
        plan = plan_stages(program, (), normal, (), (), (), all_shown=False, products=False, to_the_end=False)
        course = Course(kept, merged, (), lessons, plan, processes=processes)
        for number, stage in enumerate(plan):
            statistics = [Statistics(names, nodes) for names, nodes in stage.statistics.items()]
            for batch, values, _ in course.batches(number, onward=True):
                _add(statistics, course, batch, values, owner or {})
                del values
            for one in statistics:
                one.total(processes)
                one.settle(state)
            merged.use(state)
    return state


def _settled(fits: Sequence[LayerFit | Repair], state: dict[str, Tensor], processes: Processes) -> LayerReport:
    """Puts the new coefficients of some layers into a state dict, and tells how they were found."""
    told = LayerReport()
    for fit in fits:
        if isinstance(fit, Repair):
            fit.total(processes)
            told[fit.layer.name] = fit.settle(state)
    layers = [fit for fit in fits if isinstance(fit, LayerFit)]
    LayerFit.total(layers, processes)
    for layer, step in zip(layers, ridge_fits([layer.folds for layer in layers], processes), strict=True):
        told[layer.layer.name] = layer.settle(state, step, processes)
    return told


def _statistics(program: Program, agreed: Collection[str]) -> dict[tuple[str, str], list[fx.Node]]:
    """The statistics that are not the same in all models, by their names, and the nodes that use them."""
    found = statistics_nodes(program)
    return {names: nodes for names, nodes in found.items() if not alike(program, names, nodes, agreed)}


def _add(
    statistics: Sequence[Statistics], course: Course, number: int, values: Values, owner: Mapping[str, int]
) -> None:
    """Takes a batch into statistics; into those of one model only if it is of its data."""
    for one in statistics:
        counted = course.lesson(number, owner.get(one.names[0]))
        if counted is not None:
            one.add(values, counted.weight)


def written_out(program: Program) -> Program:
    """The program with its recurrent layers, and whatever else multiplies parameters inside of one op, written out in
    simpler ops where torch can do that, and with plain norms."""
    ops = {
        node.target
        for node in program.graph.graph.nodes
        if rules.contracts(node.target) and form_of(node) is None and _holds_weights(program, node)
    }
    simpler = program.aten.decompose(ops) if ops else None
    aten = plain_norms(simpler or program.aten)
    return program if aten is program.aten else replace(program, aten=aten)


def _holds_weights(program: Program, node: fx.Node) -> bool:
    return any(program.sources.get(n, ("", ""))[0] == "parameter" for n in node.all_input_nodes)


def _only_parent(layer: Layer, owner: Mapping[str, int]) -> int | None:
    """The only parent that a layer learns from; None if it learns from all."""
    owners = {owner.get(name) for name in layer.places}
    return owners.pop() if len(owners) == 1 else None

"""Refitting a merged network layer by layer, in closed form, on what its own earlier layers give."""

from __future__ import annotations

import logging
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor, fx
from tqdm.auto import tqdm

from fxmerge.combine.batch_norm import alike, statistics_nodes
from fxmerge.program.captured import Program
from fxmerge.program.forms import argument, bind, form_of
from fxmerge.progress import Ticker
from fxmerge.refitting.boundaries import Boundaries
from fxmerge.refitting.class_scores import ScoreLayers, score_layers
from fxmerge.refitting.course import Course, Lane, Lesson
from fxmerge.refitting.gather import LayerFit, Statistics, Teacher, Values
from fxmerge.refitting.layers import Layer, Layers, Use, find_layers
from fxmerge.refitting.output_error import OutputDistance, OutputErrors, asked, comparable, of_last_layers
from fxmerge.refitting.places import Places
from fxmerge.refitting.repair import Repair
from fxmerge.refitting.schedule import Step, stages_of, walk
from fxmerge.refitting.sums import Summand, summand_of
from fxmerge.shared import EQUAL
from fxmerge.symmetry import rules

logger = logging.getLogger(__name__)

ROUNDS = 3
"""How often a layer is fitted whose inputs depend on itself, as in a recurrent network."""

LayerReport = dict[str, dict[str, float]]
"""Numbers on the fit of each layer, by its name."""


@dataclass(frozen=True)
class Refitted:
    """What a refit gives.

    Attributes:
        state: the new state dict.
        layers: for every refitted layer by name: `before` and `after`, the squared error relative to the square of the
            targets; `held_out`, the same on rows apart from those of the fit; `ridge`, relative to the mean square of
            a feature; `rank`, how many directions of the features it leaves free, of `features`; `rows`, the number
            of equations; `seconds`. Where scores of classes were fitted, these numbers are of the squared-error fit,
            and there are `cross_entropy_before` and `cross_entropy_after`, in nats on rows held out, of the
            squared-error fit and of the result; `entropy`, below which none can be; and `cross_entropy_ridge`, infinite
            where the squared-error fit was kept.
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
    shared: Collection[str] = (),
    agreed: Collection[str] = (),
    owner: Mapping[str, int] | None = None,
    max_memory: float = math.inf,
    seed: int = 0,
    progress: bool | None = None,
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
        shared: names of tensors that are equal in all parents and on which no unit moves: layers stay that are mostly
            made of these.
        agreed: names of tensors that are equal in all parents: BatchNorm statistics stay of activations that depend on
            these alone.
        owner: for parameters that are of one parent alone, its number. Layers of these learn from that parent alone, on
            all data or, where parents have data of their own, on its.
        max_memory: GiB of activations to keep in memory between stages; the rest goes to a temporary folder.
        seed: seed of the choice of rows.
        progress: whether to show a progress bar; None shows it on a terminal.

    Returns:
        The new state dict, and what is told of it.

    Raises:
        NonFiniteError: if an activation is NaN or infinite.
    """
    program = written_out(program)
    resized = parents_program is not None and parents_program is not program
    layers = find_layers(program)
    last = last_layers(program, layers)
    teachers = teachers or [Teacher(own, {}) for own in parents]
    places = [teacher.places for teacher in teachers if teacher.places is not None]
    chosen: list[Layer] = []
    left: dict[str, str] = {} if only_last else dict(layers.left)
    for layer in last if only_last else layers.all:
        if _mostly(layer, shared):
            left[layer.name] = f"its parameters are {EQUAL}"
            continue
        apart = any(_apart(use, own) for use in layer.uses for own in places)
        if apart and (repair or layer in last or not all(_shown(use, own) for use in layer.uses for own in places)):
            left[layer.name] = "merged units lie along the rows or groups of its data, and " + (
                "means and deviations do not tell them apart"
                if repair
                else "no layer after it reads them"
                if layer in last
                else "it cannot be told where they are in its output"
            )
        elif resized and not all(_shown(use, own) for use in layer.uses for own in places):
            left[layer.name] = "it cannot be told where merged units are in its output"
        else:
            chosen.append(layer)
    found = score_layers(program, layers, last) if scores else ScoreLayers((), {})
    left, of_scores = {**found.left, **left}, [layer for layer in found.layers if layer in chosen]
    for layer in [layer for layer in of_scores if _in_other_units(layer, places)]:
        left[layer.name] = "the order of its classes is free"
        of_scores.remove(layer)
    towards_sums = [] if repair else [layer for layer in chosen if layer not in last]
    owner = owner or {}
    only_parent = {layer: _only_parent(layer, owner) for layer in chosen}
    by_layers = not repair and not owner and comparable(program, last, chosen, teachers)
    distance = None if repair or by_layers or owner else OutputDistance(program)
    state, normal = dict(start), _statistics(program, agreed)
    left = {name: why for name, why in left.items() if not any(name in names for names in normal)}
    end = distance is not None
    stages = _plan(program, chosen, normal, towards_sums, places, of_scores, all_shown=resized, to_the_end=end)
    told: LayerReport = {}
    merged, *lanes = Lane(program, state), *(Lane(program, own, parents_program) for own in parents)
    disable = None if progress is None else not progress
    with Boundaries(max_memory * 2**30) as kept:
        course = Course(kept, merged, lanes, lessons, all_parents=bool(owner))
        everywhere = [j for j in range(len(parents)) if all(j in asked(shares) for shares in course.alike(None))]
        last_fits: list[LayerFit] = []
        bar = tqdm(total=len(stages) * len(course.data), desc="refitting", leave=False, disable=disable)
        ticker, due = Ticker(logger, "refitting: layer %d of %d"), sum(len(stage.layers) for stage in stages)
        for stage in stages:
            statistics = [Statistics(names, nodes) for names, nodes in stage.statistics.items()]
            for again in reversed(range(ROUNDS if stage.circular else 1)):
                fits: Sequence[LayerFit | Repair] = [
                    Repair(layer, state, teachers)
                    if repair
                    else LayerFit(
                        layer,
                        state,
                        teachers,
                        stage.summands,
                        stage.shown,
                        course.alike(only_parent[layer]),
                        seed,
                        everywhere if by_layers and layer in last else (),
                        scores=layer in of_scores and not again,
                    )
                    for layer in stage.layers
                ]
                for number, values, taught in course.batches(stage.mine, stage.theirs, onward=not again):
                    for fit in fits:
                        told_by = course.lesson(number, only_parent[fit.layer])
                        if told_by is not None:
                            own = {j: theirs for j, theirs in taught.items() if told_by[0][j] > 0}
                            fit.add(values, own, *told_by)
                    _add(() if again else statistics, course, number, values, owner)
                    if distance and stage is stages[-1]:
                        told_by = course.lesson(number, None)
                        assert told_by is not None
                        distance.add(values, taught, *told_by)
                    del values, taught
                    bar.update(not again)
                    ticker.tick(min(len(told) + 1, due), due)
                told |= {fit.layer.name: fit.settle(state) for fit in fits}
                if not again:
                    last_fits += [fit for fit in fits if isinstance(fit, LayerFit) and fit.layer in last]
                if again:
                    merged.use(state)
            for one in statistics:
                one.settle(state)
            merged.use(state)
        bar.close()
    errors: OutputErrors = {}
    if distance is not None:
        errors = {number: distance.error(number) for number in (None, *everywhere)}
    elif by_layers or (owner and last_fits):
        errors = of_last_layers(last_fits)
    if all(map(math.isnan, errors.values())):  # No output varies.
        errors = {}
    return Refitted(state, told, left, errors, held_out=distance is None and bool(errors))


def with_statistics(
    program: Program,
    state: Mapping[str, Tensor],
    lessons: Iterable[Lesson],
    *,
    agreed: Collection[str] = (),
    owner: Mapping[str, int] | None = None,
    max_memory: float = math.inf,
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
        course = Course(kept, merged, (), lessons)
        for stage in _plan(program, (), normal, (), (), (), all_shown=False, to_the_end=False):
            statistics = [Statistics(names, nodes) for names, nodes in stage.statistics.items()]
            for number, values, _ in course.batches(stage.mine, stage.theirs, onward=True):
                _add(statistics, course, number, values, owner or {})
                del values
            for one in statistics:
                one.settle(state)
            merged.use(state)
    return state


def _statistics(program: Program, agreed: Collection[str]) -> dict[tuple[str, str], list[fx.Node]]:
    """The statistics that are not the same in all models, by their names, and the nodes that use them."""
    found = statistics_nodes(program)
    return {names: nodes for names, nodes in found.items() if not alike(program, names, nodes, agreed)}


def _add(
    statistics: Sequence[Statistics], course: Course, number: int, values: Values, owner: Mapping[str, int]
) -> None:
    """Takes a batch into statistics; into those of one model only if it is of its data."""
    for one in statistics:
        told_by = course.lesson(number, owner.get(one.names[0]))
        if told_by is not None:
            one.add(values, told_by[1])


def written_out(program: Program) -> Program:
    """The program with its recurrent layers, and whatever else multiplies parameters inside of one op, written out in
    simpler ops where torch can do that."""
    ops = {
        node.target
        for node in program.graph.graph.nodes
        if rules.contracts(node.target) and form_of(node) is None and _holds_weights(program, node)
    }
    simpler = program.aten.decompose(ops) if ops else None
    return program if simpler is None else replace(program, aten=simpler)


def _holds_weights(program: Program, node: fx.Node) -> bool:
    return any(program.sources.get(n, ("", ""))[0] == "parameter" for n in node.all_input_nodes)


def last_layers(program: Program, layers: Layers) -> list[Layer]:
    """The layers that no other layer comes after."""
    nodes = {use.node for layer in layers.all for use in layer.uses}
    before: set[fx.Node] = set()
    for node in reversed(program.graph.graph.nodes):
        if any(user in before or user in nodes for user in node.users):
            before.add(node)
    return [layer for layer in layers.all if before.isdisjoint(use.node for use in layer.uses)]


@dataclass(frozen=True)
class _Stage:
    """What is computed and settled in one stage.

    Attributes:
        layers: to be refitted.
        summands: what the outputs of some of their uses are added to, and is final.
        shown: the uses that are to give what their parents' outputs are in merged units, and not what follows from
            coefficients.
        statistics: running means and variances to be estimated, by their names, and the nodes that use them.
        circular: whether what a layer reads depends on the layer itself.
        mine, theirs: how the merged network and the parents get there.
    """

    layers: Sequence[Layer]
    summands: Mapping[Use, Summand]
    shown: Collection[Use]
    statistics: Mapping[tuple[str, str], Sequence[fx.Node]]
    circular: bool
    mine: Step
    theirs: Step


def _plan(
    program: Program,
    chosen: Sequence[Layer],
    statistics: Mapping[tuple[str, str], Sequence[fx.Node]],
    towards_sums: Collection[Layer],
    places: Sequence[Places],
    of_scores: Collection[Layer],
    *,
    all_shown: bool,
    to_the_end: bool,
) -> list[_Stage]:
    """The stages of a refit of some layers and statistics, of which some layers learn what the sums are to be
    that their outputs go into; and the way from the last of them to the outputs, if that is asked for. Where all are
    shown, no layer learns from what follows from its parents' coefficients. Of layers that write scores, what the
    parents give is computed as well."""
    graph, derived = program.graph.graph, program.derived
    normal = list(statistics.items())
    sets = [[use.node for use in layer.uses] for layer in chosen] + [nodes for _, nodes in normal]
    due, final = stages_of(graph, sets, derived)
    if to_the_end:
        due.append([])
    own = [[chosen[i] for i in numbers if i < len(chosen)] for numbers in due]
    normalized = [dict(normal[i - len(chosen)] for i in numbers if i >= len(chosen)) for numbers in due]
    read = [_read(numbers, sets, derived) for numbers in due]
    taught = [_read([i for i in numbers if i < len(chosen)], sets, derived) for numbers in due]
    if to_the_end:
        for nodes in (read[-1], taught[-1]):
            nodes.update(program.answers)
    circular = [any(final[n] > stage for n in nodes) for stage, nodes in enumerate(taught)]
    summands: list[dict[Use, Summand]] = [{} for _ in due]
    shown: list[set[Use]] = [set() for _ in due]
    for stage, layer in ((stage, layer) for stage, fitted in enumerate(own) for layer in fitted):
        found = {use: summand_of(use.node, program.learnt) for use in layer.uses} if layer in towards_sums else {}
        beside = {use: one for use, one in found.items() if one is not None and final[one.node] <= stage}
        # A weight that is used again and again learns towards sums everywhere or nowhere.
        if len(beside) == len(layer.uses) and all(p.known(one.node) for one in beside.values() for p in places):
            summands[stage] |= beside
            read[stage] |= {one.node for one in beside.values()}
            taught[stage] |= {one.node for one in beside.values()}
        apart = {use for use in layer.uses if all_shown or any(_apart(use, p) for p in places)}
        shown[stage] |= apart
        taught[stage] |= {use.node for use in (layer.uses if layer in of_scores else apart)}
    ways = walk(graph, read, derived, final), walk(graph, taught, derived)
    return [_Stage(*each) for each in zip(own, summands, shown, normalized, circular, *ways, strict=True)]


def _mostly(layer: Layer, names: Collection[str]) -> bool:
    """Whether most coefficients of a layer are entries of some parameters."""
    own = sum(len(where) for name, (where, _) in layer.places.items() if name in names)
    return 2 * own > layer.codes.numel()


def _apart(use: Use, places: Places) -> bool:
    """Whether merged units lie along the data of a use and along its output too: what it gives in units of a parent's
    own does not become what it gives in merged ones by merging its outputs."""
    return places.moved(argument(bind(use.node), use.data), use.kept_dims)


def _in_other_units(layer: Layer, places: Sequence[Places]) -> bool:
    """Whether a parent has what the layer gives in units of its own."""
    nodes = [use.node for use in layer.uses]
    return any(own.moved(node, range(node.meta["val"].ndim)) for own in places for node in nodes)


def _shown(use: Use, places: Places) -> bool:
    """Whether a use's output is what is fitted, and shows in which merged units it is."""
    added = use.form.bias is not None and argument(bind(use.node), use.form.bias) is not None
    return places.known(use.node) and added == use.biased


def _read(numbers: Sequence[int], sets: Sequence[Sequence[fx.Node]], derived: frozenset[fx.Node]) -> set[fx.Node]:
    """What the nodes of some sets read."""
    return {n for i in numbers for node in sets[i] for n in node.all_input_nodes} - derived


def _only_parent(layer: Layer, owner: Mapping[str, int]) -> int | None:
    """The only parent that a layer learns from; None if it learns from all."""
    owners = {owner.get(name) for name in layer.places}
    return owners.pop() if len(owners) == 1 else None

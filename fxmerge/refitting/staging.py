"""The stages of a refit: what is computed and settled in each, and what it gives."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, fx

from fxmerge.program.captured import Program
from fxmerge.program.forms import argument, bind
from fxmerge.refitting.ahead import Ahead, find_ahead
from fxmerge.refitting.layers import Layer, Use
from fxmerge.refitting.mixed import Mixed
from fxmerge.refitting.output_error import OutputErrors
from fxmerge.refitting.places import Places
from fxmerge.refitting.schedule import Step, stages_of, walk
from fxmerge.refitting.sums import Summand, summand_of
from fxmerge.stages import Form, Kept

LayerReport = dict[str, dict[str, float]]
"""Numbers on the fit of each layer, by its name."""


@dataclass(frozen=True)
class Outcome:
    """What a stage gives.

    Attributes:
        tensors: the new parameters and statistics, by name.
        layers: of every layer that was fitted: see `Refitted.layers`.
        errors: the errors of the outputs of each layer that no other layer comes after, or those of the network.
    """

    tensors: Mapping[str, Tensor]
    layers: LayerReport
    errors: tuple[OutputErrors, ...]


def _save(found: Outcome) -> Kept:
    return Kept(found.tensors, {"layers": found.layers, "errors": [list(own.items()) for own in found.errors]})


def _load(kept: Kept) -> Outcome:
    errors = tuple(dict(own) for own in kept.plain["errors"])
    return Outcome(kept.tensors, kept.plain["layers"], errors)


OUTCOME = Form(_save, _load)
"""How it is kept."""


@dataclass(frozen=True)
class Stage:
    """What is computed and settled in one stage.

    Attributes:
        layers: to be refitted.
        summands: what the outputs of some of their uses are added to, and is final.
        shown: the uses that are to give what their parents' outputs are in merged units, and not what follows from
            coefficients.
        statistics: running means and variances to be estimated, by their names, and the nodes that use them.
        circular: whether what a layer reads depends on the layer itself.
        ahead: what becomes of the layers' outputs in products of two activations; None if that is not fitted.
        mixed: parameters to be fitted to sums, and whether what each sum is added to is final.
        mine, theirs: how the merged network and the parents get there.
    """

    layers: Sequence[Layer]
    summands: Mapping[Use, Summand]
    shown: Collection[Use]
    statistics: Mapping[tuple[str, str], Sequence[fx.Node]]
    circular: bool
    ahead: Ahead | None
    mixed: Mapping[Mixed, bool]
    mine: Step
    theirs: Step


def plan_stages(
    program: Program,
    chosen: Sequence[Layer],
    statistics: Mapping[tuple[str, str], Sequence[fx.Node]],
    towards_sums: Collection[Layer],
    places: Sequence[Places],
    of_scores: Collection[Layer],
    mixed: Sequence[Mixed] = (),
    *,
    all_shown: bool,
    products: bool,
    to_the_end: bool,
) -> list[Stage]:
    """The stages of a refit of some layers and statistics, of which some layers learn what the sums are to be
    that their outputs go into; and the way from the last of them to the outputs, if that is asked for. Where all are
    shown, no layer learns from what follows from its parents' coefficients. Of layers that write scores, what the
    parents give is computed as well. Where products are fitted, so is what the layers after these read."""
    graph, derived = program.graph.graph, program.derived
    normal = list(statistics.items())
    sets = [[use.node for use in layer.uses] for layer in chosen] + [nodes for _, nodes in normal]
    due, final = stages_of(graph, [*sets, *([own.end] for own in mixed)], derived)
    sums = [[mixed[i - len(sets)] for i in numbers if i >= len(sets)] for numbers in due]
    due = [[i for i in numbers if i < len(sets)] for numbers in due]
    for one in mixed:  # Nothing on the way to a sum is final before the sum is.
        final.update(dict.fromkeys(set(one.section.nodes) - derived, final[one.end]))
    if to_the_end:
        due.append([])
        sums.append([])
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
        own_units = {use for use in layer.uses if all_shown or any(apart(use, p) for p in places)}
        shown[stage] |= own_units
        taught[stage] |= {use.node for use in (layer.uses if layer in of_scores else own_units)}
    ahead = [
        find_ahead(program, layers, chosen, final, stage) if products and not circular[stage] else None
        for stage, layers in enumerate(own)
    ]
    for stage, product in ((stage, product) for stage, product in enumerate(ahead) if product is not None):
        uses = [use for _, use in product.readers]
        shown[stage] |= {use for use in uses if all_shown or any(apart(use, p) for p in places)}
        read[stage] |= product.inputs
        taught[stage] |= {n for use in uses for n in (use.node, *use.node.all_input_nodes)} - derived
    mixtures = list[dict[Mixed, bool]]()
    for stage, ends in enumerate(sums):
        beside_sums = {one: one.summand.node for one in ends if one.summand is not None}
        beside_sums = {
            one: n for one, n in beside_sums.items() if final[n] <= stage and all(p.known(n) for p in places)
        }
        mixtures.append({one: one in beside_sums for one in ends})
        read[stage] |= {n for one in ends for n in one.section.inputs} | set(beside_sums.values())
        taught[stage] |= {one.end for one in ends} | set(beside_sums.values())
    ways = walk(graph, read, derived, final), walk(graph, taught, derived)
    return [
        Stage(*each) for each in zip(own, summands, shown, normalized, circular, ahead, mixtures, *ways, strict=True)
    ]


def apart(use: Use, places: Places) -> bool:
    """Whether merged units lie along the data of a use and along its output too: what it gives in units of a parent's
    own does not become what it gives in merged ones by merging its outputs."""
    return places.moved(argument(bind(use.node), use.data), use.kept_dims)


def _read(numbers: Sequence[int], sets: Sequence[Sequence[fx.Node]], derived: frozenset[fx.Node]) -> set[fx.Node]:
    """What the nodes of some sets read."""
    return {n for i in numbers for node in sets[i] for n in node.all_input_nodes} - derived

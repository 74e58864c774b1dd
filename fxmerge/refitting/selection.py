"""Which layers of a merged network are fitted, and why others are left."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import fx

from fxmerge.program.captured import Program
from fxmerge.program.forms import argument, bind
from fxmerge.refitting.class_scores import ScoreLayers, score_layers
from fxmerge.refitting.gains import find_gains
from fxmerge.refitting.layers import Layer, Layers, Use, find_layers
from fxmerge.refitting.mixed import Mixed, find_mixed
from fxmerge.refitting.places import Places
from fxmerge.refitting.routers import router_layers
from fxmerge.refitting.staging import apart
from fxmerge.refitting.tied import can_be_fitted
from fxmerge.shared import EQUAL


@dataclass(frozen=True)
class Selection:
    """The layers that are fitted.

    Attributes:
        chosen: all of these but for `tied`, in graph order; gains of norms come after the others.
        last: the layers that no other layer comes after, whether they are fitted or not.
        of_scores: those of `chosen` that are fitted to probabilities at last.
        tied: layers whose weights are looked up as well, with the nodes that do so. They are fitted before all others.
        mixed: parameters that are fitted to sums.
        left: for other parameters that are multiplied with data, why they are left.
    """

    chosen: list[Layer]
    last: list[Layer]
    of_scores: list[Layer]
    tied: Mapping[Layer, tuple[fx.Node, ...]]
    mixed: list[Mixed]
    left: Mapping[str, str]


def select(
    program: Program,
    places: Sequence[Places],
    shared: Collection[str],
    mixed: Collection[str],
    *,
    only_last: bool,
    repair: bool,
    scores: bool,
    owned: bool,
    resized: bool,
) -> Selection:
    """Chooses the layers to be fitted.

    Arguments:
        program: the program of the merged network.
        places: where units of the parents go, for those in which any are merged.
        shared: names of tensors that are equal in all parents.
        mixed: names of parameters that may be fitted to sums.
        only_last: whether only layers that no other one comes after are fitted.
        repair: whether outputs are shifted and scaled, in place of a fit.
        scores: whether outputs are scores of classes.
        owned: whether some parameters are of one parent alone.
        resized: whether the parents are of other sizes.
    """
    layers = find_layers(program)
    left: dict[str, str] = {} if only_last else dict(layers.left)
    tied = {} if only_last or repair or owned or resized else _tied(layers, places, shared)
    for name in (name for layer in tied for name in layer.parameters):
        left.pop(name, None)
    last = last_layers(program, replace(layers, all=(*layers.all, *tied)))

    def chosen_of(some: Iterable[Layer]) -> list[Layer]:
        """Those that can be fitted; of the others the reason is noted."""
        reasons = {
            layer: _why_left(layer, places, shared, repair=repair, last=layer in last, resized=resized)
            for layer in some
        }
        left.update({layer.name: why for layer, why in reasons.items() if why is not None})
        return [layer for layer, why in reasons.items() if why is None]

    sums = [] if only_last or repair else find_mixed(program, set(mixed).difference(shared), places)
    in_sums = {one.parameter for one in sums}
    chosen = chosen_of(last if only_last else (own for own in layers.all if in_sums.isdisjoint(own.parameters)))
    if not (only_last or repair):
        gains = find_gains(program, chosen)
        for name in (name for layer in gains.all for name in layer.parameters):
            left.pop(name, None)
        left.update(gains.left)
        chosen += chosen_of(gains.all)
    found = score_layers(program, layers, last) if scores else ScoreLayers((), {})
    left, of_scores = {**found.left, **left}, [layer for layer in found.layers if layer in chosen]
    for layer in [layer for layer in of_scores if _in_other_units(layer, places)]:
        left[layer.name] = "the order of its classes is free"
        of_scores.remove(layer)
    if not (only_last or repair):
        of_scores += [layer for layer in router_layers(chosen) if layer not in of_scores]
    left = {name: why for name, why in left.items() if name not in in_sums}
    return Selection(chosen, last, of_scores, tied, sums, left)


def last_layers(program: Program, layers: Layers) -> list[Layer]:
    """The layers that no other layer comes after."""
    nodes = {use.node for layer in layers.all for use in layer.uses}
    before: set[fx.Node] = set()
    for node in reversed(program.graph.graph.nodes):
        if any(user in before or user in nodes for user in node.users):
            before.add(node)
    return [layer for layer in layers.all if before.isdisjoint(use.node for use in layer.uses)]


def _tied(layers: Layers, places: Sequence[Places], shared: Collection[str]) -> dict[Layer, tuple[fx.Node, ...]]:
    """The layers whose weights are looked up as well, and can be fitted."""
    return {
        layer: lookups
        for layer, lookups in layers.tied.items()
        if not _mostly(layer, shared) and can_be_fitted(layer, lookups, places)
    }


def _why_left(
    layer: Layer, places: Sequence[Places], shared: Collection[str], *, repair: bool, last: bool, resized: bool
) -> str | None:
    """Why a layer is left as it is; None if it can be fitted, or shifted and scaled."""
    if _mostly(layer, shared):
        return f"its parameters are {EQUAL}"
    shown = all(_shown(use, own) for use in layer.uses for own in places)
    if any(apart(use, own) for use in layer.uses for own in places) and (repair or last or not shown):
        return "merged units lie along the rows or groups of its data, and " + (
            "means and deviations do not tell them apart"
            if repair
            else "no layer after it reads them"
            if last
            else "it cannot be told where they are in its output"
        )
    return "it cannot be told where merged units are in its output" if resized and not shown else None


def _mostly(layer: Layer, names: Collection[str]) -> bool:
    """Whether most coefficients of a layer are entries of some parameters."""
    own = sum(len(where) for name, (where, _) in layer.places.items() if name in names)
    return 2 * own > layer.codes.numel()


def _in_other_units(layer: Layer, places: Sequence[Places]) -> bool:
    """Whether a parent has what the layer gives in units of its own."""
    nodes = [use.node for use in layer.uses]
    return any(own.moved(node, range(node.meta["val"].ndim)) for own in places for node in nodes)


def _shown(use: Use, places: Places) -> bool:
    """Whether a use's output is what is fitted, and shows in which merged units it is."""
    added = use.form.bias is not None and argument(bind(use.node), use.form.bias) is not None
    return places.known(use.node) and added == use.biased

"""Networks with fewer units of the classes that a change of basis may mix: the stage after they are in one basis."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
from torch import Tensor

from fxmerge.bases import in_one_basis, mixing, transformed, with_gains_moved
from fxmerge.emit.proof import outputs
from fxmerge.errors import OptionError
from fxmerge.job import Job
from fxmerge.joining import joined
from fxmerge.keeping import changed
from fxmerge.kv_heads import names_kv_heads
from fxmerge.matching.balance import balance
from fxmerge.matching.models import Correlations, alpha_by_class
from fxmerge.matching.principal import principal_basis, used_first
from fxmerge.matching.room import Room, fits, wanted
from fxmerge.prepared import Prepared
from fxmerge.program.captured import Program
from fxmerge.program.double import in_double
from fxmerge.recipe import Budget, Recipe, Run, Zip
from fxmerge.sizing import Chosen, any_map, check_resizable, failing, resized, sized
from fxmerge.symmetry.flow import Flow
from fxmerge.symmetry.freeze import freeze, moving_together
from fxmerge.symmetry.group import Symmetry
from fxmerge.symmetry.truncation import Truncation
from fxmerge.units.basis import Basis
from fxmerge.units.kind import Kind, UnitKind
from fxmerge.units.unit_map import UnitMap
from fxmerge.validate import agree

logger = logging.getLogger(__name__)

TRUNCATED = "left in the directions that count most, or inside of heads"
"""The reason given for units that are not merged, since directions of them are left out."""

MIXED = (Kind.CENTRED, Kind.ORTHOGONAL, Kind.GENERAL_LINEAR)
"""The kinds of classes of which directions may be left out."""


def with_directions(
    job: Job, recipe: Recipe, run: Run, given: Symmetry | None, reference: int | None, weights: Sequence[float]
) -> Prepared:
    """The models of a job and their symmetry. If the recipe takes changes of basis, several models come in one basis.
    If it asks for fewer units of classes that may be mixed, all come in the basis in which the directions of these are
    in the order of how much they count, and the first are to be left.

    Arguments are those of `in_one_basis`, and how much each model counts.

    Raises:
        OptionError: if the recipe names a class of which there cannot be fewer units.
    """
    part = recipe.match
    width = part.width if isinstance(part, Zip) and part.continuous is True else None
    # Heads of keys and values are merged in another basis.
    narrow = width is not None and not isinstance(width, Budget) and not names_kv_heads(width)
    if len(job.states) > 1:
        group = in_one_basis(job, recipe, run, given, reference)
        group = truncated(group, recipe, run) if narrow and group.unfrozen is not None else group
        return joined(group, recipe, weights) if isinstance(part, Zip) and group.truncation is None else group
    if narrow:
        group = Prepared.of(with_gains_moved(job), recipe, run, given, continuous=True)
        found = truncated(replace(group, unfrozen=group.symmetry), recipe, run)
        inside = set() if isinstance(width, Mapping) else {group.symmetry.names[n] for n in _inside(group.symmetry)}
        return _left_alone(found if found.truncation is not None else Prepared.of(job, recipe, run, given), inside)
    return Prepared.of(job, recipe, run, given)


def _left_alone(group: Prepared, inside: Collection[str]) -> Prepared:
    """A model of which no units are merged of classes that are truncated, nor of some others by name, nor the blocks
    that these lie in."""
    symmetry, fewer = group.symmetry, group.truncation.widths if group.truncation is not None else {}
    numbers = {*fewer, *(n for n, name in enumerate(symmetry.names) if name in inside)}
    smaller, names = freeze(symmetry, moving_together(symmetry, numbers), lambda _: TRUNCATED)
    bases = {symmetry.names[n]: str(symmetry.kind(n)) for n in sorted(fewer)}
    return replace(group, symmetry=replace(smaller, kinds=()), still=group.still | {*names}, bases=bases)


def _inside(symmetry: Symmetry) -> set[int]:
    """The classes that may be mixed and lie in blocks, as the dimensions of attention heads do."""
    return {n for n in mixing(symmetry) if symmetry.units[n].parents}


def truncated(group: Prepared, recipe: Recipe, run: Run) -> Prepared:
    """Models in the basis in which the directions of some classes come in the order of how much they count, with as
    many of these to be left as a recipe asks for; as they are if it asks for none, or the graph allows none.

    Arguments:
        group: the models, in one basis.
        recipe: whose `match` is a `Zip`, without "auto".
        run: how to run.

    Raises:
        OptionError: if the recipe names a class of several models of which there cannot be fewer units.
    """
    part, symmetry = recipe.match, group.unfrozen
    assert isinstance(part, Zip) and symmetry is not None
    widths, named = _wanted(group, symmetry, part)
    if widths:
        check_resizable(group.job)
    consumed = frozenset(axis for axis, kind in group.flow.items() if kind is Flow.CONSUMES)
    while widths:
        turned = replace(group, job=replace(group.job, states=_in_principal_basis(group, symmetry, part, list(widths))))
        blocks = {n: width // len(symmetry.by_block(n)) for n, width in widths.items()}
        asked = Truncation(symmetry, consumed, blocks, _scaled(group, symmetry, blocks))
        found, reasons = _possible(turned, asked, run)
        if not reasons:
            return replace(turned, truncation=found, projections=(found.projection,) * len(turned.job.states))
        if named and len(group.job.states) > 1:  # In one basis, their units cannot be merged either.
            raise OptionError(f"Zip.width cannot be had for {reasons[0]} Leave these at 1.")
        # The others stay in their own basis, in which their units may be merged.
        widths = {n: widths[n] for n in found.widths}
    return group


def _wanted(group: Prepared, symmetry: Symmetry, part: Zip) -> tuple[dict[int, int], bool]:
    """How many units of some classes a recipe asks for, and whether it names them. What lies in blocks keeps its width
    unless it is named and the blocks are not: heads of an odd size are slow, and few classes can be built with them."""
    assert not isinstance(part.width, Budget)
    numbers, width = mixing(symmetry) - _inside(symmetry), part.width
    fewer = _may_be_fewer(group, symmetry)
    if isinstance(width, Mapping):
        named = {n for n, name in enumerate(symmetry.names) if any(fits(name, p) for p in width)}
        numbers = {n for n in mixing(symmetry) & named if named.isdisjoint(symmetry.ancestors(n))}
        # Of one model, units may be merged of what has no directions to leave out.
        able = numbers.intersection(fewer) if len(group.job.states) == 1 else numbers
        width = {p: share for p, share in width.items() if any(fits(symmetry.names[n], p) for n in able)}
        if not width:
            return {}, False
    fewer = [n for n in fewer if n in numbers]
    found = wanted(replace(part, width=width), symmetry, 1, fewer, ())
    # A deviation from the mean needs two units.
    least = {n: min(2, symmetry.by_block(n).shape[1]) if symmetry.kind(n) == Kind.CENTRED else 1 for n in found}
    return {n: max(w, least[n] * len(symmetry.by_block(n))) for n, w in found.items()}, isinstance(width, Mapping)


def _may_be_fewer(group: Prepared, symmetry: Symmetry) -> list[int]:
    """The classes of which a subspace can be left: on axes that have the same units in every row, and not along an
    output."""
    seen = {n for output in symmetry.free for n in output.classes.tolist()}
    return sorted(
        n
        for n in mixing(symmetry) - seen
        if symmetry.kind(n) in MIXED and all(len(own.axis.dims) == 1 for own in symmetry.mixed[n])
    )


def _scaled(group: Prepared, symmetry: Symmetry, numbers: Collection[int]) -> frozenset[int]:
    """Those of some classes over which a norm may go, and of which no parameter both gives and reads the units, so that
    these can be scaled."""
    both = {axis for axis, kind in group.flow.items() if kind is Flow.BOTH}
    return frozenset(
        n
        for n in numbers
        if symmetry.kind(n) != Kind.GENERAL_LINEAR
        and both.isdisjoint((own.axis.parameter, own.axis.dim) for own in symmetry.mixed[n])
    )


def _in_principal_basis(
    group: Prepared, symmetry: Symmetry, part: Zip, numbers: Sequence[int]
) -> tuple[dict[str, Tensor], ...]:
    """The parameters of the models, in a basis of some classes whose first directions count most."""
    job = group.job
    trunk = replace(symmetry, layout=tuple(a for a in symmetry.layout if a.parameter not in job.owner))
    consumed = [axis for axis, kind in group.flow.items() if kind is Flow.CONSUMES]
    steps = [balance(symmetry, job.states[0], numbers)]
    first, used = used_first(symmetry, [steps[0].apply(state) for state in job.states], numbers, consumed)
    steps.append(first)
    balanced = [transformed(symmetry, state, steps) for state in job.states]
    shown: Correlations = {}
    if job.data is not None and part.alpha != 1:
        pairs = [(i, i) for i in range(len(balanced))]
        shown = group.similarities(trunk, balanced, job.names, pairs, "cosine", numbers, until="bases")
    alpha = alpha_by_class(part, trunk) if job.data is not None else 1.0
    correlations = [{n: own[i, i] for n, own in shown.items() if n in numbers} for i in range(len(balanced))]

    def turned() -> tuple[list[dict[str, Tensor]], None]:
        turn = principal_basis(trunk, balanced, correlations, used, alpha=alpha)
        steps.append(Basis(symmetry.mixed, turn.matrices))
        return [transformed(symmetry, state, steps) for state in job.states], None

    with job.timed("matching bases"):
        once = partial(job.processes.once, "bases", turned)
        found, _ = job.stages.remember("bases", once, changed(job.states))
    return tuple(map(dict, found))


def _possible(group: Prepared, truncation: Truncation, run: Run) -> tuple[Truncation, list[str]]:
    """What is left of a truncation where the graph allows it, and why it does not allow the rest."""
    chosen = Chosen(_with_bases(group), dict(truncation.widths))

    def other(scaled: Collection[int]) -> list[int]:
        """The classes with which the network is another one."""
        asked = replace(truncation, widths=chosen.widths, scaled=frozenset(scaled))

        def same(some: Collection[int]) -> bool:
            return _same(group, replace(asked, widths={n: asked.widths[n] for n in some}))

        return failing(chosen.group, sorted(chosen.widths), same)

    scaled = truncation.scaled
    with group.job.timed("resizing"):
        chosen.leave_what_has_no_size(lambda own: _sizes(replace(truncation, widths=own), UnitMap.still(1)))
        if run.verify:
            # Where there is no norm, there may be a product of the class with itself, which knows of its scale.
            wrong = other(scaled)
            if not scaled.isdisjoint(wrong):
                scaled = scaled.difference(wrong)
                wrong = other(scaled)
            chosen.leave(wrong, "the network is another one when directions that are not in use are left out.")
    return replace(truncation, widths=chosen.widths, scaled=scaled), chosen.reasons


def _same(group: Prepared, truncation: Truncation) -> bool:
    """Whether the network with fewer units is the one that is confined to some directions of them, in float64."""
    job = group.job
    state = truncation.projection.project({name: in_double(tensor) for name, tensor in job.states[0].items()})
    small, units = _reduced(truncation, UnitMap.still(1), state)
    narrow = {name: tensor.to(job.states[0][name].dtype) for name, tensor in small.items()}
    into = resized(_with_bases(group), job.program, group.propagation, units, narrow)
    return agree(outputs(job.program, state, job.example), outputs(into, small, job.example))


def fewer_units_left(
    group: Prepared, units: UnitMap, state: Mapping[str, Tensor]
) -> tuple[Prepared, Program, UnitMap, dict[str, Tensor]]:
    """A network that is confined to some directions of its classes, with as many units as these.

    Arguments:
        group: the models.
        units: where the units of the other classes went.
        state: the parameters of the network, all of whose layers are projected.

    Returns:
        The models with all of their classes; the program, the sizes, and the parameters of the smaller network.
    """
    assert group.truncation is not None
    small, sizes = _reduced(group.truncation, units, state)
    group = _with_bases(group)
    return group, sized(group, sizes, small), sizes, small


def _with_bases(group: Prepared) -> Prepared:
    """The models with the classes that are in one basis."""
    assert group.unfrozen is not None
    return replace(group, symmetry=group.unfrozen)


def _reduced(truncation: Truncation, units: UnitMap, state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], UnitMap]:
    """The parameters of the network with fewer units, and the sizes of all of its classes."""
    before, symmetry = _sizes(replace(truncation, widths={}), units), truncation.symmetry
    layout = tuple(before.into(axis) for axis in symmetry.layout)
    # Of other classes, there may be fewer units than their kinds are of.
    kinds = tuple(own if n in truncation.widths else UnitKind() for n, own in enumerate(symmetry.kinds))
    merged = replace(truncation, symmetry=replace(symmetry, layout=layout, kinds=kinds))
    return merged.reduce(state), _sizes(truncation, units)


def _sizes(truncation: Truncation, units: UnitMap) -> UnitMap:
    """The sizes of all classes: of some as a truncation leaves them, of others as merged units tell."""
    symmetry = truncation.symmetry
    totals = {n: width * len(symmetry.by_block(n)) for n, width in truncation.widths.items()}
    room, merged = Room.of(symmetry, totals), {name: n for n, name in enumerate(units.names)}
    sizes, kept = list(room.widths), list(room.kept)
    for n, name in enumerate(symmetry.names):
        if name in merged:
            sizes[n] = units.widths[merged[name]]
            kept[n] = units.kept[merged[name]] if units.kept else np.arange(sizes[n])
    return any_map(symmetry, Room(tuple(sizes), tuple(kept)))

"""Networks with fewer units of the classes that a change of basis may mix: the stage after they are in one basis."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

import numpy as np
from torch import Tensor

from fxmerge.bases import mixing, transformed
from fxmerge.emit.proof import outputs
from fxmerge.emit.sizes import CannotResizeError
from fxmerge.errors import OptionError
from fxmerge.evidence.activations import similarities
from fxmerge.matching.balance import balance
from fxmerge.matching.models import alpha_by_class
from fxmerge.matching.principal import principal_basis
from fxmerge.matching.room import Room, fits, wanted
from fxmerge.matching.search import floats
from fxmerge.notices import warn_of_width
from fxmerge.prepared import Prepared
from fxmerge.program.captured import Program
from fxmerge.program.double import in_double
from fxmerge.recipe import Budget, Recipe, Run, Zip
from fxmerge.sizing import any_map, blamed, failing, resized, sized, try_sizes
from fxmerge.symmetry.flow import Flow
from fxmerge.symmetry.group import Symmetry
from fxmerge.symmetry.truncation import Truncation
from fxmerge.units.basis import Basis
from fxmerge.units.kind import Kind
from fxmerge.units.unit_map import UnitMap
from fxmerge.validate import agree

logger = logging.getLogger(__name__)


def truncated(group: Prepared, recipe: Recipe, run: Run) -> Prepared:
    """The models in the basis in which the directions of classes that may be mixed come in the order of how much they
    count, with the first of these to be left, as many as the recipe asks for.

    Arguments:
        group: the models, in one basis.
        recipe: without "auto".
        run: how to run.

    Raises:
        OptionError: if the recipe names a class of which there cannot be fewer units.
    """
    part, symmetry = recipe.match, group.unfrozen
    if not isinstance(part, Zip) or symmetry is None:
        return group
    widths, named = _wanted(group, symmetry, part)
    if not widths:
        return group
    states = _in_principal_basis(group, symmetry, part, list(widths))
    group = replace(group, job=replace(group.job, states=states))
    consumed = frozenset(axis for axis, kind in group.flow.items() if kind is Flow.CONSUMES)
    blocks = {n: width // len(symmetry.by_block(n)) for n, width in widths.items()}
    found, reasons = _possible(group, Truncation(symmetry, consumed, blocks), run)
    if reasons and named:
        raise OptionError(f"Zip.width cannot be had for {reasons[0]} Leave these at 1.")
    if not found.widths:
        warn_of_width(reasons)
        return group
    return replace(group, truncation=found)


def _wanted(group: Prepared, symmetry: Symmetry, part: Zip) -> tuple[dict[int, int], bool]:
    """How many units of some classes a recipe asks for, and whether it names them."""
    if isinstance(part.width, Budget):
        raise OptionError("Zip.width is a Budget, which does not count bases yet: pass shares, or continuous=False.")
    names = [name for name in group.bases if name in symmetry.names]
    width = part.width
    if isinstance(width, Mapping):
        width = {p: share for p, share in width.items() if any(fits(name, p) for name in names)}
        if not width:
            return {}, False
    fewer = _may_be_fewer(group, symmetry)
    return wanted(replace(part, width=width), symmetry, 1, fewer, ()), isinstance(width, Mapping)


def _may_be_fewer(group: Prepared, symmetry: Symmetry) -> list[int]:
    """The classes of which a subspace can be left: of blocks of one size, on axes that have the same units in every
    row, and not along an output. A parameter that both gives and reads a class with norms has one scale for both."""
    found = []
    seen = {n for output in symmetry.free for n in output.classes.tolist()}
    for n in mixing(symmetry) - seen:
        axes = [own.axis for own in symmetry.mixed[n]]
        both = any(group.flow[axis.parameter, axis.dim] is Flow.BOTH for axis in axes)
        if all(len(axis.dims) == 1 for axis in axes) and not (both and symmetry.kind(n) < Kind.GENERAL_LINEAR):
            found.append(n)
    return sorted(found)


def _in_principal_basis(
    group: Prepared, symmetry: Symmetry, part: Zip, numbers: Sequence[int]
) -> tuple[dict[str, Tensor], ...]:
    """The parameters of the models, in a basis of some classes whose first directions count most."""
    job = group.job
    trunk = replace(symmetry, layout=tuple(a for a in symmetry.layout if a.parameter not in job.owner))
    gauge = balance(symmetry, job.states[0])
    balanced = [{**state, **gauge.apply(floats(symmetry, state))} for state in job.states]
    shown = {}
    if job.data is not None and part.alpha != 1:
        pairs = [(i, i) for i in range(len(balanced))]
        with job.timed("activations"):
            shown = similarities(
                group.propagation, trunk, balanced, job.data, job.names, pairs, "cosine", job.owner, numbers
            )
    alpha = alpha_by_class(part, trunk) if job.data is not None else 1.0
    correlations = [{n: own[i, i] for n, own in shown.items() if n in numbers} for i in range(len(balanced))]
    with job.timed("matching bases"):
        turn = principal_basis(trunk, balanced, correlations, numbers, alpha=alpha)
        steps = gauge, Basis(symmetry.mixed, turn.matrices)
        return tuple(transformed(symmetry, state, steps) for state in job.states)


def _possible(group: Prepared, truncation: Truncation, run: Run) -> tuple[Truncation, list[str]]:
    """What is left of a truncation where the graph allows it, and why it does not allow the rest."""
    whole, left, reasons = _with_bases(group), dict(truncation.widths), list[str]()
    symmetry = whole.symmetry

    def leave(numbers: Collection[int], why: str) -> None:
        names = ", ".join(repr(symmetry.names[n]) for n in sorted(numbers))
        logger.info("all directions are left of %s, since %s", names, why)
        reasons.append(f"{names}: {why}")
        for n in numbers:
            del left[n]

    def same(numbers: Sequence[int]) -> bool:
        return _same(group, replace(truncation, widths={n: left[n] for n in numbers}))

    with group.job.timed("resizing"):
        while left:
            try:
                try_sizes(whole, _sizes(replace(truncation, widths=left), UnitMap.still(1)))
                break
            except CannotResizeError as error:
                leave(blamed(symmetry, left, error), str(error))
        other = failing(whole, sorted(left), same) if run.verify else []
        if other:
            leave(other, "the network is another one when directions are left out that nothing writes or reads.")
    return replace(truncation, widths=left), reasons


def _same(group: Prepared, truncation: Truncation) -> bool:
    """Whether the network with fewer units is the one that is confined to some directions of them, in float64."""
    job = group.job
    state = truncation.project({name: in_double(tensor) for name, tensor in job.states[0].items()})
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
    before = _sizes(replace(truncation, widths={}), units)
    layout = tuple(before.into(axis) for axis in truncation.symmetry.layout)
    merged = replace(truncation, symmetry=replace(truncation.symmetry, layout=layout))
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

"""Other numbers of units: which classes may have them, and the program with the sizes that follow."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from fxmerge.emit.bake import bake
from fxmerge.emit.config import config_for
from fxmerge.emit.costs import flops_of
from fxmerge.emit.proof import outputs, outputs_of_lowest, same_when_repeated, spread, unequal
from fxmerge.emit.resize import resize, rewritten, write
from fxmerge.emit.sizes import CannotResizeError
from fxmerge.errors import OptionError
from fxmerge.job import Job
from fxmerge.matching.allot import Allotment, widths_to_try
from fxmerge.matching.assignment import descendants
from fxmerge.matching.mergeable import mergeable, read_one_by_one
from fxmerge.matching.nested import carry, is_block
from fxmerge.matching.room import Room, alike, check_patterns, fits, halves, may_change, wanted
from fxmerge.notices import warn_of_width
from fxmerge.prepared import Prepared
from fxmerge.program.captured import Program
from fxmerge.program.run import Runner
from fxmerge.recipe import Budget, Run, Zip
from fxmerge.symmetry.flow import Flow
from fxmerge.symmetry.group import Symmetry
from fxmerge.symmetry.propagation import Axis, Propagation
from fxmerge.units.unit_map import UnitMap
from fxmerge.validate import agree, check_emitted

logger = logging.getLogger(__name__)


def room_for(group: Prepared, part: Zip, run: Run, models: int) -> Room | Allotment:
    """How many merged units there are to be of every class, where the graph allows it: as the recipe says, or what
    that is chosen from within its budget.

    Raises:
        OptionError: if the recipe names a class for which it does not.
    """
    symmetry = group.symmetry
    check_resizable(group.job)
    if isinstance(part.width, Mapping):  # Of classes in one basis, directions are left out.
        check_patterns(part.width, (*group.bases, *symmetry.names))
        mixed = {p for p in part.width if any(fits(name, p) for name in group.bases)}
        left = {p: w for p, w in part.width.items() if p not in mixed or any(fits(n, p) for n in symmetry.names)}
        part = replace(part, width=left)
    classes = mergeable(group.trunk, group.flow, group.one_to_one)
    fewer, more = may_change(symmetry, group.flow, classes)
    if isinstance(part.width, Budget):
        return _allotment(group, part, part.width, run, models, fewer, more)
    widths = wanted(part, group.trunk, models, fewer, more)
    found, reasons = _possible(group, widths, run)
    if reasons and isinstance(part.width, Mapping):
        raise OptionError(f"Zip.width cannot be had for {reasons[0]} Leave these at 1.")
    if widths and not found:
        warn_of_width(reasons)
    return group.room(found)


def check_resizable(job: Job) -> None:
    """The graph of a model must be such that its sizes can be changed.

    Raises:
        OptionError: if it follows the path of one example.
    """
    if job.program.follows_path:
        raise OptionError(
            "Another width than 1 needs a model that torch.export can capture, and this one it cannot: "
            f"{job.program.why_fixed}. Leave the width at 1."
        )


@dataclass
class Chosen:
    """Classes that are to have other widths, as far as the graph allows it.

    Attributes:
        group: the models.
        widths: of the classes, by number.
        reasons: why others keep theirs, a sentence for each that names them.
    """

    group: Prepared
    widths: dict[int, int]
    reasons: list[str] = field(default_factory=list)

    def leave(self, numbers: Collection[int], why: str) -> None:
        """Some classes keep their width."""
        if numbers:
            names = ", ".join(repr(self.group.symmetry.names[n]) for n in sorted(numbers))
            logger.info("as many units as before: %s, since %s", names, why)
            self.reasons.append(f"{names}: {why}")
            self.widths = {n: width for n, width in self.widths.items() if n not in numbers}

    def leave_what_has_no_size(self, sizes: Callable[[Mapping[int, int]], UnitMap]) -> None:
        """Classes keep their width that the graph cannot be given, by the sizes that all classes have with some
        widths."""
        while self.widths:
            try:
                return try_sizes(self.group, sizes(self.widths))
            except CannotResizeError as error:
                self.leave(blamed(self.group.symmetry, self.widths, error), str(error))


def _possible(group: Prepared, widths: Mapping[int, int], run: Run) -> tuple[dict[int, int], list[str]]:
    """Those of some widths that the graph allows together, and why it does not allow the others."""
    symmetry, chosen = group.symmetry, Chosen(group, dict(widths))
    with group.job.timed("resizing"):
        chosen.leave_what_has_no_size(lambda own: any_map(symmetry, group.room(own)))
        if run.verify:
            fewer, more = (
                [n for n, w in chosen.widths.items() if (w < symmetry.units[n].size) is less] for less in (True, False)
            )
            ranked = [n for n in fewer if is_block(symmetry, n) and read_one_by_one(symmetry, group.flow, n)]
            needed = failing(group, ranked, partial(_same_when_left_out, group, widths))
            added_up = [n for n in fewer if n not in ranked or n in needed]
            counted = failing(group, added_up, partial(_same_when_merged, group))
            chosen.leave(counted, "the network is another one when equal units become one, as if an op counted them.")
            placed = failing(group, more, partial(_same_when_twice, group))
            chosen.leave(placed, "the network is another one with each unit twice, as if an op knew their places.")
    return chosen.widths, chosen.reasons


def _apart(group: Prepared, widths: Mapping[int, int]) -> dict[int, int]:
    """Those of some widths that a class may have while any other one keeps its own: not the layers of one recurrence.

    Of any two classes there is a bit in which their places differ, so that trying all classes with the bit and all
    without it tells, for a few runs, which of them go only together.
    """
    numbers, found = sorted(widths), dict(widths)
    for bit in range((len(numbers) - 1).bit_length() if numbers else 0):
        for value in range(2):
            own = {n: widths[n] for i, n in enumerate(numbers) if n in found and i >> bit & 1 == value}
            chosen = Chosen(group, own)
            chosen.leave_what_has_no_size(lambda some: any_map(group.symmetry, group.room(some)))
            for n in own.keys() - chosen.widths.keys():
                del found[n]
    return found


def _allotment(
    group: Prepared, part: Zip, budget: Budget, run: Run, models: int, fewer: Collection[int], more: Collection[int]
) -> Allotment:
    """What widths within a budget are chosen from: of several models from all their units on, of one from its own."""
    symmetry, job = group.symmetry, group.job
    larger = set(more) if models > 1 else set()
    smaller = {n for n in fewer if not is_block(symmetry, n)}
    tried = {
        n: widths_to_try(symmetry, n, models, fewer=n in smaller, more=n in larger, step=part.multiple_of)
        for n in sorted({*smaller, *larger})
    }
    small, reasons = _possible(group, _apart(group, {n: tried[n][-1] for n in smaller}), run)
    large, _ = _possible(group, _apart(group, {n: tried[n][0] for n in larger}), run)
    steps = {}
    for n, widths in tried.items():
        size = symmetry.units[n].size
        steps[n] = tuple(w for w in widths if w == size or n in (small if w < size else large))
    if reasons and not {*small, *large}:
        warn_of_width(reasons)
    parameters = {
        n: t.numel() for n, t in job.states[0].items() if n in job.program.parameters and n not in job.buffers
    }
    first = sum(count for name, count in parameters.items() if not job.owner.get(name, 0))
    work = flops_of(job.program, job.states[0], job.example) if budget.flops is not None else {}
    price = dict.fromkeys(parameters, 1 / first) if budget.parameters is not None else {}
    total = sum(own for name, own in work.items() if not job.owner.get(name, 0))
    if budget.flops is not None and not total:
        raise OptionError(f"Zip.width is {budget}, but torch counts no operations of these models: pass parameters.")
    for name, own in work.items():
        if name in parameters:
            price[name] = price.get(name, 0.0) + own / (total * parameters[name])

    def fits(widths: Mapping[int, int]) -> bool:
        room = Room.of(symmetry, {n: w for n, w in widths.items() if w != symmetry.units[n].size})
        units = any_map(symmetry, room)
        count = sum(math.prod(units.shape(n, job.states[0][n].shape)) for n in parameters)
        if budget.parameters is not None and count > budget.parameters * first:
            return False
        if budget.flops is None:
            return True
        state = {n: t.new_zeros(units.shape(n, t.shape)) for n, t in job.states[0].items()}
        into = resized(group, job.program, group.propagation, units, state)
        return sum(flops_of(into, state, job.example).values()) <= budget.flops * total

    return Allotment(steps, price, fits, str(budget))


def blamed(symmetry: Symmetry, numbers: Collection[int], error: CannotResizeError) -> list[int]:
    """The classes of some that an error is about; all if it is about none."""
    found = [n for n in numbers if not error.classes.isdisjoint(descendants(symmetry, n))]
    return found or list(numbers)


def failing(group: Prepared, numbers: Sequence[int], holds: Callable[[Sequence[int]], bool]) -> list[int]:
    """The classes of some with which something does not hold, found by halves; and those with which it cannot be
    tried."""
    if not numbers:
        return []
    try:
        if holds(numbers):
            return []
    except CannotResizeError as error:
        left = blamed(group.symmetry, numbers, error)
        return [*left, *failing(group, [n for n in numbers if n not in left], holds)]
    half = len(numbers) // 2
    found = [*failing(group, numbers[:half], holds), *failing(group, numbers[half:], holds)] if half else []
    if not found:  # They fail by themselves, or only together.
        return list(numbers)
    return [*found, *failing(group, [n for n in numbers if n not in found], holds)]


def _same_when_merged(group: Prepared, numbers: Sequence[int]) -> bool:
    """Whether the network is the same when equal units of some classes become one. It is not where an op counts them
    and does not only add them up, as a softmax along them does."""
    symmetry = group.symmetry
    return _same_when_equal(group, alike(symmetry, halves(symmetry, numbers), _consumed(group)))


def _same_when_left_out(group: Prepared, widths: Mapping[int, int], numbers: Sequence[int]) -> bool:
    """Whether the network is the same without units of some classes that have the lowest scores of all, as experts that
    are never chosen. Which of equal units is chosen, and how many, is another matter, so that this says nothing of a
    merge of such units but that the graph is the one of a network with fewer."""
    symmetry, call = group.symmetry, group.job.example
    units = alike(symmetry, {n: widths[n] for n in numbers}, _consumed(group))
    small = unequal(symmetry, numbers, units.apply(group.job.states[0]))
    into = resized(group, group.propagation.program, group.propagation, units, small)
    left_out = {n: np.delete(np.arange(symmetry.units[n].size), units.kept[n]) for n in numbers}
    lowest = outputs_of_lowest(group.propagation, symmetry, left_out, spread(units, small), call)
    return agree(lowest, outputs(into, small, call))


def check_joined(group: Prepared, run: Run) -> None:
    """The graph has to allow what is settled to be merged. This is proven on a network in which the units that become
    one are equal.

    Raises:
        OptionError: if it does not.
    """
    symmetry, room = group.symmetry, group.room({})
    try:
        try_sizes(group, any_map(symmetry, room))
    except CannotResizeError as error:
        names = ", ".join(repr(symmetry.names[n]) for n in blamed(symmetry, [*group.joined], error))
        raise OptionError(f"Zip.width cannot be had for {names}: {error} Leave these out.") from error
    places = [np.arange(c.size) for c in symmetry.units]
    for n, place in group.joined.items():
        for nested, own in carry(symmetry, n, place, places).items():
            places[nested] = own
    maps = tuple(np.searchsorted(kept, own) for kept, own in zip(room.kept, places, strict=True))
    units = UnitMap(symmetry.names, symmetry.layout, _consumed(group), (maps,), room.widths, room.kept)
    if run.verify and not _same_when_equal(group, units):
        names = ", ".join(repr(symmetry.names[n]) for n in group.joined)
        raise OptionError(
            f"Zip.width cannot be had for {names}: the network is another one when equal heads become one, as if an op "
            "counted them. Leave these out."
        )


def _consumed(group: Prepared) -> frozenset[Axis]:
    return frozenset(axis for axis, kind in group.flow.items() if kind is Flow.CONSUMES)


def _same_when_equal(group: Prepared, units: UnitMap) -> bool:
    """Whether a network in which units that become one are equal is the same when they do."""
    call = group.job.example
    small = units.apply(group.job.states[0])
    into = resized(group, group.propagation.program, group.propagation, units, small)
    return agree(outputs(group.propagation.program, spread(units, small), call), outputs(into, small, call))


def _same_when_twice(group: Prepared, numbers: Sequence[int]) -> bool:
    """Whether the network is the same when there are twice as many units of some classes, each two times. It is not
    where an op knows their places, as a shuffle of channels does."""
    symmetry, job = group.symmetry, group.job
    widths = {n: 2 * symmetry.units[n].size for n in numbers}
    return same_when_repeated(group.propagation, symmetry, widths, job.states[0], job.example)


def try_sizes(group: Prepared, units: UnitMap) -> None:
    """Looks whether the graph can be given the sizes that merged units need.

    Raises:
        CannotResizeError: if it cannot.
    """
    symmetry = group.symmetry
    state = {n: t.new_empty(units.shape(n, t.shape)) for n, t in group.job.states[0].items()}
    resize(group.propagation, symmetry, units, state, group.job.example)
    rewritten(group.ops, group.job.program, group.propagation, symmetry, units, state, group.job.example)


def any_map(symmetry: Symmetry, room: Room) -> UnitMap:
    """A map of one model into a room, for the sizes that it gives."""
    maps = tuple(
        np.minimum(np.searchsorted(k, np.arange(c.size)), len(k) - 1)
        for k, c in zip(room.kept, symmetry.units, strict=True)
    )
    return UnitMap(symmetry.names, symmetry.layout, frozenset(), (maps,), room.widths, room.kept)


def sized(group: Prepared, units: UnitMap, state: Mapping[str, Tensor]) -> Program:
    """The program with the sizes of merged units; it is as it was if these are those of a model."""
    job = group.job
    if not units.resized:
        return job.program
    with job.timed("resizing"):
        ops = group.ops
        found = rewritten(ops, job.program, group.propagation, group.symmetry, units, state, job.example)
        for node, changes in found.items():
            write(node, changes)
        ops.recompile()
        program = resized(group, job.program, group.propagation, units, state)
        program = replace(program, module=ops, route="torch.export")
        check_emitted(bake(program, state), program, state, job.example)
        return program


def resized(
    group: Prepared, program: Program, found: Propagation, units: UnitMap, state: Mapping[str, Tensor]
) -> Program:
    """A labelled program with the sizes of merged units; the same one if these are those of a model."""
    if not units.resized:
        return program
    return replace(program, aten=resize(found, group.symmetry, units, state, group.job.example))


def nothing_merged(group: Prepared, units: UnitMap) -> bool:
    """Whether every unit of every model is there by itself, and all parameters of the trunk give units."""
    if not units.widths or any(sum(len(own[n]) for own in units.maps) != w for n, w in enumerate(units.widths)):
        return False
    gives = {a.parameter for a in units.layout if group.flow[a.parameter, a.dim] is not Flow.CONSUMES}
    return gives.issuperset(group.job.program.parameters.keys() - group.job.owner.keys() - group.shared)


def nothing_lost(group: Prepared, program: Program, units: UnitMap, state: Mapping[str, Tensor]) -> bool:
    """Whether the result computes what each model does, so that there is nothing to fit or to estimate: no unit was
    merged, and no norm goes over the units of several models. It is tried on the example.

    Arguments:
        group: the models.
        program: of the result.
        units: where units went.
        state: the parameters of the result.
    """
    job = group.job
    if not nothing_merged(group, units):
        return False
    if len(job.states) == 1:
        return True
    tree = program.aten.out
    assert tree is not None  # Of several models, each with a head.
    of_each = pytree.tree_unflatten(range(tree.num_leaves), tree)
    of_each = list(of_each.values()) if isinstance(of_each, dict) else of_each
    merged = outputs(program, state, job.example)
    for own, numbers in zip(job.states, of_each, strict=True):
        model, places = outputs(job.program, own, job.example), pytree.tree_leaves(numbers)
        if not agree([model[i] for i in places], [merged[i] for i in places]):
            return False
    return True


def same_on_example(group: Prepared, program: Program, state: Mapping[str, Tensor]) -> bool:
    """Whether a folded network gives what the network gives on the example, but for rounding in its own precision."""
    job = group.job
    args, kwargs = job.example
    model, folded = (
        Runner(p).outputs(own, args, kwargs) for p, own in ((job.program, job.states[0]), (program, state))
    )
    return agree(model, folded, tolerance=1e-2)


def configured(group: Prepared, units: UnitMap, result: fx.GraphModule) -> dict[str, int] | None:
    """What to change in the configuration of the model's class for the sizes of the result."""
    if not units.resized or group.job.heads:
        return None
    widths = dict.fromkeys((len(units.maps[0][n]), units.widths[n]) for n in sorted(units.resized))
    inside = {
        units.widths[n] // units.widths[parent]
        for n, c in enumerate(group.symmetry.units)
        for parent, _ in c.parents
        if units.widths[parent]
    }
    return config_for(group.job.model, result, group.job.example, widths, sorted(inside))

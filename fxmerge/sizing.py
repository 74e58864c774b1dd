"""Other numbers of units: which classes may have them, and the program with the sizes that follow."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from fxmerge import validate
from fxmerge.emit.bake import bake
from fxmerge.emit.config import config_for
from fxmerge.emit.resize import resize, rewritten, write
from fxmerge.emit.sizes import CannotResizeError
from fxmerge.errors import OptionError
from fxmerge.matching.assignment import descendants
from fxmerge.matching.room import Room, alike, may_change, wanted
from fxmerge.matching.zip_search import mergeable
from fxmerge.notices import warn_of_width
from fxmerge.prepared import Prepared
from fxmerge.program.captured import Program
from fxmerge.program.run import Runner
from fxmerge.recipe import Run, Zip
from fxmerge.symmetry.double import InDouble, in_double
from fxmerge.symmetry.flow import Flow
from fxmerge.symmetry.group import Symmetry
from fxmerge.symmetry.propagate import Propagation
from fxmerge.units.unit_map import UnitMap

logger = logging.getLogger(__name__)


def room_for(group: Prepared, part: Zip, run: Run, models: int) -> Room:
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
    classes = mergeable(group.trunk, group.flow, group.one_to_one)
    widths = wanted(part, group.trunk, models, *may_change(symmetry, group.flow, classes))

    asked, reasons = bool(widths), list[str]()

    def leave(numbers: Collection[int], why: str) -> None:
        names = ", ".join(repr(symmetry.names[n]) for n in sorted(numbers))
        if isinstance(part.width, Mapping):
            raise OptionError(f"Zip.width cannot be had for {names}: {why} Leave these at 1.")
        logger.info("as many merged units as units: %s, since %s", names, why)
        reasons.append(f"{names}: {why}")
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
    if asked and not widths:
        warn_of_width(reasons)
    return Room.of(symmetry, widths)


def _blamed(symmetry: Symmetry, numbers: Collection[int], error: CannotResizeError) -> list[int]:
    """The classes of some that an error is about; all if it is about none."""
    found = [n for n in numbers if not error.classes.isdisjoint(descendants(symmetry, n))]
    return found or list(numbers)


def _counted(group: Prepared, numbers: Sequence[int]) -> list[int]:
    """The classes of some of which the network is not the same when equal units become one: what counts them is no
    layer that reads them, as a softmax along them."""
    symmetry, job = group.symmetry, group.job
    if not numbers:
        return []
    consumed = frozenset(axis for axis, kind in group.flow.items() if kind is Flow.CONSUMES)
    units = alike(symmetry, numbers, consumed)
    try:
        small = units.apply(job.states[0])
        into = resized(group, group.propagation.program, group.propagation, units, small)
    except CannotResizeError as error:  # Of these it cannot be tried.
        left = _blamed(symmetry, numbers, error)
        return [*left, *_counted(group, [n for n in numbers if n not in left])]
    program, small = group.propagation.program, {name: in_double(tensor) for name, tensor in small.items()}
    if validate.agree(_outputs(program, units.spread(small), job.example), _outputs(into, small, job.example)):
        return []
    half = len(numbers) // 2
    return list(numbers) if not half else [*_counted(group, numbers[:half]), *_counted(group, numbers[half:])]


def _outputs(program: Program, state: Mapping[str, Tensor], call: Any) -> list[Any]:
    """What a program computes, in float64 throughout, so that rounding does not hide that networks differ."""
    args, kwargs = pytree.tree_map(in_double, call)
    wide = {name: in_double(tensor) for name, tensor in {**program.constants, **state}.items()}
    with InDouble():  # type: ignore[no-untyped-call]
        return Runner(program).outputs(wide, args, kwargs)


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
        program = resized(group, job.program, group.propagation, units, state)
        program = replace(program, module=ops, route="torch.export")
        validate.check_emitted(bake(program, state), program, state, job.example)
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
    outputs = program.aten.out
    assert outputs is not None  # Of several models, each with a head.
    of_each = pytree.tree_unflatten(range(outputs.num_leaves), outputs)
    of_each = list(of_each.values()) if isinstance(of_each, dict) else of_each
    merged = _outputs(program, state, job.example)
    for own, numbers in zip(job.states, of_each, strict=True):
        model, places = _outputs(job.program, own, job.example), pytree.tree_leaves(numbers)
        if not validate.agree([model[i] for i in places], [merged[i] for i in places]):
            return False
    return True


def same_on_example(group: Prepared, program: Program, state: Mapping[str, Tensor]) -> bool:
    """Whether a folded network gives what the network gives on the example, but for rounding in its own precision."""
    job = group.job
    args, kwargs = job.example
    model, folded = (
        Runner(p).outputs(own, args, kwargs) for p, own in ((job.program, job.states[0]), (program, state))
    )
    return validate.agree(model, folded, tolerance=1e-2)


def configured(group: Prepared, units: UnitMap, result: fx.GraphModule) -> dict[str, int] | None:
    """What to change in the configuration of the model's class for the sizes of the result."""
    if not units.resized or group.job.heads:
        return None
    widths = dict.fromkeys((len(units.maps[0][n]), units.widths[n]) for n in sorted(units.resized))
    return config_for(group.job.model, result, group.job.example, widths)

"""Which units are left out where there are to be fewer of those that are chosen among others, such as experts, and
which of these are merged: whatever makes the smaller error on data."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from fxmerge.combine.by_usage import by_usage
from fxmerge.evidence.usage import Usage
from fxmerge.matching.assignment import descendants
from fxmerge.matching.mergeable import read_one_by_one
from fxmerge.matching.nested import is_block
from fxmerge.matching.room import Room
from fxmerge.prepared import Prepared
from fxmerge.processes import Processes
from fxmerge.program.captured import Program
from fxmerge.program.run import Recorder
from fxmerge.symmetry.lowest import Lowest
from fxmerge.symmetry.section import Section, run_section, section_of
from fxmerge.symmetry.units import Ids
from fxmerge.units.unit_map import UnitMap

logger = logging.getLogger(__name__)

MEMORY = 2**30
"""Bytes of activations that are kept. Batches beyond that do not count."""

HELD_OUT = 5
"""Of so many batches, one tells whether units are merged, and the others tell which are left out."""

State = Mapping[str, Tensor]
Values = Mapping[fx.Node, Any]
Outputs = Callable[[Section, Values], Mapping[fx.Node, Any]]
"""What the nodes of a section compute from what they read."""


@dataclass(frozen=True)
class Trials:
    """What the nodes that some units change compute in the model, to be compared with what they compute otherwise.

    Attributes:
        sections: by the number of a class, the nodes that its units change.
        batches: by their numbers, what these nodes read and give; those of this process.
        count: how many batches all processes have.
        processes: those that share the batches.
    """

    sections: Mapping[int, Section]
    batches: Mapping[int, Values]
    count: int
    processes: Processes

    @staticmethod
    def of(group: Prepared, classes: Collection[int]) -> Trials:
        """Runs the model on its data."""
        job, program = group.job, group.propagation.program
        assert job.data is not None
        sections = {n: section_of(program, parameters_of(group, n)) for n in classes}
        recorder = Recorder(program, {node for own in sections.values() for node in (*own.inputs, *own.ends)})
        batches, room, count = dict[int, Values](), MEMORY, 0
        for number, (args, kwargs) in enumerate(job.data.batches("choosing")):
            count += 1
            if room > 0 and job.processes.owns(number):
                recorder.seen = {}
                recorder.call(job.states[0], args, kwargs)
                batches[number] = recorder.seen
                room -= sum(value.nbytes for value in recorder.seen.values() if isinstance(value, Tensor))
        return Trials(sections, batches, count, job.processes)

    @torch.no_grad()
    def error(self, number: int, outputs: Outputs, *, held_out: bool) -> float:
        """The squared error of other values of the nodes that a class changes, as a share of the values' squares.

        Arguments:
            number: of the class.
            outputs: gives the values.
            held_out: whether it is measured on the batches that are held out, or on the others.
        """
        section, missed, squares = self.sections[number], 0.0, 0.0
        for batch, values in self.batches.items():
            if self.count == 1 or (batch % HELD_OUT == 0) is held_out:
                given = outputs(section, values)
                for node in (n for n in section.ends if values[n].is_floating_point()):
                    wanted, own = values[node].float(), given[node].float()
                    missed += float(torch.where(own == wanted, 0.0, own - wanted).square().sum(dtype=torch.float64))
                    squares += float(wanted.where(wanted.isfinite(), 0.0).square().sum(dtype=torch.float64))
        missed, squares = self.processes.total("errors", (missed, squares))
        return missed / squares if squares else missed


def parameters_of(group: Prepared, number: int) -> list[str]:
    """The parameters along which a class lies, or what is nested in it."""
    tree = set(descendants(group.symmetry, number))
    return list(dict.fromkeys(a.parameter for a in group.symmetry.layout if any(n in tree for n, _ in a.roles)))


def with_survivors(group: Prepared, room: Room) -> tuple[Room, Trials | None]:
    """Chooses the units that stay, of one model and of classes that layers read one by one.

    Units are left out one after the other: always the one without which the nodes that they change give nearly what
    they give with all, where the network chooses among the others. So those stay that matter far beyond their share.
    """
    symmetry = group.symmetry
    numbers = [
        n
        for n in sorted(room.changed - room.joined.keys())
        if symmetry.ancestors(n).isdisjoint(room.changed)
        and room.widths[n] < symmetry.units[n].size
        and is_block(symmetry, n)
        and read_one_by_one(symmetry, group.flow, n)
    ]
    if not numbers or group.job.data is None:
        return room, None
    with group.job.timed("choosing"):
        trials, survivors = Trials.of(group, numbers), dict[int, Ids]()
        lowest = Lowest(group.propagation, symmetry, numbers)
        for n in numbers:

            def error(units: Sequence[int], n: int = n) -> float:
                return trials.error(n, partial(_without, lowest, group.job.states[0], {n: units}), held_out=False)

            size = symmetry.units[n].size
            left_out = least_needed(size, size - room.widths[n], error)
            survivors[n] = np.setdiff1d(np.arange(size), left_out)
            logger.info("%s: left out %s, error %.3g", symmetry.names[n], left_out, error(left_out))
    return replace(room, survivors=survivors), trials


def _without(
    lowest: Lowest, state: State, units: Mapping[int, Sequence[int]], section: Section, values: Values
) -> Values:
    """What a section computes if some units are never chosen."""
    changed = lowest.state(state, units)
    return run_section(lowest.found.program, section, changed, values, lambda n, v: lowest.value(n, v, units))


def least_needed(size: int, count: int, error: Callable[[Sequence[int]], float]) -> list[int]:
    """Chooses units one after the other, always the one with which the error rises least.

    By how much it rises with a unit is measured anew only for the one that it seemed to rise least with (lazy greedy
    search; Minoux 1978), as if it rose no less with a unit once others are chosen.

    Arguments:
        size: how many units there are.
        count: how many of them are chosen.
        error: of some chosen units.

    Returns:
        The chosen units in their order.

    Example:
        >>> least_needed(4, 2, lambda units: sum([3.0, 1.0, 4.0, 1.5][u] for u in units))
        [1, 3]
    """
    chosen, now = list[int](), 0.0
    rise = {unit: error([unit]) for unit in range(size)}
    while len(chosen) < count:
        unit = min(rise, key=rise.__getitem__)
        total = error([*chosen, unit]) if chosen else rise[unit]
        rise[unit] = total - now
        if all(rise[unit] <= other for other in rise.values()):
            chosen.append(unit)
            now = total
            del rise[unit]
    return chosen


def merged_where_better(
    group: Prepared, program: Program, units: UnitMap, room: Room, trials: Trials, used: Usage, state: State
) -> Usage:
    """How often each unit counts where units become one: those that stay alone, or with those that go into them, by
    how often they are used. For each unit that stays, whichever makes the smaller error on data that is held out.

    Arguments:
        group: the model.
        program: of the folded network.
        units: where its units go.
        room: the units that stay.
        trials: what the nodes that the units change compute in the model.
        used: how often units are used.
        state: the parameters of the model.
    """
    counts = dict(used)
    for n, survivors in room.survivors.items():
        goal = torch.from_numpy(units.maps[0][n])
        alone = torch.zeros(len(goal), dtype=torch.float64)
        alone[survivors] = 1
        times = used[n][0] if n in used else torch.ones_like(alone)
        error = partial(_error_of_counts, group, program, units, trials, state, n)
        least = error(alone) if _compares(group, units, n) else 0.0
        for place in goal[survivors].tolist():
            together = torch.where(goal == place, times, alone)
            if least and (together > 0)[goal == place].sum() > 1 and (missed := error(together)) < least:
                logger.info(
                    "%s: merged into unit %d, error %.3g of %.3g", group.symmetry.names[n], place, missed, least
                )
                alone, least = together, missed
        counts[n] = [alone]
    return counts


def _compares(group: Prepared, units: UnitMap, number: int) -> bool:
    """Whether the nodes that a class changes read and give the same units in the model and in the folded network."""
    tree, names = set(descendants(group.symmetry, number)), parameters_of(group, number)
    beside = {n for axis in group.symmetry.layout if axis.parameter in names for n, _ in axis.roles} - tree
    return beside.isdisjoint(units.resized) and not group.projections


def _error_of_counts(
    group: Prepared, program: Program, units: UnitMap, trials: Trials, state: State, number: int, counts: Tensor
) -> float:
    """The error of the folded network's nodes that a class changes, where its units count as told."""
    scaled = by_usage(units, [state], {number: [counts]})
    small = {
        name: units.merge_tensor(name, scaled, [1.0]).to(state[name].dtype) for name in parameters_of(group, number)
    }
    node = {n.name: n for n in program.graph.graph.nodes}

    def outputs(section: Section, values: Values) -> Values:
        own = Section(*(tuple(node[n.name] for n in part) for part in (section.nodes, section.inputs, section.ends)))
        found = run_section(program, own, small, {node[n.name]: values[n] for n in section.inputs})
        return {n: found[node[n.name]] for n in section.ends}

    return trials.error(number, outputs, held_out=True)

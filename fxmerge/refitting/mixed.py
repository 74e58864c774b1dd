"""Parameters that are read one by one, such as the last matrices of experts, fitted to the sum of what they give.

In a merged network, a router gives rows to other experts than in its parents. So only the sum can be compared of what
experts give. For a router that is settled, it is linear in their last matrices.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, fx

from fxmerge.processes import Processes
from fxmerge.program.captured import Program
from fxmerge.refitting.conjugate import Parameters, conjugate_steps, squares
from fxmerge.refitting.gather import Counted, Shares, Teacher, Values, mean_of, more_of
from fxmerge.refitting.places import Places
from fxmerge.refitting.strength import MARGIN
from fxmerge.refitting.sums import Summand, summand_of
from fxmerge.symmetry.section import Section, end_of, run_section, section_to

STEPS = (1, 2, 4, 8, 16, 32, 64)
"""After how many steps of conjugate gradients the error on data held out is measured. Fewer steps stay nearer to the
start, as a stronger ridge does."""

HELD_OUT = 5
"""Of so many batches, one is held out; of a single one, a part of the rows."""

MEMORY = 2**30
"""Bytes of activations that one fit keeps. Batches beyond that are not learnt from."""


@dataclass(frozen=True, eq=False)
class Mixed:
    """A parameter, and the nodes up to the sum that is linear in it.

    Attributes:
        parameter: its name.
        section: the nodes.
        summand: what the sum is added to.
    """

    parameter: str
    section: Section
    summand: Summand | None

    @property
    def end(self) -> fx.Node:
        """The sum."""
        return self.section.ends[0]


def find_mixed(program: Program, parameters: Collection[str], places: Sequence[Places]) -> list[Mixed]:
    """Which of some parameters can be fitted to a sum that is linear in them.

    Arguments:
        program: the program of the merged network.
        parameters: their names.
        places: where units of the parents go, for those in which any are merged.
    """
    found = list[Mixed]()
    for root, source in program.sources.items():
        if source[0] == "parameter" and source[1] in parameters:
            end = end_of(program, root)
            if end is not None and all(own.known(end) for own in places):
                found.append(Mixed(source[1], section_to(program, [root], end), summand_of(end, program.learnt)))
    return found


@dataclass(frozen=True)
class _Batch:
    """What the nodes read, what some rows of their sum are to be, and the root of how much an entry counts."""

    values: Values
    rows: slice
    target: Tensor
    factor: float


class MixedFit:
    """The fit of a parameter.

    Arguments:
        program: the program of the merged network.
        mixed: the parameter.
        teachers: the parents.
        alike: how many batches there will be, by the shares of the parents in their targets.
        summed: whether what the sum is added to is settled.
    """

    def __init__(
        self,
        program: Program,
        mixed: Mixed,
        teachers: Sequence[Teacher],
        alike: Mapping[Shares, int],
        *,
        summed: bool,
    ) -> None:
        self.began = time.perf_counter()
        self.program, self.mixed, self.teachers, self.alike = program, mixed, teachers, alike
        self.summand = mixed.summand if summed else None
        self.held, self.rest = list[_Batch](), list[_Batch]()
        self.room = MEMORY

    def add(self, values: Values, taught: Mapping[int, Values], counted: Counted) -> None:
        """Takes in a batch; see `LayerFit.add`."""
        if self.room <= 0:
            return
        target = mean_of(self.teachers, self.mixed.end, taught, counted.shares)
        if self.summand is not None:
            more = more_of(self.teachers, self.summand.node, values, taught, counted.shares)
            target = target + self.summand.placed(more)
        own = {node: _wide(values[node]) for node in self.mixed.section.inputs}
        self.room -= sum(value.nbytes for value in (*own.values(), target) if isinstance(value, Tensor))
        target = _wide(target).flatten(0, -2)
        parts = {counted.number % HELD_OUT == 0: slice(None)}
        if self.alike[counted.shares] == 1:
            first = -(-len(target) // HELD_OUT)
            parts = {True: slice(first), False: slice(first, None)}
        for is_held, rows in parts.items():
            batch = _Batch(own, rows, target[rows], counted.weight**0.5)
            (self.held if is_held else self.rest).append(batch)

    def settle(self, state: dict[str, Tensor], processes: Processes) -> dict[str, float]:
        """Puts a new parameter into a state dict, if it lowers the error of the sum on data held out; and tells how
        large that error is before and after, as a share of the squares of the sum."""
        name = self.mixed.parameter

        def error(own: Parameters) -> float:
            missed, total = processes.total("errors", squares(self, own, self.held))
            return missed / total if total else 0.0

        best: Parameters = {name: _wide(state[name].detach())}
        before = after = error(best)
        for tried in conjugate_steps(self, best, self.rest, STEPS, lambda sums: processes.total("gradients", sums)):
            missed = error(tried)
            if missed < after * (1 - MARGIN):
                best, after = tried, missed
        state[name] = best[name].to(state[name])
        self.held, self.rest = [], []
        return {"sum_before": before, "sum_after": after, "seconds": time.perf_counter() - self.began}

    def outputs(self, parameters: Parameters, batch: _Batch) -> tuple[Tensor, ...]:
        """The rows of the sum on a batch."""
        found = run_section(
            self.program, self.mixed.section, parameters, batch.values, lambda node, value: _wide(value)
        )
        return (found[self.mixed.end].flatten(0, -2)[batch.rows] * batch.factor,)

    def targets(self, batch: _Batch) -> tuple[Tensor, ...]:
        """What these rows are to be."""
        return (batch.target * batch.factor,)


def _wide(value: Tensor) -> Tensor:
    """A tensor at least in float32, if it is of floating-point numbers."""
    narrow = isinstance(value, Tensor) and value.is_floating_point() and value.element_size() < 4
    return value.float() if narrow else value

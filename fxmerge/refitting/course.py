"""All networks of a refit on their way through its stages, on all data."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from fxmerge.processes import ALONE, Processes
from fxmerge.program.captured import Program
from fxmerge.program.models import same_draws
from fxmerge.program.run import Call, Runner
from fxmerge.refitting.boundaries import Boundaries, without_the_rest
from fxmerge.refitting.gather import Counted, Shares, Values
from fxmerge.refitting.output_error import asked
from fxmerge.refitting.schedule import Step, jump
from fxmerge.refitting.staging import Stage

logger = logging.getLogger(__name__)

_MERGED = -1
"""The key of the merged network among those of its parents."""


@dataclass(frozen=True)
class Lesson:
    """Inputs, and whom to learn from on them.

    Attributes:
        call: the arguments of the model.
        shares: how much the outputs of each parent count in the targets; these sum to one.
        weight: how much all inputs with these shares count together.
        parent: the number of the parent whose own inputs these are; None if they are of all.
    """

    call: Call
    shares: Shares
    weight: float
    parent: int | None = None


class Course:
    """All networks on their way through the stages, on the data of this process.

    Arguments:
        kept: holds what networks compute in one stage for the next.
        merged: the merged network.
        lanes: the parents.
        lessons: the data of all processes.
        stages: the stages, in their order.
        all_parents: whether every parent goes through all data, also through those on which its share is 0.
        processes: those that share the data.
    """

    def __init__(
        self,
        kept: Boundaries,
        merged: Lane,
        lanes: Sequence[Lane],
        lessons: Iterable[Lesson],
        stages: Sequence[Stage],
        *,
        all_parents: bool = False,
        processes: Processes = ALONE,
    ) -> None:
        self.kept, self.merged, self.lanes, self.stages = kept, merged, lanes, stages
        self.at = 0
        self.data: list[Lesson] = []
        self.there: dict[int, list[int]] = {}
        for number, lesson in enumerate(lessons):
            if processes.owns(number):
                inputs = without_the_rest(merged.inputs(*lesson.call))  # One copy for all networks.
                self.there[number] = [*range(len(lanes))] if all_parents else asked(lesson.shares)
                for lane in (_MERGED, *self.there[number]):
                    kept.put((number, lane), inputs)
            self.data.append(replace(lesson, call=((), {})))
        if len(self.data) < processes.size:
            text = "There are fewer batches (%d) than processes (%d), so that some do nothing. Pass smaller batches."
            logger.warning(text, len(self.data), processes.size)
        self._alike: dict[int | None, Counter[Shares]] = {}
        self._counted: dict[int | None, list[Counted | None]] = {}

    def alike(self, parent: int | None) -> Counter[Shares]:
        """How many batches have the same shares, of those on which a layer learns from a parent, or from all (None)."""
        if parent not in self._alike:
            numbers = range(len(self.data))
            self._alike[parent] = Counter(s for s in (self._shares(b, parent) for b in numbers) if s is not None)
        return self._alike[parent]

    def _shares(self, number: int, parent: int | None) -> Shares | None:
        lesson = self.data[number]
        if parent is None:
            return lesson.shares
        if lesson.parent not in (None, parent):
            return None
        return tuple(float(j == parent) for j in range(len(self.lanes)))

    def lesson(self, number: int, parent: int | None) -> Counted | None:
        """How a batch counts for a layer that learns from a parent, or from all; None if it does not learn there."""
        if parent not in self._counted:
            self._counted[parent] = self._count(parent)
        return self._counted[parent][number]

    def _count(self, parent: int | None) -> list[Counted | None]:
        alike, seen = self.alike(parent), Counter[Shares]()
        found: list[Counted | None] = []
        for number, lesson in enumerate(self.data):
            shares = self._shares(number, parent)
            if shares is None:
                found.append(None)
                continue
            weight = (lesson.weight if parent is None else 1.0) / alike[shares]
            found.append(Counted(number, shares, weight, seen[shares]))
            seen[shares] += 1
        # Only their ratios matter. With weights of one, sums of float32 products are exact in float64, so that they do
        # not depend on the order of the batches, and results do not on the number of processes.
        largest = max((one.weight for one in found if one is not None), default=0.0) or 1.0
        return [one and replace(one, weight=one.weight / largest) for one in found]

    def batches(self, stage: int, *, onward: bool) -> Iterator[tuple[int, Values, dict[int, Values]]]:
        """Of every batch its number, what the merged network computes in a stage, and what the parents do.

        What is kept of stages that were left out is computed first.

        Arguments:
            stage: the number of the stage.
            onward: whether the next stage comes next, and not this one again.
        """
        own = self.stages[stage]
        if left_out := self.stages[self.at : stage]:
            mine, theirs = jump([one.mine for one in left_out]), jump([one.theirs for one in left_out])
            for done in self._through(mine, theirs, onward=True):
                del done  # Nothing but what is kept of it is needed.
        yield from self._through(own.mine, own.theirs, onward=onward)
        self.at = stage + onward

    def _through(self, mine: Step, theirs: Step, *, onward: bool) -> Iterator[tuple[int, Values, dict[int, Values]]]:
        """All networks go through all data of this process."""
        for b, there in self.there.items():
            values = self._advance((b, _MERGED), self.merged, mine, onward)
            taught = {j: self._advance((b, j), self.lanes[j], theirs, onward) for j in there}
            yield b, values, taught
            del values, taught  # The next batch takes their room.

    def _advance(self, key: tuple[int, int], lane: Lane, step: Step, onward: bool) -> Values:
        before = self.kept.take(key)
        values = lane.advance(before, step)
        self.kept.put(key, {n: values[n] for n in step.keep} if onward else before)
        return values


class Lane(Runner):
    """One network on its way through the stages.

    Arguments:
        program: the program whose nodes the stages are of.
        state: the parameters.
        own: the program of this network, if it is of other sizes; it has the same nodes by name.
    """

    def __init__(self, program: Program, state: Mapping[str, Tensor], own: Program | None = None) -> None:
        super().__init__(own or program)
        nodes = {n.name: n for n in self.program.graph.graph.nodes}
        self.own = {n: nodes[n.name] for n in program.graph.graph.nodes}
        self.number = {n: i for i, n in enumerate(nodes.values())}
        self.derived = [n for n in nodes.values() if n in self.program.derived]
        self.known: dict[fx.Node, Any] = {}
        self.use(state)

    def use(self, state: Mapping[str, Tensor]) -> None:
        """Goes on with these parameters."""
        self.env = self.known = {}
        for node in self.derived:
            kind, name = self.program.sources.get(node, ("", ""))
            if kind == "parameter":
                self.known[node] = state.get(name, self.program.parameters[name])
            elif kind == "constant":
                self.known[node] = state.get(name, self.program.constants[name])
            else:
                self._compute(node)

    def advance(self, values: Mapping[fx.Node, Any], step: Step) -> Mapping[fx.Node, Any]:
        """What is known throughout, and what a stage shows and keeps; all else is let go of as soon as it was read."""
        self.env = {**self.known, **{self.own[n]: value for n, value in values.items()}}
        run = [self.own[n] for n in step.run]
        wanted = {*self.known, *(self.own[n] for n in (*step.show, *step.keep))}
        readers = Counter(n for node in run for n in node.all_input_nodes)
        for node in run:
            self._compute(node)
            for n in node.all_input_nodes:
                readers[n] -= 1
                if not readers[n] and n not in wanted:
                    del self.env[n]
        found, self.env = {n: self.env[own] for n, own in self.own.items() if own in wanted}, {}
        return found

    @torch.no_grad()
    def _compute(self, node: fx.Node) -> None:
        if torch.Tag.nondeterministic_seeded not in getattr(node.target, "tags", ()):
            self.env[node] = self.run_node(node)
            return
        # All networks draw the same numbers: what they differ in is not to be learnt.
        with same_draws(*self.env.values(), seed=self.number[node]):
            self.env[node] = self.run_node(node)

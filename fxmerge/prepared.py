"""What a job is prepared into: its models, ready to be matched, and their symmetry."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor, fx

from fxmerge import validate
from fxmerge.combine.masks import masked, pruned
from fxmerge.evidence.activations import Pair, similarities
from fxmerge.evidence.running import RunningStatistics
from fxmerge.job import Job
from fxmerge.keeping import CORRELATIONS
from fxmerge.matching.room import Room
from fxmerge.notices import warn_of_outputs, warn_of_statistics
from fxmerge.program.capture import capture_ops
from fxmerge.program.run import Apart
from fxmerge.recipe import Recipe, Run, Similarity
from fxmerge.refitting.outputs import standardized
from fxmerge.reporting import Report, classes_of
from fxmerge.shared import staying, without_shared
from fxmerge.symmetry.flow import Flow, flows, never_merged
from fxmerge.symmetry.group import Symmetry
from fxmerge.symmetry.propagation import Axis, Propagation
from fxmerge.symmetry.truncation import Projection, Truncation
from fxmerge.symmetry.units import Ids


@dataclass(frozen=True)
class Prepared:
    """The symmetry of the models of a job.

    Attributes:
        job: the checked models and data.
        propagation: what the label calculus found.
        whole: all classes of the symmetry.
        symmetry: the symmetry without classes whose units are the same in all models.
        still: the names of these classes.
        flow: what every parameter axis does with its units.
        bases: the kinds of the classes of which all models are in one basis already, by name.
        scaled: likewise of other classes whether their units have the signs or the scales of one model already.
        placed: for every model, where units of some classes, by name, were put before they are matched.
        objectives: of the search for these bases, for every model but one, at the start and after every step.
        unfrozen: the symmetry with these classes in it, and the blocks that they lie in; None where there are none.
        truncation: the directions of these that are left, where the result is to have fewer units of them.
        projections: for every model, how their units go into those of the result, where that loses some directions.
        joined: for classes of which it is settled what is merged, the unit in whose place each unit goes.
        settled: the numbers of the classes of which nothing else is merged, since these are tied to them.
        repeats: the model as a graph in which these are read through repeats, if there are any.
    """

    job: Job
    propagation: Propagation
    whole: Symmetry
    symmetry: Symmetry
    still: frozenset[str]
    flow: Mapping[Axis, Flow]
    bases: Mapping[str, str] = field(default_factory=dict)
    scaled: Mapping[str, str] = field(default_factory=dict)
    placed: tuple[Mapping[str, Ids], ...] = ()
    objectives: tuple[tuple[float, ...], ...] = ()
    unfrozen: Symmetry | None = None
    truncation: Truncation | None = None
    projections: tuple[Projection, ...] = ()
    joined: Mapping[int, Ids] = field(default_factory=dict)
    settled: frozenset[int] = frozenset()
    repeats: fx.GraphModule | None = None

    @staticmethod
    def of(job: Job, recipe: Recipe, run: Run, given: Symmetry | None, *, continuous: bool = False) -> Prepared:
        """The symmetry that is given or else inferred; and the job with states that are ready to be matched.

        Arguments:
            continuous: whether classes are to have their kinds; else they are only permuted.
        """
        assert not isinstance(recipe.match, str)
        propagation, whole = job.symmetry(given, recipe.free, verify=run.verify, continuous=continuous)
        flow = flows(propagation)
        if recipe.match is not None:
            validate.check_class_names(recipe.match.alpha, whole)
            warn_of_outputs(propagation, whole, flow)
        if recipe.targets == "standardized" and job.data is not None:
            with job.timed("standardizing"):
                job = replace(job, states=standardized(job.program, job.states, job.data, job.processes))
        cut = masked(job.program, job.masks)
        symmetry, still = without_shared(whole, flow, job.states, cut.values(), job.owner)
        return Prepared(replace(job, states=pruned(job.states, cut)), propagation, whole, symmetry, still, flow)

    @cached_property
    def shared(self) -> frozenset[str]:
        """The names of the tensors that are equal in all models, and on which no unit moves."""
        return staying(self.symmetry, self.job.states).difference(self.job.owner)

    @cached_property
    def trunk(self) -> Symmetry:
        """The symmetry as it is on what the models share: by this, units are matched."""
        layout = tuple(axis for axis in self.symmetry.layout if axis.parameter not in self.job.owner)
        return replace(self.symmetry, layout=layout)

    @cached_property
    def one_to_one(self) -> frozenset[int]:
        """The classes of which no two units of a model are merged.

        These are the classes whose units stay apart. With heads apart they are also those that no layer of the trunk
        has, and those whose units a head writes: so each head stays as it is but for the order of its units.
        """
        apart, owner = never_merged(self.propagation), self.job.owner
        numbers = set(range(len(self.symmetry.units))) if owner else set()
        on_trunk = {number for axis in self.trunk.layout for number, _ in axis.roles}
        numbers -= on_trunk.union(*map(self.symmetry.ancestors, on_trunk))
        # What only moves along with units of the trunk, as the pixels of a channel do, is where they are.
        for n in sorted(numbers.difference(self.symmetry.choices)):
            numbers -= {n} if all(parent not in numbers for parent, _ in self.symmetry.units[n].parents) else set()
        for axis in self.symmetry.layout:
            place = axis.parameter, axis.dim
            if place in apart or (axis.parameter in owner and self.flow[place] is not Flow.CONSUMES):
                numbers |= {number for number, _ in axis.roles}
        return self.settled.union(numbers)

    def room(self, widths: Mapping[int, int]) -> Room:
        """The room for some classes of other widths, and for what is settled."""
        joined = {n: len(np.unique(place)) for n, place in self.joined.items()}
        return Room.of(self.symmetry, joined | dict(widths), self.joined)

    @cached_property
    def ops(self) -> fx.GraphModule:
        """The model as a graph of ops, in which sizes can be changed."""
        job = self.job
        return capture_ops(self.repeats or job.model, *job.example, varying=set(job.varying))

    def images(self, own: Sequence[Ids], model: int) -> dict[str, list[int]]:
        """For every class by name, the merged unit that each unit of one model goes into; not for those whose units are
        mixed.

        Arguments:
            own: the images of the classes of `symmetry`.
            model: the number of the model.
        """
        moved, placed = iter(own), self.placed[model] if self.placed else {}
        found = {}
        for name, c in zip(self.whole.names, self.whole.units, strict=True):
            image = np.arange(c.size) if name in self.still else next(moved)
            if name not in self.bases:
                found[name] = image[placed.get(name, np.arange(c.size))].tolist()
        return found

    def similarities(
        self,
        symmetry: Symmetry,
        states: Sequence[Mapping[str, Tensor]],
        names: Sequence[str],
        pairs: Sequence[Pair],
        kind: Similarity,
        mixed: Collection[int] = (),
        *,
        checks_statistics: bool = False,
        until: str | None = None,
    ) -> Mapping[int, Mapping[Pair, Tensor]]:
        """How alike units are in what models compute on the data of the job.

        Arguments and result are those of `fxmerge.evidence.activations.similarities`; `until` is that of
        `Stages.remember`. With `checks_statistics`, running statistics that are not of the data are warned of.
        """
        job, data = self.job, self.job.data
        assert data is not None
        running = self._running_statistics(states, names) if checks_statistics else None

        def measure() -> dict[int, dict[Pair, Tensor]]:
            found = similarities(
                self.propagation, symmetry, states, data, names, pairs, kind, job.owner, mixed, running, job.processes
            )
            if running is not None:
                warn_of_statistics({name: running.off(m) for m, name in enumerate(names)})
            return found

        with job.timed("activations"):
            return job.stages.remember("activations", measure, CORRELATIONS, until)

    def _running_statistics(self, states: Sequence[Mapping[str, Tensor]], names: Sequence[str]) -> RunningStatistics:
        """Gathers statistics of what some models of the job normalize, on their own data where they have some."""
        job = self.job
        assert job.data is not None
        before = len(job.names) - len(job.data.loader.loaders) if isinstance(job.data.loader, Apart) else 0  # The base.
        numbers = [job.names.index(name) - before for name in names]
        return RunningStatistics(self.propagation.program, states, numbers, job.owner)

    def report(self, result: fx.GraphModule) -> Report:
        """What is told of any result."""
        first, after = self.job.states[0], result.state_dict()
        return Report(
            models=len(self.job.states),
            shared=tuple(n for n, own in first.items() if n in self.shared and torch.equal(own, after[n])),
            classes=classes_of(self.symmetry),
            bases={**self.bases, **self.scaled},
            demoted=self.symmetry.demoted,
            unknown_ops=dict(self.symmetry.unknown),
            verification_error=self.symmetry.error,
            route="torch.export" if self.job.heads else self.job.program.route,
            seconds=dict(self.job.seconds),
        )

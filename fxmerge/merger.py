"""The merge of one job for any alpha, all from the same statistics."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from itertools import combinations, combinations_with_replacement
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from torch import Tensor, fx

from fxmerge.choose import AUTO, Alpha, best, candidates_of, disagreement, highest
from fxmerge.compare import score_of
from fxmerge.job import Job
from fxmerge.matching.assignment import Scores
from fxmerge.matching.search import match
from fxmerge.matching.universe import Alignment, canonical_order, find_universe, to_reference
from fxmerge.matching.zip_search import ZipMatch, match_zip, zipped_classes
from fxmerge.notices import warn_without_data
from fxmerge.program import Program
from fxmerge.refitting.folding import folded
from fxmerge.refitting.gather import Teacher
from fxmerge.refitting.places import Places
from fxmerge.refitting.refit import Lesson, refit, written_out
from fxmerge.refitting.rivals import Refitted
from fxmerge.rewriting.bake import bake
from fxmerge.rewriting.calibrate import batch_norm_statistics, recalibrate
from fxmerge.rewriting.combine import average
from fxmerge.rewriting.masks import voted
from fxmerge.rewriting.task_vectors import TaskVectors
from fxmerge.rewriting.zipped import produced, zip_average
from fxmerge.score import Score, judged
from fxmerge.shared import staying
from fxmerge.similarity.activations import (
    Activations,
    Pair,
    Similarity,
    classes_along,
    similarities,
    units_along,
    whole,
)
from fxmerge.symmetry.flow import flows
from fxmerge.symmetry.group import Symmetry
from fxmerge.symmetry.permutation import Permutation
from fxmerge.symmetry.propagate import Propagation, propagate

Method = Literal["align", "zip"]
Combine = Literal["average", "repair", "least_squares", "readout"]
Outputs = Literal["mean", "standardized"]

Found = TypeVar("Found")

OWN = 0.5
"""Where every model has data of its own, the share of its outputs in what is to be learnt on these; the rest is the
weighted mean of all models' outputs."""


@dataclass(frozen=True)
class Plan:
    """What is to be made of the models of a job.

    Attributes:
        shares: how much each model counts; they sum to one. Not the base, which comes first if there is one.
        method: whether units are matched one to one, or zipped.
        reference: the number of the model in whose units the result is; None for units that all have a part in.
        budget, damping: options of the zip.
        task_vectors: how differences to the first model, the base, are combined, in place of the average.
        seed: seed of the random order of the search.
        restarts: how often the search is made again, in another order.
        similarity, activations: how activations are compared, and which.
    """

    shares: Sequence[float]
    method: Method = "align"
    reference: int | None = 0
    budget: float = 1.0
    damping: float = 0.5
    task_vectors: TaskVectors | None = None
    seed: int = 0
    restarts: int = 0
    similarity: Similarity = "pearson"
    activations: Activations = "every"


@dataclass(frozen=True)
class Attempt:
    """The merge for one alpha: how the models lie in each other's units, what is zipped, and the parameters."""

    aligned: Alignment
    zipped: ZipMatch | None
    state: dict[str, Tensor]


@dataclass
class Merger:
    """Makes the merge that a plan describes.

    Models are worked on in an order of their own: that of the job, or, for units that all have a part in, one
    that does not depend on how the models were given.
    """

    job: Job
    found: Propagation
    symmetry: Symmetry
    plan: Plan
    zipper: Merger | None = None
    """The one that zips the same models, whose correlations an alignment can take: a zip needs no fewer."""

    @cached_property
    def order(self) -> list[int]:
        numbers = list(range(len(self.job.states)))
        return numbers if self.plan.reference is not None else canonical_order(self.job.states)

    @cached_property
    def states(self) -> list[dict[str, Tensor]]:
        return [self.job.states[i] for i in self.order]

    @cached_property
    def shown(self) -> dict[int, dict[Pair, Tensor]]:
        """For every class that an activation shows, the correlations of its units in the pairs that are needed."""
        if self.job.data is None:
            return {}
        if self.zipper is not None:
            return self.zipper.shown
        numbers, home = range(len(self.states)), self.plan.reference
        if self.plan.method == "zip":
            pairs = list(combinations_with_replacement(numbers, 2))
        else:
            pairs = [p for p in combinations(numbers, 2) if home is None or home in p]
        names = [self.job.names[i] for i in self.order]
        with self.job.timed("activations"):
            kind, taken = self.plan.similarity, self.plan.activations
            return similarities(self.found, self.symmetry, self.states, self.job.data, names, pairs, kind, taken)

    def choose(self, alpha: Alpha, score: Score | None = None) -> tuple[Attempt, dict[str, Any]]:
        """The merge for an alpha, or for the one of several that is best by the merge's outputs or by a score; and what
        the report tells of it."""
        names, errors, scores = self.symmetry.names, dict[float, float](), dict[float, float]()
        candidates = candidates_of(alpha if self.job.data is not None else 1.0, names)
        attempts = [self.attempt(candidate) for candidate in candidates]
        chosen = candidates[0]
        if alpha == AUTO and self.job.data is not None:
            weights = self.plan.shares if self.plan.task_vectors is None else [0.0, *self.plan.shares]
            for candidate, tried in zip(candidates, attempts, strict=True):
                merged = self.finish(tried.state)
                assert isinstance(candidate, float)
                with self.job.timed("choosing alpha"):
                    data, program = self.job.data, self.job.program
                    if score is None:
                        # Where outputs are free, only aligned models have them in the same units.
                        aligned = zip(tried.aligned.permutations, self.job.states, strict=True)
                        parents = [p.apply(s) for p, s in aligned]
                        errors[candidate] = disagreement(program, merged.state_dict(), parents, weights, data)
                    else:
                        scores[candidate] = judged(score, merged, f"the average for alpha {candidate}")
            chosen = best(errors) if score is None else highest(scores)
        attempt = attempts[candidates.index(chosen)]
        told: dict[str, Any] = {
            "alpha": {names[n]: own for n, own in chosen.items()} if isinstance(chosen, Mapping) else chosen,
            "alpha_errors": errors,
            "alpha_scores": scores,
            "quality": [{name: dict(q) for name, q in quality.items()} for quality in attempt.aligned.quality],
            "objective": list(attempt.aligned.traces),
        }
        if attempt.zipped is not None:
            told |= {"zip_objective": attempt.zipped.trace, "zipped_within": dict(attempt.zipped.within)}
        if self.plan.task_vectors is not None:
            told["task_vectors"] = {"name": type(self.plan.task_vectors).__name__, **asdict(self.plan.task_vectors)}
        return attempt, told

    def attempt(self, alpha: float | Mapping[int, float]) -> Attempt:
        """The merge for one alpha."""
        least = min(alpha.values(), default=1.0) if isinstance(alpha, Mapping) else alpha
        shown = self.shown if least < 1 else {}
        aligned, plan = self._align(shown, alpha), self.plan
        zipped: ZipMatch | None = None
        with self.job.timed("rewriting"):
            states = [p.apply(s) for p, s in zip(aligned.permutations, self.states, strict=True)]
            statistics = batch_norm_statistics(self.job.program)
        if self.job.data is None and statistics:
            warn_without_data(states, statistics)
        if plan.task_vectors is not None:
            with self.job.timed("rewriting"):
                state = plan.task_vectors.combine(states[0], states[1:], plan.shares, statistics)
                cut = [{name: s[name] for name in self.job.masks} for s in states[1:]]
                state = voted({**state, **average(cut, plan.shares, ())}, self.job.masks)
                state = self._rederived(state, states[1:], plan.shares)
            return Attempt(aligned, zipped, state)
        shares = [plan.shares[i] for i in self.order]
        if plan.method == "zip":
            zipped = self._zip(states, aligned, shown, alpha)
            layout, flow = self.symmetry.layout, flows(self.found)
            combine = partial(zip_average, labels=zipped.labels, layout=layout, flow=flow, weights=shares)
        else:
            combine = partial(average, weights=shares)
        with self.job.timed("rewriting"):
            state = voted(combine(states, statistics=statistics), self.job.masks)
            if self.job.data is None and statistics:
                state = folded(self.job.program, states, state, partial(combine, statistics=()))
            state = self._rederived(state, states, shares)
        if plan.reference is None:
            aligned = aligned.renumbered(self.order)
        return Attempt(aligned, zipped, state)

    def _rederived(
        self, state: Mapping[str, Tensor], states: Sequence[Mapping[str, Tensor]], shares: Sequence[float]
    ) -> dict[str, Tensor]:
        """A state dict with buffers that fit its parameters."""
        return self.job.rederived(state, states[max(range(len(states)), key=shares.__getitem__)])

    def _align(self, shown: Mapping[int, Mapping[Pair, Tensor]], alpha: float | Mapping[int, float]) -> Alignment:
        """All models in the units of one, or of all."""
        symmetry, states, home, seen = self.symmetry, self.states, self.plan.reference, self.job.progress
        with self.job.timed("matching"):
            if home is None:
                across = {n: {p: c for p, c in pairs.items() if p[0] != p[1]} for n, pairs in shown.items()}
                search = partial(find_universe, symmetry, states, across, alpha=alpha, progress=seen)
                return self._highest(search, lambda found: found.traces[0][-1])
            matches = {}
            for i in range(len(states)):
                if i != home:
                    own = {n: pairs[home, i] if home < i else pairs[i, home].T for n, pairs in shown.items()}
                    one = partial(match, symmetry, states[home], states[i], own, alpha=alpha, progress=seen)
                    matches[i] = self._highest(one, lambda found: found.trace[-1])
            return to_reference(symmetry, matches, home)

    def _highest(self, search: Callable[..., Found], objective: Callable[[Found], float]) -> Found:
        """The best of several searches, each with a seed of its own; of equals the first."""
        seeds = range(self.plan.seed, self.plan.seed + self.plan.restarts + 1)
        return max((search(seed=seed) for seed in seeds), key=lambda found: score_of(objective(found)))

    def _zip(
        self,
        states: Sequence[Mapping[str, Tensor]],
        aligned: Alignment,
        shown: Mapping[int, Mapping[Pair, Tensor]],
        alpha: float | Mapping[int, float],
    ) -> ZipMatch:
        """What to merge of aligned models, within and across."""
        correlation: dict[int, Scores] = {}
        for n, pairs in shown.items():
            at = [torch.from_numpy(p.images[n]).argsort() for p in aligned.permutations]
            placed = {(i, j): c[at[i]][:, at[j]] for (i, j), c in pairs.items()}
            correlation[n] = whole(placed, len(states))
        with self.job.timed("matching"):
            search = partial(
                match_zip,
                self.symmetry,
                states,
                correlation,
                flows(self.found),
                alpha=alpha,
                budget=self.plan.budget,
                damping=self.plan.damping,
                progress=self.job.progress,
            )
            return self._highest(search, lambda found: found.trace[-1])

    @cached_property
    def shared(self) -> frozenset[str]:
        """The names of the tensors that are equal in all models, and on which no unit moves."""
        return staying(self.symmetry, self.job.states)

    def stayed(self, state: Mapping[str, Tensor]) -> list[str]:
        """The names of the tensors that all models share and that are the same in a state dict."""
        return [
            name for name, own in self.job.states[0].items() if name in self.shared and torch.equal(own, state[name])
        ]

    def refit(
        self, attempt: Attempt, combine: Combine, *, or_parent: bool, options: bool, max_memory: float
    ) -> Refitted:
        """The parameters of an attempt, its layers refitted, or if better those of a parent; with all options if these
        are asked for. Parents are numbered as in the job."""
        permutations = [attempt.aligned.permutations[i] for i in self.order]
        states = [p.apply(s) for p, s in zip(permutations, self.states, strict=True)]
        program = written_out(self.found.program)
        with self.job.timed("refitting"):
            refitted = refit(
                program,
                states,
                attempt.state,
                self._lessons(),
                teachers=None if attempt.zipped is None else self.teachers(program, states, attempt.zipped),
                only_last=combine == "readout",
                or_parent=or_parent and combine == "least_squares",
                repair=combine == "repair",
                shared=self.shared,
                max_memory=max_memory,
                seed=self.plan.seed,
                progress=self.job.progress,
            )
            found = {id(one.state): one.state for one in (refitted, *refitted.options) if one.parent is None}
            shares = [self.plan.shares[i] for i in self.order]
            for state in found.values():
                state.update(self._rederived(state, states, shares))
        return (refitted if options else replace(refitted, options=())).renumbered(self.order)

    def teachers(self, program: Program, states: Sequence[Mapping[str, Tensor]], zipped: ZipMatch) -> list[Teacher]:
        """The models as the layers of a zipped network learn from them."""
        flow, layout = flows(self.found), self.symmetry.layout
        merged = frozenset(n for c in zipped_classes(self.symmetry, flow) for n, _ in self.symmetry.views[c])
        found = self.found if program is self.found.program else propagate(program)
        classes, units = classes_along(found, self.symmetry), units_along(found, self.symmetry)
        return [
            Teacher(*produced(state, labels, layout, flow), Places(classes, units, merged, labels))
            for state, labels in zip(states, zipped.labels, strict=True)
        ]

    def _lessons(self) -> Iterator[Lesson]:
        assert self.job.data is not None
        shares = self.plan.shares
        for owner, call in self.job.data.owned():
            own = [share if owner is None else OWN * (i == owner) + (1 - OWN) * share for i, share in enumerate(shares)]
            yield Lesson(call, tuple(own[i] for i in self.order), 1.0 if owner is None else shares[owner])

    def finish(self, state: Mapping[str, Tensor], *, calibrate: bool = True) -> fx.GraphModule:
        """A GraphModule with these parameters, its BatchNorm statistics re-estimated."""
        with self.job.timed("rewriting"):
            merged = bake(self.job.program, state)
        if self.job.data is not None and calibrate:
            with self.job.timed("calibration"):
                recalibrate(merged, self.job.program, self.job.data, self.shared)
        return merged


def images(symmetry: Symmetry, still: Collection[str], permutation: Permutation) -> dict[str, list[int]]:
    """For every class of a symmetry by name, where each unit goes.

    Arguments:
        symmetry: all classes.
        still: the names of those that do not move.
        permutation: an element of the symmetry without these.
    """
    moved = iter(permutation.images)
    return {
        name: (np.arange(c.size) if name in still else next(moved)).tolist()
        for name, c in zip(symmetry.names, symmetry.units, strict=True)
    }

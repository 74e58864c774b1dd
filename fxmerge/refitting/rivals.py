"""The parents beside the merged network: which of them comes nearest to what all of them answer together.

A network that keeps half of what each parent computes may know less than one of them does: where the parents have
learnt much the same, or are too narrow to be halved. Fitting the last layers of the parents as well costs next to
nothing, since the parents run on all data anyway.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from fxmerge.compare import error_of
from fxmerge.program import Program
from fxmerge.refitting.answers import Answers
from fxmerge.refitting.gather import LayerFit, Shares, Teacher
from fxmerge.refitting.layers import Layer
from fxmerge.refitting.moments import NEGLIGIBLE

Report = dict[str, dict[str, float]]
"""Numbers on the fit of each layer, by its name."""

AGREED = 0.5
"""Parents answer alike where one of them, as it is, misses less than this share of the square of the mean of all."""

EVEN = 1e-6
"""Shares that differ by less than this count as equal, and so do errors that differ by less than this share: the first
parent is taken."""

KEPT_IF_APART, KEPT_IF_ALIKE = 4 / 3, 1 / 2
"""A merged network is kept whose error is at most so many times that of a parent with its last layers refitted, where
parents answer different things and where they answer alike. A parent makes no error in what it answers itself, and all
of it in what others do, so that of two networks with equal errors the merged one serves different tasks better. Where
they answer alike, what a parent misses of the mean is mostly chance, and what a merged network misses is knowledge.
Where outputs are compared, the parent's error is that of its outputs as it is. `benchmarks/parents.py` shows what these
give."""

NEARER = 0.055
"""Of parents that answer alike, one is given with its last layers refitted if these miss less of the mean than it does,
by this share of the square of the mean: the mean errs less than they do on average, and so may who comes nearer. Where
there is little to gain, it would only lose answers that it has learnt with more data, and by a better measure than
squared errors."""


@dataclass(frozen=True)
class Refitted:
    """What a refit gives.

    Attributes:
        state: the new state dict.
        layers: for every refitted layer by name: `before` and `after`, the squared error relative to the square of the
            targets; `held_out`, the same on rows apart from those of the fit; `ridge`, relative to the mean square of
            a feature; `rank`, how many directions of the features it leaves free, of `features`; `rows`, the number
            of equations; `seconds`. Empty where a parent is given as it is.
        left: for parameters that some op multiplies with data and that were left as they were, the reason.
        parent: the number of the parent that the state is of, all but its last layers where these were refitted; None
            for the merged network.
        errors: the errors of the parents by number, and at None of the merged network; empty where they were not
            compared.
        compared: by what: by the error held out of the last layers, these refitted; or, where these do not tell, by the
            outputs of the networks as they are.
        error: that of the merged network, whatever the state is of; NaN if a last layer was not fitted.
        alike: whether a parent is given because all answer alike.
        options: all that could be given, for who can tell better which is best: the merged network first; then, if
            they may be given, the parents as they are, and with last layers refitted.
    """

    state: dict[str, Tensor]
    layers: Report
    left: Mapping[str, str]
    parent: int | None = None
    errors: Mapping[int | None, float] = field(default_factory=dict)
    compared: Literal["last layers", "outputs"] | None = None
    error: float = math.nan
    alike: bool = False
    options: tuple[Refitted, ...] = ()

    def renumbered(self, numbers: Sequence[int]) -> Refitted:
        """The same with other numbers of the parents."""
        errors = {j if j is None else numbers[j]: error for j, error in self.errors.items()}
        return replace(
            self,
            parent=None if self.parent is None else numbers[self.parent],
            errors=dict(sorted(errors.items(), key=lambda one: -1 if one[0] is None else one[0])),
            options=tuple(option.renumbered(numbers) for option in self.options),
        )


def asked(shares: Shares) -> list[int]:
    """The parents that count."""
    return [j for j, share in enumerate(shares) if share > 0]


class Rivals:
    """The parents, each with its last layers fitted to what the merged network learns.

    They take part where each is asked on all data.

    Arguments:
        last: the last layers.
        parents: their state dicts.
        teachers: what the parents' layers give to learn from.
        shares: how much each parent counts in the targets, wherever these are not the same.
        answers: the errors of the outputs of networks as they are, if last layers cannot be compared.
    """

    def __init__(
        self,
        last: Sequence[Layer],
        parents: Sequence[Mapping[str, Tensor]],
        teachers: Sequence[Teacher],
        shares: Sequence[Shares],
        answers: Answers | None = None,
    ) -> None:
        self.last, self.answers = () if answers else last, answers
        self.teachers, self.parents, self.shares = teachers, parents, shares
        self.states = {j: dict(own) for j, own in enumerate(parents) if all(j in asked(each) for each in shares)}
        self.told: dict[int, Report] = {j: {} for j in self.states}

    def enter(self, layers: Sequence[Layer], alike: Mapping[Shares, int], seed: int) -> dict[int, list[LayerFit]]:
        """The fits of some layers, by the parent."""
        due = [layer for layer in layers if layer in self.last]
        return {
            j: [LayerFit(layer, own, self.teachers, {}, (), alike, seed) for layer in due]
            for j, own in self.states.items()
        }

    def settle(self, fits: Mapping[int, Sequence[LayerFit]]) -> None:
        """Puts the fitted coefficients into the parents' state dicts."""
        for j, own in fits.items():
            for fit in own:
                self.told[j][fit.layer.name] = fit.settle(self.states[j])

    def choose(self, merged: Refitted) -> Refitted:
        """The merged network, or the parent that is seen to know more, if errors tell: with last layers refitted; or as
        it is, where the parents answer alike and these bring it little nearer to their mean."""
        errors, before = self._errors(merged)
        theirs = {j: errors[j] for j in self.states if math.isfinite(errors[j])}
        if theirs:
            merged = replace(merged, errors=errors, compared="outputs" if self.answers else "last layers")
        as_they_are = {
            j: replace(merged, state=dict(own), layers={}, left={}, parent=j)
            for j, own in enumerate(self.parents)
            if j in self.states
        }
        refitted = {
            j: replace(one, state=self.states[j], layers=self.told[j]) for j, one in as_they_are.items() if self.last
        }
        chosen = merged
        if theirs:
            least = min(theirs.values())
            best = next(j for j, error in theirs.items() if error <= least * (1 + EVEN) + NEGLIGIBLE)
            alike = self._count_equally() and before[best] < AGREED
            others = as_they_are if alike and before[best] - theirs[best] < NEARER else refitted
            bound = KEPT_IF_ALIKE if alike else KEPT_IF_APART
            if best in others and error_of(errors[None]) > bound * theirs[best] + NEGLIGIBLE:
                chosen = replace(others[best], alike=alike)
        return replace(chosen, options=(merged, *as_they_are.values(), *refitted.values()))

    def _errors(self, merged: Refitted) -> tuple[dict[int | None, float], dict[int, float]]:
        """The errors of all networks, and those of the parents as they are."""
        errors: dict[int | None, float] = {}
        if self.answers:
            before = {j: self.answers.error(j) for j in self.states}
            errors |= {None: self.answers.error(None)} | before
        else:
            before = {j: mean_of(told, self.last, "before") for j, told in self.told.items()}
            held_out = {j: mean_of(told, self.last, "held_out") for j, told in self.told.items()}
            errors |= {None: merged.error} | held_out
        return errors, before

    def _count_equally(self) -> bool:
        """Whether all parents count equally. Else it tells nothing that one comes near to the mean: it is who counts
        most."""
        return all(max(shares) - min(shares[j] for j in asked(shares)) < EVEN for shares in self.shares)


def comparable(
    program: Program,
    last: Sequence[Layer],
    chosen: Collection[Layer],
    parents: Sequence[Mapping[str, Tensor]],
    teachers: Sequence[Teacher],
) -> bool:
    """Whether last layers, refitted, tell how much networks know: there are some, all can be refitted, and all other
    parameters come before them. What others give would be in units of a network's own, or is not what they give."""
    own_outputs = all(
        torch.equal(layer.read(parent), layer.read(teacher.state))
        for layer in last
        for parent, teacher in zip(parents, teachers, strict=True)
    )
    return own_outputs and bool(last) and all(layer in chosen for layer in last) and not used_elsewhere(program, last)


def mean_of(told: Report, last: Sequence[Layer], number: str) -> float:
    """The mean of a number over the last layers; NaN unless all were fitted."""
    found = [told.get(layer.name, {}).get(number, math.nan) for layer in last]
    return sum(found) / len(found) if found else math.nan


def used_elsewhere(program: Program, last: Sequence[Layer]) -> bool:
    """Whether a parameter is used other than in some layers or on the way to them."""
    before = {use.node for layer in last for use in layer.uses}
    for node in reversed(program.graph.graph.nodes):
        if not before.isdisjoint(node.users):
            before.add(node)
    parameters = program.of_parameters & program.derived
    return any(
        not parameters.isdisjoint(node.all_input_nodes) for node in program.learnt - before if node.op != "output"
    )

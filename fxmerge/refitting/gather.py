"""What is gathered of the activations at a node, and the parameters that follow from it."""

from __future__ import annotations

import math
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial, reduce
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from fxmerge.errors import LoaderError, NonFiniteError
from fxmerge.evidence.moments import Moments
from fxmerge.processes import Processes
from fxmerge.program.forms import bind
from fxmerge.refitting.cross_entropy import ScoreFit, ScoreRows, fit_scores
from fxmerge.refitting.layers import Layer, Use
from fxmerge.refitting.places import Places
from fxmerge.refitting.ridge import Fit, NormalEquations, joined, step_without
from fxmerge.refitting.sums import Summand

ROWS_PER_FEATURE, MIN_ROWS = 16, 8192
"""How many equations a fit is made of at most: so many for each feature, and at least so many. Tokens and places of an
image above that are subsampled."""

Values = Mapping[fx.Node, Any]
Shares = tuple[float, ...]


@dataclass(frozen=True)
class Counted:
    """How a batch counts for a layer.

    Attributes:
        number: of the batch, among all.
        shares: how much the outputs of each parent count in the targets.
        weight: how much the batch counts.
        before: how many batches before it have the same shares.
    """

    number: int
    shares: Shares
    weight: float
    before: int


@dataclass(frozen=True)
class Teacher:
    """A parent whose layers give what is to be learnt.

    Attributes:
        state: its parameters. Where units are merged, its layers give sums over the members of a merged unit, from
            inputs in units of its own.
        members: for parameters by name, how many members each entry is a sum of; one where it is not told.
        places: where its units go in its values; None where nothing is merged.
    """

    state: Mapping[str, Tensor]
    members: Mapping[str, Tensor]
    places: Places | None = None

    def gather(self, node: fx.Node, value: Tensor) -> tuple[Tensor, Tensor]:
        """What it computes at a node, in merged units: sums over their members, and how many there are; at least in
        float32."""
        value = value.float() if value.element_size() < 4 else value
        return (value, value.new_ones([1] * value.ndim)) if self.places is None else self.places.gather(node, value)


class LayerFit:
    """The second moments of a layer's features and targets, and its fit.

    Arguments:
        layer: the layer.
        state: holds the coefficients around which it is fitted.
        teachers: the parents.
        summands: what the outputs of some uses are added to.
        shown: the uses that learn from the teachers' outputs; others do from their coefficients, for chosen rows only.
        alike: how many batches there will be, by the shares of the parents in their targets.
        seed: seed of the choice of rows.
        own: the numbers of parents whose errors are to be known, none of whose outputs are in other units than the
            layer's.
        scores: whether the layer writes scores of classes, or of what a softmax chooses from, which are fitted to the
            parents' distributions at last.
    """

    def __init__(
        self,
        layer: Layer,
        state: Mapping[str, Tensor],
        teachers: Sequence[Teacher],
        summands: Mapping[Use, Summand],
        shown: Collection[Use],
        alike: Mapping[Shares, int],
        seed: int,
        own: Collection[int] = (),
        *,
        scores: bool = False,
    ) -> None:
        self.began = time.perf_counter()
        self.layer, self.teachers, self.summands, self.shown = layer, teachers, summands, shown
        self.centre = layer.read(state)
        groups, features, outputs = self.centre.shape
        self.folds = NormalEquations.folds(groups, features, outputs, self.centre.device)
        batches = sum(alike.values()) * len(layer.uses)
        self.limit = max(ROWS_PER_FEATURE * features, MIN_ROWS) // batches + 1
        self.rows = ScoreRows(features, outputs, batches) if scores else None
        self.alike, self.seed = alike, seed
        self.parts: dict[tuple[int, Shares], Tensor] = {}
        self.missed = dict.fromkeys(own, 0.0)
        self.held_out = math.nan

    @cached_property
    def coefficients(self) -> list[Tensor]:
        """Those of the teachers."""
        return [self.layer.read(teacher.state) for teacher in self.teachers]

    @cached_property
    def members(self) -> list[Tensor]:
        """How many members the outputs of each teacher's coefficients are sums of."""
        return [self.layer.read(teacher.members, missing=1.0).to(self.centre) for teacher in self.teachers]

    def add(self, values: Values, taught: Mapping[int, Values], counted: Counted) -> None:
        """Takes in a batch.

        Arguments:
            values: what the merged network's nodes compute.
            taught: what the nodes of some parents compute.
            counted: how the batch counts.
        """
        shares, weight = counted.shares, counted.weight
        generator = generator_of(self.seed, counted.number)
        for use in self.layer.uses:
            mine = arguments(use, values)
            rows, chosen = use.size(mine), None
            if rows > self.limit:
                chosen = torch.randperm(rows, generator=generator)[: self.limit].sort().values
            x = use.features(mine, chosen)
            y = self.targets(use, taught, shares, chosen)
            if not x.any() and not y.any():
                continue  # Such as the state that a recurrence begins with. Of what is zero, no units are known.
            if use in self.summands:
                summand = self.summands[use]
                more = more_of(self.teachers, summand.node, values, taught, shares)
                y = y + use.outputs(summand.placed(more), mine, chosen)
            for j in self.missed:
                given = self._given(use, taught[j], j, chosen)
                self.missed[j] += weight * float((y - given).square().sum(dtype=torch.float64))
            # The rows of one batch may be of the same inputs, and then tell little of each other's folds; inputs of one
            # task tell little of those of another.
            count = len(self.folds)
            parts = count if self.alike[shares] == 1 else 1
            apart = zip(x.chunk(parts, 1), y.chunk(parts, 1), strict=True)
            for fold, part in enumerate(apart, start=counted.before):
                self.folds[fold % count].add(*part, self.centre.to(x), weight, counted.number)
            if self.rows is not None and weight > 0:
                p = self.distribution(use, taught, shares, chosen)
                for fold, (own, its) in enumerate(zip(x[0].chunk(parts), p.chunk(parts), strict=True)):
                    self.rows.add((counted.before + fold) % count, own, its, weight, generator, parts, counted.number)

    def targets(self, use: Use, taught: Mapping[int, Values], shares: Shares, chosen: Tensor | None) -> Tensor:
        """What the parents give at a use, in merged units: shape (groups, rows, outputs)."""
        if use in self.shown:
            given = mean_of(self.teachers, use.node, taught, shares)
            return use.outputs(given, arguments(use, next(iter(taught.values()))), chosen)
        features = ((j, use.features(arguments(use, theirs), chosen)) for j, theirs in taught.items())
        return _sum(x @ self.taught(j, shares).to(x) for j, x in features)

    def distribution(self, use: Use, taught: Mapping[int, Values], shares: Shares, chosen: Tensor | None) -> Tensor:
        """The mean of the probabilities that the parents give at a use, in merged units: shape (rows, classes). Of
        units that are merged, the probabilities are added up."""

        def given(number: int, theirs: Values) -> Tensor:
            value = theirs[use.node]
            wide = torch.promote_types(value.dtype, torch.float32)
            total, _ = self.teachers[number].gather(use.node, value.softmax(use.outputs_dim, dtype=wide))
            return use.outputs(total, arguments(use, theirs), chosen)[0]

        return _sum(shares[j] * given(j, theirs) for j, theirs in taught.items())

    def _given(self, use: Use, theirs: Values, number: int, chosen: Tensor | None) -> Tensor:
        """What one parent gives at a use."""
        own = arguments(use, theirs)
        if use in self.shown:
            return use.outputs(theirs[use.node], own, chosen)
        features = use.features(own, chosen)
        return features @ self.coefficients[number].to(features)

    def taught(self, number: int, shares: Shares) -> Tensor:
        """The coefficients with which one parent has a part in the targets."""
        if (number, shares) not in self.parts:
            counted = _sum(share * own for share, own in zip(shares, self.members, strict=True))
            self.parts[number, shares] = _ratio(shares[number] * self.coefficients[number], counted)
        return self.parts[number, shares]

    @staticmethod
    def total(fits: Sequence[LayerFit], processes: Processes) -> None:
        """Makes some fits those of what is gathered of the batches of all processes.

        Raises:
            NonFiniteError: if an input or an output of a layer is NaN or infinite.
        """
        NormalEquations.total([fold for fit in fits for fold in fit.folds], processes)
        for fit in fits:
            if fit.missed:
                fit.missed = processes.total("errors", fit.missed)
            if fit.rows is not None:
                fit.rows.total(processes)
            if not all(fold.is_finite for fold in fit.folds):
                raise not_finite(fit.layer)

    def settle(self, state: dict[str, Tensor], found: Fit, processes: Processes) -> dict[str, float]:
        """Puts the fitted coefficients into a state dict, and tells how they were found.

        Arguments:
            state: the state dict.
            found: the squared-error fit.
            processes: those that have been given the same.
        """
        self.layer.write(state, self.centre + found.step)
        self.held_out = found.held_out * sum(fold.targets.square for fold in self.folds)
        told: dict[str, float] = {}
        if self.rows is not None and self.rows.parts:
            scores = processes.once("scores of classes", partial(self._fit_scores, found))
            told = {} if scores is None else self._settle_scores(state, scores)
        return {
            "before": found.before,
            "after": found.after,
            "held_out": found.held_out,
            "ridge": found.ridge,
            "rank": found.rank,
            "features": self.centre.shape[1],
            "rows": sum(fold.targets.rows for fold in self.folds),
            **told,
            "seconds": time.perf_counter() - self.began,
        }

    def _fit_scores(self, squared: Fit) -> ScoreFit | None:
        """The fit to distributions over classes; None if no rows can be held out."""
        assert self.rows is not None
        rows, held = self.rows.gathered()
        first, *others = (fold for fold in self.folds if fold.targets.rows)
        if not others or not 0 < held < len(rows):
            return None
        rest = None if math.isinf(squared.ridge) else step_without(first, [first, *others], squared.ridge)
        without = torch.zeros_like(squared.step) if rest is None else rest
        return fit_scores(rows, held, (self.centre + squared.step)[0], (self.centre + without)[0])

    def _settle_scores(self, state: dict[str, Tensor], found: ScoreFit) -> dict[str, float]:
        """Puts coefficients into a state dict that are fitted to distributions over classes, if these predict the
        distributions of held-out rows better than the squared-error fit; and tells how well both do."""
        if found.coefficients is not None:
            self.layer.write(state, found.coefficients[None])
            first = next(fold for fold in self.folds if fold.targets.rows)
            # What the outputs miss is now known on the rows that were held out, and taken to be alike on the others.
            spread = self._targets.spread
            if first.targets.spread > 0:
                self.held_out = joined([first]).error(found.held_out - self.centre) * spread / first.targets.spread
        return {
            "cross_entropy_before": found.before,
            "cross_entropy_after": found.after,
            "entropy": found.entropy,
            "cross_entropy_ridge": found.ridge,
        }

    def output_errors(self) -> dict[int | None, float]:
        """What the outputs of the fit on rows held out, at None, and those of parents by number miss of the variance of
        the targets."""
        variance = self._targets.spread
        missed = [(None, self.held_out), *self.missed.items()]
        return {number: own / variance if variance > 0 else math.nan for number, own in missed}

    @property
    def _targets(self) -> Moments:
        return sum((fold.targets for fold in self.folds), start=Moments())


def mean_of(teachers: Sequence[Teacher], node: fx.Node, taught: Mapping[int, Values], shares: Shares) -> Tensor:
    """What the parents compute at a node, in merged units."""
    given = [(shares[j], *teachers[j].gather(node, theirs[node])) for j, theirs in taught.items()]
    return _ratio(_sum(share * own for share, own, _ in given), _sum(share * count for share, _, count in given))


def more_of(
    teachers: Sequence[Teacher], node: fx.Node, values: Values, taught: Mapping[int, Values], shares: Shares
) -> Tensor:
    """What the parents compute at a node more than the merged network does, in merged units."""
    mine = values[node]
    given = [(shares[j], *teachers[j].gather(node, theirs[node])) for j, theirs in taught.items()]
    # Differences come first: of large values that are alike, the mean is another value.
    more = (share * torch.where(own == count * mine, 0.0, own - count * mine) for share, own, count in given)
    return _ratio(_sum(more), _sum(share * count for share, _, count in given))


def _sum(tensors: Iterable[Tensor]) -> Tensor:
    return reduce(torch.add, tensors)


def _ratio(total: Tensor, count: Tensor) -> Tensor:
    """The mean over members; 0 where there are none."""
    return torch.where(count > 0, total / count, 0.0)


def generator_of(seed: int, batch: int) -> torch.Generator:
    """Chooses the rows of a batch: the same ones, whatever other batches there are."""
    (own,) = np.random.SeedSequence((seed, batch)).generate_state(1).tolist()
    return torch.Generator().manual_seed(own)


def not_finite(layer: Layer) -> NonFiniteError:
    """The error for a layer whose inputs or outputs cannot be learnt from."""
    return NonFiniteError(
        f"An activation is NaN or infinite where {layer.name!r} (graph node {layer.uses[0].node.name!r}) was to be "
        "refitted. Check the models' outputs on this data."
    )


def arguments(use: Use, values: Values) -> dict[str, Any]:
    """The arguments of a node by their names."""
    found: dict[str, Any] = fx.map_arg(bind(use.node), values.__getitem__)
    return found


class Statistics:
    """The mean and variance of every channel over all data: what BatchNorm normalizes by.

    Arguments:
        names: of the running mean and of the running variance.
        nodes: the nodes that normalize by them.
    """

    def __init__(self, names: tuple[str, str], nodes: Sequence[fx.Node]) -> None:
        self.names, self.nodes = names, nodes
        self.moments = Moments()

    def add(self, values: Values, weight: float) -> None:
        """Takes in what the nodes of the merged network compute on a batch."""
        for node in self.nodes:
            x = values[node.args[0]].transpose(0, 1).flatten(1).T.double()  # type: ignore[index]
            self.moments += Moments.of(x, weight)

    def total(self, processes: Processes) -> None:
        """Makes these the statistics of the batches of all processes."""
        self.moments = processes.total("statistics", self.moments)

    def settle(self, state: dict[str, Tensor]) -> None:
        """Puts the mean and the variance into a state dict.

        Raises:
            LoaderError: if the data have one value for each channel, which has no variance.
        """
        if self.moments.rows < 2:
            raise LoaderError(
                f"The statistics {self.names[0]!r} and {self.names[1]!r} cannot be estimated from one value for each "
                "channel: pass larger batches, or more of them."
            )
        for name, value in zip(self.names, (self.moments.mean, self.moments.variance), strict=True):
            state[name] = value.to(state[name])

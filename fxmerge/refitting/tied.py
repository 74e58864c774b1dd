"""Layers whose weights are looked up as well: an output layer whose weight is that of the embedding.

What is looked up is read by all layers, so that it has to be known before any of them is fitted. The inputs of the
output layer are known after all of them. So the weight is fitted first, and the inputs are what all layers are fitted
to give: the mean of what the parents compute there. All other layers are then fitted to what the new rows give.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from fxmerge.processes import ALONE, Processes
from fxmerge.program.captured import Program
from fxmerge.program.forms import argument, bind
from fxmerge.refitting.course import Lane, Lesson
from fxmerge.refitting.gather import (
    Counted,
    LayerFit,
    Shares,
    Teacher,
    Values,
    arguments,
    generator_of,
    mean_of,
    not_finite,
)
from fxmerge.refitting.layers import Layer
from fxmerge.refitting.places import Places
from fxmerge.refitting.ridge import NormalEquations
from fxmerge.refitting.schedule import walk
from fxmerge.refitting.staging import Outcome, apart
from fxmerge.refitting.strength import MARGIN, RIDGES

LOOKUPS = 0.01
"""How much the relative error of what is looked up counts, beside that of what the layer gives.

It is much less than one, as the layers between both are fitted afterwards, and make up for changes of the rows. Chosen
by `benchmarks/tied.py`: smaller values leave no more than 0.2% less error of the outputs there, larger ones more of it.
"""


def fit_tied(
    program: Program,
    tied: Mapping[Layer, Sequence[fx.Node]],
    state: Mapping[str, Tensor],
    lanes: Sequence[Lane],
    teachers: Sequence[Teacher],
    lessons: Sequence[Lesson],
    seed: int,
    processes: Processes = ALONE,
) -> Outcome:
    """Fits layers whose weights are looked up as well, each in one fit from all uses.

    Minimises, around the weight that is given, the squared error of what the layer gives for the mean of the parents'
    inputs, plus that of what is looked up, each relative to its targets, plus a ridge. As a row's lookups are a number
    of equations for this row alone, one eigendecomposition of the inputs' products solves all rows.

    Arguments:
        program: the program of the merged network.
        tied: the layers, and the nodes that look up rows of their weights.
        state: the parameters.
        lanes: the parents.
        teachers: what their layers give.
        lessons: the data.
        seed: of the choice of rows.
        processes: those that share the data; all get the result.
    """
    alike, before = Counter(lesson.shares for lesson in lessons), Counter[Shares]()
    fits = [_TiedFit(layer, nodes, state, teachers, alike, seed) for layer, nodes in tied.items()]
    (step,) = walk(program.graph.graph, [{n for fit in fits for n in fit.nodes} - program.derived], program.derived)
    for number, lesson in enumerate(lessons):
        shares = lesson.shares
        counted = Counted(number, shares, lesson.weight / alike[shares], before[shares])
        before[shares] += 1
        if not processes.owns(number):
            continue
        taught = {
            j: lane.advance(lane.inputs(*lesson.call), step)
            for j, (lane, share) in enumerate(zip(lanes, shares, strict=True))
            if share > 0
        }
        for fit in fits:
            fit.add(taught, counted)
    for fit in fits:
        fit.total(processes)

    def solved() -> Outcome:
        new = dict(state)
        told = {fit.layer.name: fit.settle(new) for fit in fits}
        return Outcome({name: tensor for name, tensor in new.items() if tensor is not state[name]}, told, ())

    return processes.once("tied layers", solved)


def can_be_fitted(layer: Layer, lookups: Sequence[fx.Node], places: Sequence[Places]) -> bool:
    """Whether the inputs and outputs of a layer, and what is looked up, are known in merged units."""
    data = [argument(bind(use.node), use.data) for use in layer.uses]
    return not any(apart(use, own) for use in layer.uses for own in places) and all(
        own.known(node) for node in (*data, *lookups) for own in places
    )


@dataclass
class _Rows:
    """What is looked up in a part of the data: sums over lookups, for every row of the table.

    Attributes:
        counts: how often it is looked up, shape (rows,).
        rest: how far the targets are from the row, shape (rows, features). Where there is a bias, it is the last
            feature of its row.
        squares: the sum of squares of this.
        total: the sum of squares of the targets.
    """

    counts: Tensor
    rest: Tensor
    squares: float = 0.0
    total: float = 0.0

    def add(self, ids: Tensor, targets: Tensor, table: Tensor, weight: float) -> None:
        """Adds lookups: numbers of rows, shape (n,), and what they should give, shape (n, features)."""
        targets = targets.to(table)
        rest = targets - table[ids]
        self.counts.index_add_(0, ids, torch.full(ids.shape, weight).to(table))
        self.rest.index_add_(0, ids, rest, alpha=weight)
        self.squares += weight * float(rest.square().sum())
        self.total += weight * float(targets.square().sum())

    def error(self, step: Tensor) -> float:
        """The sum of squares of what a step of the table leaves over."""
        return max(self.squares + float((step * (self.counts[:, None] * step - 2 * self.rest)).sum()), 0.0)


class _TiedFit:
    """The sums of a tied layer over all uses, and its fit."""

    def __init__(
        self,
        layer: Layer,
        lookups: Sequence[fx.Node],
        state: Mapping[str, Tensor],
        teachers: Sequence[Teacher],
        alike: Mapping[Shares, int],
        seed: int,
    ) -> None:
        self.began = time.perf_counter()
        self.layer, self.lookups = layer, lookups
        self.fit = LayerFit(layer, state, teachers, {}, (), alike, seed)
        self.biased = layer.uses[0].biased
        self.centre = self.fit.centre[0]
        self.table = self.centre.T.contiguous()
        self.folds = [NormalEquations(1, len(self.centre), len(self.table), self.centre.device) for _ in self.fit.folds]
        self.rows = [_Rows(self.table.new_zeros(len(self.table)), torch.zeros_like(self.table)) for _ in self.folds]

    @property
    def nodes(self) -> set[fx.Node]:
        """What is read of the parents."""
        nodes = [*self.lookups, *(use.node for use in self.layer.uses)]
        return {*self.lookups, *(n for node in nodes for n in node.all_input_nodes)}

    def add(self, taught: Mapping[int, Values], counted: Counted) -> None:
        """Takes in a batch."""
        shares, weight, count = counted.shares, counted.weight, len(self.folds)
        parts = count if sum(self.fit.alike.values()) == 1 else 1
        some, generator = next(iter(taught.values())), generator_of(self.fit.seed, counted.number)
        for use in self.layer.uses:
            mean = mean_of(self.fit.teachers, argument(bind(use.node), use.data), taught, shares)
            mine = {**arguments(use, some), use.data: mean}
            rows, chosen = use.size(mine), None
            if rows > self.fit.limit:
                chosen = torch.randperm(rows, generator=generator)[: self.fit.limit].sort().values
            x, y = use.features(mine, chosen), self.fit.targets(use, taught, shares, chosen)
            for fold, own in enumerate(zip(x.chunk(parts, 1), y.chunk(parts, 1), strict=True), start=counted.before):
                self.folds[fold % count].add(*own, self.centre.to(x), weight, counted.number)
        for node in self.lookups:
            mean = mean_of(self.fit.teachers, node, taught, shares)
            ids = some[bind(node)["indices"]].reshape(-1)
            given = mean.reshape(len(ids), -1).to(self.table)
            if self.biased:
                bias = torch.stack([self.fit.taught(j, shares)[0, -1] for j in taught]).sum(0)
                given = torch.cat([given, bias[ids, None]], 1)
            pieces = zip(ids.chunk(parts), given.chunk(parts), strict=True)
            for fold, (own, targets) in enumerate(pieces, start=counted.before):
                self.rows[fold % count].add(own, targets, self.table, weight)

    def total(self, processes: Processes) -> None:
        """Makes these the sums over the batches of all processes."""
        NormalEquations.total(self.folds, processes)
        sums = [(own.counts, own.rest, own.squares, own.total) for own in self.rows]
        self.rows = [_Rows(*own) for own in processes.total("lookups", sums)]

    def settle(self, state: dict[str, Tensor]) -> dict[str, float]:
        """Puts the fitted coefficients into a state dict, and tells how they were found."""
        if not all(fold.is_finite for fold in self.folds):
            raise not_finite(self.layer)
        parts = [part for part in zip(self.folds, self.rows, strict=True) if part[0].targets.rows]
        square = sum(fold.targets.square for fold, _ in parts)
        looked_up = sum(rows.total for _, rows in parts)
        count = LOOKUPS * square / looked_up if looked_up > 0 else 0.0
        still = torch.zeros_like(self.centre)
        before = self._error(parts, still, count)
        errors = {math.inf: before}
        if len(parts) > 1:
            others = [_Equations.of([p for p in parts if p is not part], count) for part in parts]
            for ridge in RIDGES:
                errors[ridge] = sum(
                    self._error([part], other.solve(ridge), count) for part, other in zip(parts, others, strict=True)
                )
        ridge = next(ridge for ridge, error in errors.items() if error <= min(errors.values()) * (1 + MARGIN))
        step = still if math.isinf(ridge) else _Equations.of(parts, count).solve(ridge)
        if not math.isinf(ridge):
            self.layer.write(state, (self.centre + step)[None])
        total = (1 + LOOKUPS) * square if square > 0 else 1.0
        return {
            "before": before / total,
            "after": self._error(parts, step, count) / total,
            "held_out": errors[ridge] / total,
            "ridge": ridge,
            "features": len(self.centre),
            "rows": sum(fold.targets.rows for fold, _ in parts),
            "seconds": time.perf_counter() - self.began,
        }

    def _error(self, parts: Sequence[tuple[NormalEquations, _Rows]], step: Tensor, count: float) -> float:
        return sum(fold.sums().error(step[None]) + count * rows.error(step.T) for fold, rows in parts)


@dataclass(frozen=True)
class _Equations:
    """The normal equations of the rows w of a table:  w (products + ridge + count of w) = wanted of w.

    Attributes:
        values, vectors: the eigendecomposition of the products of features, shapes (features,), (features, features).
        counts: how much each row is looked up, shape (rows,).
        wanted: shape (rows, features).
    """

    values: Tensor
    vectors: Tensor
    counts: Tensor
    wanted: Tensor

    @classmethod
    def of(cls, parts: Sequence[tuple[NormalEquations, _Rows]], count: float) -> _Equations:
        """The equations of some parts of the data together."""
        sums = [fold.sums() for fold, _ in parts]
        products = torch.stack([own.features[0] for own in sums]).sum(0)
        cross = torch.stack([own.cross[0] for own in sums]).sum(0).T
        counts = count * torch.stack([rows.counts for _, rows in parts]).sum(0)
        wanted = cross + count * torch.stack([rows.rest for _, rows in parts]).sum(0)
        values, vectors = torch.linalg.eigh(products)
        return cls(values.clamp(min=0), vectors, counts, wanted)

    def solve(self, ridge: float) -> Tensor:
        """The step of a ridge, relative to the mean of the features' sums of squares: shape (features, rows)."""
        scale = float(self.values.mean())
        added = ridge * scale if scale > 0 else 1.0
        return ((self.wanted @ self.vectors / (self.values + added + self.counts[:, None])) @ self.vectors.T).T

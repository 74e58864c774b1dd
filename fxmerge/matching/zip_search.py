"""The search for what to zip: coordinate descent over the classes of aligned models.

The models are aligned first, so that their blocks (heads, groups, experts) lie in the same places; then the units of
each class are zipped inside of its blocks.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from fxmerge.evidence import weights
from fxmerge.evidence.weights import Slices
from fxmerge.matching.agglomerate import Links
from fxmerge.matching.allot import Allotment, zip_losses
from fxmerge.matching.assignment import Scores, descendants
from fxmerge.matching.descent import descend, rises
from fxmerge.matching.gains import Gains, Known
from fxmerge.matching.mergeable import zipped_classes
from fxmerge.matching.mix import Mix
from fxmerge.matching.nearest import nearest, with_blocks
from fxmerge.matching.neighbours import meets_itself, neighbours, reads
from fxmerge.matching.nested import carry, is_block, merge_blocks, similar_blocks
from fxmerge.matching.room import Room, cells
from fxmerge.matching.zipping import zip_blocks
from fxmerge.progress import release_memory
from fxmerge.symmetry.flow import Flow
from fxmerge.symmetry.group import Symmetry
from fxmerge.symmetry.propagation import Axis
from fxmerge.symmetry.units import Ids
from fxmerge.units.layout import AxisLayout, add_axis, along_axis
from fxmerge.units.unit_map import UnitMap


@dataclass(frozen=True)
class ZipMatch:
    """What is merged with what, and how it was found.

    Attributes:
        units: from the units of aligned models to merged ones.
        trace: the objective after the first sweep and after every step that was taken then; it never falls.
        within: per zipped class, how many merged units have several members of one model.
    """

    units: UnitMap
    trace: tuple[float, ...]
    within: Mapping[str, int]


@dataclass
class ZipProblem:
    """The objective of the zip, and what is merged so far.

    With T the orthonormal matrix that takes units to merged units (one over the root of a merged unit's size
    where a unit is its member), the objective is
    mix.weights * sum over parameters of scale * |sum over models of the parameter, T along all of its axes|^2
    + sum over classes of mix.activations * entries per unit * trace(T' correlations T):
    how much of the parents' weights and activations lies in what the merged network can express.
    For an alignment it is that of `search.py`, but for a constant.
    """

    symmetry: Symmetry
    states: Sequence[Mapping[str, Tensor]]
    correlation: Mapping[int, Links]
    mix: Mix
    room: Room
    places: list[list[Ids]] = field(init=False)
    labels: list[list[Ids]] = field(init=False)
    kept: list[Ids] = field(init=False)
    widths: list[int] = field(init=False)
    value: dict[str, float] = field(init=False)
    agreed: dict[int, float] = field(init=False)

    def __post_init__(self) -> None:
        self.kept = [np.arange(c.size) for c in self.symmetry.units]
        self.widths = [c.size for c in self.symmetry.units]
        self.places = [list(self.kept) for _ in self.states]
        self.labels = [list(self.kept) for _ in self.states]
        self.value = {name: self._kept(name) for name in self.axes}
        self.agreed = {n: self._agreement(n) for n in self.mix.activations}

    @cached_property
    def axes(self) -> dict[str, list[AxisLayout]]:
        """The axes of every parameter, those that lie apart by rows before the rows."""
        found: dict[str, list[AxisLayout]] = {}
        for axis in self.symmetry.layout:
            found.setdefault(axis.parameter, []).insert(0, axis)
        return found

    @cached_property
    def scales(self) -> dict[str, float]:
        """What makes every entry of every parameter count alike."""
        norms = {
            n: sum(float(weights.single(s[n]).norm()) ** 2 for s in self.states) / len(self.states) for n in self.axes
        }
        return {n: self.states[0][n].numel() / norm if norm > 0 else 0.0 for n, norm in norms.items()}

    @cached_property
    def slices(self) -> dict[int, list[Slices]]:
        return weights.slices(self.symmetry)

    def into(self, axis: AxisLayout) -> AxisLayout:
        """An axis in merged units, as far as they are merged."""
        now = axis.parameter, axis.dim, tuple(self.widths[number] for number, _ in axis.roles)
        if now not in self._into:
            self._into[now] = axis.resized(self.widths, self.kept)
        return self._into[now]

    @cached_property
    def _into(self) -> dict[tuple[Any, ...], AxisLayout]:
        return {}

    def weight(self, number: int, without: Collection[str] = ()) -> float:
        return float(sum(s.entries for s in self._without(number, without))) or 1.0

    def _without(self, number: int, names: Collection[str]) -> list[Slices]:
        return [s for s in self.slices[number] if s.axis.parameter not in names]

    def objective(self) -> float:
        kept = sum(self.value.values()) * self.mix.weights
        return kept + sum(factor * self.weight(n) * self.agreed[n] for n, factor in self.mix.activations.items())

    def _agreement(self, number: int) -> float:
        """The trace of T' correlations T: for every merged unit, the correlations of its members with each other, added
        up, over their number."""
        labels, correlation = np.concatenate([own[number] for own in self.labels]), self.correlation[number]
        order, sizes = np.argsort(labels, kind="stable"), np.bincount(labels)
        by_label = labels[order]
        total = np.bincount(by_label, correlation[order, order])
        for apart in range(1, int(sizes.max())):
            same = np.flatnonzero(by_label[apart:] == by_label[:-apart])
            pairs = correlation[order[same], order[same + apart]]
            total += 2 * np.bincount(by_label[same], pairs, minlength=len(total))
        return float((total / np.maximum(sizes, 1)).sum())

    def _kept(self, name: str) -> float:
        total = self.expressed(name, 0)
        for m in range(1, len(self.states)):
            total = total + self.expressed(name, m)
        return weights.inner(total, total) * self.scales[name]

    def expressed(self, name: str, model: int, without: AxisLayout | None = None) -> Tensor:
        """T applied to a parameter of one model along all of its axes but one, and but for the rows that have units of
        their own along that one."""
        x = weights.single(self.states[model][name].detach())
        for axis in self.axes[name]:
            if without is None or axis.dim not in without.dims:
                into = self.into(axis)
                x = x * self._shrinkage(axis, model).to(x)
                x = add_axis(x, axis, axis.target(self.labels[model], into), into.shape[axis.dim])
        return x

    def _shrinkage(self, axis: AxisLayout, model: int) -> Tensor:
        """1 over the root of the size of the merged unit that each unit goes into; where rows have units of their own,
        of its part in a row."""
        factor = np.ones(len(axis.index))
        row = axis.rows
        for number, slots in axis.roles:
            row_of = np.unique(row[slots], return_inverse=True)[1] * self.widths[number]
            sizes = np.bincount(np.concatenate([row_of + own[number] for own in self.labels]))
            factor[slots] = 1 / np.sqrt(sizes[row_of + self.labels[model][number]])
        return along_axis(torch.from_numpy(factor[axis.slot]), axis)

    def similarity(self, number: int, without: Collection[str] = ()) -> Links:
        """alpha * cosines of the units' weights + (1 - alpha) * correlations of their activations (MuDSC, equation 5),
        of all pairs of units of all models, above the diagonal. Some parameters do not count."""
        alpha, total = self.mix.alpha(number), self._cosines(number, without)
        if alpha < 1:
            total.mul_(alpha).add_(torch.from_numpy(self.correlation[number]), alpha=1 - alpha)
        links: Links = total.numpy()
        return links

    def _gain(self, number: int, without: Collection[str] = ()) -> Scores:
        """The same of all pairs, each as much as the entries of a unit, but for some parameters."""
        above = np.triu(self.similarity(number, without), 1).astype(np.float64)
        gain: Scores = self.weight(number, without) * (above + above.T + np.eye(len(above)))
        return gain

    def _cosines(self, number: int, without: Collection[str]) -> Tensor:
        """The cosines of the units' weights, above the diagonal; 0 where they are not needed."""
        size = self.symmetry.units[number].size * len(self.states)
        slices = self._without(number, without)
        if self.mix.alpha(number) == 0 or not slices:
            return torch.zeros(size, size)
        gram: Tensor | None = None
        for s in slices:
            name = s.axis.parameter
            for pieces in s.pieces(*(self.expressed(name, m, s.axis) for m in range(len(self.states)))):
                x = torch.cat(pieces).float()
                gram = x.new_zeros(size, size) if gram is None else gram
                weights.add_products(gram, x, self.scales[name])
        assert gram is not None
        norms = gram.diagonal().clamp(min=0).sqrt()
        inverse = torch.where(norms > 0, 1 / norms, torch.zeros_like(norms))
        return gram.mul_(inverse[:, None]).mul_(inverse).cpu()

    def pairs(self, number: int, without: Collection[int] = ()) -> tuple[Links, dict[int, Scores]]:
        """How similar all units of a class are; and for blocks, what those in them gain, but for some classes."""
        if not is_block(self.symmetry, number):
            return self.similarity(number), {}
        known, inside = self._comparable(number, without)
        own = {n: self._gain(n, inside if n == number else ()) for n in known}
        gains = similar_blocks(self.symmetry, number, len(self.states), own)
        size = self.symmetry.units[number].size
        none = np.zeros((size * len(self.states),) * 2)
        return gains.get(number, none) / (sum(self.shares(number, known, inside).values()) or 1.0), gains

    def _comparable(self, number: int, without: Collection[int] = ()) -> tuple[set[int], set[str]]:
        """Of a class of blocks, and of those that are nested in it, but for some, those of which units can be compared;
        and the parameters in which units of the latter lie."""
        known = {n for n, slices in self.slices.items() if slices or n in self.correlation}
        known &= set(descendants(self.symmetry, number)).difference(without)
        # Units inside of blocks are in an order of their own in each, and are compared once they are matched.
        inside = {s.axis.parameter for n in known - {number} for s in self.slices[n]}
        if not self._without(number, inside) and number not in self.correlation:
            known.discard(number)
        return known, inside

    def gains(self, number: int) -> Known:
        """What units of a class of blocks of one model gain from each other, and those of all that is nested in it, as
        of `pairs`."""
        known, inside = self._comparable(number)
        found = dict[int, Gains]()
        for n in known:
            without = inside if n == number else set[str]()
            alpha, rows = self.mix.alpha(n), self._unit_rows(n, without)
            found[n] = Gains(rows, self.correlation[n] if alpha < 1 else None, alpha, self.weight(n, without))
        return with_blocks(self.symmetry, number, found)

    def _unit_rows(self, number: int, without: Collection[str]) -> Tensor | None:
        """The weights of every unit of one model, as rows of norm 1, of which the products are `_cosines`."""
        slices = self._without(number, without)
        if self.mix.alpha(number) == 0 or not slices:
            return None
        of = [(s, self.scales[s.axis.parameter] ** 0.5) for s in slices]
        rows = torch.cat([s.of(self.expressed(s.axis.parameter, 0, s.axis)) * root for s, root in of], 1).float()
        return torch.nn.functional.normalize(rows)

    def shares(self, number: int, nested: Collection[int], inside: Collection[str] = ()) -> dict[int, float]:
        """How much of a unit of a class lies in the units of each of some that are nested in it, and, of parameters in
        which none of these lie, in its own."""
        units = self.symmetry.units
        weight = {n: self.weight(n, inside if n == number else ()) for n in nested}
        return {n: own * units[n].size / units[number].size for n, own in weight.items()}

    def blocks(self, number: int) -> Ids:
        """For every model and unit of a class, the block in which it lies."""
        return np.broadcast_to(cells(self.symmetry, number), (len(self.states), self.symmetry.units[number].size))

    def zipped(self, number: int, budget: float, damping: float) -> list[dict[int, Ids]]:
        """What to merge of a class: for every model, the places of its units and of all that is nested in it."""
        survivors = self.room.survivors.get(number)
        if survivors is not None:
            known = self.gains(number)
            labels = nearest(self.symmetry, number, survivors, known)
            return merge_blocks(self.symmetry, number, self.room.kept[number][labels][None], self.places, known)
        similarity, gains = self.pairs(number)
        width = self.room.widths[number]
        zipped = zip_blocks(similarity, self.blocks(number), budget=budget, damping=damping, width=width)
        return merge_blocks(self.symmetry, number, zipped.labels, self.places, gains)

    def take(self, places: Sequence[Mapping[int, Ids]]) -> None:
        """Merges units.

        Arguments:
            places: for every model and class that moves, the place of each of its units.
        """
        moved = set(places[0])
        for n in moved:
            # What lies in two classes of other widths has its own when both are merged.
            place, size = np.concatenate([of_model[n] for of_model in places]), self.symmetry.units[n].size
            if np.isin(place[place < size], self.room.kept[n]).all():
                self.kept[n], self.widths[n] = self.room.kept[n], self.room.widths[n]
        for own, labels, of_model in zip(self.places, self.labels, places, strict=True):
            for n, place in of_model.items():
                own[n], labels[n] = place, self._numbered(n, place)
        names = {a.parameter for a in self.symmetry.layout if any(n in moved for n, _ in a.roles)}
        self.value = self.value | {name: self._kept(name) for name in names}
        self.agreed = self.agreed | {n: self._agreement(n) for n in moved & self.mix.activations.keys()}
        release_memory()

    def _numbered(self, number: int, places: Ids) -> Ids:
        """The numbers of the merged units of a class that stand in some places."""
        size = self.symmetry.units[number].size
        return np.where(places < size, np.searchsorted(self.kept[number], places), places)

    def improve(self, places: Sequence[Mapping[int, Ids]]) -> float:
        """Merges units if the objective rises by it, and returns the objective."""
        before = self.objective()
        at = [list(own) for own in self.places], [list(own) for own in self.labels], self.value, self.agreed
        self.take(places)
        after = self.objective()
        if rises(before, after):
            return after
        self.places, self.labels, self.value, self.agreed = at
        return before


def match_zip(
    symmetry: Symmetry,
    states: Sequence[Mapping[str, Tensor]],
    correlation: Mapping[int, Links],
    flow: Mapping[Axis, Flow],
    *,
    alpha: float | Mapping[int, float],
    budget: float,
    damping: float,
    one_to_one: Collection[int] = (),
    room: Room | Allotment | None = None,
    seed: int = 0,
    progress: bool | None = None,
) -> ZipMatch:
    """Finds which units of aligned models to merge (MuDSC-Zip, arXiv 2403.01753, section 4.2 and 4.3).

    The first sweep zips every class, in random order; from there coordinate descent goes on as long as the
    objective rises. With alpha = 0 the first sweep is ZipIt! (arXiv 2305.03053).

    Arguments:
        symmetry: the group.
        states: parameters of the aligned models.
        correlation: for some classes, of all pairs of units of all models, model after model.
        flow: which axes produce, which consume.
        alpha: weight of the weight-space similarity, in [0, 1]: one for all classes, or one for each by its number.
        budget: share of the merges that may be within one model, see `zip_units`.
        damping: what the similarity of a merged unit is multiplied with, see `zip_units`.
        one_to_one: the numbers of classes of which no units of one model are merged.
        room: how many merged units there are to be of each class, or what that is chosen from; None is as many as one
            model has.
        seed: seed of the random order.
        progress: whether to show a progress bar; None shows it on a terminal.
    """
    chosen = room if isinstance(room, Room) else Room.of(symmetry)
    problem = ZipProblem(symmetry, states, correlation, Mix.of(alpha, correlation), chosen)
    if isinstance(room, Allotment):

        def loss(number: int, widths: Sequence[int]) -> list[float]:
            similarity, blocks = problem.pairs(number)[0], problem.blocks(number)
            losses = zip_losses(similarity, blocks, widths, budget, damping)
            return [reads(symmetry, flow, number) * own for own in losses]

        problem.room = room.room(symmetry, loss)
    room = problem.room
    for n, place in room.joined.items():
        problem.take([carry(symmetry, n, place, own) for own in problem.places])
    rng = np.random.default_rng(seed)
    classes = zipped_classes(symmetry, flow, one_to_one, room.changed)
    beside, settled = neighbours(symmetry, classes), set[int]()

    def moved(number: int) -> None:
        """Notes that a class is zipped anew, so that others would be zipped otherwise than they are."""
        settled.difference_update(beside[number])
        if not meets_itself(symmetry, number):
            settled.add(number)

    def step(number: int) -> float:
        before = problem.objective()
        # As long as nothing on its parameters has moved, a class would be zipped as it was tried last.
        if number in settled:
            return before
        after = problem.improve(problem.zipped(number, budget, damping))
        if after > before:
            moved(number)
        else:
            settled.add(number)
        return after

    with tqdm(total=None, desc="zipping", disable=None if progress is None else not progress, leave=False) as bar:
        for n in rng.permutation(classes).tolist():
            problem.take(problem.zipped(n, budget, damping))
            moved(n)
            bar.update()
        coordinates = classes if problem.mix.weights > 0 else ()
        trace = descend(coordinates, problem.objective(), step, beside.__getitem__, rng, bar)
    consumed = frozenset(axis for axis, kind in flow.items() if kind is Flow.CONSUMES)
    kept = room.kept if room.changed else ()
    units = UnitMap(
        symmetry.names, symmetry.layout, consumed, tuple(map(tuple, problem.labels)), tuple(problem.widths), kept
    )
    return ZipMatch(units, trace, _within(symmetry, problem, classes))


def _within(symmetry: Symmetry, problem: ZipProblem, classes: Sequence[int]) -> dict[str, int]:
    found = {}
    for n in classes:
        several = [np.bincount(own[n], minlength=problem.widths[n]) > 1 for own in problem.labels]
        found[symmetry.names[n]] = int(np.any(several, axis=0).sum())
    return found

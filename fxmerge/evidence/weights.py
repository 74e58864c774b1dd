"""Weight space: how alike the parameter slices of two models' units are."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, reduce

import numpy as np
import torch
from torch import Tensor

from fxmerge.symmetry.group import Symmetry
from fxmerge.symmetry.units import Ids
from fxmerge.units.layout import AxisLayout

Stamps = Mapping[tuple[str, int], int]
"""For every axis of parameters, by name and dimension, a number that is another one after every change of the units
along it."""

ROOM, LEAST_ROOM = 2**30, 2**28
"""Bytes of similarities, and of the parameters that they were found from, which a search keeps beside those that it
works on: the most, and the least that is the most; see `most_kept`."""


def most_kept(a: Mapping[str, Tensor], *, mixes: bool) -> int:
    """How many bytes a search keeps at most, for a model of some parameters.

    Where units only change places it is half as many as these have. Where they are mixed it is more: a mix changes all
    entries, so that more versions of a parameter are in use.
    """
    return ROOM if mixes else min(max(sum(tensor.nbytes for tensor in a.values()) // 2, LEAST_ROOM), ROOM)


FEW = 16
"""Rows of a similarity that are looked at first."""

PIECE = 2**22
"""So many entries of a tensor are turned to single precision at a time."""

BLOCK = 512
"""Rows of which inner products with the rows after them are taken together."""


@dataclass(frozen=True, eq=False)
class Slices:
    """Where the parameter slices of a class's units lie on one axis: `slots` has shape (units, slices per unit)."""

    axis: AxisLayout
    slots: Ids

    @cached_property
    def positions(self) -> Tensor:
        """For every unit, the positions along the (flattened) dims of the axis that are its own."""
        flat = torch.from_numpy(self.axis.slot.reshape(-1))
        where: list[list[int]] = [[] for _ in range(int(flat.max()) + 1)]
        order = flat.argsort(stable=True)
        counts = torch.bincount(flat, minlength=len(where))
        starts = counts.cumsum(0) - counts
        slots = torch.from_numpy(self.slots)
        width = int(counts[slots.reshape(-1)].max())
        picked = order[(starts[slots][..., None] + torch.arange(width)).clamp(max=len(order) - 1)]
        return picked.reshape(len(slots), -1)

    def of(self, tensor: Tensor) -> Tensor:
        """The slices of every unit, shape (units, entries), in at least single precision; of complex numbers both
        parts."""
        return single(self._rows(tensor))

    def pieces(self, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
        """The slices of several tensors as `of` gives them, a stretch of the entries at a time."""
        stretch = max(PIECE // len(self.slots), 1)
        for pieces in zip(*(self._rows(tensor).split(stretch, 1) for tensor in tensors), strict=True):
            yield tuple(map(single, pieces))

    def _rows(self, tensor: Tensor) -> Tensor:
        tensor = real(tensor)
        rest = [d for d in range(tensor.ndim) if d not in self.axis.dims]
        flat = tensor.permute(*self.axis.dims, *rest).reshape(self.axis.slot.size, -1)
        if self._in_order:
            return flat.reshape(len(self.slots), -1)
        return flat[self.positions.to(tensor.device)].reshape(len(self.slots), -1)

    @cached_property
    def _in_order(self) -> bool:
        """Whether the slices of all units lie one after the other, so that none has to be gathered."""
        return torch.equal(self.positions.reshape(-1), torch.arange(self.axis.slot.size))

    @cached_property
    def across(self) -> tuple[tuple[str, int], ...]:
        """The axes along which the entries of a unit's slices lie; units that move along them change the slices.

        These are all other axes of the parameter, and the own one where a unit is at several places of it, since other
        classes may tell their order.
        """
        own = range(len(self.axis.shape))
        return tuple((self.axis.parameter, d) for d in own if d != self.axis.dim or self.slots.shape[1] > 1)

    def changed(self, before: Stamps, after: Stamps) -> bool:
        """Whether a unit's slices may have changed, but for the unit's own moves."""
        return any(before.get(axis) != after.get(axis) for axis in self.across)

    @property
    def entries(self) -> int:
        """Number of parameter entries for each unit."""
        size = 1
        for d, n in enumerate(self.axis.shape):
            size *= 1 if d in self.axis.dims else n
        return int(self.positions.shape[1]) * size


def slices(symmetry: Symmetry) -> dict[int, list[Slices]]:
    """For every class with a choice, the parameter slices that show its units."""
    found: dict[int, list[Slices]] = {}
    for number, views in symmetry.views.items():
        found[number] = [
            Slices(axis, slots[units])
            for shown, units in views
            for axis in symmetry.layout
            for n, slots in axis.roles
            if n == shown and axis.parameter not in symmetry.scales(number)
        ]
    return found


def real(tensor: Tensor) -> Tensor:
    """A tensor with complex numbers as pairs, along a last dimension: their inner product is a real number."""
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def single(tensor: Tensor) -> Tensor:
    """A tensor of real numbers in at least single precision."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def inner(a: Tensor, b: Tensor) -> float:
    """The inner product of two tensors as lists of real numbers."""
    pieces = zip(*(real(t).reshape(-1).split(PIECE) for t in (a, b)), strict=True)
    return sum(float((single(one) * single(other)).sum(dtype=torch.float64)) for one, other in pieces)


def norm(tensor: Tensor) -> float:
    """The norm of a tensor as a list of real numbers."""
    pieces = real(tensor).reshape(-1).split(PIECE)
    return math.hypot(*(float(piece.norm(dtype=torch.float64)) for piece in pieces))


def scale(a: Tensor, b: Tensor) -> float:
    """Turns <a, b> into a similarity that counts every entry alike: the number of entries times the cosine."""
    norms = norm(a) * norm(b)
    return a.numel() / norms if norms > 0 else 0.0


def similarity(
    a: Mapping[str, Tensor], b: Mapping[str, Tensor], where: list[Slices], scales: Mapping[str, float]
) -> Tensor:
    """The scaled inner products of all pairs of units of two models.

    Returns:
        A tensor of shape (units, units): rows are units of a, columns of b; the sum over `where` of the
        inner products of the units' slices, each times the parameter's entry of `scales`.
    """
    if not where:
        raise ValueError("a class without parameter slices has no weight similarity")
    names, units = {s.axis.parameter for s in where}, len(where[0].slots)
    dtype = reduce(torch.promote_types, (own[name].real.dtype for own in (a, b) for name in names), torch.float32)
    total = torch.zeros(units, units, dtype=dtype, device=a[where[0].axis.parameter].device)
    for s in where:
        name = s.axis.parameter
        for one, other in s.pieces(a[name], b[name]):
            total.addmm_(one.to(dtype), other.T.to(dtype), alpha=scales[name])
    return total


def add_products(total: Tensor, x: Tensor, scale: float) -> None:
    """Adds the scaled inner products of all pairs of rows, in place, on the diagonal and above.

    They are taken by blocks, of which those below the diagonal are left out.

    Arguments:
        total: shape (rows, rows).
        x: shape (rows, entries).
        scale: what the products are multiplied with.
    """
    for start in range(0, len(x), BLOCK):
        end = start + BLOCK
        total[start:end, start:].addmm_(x[start:end], x[start:].T, alpha=scale)


@dataclass(frozen=True, eq=False)
class Placing:
    """The units of a class in a model that is permuted and mixed.

    Attributes:
        b: the model's parameters, which must not change in place.
        image: for every unit, its place in b.
        stamps: of the axes of b.
        blocks: the units that are mixed with each other, if any are: shape (blocks, units).
        matrix: the orthogonal matrices by which these are mixed once they are in their places.
    """

    b: Mapping[str, Tensor]
    image: Ids
    stamps: Stamps
    blocks: Ids | None = None
    matrix: Tensor | None = None


@dataclass(frozen=True, eq=False)
class _Seen:
    """The similarity of a class by some slices, and what it was found from."""

    total: Tensor
    where: list[Slices]
    at: Placing


class Similarities:
    """`similarity` for a search that asks for the same classes again while it permutes and mixes the units of b.

    From one visit of a class to the next, other classes move few of their units, and an inner product changes by the
    terms of those alone. So what a class was found from is kept, of as many classes as there is room for.

    Arguments:
        a: parameters of the model that stays.
        scales: how much an inner product counts, for every parameter.
        room: how much is kept, in bytes.
    """

    def __init__(self, a: Mapping[str, Tensor], scales: Mapping[str, float], room: int = ROOM) -> None:
        self._a, self._scales, self._room = a, scales, room
        self._seen: dict[int, _Seen] = {}

    def of(self, number: int, where: list[Slices], at: Placing) -> Tensor:
        """The similarity of one class, shape (units of a, places in b).

        Arguments:
            number: of the class.
            where: the slices of its units that count, at least one.
            at: where these are.
        """
        last = self._seen.pop(number, None)
        before = set(last.where) if last is not None else set[Slices]()
        if last is None or not before.issubset(where):
            total = similarity(self._a, at.b, where, self._scales)
        else:
            now = _Change.of(last.at, at)
            total = now.columns(last.total)
            for s in last.where:
                if s.changed(last.at.stamps, at.stamps):
                    total = self._updated(total, s, now, last.at, at)
            fresh = [s for s in where if s not in before]
            if fresh:
                total = total + similarity(self._a, at.b, fresh, self._scales)
        self._keep(number, _Seen(total, where, _of_slices(at, where)), at)
        return total

    def follow(self, number: int, at: Placing) -> None:
        """Brings what is kept of a class to where its units are now, if nothing else has moved since.

        So parameters that the search itself has left are not held on to.
        """
        last = self._seen.get(number)
        if last is not None and not any(s.changed(last.at.stamps, at.stamps) for s in last.where):
            total = _Change.of(last.at, at).columns(last.total)
            self._seen[number] = _Seen(total, last.where, _of_slices(at, last.where))

    def stay(self, number: int, where: list[Slices], at: Placing) -> bool:
        """Whether it is certain, without a product of matrices, that no permutation of the units of a class is better
        than none.

        That is so if no two units are more similar than each is to its own counterpart, on average of both. For then
        the sum over matched pairs is largest where all are matched with their counterparts. How similar two units are
        is known from the last visit. It has changed by no more than the norm of the one's slices times that of the
        change of the other's. Units must not be mixed. Arguments are those of `of`.
        """
        last = self._seen.get(number)
        if last is None or set(last.where) != set(where):
            return False
        now = _Change.of(last.at, at)
        few = now.columns(last.total[:FEW])
        if bool((few[:, : len(few)] > (few.diagonal()[:, None] + few.diagonal()) / 2).any()):
            return False
        norms, changes, own = (last.total.new_zeros(len(last.total)) for _ in range(3))
        for s in where:
            name, scale = s.axis.parameter, self._scales[s.axis.parameter]
            changed = s.changed(last.at.stamps, at.stamps)
            for a, after, before in s.pieces(self._a[name], at.b[name], last.at.b[name]):
                own += scale / 2 * (a * after).sum(1)
                if changed:
                    norms += scale * a.square().sum(1)
                    changes += scale * (after - now.rows(before)).square().sum(1)
        above = torch.addr(now.columns(last.total), norms.sqrt(), changes.sqrt()).sub_(own).sub_(own[:, None])
        return bool(above.fill_diagonal_(0).amax() <= 0)

    def _updated(self, total: Tensor, s: Slices, now: _Change, before: Placing, after: Placing) -> Tensor:
        """A similarity in which the terms of some slices are as they are now."""
        name = s.axis.parameter
        for own, old, new in s.pieces(self._a[name], before.b[name], after.b[name]):
            old = now.rows(old)
            # As bytes, because any() takes several times as long.
            terms = (old != new).view(torch.uint8).amax(0).nonzero().squeeze(1)
            if len(terms):
                change = new - old
                if len(terms) < len(change.T):
                    own, change = own[:, terms], change[:, terms]
                total = torch.addmm(total, own.to(total), change.T.to(total), alpha=self._scales[name])
        return total

    def _keep(self, number: int, seen: _Seen, at: Placing) -> None:
        if self._taken([seen], at.b) <= self._room:
            self._seen[number] = seen
            self.make_room(at.b)

    def make_room(self, b: Mapping[str, Tensor]) -> None:
        """Forgets classes, the first seen first, until what is kept fits into the room.

        Arguments:
            b: parameters that the search works on, and goes on working on: these take no room.
        """
        while self._taken(self._seen.values(), b) > self._room:
            del self._seen[next(iter(self._seen))]

    @staticmethod
    def _taken(kept: Iterable[_Seen], b: Mapping[str, Tensor]) -> int:
        """The bytes of what is kept. A tensor of several classes takes room once."""
        held = {id(tensor) for tensor in b.values()}
        tensors = (tensor for s in kept for tensor in (s.total, *s.at.b.values()))
        return sum({id(tensor): tensor.nbytes for tensor in tensors if id(tensor) not in held}.values())


def _of_slices(at: Placing, where: list[Slices]) -> Placing:
    """A placing with the parameters of some slices alone."""
    return replace(at, b={s.axis.parameter: at.b[s.axis.parameter] for s in where})


@dataclass(frozen=True)
class _Change:
    """What has become of the units of a class since they were seen.

    Attributes:
        came: for every place, the one in which its unit was; None if all are where they were.
        blocks: the units that are mixed with each other, shape (blocks, units), and `turn`, the matrices by which they
            have been mixed since; None if they have not been.
    """

    came: Tensor | None
    blocks: Tensor | None
    turn: Tensor | None

    @staticmethod
    def of(before: Placing, now: Placing) -> _Change:
        came, blocks = before.image[np.argsort(now.image)], now.blocks
        moved = None if np.array_equal(came, np.arange(len(came))) else torch.from_numpy(came)
        if before.matrix is None or now.matrix is None or blocks is None or now.matrix is before.matrix:
            return _Change(moved, None, None)
        of_unit = np.empty(blocks.size, np.int64)
        of_unit[blocks] = np.arange(len(blocks))[:, None]
        turn = now.matrix @ before.matrix[torch.from_numpy(of_unit[came[blocks[:, 0]]])].mT
        return _Change(moved, torch.from_numpy(blocks), turn)

    def rows(self, seen: Tensor) -> Tensor:
        """The units' rows as they were seen, as they are now."""
        rows = seen if self.came is None else seen.index_select(0, self.came.to(seen.device))
        if self.blocks is None or self.turn is None:
            return rows
        blocks, turned = self.blocks.to(rows.device), rows.clone()
        turned[blocks] = self.turn.to(rows) @ rows[blocks]
        return turned

    def columns(self, seen: Tensor) -> Tensor:
        """The units' columns as they were seen, as they are now."""
        if self.turn is not None:
            return self.rows(seen.T).T
        # Much faster than to take rows of the transpose.
        return seen if self.came is None else seen.index_select(1, self.came.to(seen.device))

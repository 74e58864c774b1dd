"""Weight space: how alike the parameter slices of two models' units are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from fxmerge.symmetry.group import Symmetry
from fxmerge.symmetry.units import Ids
from fxmerge.units.layout import AxisLayout

ROOM = 2**30
"""Bytes of similarities, and of the parameters that they are of, which a search keeps."""


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
        """The slices of every unit, shape (units, entries); of complex numbers both parts."""
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


def inner(a: Tensor, b: Tensor) -> float:
    """The inner product of two tensors as lists of real numbers."""
    return float((real(a) * real(b)).sum(dtype=torch.float64))


def scale(a: Tensor, b: Tensor) -> float:
    """Turns <a, b> into a similarity that counts every entry alike: the number of entries times the cosine."""
    norms = float(real(a).norm(dtype=torch.float64) * real(b).norm(dtype=torch.float64))
    return a.numel() / norms if norms > 0 else 0.0


def similarity(
    a: Mapping[str, Tensor], b: Mapping[str, Tensor], where: list[Slices], scales: Mapping[str, float]
) -> Tensor:
    """The scaled inner products of all pairs of units of two models.

    Returns:
        A tensor of shape (units, units): rows are units of a, columns of b; the sum over `where` of the
        inner products of the units' slices, each times the parameter's entry of `scales`.
    """
    total: Tensor | None = None
    for s in where:
        name = s.axis.parameter
        product = s.of(a[name]) @ s.of(b[name]).T * scales[name]
        total = product if total is None else total + product
    if total is None:
        raise ValueError("a class without parameter slices has no weight similarity")
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


@dataclass(frozen=True)
class _Seen:
    """The similarity of a class by some slices, when the units of b were in the places `image`."""

    total: Tensor
    where: list[Slices]
    b: Mapping[str, Tensor]
    image: Ids

    @property
    def bytes(self) -> int:
        return self.total.nbytes + sum(tensor.nbytes for tensor in self.b.values())


class Similarities:
    """`similarity` for a search that asks for the same classes again while it permutes b.

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

    def of(self, number: int, b: Mapping[str, Tensor], where: list[Slices], image: Ids) -> Tensor:
        """The similarity of one class, shape (units of a, places in b).

        Arguments:
            number: of the class.
            b: the permuted parameters, which must not change in place.
            where: the slices of its units that count, at least one.
            image: for every unit of the class, its place in b.
        """
        last = self._seen.pop(number, None)
        before = set(last.where) if last is not None else set[Slices]()
        if last is None or not before.issubset(where):
            total = similarity(self._a, b, where, self._scales)
        else:
            came = torch.from_numpy(last.image[np.argsort(image)]).to(last.total.device)
            total = last.total[:, came]
            for s in last.where:
                if b[s.axis.parameter] is not last.b[s.axis.parameter]:
                    self._update(total, s, s.of(last.b[s.axis.parameter])[came], s.of(b[s.axis.parameter]))
            fresh = [s for s in where if s not in before]
            if fresh:
                total += similarity(self._a, b, fresh, self._scales)
        self._keep(number, _Seen(total, where, {s.axis.parameter: b[s.axis.parameter] for s in where}, image))
        return total

    def _update(self, total: Tensor, s: Slices, before: Tensor, after: Tensor) -> None:
        # As bytes, because any() takes several times as long.
        terms = (before != after).view(torch.uint8).amax(0).nonzero().squeeze(1)
        if len(terms):
            change = after[:, terms] - before[:, terms]
            total += s.of(self._a[s.axis.parameter])[:, terms] @ change.T * self._scales[s.axis.parameter]

    def _keep(self, number: int, seen: _Seen) -> None:
        if seen.bytes > self._room:
            return
        self._seen[number] = seen
        while sum(s.bytes for s in self._seen.values()) > self._room:
            del self._seen[next(iter(self._seen))]

"""Weight space: how alike the parameter slices of two models' units are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from fxmerge.symmetry.group import Symmetry
from fxmerge.symmetry.permutation import AxisLayout
from fxmerge.symmetry.units import Ids


@dataclass(frozen=True)
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
        """The slices of every unit, shape (units, entries)."""
        rest = [d for d in range(tensor.ndim) if d not in self.axis.dims]
        flat = tensor.permute(*self.axis.dims, *rest).reshape(self.axis.slot.size, -1)
        return flat[self.positions.to(tensor.device)].reshape(len(self.slots), -1)

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
            if n == shown
        ]
    return found


def scale(a: Tensor, b: Tensor) -> float:
    """Turns <a, b> into a similarity that counts every entry alike: the number of entries times the cosine."""
    norms = float(a.norm(dtype=torch.float64) * b.norm(dtype=torch.float64))
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

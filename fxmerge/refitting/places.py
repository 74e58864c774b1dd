"""Where the units that lie along a parent's values go in the merged network."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, fx

from fxmerge.symmetry.truncation import Projection
from fxmerge.units.layout import Ids, value_layout
from fxmerge.units.unit_map import UnitMap


@dataclass(frozen=True, eq=False)
class Confined:
    """A parent's values where the merged network has other directions of a class.

    Attributes:
        classes, units: as for `Places`, but of all classes of the projection.
        projection: what the units of the parent become.
    """

    classes: Callable[[str, Collection[int]], set[int]]
    units: Callable[[str, int], tuple[Ids, Ids] | None]
    projection: Projection
    _known: dict[tuple[str, int], dict[int, Ids] | None] = field(default_factory=dict)

    def lies(self, node: str, dims: Collection[int]) -> bool:
        """Whether units of such classes lie along some dimensions of a node's value."""
        return not self.classes(node, dims).isdisjoint(self.projection.matrices)

    def known(self, node: str, dim: int) -> bool:
        """Whether it can be told which units lie along a dimension: of such classes alone, all of each as often."""
        return self._positions(node, dim) is not None

    def project(self, node: str, value: Tensor) -> Tensor:
        """A node's value in the new units."""
        for dim in range(value.ndim):
            places = self._positions(node, dim) or {}
            count = sum(where.size for where in places.values())
            for number, where in places.items():
                matrix, index = self.projection.matrices[number].to(value), torch.from_numpy(where).to(value.device)
                parts = value.unflatten(dim, (-1, count))  # The units may repeat.
                moved = parts.movedim(dim + 1, -1).clone()
                moved[..., index] = torch.einsum("uv,...bvt->...but", matrix, moved[..., index])
                value = moved.movedim(-1, dim + 1).flatten(dim, dim + 1)
        return value

    def _positions(self, node: str, dim: int) -> dict[int, Ids] | None:
        """Where the units of every class lie along a dimension: shape (blocks, units in each, times). {} if no such
        units lie there, None if it cannot be told."""
        if (node, dim) not in self._known:
            self._known[node, dim] = self._find(node, dim) if self.lies(node, [dim]) else {}
        return self._known[node, dim]

    def _find(self, node: str, dim: int) -> dict[int, Ids] | None:
        found = self.units(node, dim)
        if found is None:
            return None
        number, unit = found
        places: dict[int, Ids] = {}
        for n in np.unique(number).tolist():
            blocks = self.projection.symmetry.by_block(n) if n in self.projection.matrices else None
            if blocks is None:
                return None
            at = np.flatnonzero(number == n)
            order = at[np.argsort(unit[at], kind="stable")]
            if len(at) % blocks.size or not np.array_equal(
                unit[order], np.repeat(np.arange(blocks.size), len(at) // blocks.size)
            ):
                return None
            places[n] = order.reshape(blocks.size, -1)[blocks]
        return places


@dataclass(frozen=True, eq=False)
class Places:
    """The merged units that the units of one parent go into, by the dimensions of a graph's values.

    Attributes:
        classes: tells the classes whose units lie along some dimensions of a node's value, by the node's name.
        units: tells the class and the unit at every position along a dimension, or None where that cannot be told.
        map: where the units of all models go.
        model: the number of the parent.
        confined: how the units of classes are mixed of which the merged network has other directions.
    """

    classes: Callable[[str, Collection[int]], set[int]]
    units: Callable[[str, int], tuple[Ids, Ids] | None]
    map: UnitMap
    model: int
    confined: Confined | None = None
    _known: dict[str, dict[int, tuple[Ids, int] | None]] = field(default_factory=dict)

    def moved(self, node: fx.Node, dims: Collection[int]) -> bool:
        """Whether merged units lie along some dimensions of a node's value."""
        return not self.map.moving.isdisjoint(self.classes(node.name, dims)) or (
            self.confined is not None and self.confined.lies(node.name, dims)
        )

    def known(self, node: fx.Node) -> bool:
        """Whether it can be told what lies where in a node's value."""
        return all(target is not None for target in self._targets(node).values())

    def gather(self, node: fx.Node, value: Tensor) -> tuple[Tensor, Tensor]:
        """A node's value in merged units.

        Returns:
            The sums over the members of each unit, and how many there are, with 1 in place of the size of every
            dimension along which that is the same.

        Raises:
            ValueError: if it cannot be told what lies where.
        """
        members = value.new_ones([1] * value.ndim)
        for dim, found in self._targets(node).items():
            if found is None:
                raise ValueError(f"It cannot be told what units lie along dimension {dim} of graph node {node.name!r}.")
            target, size = found
            index = torch.from_numpy(target).to(value.device)
            parts = value.unflatten(dim, (-1, len(target)))  # The units may repeat.
            sums = parts.new_zeros([*parts.shape[: dim + 1], size, *parts.shape[dim + 2 :]])
            value = sums.index_add_(dim + 1, index, parts).flatten(dim, dim + 1)
            counts = torch.from_numpy(np.bincount(target, minlength=size)).to(value).repeat(parts.shape[dim])
            members = members * counts.reshape([-1 if d == dim else 1 for d in range(value.ndim)])
        return value if self.confined is None else self.confined.project(node.name, value), members

    def _targets(self, node: fx.Node) -> dict[int, tuple[Ids, int] | None]:
        """For those dimensions of a node's value along which merged units lie, the position that the merged unit has
        for every position, and how many positions there are then; None if that cannot be told."""
        if node.name not in self._known:
            dims = [d for d in range(node.meta["val"].ndim) if self.moved(node, [d])]
            own = {d for d in dims if self.confined is not None and self.confined.lies(node.name, [d])}
            known = {d: self._target(node, d) for d in dims if d not in own}
            if self.confined is not None:
                known |= {d: None for d in own if not self.confined.known(node.name, d)}
            self._known[node.name] = known
        return self._known[node.name]

    def _target(self, node: fx.Node, dim: int) -> tuple[Ids, int] | None:
        units = self.units(node.name, dim)
        if units is None:
            return None
        number, unit = units
        if not self.map.resized.isdisjoint(np.unique(number).tolist()):
            layout = value_layout(number, unit, [len(own) for own in self.map.maps[self.model]])
            if layout is None:
                return None
            into = self.map.into(layout)
            return layout.target(self.map.maps[self.model], into), len(into.index)
        goal = unit.copy()
        for n in self.map.moving & set(np.unique(number).tolist()):
            own = number == n
            goal[own] = self.map.maps[self.model][n][unit[own]]
        size = int(max(unit.max(initial=0), goal.max(initial=0))) + 1
        at, wanted = number * size + unit, number * size + goal
        order = np.argsort(at, kind="stable")
        target = order[np.minimum(np.searchsorted(at[order], wanted), len(order) - 1)]
        target = np.where(number >= 0, target, np.arange(len(target)))
        alone = len(np.unique(at[number >= 0])) == np.count_nonzero(number >= 0)
        return (target, len(target)) if alone and np.array_equal(at[target], wanted) else None

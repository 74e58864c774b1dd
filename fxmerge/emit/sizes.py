"""The sizes that the values of a graph have with merged units, by the units that lie along them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
from torch import Tensor, fx

from fxmerge.emit.constants import needed
from fxmerge.errors import FxmergeError
from fxmerge.symmetry.deferred import Chosen, Counts, Index
from fxmerge.symmetry.group import Symmetry
from fxmerge.symmetry.propagation import Propagation
from fxmerge.symmetry.shown import Shown, places_and_blocks, shown_by
from fxmerge.units.layout import AxisLayout, Ids, value_layout
from fxmerge.units.unit_map import UnitMap


class CannotResizeError(FxmergeError):
    """A node cannot have another size.

    Attributes:
        node: its name.
        classes: the numbers of the classes to blame.
        why: the reason, as the end of a sentence.
    """

    def __init__(self, node: str, classes: frozenset[int], why: str) -> None:
        super().__init__(f"Graph node {node!r} {why.rstrip('.')}.")
        self.node, self.classes, self.why = node, classes, why


Size = tuple[AxisLayout, AxisLayout] | Ids | int
"""Of a dimension that changes: what lies before and after; or, where units lie along other dimensions too, how many
entries are left before each index and in all; or just the new size."""


class Sizes:
    """The sizes of a graph's values with merged units.

    Arguments:
        found: the labelled program.
        symmetry: its classes.
        units: where units go, and how many merged ones there are.
        twins: for nodes of another graph of the model, the node of the labelled one with the same value.

    Raises:
        CannotResizeError: if a parameter would have rows of several lengths.
    """

    def __init__(
        self,
        found: Propagation,
        symmetry: Symmetry,
        units: UnitMap,
        twins: Mapping[fx.Node, fx.Node] | None = None,
    ) -> None:
        self.found, self.symmetry, self.units, self.twins = found, symmetry, units, twins or {}
        self._graph = found.program.graph.graph
        self.counts = [c.size for c in symmetry.units]
        self.number, self.place = places_and_blocks(found, symmetry)
        self.dims: dict[str, dict[int, Size]] = {}
        for axis in symmetry.layout:
            if not units.into(axis).even:
                why = f"would have rows of several lengths along axis {axis.dim}: all must lose as many units"
                raise CannotResizeError(axis.parameter, units.resized & axis.classes, why)

    def of(self, node: fx.Node) -> dict[int, Size]:
        """For every dimension of a node's value of which the size changes, what is known of that.

        Raises:
            CannotResizeError: if units lie so that they are no tensor of another size.
        """
        node = self.twins.get(node, node)
        if node.graph is not self._graph:
            return {}
        if node.name not in self.dims:
            self._find()
        return self.dims[node.name]

    def _find(self) -> None:
        """Finds the sizes of all values. Of dimensions along which no units lie, the readers of a value tell the size.
        Readers come later in the graph, so that the last value comes first."""
        self.dims = {node.name: self._along(node) for node in self._graph.nodes}
        for node in reversed(self._graph.nodes):
            if isinstance(node.meta.get("val"), Tensor):
                self.dims[node.name] |= needed(node, self)

    def _along(self, node: fx.Node) -> dict[int, Size]:
        """The dimensions of which the size changes since units lie along them."""
        changed: dict[int, Size] = {}
        for shown in self._shown(node):
            if not self.units.resized.isdisjoint(np.unique(shown.number).tolist()):
                for dim, size in self._resized(node, shown).items():
                    if dim < 0:
                        continue
                    if dim in changed and _size(changed[dim]) != _size(size):
                        raise self.cannot(node, "has units of several sizes along one dimension")
                    changed[dim] = size
        return changed

    def has_units(self, node: fx.Node, dim: int) -> bool:
        """Whether units are known to lie along a dimension of a node's value."""
        node = self.twins.get(node, node)
        dim %= len(self.shape(node))
        return any(dim in shown.dims for shown in self._shown(node))

    def _shown(self, node: fx.Node) -> list[Shown]:
        """What lies along the dimensions of the value of a node of the labelled graph. Of what an index chooses, it is
        what each of the units has among which it chooses: these lie along a dimension of number -1."""
        if node.graph is not self._graph:
            return []
        chosen = self.found.deferred.get(node.name)
        if isinstance(chosen, Chosen):
            found = [shown_by(c, self.number, self.place) for c in chosen.full.columns]
            return [replace(shown, dims=tuple(d - 1 for d in shown.dims)) for shown in found]
        labels = self.found.labels.get(node.name)
        return [shown_by(c, self.number, self.place) for c in (labels.columns if labels is not None else ())]

    def names(self, node: fx.Node) -> bool:
        """Whether the value of a node holds numbers that name units, or how often each is named."""
        return isinstance(self.found.deferred.get(self.twins.get(node, node).name), (Counts, Index))

    def named(self, node: fx.Node) -> int | None:
        """How many units there are then among which the numbers name some; None if as many as before."""
        index = self.found.deferred.get(self.twins.get(node, node).name)
        for column in index.hot.columns if isinstance(index, Index) else ():
            shown = shown_by(column, self.number, self.place)
            if shown.dims == (0,) and not self.units.resized.isdisjoint(np.unique(shown.number).tolist()):
                return _size(self._resized(node, replace(shown, dims=(-1,)))[-1])
        return None

    def shape(self, node: fx.Node) -> Sequence[int]:
        """The shape of a node's value before."""
        shape: Sequence[int] = self.twins.get(node, node).meta["val"].shape
        return shape

    def _resized(self, node: fx.Node, shown: Shown) -> dict[int, Size]:
        if any(d >= 0 and not isinstance(node.meta["val"].shape[d], int) for d in shown.dims):
            raise self.cannot(node, "has units along a dimension of any size")
        if len(shown.dims) == 1:
            before = value_layout(shown.number, shown.place, self.counts)
            if before is None:
                raise self.cannot(node, "has some units of a class, and not all, along a dimension")
            return {shown.dims[0]: (before, self.units.into(before))}
        if all(n >= 0 and self.units.widths[n] > self.counts[n] for n in np.unique(shown.number)):
            return self._grown(node, shown)
        alive = np.ones(shown.number.shape, bool)
        for n in self.units.resized & set(np.unique(shown.number).tolist()):
            if self.units.widths[n] > self.counts[n]:
                raise self.cannot(node, "has more and fewer units along several dimensions")
            alive[shown.number == n] = np.isin(shown.place[shown.number == n], self.units.kept[n])
        left = [alive.any(axis=tuple(a for a in range(alive.ndim) if a != at)) for at in range(alive.ndim)]
        if alive.sum() != math.prod(int(own.sum()) for own in left):
            raise self.cannot(node, "has units along several dimensions, of which other numbers would be left")
        return {dim: np.append(0, own.cumsum()) for dim, own in zip(shown.dims, left, strict=True) if not own.all()}

    def _grown(self, node: fx.Node, shown: Shown) -> dict[int, Size]:
        """The size of the dimension along which there are more blocks, such as heads."""
        numbers, block, size = np.unique(shown.number), np.zeros_like(shown.place), shown.number.shape
        for n in set(numbers.tolist()) & self.units.resized:
            own = shown.number == n
            block[own] = self.root(n)[shown.place[own]]
        dims = [i for i in range(block.ndim) if (block != block.take([0], axis=i)).any()]
        grown = {(self.units.widths[n], self.counts[n]) for n in numbers.tolist()}
        sizes = {size[dims[0]] * width / count for width, count in grown} if len(dims) == 1 else set()
        if len(sizes) != 1 or not (new := sizes.pop()).is_integer():
            raise self.cannot(node, "has units along several dimensions, so that there cannot be more of them")
        return {shown.dims[dims[0]]: int(new)}

    def root(self, number: int) -> Ids:
        """For every unit of a class of another width, the outermost unit that it lies in of which there are more."""
        unit = np.arange(self.counts[number])
        while (parents := self.symmetry.units[number].parents) and parents[0][0] in self.units.resized:
            number, at = parents[0]
            unit = at[unit]
        return unit

    def size(self, node: fx.Node, dim: int) -> int | None:
        """The new size of a dimension; None if it stays."""
        sizes = self.of(node)
        found = sizes.get(dim % len(self.shape(node))) if sizes else None
        return None if found is None else _size(found)

    def boundary(self, node: fx.Node, dim: int, index: int) -> int:
        """The new place of what comes before an index along a dimension of a node's value."""
        size = self.shape(node)[dim]
        found = self.of(node).get(dim % len(self.shape(node)))
        if found is None or not isinstance(size, int):
            return index
        index = min(index + size if index < 0 else index, size)
        if isinstance(found, tuple):
            return found[0].boundary(index, self.units.widths, self.units.kept or None)
        if not isinstance(found, int):
            return int(found[index])
        if index not in (0, size):
            raise self.cannot(node, "is cut inside of units that lie along several dimensions")
        return found if index else 0

    def groups(self, node: fx.Node, dim: int, groups: int, *, alike: bool = False) -> int:
        """The new number of groups into which a dimension of a node's value is cut.

        Arguments:
            alike: whether more groups may come after the last one, since none knows of its place.
        """
        new = self.size(node, dim)
        if new is None or groups == 1:
            return groups
        size = self.shape(node)[dim]
        if groups == size:
            return new
        ends = [self.boundary(node, dim, i * size // groups) for i in range(groups + 1)]
        sizes = {b - a for a, b in itertools.pairwise(ends)} - {0}
        if alike and len(sizes) == 2 and new > size and max(sizes) % min(sizes) == 0:
            sizes = {min(sizes)}
        if len(sizes) > 1:
            raise self.cannot(node, f"is cut into {groups} groups, which would differ in size")
        return new // sizes.pop()

    def changes(self, node: fx.Node) -> bool:
        """Whether the size of a node's value changes."""
        return isinstance(self.twins.get(node, node).meta.get("val"), Tensor) and bool(self.of(node))

    def cannot(self, node: fx.Node, why: str, values: Sequence[fx.Node] | None = None) -> CannotResizeError:
        """The error for a node: to blame are the classes of other widths along some values, by default those that it
        gives and reads."""
        found: set[int] = set()
        for one in (node, *node.all_input_nodes) if values is None else values:
            for shown in self._shown(self.twins.get(one, one)):
                found |= set(np.unique(shown.number).tolist())
        return CannotResizeError(node.name, self.units.resized & found or self.units.resized, why)


def _size(found: Size) -> int:
    if isinstance(found, tuple):
        return len(found[1].index)
    return found if isinstance(found, int) else int(found[-1])

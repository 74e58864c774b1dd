"""From the unit graph to equivalence classes: which units may be exchanged, and inside of what.

Equal units are contracted, colour refinement finds the units that look alike, and what the classes
say of each other (two partitions of one class are related like two columns of one tensor) is
recorded in the unit graph, until nothing new follows.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import combinations

import networkx as nx
import numpy as np
import torch
from numpy.typing import NDArray

from fxmerge.symmetry.contracted import Contracted, Recorded, Role
from fxmerge.symmetry.propagation import Axis, AxisUnits
from fxmerge.symmetry.reasons import concatenate, first_reasons
from fxmerge.symmetry.relate import Pairs, meet
from fxmerge.symmetry.units import (
    CONCLUDED,
    Ids,
    UnitGraph,
    among,
    count_columns,
    distinct,
    distinct_columns,
    hashed,
    mix,
    number,
)


@dataclass(frozen=True)
class UnitClass:
    """Units that can be exchanged.

    Attributes:
        size: how many units there are.
        roles: the parameter axes that the units index.
        parents: classes in which the units are nested, with each unit's parent unit.
        fixed: for every unit, a number that must not change when it moves (zeros where nothing is fixed).
        name: what the class is called, if not after the first axis that it indexes.
    """

    size: int
    roles: tuple[Role, ...]
    parents: tuple[tuple[int, Ids], ...]
    fixed: Ids
    name: str = ""

    @cached_property
    def blocks(self) -> Ids:
        """For every unit, the number of the combination of parent units and fixed position that it is in."""
        blocks: Ids = np.unique(self.fixed, return_inverse=True)[1]
        for _, at in reversed(self.parents):
            blocks = np.unique(at * (blocks.max(initial=0) + 1) + blocks, return_inverse=True)[1]
        return blocks


@dataclass(frozen=True)
class Resolution:
    """The classes, and which raw units they are made of.

    Attributes:
        classes: parents before children.
        pinned: for the pinned raw units of every axis the reason.
        number: for every raw unit the class that it is in, -1 if in none.
        place: its place in that class.
    """

    classes: tuple[UnitClass, ...]
    pinned: dict[Axis, dict[str, Ids]]
    number: Ids
    place: Ids


def resolve(units: UnitGraph, axes: dict[Axis, AxisUnits]) -> Resolution:
    """Finds the equivalence classes. Facts that follow from others are added to `units`."""
    used = np.zeros(units.size, bool)
    for ids in units.used:
        used[ids] = True
    for axis in axes.values():
        units.pin(distinct(axis.ids[~used[axis.ids]]), "not used for the example inputs")
    units.node = CONCLUDED
    recorded, state = Recorded(units, axes), None
    while True:
        state = _Closing(units, recorded, state)
        if not state.close():
            return state.classes()


class _Closing(Contracted):
    """A contracted unit graph that adds what follows from it to the unit graph it was made of."""

    def close(self) -> bool:
        """Adds what the classes say of each other to the unit graph; True if there was anything new."""
        if self._check_places() or self._check_followed() or self._merge_blocks():
            return True
        new = False
        for cycle in nx.strongly_connected_components(self._class_graph()):
            if len(cycle) > 1:
                new |= self._pin([self.ids(c) for c in cycle], "blocks contain each other")
        for c, parents in self.maps.items():
            if self.pinned[self.members(c)[0]]:
                continue
            for p, block in list(parents.items()):
                if len(block) != len(self.members(c)):
                    part = self._fixed_blocks(c, p) if self.pinned[block[0]] else None
                    del parents[p]
                    if part is not None:
                        new |= self._tell_apart(c, part)
                        continue
                    new |= self._pin([self.ids(c), self.first[block]], "a unit is a member of two blocks of one kind")
                elif len(self.members(p)) == len(block) and self.pinned[block[0]]:
                    if not self._turned(c):
                        new |= self._pin([self.ids(c)], "each is alone at a fixed position")
                elif len(self.members(p)) == len(block):
                    self.units.equate(self.ids(c), self.first[block])
                    new = True
        if new:
            return True
        for c, parents in self.maps.items():
            if not self.pinned[self.members(c)[0]]:
                for (p, a), (q, b) in combinations(parents.items(), 2):
                    new |= self._relate(p, a, q, b)
        if new:
            return True
        return any(self._check_product(c) for c in self.maps) | self._check_roles()

    def _pin(self, ids: list[Ids], reason: str) -> bool:
        """Pins what is not pinned yet; True if there was any."""
        loose = np.concatenate([i[~self.pinned[self.unit[i]]] for i in ids])
        self.units.pin(distinct(loose), reason)
        return bool(len(loose))

    def _check_places(self) -> bool:
        """Pins units made of several that nothing tells apart, though they have different members."""
        child, parent = self.members_of_several
        if not len(child):
            return False
        unit, parent = distinct_columns(self.unit[child], parent)
        members = np.zeros(self.units.size, np.uint64)
        np.add.at(members, parent, mix(unit))
        some = np.flatnonzero(self.several & ~self.pinned[self.unit])
        origin = self.origin[some]
        first, group = number(hashed(self.unit[some], origin, self.places[some]))
        differ = members[some] != members[some[first[group]]]
        return self._pin([some[differ]], "equal units that look alike have different members")

    def _check_followed(self) -> bool:
        """Pins places in an order that anything but each other tells apart, and the units that the order is one of."""
        several = np.bincount(self.unit, minlength=self.count) > 1
        nested = np.bincount(self.parent, minlength=self.count) > 0
        inside = np.zeros(self.count, np.uint64)
        np.add.at(inside, self.child, mix(self.parent))
        new = False
        for followed in self.units.followed:
            ids = self.unit[followed.ids]
            # What a place is a member of may tell its row, and no more.
            free = (
                not (several | nested | self.pinned)[ids].any()
                and sum(len(self.members(c)) for c in distinct(self.colour[ids]).tolist()) == len(ids)
                and count_columns(followed.row, self.colour[ids], inside[ids]) == len(distinct(followed.row))
            )
            if not free:
                new |= self._pin([followed.ids, *followed.named], "something tells places apart that are in its order")
        return new

    def _class_graph(self) -> nx.DiGraph[int]:
        graph: nx.DiGraph[int] = nx.DiGraph()
        graph.add_edges_from((c, p) for c, parents in self.maps.items() for p in parents)
        return graph

    # ------------------------------------------------------------------ blocks and fixed positions

    def _merge_blocks(self) -> bool:
        """Blocks with the same members are one block; True if there were any.

        Not so two of one creation: their members are parts of units that have become one, and tell them apart
        (unless they are no more than the names of fixed positions). Nor does a unit of a plane that is turned become
        the name of a fixed position.
        """
        members = np.zeros(self.count, np.uint64)
        members[self.turned & ~self.pinned] = mix(np.array([1]))[0]
        np.add.at(members, self.parent, mix(self.child))
        raw = distinct(concatenate(self.units.member)[1])
        held, origin, unit = distinct_columns(members[self.unit[raw]], self.origin[raw], self.unit[raw])
        kind = number(hashed(held, origin))[1]
        twins = np.zeros(self.count, bool)
        twins[unit[np.bincount(kind)[kind] > 1]] = True
        twins &= np.bincount(self.unit[~self.is_tag], minlength=self.count) > 0
        blocks = distinct(self.parent)
        if self._pin([self.first[blocks[twins[blocks]]]], "two blocks of one kind have the same members"):
            return True
        blocks = blocks[~twins[blocks]]
        _, first, group = np.unique(members[blocks], return_index=True, return_inverse=True)
        self.units.equate(self.first[blocks], self.first[blocks[first[group]]])
        return len(first) < len(blocks)

    def _fixed_blocks(self, c: int, p: int) -> Ids | None:
        """For every unit of class c, a number for the fixed blocks of class p that its parts are members of.

        None where it is unclear which part is a member of which.
        """
        child, parent = self.recorded.child, self.recorded.parent
        own = (self.colour[self.unit[child]] == c) & (self.colour[self.unit[parent]] == p)
        child, parent = child[own], parent[own]
        raw = distinct(child)
        clear = (
            kinds
            for kinds in (self.kinds, self.kinds_by_place)
            if count_columns(self.unit[raw], kinds[raw]) == len(raw)
        )
        kinds = next(clear, None)
        told = count_columns(self.unit[child], self.unit[parent])
        if kinds is None or told < len(self.maps[c].get(p, ())):
            return None
        # By the blocks as they were: one that became one with others may hold other units in each of its parts.
        pairs = np.unique(np.stack([child, parent]), axis=1)
        seen = np.zeros(self.count, np.uint64)
        np.add.at(seen, self.unit[pairs[0]], mix(kinds[pairs[0]] + mix(pairs[1])))
        return np.unique(seen[self.members(c)], return_inverse=True)[1].astype(np.int64)

    def _tell_apart(self, c: int, part: Ids) -> bool:
        """Members of a class in different parts are not exchanged; True if that is new."""
        members = self.members(c)
        known = (q for q, block in self.maps[c].items() if self.pinned[block[0]] and len(block) == len(members))
        if part.max() == 0 or any(self._same_blocks(c, members, part, q) for q in known):
            return False
        tag = self.units.fresh(int(part.max()) + 1, ("fixed", "members of fixed blocks"))
        self.units.pin(tag, "members of fixed blocks")
        self.units.include(self.ids(c), tag[part])
        return True

    def _relate(self, p: int, a: Ids, q: int, b: Ids) -> bool:
        """Relates two partitions of one class, given as the blocks that its units are members of."""
        if len(self.members(p)) == 1 or len(self.members(q)) == 1:
            return False
        if self.pinned[a[0]] and self.pinned[b[0]]:
            return False
        if self.pinned[a[0]]:
            p, a, q, b = q, b, p, a
        met = meet(torch.from_numpy(a), torch.from_numpy(b))
        if met is None or met.independent:
            return False
        if self.pinned[b[0]]:
            return self._relate_pinned(p, met)
        if not met.complete.all():
            return self._pin([self.first[met.a], self.first[met.b]], "two kinds of block overlap irregularly")
        if (met.b_count == 1).all():
            if (met.a_count == 1).all():
                self.units.equate(self.first[met.a[np.argsort(met.a_part)]], self.first[met.b[np.argsort(met.b_part)]])
                return True
            return self._include(met.a, met.b[np.argsort(met.b_part)][met.a_part])
        if (met.a_count == 1).all():
            return self._include(met.b, met.a[np.argsort(met.a_part)][met.b_part])
        if any(
            self._same_blocks(p, met.a, met.a_part, s) for s in set(self.maps.get(p, {})) & set(self.maps.get(q, {}))
        ):
            return False
        block = self.units.fresh(len(met.a_count), ("block", "overlap"))
        self.units.include(self.first[met.a], block[met.a_part])
        self.units.include(self.first[met.b], block[met.b_part])
        return True

    def _relate_pinned(self, p: int, met: Pairs) -> bool:
        """Blocks p that meet different pinned units stay with those."""
        broken = ~met.complete | ((met.a_count == 1) & (not self._turned(p)))
        if self._pin([self.first[met.a[broken[met.a_part]]]], "blocks hold different fixed positions"):
            return True
        if any(
            self.pinned[self.members(s)[0]] and self._same_blocks(p, met.a, met.a_part, s) for s in self.maps.get(p, {})
        ):
            return False
        block = self.units.fresh(len(met.a_count), ("fixed", "fixed positions"))
        self.units.pin(block, "blocks hold different fixed positions")
        self.units.include(self.first[met.a], block[met.a_part])
        return True

    def _include(self, child: Ids, parent: Ids) -> bool:
        new = ~among(child * self.count + parent, self.child * self.count + self.parent)  # These are in order.
        self.units.include(self.first[child[new]], self.first[parent[new]])
        return bool(new.any())

    def _same_blocks(self, p: int, unit: Ids, part: Ids, s: int) -> bool:
        """Whether the units of class p are in one block of class s just where they are in one part."""
        block = np.zeros(self.count, np.int64)
        block[self.members(p)] = self.maps[p][s]
        pairs = count_columns(block[unit], part)
        return pairs == len(distinct(part)) == len(distinct(block[unit]))

    # ------------------------------------------------------------------ the structure of a class

    def _check_product(self, c: int) -> bool:
        """Pins a class whose units are not spread evenly over all combinations of their blocks.

        Where only the fixed positions hold different numbers of units, they tell the units apart.
        """
        if self.pinned[self.members(c)[0]]:
            return False
        free, fixed = self.blocks(c)
        together = np.bincount(fixed)[fixed]
        if together.min() < together.max():
            for size in distinct(together):
                self.units.segment(self.ids(c)[together == size], "fixed positions hold different numbers of units")
            return True
        if not free:
            alone = together.max() == 1 and not self._turned(c)
            return alone and self._pin([self.ids(c)], "each is alone at a fixed position")
        if any(self._segment_by_fixed(p, block, fixed) for p, block in free.items()):
            return True
        columns = [*free.values(), fixed]
        table = np.stack([number(b)[1] for b in columns])
        count = np.bincount(number(hashed(*table))[1])
        even = count.min() == count.max()
        if even and len(columns) > 2:
            even = len(count) == _combinations(np.stack(distinct_columns(*table)))
        ids = [self.ids(c), *(self.first[distinct(b)] for b in free.values())]
        return not even and self._pin(ids, "units are spread unevenly over their blocks")

    def _turned(self, c: int) -> bool:
        """Whether the units of a class lie in planes that are turned: these may change where none is permuted."""
        return bool(self.turned[self.members(c)].all())

    def _segment_by_fixed(self, p: int, block: Ids, fixed: Ids) -> bool:
        """Tells blocks apart that could be exchanged but hold members at different fixed positions."""
        held, positions = distinct_columns(block, fixed)
        seen = np.zeros(self.count, np.uint64)
        np.add.at(seen, held, mix(positions))
        members, own = self.members(p), self.blocks(p)[1]
        if count_columns(own, seen[members]) == len(distinct(own)):
            return False
        for at in distinct(seen[members]):
            self.units.segment(self.first[members[seen[members] == at]], "blocks hold different fixed positions")
        return True

    def _check_roles(self) -> bool:
        new = False
        for c in range(int(self.colour.max()) + 1):
            if len(self.members(c)) > 1 and not self.pinned[self.members(c)[0]] and self.roles(c) is None:
                new |= self._pin([self.ids(c)], "a unit has several indices on one axis that look alike")
        return new

    def classes(self) -> Resolution:
        movable = [
            c
            for c in range(int(self.colour.max()) + 1)
            if len(self.members(c)) > 1 and not self.pinned[self.members(c)[0]]
        ]
        free = {c: self.blocks(c) for c in movable}
        graph: nx.DiGraph[int] = nx.DiGraph()
        graph.add_nodes_from(sorted(movable, key=lambda c: int(self.ids(c).min())))
        graph.add_edges_from((p, c) for c in movable for p in free[c][0])
        # What neither lies on an axis nor holds units that do moves nothing: places in an order, diagonals.
        on_axes = {c for c in movable if self.roles(c)}
        graph.remove_nodes_from([c for c in movable if on_axes.isdisjoint({c} | nx.descendants(graph, c))])
        order = list(nx.lexicographical_topological_sort(graph, key=lambda c: int(self.ids(c).min())))
        number = {c: i for i, c in enumerate(order)}
        position = np.zeros(self.count, np.int64)
        for c in order:
            position[self.members(c)] = np.arange(len(self.members(c)))
        classes = []
        for c in order:
            parents, fixed = free[c]
            nested = tuple(sorted((number[p], position[b]) for p, b in parents.items()))
            classes.append(UnitClass(len(fixed), tuple(self.roles(c) or ()), nested, fixed))
        own = np.array([number.get(c, -1) for c in range(int(self.colour.max()) + 1)])[self.colour]
        pinned = self._reasons(among(self.colour, np.sort(movable)))
        unit = self.unit[self.units.first]
        return Resolution(tuple(classes), pinned, own[unit], position[unit])

    def _reasons(self, movable: NDArray[np.bool_]) -> dict[Axis, dict[str, Ids]]:
        """For every axis, the raw units that do not move, by the first reason given for each."""
        names, why = first_reasons(self.units)
        pinned: dict[Axis, dict[str, Ids]] = {}
        for axis, raw in self.recorded.raw.items():
            still = raw[~movable[self.unit[raw]]]
            for r in distinct(why[still]):
                pinned.setdefault(axis, {})[names[r]] = still[why[still] == r]
        return pinned


def _combinations(rows: Ids) -> int:
    """How many combinations of values are pairwise together in some row of the table."""
    sizes = rows.max(axis=1) + 1
    if np.prod(sizes.astype(float)) > 1e7:
        return -1
    allowed = np.ones(tuple(sizes), bool)
    for i, j in combinations(range(len(rows)), 2):
        together = np.zeros((sizes[i], sizes[j]), bool)
        together[rows[i], rows[j]] = True
        shape = [1] * len(rows)
        shape[i], shape[j] = int(sizes[i]), int(sizes[j])
        allowed &= together.reshape(shape)
    return int(allowed.sum())

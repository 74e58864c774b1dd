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
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from fxmerge.symmetry.propagate import Axis, AxisUnits
from fxmerge.symmetry.reasons import first_reasons
from fxmerge.symmetry.relate import Pairs, meet
from fxmerge.symmetry.units import CONCLUDED, Hashes, Ids, UnitGraph, mix


@dataclass(frozen=True)
class Role:
    """One parameter axis on which every unit of a class has one index.

    Attributes:
        axis: parameter and dimension.
        raw: for every unit of the class, which of the units that the axis started with it is.
    """

    axis: Axis
    raw: Ids


@dataclass(frozen=True)
class UnitClass:
    """Units that can be exchanged.

    Attributes:
        size: how many units there are.
        roles: the parameter axes that the units index.
        parents: classes in which the units are nested, with each unit's parent unit.
        fixed: for every unit, a number that must not change when it moves (zeros where nothing is fixed).
    """

    size: int
    roles: tuple[Role, ...]
    parents: tuple[tuple[int, Ids], ...]
    fixed: Ids


@dataclass(frozen=True)
class Resolution:
    """The classes, parents before children, and for the pinned raw units of every axis the reason."""

    classes: tuple[UnitClass, ...]
    pinned: dict[Axis, dict[str, Ids]]


def resolve(units: UnitGraph, axes: dict[Axis, AxisUnits]) -> Resolution:
    """Finds the equivalence classes. Facts that follow from others are added to `units`."""
    used = np.zeros(units.size, bool)
    for ids in units.used:
        used[ids] = True
    for axis in axes.values():
        units.pin(np.unique(axis.ids[~used[axis.ids]]), "not used for the example inputs")
    units.node = CONCLUDED
    told = len(units.equal), len(units.member)
    while True:
        state = _State(units, axes, told)
        if not state.close():
            return state.classes()


def _concatenate(pairs: list[tuple[Ids, Ids]]) -> tuple[Ids, Ids]:
    none = [np.zeros(0, np.int64)]
    return np.concatenate([a for a, _ in pairs] or none), np.concatenate([b for _, b in pairs] or none)


class _State:
    """The unit graph with equal units contracted, its colours, and the maps from class to class."""

    def __init__(self, units: UnitGraph, axes: dict[Axis, AxisUnits], told: tuple[int, int]) -> None:
        self.units, self.axes = units, axes
        # What the rules said, of single units; what was concluded since is said of whole contracted ones.
        self.told_equal, self.told_member = units.equal[: told[0]], units.member[: told[1]]
        self.unit = self._contract()
        self.count = int(self.unit.max()) + 1
        self.first = np.zeros(self.count, np.int64)
        self.first[self.unit[::-1]] = np.arange(units.size)[::-1]
        self.raw = {axis: np.unique(a.ids) for axis, a in axes.items()}
        self.child, self.parent = self._memberships()
        self.pinned = self._pinned()
        self.colour = self._refine()
        self.order = np.argsort(self.colour, kind="stable")
        self.starts = np.searchsorted(self.colour[self.order], np.arange(int(self.colour.max()) + 2))
        self.maps = self._maps()

    # ------------------------------------------------------------------ contraction and colours

    def _contract(self) -> Ids:
        a, b = _concatenate(self.units.equal)
        graph = coo_matrix((np.ones(len(a), np.int8), (a, b)), shape=(self.units.size,) * 2)
        unit: Ids = connected_components(graph, directed=False)[1].astype(np.int64)
        return unit

    def _memberships(self) -> tuple[Ids, Ids]:
        child, parent = _concatenate(self.units.member)
        code = np.unique(self.unit[child] * self.count + self.unit[parent])
        child, parent = code // self.count, code % self.count
        real = child != parent
        return child[real], parent[real]

    def _pinned(self) -> NDArray[np.bool_]:
        pinned = np.zeros(self.count, bool)
        for ids, _ in self.units.pinned:
            pinned[self.unit[ids]] = True
        while True:  # A block with a member that stays where it is stays where it is.
            up = self.parent[pinned[self.child] & ~pinned[self.parent]]
            if not len(up):
                return pinned
            pinned[up] = True

    def _refine(self) -> Ids:
        """Stable colours: what axes a unit indexes, then what its members and blocks look like."""
        colour = np.zeros(self.count, np.uint64)
        for number, raw in enumerate(self.raw.values()):
            np.add.at(colour, self.unit[raw], mix(np.array([number]))[0])
        tags = np.flatnonzero(self.pinned[self.unit] & ~self._is_raw())
        np.add.at(colour, self.unit[tags], mix(self.units.origin(tags) + (1 << 40)))
        colour[self.pinned] = mix(colour[self.pinned] + np.uint64(1))
        if self._several.any():
            # A member of one of several alike that became one unit is a member of that one, not of the others.
            child, parent = self._members_of_several
            pairs = np.unique(np.stack([self.unit[child].astype(np.uint64), self._places[parent]]), axis=1)
            np.add.at(colour, pairs[0].astype(np.int64), mix(pairs[1]))
        known = 0
        while True:
            found, colours = np.unique(colour, return_inverse=True)
            if len(found) == known:
                return colours.astype(np.int64)
            known = len(found)
            mixed, new = mix(colour), mix(colour)
            np.add.at(new, self.child, mix(mixed[self.parent] ^ np.uint64(0x5555)))
            np.add.at(new, self.parent, mix(mixed[self.child] ^ np.uint64(0x3333)))
            colour = new

    @cached_property
    def _several(self) -> NDArray[np.bool_]:
        """The units that became one with another of their own creation."""
        code = self.unit * (len(self.units.starts) + 1) + self.units.origin(np.arange(self.units.size))
        _, inverse, count = np.unique(code, return_inverse=True, return_counts=True)
        several: NDArray[np.bool_] = (count[inverse] > 1) & ~self._is_tag
        return several

    @cached_property
    def _is_tag(self) -> NDArray[np.bool_]:
        """The units that are no more than names of fixed positions, and lie on no column."""
        tag = np.array([origin[0] in ("segment", "fixed") for origin in self.units.origins])
        is_tag: NDArray[np.bool_] = tag[self.units.origin(np.arange(self.units.size))]
        return is_tag

    @cached_property
    def _places(self) -> Hashes:
        """What tells such units apart: how they were tied, or, where they do not move, which they are."""
        places: Hashes = self._kinds.copy()
        still = self.pinned[self.unit]
        places[still] = mix(np.flatnonzero(still))
        return places

    @cached_property
    def _members_of_several(self) -> tuple[Ids, Ids]:
        child, parent = _concatenate(self.told_member)
        some = self._several[parent] & (self.unit[child] != self.unit[parent])
        return child[some], parent[some]

    def _check_places(self) -> bool:
        """Pins units made of several that nothing tells apart, though they have different members."""
        child, parent = self._members_of_several
        if not len(child):
            return False
        pairs = np.unique(np.stack([self.unit[child], parent]), axis=1)
        members = np.zeros(self.units.size, np.uint64)
        np.add.at(members, pairs[1], mix(pairs[0]))
        some = np.flatnonzero(self._several & ~self.pinned[self.unit])
        origin = self.units.origin(some)
        alike = np.stack([self.unit[some].astype(np.uint64), origin.astype(np.uint64), self._places[some]])
        _, first, group = np.unique(alike, axis=1, return_index=True, return_inverse=True)
        differ = members[some] != members[some[first[group.reshape(-1)]]]
        return self._pin([some[differ]], "equal units that look alike have different members")

    def _is_raw(self) -> NDArray[np.bool_]:
        is_raw = np.zeros(self.units.size, bool)
        for raw in self.raw.values():
            is_raw[raw] = True
        return is_raw

    def members(self, colour: int) -> Ids:
        return self.order[self.starts[colour] : self.starts[colour + 1]]

    def _maps(self) -> dict[int, dict[int, Ids]]:
        """For each class and each class of its blocks: every member's block, in the order of `members`."""
        maps: dict[int, dict[int, Ids]] = {}
        colours = int(self.colour.max()) + 1
        code = self.colour[self.child] * colours + self.colour[self.parent]
        rank = np.empty(self.count, np.int64)
        rank[self.order] = np.arange(self.count)
        order = np.lexsort((rank[self.child], code))
        codes, starts = np.unique(code[order], return_index=True)
        for c, edges in zip(codes, np.split(order, starts)[1:], strict=True):
            maps.setdefault(int(c // colours), {})[int(c % colours)] = self.parent[edges]
        return maps

    # ------------------------------------------------------------------ what follows

    def close(self) -> bool:
        """Adds what the classes say of each other to the unit graph; True if there was anything new."""
        if self._check_places() or self._merge_blocks():
            return True
        new = False
        for cycle in nx.strongly_connected_components(self._class_graph()):
            if len(cycle) > 1:
                new |= self._pin([self._ids(c) for c in cycle], "blocks contain each other")
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
                    new |= self._pin([self._ids(c), self.first[block]], "a unit is a member of two blocks of one kind")
                elif len(self.members(p)) == len(block) and self.pinned[block[0]]:
                    new |= self._pin([self._ids(c)], "each is alone at a fixed position")
                elif len(self.members(p)) == len(block):
                    self.units.equate(self._ids(c), self.first[block])
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

    def _fixed_blocks(self, c: int, p: int) -> Ids | None:
        """For every unit of class c, a number for the fixed blocks of class p that its parts are members of.

        None where it is unclear which part is a member of which.
        """
        child, parent = _concatenate(self.told_member)
        own = (self.colour[self.unit[child]] == c) & (self.colour[self.unit[parent]] == p)
        child, block = child[own], self.unit[parent[own]]
        raw = np.unique(child)
        kinds = np.stack([self.unit[raw].astype(np.uint64), self._kinds[raw]])
        told = len(np.unique(np.stack([self.unit[child], block]), axis=1).T)
        if np.unique(kinds, axis=1).shape[1] < len(raw) or told < len(self.maps[c].get(p, ())):
            return None
        pairs = np.unique(np.stack([child, block]), axis=1)
        seen = np.zeros(self.count, np.uint64)
        np.add.at(seen, self.unit[pairs[0]], mix(self._kinds[pairs[0]] + mix(pairs[1])))
        return np.unique(seen[self.members(c)], return_inverse=True)[1].astype(np.int64)

    def _tell_apart(self, c: int, part: Ids) -> bool:
        """Members of a class in different parts are not exchanged; True if that is new."""
        members = self.members(c)
        known = (q for q, block in self.maps[c].items() if self.pinned[block[0]] and len(block) == len(members))
        if part.max() == 0 or any(self._same_blocks(c, members, part, q) for q in known):
            return False
        tag = self.units.fresh(int(part.max()) + 1, ("fixed", "members of fixed blocks"))
        self.units.pin(tag, "members of fixed blocks")
        self.units.include(self._ids(c), tag[part])
        return True

    def _merge_blocks(self) -> bool:
        """Blocks with the same members are one block; True if there were any.

        Not so two of one creation: their members are parts of units that have become one, and tell them apart
        (unless they are no more than the names of fixed positions).
        """
        members = np.zeros(self.count, np.uint64)
        np.add.at(members, self.parent, mix(self.child))
        raw = np.unique(_concatenate(self.units.member)[1])
        made = np.unique(
            np.stack([members[self.unit[raw]], self.units.origin(raw).astype(np.uint64), self.unit[raw]]), axis=1
        )
        _, kind, count = np.unique(made[:2], axis=1, return_inverse=True, return_counts=True)
        twins = np.zeros(self.count, bool)
        twins[made[2, count[kind.reshape(-1)] > 1].astype(np.int64)] = True
        twins &= np.bincount(self.unit[~self._is_tag], minlength=self.count) > 0
        blocks = np.unique(self.parent)
        if self._pin([self.first[blocks[twins[blocks]]]], "two blocks of one kind have the same members"):
            return True
        blocks = blocks[~twins[blocks]]
        _, first, group = np.unique(members[blocks], return_index=True, return_inverse=True)
        self.units.equate(self.first[blocks], self.first[blocks[first[group]]])
        return len(first) < len(blocks)

    def _class_graph(self) -> nx.DiGraph[int]:
        graph: nx.DiGraph[int] = nx.DiGraph()
        graph.add_edges_from((c, p) for c, parents in self.maps.items() for p in parents)
        return graph

    def _ids(self, colour: int) -> Ids:
        return self.first[self.members(colour)]

    def _pin(self, ids: list[Ids], reason: str) -> bool:
        """Pins what is not pinned yet; True if there was any."""
        loose = np.concatenate([i[~self.pinned[self.unit[i]]] for i in ids])
        self.units.pin(np.unique(loose), reason)
        return bool(len(loose))

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
        broken = ~met.complete | (met.a_count == 1)
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
        code = self.child * self.count + self.parent
        new = ~np.isin(child * self.count + parent, code)
        self.units.include(self.first[child[new]], self.first[parent[new]])
        return bool(new.any())

    def _same_blocks(self, p: int, unit: Ids, part: Ids, s: int) -> bool:
        """Whether the units of class p are in one block of class s just where they are in one part."""
        block = np.zeros(self.count, np.int64)
        block[self.members(p)] = self.maps[p][s]
        pairs = len(np.unique(np.stack([block[unit], part]), axis=1).T)
        return pairs == len(np.unique(part)) == len(np.unique(block[unit]))

    # ------------------------------------------------------------------ the structure of a class

    def blocks(self, c: int) -> tuple[dict[int, Ids], Ids]:
        """The free classes in which class c is nested, without those that follow from others, and the joint
        number of all pinned units that its units are members of."""
        parents = {p: b for p, b in self.maps.get(c, {}).items() if len(self.members(p)) > 1}
        fixed = np.zeros(len(self.members(c)), np.int64)
        for b in parents.values():
            if self.pinned[b[0]]:
                fixed = np.unique(np.stack([fixed, b]), axis=1, return_inverse=True)[1].reshape(-1)
        free = {p: b for p, b in parents.items() if not self.pinned[b[0]]}
        implied = {s for p in free for s in self.maps.get(p, {})}
        return {p: b for p, b in free.items() if p not in implied}, fixed

    def _check_product(self, c: int) -> bool:
        """Pins a class whose units are not spread evenly over all combinations of their blocks.

        Where only the fixed positions hold different numbers of units, they tell the units apart.
        """
        if self.pinned[self.members(c)[0]]:
            return False
        free, fixed = self.blocks(c)
        together = np.bincount(fixed)[fixed]
        if together.min() < together.max():
            for size in np.unique(together):
                self.units.segment(self._ids(c)[together == size], "fixed positions hold different numbers of units")
            return True
        if not free:
            return False
        if any(self._segment_by_fixed(p, block, fixed) for p, block in free.items()):
            return True
        columns = [*free.values(), fixed]
        table = np.stack([np.unique(b, return_inverse=True)[1].reshape(-1) for b in columns])
        rows, count = np.unique(table, axis=1, return_counts=True)
        even = count.min() == count.max()
        if even and len(columns) > 2:
            even = rows.shape[1] == _combinations(rows)
        ids = [self._ids(c), *(self.first[np.unique(b)] for b in free.values())]
        return not even and self._pin(ids, "units are spread unevenly over their blocks")

    def _segment_by_fixed(self, p: int, block: Ids, fixed: Ids) -> bool:
        """Tells blocks apart that could be exchanged but hold members at different fixed positions."""
        pairs = np.unique(np.stack([block, fixed]), axis=1)
        seen = np.zeros(self.count, np.uint64)
        np.add.at(seen, pairs[0], mix(pairs[1]))
        members, own = self.members(p), self.blocks(p)[1]
        if len(np.unique(np.stack([own.astype(np.uint64), seen[members]]), axis=1).T) == len(np.unique(own)):
            return False
        for positions in np.unique(seen[members]):
            self.units.segment(self.first[members[seen[members] == positions]], "blocks hold different fixed positions")
        return True

    @cached_property
    def _on_axes(self) -> dict[int, list[tuple[Axis, Ids]]]:
        """For every class, the raw units of it on each axis."""
        found: dict[int, list[tuple[Axis, Ids]]] = {}
        for axis, raw in self.raw.items():
            colour = self.colour[self.unit[raw]]
            for c in np.unique(colour):
                found.setdefault(int(c), []).append((axis, raw[colour == c]))
        return found

    def _roles(self, c: int) -> list[Role] | None:
        """The axes that class c indexes; None if it is unclear which index of a unit is which."""
        members = self.members(c)
        roles = []
        for axis, raw in self._on_axes.get(c, []):
            kinds = np.zeros(len(raw), np.uint64) if len(raw) == len(members) else self._kinds[raw]
            for kind in dict.fromkeys(kinds.tolist()):
                some = raw[kinds == kind]
                some = some[np.argsort(self.unit[some])]
                if not np.array_equal(self.unit[some], np.sort(members)):
                    return None
                roles.append(Role(axis, some[np.argsort(np.argsort(members))]))
        return roles

    @cached_property
    def _kinds(self) -> Hashes:
        """Tells raw units of one axis apart by what each was found equal to, and a member of, by itself."""
        kind = np.zeros(self.units.size, np.uint64)
        child, parent = _concatenate(self.told_member)
        np.add.at(kind, child, mix(self.units.origin(parent)))
        a, b = _concatenate(self.told_equal)
        # Which equality it was tells two neighbours of one origin apart.
        sizes = [len(x) for x, _ in self.told_equal]
        tag = np.repeat(np.arange(len(sizes)), sizes).astype(np.uint64) * np.uint64(2)
        origin = mix(self.units.origin(np.arange(self.units.size)))
        for _ in range(3):
            new = mix(kind)
            np.add.at(new, a, mix(kind[b] + origin[b] + tag))
            np.add.at(new, b, mix(kind[a] + origin[a] + tag + np.uint64(1)))
            kind = new
        return kind

    def _check_roles(self) -> bool:
        new = False
        for c in range(int(self.colour.max()) + 1):
            if len(self.members(c)) > 1 and not self.pinned[self.members(c)[0]] and self._roles(c) is None:
                new |= self._pin([self._ids(c)], "a unit has several indices on one axis that look alike")
        return new

    # ------------------------------------------------------------------ the result

    def classes(self) -> Resolution:
        movable = [
            c
            for c in range(int(self.colour.max()) + 1)
            if len(self.members(c)) > 1 and not self.pinned[self.members(c)[0]]
        ]
        free = {c: self.blocks(c) for c in movable}
        graph: nx.DiGraph[int] = nx.DiGraph()
        graph.add_nodes_from(sorted(movable, key=lambda c: int(self._ids(c).min())))
        graph.add_edges_from((p, c) for c in movable for p in free[c][0])
        order = list(nx.lexicographical_topological_sort(graph, key=lambda c: int(self._ids(c).min())))
        number = {c: i for i, c in enumerate(order)}
        position = np.zeros(self.count, np.int64)
        for c in order:
            position[self.members(c)] = np.arange(len(self.members(c)))
        classes = []
        for c in order:
            parents, fixed = free[c]
            nested = tuple(sorted((number[p], position[b]) for p, b in parents.items()))
            classes.append(UnitClass(len(fixed), tuple(self._roles(c) or ()), nested, fixed))
        return Resolution(tuple(classes), self._reasons(np.isin(self.colour, movable)))

    def _reasons(self, movable: NDArray[np.bool_]) -> dict[Axis, dict[str, Ids]]:
        """For every axis, the raw units that do not move, by the first reason given for each."""
        names, why = first_reasons(self.units)
        pinned: dict[Axis, dict[str, Ids]] = {}
        for axis, raw in self.raw.items():
            still = raw[~movable[self.unit[raw]]]
            for r in np.unique(why[still]):
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

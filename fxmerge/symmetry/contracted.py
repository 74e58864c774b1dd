"""The unit graph with equal units contracted: colours, classes, and what tells the parts of a unit apart."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from fxmerge.symmetry.propagation import Axis, AxisUnits
from fxmerge.symmetry.reasons import concatenate
from fxmerge.symmetry.units import Hashes, Ids, UnitGraph, distinct, distinct_columns, mix


@dataclass(frozen=True)
class Role:
    """One parameter axis on which every unit of a class has one index.

    Attributes:
        axis: parameter and dimension.
        raw: for every unit of the class, which of the units that the axis started with it is.
    """

    axis: Axis
    raw: Ids


class Recorded:
    """What the rules said, of single units. What is concluded since is said of whole contracted ones.

    Attributes:
        size: how many units there were.
        raw: for every parameter axis, the units that it started with.
        child, parent: the memberships.
        equal: the equalities, and for each the number of its record.
    """

    def __init__(self, units: UnitGraph, axes: dict[Axis, AxisUnits]) -> None:
        self.size = units.size
        self.raw = {axis: distinct(a.ids) for axis, a in axes.items()}
        self.child, self.parent = concatenate(units.member)
        sizes = [len(a) for a, _ in units.equal]
        self.equal = (*concatenate(units.equal), np.repeat(np.arange(len(sizes)), sizes).astype(np.uint64))
        self.origin = units.all_origins()

    @cached_property
    def kinds(self) -> Hashes:
        """Tells units of one axis apart by what each was found equal to, and a member of, by itself."""
        return self.hashes(np.zeros(self.size, np.uint64), self.origin[self.parent], self.origin)

    def hashes(self, kind: Hashes, block: Ids, origin: Ids) -> Hashes:
        """`kind` and what else is known of every unit.

        Arguments:
            kind: a hash of every unit.
            block: for every membership, a number for what the unit is a member of.
            origin: for every unit, the number of the creation that it comes from.
        """
        np.add.at(kind, self.child, mix(block))
        a, b, record = self.equal
        # Which equality it was tells two neighbours of one origin apart.
        tag, origins = record * np.uint64(2), mix(origin)
        for _ in range(3):
            new = mix(kind)
            np.add.at(new, a, mix(kind[b] + origins[b] + tag))
            np.add.at(new, b, mix(kind[a] + origins[a] + tag + np.uint64(1)))
            kind = new
        return kind


class Contracted:
    """A unit graph with equal units contracted to one, its colours, and the maps from class to class.

    Arguments:
        units: the unit graph.
        recorded: what the rules said.
        before: the same graph with fewer facts, contracted, if it is known.

    Attributes:
        unit: for every raw unit, the contracted one.
        counts: how many equalities and memberships there were.
        first: for every contracted unit, its first raw unit.
        child, parent: the memberships of contracted units.
        pinned: which contracted units do not move.
        colour: the class of every contracted unit.
        maps: for each class and each class of its blocks, every member's block, in the order of `members`.
    """

    def __init__(self, units: UnitGraph, recorded: Recorded, before: Contracted | None = None) -> None:
        self.units, self.recorded = units, recorded
        self.counts = len(units.equal), len(units.member)
        self.unit = self._contract(before)
        self.count = int(self.unit.max()) + 1
        self.first = np.zeros(self.count, np.int64)
        self.first[self.unit[::-1]] = np.arange(units.size)[::-1]
        self.child, self.parent = self._memberships(before)
        self.pinned = self._pinned()
        self.colour = self._refine()
        self.order = np.argsort(self.colour, kind="stable")
        self.starts = np.searchsorted(self.colour[self.order], np.arange(int(self.colour.max()) + 2))
        self.maps = self._maps()

    def _contract(self, before: Contracted | None) -> Ids:
        """Numbers the contracted units by their first raw ones."""
        count, start, known = self.units.size, np.arange(self.units.size), 0
        if before is not None:
            count = before.count + self.units.size - len(before.unit)
            start, known = np.concatenate([before.unit, np.arange(before.count, count)]), before.counts[0]
        a, b = concatenate(self.units.equal[known:])
        graph = coo_matrix((np.ones(len(a), np.int8), (start[a], start[b])), shape=(count,) * 2)
        unit: Ids = connected_components(graph, directed=False)[1].astype(np.int64)[start]
        return unit

    def _memberships(self, before: Contracted | None) -> tuple[Ids, Ids]:
        child, parent = concatenate(self.units.member[0 if before is None else before.counts[1] :])
        code = self.unit[child] * self.count + self.unit[parent]
        if before is not None:
            now = self.unit[before.first]
            code = np.concatenate([now[before.child] * self.count + now[before.parent], code])
        code = distinct(code)
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
        for number, raw in enumerate(self.recorded.raw.values()):
            np.add.at(colour, self.unit[raw], mix(np.array([number]))[0])
        for number, followed in enumerate(self.units.followed):
            np.add.at(colour, self.unit[followed.ids], mix(np.array([number + (1 << 50)]))[0])
        tags = np.flatnonzero(self.pinned[self.unit] & ~self.is_raw())
        np.add.at(colour, self.unit[tags], mix(self.origin[tags] + (1 << 40)))
        colour[self.pinned] = mix(colour[self.pinned] + np.uint64(1))
        if self.several.any():
            # A member of one of several alike that became one unit is a member of that one, not of the others.
            child, parent = self.members_of_several
            unit, place = distinct_columns(self.unit[child], self.places[parent])
            np.add.at(colour, unit, mix(place))
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

    def members(self, colour: int) -> Ids:
        return self.order[self.starts[colour] : self.starts[colour + 1]]

    def ids(self, colour: int) -> Ids:
        return self.first[self.members(colour)]

    def blocks(self, c: int) -> tuple[dict[int, Ids], Ids]:
        """The free classes in which class c is nested, without those that follow from others, and the joint
        number of all pinned units that its units are members of."""
        parents = {p: b for p, b in self.maps.get(c, {}).items() if len(self.members(p)) > 1}
        fixed = np.zeros(len(self.members(c)), np.int64)
        for b in parents.values():
            if self.pinned[b[0]] and len(b) == len(fixed):
                fixed = np.unique(np.stack([fixed, b]), axis=1, return_inverse=True)[1].reshape(-1)
        free = {p: b for p, b in parents.items() if not self.pinned[b[0]]}
        implied = {s for p in free for s in self.maps.get(p, {})}
        return {p: b for p, b in free.items() if p not in implied}, fixed

    # ------------------------------------------------------------------ the parts of a unit

    @cached_property
    def origin(self) -> Ids:
        """For every raw unit, the number of the creation that it comes from."""
        return self.units.all_origins()

    def is_raw(self) -> NDArray[np.bool_]:
        is_raw = np.zeros(self.units.size, bool)
        for raw in self.recorded.raw.values():
            is_raw[raw] = True
        return is_raw

    @cached_property
    def turned(self) -> NDArray[np.bool_]:
        """The contracted units that lie in planes that are turned."""
        turned = np.zeros(self.count, bool)
        for planes in self.units.turned:
            turned[self.unit[planes]] = True
        return turned

    @cached_property
    def is_tag(self) -> NDArray[np.bool_]:
        """The units that are no more than names of fixed positions, and lie on no column."""
        tag = np.array([origin[0] in ("segment", "fixed") for origin in self.units.origins])
        is_tag: NDArray[np.bool_] = tag[self.origin]
        return is_tag

    @cached_property
    def several(self) -> NDArray[np.bool_]:
        """The units that became one with another of their own creation."""
        several = np.zeros(self.units.size, bool)
        for start, end in pairwise([*self.units.starts, self.units.size]):
            own = self.unit[start:end]
            if not (own[1:] > own[:-1]).all():
                _, number, count = np.unique(own, return_inverse=True, return_counts=True)
                several[start:end] = count[number] > 1
        return several & ~self.is_tag

    @cached_property
    def places(self) -> Hashes:
        """What tells such units apart: how they were tied, or, where they do not move, which they are."""
        places: Hashes = self.kinds.copy()
        still = self.pinned[self.unit]
        places[still] = mix(np.flatnonzero(still))
        return places

    @cached_property
    def kinds(self) -> Hashes:
        """Those of `Recorded`; nothing was recorded of the units that are new since."""
        new = np.zeros(self.units.size - self.recorded.size, np.uint64)
        return np.concatenate([self.recorded.kinds, mix(mix(mix(new)))])

    @cached_property
    def kinds_by_place(self) -> Hashes:
        """Tells raw units apart by their axes, too, and by which of the blocks that do not move each is a member of."""
        parent = self.recorded.parent
        unit = self.unit[parent]
        block = np.where(self.pinned[unit], self.units.size + unit, self.origin[parent])
        return self.recorded.hashes(mix(self.origin), block, self.origin)

    @cached_property
    def members_of_several(self) -> tuple[Ids, Ids]:
        child, parent = self.recorded.child, self.recorded.parent
        some = self.several[parent] & (self.unit[child] != self.unit[parent])
        return child[some], parent[some]

    @cached_property
    def on_axes(self) -> dict[int, list[tuple[Axis, Ids]]]:
        """For every class, the raw units of it on each axis."""
        found: dict[int, list[tuple[Axis, Ids]]] = {}
        for axis, raw in self.recorded.raw.items():
            colour = self.colour[self.unit[raw]]
            for c in distinct(colour):
                found.setdefault(int(c), []).append((axis, raw[colour == c]))
        return found

    def roles(self, c: int) -> list[Role] | None:
        """The axes that class c indexes; None if it is unclear which index of a unit is which."""
        members = self.members(c)
        roles = []
        for axis, raw in self.on_axes.get(c, []):
            several = len(raw) > len(members)
            parts = self._parts(raw, self.kinds[raw] if several else np.zeros(len(raw), np.uint64), members)
            if parts is None and several:
                parts = self._parts(raw, self.kinds_by_place[raw], members)
            if parts is None:
                return None
            roles += [Role(axis, part) for part in parts]
        return roles

    def _parts(self, raw: Ids, kinds: Hashes, members: Ids) -> list[Ids] | None:
        """The raw units of each kind in the order of the members that they are; None if any kind lacks a member."""
        parts = []
        for kind in dict.fromkeys(kinds.tolist()):
            some = raw[kinds == kind]
            some = some[np.argsort(self.unit[some])]
            if not np.array_equal(self.unit[some], np.sort(members)):
                return None
            parts.append(some[np.argsort(np.argsort(members))])
        return parts

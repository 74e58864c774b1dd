"""The unit graph while it grows: units, equalities, memberships and pins.

A *unit* is the smallest thing that may move: one index of one parameter axis, or a block of other
units. Rules never loop over units; they hand over arrays of them.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from fxmerge.symmetry.mixing import Mix
from fxmerge.units.layout import Ids as Ids

Hashes = NDArray[np.uint64]
Numbers = TypeVar("Numbers", Ids, Hashes)

NOTHING = 0
"""The unit of positions that carry no unit of a column: constants and inputs beside moving units in one cat."""

CONCLUDED = "conclusion"
"""Stands for the graph node of facts that follow from what the classes say of each other."""


def mix(x: Ids | Hashes) -> Hashes:
    """A hash of each number (the finalizer of SplitMix64)."""
    z = x.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: Hashes = z ^ (z >> np.uint64(31))
    return mixed


def distinct(ids: Numbers) -> Numbers:
    """The numbers in `ids`, each once, in order: `numpy.unique`, but quick for what is in order already, or large."""
    ordered: Numbers = ids.reshape(-1)
    if (ordered[1:] > ordered[:-1]).all():
        return ordered
    ordered = np.sort(ordered)
    kept: Numbers = ordered[np.concatenate([[True], ordered[1:] != ordered[:-1]])]
    return kept


def among(ids: Ids, ordered: Ids) -> NDArray[np.bool_]:
    """Which of `ids` are in `ordered`, which is in order: `numpy.isin`, but quick for large numbers too."""
    found: NDArray[np.bool_] = np.searchsorted(ordered, ids, "right") > np.searchsorted(ordered, ids)
    return found


def number(values: Ids | Hashes) -> tuple[Ids, Ids]:
    """Numbers equal values alike, from 0 in the order of their first places; these places, and the numbers."""
    _, first, inverse = np.unique(values, return_index=True, return_inverse=True)
    order = np.argsort(first)
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    return first[order], rank[inverse]


def number_rows(rows: Ids) -> Ids:
    """Numbers equal rows of a table alike."""
    return number(rows[:, 0] if rows.shape[1] == 1 else hashed(*rows.T))[1]


def hashed(*rows: Ids | Hashes) -> Hashes:
    """A hash of each column of some rows of numbers."""
    hashes: Hashes = sum((mix(row.view(np.uint64) ^ mix(np.array([n]))) for n, row in enumerate(rows)), np.uint64(0))
    return hashes


def distinct_columns(*rows: Ids | Hashes) -> list[Any]:
    """The columns of some rows of numbers, each once: `numpy.unique` along axis 1, but quick, and in another order."""
    hashes = hashed(*rows)
    order = np.argsort(hashes)
    ordered = hashes[order]
    kept = order[np.concatenate([[True], ordered[1:] != ordered[:-1]])[: len(order)]]
    return [row[kept] for row in rows]


def count_columns(*rows: Ids | Hashes) -> int:
    """How many of the columns of some rows of numbers differ."""
    return len(distinct(hashed(*rows)))


@dataclass(frozen=True)
class Followed:
    """Places in an order, `ids`, whose units go where the order of the units `named` takes them.

    The places of several orders lie in rows, numbered by `row`: each moves inside of its row. `order` is for the rules:
    the numbers and the same ones sorted, None where there is no more to be said of these.
    """

    ids: Ids
    named: tuple[Ids, ...]
    row: Ids
    order: Any = None


@dataclass
class UnitGraph:
    """Facts about units, appended by the rules and resolved once, by `fxmerge.symmetry.classes`.

    Units are numbered from 0 in the order of their creation; each creation has an `origin`, which
    is the parameter axis of its units, or the graph node for which the units were made.

    What is computed from units may have them under new names: see `rename`. All facts are kept under the first names.

    `weighs` says whether rules record what signs and scales units may have, and give names for it.

    `node` names the graph node whose facts are being recorded (CONCLUDED for what follows from other
    facts). `equal_at`, `member_at` and so on keep it for every entry of `equal`, `member` and so on.
    """

    weighs: bool = True
    starts: list[int] = field(default_factory=list)
    origins: list[tuple[Any, ...]] = field(default_factory=list)
    size: int = 0
    equal: list[tuple[Ids, Ids]] = field(default_factory=list)
    member: list[tuple[Ids, Ids]] = field(default_factory=list)
    pinned: list[tuple[Ids, str]] = field(default_factory=list)
    final: list[Ids] = field(default_factory=list)
    rows: list[tuple[Ids, Ids]] = field(default_factory=list)
    rigid: list[Ids] = field(default_factory=list)
    used: list[Ids] = field(default_factory=list)
    summed: list[Ids] = field(default_factory=list)
    contracted: list[Ids] = field(default_factory=list)
    followed: list[Followed] = field(default_factory=list)
    turned: list[Ids] = field(default_factory=list)
    mixing: list[tuple[Mix, tuple[Any, ...], Mapping[str, Any], str]] = field(default_factory=list)
    node: str = ""
    equal_at: list[str] = field(default_factory=list)
    member_at: list[str] = field(default_factory=list)
    pinned_at: list[str] = field(default_factory=list)
    used_at: list[str] = field(default_factory=list)
    contracted_at: list[str] = field(default_factory=list)
    summed_at: list[str] = field(default_factory=list)
    turned_at: list[str] = field(default_factory=list)
    mixing_at: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._first, self._renamed = np.arange(0), np.iinfo(np.int64).max
        self.pin(self.fresh(1, ("nothing",)), "no unit")

    def fresh(self, count: int, origin: tuple[Any, ...]) -> Ids:
        """Makes `count` new units."""
        self.starts.append(self.size)
        self.origins.append(origin)
        self.size += count
        if self.size > len(self._first):
            self._first = np.concatenate([self._first, np.arange(len(self._first), 2 * self.size)])
        return np.arange(self.size - count, self.size, dtype=np.int64)

    def origin(self, ids: Ids) -> Ids:
        """For each unit, the number of the creation that it comes from."""
        return self.creation(self.first_names(ids))

    def creation(self, ids: Ids) -> Ids:
        """For each name of a unit, the number of the creation of the name."""
        if ids.size:
            first, last = (bisect_right(self.starts, end) - 1 for end in (ids.min(), ids.max()))
            if first == last:
                return np.full(ids.shape, first)
        return (np.searchsorted(self.starts, ids, side="right") - 1).astype(np.int64)

    def all_origins(self) -> Ids:
        """`origin` of all units."""
        return np.repeat(np.arange(len(self.starts)), np.diff([*self.starts, self.size]))

    def axis(self, ids: Ids) -> tuple[str, int] | None:
        """The parameter axis on which all these units are, None if there is no such."""
        origins = {self.origins[i] for i in distinct(self.origin(ids))}
        origin = origins.pop()
        return origin[1:] if not origins and origin[0] == "axis" else None

    def nodes_by_axis(self, records: Iterable[Ids], at: Iterable[str]) -> dict[tuple[str, int], set[str]]:
        """For every parameter axis, the nodes at which something was recorded of its units."""
        nodes: dict[tuple[str, int], set[str]] = defaultdict(set)
        for ids, node in zip(records, at, strict=True):
            axis = self.axis(ids)
            if axis is not None:
                nodes[axis].add(node)
        return nodes

    def keep(self, nodes: Collection[str]) -> None:
        """Forgets the facts of all graph nodes but these."""
        nodes = {"", *nodes}
        for kind in ("equal", "member", "pinned", "used", "contracted", "summed", "turned", "mixing"):
            facts, at = getattr(self, kind), getattr(self, f"{kind}_at")
            kept = [i for i, node in enumerate(at) if node in nodes]
            setattr(self, kind, [facts[i] for i in kept])
            setattr(self, f"{kind}_at", [at[i] for i in kept])

    def equate(self, a: Ids, b: Ids) -> None:
        """Unit `a[i]` moves exactly as unit `b[i]` does, for all i."""
        self.equal.append((self.first_names(a), self.first_names(b)))
        self.equal_at.append(self.node)

    def rename(self, ids: Ids) -> Ids:
        """New names of those units that are on an axis. Only signs and scales tell them apart from the old ones: those
        of a result may be others than those of what it is computed from."""
        old = distinct(ids)
        creation, new = self.creation(old), old.copy()
        for c in distinct(creation).tolist():
            if self.origins[c][0] == "axis":
                own = creation == c
                self._renamed = min(self._renamed, self.size)
                new[own] = self.fresh(int(own.sum()), self.origins[c])
                self._first[new[own]] = self._first[old[own]]
        result: Ids = new[np.searchsorted(old, ids)]
        return result

    @property
    def renamed(self) -> bool:
        """Whether any unit has another name than its first."""
        return self.size > self._renamed

    @property
    def first(self) -> Ids:
        """For every name of a unit, the first one."""
        return self._first[: self.size]

    def first_names(self, ids: Ids) -> Ids:
        """The units under the names that they were made with."""
        return self._first[ids] if self.renamed and ids.max(initial=0) >= self._renamed else ids

    def include(self, child: Ids, parent: Ids) -> None:
        """Where unit `child[i]` goes, its block `parent[i]` goes too, for all i."""
        self.member.append((self.first_names(child), self.first_names(parent)))
        self.member_at.append(self.node)

    def pin(self, ids: Ids, reason: str, *, final: bool = True) -> None:
        """None of these units may move; not final where separate units for each row might."""
        if len(ids):
            ids = self.first_names(ids)
            self.pinned.append((ids, reason))
            self.pinned_at.append(self.node)
            if final:
                self.final.append(ids)

    def use(self, ids: Ids) -> None:
        """These units of parameters reach an op that computes with them."""
        self.used.append(self.first_names(ids))
        self.used_at.append(self.node)

    def contract(self, ids: Ids) -> None:
        """A sum goes over these units of a parameter and those of an activation."""
        self.contracted.append(self.first_names(ids))
        self.contracted_at.append(self.node)

    def stay_apart(self, ids: Ids) -> None:
        """These units may move, but no two of one model may be merged, and neither may what lies in them: some op does
        more than add them up."""
        self.rigid.append(self.first_names(ids))

    def use_apart(self, ids: Ids, groups: Ids) -> None:
        """The parameter rows `ids[i]` are used together with the rows of the same group only."""
        self.rows.append((self.first_names(ids), groups))

    def sum(self, ids: Ids) -> None:
        """A symmetric reduction goes over these units of a parameter, in each of its rows."""
        self.summed.append(self.first_names(ids))
        self.summed_at.append(self.node)

    def follow(self, ids: Ids, named: Sequence[Ids], row: Ids | None = None, order: Any = None) -> None:
        """Where the units `ids` go is told by data and by where the units `named` go: if anything but each other tells
        those of one `row` apart (by default all are in one), neither move."""
        row = np.zeros_like(ids) if row is None else row
        self.followed.append(Followed(ids, tuple(map(self.first_names, named)), row, order))

    def rows_followed(self, ids: Ids) -> Ids | None:
        """For units that are places in an order, the numbers of their rows; None for others."""
        for followed in self.followed:
            at = np.minimum(np.searchsorted(followed.ids, ids), len(followed.ids) - 1)
            if np.array_equal(followed.ids[at], ids):
                return followed.row[at]
        return None

    def record(self, mix: Mix, operands: Sequence[Any], how: Mapping[str, Any], reason: str) -> None:
        """What an op says of changes of basis: `mix` is called once the classes are known, with labels as they then
        are."""
        self.mixing.append((mix, tuple(operands), how, reason))
        self.mixing_at.append(self.node)

    def turn(self, ids: Ids, code: Ids, planes: Ids, reason: str) -> None:
        """The units of each of the `planes`, shape (planes, 2), are multiplied by matrices that turn a plane.

        The number `code[i]` tells what happens to unit `ids[i]`: it is the same for units that are treated alike.
        """
        planes = self.first_names(planes)
        tag = self.fresh(int(code.max()) + 1, ("fixed", reason))
        self.pin(tag, reason)
        self.include(ids, tag[code])
        block = self.fresh(len(planes), ("block", reason))
        self.include(planes.reshape(-1), block.repeat(2))
        self.turned.append(planes)
        self.turned_at.append(self.node)

    def segment(self, ids: Ids, reason: str) -> None:
        """The units `ids` are told apart from all others, but may move among themselves."""
        tag = self.fresh(1, ("segment", reason))
        self.pin(tag, reason)
        self.include(ids, np.broadcast_to(tag, ids.shape))


def reached(units: UnitGraph, start: Sequence[Ids], steps: Iterable[tuple[Ids, Ids]]) -> NDArray[np.bool_]:
    """For every unit of a walk, whether it is one of some units or equal to one, or is reached from these by steps.

    Arguments:
        units: of the walk.
        start: the first units.
        steps: pairs of arrays of one length: from a unit of the first, a step goes to the unit at its place in the
            second.
    """
    ways = [*units.equal, *((b, a) for a, b in units.equal), *steps]
    found = np.zeros(units.size, bool)
    found[np.concatenate(start)] = True
    before = 0
    while found.sum() > before:
        before = found.sum()
        for a, b in ways:
            found[b[found[a]]] = True
        found[NOTHING] = False
    return found

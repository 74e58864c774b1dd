"""By which matrices the units of each class may be mixed: what the rules recorded, put together by class."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from typing import TypeVar

import numpy as np
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from torch import Tensor

from fxmerge.symmetry import weighing
from fxmerge.symmetry.base import Group
from fxmerge.symmetry.columns import support
from fxmerge.symmetry.exponents import ExponentFacts
from fxmerge.symmetry.labels import Labels
from fxmerge.symmetry.mixing import Column, Seen
from fxmerge.symmetry.propagation import Propagation
from fxmerge.symmetry.units import Ids, distinct, mix
from fxmerge.units.kind import Kind, UnitKind

G = TypeVar("G", bound=Group)


def find_kinds(found: Propagation, symmetry: Group, number: Ids, place: Ids) -> tuple[UnitKind, ...]:
    """The kind of every class of a symmetry, in the order of `symmetry.units`.

    Units of a class are mixed within the units of its parents only, each block by a matrix of its own. A class in which
    others are nested that have choices of their own is permuted at most.

    Arguments:
        found: the labelled program.
        symmetry: its classes.
        number: for every unit of the walk the class that it is in, -1 if in none.
        place: its place in that class.
    """
    symmetry = replace(symmetry, kinds=_planes(found, symmetry, number, place))
    facts, sight = _Facts(symmetry), _Sight(symmetry, number, place)
    for record, operands, how, reason in found.units.mixing if facts.open else ():
        if record not in weighing.WORDS:
            facts.reason = reason
            record(facts, *map(sight.of, operands), **how)
    kinds = facts.kinds(found)
    single = {n for n in facts.may_mix if kinds[n].kind == Kind.PERMUTATION}
    return _with_exponents(found, symmetry, kinds, single, sight) if found.units.weighs else kinds


def _with_exponents(
    found: Propagation, symmetry: Group, kinds: Sequence[UnitKind], single: Set[int], sight: _Sight
) -> tuple[UnitKind, ...]:
    """The kinds, with the signs and scales that each unit of some classes may have."""
    facts = ExponentFacts(found, symmetry)
    for record, operands, how, _ in found.units.mixing if single else ():
        if record in weighing.WORDS:
            seen = [sight.of(x) for x in operands]
            if any(c.number in single for x in seen for c in x.columns):
                record(facts, *seen, **how)
    own = list(kinds)
    for n in single:
        signs, stretches = facts.solve(n)
        own[n] = replace(own[n], signs=signs, stretches=stretches)
    return tuple(own)


def is_uniform(tensor: Tensor) -> bool:
    """Whether all entries of a vector, which may lie along any dimension, are one number."""
    if sum(n != 1 for n in tensor.shape) != 1 or not tensor.numel() or tensor.is_meta or not tensor.is_floating_point():
        return False
    return bool((tensor == tensor.reshape(-1)[0]).all())


def fitting(symmetry: G, states: Sequence[Mapping[str, Tensor]]) -> G:
    """A symmetry in which classes are only permuted that are scaled by gains which differ from unit to unit in a state.

    Arguments:
        symmetry: found for other parameters, of which these gains were one number each.
        states: the parameters with which it is to be used.
    """
    kinds = tuple(
        replace(UnitKind(), why=f"{uneven[0]} scales each unit by a number of its own") if uneven else own
        for own in symmetry.kinds
        for uneven in [sorted(name for name in own.scales if not all(is_uniform(state[name]) for state in states))]
    )
    return replace(symmetry, kinds=kinds)


def not_turned(found: Propagation, symmetry: Group, number: Ids) -> set[str]:
    """The nodes that end turns of planes, of which some may not be turned after all.

    Arguments:
        found: the labelled program.
        symmetry: its classes with their kinds.
        number: for every unit of the walk the class that it is in, -1 if in none.
    """
    turns = [any(symmetry.kind(m).turns for m in (n, *(p for p, _ in c.parents))) for n, c in enumerate(symmetry.units)]
    records = zip(found.units.turned, found.units.turned_at, strict=True)
    return {node for planes, node in records if not all(n >= 0 and turns[n] for n in distinct(number[planes]))}


def _planes(found: Propagation, symmetry: Group, number: Ids, place: Ids) -> tuple[UnitKind, ...]:
    """For every class of which the units lie in planes that are turned, the kind of these, and permutations for others.

    A class in such a class moves along with it: it must have the same planes, and has no kind of its own.
    """
    pairs: dict[int, set[tuple[int, int]]] = defaultdict(set)
    why: dict[int, str] = {}
    for planes, node in zip(found.units.turned, found.units.turned_at, strict=True):
        for n in distinct(number[planes]).tolist():
            own = planes[(number[planes] == n).any(1)]
            why.setdefault(n, node)
            whole = (number[own] == n).all(1).tolist()
            pairs[n].update((a, b) if w else (-1, -1) for w, (a, b) in zip(whole, place[own].tolist(), strict=True))
    kinds = [UnitKind() for _ in symmetry.units]
    for n, own_pairs in pairs.items():
        units = sorted(unit for pair in own_pairs for unit in pair)
        if n >= 0 and units == list(range(symmetry.units[n].size)) and pairs.keys().isdisjoint(symmetry.ancestors(n)):
            kinds[n] = UnitKind(Kind.COMPLEX, why[n], planes=tuple(sorted(own_pairs)))
    for n, own_pairs in pairs.items():
        for p, at in symmetry.units[n].parents if n >= 0 else ():
            if p in pairs and any((int(at[a]), int(at[b])) not in pairs[p] for a, b in own_pairs):
                kinds[p] = UnitKind()
    return tuple(kinds)


class _Sight:
    """Labels as they are once the classes are known."""

    def __init__(self, symmetry: Group, number: Ids, place: Ids) -> None:
        self.number, self.place = number, place
        # For the units of a class, the units of classes with a choice that they show.
        self.views: dict[int, list[tuple[int, Ids]]] = defaultdict(list)
        for owner in _may_mix(symmetry):
            for shown, view in symmetry.views[owner]:
                own = np.full(symmetry.units[shown].size, -1)
                own[view] = np.arange(len(view))[:, None]
                self.views[shown].append((owner, own))
        self._known: dict[tuple[object, ...], tuple[list[Column], tuple[int, ...]]] = {}
        self._seen: dict[int, Seen] = {}

    def of(self, labels: Labels) -> Seen:
        if id(labels) not in self._seen:  # The records keep the labels, so their ids stay their own.
            self._seen[id(labels)] = self._look(labels)
        return self._seen[id(labels)]

    def _look(self, labels: Labels) -> Seen:
        columns: list[Column] = []
        depends = {d for c in labels.inert for d in support(c)}
        for column in labels.columns:
            own, along = self._column(column)
            columns += own
            depends |= along
        return Seen(labels.shape, tuple(columns), frozenset(depends), labels.uniform)

    def _column(self, column: Tensor) -> tuple[list[Column], set[int]]:
        """The units of every class that a column shows, and the dimensions along which it differs."""
        dims = support(column)
        raw = column.numpy()[tuple(slice(None) if d in dims else 0 for d in range(column.ndim))]
        key = raw.shape, raw.tobytes()
        if key not in self._known:  # The same units lie on many tensors, along one dimension or another.
            self._known[key] = self._shown(raw)
        columns, along = self._known[key]
        own = [Column(c.number, tuple(dims[i] for i in c.dims), c.ids, c.raw) for c in columns]
        return own, {dims[i] for i in along}

    def _shown(self, raw: Ids) -> tuple[list[Column], tuple[int, ...]]:
        """The columns of the classes that units of the walk show, and the dimensions along which these units differ."""
        number, place = self.number[raw], self.place[raw]
        if number.size and (number == (n := int(number.flat[0]))).all() and n >= 0:  # By far most are of one class.
            return [_column(owner, own[place], raw) for owner, own in self.views[n]], _shrunk(place)[0]
        along, _ = _shrunk(np.where(number < 0, -1 - raw, number * (int(place.max()) + 1) + place))
        shown: dict[int, Ids] = {}
        for n in np.flatnonzero(np.bincount(number[number >= 0])).tolist():
            here = number == n
            for owner, own in self.views[n]:
                shown.setdefault(owner, np.full(raw.shape, -1))[here] = own[place[here]]
        return [_column(owner, ids, raw) for owner, ids in shown.items()], along


def _column(number: int, ids: Ids, raw: Ids) -> Column:
    kept, shrunk = _shrunk(ids)
    if len(kept) == ids.ndim:  # Every unit has a place of its own.
        (place,) = np.nonzero(ids.reshape(-1) >= 0)
        return Column(number, kept, ids, np.stack([place, raw.reshape(-1)[place]]))
    sizes = [n if d in kept else 1 for d, n in enumerate(ids.shape)]
    place = np.broadcast_to(np.arange(shrunk.size).reshape(sizes), ids.shape)
    return Column(number, kept, shrunk, _pairs(place[ids >= 0], raw[ids >= 0]))


def _pairs(a: Ids, b: Ids) -> Ids:
    """The pairs of numbers at the same places, each once, in order: shape (2, pairs)."""
    span = int(b.max(initial=0)) + 1
    return np.stack(np.divmod(distinct(a * span + b), span))


def _may_mix(symmetry: Group) -> list[int]:
    """The classes of which units may be mixed: those with a choice and on parameters, without others in them that have
    a choice."""
    above = set().union(*(symmetry.ancestors(n) for n in symmetry.choices))
    on_axes = {n for axis in symmetry.layout for n, _ in axis.roles}
    return [n for n in symmetry.choices if n in on_axes and n not in above]


def _shrunk(ids: Ids) -> tuple[tuple[int, ...], Ids]:
    """The dimensions along which numbers differ, and the numbers along these."""
    kept = tuple(d for d in range(ids.ndim) if not (ids == ids.take([0], axis=d)).all())
    return kept, ids[tuple(slice(None) if d in kept else 0 for d in range(ids.ndim))]


@dataclass
class _Facts:
    """The kinds that are left as facts are read.

    Attributes:
        kind, why: of every class.
        may_mix: the classes that are more than permuted if nothing speaks against it.
        first: for every unit of a class, the first unit in its block.
        ties: pairs of units of the walk, and whether one is mixed by the transpose of the inverse.
        scaling, mixing: for every class, the parameters of one number that scale its units, and those that are mixed.
        reason: the node whose facts are read.
    """

    symmetry: Group
    kind: list[Kind] = field(init=False)
    why: list[str] = field(init=False)
    first: list[Ids] = field(init=False)
    may_mix: set[int] = field(init=False)
    ties: dict[int, list[tuple[Ids, Ids, bool]]] = field(default_factory=lambda: defaultdict(list))
    scaling: dict[int, set[str]] = field(default_factory=lambda: defaultdict(set))
    mixing: dict[int, set[str]] = field(default_factory=lambda: defaultdict(set))
    reason: str = ""

    def __post_init__(self) -> None:
        numbers, open_ = range(len(self.symmetry.units)), set(_may_mix(self.symmetry))
        self.may_mix = open_
        largest = [kind if kind.turns else Kind.GENERAL_LINEAR for kind in map(self.symmetry.kind, numbers)]
        self.kind = [largest[n] if n in open_ else Kind.PERMUTATION for n in numbers]
        self.why = [self.symmetry.kinds[n].why if n in open_ else "it is of blocks" for n in numbers]
        self.first = []
        for n, c in enumerate(self.symmetry.units):
            blocks = self.symmetry.by_block(n)
            self.first.append(np.empty(c.size, np.int64))
            self.first[n][blocks] = blocks[:, :1]

    @property
    def open(self) -> bool:
        return any(kind > Kind.PERMUTATION for kind in self.kind)

    def apart(self, column: Column, dims: Iterable[int] | None = None) -> None:
        if self.kind[column.number] == Kind.PERMUTATION:
            return
        along = set(column.dims if dims is None else dims)
        split = [i for i, d in enumerate(column.dims) if d in along]
        if not split:
            return
        place = np.zeros((1,) * len(column.dims), np.int64)
        for i in split:
            line = np.arange(column.ids.shape[i]).reshape([-1 if j == i else 1 for j in range(len(column.dims))])
            place = place * column.ids.shape[i] + line
        place = np.broadcast_to(place, column.ids.shape)
        own = column.ids >= 0
        self._tell(column.number, _pairs(column.ids[own], place[own]))

    def count(self, number: int, ids: Ids) -> None:
        size = self.symmetry.units[number].size
        self._tell(number, np.stack([np.arange(size), np.bincount(ids[ids >= 0], minlength=size)]))

    def _tell(self, number: int, pairs: Ids) -> None:
        """Units with other numbers are not mixed with each other; (units, numbers), a unit may have several."""
        seen = np.zeros(self.symmetry.units[number].size, np.uint64)
        np.add.at(seen, pairs[0], mix(pairs[1]))
        if (seen != seen[self.first[number]]).any():
            self._lower(number, Kind.PERMUTATION)

    def limit(self, column: Column, kind: Kind) -> None:
        self._lower(column.number, kind)

    def _lower(self, number: int, kind: Kind, reason: str = "") -> None:
        lower = self.kind[number].meet(kind)
        if lower < self.kind[number]:
            self.kind[number], self.why[number] = lower, reason or self.reason

    def scale(self, column: Column, parameters: Collection[str]) -> None:
        self.scaling[column.number].update(parameters)

    def mixed(self, column: Column, parameters: Collection[str]) -> None:
        self.mixing[column.number].update(parameters)

    def tie(self, a: Column, b: Column, *, inverse: bool) -> None:
        if self.kind[a.number] == Kind.PERMUTATION:
            return
        firsts = []
        for place, units in (a.raw, b.raw):  # At one place of a tensor, units are mixed in one way.
            is_first = np.concatenate([[True], place[1:] != place[:-1]])
            firsts.append(units[is_first])
            if not is_first.all():
                self.ties[a.number].append((units, firsts[-1][is_first.cumsum() - 1], False))
        self.ties[a.number].append((firsts[0], firsts[1], inverse))

    def kinds(self, found: Propagation) -> tuple[UnitKind, ...]:
        """The kinds, with the axes on which the inverse is applied.

        A class that is summed over with itself is mixed by matrices whose inverse is their transpose. What only scales
        a class must not be mixed elsewhere.
        """
        size, first = found.units.size, found.units.first
        ties = {n: [(first[a], first[b], inverse) for a, b, inverse in own] for n, own in self.ties.items()}
        part = _signs(size, [tie for n, own in ties.items() if self.kind[n] > Kind.PERMUTATION for tie in own])
        for n, own in ties.items():
            ids = np.concatenate([ids for a, b, _ in own for ids in (a, b)])
            if (part[ids] == part[ids + size]).any():
                self._lower(n, Kind.ORTHOGONAL, "the same units are summed over with each other")
        for n, names in self.scaling.items():
            if not names.isdisjoint(self.mixing[n]):
                self._lower(n, Kind.PERMUTATION, "one parameter scales units and is mixed as they are")
        inverse = {n: self._inverse(n, found, part) for n, kind in enumerate(self.kind) if kind > Kind.PERMUTATION}
        for n, axes in inverse.items():
            if axes is None:
                self._lower(n, Kind.ORTHOGONAL, "units of one axis are mixed in two ways")
        return tuple(
            UnitKind(kind, why, inverse[n] or frozenset(), frozenset(self.scaling[n]), self.symmetry.kinds[n].planes)
            if kind > Kind.PERMUTATION
            else UnitKind(kind, why)
            for n, (kind, why) in enumerate(zip(self.kind, self.why, strict=True))
        )

    def _inverse(self, number: int, found: Propagation, part: Ids) -> frozenset[tuple[str, int, int]] | None:
        """The axes of a class on which units are mixed by the transpose of the inverse of what other axes have, None if
        that is not the same for all units of an axis.

        Axes that no tie connects, such as those of two pairs of layers with one gain between both, have a side each.
        """
        views = dict(self.symmetry.views[number])
        inverse: set[tuple[str, int, int]] = set()
        sides: list[Ids] = []
        for axis in self.symmetry.layout:
            for shown, slots in axis.roles:
                if shown in views and axis.parameter not in self.scaling[number]:
                    raw = distinct(found.axes[axis.parameter, axis.dim].ids)
                    ids = raw[slots[views[shown]]][:, 0]
                    same, other = part[ids], part[ids + found.units.size]
                    if any((same == side).all() for side in sides):
                        continue
                    if any((other == side).all() for side in sides):
                        inverse.add((axis.parameter, axis.dim, int(slots[0])))
                    elif any((same == side).any() or (other == side).any() for side in sides):
                        return None
                    else:
                        sides.append(same)
        return frozenset(inverse)


def _signs(size: int, ties: Sequence[tuple[Ids, Ids, bool]]) -> Ids:
    """The connected components of all units, mixed by a matrix and, after these, by the transpose of its inverse."""
    ends: tuple[list[Ids], list[Ids]] = ([np.zeros(0, np.int64)], [np.zeros(0, np.int64)])
    for a, b, inverse in ties:
        for shift in (0, size):
            ends[0].append(a + shift)
            ends[1].append(b + (size - shift if inverse else shift))
    i, j = map(np.concatenate, ends)
    graph = coo_matrix((np.ones(len(i), np.int8), (i, j)), shape=(2 * size, 2 * size))
    part: Ids = connected_components(graph, directed=False)[1].astype(np.int64)
    return part

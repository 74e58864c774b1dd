"""How many merged units there are to be of every class, and in whose places they stand."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

import numpy as np

from fxmerge.errors import OptionError
from fxmerge.matching.assignment import descendants
from fxmerge.matching.nested import carry, is_block, whole_blocks
from fxmerge.recipe import Budget, Zip
from fxmerge.symmetry.flow import Flow
from fxmerge.symmetry.group import Symmetry
from fxmerge.symmetry.propagation import Axis
from fxmerge.symmetry.units import Ids
from fxmerge.units.unit_map import UnitMap


@dataclass(frozen=True, eq=False)
class Room:
    """How many merged units there are to be of every class.

    Attributes:
        widths: by the number of the class.
        kept: for every class, the units of a model in whose places merged units stand, ascending. Where there are more
            merged units than units, the others come after them.
        changed: the numbers of the classes of which there are more or fewer than units of a model.
        joined: for classes of which it is settled what is merged, the unit in whose place each unit goes.
        survivors: for classes of which it is settled which units stay apart, these units, ascending. Each of the others
            goes into one of them.
    """

    widths: tuple[int, ...]
    kept: tuple[Ids, ...]
    changed: frozenset[int] = frozenset()
    joined: Mapping[int, Ids] = field(default_factory=dict)
    survivors: Mapping[int, Ids] = field(default_factory=dict)

    @staticmethod
    def of(
        symmetry: Symmetry, widths: Mapping[int, int] | None = None, joined: Mapping[int, Ids] | None = None
    ) -> Room:
        """The room for some classes of other widths, and for what is nested in them; all others have as many merged
        units as units. Of every block, as many units are kept.

        Arguments:
            symmetry: the classes.
            widths: for some classes by number, how many merged units there are to be, as `may_change` allows.
            joined: for some of them, the unit in whose place each unit goes: one that is kept.
        """
        sizes, kept = list[int](), list[Ids]()
        for n, c in enumerate(symmetry.units):
            width = (widths or {}).get(n, c.size)
            left = np.ones(c.size, bool)
            for parent, at in c.parents:
                left &= np.isin(at, kept[parent])
                if sizes[parent] > symmetry.units[parent].size:
                    width = c.size // symmetry.units[parent].size * sizes[parent]
            if width < c.size:
                rank, blocks = _ranked(cells(symmetry, n))
                left &= rank < width // blocks
            kept.append(np.flatnonzero(left))
            sizes.append(max(width, c.size) if left.all() else len(kept[n]))
        changed = (n for n, c in enumerate(symmetry.units) if sizes[n] != c.size)
        return Room(tuple(sizes), tuple(kept), frozenset(changed), joined or {})


def halves(symmetry: Symmetry, classes: Collection[int]) -> dict[int, int]:
    """Widths of some classes with which as few units as possible are merged in every block, in all blocks as many:
    pairs, where there is an even number of units."""
    widths = {}
    for n in classes:
        block = int((cells(symmetry, n) == 0).sum())
        step = next(k for k in range(2, block + 1) if block % k == 0)
        widths[n] = symmetry.units[n].size // step
    return widths


def alike(symmetry: Symmetry, widths: Mapping[int, int], consumed: frozenset[Axis]) -> UnitMap:
    """A map of one model with which there are fewer units of some classes: the first of every block, into which the
    others go in turn."""
    room = Room.of(symmetry, widths)
    places = [np.arange(c.size) for c in symmetry.units]
    for n in widths:
        place, blocks = places[n].copy(), cells(symmetry, n)
        for block in np.unique(blocks):
            own = np.flatnonzero(blocks == block)
            left = np.intersect1d(own, room.kept[n])
            place[own] = left[np.arange(len(own)) % len(left)]
        for nested, own in carry(symmetry, n, place, places).items():
            places[nested] = own
    maps = tuple(np.searchsorted(kept, own) for kept, own in zip(room.kept, places, strict=True))
    return UnitMap(symmetry.names, symmetry.layout, consumed, (maps,), room.widths, room.kept)


def repeated(symmetry: Symmetry, flow: Mapping[Axis, Flow], widths: Mapping[int, int]) -> tuple[UnitMap, UnitMap]:
    """Two maps of one model: from its units to more of some classes, where `whole_blocks` allows that; and from these
    to its own, of which each is there several times. What the second one spreads is the same function as before
    (Net2WiderNet, arXiv 1511.05641)."""
    room = Room.of(symmetry, widths)
    own = tuple(np.arange(c.size) for c in symmetry.units)
    several = UnitMap(symmetry.names, symmetry.layout, frozenset(), (own,), room.widths)
    copies = [np.arange(width) for width in room.widths]
    for n in widths:
        copies[n] %= symmetry.units[n].size
        for nested in descendants(symmetry, n)[1:]:
            ((parent, _),) = symmetry.units[nested].parents
            each = symmetry.units[nested].size // symmetry.units[parent].size
            copies[nested] = copies[parent][copies[nested] // each] * each + copies[nested] % each
    consumed = frozenset(axis for axis, kind in flow.items() if kind is Flow.CONSUMES)
    sizes = tuple(c.size for c in symmetry.units)
    layout = tuple(several.into(axis) for axis in symmetry.layout)
    return several, UnitMap(symmetry.names, layout, consumed, (tuple(copies),), sizes)


def cells(symmetry: Symmetry, number: int) -> Ids:
    """For every unit of a class, the number of the block in which it lies."""
    c = symmetry.units[number]
    key = np.stack([*(at for _, at in c.parents), c.fixed], axis=1)
    return np.unique(key, axis=0, return_inverse=True)[1].reshape(-1)


def _ranked(blocks: Ids) -> tuple[Ids, int]:
    """The rank of every unit in its block, and how many blocks there are."""
    order = np.argsort(blocks, kind="stable")
    starts = np.flatnonzero(np.diff(blocks[order], prepend=-1))
    rank = np.empty(len(blocks), np.int64)
    rank[order] = np.arange(len(blocks)) - np.repeat(starts, np.diff(starts, append=len(blocks)))
    return rank, len(starts)


def may_change(
    symmetry: Symmetry, flow: Mapping[Axis, Flow], classes: Collection[int]
) -> tuple[frozenset[int], frozenset[int]]:
    """The classes, of those whose units may be merged, of which there may be fewer and more merged units than units.

    These are classes that some layer consumes: what it gives is then the sum over as many members as before, while a
    product of two activations along merged units has fewer terms. Fewer means fewer in every block, so that the blocks
    are of one size; more means more of what lies in no block. A class of blocks has fewer or more whole blocks. Where
    rows of a parameter have units of their own, the rows can only be fewer with all that lies in them.
    """
    fewer, more = set(), set()
    for n in classes:
        tree = set(descendants(symmetry, n))
        axes = [axis for axis in symmetry.layout if any(number in tree for number, _ in axis.roles)]
        on = {(axis.parameter, axis.dim) for axis in axes}
        by_rows = [a for a in symmetry.layout if any((a.parameter, d) in on for d in a.dims if d != a.dim)]
        sizes = np.bincount(cells(symmetry, n))
        whole = all(a.classes <= tree and len(a.index) == sum(len(own) for _, own in a.roles) for a in by_rows)
        consumed = any(flow[axis.parameter, axis.dim] is Flow.CONSUMES for axis in axes)
        if sizes.min() > 1 and whole and consumed and len(set(sizes.tolist())) == 1:
            fewer.add(n)
            one_row = not by_rows and all(len(axis.dims) == 1 for axis in axes)
            if len(sizes) == 1 and whole_blocks(symmetry, n) and one_row:
                more.add(n)
    return frozenset(fewer), frozenset(more)


def wanted(part: Zip, symmetry: Symmetry, models: int, fewer: Collection[int], more: Collection[int]) -> dict[int, int]:
    """How many merged units of some classes a recipe asks for, where that is not as many as a model has.

    Arguments:
        part: the recipe's.
        symmetry: the classes.
        models: how many models there are.
        fewer: the classes of which there may be fewer merged units than units.
        more: those of which there may be more.

    Raises:
        OptionError: if a class is named of which there can be no other number, or a pattern fits none.
    """
    assert not isinstance(part.width, Budget)
    named = part.width if isinstance(part.width, Mapping) else None
    if named is not None:
        free = [symmetry.names[n] for n in sorted({*fewer, *more})]
        check_patterns(named, symmetry.names)
        for pattern in named:
            if not any(fits(name, pattern) for name in free):
                raise OptionError(
                    f"Zip.width names {pattern!r}, but no class that it fits can have another width. These can: "
                    f"{_some(free) or 'none'}."
                )
    # A head costs more than other units, so blocks are merged only where they are named.
    smaller = {n for n in fewer if named is not None or not is_block(symmetry, n)}
    larger = set(more) if models > 1 else set()
    found, refused = {}, dict[str, str]()
    for n in sorted({*smaller, *more}):
        name, size = symmetry.names[n], symmetry.units[n].size
        asked = part.width * size if not isinstance(part.width, Mapping) else _asked(part.width, name, size)
        step = (int(cells(symmetry, n).max()) + 1) * part.multiple_of
        width = max(round(asked / step) * step, step)
        # Rounding does not turn fewer units into more.
        width = min(width, size) if asked <= size else max(min(width, models * size), size)
        if asked != size and n in (larger if asked > size else smaller):
            found[n] = width
        elif asked != size and named is not None:
            refused[_pattern(named, name)] = f"{name!r} cannot have {'more' if asked > size else 'fewer'} units"
    for pattern in refused.keys() - {_pattern(named or {}, symmetry.names[n]) for n in found}:
        raise OptionError(f"Zip.width names {pattern!r}, but {refused[pattern]}. Leave it out.")
    found = {n: width for n, width in found.items() if width != symmetry.units[n].size}
    return whole_or_inside(symmetry, found, named)


def check_patterns(patterns: Iterable[str], names: Sequence[str]) -> None:
    """Every pattern must fit the name of a class.

    Raises:
        OptionError: if one fits none.
    """
    for pattern in patterns:
        if not any(fits(name, pattern) for name in names):
            raise OptionError(f"Zip.width names {pattern!r}, which is no class; there are {_some(names)}.")


def whole_or_inside(
    symmetry: Symmetry, widths: Mapping[int, int], named: Mapping[str, float] | None = None
) -> dict[int, int]:
    """The widths of blocks, or of what lies in them: of blocks, unless all units in them have another number.

    Arguments:
        symmetry: the classes.
        widths: of some classes by number.
        named: what the recipe names.

    Raises:
        OptionError: if that is both, each by a name of its own.
    """
    left = dict(widths)
    for n in widths:
        nested = set(descendants(symmetry, n)[1:])
        inside = nested & set(symmetry.choices)
        both = nested & left.keys()
        if n not in left or not both:
            continue
        order = [*(named or ()), ""]
        inner = [_pattern(named or {}, symmetry.names[k]) for k in both]
        outer = order.index(_pattern(named or {}, symmetry.names[n]))
        # A later pattern that fits much does not name what lies in blocks that an earlier one names.
        if any(order.index(p) < outer or p in symmetry.names for p in inner if order.index(p) != outer):
            raise OptionError(
                f"Zip.width names {symmetry.names[n]!r}, which are blocks, and {symmetry.names[min(both)]!r}, which "
                "lies in them: give one of the two another width, and leave out the other."
            )
        leaves = {k for k in inside if inside.isdisjoint(descendants(symmetry, k)[1:])}
        first = all(order.index(p) == outer for p in inner)
        for k in [n] if first and leaves <= left.keys() else both:
            del left[k]
    return left


def _asked(widths: Mapping[str, float], name: str, size: int) -> float:
    """How many merged units a mapping asks for of one class: as a share, or as a whole number above 1."""
    share = widths.get(_pattern(widths, name), 1.0)
    return share if isinstance(share, int) and share > 1 else share * size


def _pattern(widths: Mapping[str, float], name: str) -> str:
    """The first pattern of a mapping that fits a name; "" if none does."""
    return next((pattern for pattern in widths if fits(name, pattern)), "")


def fits(name: str, pattern: str) -> bool:
    """Whether a pattern fits a name, in which brackets are no pattern."""
    return name == pattern or fnmatchcase(name, pattern.replace("[", "[[]"))


def _some(names: Sequence[str]) -> str:
    """A list of names that is not too long."""
    return ", ".join(map(repr, names[:20])) + (", ..." if len(names) > 20 else "")

"""How many merged units there are to be of every class, and in whose places they stand."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import numpy as np

from fxmerge.errors import OptionError
from fxmerge.recipe import Zip
from fxmerge.symmetry.flow import Flow
from fxmerge.symmetry.group import Symmetry
from fxmerge.symmetry.propagate import Axis
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
    """

    widths: tuple[int, ...]
    kept: tuple[Ids, ...]
    changed: frozenset[int] = frozenset()

    @staticmethod
    def of(symmetry: Symmetry, widths: Mapping[int, int] | None = None) -> Room:
        """The room for some classes of other widths, and for what only moves along with them; all others have as many
        merged units as units. Of every block, as many units are kept.

        Arguments:
            symmetry: the classes.
            widths: for some classes by number, how many merged units there are to be, as `may_change` allows.
        """
        sizes = [c.size for c in symmetry.units]
        kept = [np.arange(size) for size in sizes]
        for n, width in (widths or {}).items():
            sizes[n] = width
            if width < symmetry.units[n].size:
                blocks = cells(symmetry, n)
                rank = np.zeros(len(blocks), np.int64)
                for block in np.unique(blocks):
                    own = np.flatnonzero(blocks == block)
                    rank[own] = np.arange(len(own))
                kept[n] = np.flatnonzero(rank < width // len(np.unique(blocks)))
                for shown, units in symmetry.views[n]:
                    if shown != n:
                        kept[shown] = np.sort(units[kept[n]].reshape(-1))
                        sizes[shown] = len(kept[shown])
        changed = (n for n, c in enumerate(symmetry.units) if sizes[n] != c.size)
        return Room(tuple(sizes), tuple(kept), frozenset(changed))


def alike(symmetry: Symmetry, classes: Collection[int], consumed: frozenset[Axis]) -> UnitMap:
    """The map of one model of which, in every block of some classes, as few units as possible are merged, all with as
    many: pairs, where there is an even number of units."""
    widths = {}
    for n in classes:
        block = int((cells(symmetry, n) == 0).sum())
        step = next(k for k in range(2, block + 1) if block % k == 0)
        widths[n] = symmetry.units[n].size // step
    room = Room.of(symmetry, widths)
    maps = [np.arange(c.size) for c in symmetry.units]
    for n in classes:
        place, blocks = np.zeros(symmetry.units[n].size, np.int64), cells(symmetry, n)
        for block in np.unique(blocks):
            own = np.flatnonzero(blocks == block)
            left = np.intersect1d(own, room.kept[n])
            place[own] = left[np.arange(len(own)) % len(left)]
        for shown, view in symmetry.views[n]:
            places = np.arange(symmetry.units[shown].size)
            places[view] = view[place]
            maps[shown] = np.searchsorted(room.kept[shown], places)
    return UnitMap(symmetry.names, symmetry.layout, consumed, (tuple(maps),), room.widths, room.kept)


def cells(symmetry: Symmetry, number: int) -> Ids:
    """For every unit of a class, the number of the block in which it lies."""
    c = symmetry.units[number]
    key = np.stack([*(at for _, at in c.parents), c.fixed], axis=1)
    return np.unique(key, axis=0, return_inverse=True)[1].reshape(-1)


def may_change(
    symmetry: Symmetry, flow: Mapping[Axis, Flow], classes: Collection[int]
) -> tuple[frozenset[int], frozenset[int]]:
    """The classes, of those whose units may be merged, of which there may be fewer and more merged units than units.

    These are classes that some layer consumes: what it gives is then the sum over as many members as before, while a
    product of two activations along merged units has fewer terms. Fewer means fewer in every block, so that the blocks
    are of one size; more means more of what lies in no block.
    """
    fewer, more = set(), set()
    rows = {(axis.parameter, d) for axis in symmetry.layout if len(axis.dims) > 1 for d in axis.dims}
    for n in classes:
        views = symmetry.views[n]
        shown = {number for number, _ in views}
        axes = [axis for axis in symmetry.layout if any(number in shown for number, _ in axis.roles)]
        many = np.bincount(cells(symmetry, n)).min() > 1
        whole = many and all(units.size == symmetry.units[number].size for number, units in views)
        alone = rows.isdisjoint((axis.parameter, axis.dim) for axis in axes)
        consumed = any(flow[axis.parameter, axis.dim] is Flow.CONSUMES for axis in axes)
        sizes = np.bincount(cells(symmetry, n))
        if whole and alone and consumed and len(set(sizes.tolist())) == 1:
            fewer.add(n)
            if len(sizes) == 1 and len(views) == 1:
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
    if isinstance(part.width, Mapping):
        free = [symmetry.names[n] for n in sorted({*fewer, *more})]
        for pattern in part.width:
            if not any(_fits(name, pattern) for name in symmetry.names):
                raise OptionError(f"Zip.width names {pattern!r}, which is no class; there are {_some(symmetry.names)}.")
            if not any(_fits(name, pattern) for name in free):
                raise OptionError(
                    f"Zip.width names {pattern!r}, but no class that it fits can have another width. These can: "
                    f"{_some(free) or 'none'}."
                )
    found = {}
    for n in sorted({*fewer, *more}):
        name, size = symmetry.names[n], symmetry.units[n].size
        asked = part.width * size if not isinstance(part.width, Mapping) else _asked(part.width, name, size)
        step = (int(cells(symmetry, n).max()) + 1) * part.multiple_of
        width = max(round(asked / step) * step, step)
        # Rounding does not turn fewer units into more.
        width = min(width, size) if asked <= size else max(min(width, models * size), size)
        if asked != size and (n in more if width > size else n in fewer and width < size):
            found[n] = width
    return found


def _asked(widths: Mapping[str, float], name: str, size: int) -> float:
    """How many merged units a mapping asks for of one class: as a share, or as a whole number above 1."""
    share = next((own for pattern, own in widths.items() if _fits(name, pattern)), 1.0)
    return share if isinstance(share, int) and share > 1 else share * size


def _fits(name: str, pattern: str) -> bool:
    """Whether a pattern fits a name, in which brackets are no pattern."""
    return name == pattern or fnmatchcase(name, pattern.replace("[", "[[]"))


def _some(names: Sequence[str]) -> str:
    """A list of names that is not too long."""
    return ", ".join(map(repr, names[:20])) + (", ..." if len(names) > 20 else "")

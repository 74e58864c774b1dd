"""The greedy zip of ZipIt! and MuDSC: units of several models are merged, also units of one and the same model.

Of all pairs the most similar is merged, again and again, until as few units are left as one model has.
`agglomerate.py` is that loop; this module says what it is applied to, and what its result means.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from fxmerge.errors import NonFiniteError, OptionError
from fxmerge.matching.agglomerate import Links, agglomerate, symmetric
from fxmerge.matching.blocks import match_blocks, nest
from fxmerge.symmetry.units import Ids


@dataclass(frozen=True, eq=False)
class Zipped:
    """Which units of several models are merged.

    Attributes:
        labels: for every model and unit, the merged unit that it goes into; shape (models, units). Unless another width
            was asked for, there are as many merged units as units of one model. Each has at least one member.
        forced: how many merges the budget (or a damping of 0) did not allow, but were made because no allowed
            pair was left. Always 0 for two models.
    """

    labels: Ids
    forced: int = 0

    @cached_property
    def sizes(self) -> Ids:
        """The number of members of every merged unit, shape (units,)."""
        return np.bincount(self.labels.reshape(-1))

    @property
    def unmerge(self) -> NDArray[np.float64]:
        """1 where a unit goes into a merged unit, else 0; shape (models * units, units), model after model.

        It is for axes that consume the units: `weight @ unmerge` where the columns of `weight` are the units.
        """
        return np.eye(self.labels.shape[1])[self.labels.reshape(-1)]

    @property
    def merge(self) -> NDArray[np.float64]:
        """1 / size where a merged unit has a unit as its member, else 0; shape (units, models * units).

        It is for axes that produce the units: every merged unit is the mean of its members. The published
        codes add 1e-5 to the size.
        """
        merge: NDArray[np.float64] = self.unmerge.T / self.sizes[:, None]
        return merge


def zip_units(
    similarity: Links, models: int, *, budget: float = 1.0, damping: float = 0.5, width: int | None = None
) -> Zipped:
    """Merges units of several models greedily (ZipIt!, arXiv 2305.03053, with the defaults of MuDSC's code).

    Of pairs that are equally similar, the one is merged first whose first unit comes first, and then the one
    whose second unit does; a merged unit comes where the first of its members comes. Merged units are
    numbered by their first members.

    Arguments:
        similarity: of all pairs of units, model after model, shape (models * units, models * units). Only what is
            above the diagonal is read.
        models: the number of models. Of one, units are merged with each other only if `width` asks for fewer.
        budget: in [0, 1]; each model may have `int(budget * (merges // models))` merges of two of its units, where a
            merged unit counts as one of the model of its first member. With 0, two models are aligned, unit by unit.
        damping: in [0, 1]; what the similarities of a merged unit are multiplied with, anew for every merge, so
            that it is less likely to be merged again. 0 forbids a merged unit further merges with units of the
            models of the two that it is made of.
        width: how many merged units there are to be, from 1 to all units of all models; None is as many as one model
            has.

    Raises:
        OptionError: if the shape does not fit, or an option is outside of its range.
        NonFiniteError: if a similarity is NaN or infinite.

    Example:
        The units of the first model are alike and become one, so that those of the second may stay apart.

        >>> import numpy as np
        >>> similarity = np.array([[1, 0.9, 0.1, 0.2], [0.9, 1, 0.1, 0.3], [0.1, 0.1, 1, 0], [0.2, 0.3, 0, 1]])
        >>> zip_units(similarity, 2).labels.tolist()
        [[0, 0], [1, 0]]
        >>> zip_units(similarity, 2, budget=0).labels.tolist()
        [[0, 1], [0, 1]]
    """
    one_block = np.zeros((models, _units(similarity, models)), np.int64)
    return zip_blocks(similarity, one_block, budget=budget, damping=damping, width=width)


def zip_groups(
    similarity: Links, models: int, blocks: Sequence[Ids] | Ids, *, budget: float = 1.0, damping: float = 0.5
) -> Zipped:
    """Merges units greedily inside of matched blocks, such as attention heads (MuDSC, arXiv 2403.01753, section 4.3).

    The blocks of every model are matched to those of the first, one to one, by what their members gain from
    their best assignment. Where blocks lie in blocks, the outer ones are matched first. No block is split or
    merged with another of its model; members of matched blocks are merged as by `zip_units`.

    Arguments:
        similarity: as for `zip_units`.
        models: the number of models, at least 2.
        blocks: the block of every unit, in every model the same, shape (units,); or for blocks in blocks one such
            row for every level, outer blocks first, shape (levels, units).
        budget: as for `zip_units`, for all blocks together. They are served in the order of their numbers, and
            none gets more than its part of a budget of 1.
        damping: as for `zip_units`.

    Returns:
        The merged units of a block have the numbers of the units of the first model in it.

    Raises:
        OptionError: if the shapes do not fit, blocks of one level differ in size or lie across outer blocks, or
            an option is outside of its range.
        NonFiniteError: if a similarity is NaN or infinite.

    Example:
        >>> import numpy as np
        >>> features = np.eye(4)[[0, 1, 2, 3, 3, 2, 0, 1]]
        >>> zip_groups(features @ features.T, 2, np.array([0, 0, 1, 1])).labels.tolist()
        [[0, 1, 2, 3], [3, 2, 0, 1]]
    """
    units = _units(similarity, models)
    levels = np.atleast_2d(np.asarray(blocks))
    if levels.ndim != 2 or levels.shape[1] != units:
        raise OptionError(f"The blocks have shape {levels.shape}; give one number for each of the {units} units.")
    try:
        nested = nest(list(levels))
    except ValueError as error:
        raise OptionError(f"The blocks cannot be matched: {error}.") from None
    numbers, inner = np.unique(levels[-1], return_inverse=True)
    matched = [levels[-1]]
    for start in range(units, models * units, units):
        matched.append(
            numbers[match_blocks(similarity[:units, start : start + units].astype(np.float64), nested)[inner]]
        )
    return zip_blocks(similarity, np.stack(matched), budget=budget, damping=damping)


def zip_blocks(
    similarity: Links, blocks: Ids, *, budget: float = 1.0, damping: float = 0.5, width: int | None = None
) -> Zipped:
    """Merges units greedily inside of blocks that are matched already.

    Arguments:
        similarity: as for `zip_units`.
        blocks: for every model and unit, the number of its block, shape (models, units); units of one number
            may be merged. A block has as many units in every model.
        budget: as for `zip_groups`.
        damping: as for `zip_units`.
        width: as for `zip_units`; of it, every block gets as much. More than a block has units is for one block.

    Returns:
        The merged units of a block have the numbers of the first units of the first model in it, and then those from
        the number of its units on.
    """
    models, units = blocks.shape
    width = units if width is None else width
    _check(similarity, blocks, budget, damping, width)
    merges = models * units - width
    allowed = np.full(models, _share(merges, models, budget))
    labels, forced = np.empty(models * units, np.int64), 0
    for block in np.unique(blocks):
        own = np.flatnonzero(blocks.reshape(-1) == block)
        model = own // units
        goal = (model == 0).sum() * width // units
        places = np.concatenate([own[model == 0], np.arange(units, width)])[:goal]
        limits = np.minimum(allowed, _share(len(own) - goal, models))
        inside = similarity if len(own) == len(similarity) else similarity[np.ix_(own, own)]
        first, used, excess = _zip(inside, model, goal, limits, damping)
        labels[own] = places[np.unique(first, return_inverse=True)[1]]
        allowed -= used
        forced += excess
    return Zipped(labels.reshape(models, units), forced)


def _zip(similarity: Links, model: Ids, goal: int, limits: Ids, damping: float) -> tuple[Ids, Ids, int]:
    """Merges until `goal` units are left: the first unit of those that each is merged with, the merges inside of
    each model, and how many merges had to be forced."""
    merges = len(similarity) - goal
    first, used = agglomerate(similarity, model, merges, limits, damping)
    kept = np.unique(first)
    if len(kept) == goal:
        return first, used, 0
    # Nothing that is left is allowed. Merges go on without damping or limits, from the plain minimum linkage.
    unlimited = np.full_like(limits, merges + 1)
    further, _ = agglomerate(_linkage(symmetric(similarity), first), model[kept], len(kept) - goal, unlimited, 1.0)
    return kept[further[np.searchsorted(kept, first)]], used, len(kept) - goal


def _linkage(links: Links, first: Ids) -> Links:
    """The smallest similarity of any members, for all pairs of merged units."""
    order = np.argsort(first, kind="stable")
    starts = np.flatnonzero(np.diff(first[order], prepend=-1))
    rows = np.minimum.reduceat(links[order], starts, axis=0)
    return np.minimum.reduceat(rows[:, order], starts, axis=1)


def _share(total: int, parts: int, budget: float = 1.0) -> int:
    # Rounded as published.
    return int(total // parts * budget + 1e-4)


def _units(similarity: Links, models: int) -> int:
    """The number of units of one model."""
    if models < 1:
        raise OptionError(f"models is {models}; at least 1 is needed to zip.")
    if similarity.ndim != 2 or len(set(similarity.shape)) > 1 or similarity.shape[0] % models or not similarity.size:
        raise OptionError(
            f"The similarity has shape {similarity.shape}; it must be square, with as many rows for each of "
            f"{models} models."
        )
    return len(similarity) // models


def _check(similarity: Links, blocks: Ids, budget: float, damping: float, width: int) -> None:
    models, units = blocks.shape
    if units != _units(similarity, models):
        raise OptionError(f"The blocks have shape {blocks.shape}, and the similarity {similarity.shape}.")
    counts = [np.unique(row, return_counts=True) for row in blocks]
    if any(not (np.array_equal(n, counts[0][0]) and np.array_equal(c, counts[0][1])) for n, c in counts[1:]):
        raise OptionError("A block must have as many units in every model.")
    count = len(counts[0][0])
    most = models * units if count == 1 else units
    if width != units and (not count <= width <= most or width % count or len(set(counts[0][1].tolist())) > 1):
        raise OptionError(
            f"width is {width}; it must be from {count} to {most}, and as much for each block; there are {count}, of "
            f"{units} units."
        )
    for name, value in (("budget", budget), ("damping", damping)):
        if not 0 <= value <= 1:
            raise OptionError(f"{name} is {value}; it must be in [0, 1].")
    if not np.isfinite(similarity).all() and not np.isfinite(np.triu(similarity, 1)).all():
        raise NonFiniteError("A similarity above the diagonal is NaN or infinite.")

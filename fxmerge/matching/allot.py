"""Widths within a budget: classes give up units where that loses least for what it saves."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fxmerge.errors import OptionError
from fxmerge.matching.agglomerate import Links
from fxmerge.matching.assignment import descendants
from fxmerge.matching.room import Room, cells
from fxmerge.matching.zipping import zip_blocks
from fxmerge.symmetry.group import Symmetry
from fxmerge.symmetry.units import Ids

FINE = 8
"""In how many steps a class goes from the units of one model to none; the last is not taken."""

TINY = 1e-12
"""What stands for nothing in a denominator."""


@dataclass(frozen=True)
class Allotment:
    """What may be chosen, and what it costs.

    Attributes:
        steps: for classes by number, the widths to choose from, from the largest on.
        price: for every parameter, what one entry of it costs.
        fits: whether the result is within the budget at some widths.
        budget: what to call it in messages.
    """

    steps: Mapping[int, tuple[int, ...]]
    price: Mapping[str, float]
    fits: Callable[[Mapping[int, int]], bool]
    budget: str

    def room(self, symmetry: Symmetry, loss: Callable[[int, Sequence[int]], Sequence[float]]) -> Room:
        """The room at the widths that are chosen.

        From all units on, the class is narrowed by a step, again and again, that loses least for what it saves. What is
        left of the budget then goes to those classes of which a step still fits, whose loss is largest first. To give
        layers widths within a budget is PLeaS's idea (arXiv 2407.02447), which solves a program for it.

        Arguments:
            symmetry: the classes.
            loss: what is lost of a class at each of some widths.

        Raises:
            OptionError: if the result is not within the budget at the smallest widths either.
        """
        losses = {n: loss(n, widths) for n, widths in self.steps.items()}
        at = dict.fromkeys(self.steps, 0)
        path = [self._widths(at)]
        while due := [n for n, widths in self.steps.items() if at[n] + 1 < len(widths)]:
            before = self._cost(symmetry, path[-1])

            def rate(n: int, before: float = before) -> float:
                saved = before - self._cost(symmetry, self._widths({**at, n: at[n] + 1}))
                return (losses[n][at[n] + 1] - losses[n][at[n]]) / max(saved, TINY)

            at[min(due, key=rate)] += 1
            path.append(self._widths(at))
        low, high = 0, len(path) - 1  # The first that fits: what comes later costs less.
        if not self.fits(path[high]):
            raise OptionError(
                f"Zip.width is {self.budget}, but the smallest widths that classes may have cost more: allow more."
            )
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if self.fits(path[middle]) else (middle + 1, high)
        at = {n: self.steps[n].index(width) for n, width in path[low].items()}
        while wider := [n for n in at if at[n] and self.fits(self._widths({**at, n: at[n] - 1}))]:
            at[max(wider, key=lambda n: losses[n][at[n]] - losses[n][at[n] - 1])] -= 1
        return Room.of(symmetry, {n: w for n, w in self._widths(at).items() if w != symmetry.units[n].size})

    def _widths(self, at: Mapping[int, int]) -> dict[int, int]:
        return {n: self.steps[n][i] for n, i in at.items()}

    def _cost(self, symmetry: Symmetry, widths: Mapping[int, int]) -> float:
        """What all parameters cost at some widths."""
        share = np.ones(len(symmetry.units))
        for n, width in widths.items():
            share[descendants(symmetry, n)] *= width / symmetry.units[n].size
        entries: dict[str, float] = {}
        for axis in symmetry.layout:
            more = sum(len(slots) * (share[n] - 1) for n, slots in axis.roles) / len(axis.index)
            entries[axis.parameter] = entries.get(axis.parameter, float(np.prod(axis.shape))) * (1 + more)
        return sum(count * self.price.get(name, 0.0) for name, count in entries.items())


def widths_to_try(symmetry: Symmetry, number: int, models: int, *, fewer: bool, more: bool, step: int) -> list[int]:
    """Widths of a class to choose from, from the largest on.

    Arguments:
        symmetry: the classes.
        number: the class.
        models: how many models there are.
        fewer, more: whether there may be fewer or more merged units than units.
        step: what widths are multiples of, unless it is the number of units.
    """
    size, blocks = symmetry.units[number].size, int(cells(symmetry, number).max()) + 1
    parts = [*range(FINE * models, FINE, -1)] if more else []
    parts += [FINE, *(range(FINE - 1, 0, -1) if fewer else ())]
    step *= blocks
    widths = {size}
    for part in parts:
        width = max(size * part // (FINE * step) * step, step)
        widths.add(min(width, size) if part < FINE else max(min(width, models * size), size))
    return sorted(widths, reverse=True)


def zip_losses(similarity: Links, blocks: Ids, widths: Sequence[int], budget: float, damping: float) -> list[float]:
    """How much of a class is lost when its units are zipped to some widths, over how much is kept: as noise stands to
    the signal. What many layers add, one after the other, is about the sum of such ratios.

    Of every merged unit, the similarities of its members to each other, added up, over their number are kept: all of
    what one unit has in common with itself, half of what two have that are not alike.

    Arguments:
        similarity: of all pairs of units of all models, above the diagonal.
        blocks, budget, damping: as for `zip_blocks`.
        widths: the numbers of merged units.
    """
    above = np.triu(similarity, 1)
    whole, losses = above + above.T + np.eye(len(above)), []
    for width in widths:
        labels = zip_blocks(similarity, blocks, budget=budget, damping=damping, width=width).labels.reshape(-1)
        order = np.argsort(labels, kind="stable")
        starts = np.flatnonzero(np.diff(labels[order], prepend=-1))
        rows = np.add.reduceat(whole[order][:, order], starts, axis=0)
        sizes = np.diff(starts, append=len(labels))
        kept = sum(rows[i, s : s + n].sum() / n for i, (s, n) in enumerate(zip(starts, sizes, strict=True)))
        losses.append(len(labels) / max(float(kept), TINY) - 1)
    return losses

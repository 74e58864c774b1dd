"""Signs of units where these may have some: the ones under which two models are most similar.

What two units gain from being matched is the largest sum of their similarities over all signs that the unit may have.
With one sign this is the similarity on the axes that it does not change, plus the absolute value of that on the others.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import product

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fxmerge.evidence.weights import Slices
from fxmerge.symmetry.group import Symmetry

Parities = tuple[int, ...]
"""For every sign of a unit, whether it changes an axis: one or zero."""

Scores = NDArray[np.float64]


def by_parities(symmetry: Symmetry, number: int, where: Sequence[Slices]) -> dict[Parities, list[Slices]]:
    """Parameter slices of a class, by the signs that change them."""
    found: dict[Parities, list[Slices]] = {}
    for s in where:
        own = next((o for o in symmetry.scaled[number] if o.axis is s.axis and np.array_equal(o.slots, s.slots)), None)
        count = len(symmetry.kinds[number].signs)
        parities = (0,) * count if own is None else tuple(power % 2 for power in own.powers[:count])
        found.setdefault(parities, []).append(s)
    return found


def of_activations(symmetry: Symmetry, number: int) -> Parities:
    """The signs that the activations of a class have, where they are read.

    A sign that one parameter of several dimensions has does not reach what reads the units: they are squared between.
    """
    shapes = {axis.parameter: axis.shape for axis in symmetry.layout}
    signs = symmetry.kinds[number].signs
    return tuple(int(sum(len(shapes.get(name, ())) > 1 for name, *_ in one) > 1) for one in signs)


def shown(symmetry: Symmetry, number: int, factors: Tensor) -> Tensor:
    """The signs of the activations of a class, by the factors of its units."""
    signs = torch.ones(factors.shape[1], dtype=factors.dtype)
    for own, parity in zip(factors, of_activations(symmetry, number), strict=False):
        signs = signs * own if parity else signs
    return signs


def best(scores: Mapping[Parities, Scores]) -> Scores:
    """The largest scores over all signs.

    Example:
        >>> best({(0,): np.array([[1.0, 1.0]]), (1,): np.array([[2.0, -3.0]])})
        array([[3., 4.]])
    """
    totals = (total for _, total in _over_signs(scores))
    largest = next(totals)
    for total in totals:
        largest = np.maximum(largest, total)
    return largest


def chosen(scores: Mapping[Parities, Scores]) -> Tensor:
    """For every unit the signs with the largest score with the unit in its own place, shape (signs, units).

    Example:
        >>> chosen({(1,): np.array([[2.0, 0.0], [0.0, -3.0]])})
        tensor([[ 1., -1.]], dtype=torch.float64)
    """
    options = list(_over_signs({parities: own.diagonal() for parities, own in scores.items()}))
    which = np.argmax(np.stack([total for _, total in options]), axis=0)
    return torch.tensor([signs for signs, _ in options], dtype=torch.float64)[torch.from_numpy(which)].T


def _over_signs(scores: Mapping[Parities, Scores]) -> Iterator[tuple[tuple[int, ...], Scores]]:
    """All signs of a unit, the positive ones first, and the scores with them."""
    count = len(next(iter(scores)))
    for signs in product((1, -1), repeat=count):
        yield signs, sum(_sign(signs, parities) * own for parities, own in scores.items())  # type: ignore[misc]


def _sign(signs: Sequence[int], parities: Parities) -> int:
    return int(np.prod([s for s, parity in zip(signs, parities, strict=True) if parity], initial=1))

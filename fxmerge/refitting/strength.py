"""The strengths of a ridge, and the search for the one that predicts held-out data best."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from itertools import pairwise

RIDGES = tuple(10.0**power for power in range(1, -6, -1))
"""The strengths to choose from, relative to the mean square of a feature, strongest first. Below them, rounding in
the moments would count."""

USUAL = 4
"""The position of the strength that is tried first: the one that is chosen most often if there are more rows than
features."""

CERTAIN = 4
"""From how many rows for each feature on the error is taken to have one minimum over the strength."""

MARGIN, NEGLIGIBLE = 0.01, 1e-10
"""A stronger ridge is preferred if its error is greater by no more than this share, and this share of the targets."""


def limit_of(errors: Mapping[float, float], total: float) -> float:
    """Up to which held-out error a stronger ridge is preferred.

    Arguments:
        errors: held-out errors by ridge.
        total: the square of the targets.
    """
    return min(errors.values()) * (1 + MARGIN) + NEGLIGIBLE * total


class Search:
    """The search for the best ridge of a layer.

    With many rows for each feature, the error falls to its least and then rises, from the strongest ridge on. So from a
    usual strength on, weaker ones are tried until it rises, and stronger ones until it is beyond the limit. With about
    as many rows as features, a weak ridge follows the noise, and the error has several minima: then all are tried.

    Arguments:
        total: the square of the targets.
        in_one_minimum: whether the error is taken to have one minimum.

    Attributes:
        errors: of what the search has tried, from the strongest ridge on.

    Example:
        >>> search = Search(1.0, in_one_minimum=True)
        >>> while not search.go_on({ridge: (ridge - 0.01) ** 2 for ridge in search.nearest(1)}):
        ...     pass
        >>> list(search.errors)
        [0.1, 0.01, 0.001, 0.0001]
    """

    def __init__(self, total: float, *, in_one_minimum: bool) -> None:
        self.errors, self._known = dict[float, float](), dict[float, float]()
        self._steps = self._from_usual(total) if in_one_minimum else self._all(total)
        self._wanted = next(self._steps)

    def nearest(self, count: int) -> list[float]:
        """The ridge that is to be tried next, and others that are not known, by how near they are to it."""
        at = RIDGES.index(self._wanted)
        others = (ridge for ridge in RIDGES if ridge not in self._known)
        return sorted(others, key=lambda ridge: abs(RIDGES.index(ridge) - at))[:count]

    def go_on(self, found: Mapping[float, float]) -> bool:
        """Goes on with the errors of some ridges; True at the end."""
        self._known.update(found)
        try:
            while self._wanted in self._known:
                self._wanted = self._steps.send(self._known[self._wanted])
        except StopIteration:
            return True
        return False

    def _from_usual(self, total: float) -> Generator[float, float, None]:
        self.errors = {RIDGES[USUAL]: (yield RIDGES[USUAL])}
        for before, ridge in pairwise(RIDGES[USUAL:]):
            self.errors[ridge] = yield ridge
            if self.errors[ridge] >= self.errors[before]:
                break
        for ridge in reversed(RIDGES[:USUAL]):
            self.errors = {ridge: (yield ridge), **self.errors}
            if self.errors[ridge] > limit_of(self.errors, total):
                break

    def _all(self, total: float) -> Generator[float, float, None]:
        for ridge in RIDGES:
            self.errors[ridge] = yield ridge
            if self.errors[ridge] > 2 * min(self.errors.values()) + NEGLIGIBLE * total:
                break  # It only gets worse from here.

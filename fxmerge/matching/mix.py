"""How much weights and activations count: one alpha for all classes, or one for each."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

LEAST = 0.01
"""What counts as the alpha of a class whose alpha is smaller, beside classes with other alphas: the weights of a
parameter cannot count for one of its axes and not at all for the other."""


@dataclass(frozen=True)
class Mix:
    """The factors of an objective that all classes raise together.

    Attributes:
        weights: the factor of the weights, one for all, since a parameter lies between classes.
        activations: for every class that an activation shows, the factor of its activations. It stands to
            that of the weights as 1 - alpha to alpha of this class.
    """

    weights: float
    activations: Mapping[int, float]

    @staticmethod
    def of(alpha: float | Mapping[int, float], shown: Iterable[int]) -> Mix:
        """The factors for classes with these alphas; those that no activation shows are matched by their weights.

        Arguments:
            alpha: weight of the weight-space similarity, in [0, 1]: of all classes, or by number.
            shown: the classes that activations show.

        Example:
            >>> Mix.of(0.25, [0]), Mix.of({0: 0.5, 1: 1.0}, [0, 1])
            (Mix(weights=0.25, activations={0: 0.75}), Mix(weights=0.75, activations={0: 0.75, 1: 0.0}))
        """
        own = {n: alpha[n] if isinstance(alpha, Mapping) else alpha for n in shown}
        if not own:
            return Mix(1.0, {})
        if len(set(own.values())) > 1:
            own = {n: max(value, LEAST) for n, value in own.items()}
        values = set(own.values())
        weights = sum(own.values()) / len(own) if len(values) > 1 else values.pop()
        # Equal alphas must not be put through a division: 0 has no inverse, and others would be rounded.
        return Mix(weights, {n: 1 - v if v == weights else weights * (1 - v) / v for n, v in own.items()})

    def weights_of(self, number: int) -> float:
        """The factor of the weights for one class: all counts where no activation shows it."""
        return self.weights if number in self.activations else 1.0

    def alpha(self, number: int) -> float:
        """The share of the weights in what counts for one class."""
        both = self.weights_of(number) + self.activations.get(number, 0.0)
        return self.weights_of(number) / both

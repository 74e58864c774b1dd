"""The kind of a class: the largest group of matrices by which its units may be mixed."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum


class Kind(IntEnum):
    """The matrices by which the units of a class may be mixed; a larger number is a larger group.

    Attributes:
        PERMUTATION: permutations.
        CENTRED: orthogonal matrices that keep the vector of ones, and so the mean over the units.
        ORTHOGONAL: orthogonal matrices.
        GENERAL_LINEAR: invertible matrices.
    """

    PERMUTATION = 0
    CENTRED = 1
    ORTHOGONAL = 2
    GENERAL_LINEAR = 3

    def __str__(self) -> str:
        return _WORDS[self]

    def dimension(self, size: int) -> int:
        """The dimension of the group for so many units.

        Example:
            >>> [kind.dimension(3) for kind in Kind]
            [0, 1, 3, 9]
        """
        return (0, (size - 1) * (size - 2) // 2, size * (size - 1) // 2, size * size)[self]


_WORDS = ("permutation", "orthogonal, keeps the mean", "orthogonal", "general linear")


@dataclass(frozen=True)
class UnitKind:
    """The kind of one class, and on which axes its units are mixed by what.

    Attributes:
        kind: the largest group that every op on the way of the units commutes with.
        why: for a kind below the general linear one, the node or the reason that limits it.
        inverse: the axes on which the transpose of the inverse matrix is to be applied, each as (parameter, dimension,
            slot of the first unit there).
        scales: the parameters that hold one number for all units and scale them: on these nothing is mixed.
    """

    kind: Kind = Kind.PERMUTATION
    why: str = ""
    inverse: frozenset[tuple[str, int, int]] = frozenset()
    scales: frozenset[str] = frozenset()

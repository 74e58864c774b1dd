"""The kind of a class: the largest group of matrices by which its units may be mixed."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum


class Kind(IntEnum):
    """The matrices by which the units of a class may be mixed. A group that is within another one has a smaller number.

    Attributes:
        PERMUTATION: permutations.
        CENTRED: orthogonal matrices that keep the vector of ones, and so the mean over the units.
        UNITARY: rotations of planes, which are pairs of units.
        ORTHOGONAL: orthogonal matrices.
        COMPLEX: rotations of planes, each times a scale: the matrices that commute with all rotations of a plane. Taken
            as complex numbers, the two units of a plane are multiplied by one.
        GENERAL_LINEAR: invertible matrices.
    """

    PERMUTATION = 0
    CENTRED = 1
    UNITARY = 2
    ORTHOGONAL = 3
    COMPLEX = 4
    GENERAL_LINEAR = 5

    def __str__(self) -> str:
        return _WORDS[self]

    @property
    def turns(self) -> bool:
        """Whether the units of a class lie in planes, of which each is turned by itself."""
        return self in (Kind.UNITARY, Kind.COMPLEX)

    @property
    def subgroups(self) -> tuple[Kind, ...]:
        """The kinds that a class of this kind may turn out to be, the largest first.

        Only a class with planes turns these.

        Example:
            >>> for kind in (Kind.COMPLEX, Kind.ORTHOGONAL):
            ...     print(", ".join(map(str, kind.subgroups)))
            complex, unitary, permutation
            orthogonal, orthogonal, keeps the mean, permutation
        """
        own = (kind for kind in reversed(Kind) if self.meet(kind) == kind)
        return tuple(kind for kind in own if kind.turns == self.turns or kind == Kind.PERMUTATION)

    def meet(self, other: Kind) -> Kind:
        """The largest kind of matrices that are of this kind and of another one.

        Example:
            >>> str(Kind.COMPLEX.meet(Kind.ORTHOGONAL)), str(Kind.COMPLEX.meet(Kind.CENTRED))
            ('unitary', 'permutation')
        """
        return max(kind for kind in Kind if kind in _WITHIN[self] and kind in _WITHIN[other])

    def dimension(self, size: int) -> int:
        """The dimension of the group for so many units; of planes there are half as many as units.

        Example:
            >>> {str(kind): kind.dimension(2) for kind in (Kind.UNITARY, Kind.COMPLEX)}
            {'unitary': 1, 'complex': 2}
            >>> [kind.dimension(3) for kind in (Kind.PERMUTATION, Kind.CENTRED, Kind.ORTHOGONAL, Kind.GENERAL_LINEAR)]
            [0, 1, 3, 9]
        """
        dimensions = {
            Kind.PERMUTATION: 0,
            Kind.CENTRED: (size - 1) * (size - 2) // 2,
            Kind.UNITARY: size // 2,
            Kind.ORTHOGONAL: size * (size - 1) // 2,
            Kind.COMPLEX: size,
            Kind.GENERAL_LINEAR: size * size,
        }
        return dimensions[self]


_WORDS = ("permutation", "orthogonal, keeps the mean", "unitary", "orthogonal", "complex", "general linear")

_WITHIN = {
    Kind.PERMUTATION: {Kind.PERMUTATION},
    Kind.CENTRED: {Kind.PERMUTATION, Kind.CENTRED},
    Kind.UNITARY: {Kind.PERMUTATION, Kind.UNITARY},
    Kind.ORTHOGONAL: {Kind.PERMUTATION, Kind.CENTRED, Kind.UNITARY, Kind.ORTHOGONAL},
    Kind.COMPLEX: {Kind.PERMUTATION, Kind.UNITARY, Kind.COMPLEX},
    Kind.GENERAL_LINEAR: set(Kind),
}
"""The kinds of the groups that each group holds. Units are permuted by what their class allows, whatever its kind."""


Exponents = tuple[tuple[str, int, int, int], ...]
"""How a number for each unit of a class multiplies parameters: to which power on each axis, as (parameter, dimension,
slot of the first unit there, power)."""


@dataclass(frozen=True)
class UnitKind:
    """The kind of one class, and on which axes its units are mixed by what.

    Attributes:
        kind: the largest group that every op on the way of the units commutes with.
        why: for a kind below the general linear one, the node or the reason that limits it.
        inverse: the axes on which the transpose of the inverse matrix is to be applied, each as (parameter, dimension,
            slot of the first unit there).
        scales: the parameters that hold one number for all units and scale them: on these nothing is mixed.
        planes: for a kind that turns planes, the two units of each.
        signs: of units that are only permuted, the ways in which each may have a sign.
        stretches: likewise the ways in which each may have a positive scale.
    """

    kind: Kind = Kind.PERMUTATION
    why: str = ""
    inverse: frozenset[tuple[str, int, int]] = frozenset()
    scales: frozenset[str] = frozenset()
    planes: tuple[tuple[int, int], ...] = ()
    signs: tuple[Exponents, ...] = ()
    stretches: tuple[Exponents, ...] = ()

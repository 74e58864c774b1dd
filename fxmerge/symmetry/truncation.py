"""Directions of classes that may be mixed: a network that is confined to some, and one that has fewer units."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from fxmerge.symmetry.group import Symmetry
from fxmerge.units.basis import Mixed, centred_frame, mix
from fxmerge.units.kind import Kind
from fxmerge.units.unit_map import Axis


@dataclass(frozen=True)
class Projection:
    """Matrices that take the units of some classes of a network to other ones, and may lose what other directions hold.

    Attributes:
        symmetry: the classes.
        consumed: the parameter axes along which the network consumes units.
        matrices: for some classes by number, shape (units, units) of one block, float64: row i gives the new unit i.
            What consumes units is multiplied by the same matrix as what gives them.
    """

    symmetry: Symmetry
    consumed: frozenset[Axis]
    matrices: Mapping[int, Tensor]

    def project(self, state: Mapping[str, Tensor], *, produced_only: bool = False) -> dict[str, Tensor]:
        """A network of the same sizes that writes and reads the new units.

        Arguments:
            state: tensors by name, in the shapes that the symmetry was found for.
            produced_only: whether what consumes units stays as it is: it reads the old ones.
        """
        moved = dict(state)
        for number, matrix in self.matrices.items():
            for own in self.symmetry.mixed[number]:
                name = own.axis.parameter
                if not (produced_only and (name, own.axis.dim) in self.consumed):
                    moved[name] = mix(moved[name], own, matrix)
                    moved |= dict.fromkeys(own.axis.aliases, moved[name])
        return moved


@dataclass(frozen=True)
class Truncation:
    """The first directions of some classes, to which a network is confined, and in which it has fewer units.

    Which directions come first is a matter of the basis that the network is in.

    Attributes:
        symmetry: the classes.
        consumed: the parameter axes along which the network consumes units.
        widths: for some classes by number, how many units are left in every block.
        scaled: those of these whose units are scaled, so that their mean square is as before.
    """

    symmetry: Symmetry
    consumed: frozenset[Axis]
    widths: Mapping[int, int]
    scaled: frozenset[int] = frozenset()

    @cached_property
    def projection(self) -> Projection:
        """The projector onto the directions that are left: nothing is written or read along the others."""
        matrices = {n: back @ fewer for n, (fewer, back) in self._matrices.items()}
        return Projection(self.symmetry, self.consumed, matrices)

    def reduce(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The network with fewer units that computes what a projected one does.

        Arguments:
            state: what `projection.project` gave.
        """
        moved, gone = dict(state), dict[str, dict[int, Tensor]]()
        for number, width in self.widths.items():
            fewer, back = self._matrices[number]
            for own in self.symmetry.mixed[number]:
                name, at = own.axis.parameter, (own.axis.parameter, own.axis.dim)
                matrix = back.T if at in self.consumed else fewer
                whole = torch.cat([matrix, matrix.new_zeros(len(back) - width, len(back))])
                moved[name] = mix(moved[name], own, whole)
            for own in self._axes(number):
                where = own.positions[:, width:].reshape(-1)
                along = gone.setdefault(own.axis.parameter, {})
                along[own.axis.dim] = torch.cat([along[own.axis.dim], where]) if own.axis.dim in along else where
        for name, along in gone.items():
            for dim, where in along.items():
                left = torch.ones(moved[name].shape[dim], dtype=torch.bool)
                left[where] = False
                moved[name] = moved[name].index_select(dim, left.nonzero().reshape(-1).to(moved[name].device))
        for axis in self.symmetry.layout:
            if axis.parameter in gone:
                moved |= dict.fromkeys(axis.aliases, moved[axis.parameter])
        return moved

    @cached_property
    def _matrices(self) -> dict[int, tuple[Tensor, Tensor]]:
        """For every class, the matrix that takes the units of a block to those that are left, and the one that takes
        these back."""
        sizes = {n: self.symmetry.by_block(n).shape[1] for n in self.widths}
        kinds = {n: self.symmetry.kind(n) for n in self.widths}
        return {n: fewer_units(kinds[n], sizes[n], w, scaled=n in self.scaled) for n, w in self.widths.items()}

    def _axes(self, number: int) -> Iterator[Mixed]:
        """Where a class lies on parameters, also where it is not mixed."""
        views, blocks = dict(self.symmetry.views[number]), self.symmetry.by_block(number)
        for axis in self.symmetry.layout:
            for shown, slots in axis.roles:
                if shown in views:
                    yield Mixed(axis, slots[views[shown]][blocks], inverse=False)


def fewer_units(kind: Kind, size: int, width: int, *, scaled: bool) -> tuple[Tensor, Tensor]:
    """The matrix that takes units to fewer ones, and the one that takes these back: the first directions are left.

    The product of the first with the second is the identity.

    Arguments:
        kind: what units may be mixed by. With `Kind.CENTRED` their mean is left and stays what it is, and the other
            directions are those of `centred_frame`.
        size: how many units there are.
        width: how many are left.
        scaled: whether units are multiplied with a number so that, of a vector in the subspace that is left, the mean
            square (with `Kind.CENTRED`, the variance) is as before. Then a norm over fewer units is that over all.

    Returns:
        Shapes (width, size) and (size, width), float64.

    Example:
        >>> fewer, back = fewer_units(Kind.ORTHOGONAL, 4, 1, scaled=True)
        >>> fewer
        tensor([[0.5000, 0.0000, 0.0000, 0.0000]], dtype=torch.float64)
        >>> fewer @ back
        tensor([[1.]], dtype=torch.float64)
    """
    scale = (width / size) ** 0.5 if scaled else 1.0
    if kind == Kind.CENTRED:
        before, after = centred_frame(size)[:, : width - 1], centred_frame(width)
        return scale * after @ before.T + 1 / size, before @ after.T / scale + 1 / width
    eye = torch.eye(size, dtype=torch.float64)
    return scale * eye[:width], eye[:, :width] / scale

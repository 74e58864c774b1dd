"""Changes of basis: how matrices that mix the units of a class act on parameters."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from fxmerge.errors import UnitMapError
from fxmerge.units.applied import applied
from fxmerge.units.kind import Kind
from fxmerge.units.layout import AxisLayout, Ids


@dataclass(frozen=True)
class Mixed:
    """Where the units of a class lie on one parameter axis, for a change of their basis.

    Attributes:
        axis: the layout of the axis.
        slots: shape (blocks, units in each, times that each unit is there).
        inverse: whether the transpose of the inverse matrix acts here.
    """

    axis: AxisLayout
    slots: Ids
    inverse: bool

    @cached_property
    def positions(self) -> Tensor:
        """For every unit, its positions along the flattened dimensions of the axis: (blocks, units, positions)."""
        flat = self.axis.slot.reshape(-1)
        order = np.argsort(flat, kind="stable")
        start = np.searchsorted(flat[order], self.slots)
        width = int(np.bincount(flat)[self.slots.reshape(-1)[0]])
        found = order[start[..., None] + np.arange(width)]
        return torch.from_numpy(found.reshape(*self.slots.shape[:2], -1))


@dataclass(frozen=True)
class Basis:
    """A change of basis of some classes, which leaves the function of a network unchanged.

    What gives the units of a class is multiplied by a matrix, what reads them by the transpose of its inverse.

    Attributes:
        mixed: for every class, the axes on which its units lie.
        matrices: for every class, shape (blocks, units, units), float64: row i of a matrix gives the new unit i.
    """

    mixed: tuple[tuple[Mixed, ...], ...]
    matrices: Mapping[int, Tensor]

    def apply(self, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Parameters in the new basis.

        Arguments:
            state_dict: tensors by name, in the shapes that the symmetry was found for.

        Returns:
            A new dict with the same keys in the same order, and with the `_metadata` that the state dict of a module
            has; tensors that do not change are the same objects. Sums are taken in at least single precision.

        Raises:
            UnitMapError: if a parameter is missing or has another shape.

        Example:
            >>> import torch, fxmerge
            >>> net = torch.nn.Sequential(torch.nn.Linear(4, 2, bias=False), torch.nn.Linear(2, 3)).double()
            >>> symmetry = fxmerge.find_symmetry(net, (torch.zeros(1, 4).double(),))
            >>> basis = symmetry.sample(torch.Generator().manual_seed(0)).basis
            >>> before, x = net(torch.ones(1, 4).double()), torch.ones(1, 4).double()
            >>> _ = net.load_state_dict(basis.apply(net.state_dict()))
            >>> torch.allclose(net(x), before)
            True
        """
        axes = (own.axis for steps in self._steps.values() for own, _ in steps)
        return applied(state_dict, axes, self.moved, UnitMapError)

    def moved(self, name: str, tensor: Tensor) -> Tensor:
        """One parameter of `apply`, by the first of its names; as it is, if no class lies on it."""
        for own, matrix in self._steps.get(name, ()):
            tensor = mix(tensor, own, matrix)
        return tensor

    @cached_property
    def _steps(self) -> dict[str, list[tuple[Mixed, Tensor]]]:
        """By parameter, the axes that are mixed and the matrices that act there."""
        found: dict[str, list[tuple[Mixed, Tensor]]] = {}
        for number, matrix in self.matrices.items():
            inverse = torch.linalg.inv(matrix).mT if any(own.inverse for own in self.mixed[number]) else matrix
            for own in self.mixed[number]:
                found.setdefault(own.axis.parameter, []).append((own, inverse if own.inverse else matrix))
        return found

    def inverse(self) -> Basis:
        """The change of basis that undoes this one."""
        return Basis(self.mixed, {number: torch.linalg.inv(matrix) for number, matrix in self.matrices.items()})

    def __matmul__(self, other: Basis) -> Basis:
        """First `other`, then this one."""
        matrices = dict(other.matrices)
        for number, matrix in self.matrices.items():
            matrices[number] = matrix @ matrices[number] if number in matrices else matrix
        return Basis(self.mixed, matrices)


def gathered(tensor: Tensor, own: Mixed) -> Tensor:
    """The entries of a parameter that belong to the units of a class, shape (blocks, units, entries)."""
    flat = tensor.permute(*own.axis.dims, *_rest(own.axis)).reshape(own.axis.slot.size, -1)
    return flat[own.positions.to(tensor.device)].flatten(2)


def mix(tensor: Tensor, own: Mixed, matrix: Tensor) -> Tensor:
    """A parameter with the units on one axis multiplied by a matrix, or each block by one of its own."""
    wide, where = torch.promote_types(tensor.dtype, torch.float32), own.positions
    whole = torch.equal(where.flatten(), torch.arange(own.axis.slot.size))
    if whole and where.shape[::2] == (1, 1) and own.axis.dims == (tensor.ndim - 1,):  # Rows stay where they lie.
        return (tensor.to(wide) @ matrix.reshape(matrix.shape[-2:]).to(tensor.device, wide).mT).to(tensor.dtype)
    order = [*own.axis.dims, *_rest(own.axis)]
    moved = tensor.permute(order)
    flat = moved.reshape(own.axis.slot.size, -1)
    where = where.to(tensor.device)
    values = (flat.reshape(*where.shape, -1) if whole else flat[where]).to(wide)
    mixed = (matrix.to(values) @ values.flatten(2)).to(tensor.dtype)
    if not whole:
        flat = flat.index_put((where.flatten(),), mixed.reshape(where.numel(), -1))
    result: Tensor = (mixed if whole else flat).reshape(moved.shape).permute(np.argsort(order).tolist()).contiguous()
    return result


def _rest(axis: AxisLayout) -> list[int]:
    return [d for d in range(len(axis.shape)) if d not in axis.dims]


def random_matrices(kind: Kind, blocks: int, size: int, generator: torch.Generator | None = None) -> Tensor:
    """Random elements of a group of matrices, shape (blocks, size, size), float64.

    Arguments:
        kind: the group, a `Kind`: orthogonal matrices and angles are uniformly distributed; singular values of others,
            and absolute values of complex numbers, are from 1/2 to 2.
        blocks: how many.
        size: of each.
        generator: source of randomness, on the CPU; torch's default one if None.
    """

    def orthogonal(n: int) -> Tensor:
        q, r = torch.linalg.qr(torch.randn(blocks, n, n, dtype=torch.float64, generator=generator))
        turned: Tensor = q * r.diagonal(dim1=-2, dim2=-1).sign()[:, None, :]
        return turned

    if kind == Kind.GENERAL_LINEAR:
        scales = 2 ** (2 * torch.rand(blocks, 1, size, dtype=torch.float64, generator=generator) - 1)
        return (orthogonal(size) * scales) @ orthogonal(size)
    if kind == Kind.ORTHOGONAL:
        return orthogonal(size)
    if kind.turns:
        angles = 2 * math.pi * torch.rand(blocks, dtype=torch.float64, generator=generator)
        scales = 2 ** (2 * torch.rand(blocks, dtype=torch.float64, generator=generator) - 1)
        return plane(torch.polar(scales if kind == Kind.COMPLEX else torch.ones_like(scales), angles))
    frame = centred_frame(size)
    return frame @ orthogonal(size - 1) @ frame.T + 1 / size


def plane(numbers: Tensor) -> Tensor:
    """The matrices that multiply a plane by complex numbers a + bi: ((a, -b), (b, a)), shape (numbers, 2, 2)."""
    a, b = numbers.real, numbers.imag
    return torch.stack([torch.stack([a, -b], -1), torch.stack([b, a], -1)], -2)


def centred_frame(size: int) -> Tensor:
    """An orthonormal basis of the vectors whose entries sum to zero, shape (size, size - 1), float64."""
    ones = torch.ones(size, 1, dtype=torch.float64)
    basis: Tensor = torch.linalg.qr(torch.cat([ones, torch.eye(size, dtype=torch.float64)[:, 1:]], 1))[0]
    return basis[:, 1:]

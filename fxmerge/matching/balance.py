"""The basis of a class in which what gives its units is as large as what reads them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fxmerge.program.double import in_double
from fxmerge.symmetry.base import Group
from fxmerge.units.basis import Basis, gathered
from fxmerge.units.kind import Kind

ROUNDS = 50
TOLERANCE = 1e-12

SMALLEST = 1e-6
"""A class is not balanced if what writes or reads its units is smaller than this along some direction, as a share of
the mean over all directions: no basis would make both equal."""


_SCALED = (Kind.GENERAL_LINEAR, Kind.COMPLEX)
"""The kinds of which matrices change lengths."""


def balance(symmetry: Group, state: Mapping[str, Tensor]) -> Basis:
    """The change of basis after which the general linear and the complex classes of a network are balanced.

    Let P be the sum of the outer products of the weights that give the units of a block, and C that of the weights
    that read them. A matrix M takes P to M P Mᵀ and C to M⁻ᵀ C M⁻¹. The class is balanced where both are equal.
    This is so if MᵀM is the geometric mean of P⁻¹ and C. Balanced bases of one class differ by orthogonal matrices
    only. So two networks that differ by invertible matrices differ by orthogonal ones once both are balanced.
    Classes that meet in one weight are balanced in turn, until all are. A plane that is turned is only scaled: P
    and C count by their traces. A class stays as it is if what writes or reads its units does not span all of its
    directions.

    Arguments:
        symmetry: the group.
        state: tensors by name.

    Example:
        >>> import torch, fxmerge
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 2, bias=False), torch.nn.Linear(2, 3)).double()
        >>> symmetry = fxmerge.find_symmetry(net, (torch.zeros(1, 4).double(),))
        >>> state = balance(symmetry, net.state_dict()).apply(net.state_dict())
        >>> first, second = state["0.weight"], state["1.weight"]
        >>> torch.allclose(first @ first.T, second.T @ second)
        True
    """
    classes = [n for n in range(len(symmetry.units)) if symmetry.kind(n) in _SCALED]
    names = {own.axis.parameter for n in classes for own in symmetry.mixed[n]}
    wide: Mapping[str, Tensor] = {name: in_double(state[name].to("cpu")) for name in names}
    total = Basis(symmetry.mixed, {n: m for n, m in symmetry.identity_basis().matrices.items() if n in classes})
    for _ in range(ROUNDS):
        change = 0.0
        for n in classes:
            step = _step(symmetry, n, wide)
            if step is not None:
                one = Basis(symmetry.mixed, {n: step})
                wide, total = one.apply(wide), one @ total
                change = max(change, float((step - torch.eye(step.shape[-1], dtype=step.dtype)).abs().max()))
        if change < TOLERANCE:
            break
    return total


def _step(symmetry: Group, number: int, state: Mapping[str, Tensor]) -> Tensor | None:
    """The matrices that balance a class, shape (blocks, units, units); None where nothing gives or reads its units."""
    sums: dict[bool, Tensor] = {}
    for own in symmetry.mixed[number]:
        entries = gathered(state[own.axis.parameter], own)
        product = entries @ entries.mT
        if symmetry.kind(number) == Kind.COMPLEX:
            product = product.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None] * torch.eye(2, dtype=product.dtype)
        sums[own.inverse] = sums[own.inverse] + product if own.inverse in sums else product
    if len(sums) < 2 or not all(map(_spans, sums.values())):
        return None
    gives, root = (_power(sums[False], p) for p in (-0.5, 0.5))
    return _power(gives @ _power(root @ sums[True] @ root, 0.5) @ gives, 0.5)


def _spans(matrix: Tensor) -> bool:
    """Whether symmetric matrices that are not negative have no direction that is next to nothing."""
    values = torch.linalg.eigvalsh(matrix)
    return bool((values[..., 0] > SMALLEST * values.mean(-1)).all())


def _power(matrix: Tensor, exponent: float) -> Tensor:
    """A power of symmetric matrices that are not negative."""
    values, vectors = torch.linalg.eigh(matrix)
    power: Tensor = (vectors * values[..., None, :] ** exponent) @ vectors.mT
    return power

"""The basis of a class in which what gives its units is as large as what reads them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping

import torch
from torch import Tensor

from fxmerge.program.double import in_double
from fxmerge.symmetry.base import Group
from fxmerge.units.basis import Basis, Mixed, gathered
from fxmerge.units.kind import Kind

ROUNDS = 50
TOLERANCE = 1e-12

SMALLEST = 1e-6
"""A class is not balanced if what writes or reads its units is smaller than this along some direction, as a share of
the mean over all directions: no basis would make both equal."""


_SCALED = (Kind.GENERAL_LINEAR, Kind.COMPLEX)
"""The kinds of which matrices change lengths."""


def balance(symmetry: Group, state: Mapping[str, Tensor], numbers: Collection[int] | None = None) -> Basis:
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
        numbers: the classes to balance, if not all.

    Example:
        >>> import torch, fxmerge
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 2, bias=False), torch.nn.Linear(2, 3)).double()
        >>> symmetry = fxmerge.find_symmetry(net, (torch.zeros(1, 4).double(),))
        >>> state = balance(symmetry, net.state_dict()).apply(net.state_dict())
        >>> first, second = state["0.weight"], state["1.weight"]
        >>> torch.allclose(first @ first.T, second.T @ second)
        True
    """
    numbers = range(len(symmetry.units)) if numbers is None else numbers
    classes = [n for n in numbers if symmetry.kind(n) in _SCALED]
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
    sums = outer_products(symmetry.mixed[number], state, lambda own: own.inverse)
    if symmetry.kind(number) == Kind.COMPLEX:
        sums = {side: _of_planes(product) for side, product in sums.items()}
    if len(sums) < 2 or not all(map(_spans, sums.values())):
        return None
    gives, root = (_power(sums[False], p) for p in (-0.5, 0.5))
    return _power(gives @ _power(root @ sums[True] @ root, 0.5) @ gives, 0.5)


def outer_products(
    mixed: Iterable[Mixed], state: Mapping[str, Tensor], side: Callable[[Mixed], bool]
) -> dict[bool, Tensor]:
    """The sums of the outer products of the weights of a class, shape (blocks, units, units), by what `side` tells of
    the axis that its units lie on."""
    sums: dict[bool, Tensor] = {}
    for own in mixed:
        entries = gathered(state[own.axis.parameter], own)
        product = entries @ entries.mT
        sums[side(own)] = sums[side(own)] + product if side(own) in sums else product
    return sums


def _of_planes(products: Tensor) -> Tensor:
    """Outer products as far as planes that are turned know of them: their mean over all turns."""
    mean: Tensor = products.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None] * torch.eye(2, dtype=products.dtype)
    return mean


def _spans(matrix: Tensor) -> bool:
    """Whether symmetric matrices that are not negative have no direction that is next to nothing."""
    values = torch.linalg.eigvalsh(matrix)
    return bool((values[..., 0] > SMALLEST * values.mean(-1)).all())


def _power(matrix: Tensor, exponent: float) -> Tensor:
    """A power of symmetric matrices that are not negative."""
    values, vectors = torch.linalg.eigh(matrix)
    power: Tensor = (vectors * values[..., None, :] ** exponent) @ vectors.mT
    return power

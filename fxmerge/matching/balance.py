"""The basis and the scales of a class in which what gives its units is as large as what reads them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping

import torch
from torch import Tensor

from fxmerge.matching.scales import least_scales
from fxmerge.program.double import in_double
from fxmerge.symmetry.base import Group
from fxmerge.units.basis import Basis, Mixed, gathered
from fxmerge.units.kind import Kind
from fxmerge.units.scaling import Scaled, Scaling

ROUNDS = 200
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
    return _balanced(symmetry, state, range(len(symmetry.units)) if numbers is None else numbers, ())[0]


def gauge(symmetry: Group, state: Mapping[str, Tensor]) -> tuple[Basis, Scaling]:
    """The change of basis and the scales of units after which all classes of a network are balanced.

    A unit with scales is balanced if the sum of the squares of its weights is the least that any scales give. This is
    so where what a scale multiplies is as large as what it divides: behind a ReLU, the norm of the weights and the bias
    that write a unit is that of the weights that read it (Stock et al. 2019, "Equi-normalization of neural networks",
    arXiv 1902.10416).

    Arguments:
        symmetry: the group.
        state: tensors by name.

    Example:
        >>> import torch, fxmerge
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 3, bias=False), torch.nn.ReLU(), torch.nn.Linear(3, 2))
        >>> symmetry = fxmerge.find_symmetry(net, (torch.zeros(1, 4),))
        >>> state = gauge(symmetry, net.state_dict())[1].apply(net.state_dict())
        >>> torch.allclose(state["0.weight"].norm(dim=1), state["2.weight"].norm(dim=0))
        True
    """
    numbers = range(len(symmetry.units))
    return _balanced(symmetry, state, numbers, [n for n, own in enumerate(symmetry.kinds) if own.stretches])


def _balanced(
    symmetry: Group, state: Mapping[str, Tensor], numbers: Iterable[int], stretched: Collection[int]
) -> tuple[Basis, Scaling]:
    """The changes after which some classes are balanced by matrices, and others by scales."""
    classes = [n for n in numbers if symmetry.kind(n) in _SCALED]
    names = {own.axis.parameter for n in classes for own in symmetry.mixed[n]}
    names |= {own.axis.parameter for n in stretched for own in symmetry.scaled[n]}
    wide: Mapping[str, Tensor] = {name: in_double(state[name].to("cpu")) for name in names}
    total = Basis(symmetry.mixed, {n: m for n, m in symmetry.identity_basis().matrices.items() if n in classes})
    scales = Scaling(symmetry.scaled, {n: f for n, f in symmetry.identity_scaling().factors.items() if n in stretched})
    for _ in range(ROUNDS):
        change = 0.0
        for n in classes:
            step = _step(symmetry, n, wide)
            if step is not None:
                one = Basis(symmetry.mixed, {n: step})
                wide, total = one.apply(wide), one @ total
                change = max(change, float((step - torch.eye(step.shape[-1], dtype=step.dtype)).abs().max()))
        if stretched:
            scaling = Scaling(symmetry.scaled, least_scales(symmetry, wide, stretched))
            wide, scales = scaling.apply(wide), scaling @ scales
            change = max(change, *(float((factors - 1).abs().max()) for factors in scaling.factors.values()))
        if change < TOLERANCE or not classes:
            break
    return total, scales


def sums_of(weight: Tensor, own: Scaled) -> Tensor:
    """For every unit of a class on one axis, the sum of its entries, which are real."""
    others = [d for d in range(weight.ndim) if d not in own.axis.dims]
    by_place = weight.sum(others) if others else weight
    by_slot = torch.zeros(len(own.axis.index), dtype=weight.dtype)
    by_slot.index_add_(0, torch.from_numpy(own.axis.slot.reshape(-1)), by_place.reshape(-1))
    return by_slot[torch.from_numpy(own.slots)].sum(1)


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

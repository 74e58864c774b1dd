"""Signs and positive scales of single units: how they act on parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from fxmerge.errors import UnitMapError
from fxmerge.units.applied import applied
from fxmerge.units.layout import AxisLayout, Ids, along_axis


@dataclass(frozen=True)
class Scaled:
    """Where the units of a class lie on one parameter axis, for signs and scales.

    Attributes:
        axis: the layout of the axis.
        slots: shape (units, times that each unit is there).
        powers: for every sign and then every scale of a unit, the power to which it multiplies this axis.
    """

    axis: AxisLayout
    slots: Ids
    powers: tuple[int, ...]


@dataclass(frozen=True)
class Scaling:
    """Signs and positive scales of single units, which leave the function of a network unchanged.

    Attributes:
        scaled: for every class, the axes on which its units have signs or scales.
        factors: for some classes the numbers, shape (signs and then scales, units), float64.
    """

    scaled: tuple[tuple[Scaled, ...], ...]
    factors: Mapping[int, Tensor]

    def apply(self, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Parameters with their units multiplied.

        Arguments:
            state_dict: tensors by name, in the shapes that the symmetry was found for.

        Returns:
            A new dict with the same keys in the same order, and with the `_metadata` that the state dict of a module
            has; tensors that do not change are the same objects. Products are taken in at least single precision.

        Raises:
            UnitMapError: if a parameter is missing or has another shape.

        Example:
            >>> import torch, fxmerge
            >>> mlp = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.ReLU(), torch.nn.Linear(3, 1))
            >>> symmetry = fxmerge.find_symmetry(mlp, (torch.zeros(1, 2),))
            >>> doubled = Scaling(symmetry.scaled, {0: torch.full((1, 3), 2.0)}).apply(mlp.state_dict())
            >>> torch.equal(doubled["0.bias"], 2 * mlp[0].bias), torch.equal(doubled["2.weight"], mlp[2].weight / 2)
            (True, True)
        """
        axes = (own.axis for steps in self._steps.values() for own, _ in steps)
        return applied(state_dict, axes, self.moved, UnitMapError)

    def moved(self, name: str, tensor: Tensor) -> Tensor:
        """One parameter of `apply`, by the first of its names; as it is, if no class lies on it."""
        for own, factors in self._steps.get(name, ()):
            tensor = multiplied(tensor, own, total(factors, own.powers))
        return tensor

    @cached_property
    def _steps(self) -> dict[str, list[tuple[Scaled, Tensor]]]:
        """By parameter, the axes that are multiplied and the numbers of their units."""
        found: dict[str, list[tuple[Scaled, Tensor]]] = {}
        for number, factors in self.factors.items():
            for own in self.scaled[number]:
                found.setdefault(own.axis.parameter, []).append((own, factors))
        return found

    def inverse(self) -> Scaling:
        """What undoes this one."""
        return Scaling(self.scaled, {number: 1 / factors for number, factors in self.factors.items()})

    def __matmul__(self, other: Scaling) -> Scaling:
        """First `other`, then this one."""
        factors = dict(other.factors)
        for number, own in self.factors.items():
            factors[number] = own * factors[number] if number in factors else own
        return Scaling(self.scaled, factors)


def total(factors: Tensor, powers: Sequence[int]) -> Tensor:
    """The product of powers of numbers, one for each unit."""
    product = torch.ones(factors.shape[1], dtype=factors.dtype)
    for own, power in zip(factors, powers, strict=True):
        product = product * own**power
    return product


def multiplied(tensor: Tensor, own: Scaled, factors: Tensor) -> Tensor:
    """A parameter with each unit on one axis multiplied by a number."""
    wide = torch.promote_types(tensor.dtype, torch.float32)
    by_slot = torch.ones(len(own.axis.index), dtype=factors.dtype)
    by_slot[torch.from_numpy(own.slots)] = factors[:, None]
    along = along_axis(by_slot[torch.from_numpy(own.axis.slot)], own.axis)
    result: Tensor = (tensor.to(wide) * along.to(tensor.device, wide)).to(tensor.dtype)
    return result


def random_factors(signs: int, stretches: int, units: int, generator: torch.Generator | None = None) -> Tensor:
    """Random signs and scales, shape (signs and then stretches, units), float64.

    Signs are uniformly distributed, scales are from 1/2 to 2.

    Arguments:
        signs, stretches: how many each unit has.
        units: how many.
        generator: source of randomness, on the CPU; torch's default one if None.
    """
    drawn = torch.rand(signs + stretches, units, dtype=torch.float64, generator=generator)
    return torch.cat([torch.where(drawn[:signs] < 0.5, -1.0, 1.0).double(), 2 ** (2 * drawn[signs:] - 1)])

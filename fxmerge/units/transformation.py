"""Elements of the whole group of a network: where units go, how they are then mixed, and what multiplies them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from fxmerge.units.basis import Basis
from fxmerge.units.permutation import Permutation
from fxmerge.units.scaling import Scaling


@dataclass(frozen=True)
class Transformation:
    """A permutation of units, a change of basis and a scaling, which leave the function of a network unchanged.

    Attributes:
        permutation: where units go. It is applied first.
        basis: how the units of the classes that may be mixed are mixed, once they are in their places.
        scaling: the signs and positive scales of the units of other classes, once they are in their places.
    """

    permutation: Permutation
    basis: Basis
    scaling: Scaling

    def apply(self, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Parameters with their units permuted, mixed and multiplied.

        Arguments:
            state_dict: tensors by name, in the shapes that the symmetry was found for.

        Returns:
            A new dict with the same keys in the same order, and with the `_metadata` that the state dict of a module
            has; tensors that do not change are the same objects.

        Raises:
            PermutationError: if a parameter is missing or has another shape.

        Example:
            >>> import torch, fxmerge
            >>> net = torch.nn.Sequential(torch.nn.Linear(4, 2, bias=False), torch.nn.Linear(2, 3)).double()
            >>> x = torch.ones(1, 4).double()
            >>> change = fxmerge.find_symmetry(net, (x,)).sample(torch.Generator().manual_seed(0))
            >>> before = net(x)
            >>> _ = net.load_state_dict(change.apply(net.state_dict()))
            >>> torch.allclose(net(x), before)
            True
        """
        return self.scaling.apply(self.basis.apply(self.permutation.apply(state_dict)))

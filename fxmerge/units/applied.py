"""State dicts in which some parameters are changed, each by itself."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping

from torch import Tensor

from fxmerge.errors import PermutationError, UnitMapError
from fxmerge.units.layout import AxisLayout

Mismatch = type[PermutationError] | type[UnitMapError]


def check_state(state_dict: Mapping[str, Tensor], axes: Iterable[AxisLayout], error: Mismatch) -> None:
    """Checks that parameters are there, in the shapes that a symmetry was found for.

    Arguments:
        state_dict: tensors by name.
        axes: the axes of the symmetry.
        error: what is raised if a parameter is missing or has another shape.
    """
    for axis in axes:
        name = axis.parameter
        if name not in state_dict:
            raise error(f"The state dict has no parameter {name!r}, but the symmetry was found for a model with it.")
        if tuple(state_dict[name].shape) != axis.shape:
            raise error(
                f"Parameter {name!r} has shape {tuple(state_dict[name].shape)}, but the symmetry was found for shape "
                f"{axis.shape}."
            )


def applied(
    state_dict: Mapping[str, Tensor],
    axes: Iterable[AxisLayout],
    change: Callable[[str, Tensor], Tensor],
    error: Mismatch,
) -> dict[str, Tensor]:
    """A state dict with a change of some parameters, which tied ones share.

    Arguments:
        state_dict: tensors by name.
        axes: axes of these parameters.
        change: gives a parameter as it is then, from its first name and from the parameter.
        error: what is raised, before any work, if a parameter is missing or has another shape.

    Returns:
        A new dict with the same keys in the same order, and with the `_metadata` that the state dict of a module has.
    """
    axes = list(axes)
    check_state(state_dict, axes, error)
    changed: OrderedDict[str, Tensor] = OrderedDict(state_dict)
    if hasattr(state_dict, "_metadata"):
        changed._metadata = state_dict._metadata  # type: ignore[attr-defined]
    for name, aliases in {axis.parameter: axis.aliases for axis in axes}.items():
        changed[name] = change(name, state_dict[name])
        changed.update((alias, changed[name]) for alias in aliases if alias in changed)
    return changed

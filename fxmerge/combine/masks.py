"""Masks of pruned networks: buffers of zeros and ones, which stay masks, and the parameters that they cut."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from torch import Tensor, fx

from fxmerge.program.captured import Program
from fxmerge.shared import equal_names

MAJORITY = 0.5 - 1e-6
"""A mean of masks that is at least one half, but for rounding, keeps an entry."""

State = Mapping[str, Tensor]


def masks_of(buffers: Collection[str], states: Sequence[State]) -> frozenset[str]:
    """The names of the floating-point buffers that hold only zeros and ones in all models."""
    return frozenset(
        name for name, own in states[0].items() if name in buffers and all(_is_mask(state[name]) for state in states)
    )


def _is_mask(value: Tensor) -> bool:
    return value.is_floating_point() and value.numel() > 0 and bool(((value == 0) | (value == 1)).all())


def masked(program: Program, masks: Collection[str]) -> dict[str, str]:
    """For the parameters that a graph only uses multiplied with a mask of their shape, the name of the mask."""
    found: dict[str, str] = {}
    for node in program.graph.graph.nodes:
        if getattr(getattr(node.target, "_schema", None), "name", "") == "aten::mul":
            operands = [n for n in node.args if isinstance(n, fx.Node)]
            named = [program.sources.get(n, ("", "")) for n in operands]
            own = [name for kind, name in named if kind == "parameter"]
            if len(own) == 2 and sum(name in masks for name in own) == 1:
                mask, parameter = sorted(own, key=lambda name: name not in masks)
                used = len(operands[own.index(parameter)].users)
                if program.parameters[mask].shape == program.parameters[parameter].shape and used == 1:
                    found[parameter] = mask
    return found


def pruned(states: Sequence[State], masks: Mapping[str, str]) -> tuple[dict[str, Tensor], ...]:
    """State dicts whose parameters are zero where their masks are, which does not change what they compute.

    Else an entry that one model has pruned would be averaged with one that another model uses. What is equal in all
    models, parameter and mask, stays as it is.
    """
    equal = equal_names(states)
    differing = {name: mask for name, mask in masks.items() if not {name, mask} <= equal}
    return tuple({**s, **{name: s[name] * s[mask].to(s[name]) for name, mask in differing.items()}} for s in states)


def voted(state: State, masks: Collection[str]) -> dict[str, Tensor]:
    """A merged state dict in which an entry of a mask is one if the mean of the models' masks is at least one half."""
    return {name: (value >= MAJORITY).to(value) if name in masks else value for name, value in state.items()}

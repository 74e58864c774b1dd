"""What training tools wrap around a state dict: entries of a checkpoint, and prefixes of names."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from fxmerge.errors import CheckpointError

INSIDE = ("state_dict", "model_state_dict", "model", "module", "net", "network", "weights", "params")
"""The entries in which training tools keep a state dict, the most telling name first."""

PREFIXES = ("module.", "_orig_mod.", "model.")
"""What data-parallel training, compiled modules and trainers put before every name."""


def unwrapped(path: Any, given: Any, is_tensor: Any) -> tuple[Mapping[str, Any], tuple[str, ...]]:
    """The state dict inside of what a file holds, and the entries that lead to it.

    Arguments:
        path: of the file, for messages.
        given: what it holds.
        is_tensor: tells whether a value is a tensor.

    Raises:
        CheckpointError: if there is no state dict inside, or more than one.
    """
    way: list[str] = []
    while True:
        if not isinstance(given, Mapping):
            at = f" at {'.'.join(way)!r}" if way else ""
            raise CheckpointError(
                f"{path} holds a {type(given).__name__}{at}, and no state dict; save model.state_dict()."
            )
        if given and all(isinstance(name, str) and is_tensor(value) for name, value in given.items()):
            return given, tuple(way)
        inside = [name for name in INSIDE if isinstance(given.get(name), Mapping)]
        if len(inside) != 1:
            names = ", ".join(repr(name) for name in list(given)[:8]) or "nothing"
            what = f"several that may be one, {' and '.join(map(repr, inside))}" if inside else "none"
            raise CheckpointError(
                f"{path} holds {names}: a state dict was looked for, and there is {what}. Save one state dict by "
                "itself: torch.save(checkpoint[NAME], 'weights.pt')."
            )
        way.append(inside[0])
        given = given[inside[0]]


def prefix_to_remove(names: Collection[str], wanted: Collection[str]) -> str:
    """The prefix without which names fit those of a network; "" if they fit as they are, or none helps.

    A prefix counts only if all names have it, and several may stand one before the other.

    Example:
        >>> prefix_to_remove(["module._orig_mod.a.weight", "module._orig_mod.a.bias"], ["a.weight", "a.bias"])
        'module._orig_mod.'
        >>> prefix_to_remove(["model.weight", "head.weight"], ["weight"])
        ''
    """
    found, best, most = "", "", len(set(names) & set(wanted))
    while True:
        rest = [name[len(found) :] for name in names]
        step = next((p for p in PREFIXES if rest and all(name.startswith(p) for name in rest)), None)
        if step is None:
            return best
        found += step
        fitting = len({name[len(found) :] for name in names} & set(wanted))
        if fitting > most:
            best, most = found, fitting

"""The configuration with which a model's own class has other sizes."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator, Mapping
from itertools import combinations
from typing import Any

import torch
from torch import Tensor, nn

from fxmerge.program.captured import quiet

Changes = dict[str, int]

TOGETHER = 2
"""How many entries of a configuration are changed together at most."""


def config_for(
    model: Any, shapes: Mapping[str, tuple[int, ...]], widths: Collection[tuple[int, int]]
) -> Changes | None:
    """What to change in the configuration of a model, so that a fresh instance of its class has given shapes.

    It is for classes that are built from an object `config` alone, as those of transformers are. Which entries have to
    change is found by trial, on instances without values: entries that hold an old size, and one that holds None.

    Arguments:
        model: the model.
        shapes: of all tensors of the state dict that the instance is to have.
        widths: the sizes that change: old and new.

    Returns:
        New values by the names of entries; None if there is no such configuration.
    """
    config = getattr(model, "config", None)
    if not isinstance(model, nn.Module) or config is None or not hasattr(config, "__dict__"):
        return None
    for changes in _candidates(vars(config), widths):
        other = copy.deepcopy(config)
        try:
            for name, value in changes.items():
                setattr(other, name, value)
            with torch.device("meta"), quiet():
                made = type(model)(other)
        except Exception:  # Whatever a class raises for sizes that do not go together.
            continue
        if {name: tuple(t.shape) for name, t in made.state_dict().items() if isinstance(t, Tensor)} == dict(shapes):
            return changes
    return None


def _candidates(entries: Mapping[str, Any], widths: Collection[tuple[int, int]]) -> Iterator[Changes]:
    """What might be changed, fewest entries first."""
    sizes = [
        (name, new) for name, value in entries.items() for old, new in widths if type(value) is int and value == old
    ]
    for count in range(1, TOGETHER + 1):
        yield from (dict(own) for own in combinations(sizes, count) if len(dict(own)) == count)
    yield from ({name: new} for name, value in entries.items() if value is None for _, new in widths)

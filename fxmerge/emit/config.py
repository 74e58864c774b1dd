"""The configuration with which a model's own class has other sizes."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator, Mapping
from itertools import combinations
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from fxmerge.program import models
from fxmerge.program.capture import Args
from fxmerge.program.captured import quiet
from fxmerge.program.models import evaluating
from fxmerge.validate import agree

Changes = dict[str, int]

TOLERANCE = 1e-3
"""How much outputs of one function may differ by rounding, as a share of the largest."""

TOGETHER = 2
"""How many entries of a configuration are changed together at most."""


def config_for(
    model: Any, result: nn.Module, call: tuple[Args, Mapping[str, Any]], widths: Collection[tuple[int, int]]
) -> Changes | None:
    """What to change in the configuration of a model, so that its class makes a network of other sizes.

    It is for classes that are built from an object `config` alone, as those of transformers are. Which entries have to
    change is found by trial, on instances without values: entries that hold an old size, and one that holds None. The
    first with the right shapes must compute what the network does, since a class may also compute with its sizes.

    Arguments:
        model: the model.
        result: the network of other sizes.
        call: (args, kwargs) to run both on.
        widths: the sizes that change: old and new.

    Returns:
        New values by the names of entries; None if there is no such configuration.
    """
    config = getattr(model, "config", None)
    if not isinstance(model, nn.Module) or config is None or not hasattr(config, "__dict__"):
        return None
    state = result.state_dict()
    for changes in _candidates(vars(config), widths):
        other = copy.deepcopy(config)
        try:
            for name, value in changes.items():
                setattr(other, name, value)
            with torch.device("meta"), quiet():
                shapes = {name: tensor.shape for name, tensor in type(model)(other).state_dict().items()}
            if shapes != {name: tensor.shape for name, tensor in state.items()}:
                continue
            with torch.random.fork_rng(devices=[]), quiet():
                made = type(model)(other).to(next(iter(state.values())))
            made.load_state_dict(state)
            with evaluating(made):
                outputs = models.run(made, *call)
        except Exception:  # Whatever a class raises for sizes that do not go together.
            continue
        expected = models.run(result, *call)
        same = agree(pytree.tree_leaves(expected), pytree.tree_leaves(outputs), TOLERANCE)
        return changes if same else None
    return None


def _candidates(entries: Mapping[str, Any], widths: Collection[tuple[int, int]]) -> Iterator[Changes]:
    """What might be changed, fewest entries first."""
    sizes = [
        (name, new) for name, value in entries.items() for old, new in widths if type(value) is int and value == old
    ]
    for count in range(1, TOGETHER + 1):
        yield from (dict(own) for own in combinations(sizes, count) if len(dict(own)) == count)
    yield from ({name: new} for name, value in entries.items() if value is None for _, new in widths)

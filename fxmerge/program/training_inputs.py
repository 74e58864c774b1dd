"""Inputs that are for training only, such as labels: what is merged needs none."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fxmerge.program.captured import quiet
from fxmerge.program.models import evaluating
from fxmerge.program.run import Call

Output = tuple[tuple[str | None, ...], Any]
"""Where an output lies, by the keys and attributes that lead to it, and its value."""


def training_only(model: nn.Module, call: Call) -> frozenset[str]:
    """The names of inputs that a model computes nothing from but numbers about the whole batch, such as a loss.

    Without such an input the model gives the same outputs, and some tensors of dimension zero less.
    A tensor that forward does not need and that other outputs depend on, such as a mask, is none of these.

    Arguments:
        model: the model; its forward is run once for every optional input.
        call: a batch, as (args, kwargs).
    """
    args, kwargs = call
    parameters = inspect.signature(model.forward).parameters
    given = {**dict(zip(parameters, args, strict=False)), **kwargs}
    optional = [name for name, value in given.items() if _is_optional(parameters.get(name)) and _holds_tensors(value)]
    if not optional:
        return frozenset()
    whole = _outputs(model, call)
    found = frozenset(n for n in optional if _loses_numbers(whole, _outputs(model, left_out(model, call, {n}))))
    together = found and _loses_numbers(whole, _outputs(model, left_out(model, call, found)))
    return found if together else frozenset()


def left_out(model: nn.Module, call: Call, names: Collection[str]) -> Call:
    """A call without some inputs; what comes after one that was given by position is then given by name."""
    args, kwargs = call
    order = list(inspect.signature(model.forward).parameters)[: len(args)]
    cut = min((i for i, name in enumerate(order) if name in names), default=len(args))
    named = {**dict(zip(order[cut:], args[cut:], strict=False)), **kwargs}
    return args[:cut], {name: value for name, value in named.items() if name not in names}


def _is_optional(parameter: inspect.Parameter | None) -> bool:
    """Whether forward can do without; None stands for what it takes as further keywords."""
    return parameter is None or parameter.default is not parameter.empty


def _holds_tensors(value: Any) -> bool:
    return any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(value))


def _outputs(model: nn.Module, call: Call) -> list[Output] | None:
    """What a model gives, apart from None; None if it cannot be called so."""
    try:
        with torch.no_grad(), evaluating(model), torch.random.fork_rng(devices=()), _silent():
            torch.manual_seed(0)  # What draws random numbers, draws the same ones every time.
            result = model(*call[0], **call[1])
    except Exception:  # Whatever a model raises that needs the input.
        return None
    leaves = pytree.tree_flatten_with_path(result)[0]
    return [(tuple(map(_key, path)), value) for path, value in leaves if value is not None]


@contextmanager
def _silent() -> Iterator[None]:
    """Without what libraries say of calls that only try something."""
    before = logging.root.manager.disable
    logging.disable(max(before, logging.WARNING))
    try:
        with quiet():
            yield
    finally:
        logging.disable(before)


def _key(entry: Any) -> str | None:
    """The name of an entry; None for a place in a sequence, which moves up where what is before it is left out."""
    return None if isinstance(entry, pytree.SequenceKey) else str(entry)


def _loses_numbers(whole: list[Output] | None, rest: list[Output] | None) -> bool:
    """Whether some outputs are the others without tensors of dimension zero."""
    if not whole or not rest or len(rest) >= len(whole):
        return False
    kept = list(rest)
    for path, value in whole:
        if kept and kept[0][0] == path and _same(kept[0][1], value):
            del kept[0]
        elif not isinstance(value, Tensor) or value.ndim:
            return False
    return not kept


def _same(a: Any, b: Any) -> bool:
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return type(a) is type(b)
    return a.shape == b.shape and a.dtype == b.dtype and torch.allclose(a, b, equal_nan=True)

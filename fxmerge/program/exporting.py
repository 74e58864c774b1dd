"""A model as torch.export gives it, with as many dynamic sizes as it can have."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Collection, Mapping
from itertools import count
from textwrap import shorten
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.utils import _pytree as pytree

from fxmerge.errors import CaptureError
from fxmerge.program import trees
from fxmerge.program.captured import quiet
from fxmerge.program.models import evaluating

logger = logging.getLogger(__name__)

Args = tuple[Any, ...]
Kwargs = Mapping[str, Any]
Sizes = Collection[tuple[int, int]]
"""Dimensions of inputs: the number of the input among all leaves of (args, kwargs), and the dimension."""


def export(model: nn.Module, args: Args, kwargs: Kwargs, varying: Sizes) -> tuple[ExportedProgram, Exception | None]:
    """Exports with all dimensions dynamic that may vary; where that fails, with the first of every input; where that
    fails too, at the shapes of the example. Also gives the last failure."""
    leaves = pytree.tree_leaves((args, dict(kwargs)))
    batch = {(i, 0) for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.ndim}
    all_sizes = batch | {*varying} | {(i, d) for i, leaf in enumerate(leaves) for d in _discrete_dims(leaf)}
    failure: Exception | None = None
    with evaluating(model):
        for sizes in (all_sizes, batch, set()) if all_sizes != batch else (batch, set()):
            try:
                with torch.no_grad(), quiet():
                    program = _export_with(model, args, kwargs, sizes)
                    if sizes:
                        program.module()(*args, **kwargs)  # Refuses a size that was baked in.
                    return program, failure
            except Exception as error:
                logger.debug("torch.export failed (dynamic: %s)", sorted(sizes), exc_info=True)
                failure = error
    raise CaptureError(f"torch.export cannot capture {type(model).__name__}: {shorten(str(failure), 400)}") from failure


def _export_with(model: nn.Module, args: Args, kwargs: Kwargs, sizes: Sizes) -> ExportedProgram:
    """Exports with some dimensions dynamic."""
    example = at_least_two(args, kwargs) if sizes else (args, dict(kwargs))
    numbers = count()
    shapes = trees.dynamic_shapes(example, lambda _: _dynamic(next(numbers), sizes))
    dynamic = _by_name(model, *shapes) if sizes else None
    return torch.export.export(model, example[0], example[1], dynamic_shapes=dynamic, strict=False)


def _dynamic(number: int, sizes: Sizes) -> dict[int, Any] | None:
    """The dynamic dimensions of the input of a number."""
    return {d: Dim.AUTO for i, d in sizes if i == number} or None


def _discrete_dims(value: Any) -> range:
    """The dimensions beyond the first of what may be tokens or a mask, which come in any length; bytes are images."""
    if not isinstance(value, Tensor) or value.dtype == torch.uint8 or value.is_floating_point() or value.is_complex():
        return range(0)
    return range(1, value.ndim)


def has_fixed_batch(program: ExportedProgram) -> bool:
    """Whether no input has a dynamic batch dimension, though some could have."""
    names = set(program.graph_signature.user_inputs)
    values = [n.meta["val"] for n in program.graph.find_nodes(op="placeholder") if n.name in names]
    sizes = [v.shape[0] for v in values if isinstance(v, Tensor) and v.ndim]
    return bool(sizes) and all(isinstance(s, int) or s.node.maybe_as_int() is not None for s in sizes)


def _by_name(model: nn.Module, args: Any, kwargs: Any) -> Any:
    """Dynamic shapes as torch.export wants them: one entry for each argument, by name where given by name."""
    if not kwargs:
        return tuple(args)
    names = list(inspect.signature(model.forward).parameters)
    return dict(zip(names, args, strict=False)) | dict(kwargs)


def at_least_two(args: Args, kwargs: Kwargs) -> tuple[Args, dict[str, Any]]:
    """The example with a batch of one doubled, since torch.export takes a size of one for a constant."""
    leaves, spec = pytree.tree_flatten((tuple(args), dict(kwargs)))
    tensors = [v for v in leaves if isinstance(v, Tensor) and v.ndim]
    if tensors and all(t.shape[0] == 1 for t in tensors):
        leaves = [torch.cat([v, v]) if isinstance(v, Tensor) and v.ndim else v for v in leaves]
    doubled: tuple[Args, dict[str, Any]] = pytree.tree_unflatten(leaves, spec)
    return doubled

"""A graph that follows the path of an example: which batches it is right for."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from fxmerge.errors import LoaderError
from fxmerge.program import models
from fxmerge.program.captured import Program
from fxmerge.program.exporting import Args
from fxmerge.program.models import evaluating
from fxmerge.program.reads import Read, find_reads, fixed_inputs
from fxmerge.program.run import Recorder

LOOSE = 1e-2
"""Largest relative difference of outputs where all that is read is as in the example."""

SHOWN = 8
"""How many values of a tensor are written out in a message."""


class SamePath:
    """Refuses batches for which a captured path is not the one that the models themselves take.

    Where forward reads the same values as on the example, it takes the same path. Where it reads others, the path may
    still be the same: then the graph must give the outputs of the model itself.

    Arguments:
        program: a program captured along the path of an example.
        modules: the models, in eval mode.
        states: their parameters.
        names: what they are called in messages.
        example: the inputs that the program was captured with.
    """

    def __init__(
        self,
        program: Program,
        modules: Sequence[nn.Module],
        states: Sequence[Mapping[str, Tensor]],
        names: Sequence[str],
        example: tuple[Args, Mapping[str, Any]],
    ) -> None:
        self.program, self.modules, self.states, self.names = program, modules, states, names
        self.example = example
        self.reads = {read.node: read for read in find_reads(program.aten)}
        self.checked: set[bytes] = set()

    @cached_property
    def expected(self) -> dict[fx.Node, Any]:
        """What the first model reads on the example."""
        reader = Recorder(self.program, self.reads, _kept(self.reads))
        reader.call(self.states[0], *self.example)
        return reader.seen

    def __call__(self, args: Args, kwargs: Mapping[str, Any]) -> None:
        """Checks the inputs of a batch with all models.

        Raises:
            LoaderError: if a model takes another path; it names the inputs.
        """
        digest = _digest((args, kwargs))
        if digest in self.checked:
            return
        for module, state, name in zip(self.modules, self.states, self.names, strict=True):
            self._check(module, state, name, args, kwargs)
        self.checked.add(digest)

    def check_example(self) -> None:
        """Checks that all models take the same path on the example itself, as far as it shows in what they read.

        Raises:
            LoaderError: if a model takes another path; it names the inputs.
        """
        for module, state, name in zip(self.modules, self.states, self.names, strict=True):
            self._check(module, state, name, *self.example, by_reads=True)

    def _check(
        self,
        module: nn.Module,
        state: Mapping[str, Tensor],
        name: str,
        args: Args,
        kwargs: Mapping[str, Any],
        *,
        by_reads: bool = False,
    ) -> None:
        reader, failure, outputs = Recorder(self.program, self.reads, _kept(self.reads)), None, list[Any]()
        reader.inputs(args, kwargs)  # Its own errors say enough.
        try:
            outputs = reader.outputs(state, args, kwargs)
        except LoaderError as error:
            failure = error
        changed = [node for node, value in reader.seen.items() if not _equal(value, self.expected[node])]
        if failure is not None and not changed:
            raise failure
        if by_reads and not changed:
            return
        with evaluating(module):
            expected = models.run(module, args, kwargs)
        if failure is None and _alike(pytree.tree_leaves(expected), outputs, tight=bool(changed)):
            return
        what = [
            f"{self.reads[n]}: {_shown(reader.seen[n])}, and {_shown(self.expected[n])} in the example"
            for n in changed[:3]
        ]
        raise LoaderError(
            f"A batch leads {name} on another path than the example that it was captured with: "
            f"{'; '.join(what) or 'the outputs of the captured graph differ from its own'}. "
            f"{_advice(list(self.reads.values()))}"
        ) from failure


def _advice(reads: Sequence[Read]) -> str:
    names = fixed_inputs(reads)
    of = f"of {', '.join(map(repr, names))} " if names else ""
    return (
        f"Sizes and branches that depend on values {of}are fixed to those of the example: "
        "give batches that agree in them, or merge the part of the model that does not depend on them."
    )


def _kept(reads: Mapping[fx.Node, Read]) -> Callable[[fx.Node, Any], Any]:
    """What is kept of a value that forward reads: its shape, if only that is read, else a copy."""

    def kept(node: fx.Node, value: Any) -> Any:
        size = reads[node].size
        return pytree.tree_map_only(Tensor, lambda t: t.shape if size else t.detach().clone(), value)

    return kept


def _equal(a: Any, b: Any) -> bool:
    def same(x: Any, y: Any) -> bool:
        return torch.equal(x, y) if isinstance(x, Tensor) and isinstance(y, Tensor) else bool(x == y)

    left, right = pytree.tree_leaves(a), pytree.tree_leaves(b)
    return len(left) == len(right) and all(map(same, left, right))


def _shown(value: Any) -> str:
    if isinstance(value, Tensor):
        return str(value.tolist()) if value.numel() <= SHOWN else f"a tensor of shape {tuple(value.shape)}"
    return f"of shape {tuple(value)}" if isinstance(value, torch.Size) else str(value)


def _alike(expected: Sequence[Any], got: Sequence[Any], *, tight: bool) -> bool:
    """Whether outputs agree: but for rounding, or also for what half precision makes of it."""
    for a, b in zip(expected, got, strict=True):
        if not isinstance(a, Tensor):
            continue
        if a.shape != b.shape:
            return False
        if not a.is_floating_point() and not a.is_complex():
            if tight and not torch.equal(a, b):
                return False
            continue
        scale = float(a.detach().abs().max()) if a.numel() else 0.0
        largest = torch.finfo(a.dtype).eps ** 0.5 if tight else LOOSE
        if not torch.allclose(b, a, rtol=0, atol=largest * scale, equal_nan=True):
            return False
    return True


def _digest(inputs: Any) -> bytes:
    """Equal for inputs with equal values."""
    digest = hashlib.blake2b(digest_size=16)
    for leaf in pytree.tree_leaves(inputs):
        if isinstance(leaf, Tensor):
            digest.update(f"{leaf.dtype}{tuple(leaf.shape)}".encode())
            digest.update(leaf.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        else:
            digest.update(repr(leaf).encode())
    return digest.digest()

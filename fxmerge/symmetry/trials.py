"""An op that is tried on values, in float64: its tensors are moved, and its outputs compared with those before."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fxmerge.program.double import in_double

logger = logging.getLogger(__name__)

MAX_ENTRIES = 2**24
"""Ops on more entries than this are not tried."""


@dataclass
class Op:
    """An op as a function of its tensor operands, with what it gives for two sets of values."""

    call: Callable[[Sequence[Tensor]], list[Tensor]]
    given: list[list[Tensor]]
    expected: list[list[Tensor]]

    @classmethod
    def make(cls, target: Any, args: Any, kwargs: Any, used: frozenset[int] | None) -> Op | None:
        """The op, of which only the outputs `used` count if there are several; None if it cannot be probed."""
        leaves, spec = pytree.tree_flatten((args, kwargs))
        places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        if sum(leaves[i].numel() for i in places) > MAX_ENTRIES:
            return None

        def call(tensors: Sequence[Tensor]) -> list[Tensor]:
            full = list(leaves)
            for i, t in zip(places, tensors, strict=True):
                full[i] = t.clone()
            again, by_name = pytree.tree_unflatten(full, spec)
            with torch.random.fork_rng(devices=()):
                torch.manual_seed(0)
                out = target(*again, **by_name)
            return [out] if used is None else [out[i] for i in sorted(used)]

        actual = [in_double(leaves[i]) for i in places]
        generator = torch.Generator().manual_seed(0)
        noisy = [_perturb(t, generator) for t in actual]
        try:
            expected = [call(actual), call(noisy)]
        except Exception:
            logger.debug("%s cannot be probed in float64", target, exc_info=True)
            return None
        if any(not y.numel() or bool((y == y.reshape(-1)[0]).all()) for ys in expected for y in ys):
            return None  # Nothing can be learnt from an output that has but one value.
        return cls(call, [actual, noisy], expected)

    def times(self, factor: float, numbers: Collection[int]) -> Op | None:
        """The op on the same values, but for some operands that are multiplied by a number; None if it then fails or
        gives numbers that are not finite."""
        given = [[t * factor if i in numbers else t for i, t in enumerate(own)] for own in self.given]
        try:
            expected = [self.call(own) for own in given]
        except Exception:
            return None
        return Op(self.call, given, expected) if all(y.isfinite().all() for ys in expected for y in ys) else None

    def maps(self, moved: Callable[[list[Tensor]], list[Tensor]], out: Callable[[list[Tensor]], list[Tensor]]) -> bool:
        """Whether moving the operands moves the outputs."""
        try:
            return all(same(self.call(moved(g)), out(e)) for g, e in zip(self.given, self.expected, strict=True))
        except Exception:
            return False


def _perturb(t: Tensor, generator: torch.Generator) -> Tensor:
    if t.is_complex():
        return torch.view_as_complex(_perturb(torch.view_as_real(t.resolve_conj()), generator))
    if not t.is_floating_point():
        return t
    noise = torch.rand(t.shape, dtype=t.dtype, generator=generator).to(t.device)
    return torch.where(t == 0, 0.1 * (noise - 0.5), t * (0.7 + 0.6 * noise))


def same(xs: Sequence[Tensor], ys: Sequence[Tensor]) -> bool:
    for x, y in zip(xs, ys, strict=True):
        if x.shape != y.shape:
            return False
        if x.is_complex() and y.is_complex():
            x, y = (torch.view_as_real(z.resolve_conj()) for z in (x, y))
        if not x.is_floating_point():
            if not torch.equal(x, y):
                return False
        elif not torch.allclose(
            x, y, rtol=1e-9, atol=1e-9 * float(y.abs().max().nan_to_num(1.0, 1.0, 1.0)), equal_nan=True
        ):
            return False
    return True

"""What `fxmerge inspect` reports of a model: its classes, how much of it may move, and what holds the rest."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from torch import Tensor, nn

from fxmerge.program.capture import Args, Kwargs, capture_program
from fxmerge.symmetry.explain import Chain, chains
from fxmerge.symmetry.group import Symmetry, analyse
from fxmerge.symmetry.overrides import Pin
from fxmerge.units.layout import AxisLayout


@dataclass(frozen=True)
class Inspection:
    """What was found, and how long each stage took.

    Attributes:
        symmetry: the inferred symmetry, verified if asked for.
        chains: for every pinned axis, what pinned it.
        route: how the model was captured.
        entries: how many entries its parameters and buffers have.
        free: how many of them lie on at least one axis that may move.
        seconds: time spent, by stage.
    """

    symmetry: Symmetry
    chains: tuple[Chain, ...]
    route: str
    entries: int
    free: int
    seconds: Mapping[str, float]

    def __str__(self) -> str:
        share = f"{self.free / max(self.entries, 1):.1%} of {self.entries:,}"
        lines = [
            str(self.symmetry),
            "",
            f"free: {share} parameter entries lie on an axis that moves",
            f"log order: {self.symmetry.log_order():.1f}",
            f"captured by: {self.route}",
        ]
        if self.symmetry.error is not None:
            lines.append(f"verified: outputs change by {self.symmetry.error:.0e} at most")
        lines.append("seconds: " + ", ".join(f"{stage} {spent:.1f}" for stage, spent in self.seconds.items()))
        return "\n".join(lines)


def inspect(
    model: nn.Module,
    args: Args = (),
    kwargs: Kwargs | None = None,
    *,
    pin: Iterable[Pin] = (),
    free: str | Iterable[str] = (),
    verify: bool = False,
) -> Inspection:
    """Infers the symmetry of a model and explains it.

    Arguments:
        model: any module that torch.export can capture; it is not modified.
        args: example inputs, as the model's forward takes them.
        kwargs: example inputs by keyword.
        pin: parameters that must not move, as in `find_symmetry`.
        free: outputs along which units may move, as in `find_symmetry`.
        verify: whether to prove the symmetry on the model.

    Raises:
        CaptureError: if the model cannot be captured as a graph.
        OptionError: if `pin` names no parameter, or `free` no output.
    """
    began = time.perf_counter()
    program = capture_program(model, args, kwargs)
    captured = time.perf_counter()
    found, symmetry = analyse(program, pin, free=free)
    seconds = {"capture": captured - began, "inference": time.perf_counter() - captured}
    if verify:
        began = time.perf_counter()
        symmetry = symmetry.verify(model, args, kwargs)
        seconds["verification"] = time.perf_counter() - began
    moving, entries = free_entries(symmetry, program.parameters)
    return Inspection(symmetry, chains(found, symmetry), program.route, entries, moving, seconds)


def free_entries(symmetry: Symmetry, parameters: Mapping[str, Tensor]) -> tuple[int, int]:
    """How many entries of some parameters lie on at least one axis that may move, and how many there are."""
    moving: dict[str, list[AxisLayout]] = {}
    for axis in symmetry.layout:
        moving.setdefault(axis.parameter, []).append(axis)
    free = sum(_moving(moving[name], tensor.numel()) for name, tensor in parameters.items() if name in moving)
    return free, sum(tensor.numel() for tensor in parameters.values())


def _moving(axes: list[AxisLayout], entries: int) -> int:
    """How many entries of one parameter lie on one of these axes where it moves."""
    still = np.ones((1,) * len(axes[0].shape), bool)
    for axis in axes:
        stays = np.ones(len(axis.index), bool)
        for _, slots in axis.roles:
            stays[slots] = False
        shown = stays[axis.slot]
        if not shown.any():
            return entries
        still = still & np.expand_dims(shown, [d for d in range(len(axis.shape)) if d not in axis.dims])
    return entries - int(still.sum()) * (entries // still.size)

"""What is done to parameters where gains and shifts go into the layers around them."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fxmerge.program.affine import Site
from fxmerge.program.channels import Operand
from fxmerge.program.double import in_double
from fxmerge.program.products import Layer

logger = logging.getLogger(__name__)

LEAST = 1e-4
"""A shift is divided by gains only if the smallest gain is at least this share of the largest."""

State = Mapping[str, Tensor]

READERS, KEEPING, WRITER = "readers", "readers, shift kept", "writer"
"""Where gains go: into the layers that read, with or without the shifts, or into the layer that writes."""


@dataclass(frozen=True)
class Fold:
    """One move that was made.

    Attributes:
        node: the node of the graph whose gains were moved.
        parameters: the names of its parameters: gain, shift, and running statistics.
        where: "readers", "readers, shift kept" or "writer".
        into: the names of the parameters that took the gains.
    """

    node: str
    parameters: tuple[str, ...]
    where: str
    into: tuple[str, ...]

    def __str__(self) -> str:
        return f"{', '.join(self.parameters)} ({self.node}) into the {self.where}: {', '.join(self.into)}"


@dataclass(frozen=True)
class Move:
    """What may be done with the gains of some sites, which share their parameters.

    Attributes:
        site: one of the sites.
        readers: the layers that can take the gains into their columns; None if others read them as well.
        takes_shift: whether all of these can take the shift.
        writers: the layers that can take the gains into their rows; None if there are none.
    """

    site: Site
    readers: tuple[Layer, ...] | None
    takes_shift: bool
    writers: tuple[Layer, ...] | None

    def layers(self, where: str) -> tuple[Layer, ...]:
        return (self.writers if where == WRITER else self.readers) or ()

    def fold(self, where: str) -> Fold:
        into = [one.operand.parameter for layer in self.layers(where) for one in layer.scalings]
        if where == READERS and (self.site.shift is not None or self.site.moments is not None):
            into += [layer.addition.bias.parameter for layer in self.layers(where) if layer.addition is not None]
        return Fold(self.site.node.name, self.site.parameters, where, tuple(dict.fromkeys(into)))

    # ------------------------------------------------------------------------------ values

    def vectors(self, state: State) -> tuple[Tensor, Tensor]:
        """What the site multiplies every channel by, and what it adds."""
        gain, shift = (_flat(one, state, empty) for one, empty in ((self.site.gain, 1.0), (self.site.shift, 0.0)))
        gain, shift = (v.expand(self.site.count) for v in (gain, shift))
        if self.site.moments is not None:
            mean, variance = (in_double(state[name]) for name in (self.site.moments.mean, self.site.moments.variance))
            gain = gain * (variance + self.site.moments.eps).rsqrt()
            shift = shift - mean * gain
        return gain, shift

    def where(self, states: Sequence[State]) -> str | None:
        """Where the gains are to go, the same for all states; None if they are to stay."""
        vectors = [self.vectors(state) for state in states]
        uniform = all(self._is_one(gain, state) for (gain, _), state in zip(vectors, states, strict=True))
        unshifted = not any(shift.any() for _, shift in vectors)
        if self.takes_shift:
            return None if uniform and unshifted else READERS
        if uniform:
            return None
        if self.writers is not None:
            return WRITER
        if unshifted or all(bool(g.abs().min() > LEAST * g.abs().max()) for g, _ in vectors):
            return KEEPING
        logger.debug("%s keeps gains that are next to zero, by which its shift cannot be divided", self.site.node.name)
        return None

    def _is_one(self, gain: Tensor, state: State) -> bool:
        """Whether all gains are one; those of a batch norm but for the rounding of its own parameters."""
        if self.site.moments is None:
            return bool((gain == 1).all())
        return bool(((gain - 1).abs() <= 4 * torch.finfo(state[self.site.moments.variance].dtype).eps).all())

    def apply(self, state: dict[str, Tensor], where: str) -> None:
        """Makes the move, on parameters in float64, which are replaced in `state` and not written into."""
        gain, shift = self.vectors(state)
        # Gains of columns that no gain meets, and shifts of those.
        gains, shifts = (torch.cat([torch.tensor(none).to(v).expand(2), v]) for v, none in ((gain, 1.0), (shift, 0.0)))
        changed: dict[str, Tensor] = {}

        def own(vector: Operand) -> Tensor:
            """A view of a copy, to be written into."""
            name = vector.parameter
            return vector.view(changed.setdefault(name, state[name] if name in changed else state[name].clone()))

        # Layers that are called several times are changed once.
        sums = [layer.addition for layer in self.layers(where) if layer.addition is not None]
        for sum_ in {one.bias.key: one for one in sums}.values() if where == READERS and shift.any() else ():
            products = sum_.weight.view(state[sum_.weight.parameter]) * shifts[sum_.index + 2]
            bias = own(sum_.bias)
            bias += sum_.factor * products.sum(sum_.summed).reshape(bias.shape)
        for scaling in {one.key: one for layer in self.layers(where) for one in layer.scalings}.values():
            own(scaling.operand).mul_(gains[scaling.index + 2])
        state.update(changed)
        rest = {READERS: torch.zeros_like(shift), KEEPING: shift / gain, WRITER: shift}[where]
        self._leave(state, torch.where(shift == 0, 0.0, rest))

    def _leave(self, state: dict[str, Tensor], shift: Tensor) -> None:
        """Leaves the site with gains of one, and a shift."""
        site, one = self.site, 1.0
        if site.moments is not None:
            state[site.moments.mean] = torch.zeros_like(shift) if site.shift is not None else -shift
            state[site.moments.variance] = torch.ones_like(shift)
            if site.gain is None:
                state[site.moments.variance] -= site.moments.eps
            one = (1 + site.moments.eps) ** 0.5
        if site.gain is not None:
            state[site.gain.parameter] = torch.full_like(state[site.gain.parameter], one - site.gain.offset)
        if site.shift is not None:
            state[site.shift.parameter] = shift.reshape(state[site.shift.parameter].shape)


def _flat(vector: Operand | None, state: State, empty: float) -> Tensor:
    """All entries of a parameter, in order."""
    if vector is None:
        return torch.tensor(empty, dtype=torch.float64)
    return in_double(state[vector.parameter]).reshape(-1) + vector.offset  # type: ignore[no-any-return]

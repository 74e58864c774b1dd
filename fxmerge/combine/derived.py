"""Buffers that follow from the parameters: an average of them is no such buffer, so they are derived anew.

A power iteration keeps vectors from one training step to the next, which converge to singular vectors of a weight. They
have an arbitrary sign, so that their mean may be zero. Such buffers are found by what they do, and not by their names:
a forward pass in train mode brings them back to where they were from wherever they are put, whatever the inputs.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from fxmerge.program.captured import Program
from fxmerge.program.models import copied
from fxmerge.symmetry import rules

logger = logging.getLogger(__name__)

TRIALS, STEPS = 100, 2000
"""How often a buffer is derived again at most: to see whether it converges, and until it no longer changes."""

SETTLED = 1e-6
"""A buffer that changes by less than this, relative to its norm, no longer changes; or by less than rounding does."""

SHRINKING = 0.1
"""The last change of a buffer that converges is smaller than the first by this factor at least. That of a counter is as
large as the first."""

State = Mapping[str, Tensor]


@dataclass
class Derived:
    """The buffers of a model that its forward derives from its parameters when it is trained.

    Attributes:
        module: a copy of the model in train mode.
        args, kwargs: example inputs.
        owners: for the submodules that own such buffers, by name, the names of these.
    """

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    owners: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        return [name for own in self.owners.values() for name in own]

    @classmethod
    def find(
        cls, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], among: Collection[str]
    ) -> Derived | None:
        """The derived buffers of a model among those named; None if there are none, or it cannot be run in train mode.

        Where a buffer was put does not matter to what it becomes. One that stays there is a constant; one that depends
        on the inputs is a statistic; one whose changes do not become small is a counter.
        """
        owners = _owners(model, among)
        if not owners:
            return None
        try:
            module = copied(model)
            module.train()
            found = cls(module, args, kwargs, owners)._that_converge()
        except Exception:
            logger.debug("no buffers could be derived in train mode", exc_info=True)
            return None
        return found if found.owners else None

    def of_sizes(self, state: State) -> Derived:
        """The buffers of submodules of which all tensors have the sizes that a state dict has."""
        sizes = {name: value.shape for name, value in self.module.state_dict().items()}
        other = [name for name, size in sizes.items() if state[name].shape != size]
        kept = [o for o in self.owners if not any(name.startswith(f"{o}." if o else "") for name in other)]
        return self._only([name for owner in kept for name in self.owners[owner]])

    def settle(self, state: State) -> dict[str, Tensor]:
        """A state dict with its derived buffers as its parameters have them, from where they are on."""
        self._load(state)
        self._converge(STEPS)
        own = self.module.state_dict()
        return {name: own[name].to(value).clone() if name in self.names else value for name, value in state.items()}

    def _that_converge(self) -> Derived:
        start = {name: value.clone() for name, value in self.module.state_dict().items()}
        generator = torch.Generator().manual_seed(0)
        for name in self.names:
            start[name] = _elsewhere(start[name], generator)
        once = []
        for change in (lambda v: v, _other_input):
            self._load(start)
            self._run(pytree.tree_map(change, (self.args, dict(self.kwargs))))
            once.append(self._buffers())
        moved = [
            name
            for name in self.names
            if torch.equal(once[0][name], once[1][name]) and not torch.equal(once[0][name], start[name])
        ]
        tried = self._only(moved)
        if not moved:
            return tried
        tried._load(start)
        changes = tried._converge(TRIALS)
        # Comparisons with NaN are false.
        return self._only([name for name in moved if changes[name][-1] <= SHRINKING * changes[name][0] < math.inf])

    def _only(self, names: Collection[str]) -> Derived:
        owners = {owner: tuple(n for n in own if n in names) for owner, own in self.owners.items()}
        return replace(self, owners={owner: own for owner, own in owners.items() if own})

    def _converge(self, steps: int) -> dict[str, list[float]]:
        """Derives all buffers again and again until they no longer change; what each changed by in every step."""
        before = self._buffers()
        sizes = {name: float(value.norm()) or 1.0 for name, value in before.items()}
        least = {name: max(SETTLED, 8 * torch.finfo(value.dtype).eps) for name, value in before.items()}
        changes: dict[str, list[float]] = {name: [] for name in self.names}

        def note(names: Collection[str]) -> None:
            for name, value in self._buffers().items():
                if name in names:
                    changes[name].append(float((value - before[name]).norm()) / sizes[name])
                    before[name] = value

        # What the inputs of one owner are may depend on the buffers of another.
        for _ in range(2):
            calls = self._run((self.args, dict(self.kwargs)))
            note(self.names)
            for owner, names in self.owners.items():
                for _ in range(steps if owner in calls else 0):
                    if all(changes[name][-1] <= least[name] for name in names):
                        break
                    with _alone():
                        calls[owner]()
                    note(names)
        return changes

    def _run(self, inputs: tuple[tuple[Any, ...], dict[str, Any]]) -> dict[str, Callable[[], Any]]:
        """Runs the whole model, and gives for every owner that was called a way to call it again."""
        calls: dict[str, Callable[[], Any]] = {}
        handles = []
        for name in self.owners:
            owner = self.module.get_submodule(name)

            def note(m: nn.Module, args: Any, kwargs: Any, name: str = name) -> None:
                calls.setdefault(name, lambda: m(*args, **kwargs))

            handles.append(owner.register_forward_pre_hook(note, with_kwargs=True))
        try:
            with _alone():
                self.module(*inputs[0], **inputs[1])
        finally:
            for handle in handles:
                handle.remove()
        return calls

    def _buffers(self) -> dict[str, Tensor]:
        own = self.module.state_dict()
        return {name: own[name].clone() for name in self.names}

    def _load(self, state: State) -> None:
        """Loads what has the sizes of the module: no derived buffer depends on the rest (see `of_sizes`)."""
        with torch.no_grad():
            for name, value in self.module.state_dict().items():
                if state[name].shape == value.shape:
                    value.copy_(state[name])


@contextmanager
def _alone() -> Iterator[None]:
    """Without gradients, and with random numbers that are the same every time."""
    with torch.no_grad(), torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        yield


def _owners(model: nn.Module, among: Collection[str]) -> dict[str, tuple[str, ...]]:
    """The floating-point buffers of a state dict among those named, by the module that owns them."""
    state, owners = model.state_dict(), dict[str, tuple[str, ...]]()
    for prefix, module in model.named_modules():
        own = (
            f"{prefix}.{name}" if prefix else name
            for name, buffer in module.named_buffers(recurse=False)
            if buffer.is_floating_point() and buffer.numel()
        )
        names = tuple(name for name in own if name in state and name in among)
        if names:
            owners[prefix] = names
    return owners


def _elsewhere(value: Tensor, generator: torch.Generator) -> Tensor:
    """Random numbers of about the same size."""
    size = float(value.square().mean().sqrt()) or 1.0
    return (torch.randn(value.shape, generator=generator) * size).to(value)


def _other_input(value: Any) -> Any:
    """Another input like an example: noise is added, or what cannot have noise is moved about."""
    if not isinstance(value, Tensor):
        return value
    if value.is_floating_point():
        return value + 0.1 * (value.std() if value.numel() > 1 else 1.0) * torch.randn_like(value)
    return value.roll(1) if value.ndim else value


def not_averaged(program: Program, names: Collection[str]) -> list[str]:
    """Of some buffers those that a contraction multiplies with parameters before there is any activation: they are part
    of how a weight is computed, and the mean of two of them is of no weight."""
    read: dict[fx.Node, frozenset[str]] = {}
    found: set[str] = set()
    for node in program.graph.graph.nodes:
        if node in program.derived:
            kind, name = program.sources.get(node, ("", ""))
            read[node] = frozenset({name} if kind == "parameter" else ()).union(
                *(read[n] for n in node.all_input_nodes)
            )
            if node.op != "placeholder" and rules.contracts(node.target) and read[node] - set(names):
                found |= read[node] & set(names)
    return sorted(found)

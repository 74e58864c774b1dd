"""The configuration with which a model's own class has other sizes."""

from __future__ import annotations

import copy
import logging
import math
from collections import deque
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fxmerge.program import models
from fxmerge.program.capture import Args
from fxmerge.program.captured import quiet
from fxmerge.symmetry.verify import Probe
from fxmerge.validate import agree

logger = logging.getLogger(__name__)

Changes = dict[str, int]

Shapes = Mapping[str, torch.Size]
"""The shapes of the tensors of a state dict."""

TOLERANCE = 1e-6
"""How much outputs of one function may differ by rounding in float64, as a share of the largest."""

TOGETHER = 6
"""How many entries of a configuration are changed together at most."""

TRIALS = 200
"""How many changes are tried at most."""


def config_for(
    model: Any,
    result: nn.Module,
    call: tuple[Args, Mapping[str, Any]],
    widths: Collection[tuple[int, int]],
    inside: Collection[int] = (),
) -> Changes | None:
    """What to change in the configuration of a model, so that its class makes a network of other sizes.

    It is for classes that are built from an object `config` alone, as those of transformers are. Which entries have to
    change is found by trial, on instances without values: entries that hold an old size, and those that hold None. With
    the changes that are told, the class can be built, has all tensors in their shapes, and computes what the network
    does. This is tried on random parameters: in a network that is hardly trained, attention is nearly uniform, and two
    heads compute nearly what four of half their size do.

    Arguments:
        model: the model.
        result: the network of other sizes.
        call: (args, kwargs) to run both on.
        widths: the sizes that change: old and new.
        inside: further sizes that entries may hold that are None, such as how many units a head has.

    Returns:
        New values by the names of entries, as few as possible; None if there is no such configuration.
    """
    config = getattr(model, "config", None)
    if not isinstance(model, nn.Module) or config is None or not hasattr(config, "__dict__"):
        return None
    wanted = {name: tensor.shape for name, tensor in result.state_dict().items()}
    dtypes = {name: buffer.dtype for name, buffer in model.named_buffers()}
    rebuilding = _Rebuilding(type(model), config, dtypes)
    now = rebuilding.shapes({})
    if now is None or now.keys() != wanted.keys():
        return None
    probe: Probe | None = None
    for changes in _with_shapes(rebuilding, wanted, _entries(rebuilding, now, widths, inside)):
        try:
            probe = probe or _probe(_generic(result), call)
        except Exception:
            logger.info("a configuration could not be tried: the result does not run in float64", exc_info=True)
            return None
        outputs = rebuilding.outputs(changes, probe.state, call)
        if outputs is not None and agree(probe.expected, outputs, TOLERANCE):
            return changes
    return None


def _probe(model: nn.Module, call: tuple[Args, Mapping[str, Any]]) -> Probe:
    args, kwargs = call
    return Probe(model, args, dict(kwargs), torch.Generator().manual_seed(0))


def _generic(model: nn.Module) -> nn.Module:
    """A copy of a network whose matrices are random, and large enough for all that it computes to count."""
    made, generator = models.copied(model), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.ndim > 1 and parameter.is_floating_point() and (parameter < 0).any():
                noise = torch.randn(parameter.shape, generator=generator).to(parameter)
                parameter.copy_(noise * (2 * math.sqrt(len(parameter) / parameter.numel())))
    return made


@dataclass(frozen=True)
class _Rebuilding:
    """Builds a class anew, from its configuration with changes, with buffers of the dtypes of the model.

    What `half()` or `bfloat16()` has rounded, such as the frequencies of rotary positions, need not be part of a state
    dict: a new instance computes the same once it is rounded likewise.
    """

    kind: type[nn.Module]
    config: Any
    dtypes: Mapping[str, torch.dtype]

    def changed(self, changes: Changes) -> Any:
        """The configuration with changes, made as a user makes it, so that it is checked as a whole."""
        if hasattr(self.config, "to_dict") and hasattr(type(self.config), "from_dict"):
            return type(self.config).from_dict({**self.config.to_dict(), **changes})
        return self._set(changes)

    def _set(self, changes: Changes) -> Any:
        other = copy.deepcopy(self.config)
        for name, value in changes.items():
            setattr(other, name, value)
        return other

    def shapes(self, changes: Changes) -> Shapes | None:
        """The shapes of an instance, of a configuration that may fit only with further changes; None if there can be no
        such instance."""
        try:
            with torch.device("meta"), quiet():
                made = self.kind(self._set(changes))
            return {name: tensor.shape for name, tensor in made.state_dict().items()}
        except Exception:  # Whatever a class raises for sizes that do not go together.
            return None

    def outputs(
        self, changes: Changes, state: Mapping[str, Tensor], call: tuple[Args, Mapping[str, Any]]
    ) -> list[Any] | None:
        """What an instance computes with these tensors; None if there can be no such instance."""
        try:
            with torch.random.fork_rng(devices=[]), quiet():
                made = self.kind(self.changed(changes)).to(next(iter(state.values())).device)
            for name, buffer in made.named_buffers():
                buffer.data = buffer.to(self.dtypes.get(name, buffer.dtype))
            return _probe(made, call).outputs(state)
        except Exception:  # Likewise.
            return None


def _entries(
    rebuilding: _Rebuilding, now: Shapes, widths: Collection[tuple[int, int]], inside: Collection[int]
) -> list[tuple[str, int]]:
    """What may be changed: names of entries and new values."""
    news = list(dict.fromkeys([*(new for _, new in widths), *inside]))
    found = []
    for name, value in vars(rebuilding.config).items():
        if type(value) is int:
            found += [(name, new) for new in dict.fromkeys(new for old, new in widths if old == value)]
        elif value is None and any(
            rebuilding.shapes({name: new}) not in (None, now) for new in (*news, 2 * max(news, default=0))
        ):
            # Sizes follow from this entry once it is given, and from others until then.
            found += [(name, new) for new in news]
    return found


def _with_shapes(rebuilding: _Rebuilding, wanted: Shapes, entries: Sequence[tuple[str, int]]) -> Iterator[Changes]:
    """Changes with which an instance has the shapes that are wanted, the fewest first.

    One size after the other is brought right, by a change that it follows from. If all are, another entry may still
    have to change, from which no size follows.
    """
    queue, seen = deque[Changes]([{}]), set[frozenset[tuple[str, int]]]()
    while queue:
        changes = queue.popleft()
        shapes = rebuilding.shapes(changes)
        first = None if shapes is None else _first_wrong(shapes, wanted)
        if shapes == wanted:
            yield changes
        for name, new in entries if len(changes) < TOGETHER else ():
            more = {**changes, name: new}
            if name in changes or frozenset(more.items()) in seen:
                continue
            if len(seen) == TRIALS:
                return
            seen.add(frozenset(more.items()))
            then = rebuilding.shapes(more)
            if then is not None and then.keys() != wanted.keys():
                continue
            given = vars(rebuilding.config)[name] is not None
            fixed = _size(shapes, first) != _size(then, first) if shapes and then and first else then == shapes
            if shapes is None or then is None or not given or fixed:
                queue.append(more)


def _first_wrong(shapes: Shapes, wanted: Shapes) -> tuple[str, int] | None:
    """A dimension of a tensor along which there is another size than the one that is wanted; None if there is none."""
    return next(
        (
            (name, d)
            for name, shape in wanted.items()
            for d in range(max(len(shape), len(shapes[name])))
            if shape[d : d + 1] != shapes[name][d : d + 1]
        ),
        None,
    )


def _size(shapes: Shapes, place: tuple[str, int]) -> torch.Size:
    """The size along a dimension of a tensor, in a tuple that is empty if there is no such dimension."""
    name, dim = place
    return shapes[name][dim : dim + 1]

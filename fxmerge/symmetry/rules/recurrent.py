"""Recurrent layers: the gates are stacked segments of one hidden axis, which the recurrence maps to itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import reduce as fold
from typing import Any

from torch import Tensor

from fxmerge.symmetry.labels import Labels, inert, move, reduce
from fxmerge.symmetry.rules.contraction import linear
from fxmerge.symmetry.rules.movement import in_a_row
from fxmerge.symmetry.rules.registry import Site, rule

Operand = Labels | Tensor

_GATES = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1}


@dataclass(frozen=True)
class _Cell:
    """The weights of one layer and direction; `out` projects the hidden state (LSTM with proj_size)."""

    gates: int
    inward: Operand
    hidden: Operand
    inward_bias: Operand | None = None
    hidden_bias: Operand | None = None
    out: Operand | None = None

    def step(self, at: Site, x: Operand, state: Sequence[Operand]) -> list[Labels]:
        """The state after one step: (h, c) of an LSTM, (h,) of the others. Gates are pointwise in the hidden axis."""
        parts = [*self._split(at, linear(at, x, self.inward, self.inward_bias))]
        parts += self._split(at, linear(at, state[0], self.hidden, self.hidden_bias))
        # An LSTM carries its cell along, a GRU its hidden state, in these same units.
        carried = state[1:] if self.gates == 4 else state[: self.gates == 3]
        new = fold(at.join, [at.labels(s) for s in carried], fold(at.join, parts))
        hidden = new if self.out is None else linear(at, new, self.out)
        return [hidden, new] if self.gates == 4 else [hidden]

    def _split(self, at: Site, x: Labels) -> list[Labels]:
        size = x.shape[-1] // self.gates
        shape = (*x.shape[:-1], size)
        return [
            move(at.units, x, lambda c, i=i: c.narrow(-1, i * size, size), shape, f"{at.name}: gate {i}")  # type: ignore[misc]
            for i in range(self.gates)
        ]


@rule("lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell", contracts=True)
def cell(at: Site, x: Operand, state: Any, *weights: Operand | None) -> Any:
    several = isinstance(state, (list, tuple))
    gates = _GATES[at.target._schema.name.removeprefix("aten::").removesuffix("_cell")]
    new = _Cell(gates, *weights).step(at, x, state if several else [state])  # type: ignore[arg-type]
    return new if several else new[0]


@rule("lstm", "gru", "rnn_tanh", "rnn_relu", contracts=True)
def layers(
    at: Site,
    x: Labels,
    initial: Any,
    weights: Sequence[Operand],
    has_biases: bool,
    count: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool = False,
) -> Any:
    """(batch, time, inputs) or (time, batch, inputs), or without a batch; the states are (layers, batch, hidden)."""
    if at.target._overloadname != "input":
        return NotImplemented  # Packed sequences have another signature.
    kind = at.target._schema.name.removeprefix("aten::")
    time = 1 if batch_first and x.ndim == 3 else 0
    initial = initial if isinstance(initial, (list, tuple)) else [initial]
    directions = 2 if bidirectional else 1
    each = len(weights) // (count * directions)
    finals: list[list[Labels]] = [[] for _ in initial]
    for layer in range(count):
        outputs = []
        for number in range(layer * directions, (layer + 1) * directions):
            own = list(weights[number * each : (number + 1) * each])
            projection = own.pop() if each - 2 * has_biases == 3 else None
            run = _run(
                at,
                _Cell(_GATES[kind], *own, **({"out": projection} if projection is not None else {})),
                x,
                [_state(at, s, number, x, time) for s in initial],
            )
            outputs.append(run[0])
            for final, state in zip(finals, run, strict=True):
                last = reduce(at.units, state, [time], at.name)
                final.append(last.reshape((1, *last.shape)))
        shape = (*x.shape[:-1], sum(o.shape[-1] for o in outputs))
        x = in_a_row(replace(at, shape=shape), outputs, -1) if directions > 1 else outputs[0]
        if train and dropout and layer < count - 1:
            x = at.join(x, inert(x.shape))
    states = [
        in_a_row(replace(at, shape=s), f, 0) if len(f) > 1 else f[0] for s, f in zip(at.shape[1:], finals, strict=True)
    ]
    return [x, *states]


def _state(at: Site, state: Operand, number: int, x: Labels, time: int) -> Labels:
    """The initial state of one layer and direction, for every step."""
    labels = at.labels(state)
    own = move(at.units, labels, lambda c: c.narrow(0, number, 1), (1, *labels.shape[1:]), at.name)
    shape = (*x.shape[:-1], own.shape[-1])
    return own.reshape(tuple(1 if d == time else n for d, n in enumerate(shape))).expand(shape)


def _run(at: Site, cell: _Cell, x: Labels, state: Sequence[Labels]) -> list[Labels]:
    """The states at all steps: the second step reads what the first one wrote; another one would say no more."""
    first = [at.join(new, old) for new, old in zip(cell.step(at, x, state), state, strict=True)]
    return [at.join(new, old) for new, old in zip(cell.step(at, x, first), first, strict=True)]

"""The sizes of values along which no units lie, such as the zeros that a recurrence begins with: their readers tell."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

from torch import fx

from fxmerge.program.forms import bind
from fxmerge.symmetry.rules import elementwise, find_rule

FILLED = ("zeros", "ones", "full", "empty", "new_zeros", "new_ones", "new_full", "new_empty")
"""Ops that fill a tensor of a written size with one value."""

ENTRY_BY_ENTRY = (elementwise.pointwise, elementwise.identity, elementwise.prelu, elementwise.copy, elementwise.filled)
"""The rules of ops that act on every entry by itself."""

_BROADCAST = ("expand", "expand_copy")
_SPLIT = ("split", "split_with_sizes", "unsafe_split", "unsafe_split_with_sizes", "chunk", "unsafe_chunk")
_DROPPED = ("select", "unbind")
_RECURRENT = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1}
"""How many gates a recurrence has."""


class Sizes(Protocol):
    """The sizes of values with merged units, as `fxmerge.emit.sizes.Sizes` has them."""

    def size(self, node: fx.Node, dim: int) -> int | None:
        """The new size of a dimension; None if it stays."""

    def shape(self, node: fx.Node) -> Sequence[int]:
        """The shape of a node's value before."""

    def has_units(self, node: fx.Node, dim: int) -> bool:
        """Whether units are known to lie along a dimension of a node's value."""

    def cannot(self, node: fx.Node, why: str) -> Exception:
        """The error for a node."""


def needed(node: fx.Node, sizes: Sizes) -> dict[int, int]:
    """The other sizes that what reads a value needs it to have, by dimension. Units lie along none of these.

    Raises:
        CannotResizeError: if two readers need other sizes, or one needs another and one what it is.
    """
    readers = [set(_needed_by(reader, node, sizes)) for reader in node.users if _name(reader) not in FILLED]
    found: dict[int, int] = {}
    for dim, size in set().union(*readers):
        if node.meta["val"].shape[dim] == 1 or sizes.has_units(node, dim):
            continue
        if found.setdefault(dim, size) != size or not all(any(d == dim for d, _ in own) for own in readers):
            raise sizes.cannot(node, "is read in places that need it in other sizes")
    return found


def _needed_by(reader: fx.Node, node: fx.Node, sizes: Sizes) -> Iterator[tuple[int, int]]:
    """The dimensions of a value of which one reader tells the sizes, and these."""
    name, dims = _name(reader), range(len(sizes.shape(node)))
    if name.removesuffix("_cell") in _RECURRENT:
        yield from _of_state(reader, node, sizes)
    elif name == "linear" and bind(reader)["input"] is node:
        if (size := sizes.size(bind(reader)["weight"], 1)) is not None:
            yield dims[-1], size
    elif name in _SPLIT:
        yield from _of_parts(reader, node, sizes)
    elif name in ("unsqueeze", *_DROPPED, *_BROADCAST) or find_rule(reader.target) in ENTRY_BY_ENTRY:
        for value in reader.users if name == "unbind" else (reader,):
            for dim in dims:
                place = _place(reader, dim, len(dims), len(sizes.shape(value)))
                if place is not None and (size := sizes.size(value, place)) is not None:
                    yield dim, size


def _place(reader: fx.Node, dim: int, ndim: int, result: int) -> int | None:
    """Where a dimension of what an op reads lies in what it gives."""
    name = _name(reader)
    if name == "unsqueeze":
        added: int = bind(reader)["dim"] % result
        return dim + (dim >= added)
    if name in _DROPPED:
        dropped = bind(reader)["dim"] % ndim
        return None if dim == dropped else dim - (dim > dropped)
    return dim + result - ndim


def _of_parts(reader: fx.Node, node: fx.Node, sizes: Sizes) -> Iterator[tuple[int, int]]:
    """What is split is as long as its parts together."""
    along = bind(reader)["dim"] % len(sizes.shape(node))
    if (total := sum(parts(reader, sizes))) != sizes.shape(node)[along]:
        yield along, total
    for part in reader.users:
        for dim in set(range(len(sizes.shape(part)))) - {along}:
            if (size := sizes.size(part, dim)) is not None:
                yield dim, size


def parts(node: fx.Node, sizes: Sizes) -> list[int]:
    """How long the parts are into which a call splits a dimension. Those that nobody reads stay as they are."""
    along = bind(node)["dim"]
    found = [part.shape[along] for part in node.meta["val"]]
    for part in node.users:
        place = part.args[1]
        assert isinstance(place, int)  # An item of a list.
        found[place] = sizes.size(part, along) or found[place]
    return found


def _of_state(reader: fx.Node, node: fx.Node, sizes: Sizes) -> Iterator[tuple[int, int]]:
    """The states that a recurrence begins with: (h, c) of an LSTM, else h. The weight of h is (gates x c, h)."""
    call, gates = bind(reader), _RECURRENT[_name(reader).removesuffix("_cell")]
    weight = call["w_hh"] if "w_hh" in call else call["params"][1]
    states = call["hx"] if isinstance(call["hx"], (list, tuple)) else [call["hx"]]
    for state, dim, parts in zip(states, (1, 0), (1, gates), strict=False):
        if state is node and (size := sizes.size(weight, dim)) is not None:
            yield len(sizes.shape(node)) - 1, size // parts


def _name(node: fx.Node) -> str:
    """The name of an op of torch, "" for another node."""
    schema = getattr(node.target, "_schema", None)
    return schema.name.removeprefix("aten::") if schema is not None else ""

"""What several graphs have in common, from the inputs on: by ops, arguments and shapes, never by names."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Hashable, Mapping
from functools import partial
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, fx

ROUNDS = 8
"""How many ops ahead are looked at to tell apart nodes that may both be the one that is sought."""

Pairs = dict[fx.Node, fx.Node]
"""For nodes of one graph, the nodes of another one that do the same."""


def common_part(first: fx.GraphModule, other: fx.GraphModule, *, by_name: bool = False) -> Pairs:
    """The nodes of a graph that another one has too.

    Nodes are the same if their ops are, and their arguments: numbers, the same nodes, and parameters of one shape and
    dtype. Where several nodes would do, as the three projections of an attention, that is taken whose consumers
    are the most alike, and of these the first.

    Arguments:
        first: a graph of ops, as `torch.export` gives it, with as many inputs as the other one.
        other: another such graph.
        by_name: whether, of several nodes that would do, one is preferred that reads parameters of the same names: for
            networks that are copies of one.

    Returns:
        For nodes of the first graph those of the other. With a node it has all that the node depends on.

    Example:
        >>> from torch import nn
        >>> def net(classes):
        ...     model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, classes))
        ...     return torch.export.export(model, (torch.zeros(2, 2),)).module()
        >>> [node.name for node in common_part(net(4), net(5)) if node.op == "call_function"]
        ['linear', 'relu']
    """
    tokens, theirs = _Tokens(first), _Tokens(other)
    ahead, their_ahead = _ahead(first.graph, tokens), _ahead(other.graph, theirs)

    def likeness(node: fx.Node, candidate: fx.Node) -> tuple[bool, int]:
        named = by_name and [n.target for n in _attributes(node)] == [n.target for n in _attributes(candidate)]
        return named, _agreed(ahead[candidate], their_ahead[node])

    alike: dict[Hashable, list[fx.Node]] = defaultdict(list)
    for node in first.graph.nodes:
        if node.op in _CALLS:
            alike[_key(node, lambda n: n if n.op != "get_attr" else tokens.of(n))].append(node)
    found: Pairs = {}  # From nodes of the other graph, which is walked, to those of the first.
    same = _Same(theirs, tokens)
    taken: set[fx.Node] = set()
    inputs = (graph.find_nodes(op="placeholder") for graph in (other.graph, first.graph))
    found.update(zip(*inputs, strict=False))
    for node in other.graph.nodes:
        if node.op not in _CALLS or any(n not in found for n in node.all_input_nodes if n.op != "get_attr"):
            continue
        would_do = alike[_key(node, lambda n: found[n] if n.op != "get_attr" else theirs.of(n))]
        candidates = [one for one in would_do if one not in taken and same.may_be(node, one)]
        if candidates:
            best = max(candidates, key=partial(likeness, node))
            same.bind(node, best)
            found[node] = best
            taken.add(best)
            found.update(zip(_attributes(node), _attributes(best), strict=True))
    return {mine: own for own, mine in found.items()}


_CALLS = ("call_function", "call_method")


class _Tokens:
    """What the attributes that a graph reads are, but for the values of parameters and buffers."""

    def __init__(self, module: fx.GraphModule) -> None:
        self.state = {id(t) for t in module.state_dict(keep_vars=True).values()}
        self._module = module
        self._known: dict[str, Hashable] = {}

    def value(self, node: fx.Node) -> Any:
        return attrgetter(str(node.target))(self._module)

    def of(self, node: fx.Node) -> Hashable:
        target = str(node.target)
        if target not in self._known:
            self._known[target] = self._of(target, self.value(node))
        return self._known[target]

    def _of(self, target: str, value: Any) -> Hashable:
        if not isinstance(value, Tensor):
            # The mode of a module; a graph in a graph is equal to no other.
            return (target, type(value)) if isinstance(value, bool) else ("alone", id(value))
        kind = tuple(value.shape), value.dtype
        number = value.is_floating_point() or value.is_complex()
        if id(value) in self.state and (number or value.ndim == 0):  # A counter may differ.
            return ("state", *kind)
        content = value.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        return ("constant", *kind, hashlib.sha256(content).digest())


def _attributes(node: fx.Node) -> list[fx.Node]:
    """The attributes that a node reads, in the order of its arguments."""
    return [n for n in node.all_input_nodes if n.op == "get_attr"]


class _Same:
    """Which tensors of one graph are which of another."""

    def __init__(self, theirs: _Tokens, mine: _Tokens) -> None:
        self._theirs, self._mine = theirs, mine
        self._there: dict[int, int] = {}
        self._back: dict[int, int] = {}

    def _pairs(self, node: fx.Node, candidate: fx.Node) -> list[tuple[int, int]]:
        both = zip(_attributes(node), _attributes(candidate), strict=True)
        return [(id(self._theirs.value(own)), id(self._mine.value(mine))) for own, mine in both]

    def may_be(self, node: fx.Node, candidate: fx.Node) -> bool:
        """Whether two nodes may be the same: what they read is not the same as something else."""
        return all(self._there.get(a, b) == b and self._back.get(b, a) == a for a, b in self._pairs(node, candidate))

    def bind(self, node: fx.Node, candidate: fx.Node) -> None:
        """From here on, what one node reads is what the other does."""
        for a, b in self._pairs(node, candidate):
            self._there[a], self._back[b] = b, a


def _key(node: fx.Node, told: Callable[[fx.Node], Hashable]) -> Hashable:
    """Equal for nodes that do the same with the same arguments."""
    return node.op, node.target, _frozen(node.args, told), _frozen(node.kwargs, told)


def _frozen(value: Any, told: Callable[[fx.Node], Hashable]) -> Hashable:
    if isinstance(value, fx.Node):
        return told(value)
    if isinstance(value, Mapping):
        return tuple((name, _frozen(own, told)) for name, own in value.items())
    if isinstance(value, (list, tuple)):
        return tuple(_frozen(own, told) for own in value)
    if isinstance(value, slice):
        return "slice", _frozen((value.start, value.stop, value.step), told)
    return type(value), value if isinstance(value, Hashable) else repr(value)


def _ahead(graph: fx.Graph, tokens: _Tokens) -> dict[fx.Node, list[int]]:
    """For every node what it does, and what those do that read it, so many ops ahead."""
    nodes = list(graph.nodes)
    own = {
        n: hash((n.op, "" if n.op in ("placeholder", "get_attr") else n.target, *map(tokens.of, _attributes(n))))
        for n in nodes
    }
    found = {n: [own[n]] for n in nodes}
    for _ in range(ROUNDS):
        last = {n: found[n][-1] for n in nodes}
        for n in nodes:
            after = sorted((last[user], user.all_input_nodes.index(n)) for user in n.users)
            found[n].append(hash((own[n], *after)))
    return found


def _agreed(a: list[int], b: list[int]) -> int:
    """How many ops ahead two nodes are alike."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), len(a))

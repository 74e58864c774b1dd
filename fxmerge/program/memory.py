"""Which values of a graph lie in one memory, and what ops that write in place do to them."""

from __future__ import annotations

import operator
from collections import Counter, defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import fx

_AS_THEY_ARE = {f"aten::{name}dropout" for name in ("", "alpha_", "feature_", "feature_alpha_")}
"""Ops that give their input itself in eval mode, though their schemas do not say so."""


def writes(node: fx.Node) -> bool:
    """Whether an op changes its first argument in place."""
    return any(a.alias_info is not None and a.alias_info.is_write for a in _arguments(node.target))


def memory_of(graph: fx.Graph) -> dict[fx.Node, fx.Node]:
    """For every node the first one in whose memory its value lies, or may lie: of a view, what it is a view of."""
    found: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        found[node] = _memory(node, found)
    return found


def needed(nodes: Iterable[fx.Node], *, at_the_end: bool = False) -> set[fx.Node]:
    """Some nodes of a graph and all that they depend on, ops that have written into what they read among it.

    Arguments:
        nodes: the nodes.
        at_the_end: whether their values are wanted as they are at the end of the graph, and not when they are computed.
    """
    todo = list(nodes)
    if not todo:
        return set()
    graph = todo[0].graph
    memory, place = memory_of(graph), {node: number for number, node in enumerate(graph.nodes)}
    written: defaultdict[fx.Node, list[fx.Node]] = defaultdict(list)
    for node in graph.nodes:
        if writes(node):
            written[memory[node]].append(node)
    if at_the_end:
        todo += [w for node in todo for w in written[memory[node]]]
    found: set[fx.Node] = set()
    while todo:
        node = todo.pop()
        if node not in found:
            found.add(node)
            todo += node.all_input_nodes
            todo += [w for n in node.all_input_nodes for w in written[memory[n]] if place[w] < place[node]]
    return found


def write_out_of_place(graph: fx.Graph) -> None:
    """Lets ops that write in place give a new tensor instead, where nothing else reads the one that they write to.

    What such an op gives is what it has written. So it makes no difference if all that comes after reads that, and if
    the tensor shares its memory with no other value of the graph.
    """
    place = {node: number for number, node in enumerate(graph.nodes)}
    found: dict[fx.Node, fx.Node] = {}
    sharing: Counter[fx.Node] = Counter()
    for node in graph.nodes:
        own, twin = _first(node), _twin(node.target) if writes(node) else None
        alone = own is not None and own.op == "call_function" and found[own] is own and not sharing[own]
        if own is not None and twin is not None and alone and all(place[u] <= place[node] for u in own.users):
            node.target = twin
            found[node] = node
        else:
            found[node] = _memory(node, found)
            sharing[found[node]] += found[node] is not node


def _memory(node: fx.Node, known: dict[fx.Node, fx.Node]) -> fx.Node:
    own = _first(node)
    if own is None or node.op != "call_function":
        return node
    shares = node.target is operator.getitem or getattr(_schema(node.target), "name", "") in _AS_THEY_ARE
    return known[own] if shares or any(a.alias_info is not None for a in _arguments(node.target)) else node


def _first(node: fx.Node) -> fx.Node | None:
    """The first argument, if it is a value of the graph."""
    return node.args[0] if node.args and isinstance(node.args[0], fx.Node) else None


def _twin(target: Any) -> Any:
    """The op that gives what one writes in place: `relu` for `relu_`; None if there is none of the same arguments."""
    namespace, _, name = target._schema.name.partition("::")
    packet = getattr(getattr(torch.ops, namespace), name.removesuffix("_"), None) if name.endswith("_") else None
    twin = getattr(packet, target._overloadname, None)
    names = [[a.name for a in _arguments(op)] for op in (target, twin)]
    return twin if names[0] == names[1] else None


def _schema(target: Any) -> Any:
    return getattr(target, "_schema", None)


def _arguments(target: Any) -> list[Any]:
    """The arguments of an op as its schema has them; none where it has no schema."""
    return list(getattr(_schema(target), "arguments", ()))

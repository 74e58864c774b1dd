"""Norms that give their statistics as well, which nothing reads, as the plain norms that they are.

Graphs of core ATen ops have them, and graphs of devices that torch takes norms apart for.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from fxmerge.program.captured import AtenGraph
from fxmerge.program.forms import bind

aten = torch.ops.aten

_PLAIN: Mapping[Any, tuple[Any, Callable[..., tuple[Any, ...]]]] = {
    aten.native_layer_norm.default: (
        aten.layer_norm.default,
        lambda input, normalized_shape, weight, bias, eps: (input, normalized_shape, weight, bias, eps),
    ),
    aten._fused_rms_norm.default: (
        aten.rms_norm.default,
        lambda input, normalized_shape, weight, eps: (input, normalized_shape, weight, eps),
    ),
    aten.native_group_norm.default: (
        aten.group_norm.default,
        lambda input, weight, bias, N, C, HxW, group, eps: (input, group, weight, bias, eps),
    ),
}
"""The plain op of each, and its arguments from those of the other by name."""


def plain_norms(graph: AtenGraph) -> AtenGraph:
    """The graph with plain norms in place of those of whose results only the first is read; itself if it has none.

    Example:
        >>> from torch import nn
        >>> from fxmerge.program.capture import capture_program
        >>> exported = torch.export.export(nn.LayerNorm(4), (torch.randn(3, 4),)).run_decompositions()
        >>> program = capture_program(exported, (torch.randn(3, 4),))
        >>> [str(node.target) for node in plain_norms(program.aten).module.graph.nodes if node.op == "call_function"]
        ['aten.layer_norm.default']
    """
    if not any(_is_plain(node) for node in graph.module.graph.nodes):
        return graph
    copied, copies = fx.Graph(), dict[fx.Node, fx.Node]()
    copied.output(copied.graph_copy(graph.module.graph, copies))
    for node in [copies[node] for node in graph.module.graph.nodes if node in copies and _is_plain(node)]:
        op, arguments = _PLAIN[node.target]
        with copied.inserting_before(node):
            plain = copied.call_function(op, arguments(**bind(node)))
        for result in list(node.users):
            if result.args[1] == 0:
                plain.meta = result.meta
                result.replace_all_uses_with(plain)
            copied.erase_node(result)
        copied.erase_node(node)
    return replace(graph, module=fx.GraphModule(graph.module, copied))


def _is_plain(node: fx.Node) -> bool:
    """Whether a node is a norm of which only the first result is read."""
    return node.target in _PLAIN and all(
        user.target is operator.getitem and (user.args[1] == 0 or not user.users) for user in node.users
    )

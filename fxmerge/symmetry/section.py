"""The part of a graph that some parameters change, up to where all that they change goes into one value."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from fxmerge.program.captured import Program
from fxmerge.program.channels import CASTS, MOVES, SIZES
from fxmerge.program.double import grouped_mm
from fxmerge.program.forms import form_of, op_name
from fxmerge.symmetry import rules

State = Mapping[str, Tensor]

_CHOOSES = frozenset(("index", "index_select", "gather", "repeat_interleave"))
"""Ops whose first operand is read at places that others tell."""

_GROUPED = frozenset(("_grouped_mm", "transformers::grouped_mm_fallback"))
"""Ops that multiply groups of rows, each with a matrix of its own."""

_REDUCES = frozenset(("sum", "mean"))


@dataclass(frozen=True, eq=False)
class Section:
    """Nodes of a graph.

    Attributes:
        nodes: what is computed, in graph order, from parameters and `inputs`.
        inputs: the other values that are read.
        ends: the nodes that are asked for.
    """

    nodes: tuple[fx.Node, ...]
    inputs: tuple[fx.Node, ...]
    ends: tuple[fx.Node, ...]


def section_of(program: Program, parameters: Collection[str]) -> Section:
    """The nodes that some parameters change, up to the last node in which one of them is linear and through which all
    goes that any of them changes: of a mixture of experts, the sum of what the experts give. Where there is none, up to
    the outputs.

    Arguments:
        program: the program.
        parameters: the names of the parameters.
    """
    roots = [n for n, source in program.sources.items() if source[0] == "parameter" and source[1] in parameters]
    changed = _after(program, roots)
    for root in roots:
        end = end_of(program, root)
        if end is not None:
            before, after = _before([end], changed), _after(program, [end])
            if _after(program, roots, values=True) - program.derived <= before | after:
                return _leading_to(program, changed, (end,))
    return _leading_to(program, changed, tuple(n for n in program.answers if isinstance(n, fx.Node)))


def end_of(program: Program, root: fx.Node) -> fx.Node | None:
    """The last activation in which a parameter is linear, such as the sum of what the experts give for the last
    matrices of the experts; None if its product with data goes into no sum in which it is linear."""
    node, sums = root, 0
    while True:
        users = [user for user in node.users if op_name(user) not in SIZES]
        if len(users) != 1 or not _is_linear(program, users[0], node):
            break
        node = users[0]
        sums += op_name(node) in _REDUCES or bool(rules.multiplied(node))
    return node if sums > 1 else None


def _is_linear(program: Program, node: fx.Node, operand: fx.Node) -> bool:
    """Whether what a node gives is linear in one of its operands, and depends on no other parameters but through
    activations."""
    name = op_name(node)
    others = [n for n in node.all_input_nodes if n is not operand]
    if name in MOVES:
        return isinstance(node.meta.get("val"), Tensor) and node.args[0] is operand
    if name in CASTS:
        return bool(node.meta["val"].is_floating_point())
    if name in _CHOOSES | _REDUCES:
        return node.args[0] is operand
    if name == "mul":
        return len(others) == 1 and others[0] not in program.derived
    if name == "div":
        return node.args[0] is operand and not any(n in program.derived for n in others)
    factors = rules.multiplied(node)
    if form_of(node) is None and name not in _GROUPED:
        return False
    return operand in factors and not any(n in program.derived for n in factors if n is not operand)


def _after(program: Program, nodes: Collection[fx.Node], *, values: bool = False) -> set[fx.Node]:
    """Some nodes and all that depends on them; or, on their values, that is not on their sizes alone."""
    found = set(nodes)
    for node in program.graph.graph.nodes:
        sizes = values and op_name(node) in SIZES
        if node.op != "output" and not sizes and not found.isdisjoint(node.all_input_nodes):
            found.add(node)
    return found


def _before(ends: Collection[fx.Node], among: Collection[fx.Node]) -> set[fx.Node]:
    """Some nodes and all of others that lead to them."""
    found, todo = set[fx.Node](), list(ends)
    while todo:
        node = todo.pop()
        if node not in found and node in among:
            found.add(node)
            todo += node.all_input_nodes
    return found


def section_to(program: Program, roots: Collection[fx.Node], end: fx.Node) -> Section:
    """The nodes that lead from some parameters to an end."""
    return _leading_to(program, _after(program, roots), (end,))


def _leading_to(program: Program, changed: Collection[fx.Node], ends: tuple[fx.Node, ...]) -> Section:
    own = _before(ends, {*changed, *program.derived})
    inputs = {n for node in own for n in node.all_input_nodes} - own
    order = program.graph.graph.nodes
    return Section(tuple(n for n in order if n in own), tuple(n for n in order if n in inputs), ends)


def run_section(
    program: Program,
    section: Section,
    state: State,
    values: Mapping[fx.Node, Any],
    seen: Callable[[fx.Node, Any], Any] = lambda node, value: value,
) -> dict[fx.Node, Any]:
    """What the nodes of a section compute.

    Arguments:
        program: the program.
        section: of its graph.
        state: parameters and constants that are others than captured.
        values: what the inputs of the section are.
        seen: gives what takes the place of what a node computes.
    """
    env = dict(values)
    for node in section.nodes:
        kind, name = program.sources.get(node, ("", ""))
        if kind == "parameter":
            env[node] = state.get(name, program.parameters[name])
        elif kind == "constant":
            env[node] = state.get(name, program.constants[name])
        else:
            args, kwargs = fx.map_arg((node.args, node.kwargs), env.__getitem__)
            env[node] = seen(node, _op(node)(*args, **kwargs))
    return env


def _op(node: fx.Node) -> Any:
    """What a node calls, or what computes the same and has derivatives of any order."""
    name = op_name(node)
    if name in _GROUPED:
        return grouped_mm
    # Of an op that is run otherwise than in the graph, the result may lie otherwise in memory.
    return torch.reshape if name in ("view", "_unsafe_view") else node.target

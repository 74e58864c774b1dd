"""Another number of units in a graph: a copy with other sizes, and what changes likewise in the graph to emit."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

from fxmerge.emit.sizes import CannotResizeError, Sizes
from fxmerge.emit.written_sizes import Changes, changes_of
from fxmerge.program.captured import AtenGraph, Program, quiet
from fxmerge.program.forms import bind
from fxmerge.symmetry.group import Symmetry
from fxmerge.symmetry.propagation import Propagation
from fxmerge.units.unit_map import UnitMap


def resize(found: Propagation, symmetry: Symmetry, units: UnitMap, state: Mapping[str, Tensor], call: Any) -> AtenGraph:
    """Gives a graph the sizes of merged units.

    Its ops stay what they are. What changes is numbers that are written in it: sizes, places of cuts, numbers of
    groups; and a scale of attention that follows from a size is written out as it was. Then the graph is run without
    values, and every value must have the size that its units tell.

    Arguments:
        found: the labelled program.
        symmetry: its classes.
        units: where units go.
        state: the merged parameters, or others of their shapes.
        call: (args, kwargs) of the model, for the run.

    Returns:
        The graph, with nodes of the same names.

    Raises:
        CannotResizeError: if an op with resized operands is not known to allow this, or gives another size.
    """
    program, sizes = found.program, Sizes(found, symmetry, units)
    inputs = [leaf.detach() if isinstance(leaf, Tensor) else leaf for leaf in pytree.tree_leaves(call)]
    before = _shapes(program.graph, _values(program, program.aten.state, inputs))
    graph = fx.Graph()
    copied: dict[fx.Node, Any] = {}
    graph.output(graph.graph_copy(program.graph.graph, copied))
    for old, node in copied.items():
        node.name, node.meta = old.name, dict(old.meta)  # A copy may be given another name.
        write(node, changes_of(old, sizes))
        if node.target is torch.ops.aten.view.default:
            node.target = torch.ops.aten.reshape.default  # Other sizes may lie in memory so that no view shows them.
    resized = replace(
        program.aten, module=fx.GraphModule(program.graph, graph), state=state, exported=None, example=call
    )
    twins = {node.name: node for node in program.graph.graph.nodes}
    try:
        after = _shapes(resized.module, _values(replace(program, aten=resized), state, inputs))
    except CannotResizeError as error:
        raise sizes.cannot(twins[error.node], error.why) from error
    for node in resized.module.graph.nodes:
        old, value = twins[node.name], after[node.name]
        if not isinstance(value, Tensor):
            continue
        size = list(before[old.name].shape)
        told = old.name in found.labels and 0 not in size  # What holds nothing has no units.
        expected = [sizes.size(old, d) or n for d, n in enumerate(size)] if told else value.shape
        if list(value.shape) != list(expected):
            raise sizes.cannot(old, f"would have the shape {tuple(value.shape)}, and not {tuple(expected)}")
        if list(value.shape) != size:
            open_ = old.meta["val"].shape  # Of any size along some dimensions.
            if any(n != m and not isinstance(o, int) for n, m, o in zip(value.shape, size, open_, strict=True)):
                raise sizes.cannot(old, "has units along a dimension of any size")
            shape = [n if n != m else o for n, m, o in zip(value.shape, size, open_, strict=True)]
            node.meta["val"] = old.meta["val"].new_empty(shape)
    return resized


def rewritten(
    module: fx.GraphModule,
    program: Program,
    found: Propagation,
    symmetry: Symmetry,
    units: UnitMap,
    state: Mapping[str, Tensor],
    call: Any,
) -> dict[fx.Node, Changes]:
    """What changes likewise in the graph that a captured program was made of, as `capture_ops` gives it.

    Arguments:
        module: the graph.
        program: the captured program.
        found: the labelled program, which is it or has some of its ops written out.
        symmetry, units, state, call: as for `resize`.

    Raises:
        CannotResizeError: as for `resize`; and if the graph does not run then.
    """
    sizes = Sizes(found, symmetry, units, twins_of(module, program, found))
    changes = {node: changes_of(node, sizes) for node in module.graph.nodes}
    graph = fx.Graph()
    copied: dict[fx.Node, Any] = {}
    graph.output(graph.graph_copy(module.graph, copied))
    for old, node in copied.items():
        write(node, changes[old])
        node.name = old.name
    nodes = {node.name: node for node in module.graph.nodes}
    try:
        _runs(fx.GraphModule(module, graph), state, call)
    except CannotResizeError as error:
        raise sizes.cannot(nodes[error.node], error.why) from error
    return changes


def _runs(module: fx.GraphModule, state: Mapping[str, Tensor], call: Any) -> None:
    """Runs a graph without values on tensors of other sizes than its own."""
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, quiet(), torch.no_grad():
        inputs = [mode.from_tensor(v.detach()) if isinstance(v, Tensor) else v for v in pytree.tree_leaves(call)]
        own = {name: mode.from_tensor(tensor.detach()) for name, tensor in state.items()}
        _ShapeRun(module, own).run(*inputs)


def twins_of(module: fx.GraphModule, program: Program, found: Propagation) -> dict[fx.Node, fx.Node]:
    """For the nodes of a graph, those of the labelled program with the same value; of some there is none.

    Arguments are those of `rewritten`.
    """
    twins = _twins(module, program)
    if found.program is not program:
        further = _made_of(found.program.graph)
        twins = {node: further.get(twin.name, twin) for node, twin in twins.items()}
    # Items have the name of the list that they are of, and the last one stands for it.
    for node in module.graph.find_nodes(op="call_function", target=operator.getitem):
        source = twins.get(node.args[0])
        if source is not None and source.target is operator.getitem:
            source = source.all_input_nodes[0]
        items = source.users if source is not None else ()
        same = [item for item in items if item.target is operator.getitem and item.args[1] == node.args[1]]
        twins |= {node: same[0]} if same else {}
    return twins


def _twins(module: fx.GraphModule, program: Program) -> dict[fx.Node, fx.Node]:
    """For the nodes of a graph, those of the captured program with the same value; of some there is none."""
    tensors = {name: node for node, (kind, name) in program.sources.items() if kind == "parameter"}
    made = _made_of(program.graph)
    found: dict[fx.Node, fx.Node] = {}
    for node in module.graph.nodes:
        if node.op == "get_attr":
            twin = tensors.get(program.aliases.get(node.target, node.target))
        elif node.op == "call_function":
            # What does nothing in eval mode, such as dropout, is left out of the program.
            twin = made.get(node.name) or next((found[n] for n in node.all_input_nodes if n in found), None)
        else:
            twin = None
        if twin is not None:
            found[node] = twin
    return found


def _made_of(module: fx.GraphModule) -> dict[str, fx.Node]:
    """The last node that each node was written out as, by the name of that."""
    found = {}
    for node in module.graph.nodes:
        if node.op == "call_function":
            names = [source.name for source in node.meta.get("from_node", ())]
            found.update(dict.fromkeys(names or [node.name], node))
    return found


def write(node: fx.Node, changes: Changes) -> None:
    """Gives a call new arguments. Of sizes, those that the graph computes stay as this call has them."""
    if not changes:
        return
    names, now = [a.name for a in node.target._schema.arguments], bind(node)  # type: ignore[union-attr]
    for name, value in changes.items():
        if isinstance(value, list):
            value = [now[name][i] if isinstance(n, fx.Node) else n for i, n in enumerate(value)]
        if names.index(name) < len(node.args):
            node.update_arg(names.index(name), value)
        else:
            node.update_kwarg(name, value)


def _values(program: Program, state: Mapping[str, Tensor], inputs: list[Any]) -> list[Any]:
    """The values of all placeholders of a program."""
    left = iter(inputs)
    return [
        next(left) if kind == "input" else state.get(name, program.aten.state.get(name, program.constants.get(name)))
        for kind, name in program.sources.values()
    ]


class _ShapeRun(fx.Interpreter):
    """Runs a graph on tensors without values, some in place of its own, and keeps all."""

    def __init__(self, module: fx.GraphModule, state: Mapping[str, Tensor] | None = None) -> None:
        super().__init__(module)
        self.state = state or {}
        self.seen: dict[str, Any] = {}

    def fetch_attr(self, target: str) -> Any:
        return self.state[target] if target in self.state else super().fetch_attr(target)

    def run_node(self, n: fx.Node) -> Any:
        try:
            self.seen[n.name] = super().run_node(n)
        except Exception as error:
            why = f"fails: {next(iter(str(error).splitlines()), type(error).__name__)}"
            raise CannotResizeError(n.name, frozenset(), why) from error
        return self.seen[n.name]


def _shapes(module: fx.GraphModule, values: list[Any]) -> dict[str, Any]:
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, quiet(), torch.no_grad():
        fake = [mode.from_tensor(v.detach()) if isinstance(v, Tensor) else v for v in values]
        run = _ShapeRun(module)
        run.run(*fake)
    return run.seen

"""Tracing of what `torch.export` cannot take: along the path of the example, or around what cannot be traced."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.graph import _PyTreeCodeGen, _PyTreeInfo
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree

from fxmerge.program import AtenGraph

Args = tuple[Any, ...]


def trace_path(model: nn.Module, args: Args, kwargs: Mapping[str, Any]) -> tuple[fx.GraphModule, AtenGraph]:
    """Traces one run of a model on real tensors: branches are taken, and sizes fixed, as the example has them.

    Arguments:
        model: a module in eval mode; it is not modified.
        args: example inputs.
        kwargs: example inputs by keyword.

    Returns:
        The path as a GraphModule with parameter names as in the model, and as a graph to analyse.
    """
    model = copy.deepcopy(model)
    state = model.state_dict(keep_vars=True)
    names = [*dict.fromkeys([*state, *(n for n, _ in model.named_buffers(remove_duplicate=False))])]
    tensors = {**state, **dict(model.named_buffers(remove_duplicate=False))}
    leaves, inputs = pytree.tree_flatten((tuple(args), dict(kwargs)))
    nested: list[pytree.TreeSpec] = []

    def run(*flat: Any) -> tuple[Any, ...]:
        example = pytree.tree_unflatten(list(flat[len(names) :]), inputs)
        values = dict(zip(names, flat, strict=False))
        out = torch.func.functional_call(model, values, example[0], example[1], tie_weights=False)
        results, spec = pytree.tree_flatten(out)
        nested[:] = [spec]
        return tuple(results)

    flat = [*(tensors[n].detach().clone() for n in names), *leaves]
    # The ops that every device has, in place of those for some.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), torch.backends.mkldnn.flags(enabled=False):
        # First the path, then its ops in functional form: what is functional from the start cannot read values.
        path = make_fx(run, tracing_mode="real", _error_on_data_dependent_ops=False)(*flat)
        graph = make_fx(torch.func.functionalize(path), tracing_mode="real", _error_on_data_dependent_ops=False)(*flat)
    sources = [("parameter" if n in state else "constant", n) for n in names]
    sources += [("input", n.name) for n in graph.graph.find_nodes(op="placeholder")[len(names) :]]
    outputs = (True,) * nested[0].num_leaves
    _Record(graph).run(*(tensors[n].detach() for n in names), *leaves)
    constants = {n: t for n, t in tensors.items() if n not in state}
    example = tuple(args), dict(kwargs)
    traced = AtenGraph(graph, tuple(sources), outputs, inputs, state, constants, example, out=nested[0])
    return _with_attributes(model, graph, names, nested[0], inputs), traced


class _Record(fx.Interpreter):
    """Runs a graph and notes what every node computes, without its values, as `meta["val"]`."""

    def run_node(self, n: fx.Node) -> Any:
        with torch.no_grad():
            value = super().run_node(n)
        n.meta["val"] = pytree.tree_map_only(Tensor, lambda t: torch.empty_like(t, device="meta"), value)
        return value


def _with_attributes(
    model: nn.Module, graph: fx.GraphModule, names: list[str], out: pytree.TreeSpec, inputs: pytree.TreeSpec
) -> fx.GraphModule:
    """The graph with the tensors of the model as attributes in place of its first placeholders."""
    root = copy.deepcopy(model)
    for name, value in graph.named_buffers():  # Constants that the trace met.
        root.register_buffer(name, value, persistent=False)
    copied = fx.Graph()
    nodes: dict[fx.Node, fx.Node] = {}
    for number, node in enumerate(graph.graph.nodes):
        if number < len(names):
            if node.users:
                nodes[node] = copied.get_attr(names[number])
        else:
            nodes[node] = copied.node_copy(node, nodes.__getitem__)
    args, kwargs = pytree.tree_unflatten([None] * inputs.num_leaves, inputs)
    arguments = [*(f"arg_{i}" for i in range(len(args))), *kwargs]
    copied.set_codegen(_PyTreeCodeGen(_PyTreeInfo(arguments, inputs, out)))
    copied.lint()
    return fx.GraphModule(root, copied, type(model).__name__)


def trace_around(model: nn.Module) -> fx.GraphModule:
    """Traces a model symbolically, with those of its submodules left whole that cannot be traced.

    Raises:
        Exception: what tracing raised, where it failed outside of any submodule.
    """
    model = copy.deepcopy(model)
    whole: set[str] = set()
    while True:
        tracer = _Around(whole)
        try:
            graph = tracer.trace(model)
            return fx.GraphModule(tracer.root, graph, type(model).__name__)
        except Exception:
            if not tracer.path:
                raise
            whole.add(tracer.path[-1])


class _Around(fx.Tracer):
    """Leaves some submodules whole, and knows in which submodule it is."""

    def __init__(self, whole: set[str]) -> None:
        super().__init__()
        self.whole = whole
        self.path: list[str] = []

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return module_qualified_name in self.whole or super().is_leaf_module(m, module_qualified_name)

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        name = self.path_of_module(m)
        leaf = self.is_leaf_module(m, name)
        if not leaf:
            self.path.append(name)
        value = super().call_module(m, forward, args, kwargs)
        if not leaf:
            self.path.pop()  # Not after an error: it tells where tracing failed.
        return value

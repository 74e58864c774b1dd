"""Traces of a model: symbolic ones, also around what cannot be traced, and ones along the path of an example."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree

from fxmerge.program import models
from fxmerge.program.captured import AtenGraph
from fxmerge.program.reads import Noted

Args = tuple[Any, ...]
Traced = tuple[fx.Graph, nn.Module]
"""A graph with the attribute names of a model, and what holds the attributes that the graph reads."""


def trace_path(model: nn.Module, args: Args, kwargs: Mapping[str, Any]) -> AtenGraph:
    """Traces one run of a model on real tensors: branches are taken, and sizes fixed, as the example has them.

    Arguments:
        model: a module in eval mode; it is not modified.
        args: example inputs.
        kwargs: example inputs by keyword.

    Returns:
        The path as a graph to analyse.
    """
    model = models.copied(model)
    state = models.tensors(model, keep_vars=True)
    names = [*dict.fromkeys([*state, *(n for n, _ in model.named_buffers(remove_duplicate=False))])]
    tensors = {**state, **dict(model.named_buffers(remove_duplicate=False))}
    leaves, inputs = pytree.tree_flatten((tuple(args), dict(kwargs)))
    nested: list[pytree.TreeSpec] = []

    def run(*flat: Any) -> tuple[Any, ...]:
        example = pytree.tree_unflatten(list(flat[len(names) :]), inputs)
        values = dict(zip(names, flat, strict=False))
        with Noted():
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
    sources += [("input", name) for name in _input_names(model, args, kwargs)]
    outputs = (True,) * nested[0].num_leaves
    _Record(graph).run(*(tensors[n].detach() for n in names), *leaves)
    constants = {n: t for n, t in tensors.items() if n not in state}
    example = tuple(args), dict(kwargs)
    return AtenGraph(graph, tuple(sources), outputs, inputs, state, constants, example, out=nested[0])


def _input_names(model: nn.Module, args: Args, kwargs: Mapping[str, Any]) -> list[str]:
    """What the user calls each leaf of the inputs: x, xs[0], batch['x']."""
    order = list(inspect.signature(model.forward).parameters)
    names = [order[i] if i < len(order) else f"args[{i}]" for i in range(len(args))]
    named = [*zip(names, args, strict=True), *kwargs.items()]
    return [name + pytree.keystr(path) for name, value in named for path, _ in pytree.tree_flatten_with_path(value)[0]]


class _Record(fx.Interpreter):
    """Runs a graph and notes what every node computes, without its values, as `meta["val"]`."""

    def run_node(self, n: fx.Node) -> Any:
        with torch.no_grad():
            value = super().run_node(n)
        n.meta["val"] = pytree.tree_map_only(Tensor, lambda t: torch.empty_like(t, device="meta"), value)
        return value


def trace_ops(model: nn.Module, args: Args, kwargs: Mapping[str, Any]) -> fx.Graph:
    """The ops of one run of a model in the mode that it is in, before torch writes any of them out in others.

    Arguments:
        model: a copy of a module; its buffers may change.
        args: example inputs.
        kwargs: example inputs by keyword.
    """
    leaves, inputs = pytree.tree_flatten((tuple(args), dict(kwargs)))

    def run(*flat: Any) -> Any:
        example = pytree.tree_unflatten(list(flat), inputs)
        return pytree.tree_leaves(model(*example[0], **example[1]))

    with torch.no_grad(), torch.random.fork_rng(devices=()):
        return make_fx(run, tracing_mode="real", pre_dispatch=True, _error_on_data_dependent_ops=False)(*leaves).graph


def trace_symbolically(model: nn.Module) -> Traced:
    """Traces a model symbolically.

    Arguments:
        model: a copy of a module.
    """
    return _traced(Tracer(), model)


def _traced(tracer: fx.Tracer, model: nn.Module) -> Traced:
    graph = tracer.trace(model)
    for name, buffer in model.named_buffers():
        if isinstance(buffer, fx.Proxy):
            raise TypeError(f"its forward assigns the buffer {name!r}")
    return graph, tracer.root


def trace_around(model: nn.Module) -> Traced:
    """Traces a model symbolically, with those of its submodules left whole that cannot be traced.

    Arguments:
        model: a copy of a module.

    Raises:
        Exception: what tracing raised, where it failed outside of any submodule.
    """
    whole: set[str] = set()
    while True:
        tracer = _Around(whole)
        try:
            return _traced(tracer, model)
        except Exception:
            if not tracer.path:
                raise
            whole.add(tracer.path[-1])


class Tracer(fx.Tracer):
    """Reads the buffers of a module when the graph runs, as it does parameters: else what is computed with them is
    computed while tracing, with the values that they have then."""

    proxy_buffer_attributes = True


class _Around(Tracer):
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

"""Capture: from a module to the GraphModule that is emitted and the ATen graph that is analysed."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import cached_property
from textwrap import shorten
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from fxmerge.errors import CaptureError, OptionError
from fxmerge.program import models, trees
from fxmerge.program.captured import AtenGraph, Program, quiet
from fxmerge.program.emission import (
    Whole,
    duplicate,
    emitted,
    follow_training,
    is_told,
    write_out_guards,
)
from fxmerge.program.exporting import Args as Args
from fxmerge.program.exporting import Kwargs as Kwargs
from fxmerge.program.exporting import Sizes, at_least_two, export, has_fixed_batch
from fxmerge.program.memory import write_out_of_place
from fxmerge.program.models import evaluating, first_names
from fxmerge.program.on_use import OnDemand, by_pieces, fill, with_stand_ins
from fxmerge.program.reads import find_reads, fixed_inputs
from fxmerge.program.tracing import Traced, trace_around, trace_ops, trace_path, trace_symbolically

logger = logging.getLogger(__name__)


def capture(model: nn.Module | ExportedProgram, args: Args = (), kwargs: Kwargs | None = None) -> fx.GraphModule:
    """Captures a model as a GraphModule that computes the same function.

    A GraphModule is kept as it is; else symbolic tracing is tried, which keeps the code readable, then
    `torch.export`, with the first dimension of all inputs dynamic and every dimension of those that hold whole
    numbers or truth values, such as tokens and masks, then symbolic tracing around the submodules that cannot be
    traced. A model that no trace captures, because what it does depends on the values of its inputs, is called
    whole: the graph has one node. With example inputs, outputs are compared for other parameters and buffers.
    Dropout, BatchNorm and the like follow `train()` and `eval()` as in the model.

    Arguments:
        model: any module, GraphModule or ExportedProgram; it is not modified.
        args: example inputs, as the model's forward takes them. Needed unless the model is a GraphModule.
        kwargs: example inputs by keyword.

    Returns:
        A GraphModule in eval mode, with copies of the model's tensors. Its state dict has the keys of the model's, in
        their order, and loads into the class of the model.

    Raises:
        CaptureError: if no route captures the model; the message names each and why it failed.

    Example:
        >>> import torch, fxmerge
        >>> gm = fxmerge.capture(torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.ReLU()), (torch.zeros(1, 2),))
        >>> [node.op for node in gm.graph.nodes]
        ['placeholder', 'call_module', 'call_module', 'output']
    """
    views = _Views(*_given(model, args, kwargs))
    with _tracing(views.model):
        return duplicate(_skeleton(views)[0])


def capture_program(
    model: nn.Module | ExportedProgram, args: Args = (), kwargs: Kwargs | None = None, varying: Sizes = ()
) -> Program:
    """Captures both the GraphModule to emit, which shares the parameters of the model, and the graph to analyse.

    Arguments:
        model, args, kwargs: as for `capture`.
        varying: dimensions that are to be dynamic, in addition to those that always are, where torch can do so.

    Raises:
        CaptureError: if no route captures the model, or torch.export cannot.
        OptionError: if the model or its inputs are none.
    """
    model, args, kwargs = _given(model, args, kwargs)
    if isinstance(model, ExportedProgram) and not args and not kwargs and model.example_inputs is not None:
        args, kwargs = model.example_inputs
    # How the example lies in memory is not to become a condition on all inputs.
    args, kwargs = pytree.tree_map(lambda v: v.contiguous() if isinstance(v, Tensor) else v, (tuple(args), kwargs))
    views = _Views(model, args, kwargs, varying)
    with _tracing(model):
        module, route = _skeleton(views)
        aten = views.analysed
    return Program(module, aten, route, _why_fixed(aten, views.failure or views.narrower))


def capture_ops(
    model: nn.Module | ExportedProgram, args: Args = (), kwargs: Kwargs | None = None, varying: Sizes = ()
) -> fx.GraphModule:
    """Captures a model as a graph of ops, by `torch.export` alone: networks of other code that compute the same have
    the same graph.

    Arguments are those of `capture_program`.

    Raises:
        CaptureError: if torch.export cannot capture the model.
    """
    model, args, kwargs = _given(model, args, kwargs)
    if isinstance(model, ExportedProgram):
        return _skeleton(_Views(model, args, kwargs))[0]
    views = _Views(model, args, kwargs, varying)
    try:
        with _tracing(model), evaluating(model), quiet():
            module = _emitted(views, models.copied(model), None)
            write_out_of_place(module.graph)
            module.recompile()
            _check_same(views, module)
    except Exception as error:
        raise CaptureError(
            f"{type(model).__name__} cannot be captured as a graph of ops, by which networks are compared: "
            f"{_first_line(error)}."
        ) from error
    return module


def _why_fixed(aten: AtenGraph, failure: Exception | None) -> str:
    """Why the graph takes some sizes only as they are in the example."""
    said = "" if failure is None else shorten(_first_line(failure), 200)
    if aten.exported is None:
        return "the graph follows the path that the example takes" + (f", since {said}" if said else "")
    if said:
        return f"torch.export fails where it is left open ({said})"
    return "the model computes with this size as with a constant"


def _tracing(model: Any) -> AbstractContextManager[None]:
    """Random numbers drawn by a trace are not those of a run: a check would not see that they were baked in."""
    return models.same_draws(*(models.tensors(model).values() if isinstance(model, nn.Module) else ()), seed=1)


def _given(model: Any, args: Any, kwargs: Any) -> tuple[nn.Module | ExportedProgram, Args, dict[str, Any]]:
    """What a user gave, checked: a model that may be called without a trace, and inputs that torch can open."""
    model = models.accepted(model)
    args, kwargs = check_example(model, args, kwargs)
    if isinstance(model, nn.Module):
        model = models.apart(model)
        if args or kwargs:
            _run_once(model, args, kwargs)
    return model, args, kwargs


def check_example(model: nn.Module | ExportedProgram, args: Any, kwargs: Any) -> tuple[Args, dict[str, Any]]:
    """Example inputs of a model, as a tuple and a dict.

    Raises:
        CaptureError: if they hold an object that cannot be opened.
        OptionError: if they are something else, such as a tensor that is not in a tuple.
    """
    if not isinstance(args, (tuple, list)):
        raise OptionError(f"args is a {type(args).__name__}; give a tuple of the inputs, such as (x,).")
    if kwargs is not None and not isinstance(kwargs, Mapping):
        raise OptionError(f"kwargs is a {type(kwargs).__name__}; give a dict of the inputs by name.")
    advice = "Pass tensors, or a tuple, dict or dataclass of tensors."
    trees.open_classes((args, kwargs), f"{type(model).__name__} is given", CaptureError, advice)
    return tuple(args), dict(kwargs or {})


def _run_once(model: nn.Module, args: Args, kwargs: Kwargs) -> None:
    """Makes torch see the tensors inside of what a model returns."""
    try:
        with evaluating(model), quiet():
            outputs = models.run(model, args, kwargs)
    except Exception:
        logger.debug("%s does not run on its example", type(model).__name__, exc_info=True)
        return  # Every route of the capture will tell why.
    open_outputs(model, outputs)


def open_outputs(model: nn.Module, outputs: Any) -> None:
    """Makes torch see the tensors inside of the outputs of a model.

    Raises:
        CaptureError: if they are inside of an object that cannot be opened.
    """
    advice = "Return a tensor, or a tuple, dict or dataclass of tensors."
    trees.open_classes(outputs, f"{type(model).__name__} returns", CaptureError, advice)


class _Views:
    """What a model looks like to torch.export, and run on its example: each found at most once, when asked for."""

    def __init__(self, model: nn.Module | ExportedProgram, args: Args, kwargs: Kwargs, varying: Sizes = ()) -> None:
        self.model, self.args, self.kwargs, self.varying = model, args, kwargs, varying
        self.failure: Exception | None = None
        self.narrower: Exception | None = None
        """Why not all dimensions are dynamic that were to be."""

    @cached_property
    def exported(self) -> ExportedProgram:
        if isinstance(self.model, ExportedProgram):
            return self.model
        if self.failure is not None:
            raise self.failure
        try:
            # Of a copy: what a model keeps of this run is of tensors without values.
            model = models.apart(self.model)
            program, self.narrower = export(model, self.args, self.kwargs, self.varying)
        except Exception as error:
            self.failure = error
            raise
        return program

    @cached_property
    def path(self) -> AtenGraph:
        assert isinstance(self.model, nn.Module)
        with evaluating(self.model), quiet():
            return self._named(trace_path(self.model, self.args, self.kwargs))

    def _named(self, graph: AtenGraph) -> AtenGraph:
        """A graph with the user's names of its inputs."""
        if not isinstance(self.model, nn.Module):
            return graph
        names = iter(trees.input_names(self.model.forward, self.args, self.kwargs))
        sources = tuple((kind, next(names, name) if kind == "input" else name) for kind, name in graph.sources)
        return replace(graph, sources=sources)

    @cached_property
    def analysed(self) -> AtenGraph:
        """The graph to analyse: all that the model may do, or, where torch.export fails or leaves sizes open that
        depend on values, what it does here."""
        try:
            with quiet():
                graph = self._named(AtenGraph.of(self.exported.run_decompositions({})))
            return graph if isinstance(self.model, ExportedProgram) or not graph.has_open_sizes else self.path
        except Exception as error:
            if isinstance(self.model, ExportedProgram):
                raise
            logger.debug("torch.export failed", exc_info=True)
            try:
                return self.path
            except Exception as second:
                raise CaptureError(
                    f"{type(self.model).__name__} cannot be analysed. torch.export: {_first_line(error)} | "
                    f"make_fx: {_first_line(second)}. Pass example inputs that the model accepts as args and kwargs."
                ) from second

    @cached_property
    def varied(self) -> tuple[Mapping[str, Tensor], Any]:
        """Values of the model's parameters and buffers other than its own, and its outputs with these."""
        assert isinstance(self.model, nn.Module)
        own = models.tensors(self.model)
        first = first_names(own)
        seeds = {name: seed for seed, name in enumerate(own)}

        def other(name: str) -> Tensor:
            name = first[name]
            return other_values(own[name], torch.Generator().manual_seed(seeds[name])).to(own[name].dtype)

        values = OnDemand(own, other)
        return values, self.outputs(self.model, values)

    def outputs(self, model: nn.Module, values: Mapping[str, Tensor]) -> Any:
        """The outputs of a model, or of a trace of it, with other values of its tensors."""
        light = with_stand_ins(model)
        with fill(models.tensors(light, keep_vars=True), values) as filled:
            return filled.with_values(models.run(light, self.args, self.kwargs))


def _skeleton(views: _Views) -> tuple[fx.GraphModule, str]:
    model = views.model
    if isinstance(model, ExportedProgram):
        module = model.module()
        return emitted(module, write_out_guards(_as_graph_module(module)), module), "exported program"
    if isinstance(model, fx.GraphModule):
        return duplicate(model, models.shared(model)).eval(), "kept"
    routes: dict[str, Callable[[nn.Module], fx.GraphModule]] = {
        "symbolic_trace": lambda model: _emitted(views, model, trace_symbolically),
        "torch.export": lambda model: _emitted(views, model, None),
        "symbolic_trace (leaf modules)": lambda model: _emitted(views, model, trace_around),
        "whole": lambda model: _whole(views, model),
    }
    failures = []
    for name, route in routes.items():
        try:
            with evaluating(model), quiet():
                module = route(models.apart(model))  # Parameters are not copied: no route changes them.
                _check_same(views, module)
        except Exception as error:
            logger.debug("%s did not capture %s", name, type(model).__name__, exc_info=True)
            failures.append(f"{name}: {type(error).__name__}: {_first_line(error)}")
            continue
        if name == "torch.export" and has_fixed_batch(views.exported):
            name = "torch.export (fixed batch)"
        if name == "whole":
            logger.warning(
                "%s could not be traced (%s). The GraphModule calls it as one module of its class.%s",
                type(model).__name__,
                shorten(failures[1], 300),
                _what_is_fixed(views),
            )
        return module, name
    raise CaptureError(
        f"{type(model).__name__} could not be captured as a graph. "
        + " | ".join(failures)
        + ". Pass example inputs that the model accepts as args and kwargs; if its code depends on the values of "
        "tensors, capture the part that does not."
    )


def _whole(views: _Views, model: nn.Module) -> fx.GraphModule:
    if not views.args and not views.kwargs:
        raise ValueError("there are no example inputs to run it on")
    return Whole(model)


def _emitted(views: _Views, model: nn.Module, trace: Callable[[nn.Module], Traced] | None) -> fx.GraphModule:
    """A copy of the model as a GraphModule, by a trace of it or as torch.export has it.

    In training mode it does what the model does then: this is told by the same trace in training mode, or by the ops
    that run then.
    """
    if trace is None:
        source: nn.Module = views.exported.module()
        graph = write_out_guards(_as_graph_module(source))
    else:
        graph, source = trace(model)
    if is_told(graph):
        # A trace by running it may write into its parameters: it writes into copies, made as long as they are used.
        own, trained = models.tensors(model), with_stand_ins(model)
        models.switch(trained, True)
        try:
            with fill(models.tensors(trained, keep_vars=True), OnDemand(own, lambda name: own[name].clone())):
                if trace is None:
                    follow_training(graph, trace_ops(trained, *at_least_two(views.args, views.kwargs)))
                else:
                    follow_training(graph, trace(trained)[0])
        except Exception:
            logger.debug("%s could not be traced in training mode", type(model).__name__, exc_info=True)
    return emitted(model, graph, source)


def _what_is_fixed(views: _Views) -> str:
    """What of a model the analysis takes as it is in the example, where it follows the path of that, as a sentence."""
    try:
        graph = views.analysed
    except CaptureError:
        return ""  # Whoever needs the analysis is told.
    if graph.exported is not None:
        return ""
    names = fixed_inputs(find_reads(graph))
    values = f", and whatever depends on the values of {', '.join(map(repr, names))}" if names else ""
    return f" Its analysis follows the path that the example takes: fixed are the sizes of all inputs{values}."


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def _as_graph_module(module: nn.Module) -> fx.GraphModule:
    assert isinstance(module, fx.GraphModule)
    return module


def _check_same(views: _Views, module: nn.Module) -> None:
    """A trace may have baked in what it should not have, such as values of parameters and buffers: compares outputs for
    others, where there are inputs to do so."""
    model = views.model
    assert isinstance(model, nn.Module)
    if (not views.args and not views.kwargs) or any(t.is_meta for t in models.tensors(model).values()):
        return
    values, expected = views.varied
    open_outputs(model, expected)
    got = views.outputs(module, values)
    if pytree.tree_structure(expected) != pytree.tree_structure(got):
        names = type(got).__name__, type(expected).__name__
        raise TypeError(f"the outputs are a {names[0]}, and not a {names[1]} as the model's")
    for a, b in zip(pytree.tree_leaves(expected), pytree.tree_leaves(got), strict=True):
        if isinstance(a, Tensor):
            torch.testing.assert_close(b, a, equal_nan=True)


def other_values(tensor: Tensor, generator: torch.Generator) -> Tensor:
    """Values near those of a tensor, none of them equal, in at least single precision; positive ones stay positive, as
    variances must."""
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return tensor

    def other(value: Tensor) -> Tensor:
        noise = torch.rand(value.shape, generator=generator).to(value.device)
        return torch.where(value == 0, 0.01 * noise, value * (1 + 0.1 * noise))

    return by_pieces(other, tensor.detach(), torch.promote_types(tensor.dtype, torch.float32))

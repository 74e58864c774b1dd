"""Capture: from a module to the GraphModule that is emitted and the ATen graph that is analysed."""

from __future__ import annotations

import copy
import inspect
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from functools import cached_property
from textwrap import shorten
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram
from torch.utils import _pytree as pytree

from fxmerge import models, trees
from fxmerge.errors import CaptureError, OptionError
from fxmerge.program import AtenGraph, Program, quiet
from fxmerge.reads import find_reads, fixed_inputs
from fxmerge.tracing import trace_around, trace_path

logger = logging.getLogger(__name__)

Args = tuple[Any, ...]
Kwargs = Mapping[str, Any]


def capture(model: nn.Module | ExportedProgram, args: Args = (), kwargs: Kwargs | None = None) -> fx.GraphModule:
    """Captures a model as a GraphModule that computes the same function.

    A GraphModule is kept as it is; else `torch.fx.symbolic_trace` is tried, which keeps the code
    readable, then `torch.export` with a dynamic batch dimension, then symbolic tracing around the submodules that
    cannot be traced. What depends on the values of its inputs is captured along the path that the example takes.

    Arguments:
        model: any module, GraphModule or ExportedProgram; it is not modified.
        args: example inputs, as the model's forward takes them. Needed unless the model is a GraphModule.
        kwargs: example inputs by keyword.

    Returns:
        A GraphModule in eval mode, with parameter names as in the model and copies of its tensors.

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
        return _skeleton(views)[0]


def capture_program(model: nn.Module | ExportedProgram, args: Args = (), kwargs: Kwargs | None = None) -> Program:
    """Captures both the GraphModule to emit and the graph to analyse.

    Raises:
        CaptureError: if no route captures the model, or torch.export cannot.
        OptionError: if the model or its inputs are none.
    """
    model, args, kwargs = _given(model, args, kwargs)
    if isinstance(model, ExportedProgram) and not args and not kwargs and model.example_inputs is not None:
        args, kwargs = model.example_inputs
    # How the example lies in memory is not to become a condition on all inputs.
    args, kwargs = pytree.tree_map(lambda v: v.contiguous() if isinstance(v, Tensor) else v, (tuple(args), kwargs))
    views = _Views(model, args, kwargs)
    with _tracing(model):
        module, route = _skeleton(views)
        return Program(module, views.analysed, route)


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

    def __init__(self, model: nn.Module | ExportedProgram, args: Args, kwargs: Kwargs) -> None:
        self.model, self.args, self.kwargs = model, args, kwargs
        self.failure: Exception | None = None

    @cached_property
    def exported(self) -> ExportedProgram:
        if isinstance(self.model, ExportedProgram):
            return self.model
        if self.failure is not None:
            raise self.failure
        try:
            return _export(self.model, self.args, self.kwargs)
        except Exception as error:
            self.failure = error
            raise

    @cached_property
    def path(self) -> tuple[fx.GraphModule, AtenGraph]:
        assert isinstance(self.model, nn.Module)
        with evaluating(self.model), quiet():
            module, graph = trace_path(self.model, self.args, self.kwargs)
        return module, self._named(graph)

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
            return graph if isinstance(self.model, ExportedProgram) or not graph.has_open_sizes else self.path[1]
        except Exception as error:
            if isinstance(self.model, ExportedProgram):
                raise
            logger.debug("torch.export failed", exc_info=True)
            try:
                return self.path[1]
            except Exception as second:
                raise CaptureError(
                    f"{type(self.model).__name__} cannot be analysed. torch.export: {_first_line(error)} | "
                    f"make_fx: {_first_line(second)}. Pass example inputs that the model accepts as args and kwargs."
                ) from second


def _skeleton(views: _Views) -> tuple[fx.GraphModule, str]:
    model = views.model
    if isinstance(model, ExportedProgram):
        return copy.deepcopy(_as_graph_module(model.module())), "exported program"
    if isinstance(model, fx.GraphModule):
        return copy.deepcopy(model).eval(), "kept"
    routes: dict[str, Callable[[], fx.GraphModule]] = {
        "symbolic_trace": lambda: fx.symbolic_trace(copy.deepcopy(model)),
        "torch.export": lambda: _as_graph_module(views.exported.module()),
        "symbolic_trace (leaf modules)": lambda: trace_around(model),
        "make_fx": lambda: views.path[0],
    }
    failures = []
    for name, route in routes.items():
        try:
            with evaluating(model), quiet():
                module = route()
                _check_same(model, module, views.args, views.kwargs)
        except Exception as error:
            logger.debug("%s did not capture %s", name, type(model).__name__, exc_info=True)
            failures.append(f"{name}: {type(error).__name__}: {_first_line(error)}")
            continue
        if name == "torch.export" and _has_fixed_batch(views.exported):
            name = "torch.export (fixed batch)"
        if name == "make_fx":
            name = "make_fx (path of the example)"
            logger.warning(
                "%s depends on the values of its inputs (%s): the GraphModule follows the path that the example takes. "
                "Fixed are%s. Load its state dict into the original class to run it on other inputs.",
                type(model).__name__,
                failures[1],
                _fixed(views.path[1]),
            )
        return module, name
    raise CaptureError(
        f"{type(model).__name__} could not be captured as a graph. "
        + " | ".join(failures)
        + ". Pass example inputs that the model accepts as args and kwargs; if its code depends on the values of "
        "tensors, capture the part that does not."
    )


def _fixed(graph: AtenGraph) -> str:
    """What is fixed in a graph that follows the path of an example."""
    names = fixed_inputs(find_reads(graph))
    values = f" and whatever depends on values of {', '.join(map(repr, names))}" if names else ""
    return f" the sizes of all inputs{values}"


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def _as_graph_module(module: nn.Module) -> fx.GraphModule:
    assert isinstance(module, fx.GraphModule)
    return module


def _check_same(model: nn.Module, module: nn.Module, args: Args, kwargs: Kwargs) -> None:
    """A trace may have baked in what it should not have: compare outputs, where there are inputs to do so."""
    if (not args and not kwargs) or any(t.is_meta for t in models.tensors(model).values()):
        return
    expected, got = (models.run(m, args, kwargs) for m in (model, module))
    open_outputs(model, expected)
    if pytree.tree_structure(expected) != pytree.tree_structure(got):
        raise TypeError(f"the outputs are a {type(got).__name__}, and not a {type(expected).__name__} as the model's")
    for a, b in zip(pytree.tree_leaves(expected), pytree.tree_leaves(got), strict=True):
        if isinstance(a, Tensor):
            torch.testing.assert_close(b, a, equal_nan=True)


def _export(model: nn.Module, args: Args, kwargs: Kwargs) -> ExportedProgram:
    """Exports with a dynamic batch dimension, or, where that fails, at the shapes of the example."""
    failures = []
    with evaluating(model):
        for dynamic in (True, False):
            example = _at_least_two(args, kwargs) if dynamic else (args, dict(kwargs))
            try:
                shapes = trees.dynamic_shapes(example, _batch_dim) if dynamic else (None, None)
                with torch.no_grad(), quiet():
                    program = torch.export.export(
                        model,
                        example[0],
                        example[1],
                        dynamic_shapes=_by_name(model, *shapes) if dynamic else None,
                        strict=False,
                    )
                    if dynamic:
                        program.module()(*args, **kwargs)  # Refuses a batch size that was baked in.
                    return program
            except Exception as error:
                logger.debug("torch.export failed (dynamic batch: %s)", dynamic, exc_info=True)
                failures.append(error)
    raise CaptureError(
        f"torch.export cannot capture {type(model).__name__}: {shorten(str(failures[-1]), 400)}"
    ) from failures[-1]


def _has_fixed_batch(program: ExportedProgram) -> bool:
    """Whether no input has a dynamic batch dimension, though some could have."""
    names = set(program.graph_signature.user_inputs)
    values = [n.meta["val"] for n in program.graph.find_nodes(op="placeholder") if n.name in names]
    sizes = [v.shape[0] for v in values if isinstance(v, Tensor) and v.ndim]
    return bool(sizes) and all(isinstance(s, int) or s.node.maybe_as_int() is not None for s in sizes)


def _by_name(model: nn.Module, args: Any, kwargs: Any) -> Any:
    """Dynamic shapes as torch.export wants them: one entry for each argument, by name where given by name."""
    if not kwargs:
        return tuple(args)
    names = list(inspect.signature(model.forward).parameters)
    return dict(zip(names, args, strict=False)) | dict(kwargs)


def _batch_dim(value: Any) -> Any:
    return {0: Dim.AUTO} if isinstance(value, Tensor) and value.ndim else None


def _at_least_two(args: Args, kwargs: Kwargs) -> tuple[Args, dict[str, Any]]:
    """The example with a batch of one doubled, since torch.export takes a size of one for a constant."""
    leaves, spec = pytree.tree_flatten((tuple(args), dict(kwargs)))
    tensors = [v for v in leaves if isinstance(v, Tensor) and v.ndim]
    if tensors and all(t.shape[0] == 1 for t in tensors):
        leaves = [torch.cat([v, v]) if isinstance(v, Tensor) and v.ndim else v for v in leaves]
    doubled: tuple[Args, dict[str, Any]] = pytree.tree_unflatten(leaves, spec)
    return doubled


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in eval mode for a while, every submodule put back as it was.

    What modules have derived from their parameters in eval mode and kept, they drop when they are trained; so they
    are for a moment, before and after: what a capture leaves behind is of no use to anyone.
    """
    modes = [(m, m.training) for m in model.modules()]
    models.switch(model, True)
    models.switch(model, False)
    try:
        yield
    finally:
        models.switch(model, True)
        for module, training in modes:
            module.training = training

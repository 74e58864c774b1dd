"""Capture: from a module to the GraphModule that is emitted and the ATen graph that is analysed."""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._decomp import get_decompositions
from torch.export import Dim, ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind
from torch.utils import _pytree as pytree

from fxmerge.errors import CaptureError

logger = logging.getLogger(__name__)

Args = tuple[Any, ...]
Kwargs = Mapping[str, Any]


@dataclass(frozen=True)
class Program:
    """A captured model: what is emitted, and what is analysed, tied by parameter name.

    Attributes:
        module: the GraphModule to rewrite.
        graph: the ATen graph to analyse; its placeholders are parameters, buffers, constants and inputs.
        exported: the exported program that `graph` belongs to.
        route: how `module` was captured.
        parameters: the tensors that may be permuted: parameters and persistent floating-point buffers,
            each storage under one name.
        aliases: every name of such a tensor, mapped to the name that stands for it.
        constants: all other tensors of the program.
    """

    module: fx.GraphModule
    exported: ExportedProgram
    route: str
    parameters: Mapping[str, Tensor]
    aliases: Mapping[str, str]
    constants: Mapping[str, Any]

    @property
    def graph(self) -> fx.GraphModule:
        graph: fx.GraphModule = self.exported.graph_module
        return graph

    def decompose(self, ops: Iterable[Any]) -> Program | None:
        """The program with some ops written out in simpler ones; None where torch cannot do so."""
        table = get_decompositions(list(ops))
        if not table:
            return None
        with _quiet():
            return replace(self, exported=self.exported.run_decompositions(dict(table)))

    def source(self, node: fx.Node) -> tuple[str, str]:
        """What a placeholder stands for: ("parameter" | "constant" | "input", name)."""
        spec = next(s for s in self.exported.graph_signature.input_specs if s.arg.name == node.name)
        if spec.kind is InputKind.USER_INPUT:
            return "input", node.name
        name = str(spec.target)
        return ("parameter", self.aliases[name]) if name in self.aliases else ("constant", name)

    def outputs(self, node: fx.Node) -> Iterator[fx.Node]:
        """The nodes that the user sees as outputs."""
        specs = self.exported.graph_signature.output_specs
        for arg, spec in zip(node.args[0], specs, strict=True):  # type: ignore[arg-type]
            if isinstance(arg, fx.Node) and spec.kind is OutputKind.USER_OUTPUT:
                yield arg


def capture(model: nn.Module | ExportedProgram, args: Args = (), kwargs: Kwargs | None = None) -> fx.GraphModule:
    """Captures a model as a GraphModule that computes the same function.

    A GraphModule is kept as it is; else `torch.fx.symbolic_trace` is tried, which keeps the code
    readable, then `torch.export` with a dynamic batch dimension.

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
    return _skeleton(model, args, dict(kwargs or {}), _Exported(model, args, dict(kwargs or {})))[0]


def capture_program(model: nn.Module | ExportedProgram, args: Args = (), kwargs: Kwargs | None = None) -> Program:
    """Captures both the GraphModule to emit and the graph to analyse.

    Raises:
        CaptureError: if no route captures the model, or torch.export cannot.
    """
    kwargs = dict(kwargs or {})
    if isinstance(model, ExportedProgram) and not args and not kwargs and model.example_inputs is not None:
        args, kwargs = model.example_inputs
    lazily = _Exported(model, args, kwargs)
    module, route = _skeleton(model, args, kwargs, lazily)
    exported = lazily.program
    with _quiet():
        exported = exported.run_decompositions({})
    parameters: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    by_storage: dict[Any, str] = {}
    constants: dict[str, Any] = dict(exported.constants)
    for name, tensor in exported.state_dict.items():
        if tensor.is_floating_point() or tensor.is_complex():
            aliases[name] = by_storage.setdefault(_identity(tensor), name)
            parameters.setdefault(aliases[name], tensor)
        else:
            constants[name] = tensor
    return Program(module, exported, route, parameters, aliases, constants)


def _identity(tensor: Tensor) -> Any:
    """Equal for two tensors that are the same view of the same memory."""
    storage = tensor.untyped_storage()
    return storage._cdata, tensor.storage_offset(), tuple(tensor.shape), tensor.stride()


class _Exported:
    """A model exported at most once, when first asked for."""

    def __init__(self, model: nn.Module | ExportedProgram, args: Args, kwargs: Kwargs) -> None:
        self.model, self.args, self.kwargs = model, args, kwargs

    @cached_property
    def program(self) -> ExportedProgram:
        if isinstance(self.model, ExportedProgram):
            return self.model
        return _export(self.model, self.args, self.kwargs)


def _skeleton(
    model: nn.Module | ExportedProgram, args: Args, kwargs: Kwargs, exported: _Exported
) -> tuple[fx.GraphModule, str]:
    if isinstance(model, ExportedProgram):
        return copy.deepcopy(_as_graph_module(model.module())), "exported program"
    if isinstance(model, fx.GraphModule):
        return copy.deepcopy(model).eval(), "kept"
    routes: dict[str, Callable[[], fx.GraphModule]] = {
        "symbolic_trace": lambda: fx.symbolic_trace(copy.deepcopy(model).eval()),
        "torch.export": lambda: _as_graph_module(exported.program.module()),
    }
    failures = []
    for name, route in routes.items():
        try:
            with _quiet():
                module = route()
                _check_same(model, module, args, kwargs)
            fixed = name == "torch.export" and _has_fixed_batch(exported.program)
            return module, f"{name} (fixed batch)" if fixed else name
        except Exception as error:
            logger.debug("%s did not capture %s", name, type(model).__name__, exc_info=True)
            failures.append(
                f"{name}: {type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
            )
    raise CaptureError(
        f"{type(model).__name__} could not be captured as a graph. "
        + " | ".join(failures)
        + ". Pass example inputs that the model accepts as args and kwargs; if it branches on the values of tensors, "
        "capture the part that does not."
    )


def _as_graph_module(module: nn.Module) -> fx.GraphModule:
    assert isinstance(module, fx.GraphModule)
    return module


def _check_same(model: nn.Module, module: nn.Module, args: Args, kwargs: Kwargs) -> None:
    """A trace may have baked in what it should not have: compare outputs, where there are inputs to do so."""
    if (not args and not kwargs) or any(p.is_meta for p in model.parameters()):
        return  # On the meta device there are no values; a model may not even run on it, though it can be exported.
    outputs = []
    for m in (model, module):
        with torch.no_grad(), evaluating(model), torch.random.fork_rng(devices=()):
            torch.manual_seed(0)  # What draws random numbers, draws the same ones.
            outputs.append(m(*args, **kwargs))
    expected, got = outputs
    for a, b in zip(pytree.tree_leaves(expected), pytree.tree_leaves(got), strict=True):
        if isinstance(a, Tensor):
            torch.testing.assert_close(b, a, equal_nan=True)


def _export(model: nn.Module, args: Args, kwargs: Kwargs) -> ExportedProgram:
    """Exports with a dynamic batch dimension, or, where that fails, at the shapes of the example."""
    failures = []
    with evaluating(model):
        for dynamic in (True, False):
            example = _at_least_two(args, kwargs) if dynamic else (args, dict(kwargs))
            shapes = pytree.tree_map(_batch_dim, example) if dynamic else (None, None)
            try:
                with torch.no_grad(), _quiet():
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
    raise CaptureError(f"torch.export cannot capture {type(model).__name__}: {failures[-1]}") from failures[-1]


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
    import inspect

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
    """The model in eval mode for a while, every submodule put back as it was."""
    modes = [(m, m.training) for m in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the warnings that capture by other libraries' means gives about their own internals."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield

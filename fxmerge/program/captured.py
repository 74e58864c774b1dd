"""A captured model: what is emitted, and what is analysed, tied by parameter name."""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx
from torch._decomp import get_decompositions
from torch.export import ExportedProgram, default_decompositions
from torch.export.graph_signature import InputKind, OutputKind
from torch.utils import _pytree as pytree

logger = logging.getLogger(__name__)

Source = tuple[str, str]
"""What a placeholder stands for: ("parameter" | "constant" | "input", name)."""


_SIZES = ("aten::sym_size", "aten::sym_numel", "aten::sym_stride")


@dataclass(frozen=True)
class AtenGraph:
    """A functional graph of ATen ops in which every node's `meta["val"]` tells shape and dtype.

    Attributes:
        module: the graph; its placeholders are parameters, buffers, constants and inputs.
        sources: what each placeholder stands for, with the names of the model's state dict.
        outputs: for every result of the graph, whether it is an output that the user sees.
        inputs: how the inputs are nested in (args, kwargs).
        state: the tensors of the model's state dict.
        constants: the values of all other placeholders that are not inputs.
        example: the inputs that it was captured with, as (args, kwargs).
        exported: the exported program that the graph is from, if it is from one.
        out: how the outputs that the user sees are nested, if that is known.
    """

    module: fx.GraphModule
    sources: tuple[Source, ...]
    outputs: tuple[bool, ...]
    inputs: pytree.TreeSpec
    state: Mapping[str, Tensor]
    constants: Mapping[str, Any]
    example: Any = None
    exported: ExportedProgram | None = None
    out: pytree.TreeSpec | None = None

    @classmethod
    def of(cls, exported: ExportedProgram) -> AtenGraph:
        """The graph of an exported program."""
        sources = tuple(
            ("input", spec.arg.name) if spec.kind is InputKind.USER_INPUT else ("parameter", str(spec.target))
            for spec in exported.graph_signature.input_specs
        )
        outputs = tuple(spec.kind is OutputKind.USER_OUTPUT for spec in exported.graph_signature.output_specs)
        spec, state, constants = exported.call_spec.in_spec, exported.state_dict, exported.constants
        example = exported.example_inputs
        out = exported.call_spec.out_spec
        return cls(exported.graph_module, sources, outputs, spec, state, constants, example, exported, out)

    @cached_property
    def has_open_sizes(self) -> bool:
        """Whether the size of some tensor, or some number, depends on the values of the inputs."""
        values = pytree.tree_leaves([n.meta.get("val") for n in self.module.graph.nodes])
        sizes = [s for v in values for s in (v.shape if isinstance(v, Tensor) else [v])]
        return any(isinstance(s, (torch.SymInt, torch.SymFloat, torch.SymBool)) and s.node.hint is None for s in sizes)

    @cached_property
    def guards(self) -> Callable[..., Any]:
        """Takes the inputs, one by one; raises an AssertionError where the graph is not made for their sizes."""
        checked = None if self.exported is None else getattr(self.exported.module(), "_guards_fn", None)
        return (lambda *leaves: None) if checked is None else checked

    def decompose(self, ops: Iterable[Any]) -> AtenGraph | None:
        """The graph with some ops written out in simpler ones, where torch can do so; None where it can for none."""
        if self.exported is None:
            return None
        ops, composite = set(ops), default_decompositions()
        table = get_decompositions(list(ops))
        # Ops that torch composes of others, such as recurrent cells, have no entry there.
        table |= {op: composite[op] for op in ops - table.keys() if op in composite}
        program = _run_decompositions(self.exported, table)
        if program is None:  # One that fails does not stop the others.
            program = self.exported
            for op, written_out in table.items():
                program = _run_decompositions(program, {op: written_out}) or program
        return None if program is self.exported else AtenGraph.of(program)


@dataclass(frozen=True)
class Program:
    """A captured model.

    Attributes:
        module: the GraphModule to rewrite.
        aten: the graph to analyse.
        route: how `module` was captured.
        why_fixed: why some sizes of inputs have to be as in the example, if any have to.
    """

    module: fx.GraphModule
    aten: AtenGraph
    route: str
    why_fixed: str = "the model computes with this size as with a constant"

    @property
    def graph(self) -> fx.GraphModule:
        return self.aten.module

    @property
    def follows_path(self) -> bool:
        """Whether the graph to analyse holds for the path of the example only, with branches taken and sizes fixed."""
        return self.aten.exported is None

    @cached_property
    def aliases(self) -> Mapping[str, str]:
        """Every name of a tensor that may be permuted (parameters and persistent floating-point buffers),
        mapped to the one name that stands for its memory."""
        first: dict[Any, str] = {}
        return {
            name: first.setdefault(_identity(tensor), name)
            for name, tensor in self.aten.state.items()
            if tensor.is_floating_point() or tensor.is_complex()
        }

    @cached_property
    def parameters(self) -> Mapping[str, Tensor]:
        """The tensors that may be permuted, each memory under one name."""
        return {name: self.aten.state[name] for name in dict.fromkeys(self.aliases.values())}

    @cached_property
    def constants(self) -> Mapping[str, Any]:
        """All other tensors of the program."""
        return {**self.aten.constants, **{n: t for n, t in self.aten.state.items() if n not in self.aliases}}

    @cached_property
    def sources(self) -> Mapping[fx.Node, Source]:
        """What each placeholder of the graph stands for, under the names of `parameters` and `constants`."""
        placeholders: Sequence[fx.Node] = self.graph.graph.find_nodes(op="placeholder")
        return {n: self._named(*source) for n, source in zip(placeholders, self.aten.sources, strict=True)}

    def _named(self, kind: str, name: str) -> Source:
        if kind != "parameter":
            return kind, name
        return ("parameter", self.aliases[name]) if name in self.aliases else ("constant", name)

    @cached_property
    def derived(self) -> frozenset[fx.Node]:
        """The nodes that depend on parameters and constants alone."""
        found: set[fx.Node] = set()
        for node in self.graph.graph.nodes:
            if node.op == "placeholder":
                given = self.sources[node][0] != "input"
            else:
                random = torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
                given = node.op != "output" and not random and found.issuperset(node.all_input_nodes)
            if given:
                found.add(node)
        return frozenset(found)

    @cached_property
    def sized(self) -> frozenset[fx.Node]:
        """The nodes that depend on parameters, constants and the sizes of inputs alone, such as the embeddings of
        positions."""
        found = set(self.derived)
        for node in self.graph.graph.nodes:
            name = getattr(getattr(node.target, "_schema", None), "name", "")
            random = torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
            known = found.issuperset(node.all_input_nodes) and not random
            if name in _SIZES or (known and node.op not in ("placeholder", "output")):
                found.add(node)
        return frozenset(found)

    @cached_property
    def of_parameters(self) -> frozenset[fx.Node]:
        """The nodes that depend on parameters."""
        return self.depending_on(self.parameters)

    def depending_on(self, names: Collection[str]) -> frozenset[fx.Node]:
        """The nodes that depend on some parameters."""
        found: set[fx.Node] = set()
        for node in self.graph.graph.nodes:
            kind, name = self.sources.get(node, ("", ""))
            if (kind == "parameter" and name in names) or not found.isdisjoint(node.all_input_nodes):
                found.add(node)
        return frozenset(found)

    @cached_property
    def learnt(self) -> frozenset[fx.Node]:
        """The activations that depend on parameters and on what the inputs hold."""
        return self.of_parameters - self.sized

    @cached_property
    def answers(self) -> tuple[fx.Node, ...]:
        """The activations that depend on parameters and that the user sees as outputs, each once."""
        (output,) = (node for node in self.graph.graph.nodes if node.op == "output")
        seen = dict.fromkeys(self.outputs(output))
        return tuple(node for node in seen if node in self.learnt and _is_number(node.meta.get("val")))

    def outputs(self, node: fx.Node) -> Iterator[fx.Node]:
        """The nodes that the user sees as outputs."""
        return (own for _, own in self.numbered_outputs(node))

    def numbered_outputs(self, node: fx.Node) -> Iterator[tuple[int, fx.Node]]:
        """The nodes that the user sees as outputs, each with its number among all outputs."""
        seen = [arg for arg, seen in zip(node.args[0], self.aten.outputs, strict=True) if seen]  # type: ignore[arg-type]
        return ((i, arg) for i, arg in enumerate(seen) if isinstance(arg, fx.Node))


def _run_decompositions(program: ExportedProgram, table: Mapping[Any, Any]) -> ExportedProgram | None:
    """The program with the ops of a table written out; None where there are none, or torch fails."""
    if not table:
        return None
    try:
        with quiet():
            simpler: ExportedProgram = program.run_decompositions(dict(table))
            # Written out, an op that checks its result takes a token of effects. No model is given one.
            kinds = {spec.kind for spec in simpler.graph_signature.input_specs}
            return None if InputKind.TOKEN in kinds else simpler
    except Exception:
        logger.debug("torch cannot write out %s", ", ".join(map(str, table)), exc_info=True)
        return None


def _identity(tensor: Tensor) -> Any:
    """Equal for two tensors that are the same view of the same memory."""
    storage = tensor.untyped_storage()
    return storage._cdata, tensor.storage_offset(), tuple(tensor.shape), tensor.stride()


@contextmanager
def quiet() -> Iterator[None]:
    """Without what torch says of its own internals in warnings and, where it fails, prints: a graph of many pages."""
    with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


def _is_number(value: object) -> bool:
    return isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())

"""Values that a forward reads while it runs: by these it chooses its path, and a graph of the path cannot follow."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.overrides import TorchFunctionMode

from fxmerge.program.captured import AtenGraph

aten = torch.ops.aten

LENGTHS = {aten._pack_padded_sequence.default: 1}
"""Ops whose kernels read the values of an operand to choose what to do, and the number of the operand."""


class Noted(TorchFunctionMode):
    """Leaves an `alias` in the trace, which nothing uses, of every tensor that becomes Python numbers or an array."""

    readers = (Tensor.tolist, Tensor.numpy, Tensor.__array__)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in self.readers:
            aten.alias.default(args[0])
        return func(*args, **(kwargs or {}))


@dataclass(frozen=True)
class Read:
    """A value that was read.

    Attributes:
        node: the node that shows it: its own result, or that of an operand.
        inputs: the inputs that it depends on, under the user's names.
        learnt: whether it depends on parameters too.
        size: whether only its size is read, which depends on values.
    """

    node: fx.Node
    inputs: tuple[str, ...]
    learnt: bool
    size: bool

    def __str__(self) -> str:
        """Such as `the values of input 'lengths'`, or `the result of max from input 'x' and parameters`."""
        names = ", ".join(map(repr, self.inputs))
        source = f"input {names}" if len(self.inputs) == 1 else f"inputs {names}" if names else ""
        if self.node.op == "placeholder":
            return f"the values of {source}"
        source = " and ".join([part for part in (source, "parameters" if self.learnt else "") if part])
        what = "the size of" if self.size else "the"
        return f"{what} result of {_op_name(self.node)} from {source or 'constants'}"


def find_reads(graph: AtenGraph) -> list[Read]:
    """The values that were read on the path that a graph follows, each once.

    A size may depend on values as well: results of ops such as `nonzero` count as read.
    """
    nodes = graph.module.graph.nodes
    placeholders = [n for n in nodes if n.op == "placeholder"]
    sources = dict(zip(placeholders, graph.sources, strict=True))
    roots: dict[fx.Node, frozenset[fx.Node]] = {n: frozenset([n]) for n in placeholders}
    reads: dict[fx.Node, Read] = {}
    for node in nodes:
        if node.op == "placeholder":
            continue
        roots[node] = frozenset().union(*(roots[n] for n in _operands(node)))
        read, size = _read(node)
        if read is not None and not (size and read in reads):
            found = [sources[n] for n in placeholders if n in roots[read]]
            inputs = tuple(name for kind, name in found if kind == "input")
            reads[read] = Read(read, inputs, any(kind == "parameter" for kind, _ in found), size)
    return list(reads.values())


def _operands(node: fx.Node) -> Sequence[fx.Node]:
    """The nodes that a node depends on: of a packed sequence, how many steps go together, on the lengths alone."""
    packed = node.args[0] if node.target is operator.getitem else None
    if isinstance(packed, fx.Node) and packed.target in LENGTHS and node.args[1] == 1:
        lengths = packed.args[LENGTHS[packed.target]]
        assert isinstance(lengths, fx.Node)
        return [lengths]
    return node.all_input_nodes


def _read(node: fx.Node) -> tuple[fx.Node | None, bool]:
    """The node whose value a node reads, or itself if its size depends on values; and whether only the size is read."""
    tags: Sequence[Any] = getattr(node.target, "tags", ())
    operand: Any = None
    if node.target in LENGTHS:
        operand = node.args[LENGTHS[node.target]]
    elif node.target is aten._local_scalar_dense.default or (node.target is aten.alias.default and not node.users):
        operand = node.args[0]
    elif torch.Tag.data_dependent_output in tags:
        return node, False
    elif torch.Tag.dynamic_output_shape in tags and not _is_gather(node):
        return node, True
    return (operand if isinstance(operand, fx.Node) else None), False


def _is_gather(node: fx.Node) -> bool:
    """Whether an op with a tag of its own for masks is given numbers of places here, and no mask."""
    if node.target is not aten.index.Tensor:
        return False
    indices: Any = node.args[1]
    return all(not isinstance(i, fx.Node) or i.meta["val"].dtype not in (torch.bool, torch.uint8) for i in indices)


def _op_name(node: fx.Node) -> str:
    while "getitem" in str(node.target) and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return str(getattr(node.target, "overloadpacket", node.target)).removeprefix("aten.")


def fixed_inputs(reads: Sequence[Read]) -> list[str]:
    """The names of all inputs that some value read depends on."""
    return list(dict.fromkeys(name for read in reads for name in read.inputs))

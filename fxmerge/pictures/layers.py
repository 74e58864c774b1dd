"""The layers of a graph, and which of them read which: what a picture of a network shows."""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import takewhile

import torch
from torch import fx, nn

INPUT, OUTPUT = "input", "output"


@dataclass(frozen=True)
class Layer:
    """One node of the picture: a layer, an op that joins several values, an input or the output.

    Attributes:
        name: of the module that holds the parameters, or of the graph node where there are none.
        op: the class of the module, or the name of the op.
        parameters: the names of its parameters and buffers, as in the state dict.
        inputs: the numbers of the nodes that it reads.
    """

    name: str
    op: str
    parameters: tuple[str, ...] = ()
    inputs: tuple[int, ...] = ()


@dataclass
class _Drawing:
    """The nodes so far, and for every graph node from which of them its value comes and of which parameters it is."""

    layers: list[Layer] = field(default_factory=list)
    sources: dict[fx.Node, tuple[int, ...]] = field(default_factory=dict)
    made_of: dict[fx.Node, tuple[str, ...]] = field(default_factory=dict)

    def add(self, node: fx.Node, layer: Layer) -> None:
        self.layers.append(layer)
        self.sources[node] = (len(self.layers) - 1,)

    def continues(self, parameters: Sequence[str], inputs: Sequence[int]) -> bool:
        """Whether an op is part of the last layer: it reads that alone, and its parameters lie in the same module."""
        last = len(self.layers) - 1
        return (
            bool(parameters)
            and tuple(inputs) == (last,)
            and bool(self.layers[last].parameters)
            and _module(self.layers[last].parameters) == _module(parameters)
        )


def layers_of(module: fx.GraphModule) -> tuple[Layer, ...]:
    """The layers of a graph, in its order.

    An op without parameters is left out if its value comes from one node only, such as an activation function. Ops that
    join several values, such as the sum of a residual connection, are nodes of their own.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
        >>> for layer in layers_of(fx.symbolic_trace(net)):
        ...     print(layer.name, layer.op, layer.parameters, layer.inputs)
        input input () ()
        0 Linear ('0.weight', '0.bias') (0,)
        2 Linear ('2.weight', '2.bias') (1,)
        output output () (2,)
    """
    drawing = _Drawing()
    # Constants, and buffers that no state dict has, hold no units of the network.
    tensors = module.state_dict(keep_vars=True).items()
    values = dict.fromkeys(name for name, t in tensors if t.is_floating_point() or t.is_complex())
    for node in module.graph.nodes:
        inputs = tuple(dict.fromkeys(i for own in node.all_input_nodes for i in drawing.sources.get(own, ())))
        parameters = tuple(dict.fromkeys(_parameters(module, node, values, drawing)))
        if node.op == "placeholder":
            drawing.add(node, Layer(str(node.target), INPUT))
        elif node.op == "get_attr" or not inputs:
            drawing.made_of[node] = parameters
        elif node.op == "output":
            drawing.add(node, Layer(OUTPUT, OUTPUT, (), inputs))
        elif _is_size(node):
            continue
        elif drawing.continues(parameters, inputs):
            last = drawing.layers[-1]
            both = tuple(dict.fromkeys((*last.parameters, *parameters)))
            drawing.layers[-1] = Layer(last.name, last.op, both, last.inputs)
            drawing.sources[node] = inputs
        elif parameters or len(inputs) > 1:
            drawing.add(node, Layer(_name(module, parameters) or node.name, _op(module, node), parameters, inputs))
        else:
            drawing.sources[node] = inputs
    return tuple(drawing.layers)


def _parameters(module: fx.GraphModule, node: fx.Node, values: Collection[str], drawing: _Drawing) -> Iterator[str]:
    """The names of the parameters that a graph node reads, directly or by way of ops on these alone."""
    if node.op == "get_attr":
        yield from [str(node.target)] if node.target in values else []
    if node.op == "call_module":
        start = f"{node.target}."
        yield from (name for name in values if name.startswith(start))
    for own in node.all_input_nodes:
        yield from drawing.made_of.get(own, ())


def _is_size(node: fx.Node) -> bool:
    """Whether a node only tells of the shape of a value."""
    if node.op == "call_method":
        return node.target in ("size", "dim", "numel", "stride")
    if node.op == "call_function":
        op = torch.ops.aten
        return (node.target is getattr and node.args[1] in ("shape", "device", "dtype", "ndim")) or node.target in (
            op.sym_size.int,
            op.sym_size.default,
            op.sym_numel.default,
        )
    return False


def _name(module: fx.GraphModule, parameters: Sequence[str]) -> str:
    """What to call a layer: its module; or its parameter, if that is all of a module with others inside of it."""
    name = _module(parameters)
    if len(parameters) == 1 and name != parameters[0] and any(True for _ in module.get_submodule(name).children()):
        return parameters[0]
    return name


def _module(parameters: Sequence[str]) -> str:
    """The path of the module that holds some parameters, or the name of a parameter that none holds."""
    paths = [name.split(".")[:-1] for name in parameters]
    if not paths:
        return ""
    common = takewhile(lambda parts: len(set(parts)) == 1, zip(*paths, strict=False))
    return ".".join(parts[0] for parts in common) or parameters[0]


def _op(module: fx.GraphModule, node: fx.Node) -> str:
    """What a node does, in a word."""
    if node.op == "call_module":
        inside: nn.Module = module.get_submodule(str(node.target))
        return type(inside).__name__
    if node.op == "call_method":
        return str(node.target)
    if isinstance(node.target, torch._ops.OpOverload):
        return str(node.target.overloadpacket.__name__)
    if node.target in (operator.add, operator.iadd):
        return "add"
    return getattr(node.target, "__name__", str(node.target))

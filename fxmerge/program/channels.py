"""Which entry of a vector belongs to each entry of an activation, followed from op to op through a graph.

A gain multiplies every entry of an activation by one entry of a parameter. An op that only moves entries moves the gain
along with them. What an op moves where is found by running the op itself on whole numbers: the places of the entries of
the parameter. No op needs a rule for this but those that compute.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from fxmerge.program.forms import bind, op_name

INERT, ZERO = -1, -2
"""The numbers of entries that the vector does not touch, and of zeros, such as of padding, which no gain changes."""

VIEWS = frozenset(
    (
        *("t", "transpose", "permute", "view", "_unsafe_view", "slice", "select", "split", "split_with_sizes", "chunk"),
        *("unbind", "unsqueeze", "squeeze", "alias", "detach", "narrow", "swapaxes", "movedim"),
    )
)
"""Ops whose result is a view of their operand."""

MOVES = VIEWS | frozenset(
    (
        *("reshape", "flatten", "unflatten", "expand", "clone", "contiguous", "roll", "flip", "repeat", "unfold"),
        *("pixel_shuffle", "pixel_unshuffle", "channel_shuffle", "numpy_T", "lift_fresh_copy"),
    )
)
"""Ops with one operand that move entries, or copy them, and compute nothing."""

CASTS = frozenset(("_to_copy", "to", "type_as"))

DROPOUTS = frozenset(("dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout"))

SIZES = frozenset(
    (
        *("sym_size", "sym_numel", "sym_stride", "_assert_tensor_metadata"),
        *("zeros_like", "ones_like", "full_like", "empty_like", "new_zeros", "new_ones", "new_full", "new_empty"),
    )
)
"""Ops that read the shape or the dtype of an operand, and no values."""


def is_tensor(node: Any) -> bool:
    return isinstance(node, fx.Node) and isinstance(node.meta.get("val"), Tensor)


def shape_of(node: fx.Node) -> tuple[int, ...]:
    """The shape of what a node computes on the example."""
    return tuple(_number(size) for size in node.meta["val"].shape)


def _number(value: Any) -> Any:
    """A number as it is on the example.

    Raises:
        ValueError: if it depends on the values of the inputs.
    """
    if not isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        return value
    hint = value.node.hint
    if hint is None:
        raise ValueError("the size depends on values")
    return hint


def run(node: fx.Node, values: Mapping[fx.Node, Any]) -> Any:
    """What a node computes if some of its operands have other values. Sizes are those of the example.

    Raises:
        ValueError: if it has another operand that is a tensor.
    """

    def value(operand: fx.Node) -> Any:
        if operand in values:
            return values[operand]
        if is_tensor(operand):
            raise ValueError(f"{node.name} has the operand {operand.name}, whose values are not known")
        return _number(operand.meta["val"])

    target: Any = node.target
    if op_name(node) in ("view", "_unsafe_view") and not any(v.is_contiguous() for v in values.values()):
        target = torch.ops.aten.reshape.default  # The numbers do not lie in memory as the activation does.
    return target(*fx.map_arg(node.args, value), **fx.map_arg(node.kwargs, value))


@dataclass(frozen=True)
class Followed:
    """How a vector goes into what a node computes.

    Attributes:
        ids: for every entry the number of the entry of the vector that belongs to it, or INERT, or ZERO; several
            tensors for an op with several results.
        factor: by what the op multiplies a shift by the vector.
        shift: whether a shift by the vector stays one. A gain always stays one.
    """

    ids: Any
    factor: float = 1.0
    shift: bool = True


Known = Mapping[fx.Node, Followed]


def step(node: fx.Node, known: Known) -> Followed | None:
    """How a vector goes into what a node computes; None if the node mixes entries that different entries of the vector
    belong to, or is not linear.

    Arguments:
        node: a node that reads some of the known ones.
        known: the nodes that the vector goes into.
    """
    try:
        return _step(node, known)
    except (ValueError, RuntimeError, NotImplementedError):  # A size that depends on values, or no kernel for numbers.
        return None


def _step(node: fx.Node, known: Known) -> Followed | None:
    if node.target is operator.getitem:
        (source,) = (known[n] for n in node.all_input_nodes if n in known)
        return replace(source, ids=source.ids[node.args[1]])
    name = op_name(node)
    if name in CASTS:
        return known.get(node.all_input_nodes[0]) if node.meta["val"].is_floating_point() else None
    if name in ("cat", "stack"):
        return _joined(node, known)
    if name in ("mul", "div"):
        return _multiplied(node, known)
    tensors = [n for n in node.all_input_nodes if is_tensor(n) or n in known]
    if len(tensors) != 1 or tensors[0] not in known:
        return None
    source = known[tensors[0]]
    call = bind(node) if name else {}
    if name in MOVES:
        return replace(source, ids=run(node, {tensors[0]: source.ids}))
    if name in DROPOUTS:
        return None if call["train"] else source
    if name == "neg":
        return replace(source, factor=-source.factor)
    if name in ("pad", "constant_pad_nd"):
        return _padded(call, source)
    if name == "mean":
        dims = call.get("dim")
        dims = dims if dims else list(range(source.ids.ndim))
        return _averaged(source, dims, node, keepdim=call.get("keepdim", False))
    if name.startswith(("adaptive_avg_pool", "_adaptive_avg_pool", "avg_pool", "upsample_")):
        places = next(i for i in (1, 2, 3) if f"{i}d" in name)
        whole = not any(call.get("padding") or ()) and call.get("divisor_override") is None
        return _averaged(replace(source, shift=source.shift and whole), range(-places, 0), node, keepdim=True)
    return None


def _joined(node: fx.Node, known: Known) -> Followed | None:
    """A vector in some of the tensors that a node joins; to the others it does nothing."""
    parts = [n for n in node.all_input_nodes if is_tensor(n)]
    sources = [known[n] for n in parts if n in known]
    if len({one.factor for one in sources}) > 1:
        return None
    values = {n: known[n].ids if n in known else torch.tensor(INERT).expand(shape_of(n)) for n in parts}
    return Followed(run(node, values), sources[0].factor, all(one.shift for one in sources))


def _multiplied(node: fx.Node, known: Known) -> Followed | None:
    """A vector in one factor of a product. Only a number multiplies all shifts alike."""
    call = bind(node)
    pair = call["self"], call["other"]
    inside = [value for value in pair if isinstance(value, fx.Node) and value in known]
    divides = op_name(node) == "div"
    if len(inside) != 1 or call.get("rounding_mode") or (divides and inside[0] is not pair[0]):
        return None
    source, other = known[inside[0]], pair[1] if inside[0] is pair[0] else pair[0]
    if isinstance(other, (int, float)):
        return replace(source, factor=source.factor / other if divides else source.factor * other)
    return replace(source, ids=source.ids.expand(shape_of(node)), shift=False)


def _padded(call: Mapping[str, Any], source: Followed) -> Followed | None:
    widths, mode, value = call["pad"], call.get("mode", "constant"), call.get("value") or 0
    if mode != "constant":
        moved = torch.nn.functional.pad(source.ids.double(), widths, mode=mode)
        return replace(source, ids=moved.round().long())
    adds = any(width > 0 for width in widths)
    fill = ZERO if value == 0 else INERT
    return replace(
        source, ids=torch.nn.functional.pad(source.ids, widths, value=fill) if adds or any(widths) else source.ids
    )


def _averaged(source: Followed, dims: Any, node: fx.Node, *, keepdim: bool) -> Followed | None:
    """A vector in means over dimensions along which it does not vary."""
    found = constant_along(source.ids, dims)
    if found is None:
        return None
    ids, whole = found
    if not keepdim:
        ids = ids.squeeze(tuple(d % source.ids.ndim for d in dims))
    return replace(source, ids=ids.expand(shape_of(node)), shift=source.shift and whole)


def constant_along(ids: Tensor, dims: Any) -> tuple[Tensor, bool] | None:
    """The one number along some dimensions, which are kept with size 1, and whether no zero is beside it; None where
    numbers differ.

    Example:
        >>> constant_along(torch.tensor([[0, 1], [0, ZERO]]), [0])
        (tensor([[0, 1]]), False)
        >>> constant_along(torch.tensor([[0, 1], [1, 1]]), [0])
    """
    dims = tuple(d % ids.ndim for d in dims)
    if not dims:
        return ids, True
    # Along dimensions of stride 0 all is the same.
    ids = ids[tuple(slice(0, 1) if d in dims and ids.stride(d) == 0 else slice(None) for d in range(ids.ndim))]
    zero = ids == ZERO
    high = ids.amax(dims, keepdim=True)
    low = torch.where(zero, high, ids).amin(dims, keepdim=True)
    if not torch.equal(low, high):
        return None
    return high, not bool((zero & (high != ZERO)).any())


@dataclass(frozen=True)
class Operand:
    """A parameter, or a view of a part of it, as an op reads it.

    Attributes:
        parameter: its name.
        chain: the nodes that take the view, in order.
        offset: a number that is added to it.
    """

    parameter: str
    chain: tuple[fx.Node, ...] = ()
    offset: float = 0.0

    def view(self, tensor: Tensor) -> Tensor:
        """The view, of a tensor of the parameter's shape: what is written into it, is written into the tensor."""
        value: Any = tensor
        for node in self.chain:
            if node.target is operator.getitem:
                value = value[node.args[1]]
            else:
                value = run(node, {n: value for n in node.all_input_nodes if is_tensor(n)})
        assert isinstance(value, Tensor)
        return value

    @property
    def key(self) -> Any:
        """Equal for equal views of one parameter, by whichever nodes."""
        plain = (fx.map_arg((node.args, node.kwargs), lambda n: None) for node in self.chain)
        return self.parameter, tuple((node.target, repr(own)) for node, own in zip(self.chain, plain, strict=True))


def operand(node: Any, names: Mapping[fx.Node, str]) -> Operand | None:
    """The parameter that a node is, but for views, casts and the sum with a number; None if it is none.

    Arguments:
        node: an operand of an op.
        names: the parameters by their placeholders.
    """
    chain: list[fx.Node] = []
    offset = 0.0
    while isinstance(node, fx.Node) and node not in names:
        if not passes_on(node):
            return None
        if op_name(node) == "add":
            offset += added_number(node)
        elif op_name(node) not in CASTS:
            chain.append(node)
        node = next(iter(node.all_input_nodes))
    return Operand(names[node], tuple(reversed(chain)), offset) if isinstance(node, fx.Node) else None


def passes_on(node: fx.Node) -> bool:
    """Whether what a node gives is a view of its one operand, or that in another dtype or plus a number."""
    name = op_name(node)
    if node.target is operator.getitem:
        return op_name(node.all_input_nodes[0]) in VIEWS
    if name in CASTS:
        return bool(node.meta["val"].is_floating_point())
    return sum(is_tensor(n) for n in node.all_input_nodes) == 1 and (name in VIEWS or added_number(node) != 0)


def added_number(node: fx.Node) -> float:
    """The number that a node adds to a tensor; 0 for all other nodes."""
    if op_name(node) != "add":
        return 0.0
    call = bind(node)
    numbers = [value for value in (call["self"], call["other"]) if isinstance(value, (int, float))]
    return float(numbers[0]) if len(numbers) == 1 and call["alpha"] == 1 else 0.0


def readers_of(node: fx.Node) -> list[fx.Node]:
    """The nodes that read the values of a node."""
    return [user for user in node.users if node in values_read(user)]


def values_read(node: fx.Node) -> list[fx.Node]:
    """The operands of which a node reads the values."""
    name = op_name(node)
    return [] if name in SIZES else node.all_input_nodes[:1] if name in CASTS else node.all_input_nodes


def follow(
    nodes: list[fx.Node], start: fx.Node, first: Followed, ends: Callable[[fx.Node, Known], bool]
) -> list[fx.Node]:
    """Follows a vector through a graph as far as ops move it.

    Arguments:
        nodes: the nodes of the graph, in order.
        start: the first node that the vector goes into.
        first: how it does so.
        ends: whether the vector is followed up to a node, and no further. It is given the node and what is known.

    Returns:
        The nodes at which the vector cannot be followed further.
    """
    known = {start: first}
    stops = []
    for node in nodes[nodes.index(start) + 1 :]:
        if known.keys().isdisjoint(values_read(node)) or ends(node, known):
            continue
        found = step(node, known) if node.op == "call_function" else None
        if found is None:
            stops.append(node)
        else:
            known[node] = found
    return stops

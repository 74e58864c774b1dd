"""The layers of a graph that multiply by parameters, and what of these has to change if gains are moved into them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx

from fxmerge.program.captured import Program
from fxmerge.program.channels import (
    INERT,
    Followed,
    Known,
    Operand,
    constant_along,
    is_tensor,
    operand,
    passes_on,
    readers_of,
    shape_of,
    step,
)
from fxmerge.program.forms import RESULT, argument, bind, form_of, op_name


@dataclass(frozen=True)
class Scaling:
    """The gains by which the entries of a parameter are to be multiplied: their numbers, in a shape that broadcasts to
    that of the operand."""

    operand: Operand
    index: Tensor

    @property
    def key(self) -> Any:
        return self.operand.key, tuple(self.index.shape), tuple(self.index.reshape(-1).tolist())


@dataclass(frozen=True)
class Addition:
    """What a bias is to receive in place of a shift of the data: the product of the weight and the shift.

    Attributes:
        bias, weight: the parameters of the layer.
        index: for every entry of the weight the number of the shift that it meets, in a shape that broadcasts.
        summed: the dimensions of the weight that are summed over.
        factor: by what the shift is multiplied on its way to the layer.
    """

    bias: Operand
    weight: Operand
    index: Tensor
    summed: tuple[int, ...]
    factor: float


@dataclass(frozen=True)
class Layer:
    """What a layer has to do in place of a site.

    Attributes:
        node: the layer.
        scalings: what is to be multiplied.
        addition: what its bias is to receive, if it can stand in for a shift.
    """

    node: fx.Node
    scalings: tuple[Scaling, ...]
    addition: Addition | None = None


@dataclass(frozen=True)
class Product:
    """A node that multiplies data with a weight.

    Attributes:
        terms: the letters of the dimensions of data, weight and result, as in an einsum; none for a convolution.
        groups: of a convolution.
        transposed: whether it is a transposed one.
        padded: whether zeros are around the data.
    """

    node: fx.Node
    data: fx.Node
    weight: Operand
    bias: Operand | None
    has_bias: bool
    terms: tuple[str, str, str] | None = None
    groups: int = 1
    transposed: bool = False
    padded: bool = False


class Layers:
    """The layers of a program.

    Arguments:
        program: the captured program.
        parameters: the names of the tensors that may be changed.
    """

    def __init__(self, program: Program, parameters: frozenset[str]) -> None:
        self.program, self.parameters = program, parameters
        self.names = {n: name for n, (kind, name) in program.sources.items() if kind == "parameter"}

    def operand(self, node: Any) -> Operand | None:
        """The parameter that a node is, if it may be changed."""
        found = operand(node, self.names)
        return found if found is not None and found.parameter in self.parameters else None

    @cached_property
    def uses(self) -> Mapping[str, list[tuple[fx.Node, fx.Node]]]:
        """By parameter, the nodes that compute with it, each with the view of the parameter that it reads."""
        found: dict[str, list[tuple[fx.Node, fx.Node]]] = defaultdict(list)
        for placeholder, name in self.names.items():
            views = [placeholder]
            while views:
                view = views.pop()
                for user in readers_of(view):
                    if passes_on(user):
                        views.append(user)
                    else:
                        found[name].append((user, view))
        return found

    # ------------------------------------------------------------------------------ layers that read

    def reader(self, node: fx.Node, known: Known) -> Layer | None:
        product = self.product(node)
        if (
            product is None
            or product.data not in known
            or any(n in known and n is not product.data for n in node.all_input_nodes)
        ):
            return None
        source = known[product.data]
        found = _read_columns(product, source.ids, self._shape(product.weight))
        if found is None:
            return None
        index, summed, whole = found
        scaling, bias = Scaling(product.weight, index), product.bias
        addition = None
        fits = whole and not product.padded and not product.transposed and len(summed) == index.ndim - 1
        if bias is not None and source.shift and fits:
            addition = Addition(bias, product.weight, index, summed, source.factor)
        return Layer(node, (scaling,), addition)

    def _shape(self, weight: Operand) -> tuple[int, ...]:
        shape = self.program.parameters[weight.parameter].shape
        return tuple(weight.view(torch.empty(shape, device="meta")).shape)

    # ------------------------------------------------------------------------------ the layer that writes

    def writer(self, source: fx.Node, ids: Tensor) -> Layer | None:
        """The one layer that gives what a site multiplies, and nothing else reads."""
        path: list[fx.Node] = []
        node = source
        while (product := self.product(node)) is None:
            inputs = [n for n in node.all_input_nodes if n not in self.program.sized]
            if len(readers_of(node)) != 1 or node.op != "call_function" or len(inputs) != 1:
                return None
            path.append(node)
            (node,) = inputs
        if len(readers_of(node)) != 1 or (product.has_bias and product.bias is None):
            return None
        return self._written(source, ids, product, path[::-1])

    def _written(self, source: fx.Node, ids: Tensor, product: Product, path: list[fx.Node]) -> Layer | None:
        shape, weight = shape_of(product.node), self._shape(product.weight)
        laid = _written_rows(product, shape, weight)
        if laid is None:
            return None
        rows, at = laid
        known = {product.node: Followed(rows)}
        for node in path:
            found = step(node, known)
            if found is None:
                return None
            known[node] = found
        rows = known[source].ids
        if rows.shape != ids.shape or int(rows.min()) < 0:
            return None
        # The gain of every row; each has to have the same one everywhere.
        gains = torch.full((int(at.max()) + 1,), INERT)
        gains[rows.reshape(-1)] = ids.reshape(-1)
        if not torch.equal(gains[rows], ids):
            return None
        scalings = [Scaling(product.weight, gains[at])]
        if product.bias is not None:
            own = self._shape(product.bias)
            if own[-1] != len(gains) or len(gains) != max(own):
                return None
            scalings.append(Scaling(product.bias, gains))
        return Layer(product.node, tuple(scalings))

    # ------------------------------------------------------------------------------ products

    def product(self, node: fx.Node) -> Product | None:
        """A node as a product of data with a weight that may be changed."""
        form = form_of(node) if is_tensor(node) else None
        if form is None:
            return None
        call, (*terms, out) = bind(node), form.terms
        bias = None if form.bias is None else call[form.bias]
        convolves = RESULT in (form.views or {})
        both = [(argument(call, name), term) for name, term in zip(form.operands, terms, strict=True)]
        for (data, data_term), (other, weight_term) in (both, both[::-1]):
            weight = self.operand(other)
            if weight is not None and not weight.offset and is_tensor(data) and data not in self.program.derived:
                changed = self.operand(bias)
                along_rows = convolves or out[-1] in weight_term
                if changed is not None and not (along_rows and _is_row(changed, self._shape(changed))):
                    changed = None
                if convolves:
                    return self._convolution(node, call, weight, changed) if other is call["weight"] else None
                return Product(node, data, weight, changed, bias is not None, (data_term, weight_term, out))
        return None

    def _convolution(self, node: fx.Node, call: Mapping[str, Any], weight: Operand, bias: Operand | None) -> Product:
        padding = call["padding"]
        padded = (
            padding == "same" if isinstance(padding, str) else any([padding] if isinstance(padding, int) else padding)
        )
        transposed = bool(call.get("transposed", "transpose" in op_name(node)))
        has_bias = call["bias"] is not None
        return Product(node, call["input"], weight, bias, has_bias, None, call["groups"], transposed, padded)


def _is_row(bias: Operand, shape: tuple[int, ...]) -> bool:
    """Whether a bias has one entry for each row of the weight, as it is, along its last dimension."""
    return not bias.offset and len(shape) > 0 and shape[-1] == max(shape) and all(n == 1 for n in shape[:-1])


def _read_columns(product: Product, ids: Tensor, shape: tuple[int, ...]) -> tuple[Tensor, tuple[int, ...], bool] | None:
    """The numbers of the gains that the entries of a weight meet, which dimensions of it a product sums over, and
    whether no zeros are among the data."""
    if product.terms is None:
        found = constant_along(ids, [d for d in range(ids.ndim) if d != 1])
        if found is None:
            return None
        channels = found[0].reshape(product.groups, -1)
        places = (1,) * (len(shape) - 2)
        if product.transposed:
            index = channels.reshape(-1, 1, *places)
        elif product.groups == 1:
            index = channels.reshape(1, -1, *places)
        else:
            index = channels.repeat_interleave(shape[0] // product.groups, 0).reshape(*shape[:2], *places)
        return index, tuple(range(1, len(shape))), found[1]
    data, weight, out = product.terms
    found = constant_along(ids, [d for d, c in enumerate(data) if c not in weight])
    if found is None:
        return None
    kept = [c for c in data if c in weight]
    sizes = {c: found[0].shape[d] for d, c in enumerate(data)}
    narrow = found[0].reshape([sizes[c] for c in kept]).permute([kept.index(c) for c in weight if c in kept])
    index = narrow.reshape([sizes[c] if c in kept else 1 for c in weight])
    return index, tuple(d for d, c in enumerate(weight) if c not in out), found[1]


def _written_rows(product: Product, shape: tuple[int, ...], weight: tuple[int, ...]) -> tuple[Tensor, Tensor] | None:
    """Numbers for the rows of a weight: for every entry of the result, and for every entry of the weight, in a shape
    that broadcasts."""
    if product.terms is None:
        places = (1,) * (len(shape) - 2)
        rows = torch.arange(shape[1])
        at = rows.reshape(-1, 1, *places)
        if product.transposed:
            at = rows.reshape(product.groups, -1).repeat_interleave(weight[0] // product.groups, 0)
            at = at.reshape(weight[0], weight[1], *places)
        return rows.reshape(-1, *places).expand(shape), at
    data, own, out = product.terms
    letters = [c for c in out if c in own and c not in data]
    if len(letters) != 1:
        return None
    (letter,) = letters
    rows = torch.arange(shape[out.index(letter)])
    laid = rows.reshape([-1 if c == letter else 1 for c in out]).expand(shape)
    return laid, rows.reshape([-1 if c == letter else 1 for c in own])

"""Where attention reads its key/value heads, and a graph in which each may serve several query heads there."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import fx

from fxmerge.matching.nested import inside
from fxmerge.program.forms import argument, bind, form_of, op_name
from fxmerge.symmetry.columns import axis_column, reshape, support
from fxmerge.symmetry.cuts import REPEAT
from fxmerge.symmetry.group import Symmetry
from fxmerge.symmetry.labels import Labels
from fxmerge.symmetry.propagate import concrete, shape_of
from fxmerge.symmetry.propagation import Propagation
from fxmerge.symmetry.rules import find_rule, movement
from fxmerge.symmetry.shown import places_and_blocks, shown_by
from fxmerge.units.layout import Ids


@dataclass(frozen=True, eq=False)
class Operand:
    """An operand of a product of attention along which heads lie.

    Attributes:
        node: the product, in the labelled graph.
        name: of the operand, as its op's schema has it.
        dim: the dimension along which heads lie.
        heads: for every position along it, the head.
    """

    node: fx.Node
    name: str
    dim: int
    heads: Ids

    @property
    def value(self) -> fx.Node:
        """What is read."""
        read: fx.Node = argument(bind(self.node), self.name)
        return read


@dataclass(frozen=True, eq=False)
class _Product:
    """A product of two activations for each head: its operands, and the letters of their dimensions and its own."""

    node: fx.Node
    operands: tuple[Operand, Operand]
    terms: tuple[str, str, str]


class Attentions:
    """The products of attention of a labelled graph.

    Arguments:
        found: the labelled program.
        symmetry: its classes.
    """

    def __init__(self, found: Propagation, symmetry: Symmetry) -> None:
        self.found, self.symmetry = found, symmetry
        self.number, self.place = places_and_blocks(found, symmetry)

    def kv_operands(self, number: int) -> list[Operand]:
        """The operands that bring keys and values, of which the heads are a class of blocks; none where this is not
        clear.

        These are those of an op of attention; and those of two products of which the second sums over what the first
        has along the places of one of its operands. That operand is the keys, and what the second product reads beside
        it is the values.
        """
        heads = inside(self.symmetry, number)
        operands, products = list[Operand](), list[_Product]()
        for node in self.found.program.graph.graph.nodes:
            if op_name(node) == "scaled_dot_product_attention":
                own = [self._operand(node, name, heads) for name in ("query", "key", "value")]
                if all(o is not None and o.dim < len(shape_of(o.value)) - 2 for o in own):
                    operands += [o for o in own[1:] if o is not None]
            elif (product := self._product(node, heads)) is not None:
                products.append(product)
        for second in products:
            for i in (0, 1):
                keys = [self._keys(first, second, i, heads) for first in products if first is not second]
                if len(one := [k for k in keys if k is not None]) == 1:
                    operands += [one[0], second.operands[1 - i]]
        return operands

    def holds(self, node: fx.Node, number: int) -> bool:
        """Whether what lies in a class of blocks lies along a dimension of a node's value."""
        labels, heads = self.found.labels.get(node.name), inside(self.symmetry, number)
        shown = [shown_by(c, self.number, self.place) for c in (labels.columns if labels is not None else ())]
        return any(not heads.keys().isdisjoint(np.unique(c.number).tolist()) for c in shown)

    def heads_along(self, labels: Labels, within: Mapping[int, Ids]) -> tuple[int, Ids] | None:
        """The one dimension along which heads lie, and the head at each position there; None if there is no such."""
        found: tuple[int, Ids] | None = None
        for column in labels.columns:
            shown = shown_by(column, self.number, self.place)
            numbers = np.unique(shown.number).tolist()
            if within.keys().isdisjoint(numbers):
                continue
            if not within.keys() >= set(numbers):
                return None
            heads = np.zeros_like(shown.place)
            for n in numbers:
                own = shown.number == n
                heads[own] = within[n][shown.place[own]]
            along = [i for i in range(heads.ndim) if (heads != heads.take([0], axis=i)).any()]
            if len(along) != 1:
                return None
            (i,) = along
            one = shown.dims[i], np.moveaxis(heads, i, 0).reshape(heads.shape[i], -1)[:, 0]
            if found is not None and (found[0] != one[0] or not np.array_equal(found[1], one[1])):
                return None
            found = one
        return found

    def _operand(self, node: fx.Node, name: str, within: Mapping[int, Ids]) -> Operand | None:
        value = argument(bind(node), name)
        labels = self.found.labels.get(value.name) if isinstance(value, fx.Node) else None
        along = None if labels is None else self.heads_along(labels, within)
        return None if along is None else Operand(node, name, *along)

    def _product(self, node: fx.Node, within: Mapping[int, Ids]) -> _Product | None:
        """A node as a product, for each head, of two tensors that depend on inputs."""
        form = form_of(node)
        if form is None or form.views or form.bias is not None:
            return None
        if any(argument(bind(node), name) in self.found.program.derived for name in form.operands):
            return None
        one, two = (self._operand(node, name, within) for name in form.operands)
        if one is None or two is None:
            return None
        letters = {term[o.dim] for term, o in zip(form.terms, (one, two), strict=False)}
        apart = len(letters) == 1 and letters <= set(form.terms[2])
        return _Product(node, (one, two), form.terms) if apart else None

    def _keys(self, first: _Product, second: _Product, i: int, within: Mapping[int, Ids]) -> Operand | None:
        """The operand of a product along whose places another one sums, by its operand `i`; None if there is none."""
        path = self._path(first.node, second.operands[i].value, within)
        if path is None:
            return None
        summed = set(second.terms[0]) & set(second.terms[1]) - set(second.terms[2])
        if len(summed) != 1:
            return None
        goal = second.terms[i].index(summed.pop())
        for j, operand in enumerate(first.operands):
            rows = set(first.terms[j]) & set(first.terms[2]) - set(first.terms[1 - j])
            if len(rows) != 1:
                continue
            row = rows.pop()
            inside = self._lie_along(operand.value, first.terms[j].index(row), within)
            if not inside and _followed(path, first.terms[2].index(row)) == goal:
                return operand
        return None

    def _lie_along(self, node: fx.Node, dim: int, within: Mapping[int, Ids]) -> bool:
        """Whether what lies in heads lies along a dimension of a node's value, which then is none of places. Linear
        attention sums over such a dimension: keys and values are multiplied first."""
        shown = [shown_by(c, self.number, self.place) for c in self.found.labels[node.name].columns]
        return any(dim in s.dims and not within.keys().isdisjoint(np.unique(s.number).tolist()) for s in shown)

    def _path(self, start: fx.Node, end: fx.Node, within: Mapping[int, Ids]) -> list[fx.Node] | None:
        """The nodes by which one leads to another, each with heads along it; None if it does not."""
        path = {start}
        for node in self.found.program.graph.graph.nodes:
            if not path.isdisjoint(node.all_input_nodes):
                labels = self.found.labels.get(node.name)
                if labels is not None and self.heads_along(labels, within) is not None and form_of(node) is None:
                    path.add(node)
        return [n for n in self.found.program.graph.graph.nodes if n in path] if end in path else None


def _followed(path: Sequence[fx.Node], dim: int) -> int | None:
    """Where a dimension of the first node's value is in that of the last; None if that is not clear."""
    dims: dict[fx.Node, int] = {path[0]: dim}
    for node in path[1:]:
        found = {_moved(node, source, dims[source]) for source in node.all_input_nodes if source in dims} - {None}
        if len(found) == 1:
            dims[node] = found.pop()  # type: ignore[assignment]
    return dims.get(path[-1])


def _moved(node: fx.Node, source: fx.Node, dim: int) -> int | None:
    """Where a dimension of an operand's value is in that of a node: what does not rearrange it leaves dimensions where
    they are. None if it is gone or in several."""
    rule, shape = find_rule(node.target), shape_of(node)
    if rule not in movement.MOVEMENTS:
        return dim if len(shape) == len(shape_of(source)) else None
    column = axis_column(shape_of(source), dim)
    if rule is movement.view:
        moved = reshape(column, shape)
    elif rule is movement.movement:
        args, kwargs = fx.map_arg((node.args[1:], node.kwargs), lambda n: concrete(n.meta["val"]))
        moved = movement.on_columns(node.target, *args, **kwargs)(column)
    else:
        return None
    along = support(moved)
    return along[0] if len(along) == 1 else None


def with_repeat(module: fx.GraphModule, node: fx.Node, name: str, dim: int) -> fx.Node:
    """Lets a product read heads through an op that repeats each a number of times, one after the other: once for now.

    Arguments:
        module: the graph, which is changed.
        node: the product.
        name: of the operand.
        dim: the dimension along which heads lie.

    Returns:
        The op.
    """
    with module.graph.inserting_before(node):
        repeated = module.graph.call_function(REPEAT, (argument(bind(node), name), 1, dim))
    _replace_operand(node, name, repeated)
    return repeated


def _replace_operand(node: fx.Node, name: str, value: fx.Node) -> None:
    name, _, place = name.partition(".")
    given: Any = value
    if place:
        given = [value if i == int(place) else old for i, old in enumerate(bind(node)[name])]
    names = [a.name for a in node.target._schema.arguments]  # type: ignore[union-attr]
    if names.index(name) < len(node.args):
        node.update_arg(names.index(name), given)
    else:
        node.update_kwarg(name, given)


def with_written_parts(nodes: Iterable[fx.Node]) -> None:
    """Writes out the sizes of equal parts into which some nodes cut a dimension, so that they may come to differ."""
    for node in nodes:
        call = bind(node)
        parts = [v.shape[call["dim"]] for v in node.meta["val"]]
        if all(isinstance(n, int) for n in parts):
            node.target = torch.ops.aten.split_with_sizes.default
            node.args, node.kwargs = (call["self"], parts, call["dim"]), {}

"""The layers of a program: parameters in which some of its nodes are linear, found by the graph alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from typing import Any

import torch
from torch import Tensor, fx

from fxmerge.program.captured import Program
from fxmerge.program.forms import RESULT, Form, argument, bind, form_of, op_name

_ROOM = 2**40
"""More than the entries of any parameter: an entry's code is its parameter's number times this, plus its position."""


@dataclass(frozen=True)
class Kinds:
    """The letters of a product, by what they are to a fit of its weight.

    Attributes:
        rows: in the data and the output: each is an equation.
        groups: in all three: each has a fit of its own.
        features: in the data and the weight: summed over.
        outputs: in the weight and the output.
    """

    rows: str
    groups: str
    features: str
    outputs: str


@dataclass(frozen=True, eq=False)
class Use:
    """A node that computes a product of data with a layer's weight.

    Attributes:
        node: the node.
        form: how it is written.
        data: the name of the operand that is data.
        kinds: its letters.
        data_term: which letters the data have.
        biased: whether what is added to the product is a parameter too.
    """

    node: fx.Node
    form: Form
    data: str
    kinds: Kinds
    data_term: str
    biased: bool

    @property
    def kept_dims(self) -> list[int]:
        """The dimensions of the data along which the output lies too, so that it has their units: rows and groups."""
        if RESULT in (self.form.views or {}):
            # Of a convolution's data, the places that are rows hold no units, and groups of several channels are
            # blocks, which are not merged.
            call = bind(self.node)
            return [1] if 1 < call["groups"] == call["input"].meta["val"].shape[1] else []
        return [self.data_term.index(letter) for letter in self.kinds.rows + self.kinds.groups]

    @property
    def outputs_dim(self) -> int | None:
        """The dimension of what the node gives along which the outputs lie; None if they lie along several."""
        if RESULT in (self.form.views or {}):
            return 1  # Of a convolution, they are its channels.
        return self.form.terms[2].index(self.kinds.outputs) if len(self.kinds.outputs) == 1 else None

    def size(self, arguments: Mapping[str, Any]) -> int:
        """How many rows the data have."""
        x = self.form.view(self.data, argument(arguments, self.data), arguments)
        return prod(x.shape[self.data_term.index(letter)] for letter in self.kinds.rows)

    def features(self, arguments: Mapping[str, Any], chosen: Tensor | None) -> Tensor:
        """What is multiplied with the coefficients: shape (groups, rows, features), of some rows or of all; at least
        in float32."""
        x = self.form.view(self.data, argument(arguments, self.data), arguments)
        x = self._matrices(x, self.data_term, self.kinds.features, chosen)
        return torch.cat([x, x.new_ones(*x.shape[:2], 1)], dim=2) if self.biased else x

    def outputs(self, value: Tensor, arguments: Mapping[str, Any], chosen: Tensor | None) -> Tensor:
        """A tensor like what the node gives as its equations have it: shape (groups, rows, outputs)."""
        return self._matrices(self.form.view(RESULT, value, arguments), self.form.terms[2], self.kinds.outputs, chosen)

    def _matrices(self, x: Tensor, term: str, columns: str, chosen: Tensor | None) -> Tensor:
        x = x.permute([term.index(letter) for letter in self.kinds.rows + self.kinds.groups + columns])
        count = len(self.kinds.rows)
        sizes, others = x.shape[:count], x.shape[count:]
        x = x.reshape(prod(sizes), *others) if chosen is None else x[torch.unravel_index(chosen, sizes)]
        split = len(self.kinds.groups)
        x = x.reshape(len(x), prod(others[:split]), prod(others[split:])).transpose(0, 1)
        return x.float() if x.element_size() < 4 else x


@dataclass(frozen=True, eq=False)
class Layer:
    """Parameters that are fitted together.

    Attributes:
        name: the first of the parameters.
        parameters: the names of the parameters that hold the entries.
        codes: which entry of which parameter each coefficient is, shape (groups, features, outputs); the last feature
            is the bias if there is one.
        uses: where they are used.
    """

    name: str
    parameters: tuple[str, ...]
    codes: Tensor
    uses: tuple[Use, ...]
    numbers: Mapping[str, int] = field(repr=False)

    @cached_property
    def places(self) -> dict[str, tuple[Tensor, Tensor]]:
        """For every parameter, which coefficients it holds and where."""
        found = {}
        flat = self.codes.reshape(-1)
        for name in self.parameters:
            where = (flat // _ROOM == self.numbers[name]).nonzero().reshape(-1)
            found[name] = where, flat[where] % _ROOM
        return found

    def read(self, state: Mapping[str, Tensor], missing: float = 0.0) -> Tensor:
        """The coefficients, in float64; `missing` for those of parameters that are not in the state dict."""
        device = next((t.device for t in state.values()), None)
        flat = torch.full((self.codes.numel(),), missing, dtype=torch.float64, device=device)
        for name, (where, positions) in self.places.items():
            if name in state:
                flat[where.to(device)] = state[name].detach().reshape(-1)[positions.to(device)].double()
        return flat.reshape(self.codes.shape)

    def write(self, state: dict[str, Tensor], coefficients: Tensor) -> None:
        """Puts new tensors with these coefficients into a state dict."""
        flat = coefficients.reshape(-1)
        for name, (where, positions) in self.places.items():
            old = state[name]
            new = old.detach().reshape(-1).clone()
            new[positions.to(old.device)] = flat[where.to(flat.device)].to(old)
            state[name] = new.reshape(old.shape)


@dataclass(frozen=True)
class Layers:
    """All layers of a program in graph order, and why other parameters are in none.

    Attributes:
        all: the layers.
        left: for parameters that some op multiplies with data and that are in no layer, the reason.
        tied: layers that are not among these, since rows of their weights are looked up as well, as those of an output
            layer whose weight is that of the embedding; with the nodes that look them up.
    """

    all: tuple[Layer, ...]
    left: Mapping[str, str]
    tied: Mapping[Layer, tuple[fx.Node, ...]] = field(default_factory=dict)


def find_layers(program: Program, form: Callable[[fx.Node], Form | None] = form_of) -> Layers:
    """Finds the layers of a program.

    A node's operand is a weight if it shows entries of parameters as they are, moved about but not computed with; this
    is found by running what leads to it on the numbers of the entries. Uses that show the same entries in the
    same places are of one layer. Entries that are used in any other way as well are not fitted.

    Arguments:
        program: the program.
        form: how a node is written as a product of data with a weight; None for other nodes.
    """
    finder = _Finder(program, form)
    for node in program.graph.graph.nodes:
        if node.op != "placeholder" and node not in program.derived:
            finder.visit(node)
    return finder.finish()


class _Finder:
    """What is found while walking over a graph."""

    def __init__(self, program: Program, form: Callable[[fx.Node], Form | None]) -> None:
        self.form = form
        self.numbers = {name: i for i, name in enumerate(program.parameters)}
        self.names = list(program.parameters)
        self.read_from: dict[fx.Node, frozenset[str]] = {}
        self.products: list[tuple[Use, Tensor]] = []
        self.elsewhere: dict[str, str] = {}
        self.lookups: dict[fx.Node, str] = {}
        self.shapes = {name: p.shape for name, p in program.parameters.items()}
        self.program = program
        for node in program.graph.graph.nodes:
            if node in program.derived:
                own = program.sources.get(node, ("", ""))
                above = frozenset({own[1]} if own[0] == "parameter" else ())
                self.read_from[node] = above.union(*(self.read_from[n] for n in node.all_input_nodes))

    def visit(self, node: fx.Node) -> None:
        """Notes what a node does with parameters."""
        found = self._product(node)
        claimed: set[fx.Node] = set()
        if isinstance(found, tuple):
            use, codes, claimed = found
            self.products.append((use, codes))
        why = found if isinstance(found, str) else f"also used by {node.target} at graph node {node.name!r}"
        if op_name(node) == "embedding" and node.args[0] in self.program.derived:
            self.lookups[node] = why
            return
        for other in node.all_input_nodes:
            if other in self.program.derived and other not in claimed:
                for name in self.read_from[other]:
                    self.elsewhere.setdefault(name, why)

    def finish(self) -> Layers:
        """Layers of what was found."""
        same: list[list[tuple[Use, Tensor]]] = []
        for use, codes in self.products:
            for others in same:
                if others[0][1].shape == codes.shape and bool((others[0][1] == codes).all()):
                    others.append((use, codes))
                    break
            else:
                same.append([(use, codes)])
        layers = [self._layer(tuple(use for use, _ in uses), uses[0][1]) for uses in same]
        own = {name: self.shapes[name].numel() for layer in layers for name in layer.parameters}
        counts = {name: torch.zeros(count, dtype=torch.int32) for name, count in own.items()}
        for layer in layers:
            for name, (_, positions) in layer.places.items():
                counts[name].index_add_(0, positions, torch.ones(len(positions), dtype=torch.int32))
        looked_up = {name: why for node, why in self.lookups.items() for name in self.read_from[_table(node)]}
        kept, tied, left = list[Layer](), dict[Layer, tuple[fx.Node, ...]](), dict(self.elsewhere)
        for layer in layers:
            shared = [n for n, (_, positions) in layer.places.items() if int(counts[n][positions].max()) > 1]
            left.update(dict.fromkeys(shared, "its entries are used in several ways"))
            if not left.keys().isdisjoint(layer.parameters):
                continue
            if looked_up.keys().isdisjoint(layer.parameters):
                kept.append(layer)
            elif nodes := self._looked_up(layer):
                tied[layer] = nodes
        return Layers(tuple(kept), looked_up | left, tied)

    def _looked_up(self, layer: Layer) -> tuple[fx.Node, ...]:
        """The nodes that look up the coefficients of each output of a layer; none if some look up anything else."""
        nodes = [n for n in self.lookups if not self.read_from[_table(n)].isdisjoint(layer.parameters)]
        rows = layer.codes[0, : layer.codes.shape[1] - layer.uses[0].biased].T
        tables = [self._codes(_table(node)) for node in nodes]
        same = len(layer.codes) == 1 and all(table is not None and torch.equal(table, rows) for table in tables)
        return tuple(nodes) if same else ()

    def _layer(self, uses: tuple[Use, ...], codes: Tensor) -> Layer:
        numbers = torch.unique(codes // _ROOM).tolist()
        first = int(codes.reshape(-1)[0]) // _ROOM
        names = [self.names[first], *(self.names[n] for n in numbers if n != first)]
        return Layer(names[0], tuple(names), codes, uses, {n: self.numbers[n] for n in names})

    def _product(self, node: fx.Node) -> tuple[Use, Tensor, set[fx.Node]] | str | None:
        """A use and its codes, with the nodes that it takes them from; or why it is none."""
        form = self.form(node)
        if form is None:
            return None
        arguments = bind(node)
        nodes = [argument(arguments, name) for name in form.operands]
        if node.meta["val"].is_complex():
            return f"its product at graph node {node.name!r} is of complex numbers"
        if not all(isinstance(n, fx.Node) for n in nodes) or sum(n in self.program.derived for n in nodes) != 1:
            return None
        at = 0 if nodes[0] in self.program.derived else 1
        weight = nodes[at]
        if not self.read_from[weight]:
            return None
        codes = self._codes(weight)
        if codes is None:
            return f"computed with before it is used by {node.target} at graph node {node.name!r}"
        shown: dict[str, Any] = fx.map_arg(arguments, lambda n: n.meta.get("val"))
        if _has_open_sizes(nodes[1 - at]):
            return f"the number of its inputs depends on their values at graph node {node.name!r}"
        data_term, out = form.terms[1 - at], form.terms[2]
        codes, term = _without(
            codes=form.view(form.operands[at], codes, shown), term=form.terms[at], letters=set(data_term) & set(out)
        )
        kinds = _kinds(data_term, term, out)
        if kinds is None:
            return f"its product at graph node {node.name!r} is not of a known kind"
        codes = codes.permute([term.index(c) for c in kinds.groups + kinds.features + kinds.outputs])
        sizes = [
            prod(codes.shape[i] for i, c in enumerate(kinds.groups + kinds.features + kinds.outputs) if c in own)
            for own in (kinds.groups, kinds.features, kinds.outputs)
        ]
        codes, claimed = codes.reshape(sizes), {weight}
        bias = argument(arguments, form.bias) if form.bias is not None else None
        added = self._bias(form, bias, kinds, shown, sizes)
        if added is not None:
            codes = torch.cat([codes, added], dim=1)
            claimed.add(bias)
        use = Use(node, form, form.operands[1 - at], kinds, data_term, added is not None)
        return use, codes, claimed

    def _bias(self, form: Form, bias: Any, kinds: Kinds, shown: dict[str, Any], sizes: list[int]) -> Tensor | None:
        if not isinstance(bias, fx.Node) or bias not in self.program.derived or not self.read_from[bias]:
            return None
        assert form.bias is not None
        codes = self._codes(bias)
        if codes is None:
            return None
        codes, term = _without(form.view(form.bias, codes, shown), form.bias_term, set(form.bias_term))
        wanted = kinds.groups + kinds.outputs
        if set(term) - set(wanted) or codes.numel() != sizes[0] * sizes[2]:
            return None
        order = [term.index(c) for c in wanted if c in term]
        return codes.permute(order).reshape(sizes[0], 1, sizes[2])

    def _codes(self, node: fx.Node) -> Tensor | None:
        """Which entry of which parameter each entry of a node's value is; None if some is none."""
        generator = torch.Generator().manual_seed(0)
        numbered: dict[fx.Node, Any] = {}
        random: dict[fx.Node, Any] = {}
        entries = {}
        for n in self._leading_to(node):
            kind, name = self.program.sources.get(n, ("", ""))
            if kind == "parameter":
                shape = self.shapes[name]
                entries[name] = torch.randn(shape.numel(), generator=generator, dtype=torch.float64)
                random[n] = entries[name].reshape(shape)
                numbered[n] = torch.arange(shape.numel()).reshape(shape) + self.numbers[name] * _ROOM
            elif n.op == "placeholder":
                numbered[n] = random[n] = self.program.constants[name]
            else:
                for values in (numbered, random):
                    args, kwargs = fx.map_arg((n.args, n.kwargs), values.__getitem__)
                    try:
                        values[n] = n.target(*args, **kwargs)  # type: ignore[operator]
                    except Exception:  # An op that is not for whole numbers computes; whatever it raises.
                        return None
        codes, value = numbered[node], random[node]
        if not isinstance(codes, Tensor) or codes.dtype != torch.int64:
            return None
        known = torch.full(codes.shape, torch.nan, dtype=torch.float64)
        for name, own in entries.items():
            mine = codes // _ROOM == self.numbers[name]
            position = codes[mine] % _ROOM
            if len(position) and int(position.max()) < len(own):
                known[mine] = own[position]
        return codes if torch.equal(known, value.double()) else None

    def _leading_to(self, node: fx.Node) -> list[fx.Node]:
        found: dict[fx.Node, None] = {}

        def add(n: fx.Node) -> None:
            if n not in found:
                for other in n.all_input_nodes:
                    add(other)
                found[n] = None

        add(node)
        return list(found)


def _table(node: fx.Node) -> fx.Node:
    """The weight of an embedding."""
    table = node.args[0]
    assert isinstance(table, fx.Node)
    return table


def _has_open_sizes(node: fx.Node) -> bool:
    """Whether the shape of a value depends on the values of the inputs: then rows of two networks are not of the same
    inputs."""
    sizes = node.meta["val"].shape
    return any(isinstance(size, torch.SymInt) and size.node.hint is None for size in sizes)


def _without(codes: Tensor, term: str, letters: set[str]) -> tuple[Tensor, str]:
    """Without those dimensions of some letters that are of size one, and so the same for all rows."""
    dropped = [d for d, (c, n) in enumerate(zip(term, codes.shape, strict=True)) if n == 1 and c in letters]
    return codes.squeeze(dropped), "".join(c for d, c in enumerate(term) if d not in dropped)


def _kinds(data: str, weight: str, out: str) -> Kinds | None:
    if any(len(set(term)) < len(term) for term in (data, weight, out)):
        return None
    features = "".join(c for c in weight if c in data and c not in out)
    found = Kinds(
        rows="".join(c for c in out if c not in weight and c in data),
        groups="".join(c for c in weight if c in data and c in out),
        features=features,
        outputs="".join(c for c in weight if c in out and c not in data),
    )
    whole = set(found.rows + found.groups + found.features)
    used = set(found.groups + found.features + found.outputs)
    return found if whole >= set(data) and used >= set(weight) and whole | used >= set(out) else None

"""Planes of units that a network turns, as rotary position embeddings do.

A part of a graph may turn pairs of entries of a tensor by angles that do not depend on parameters. Whatever ops it is
written in (halves that are negated and put together, every other entry, complex numbers), it is a linear map of the
entries, at each place by itself. `Turns.at` computes this map by the ops themselves. It turns a plane if it multiplies
its two entries by matrices

    ((a, -b),
     (b,  a)).

All of these commute with each other, so the plane may be multiplied by any such matrix: a rotation times a scale.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from zlib import crc32

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from torch import Tensor, fx

from fxmerge.symmetry.columns import axis_column, compact, core, joint_column, reshape, shrink, spread, support
from fxmerge.symmetry.labels import Labels
from fxmerge.symmetry.rules import elementwise, movement, reduction
from fxmerge.symmetry.rules.registry import Lookup
from fxmerge.symmetry.units import NOTHING, Ids, distinct, number_rows

MOST_TERMS = 8
"""How many entries may be added up at one place, those that cancel included."""

NO_ENTRY = -1

_TIMES, _OVER = ("aten::mul", "aten::multiply"), ("aten::div", "aten::divide", "aten::true_divide")
_PLUS, _MINUS, _PAIR = ("aten::add",), ("aten::sub", "aten::subtract"), ("aten::complex",)
_NEGATIVE, _CONJUGATE = ("aten::neg", "aten::negative"), ("aten::_conj", "aten::_conj_physical")
_BY_MEMORY = ("aten::as_strided", "aten::_neg_view")
"""Ops that read the memory of a tensor, not its entries."""


@dataclass(frozen=True)
class Turn:
    """A part of a graph that turns planes.

    Attributes:
        inputs: the nodes that the part reads: first the one whose entries are turned, then those that tell the angles.
        column: for every position of the result the unit of these entries that it shows.
        units: these units, each once.
        code: for each of them a number for what happens to it: those of one number are treated alike.
        planes: the units of every plane, shape (planes, 2).
    """

    inputs: tuple[fx.Node, ...]
    column: Tensor
    units: Ids
    code: Ids
    planes: Ids


@dataclass(frozen=True)
class _Form:
    """A tensor as a linear function of the entries of another one.

    Attributes:
        place: which place, along the dimensions of the other tensor that have no units, is read.
        terms: what is added up: the numbers of entries along the dimensions with units, and their factors.
    """

    place: Tensor
    terms: tuple[tuple[Tensor, Tensor], ...]

    def map(self, op: Callable[[Tensor], Tensor]) -> _Form:
        return _Form(op(self.place), tuple((op(entry), op(factor)) for entry, factor in self.terms))

    def times(self, value: Tensor, shape: tuple[int, ...]) -> _Form:
        value = value.expand(shape)
        wide = self.map(lambda t: t.expand(shape))
        return _Form(wide.place, tuple((e, (compact(f) * compact(value)).expand(shape)) for e, f in wide.terms))


class Turns:
    """The parts of a graph that turn planes.

    Attributes:
        factors: the nodes by which linear ones are multiplied, of which the values are needed.
    """

    def __init__(self, graph: fx.Graph, parameters: set[fx.Node], find_rule: Lookup) -> None:
        self.find_rule = find_rule
        self.linear: dict[fx.Node, list[fx.Node]] = {}
        self.before: dict[fx.Node, fx.Node] = {}
        self.factors: set[fx.Node] = set()
        depends, depth = set(parameters), dict[fx.Node, int]()
        for n in graph.nodes:
            own = [m for m in n.all_input_nodes if m in depends]
            if not own:
                continue
            depends.add(n)
            before = self._before(own, depth) if self._is_linear(n, own) else None
            if before is not None:
                # What is linear in some nodes, and the last one through which all of these go.
                self.linear[n], self.before[n], depth[n] = own, before, depth.get(before, 0) + 1
                self.factors.update(m for m in n.all_input_nodes if m not in depends)

    def _before(self, own: Sequence[fx.Node], depth: Mapping[fx.Node, int]) -> fx.Node | None:
        a: fx.Node | None = own[0]
        for b in own[1:]:
            other: fx.Node | None = b
            while a is not other and a is not None and other is not None:
                if depth.get(a, 0) >= depth.get(other, 0):
                    a = self.before.get(a)
                else:
                    other = self.before.get(other)
            a = a if a is other else None
        return a

    def _is_linear(self, n: fx.Node, own: Sequence[fx.Node]) -> bool:
        """Whether a node is linear in the operands that depend on parameters."""
        name, rule = _name(n), self.find_rule(n.target)
        if n.target is operator.getitem:
            return True
        value = n.meta.get("val")
        if isinstance(value, Tensor) and not (value.is_floating_point() or value.is_complex()):
            return False
        if rule is elementwise.pointwise:
            if n.kwargs:
                return False
            if name in _TIMES:
                return len(own) == 1 and n.args[0] is not n.args[1]
            if name in _OVER:
                return own == [n.args[0]]
            return name in _NEGATIVE or (name in (*_PLUS, *_MINUS, *_PAIR) and all(a in own for a in n.args))
        if rule in (movement.cat, movement.stack):
            return all(t in own for t in n.args[0])  # type: ignore[union-attr]
        moves = (*movement.MOVEMENTS, movement.expand, elementwise.identity, reduction.complex_parts)
        return rule in moves and name not in _BY_MEMORY and own == [n.args[0]]

    def at(self, n: fx.Node, labels: Mapping[str, Labels], values: Mapping[fx.Node, Any]) -> Turn | None:
        """The turn that ends with a node, None if there is none.

        Arguments:
            labels: of the nodes so far.
            values: what is known of the nodes in `factors`: labels, or values.
        """
        if len(set(self.linear.get(n, ()))) < 2 and _name(n) != "aten::view_as_real":
            return None
        source, size = n, _size(n)
        while source in self.before:
            source = self.before[source]
            own = labels.get(source.name)
            if own is None or len(own.columns) != 1 or _size(source) != size:
                continue
            part = self._between(source, n)
            if any(_name(m) in (*_TIMES, *_OVER) for m in part):
                form = self._form(n, source, part, own, values)
                turn = None if form is None else _turn(form, own.columns[0])
                if turn is not None:
                    needs = {m for p in part for m in p.all_input_nodes if m not in part and m is not source}
                    return Turn((source, *sorted(needs)), *turn)
        return None

    def _between(self, source: fx.Node, n: fx.Node) -> list[fx.Node]:
        """The nodes from after a source to a node, in order."""
        found, open_ = set[fx.Node](), [n]
        while open_:
            m = open_.pop()
            if m is not source and m not in found:
                found.add(m)
                open_ += self.linear[m]
        return sorted(found)

    def _form(
        self, n: fx.Node, source: fx.Node, part: Sequence[fx.Node], own: Labels, values: Mapping[fx.Node, Any]
    ) -> _Form | None:
        dims = support(own.columns[0])
        sizes = [own.shape[d] for d in dims]
        entry = spread(torch.arange(int(np.prod(sizes))).reshape(sizes), own.shape, dims)
        others = [axis_column(own.shape, d) for d in range(own.ndim) if d not in dims]
        place = joint_column([torch.zeros(1, dtype=torch.int64).expand(own.shape), *others])
        assert place is not None
        one = torch.ones(1, dtype=torch.float64).expand(own.shape)
        forms: dict[fx.Node, Any] = {source: _Form(place, ((entry, one),))}
        for m in part:
            try:
                form = self._step(m, forms, values)
            except (NotImplementedError, RuntimeError):  # No kernel for these numbers.
                return None
            if form is None:
                return None
            forms[m] = form
        return forms[n] if isinstance(forms[n], _Form) else None

    def _step(self, n: fx.Node, forms: Mapping[fx.Node, Any], values: Mapping[fx.Node, Any]) -> Any:
        """The form of a node, from those of its operands; a list for several results, None where there is none."""
        name, rule = _name(n), self.find_rule(n.target)
        if n.target is operator.getitem:
            return forms[n.args[0]][n.args[1]]  # type: ignore[index]
        value = n.meta["val"]
        shape = tuple(map(_known, value.shape)) if isinstance(value, Tensor) else ()
        if rule is elementwise.pointwise:
            own = [forms.get(a) for a in n.args if isinstance(a, fx.Node)]
            if name in (*_TIMES, *_OVER):
                form, other = (n.args[0], n.args[1]) if n.args[0] in forms else (n.args[1], n.args[0])
                factor = _value(other, values)
                if factor is None:
                    return None
                return forms[form].times(factor if name in _TIMES else 1 / factor, shape)
            if name in _NEGATIVE:
                return own[0].times(torch.tensor(-1.0), shape)
            scale = torch.tensor(1.0 if name in _PLUS else -1.0 if name in _MINUS else 1j)
            return _sum(own[0].map(lambda t: t.expand(shape)), own[1].times(scale, shape))
        if rule in (movement.cat, movement.stack):
            parts = [forms[t] for t in n.args[0]]  # type: ignore[union-attr]
            dim = (*n.args[1:], *n.kwargs.values(), 0)[0] % len(shape)
            if rule is movement.stack:
                parts = [p.map(lambda t: t.unsqueeze(dim)) for p in parts]
            return _cat(parts, dim, shape)
        form = forms[n.args[0]]
        if rule is elementwise.identity:
            return form.times(torch.tensor(1.0), shape) if name not in _CONJUGATE else _conjugate(form)
        if rule is reduction.complex_parts:
            return _as_real(form) if name == "aten::view_as_real" else _as_complex(form)
        args, kwargs = fx.map_arg((n.args[1:], n.kwargs), lambda m: _known(m.meta["val"]))
        if rule is movement.view:
            return form.map(lambda t: reshape(t, shape))
        if rule is movement.expand:
            return form.map(lambda t: t.expand(shape))
        target: Any = n.target
        if rule is movement.split:
            return [form.map(lambda t, i=i: target(t, *args, **kwargs)[i]) for i in range(len(value))]
        return form.map(lambda t: target(t, *args, **kwargs))


def _name(n: fx.Node) -> str:
    name: str = getattr(getattr(n.target, "_schema", None), "name", "")
    return name


def _size(n: fx.Node) -> int:
    value = n.meta["val"]
    return int(np.prod([_known(size) for size in value.shape])) if isinstance(value, Tensor) else 0


def _known(size: Any) -> Any:
    """The number that a symbolic size stood for when the graph was captured."""
    return size.node.hint if isinstance(size, torch.SymInt) else size


def _value(operand: Any, values: Mapping[fx.Node, Any]) -> Tensor | None:
    """The value of a factor. One that depends on inputs has any numbers: equal ones where its labels are equal."""
    if not isinstance(operand, fx.Node):
        return torch.tensor(operand, dtype=torch.complex128 if isinstance(operand, complex) else torch.float64)
    value, like = values.get(operand), operand.meta["val"]
    dtype = torch.complex128 if isinstance(like, Tensor) and like.is_complex() else torch.float64
    if isinstance(value, Labels):
        if value.columns:
            return None
        joint = joint_column(value.inert)
        joint = torch.zeros(1, dtype=torch.int64).expand(value.shape) if joint is None else joint
        numbers, code = compact(joint).unique(return_inverse=True)
        generator = torch.Generator().manual_seed(crc32(operand.name.encode()))  # Each factor has its own.
        return torch.randn(len(numbers), dtype=dtype, generator=generator)[code].expand(value.shape)
    if isinstance(value, Tensor):
        return None if value.is_meta else value.detach().cpu().resolve_conj().to(dtype)
    return None if value is None else torch.tensor(value, dtype=dtype)


def _equal(a: Tensor, b: Tensor) -> bool:
    dims = sorted({*support(a), *support(b)})
    return torch.equal(core(a, dims), core(b, dims))


def _sum(a: _Form, b: _Form) -> _Form | None:
    terms = (*a.terms, *b.terms)
    return _Form(a.place, terms) if _equal(a.place, b.place) and len(terms) <= MOST_TERMS else None


def _cat(parts: Sequence[_Form], dim: int, shape: tuple[int, ...]) -> _Form:
    def together(pieces: Sequence[Tensor]) -> Tensor:
        used = {dim, *(d for p in pieces for d in support(p))}
        thin = [p[tuple(slice(None) if d in used else slice(0, 1) for d in range(p.ndim))] for p in pieces]
        dtype = torch.complex128 if any(p.is_complex() for p in pieces) else pieces[0].dtype
        return shrink(torch.cat([p.to(dtype) for p in thin], dim).expand(shape))

    terms = []
    for i in range(max(len(p.terms) for p in parts)):
        own = [p.terms[i] if i < len(p.terms) else _nothing(tuple(p.place.shape)) for p in parts]
        terms.append((together([e for e, _ in own]), together([f for _, f in own])))
    return _Form(together([p.place for p in parts]), tuple(terms))


def _nothing(shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    one = (1,) * len(shape)
    return torch.full(one, NO_ENTRY).expand(shape), torch.zeros(one, dtype=torch.float64).expand(shape)


def _conjugate(form: _Form) -> _Form:
    return _Form(form.place, tuple((e, f.conj().resolve_conj()) for e, f in form.terms))


def _as_complex(form: _Form) -> _Form | None:
    real, imaginary = (form.map(lambda t, i=i: t[..., i]) for i in (0, 1))
    return _sum(real, imaginary.times(torch.tensor(1j), tuple(imaginary.place.shape)))


def _as_real(form: _Form) -> _Form:
    def both(t: Tensor) -> Tensor:
        return t.unsqueeze(-1).expand(*t.shape, 2)

    factors = [torch.view_as_real(compact(f).to(torch.complex128)).expand(*f.shape, 2) for _, f in form.terms]
    return _Form(both(form.place), tuple((both(e), f) for (e, _), f in zip(form.terms, factors, strict=True)))


def _turn(form: _Form, column: Tensor) -> tuple[Tensor, Ids, Ids, Ids] | None:
    """What the form of a tensor says, if it turns planes of the units of a column, each at one place: the column of the
    result, its units, their codes, and the planes."""
    raw = core(column, support(column)).reshape(-1).numpy()
    shape = tuple(form.place.shape)
    dims = [d for d in range(len(shape)) if shape[d] > 1 and d not in support(form.place)]
    sizes = [shape[d] for d in dims]
    if int(np.prod(sizes)) != len(raw) or len(distinct(raw)) < len(raw) or (raw == NOTHING).any():
        return None
    if any(f.is_complex() or not set(support(e)) <= set(dims) for e, f in form.terms):
        return None
    entry, factor = _table(form, dims)
    if not (0 < (count := (entry != NO_ENTRY).sum(0)).min() and count.max() <= 2):
        return None
    # For every position its entry or two of these, the first one first.
    order = np.argsort(np.where(entry == NO_ENTRY, len(raw), entry), axis=0, kind="stable")[:2]
    entry = np.take_along_axis(entry, order, 0)
    factor = np.take_along_axis(factor, order[..., None], 0)
    first, second = entry[0], np.where(entry[1] == NO_ENTRY, entry[0], entry[1]) if len(entry) > 1 else entry[0]
    parts = connected_components(
        coo_matrix((np.ones(len(raw), np.int8), (first, second)), shape=(len(raw),) * 2), directed=False
    )[1]
    members, positions = np.argsort(parts, kind="stable"), np.argsort(parts[first], kind="stable")
    size = np.bincount(parts)
    if size.max() != 2 or not np.array_equal(size, np.bincount(parts[first], minlength=len(size))):
        return None
    starts = np.concatenate([[0], np.cumsum(size)[:-1]])
    start = starts[size == 2]
    own = np.stack([members[start], members[start + 1]])
    rows = np.stack([positions[start], positions[start + 1]])
    matrix = np.zeros((2, 2, len(start), factor.shape[-1]))  # Row of the result, unit, plane, and place.
    for i in (0, 1):
        for k in (0, 1):
            for term in range(len(entry)):
                matrix[i, k] += np.where((entry[term, rows[i]] == own[k])[:, None], factor[term, rows[i]], 0)
    swapped = ~_commutes(matrix)
    matrix[:, :, swapped] = matrix[::-1][:, :, swapped]
    if not _commutes(matrix).all():
        return None
    rows[:, swapped] = rows[::-1][:, swapped]
    shown, rest = np.zeros(len(raw), np.int64), starts[size == 1]
    shown[positions[rest]] = members[rest]
    shown[rows.reshape(-1)] = own.reshape(-1)
    width = factor.shape[-1]
    told = np.zeros((len(raw), 1 + 2 * width))
    told[members[rest], 1 : 1 + width] = factor[0, positions[rest]]
    for i in (0, 1):
        told[own[i], 0], told[own[i], 1:] = i + 1, np.concatenate([matrix[0, 0], matrix[0, 1]], 1)
    code = number_rows(np.ascontiguousarray(told + 0.0).view(np.int64))  # Zeros have one sign.
    result = spread(torch.from_numpy(raw[shown].reshape(sizes)), shape, dims)
    return result, raw, code, raw[own].T


def _table(form: _Form, dims: Sequence[int]) -> tuple[Ids, NDArray[np.float64]]:
    """For every term and position along some dimensions the entry, and the factors at all places; each entry once."""
    along = sorted({d for _, f in form.terms for d in support(f)} - set(dims))
    count = int(np.prod([form.place.shape[d] for d in dims]))
    entry = np.stack([core(e, dims).reshape(-1).numpy() for e, _ in form.terms])
    factor = np.stack([core(f, [*dims, *along]).reshape(count, -1).double().numpy() for _, f in form.terms])
    for k in range(len(entry)):
        for i in range(k):
            same = (entry[i] == entry[k]) & (entry[i] != NO_ENTRY)
            factor[i, same] += factor[k, same]
            factor[k, same], entry[k, same] = 0, NO_ENTRY
    entry[(factor == 0).all(-1)] = NO_ENTRY
    return entry, factor


def _commutes(matrix: NDArray[np.float64]) -> NDArray[np.bool_]:
    """For every plane, whether its matrices are of the form ((a, -b), (b, a)) at all places."""
    same: NDArray[np.bool_] = (matrix[0, 0] == matrix[1, 1]) & (matrix[0, 1] == -matrix[1, 0])
    return same.all(-1)

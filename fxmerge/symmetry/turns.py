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

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from torch import Tensor, fx

from fxmerge.symmetry.columns import core, spread, support
from fxmerge.symmetry.forms import NO_ENTRY, OVER, TIMES, Form, is_linear, known, name_of, step
from fxmerge.symmetry.labels import Labels
from fxmerge.symmetry.rules.registry import Lookup
from fxmerge.symmetry.units import NOTHING, Ids, distinct, number_rows

Factors = NDArray[np.float64]


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


class Turns:
    """The parts of a graph that turn planes.

    Attributes:
        linear: for every node that is linear in them, the operands that depend on parameters.
        before: for such a node, the last one before it through which all goes that it is linear in.
        factors: the nodes by which these are multiplied, of which the values are needed.
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
            before = self._before(own, depth) if is_linear(n, own, find_rule) else None
            if before is not None:
                self.linear[n], self.before[n], depth[n] = own, before, depth.get(before, 0) + 1
                self.factors.update(m for m in n.all_input_nodes if m not in depends)

    def _before(self, own: Sequence[fx.Node], depth: Mapping[fx.Node, int]) -> fx.Node | None:
        """The last node through which all goes that some nodes are linear in, the only one itself."""
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

    def at(self, n: fx.Node, labels: Mapping[str, Labels], values: Mapping[fx.Node, Any]) -> Turn | None:
        """The turn that ends with a node, None if there is none.

        Arguments:
            n: the node.
            labels: of the nodes so far.
            values: what is known of the nodes in `factors`: labels, or values.
        """
        if len(self.linear.get(n, ())) < 2 and name_of(n) != "aten::view_as_real":
            return None
        source, size = n, _size(n)
        while source in self.before:
            source = self.before[source]
            own = labels.get(source.name)
            if own is None or own.uniform is not None or len(own.columns) != 1 or _size(source) != size:
                continue
            part = self._between(source, n)
            if any(name_of(m) in (*TIMES, *OVER) for m in part):
                form = self._form(n, source, part, own, values)
                turn = None if form is None else _turn(form, own.columns[0])
                if turn is not None:
                    read = {m for p in part for m in p.all_input_nodes}
                    return Turn((source, *sorted(read.difference(part, [source]))), *turn)
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
    ) -> Form | None:
        """A node as a linear function of a source; None if it is not known to be one, or for numbers of no kernel."""
        forms: dict[fx.Node, Any] = {source: Form.of(own.shape, support(own.columns[0]))}
        for m in part:
            try:
                forms[m] = step(m, self.find_rule, forms, values)
            except (NotImplementedError, RuntimeError):
                return None
            if forms[m] is None:
                return None
        form = forms[n]
        return form if isinstance(form, Form) else None


def _size(n: fx.Node) -> int:
    value = n.meta["val"]
    return int(np.prod([known(size) for size in value.shape])) if isinstance(value, Tensor) else 0


def _turn(form: Form, column: Tensor) -> tuple[Tensor, Ids, Ids, Ids] | None:
    """What the form of a tensor says, if it turns planes of the units of a column, each at one place: the column of the
    result, its units, their codes, and the planes."""
    raw = core(column, support(column)).reshape(-1).numpy()
    shape = form.shape
    dims = [d for d in range(len(shape)) if shape[d] > 1 and d not in support(form.place)]
    sizes = [shape[d] for d in dims]
    if int(np.prod(sizes)) != len(raw) or len(distinct(raw)) < len(raw) or (raw == NOTHING).any():
        return None
    if any(f.is_complex() or not set(support(e)) <= set(dims) for e, f in form.terms):
        return None
    entry, factor = _table(form, dims)
    if not np.isin((entry != NO_ENTRY).sum(0), (1, 2)).all():
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


def _table(form: Form, dims: Sequence[int]) -> tuple[Ids, Factors]:
    """For every term and position along some dimensions the entry, and the factors at all places; each entry once."""
    along = sorted({d for _, f in form.terms for d in support(f)} - set(dims))
    count = int(np.prod([form.shape[d] for d in dims]))
    entry = np.stack([core(e, dims).reshape(-1).numpy() for e, _ in form.terms])
    factor = np.stack([core(f, [*dims, *along]).reshape(count, -1).double().numpy() for _, f in form.terms])
    for k in range(len(entry)):
        for i in range(k):
            same = (entry[i] == entry[k]) & (entry[i] != NO_ENTRY)
            factor[i, same] += factor[k, same]
            factor[k, same], entry[k, same] = 0, NO_ENTRY
    entry[(factor == 0).all(-1)] = NO_ENTRY
    return entry, factor


def _commutes(matrix: Factors) -> NDArray[np.bool_]:
    """For every plane, whether its matrices are of the form ((a, -b), (b, a)) at all places."""
    same: NDArray[np.bool_] = ((matrix[0, 0] == matrix[1, 1]) & (matrix[0, 1] == -matrix[1, 0])).all(-1)
    return same

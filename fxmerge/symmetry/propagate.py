"""Walks an ATen graph and labels every tensor in it, filling a unit graph on the way."""

from __future__ import annotations

import logging
import operator
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from itertools import combinations
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from fxmerge.program import Program
from fxmerge.symmetry import rules
from fxmerge.symmetry.columns import Shape, core, spread, support
from fxmerge.symmetry.deferred import Deferred
from fxmerge.symmetry.labels import Labels, inert, pin
from fxmerge.symmetry.probe import Prober
from fxmerge.symmetry.relate import relate
from fxmerge.symmetry.units import Ids, UnitGraph, distinct

logger = logging.getLogger(__name__)

Axis = tuple[str, int]
"""A parameter's name and one of its dimensions."""


@dataclass
class AxisUnits:
    """The units of one parameter axis.

    `ids` has one dimension for each entry of `dims`: the axis itself, and every other dimension whose
    rows are used apart from each other, so that the axis has separate units for each block of rows.
    """

    dims: tuple[int, ...]
    ids: Ids


@dataclass
class Propagation:
    """What a walk over a program found: its units, how often each op was met that has no rule or was probed, and the
    labels of every node, apart from those that were deferred."""

    program: Program
    units: UnitGraph
    axes: dict[Axis, AxisUnits]
    unknown: Counter[Any] = field(default_factory=Counter)
    probed: Counter[Any] = field(default_factory=Counter)
    labels: dict[str, Labels] = field(default_factory=dict)
    deferred: dict[str, Deferred] = field(default_factory=dict)


def propagate(program: Program, find_rule: rules.Lookup = rules.find_rule) -> Propagation:
    """Labels the graph: again with ops written out that have no rule, if torch can do so, and again with
    those parameters split whose rows are used apart."""
    splits: dict[Axis, Ids] = {}
    prober = None
    while True:
        found = _Walk(program, splits, find_rule, prober).run_all()
        if found.unknown and prober is None:
            simpler = program.aten.decompose(found.unknown)
            if simpler is None:
                prober = Prober(program, set(found.unknown))
            else:
                program = replace(program, aten=simpler)
            continue
        more = _rows_used_apart(found, splits)
        if not more:
            return found
        splits = splits | more


def _rows_used_apart(found: Propagation, known: Mapping[Axis, Ids]) -> dict[Axis, Ids]:
    """For every axis whose rows are used apart, the block that each row belongs to."""
    if not found.units.rows:
        return {}
    movable = np.ones(found.units.size, bool)
    for ids in found.units.final:
        movable[ids] = False
    blocks, count = np.zeros(found.units.size, np.int64), 1
    for ids, groups in found.units.rows:
        span = int(groups.max() - groups.min()) + 1
        block = np.unique(blocks[ids] * span + groups - groups.min(), return_inverse=True)[1]
        blocks[ids] = count + block
        count += int(block.max()) + 1
    by_parameter = defaultdict(list)
    for (name, dim), axis in found.axes.items():
        if movable[axis.ids].any():
            by_parameter[name].append(dim)
    splits = {}
    for (name, dim), axis in found.axes.items():
        row = blocks[
            np.moveaxis(axis.ids, axis.dims.index(dim), 0).reshape(axis.ids.shape[axis.dims.index(dim)], -1)[:, 0]
        ]
        if (name, dim) not in known and len(np.unique(row)) > 1 and set(by_parameter[name]) - {dim}:
            splits[name, dim] = np.unique(row, return_inverse=True)[1]
    return splits


class _Walk(fx.Interpreter):
    """One walk over the graph. Nodes hold `Labels`, or the values of what does not depend on the inputs or
    parameters, which is computed as it stands."""

    def __init__(
        self, program: Program, splits: Mapping[Axis, Ids], find_rule: rules.Lookup, prober: Prober | None
    ) -> None:
        super().__init__(program.graph, garbage_collect_values=True)
        self.program, self.splits, self.find_rule, self.prober = program, splits, find_rule, prober
        self.found = Propagation(program, UnitGraph(), {})

    def run_all(self) -> Propagation:
        with torch.no_grad():
            self.run(*(None for _ in self.program.graph.graph.find_nodes(op="placeholder")))
        return self.found

    def run_node(self, n: fx.Node) -> Any:
        self.found.units.node = n.name
        if n.op == "placeholder":
            value = self._placeholder(n)
        elif n.op == "output":
            self._output(n)
            value = None
        elif n.op == "call_function":
            args, kwargs = self.fetch_args_kwargs_from_env(n)
            value = self._call(n, args, kwargs)
        else:
            value = super().run_node(n)
        if isinstance(value, Labels):
            self.found.labels[n.name] = value
        elif isinstance(value, Deferred):
            self.found.deferred[n.name] = value
        return value

    def _placeholder(self, n: fx.Node) -> Any:
        shape = shape_of(n)
        kind, name = self.program.sources[n]
        if kind == "parameter":
            return self._parameter(name, shape)
        if kind == "constant":
            return self.program.constants[name]
        return inert(shape) if isinstance(n.meta["val"], Tensor) else n.meta["val"]

    def _parameter(self, name: str, shape: Shape) -> Labels:
        units = self.found.units
        split = [d for d in range(len(shape)) if (name, d) in self.splits]
        columns: list[Tensor] = []
        for dim in range(len(shape)):
            if shape[dim] < 2:
                continue
            if (name, dim) not in self.found.axes:
                others = [d for d in split if d != dim and (dim not in split or d < dim)]
                counts = [int(self.splits[name, d].max()) + 1 for d in others]
                ids = units.fresh(int(np.prod(counts)) * shape[dim], ("axis", name, dim)).reshape(*counts, shape[dim])
                for i, d in enumerate(others):
                    ids = np.take(ids, self.splits[name, d], axis=i)
                dims = sorted((*others, dim))
                order = [(*others, dim).index(d) for d in dims]
                self.found.axes[name, dim] = AxisUnits(tuple(dims), np.ascontiguousarray(ids.transpose(order)))
            axis = self.found.axes[name, dim]
            columns.append(spread(torch.from_numpy(axis.ids), shape, axis.dims))
        for a, b in combinations(columns, 2):
            relate(units, a, b, f"{name}: rows used apart")
        return Labels(shape, tuple(columns), parameter=name)

    def _call(self, n: fx.Node, args: Any, kwargs: Any) -> Any:
        if not _labels_in((args, kwargs)):
            return n.target(*args, **kwargs)  # type: ignore[operator]
        if n.meta.get("val") is None and not n.users:
            return None
        if not isinstance(n.meta.get("val"), (Tensor, tuple, list)):
            if not n.name.startswith("sym_"):
                self._settled(n, args, kwargs)
            return concrete(n.meta.get("val"))
        if n.target is operator.getitem:
            return args[0][args[1]]
        used = frozenset(cast(int, u.args[1]) for u in n.users if u.target is operator.getitem and u.users)
        site = rules.Site(self.found.units, n.name, n.target, shape_of(n), used, n)
        if getattr(getattr(n.target, "_schema", None), "is_mutable", False):
            return self._write(n, *self._settled(n, args, kwargs))
        several = isinstance(site.shape, list)
        if all(0 in shape for shape in (site.shape if several else [site.shape])):
            return [Labels(shape) for shape in site.shape] if several else Labels(site.shape)
        value = self._try(n, lambda: self._apply_rule(site, n, args, kwargs))
        if value is not NotImplemented:
            moved = {v.parameter for v in _labels_in(value)}
            for v in _labels_in((args, kwargs)):
                if v.parameter not in moved:
                    self._use(v)
            return value
        args, kwargs = self._settled(n, args, kwargs)
        for v in _labels_in((args, kwargs)):
            self._use(v)
        if self.prober is not None:
            prober = self.prober
            value = self._try(n, lambda: prober.label(site, n, args, kwargs))
            if value is not NotImplemented:
                self.found.probed[n.target] += 1
                return value
        self.found.unknown[n.target] += 1
        for v in _labels_in((args, kwargs)):
            pin(self.found.units, v, f"{n.name}: no rule for {n.target}")
        return [inert(s) for s in site.shape] if several else inert(site.shape)

    def _write(self, n: fx.Node, args: Any, kwargs: Any) -> Any:
        """An op in place, which a trace leaves where it writes to a constant: all that it reads is pinned, and of what
        it writes to, and what that is a view of, it is only known that positions differ."""
        for v in _labels_in((args, kwargs)):
            self._use(v)
            pin(self.found.units, v, f"{n.name}: written in place")
        node: Any = n
        while isinstance(node, fx.Node) and isinstance(node.meta.get("val"), Tensor):
            self.env[node] = inert(shape_of(node))
            node = node.args[0] if node.args else None
        shape = shape_of(n)
        return [inert(s) for s in shape] if isinstance(shape, list) else inert(shape)

    def _try(self, n: fx.Node, label: Callable[[], Any]) -> Any:
        """The labels, or NotImplemented where there is an error: a node that cannot be labelled is pinned."""
        try:
            return label()
        except Exception:
            logger.warning("node %s (%s) could not be labelled, and is pinned", n.name, n.target, exc_info=True)
            return NotImplemented

    def _apply_rule(self, site: rules.Site, n: fx.Node, args: Any, kwargs: Any) -> Any:
        """What the op's rule gives; NotImplemented if there is none, or it does not serve this call."""
        rule = self.find_rule(n.target)
        return NotImplemented if rule is None else rules.lifting.apply(rule, site, args, kwargs)

    def _settled(self, n: fx.Node, args: Any, kwargs: Any) -> Any:
        """The arguments of a node with labels in place of what is deferred."""
        return rules.lifting.settle(rules.Site(self.found.units, n.name, n.target, None), args, kwargs)

    def _output(self, n: fx.Node) -> None:
        for node in self.program.outputs(n):
            value = self.env[node]
            if isinstance(value, Deferred):
                for part in value.parts:
                    self._use(part)
                value = value.settle(self.found.units, "output")
            if isinstance(value, Labels):
                self._use(value)
                pin(self.found.units, value, "output")

    def _use(self, x: Labels) -> None:
        if x.parameter is not None:
            for column in x.columns:
                self.found.units.use(distinct(core(column, support(column)).numpy()))


def _labels_in(value: Any) -> list[Labels]:
    leaves = pytree.tree_leaves(value, is_leaf=lambda v: isinstance(v, (Labels, Deferred)))
    parts = (v.parts if isinstance(v, Deferred) else (v,) for v in leaves if isinstance(v, (Labels, Deferred)))
    return [p for own in parts for p in own]


def concrete(size: Any) -> Any:
    """The number that a symbolic size stood for when the graph was captured."""
    return size.node.hint if isinstance(size, torch.SymInt) else size


def shape_of(n: fx.Node) -> Any:
    """The shape of a node's output, or a list of shapes where it has several."""
    value = n.meta["val"]
    if isinstance(value, (tuple, list)):
        return [tuple(concrete(s) for s in v.shape) if isinstance(v, Tensor) else () for v in value]
    return tuple(concrete(s) for s in value.shape) if isinstance(value, Tensor) else ()

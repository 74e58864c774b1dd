"""Walks an ATen graph and labels every tensor in it, filling a unit graph on the way."""

from __future__ import annotations

import logging
import operator
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from itertools import combinations
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from fxmerge.errors import OptionError
from fxmerge.program.captured import Program
from fxmerge.program.double import InSingle
from fxmerge.program.models import same_draws
from fxmerge.registered import load_rules
from fxmerge.symmetry import mixing, rules, weighing
from fxmerge.symmetry.columns import Shape, core, reshape, spread, support
from fxmerge.symmetry.deferred import Deferred
from fxmerge.symmetry.labels import Labels, inert, pin, prune
from fxmerge.symmetry.parts import COMMUTATIVE, Part, combine, parts
from fxmerge.symmetry.probe import Prober
from fxmerge.symmetry.propagation import Axis, AxisUnits, Propagation, rows_summed_apart, rows_used_apart
from fxmerge.symmetry.relate import relate, rows_along
from fxmerge.symmetry.rules import elementwise, movement
from fxmerge.symmetry.rules.random import draws
from fxmerge.symmetry.turns import Turn, Turns
from fxmerge.symmetry.units import Ids, UnitGraph, distinct

logger = logging.getLogger(__name__)

OUTPUT = "output"
"""The reason given for units that lie along an output."""


def propagate(
    program: Program,
    find_rule: rules.Lookup = rules.find_rule,
    free: Collection[int] = frozenset(),
    uniform: Collection[str] = (),
    still: Collection[str] = (),
    *,
    weighs: bool = True,
) -> Propagation:
    """Labels the graph: again with ops written out that have no rule, if torch can do so, and again with
    those parameters split whose rows are used apart. Units may move along the outputs whose numbers are in `free`. The
    parameters named in `uniform` are vectors of one number each. Planes that a part of the graph turns are told,
    but for the parts that end with nodes named in `still`. `weighs` as for `UnitGraph`."""
    load_rules()
    splits: dict[Axis, Ids] = {}
    prober, tried = None, set[Any]()
    while True:
        walk = _Walk(program, splits, find_rule, prober, free, uniform, still, weighs)
        found = walk.run_all()
        if found.unknown and prober is None:
            simpler = program.aten.decompose(found.unknown.keys() - tried)
            tried |= found.unknown.keys()
            if simpler is None:
                prober = Prober(program, set(found.unknown))
            else:
                program = replace(program, aten=simpler)
            continue
        more = rows_used_apart(found, splits) or rows_summed_apart(found, splits)
        if not more:
            for node, error in walk.failed.items():
                logger.warning("%s (%s) cannot be labelled, so what it reads is pinned.", node.name, node.target)
                logger.debug("%s: %s", node.name, error, exc_info=error)
            return found
        splits = splits | more


class _Walk(fx.Interpreter):
    """One walk over the graph. Nodes hold `Labels`, or the values of what does not depend on the inputs or
    parameters, which is computed as it stands."""

    def __init__(
        self,
        program: Program,
        splits: Mapping[Axis, Ids],
        find_rule: rules.Lookup,
        prober: Prober | None,
        free: Collection[int],
        uniform: Collection[str],
        still: Collection[str],
        weighs: bool,
    ) -> None:
        super().__init__(program.graph, garbage_collect_values=True)
        self.program, self.splits, self.find_rule, self.prober = program, splits, find_rule, prober
        self.free, self.uniform = free, uniform
        self.found = Propagation(program, UnitGraph(weighs), {})
        self.failed: dict[fx.Node, Exception] = {}
        self.fixed: set[fx.Node] = set()
        self.written: list[fx.Node] = []
        self.wide: dict[int, tuple[Tensor, Tensor]] = {}
        self.parts = parts(program.graph.graph, self._combines, self._moves)
        moved = {n for n, (kind, _) in program.sources.items() if kind == "parameter"}
        self.turns, self.still = Turns(program.graph.graph, moved, find_rule), still
        self.factors: dict[fx.Node, Any] = {}
        self.turned: dict[fx.Node, Turn] = {}

    def run_all(self) -> Propagation:
        with torch.no_grad():
            self.run(*(None for _ in self.program.graph.graph.find_nodes(op="placeholder")))
        self.found.units.keep({n.name for n in self._read()})
        return self.found

    def _read(self) -> set[fx.Node]:
        """The nodes on which outputs depend: an op that takes only the shape of its operand gives a constant."""
        read: set[fx.Node] = set()
        open_ = [self.program.graph.graph.output_node(), *self.written]
        while open_:
            node = open_.pop()
            if node not in read and node not in self.fixed:
                read.add(node)
                open_ += self.turned[node].inputs if node in self.turned else node.all_input_nodes
        return read

    def run_node(self, n: fx.Node) -> Any:
        self.found.units.node = n.name
        if n.op == "placeholder":
            value = self._placeholder(n)
        elif n.op == "output":
            self._output(n)
            value = None
        elif n.op == "call_function":
            args, kwargs = self.fetch_args_kwargs_from_env(n)
            turn = None if n.name in self.still else self.turns.at(n, self.found.labels, self.factors)
            if turn is not None:  # What the op says by itself is forgotten.
                self.found.units.node = f"{n.name} in parts"
            value = self._call(n, args, kwargs)
            if turn is not None and isinstance(value, Labels):
                value = self._turned(n, turn, value)
        else:
            value = self._widened(super().run_node(n))
        if isinstance(value, Labels):
            # An object of its own for every node: rules take operands that are one object for one tensor.
            value = replace(value, is_mask=getattr(n.meta.get("val"), "dtype", None) is torch.bool)
            self.found.labels[n.name] = value
        elif isinstance(value, Deferred):
            self.found.deferred[n.name] = value
        elif isinstance(value, Tensor) or n.name.startswith("sym_"):
            self.fixed.add(n)
        if n in self.turns.factors:
            self.factors[n] = value
        return value

    def _turned(self, n: fx.Node, turn: Turn, value: Labels) -> Labels:
        """The labels of a node that ends a turn, from those that it has by itself."""
        units, self.turned[n] = self.found.units, turn
        units.node = n.name
        units.turn(turn.units, turn.code, turn.planes, n.name)
        self._use(self.found.labels[turn.inputs[0].name])
        others = [d for d in range(value.ndim) if d not in support(turn.column)]
        inert_ = [rows_along(f, others) for f in value.inert if not set(others).isdisjoint(support(f))]
        return Labels(value.shape, (turn.column,), prune(inert_, [turn.column]))

    def _placeholder(self, n: fx.Node) -> Any:
        shape = shape_of(n)
        kind, name = self.program.sources[n]
        if kind == "parameter":
            return self._parameter(name, shape)
        if kind == "constant":
            return self._widened(self.program.constants[name])
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
        uniform = frozenset([name]) if name in self.uniform else None
        return Labels(shape, tuple(columns), parameter=name, uniform=uniform)

    def _widened(self, value: Any) -> Any:
        """A constant in at least single precision: in less, many more values are equal than those that are meant to be.

        One tensor stays one, so that what is written into it is seen wherever it is read.
        """
        wider = InSingle.wider.get(value.dtype) if isinstance(value, Tensor) else None
        if wider is None:
            return value
        return self.wide.setdefault(id(value), (value, value.to(wider)))[1]

    def _compute(self, n: fx.Node, args: Any, kwargs: Any) -> Any:
        """What depends on constants alone, in at least single precision where the op takes that."""
        target = cast(Callable[..., Any], n.target)
        if target is not torch.ops.aten.view.dtype:  # It reads the bits of a number.
            try:
                with InSingle():  # type: ignore[no-untyped-call]
                    return target(*args, **kwargs)
            except (NotImplementedError, RuntimeError):
                logger.debug("%s (%s) is computed in its own precision", n.name, target, exc_info=True)
        args, kwargs = fx.map_arg((n.args, n.kwargs), self._as_recorded)
        return target(*args, **kwargs)

    def _as_recorded(self, n: fx.Node) -> Any:
        value, recorded = self.env[n], n.meta.get("val")
        return value.to(recorded.dtype) if isinstance(value, Tensor) and isinstance(recorded, Tensor) else value

    def _call(self, n: fx.Node, args: Any, kwargs: Any) -> Any:
        if not _labels_in((args, kwargs)):
            if draws(n.target, args, kwargs):  # Other numbers at each call, which may be equal by chance.
                shape = shape_of(n)
                return [inert(s) for s in shape] if isinstance(shape, list) else inert(shape)
            with same_draws(*args):
                return self._compute(n, args, kwargs)
        if n.meta.get("val") is None and not n.users:
            return None
        if not isinstance(n.meta.get("val"), (Tensor, tuple, list)):
            if not n.name.startswith("sym_"):
                self._settled(n, args, kwargs)
            return concrete(n.meta.get("val"))
        if n in self.parts and (isinstance(args[0], Part) or (n.args[0] not in self.parts and _is_activation(args[0]))):
            return self._part(n, *args, **kwargs)
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
        told = self._is_told(n, args, kwargs)
        operands = _labels_in((args, kwargs))
        if not (told and rules.mixes(n.target)) and (value is not NotImplemented or self.prober is None):
            site.mix(mixing.separate, *operands)
        if not (told and rules.weighs(n.target)):
            site.weigh(weighing.still, *operands)
        if value is not NotImplemented:
            moved = {v.parameter for v in _labels_in(value)}
            for v in operands:
                if v.parameter not in moved and site.meets.get(v.parameter or "", True):
                    self._use(v)
            is_zero = isinstance(value, Labels) and value.is_zero
            return torch.zeros(value.shape, dtype=n.meta["val"].dtype) if is_zero else value
        args, kwargs = self._settled(n, args, kwargs)
        for v in _labels_in((args, kwargs)):
            self._use(v)
        if self.prober is not None:
            prober = self.prober
            value = self._try(n, lambda: prober.label(site, n, args, kwargs))  # This records what units are mixed.
            if value is not NotImplemented:
                self.failed.pop(n, None)
                self.found.probed[n.target] += 1
                return value
        self.found.unknown[n.target] += 1
        for v in _labels_in((args, kwargs)):
            pin(self.found.units, v, f"{n.name}: {'no labels' if n in self.failed else 'no rule'} for {n.target}")
        return [inert(s) for s in site.shape] if several else inert(site.shape)

    def _combines(self, target: Any) -> bool:
        return target in COMMUTATIVE and self.find_rule(target) is elementwise.pointwise

    def _moves(self, target: Any) -> bool:
        return target is operator.getitem or self.find_rule(target) in movement.MOVEMENTS

    def _part(self, n: fx.Node, x: Labels | Part, *args: Any, **kwargs: Any) -> Part:
        """A rearrangement that waits for the op that it is for."""
        whole = x if isinstance(x, Part) else Part(x, lambda column: column)
        if self.find_rule(n.target) is movement.view:
            shape = shape_of(n)
            return whole.then(lambda column: reshape(column, shape))
        return whole.then(movement.on_columns(n.target, *args, **kwargs))

    def _write(self, n: fx.Node, args: Any, kwargs: Any) -> Any:
        """An op in place, which a trace leaves where it writes to a constant: all that it reads is pinned, and of what
        it writes to, and what that is a view of, it is only known that positions differ."""
        self.written.append(n)
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
        except OptionError:  # A user's own rule is wrong.
            raise
        except Exception as error:
            self.failed[n] = error
            return NotImplemented

    def _apply_rule(self, site: rules.Site, n: fx.Node, args: Any, kwargs: Any) -> Any:
        """What the op's rule gives; NotImplemented if there is none, or it does not serve this call."""
        rule = self.find_rule(n.target)
        if any(isinstance(a, Part) for a in args):
            return combine(site, *args)
        if rule is None:
            return NotImplemented
        apply = rules.lifting.apply if rules.users.is_ours(rule) else rules.users.apply
        return apply(rule, site, args, kwargs)

    def _is_told(self, n: fx.Node, args: Any, kwargs: Any) -> bool:
        """Whether what the rule of an op records of changes of basis holds for a call."""
        leaves = pytree.tree_leaves((args, kwargs), is_leaf=_is_labelled)
        deferred = any(isinstance(v, (Deferred, Part)) for v in leaves)
        rule = self.find_rule(n.target)
        return rule is rules.find_rule(n.target) and n not in self.failed and not deferred and not _rounds(n)

    def _settled(self, n: fx.Node, args: Any, kwargs: Any) -> Any:
        """The arguments of a node with labels in place of what is deferred."""
        return rules.lifting.settle(rules.Site(self.found.units, n.name, n.target, None), args, kwargs)

    def _output(self, n: fx.Node) -> None:
        for number, node in self.program.numbered_outputs(n):
            value = self.env[node]
            if isinstance(value, Deferred):
                for part in value.parts:
                    self._use(part)
                value = value.settle(self.found.units, OUTPUT)
            if isinstance(value, Labels):
                self._use(value)
                for what in (mixing.separate, weighing.still):  # Free outputs are permuted only.
                    self.found.units.record(what, [value], {}, OUTPUT)
                still = [c for c in value.columns if number not in self.free or not self._may_move(c, value)]
                pin(self.found.units, replace(value, columns=tuple(still)), OUTPUT)

    def _may_move(self, column: Tensor, value: Labels) -> bool:
        """Whether a column of a free output tells which unit of a parameter is where along one dimension."""
        dims = support(column)
        if len(dims) != 1 or any(dims[0] in support(c) for c in value.columns if c is not column):
            return False
        units = self.found.units
        origins = distinct(units.origin(core(column, dims).numpy()))
        return all(units.origins[i][0] in ("axis", "nothing") for i in origins.tolist())

    def _use(self, x: Labels) -> None:
        if x.parameter is not None:
            for column in x.columns:
                self.found.units.use(distinct(core(column, support(column)).numpy()))


def _rounds(n: fx.Node) -> bool:
    """Whether a node gives whole numbers or truth values, which casts and sums may do, or reads the bits of numbers."""
    first = next((v for v in pytree.tree_leaves(n.meta["val"]) if isinstance(v, Tensor)), None)
    whole = first is not None and not (first.is_floating_point() or first.is_complex())
    return whole or n.target is torch.ops.aten.view.dtype


def _labels_in(value: Any) -> list[Labels]:
    leaves = pytree.tree_leaves(value, is_leaf=_is_labelled)
    parts = (_labels_of(v) for v in leaves)
    return [p for own in parts for p in own]


def _labels_of(value: Any) -> tuple[Labels, ...]:
    if isinstance(value, Deferred):
        return value.parts
    whole = value.source if isinstance(value, Part) else value
    return (whole,) if isinstance(whole, Labels) else ()


def _is_labelled(value: Any) -> bool:
    return isinstance(value, (Labels, Deferred, Part))


def _is_activation(value: Any) -> bool:
    return isinstance(value, Labels) and value.parameter is None


def concrete(size: Any) -> Any:
    """The number that a symbolic size stood for when the graph was captured."""
    return size.node.hint if isinstance(size, torch.SymInt) else size


def shape_of(n: fx.Node) -> Any:
    """The shape of a node's output, or a list of shapes where it has several."""
    value = n.meta["val"]
    if isinstance(value, (tuple, list)):
        return [tuple(concrete(s) for s in v.shape) if isinstance(v, Tensor) else () for v in value]
    return tuple(concrete(s) for s in value.shape) if isinstance(value, Tensor) else ()

"""A rule of one op as a line of text, and whether the op itself does what the line says.

An expression such as `linear(P(5, 4), P(3, 4))` becomes a graph of that one op over fresh parameters. Propagation
labels it, and what is found is printed with a letter for every class of units:

    linear(P(5, 4), P(3, 4))    (a b), (c b) -> (a c)

| token | meaning |
|---|---|
| `a` | a class of units, one at each position, in order |
| `(a b)` | units of `b` inside of blocks `a`, block after block |
| `(2 a)` `(a 2)` | every unit twice, in the same role |
| `(. a)` | as before, but the places of a unit are told apart |
| `a[2 1 0]` | units in this order |
| `a+b` | one after the other |
| `{a b}` | these, in some other arrangement |
| `a@01` | units along the dimensions 0 and 1 together |
| `a&b` | units of both at each position |
| `!` | units that do not move |
| `.` | no units, but positions differ; `.[0 1 0]` where some are alike |
| `_` | all positions alike |
| `(a => b)` | numbers along `a` that name units of `b` |
| `-` | an output that is not read |
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, wraps
from itertools import groupby, permutations
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx
from torch.nn.functional import one_hot
from torch.utils import _pytree as pytree

from fxmerge.program.captured import AtenGraph, Program
from fxmerge.program.double import _WRITTEN_OUT
from fxmerge.symmetry.classes import Resolution, resolve
from fxmerge.symmetry.columns import core, joint_column, support
from fxmerge.symmetry.contracted import Contracted, Recorded
from fxmerge.symmetry.deferred import Deferred, Index
from fxmerge.symmetry.labels import Labels, constant
from fxmerge.symmetry.propagate import propagate
from fxmerge.symmetry.rules.elementwise import filled
from fxmerge.symmetry.rules.registry import Rule, Site, find_rule
from fxmerge.symmetry.units import NOTHING, Ids
from fxmerge.units.permutation import build_image

SHOWN = 12
"""How many places of units out of order are listed."""
PIECES = 4
"""A column of more pieces than this is printed as the set of its classes, in braces."""


@dataclass(frozen=True, eq=False)
class Leaf:
    """An operand: a parameter, an input or a constant."""

    kind: str
    value: Tensor


@dataclass(frozen=True, eq=False)
class Call:
    """An op with its arguments, among which are leaves and other calls; `used` names the outputs that are read."""

    target: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    used: int | None = None

    def __getitem__(self, number: int) -> Call:
        return replace(self, used=number)


@dataclass(frozen=True)
class _Op:
    """An op in an expression; `op.overload` where it is not the default one."""

    packet: Any

    def __getattr__(self, overload: str) -> _Op:
        return _Op(getattr(self.packet, overload))

    def __call__(self, *args: Any, **kwargs: Any) -> Call:
        return Call(getattr(self.packet, "default", self.packet), args, kwargs)


class _Names(dict[str, Any]):
    """The names in an expression: leaves, every op of ATen, and those of torch's primitives as `prims.op`."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(0)
        leaves = {"P": self.parameter, "X": self.input, "T": self.constant}
        super().__init__(**leaves, torch=torch, inf=math.inf, prims=_Op(torch.ops.prims))

    def __missing__(self, name: str) -> _Op:
        packet = getattr(torch.ops.aten, name, None)
        if packet is None:
            raise KeyError(name)
        return _Op(packet)

    def _random(self, shape: Sequence[int], high: int | None, dtype: torch.dtype = torch.float64) -> Tensor:
        if high is not None:
            return torch.randint(high, tuple(shape), generator=self.generator)
        return torch.randn(tuple(shape), dtype=dtype, generator=self.generator)

    def parameter(self, *shape: int, dtype: torch.dtype = torch.float64) -> Leaf:
        return Leaf("parameter", self._random(shape, None, dtype))

    def input(self, *shape: int, high: int | None = None) -> Leaf:
        return Leaf("input", self._random(shape, high))

    def constant(self, *values: Any) -> Leaf:
        value = torch.tensor(values[0] if len(values) == 1 and isinstance(values[0], list) else list(values))
        return Leaf("constant", value.double() if value.is_floating_point() else value)


def read(expression: str) -> Call:
    """The call that an expression stands for; its parameters have random values."""
    call = eval(expression, {}, _Names())
    assert isinstance(call, Call)
    return call


def _leaves(call: Call) -> Iterator[Leaf]:
    seen: set[int] = set()
    for x in pytree.tree_leaves((call.args, call.kwargs), is_leaf=_is_operand):
        for leaf in _leaves(x) if isinstance(x, Call) else [x] if isinstance(x, Leaf) else []:
            if id(leaf) not in seen:
                seen.add(id(leaf))
                yield leaf


def ops(call: Call) -> Iterator[Any]:
    """The ops of a call, its own first."""
    yield call.target
    for x in pytree.tree_leaves((call.args, call.kwargs), is_leaf=_is_operand):
        if isinstance(x, Call):
            yield from ops(x)


def _is_operand(x: Any) -> bool:
    return isinstance(x, (Leaf, Call))


def _read(value: Any, number: int | None) -> Any:
    return value if number is None else value[number]


def run(call: Call, values: dict[int, Tensor]) -> Any:
    """The outputs of a call, with these values for its leaves."""

    def value(x: Any) -> Any:
        if isinstance(x, Leaf):
            return values[id(x)].clone()
        return _read(run(x, values), x.used) if isinstance(x, Call) else x

    args, kwargs = pytree.tree_map(value, (call.args, call.kwargs), is_leaf=_is_operand)
    torch.manual_seed(0)
    with torch.no_grad():
        return _WRITTEN_OUT.get(call.target, call.target)(*args, **kwargs)


@dataclass
class Analysis:
    """What propagation finds of one call.

    Attributes:
        leaves: its operands, each with its labels.
        outputs: the labels of its outputs, None for one that is not read.
        state: the resolved unit graph.
        resolution: the classes that it gives.
    """

    call: Call
    leaves: list[tuple[Leaf, Labels]]
    outputs: list[Labels | Index | None]
    state: Contracted
    resolution: Resolution
    unknown: list[str]
    letters: dict[int, str] = field(default_factory=dict)

    # ------------------------------------------------------------------ text

    def __str__(self) -> str:
        operands = ", ".join(self._pattern(labels) for _, labels in self.leaves)
        results = ", ".join("-" if y is None else self._pattern(y) for y in self.outputs)
        why = dict.fromkeys(w.split(": ")[-1] for reasons in self.resolution.pinned.values() for w in reasons)
        return f"{operands} -> {results}" + (f" ! {'; '.join(why)}" if why else "")

    def _pattern(self, x: Labels | Index) -> str:
        tokens = self._tokens(_hot(x) if isinstance(x, Index) else x)
        if isinstance(x, Index):
            return f"({' '.join(tokens[:-1])} => {tokens[-1]})"
        return f"({' '.join(tokens)})"

    def _tokens(self, x: Labels) -> list[str]:
        tokens: list[list[str]] = [[] for _ in x.shape]
        kinds = [dims for dims in sorted({support(c) for c in (*x.columns, *x.inert)}, key=len) if dims]
        for dims in kinds:
            joint = joint_column([c for c in x.inert if support(c) == dims])
            marks = None if joint is None else core(joint, dims).reshape(-1).numpy()
            where = "" if len(dims) == 1 else "@" + "".join(map(str, dims))
            columns = [core(c, dims).reshape(-1).numpy() for c in x.columns if support(c) == dims]
            together = self._together(columns) if len(columns) > 1 else ""
            for token in [together] if together else [self._column(c, marks) for c in columns]:
                tokens[dims[-1]].append(token + where)
            if not columns and marks is not None:
                alike = _by_appearance(marks)
                full = len(np.unique(alike)) == len(alike)
                tokens[dims[-1]].append("." + ("" if full else str(alike).replace("\n", "")) + where)
        return ["&".join(t) or "_" for t in tokens]

    def _column(self, raw: Ids, marks: Ids | None) -> str:
        """A column as pieces of one class each."""
        unit = self.state.unit[self.state.units.first_names(raw)]
        still = {True: -2, False: -1}
        kinds = [
            self.state.colour[u] if self._moves(u) else still[bool(r == NOTHING)]
            for u, r in zip(unit, raw, strict=True)
        ]
        pieces, start = [], 0
        for kind, run_ in groupby(kinds):
            stop = start + len(list(run_))
            if kind < 0:
                pieces.append("!" if kind == -1 else ".")
            else:
                pieces.append(self._run(int(kind), unit[start:stop], None if marks is None else marks[start:stop]))
            start = stop
        if len(pieces) > PIECES:
            return "{" + " ".join(dict.fromkeys(p.partition("[")[0] for p in pieces)) + "}"
        return "+".join(pieces)

    def _together(self, columns: list[Ids]) -> str:
        """Columns along the same dimensions, where every combination of their units is there once."""
        factors: dict[str, Ids] = {}
        for raw in columns:
            unit = self.state.unit[self.state.units.first_names(raw)]
            c = int(self.state.colour[unit[0]])
            if not self._moves(unit[0]) or (self.state.colour[unit] != c).any():
                return ""
            factors |= {name: d[np.searchsorted(self.state.members(c), unit)] for name, d in self._factors(c).items()}
        return _product(factors)

    def _moves(self, unit: int) -> bool:
        return len(self.state.members(self.state.colour[unit])) > 1 and not self.state.pinned[unit]

    def _run(self, c: int, units: Ids, marks: Ids | None) -> str:
        members = self.state.members(c)
        place = np.searchsorted(members, units)
        copy = np.array([int((place[:i] == p).sum()) for i, p in enumerate(place)])
        factors = {name: digits[place] for name, digits in self._factors(c).items()}
        if copy.any():
            apart = marks is not None and len(np.unique(np.stack([place, marks]), axis=1).T) == len(place)
            factors["." if apart else str(int(copy.max()) + 1)] = copy
        product = _product(factors)
        if product:
            return product
        names = list(self._factors(c))
        if len(place) % len(members) == 0 and len(place) > len(members):
            parts = np.split(np.arange(len(place)), len(place) // len(members))
            if all(len(np.unique(place[p])) == len(members) for p in parts):
                return "+".join(self._run(c, units[p], None if marks is None else marks[p]) for p in parts)
        listed = " ".join(map(str, place)) if len(place) <= SHOWN else ".."
        name = names[0] if len(names) == 1 else f"({' '.join(names)})"
        return f"{name}[{listed}]"

    def _factors(self, c: int) -> dict[str, Ids]:
        """What a unit of a class is named by: its place in each of its blocks, and its rank among those in the same."""
        free, fixed = self.state.blocks(c)
        factors: dict[str, Ids] = {}
        for p, block in sorted(free.items(), key=lambda item: int(self.state.first[item[1]].min())):
            place = np.searchsorted(self.state.members(p), block)
            factors |= {name: digits[place] for name, digits in self._factors(p).items()}
        told = np.stack([*factors.values(), np.zeros_like(fixed)])
        if len(np.unique(np.vstack([told, fixed]), axis=1).T) > len(np.unique(told, axis=1).T):
            factors["."] = _by_appearance(fixed)
        key = np.unique(np.stack([*factors.values(), np.zeros_like(fixed)]), axis=1, return_inverse=True)[1].reshape(-1)
        rank = np.array([int((key[:i] == k).sum()) for i, k in enumerate(key)])
        if rank.any():
            factors[self.letters.setdefault(c, chr(ord("a") + len(self.letters)))] = rank
        return factors

    # ------------------------------------------------------------------ proof

    def holds(self, generator: np.random.Generator) -> str:
        """Permutes the operands by a random element of the group; a sentence where the outputs do not follow."""
        image = self._sample(generator)
        values = {id(leaf): leaf.value for leaf, _ in self.leaves}
        before = run(self.call, values)
        for leaf, labels in self.leaves:
            if leaf.kind == "parameter":
                here, there = self._names(labels, image)
                moved = torch.empty_like(leaf.value).reshape(-1)
                moved[np.argsort(here)] = leaf.value.reshape(-1)[np.argsort(there)]
                values[id(leaf)] = moved.reshape(leaf.value.shape)
        after = run(self.call, values)
        for number, (x, y, out) in enumerate(zip(_listed(before), _listed(after), self.outputs, strict=True)):
            if out is not None:
                if isinstance(out, Index):
                    x, y = one_hot(x, out.count), one_hot(y, out.count)
                here, there = self._names(_hot(out) if isinstance(out, Index) else out, image)
                if not np.array_equal(np.unique(here), np.unique(there)):
                    return f"output {number}: some positions move to where there are none"
                first = np.unique(here, return_index=True)[1]
                x, y = x.reshape(-1), y.reshape(-1)
                if not (_close(y, y[first][here]) and _close(x, y[first][there])):
                    return f"output {number} does not follow its operands"
        return ""

    def _sample(self, generator: np.random.Generator) -> Ids:
        """Where every contracted unit goes."""
        state, images = self.state, np.arange(self.state.count)
        todo = [c for c in range(int(state.colour.max()) + 1) if self._moves(state.members(c)[0])]
        done: set[int] = set()
        while todo:
            c = next(c for c in todo if set(state.blocks(c)[0]) <= done)
            todo.remove(c)
            done.add(c)
            free, fixed = state.blocks(c)
            key = np.stack([*free.values(), fixed], axis=1)

            def moved(rows: Ids) -> Ids:
                return np.concatenate([images[rows[:, :-1]], rows[:, -1:]], axis=1)

            def choose(_: Ids, places: Ids) -> Ids:
                return generator.permuted(places, axis=1)

            members = state.members(c)
            images[members] = members[build_image(len(members), key, moved, choose)]
        return images

    @cached_property
    def _roles(self) -> Ids:
        """For every raw unit on an axis, the number of the part of the axis that holds each unit once.

        Units that do not move may all be equal: each is a part.
        """
        moving = [r.raw for c in self.resolution.classes for r in c.roles]
        still = [raw for reasons in self.resolution.pinned.values() for ids in reasons.values() for raw in ids]
        roles = np.zeros(self.state.units.size, np.int64)
        for number, raw in enumerate([*moving, *still], start=1):
            roles[raw] = number
        return roles

    def _names(self, labels: Labels, image: Ids) -> tuple[Ids, Ids]:
        """For every position a number for what is there, and for what is there once the units have moved."""
        raw = [self.state.units.first_names(c.reshape(-1).numpy()) for c in labels.columns]
        units = [self.state.unit[r] for r in raw]
        still = [*(self._roles[r] for r in raw), *(c.reshape(-1).numpy() for c in labels.inert)]
        count = math.prod(labels.shape)
        here = np.stack([np.zeros(count, np.int64), *units, *still])
        there = np.stack([np.zeros(count, np.int64), *(image[u] for u in units), *still])
        number = np.unique(np.concatenate([here, there], axis=1), axis=1, return_inverse=True)[1].reshape(-1)
        return number[:count], number[count:]


def _product(factors: dict[str, Ids]) -> str:
    """The factors in the order in which they run through all their combinations; empty where they do not."""
    sizes = {name: len(np.unique(d)) for name, d in factors.items()}
    if all(math.prod(sizes.values()) == len(d) for d in factors.values()):
        for order in permutations(factors):
            digits = np.indices([sizes[n] for n in order]).reshape(len(order), -1)
            if all(np.array_equal(d, factors[n]) for n, d in zip(order, digits, strict=True)):
                return order[0] if len(order) == 1 else f"({' '.join(order)})"
    return ""


def _by_appearance(numbers: Ids) -> Ids:
    _, first, inverse = np.unique(numbers, return_index=True, return_inverse=True)
    rank: Ids = np.argsort(np.argsort(first))[inverse.reshape(-1)]
    return rank


def _hot(x: Index) -> Labels:
    """The labels of the one-hot vectors that numbers stand for, these along the last dimension."""
    return x.hot.map(lambda c: c.movedim(0, -1), (*x.shape, x.count))


def _close(x: Tensor, y: Tensor) -> bool:
    if x.is_complex():
        x, y = torch.view_as_real(x.resolve_conj()), torch.view_as_real(y.resolve_conj())
    if not x.is_floating_point():
        return torch.equal(x, y)
    return torch.allclose(x, y, rtol=1e-9, atol=1e-9, equal_nan=True)


def _listed(value: Any) -> list[Tensor]:
    return list(value) if isinstance(value, (tuple, list)) else [value]


def analyse(call: Call) -> Analysis:
    """Runs propagation on the graph of one call."""
    graph = fx.Graph()
    leaves = list(_leaves(call))
    nodes: dict[int, fx.Node] = {}
    for number, leaf in enumerate(leaves):
        node = graph.placeholder(f"{leaf.kind}_{number}")
        node.meta["val"] = leaf.value
        nodes[id(leaf)] = node
    values = {id(leaf): leaf.value for leaf in leaves}
    made: dict[tuple[Any, int], fx.Node] = {}

    def emit(x: Any) -> Any:
        if id(x) in nodes:
            return nodes[id(x)]
        if not isinstance(x, Call):
            return x
        if (x.target, id(x.args)) not in made:
            args, kwargs = pytree.tree_map(emit, (x.args, x.kwargs), is_leaf=_is_operand)
            name = x.target._schema.name.removeprefix("aten::").strip("_")
            node = made[x.target, id(x.args)] = graph.create_node("call_function", x.target, args, kwargs, name)
            node.meta["val"] = run(x, values)
        node = made[x.target, id(x.args)]
        return node if x.used is None or x is call else part(node, x.used)

    def part(node: fx.Node, number: int) -> fx.Node:
        taken = graph.call_function(operator.getitem, (node, number))
        taken.meta["val"] = node.meta["val"][number]
        return taken

    top = emit(call)
    results: list[fx.Node | None] = [top]
    if isinstance(top.meta["val"], (tuple, list)):
        count = len(top.meta["val"])
        results = [part(top, number) if call.used in (None, number) else None for number in range(count)]
    graph.output(tuple(r for r in results if r is not None))
    names = {leaf_id: node.name for leaf_id, node in nodes.items()}
    state = {names[id(x)]: x.value for x in leaves if x.kind == "parameter"}
    constants = {names[id(x)]: x.value for x in leaves if x.kind == "constant"}
    aten = AtenGraph(
        fx.GraphModule(torch.nn.Module(), graph),
        tuple((leaf.kind, names[id(leaf)]) for leaf in leaves),
        tuple(False for r in results if r is not None),
        pytree.tree_structure(()),
        state,
        constants,
    )
    returned: dict[str, Any] = {}

    def recording(target: Any) -> Rule | None:
        rule = find_rule(target)
        if rule is not filled:
            return rule

        def apply(at: Site, *args: Any, **kwargs: Any) -> Any:
            returned[at.name] = rule(at, *args, **kwargs)
            return returned[at.name]

        return wraps(rule)(apply)

    found = propagate(Program(aten.module, aten, "one op"), recording)
    labels = {id(x): constant(x.value) if x.kind == "constant" else found.labels[names[id(x)]] for x in leaves}

    known: dict[str, Any] = {**found.labels, **found.deferred}

    def output(value: Any) -> Labels | Index:
        if isinstance(value, Deferred) and not isinstance(value, Index):
            for c in (c for part in value.parts if part.parameter is not None for c in part.columns):
                found.units.use(np.unique(core(c, support(c)).numpy()))
            return value.settle(found.units, "output")
        return value if isinstance(value, (Labels, Index)) else constant(value)

    outputs = [None if r is None else output(known.get(r.name, returned.get(r.name))) for r in results]
    for y in outputs:
        if isinstance(y, Labels) and y.parameter is not None:
            for c in y.columns:
                found.units.use(np.unique(core(c, support(c)).numpy()))
    recorded = Recorded(found.units, found.axes)
    resolution = resolve(found.units, found.axes)
    return Analysis(
        call,
        [(leaf, labels[id(leaf)]) for leaf in leaves],
        outputs,
        Contracted(found.units, recorded),
        resolution,
        [str(op) for op in found.unknown],
    )

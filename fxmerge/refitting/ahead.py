"""Layers whose outputs are multiplied with each other, fitted for what their product becomes.

Queries and keys matter by their products, and so do values and the layer that reads what attention gives. A fit of each
layer alone counts errors that the product does not have, and misses others. So after their own fits, such layers are
fitted together, to what the next layer gives. That depends on their parameters by a product, so that each step solves a
linear least-squares problem (Gauss-Newton). Conjugate gradients solve it, and derivatives are those of the graph.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from fxmerge.program.captured import Program
from fxmerge.program.forms import argument, bind, op_name
from fxmerge.refitting.conjugate import Parameters, conjugate_steps, squares
from fxmerge.refitting.gather import MIN_ROWS, Counted, LayerFit, Shares, Teacher, Values
from fxmerge.refitting.layers import Layer, Use
from fxmerge.refitting.strength import MARGIN
from fxmerge.symmetry import rules

ROUNDS = 2
"""How often the problem is made linear."""

STEPS = (1, 2, 4, 8, 16)
"""After how many steps of conjugate gradients the error on data held out is measured. Fewer steps stay nearer to the
start, as a stronger ridge does."""

HELD_OUT = 5
"""Every so many batches, one is held out."""


@dataclass(frozen=True, eq=False)
class Ahead:
    """Layers, and what becomes of their outputs.

    Attributes:
        layers: the layers, in which all changes are made.
        readers: the uses of layers that read what becomes of the outputs, with these layers.
        nodes: what is computed on the way, in graph order, from parameters and `inputs`.
        inputs: activations that are read on the way.
    """

    layers: tuple[Layer, ...]
    readers: tuple[tuple[Layer, Use], ...]
    nodes: tuple[fx.Node, ...]
    inputs: frozenset[fx.Node]


def find_ahead(
    program: Program,
    due: Sequence[Layer],
    layers: Sequence[Layer],
    final: Mapping[fx.Node, int],
    stage: int,
) -> Ahead | None:
    """What becomes of the outputs of the layers of a stage in products of two activations; None if there are none.

    Arguments:
        program: the program.
        due: the layers of the stage.
        layers: all layers that are fitted.
        final: the first stage in which each node's value is no longer going to change.
        stage: the number of the stage.
    """
    derived = program.derived
    uses = {use.node: (layer, use) for layer in layers for use in layer.uses}
    starts = {layer.uses[0].node: layer for layer in due if len(layer.uses) == 1}
    reached, multiplied = set(starts), set[fx.Node]()
    ends: list[tuple[Layer, Use]] = []
    for node in program.graph.graph.nodes:
        read = reached.intersection(node.all_input_nodes)
        if node in starts or node.op == "output" or not read:
            continue
        if node in uses:
            layer, use = uses[node]
            if argument(bind(node), use.data) in multiplied and len(layer.uses) == 1:
                ends.append((layer, use))
            continue
        reached.add(node)
        product = len([n for n in rules.multiplied(node) if n not in derived]) > 1
        if product or not multiplied.isdisjoint(read):
            multiplied.add(node)
    found, way, inputs = [], set[fx.Node](), set[fx.Node]()
    for layer, use in ends:
        own, read = _leading_to(argument(bind(use.node), use.data), reached, derived)
        if not any(map(_draws, own)) and all(final[n] <= stage for n in read):
            found.append((layer, use))
            way |= own
            inputs |= read
    if not found:
        return None
    changed = tuple(layer for node, layer in starts.items() if node in way)
    order = tuple(node for node in program.graph.graph.nodes if node in way)
    return Ahead(changed, tuple(found), order, frozenset(inputs))


def _draws(node: fx.Node) -> bool:
    """Whether what a node computes is random; attention without dropout only may be."""
    random = torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
    return random and bind(node).get("dropout_p") != 0.0


def _leading_to(
    end: fx.Node, reached: Collection[fx.Node], derived: Collection[fx.Node]
) -> tuple[set[fx.Node], set[fx.Node]]:
    """The nodes that lead from some nodes, and from parameters, to an end; and the activations that they read."""
    own, read, todo = set[fx.Node](), set[fx.Node](), [end]
    while todo:
        node = todo.pop()
        if node in own or node in read:
            continue
        if node in reached or node in derived:
            own.add(node)
            todo += node.all_input_nodes
        else:
            read.add(node)
    return own, read


@dataclass(frozen=True)
class _Batch:
    """A batch: activations, the targets of every reader, and how much a row counts."""

    values: Values
    targets: list[Tensor]
    weight: float


class AheadFit:
    """The joint fit of layers whose outputs are multiplied.

    Arguments:
        program: the program.
        ahead: what becomes of their outputs.
        state: the parameters of the layers that come after.
        teachers: the parents.
        shown: the uses that learn from the teachers' outputs; others do from their coefficients.
        alike: how many batches there will be, by the shares of the parents in their targets.
        seed: of the choice of rows.
    """

    def __init__(
        self,
        program: Program,
        ahead: Ahead,
        state: Mapping[str, Tensor],
        teachers: Sequence[Teacher],
        shown: Collection[Use],
        alike: Mapping[Shares, int],
        seed: int,
    ) -> None:
        self.program, self.ahead = program, ahead
        self.fits = [LayerFit(layer, state, teachers, {}, shown, alike, seed) for layer, _ in ahead.readers]
        self.count, self.seen, self.every = sum(alike.values()), 0, 1
        self.batches: list[_Batch] = []

    def add(self, values: Values, taught: Mapping[int, Values], counted: Counted) -> None:
        """Takes in a batch; see `LayerFit.add`."""
        if self.seen % self.every == 0:
            targets = [
                fit.targets(use, taught, counted.shares, None)
                for fit, (_, use) in zip(self.fits, self.ahead.readers, strict=True)
            ]
            rows = max(targets[0].shape[1], 1)
            self.every = max(min(rows * self.count // MIN_ROWS, self.count // HELD_OUT), 1)
            self.batches.append(_Batch({n: values[n] for n in self.ahead.inputs}, targets, counted.weight))
        self.seen += 1

    def settle(self, state: dict[str, Tensor]) -> dict[str, dict[str, float]]:
        """Puts new parameters into a state dict, if these lower the error of what the readers give on data held out;
        and tells of every layer how large that error is before and after."""
        held, rest = self.batches[::HELD_OUT], [b for i, b in enumerate(self.batches) if i % HELD_OUT]
        self.batches = []
        names = list(dict.fromkeys(name for layer in self.ahead.layers for name in layer.parameters))
        if not rest or any(state[name].element_size() < 4 for name in names):
            return {}
        problem = _Problem(self, state, names, [*held, *rest])
        now = {name: state[name].detach() for name in names}
        before = best = _error(problem, now, held)
        for _ in range(ROUNDS):
            tried = [(_error(problem, own, held), own) for own in conjugate_steps(problem, now, rest, STEPS)]
            error, found = min(tried, key=lambda pair: pair[0], default=(best, now))
            if not error < best * (1 - MARGIN):
                break
            best, now = error, found
        state.update(now)
        return {layer.name: {"read_before": before, "read_after": best} for layer in self.ahead.layers}


class _Problem:
    """The least-squares problem of what readers give, over the parameters of the layers before them."""

    def __init__(
        self, fit: AheadFit, state: Mapping[str, Tensor], names: Sequence[str], batches: Sequence[_Batch]
    ) -> None:
        self.ahead = fit.ahead
        self.coefficients = [own.centre for own in fit.fits]
        squares = [
            sum(b.weight * float(b.targets[i].square().sum(dtype=torch.float64)) for b in batches)
            for i in range(len(fit.fits))
        ]
        self.scales = [square if square > 0 else 1.0 for square in squares]
        program = fit.program
        self.open, self.fixed = dict[fx.Node, str](), dict[fx.Node, Any]()
        self.way: list[fx.Node] = []
        for node in fit.ahead.nodes:
            kind, name = program.sources.get(node, ("", ""))
            if kind == "parameter" and name in names:
                self.open[node] = name
            elif kind == "parameter":
                self.fixed[node] = state.get(name, program.parameters[name])
            elif kind == "constant":
                self.fixed[node] = state.get(name, program.constants[name])
            else:
                self.way.append(node)

    def outputs(self, parameters: Parameters, batch: _Batch) -> tuple[Tensor, ...]:
        """What each reader gives on a batch, scaled so that the squares of all targets sum to one for each reader."""
        env = {**batch.values, **self.fixed, **{node: parameters[name] for node, name in self.open.items()}}
        for node in self.way:
            args, kwargs = fx.map_arg((node.args, node.kwargs), env.__getitem__)
            # Attention in simple ops leaves its result in another order in memory than the op that the graph is of.
            op: Any = torch.reshape if op_name(node) in ("view", "_unsafe_view") else node.target
            env[node] = op(*args, **kwargs)
        found = []
        for (_, use), own, scale in zip(self.ahead.readers, self.coefficients, self.scales, strict=True):
            # Of the other arguments, only the shapes count.
            call = fx.map_arg(bind(use.node), lambda n: env.get(n, n.meta.get("val")))
            x = use.features(call, None)
            found.append(x @ own.to(x) * math.sqrt(batch.weight / scale))
        return tuple(found)

    def targets(self, batch: _Batch) -> tuple[Tensor, ...]:
        return tuple(y * math.sqrt(batch.weight / scale) for y, scale in zip(batch.targets, self.scales, strict=True))


def _error(problem: _Problem, parameters: Parameters, batches: Sequence[_Batch]) -> float:
    """The squared error of what readers give, as a share of the squares of the targets."""
    missed, total = squares(problem, parameters, batches)
    return missed / total if total else 0.0

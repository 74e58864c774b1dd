"""Gains and shifts of normalizations, moved into the layers around them.

A network whose normalizations have a gain for every channel has few continuous symmetries: a rotation of the channels
does not commute with the gains. Where the layers that read a normalization multiply by its gains in its place, the
function is the same, the gains are all one, and rotations are symmetries. Three moves do this:

- Layers that read the channels take the gains into the columns of their weights, and the shifts into their biases.
  All that reads the channels has to be such a layer.
- The layer that writes the channels takes the gains into the rows of its weight. Nothing else may read what it writes.
  The shifts stay where they are, as a vector that is added.
- A shift that no bias can take stays, divided by its gain.

Which of these are possible is found from the graph. A network in eval mode is one in which a batch norm is such a
diagonal affine map as well. The mean that a layer norm subtracts needs no move: it commutes with all rotations that
keep the vector of ones.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import networkx as nx
import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from fxmerge.errors import OptionError
from fxmerge.program import models
from fxmerge.program.affine import ACTIVATIONS, Site, Sites
from fxmerge.program.capture import other_values
from fxmerge.program.captured import Program
from fxmerge.program.channels import Operand, operand
from fxmerge.program.double import InDouble, in_double, largest_change
from fxmerge.program.emission import duplicate
from fxmerge.program.forms import op_name
from fxmerge.program.moves import Fold as Fold
from fxmerge.program.moves import Move, State
from fxmerge.program.products import Layer, Layers, Scaling

logger = logging.getLogger(__name__)

TOLERANCE = 1e-9
"""The largest relative change of an output, in float64, that counts as rounding."""


@dataclass(frozen=True)
class Plan:
    """What may be moved in a program: it depends on the graph alone, and so holds for all its state dicts.

    Attributes:
        program: the captured program.
        moves: what may be done, in the order of the graph.
    """

    program: Program
    moves: tuple[Move, ...]

    def choose(self, states: Sequence[State]) -> dict[int, str]:
        """For the moves that are to be made, by number, where the gains go. It is the same for all states: of networks
        that are to be merged, all have to be changed in the same way."""
        wide = [self._named(state) for state in states]
        chosen = {number: move.where(wide) for number, move in enumerate(self.moves)}
        return {number: where for number, where in chosen.items() if where is not None}

    def apply(self, state: State, chosen: Mapping[int, str] | None = None) -> dict[str, Tensor]:
        """A state dict after the moves, computed in float64 and rounded once. Tensors that no move changes are those of
        `state`.

        Arguments:
            state: of the program.
            chosen: which moves, as `choose` gives them; None chooses for this state alone.
        """
        made = self._moved(state, self.choose([state]) if chosen is None else chosen)
        return {name: made[name].to(tensor.dtype) if name in made else tensor for name, tensor in state.items()}

    def _moved(self, state: State, chosen: Mapping[int, str]) -> dict[str, Tensor]:
        """The tensors that moves change, in float64, under all their names."""
        touched = [self.moves[number].fold(where) for number, where in chosen.items()]
        wide = {name: in_double(state[name]) for fold in touched for name in (*fold.parameters, *fold.into)}
        for number, where in chosen.items():
            self.moves[number].apply(wide, where)
        return {name: wide[stands] for name, stands in self.program.aliases.items() if stands in wide}

    def apply_all(
        self, states: Sequence[State], fixed: Collection[str] = ()
    ) -> tuple[list[dict[str, Tensor]], tuple[Fold, ...]]:
        """Some state dicts after the same moves, each checked on the first of them, and what was moved.

        Arguments:
            states: of the program.
            fixed: names of tensors that no move may change.

        Raises:
            OptionError: if the program was captured without example inputs.
        """
        folds = {number: self.moves[number].fold(where) for number, where in self.choose(states).items()}
        free = {n: fold.where for n, fold in folds.items() if {*fold.parameters, *fold.into}.isdisjoint(fixed)}
        chosen = self.checked(states[0], free)
        return [self.apply(state, chosen) for state in states], tuple(folds[number] for number in chosen)

    def _named(self, state: State) -> dict[str, Tensor]:
        return {name: state[name] for name in self.program.parameters}

    def checked(self, state: State, chosen: Mapping[int, str]) -> dict[int, str]:
        """The moves that leave the outputs as they are: each is checked on the module, in float64, with parameters near
        those of a state dict, so that zeros and ones of a fresh network hide nothing."""
        if not chosen:
            return {}
        check = _Check(self.program, state)
        good: dict[int, str] = {}

        def sort_out(moves: list[tuple[int, str]]) -> None:
            if check.change({**check.state, **self._moved(check.state, good | dict(moves))}) <= TOLERANCE:
                good.update(moves)
            elif len(moves) == 1:
                fold = self.moves[moves[0][0]].fold(moves[0][1])
                names = ", ".join(map(repr, fold.parameters))
                logger.warning("gains stay where they are, as the outputs would change: %s of %s", names, fold.node)
            else:
                sort_out(moves[: len(moves) // 2])
                sort_out(moves[len(moves) // 2 :])

        sort_out(list(chosen.items()))
        return dict(sorted(good.items()))


class _Check:
    """A copy of a program's module in float64, with parameters near those of a state dict, and its outputs."""

    def __init__(self, program: Program, state: State) -> None:
        if program.aten.example is None:
            raise OptionError("The model was captured without example inputs, on which moves are checked; pass args.")
        self.module = duplicate(program.module).eval()._apply(in_double)
        self.inputs = pytree.tree_map(in_double, program.aten.example)
        generator = torch.Generator().manual_seed(0)
        near = {name: other_values(state[name], generator) for name in program.parameters}
        self.state = {name: near.get(program.aliases.get(name, name), tensor) for name, tensor in state.items()}
        self.expected = self._run(self.state)

    def _run(self, state: State) -> list[Tensor]:
        own = models.tensors(self.module, keep_vars=True)
        with torch.no_grad():
            for name, tensor in state.items():
                own[name].copy_(tensor)
        with InDouble():  # type: ignore[no-untyped-call]
            outputs = pytree.tree_leaves(models.run(self.module, *self.inputs))
        return [o.to(torch.float64) if not o.is_complex() else o for o in outputs if isinstance(o, Tensor)]

    def change(self, state: State) -> float:
        """The largest change of an output, relative to the largest value of that output."""
        return largest_change(self.expected, self._run(state))


# ------------------------------------------------------------------------------------ planning


def plan_folds(program: Program) -> Plan:
    """Finds which gains and shifts can be moved, by the graph alone.

    Arguments:
        program: a captured program.

    Example:
        >>> from torch import nn
        >>> from fxmerge.program.capture import capture_program
        >>> net = nn.Sequential(nn.LayerNorm(3), nn.Linear(3, 2))
        >>> plan = plan_folds(capture_program(net, (torch.zeros(2, 3),)))
        >>> [move.fold("readers").into for move in plan.moves]
        [('1.weight', '1.bias')]
    """
    trained = {name for name, _ in program.module.named_parameters(remove_duplicate=False)}
    standing = {program.aliases[name] for name in trained & program.aliases.keys()}
    real = {name for name in standing if program.parameters[name].is_floating_point()}
    sites = Sites(program, frozenset(real))
    found = (_move(sites, group) for group in _sharing(sites.found))
    return Plan(program, tuple(move for move in found if move is not None))


def _sharing(sites: Iterable[Site]) -> list[list[Site]]:
    """The sites, those together that have parameters in common."""
    by_name: nx.Graph[Any] = nx.Graph()
    sites = list(sites)
    for number, site in enumerate(sites):
        by_name.add_edges_from((number, name) for name in site.parameters)
    groups = [sorted(n for n in group if isinstance(n, int)) for group in nx.connected_components(by_name)]
    return [[sites[n] for n in group] for group in sorted(groups)]


def _move(sites: Sites, group: list[Site]) -> Move | None:
    """What may be done with sites that share their parameters: the same with all of them."""
    nodes = {node for site in group for node in site.nodes}
    if len({site.parameters for site in group}) > 1 or not all(
        user in nodes for name in group[0].parameters for user, _ in sites.layers.uses.get(name, ())
    ):
        return None
    read = [sites.readers(site) for site in group]
    stops = [node for _, ends in read for node in ends]
    layers = tuple(layer for own, _ in read for layer in own)
    readers = layers if layers and not stops and _can_change(sites.layers, layers, group) else None
    shifts = group[0].shift is not None or group[0].moments is not None
    takes_shift = readers is not None and (not shifts or _can_add(sites.layers, readers))
    writers = None
    if not takes_shift and not (stops and all(map(_is_activation, stops))):
        # Behind a function of each channel alone, such as ReLU, rotations are no symmetries whatever the gains are.
        written = [sites.layers.writer(site.source, site.ids) for site in group if site.source is not None]
        given = tuple(layer for layer in written if layer is not None)
        writers = given if len(given) == len(group) and _can_change(sites.layers, given, group) else None
    return None if readers is None and writers is None else Move(group[0], readers, takes_shift, writers)


def _is_activation(node: fx.Node) -> bool:
    """Whether a node is a function of each entry of one activation alone."""
    pointwise = torch.Tag.pointwise in getattr(node.target, "tags", ())
    return op_name(node) in ACTIVATIONS or (pointwise and len(node.all_input_nodes) == 1)


def _can_change(network: Layers, layers: Sequence[Layer], group: list[Site]) -> bool:
    """Whether some layers may be changed: nothing else reads the same entries of their parameters, and the sites do not
    have them as their own."""
    by_name: dict[str, dict[Any, Scaling]] = defaultdict(dict)
    for scaling in (one for layer in layers for one in layer.scalings):
        by_name[scaling.operand.parameter][scaling.key] = scaling
    nodes = {layer.node for layer in layers}
    own = {name for site in group for name in site.parameters}
    return own.isdisjoint(by_name) and all(
        _apart(network, name, [one.operand for one in scalings.values()], nodes) for name, scalings in by_name.items()
    )


def _can_add(network: Layers, layers: Sequence[Layer]) -> bool:
    """Whether all of some layers have a bias that can stand in for a shift, and that nothing else reads."""
    by_name: dict[str, dict[Any, Operand]] = defaultdict(dict)
    for layer in layers:
        if layer.addition is None:
            return False
        bias, (scaling, *_) = layer.addition.bias, layer.scalings
        by_name[bias.parameter][bias.key, scaling.key, layer.addition.factor] = bias
    scaled = {one.operand.parameter for layer in layers for one in layer.scalings}
    nodes = {layer.node for layer in layers}
    return scaled.isdisjoint(by_name) and all(
        _apart(network, name, list(parts.values()), nodes) for name, parts in by_name.items()
    )


def _apart(network: Layers, name: str, parts: Sequence[Operand], nodes: set[fx.Node]) -> bool:
    """Whether some parts of a parameter do not overlap each other, nor any part that other nodes read."""
    others = [view for user, view in network.uses[name] if user not in nodes]
    if not others and len(parts) == 1:
        return True
    count = torch.zeros(network.program.parameters[name].shape, dtype=torch.int8)
    for part in parts:
        part.view(count).add_(1)
    if int(count.max()) > 1:
        return False
    views = [operand(view, network.names) for view in others]
    return all(view is not None and not view.view(count).any() for view in views)


def fold_norms(program: Program, state: State) -> tuple[dict[str, Tensor], tuple[Fold, ...]]:
    """Moves gains and shifts of normalizations into the layers around them.

    Arguments:
        program: a captured program, with example inputs, on which every move is checked.
        state: one of its state dicts.

    Returns:
        The state dict afterwards, with the same names, shapes and dtypes, and what was moved.

    Raises:
        OptionError: if the program was captured without example inputs.

    Example:
        >>> from torch import nn
        >>> from fxmerge.program.capture import capture_program
        >>> net = nn.Sequential(nn.RMSNorm(2), nn.Linear(2, 1))
        >>> gain, one = torch.tensor([2.0, 3.0]), torch.ones(1)
        >>> net.load_state_dict({"0.weight": gain, "1.weight": torch.ones(1, 2), "1.bias": one})
        <All keys matched successfully>
        >>> state, folds = fold_norms(capture_program(net, (torch.ones(2, 2),)), net.state_dict())
        >>> state["0.weight"], state["1.weight"]
        (tensor([1., 1.]), tensor([[2., 3.]]))
        >>> print(*folds)
        0.weight (rms_norm) into the readers: 1.weight
    """
    (made,), folds = plan_folds(program).apply_all([state])
    return made, folds

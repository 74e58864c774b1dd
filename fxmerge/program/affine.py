"""Where a graph multiplies every channel by a number of its own, and the layers that can do so in its place."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx

from fxmerge.program.captured import Program
from fxmerge.program.channels import (
    Followed,
    Known,
    Operand,
    follow,
    is_tensor,
    operand,
    readers_of,
    shape_of,
)
from fxmerge.program.forms import bind, op_name
from fxmerge.program.products import Layer, Layers

LAST = ("layer_norm", "native_layer_norm", "rms_norm", "_fused_rms_norm")
"""Normalizations whose gains lie along the last dimensions."""

SECOND = (
    *("group_norm", "native_group_norm", "instance_norm", "batch_norm", "native_batch_norm", "cudnn_batch_norm"),
    *("_native_batch_norm_legit", "_native_batch_norm_legit_no_training", "miopen_batch_norm"),
)
"""Normalizations whose gains lie along the second dimension."""

ACTIVATIONS = frozenset(("hardswish", "prelu", "rrelu", "rrelu_with_noise", "glu"))
"""Elementwise functions of which torch does not say so by a tag."""


@dataclass(frozen=True)
class Moments:
    """The running statistics of a batch norm in eval mode: names of parameters, and what is added to the variance."""

    mean: str
    variance: str
    eps: float


@dataclass(frozen=True)
class Site:
    """A place where a graph multiplies each channel by a number, and may add another one.

    Attributes:
        node: what it gives.
        source: what it multiplies; None where that is the result of a normalization of torch's, which no node gives.
        nodes: the nodes that read its parameters.
        ids: for every entry of the result the number of its gain.
        count: how many gains there are.
        gain, shift: the parameters, if there are any.
        moments: the statistics, which are one more gain and shift.
    """

    node: fx.Node
    source: fx.Node | None
    nodes: tuple[fx.Node, ...]
    ids: Tensor
    count: int
    gain: Operand | None
    shift: Operand | None
    moments: Moments | None = None

    @property
    def parameters(self) -> tuple[str, ...]:
        own = [one.parameter for one in (self.gain, self.shift) if one is not None]
        return (*own, *((self.moments.mean, self.moments.variance) if self.moments else ()))


class Sites:
    """The sites of a program, and the layers around them.

    Arguments:
        program: the captured program.
        parameters: the names of the tensors that may be changed.
    """

    def __init__(self, program: Program, parameters: frozenset[str]) -> None:
        self.program, self.layers = program, Layers(program, parameters)
        self.nodes = list(program.graph.graph.nodes)

    @cached_property
    def found(self) -> list[Site]:
        """All sites, in the order of the graph."""
        sites = (self._fused(node) or self._written_out(node) for node in self.nodes)
        return [site for site in sites if site is not None]

    def _fused(self, node: fx.Node) -> Site | None:
        """A site that is part of a normalization of torch's."""
        name = op_name(node)
        if name not in (*LAST, *SECOND):
            return None
        call = bind(node)
        data = call.get("input", call.get("self"))
        results = [node]
        if not is_tensor(node):  # Its statistics are results too.
            results = [user for user in node.users if user.target is operator.getitem and user.args[1] == 0]
        if not isinstance(data, fx.Node) or len(results) != 1:
            return None
        moments = self._moments(call)
        if moments is None and call.get("running_mean") is not None and not call.get("training", False):
            return None
        gain, shift = (self.layers.operand(call.get(key)) for key in ("weight", "bias"))
        given = [call.get(key) is not None for key in ("weight", "bias")]
        if given != [gain is not None, shift is not None] or (gain is None and moments is None):
            return None
        shape = shape_of(results[0])
        size = shape_of(call["weight"]) if gain is not None else (shape[1],)
        if name in SECOND:
            size = (*size, *(1,) * (len(shape) - 2))
        return self._site(results[0], data if moments is not None else None, (node,), gain, shift, size, moments)

    def _moments(self, call: Mapping[str, Any]) -> Moments | None:
        """The running statistics by which a node normalizes, if it does."""
        if call.get("running_mean") is None or call.get("training", False) or call.get("use_input_stats", False):
            return None
        pair = [operand(call[key], self.layers.names) for key in ("running_mean", "running_var")]
        names = [one.parameter for one in pair if one is not None and not one.chain and not one.offset]
        return Moments(names[0], names[1], call.get("eps", call.get("epsilon", 0.0))) if len(names) == 2 else None

    def _written_out(self, node: fx.Node) -> Site | None:
        """A site that is a product with a parameter, and the sum with another one that may follow."""
        if op_name(node) != "mul" or not is_tensor(node):
            return None
        call = bind(node)
        pair = call["self"], call["other"]
        for data, vector in (pair, pair[::-1]):
            gain = self.layers.operand(vector)
            if gain is not None and is_tensor(data) and data not in self.program.derived:
                found = self._site(node, data, (node,), gain, None, shape_of(vector))
                return None if found is None else self._with_sum(found)
        return None

    def _with_sum(self, site: Site) -> Site:
        """A product together with the sum that is all that reads it, if there is one with a parameter."""
        node, readers = site.node, readers_of(site.node)
        while len(readers) == 1 and op_name(readers[0]) in ("_to_copy", "to"):
            node, readers = readers[0], readers_of(readers[0])
        if len(readers) != 1 or op_name(readers[0]) != "add":
            return site
        (total,) = readers
        call = bind(total)
        other = call["other"] if call["self"] is node else call["self"]
        shift = self.layers.operand(other)
        if shift is None or call["alpha"] != 1 or shape_of(total) != tuple(site.ids.shape):
            return site
        whole = self._site(total, site.source, (*site.nodes, total), site.gain, shift, None)
        return site if whole is None else whole

    def _site(
        self,
        node: fx.Node,
        source: fx.Node | None,
        nodes: tuple[fx.Node, ...],
        gain: Operand | None,
        shift: Operand | None,
        size: tuple[int, ...] | None,
        moments: Moments | None = None,
    ) -> Site | None:
        """A site whose gains and shifts, in the shape `size` or as they are, broadcast to the result; None unless each
        gain has one shift."""
        shape = shape_of(node)
        if not node.meta["val"].is_floating_point():
            return None
        tables = []
        for vector in (gain, shift):
            if vector is None:
                continue
            own = self.program.parameters[vector.parameter]
            ids = vector.view(torch.arange(own.numel()).reshape(own.shape))
            if ids.numel() != own.numel() or own.is_complex() or (vector is shift and vector.offset):
                return None
            tables.append(ids if size is None else ids.reshape(size))
        if not tables:
            assert size is not None
            tables.append(torch.arange(shape[1]).reshape(size))
        count = int(tables[0].max()) + 1
        known = self.program.parameters
        sizes = {known[one.parameter].numel() for one in (gain, shift) if one is not None}
        sizes |= {known[name].numel() for name in (moments.mean, moments.variance)} if moments else set()
        tables = list(torch.broadcast_tensors(*tables))
        if count < 2 or sizes != {count} or any(not torch.equal(tables[0], table) for table in tables[1:]):
            return None
        return Site(node, source, nodes, tables[0].expand(shape), count, gain, shift, moments)

    def readers(self, site: Site) -> tuple[list[Layer], list[fx.Node]]:
        """The layers that can multiply by the gains of a site, and the other nodes that read its result."""
        layers: list[Layer] = []

        def ends(node: fx.Node, known: Known) -> bool:
            layer = self.layers.reader(node, known)
            layers.extend([] if layer is None else [layer])
            return layer is not None

        return layers, follow(self.nodes, site.node, Followed(site.ids), ends)

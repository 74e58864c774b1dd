"""Running a captured program on other parameters and on batches of data, node by node."""

from __future__ import annotations

import logging
import math
import operator
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree
from tqdm.auto import tqdm

from fxmerge.errors import LoaderError
from fxmerge.program import models, trees
from fxmerge.program.capture import Args
from fxmerge.program.captured import Program
from fxmerge.progress import Ticker

logger = logging.getLogger(__name__)

ADVICE = "Pass inputs=batch -> (args, kwargs), with tensors, or a tuple, dict or dataclass of tensors."

Call = tuple[Args, dict[str, Any]]
Inputs = Callable[[Any], Call]
Shapes = Mapping[int, Collection[tuple[int, ...]]]
"""The shapes that a tensor has in all batches, by its number among all leaves of (args, kwargs)."""


class Runner(fx.Interpreter):
    """Runs the ATen graph of a program.

    A subclass may override `run_node`; what a node computes does not depend on where the program's own
    parameters are, only on the `state` given to `call`.
    """

    def __init__(self, program: Program) -> None:
        super().__init__(program.graph, garbage_collect_values=True)
        self.program = program
        self.state: Mapping[str, Tensor] = {}
        placeholders = program.graph.graph.find_nodes(op="placeholder")
        self.sources = [program.sources[n] for n in placeholders]
        self.examples = [n.meta["val"] for n in placeholders]

    def call(self, state: Mapping[str, Tensor], args: Args, kwargs: Mapping[str, Any]) -> Any:
        """Runs the program with the parameters and buffers in `state` (others as captured).

        Raises:
            LoaderError: if the inputs are not structured as in the example that the program was captured with.
        """
        inputs = self.inputs(args, kwargs)
        values = []
        for node, (kind, name) in self.program.sources.items():
            if kind == "input":
                values.append(inputs[node])
            elif kind == "parameter":
                values.append(state.get(name, self.program.parameters[name]))
            else:
                values.append(state.get(name, self.program.constants[name]))
        try:
            with torch.no_grad(), models.same_draws(*values):
                return self.run(*values)
        except RuntimeError as error:
            raise LoaderError(
                f"A batch with the inputs {_outline(args, kwargs)} does not fit the captured model: "
                f"{str(error).splitlines()[0]}. Make all batches alike, but for their size, "
                "or pass inputs=batch -> (args, kwargs)."
            ) from error

    def outputs(self, state: Mapping[str, Tensor], args: Args, kwargs: Mapping[str, Any]) -> list[Any]:
        """The outputs that the user sees, as leaves; a graph may give changed buffers beside."""
        results = self.call(state, args, kwargs)
        return [value for value, seen in zip(results, self.program.aten.outputs, strict=True) if seen]

    def inputs(self, args: Args, kwargs: Mapping[str, Any]) -> dict[fx.Node, Any]:
        """The values of the inputs of the graph.

        Raises:
            LoaderError: if they are not structured as in the example that the program was captured with.
        """
        leaves, spec = pytree.tree_flatten((tuple(args), dict(kwargs)))
        if spec != self.program.aten.inputs:
            raise LoaderError(
                f"A batch gives the inputs {_outline(args, kwargs)}, structured differently from the example that the "
                "model was captured with. Make all batches alike, or pass inputs=batch -> (args, kwargs)."
            )
        nodes = [n for n, (kind, _) in self.program.sources.items() if kind == "input"]
        for node, value in zip(nodes, leaves, strict=False):
            example = node.meta["val"]
            _check_number(self.program.sources[node][1], value, example)
            if isinstance(value, Tensor) and isinstance(example, Tensor):
                check_shape(self.program.sources[node][1], value.shape, example, self.program.why_fixed)
        try:
            self.program.aten.guards(*leaves)
        except AssertionError as error:
            raise LoaderError(
                f"A batch with the inputs {_outline(args, kwargs)} does not fit the captured model, whose graph holds "
                f"for some sizes only. {error}. Make all batches alike, or pass inputs=batch -> (args, kwargs)."
            ) from error
        return dict(zip(nodes, leaves, strict=False))


class Recorder(Runner):
    """Runs a program, and keeps what some of its nodes compute.

    Arguments:
        program: the program.
        nodes: the nodes whose values are kept.
        kept: what is kept of a value; None keeps it as it is.
    """

    def __init__(
        self, program: Program, nodes: Iterable[fx.Node], kept: Callable[[fx.Node, Any], Any] | None = None
    ) -> None:
        super().__init__(program)
        self.nodes, self.kept = frozenset(nodes), kept
        self.seen: dict[fx.Node, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n in self.nodes:
            self.seen[n] = value if self.kept is None else self.kept(n, value)
        return value


def _check_number(name: str, value: Any, example: Any) -> None:
    """A graph has numbers and words baked in, and would compute something else, in silence, for others."""
    if isinstance(example, (bool, int, float, str)) and value != example:
        raise LoaderError(
            f"Input {name!r} of a batch is {value!r}, and the model was captured with {example!r}, which is fixed in "
            "its graph. Make all batches alike, or pass inputs=batch -> (args, kwargs)."
        )


def check_shape(name: str, shape: Sequence[int], example: Tensor, why: str) -> None:
    """A graph may have sizes baked in, and compute something else, in silence, for others.

    Arguments:
        name: of the input.
        shape: what it has in a batch.
        example: what it is in the graph.
        why: why some of its sizes are fixed.

    Raises:
        LoaderError: if the shape does not fit.
    """
    sizes = fixed_sizes(example)
    wrong = [d for d, (s, n) in enumerate(zip(sizes, shape, strict=False)) if s not in (None, n)]
    if wrong or len(sizes) != len(shape):
        takes = ", ".join("any" if size is None else str(size) for size in sizes)
        fixed = f" Dimension {wrong[0]} is fixed to {sizes[wrong[0]]}: {why}." if len(sizes) == len(shape) else ""
        raise LoaderError(
            f"Input {name!r} of a batch has shape {tuple(shape)} and does not fit the captured model, which takes "
            f"({takes}).{fixed} Make all batches alike in what is fixed, or pass inputs=batch -> (args, kwargs)."
        )


def fixed_sizes(value: Tensor) -> list[int | None]:
    """The sizes that a graph takes as they are, None for one that may be any."""
    return [s if isinstance(s, int) else s.node.maybe_as_int() for s in value.shape]


def _outline(args: Args, kwargs: Mapping[str, Any]) -> str:
    def one(value: Any) -> str:
        return str(tuple(value.shape)) if isinstance(value, Tensor) else type(value).__name__

    return ", ".join([*map(one, args), *(f"{k}={one(v)}" for k, v in kwargs.items())]) or "nothing"


@dataclass(frozen=True)
class Apart:
    """The loaders of several models, of which each knows only its own data.

    As one loader they take turns, so that the first batches show the data of all.
    """

    loaders: Sequence[Iterable[Any]]

    def __iter__(self) -> Iterator[Any]:
        return (batch for _, batch in self.numbered())

    def numbered(self) -> Iterator[tuple[int, Any]]:
        """Every batch with the number of its loader."""
        going = dict(enumerate(map(iter, self.loaders)))
        while going:
            for number, batches in list(going.items()):
                try:
                    yield number, next(batches)
                except StopIteration:
                    del going[number]


@dataclass(frozen=True)
class Data:
    """Calibration data: a loader, and how its batches become inputs of the model."""

    loader: Iterable[Any] | Apart
    inputs: Inputs
    device: torch.device | None = None
    progress: bool | None = None
    check: Callable[[Args, dict[str, Any]], None] | None = None

    def batches(self, what: str) -> Iterator[Call]:
        """The inputs of every batch, with a progress bar named `what`."""
        return (call for _, call in self.owned(what))

    def owned(self, what: str) -> Iterator[tuple[int | None, Call]]:
        """The inputs of every batch, and the number of the model that the batch is of; None if it is of all. With a
        progress bar named `what`."""
        disable = None if self.progress is None else not self.progress
        ticker = Ticker(logger, f"{what}: batch %d")
        apart = self.loader.numbered() if isinstance(self.loader, Apart) else ((None, batch) for batch in self.loader)
        total = operator.length_hint(self.loader) or None
        bar = tqdm(apart, desc=what, total=total, disable=disable, leave=False)
        for number, (owner, batch) in enumerate(bar, start=1):
            ticker.tick(number)
            yield owner, self._call(batch)

    def first(self) -> Call:
        """The inputs of the first batch.

        Raises:
            LoaderError: if there is none.
        """
        for batch in self.loader:
            return self._call(batch)
        raise LoaderError("The loader is empty: it gave no batch. Pass an iterable that can be iterated several times.")

    def survey(self) -> tuple[Call, Shapes]:
        """The batch to capture a model with, and the shapes of all.

        Returns:
            The first of those batches that have the fewest sizes below two beyond the batch size, which torch takes for
            constants. And the shapes of all; batches structured unlike the first are left to those who run them.
        """
        chosen, spec, least = None, None, math.inf
        seen: defaultdict[int, set[tuple[int, ...]]] = defaultdict(set)
        for batch in self.loader:
            args, kwargs = self.inputs(batch)
            leaves, own = pytree.tree_flatten((tuple(args), dict(kwargs)))
            spec = own if spec is None else spec
            if own == spec:
                shapes = {i: tuple(leaf.shape) for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)}
                constant = sum(size < 2 for shape in shapes.values() for size in shape[1:])
                if constant < least:
                    chosen, least = self._call(batch), constant
                for i, shape in shapes.items():
                    seen[i].add(shape)
        return self.first() if chosen is None else chosen, seen

    def _call(self, batch: Any) -> Call:
        call = self.inputs(batch)
        if not (isinstance(call, tuple) and len(call) == 2 and isinstance(call[0], (tuple, list))):
            raise LoaderError(f"inputs gave a {type(call).__name__} for a batch; it must give (args, kwargs).")
        trees.open_classes(call, "A batch holds", LoaderError, ADVICE)
        args, kwargs = self._place(tuple(call[0])), self._place(dict(call[1]))
        if self.check is not None:
            self.check(args, kwargs)
        return args, kwargs

    def _place(self, values: Any) -> Any:
        if self.device is None:
            return values
        return pytree.tree_map(lambda v: v.to(self.device) if isinstance(v, Tensor) else v, values)


def batch_inputs(model: nn.Module) -> Inputs:
    """How the batches of a loader are passed to a model by default.

    A tensor, or an object that holds tensors, is the only argument; of a tuple or list the first entry holds the
    inputs and the rest is not used; a mapping is passed by keyword, without keys that the model's forward does not
    take, or as the only argument of a forward that takes one and none of the keys.
    """
    parameters = trees.parameters_of(model.forward)
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters)
    named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    required = [p.name for p in named if p.default is p.empty]
    rest = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.VAR_POSITIONAL)]
    names = {p.name for p in named}

    takes_one = not takes_any and (len(required) == 1 or (not required and bool(named or rest)))
    by_name = False  # Once a mapping was passed by keyword, all others are.

    def of_mapping(batch: Mapping[str, Any]) -> Call:
        nonlocal by_name
        given = {k: v for k, v in batch.items() if takes_any or k in names}
        if takes_one and not given and not by_name:
            return (batch if isinstance(batch, dict) else dict(batch),), {}
        missing = [name for name in required if name not in given]
        if missing or not given:
            raise LoaderError(mismatch(model, batch, missing))
        by_name = True
        return (), given

    def inputs(batch: Any) -> Call:
        if isinstance(batch, Mapping):
            return of_mapping(batch)
        if isinstance(batch, (tuple, list)) and batch:
            first = batch[0]
            if isinstance(first, (tuple, list)):
                return tuple(first), {}
            return inputs(first)
        if isinstance(batch, Tensor) or trees.can_open(batch):
            return (batch,), {}
        arrays = " Convert arrays by torch.from_numpy." if isinstance(batch, np.ndarray) else ""
        raise LoaderError(
            f"A batch is a {type(batch).__name__}; expected a tensor, a tuple (inputs, targets) or a dict of inputs. "
            f"Pass inputs=batch -> (args, kwargs) for anything else.{arrays}"
        )

    return inputs


def mismatch(model: nn.Module, batch: Mapping[str, Any], missing: Sequence[str] = ()) -> str:
    """What is told where the keys of a batch are not the names that a model's forward takes."""
    takes = [p.name for p in trees.parameters_of(model.forward)]
    what = f"; it has no {', '.join(map(repr, missing))}" if missing else ""
    return (
        f"A batch is a dict with the keys {', '.join(map(repr, batch)) or 'of none'}, and the model's forward takes "
        f"{', '.join(map(repr, takes)) or 'nothing'}{what}. Rename the keys, or pass inputs=batch -> (args, kwargs)."
    )

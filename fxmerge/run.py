"""Running a captured program on other parameters and on batches of data, node by node."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree
from tqdm.auto import tqdm

from fxmerge.capture import Args
from fxmerge.errors import LoaderError
from fxmerge.program import Program
from fxmerge.progress import Ticker

logger = logging.getLogger(__name__)

Call = tuple[Args, dict[str, Any]]
Inputs = Callable[[Any], Call]


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
            with torch.no_grad():
                return self.run(*values)
        except RuntimeError as error:
            raise LoaderError(
                f"A batch with the inputs {_outline(args, kwargs)} does not fit the captured model: "
                f"{str(error).splitlines()[0]}. Make all batches alike, but for their size, "
                "or pass inputs=batch -> (args, kwargs)."
            ) from error

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
            _check_shape(self.program.sources[node][1], value, node.meta["val"])
        return dict(zip(nodes, leaves, strict=False))


def _check_shape(name: str, value: Any, example: Any) -> None:
    """A graph may have sizes baked in, and compute something else, in silence, for others."""
    if isinstance(value, Tensor) and isinstance(example, Tensor):
        sizes = [s if isinstance(s, int) else s.node.maybe_as_int() for s in example.shape]
        if len(sizes) != value.ndim or any(s not in (None, n) for s, n in zip(sizes, value.shape, strict=True)):
            takes = ", ".join("any" if size is None else str(size) for size in sizes)
            raise LoaderError(
                f"Input {name!r} of a batch has shape {tuple(value.shape)} and does not fit the captured model, "
                f"which takes ({takes}). Make all batches alike, but for their size, or pass "
                "inputs=batch -> (args, kwargs)."
            )


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

    def batches(self, what: str) -> Iterator[Call]:
        """The inputs of every batch, with a progress bar named `what`."""
        disable = None if self.progress is None else not self.progress
        ticker = Ticker(logger, f"{what}: batch %d")
        for number, batch in enumerate(tqdm(self.loader, desc=what, disable=disable, leave=False), start=1):
            ticker.tick(number)
            yield self._call(batch)

    def owned(self) -> Iterator[tuple[int | None, Call]]:
        """The inputs of every batch, and the number of the model that the batch is of; None if it is of all."""
        if isinstance(self.loader, Apart):
            return ((number, self._call(batch)) for number, batch in self.loader.numbered())
        return ((None, self._call(batch)) for batch in self.loader)

    def first(self) -> Call:
        """The inputs of the first batch.

        Raises:
            LoaderError: if there is none.
        """
        for batch in self.loader:
            return self._call(batch)
        raise LoaderError("The loader is empty: it gave no batch. Pass an iterable that can be iterated several times.")

    def _call(self, batch: Any) -> Call:
        args, kwargs = self.inputs(batch)
        return self._place(tuple(args)), self._place(dict(kwargs))

    def _place(self, values: Any) -> Any:
        if self.device is None:
            return values
        return pytree.tree_map(lambda v: v.to(self.device) if isinstance(v, Tensor) else v, values)


def batch_inputs(model: nn.Module) -> Inputs:
    """How the batches of a loader are passed to a model by default.

    A tensor is the only argument; of a tuple or list the first entry holds the inputs and the rest is
    not used; a mapping is passed by keyword, without keys that the model's forward does not take.
    """
    forward = model.forward
    parameters = inspect.signature(forward).parameters.values()
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters)
    names = {p.name for p in parameters}

    def inputs(batch: Any) -> Call:
        if isinstance(batch, Mapping):
            return (), {k: v for k, v in batch.items() if takes_any or k in names}
        if isinstance(batch, (tuple, list)) and batch:
            first = batch[0]
            if isinstance(first, (tuple, list)):
                return tuple(first), {}
            return inputs(first)
        if isinstance(batch, Tensor):
            return (batch,), {}
        raise LoaderError(
            f"A batch is a {type(batch).__name__}; expected a tensor, a tuple (inputs, targets) or a dict of inputs. "
            "Pass inputs=batch -> (args, kwargs) for anything else."
        )

    return inputs

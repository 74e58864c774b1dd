"""A network as an archive of torch.export, which runs without fxmerge and without the class of the model."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, cast

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from fxmerge.errors import OutputError, first_line
from fxmerge.io.writing import Sink, told
from fxmerge.output.library import difference, placed
from fxmerge.program.models import evaluating
from fxmerge.program.run import Call

logger = logging.getLogger(__name__)

NAME = "model.pt2"


def write(module: fx.GraphModule, call: Call, place: Path) -> str:
    """Writes the archive of a network, if it runs and computes the same when it is read again.

    Arguments:
        module: the network.
        call: example inputs. Their first dimensions are left open, and of whole numbers such as tokens all dimensions.
        place: the directory.

    Returns:
        Why there is no archive; "" if there is one.

    Raises:
        OutputError: if the disk does not take it.
    """
    path = place / NAME
    args, kwargs = doubled(module, call)
    try:
        with evaluating(module):
            program = torch.export.export(module, args, kwargs, dynamic_shapes=_open(module, args, kwargs))
        _forget_addresses(program)
        with told(path), Sink(path) as file:
            torch.export.save(program, cast(IO[bytes], file))
        reason = difference(module, read(path), (args, kwargs))
    except OutputError:
        raise
    except Exception as error:
        logger.debug("%s", error, exc_info=True)
        reason = f"torch.export cannot write it: {first_line(error)}"
    if reason:
        path.unlink(missing_ok=True)
    return reason


def _forget_addresses(program: torch.export.ExportedProgram) -> None:
    """Takes notes out of a program that hold addresses in memory, so that the archive of a network is always the same
    to the byte."""
    for graph in program.graph_module.modules():
        for node in graph.graph.nodes if isinstance(graph, fx.GraphModule) else ():
            node.meta.pop("from_node", None)


class Archive(nn.Module):
    """A network that was read from an archive. It is in eval mode, which an exported program cannot leave."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.__dict__["module"] = module  # No submodule, so that no mode is asked of it.
        self.eval()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.__dict__["module"](*args, **kwargs)


def read(path: Path) -> nn.Module:
    """The network of an archive."""
    return Archive(torch.export.load(path).module())


def doubled(module: nn.Module, call: Call) -> Call:
    """Example inputs with twice as many rows, where the network is: torch.export takes one row for the only number."""
    found: Call = pytree.tree_map_only(Tensor, lambda t: torch.cat([t, t]) if t.ndim else t, call)
    return placed(module, found)


def _open(module: fx.GraphModule, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Which sizes are left open, for every input by name."""

    def sizes(value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.ndim:
            return None
        dims = 1 if value.is_floating_point() else value.ndim
        return dict.fromkeys(range(dims), torch.export.Dim.AUTO)

    bound = inspect.signature(module.forward).bind(*args, **kwargs).arguments
    return {name: pytree.tree_map(sizes, value) for name, value in bound.items()}

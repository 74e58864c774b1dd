"""Builds the network that a checkpoint is of."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fxmerge import sources
from fxmerge.errors import CheckpointError, OptionError
from fxmerge.io.checkpoint import Checkpoint, entry_of
from fxmerge.io.headers import Entry
from fxmerge.networks import transformers_models
from fxmerge.sources import Source

logger = logging.getLogger(__name__)

HF = "hf"
"""The architecture of a directory of transformers, with a config.json beside the weights."""

CLASSES = "num_classes"
"""The argument by which timm, torchvision and most factories take the number of outputs of the last layer."""


@dataclass(frozen=True)
class Network:
    """A network with the weights of a file.

    Attributes:
        source: the module in eval mode, and example inputs.
        checkpoint: the weights, with notes of what was seen through.
        arch: the name of the architecture.
        settings: the arguments that it was built with, those that follow from shapes among them.
    """

    source: Source
    checkpoint: Checkpoint
    arch: str
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def model(self) -> nn.Module:
        return self.source.model

    @property
    def parameters(self) -> int:
        """How many numbers its parameters hold."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    @property
    def dtype(self) -> torch.dtype:
        """That of its weights."""
        return next((p.dtype for p in self.model.parameters() if p.is_floating_point()), torch.float32)

    @property
    def directory(self) -> Path:
        """The directory of the weights, in which configurations and tokenizers lie."""
        return directory_of(self.checkpoint)


def directory_of(checkpoint: Checkpoint) -> Path:
    """The directory of some weights."""
    return checkpoint.path if checkpoint.path.is_dir() else checkpoint.path.parent


def build(
    checkpoint: Checkpoint, arch: str, settings: Mapping[str, Any] | None = None, inputs: Sequence[str] = ()
) -> Network:
    """Builds a network and gives it the weights of a checkpoint, in their own dtype.

    Arguments:
        checkpoint: the weights.
        arch: `timm:NAME`, `torchvision:NAME`, `package.module:factory`; or `hf`, for a directory with a config.json.
        settings: arguments of the factory. If the last layer of the checkpoint has another number of outputs,
            `num_classes` follows from it.
        inputs: shapes of example inputs, such as "1x3x224x224"; by default what the library says.

    Raises:
        CheckpointError: if the weights do not fit.
        OptionError: if there is no such architecture, or it cannot be built.

    Example:
        >>> import tempfile
        >>> from fxmerge import io
        >>> folder = tempfile.mkdtemp()
        >>> _ = io.save(nn.Linear(4, 3).state_dict(), folder)
        >>> network = build(io.load(folder), "torch.nn:Linear", {"in_features": 4, "out_features": 3}, ["1x4"])
        >>> network.model, [x.shape for x in network.source.args]
        (Linear(in_features=4, out_features=3, bias=True), [torch.Size([1, 4])])
    """
    if arch == HF:
        source, checkpoint = transformers_models.load(checkpoint, directory_of(checkpoint), settings or {}, inputs)
        return Network(source, checkpoint, arch, dict(settings or {}))
    network = _unfilled(checkpoint, arch, settings, inputs, None)
    _fill(network.model, network.checkpoint)
    network.model.eval()
    return network


def skeleton(
    checkpoint: Checkpoint, arch: str, settings: Mapping[str, Any] | None = None, inputs: Sequence[str] = ()
) -> Network:
    """The network of `build` on the meta device: its shapes, checked against the checkpoint, and no values."""
    if arch == HF:
        source, checkpoint = transformers_models.skeleton(checkpoint, directory_of(checkpoint), settings or {}, inputs)
        return Network(source, checkpoint, arch, dict(settings or {}))
    return _unfilled(checkpoint, arch, settings, inputs, "meta")


def _unfilled(
    checkpoint: Checkpoint,
    arch: str,
    settings: Mapping[str, Any] | None,
    inputs: Sequence[str],
    device: str | None,
) -> Network:
    """The network of the shapes of a checkpoint, with other weights."""
    if arch.partition(":")[0] == HF:
        raise OptionError(f"{arch!r} is no architecture of files: write hf, and put a config.json beside the weights.")
    if not arch.partition(":")[2]:
        raise OptionError(
            f"{arch!r} is no architecture; write timm:NAME, torchvision:NAME, hf or package.module:factory."
        )
    given = dict(settings or {})
    source = sources.load(arch, inputs, given, device)
    wanted = entries_of(source.model)
    checkpoint = checkpoint.without_prefix(list(wanted))
    classes = None if CLASSES in given else _classes(wanted, checkpoint.entries)
    if classes is not None:
        try:
            other = sources.load(arch, inputs, {**given, CLASSES: classes}, device)
        except OptionError:
            logger.debug("%s takes no %s", arch, CLASSES)
        else:
            source, given[CLASSES] = other, classes
            checkpoint = checkpoint.noted(f"{CLASSES}={classes} follows from the shapes in the file.")
    checkpoint = checkpoint.fitted(entries_of(source.model), tied_names(source.model))
    return Network(source, checkpoint, arch, given)


def _classes(wanted: Mapping[str, Entry], there: Mapping[str, Entry]) -> int | None:
    """The number of classes of a file, if it is all in which its shapes differ from those of a network."""
    other = [(wanted[n].shape, there[n].shape) for n in wanted if n in there and wanted[n].shape != there[n].shape]
    if not other or any(len(a) != len(b) or a[1:] != b[1:] or not a for a, b in other):
        return None
    sizes = {(a[0], b[0]) for a, b in other}
    return next(iter(sizes))[1] if len(sizes) == 1 else None


def entries_of(model: nn.Module) -> dict[str, Entry]:
    """The shapes and dtypes of the state dict of a network."""
    return {name: entry_of(tensor) for name, tensor in model.state_dict().items()}


def tied_names(model: nn.Module) -> dict[str, str]:
    """For every name of a tensor that has several, the first of them."""
    first: dict[int, str] = {}
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    names = {name: first.setdefault(id(tensor), name) for name, tensor in tensors}
    shared = {one for name, one in names.items() if name != one}
    return {name: one for name, one in names.items() if one in shared}


def _fill(model: nn.Module, checkpoint: Checkpoint) -> None:
    """Gives a network the tensors of a checkpoint, which fits it, in their own dtype; one tensor at a time.

    Raises:
        CheckpointError: if names of one tensor have different values.
    """
    tied, filled = tied_names(model), dict[str, str]()
    own = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers(remove_duplicate=False))}
    with torch.no_grad():
        for name in checkpoint:
            value, target = checkpoint[name], own[name]
            first = filled.setdefault(tied.get(name, name), name)
            if first != name:
                if not torch.equal(target.data, value.to(target.dtype)):
                    raise CheckpointError(
                        f"{checkpoint.path} has different values for {first!r} and {name!r}, which are one tensor of "
                        "the network. Pass weights of this architecture."
                    )
                continue
            target.data = (
                value.detach().clone() if target.dtype.is_floating_point else value.to(target.dtype, copy=True)
            )

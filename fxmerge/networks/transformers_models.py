"""Networks of transformers from directories: config.json says which class, and with which sizes."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fxmerge.errors import CheckpointError, OptionError, first_line
from fxmerge.io.checkpoint import Checkpoint, entry_of
from fxmerge.sources import Source, example, package, transformers_example

CONFIG = "config.json"


def load(
    checkpoint: Checkpoint, directory: Path, settings: Mapping[str, Any], inputs: Sequence[str]
) -> tuple[Source, Checkpoint]:
    """The network of a directory with the weights of a checkpoint.

    Arguments:
        checkpoint: the weights.
        directory: that of config.json.
        settings: what to change in the configuration.
        inputs: shapes of example inputs.

    Raises:
        CheckpointError: if the weights do not fit.
        OptionError: if the directory has no configuration, or one that transformers does not build a network of.
    """
    skeletal, checkpoint = skeleton(checkpoint, directory, settings, inputs)
    kind: Any = type(skeletal.model)
    state = dict(checkpoint.items())
    with quiet():
        try:
            model, info = kind.from_pretrained(
                None, config=skeletal.model.config, state_dict=state, output_loading_info=True, dtype="auto"
            )
        except Exception as error:
            raise CheckpointError(
                f"{checkpoint.path} does not fit {kind.__name__}: {type(error).__name__}: {first_line(error)}."
            ) from error
    for what, names in info.items():
        if names:
            said = what.replace("_", " ")
            listed = ", ".join(repr(name) for name in sorted(map(str, names))[:3])
            raise CheckpointError(
                f"{checkpoint.path} does not fit {kind.__name__}: {said}, {listed}. Pass the directory that "
                "save_pretrained wrote for this class."
            )
    return _source(model.eval(), inputs), checkpoint


def skeleton(
    checkpoint: Checkpoint, directory: Path, settings: Mapping[str, Any], inputs: Sequence[str]
) -> tuple[Source, Checkpoint]:
    """The network of a directory on the meta device, and the checkpoint without a prefix that does not belong to it."""
    transformers = package("transformers")
    path = directory / CONFIG
    if not path.is_file():
        raise OptionError(f"{path} is not there, and --arch hf builds the network from it. Copy it beside the weights.")
    try:
        names = json.loads(path.read_text(encoding="utf-8")).get("architectures") or []
    except (ValueError, AttributeError) as error:
        raise OptionError(f"{path} is no configuration of transformers: {error}.") from error
    kind = getattr(transformers, names[0], None) if names else None
    if kind is None:
        named = f"names the class {names[0]!r}, which transformers does not have" if names else "names no architectures"
        raise OptionError(f"{path} {named}; write it as save_pretrained does.")
    try:
        with quiet():
            config = transformers.AutoConfig.from_pretrained(directory, local_files_only=True, **settings)
            with torch.device("meta"):
                model: nn.Module = kind(config)
    except Exception as error:
        raise OptionError(
            f"{names[0]} cannot be built from {path}: {type(error).__name__}: {first_line(error)}."
        ) from error
    wanted = {name: entry_of(tensor) for name, tensor in model.state_dict().items()}
    checkpoint = checkpoint.without_prefix(list(wanted))
    for name, entry in checkpoint.entries.items():
        if name in wanted and entry.shape != wanted[name].shape:
            raise CheckpointError(
                f"{checkpoint.path} does not fit {names[0]}: {name!r} has shape {entry.shape}, and {path} gives it "
                f"{wanted[name].shape}."
            )
    return _source(model, inputs), checkpoint


def _source(model: Any, inputs: Sequence[str]) -> Source:
    device = str(next(model.parameters()).device)
    return transformers_example(model, model.config, [example(text, device) for text in inputs])


@contextmanager
def quiet() -> Iterator[None]:
    """Without the reports and progress bars of transformers: what is wrong is told in a sentence."""
    logging = package("transformers").utils.logging
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()

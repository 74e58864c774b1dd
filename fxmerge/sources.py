"""Models by name, for the command line: a function of the user's, or an architecture of a model library."""

from __future__ import annotations

import importlib
import inspect
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fxmerge.errors import OptionError
from fxmerge.registered import ARCHITECTURES, find

BIG = 500_000_000
"""A transformers model with more parameters than this is built on the meta device."""

IMAGE, CLIP, TOKENS = (1, 3, 224, 224), (1, 3, 16, 112, 112), (2, 16)


@dataclass
class Source:
    """A model and example inputs for it."""

    model: nn.Module
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)


def load(
    name: str, inputs: Sequence[str] = (), config: Mapping[str, Any] | None = None, device: str | None = None
) -> Source:
    """Builds a model with random weights.

    Arguments:
        name: `package.module:factory`, `timm:NAME`, `torchvision:NAME`, `hf:TYPE`, or a name with a prefix that a
            package registers. A factory returns a module, (module, args) or (module, args, kwargs).
        inputs: shapes of the inputs, such as "1x3x224x224" or "2x16:int64"; by default what the library says.
        config: keyword arguments of the factory, or entries of the configuration.
        device: where to build the model; "meta" needs no memory for weights.

    Raises:
        OptionError: if there is no such model, its package is not installed, or it cannot be built.

    Example:
        >>> source = load("torch.nn:Linear", ["4x8"], {"in_features": 8, "out_features": 2})
        >>> source.model, source.args[0].shape
        (Linear(in_features=8, out_features=2, bias=True), torch.Size([4, 8]))
    """
    kind, _, rest = name.partition(":")
    if not kind or not rest:
        raise OptionError(
            f"{name!r} names no model; write package.module:factory, timm:NAME, torchvision:NAME or hf:TYPE."
        )
    library = {"timm": _timm, "torchvision": _torchvision, "hf": _transformers}.get(kind)
    registered = None if library is not None else find(ARCHITECTURES, kind)
    tensors = [example(text, device) for text in inputs]
    try:
        with torch.device(device or "cpu"):
            if library is not None:
                return library(rest, tensors, dict(config or {}), device)
            factory = imported(kind, rest) if registered is None else partial(registered, rest)
            return _made(name, factory, tensors, dict(config or {}))
    except OptionError:
        raise
    except Exception as error:
        raise OptionError(f"{name} cannot be built: {type(error).__name__}: {error}") from error


def example(text: str, device: str | None = None) -> Tensor:
    """An input of a shape such as "1x3x224x224", or "2x16:int64"; its values are random.

    Raises:
        OptionError: if the text is no such shape.
    """
    found = re.fullmatch(r"(\d+(?:x\d+)*)(?::(\w+))?", text)
    dtype = getattr(torch, found[2] or "float32", None) if found else None
    if found is None or not isinstance(dtype, torch.dtype):
        raise OptionError(f"{text!r} is no shape of an input; write 1x3x224x224, or 2x16:int64 for whole numbers.")
    shape = tuple(int(n) for n in found[1].split("x"))
    if dtype.is_floating_point or dtype.is_complex:
        return torch.randn(shape, dtype=dtype, device=device)
    return torch.randint(2, shape, device=device).to(dtype)


def package(name: str) -> Any:
    """A package that may be missing.

    Raises:
        OptionError: if it is.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise OptionError(f"{name} cannot be imported ({error}); install it: pip install {name}") from error


def _known(name: str, known: Iterable[str], library: str) -> None:
    names = list(known)
    if name not in names:
        close = get_close_matches(name, names, n=3)
        hint = f" Did you mean {' or '.join(map(repr, close))}?" if close else ""
        raise OptionError(f"{library} has no model {name!r}.{hint}")


def imported(module: str, name: str) -> Any:
    """What a module has under a name, of a package or of a script in the working directory.

    Raises:
        OptionError: if there is none.
    """
    if "" not in sys.path:
        sys.path.insert(0, "")  # As with `python -m`.
    try:
        found = getattr(importlib.import_module(module), name, None)
    except ImportError as error:
        raise OptionError(f"{module!r} cannot be imported: {error}") from error
    if found is None:
        raise OptionError(f"{module!r} has no {name!r}.")
    return found


def _made(name: str, factory: Any, inputs: list[Tensor], config: dict[str, Any]) -> Source:
    """The model of a function of the user's, or of a package."""
    if not callable(factory):
        raise OptionError(f"{name} is a {type(factory).__name__}, and no function that returns a module.")
    made = factory(**config)
    parts = list(made) if isinstance(made, tuple) else [made]
    if not 1 <= len(parts) <= 3 or not isinstance(parts[0], nn.Module):
        raise OptionError(f"{name} must return a module, (module, args) or (module, args, kwargs).")
    args = parts[1] if len(parts) > 1 else ()
    args = tuple(args) if isinstance(args, (tuple, list)) else (args,)
    kwargs = dict(parts[2]) if len(parts) > 2 else {}
    return Source(parts[0], tuple(inputs), {}) if inputs else Source(parts[0], args, kwargs)


def _timm(name: str, inputs: list[Tensor], config: dict[str, Any], device: str | None) -> Source:
    timm = package("timm")
    _known(name.partition(".")[0], timm.list_models(), "timm")  # What follows says how it was trained.
    model = timm.create_model(name, pretrained=False, **config)
    shape = (1, *getattr(model, "pretrained_cfg", {}).get("input_size", IMAGE[1:]))
    return Source(model, tuple(inputs) or (torch.randn(shape),))


def _torchvision(name: str, inputs: list[Tensor], config: dict[str, Any], device: str | None) -> Source:
    models = package("torchvision").models
    _known(name, models.list_models(), "torchvision")
    builder: Callable[..., nn.Module] = models.get_model_builder(name)
    without = {k: None for k in ("weights", "weights_backbone") if k in inspect.signature(builder).parameters}
    shape = CLIP if ".video" in builder.__module__ else IMAGE
    return Source(builder(**without, **config), tuple(inputs) or (torch.randn(shape),))


def _transformers(name: str, inputs: list[Tensor], config: dict[str, Any], device: str | None) -> Source:
    transformers = package("transformers")
    _known(name, transformers.CONFIG_MAPPING.keys(), "transformers")
    settings = transformers.AutoConfig.for_model(name, **config)
    settings.use_cache = False
    with torch.device("meta"):
        model: nn.Module = transformers.AutoModel.from_config(settings)
    if device is None and sum(p.numel() for p in model.parameters()) <= BIG:
        model = transformers.AutoModel.from_config(settings)
    return transformers_example(model, settings, inputs)


def transformers_example(model: Any, settings: Any, inputs: Sequence[Tensor] = ()) -> Source:
    """A model of transformers with its example inputs: those given, and random ones for the rest."""
    where = next(model.parameters()).device
    given = {n: t.to(where) for n, t in zip(_input_names(model, settings), inputs, strict=False)}
    with torch.device(where):
        return Source(model, (), {n: _dummy(n, settings) for n in _input_names(model, settings)} | given)


def _input_names(model: Any, settings: Any) -> list[str]:
    return [model.main_input_name, *(["decoder_input_ids"] if settings.is_encoder_decoder else [])]


def _dummy(name: str, settings: Any) -> Tensor:
    """An input of a transformers model."""
    if name.endswith("input_ids"):
        text = settings.get_text_config()
        return torch.randint(2, min(text.vocab_size, 100), TOKENS)
    size = getattr(settings, "image_size", None) or IMAGE[-1]
    height, width = (size, size) if isinstance(size, int) else size
    return torch.randn(1, getattr(settings, "num_channels", 3), height, width)

"""Directories that the library of a network loads: of transformers, and of timm."""

from __future__ import annotations

import copy
import inspect
import logging
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from fxmerge.errors import OutputError, first_line
from fxmerge.io.writing import told
from fxmerge.networks import Network
from fxmerge.networks.building import HF
from fxmerge.networks.transformers_models import quiet
from fxmerge.program.models import evaluating, run
from fxmerge.program.run import Call
from fxmerge.sources import package

logger = logging.getLogger(__name__)

CLOSE = {torch.float64: 1e-9, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 1e-1}
"""How far outputs of one function may be apart by rounding, as a share of their largest value, by dtype."""

MOST = "1000TB"
"""The weights are put into one file where no size of shards is asked for."""

BESIDE = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "preprocessor_config.json",
    "processor_config.json",
    "generation_config.json",
)
"""What lies beside the weights of transformers and says how inputs are prepared and outputs are generated."""


@dataclass(frozen=True)
class Written:
    """How a directory was written.

    Attributes:
        loads: the code that loads it; "" if none does.
        reason: why the library of the network does not load it; "" if it does, or has no such directories.
    """

    loads: str
    reason: str = ""


def write(
    network: Network,
    module: fx.GraphModule,
    config: Mapping[str, int] | None,
    place: Path,
    call: Call,
    shard_size: int | None = None,
) -> Written:
    """Writes a network as its library does, if the library then builds the same network.

    Arguments:
        network: one of the architecture, whose directory has the tokenizer and so on.
        module: the network to write.
        config: what to change in the configuration for its sizes.
        place: the directory.
        call: example inputs, on which the outputs of both are compared.
        shard_size: how many bytes of tensors a file may hold.

    Raises:
        OutputError: if the disk does not take it.
    """
    kind = network.arch.partition(":")[0]
    writer = {HF: _transformers, "timm": _timm}.get(kind)
    if writer is None:
        return Written("")
    try:
        with told(place):
            other = writer(network, module.state_dict(), config or {}, place, shard_size)
        reason = difference(module, other, call)
    except OutputError:
        raise
    except Exception as error:
        logger.debug("%s", error, exc_info=True)
        reason = f"the class of the architecture does not take the weights: {first_line(error)}"
    if reason:
        for path in place.iterdir():
            path.unlink()
        return Written("", reason)
    if kind == HF:
        return Written(f"transformers.{type(network.model).__name__}.from_pretrained('DIRECTORY')")
    return Written("timm.create_model('local-dir:DIRECTORY', pretrained=True)")


def _transformers(
    network: Network, state: Mapping[str, Tensor], config: Mapping[str, int], place: Path, shard_size: int | None
) -> nn.Module:
    changed: Any = copy.deepcopy(network.model.config)
    for key, value in config.items():
        setattr(changed, key, value)
    with quiet():
        with torch.device("meta"):
            model: Any = type(network.model)(changed)
        model.load_state_dict({name: tensor.cpu() for name, tensor in state.items()}, assign=True)
        model.tie_weights()
        model.save_pretrained(place, max_shard_size=MOST if shard_size is None else shard_size)
        for name in BESIDE:
            if (network.directory / name).is_file() and not (place / name).exists():
                shutil.copyfile(network.directory / name, place / name)
        loaded: nn.Module = type(model).from_pretrained(place, local_files_only=True, dtype="auto")
    return loaded


def _timm(
    network: Network, state: Mapping[str, Tensor], config: Mapping[str, int], place: Path, shard_size: int | None
) -> nn.Module:
    timm = package("timm")
    if shard_size is not None and shard_size < sum(t.numel() * t.element_size() for t in state.values()):
        raise ValueError("timm loads one file, and shards were asked for")
    model = timm.create_model(network.arch.partition(":")[2], pretrained=False, **network.settings)
    _fill(model, state)
    save = package("timm.models").save_for_hf
    size = tuple(network.source.args[0].shape[1:])
    other = size != tuple(model.pretrained_cfg["input_size"]) and "data_config" in inspect.signature(save).parameters
    sizes = {"data_config": {"input_size": size}} if other else {}
    # What says how images are prepared is in the configuration that timm saves, and timm passes it on from there.
    args = {key: value for key, value in network.settings.items() if not key.startswith("pretrained_cfg")}
    save(model, place, model_args=args, safe_serialization=True, **sizes)
    loaded: nn.Module = timm.create_model(f"local-dir:{place}", pretrained=True)
    return loaded.to(_dtype(state))


def _dtype(state: Mapping[str, Tensor]) -> torch.dtype:
    """That of the weights."""
    return next((tensor.dtype for tensor in state.values() if tensor.is_floating_point()), torch.float32)


def _fill(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    model.to(_dtype(state))
    model.load_state_dict({name: tensor.cpu() for name, tensor in state.items()})
    model.eval()


def difference(module: nn.Module, other: nn.Module, call: Call) -> str:
    """Why two networks do not compute the same on some inputs; "" if they do."""
    dtype = _dtype(module.state_dict())
    one, two = (_outputs(own, call) for own in (module, other))
    if [v.shape for v in one] != [v.shape for v in two]:
        return "the outputs have other shapes than those of the network that was made"
    for a, b in zip(one, two, strict=True):
        both = a.isfinite() & b.isfinite()  # Scores of what is ruled out are infinite in both.
        if not torch.equal(a.where(~both, 0), b.where(~both, 0)):
            return "the outputs are not finite where those of the network that was made are"
        most, largest = (float(v.where(both, 0).abs().max()) if v.numel() else 0.0 for v in (a - b, a))
        if most > CLOSE[dtype] * max(1.0, largest):
            return f"the outputs differ by {most:.1e} from those of the network that was made"
    return ""


def placed(module: nn.Module, call: Call) -> Call:
    """Inputs where a network is."""
    where = next((t.device for t in module.parameters()), torch.device("cpu"))
    found: Call = pytree.tree_map_only(Tensor, lambda t: t.to(where), call)
    return found


def _outputs(module: nn.Module, call: Call) -> list[Tensor]:
    args, kwargs = placed(module, call)
    with evaluating(module), torch.no_grad():
        found = run(module, args, kwargs)
    return [
        v.detach().cpu().double() for v in pytree.tree_leaves(found) if isinstance(v, Tensor) and not v.is_complex()
    ]

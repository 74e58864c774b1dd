"""What may be given as a model: wrappers are seen through, mistakes told; and how a model is run without a trace."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._dynamo import OptimizedModule
from torch.export import ExportedProgram
from torch.optim.swa_utils import AveragedModel
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from fxmerge.errors import OptionError
from fxmerge.program.emission import duplicate

Model = nn.Module | ExportedProgram

WRAPPERS: dict[type, str] = {
    OptimizedModule: "_orig_mod",
    nn.DataParallel: "module",
    nn.parallel.DistributedDataParallel: "module",
    AveragedModel: "module",
}
"""Modules that hold another of the same function, and under which name."""

QUANTIZED = ("torch.ao.nn.quantized", "torch.ao.nn.intrinsic.quantized", "torch.ao.nn.sparse.quantized")
"""Packages whose modules hold packed parameters."""

FLOAT = ("FloatFunctional", "FXFloatFunctional")
"""Modules of these packages that compute in floating-point, in models that are yet to be quantized."""

_EXTRA = torch.nn.modules.module._EXTRA_STATE_KEY_SUFFIX


def accepted(model: Any, called: str = "The model") -> Model:
    """A model as it was given, without its wrappers.

    Arguments:
        model: what a user gave.
        called: what it is called in messages.

    Raises:
        OptionError: if it is no model, or one that cannot be merged.

    Example:
        >>> accepted(nn.DataParallel(nn.ReLU()))
        ReLU()
    """
    wrapper = next((kind for kind in WRAPPERS if isinstance(model, kind)), None)
    if wrapper is not None:
        return accepted(getattr(model, WRAPPERS[wrapper]), called)
    called = called[0].upper() + called[1:]
    wrong = _wrong(model)
    if wrong:
        raise OptionError(f"{called} is {wrong}")
    if isinstance(model, nn.Module):
        _check_tensors(model, called)
    assert isinstance(model, (nn.Module, ExportedProgram))
    return model


def _wrong(model: Any) -> str:
    """What is wrong with a model and what to do, as the rest of a sentence; nothing if it is one."""
    name = type(model).__name__
    if isinstance(model, (torch.jit.ScriptModule, torch.jit.ScriptFunction)):
        return f"a {name}, which torch.jit has compiled; pass the module that it was made from."
    if isinstance(model, nn.Module):
        return _sharded(model) or _quantized(model)
    if isinstance(model, ExportedProgram):
        return ""
    if isinstance(model, type):
        return f"the class {model.__name__}; pass an instance of it, with its parameters loaded."
    if isinstance(model, Mapping):
        return f"a {name}, not a module; build the module and load it: module.load_state_dict(...)."
    if isinstance(model, (str, os.PathLike)):
        return f"the path {str(model)!r}; build the module and load it: module.load_state_dict(torch.load(path))."
    if isinstance(model, (list, tuple)):
        return f"a {name} of {len(model)}; give each model by itself, or all to fxmerge.merge_many(models, loader)."
    if callable(model):
        return f"a {name}, which has no parameters; pass the torch.nn.Module that it calls."
    return f"a {name}; pass a torch.nn.Module or a torch.export.ExportedProgram."


def _sharded(model: nn.Module) -> str:
    kinds = {kind.__name__ for m in model.modules() for kind in type(m).__mro__ if kind.__module__.startswith(_FSDP)}
    if kinds & {"FullyShardedDataParallel", "FSDPModule"}:
        return "sharded by FSDP; gather its full state dict, and load that into a module that is not sharded."
    return ""


_FSDP = "torch.distributed.fsdp"


def _quantized(model: nn.Module) -> str:
    for name, module in model.named_modules():
        kind = type(module)
        if kind.__module__.startswith(QUANTIZED) and kind.__name__ not in FLOAT:
            at = f"its module {name!r}" if name else "it"
            return f"quantized ({at} is a {type(module).__name__}); merge the models first, then quantize the result."
    return ""


def _check_tensors(model: nn.Module, called: str) -> None:
    for name, tensor in tensors(model).items():
        if is_traceable_wrapper_subclass(tensor) or tensor.is_quantized:
            kind = type(tensor.data).__name__ if not tensor.is_quantized else f"tensor of {tensor.dtype}"
            raise OptionError(
                f"{called} has the parameter {name!r}, which is a {kind}; merge models with ordinary tensors: gather "
                "what is sharded, and quantize after merging."
            )


def tensors(model: nn.Module, *, keep_vars: bool = False) -> dict[str, Tensor]:
    """The state dict of a model without its extra state, which may be anything."""
    state: Mapping[str, Any] = model.state_dict(keep_vars=keep_vars)
    return {n: t for n, t in state.items() if isinstance(t, Tensor) and not _is_extra(n)}


def first_names(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """For every name of a tensor, the first of its names: tied parameters get one value."""
    first: dict[Any, str] = {}
    found = {}
    for name, tensor in tensors.items():
        key = (tensor.untyped_storage()._cdata, tensor.storage_offset(), tensor.shape, tensor.stride())
        found[name] = first.setdefault(key, name)
    return found


def _is_extra(name: str) -> bool:
    return name.rpartition(".")[2] == _EXTRA


def apart(model: nn.Module) -> nn.Module:
    """A copy of a model that shares its parameters: what a call does to buffers and attributes, it does to the copy."""
    return copied(model, shared(model))


def shared(model: nn.Module) -> dict[int, Any]:
    """What makes a copy of a model share its parameters: these by their ids, as for `copy.deepcopy`."""
    return {id(p): p for m in model.modules() for p in m._parameters.values() if p is not None}


def copied(model: nn.Module, memo: dict[int, Any] | None = None) -> nn.Module:
    """A copy of a model, also of one that keeps what it has derived from its parameters, as hooks of pruning do."""
    with _Derived():
        return duplicate(model, memo) if isinstance(model, fx.GraphModule) else copy.deepcopy(model, memo)


class _Derived(TorchFunctionMode):
    """Copies what a module has derived from its parameters and kept, without its history: torch refuses to copy it."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.__deepcopy__ and not args[0].is_leaf:
            return args[1].setdefault(id(args[0]), args[0].detach().clone())
        return func(*args, **(kwargs or {}))


def switch(model: nn.Module, training: bool) -> None:
    """Puts a model in training or eval mode, also one with a method of its own by the name of `train`."""
    try:
        model.train(training)
    except Exception:  # It trains, or what else it may do.
        for module in model.modules():
            module.training = training


@contextmanager
def same_draws(*places: Any, seed: int = 0) -> Iterator[None]:
    """Whatever draws random numbers draws the same ones each time, and none from the user's generators.

    Arguments:
        places: the tensors, among other values, on whose devices generators may be used.
        seed: which numbers are drawn.
    """
    found = {t.device for t in places if isinstance(t, Tensor) and t.device.type not in ("cpu", "meta")}
    kinds = sorted(k for k in {device.type for device in found} if hasattr(torch.get_device_module(k), "get_rng_state"))
    kind = kinds[0] if kinds else "cuda"
    with torch.random.fork_rng(devices=[d for d in found if d.type == kind], device_type=kind):
        torch.manual_seed(seed)
        yield


def run(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """The outputs of a model for some inputs: the same for the same inputs, whatever it was called with before."""
    own = tensors(model, keep_vars=True).values()  # Detached, each would be an op, which may be given values for it.
    with torch.no_grad(), same_draws(*own):
        return apart(model)(*args, **kwargs)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in eval mode and without a cache for a while, every submodule and configuration put back as it was.

    What modules have derived from their parameters in eval mode and kept, they drop when they are trained; so they
    are for a moment, before and after: what a capture leaves behind is of no use to anyone. A cache of earlier calls,
    which a configuration may ask for by `use_cache`, is no output that a merge could have.
    """
    modes = [(m, m.training) for m in model.modules()]
    configs: list[Any] = [getattr(m, "config", None) for m in model.modules()]
    cached = {id(config): (config, config.use_cache) for config in configs if getattr(config, "use_cache", None)}
    switch(model, True)
    switch(model, False)
    try:
        for config, _ in cached.values():
            with suppress(AttributeError):  # Of one that is frozen.
                config.use_cache = False
        yield
    finally:
        for config, value in cached.values():
            with suppress(AttributeError):
                config.use_cache = value
        switch(model, True)
        for module, training in modes:
            module.training = training

"""Checks of what users hand in, before any work is done."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from fxmerge.errors import ArchitectureMismatchError, CaptureError, LoaderError, NonFiniteError, OptionError
from fxmerge.program import models
from fxmerge.program.capture import Args, open_outputs
from fxmerge.program.captured import Program
from fxmerge.program.models import Model as Model
from fxmerge.program.on_use import PIECE
from fxmerge.program.run import Runner, mismatch
from fxmerge.recipe import Alpha, Recipe, Run
from fxmerge.symmetry.group import Symmetry

SAME = "only models of one architecture can be merged."


def name_of(i: int) -> str:
    """What a model is called in messages."""
    return f"model {chr(ord('A') + i)}" if i < 26 else f"model {i + 1}"


def names_of(count: int, base: Model | None) -> list[str]:
    """What the models of one call are called in messages; the base, if there is one, comes first."""
    return [*(["the base"] if base is not None else []), *map(name_of, range(count))]


def check_class_names(alpha: Alpha, symmetry: Symmetry) -> None:
    """Every name in a mapping must be one of a class, whether it is used or was demoted."""
    known = (*symmetry.names, *symmetry.demoted)
    for name in alpha if isinstance(alpha, Mapping) else ():
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=3, cutoff=0.0)
            said = f"Near it are {', '.join(map(repr, near))}" if near else "It has none"
            raise OptionError(f"alpha names {name!r}, which is no class of the symmetry. {said}.")


def check_models(sequence: Any, verb: str = "merge_many", least: int = 2) -> tuple[Any, ...]:
    """The models that a verb takes, which may themselves be containers."""
    one = isinstance(sequence, (Mapping, str, nn.Module)) and not isinstance(sequence, nn.ModuleList)
    if one or not isinstance(sequence, Iterable):
        raise OptionError(
            f"{verb} takes a list of models, such as [model_a, model_b], not a {type(sequence).__name__}."
        )
    given = tuple(sequence)
    if len(given) < least:
        raise OptionError(f"{verb} takes {'two' if least == 2 else 'one'} or more models, not {len(given)}.")
    return given


def check_loader(loader: Any) -> None:
    """A loader gives batches; what gives something else when it is iterated is refused.

    Raises:
        LoaderError: if it cannot be iterated, or if it is a batch or a model.
    """
    kind = type(loader).__name__
    if isinstance(loader, (Tensor, np.ndarray)):
        array = "torch.from_numpy(array)" if isinstance(loader, np.ndarray) else "batch"
        raise LoaderError(f"The loader is a {kind}, whose rows are no batches; give a list of batches: [{array}].")
    if isinstance(loader, Mapping):
        raise LoaderError(f"The loader is a {kind}, which gives its keys; give a list of batches: [batch].")
    iterable = hasattr(type(loader), "__iter__") or hasattr(type(loader), "__getitem__")
    if isinstance(loader, (str, bytes, nn.Module, type)) or not iterable:
        raise LoaderError(f"The loader is a {kind}; give an iterable of batches, such as a DataLoader or a list.")


def check_loaders(loader: Any, loaders: Sequence[Any] | None, count: int) -> None:
    if isinstance(loaders, (Tensor, Mapping, str)) or (loaders is not None and not hasattr(loaders, "__len__")):
        raise OptionError(f"loaders is a {type(loaders).__name__}; give a list with one loader for each model.")
    if loaders is not None and loader is not None:
        raise OptionError("Both loader and loaders are given: pass one for all models, or one for each of them.")
    if loaders is not None and len(loaders) != count:
        raise OptionError(f"loaders has {len(loaders)} entries for {count} models; give one for each model.")
    for one in loaders if loaders is not None else [loader] if loader is not None else []:
        check_loader(one)


def check_weights(weights: Sequence[float] | None, count: int) -> list[float]:
    """The weights of all models, normalized to sum to one; equal ones if None."""
    if weights is None:
        return [1 / count] * count
    if len(weights) != count:
        raise OptionError(f"The recipe has {len(weights)} weights for {count} models; give one for each model.")
    return [w / sum(weights) for w in weights]


def check_reference(reference: int | None, count: int, based: bool) -> int | None:
    """The number of the model to whose units all are aligned: of two the first, unless another is asked for; None
    for units that all models share."""
    if reference is None:
        return 0 if count <= 2 and not based else None
    if based:
        raise OptionError("With a base, all models are aligned to it; leave reference out of the recipe.")
    if reference >= count:
        raise OptionError(f"The recipe's reference is model {reference}; there are models 0 to {count - 1}.")
    return reference


def check_recipe(recipe: Any, run: Any) -> tuple[Recipe, Run]:
    """The recipe and the run, where they are given."""
    for value, kind in ((recipe, Recipe), (run, Run)):
        if value is not None and not isinstance(value, kind):
            name = kind.__name__
            several = isinstance(value, (list, tuple, nn.Module))
            hint = (
                " Several models go into merge_many([...]), and a loader for each into loaders=[...]."
                if several
                else ""
            )
            raise OptionError(f"{name.lower()} is a {type(value).__name__}; give a fxmerge.{name}(...), or None.{hint}")
    return recipe or Recipe(), run or Run()


def check_values(states: Sequence[Mapping[str, Tensor]], names: Sequence[str]) -> None:
    """The tensors of a model must be in one place, with finite values."""
    for i, state in enumerate(states):
        devices = {t.device for t in state.values()}
        if len(devices) > 1:
            raise OptionError(
                f"The parameters of {names[i]} are on several devices ({', '.join(sorted(map(str, devices)))}); "
                "move the model to one, or pass run=Run(device=...)."
            )
        if devices == {torch.device("meta")}:
            raise OptionError(f"{names[i]} is on the meta device, and has no values to merge; load its parameters.")
        for name, tensor in state.items():
            number = tensor.is_floating_point() or tensor.is_complex()
            if number and tensor.device.type != "meta" and (bad := _not_finite(tensor)):
                raise NonFiniteError(
                    f"{bad} entries of {name!r} of {names[i]} (shape {tuple(tensor.shape)}) are NaN or infinite."
                )


def _not_finite(tensor: Tensor) -> int:
    """How many entries of a tensor are NaN or infinite."""
    return sum(int((~torch.isfinite(piece)).sum()) for piece in tensor.reshape(-1).split(PIECE))


def check_same_tensors(states: Sequence[Mapping[str, Tensor]], names: Sequence[str]) -> None:
    """All models must have the same tensors."""
    first = states[0]
    for i, state in enumerate(states[1:], start=1):
        for name in [*first, *(n for n in state if n not in first)]:
            if name not in state or name not in first:
                owner, other = (0, i) if name in first else (i, 0)
                raise ArchitectureMismatchError(
                    f"Parameter {name!r} is in {names[owner]} but not in {names[other]}; {SAME}"
                )
            a, b = first[name], state[name]
            kinds = [(t.is_floating_point(), t.is_complex()) for t in (a, b)]
            if a.shape != b.shape or kinds[0] != kinds[1]:
                raise ArchitectureMismatchError(
                    f"Parameter {name!r} is {a.dtype} of shape {tuple(a.shape)} in {names[0]} and {b.dtype} of shape "
                    f"{tuple(b.shape)} in {names[i]}; {SAME}"
                )
            if a.dtype != b.dtype:
                raise OptionError(
                    f"Parameter {name!r} is {a.dtype} in {names[0]} and {b.dtype} in {names[i]}; bring all models "
                    f"to one dtype, such as by model.to({a.dtype})."
                )
            if not _mergeable(a, b):
                raise ArchitectureMismatchError(
                    f"{name!r} holds {a.dtype}, which cannot be averaged, and differs between {names[0]} and "
                    f"{names[i]}; make it equal in both, or merge models whose weights are floating-point."
                )


def _mergeable(a: Tensor, b: Tensor) -> bool:
    """Integers are left alone where both models agree; counters, such as of batches seen, may differ."""
    if a.is_floating_point() or a.is_complex():
        return not a.is_quantized
    return a.ndim == 0 or torch.equal(a.cpu(), b.cpu())


def check_same_function(
    program: Program,
    module: nn.Module,
    state: Mapping[str, Tensor],
    args: Args,
    kwargs: Mapping[str, Any],
    names: tuple[str, str],
) -> None:
    """The first model's graph with another model's parameters must compute what that model computes."""
    outputs = models.run(module, args, kwargs)
    open_outputs(module, outputs)
    different = _different(pytree.tree_leaves(outputs), Runner(program).outputs(state, args, kwargs))
    if different is not None:
        raise ArchitectureMismatchError(
            f"{names[0]} and {names[1]} have equal parameter shapes but compute different functions of "
            f"them: with the parameters of {names[1]}, the graph of {names[0]} gives other outputs than "
            f"{names[1]} itself ({different}); {SAME}"
        )


def check_heads(
    program: Program,
    modules: Sequence[nn.Module],
    states: Sequence[Mapping[str, Tensor]],
    call: tuple[Args, Mapping[str, Any]],
    names: Sequence[str],
) -> None:
    """The graph of several models with heads of their own must compute, with the trunk of each, what that computes."""
    start = 0
    for module, state, name in zip(modules, states, names, strict=True):
        outputs = models.run(module, *call)
        open_outputs(module, outputs)
        expected = pytree.tree_leaves(outputs)
        got = Runner(program).outputs(state, *call)[start : start + len(expected)]
        different = _different(expected, got)
        if different is not None:
            raise ArchitectureMismatchError(
                f"The graph of what the networks share, with the parameters of {name}, gives other outputs than {name} "
                f"itself ({different}). Share less: pass a Recipe whose share is an earlier module."
            )
        start += len(expected)


def check_emitted(
    module: fx.GraphModule, program: Program, state: Mapping[str, Tensor], call: tuple[Args, Mapping[str, Any]]
) -> None:
    """What is emitted must compute what the graph does that layers are fitted in.

    Raises:
        CaptureError: if it does not.
    """
    expected, got = Runner(program).outputs(state, *call), pytree.tree_leaves(models.run(module, *call))
    different = _different(expected, got)
    if different is not None:
        raise CaptureError(
            f"The graph to emit and the graph to analyse differ in what they compute at another width ({different}). "
            "Leave the width at 1."
        )


def agree(expected: Sequence[Any], got: Sequence[Any], tolerance: float = 1e-5) -> bool:
    """Whether outputs are the same but for rounding, as a share of the largest value of each."""
    for a, b in zip(expected, got, strict=True):
        if isinstance(a, Tensor) and (a.is_floating_point() or a.is_complex()):
            scale = float(a.abs().max()) or 1.0
            if not torch.allclose(a / scale, b / scale, rtol=0, atol=tolerance, equal_nan=True):
                return False
    return True


def _different(expected: Sequence[Any], got: Sequence[Any]) -> str | None:
    """What is other than expected; None if nothing is."""
    if len(expected) != len(got):
        return f"{len(got)} outputs in place of {len(expected)}"
    for a, b in zip(expected, got, strict=True):
        if isinstance(a, Tensor) and (a.is_floating_point() or a.is_complex()):
            scale = float(a.detach().abs().max()) or 1.0  # A parameter may be an output.
            if a.shape != b.shape or not torch.allclose(a / scale, b / scale, rtol=1e-2, atol=1e-3, equal_nan=True):
                return f"output shape {tuple(b.shape)}"
    return None


def check_batch(model: nn.Module, args: Args, kwargs: Mapping[str, Any]) -> None:
    """The first batch must fit the model, and its outputs must be such as torch can open."""
    try:
        outputs = models.run(model, args, kwargs)
    except Exception as error:
        if len(args) == 1 and isinstance(args[0], Mapping) and not kwargs:
            raise LoaderError(
                f"{mismatch(model, args[0])} The dict itself, as the one argument of forward, raises "
                f"{type(error).__name__}: {error}"
            ) from error
        shapes = [
            tuple(v.shape) if isinstance(v, Tensor) else type(v).__name__ for v in pytree.tree_leaves((args, kwargs))
        ]
        raise LoaderError(
            f"The first batch does not fit the model: its inputs {shapes} raise {type(error).__name__}: {error}. "
            "Check the loader, or pass inputs=batch -> (args, kwargs)."
        ) from error
    open_outputs(model, outputs)

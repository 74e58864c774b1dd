"""Checks of what users hand in, before any work is done."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fxmerge import models
from fxmerge.capture import Args, open_outputs
from fxmerge.choose import AUTO, Alpha
from fxmerge.errors import ArchitectureMismatchError, LoaderError, NonFiniteError, OptionError
from fxmerge.models import Model as Model
from fxmerge.program import Program
from fxmerge.rewriting.task_vectors import TaskArithmetic, TaskVectors, Ties
from fxmerge.run import Runner, mismatch
from fxmerge.score import Score
from fxmerge.symmetry.group import Symmetry

SAME = "only models of one architecture can be merged."


def name_of(i: int) -> str:
    """What a model is called in messages."""
    return f"model {chr(ord('A') + i)}" if i < 26 else f"model {i + 1}"


def names_of(count: int, base: Model | None) -> list[str]:
    """What the models of one call are called in messages; the base, if there is one, comes first."""
    return [*(["the base"] if base is not None else []), *map(name_of, range(count))]


def check_task_vectors(task_vectors: TaskVectors | None, base: Model | None, method: str) -> TaskVectors | None:
    """How task vectors are combined: task arithmetic if that is left open; None without a base."""
    if task_vectors is not None and not isinstance(task_vectors, (TaskArithmetic, Ties)):
        raise OptionError(
            f"task_vectors is {task_vectors!r}; give an instance, fxmerge.TaskArithmetic(...) or fxmerge.Ties(...)."
        )
    if task_vectors is not None and base is None:
        raise OptionError("task_vectors needs a base: pass base=, the model that the others were fine-tuned from.")
    if base is not None and method != "align":
        raise OptionError(f"method is {method!r}, which merges no task vectors; with a base it must be 'align'.")
    return TaskArithmetic() if task_vectors is None and base is not None else task_vectors


def check_alpha(alpha: Alpha) -> None:
    if isinstance(alpha, str):
        if alpha != AUTO:
            raise OptionError(f"alpha is {alpha!r}; the only word for it is {AUTO!r}, other than {_NUMBER}.")
    elif isinstance(alpha, Mapping):
        for name, value in alpha.items():
            if not _is_share(value):
                raise OptionError(f"alpha of {name!r} is {value!r}; it must be {_NUMBER}.")
    elif not _is_share(alpha):
        raise OptionError(f"alpha is {alpha!r}; it must be {_NUMBER}.")


_NUMBER = "a number from 0 (activations only) to 1 (weights only)"


def _is_share(value: Any) -> bool:
    return isinstance(value, (int, float)) and 0 <= value <= 1


def check_class_names(alpha: Alpha, symmetry: Symmetry) -> None:
    """Every name in a mapping must be one of a class, whether it is used or was demoted."""
    known = (*symmetry.names, *symmetry.demoted)
    for name in alpha if isinstance(alpha, Mapping) else ():
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=3, cutoff=0.0)
            said = f"Near it are {', '.join(map(repr, near))}" if near else "It has none"
            raise OptionError(f"alpha names {name!r}, which is no class of the symmetry. {said}.")


def check_method(method: str, budget: float, damping: float) -> None:
    if method not in ("align", "zip", "auto"):
        raise OptionError(f"method is {method!r}; it must be 'align', 'zip' or 'auto'.")
    for name, value in (("budget", budget), ("damping", damping)):
        if not 0 <= value <= 1:
            raise OptionError(f"{name} is {value!r}; it must be a number from 0 to 1.")


def check_models(sequence: Any) -> tuple[Any, ...]:
    """The models of merge_many, which may themselves be containers."""
    one = isinstance(sequence, (Mapping, str, nn.Module)) and not isinstance(sequence, nn.ModuleList)
    if one or not isinstance(sequence, Iterable):
        raise OptionError(
            f"merge_many takes a list of models, such as [model_a, model_b], not a {type(sequence).__name__}."
        )
    given = tuple(sequence)
    if len(given) < 2:
        raise OptionError(f"merge_many takes two or more models, not {len(given)}.")
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


def check_combine(combine: str, method: str, base: Model | None, given: bool, max_memory: float) -> None:
    if combine not in ("average", "repair", "least_squares", "readout"):
        raise OptionError(f"combine is {combine!r}; it must be 'average', 'repair', 'least_squares' or 'readout'.")
    if method == "auto" and combine not in ("least_squares", "readout"):
        raise OptionError(
            f"method is 'auto', which compares refits, and combine is {combine!r}: pass method='zip' or 'align', or a "
            "loader and combine='least_squares'."
        )
    if combine != "average" and base is not None:
        raise OptionError(f"combine is {combine!r}, which knows no base; with a base it must be 'average'.")
    if combine != "average" and not given:
        raise OptionError(f"combine is {combine!r}, which needs data: pass a loader, or combine='average'.")
    if not max_memory > 0:
        raise OptionError(f"max_memory is {max_memory!r}; it must be a positive number of GiB.")


def check_score(score: Score | None, alpha: Alpha, method: str, combine: str, or_parent: bool, given: bool) -> None:
    if score is None:
        return
    if not callable(score):
        raise OptionError(f"score is {score!r}; it must be a function that takes a network and gives a number.")
    if not (given and alpha == AUTO) and method != "auto" and not (or_parent and combine == "least_squares"):
        raise OptionError(
            "score has nothing to choose between: pass a loader, and alpha='auto', method='auto', or "
            "combine='least_squares' with or_parent=True."
        )


def check_outputs(outputs: str, base: Model | None, given: bool) -> None:
    if outputs not in ("mean", "standardized"):
        raise OptionError(f"outputs is {outputs!r}; it must be 'mean' or 'standardized'.")
    if outputs == "standardized" and base is not None:
        raise OptionError("outputs is 'standardized', which knows no base; with a base it must be 'mean'.")
    if outputs == "standardized" and not given:
        raise OptionError("outputs is 'standardized', which needs data: pass a loader, or outputs='mean'.")


def check_search(similarity: str, activations: str, restarts: int) -> None:
    if similarity not in ("pearson", "cosine", "covariance"):
        raise OptionError(f"similarity is {similarity!r}; it must be 'pearson', 'cosine' or 'covariance'.")
    if activations not in ("every", "last"):
        raise OptionError(f"activations is {activations!r}; it must be 'every' or 'last'.")
    if not isinstance(restarts, int) or restarts < 0:
        raise OptionError(f"restarts is {restarts!r}; it must be a number of times, 0 or more.")


def check_weights(weights: Sequence[float] | None, count: int) -> list[float]:
    """The combination weights, normalised to sum to one; equal ones if None."""
    if weights is None:
        return [1 / count] * count
    values = [float(w) for w in weights]
    if len(values) != count or any(not math.isfinite(w) or w < 0 for w in values) or sum(values) <= 0:
        raise OptionError(f"weights is {tuple(weights)!r}; give {count} numbers, none negative, at least one positive.")
    return [w / sum(values) for w in values]


def check_reference(reference: int | None, count: int, based: bool) -> int | None:
    """The number of the model to whose units all are aligned: of two the first, unless another is asked for; None
    for units that all models share."""
    if reference is None:
        return 0 if count == 2 and not based else None
    if based:
        raise OptionError("With a base, all models are aligned to it; leave reference out.")
    if not isinstance(reference, int) or not 0 <= reference < count:
        raise OptionError(
            f"reference is {reference!r}; it must be the number of a model, from 0 to {count - 1}, or None."
        )
    return reference


def check_states(states: Sequence[Mapping[str, Tensor]], names: Sequence[str]) -> None:
    """All models must have the same tensors, in one place, with finite values."""
    for i, state in enumerate(states):
        devices = {t.device for t in state.values()}
        if len(devices) > 1:
            raise OptionError(
                f"The parameters of {names[i]} are on several devices ({', '.join(sorted(map(str, devices)))}); "
                "move the model to one, or pass device=."
            )
        if devices == {torch.device("meta")}:
            raise OptionError(f"{names[i]} is on the meta device, and has no values to merge; load its parameters.")
        for name, tensor in state.items():
            if tensor.is_floating_point() and tensor.device.type != "meta" and not torch.isfinite(tensor).all():
                bad = int((~torch.isfinite(tensor)).sum())
                raise NonFiniteError(
                    f"{bad} entries of {name!r} of {names[i]} (shape {tuple(tensor.shape)}) are NaN or infinite."
                )
    first = states[0]
    for i, state in enumerate(states[1:], start=1):
        for name in [*first, *(n for n in state if n not in first)]:
            if name not in state or name not in first:
                owner, other = (0, i) if name in first else (i, 0)
                raise ArchitectureMismatchError(
                    f"Parameter {name!r} is in {names[owner]} but not in {names[other]}; {SAME}"
                )
            a, b = first[name], state[name]
            if a.shape != b.shape or a.is_floating_point() != b.is_floating_point():
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
    expected = pytree.tree_leaves(outputs)
    got = Runner(program).outputs(state, args, kwargs)
    for a, b in zip(expected, got, strict=False):
        if isinstance(a, Tensor) and a.is_floating_point():
            scale = float(a.detach().abs().max()) or 1.0  # A parameter may be an output.
            if a.shape != b.shape or not torch.allclose(a / scale, b / scale, rtol=1e-2, atol=1e-3, equal_nan=True):
                raise ArchitectureMismatchError(
                    f"{names[0]} and {names[1]} have equal parameter shapes but compute different functions of "
                    f"them: with the parameters of {names[1]}, the graph of {names[0]} gives other outputs than "
                    f"{names[1]} itself (output shape {tuple(b.shape)}); {SAME}"
                )


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

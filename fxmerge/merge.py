"""Merging and aligning: the pipeline of fxmerge from top to bottom."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.export.passes import move_to_device_pass

from fxmerge import validate
from fxmerge.capture import Args, Kwargs, capture_program, evaluating
from fxmerge.choose import AUTO, CANDIDATES, DEFAULT, Alpha, best, candidates_of, disagreement
from fxmerge.errors import OptionError
from fxmerge.matching.search import Match, match
from fxmerge.program import Program
from fxmerge.rewriting.bake import bake
from fxmerge.rewriting.calibrate import batch_norm_statistics, recalibrate
from fxmerge.rewriting.combine import average
from fxmerge.run import Data, Inputs, batch_inputs
from fxmerge.similarity.activations import correlations
from fxmerge.symmetry.group import Symmetry, analyse
from fxmerge.symmetry.propagate import Propagation, propagate
from fxmerge.symmetry.spec import check_fits
from fxmerge.validate import Model, name_of

ALPHA = DEFAULT
"""Default weight of the weight-space similarity."""


def merge(
    gm_a: Model,
    gm_b: Model,
    loader: Iterable[Any] | None = None,
    *,
    alpha: Alpha = ALPHA,
    weights: Sequence[float] = (0.5, 0.5),
    seed: int = 0,
    device: str | torch.device | None = None,
    progress: bool | None = None,
    verify: bool = True,
    symmetry: Symmetry | None = None,
    inputs: Inputs | None = None,
    args: Args = (),
    kwargs: Kwargs | None = None,
) -> fx.GraphModule:
    """Merges two networks of one architecture, trained apart from each other, into one of their size.

    The units of `gm_b` are permuted to match those of `gm_a`, by how alike they are in weight space and
    in activation space (MuDSC, arXiv 2403.01753), inside the group of permutations that leave the
    network's function unchanged; the parameters are averaged and BatchNorm statistics re-estimated.

    Arguments:
        gm_a: any nn.Module, GraphModule or ExportedProgram; neither model is modified.
        gm_b: a model of the same architecture.
        loader: calibration data, unlabelled: an iterable of tensors, of tuples (inputs, targets), or of dicts
            of keyword arguments. It is iterated several times (an iterator is read into a list first).
            Without it, units are matched by their weights alone and BatchNorm statistics are pooled.
        alpha: weight of the weight-space similarity, from 0 (activations only) to 1 (weights only); or a mapping from
            names of classes, as in `Symmetry.names`, to such numbers, 0.5 for the others; or "auto": the candidate
            whose merge has outputs most like the mean of the models' own, without labels.
        weights: how much each model counts in the average; normalised to sum to one.
        seed: seed of the random order of the search.
        device: where to work and where the result is; by default where `gm_a` is.
        progress: whether to show progress; None shows it on a terminal.
        verify: whether to prove the symmetry on `gm_a` itself, in float64, before it is used.
        symmetry: the symmetry to use in place of an inferred one, as from `find_symmetry` or `Symmetry.from_json`.
        inputs: turns a batch of the loader into (args, kwargs) of the model, where the default does not fit.
        args: example inputs, needed only without a loader.
        kwargs: example inputs by keyword.

    Returns:
        A GraphModule in eval mode, which needs nothing of fxmerge; its state dict loads into the original
        class. `.meta["fxmerge"]` tells the classes, the match quality of each, alpha, timings and the
        verification error.

    Raises:
        ArchitectureMismatchError: if the models differ in more than the values of their parameters.
        CaptureError: if the architecture cannot be captured as a graph.
        LoaderError: if the loader is empty or its batches do not fit.
        NonFiniteError: if a weight or an activation is NaN or infinite.
        OptionError: if an argument is out of range.
        SpecError: if `symmetry` is not one of these models.

    Example:
        >>> import torch, fxmerge
        >>> def mlp(seed):
        ...     torch.manual_seed(seed)
        ...     return torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> merged = fxmerge.merge(mlp(0), mlp(1), [torch.randn(16, 4)])
        >>> merged(torch.zeros(3, 4)).shape
        torch.Size([3, 2])
    """
    return merge_many(
        (gm_a, gm_b),
        loader,
        alpha=alpha,
        weights=weights,
        seed=seed,
        device=device,
        progress=progress,
        verify=verify,
        symmetry=symmetry,
        inputs=inputs,
        args=args,
        kwargs=kwargs,
    )


def merge_many(
    models: Sequence[Model],
    loader: Iterable[Any] | None = None,
    *,
    alpha: Alpha = ALPHA,
    weights: Sequence[float] | None = None,
    seed: int = 0,
    device: str | torch.device | None = None,
    progress: bool | None = None,
    verify: bool = True,
    symmetry: Symmetry | None = None,
    inputs: Inputs | None = None,
    args: Args = (),
    kwargs: Kwargs | None = None,
) -> fx.GraphModule:
    """Merges two or more networks of one architecture; all are aligned to the first.

    Arguments, result and errors are those of `merge`, with one entry of `weights` for each model (equal ones if None).

    Example:
        >>> import torch, fxmerge
        >>> def mlp():
        ...     return torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> merged = fxmerge.merge_many([mlp(), mlp(), mlp()], [torch.randn(16, 4)])
        >>> merged.meta["fxmerge"]["models"]
        3
    """
    models = tuple(models)
    if len(models) < 2:
        raise OptionError(f"merge_many takes two or more models, not {len(models)}.")
    shares = validate.check_weights(weights, len(models))
    job = _prepare(models, loader, alpha, device, progress, inputs, args, kwargs)
    found, symmetry = job.symmetry(symmetry, verify)
    matches, chosen = job.matches(found, symmetry, shares, alpha=alpha, seed=seed)
    merged = job.combine(matches, shares)
    merged.meta["fxmerge"] = job.report(symmetry, matches, chosen) | {"models": len(models), "weights": tuple(shares)}
    return merged


def align(
    model: Model,
    to: Model,
    loader: Iterable[Any] | None = None,
    *,
    alpha: Alpha = ALPHA,
    seed: int = 0,
    device: str | torch.device | None = None,
    progress: bool | None = None,
    verify: bool = True,
    symmetry: Symmetry | None = None,
    inputs: Inputs | None = None,
    args: Args = (),
    kwargs: Kwargs | None = None,
) -> fx.GraphModule:
    """Re-expresses a model in the units of another of the same architecture; its function stays the same.

    Arguments and errors are those of `merge`: `to` is the model whose units are taken as they are.

    Returns:
        A GraphModule that computes what `model` computes. `.meta["fxmerge"]["images"]` holds, for every
        class by name, where each unit of `model` went; `Symmetry.element` makes a `Permutation` of it.

    Example:
        >>> import torch, fxmerge
        >>> mlp = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> aligned = fxmerge.align(mlp, to=mlp, args=(torch.zeros(1, 4),))
        >>> aligned.meta["fxmerge"]["images"]
        {'0.weight[0]': [0, 1, 2, 3, 4, 5, 6, 7]}
    """
    job = _prepare((to, model), loader, alpha, device, progress, inputs, args, kwargs)
    found, symmetry = job.symmetry(symmetry, verify)
    (matched,), chosen = job.matches(found, symmetry, (0.5, 0.5), alpha=alpha, seed=seed)
    with job.timed("rewriting"):
        aligned = bake(job.program, matched.permutation.apply(job.states[1]))
    aligned.meta["fxmerge"] = job.report(symmetry, [matched], chosen) | {
        "images": {name: image.tolist() for name, image in zip(symmetry.names, matched.permutation.images, strict=True)}
    }
    return aligned


@dataclass
class _Job:
    """What the stages of one call share: checked inputs, the captured program, and how long each stage took."""

    model: Model
    states: tuple[dict[str, Tensor], ...]
    data: Data | None
    example: tuple[Args, dict[str, Any]]
    program: Program
    progress: bool | None
    seconds: dict[str, float]

    def timed(self, stage: str) -> AbstractContextManager[None]:
        return _timed(self.seconds, stage)

    def symmetry(self, given: Symmetry | None, verify: bool) -> tuple[Propagation, Symmetry]:
        """The labels of the program, and the symmetry given or else inferred."""
        with self.timed("symmetry"):
            if given is None:
                found, symmetry = analyse(self.program)
            else:
                check_fits(given, self.program)
                found, symmetry = propagate(self.program), given
        if verify:
            with self.timed("verification"):
                symmetry = symmetry.verify(self.model, *self.example)
        return found, symmetry

    def matches(
        self, found: Propagation, symmetry: Symmetry, shares: Sequence[float], *, alpha: Alpha, seed: int
    ) -> tuple[list[Match], dict[str, Any]]:
        """The matches of all other models with the first, and what the report tells of alpha."""
        if isinstance(alpha, Mapping):
            validate.check_class_names(alpha, symmetry)
        names = symmetry.names
        candidates = candidates_of(alpha if self.data is not None else 1.0, names)
        each = [self.match(found, symmetry, other, candidates, seed) for other in range(1, len(self.states))]
        tried = [[matches[number] for matches in each] for number in range(len(candidates))]
        errors: dict[float, float] = {}
        chosen = candidates[0]
        if alpha == AUTO and self.data is not None:
            for candidate, matches in zip(CANDIDATES, tried, strict=True):
                merged = self.combine(matches, shares).state_dict()
                with self.timed("choosing alpha"):
                    errors[candidate] = disagreement(self.program, merged, self.states, shares, self.data)
            chosen = best(errors)
        return tried[candidates.index(chosen)], {
            "alpha": {names[n]: own for n, own in chosen.items()} if isinstance(chosen, dict) else chosen,
            "alpha_errors": errors,
        }

    def match(
        self,
        found: Propagation,
        symmetry: Symmetry,
        other: int,
        alphas: Sequence[float | dict[int, float]],
        seed: int,
    ) -> list[Match]:
        """The match of another model with the first for every alpha, all from the same statistics."""
        a, b = self.states[0], self.states[other]
        correlation: Mapping[int, Tensor] = {}
        least = min(min(own.values(), default=1.0) if isinstance(own, dict) else own for own in alphas)
        if self.data is not None and least < 1:
            with self.timed("activations"):
                names = (name_of(0), name_of(other))
                shown = correlations(found, symmetry, (a, b), self.data, names, [(0, 1)])
                correlation = {number: c[0, 1] for number, c in shown.items()}
        with self.timed("matching"):
            return [match(symmetry, a, b, correlation, alpha=own, seed=seed, progress=self.progress) for own in alphas]

    def combine(self, matches: Sequence[Match], shares: Sequence[float]) -> fx.GraphModule:
        """The average of all models in the units of the first, its BatchNorm statistics re-estimated."""
        with self.timed("rewriting"):
            states = [self.states[0], *(m.permutation.apply(s) for m, s in zip(matches, self.states[1:], strict=True))]
            merged = bake(self.program, average(states, shares, batch_norm_statistics(self.program)))
        if self.data is not None:
            with self.timed("calibration"):
                recalibrate(merged, self.program, self.data)
        return merged

    def report(self, symmetry: Symmetry, matches: Sequence[Match], alpha: Mapping[str, Any]) -> dict[str, Any]:
        """What `.meta["fxmerge"]` tells: plain data, so that a result can be unpickled without fxmerge."""
        return {
            "classes": [
                {
                    "name": c.name,
                    "size": c.size,
                    "structure": c.structure,
                    "axes": [(axis.parameter, axis.dim) for axis in c.axes],
                    "parents": list(c.parents),
                    "why": c.why,
                }
                for c in symmetry.classes
            ],
            "demoted": symmetry.demoted,
            "unknown_ops": dict(symmetry.unknown),
            "verification_error": symmetry.error,
            "route": self.program.route,
            **alpha,
            "quality": [{name: dict(q) for name, q in m.quality.items()} for m in matches],
            "objective": [m.trace for m in matches],
            "seconds": dict(self.seconds),
        }


def _prepare(
    models: tuple[Model, ...],
    loader: Iterable[Any] | None,
    alpha: Alpha,
    device: str | torch.device | None,
    progress: bool | None,
    inputs: Inputs | None,
    args: Args,
    kwargs: Kwargs | None,
) -> _Job:
    """Checks everything that can be checked before any work is done, and captures the first model."""
    validate.check_alpha(alpha)
    if device is not None:
        models = tuple(_to(m, device) for m in models)
    modules = tuple(m.module() if isinstance(m, ExportedProgram) else m for m in models)
    states = tuple(dict(m.state_dict()) for m in modules)
    validate.check_states(states)
    example = tuple(args), dict(kwargs or {})
    data = None
    if loader is not None:
        if iter(loader) is loader:
            loader = list(loader)  # An iterator can be read once; every stage reads the data anew.
        where = next((t.device for t in states[0].values()), torch.device("cpu"))
        data = Data(loader, inputs or batch_inputs(modules[0]), where, progress)
        example = example if any(example) else data.first()
    example = example if any(example) else _example_of(models[0])
    seconds: dict[str, float] = {}
    with ExitStack() as stack:
        for model in models:
            if isinstance(model, nn.Module):
                stack.enter_context(evaluating(model))
        validate.check_batch(modules[0], *example)
        with _timed(seconds, "capture"):
            program = capture_program(models[0], *example)
        for i in range(1, len(models)):
            validate.check_same_function(program, modules[i], states[i], *example, i)
    return _Job(models[0], states, data, example, program, progress, seconds)


def _to(model: Model, device: str | torch.device) -> Model:
    """A copy of a model on a device."""
    if isinstance(model, ExportedProgram):
        return move_to_device_pass(model, device)
    return copy.deepcopy(model).to(device)


@contextmanager
def _timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    """Adds the seconds spent inside to the entry of a stage."""
    began = time.perf_counter()
    yield
    seconds[stage] = seconds.get(stage, 0.0) + time.perf_counter() - began


def _example_of(model: Model) -> tuple[Args, dict[str, Any]]:
    """Example inputs that a model carries with it.

    Raises:
        OptionError: if it carries none.
    """
    if isinstance(model, ExportedProgram) and model.example_inputs is not None:
        args, kwargs = model.example_inputs
        return args, kwargs
    if isinstance(model, fx.GraphModule):
        values = [n.meta.get("val") for n in model.graph.nodes if n.op == "placeholder"]
        if values and all(isinstance(v, Tensor) and v.is_floating_point() for v in values):
            return tuple(torch.randn([int(s) for s in v.shape], dtype=v.dtype) for v in values if v is not None), {}
    raise OptionError(
        "Without a loader, example inputs are needed to capture the model: pass args=(...) or kwargs={...}."
    )

"""Merging and aligning: the pipeline of fxmerge from top to bottom."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import asdict, dataclass
from itertools import combinations, combinations_with_replacement
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.export.passes import move_to_device_pass

from fxmerge import validate
from fxmerge.capture import Args, Kwargs, capture_program, evaluating
from fxmerge.errors import OptionError
from fxmerge.matching.assignment import Scores
from fxmerge.matching.search import Match, match
from fxmerge.matching.universe import Alignment, canonical_order, find_universe, to_reference
from fxmerge.matching.zip_search import ZipMatch, match_zip
from fxmerge.program import Program
from fxmerge.rewriting.bake import bake
from fxmerge.rewriting.calibrate import batch_norm_statistics, recalibrate
from fxmerge.rewriting.combine import average
from fxmerge.rewriting.task_vectors import TaskVectors
from fxmerge.rewriting.zipped import zip_average
from fxmerge.run import Data, Inputs, batch_inputs
from fxmerge.similarity.activations import correlations, whole
from fxmerge.symmetry.flow import flows
from fxmerge.symmetry.group import Symmetry, analyse
from fxmerge.symmetry.permutation import Permutation
from fxmerge.symmetry.propagate import Propagation, propagate
from fxmerge.symmetry.spec import check_fits
from fxmerge.validate import Model

Method = Literal["align", "zip"]

ALPHA = 0.5
"""Default weight of the weight-space similarity."""


def merge(
    gm_a: Model,
    gm_b: Model,
    loader: Iterable[Any] | None = None,
    *,
    method: Method = "align",
    alpha: float = ALPHA,
    budget: float = 1.0,
    damping: float = 0.5,
    weights: Sequence[float] = (0.5, 0.5),
    base: Model | None = None,
    task_vectors: TaskVectors | None = None,
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
        method: "align" matches units one to one; "zip" also merges units of one and the same model where these are
            more alike (ZipIt!, arXiv 2305.03053), inside of aligned blocks such as attention heads.
        alpha: weight of the weight-space similarity, from 0 (activations only) to 1 (weights only).
        budget: zip only: in [0, 1], the share of the merges that may be of units of one model.
        damping: zip only: in [0, 1], what the similarities of a merged unit are multiplied with, so that it is less
            likely to be merged again.
        weights: how much each model counts in the average; normalised to sum to one.
        base: the model that both were fine-tuned from. Both are aligned to it, and their differences to it are
            combined and added to it, in place of the average; the result is in its units.
        task_vectors: how the differences are combined: `TaskArithmetic` (if None) or `Ties`.
        seed: seed of the random order of the search.
        device: where to work and where the result is; by default where the base or else `gm_a` is.
        progress: whether to show progress; None shows it on a terminal.
        verify: whether to prove the symmetry on `gm_a` (or the base) itself, in float64, before it is used.
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
        method=method,
        alpha=alpha,
        budget=budget,
        damping=damping,
        weights=weights,
        base=base,
        task_vectors=task_vectors,
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
    method: Method = "align",
    alpha: float = ALPHA,
    budget: float = 1.0,
    damping: float = 0.5,
    weights: Sequence[float] | None = None,
    reference: int | None = None,
    base: Model | None = None,
    task_vectors: TaskVectors | None = None,
    seed: int = 0,
    device: str | torch.device | None = None,
    progress: bool | None = None,
    verify: bool = True,
    symmetry: Symmetry | None = None,
    inputs: Inputs | None = None,
    args: Args = (),
    kwargs: Kwargs | None = None,
) -> fx.GraphModule:
    """Merges two or more networks of one architecture.

    Three or more are all matched with each other, in units that they share (C2M3, arXiv 2405.17897): the way from one
    model to a second and on to a third is the way from the first to the third, and the result does not
    depend on the order of the models.

    Arguments, result and errors are those of `merge`, with one entry of `weights` for each model (equal ones if None);
    and `reference`, the number of a model, from 0 on, to whose units each of the others is matched by itself. None is
    the first of two models, and for more the units that they share; with a base, all are matched with the base.
    `.meta["fxmerge"]` tells in "images", for every model and class, where each unit went, and in "units_of" the
    number of the model whose units the result has.

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
    reference = validate.check_reference(reference, len(models), base is not None)
    validate.check_method(method, budget, damping)
    task_vectors = validate.check_task_vectors(task_vectors, base, method)
    job = _prepare(models, loader, alpha, device, progress, inputs, args, kwargs, base)
    found, symmetry = job.symmetry(symmetry, verify)
    # The base comes first.
    aligned = job.align(found, symmetry, reference if base is None else 0, alpha=alpha, seed=seed)
    with job.timed("rewriting"):
        states = [aligned.permutations[i].apply(job.states[i]) for i in aligned.order]
        ordered = [shares[i] for i in aligned.order] if base is None else shares
    statistics = batch_norm_statistics(job.program)
    if method == "zip":
        zipped = job.zip(found, symmetry, states, alpha=alpha, budget=budget, damping=damping, seed=seed)
        with job.timed("rewriting"):
            state = zip_average(states, zipped.labels, symmetry.layout, flows(found), ordered, statistics)
    elif task_vectors is not None:
        with job.timed("rewriting"):
            state = task_vectors.combine(states[0], states[1:], shares, statistics)
    else:
        with job.timed("rewriting"):
            state = average(states, ordered, statistics)
    with job.timed("rewriting"):
        merged = bake(job.program, state)
    if job.data is not None:
        with job.timed("calibration"):
            recalibrate(merged, job.program, job.data)
    merged.meta["fxmerge"] = job.report(symmetry, aligned, alpha) | {
        "models": len(models),
        "weights": tuple(shares),
        "method": method,
        "reference": reference,
        "units_of": aligned.home if base is None else None,
        "images": [_images(symmetry, p) for p in aligned.permutations[-len(models) :]],
    }
    if method == "zip":
        merged.meta["fxmerge"] |= {"zip_objective": zipped.trace, "zipped_within": dict(zipped.within)}
    if task_vectors is not None:
        merged.meta["fxmerge"]["task_vectors"] = {"name": type(task_vectors).__name__, **asdict(task_vectors)}
    return merged


def align(
    model: Model,
    to: Model,
    loader: Iterable[Any] | None = None,
    *,
    alpha: float = ALPHA,
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
    matched = job.align(found, symmetry, 0, alpha=alpha, seed=seed)
    permutation = matched.permutations[1]
    with job.timed("rewriting"):
        aligned = bake(job.program, permutation.apply(job.states[1]))
    aligned.meta["fxmerge"] = job.report(symmetry, matched, alpha) | {"images": _images(symmetry, permutation)}
    return aligned


@dataclass
class _Job:
    """What the stages of one call share: checked inputs, the captured program, and how long each stage took."""

    model: Model
    states: tuple[dict[str, Tensor], ...]
    names: list[str]
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

    def align(
        self, found: Propagation, symmetry: Symmetry, reference: int | None, *, alpha: float, seed: int
    ) -> Alignment:
        """All models in the units of one; None for units that all have a part in."""
        numbers = range(len(self.states))
        if reference is not None:
            others = [i for i in numbers if i != reference]
            matches = {i: self.match(found, symmetry, reference, i, alpha=alpha, seed=seed) for i in others}
            return to_reference(symmetry, matches, reference)
        with self.timed("matching"):
            order = canonical_order(self.states)
        states = [self.states[i] for i in order]
        correlation: Mapping[int, Mapping[tuple[int, int], Tensor]] = {}
        if self.data is not None and alpha < 1:
            with self.timed("activations"):
                names, pairs = [self.names[i] for i in order], list(combinations(numbers, 2))
                correlation = correlations(found, symmetry, states, self.data, names, pairs)
        with self.timed("matching"):
            shared = find_universe(symmetry, states, correlation, alpha=alpha, seed=seed, progress=self.progress)
        return shared.renumbered(order)

    def match(self, found: Propagation, symmetry: Symmetry, home: int, other: int, *, alpha: float, seed: int) -> Match:
        """The match of one model with another, whose units are taken as they are."""
        a, b = self.states[home], self.states[other]
        correlation: Mapping[int, Tensor] = {}
        if self.data is not None and alpha < 1:
            with self.timed("activations"):
                names = (self.names[home], self.names[other])
                shown = correlations(found, symmetry, (a, b), self.data, names, [(0, 1)])
                correlation = {number: c[0, 1] for number, c in shown.items()}
        with self.timed("matching"):
            return match(symmetry, a, b, correlation, alpha=alpha, seed=seed, progress=self.progress)

    def zip(
        self,
        found: Propagation,
        symmetry: Symmetry,
        states: Sequence[Mapping[str, Tensor]],
        *,
        alpha: float,
        budget: float,
        damping: float,
        seed: int,
    ) -> ZipMatch:
        """What to merge of aligned models, within and across."""
        count = len(states)
        correlation: Mapping[int, Scores] = {}
        if self.data is not None and alpha < 1:
            with self.timed("activations"):
                pairs = list(combinations_with_replacement(range(count), 2))
                shown = correlations(found, symmetry, states, self.data, self.names, pairs)
                correlation = {number: whole(blocks, count) for number, blocks in shown.items()}
        with self.timed("matching"):
            return match_zip(
                symmetry,
                states,
                correlation,
                flows(found),
                alpha=alpha if correlation else 1.0,
                budget=budget,
                damping=damping,
                seed=seed,
                progress=self.progress,
            )

    def report(self, symmetry: Symmetry, aligned: Alignment, alpha: float) -> dict[str, Any]:
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
            "alpha": alpha if self.data is not None else 1.0,
            "quality": [{name: dict(q) for name, q in quality.items()} for quality in aligned.quality],
            "objective": list(aligned.traces),
            "seconds": dict(self.seconds),
        }


def _images(symmetry: Symmetry, permutation: Permutation) -> dict[str, list[int]]:
    """For every class by name, where each unit goes."""
    return {name: image.tolist() for name, image in zip(symmetry.names, permutation.images, strict=True)}


def _prepare(
    models: tuple[Model, ...],
    loader: Iterable[Any] | None,
    alpha: float,
    device: str | torch.device | None,
    progress: bool | None,
    inputs: Inputs | None,
    args: Args,
    kwargs: Kwargs | None,
    base: Model | None = None,
) -> _Job:
    """Checks everything that can be checked before any work is done, and captures the base or else the first model."""
    validate.check_alpha(alpha)
    names = validate.names_of(len(models), base)
    models = models if base is None else (base, *models)
    if device is not None:
        models = tuple(_to(m, device) for m in models)
    modules = tuple(m.module() if isinstance(m, ExportedProgram) else m for m in models)
    states = tuple(dict(m.state_dict()) for m in modules)
    validate.check_states(states, names)
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
            validate.check_same_function(program, modules[i], states[i], *example, names=(names[0], names[i]))
    return _Job(models[0], states, names, data, example, program, progress, seconds)


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

"""Merging and aligning: the pipeline of fxmerge from top to bottom."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import fx

from fxmerge import validate
from fxmerge.capture import Args, Kwargs
from fxmerge.choose import DEFAULT, Alpha
from fxmerge.decide import decide, errors_of, warn_of_parent
from fxmerge.job import prepare
from fxmerge.merger import Combine, Merger, Method, Outputs, Plan, images
from fxmerge.notices import warn_of_few_rows, warn_of_outputs
from fxmerge.refitting.outputs import standardized
from fxmerge.rewriting.bake import bake
from fxmerge.rewriting.masks import masked, pruned
from fxmerge.rewriting.task_vectors import TaskVectors
from fxmerge.run import Inputs
from fxmerge.score import Score
from fxmerge.shared import without_shared
from fxmerge.similarity.activations import Activations, Similarity
from fxmerge.symmetry.flow import flows
from fxmerge.symmetry.group import Symmetry
from fxmerge.validate import Model

ALPHA = DEFAULT
"""Default weight of the weight-space similarity."""

MAX_MEMORY = 2.0
"""GiB of activations that refitting keeps in memory by default."""


def merge(
    gm_a: Model,
    gm_b: Model,
    loader: Iterable[Any] | None = None,
    *,
    loaders: Sequence[Iterable[Any]] | None = None,
    method: Method | Literal["auto"] | None = None,
    combine: Combine | None = None,
    alpha: Alpha = ALPHA,
    similarity: Similarity = "pearson",
    activations: Activations = "every",
    budget: float = 1.0,
    damping: float = 0.5,
    weights: Sequence[float] = (0.5, 0.5),
    base: Model | None = None,
    task_vectors: TaskVectors | None = None,
    outputs: Outputs = "mean",
    or_parent: bool = True,
    score: Score | None = None,
    max_memory: float = MAX_MEMORY,
    restarts: int = 0,
    seed: int = 0,
    device: str | torch.device | None = None,
    progress: bool | None = None,
    verify: bool = True,
    symmetry: Symmetry | None = None,
    free: str | Sequence[str] = (),
    inputs: Inputs | None = None,
    args: Args = (),
    kwargs: Kwargs | None = None,
) -> fx.GraphModule:
    """Merges two networks of one architecture, trained apart from each other, into one of their size.

    Units are matched by how alike they are in weight space and in activation space (MuDSC, arXiv 2403.01753), inside
    the group of permutations that leave the network's function unchanged, and their parameters averaged. Then every
    layer is fitted, in closed form and in graph order, to what the two networks compute there, from what the
    merged network computes before it.

    Arguments:
        gm_a: any nn.Module, GraphModule or ExportedProgram; neither model is modified.
        gm_b: a model of the same architecture.
        loader: calibration data, unlabelled: an iterable of tensors, of tuples (inputs, targets), or of dicts
            of keyword arguments. It is iterated several times (an iterator is read into a list first).
            Without it, units are matched by their weights alone and averaged, and BatchNorm statistics are
            estimated from the models' and the weights.
        loaders: in place of a loader, one for each model with data of its own task: refitted layers then learn from
            each model mostly on its own data. No input needs a label, but for the task it is of.
        method: "zip" merges the most similar units, within models too (ZipIt!, arXiv 2305.03053), inside of aligned
            blocks such as attention heads; "align" matches units one to one; "auto" refits both, and takes the one
            with the smaller error of the last layers on data that are held out. None is "zip", with a base "align".
        combine: "least_squares" refits every layer after averaging; "readout" only layers that no other comes after;
            "repair" gives every unit the mean and deviation of the models' (arXiv 2211.08403); "average" does nothing
            more. None is "least_squares" where there are data and no base, else "average".
        alpha: weight of the weight-space similarity, from 0 (activations only) to 1 (weights only); or a mapping from
            names of classes, as in `Symmetry.names`, to such numbers, 0.5 for the others; or "auto": the candidate
            whose merge has outputs most like the mean of the models' own, without labels.
        similarity: how activations of units are compared: by "pearson" correlation, "cosine" or "covariance".
        activations: of "every" activation that shows units to a layer, or of the "last" one of each class.
        budget: zip only: in [0, 1], the share of the merges that may be of units of one model.
        damping: zip only: in [0, 1], what the similarities of a merged unit are multiplied with, so that it is less
            likely to be merged again.
        weights: how much each model counts in the average; normalised to sum to one.
        base: the model that both were fine-tuned from. Both are aligned to it, and their differences to it are
            combined and added to it, in place of the average; the result is in its units.
        task_vectors: how the differences are combined: `TaskArithmetic` (if None) or `Ties`.
        outputs: what last layers learn: the weighted "mean" of the models' outputs; or, for models of different tasks
            whose outputs are compared with each other or by direction, that of "standardized" ones: each output shifted
            to mean zero over all data, and all scaled to one deviation.
        or_parent: with "least_squares": whether one of the models may be returned, with a warning and its last layers
            refitted, where their error is smaller than that of the merged network's by a quarter, or, if the models
            answer alike, less than twice as large. If they do, and that brings its outputs little nearer to the mean of
            all, it is returned as it is. Where last layers cannot be compared (an output layer tied to the
            embedding), the outputs of the networks as they are decide, and models are returned as they are only.
        score: for who has labels after all: how good a network is, larger for better, such as its accuracy on
            validation data. It is called with GraphModules in eval mode, without gradients, and chooses in place of
            errors without labels: with "least_squares" and `or_parent` between the merged network, the models that
            count, as they are, and these with last layers refitted; with the method "auto" between both refits; with
            the alpha "auto" between the averages of its candidates. NaN is the lowest score.
        max_memory: GiB of activations that refitting keeps in memory; what is more goes to a temporary folder.
        restarts: how often the search is made again in another order; what has the highest objective is taken.
        seed: seed of the random order of the search.
        device: where to work and where the result is; by default where the base or else `gm_a` is.
        progress: whether to show progress; None shows it on a terminal.
        verify: whether to prove the symmetry on `gm_a` (or the base) itself, in float64, before it is used.
        symmetry: the symmetry to use in place of an inferred one, as from `find_symmetry` or `Symmetry.from_json`.
        free: outputs along which units may move, as those of a backbone whose head is not part of it, by name as in
            `find_symmetry`: "output" for all. The outputs of the result are in the units of the model that "units_of"
            tells, mostly the first. A symmetry that is given has its own free outputs.
        inputs: turns a batch of the loader into (args, kwargs) of the model, where the default does not fit.
        args: example inputs, needed only without a loader.
        kwargs: example inputs by keyword.

    Returns:
        A GraphModule in eval mode, which needs nothing of fxmerge; its state dict loads into the original
        class. `.meta["fxmerge"]` tells the classes, the match quality of each, alpha, what was gained by refitting
        each layer, timings and the verification error. Tensors that are equal in all models stay as they are, such
        as a frozen base under adapters, unless their units must move with others; "shared" names them.

    Raises:
        ArchitectureMismatchError: if the models differ in more than the values of their parameters.
        CaptureError: if the architecture cannot be captured as a graph.
        LoaderError: if the loader is empty or its batches do not fit.
        NonFiniteError: if a weight or an activation is NaN or infinite.
        OptionError: if an argument is out of range, or `free` names no output.
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
        loaders=loaders,
        method=method,
        combine=combine,
        alpha=alpha,
        similarity=similarity,
        activations=activations,
        budget=budget,
        damping=damping,
        weights=weights,
        base=base,
        task_vectors=task_vectors,
        outputs=outputs,
        or_parent=or_parent,
        score=score,
        max_memory=max_memory,
        restarts=restarts,
        seed=seed,
        device=device,
        progress=progress,
        verify=verify,
        symmetry=symmetry,
        free=free,
        inputs=inputs,
        args=args,
        kwargs=kwargs,
    )


def merge_many(
    models: Sequence[Model],
    loader: Iterable[Any] | None = None,
    *,
    loaders: Sequence[Iterable[Any]] | None = None,
    method: Method | Literal["auto"] | None = None,
    combine: Combine | None = None,
    alpha: Alpha = ALPHA,
    similarity: Similarity = "pearson",
    activations: Activations = "every",
    budget: float = 1.0,
    damping: float = 0.5,
    weights: Sequence[float] | None = None,
    reference: int | None = None,
    base: Model | None = None,
    task_vectors: TaskVectors | None = None,
    outputs: Outputs = "mean",
    or_parent: bool = True,
    score: Score | None = None,
    max_memory: float = MAX_MEMORY,
    restarts: int = 0,
    seed: int = 0,
    device: str | torch.device | None = None,
    progress: bool | None = None,
    verify: bool = True,
    symmetry: Symmetry | None = None,
    free: str | Sequence[str] = (),
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
    models = validate.check_models(models)
    shares = validate.check_weights(weights, len(models))
    reference = validate.check_reference(reference, len(models), base is not None)
    method = ("zip" if base is None else "align") if method is None else method
    validate.check_method(method, budget, damping)
    task_vectors = validate.check_task_vectors(task_vectors, base, method)
    validate.check_loaders(loader, loaders, len(models))
    given = loader is not None or loaders is not None
    combine = ("least_squares" if base is None and given else "average") if combine is None else combine
    validate.check_combine(combine, method, base, given, max_memory)
    validate.check_score(score, alpha, method, combine, or_parent, given)
    validate.check_outputs(outputs, base, given)
    validate.check_search(similarity, activations, restarts)
    job = prepare(models, loader, alpha, device, progress, inputs, args, kwargs, base, loaders)
    found, whole = job.symmetry(symmetry, verify, free)
    validate.check_class_names(alpha, whole)
    flow = flows(found)
    warn_of_outputs(found, whole, flow)
    if outputs == "standardized" and job.data is not None:
        with job.timed("standardizing"):
            job = replace(job, states=standardized(job.program, job.states, job.data))
    cut = masked(job.program, job.masks)
    symmetry, still = without_shared(whole, flow, job.states, cut.values())
    job = replace(job, states=pruned(job.states, cut))
    home = reference if base is None else 0  # The base comes first.
    plan = Plan(
        shares,
        "align" if method == "align" else "zip",
        home,
        budget=budget,
        damping=damping,
        task_vectors=task_vectors,
        seed=seed,
        restarts=restarts,
        similarity=similarity,
        activations=activations,
    )
    mergers = [Merger(job, found, symmetry, plan)]
    if method == "auto":
        mergers.append(Merger(job, found, symmetry, replace(plan, method="align"), zipper=mergers[0]))
    attempts = [merger.choose(alpha, score) for merger in mergers]
    if combine == "average":
        (merger,), ((attempt, told),) = mergers, attempts
        merged = merger.finish(attempt.state)
    else:
        refits = [
            merger.refit(attempt, combine, or_parent=or_parent, options=score is not None, max_memory=max_memory)
            for merger, (attempt, _) in zip(mergers, attempts, strict=True)
        ]
        number, refitted, scores = decide(mergers, refits, score)
        merger, (attempt, told) = mergers[number], attempts[number]
        told["scores"] = scores
        if method == "auto":
            told["method_errors"] = {m.plan.method: e for m, e in zip(mergers, errors_of(refits), strict=True)}
        merged = merger.finish(refitted.state, calibrate=False)
        told |= {"layers": refitted.layers, "left": dict(refitted.left)}
        told |= {"parent": refitted.parent, "errors": dict(refitted.errors), "compared": refitted.compared}
        warn_of_few_rows(refitted.layers)
        if refitted.parent is not None:
            warn_of_parent(job.names[refitted.parent], refitted, outputs, scores)
    merged.meta["fxmerge"] = job.report(symmetry) | told
    merged.meta["fxmerge"] |= {
        "models": len(models),
        "weights": tuple(shares),
        "method": merger.plan.method,
        "combine": combine,
        "outputs": outputs,
        "reference": reference,
        "units_of": attempt.aligned.home if base is None else None,
        "images": [images(whole, still, p) for p in attempt.aligned.permutations[-len(models) :]],
        "shared": merger.stayed(merged.state_dict()),
    }
    return merged


def align(
    model: Model,
    to: Model,
    loader: Iterable[Any] | None = None,
    *,
    alpha: Alpha = ALPHA,
    similarity: Similarity = "pearson",
    activations: Activations = "every",
    restarts: int = 0,
    seed: int = 0,
    device: str | torch.device | None = None,
    progress: bool | None = None,
    verify: bool = True,
    symmetry: Symmetry | None = None,
    free: str | Sequence[str] = (),
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
    validate.check_search(similarity, activations, restarts)
    validate.check_loaders(loader, None, 2)
    job = prepare((to, model), loader, alpha, device, progress, inputs, args, kwargs)
    found, whole = job.symmetry(symmetry, verify, free)
    validate.check_class_names(alpha, whole)
    flow = flows(found)
    warn_of_outputs(found, whole, flow)
    symmetry, still = without_shared(whole, flow, job.states, masked(job.program, job.masks).values())
    plan = Plan((0.5, 0.5), seed=seed, restarts=restarts, similarity=similarity, activations=activations)
    merger = Merger(job, found, symmetry, plan)
    attempt, told = merger.choose(alpha)
    permutation = attempt.aligned.permutations[1]
    with job.timed("rewriting"):
        aligned = bake(job.program, permutation.apply(job.states[1]))
    aligned.meta["fxmerge"] = job.report(symmetry) | told
    aligned.meta["fxmerge"] |= {
        "images": images(whole, still, permutation),
        "shared": merger.stayed(aligned.state_dict()),
    }
    return aligned

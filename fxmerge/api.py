"""The verbs of fxmerge: each is the pipeline from models to a network, top to bottom."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from torch import Tensor, fx

from fxmerge import validate
from fxmerge.evidence.activations import classes_along, similarities, units_along
from fxmerge.job import Job, prepare
from fxmerge.matching.models import Matching, match_models, pairs_to_correlate
from fxmerge.matching.universe import canonical_order
from fxmerge.notices import warn_of_few_rows, warn_of_nearer_parent, warn_of_outputs, warn_without_data
from fxmerge.recipe import Align, Average, LeastSquares, Readout, Recipe, Repair, Run
from fxmerge.refitting.folding import folded
from fxmerge.refitting.gather import Teacher
from fxmerge.refitting.outputs import standardized
from fxmerge.refitting.places import Places
from fxmerge.refitting.refit import Lesson, Refitted, refit, written_out
from fxmerge.reporting import KEY, Report, classes_of, named_errors
from fxmerge.rewriting.bake import bake
from fxmerge.rewriting.calibrate import batch_norm_statistics, recalibrate
from fxmerge.rewriting.combine import average
from fxmerge.rewriting.masks import masked, pruned, voted
from fxmerge.rewriting.task_vectors import combine_task_vectors
from fxmerge.run import Inputs
from fxmerge.shared import staying, without_shared
from fxmerge.symmetry.flow import Flow, flows
from fxmerge.symmetry.group import Symmetry
from fxmerge.symmetry.propagate import Axis, Propagation, propagate
from fxmerge.units.unit_map import UnitMap
from fxmerge.validate import Model


def merge(
    gm_a: Model,
    gm_b: Model,
    loader: Iterable[Any] | None = None,
    recipe: Recipe | None = None,
    *,
    loaders: Sequence[Iterable[Any]] | None = None,
    base: Model | None = None,
    symmetry: Symmetry | None = None,
    example: Any = None,
    inputs: Inputs | None = None,
    run: Run | None = None,
) -> fx.GraphModule:
    """Merges two networks of one architecture, trained apart from each other, into one of their size.

    Units are matched by how alike they are in weight space and in activation space (MuDSC, arXiv 2403.01753), inside
    the group of permutations that leave the network's function unchanged, and their parameters are averaged. Where
    there are data, every layer is then fitted, in closed form and in graph order, to what the two networks compute
    there, from what the merged network computes before it.

    Arguments:
        gm_a: any nn.Module, GraphModule or ExportedProgram; neither model is modified.
        gm_b: a model of the same architecture.
        loader: calibration data, unlabelled: an iterable of tensors, of tuples (inputs, targets), or of dicts
            of keyword arguments. It is iterated several times (an iterator is read into a list first).
            Without it, units are matched by their weights alone and averaged, and BatchNorm statistics are
            estimated from the models' and the weights.
        recipe: how to match, combine and fit; None is `Recipe()`.
        loaders: in place of a loader, one for each model with data of its own task. Fitted layers then learn from
            each model mostly on its own data. No input needs a label, but for the task it is of.
        base: the model that both were fine-tuned from. Both are aligned to it, and their differences to it are combined
            and added to it, in place of the average; the result is in its units.
        symmetry: the symmetry to use in place of an inferred one, as from `find_symmetry` or `Symmetry.from_json`.
        example: a batch to capture the model with, as the loader gives them. It is needed only without a loader.
        inputs: turns a batch into (args, kwargs) of the model, where the default does not fit.
        run: device, memory, seed, progress and verification; None is `Run()`.

    Returns:
        A GraphModule in eval mode, which needs nothing of fxmerge; its state dict loads into the original class.
        `report(merged)` tells how it was made. Tensors that are equal in all models stay as they are, such as a frozen
        base under adapters, unless their units must move with others.

    Raises:
        ArchitectureMismatchError: if the models differ in more than the values of their parameters.
        CaptureError: if the architecture cannot be captured as a graph.
        LoaderError: if the loader is empty or its batches do not fit.
        NonFiniteError: if a weight or an activation is NaN or infinite.
        OptionError: if an argument or the recipe does not fit the models.
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
        recipe,
        loaders=loaders,
        base=base,
        symmetry=symmetry,
        example=example,
        inputs=inputs,
        run=run,
    )


def merge_many(
    models: Sequence[Model],
    loader: Iterable[Any] | None = None,
    recipe: Recipe | None = None,
    *,
    loaders: Sequence[Iterable[Any]] | None = None,
    base: Model | None = None,
    symmetry: Symmetry | None = None,
    example: Any = None,
    inputs: Inputs | None = None,
    run: Run | None = None,
) -> fx.GraphModule:
    """Merges two or more networks of one architecture.

    Three or more are all matched with each other, in units that they share (C2M3, arXiv 2405.17897): the way from one
    model to a second and on to a third is the way from the first to the third, and the result does not
    depend on the order of the models. With a `reference` in the recipe, each of the others is matched with that model.

    Arguments, result and errors are those of `merge`.

    Example:
        >>> import torch, fxmerge
        >>> def mlp():
        ...     return torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> merged = fxmerge.merge_many([mlp(), mlp(), mlp()], [torch.randn(16, 4)])
        >>> fxmerge.report(merged).models
        3
    """
    recipe, run = validate.check_recipe(recipe, run)
    models = validate.check_models(models)
    validate.check_loaders(loader, loaders, len(models))
    recipe = recipe.settled(data=loader is not None or loaders is not None, base=base is not None)
    assert not isinstance(recipe.match, str) and not isinstance(recipe.combine, str)
    weights = validate.check_weights(recipe.combine.weights, len(models))
    reference = validate.check_reference(recipe.match.reference, len(models), base is not None)
    job = prepare(models, loader, run, loaders=loaders, base=base, example=example, inputs=inputs)
    group = _Group.of(job, recipe, run, symmetry)
    job = group.job
    home = reference if base is None else 0  # The base comes first.
    # The result must not depend on the order of models that are all matched with each other.
    order = list(range(len(job.states))) if home is not None else canonical_order(job.states)
    states = [job.states[i] for i in order]
    matching = _match(group, recipe, run, states, [job.names[i] for i in order], home)
    with job.timed("rewriting"):
        aligned = [matching.alignment.apply(state, m) for m, state in enumerate(states)]
    counts = weights if base is not None else [weights[i] for i in order]
    state = _combine(group, recipe, matching.merged, aligned, counts)
    refitted = Refitted(state, {}, {}, {}, held_out=False)
    if recipe.fit is not None:
        refitted = _fit(group, recipe, run, matching.merged, aligned, state, weights, order)
        warn_of_few_rows(refitted.layers)
        warn_of_nearer_parent(refitted.errors, job.names)
    merged = _emit(group, refitted.state, calibrate=recipe.fit is None)
    back = sorted(range(len(order)), key=order.__getitem__)
    maps = [matching.units.maps[i] for i in back][-len(models) :]
    report = replace(
        group.report(merged),
        models=len(models),
        recipe=recipe.to_dict(),
        weights=tuple(weights),
        units_of=order[matching.reference] if base is None else None,
        images=tuple(group.images(own) for own in maps),
        quality=_renumbered(matching.quality, back if home is None else ()),
        objective=matching.objectives,
        zip_objective=matching.zip_objective,
        zipped_within=dict(matching.within),
        layers=refitted.layers,
        left=dict(refitted.left),
        errors=named_errors(refitted.errors),
        held_out=refitted.held_out,
    )
    merged.meta[KEY] = report.to_dict()
    return merged


def align(
    model: Model,
    to: Model,
    loader: Iterable[Any] | None = None,
    recipe: Recipe | None = None,
    *,
    symmetry: Symmetry | None = None,
    example: Any = None,
    inputs: Inputs | None = None,
    run: Run | None = None,
) -> fx.GraphModule:
    """Re-expresses a model in the units of another of the same architecture; its function stays the same.

    Arguments and errors are those of `merge`: `to` is the model whose units are taken as they are. Of the recipe,
    `match` and `free` count; the rest is of merging.

    Returns:
        A GraphModule that computes what `model` computes. `report(aligned).images` holds, for every class by name,
        where each unit of `model` went; `Symmetry.element` makes a `Permutation` of it.

    Example:
        >>> import torch, fxmerge
        >>> mlp = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> aligned = fxmerge.align(mlp, to=mlp, example=torch.zeros(1, 4))
        >>> fxmerge.report(aligned).images
        ({'0.weight[0]': [0, 1, 2, 3, 4, 5, 6, 7]},)
    """
    recipe, run = validate.check_recipe(recipe, run)
    validate.check_loaders(loader, None, 2)
    part = recipe.match if isinstance(recipe.match, Align) else Align()
    recipe = Recipe(match=part, fit=None, free=recipe.free)
    job = prepare((to, model), loader, run, example=example, inputs=inputs)
    group = _Group.of(job, recipe, run, symmetry)
    matching = _match(group, recipe, run, job.states, job.names, 0)
    with job.timed("rewriting"):
        state = matching.alignment.apply(job.states[1], 1)
    aligned = _emit(group, state, calibrate=False)
    report = replace(
        group.report(aligned),
        models=2,
        images=(group.images(matching.alignment.maps[1]),),
        quality=_renumbered(matching.quality, ()),
        objective=matching.objectives,
    )
    aligned.meta[KEY] = report.to_dict()
    return aligned


@dataclass(frozen=True)
class _Group:
    """The symmetry of the models of a job.

    Attributes:
        job: the checked models and data.
        propagation: what the label calculus found.
        whole: all classes of the symmetry.
        symmetry: the symmetry without classes whose units are the same in all models.
        still: the names of these classes.
        flow: what every parameter axis does with its units.
    """

    job: Job
    propagation: Propagation
    whole: Symmetry
    symmetry: Symmetry
    still: frozenset[str]
    flow: Mapping[Axis, Flow]

    @staticmethod
    def of(job: Job, recipe: Recipe, run: Run, given: Symmetry | None) -> _Group:
        """The symmetry that is given or else inferred; and the job with states that are ready to be matched."""
        propagation, whole = job.symmetry(given, recipe.free, verify=run.verify)
        assert not isinstance(recipe.match, str)
        validate.check_class_names(recipe.match.alpha, whole)
        flow = flows(propagation)
        warn_of_outputs(propagation, whole, flow)
        if recipe.outputs == "standardized" and job.data is not None:
            with job.timed("standardizing"):
                job = replace(job, states=standardized(job.program, job.states, job.data))
        cut = masked(job.program, job.masks)
        symmetry, still = without_shared(whole, flow, job.states, cut.values())
        return _Group(replace(job, states=pruned(job.states, cut)), propagation, whole, symmetry, still, flow)

    def shared(self) -> frozenset[str]:
        """The names of the tensors that are equal in all models, and on which no unit moves."""
        return staying(self.symmetry, self.job.states)

    def images(self, own: Sequence[np.ndarray[Any, Any]]) -> dict[str, list[int]]:
        """For every class by name, the merged unit that each unit of one model goes into."""
        moved = iter(own)
        return {
            name: (np.arange(c.size) if name in self.still else next(moved)).tolist()
            for name, c in zip(self.whole.names, self.whole.units, strict=True)
        }

    def report(self, result: fx.GraphModule) -> Report:
        """What is told of any result."""
        first, after = self.job.states[0], result.state_dict()
        return Report(
            models=len(self.job.states),
            shared=tuple(n for n, own in first.items() if n in self.shared() and bool((own == after[n]).all())),
            classes=classes_of(self.symmetry),
            demoted=self.symmetry.demoted,
            unknown_ops=dict(self.symmetry.unknown),
            verification_error=self.symmetry.error,
            route=self.job.program.route,
            seconds=dict(self.job.seconds),
        )


def _match(
    group: _Group,
    recipe: Recipe,
    run: Run,
    states: Sequence[Mapping[str, Tensor]],
    names: Sequence[str],
    reference: int | None,
) -> Matching:
    """Measures how alike units are, and matches them."""
    job, part = group.job, recipe.match
    assert not isinstance(part, str)
    correlations = {}
    if job.data is not None and part.alpha != 1:
        pairs = pairs_to_correlate(part, len(states), reference)
        with job.timed("activations"):
            correlations = similarities(
                group.propagation, group.symmetry, states, job.data, names, pairs, part.similarity
            )
    part = part if job.data is not None else replace(part, alpha=1.0)
    with job.timed("matching"):
        return match_models(
            group.symmetry,
            group.flow,
            states,
            correlations,
            part,
            reference,
            seed=run.seed,
            progress=run.progress,
        )


def _combine(
    group: _Group,
    recipe: Recipe,
    units: UnitMap,
    states: Sequence[Mapping[str, Tensor]],
    weights: Sequence[float],
) -> dict[str, Tensor]:
    """One state dict from those of aligned models; a base comes first."""
    job, part = group.job, recipe.combine
    statistics = batch_norm_statistics(job.program)
    if job.data is None and statistics:
        warn_without_data(states, statistics)
    with job.timed("rewriting"):
        if isinstance(part, Average):
            state = voted(average(units, states, weights, statistics), job.masks)
            if job.data is None and statistics:
                state = folded(job.program, states, state, partial(average, units, weights=weights, statistics=()))
            return _rederived(job, state, states, weights)
        assert not isinstance(part, str)
        base, *tuned = states
        state = combine_task_vectors(part, base, tuned, weights, statistics)
        masks = [{name: own[name] for name in job.masks} for own in tuned]
        state |= average(UnitMap.still(len(tuned)), masks, weights, ())
        return _rederived(job, voted(state, job.masks), tuned, weights)


def _rederived(
    job: Job, state: Mapping[str, Tensor], states: Sequence[Mapping[str, Tensor]], weights: Sequence[float]
) -> dict[str, Tensor]:
    """A state dict with derived buffers that fit its parameters."""
    return job.rederived(state, states[max(range(len(states)), key=weights.__getitem__)])


def _fit(
    group: _Group,
    recipe: Recipe,
    run: Run,
    units: UnitMap,
    states: Sequence[Mapping[str, Tensor]],
    start: Mapping[str, Tensor],
    weights: Sequence[float],
    order: Sequence[int],
) -> Refitted:
    """Fits the layers of the merged network to what the models compute. Errors are by the numbers of the job."""
    job, part = group.job, recipe.fit
    assert isinstance(part, LeastSquares | Readout | Repair)
    program = written_out(group.propagation.program)
    with job.timed("fitting"):
        refitted = refit(
            program,
            states,
            start,
            _lessons(job, weights, part.own, order),
            teachers=None if not units.moving else _teachers(group, program, units, states),
            only_last=isinstance(part, Readout),
            repair=isinstance(part, Repair),
            shared=group.shared(),
            max_memory=run.memory,
            seed=run.seed,
            progress=run.progress,
        )
        state = _rederived(job, refitted.state, states, [weights[i] for i in order])
    errors = {None if j is None else order[j]: error for j, error in refitted.errors.items()}
    return replace(refitted, state=state, errors=errors)


def _lessons(job: Job, weights: Sequence[float], own: float, order: Sequence[int]) -> Iterable[Lesson]:
    """Every batch, and how much each model counts in what is to be learnt on it."""
    assert job.data is not None
    for owner, call in job.data.owned():
        shares = [w if owner is None else own * (i == owner) + (1 - own) * w for i, w in enumerate(weights)]
        yield Lesson(call, tuple(shares[i] for i in order), 1.0 if owner is None else weights[owner])


def _teachers(group: _Group, program: Any, units: UnitMap, states: Sequence[Mapping[str, Tensor]]) -> list[Teacher]:
    """The models as the layers of a network with merged units learn from them."""
    same = program is group.propagation.program
    propagation = group.propagation if same else propagate(program)
    classes, along = classes_along(propagation, group.symmetry), units_along(propagation, group.symmetry)
    return [Teacher(*units.produce(state, m), Places(classes, along, units, m)) for m, state in enumerate(states)]


def _emit(group: _Group, state: Mapping[str, Tensor], *, calibrate: bool) -> fx.GraphModule:
    """A GraphModule with these parameters, its BatchNorm statistics re-estimated."""
    job = group.job
    with job.timed("rewriting"):
        module = bake(job.program, state)
    if job.data is not None and calibrate:
        with job.timed("calibration"):
            recalibrate(module, job.program, job.data, group.shared())
    return module


def _renumbered(quality: Sequence[Mapping[str, Mapping[str, float]]], order: Collection[int]) -> tuple[Any, ...]:
    """What is told of every matched model as plain data, in another order if one is given."""
    plain = [{name: dict(own) for name, own in each.items()} for each in quality]
    return tuple(plain[i] for i in order) if order else tuple(plain)

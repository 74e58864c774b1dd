"""The pipeline from models to one network, top to bottom."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from torch import Tensor, fx

from fxmerge import validate
from fxmerge.combine.by_usage import by_usage
from fxmerge.errors import OptionError
from fxmerge.evidence.usage import Usage
from fxmerge.job import Job, prepare
from fxmerge.kv_heads import check_one_network, with_fewer_kv_heads
from fxmerge.leaving_out import merged_where_better, with_survivors
from fxmerge.manifest import with_stages
from fxmerge.matching.room import Room
from fxmerge.matching.universe import canonical_order
from fxmerge.notices import (
    warn_of_far_heads,
    warn_of_few_rows,
    warn_of_fold_without_data,
    warn_of_nearer_parent,
    warn_of_no_scores,
)
from fxmerge.pipeline import (
    calibrated,
    check_scores,
    combine,
    emit,
    fit,
    match,
    of_scores,
    renumbered,
    sampled,
    usage_of,
)
from fxmerge.prepared import Prepared
from fxmerge.program.on_use import OnDemand
from fxmerge.program.run import Inputs
from fxmerge.progress import peak_memory
from fxmerge.recipe import NOTHING, Average, LeastSquares, Recipe, Run, Zip
from fxmerge.refitting.refit import Refitted
from fxmerge.reporting import Made, attach, named_errors, widths_of
from fxmerge.sizing import configured, nothing_lost, room_for, same_on_example, sized
from fxmerge.symmetry.group import Symmetry
from fxmerge.truncating import fewer_units_left, with_directions
from fxmerge.units.unit_map import UnitMap
from fxmerge.validate import Model

logger = logging.getLogger(__name__)


def one_network(
    models: tuple[Model, ...],
    loader: Iterable[Any] | None,
    recipe: Recipe,
    *,
    run: Run,
    loaders: Sequence[Iterable[Any]] | None = None,
    base: Model | None = None,
    symmetry: Symmetry | None = None,
    example: Any = None,
    inputs: Inputs | None = None,
) -> fx.GraphModule:
    """One network of any number of models, by a recipe without "auto"."""
    asked = recipe
    assert not isinstance(recipe.match, str) and not isinstance(recipe.combine, str)
    weights = validate.check_weights(recipe.combine.weights, len(models))
    wanted = None if recipe.match is None else recipe.match.reference
    reference = validate.check_reference(wanted, len(models), base is not None)
    reference = reference if base is None else 0  # The base comes first.
    check_one_network(recipe, len(models))
    if isinstance(recipe.fit, LeastSquares) and recipe.fit.products and getattr(run.processes, "size", 1) > 1:
        raise OptionError("LeastSquares.products is of one process, and this run has several: leave products out.")
    job = prepare(models, loader, run, loaders=loaders, base=base, example=example, inputs=inputs, recipe=recipe)
    job = with_stages(job, "fold" if len(models) == 1 else "merge", recipe, run, symmetry)
    if of_scores(recipe):
        check_scores(job)
    group, recipe = with_fewer_kv_heads(with_directions(job, recipe, run, symmetry, reference, weights), recipe, run)
    job, truncation = group.job, group.truncation
    if recipe.share == NOTHING:
        return _side_by_side(group, recipe, weights)
    # The result must not depend on the order of models that are all matched with each other.
    order = list(range(len(job.states))) if reference is not None else canonical_order(job.states)
    states = [job.states[i] for i in order]
    room, trials = None, None
    if isinstance(recipe.match, Zip) and recipe.match.width != 1:
        room = room_for(group, recipe.match, run, len(states))
        if len(models) == 1 and isinstance(room, Room):
            room, trials = with_survivors(group, room)
    matching = match(group, recipe, run, states, [job.names[i] for i in order], reference, room)
    with job.timed("combining"):
        aligned = [_aligned(matching.alignment, state, m, again=job.data is not None) for m, state in enumerate(states)]
    similarities = sampled(group, matching, states, aligned, [job.names[i] for i in order])
    counts = weights if base is not None else [weights[i] for i in order]
    confined = [group.projections[i].project(aligned[m]) for m, i in enumerate(order)] if group.projections else aligned
    used = usage_of(group, matching.merged, aligned) if base is None else {}

    def combined(counted: Usage) -> dict[str, Tensor]:
        scaled = by_usage(matching.merged, confined, counted)
        state = combine(group, recipe, matching.merged, scaled, counts, order)
        return {name: tensor.to(confined[0][name].dtype) for name, tensor in state.items()}

    state = combined(used)
    program = sized(group, matching.merged, state)
    if trials is not None:
        assert isinstance(room, Room)
        used = merged_where_better(group, program, matching.merged, room, trials, used, aligned[0])
        state = combined(used)
    refitted = Refitted(state, {}, {}, {}, held_out=False)
    settled = not group.projections and nothing_lost(group, program, matching.merged, state)
    if not settled and job.heads and isinstance(recipe.match, Zip) and recipe.match.width == len(models):
        # As many units as all models have are to lose nothing.
        logger.info("some units are of all models, or an op goes over them: the models stand side by side instead")
        apart = replace(recipe, share=NOTHING, match=Zip(), combine=Average(), fit=None)
        run = replace(run, resume=None)  # The folder is of the other merge, and nothing in this one takes long.
        return one_network(models, None, apart, run=run, example=job.example, inputs=lambda given: given)
    if recipe.fit is not None and not settled:
        refitted = fit(group, recipe, run, program, matching.merged, aligned, state, weights, order)
        _warn_of_fit(refitted, job, scores=of_scores(recipe))
    if recipe.fit is None and not settled:
        refitted = replace(refitted, state=dict(calibrated(group, run, program, matching.merged, aligned, state)))
    state, sizes, whole = refitted.state, matching.merged, group
    if truncation is not None:
        whole, program, sizes, state = fewer_units_left(group, sizes, state)
    merged = emit(group, program, state)
    if len(models) == 1 and job.data is None and not settled and not same_on_example(group, program, state):
        warn_of_fold_without_data()
    back = sorted(range(len(order)), key=order.__getitem__)
    numbers = range(len(back))[-len(models) :]  # A base comes first.
    maps = [(matching.units.maps[back[i]], i) for i in numbers]
    summary = replace(
        group.report(merged),
        models=len(models),
        recipe=asked.to_dict(),
        weights=tuple(weights),
        units_of=order[matching.reference] if base is None else None,
        images=tuple(group.images(own, i) for own, i in maps),
        heads=tuple(asdict(head) for head in job.heads),
        widths=widths_of(sizes),
        config=configured(whole, sizes, merged),
        quality=renumbered(matching.quality, back if reference is None else ()),
        objective=(*group.objectives, *matching.objectives),
        zip_objective=matching.zip_objective,
        zipped_within=dict(matching.within),
        layers=refitted.layers,
        left=dict(refitted.left),
        errors=named_errors(refitted.errors),
        held_out=refitted.held_out,
    )
    units = replace(matching.units, maps=tuple(own for own, _ in maps))
    attach(summary, merged, Made(group.whole, units, similarities, tuple(job.names), peak_memory()))
    return merged


def _aligned(units: UnitMap, state: Mapping[str, Tensor], model: int, *, again: bool) -> Mapping[str, Tensor]:
    """A model in the units that all share; its tensors are kept if they will be asked for `again` and again."""
    if again:
        return units.apply(state, model)
    return OnDemand(state, lambda name: units.apply_tensor(name, state, model))


def _warn_of_fit(refitted: Refitted, job: Job, *, scores: bool) -> None:
    """Warns of a fit from few data, and of one that is far from the models."""
    warn_of_few_rows(refitted.layers)
    if scores:  # Then other distances count than squared ones.
        warn_of_no_scores(refitted.layers)
    elif len(job.states) > 1:
        warn_of_nearer_parent(refitted.errors, job.names)
        if job.heads:
            warn_of_far_heads(refitted.errors)


def _side_by_side(group: Prepared, recipe: Recipe, weights: Sequence[float]) -> fx.GraphModule:
    """Networks that share nothing, in one graph."""
    job = group.job
    merged = emit(group, job.program, job.states[0])
    summary = replace(
        group.report(merged),
        recipe=recipe.to_dict(),
        weights=tuple(weights),
        heads=tuple(asdict(head) for head in job.heads),
    )
    attach(summary, merged, Made(group.whole, None, (), tuple(job.names), peak_memory()))
    return merged

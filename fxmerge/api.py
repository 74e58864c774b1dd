"""The verbs of fxmerge: what they take is checked, and the pipeline makes a network of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import fx

from fxmerge import validate
from fxmerge.bases import in_one_basis
from fxmerge.choosing import better_of, within_distance
from fxmerge.emit.fork import Head, take_out
from fxmerge.errors import OptionError
from fxmerge.job import prepare
from fxmerge.manifest import with_stages
from fxmerge.merging import one_network
from fxmerge.pipeline import emit, match, renumbered, sampled
from fxmerge.processes import in_step
from fxmerge.program.run import Inputs
from fxmerge.progress import peak_memory
from fxmerge.recipe import AUTO, Align, Budget, Recipe, Run, Zip
from fxmerge.reporting import Made, attach, report
from fxmerge.symmetry.group import Symmetry
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
    """Merges two networks, trained apart from each other, into one.

    Networks that are equal all through become one of their size. Of others, what they have in common from the inputs on
    becomes one trunk, and each keeps its own head: see `Recipe.share`.

    Units are matched by how alike they are in weight space and in activation space (MuDSC, arXiv 2403.01753), inside
    the group of permutations that leave the network's function unchanged, and their parameters are averaged. Where
    there are data, every layer is then fitted, in closed form and in graph order, to what the two networks compute
    there, from what the merged network computes before it.

    Arguments:
        gm_a: any nn.Module, GraphModule or ExportedProgram; neither model is modified.
        gm_b: a model of the same architecture, or one that begins with the same layers.
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
        A GraphModule in eval mode, which needs nothing of fxmerge; its state dict loads into the original class. With
        heads apart it gives the outputs of all networks, and `head` takes one of them out of it.
        `report(merged)` tells how it was made. Tensors that are equal in all models stay as they are, such as a frozen
        base under adapters, unless their units must move with others.

    Raises:
        ArchitectureMismatchError: if the models have no layer in common, or not all that they are to share.
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


@in_step
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
    """Merges two or more networks.

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
    how = {"loaders": loaders, "base": base, "symmetry": symmetry, "example": example, "inputs": inputs, "run": run}
    recipe = recipe.settled(data=loader is not None or loaders is not None, base=base is not None)
    assert not isinstance(recipe.match, str)
    if recipe.match is not None and recipe.match.continuous == "auto":
        return better_of(merge_many, models, loader, recipe, how)
    if isinstance(recipe.share, Budget) and recipe.share.distance is not None:
        return within_distance(merge_many, models, loader, recipe, how)
    return one_network(models, loader, recipe, **how)


@in_step
def fold(
    model: Model,
    loader: Iterable[Any] | None = None,
    width: float | Mapping[str, float] | Budget = 0.7,
    recipe: Recipe | None = None,
    *,
    example: Any = None,
    inputs: Inputs | None = None,
    run: Run | None = None,
) -> fx.GraphModule:
    """Makes a network smaller by merging units of it that are alike (model folding, arXiv 2502.10216).

    Units are compared as by `merge`, and merged greedily: what gives a merged unit is the mean of what gave its
    members, and what reads it the sum of what read them. Of classes that a change of basis may mix, such as residual
    streams and, if they are named, the dimensions of attention heads, the directions that count most are left
    (SliceGPT, arXiv 2401.15024) unless the recipe says `Zip(continuous=False)`. Where there are data, every layer is
    then fitted, in closed form, to what the network computes there. Nothing is trained.

    Heads of attention are merged where they are named: `{"blocks of *": 0.5}` merges heads with their queries, keys and
    values, `{"kv heads of *": 0.5}` those of keys and values only. Several heads of queries then read one of these, as
    in grouped-query attention (arXiv 2305.13245). Heads that are alike are merged, as many into each, and query heads
    are put in the order that this needs.

    Arguments:
        model: any nn.Module, GraphModule or ExportedProgram; it is not modified.
        loader: calibration data, unlabelled, as for `merge`. Without it, units are compared by their weights alone, and
            running variances are estimated from the weights.
        width: the share of its units that each class keeps, or shares or numbers for classes by name or pattern, or a
            `Budget` from which they follow: see `Zip.width`. Key/value heads have the name of the blocks of heads, with
            "kv heads of" in place of "blocks of"; their number has to divide that of the network.
        recipe: how to match and fit; None is `Recipe()`. Its `match` has to be a `Zip`, whose width this one replaces.
        example: as for `merge`.
        inputs: as for `merge`.
        run: as for `merge`.

    Returns:
        A smaller GraphModule. `report(folded).widths` tells how many units of each class it has.

    Raises:
        CaptureError: if the architecture cannot be captured as a graph.
        LoaderError: if the loader is empty or its batches do not fit.
        OptionError: if an argument or the recipe does not fit the model.

    Example:
        >>> import torch, fxmerge
        >>> mlp = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> folded = fxmerge.fold(mlp, [torch.randn(64, 4)], width=0.5)
        >>> fxmerge.report(folded).widths
        {'0.weight[0]': (8, 4)}
    """
    recipe, run = validate.check_recipe(recipe, run)
    validate.check_loaders(loader, None, 1)
    recipe = recipe.settled(data=loader is not None, base=False)
    if not isinstance(recipe.match, Zip):
        raise OptionError("Recipe.match is not Zip, and fold merges units: pass Zip(...), or leave it out.")
    if recipe.share != AUTO:
        raise OptionError("Recipe.share is of several networks: leave it at 'auto' to fold one.")
    by_bases = recipe.match.continuous
    if by_bases is None:
        by_bases = not isinstance(width, Budget)
    elif by_bases and isinstance(width, Budget):
        raise OptionError("width is a Budget, which counts no bases: pass a share, or Zip(continuous=False).")
    part = replace(recipe.match, width=width, reference=None, continuous=by_bases)
    recipe = replace(recipe, match=part)
    if isinstance(width, int | float) and width > 1:
        raise OptionError(f"width is {width}, and fold makes a network smaller: pass a share up to 1, such as 0.7.")
    how = {"loaders": None, "example": example, "inputs": inputs, "run": run}
    if part.continuous == "auto":
        return better_of(one_network, (model,), loader, recipe, how)
    return one_network((model,), loader, recipe, **how)


@in_step
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
        A GraphModule that computes what `model` computes. With `Align(continuous=True)` it is in the basis of
        `canonicalize(to)`. `report(aligned).images` holds, for every class by name,
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
    if isinstance(recipe.match, Zip) or recipe.match is None:
        kind = "None, which moves no units" if recipe.match is None else "Zip, which merges units"
        raise OptionError(f"Recipe.match is {kind}; align moves them: pass Align(...).")
    recipe = Recipe(match=Align() if recipe.match == AUTO else recipe.match, fit=None, free=recipe.free)
    if isinstance(recipe.match, Align) and recipe.match.continuous == "auto":
        raise OptionError(
            "Align.continuous is 'auto', which compares two merges; align makes none: pass True or False."
        )
    job = prepare((to, model), loader, run, example=example, inputs=inputs)
    job = with_stages(job, "align", recipe, run, symmetry)
    group = in_one_basis(job, recipe, run, symmetry, 0, merges=False)
    job = group.job
    matching = match(group, recipe, run, job.states, job.names, 0)
    with job.timed("combining"):
        state = matching.alignment.apply(job.states[1], 1)
    aligned = emit(group, job.program, state)
    told = replace(
        group.report(aligned),
        models=2,
        images=(group.images(matching.alignment.maps[1], 1),),
        quality=renumbered(matching.quality, ()),
        objective=(*group.objectives, *matching.objectives),
    )
    similarities = sampled(group, matching, job.states, (job.states[0], state), job.names)
    attach(told, aligned, Made(group.whole, matching.alignment, similarities, tuple(job.names), peak_memory()))
    return aligned


def head(merged: fx.GraphModule, name: str | int) -> fx.GraphModule:
    """The trunk and one head of a merged network: what stands for one of the models.

    Arguments:
        merged: what `merge` or `merge_many` gave for networks with heads of their own.
        name: of the head, as in `Recipe.names`, or the number of its model.

    Returns:
        A GraphModule with copies of the tensors. Its state dict loads into the class of that model, and its outputs are
        nested as that model's.

    Raises:
        OptionError: if the network has no heads, or none of that name.

    Example:
        >>> import torch, fxmerge
        >>> def mlp(classes):
        ...     return torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, classes))
        >>> merged = fxmerge.merge(mlp(2), mlp(3), [torch.randn(64, 4)], fxmerge.Recipe(names=("digits", "letters")))
        >>> [output.shape for output in merged(torch.zeros(1, 4))]
        [torch.Size([1, 2]), torch.Size([1, 3])]
        >>> letters = fxmerge.head(merged, "letters")
        >>> mlp(3).load_state_dict(letters.state_dict())
        <All keys matched successfully>
    """
    heads = [Head(**given) for given in report(merged).heads]
    if not heads:
        raise OptionError(
            "The network has one head: the models were merged all through. Pass Recipe(share='trunk') for heads apart."
        )
    for one in heads:
        if name in (one.name, one.number):
            return take_out(merged, one)
    raise OptionError(f"There is no head {name!r}; there are {', '.join(repr(one.name) for one in heads)}.")

"""Several models as the one that is captured: one of them, or all of them with what they share once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx

from fxmerge import validate
from fxmerge.emit.fork import Head, fork, in_common, names_in
from fxmerge.emit.trunk import within
from fxmerge.errors import ArchitectureMismatchError, CaptureError, OptionError
from fxmerge.program.capture import Args, capture_ops
from fxmerge.recipe import AUTO, Budget, Recipe
from fxmerge.validate import Model


@dataclass(frozen=True)
class Joined:
    """Several models as one.

    Attributes:
        model: what is captured.
        states: of all models, by the names of `model`.
        heads: those that stay apart; none where all is to be merged.
        trunks: the nodes with which a trunk within a budget may end, the shortest trunk first.
    """

    model: Model
    states: tuple[dict[str, Tensor], ...]
    heads: tuple[Head, ...] = ()
    trunks: tuple[str, ...] = ()


def join_models(
    models: Sequence[Model],
    states: tuple[dict[str, Tensor], ...],
    names: Sequence[str],
    call: tuple[Args, dict[str, Any]],
    varying: set[tuple[int, int]],
    recipe: Recipe,
    mismatch: ArchitectureMismatchError | None,
    *,
    based: bool,
) -> Joined:
    """Several models as one, as a recipe says.

    Arguments:
        models: the models.
        states: their parameters and buffers.
        names: what messages call the models.
        call: example inputs, (args, kwargs).
        varying: the dimensions of inputs that data have in several sizes, by the number of the input.
        recipe: what they are to share, and how heads are named.
        mismatch: what is known of why the models are not equal all through.
        based: whether the first model is a base.

    Raises:
        ArchitectureMismatchError: if the models differ and have no layer in common, or not what they are to share.
        OptionError: if models are to have heads of their own, and something else is asked for that needs equal ones.
    """
    if recipe.names is not None and len(recipe.names) != len(models):
        raise OptionError(f"Recipe.names has {len(recipe.names)} names for {len(models)} models; give one for each.")
    if recipe.share == AUTO and mismatch is None:
        try:
            validate.check_same_tensors(states, names)
            return Joined(models[0], states)
        except ArchitectureMismatchError as error:
            mismatch = error
    if based:
        raise mismatch or OptionError("With a base, networks have no heads of their own: leave share at 'auto'.")
    try:
        modules = [capture_ops(model, *call, varying=varying) for model in models]
        budget, ends, by_name = recipe.share, list[fx.Node](), recipe.match is None
        if isinstance(budget, Budget):
            ends = within(modules, in_common(modules, by_name=by_name)[1], budget, call)
        share = ends[0] if isinstance(budget, Budget) else budget
        found = fork(modules, share, recipe.names, names, as_dict=recipe.outputs == "dict", by_name=by_name)
    except (ArchitectureMismatchError, CaptureError) as error:
        if mismatch is None:
            raise
        differ = str(mismatch).removesuffix(f"; {validate.SAME}").rstrip(".")
        raise ArchitectureMismatchError(
            f"{differ}. What they have in common cannot be merged either: {error}"
        ) from error
    if found is None:
        renamed = names_in(modules)
        if renamed is None or renamed == [renamed[0]] * len(models):
            raise mismatch or ArchitectureMismatchError(f"{names[0]} and {names[1]} differ in what they save.")
        own = [{name: state[there] for name, there in to.items()} for to, state in zip(renamed, states, strict=True)]
        states = tuple({name: one[name] for name in states[0]} for one in own)
        validate.check_same_tensors(states, names)
        return Joined(models[0], states)
    if recipe.targets == "standardized":
        raise OptionError(
            "Recipe.targets is 'standardized', for outputs that are compared with each other; these networks have "
            "heads of their own. Pass targets='mean'."
        )
    return Joined(found.module, found.states(states), found.heads, tuple(n.name for n in ends))

"""Merges of which there are several, and the one that is kept."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

from torch import fx

from fxmerge.errors import OptionError
from fxmerge.job import prepare, readable_again
from fxmerge.ordering import error_of
from fxmerge.recipe import Align, Budget, Recipe, Zip
from fxmerge.reporting import report

logger = logging.getLogger(__name__)

Merge = Callable[..., fx.GraphModule]
"""`merge_many`."""


def within_distance(
    merge: Merge, models: tuple[Any, ...], loader: Iterable[Any] | None, recipe: Recipe, how: Mapping[str, Any]
) -> fx.GraphModule:
    """The merge with the longest trunk that is within a distance of the models.

    Raises:
        OptionError: if there is none.
    """
    budget = recipe.share
    assert isinstance(budget, Budget) and budget.distance is not None
    loader, how = _readable(loader, how)
    for_job = {name: how[name] for name in ("loaders", "base", "example", "inputs")}
    nearest = math.inf, ""
    for trunk in reversed(prepare(models, loader, how["run"], recipe=recipe, **for_job).trunks):
        merged = merge(models, loader, replace(recipe, share=trunk), **how | {"run": how["run"].within(trunk)})
        distance = error_of(report(merged).errors.get("merged", math.nan))
        logger.info("with a trunk up to %r the distance is %.3g", trunk, distance)
        if distance <= budget.distance:
            return merged
        nearest = min(nearest, (distance, trunk))
    raise OptionError(
        f"Recipe.share is {budget}, but no trunk is within that distance: the nearest ends with {nearest[1]!r}, with "
        f"{nearest[0]:.3g}. Allow as much, or pass more data."
    )


def better_of(
    merge: Merge, models: tuple[Any, ...], loader: Iterable[Any] | None, recipe: Recipe, how: Mapping[str, Any]
) -> fx.GraphModule:
    """The merge with classes matched by changes of basis, or the one by permutations.

    Returns:
        The one whose outputs miss less of the ensemble's on held-out data; the latter where nothing is measured.
    """
    part = recipe.match
    assert isinstance(part, Align | Zip)
    by_matrices, by_permutations = (replace(recipe, match=replace(part, continuous=way)) for way in (True, False))
    if recipe.fit is None:
        return merge(models, loader, by_permutations, **how)
    loader, how = _readable(loader, how)
    run = how["run"]
    mixed = merge(models, loader, by_matrices, **how | {"run": run.within("matrices")})
    if not report(mixed).bases:
        return mixed
    permuted = merge(models, loader, by_permutations, **how | {"run": run.within("permutations")})
    errors = [error_of(report(one).errors.get("merged", math.nan)) for one in (mixed, permuted)]
    logger.info("the error is %.3g with changes of basis, %.3g with permutations", *errors)
    return mixed if errors[0] < errors[1] else permuted


def _readable(loader: Iterable[Any] | None, how: Mapping[str, Any]) -> tuple[Iterable[Any] | None, dict[str, Any]]:
    """Loaders that can be read several times."""
    own = how["loaders"]
    loaders = None if own is None else [readable_again(one) for one in own]
    return None if loader is None else readable_again(loader), {**how, "loaders": loaders}

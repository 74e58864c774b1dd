"""Holds random recipes against the oracle, and cuts those that fail down to short ones.

`python -m tests.oracle.hunt 5000 --start 0` prints a short recipe for every failure among the recipes of 5000 seeds.
With `--op NAME` it looks at those with one op alone.
"""

from __future__ import annotations

import argparse
import logging
import random
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

import fxmerge
from tests.oracle.exact import exact_log_order
from tests.oracle.generator import LIMIT, OPS, Recipe, Step, build, cost, has_unused_entries, random_recipe

EXACT, INCOMPLETE, UNSOUND, UNUSED, CRASH = "exact", "incomplete", "unsound", "unused", "crash"
"""What a recipe can come out as. `UNUSED`: more is found than the oracle counts, but there are parameter entries on
which no output depends, and which the oracle does not count."""


@dataclass(frozen=True)
class Finding:
    """What came of one recipe."""

    state: str
    detail: str


def examine(recipe: Recipe) -> Finding:
    """Finds and proves the symmetry of a recipe, and compares it with the exact one."""
    model, args = build(recipe)
    try:
        symmetry = fxmerge.find_symmetry(model, args)
        verified = symmetry.verify(model, args, trials=4)
    except Exception as error:
        return Finding(CRASH, f"{type(error).__name__}: {error}")
    found, exact = symmetry.log_order(), exact_log_order(model, args)
    detail = f"found {found:.4f} of {exact:.4f}, error {verified.error}, demoted {verified.demoted}\n{symmetry}"
    if verified.demoted or verified.error is None or verified.error > 1e-9:
        return Finding(UNSOUND, detail)
    if found > exact + 1e-6:
        return Finding(UNUSED if has_unused_entries(recipe) else UNSOUND, detail)
    return Finding(INCOMPLETE if found < exact - 1e-6 else EXACT, detail)


def has_equal_entries(recipe: Recipe) -> bool:
    """Whether some value of the recipe holds one number at two places."""
    values = len(recipe.inputs) + len(recipe.steps)
    model, args = build(replace(recipe, outputs=tuple(range(values))))
    with torch.no_grad():
        found = model.double()(*(a.double() for a in args))
    return any(len(v.mul(1e6).round().unique()) < v.numel() for v in found)


def excuses(recipe: Recipe) -> list[str]:
    """The documented reasons for which the symmetry of a recipe may be smaller than the exact one.

    These are judged by the steps of the recipe, so a recipe may be complete in spite of them. Soundness has no excuse.
    """
    ops = {op for op, _, _ in recipe.steps}
    kinds = {(op, option) for op, _, options in recipe.steps for option in options if isinstance(option, str)}
    groups = {(op, *options[-1:]) for op, _, options in recipe.steps if op in ("group_mean", "channels", "conv")}
    twice = {op for op, taken, _ in recipe.steps if len(taken) == 2 and len(set(taken)) == 1}
    found = {
        "one number at several places (copies, symmetric products): places are told apart": has_equal_entries(recipe),
        "products of a value with itself": bool(twice & {"outer", "matmul", "apply"})
        or "gram" in ops
        or ("einsum", "bi,bj,ijk->bk") in kinds,
        "reversals and rotations": bool(ops & {"flip", "roll"}) or ("low_rank", "flip") in kinds,
        "groups that do not nest": len(groups) > 1,
        "two axes as one": bool(ops & {"flatten", "unflatten", "shuffle", "pixel_shuffle", "pixel_unshuffle"}),
        "a sum right after a product": "einsum" in ops and bool(ops & {"reduce", "pool"}),
        "experts whose outputs are used apart": "experts" in ops,
    }
    return [why for why, holds in found.items() if holds]


# ------------------------------------------------------------------------------------ shorter recipes


def _pruned(recipe: Recipe) -> Recipe:
    """The recipe without the steps that no output needs."""
    first, needed = len(recipe.inputs), set(recipe.outputs)
    for i in reversed(range(len(recipe.steps))):
        if first + i in needed:
            needed |= set(recipe.steps[i][1])
    kept = [i for i in range(len(recipe.steps)) if first + i in needed]
    number = {i: i for i in range(first)} | {first + i: first + k for k, i in enumerate(kept)}
    steps = tuple((o, tuple(number[t] for t in taken), more) for o, taken, more in (recipe.steps[i] for i in kept))
    return Recipe(recipe.inputs, steps, tuple(number[o] for o in recipe.outputs))


def _lower(value: Any) -> Iterator[Any]:
    """The option with one number in it made smaller."""
    if isinstance(value, bool):
        yield from [False] * value
    elif isinstance(value, int):
        yield from [value - 1] * (value > 1)
    elif isinstance(value, tuple):
        for i, part in enumerate(value):
            yield from ((*value[:i], less, *value[i + 1 :]) for less in _lower(part))


def _shorter(recipe: Recipe) -> Iterator[Recipe]:
    """Recipes that are simpler in one respect; not all of them can be built."""
    first, steps, outputs = len(recipe.inputs), recipe.steps, recipe.outputs
    for k, value in enumerate(outputs):
        if len(outputs) > 1:
            yield _pruned(replace(recipe, outputs=(*outputs[:k], *outputs[k + 1 :])))
        for t in steps[value - first][1] if value >= first else ():
            yield _pruned(replace(recipe, outputs=(*outputs[:k], t, *outputs[k + 1 :])))
    for i, (_, taken, _) in enumerate(steps):
        for t in taken:
            number = {first + i: t}
            skipped: tuple[Step, ...] = tuple((o, tuple(number.get(v, v) for v in vs), more) for o, vs, more in steps)
            yield _pruned(replace(recipe, steps=skipped, outputs=tuple(number.get(v, v) for v in outputs)))
    for k, shape in enumerate(recipe.inputs):
        for d, n in enumerate(shape):
            if n > (2 if d else 1):
                less = (*shape[:d], n - 1, *shape[d + 1 :])
                yield replace(recipe, inputs=(*recipe.inputs[:k], less, *recipe.inputs[k + 1 :]))
    for i, (o, taken, options) in enumerate(steps):
        for less in _lower(options):
            yield replace(recipe, steps=(*steps[:i], (o, taken, less), *steps[i + 1 :]))


def shorten(recipe: Recipe, state: str, tries: int = 100) -> Recipe:
    """A shorter recipe that comes out as `state` as well."""
    tricky = has_equal_entries(recipe)
    shorter = _shorter(recipe)
    while tries:
        candidate = next(shorter, None)
        if candidate is None:
            break
        try:
            fits = cost(candidate) <= LIMIT and (tricky or not has_equal_entries(candidate))
        except (RuntimeError, ValueError, IndexError, KeyError):
            continue
        tries -= fits
        if fits and candidate != recipe and examine(candidate).state == state:
            recipe, shorter = candidate, _shorter(candidate)
    return recipe


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("count", type=int)
    parser.add_argument("--start", type=int, default=0)
    parser.add_argument("--op", choices=OPS, help="only recipes with this op")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    states: Counter[str] = Counter()
    for seed in range(options.start, options.start + options.count):
        recipe = random_recipe(random.Random(seed))
        if options.op and all(op != options.op for op, _, _ in recipe.steps):
            continue
        finding = examine(recipe)
        excused = finding.state == UNUSED or (finding.state == INCOMPLETE and excuses(recipe))
        states[f"{finding.state}, excused" if excused else finding.state] += 1
        if finding.state != EXACT and not excused:
            recipe = shorten(recipe, finding.state)
            sys.stdout.write(f"{seed}: {finding.state}\n{recipe}\n{examine(recipe).detail}\n\n")
            sys.stdout.flush()
    sys.stdout.write(f"{dict(states)}\n")


if __name__ == "__main__":
    main()

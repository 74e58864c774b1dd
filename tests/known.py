"""What the calculus is known not to find in random recipes."""

from __future__ import annotations

from tests.generator import Recipe
from tests.hunt import has_equal_entries


def excuses(recipe: Recipe) -> list[str]:
    """The documented reasons for which the symmetry of a recipe may be smaller than the exact one.

    These are judged by the steps of the recipe, so a recipe may be complete in spite of them. Soundness has no excuse.
    """
    ops = {op for op, _, _ in recipe.steps}
    kinds = {(op, option) for op, _, options in recipe.steps for option in options if isinstance(option, str)}
    groups = {(op, *options[-1:]) for op, _, options in recipe.steps if op in ("group_mean", "channels", "conv")}
    found = {
        "one number at several places (copies, symmetric products): places are told apart": has_equal_entries(recipe),
        "two factors or terms of one layer can be exchanged": bool(
            kinds & {("glu", "products"), ("combine", "mul"), ("combine", "add"), ("combine", "maximum")}
        )
        or bool(ops & {"outer", "gram", "matmul", "apply"})
        or ("einsum", "bi,bj,ijk->bk") in kinds,
        "reversals and rotations": bool(ops & {"flip", "roll"}) or ("low_rank", "flip") in kinds,
        "windows along units": "pool" in ops,
        "groups that do not nest": len(groups) > 1,
        "two axes as one": bool(ops & {"flatten", "unflatten", "shuffle", "pixel_shuffle", "pixel_unshuffle"}),
        "rows of a parameter that are reduced": "parameter" in ops,
        "space that is padded": "pad" in ops,
        "ops without a rule": bool(kinds & {("cell", "gru"), ("cell", "lstm")}),
        "experts whose outputs are used apart": "experts" in ops,
    }
    return [why for why, holds in found.items() if holds]

"""Recipes on which the inferred symmetry was wrong or too small, with what they come out as now."""

from __future__ import annotations

from tests.oracle.generator import Recipe
from tests.oracle.hunt import EXACT, INCOMPLETE, UNUSED

REGRESSIONS: dict[str, tuple[str, Recipe]] = {
    "inputs padded, then a convolution": (
        EXACT,
        Recipe(((1, 2, 1, 1),), (("pad", (0,), (2, 1)), ("conv", (1,), ("p3", 1, 1, 1, 1, 1))), (2,)),
    ),
    "inputs padded, then a transposed convolution": (
        EXACT,
        Recipe(((1, 2, 1),), (("pad", (0,), (2, 1)), ("deconv", (1,), ("p3", 1, 1, 1, 2, 0))), (2,)),
    ),
    "units and their reversal, stacked": (
        EXACT,
        Recipe(
            ((1, 2),),
            (
                ("linear", (0,), ("p1", 4, False)),
                ("flip", (1,), (1,)),
                ("stack", (2, 1), (0,)),
                ("linear", (3,), ("p2", 2, False)),
            ),
            (1, 4),
        ),
    ),
    "rows that are computed and dropped": (
        UNUSED,
        Recipe(((1, 1),), (("rows", (0,), ("p2", 1, 5)), ("take", (1,), (1, (0, 1)))), (2,)),
    ),
    "weights of padding": (
        UNUSED,
        Recipe(((1, 2),), (("pad", (0,), (1, 2)), ("linear", (1,), ("p4", 1, False))), (2,)),
    ),
    "factors that can be exchanged": (
        EXACT,
        Recipe(((1, 2),), (("linear", (0,), ("p1", 4, False)), ("glu", (1,), (1, "products"))), (2,)),
    ),
    "rows of a parameter that are reduced": (
        EXACT,
        Recipe(((1, 2),), (("parameter", (), ("p2", (2, 2))), ("reduce", (1,), (1, "mean", False))), (2,)),
    ),
    "reversal": (
        INCOMPLETE,
        Recipe(((1, 2),), (("linear", (0,), ("p1", 2, False)), ("flip", (1,), (1,)), ("tied", (2,), ("p1", 2))), (3,)),
    ),
    "windows along units": (
        EXACT,
        Recipe(((1, 2, 2),), (("linear", (0,), ("p1", 2, False)), ("pool", (1,), ("max",))), (2,)),
    ),
    "one number at two places": (
        EXACT,
        Recipe(((1, 2),), (("repeat", (0,), (1, "repeat")), ("linear", (1,), ("p6", 2, False))), (2,)),
    ),
    "units padded, then a convolution": (
        EXACT,
        Recipe(
            ((1, 2, 3),),
            (
                ("conv", (0,), ("p1", 4, 1, 1, 1, 0)),
                ("pad", (1,), (2, 1)),
                ("conv", (2,), ("p2", 2, 2, 1, 1, 0)),
            ),
            (3,),
        ),
    ),
    "units padded, then pooled": (
        EXACT,
        Recipe(
            ((1, 2, 3),),
            (
                ("conv", (0,), ("p1", 4, 1, 1, 1, 0)),
                ("pad", (1,), (2, 1)),
                ("pool", (2,), ("max",)),
                ("conv", (3,), ("p2", 2, 1, 1, 1, 0)),
            ),
            (4,),
        ),
    ),
    "places that a stride passes over": (
        EXACT,
        Recipe(
            ((1, 2, 2),),
            (
                ("linear", (0,), ("p1", 3, False)),
                ("conv", (1,), ("p2", 1, 1, 1, 2, 0)),
                ("linear", (2,), ("p3", 1, False)),
            ),
            (3,),
        ),
    ),
    "a sum right after a product: places in each row of the weight": (
        INCOMPLETE,
        Recipe(
            ((1, 2),),
            (("einsum", (0,), ("p2", "bi,ijk->bjk", 2)), ("reduce", (1,), (1, "mean", False))),
            (2,),
        ),
    ),
    "GRU cell": (
        EXACT,
        Recipe(((1, 2),), (("cell", (0,), ("p2", 3, "gru")), ("linear", (1,), ("p9", 2, False))), (2,)),
    ),
    "LSTM cell": (
        EXACT,
        Recipe(((1, 2),), (("cell", (0,), ("p2", 3, "lstm")), ("linear", (1,), ("p9", 2, False))), (2,)),
    ),
    "experts, outputs used apart": (
        EXACT,
        Recipe(((1, 3),), (("experts", (0,), ("p3", 2, 2, False)), ("cumsum", (1,), (1,))), (2,)),
    ),
    "taps of a kernel": (
        EXACT,
        Recipe(((1, 2, 2),), (("deconv", (0,), ("p2", 1, 2, 1, 2, 0)), ("linear", (1,), ("p3", 1, False))), (2,)),
    ),
    "one weight behind units and behind their reversal": (
        INCOMPLETE,
        Recipe(
            ((1, 2, 2),),
            (
                ("linear", (0,), ("p1", 2, False)),
                ("einsum", (1,), ("p2", "bij,kij->bkij", 1)),
                ("flip", (1,), (2,)),
                ("linear", (2,), ("p3", 2, False)),
                ("linear", (3,), ("p3", 2, False)),
            ),
            (4, 5),
        ),
    ),
    "one weight behind units and behind their rotation": (
        INCOMPLETE,
        Recipe(
            ((1, 2, 2),),
            (
                ("linear", (0,), ("p1", 3, False)),
                ("einsum", (1,), ("p2", "bij,kij->bkij", 1)),
                ("roll", (1,), (2, 1)),
                ("linear", (2,), ("p3", 2, False)),
                ("linear", (3,), ("p3", 2, False)),
            ),
            (4, 5),
        ),
    ),
    "one weight behind units and behind an index of them": (
        INCOMPLETE,
        Recipe(
            ((1, 2, 2),),
            (
                ("linear", (0,), ("p1", 3, False)),
                ("einsum", (1,), ("p2", "bij,kij->bkij", 1)),
                ("take", (1,), (2, (1, 0, 2))),
                ("linear", (2,), ("p3", 2, False)),
                ("linear", (3,), ("p3", 2, False)),
            ),
            (4, 5),
        ),
    ),
    "one weight as it is and transposed, behind a reversal": (
        EXACT,
        Recipe(
            ((1, 2, 2),),
            (
                ("linear", (0,), ("p1", 2, False)),
                ("einsum", (1,), ("p2", "bij,kij->bkij", 1)),
                ("flip", (1,), (2,)),
                ("linear", (2,), ("p3", 2, False)),
                ("tied", (3,), ("p3", 2)),
            ),
            (4, 5),
        ),
    ),
    "a kernel that sees all places": (
        EXACT,
        Recipe(((1, 2, 2),), (("linear", (0,), ("p1", 2, False)), ("conv", (1,), ("p2", 1, 2, 1, 1, 0))), (2,)),
    ),
    "a kernel that sees all places, transposed": (
        EXACT,
        Recipe(((1, 2, 2),), (("linear", (0,), ("p1", 2, False)), ("deconv", (1,), ("p4", 1, 2, 1, 1, 1))), (2,)),
    ),
    "places that a transposed convolution leaves empty": (
        EXACT,
        Recipe(
            ((1, 2, 2),),
            (
                ("linear", (0,), ("p1", 2, False)),
                ("deconv", (1,), ("p3", 1, 1, 1, 2, 0)),
                ("linear", (2,), ("p4", 1, False)),
            ),
            (3,),
        ),
    ),
    "a value twice, then a linear layer": (
        EXACT,
        Recipe(
            ((1, 2, 2),),
            (
                ("linear", (0,), ("p1", 3, False)),
                ("stack", (1, 1), (2,)),
                ("flatten", (2,), (2,)),
                ("linear", (3,), ("p3", 2, False)),
            ),
            (4,),
        ),
    ),
    "an input at several places, then a linear layer": (
        EXACT,
        Recipe(((1, 2, 2),), (("repeat", (0,), (2, "repeat")), ("linear", (1,), ("p3", 2, False))), (2,)),
    ),
    "a reversal of space that a kernel reads": (
        EXACT,
        Recipe(
            ((1, 3, 2),),
            (
                ("linear", (0,), ("p1", 4, False)),
                ("conv", (1,), ("p2", 2, 2, 1, 1, 0)),
                ("linear", (2,), ("p3", 2, True)),
            ),
            (3,),
        ),
    ),
}

"""Recipes on which the inferred symmetry was wrong or too small, with what they come out as now."""

from __future__ import annotations

from tests.generator import Recipe
from tests.hunt import EXACT, INCOMPLETE, UNUSED

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
        INCOMPLETE,
        Recipe(((1, 2),), (("linear", (0,), ("p1", 4, False)), ("glu", (1,), (1, "products"))), (2,)),
    ),
    "rows of a parameter that are reduced": (
        INCOMPLETE,
        Recipe(((1, 2),), (("parameter", (), ("p2", (2, 2))), ("reduce", (1,), (1, "mean", False))), (2,)),
    ),
    "reversal": (
        INCOMPLETE,
        Recipe(((1, 2),), (("linear", (0,), ("p1", 2, False)), ("flip", (1,), (1,)), ("tied", (2,), ("p1", 2))), (3,)),
    ),
    "windows along units": (
        INCOMPLETE,
        Recipe(((1, 2, 2),), (("linear", (0,), ("p1", 2, False)), ("pool", (1,), ("max",))), (2,)),
    ),
    "one number at two places": (
        INCOMPLETE,
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
        INCOMPLETE,
        Recipe(((1, 3),), (("experts", (0,), ("p3", 2, 2, False)), ("cumsum", (1,), (1,))), (2,)),
    ),
    "taps of a kernel": (
        INCOMPLETE,
        Recipe(((1, 2, 2),), (("deconv", (0,), ("p2", 1, 2, 1, 2, 0)), ("linear", (1,), ("p3", 1, False))), (2,)),
    ),
}

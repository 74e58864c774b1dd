"""Recipes: what their fields may be, what goes together, and how they are written and read."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fxmerge
from fxmerge import Align, Average, Budget, LeastSquares, Readout, Recipe, Repair, Run, TaskArithmetic, Ties, Zip

NAN, INF = float("nan"), float("inf")

# -------------------------------------------------------------------------- fields

SHARE = "it must be a number from 0 to 1."
ALPHA = "it must be a number from 0 (activations only) to 1 (weights only), or such numbers by the names of classes."
WEIGHTS = "it must be one number per model, none negative and at least one positive, or None."
REFERENCE = "it must be the number of a model, from 0, or None."
SIMILARITY = "it must be 'pearson' or 'cosine'."
FLAG = "it must be True or False or 'auto'."
SCALE = "it must be a finite number."
WIDTH = "it must be a positive number, such numbers by the names or patterns of classes, or Budget(parameters=...)."
DENSITY = "it must be a number above 0, up to 1 (keep every entry)."

NO_SHARES: list[Any] = [-0.1, 1.1, NAN, INF, "half", None, True]
NO_ALPHAS: list[Any] = [*NO_SHARES, {"a": 1.5}, {"a": 0.5, "b": "half"}, {"a": True}, [0.5]]
NO_WEIGHTS: list[Any] = [(), (0, 0), (1, -1), (NAN, 1), (INF, 1), ("a", "b"), (True, 1), 3, "11"]
NO_REFERENCES: list[Any] = [-1, 0.5, "A", True]

WRONG: list[tuple[type, str, list[Any], str]] = [
    *((kind, "alpha", NO_ALPHAS, ALPHA) for kind in (Align, Zip)),
    *((kind, "similarity", ["dot", None, 1, "covariance"], SIMILARITY) for kind in (Align, Zip)),
    (Align, "continuous", [1, 0, None, "yes", NAN], FLAG),
    (Zip, "continuous", [1, 0, "yes", NAN], "it must be True or False or 'auto' or None."),
    *((kind, "reference", NO_REFERENCES, REFERENCE) for kind in (Align, Zip)),
    *((Zip, name, NO_SHARES, SHARE) for name in ("budget", "damping")),
    (Zip, "width", [0, -0.5, NAN, "half", None, True, {"a": 0}], WIDTH),
    (Zip, "multiple_of", [0, 1.5, None, True], "it must be a whole number from 1 on."),
    *((kind, "own", NO_SHARES, SHARE) for kind in (LeastSquares, Readout, Repair)),
    *((kind, "weights", NO_WEIGHTS, WEIGHTS) for kind in (Average, TaskArithmetic, Ties)),
    *((kind, "scale", [NAN, INF, "full", None, True], SCALE) for kind in (TaskArithmetic, Ties)),
    (Ties, "density", [0, -0.5, 1.1, NAN, "half", None, True], DENSITY),
    (Recipe, "match", ["zip", Zip, 3, Average()], "it must be Zip(...), Align(...), None or 'auto'."),
    (
        Recipe,
        "combine",
        ["average", None, Ties, Zip()],
        "it must be Average(...), TaskArithmetic(...), Ties(...) or 'auto'.",
    ),
    (
        Recipe,
        "fit",
        ["readout", False, Readout, Zip()],
        "it must be LeastSquares(...), Readout(...), Repair(...), None or 'auto'.",
    ),
    (Recipe, "targets", ["centred", None, 1], "it must be 'mean' or 'standardized'."),
    (Recipe, "free", [None, 3, ("a", 3), [b"a"]], "it must be the name of an output, or a sequence of names."),
    (Run, "memory", [0, -1, NAN, INF, "2 GiB", None, True], "it must be a positive number of GiB."),
    (Run, "seed", [-1, 0.5, None, True, "a"], "it must be a whole number, 0 or more."),
    (Run, "progress", ["yes", 2], "it must be True, False or None."),
    (Run, "verify", [None, "yes", 2], "it must be True or False."),
    (Run, "device", ["gpu", 1.5, "cpu:x"], "it must be a device of torch, such as 'cpu' or 'cuda:0', or None."),
]


@pytest.mark.parametrize(
    ("kind", "name", "value", "wanted"),
    [(kind, name, value, wanted) for kind, name, values, wanted in WRONG for value in values],
    ids=lambda value: value.__name__ if isinstance(value, type) else str(value)[:20],
)
def test_a_field_out_of_range_is_named_with_what_it_may_be(kind: type, name: str, value: Any, wanted: str) -> None:
    with pytest.raises(fxmerge.OptionError) as raised:
        kind(**{name: value})
    said = tuple(value) if (kind, name, type(value)) == (Recipe, "free", list) else value
    assert str(raised.value) == f"{kind.__name__}.{name} is {said!r}; {wanted}"


@pytest.mark.parametrize("kind", [Align, Zip])
@pytest.mark.parametrize("alpha", [0, 1, 0.5, {}, {"a": 0, "b": 1.0}])
def test_the_ends_of_a_range_belong_to_it(kind: Any, alpha: Any) -> None:
    assert kind(alpha=alpha, reference=0).alpha == alpha
    assert Zip(budget=0, damping=1) == Zip(alpha=0.5, budget=0.0, damping=1.0)
    assert (Ties(density=1).density, Ties(density=1e-9).density) == (1, 1e-9)
    assert TaskArithmetic(scale=-1).scale == -1
    assert Average((0, 1)).weights == (0, 1)
    assert Run(device=torch.device("cpu"), memory=1e-9, progress=False).device == torch.device("cpu")


@pytest.mark.parametrize("kind", [Average, TaskArithmetic, Ties])
def test_weights_may_be_any_sequence(kind: Any) -> None:
    assert kind(weights=[2, 1]) == kind(weights=(2, 1))
    assert hash(kind(weights=[2, 1])) == hash(kind(weights=(2, 1)))
    assert Recipe(free=["a", "b"]) == Recipe(free=("a", "b"))


def test_recipes_cannot_be_changed() -> None:
    for part in (Zip(), Average(), LeastSquares(), Recipe(), Run()):
        with pytest.raises(AttributeError):
            part.alpha = 1  # type: ignore[union-attr]


# -------------------------------------------------------------------------- what goes together


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"match": Zip(width=0.5)}, "match"),
        ({"match": Zip(width={"layer1*": 2})}, "match"),
        ({"match": Zip(width=Budget(parameters=0.5))}, "match"),
        ({"match": Align()}, "match"),
        ({"combine": Average(weights=(1, 2))}, "combine"),
        ({"combine": Ties()}, "combine"),
        ({"fit": LeastSquares()}, "fit"),
        ({"targets": "standardized"}, "targets"),
    ],
)
def test_networks_side_by_side_are_as_they_are(fields: dict[str, Any], name: str) -> None:
    with pytest.raises(fxmerge.OptionError, match=f"Recipe.share is 'nothing', .*: leave Recipe.{name} out") as caught:
        Recipe(share="nothing", **fields)
    assert caught.value.field == name
    settled = Recipe(share="nothing").settled(data=True, base=False)
    assert settled == Recipe(match=Zip(), combine=Average(), fit=None, share="nothing")
    assert Recipe(share="nothing", match=None).settled(data=False, base=False).match is None


@pytest.mark.parametrize("combine", [TaskArithmetic(), Ties()])
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"match": Zip()}, "Recipe.match is Zip, but {} needs models aligned with their base: pass Align(...)."),
        ({"fit": LeastSquares()}, "Recipe.fit is LeastSquares, but a fit knows no base of {}: pass None."),
        ({"fit": Repair()}, "Recipe.fit is Repair, but a fit knows no base of {}: pass None."),
        ({"targets": "standardized"}, "Recipe.targets is 'standardized', but {} has a base: pass 'mean'."),
    ],
)
def test_what_task_vectors_do_not_go_with(combine: Any, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(fxmerge.OptionError) as raised:
        Recipe(combine=combine, **fields)
    assert str(raised.value) == message.format(type(combine).__name__)
    Recipe(match=Align(), combine=combine, fit=None)


@pytest.mark.parametrize(
    ("recipe", "data", "base", "settled"),
    [
        (Recipe(), True, False, Recipe(Zip(), Average(), LeastSquares())),
        (Recipe(), False, False, Recipe(Zip(), Average(), None)),
        (Recipe(), True, True, Recipe(Align(), TaskArithmetic(), None)),
        (Recipe(), False, True, Recipe(Align(), TaskArithmetic(), None)),
        (Recipe(combine=Ties()), True, True, Recipe(Align(), Ties(), None)),
        (Recipe(match=Align(alpha=1)), True, False, Recipe(Align(alpha=1), Average(), LeastSquares())),
        (Recipe(fit=Repair(), free="output"), True, False, Recipe(Zip(), Average(), Repair(), free="output")),
        (Recipe(fit=None), True, False, Recipe(Zip(), Average(), None)),
        (
            Recipe(targets="standardized"),
            True,
            False,
            Recipe(Zip(), Average(), LeastSquares(), targets="standardized"),
        ),
    ],
)
def test_what_auto_is(recipe: Recipe, data: bool, base: bool, settled: Recipe) -> None:
    assert recipe.settled(data=data, base=base) == settled
    assert settled.settled(data=data, base=base) == settled


@pytest.mark.parametrize(
    ("recipe", "data", "base", "message"),
    [
        (Recipe(combine=Average()), True, True, "A base is given, and Recipe.combine is Average, which takes none"),
        (Recipe(combine=Ties()), True, False, "Recipe.combine is Ties, which needs a base: pass base="),
        (Recipe(combine=TaskArithmetic()), False, False, "Recipe.combine is TaskArithmetic, which needs a base"),
        (Recipe(fit=Readout()), False, False, "Recipe.fit is Readout, which needs data: pass a loader, or fit=None."),
        (Recipe(fit=Readout()), True, True, "Recipe.fit is Readout, but a fit knows no base of TaskArithmetic"),
        (Recipe(match=Zip()), True, True, "Recipe.match is Zip, but TaskArithmetic needs models aligned"),
        (Recipe(targets="standardized"), False, False, "Recipe.targets is 'standardized', which needs data"),
        (Recipe(targets="standardized"), True, True, "Recipe.targets is 'standardized', but TaskArithmetic has a base"),
    ],
)
def test_what_a_recipe_needs(recipe: Recipe, data: bool, base: bool, message: str) -> None:
    with pytest.raises(fxmerge.OptionError) as raised:
        recipe.settled(data=data, base=base)
    assert str(raised.value).startswith(message)


# -------------------------------------------------------------------------- written and read

SHARES = st.floats(0, 1)
NAMES = st.text(min_size=1, max_size=12)
ALPHAS = SHARES | st.dictionaries(NAMES, SHARES, max_size=3)
SIMILARITIES = st.sampled_from(["pearson", "cosine"])
REFERENCES = st.none() | st.integers(0, 9)
SOME_WEIGHTS = st.none() | st.lists(st.floats(0.125, 1e6) | st.integers(1, 9), min_size=1, max_size=4).map(tuple)
SCALES = st.floats(-10, 10)

ALIGNS = st.builds(Align, ALPHAS, SIMILARITIES, REFERENCES)
ZIPS = st.builds(Zip, ALPHAS, SHARES, SHARES, SIMILARITIES, REFERENCES)
VECTORS = st.builds(TaskArithmetic, SCALES, SOME_WEIGHTS) | st.builds(Ties, st.floats(0.01, 1), SCALES, SOME_WEIGHTS)
FITS = st.one_of(st.just("auto"), st.none(), *(st.builds(kind, SHARES) for kind in (LeastSquares, Readout, Repair)))
FREE = NAMES | st.lists(NAMES, max_size=3)
BUDGETS = st.builds(Budget, st.floats(1, 9), st.none() | st.floats(1, 9), st.none() | st.floats(0.01, 1))
SHARED = NAMES | st.floats(0.01, 0.99) | BUDGETS
HEADS = st.none() | st.lists(st.text("abc_1", min_size=1), min_size=1, max_size=4, unique=True)
RECIPES = st.builds(
    Recipe,
    st.sampled_from(["auto", None]) | ZIPS | ALIGNS,
    st.just("auto") | st.builds(Average, SOME_WEIGHTS),
    FITS,
    st.sampled_from(["mean", "standardized"]),
    SHARED,
    names=HEADS,
    free=FREE,
) | st.builds(Recipe, st.just("auto") | ALIGNS, VECTORS, st.sampled_from(["auto", None]), free=FREE)


@given(RECIPES)
@settings(max_examples=200, deadline=None)
def test_what_is_written_is_read(recipe: Recipe) -> None:
    assert Recipe.from_dict(recipe.to_dict()) == recipe
    assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe
    assert Recipe.from_json(recipe.to_json()) == recipe
    pytest.importorskip("yaml")
    assert Recipe.from_yaml(recipe.to_yaml()) == recipe


def test_what_has_its_default_is_not_written() -> None:
    assert Recipe().to_dict() == {"version": 1}
    recipe = Recipe(Zip(budget=0.25), Average((2, 1)), None, free=("output.a", "output.b"))
    written = {
        "version": 1,
        "match": {"kind": "Zip", "budget": 0.25},
        "combine": {"kind": "Average", "weights": [2, 1]},
        "fit": None,
        "free": ["output.a", "output.b"],
    }
    assert recipe.to_dict() == written
    assert recipe.to_yaml() == (
        "version: 1\nmatch:\n  kind: Zip\n  budget: 0.25\ncombine:\n  kind: Average\n  weights:\n  - 2\n  - 1\n"
        "fit: null\nfree:\n- output.a\n- output.b\n"
    )
    assert Recipe.from_dict({}) == Recipe.from_dict({"version": 1, "match": "auto"}) == Recipe()


@pytest.mark.parametrize(
    ("write", "read"),
    [(Recipe.to_json, Recipe.from_json), (Recipe.to_yaml, Recipe.from_yaml)],
    ids=["json", "yaml"],
)
def test_files(write: Callable[..., str], read: Callable[..., Recipe], tmp_path: Path) -> None:
    recipe, path = Recipe(match=Align(alpha={"a": 0.25}), fit=Repair()), tmp_path / "recipe"
    text = write(recipe, path)
    assert path.read_text() == text
    assert read(path) == read(str(path)) == read(text) == recipe
    with pytest.raises(fxmerge.OptionError, match=r"The recipe '.*missing' cannot be read: No such file"):
        read(tmp_path / "missing")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"version": 2}, "recipe.version is 2; this fxmerge reads version 1."),
        ([], "A recipe is a mapping of fields, not a list."),
        (None, "A recipe is a mapping of fields, not a NoneType."),
        ({"mach": {}}, "recipe has no field 'mach'; did you mean 'match'?"),
        (
            {"wrong": 1},
            "recipe has no field 'wrong'; its fields are match, combine, fit, targets, share, outputs, names, free.",
        ),
        (
            {"match": {"kind": "Zipp"}},
            "recipe.match.kind is 'Zipp'; it must be 'Zip' or 'Align'. Did you mean 'Zip'?",
        ),
        (
            {"combine": {"density": 0.5}},
            "recipe.combine.kind is None; it must be 'Average', 'TaskArithmetic' or 'Ties'.",
        ),
        ({"fit": {"kind": "Zip"}}, "recipe.fit.kind is 'Zip'; it must be 'LeastSquares', 'Readout' or 'Repair'."),
        ({"match": {"kind": "Zip", "alhpa": 1}}, "recipe.match has no field 'alhpa'; did you mean 'alpha'?"),
        ({"match": {"kind": "Align", "budget": 1}}, "recipe.match has no field 'budget'; its fields are alpha, "),
        ({"match": {"kind": "Zip", "alpha": 2}}, "recipe.match: Zip.alpha is 2; it must be a number from 0"),
        ({"combine": {"kind": "Ties", "weights": [0]}}, "recipe.combine: Ties.weights is (0,); it must be one number"),
        ({"match": "zip"}, "Recipe.match is 'zip'; it must be Zip(...), Align(...), None or 'auto'."),
        ({"targets": "sum"}, "Recipe.targets is 'sum'; it must be 'mean' or 'standardized'."),
        (
            {"match": {"kind": "Zip"}, "combine": {"kind": "Ties"}},
            "Recipe.match is Zip, but Ties needs models aligned with their base",
        ),
    ],
)
def test_what_is_no_recipe_is_refused(data: Any, message: str) -> None:
    for read in (
        lambda: Recipe.from_dict(data),
        lambda: Recipe.from_json(json.dumps(data, indent=1) + "\n"),
        lambda: Recipe.from_yaml(json.dumps(data, indent=1) + "\n"),
    ):
        with pytest.raises(fxmerge.OptionError) as raised:
            read()
        assert str(raised.value).startswith(message)


def test_texts_that_are_none_are_refused() -> None:
    with pytest.raises(fxmerge.OptionError, match=r"The recipe is no JSON: Expecting"):
        Recipe.from_json("{match: Zip}")
    with pytest.raises(fxmerge.OptionError, match=r"The recipe is no YAML: "):
        Recipe.from_yaml("match: [\n")


def test_yaml_is_asked_for_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "yaml", None)
    for call in (Recipe().to_yaml, lambda: Recipe.from_yaml("match: auto\n")):
        with pytest.raises(fxmerge.OptionError, match=r"need PyYAML: pip install 'fxmerge\[yaml\]'; or write JSON"):
            call()


@pytest.mark.parametrize("match", [Align(alpha=1, continuous=True), Zip(continuous="auto"), Align()])
def test_continuous_comes_back(match: Align | Zip) -> None:
    recipe = Recipe(match=match)
    written = recipe.to_dict()
    assert Recipe.from_dict(json.loads(json.dumps(written))) == recipe
    assert written["match"].get("continuous", False) is match.continuous

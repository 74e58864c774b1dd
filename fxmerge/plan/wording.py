"""What fxmerge says of Python options, in the words of the command line and of YAML files."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import fields

from fxmerge.plan.parts import Data, Output
from fxmerge.recipe import Budget, Recipe, Run
from fxmerge.recipe.recipe import PARTS

OPTIONS = {
    "Recipe.share": "--share",
    "Recipe.names": "--name",
    "Zip.width": "--width",
    "Run.device": "--device",
    "Run.memory": "--memory",
    "Run.seed": "--seed",
    "Data.path": "--data",
    "Data.samples": "--samples",
    "Data.batch": "--batch",
    "Data.length": "--length",
    "Output.path": "--out",
    "Output.shard_size": "--shard-size",
}
"""The fields that have an option. All have a place in a YAML file."""

PLACES: dict[type, str] = {
    Recipe: "recipe",
    Run: "run",
    Data: "data",
    Output: "output",
    **{kind: f"recipe.{name}" for name, kinds in PARTS.items() for kind in kinds},
}
"""Where the fields of a dataclass stand in a YAML file."""

PLACE_OF = {
    f"{kind.__name__}.{own.name}": f"{place}.{own.name}" for kind, place in PLACES.items() for own in fields(kind)
}
"""The place of every field, by its name in Python."""

VALUE = r"""\d+(?:\.\d+)?|\([^()]*\)|'[^']*'|"[^"]*"|[^\s(),.;:]+(?:\([^()]*\))?"""
"""A value as Python writes it: a text, a tuple, a call, a number or a word."""

CALLED = "|".join(kind.__name__ for kind in (*PLACES, Budget))
"""The dataclasses that messages write as calls."""

END = r"(?=[).,;:]*(?:\s|$))"
"""The end of a word. What goes on, as width=64 does in width=64.pt, is the name of a file or of a layer."""

STAND_IN = "\ue000"
"""What stands for the words of a user while the others are translated: a character that no text has."""

FIELDS = "share|names|match|combine|fit|targets|outputs|free|width|verify|device"
"""The fields that messages say how to give, as arguments of a call."""

OWNERS = {"width": "Zip", "verify": "Run", "device": "Run"}
"""Those of them that are no fields of a recipe."""

PHRASES = (
    (r"\b([Pp])ass a loader with a few batches of inputs", r"\1ass --data, a few inputs"),
    (r"\b([Pp])ass a loader\b", r"\1ass --data"),
    (r"\bWithout a loader\b", "Without --data"),
    (r"\bCheck the loader\b", "Check the data"),
    (r"\b([Pp])ass inputs=batch -> \(args, kwargs\)", r"\1ass --data package.module:loader"),
    (r"\b([Pp])ass example=batch, such as example=x", r"\1ass --input with the shape of an input"),
    (r"\b([Pp])ass example inputs that the model accepts as args and kwargs", r"\1ass --input with their shapes"),
    (r"\bpass base=", "pass --base"),
    (r"\bpass run=Run\(device=\.\.\.\)", "pass --device"),
    (r"\bpass allow_pickle=True \(on the command line --allow-pickle\)", "pass --allow-pickle"),
    (r"\bfxmerge\.(compare|fold|merge|align)\b(?!\.\w)", r"fxmerge \1"),
    (r"\breport\(\w+\)\.(\w+)", r"report.\1 in report.json"),
)

FOREIGN = rf"""\S*[/\\]\S*|(?P<ours>\b\w+=(?:{VALUE}))|(?<![\w=])(?:'[^']*'(?!\w)|"[^"]*")|{STAND_IN}"""
"""Words of users: paths and quoted names. The quotes of an argument, as in share='trunk', are of fxmerge."""


def worded(text: str, *, yaml: bool = False, typed: Sequence[str] = ()) -> str:
    """A message in the words of the command line. Paths, quoted names and what was typed stay as they are.

    Arguments:
        text: an error or a warning of fxmerge.
        yaml: whether a YAML file says what to do, so that fields are named as they stand there, and not by options.
        typed: the words of the command line.

    Example:
        >>> text = "Recipe.names is given: pass share='trunk' to keep heads apart."
        >>> worded(text)
        '--name is given: pass --share trunk to keep heads apart.'
        >>> worded(text, yaml=True)
        'recipe.names is given: pass recipe.share: trunk to keep heads apart.'
        >>> worded("Recipe.match is Zip, but Ties needs aligned models: pass Align(...).")
        'recipe.match is Zip, but Ties needs aligned models: pass {kind: Align}.'
        >>> worded("runs/Recipe.match has no files.")
        'runs/Recipe.match has no files.'
    """
    users = [re.escape(word) for word in typed if _translated(word, yaml) != word]
    pattern = "|".join([*(rf"(?<!\S){word}{END}" for word in users), FOREIGN])
    kept: list[str] = []

    def keep(match: re.Match[str]) -> str:
        if match["ours"]:
            return match[0]
        kept.append(match[0])
        return STAND_IN

    words = iter(kept)
    text = re.sub(pattern, keep, text)
    return re.sub(STAND_IN, lambda _: next(words), _translated(text, yaml))


def _translated(text: str, yaml: bool) -> str:
    """A text without words of users in the words of the command line."""
    for pattern, words in PHRASES:
        text = re.sub(pattern, words, text)
    if not yaml:  # A width has an option of its own.
        text = re.sub(rf"\bRecipe\(match=Zip\(width=({VALUE})\)\)", r"Recipe(width=\1)", text)
    text = re.sub(rf"\b(?:Recipe|Run)\(({FIELDS})=({VALUE})\){END}", _given(yaml), text)
    text = re.sub(rf"(?<![\w.(])({FIELDS})=({VALUE}){END}", _given(yaml), text)
    text = re.sub(rf"(?<![\w.])({'|'.join(map(re.escape, PLACE_OF))}){END}", lambda m: _name(m[1], yaml), text)
    return re.sub(rf"\b({CALLED})\((|\.\.\.|\w+=[^()]*)\){END}", lambda m: _mapping(m[1], m[2]), text)


def _name(field: str, yaml: bool) -> str:
    """A field such as `Zip.width` by its option, or by its place in a YAML file."""
    return PLACE_OF[field] if yaml else OPTIONS.get(field, PLACE_OF[field])


def _given(yaml: bool) -> Callable[[re.Match[str]], str]:
    """How a field is given a value."""

    def said(match: re.Match[str]) -> str:
        field, value = match[1], match[2]
        name = _name(f"{OWNERS.get(field, 'Recipe')}.{field}", yaml)
        if not name.startswith("--"):
            return f"{name}: {_plain(value)}"
        return " ".join(f"{name} {_plain(item)}" for item in _items(value))

    return said


def _mapping(kind: str, arguments: str) -> str:
    """A part of a recipe, as YAML has it."""
    pairs = [pair.partition("=") for pair in arguments.split(", ") if "=" in pair]
    return "{" + ", ".join([f"kind: {kind}", *(f"{name}: {_plain(value)}" for name, _, value in pairs)]) + "}"


def _plain(value: str) -> str:
    """A value of Python as YAML writes it."""
    if value.startswith("("):
        return f"[{', '.join(map(_plain, _items(value)))}]"
    return {"None": "null", "True": "true", "False": "false"}.get(value, value.strip("'\""))


def _items(value: str) -> list[str]:
    """The values in a tuple as Python writes it, or the one value that is no tuple."""
    return value[1:-1].removesuffix(",").split(", ") if value.startswith("(") else [value]

"""What fxmerge says of Python options, in the words of the command line and of YAML files."""

from __future__ import annotations

import re
from collections.abc import Callable

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

PLACES = {
    "Recipe": "recipe",
    "Run": "run",
    "Data": "data",
    "Output": "output",
    **{kind.__name__: f"recipe.{name}" for name, kinds in PARTS.items() for kind in kinds},
}
"""Where the fields of a dataclass stand in a YAML file."""

VALUE = r"""\d+(?:\.\d+)?|\([^()]*\)|'[^']*'|"[^"]*"|[^\s(),.;:]+(?:\([^()]*\))?"""
"""A value as Python writes it: a text, a tuple, a call, a number or a word."""

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
    (r"\bfxmerge\.(compare|fold|merge|align)\b", r"fxmerge \1"),
    (r"\breport\(\w+\)\.(\w+)", r"report.\1 in report.json"),
)


def worded(text: str, *, yaml: bool = False) -> str:
    """A message in the words of the command line.

    Arguments:
        text: an error or a warning of fxmerge.
        yaml: whether a YAML file says what to do, so that fields are named as they stand there, and not by options.

    Example:
        >>> text = "Recipe.names is given: pass share='trunk' to keep heads apart."
        >>> worded(text)
        '--name is given: pass --share trunk to keep heads apart.'
        >>> worded(text, yaml=True)
        'recipe.names is given: pass recipe.share: trunk to keep heads apart.'
        >>> worded("Recipe.match is Zip, but Ties needs aligned models: pass Align(...).")
        'recipe.match is Zip, but Ties needs aligned models: pass {kind: Align}.'
    """
    for pattern, words in PHRASES:
        text = re.sub(pattern, words, text)
    if not yaml:  # A width has an option of its own.
        text = re.sub(rf"\bRecipe\(match=Zip\(width=({VALUE})\)\)", r"Recipe(width=\1)", text)
    text = re.sub(rf"\b(?:Recipe|Run)\(({FIELDS})=({VALUE})\)", _given(yaml), text)
    text = re.sub(rf"(?<![\w.(])({FIELDS})=({VALUE})", _given(yaml), text)
    text = re.sub(rf"\b({'|'.join(PLACES)})\.([a-z]\w*)", lambda m: _name(m[1], m[2], yaml), text)
    return re.sub(rf"\b({'|'.join((*PLACES, 'Budget'))})\(([^()]*)\)", lambda m: _mapping(m[1], m[2]), text)


def _name(kind: str, field: str, yaml: bool) -> str:
    """A field by its option, or by its place in a YAML file."""
    option = None if yaml else OPTIONS.get(f"{kind}.{field}")
    return option or f"{PLACES[kind]}.{field}"


def _given(yaml: bool) -> Callable[[re.Match[str]], str]:
    """How a field is given a value."""

    def said(found: re.Match[str]) -> str:
        field, value = found[1], found[2]
        name = _name(OWNERS.get(field, "Recipe"), field, yaml)
        if not name.startswith("--"):
            return f"{name}: {_plain(value)}"
        several = value.strip("()").split(", ") if value.startswith("(") else [value]
        return " ".join(f"{name} {_plain(one)}" for one in several)

    return said


def _mapping(kind: str, arguments: str) -> str:
    """A part of a recipe, as YAML has it."""
    pairs = [pair.partition("=") for pair in arguments.split(", ") if "=" in pair]
    return "{" + ", ".join([f"kind: {kind}", *(f"{name}: {_plain(value)}" for name, _, value in pairs)]) + "}"


def _plain(value: str) -> str:
    """A value of Python as YAML writes it."""
    return {"None": "null", "True": "true", "False": "false"}.get(value, value.strip("'\""))

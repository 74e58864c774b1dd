"""Plain data to dataclasses, by their type hints. What is wrong is told with the path to it."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from functools import cache
from typing import Any, Literal, Union

import torch

from fxmerge.errors import OptionError
from fxmerge.recipe import VERSION, Recipe

Path = tuple[str | int, ...]
"""The keys and numbers that lead to a value."""

KIND = "kind"
"""The key by which parts of one field are told apart."""

WORDS = {str: "text", bool: "true or false", int: "a whole number", float: "a number", type(None): "null"}


class Misfit(Exception):
    """What is wrong with a value, and where the value is.

    Attributes:
        path: to the value.
        of_key: whether the key is wrong, and not what stands there.
    """

    def __init__(self, path: Path, sentence: str, *, of_key: bool = False) -> None:
        super().__init__(sentence)
        self.path, self.of_key = path, of_key


def shown(path: Path) -> str:
    """A path as it is written in messages.

    Example:
        >>> shown(("models", 0, "path"))
        'models[0].path'
    """
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path)
    return text.removeprefix(".") or "the file"


def meant(name: object, known: Sequence[str], otherwise: str) -> str:
    """A question for the known name that is nearest to another one, or else what is given.

    Example:
        >>> meant("wieght", ("weight", "density"), "it has weight and density.")
        "did you mean 'weight'?"
    """
    near = get_close_matches(str(name), known, n=1)
    return f"did you mean {near[0]!r}?" if near else otherwise


def read(hint: Any, value: Any, path: Path = ()) -> Any:
    """A value of a type from plain data.

    Raises:
        Misfit: if it cannot be one.
    """
    options = options_of(hint)
    parts = [one for one in options if isinstance(one, type) and dataclasses.is_dataclass(one)]
    if isinstance(value, Mapping):
        if parts and (KIND in value or len(parts) == len(options) == 1 or not _of(options, Mapping)):
            return _dataclass(parts, value, path)
        for option in _of(options, Mapping):
            _, inside = typing.get_args(option)
            return {_key(name, path): read(inside, own, (*path, name)) for name, own in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        for option in _of(options, tuple):
            inside = typing.get_args(option)[0]
            return tuple(read(inside, own, (*path, i)) for i, own in enumerate(value))
    words = [word for option in options if typing.get_origin(option) is Literal for word in typing.get_args(option)]
    for option in options:
        if option is Any or _is(value, option):
            return value
    if any(type(value) is type(word) and value == word for word in words):
        return value
    near = get_close_matches(value, [w for w in words if isinstance(w, str)], n=1) if isinstance(value, str) else []
    hint_text = f" Did you mean {near[0]!r}?" if near else _number_hint(value, options)
    raise Misfit(path, f"{shown(path)} is {_said(value)}; it must be {described(hint)}.{hint_text}")


def fields_of(kind: type) -> dict[str, Any]:
    """The fields of a dataclass with their types."""
    hints = _hints(kind)
    return {one.name: hints[one.name] for one in dataclasses.fields(kind)}


@cache
def _hints(kind: type) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def options_of(hint: Any) -> list[Any]:
    """The types of a union. A class stands for those that are derived from it; devices of torch are left out, since
    their names stand for them."""
    if typing.get_origin(hint) in (Union, types.UnionType):
        return [own for one in typing.get_args(hint) for own in options_of(one)]
    if isinstance(hint, type) and dataclasses.is_dataclass(hint) and hint.__subclasses__():
        return hint.__subclasses__()
    return [] if hint is torch.device else [hint]


def _of(options: Sequence[Any], kind: type) -> list[Any]:
    origins = [(one, typing.get_origin(one)) for one in options]
    return [one for one, origin in origins if isinstance(origin, type) and issubclass(origin, kind)]


def _is(value: Any, option: Any) -> bool:
    if option is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if option is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return option in (str, bool, type(None)) and isinstance(value, option)


def _key(name: Any, path: Path) -> str:
    if not isinstance(name, str):
        sentence = f"{shown(path)} has the key {name!r}; keys are text: put it in quotes."
        raise Misfit((*path, name), sentence, of_key=True)
    return name


def _dataclass(kinds: Sequence[type], value: Mapping[Any, Any], path: Path) -> Any:
    """A dataclass; of several, the one whose name stands under "kind"."""
    given = dict(value)
    kind = kinds[0]
    names = [one.__name__ for one in kinds]
    if KIND in given or len(kinds) > 1:
        named = given.pop(KIND, None)
        if named not in names:
            near = get_close_matches(str(named), names, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            said = f"has no {KIND}" if named is None else f"has the {KIND} {named!r}"
            at = path if named is None else (*path, KIND)
            raise Misfit(at, f"{shown(path)} {said}; it must be {_or(list(map(repr, names)))}.{hint}")
        kind = kinds[names.index(named)]
    if kind is Recipe:
        version = given.pop("version", VERSION)
        if version != VERSION:
            raise Misfit((*path, "version"), f"recipe.version is {version!r}; this fxmerge reads version {VERSION}.")
    hints = fields_of(kind)
    for name in given:
        if name not in hints:
            raise Misfit((*path, name), _no_field(path, name, list(hints)), of_key=True)
    made = {name: read(hints[name], own, (*path, name)) for name, own in given.items()}
    for one in dataclasses.fields(kind):
        needed = one.default is dataclasses.MISSING and one.default_factory is dataclasses.MISSING
        if needed and one.name not in made:
            raise Misfit(path, f"{shown(path)} has no {one.name!r}, which it needs: {described(hints[one.name])}.")
    try:
        return kind(**made)
    except OptionError as error:
        at = (*path, error.field) if error.field is not None and error.field in given else path
        raise Misfit(at, str(error)) from error


def _no_field(path: Path, name: Any, known: list[str]) -> str:
    hint = meant(name, known, f"its fields are {', '.join(known)}.")
    return f"{shown(path)} has no field {name!r}; {hint}"


def _said(value: Any) -> str:
    if isinstance(value, Mapping):
        return "a mapping"
    if isinstance(value, list):
        return "a list"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return f"the text {value!r}" if isinstance(value, str) else repr(value)


def _number_hint(value: Any, options: Sequence[Any]) -> str:
    """What to write in place of a number that YAML reads as text."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        return ""
    if isinstance(value, str) and any(one in (int, float) for one in options):
        return f" Write {number!r}, without quotes."
    return ""


def described(hint: Any) -> str:
    """What a value of a type is, in words."""
    words = []
    for option in options_of(hint):
        origin = typing.get_origin(option)
        if origin is Literal:
            words += [repr(word) for word in typing.get_args(option)]
        elif dataclasses.is_dataclass(option):
            name = getattr(option, "__name__", "")
            words.append(f"a mapping with kind: {name}" if len(options_of(hint)) > 1 else "a mapping")
        elif origin is tuple:
            words.append("a list")
        elif isinstance(origin, type) and issubclass(origin, Mapping):
            words.append("a mapping")
        else:
            words.append(WORDS.get(option, "any value"))
    return _or(list(dict.fromkeys(words)))


def _or(words: list[str]) -> str:
    return words[0] if len(words) == 1 else " or ".join([", ".join(words[:-1]), words[-1]])

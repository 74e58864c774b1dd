"""Plans as YAML. Errors name the file, the line and the column."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fxmerge.errors import OptionError
from fxmerge.plan import mergekit, reading
from fxmerge.plan.parts import VERSION, Plan
from fxmerge.plan.reading import Misfit
from fxmerge.recipe import Recipe
from fxmerge.sources import package

HEADER = "fxmerge"
"""The key of the version of the format."""

Marks = dict[reading.Path, tuple[int, int]]

TAGS = {"mapping": "tag:yaml.org,2002:map", "sequence": "tag:yaml.org,2002:seq"}

FIRST = (HEADER, "verb", "models", "base", "arch", "set", "input", "data", "recipe", "run", "output")


def from_yaml(path: str | Path) -> Plan:
    """Reads a plan, or a file of mergekit. Relative paths in a plan are relative to the directory of the file.

    Raises:
        OptionError: if the file cannot be read, is no YAML, or is no plan.

    Example:
        >>> import tempfile
        >>> file = Path(tempfile.mkdtemp()) / "recipe.yaml"
        >>> _ = file.write_text("models: [{path: a.pt}, {pth: b.pt}]")
        >>> try:
        ...     from_yaml(file)
        ... except OptionError as error:
        ...     print(str(error).replace(str(file), "recipe.yaml"))
        recipe.yaml, line 1, column 25: models[1] has no field 'pth'; did you mean 'path'?
    """
    path = Path(path)
    data, keys, values = _parsed(path)
    try:
        if not isinstance(data, dict):
            raise Misfit((), "the file is no mapping; write models:, arch:, data: and so on, each with what it is.")
        if mergekit.METHOD in data:
            return mergekit.plan_of(data)
        version = data.pop(HEADER, VERSION)
        if version != VERSION:
            raise Misfit((HEADER,), f"the format has version {version!r}; this fxmerge reads version {VERSION}.")
        if not isinstance(data.get("data", []), list):
            data["data"] = [data["data"]]  # One for all needs no list.
            keys, values = ({_listed(at): mark for at, mark in marks.items()} for marks in (keys, values))
        if isinstance(data.get("input"), str):
            data["input"] = [data["input"]]
        plan: Plan = reading.read(Plan, data)
    except Misfit as misfit:
        raise _placed(path, misfit, keys, values) from misfit
    except OptionError as error:  # Of parts that do not go together.
        raise _placed(path, Misfit((), str(error)), keys, values) from error
    return _from(path.parent, plan)


def recipe_from_yaml(path: str | Path) -> Recipe:
    """Reads a recipe alone, or that of a plan.

    Raises:
        OptionError: as `from_yaml`.
    """
    path = Path(path)
    data, keys, values = _parsed(path)
    if isinstance(data, dict) and ("models" in data or HEADER in data):
        return from_yaml(path).recipe
    try:
        found: Recipe = reading.read(Recipe, data)
        return found
    except Misfit as misfit:
        raise _placed(path, misfit, keys, values) from misfit


def to_yaml(plan: Plan) -> str:
    """A plan as YAML, without fields that have their default.

    Example:
        >>> from fxmerge.plan import ModelFile
        >>> print(to_yaml(Plan((ModelFile("a.pt"), ModelFile("b.pt")), arch="timm:resnet18")), end="")
        fxmerge: 1
        models:
        - path: a.pt
        - path: b.pt
        arch: timm:resnet18
    """
    data = {HEADER: VERSION, **_plain(plan)}
    text: str = package("yaml").safe_dump({k: data[k] for k in FIRST if k in data}, sort_keys=False, width=100)
    return text


def _plain(value: Any) -> Any:
    if isinstance(value, Recipe):
        return value.to_dict()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        own = {one.name: (one, getattr(value, one.name)) for one in dataclasses.fields(value)}
        return {name: _plain(given) for name, (one, given) in own.items() if given != _default(one)}
    if isinstance(value, Mapping):
        return {name: _plain(own) for name, own in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(own) for own in value]
    return value if isinstance(value, str | int | float | bool | None) else str(value)


def _default(one: dataclasses.Field[Any]) -> Any:
    return one.default if one.default_factory is dataclasses.MISSING else one.default_factory()


# -------------------------------------------------------------------------- places in the text


def _parsed(path: Path) -> tuple[Any, Marks, Marks]:
    """What a file holds, and where each key and each value begins.

    Raises:
        OptionError: if it cannot be read, or is no YAML.
    """
    yaml = package("yaml")
    keys: Marks = {}
    values: Marks = {}
    try:
        text = path.read_text(encoding="utf-8")
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        loader = yaml.SafeLoader(text)
        try:
            data = _read(loader, node, (), keys, values, frozenset()) if node is not None else None
        finally:
            loader.dispose()
        return data, keys, values
    except OSError as error:
        raise OptionError(f"{path} cannot be read: {error.strerror}.") from error
    except Misfit as misfit:
        raise _placed(path, misfit, keys, values) from misfit
    except UnicodeDecodeError as error:
        raise OptionError(f"{path} is not text in UTF-8: {error.reason} at byte {error.start}.") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        place = f", line {mark.line + 1}, column {mark.column + 1}" if mark is not None else ""
        problem = getattr(error, "problem", None) or str(error) or type(error).__name__
        raise OptionError(f"{path}{place}: this is no YAML: {problem}.") from error


def _read(loader: Any, node: Any, path: reading.Path, keys: Marks, values: Marks, around: frozenset[int]) -> Any:
    """The plain data of a node; a key that stands twice is refused, and so is an alias of what it stands in."""
    values[path] = node.start_mark.line + 1, node.start_mark.column + 1
    if id(node) in around:
        raise Misfit(path, f"{reading.shown(path)} holds itself, by an alias.")
    inside = around | {id(node)}
    if node.id != "scalar" and node.tag != TAGS[node.id]:
        raise Misfit(path, f"{reading.shown(path)} has the tag {node.tag!r}; leave it out.")
    if node.id == "mapping":
        found: dict[Any, Any] = {}
        for key, value in node.value:
            name = loader.construct_object(key, deep=True)
            at = (*path, name if isinstance(name, str | int) else str(name))
            keys[at] = key.start_mark.line + 1, key.start_mark.column + 1
            if not isinstance(name, str | int | float | bool | None):
                raise Misfit(at, f"{reading.shown(path)} has a key that is no text.", of_key=True)
            if name in found:
                raise Misfit(at, f"{reading.shown(path)} has {name!r} twice; keep one.", of_key=True)
            found[name] = _read(loader, value, at, keys, values, inside)
        return found
    if node.id == "sequence":
        return [_read(loader, own, (*path, i), keys, values, inside) for i, own in enumerate(node.value)]
    return loader.construct_object(node, deep=True)


def _listed(path: reading.Path) -> reading.Path:
    return (path[0], 0, *path[1:]) if path[:1] == ("data",) else path


def _placed(path: Path, misfit: Misfit, keys: Marks, values: Marks) -> OptionError:
    """An error with the line and column of what it is of."""
    at = misfit.path
    marks = {**values, **keys} if misfit.of_key else {**keys, **values}
    while at not in marks and at:
        at = at[:-1]
    place = "".join(f", {w} {n}" for w, n in zip(("line", "column"), marks.get(at, ()), strict=False))
    return OptionError(f"{path}{place}: {misfit}")


# -------------------------------------------------------------------------- paths


def _from(directory: Path, plan: Plan) -> Plan:
    """The plan with paths that are relative to a directory."""

    def moved(part: Any) -> Any:
        place = directory / part.path
        names_module = ":" in part.path and not place.exists()
        return part if names_module else dataclasses.replace(part, path=str(place))

    return dataclasses.replace(
        plan,
        models=tuple(map(moved, plan.models)),
        base=None if plan.base is None else moved(plan.base),
        data=tuple(map(moved, plan.data)),
        output=None if plan.output is None else moved(plan.output),
    )

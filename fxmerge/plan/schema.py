"""The JSON schema of a plan, by which editors complete and check YAML files."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping
from typing import Any, Literal

from fxmerge.plan.parts import VERSION, Plan
from fxmerge.plan.reading import KIND, fields_of, options_of
from fxmerge.plan.text import HEADER
from fxmerge.recipe import VERSION as RECIPE_VERSION
from fxmerge.recipe import Recipe

TYPES: dict[Any, str] = {str: "string", bool: "boolean", int: "integer", float: "number", type(None): "null"}

Definitions = dict[str, dict[str, Any]]


def schema() -> dict[str, Any]:
    """The schema of a plan, in the draft 2020-12 of JSON Schema.

    Example:
        >>> found = schema()
        >>> found["required"], found["properties"]["verb"], found["$defs"]["Align"]["properties"]["reference"]
        (['models'], {'enum': ['merge', 'align', 'fold']}, {'anyOf': [{'type': 'integer'}, {'type': 'null'}]})
    """
    definitions: Definitions = {}
    _define(Plan, definitions)
    found = definitions.pop(Plan.__name__)
    properties = {HEADER: {"const": VERSION}, **found["properties"]}
    for name in ("data", "input"):  # One needs no list.
        properties[name] = {"anyOf": [properties[name], properties[name]["items"]]}
    head = {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "fxmerge"}
    return {**head, **found, "properties": properties, "$defs": definitions}


def _define(kind: type, definitions: Definitions) -> None:
    """Adds the schema of a dataclass to the definitions, and those of its parts."""
    if kind.__name__ in definitions:
        return
    definitions[kind.__name__] = {}
    properties = {name: _schema(hint, definitions) for name, hint in fields_of(kind).items()}
    if kind is Recipe:
        properties = {"version": {"const": RECIPE_VERSION}, **properties}
    elif KIND not in properties:
        properties = {KIND: {"const": kind.__name__}, **properties}
    missing = dataclasses.MISSING
    needed = [f.name for f in dataclasses.fields(kind) if f.default is missing and f.default_factory is missing]
    found = {"type": "object", "properties": properties, "additionalProperties": False}
    definitions[kind.__name__] = found | ({"required": needed} if needed else {})


def _schema(hint: Any, definitions: Definitions) -> dict[str, Any]:
    options = options_of(hint)
    mappings = [one for one in options if dataclasses.is_dataclass(one) or _is_mapping(one)]
    found: list[dict[str, Any]] = []
    for option in options:
        if dataclasses.is_dataclass(option) and isinstance(option, type):
            _define(option, definitions)
            named = {"required": [KIND]} if len(mappings) > 1 else {}
            found.append({"$ref": f"#/$defs/{option.__name__}", **named})
        elif typing.get_origin(option) is Literal:
            found.append({"enum": list(typing.get_args(option))})
        elif typing.get_origin(option) is tuple:
            found.append({"type": "array", "items": _schema(typing.get_args(option)[0], definitions)})
        elif _is_mapping(option):
            found.append({"type": "object", "additionalProperties": _schema(typing.get_args(option)[1], definitions)})
        else:
            found.append({"type": TYPES[option]} if option in TYPES else {})
    return found[0] if len(found) == 1 else {"anyOf": found}


def _is_mapping(option: Any) -> bool:
    origin = typing.get_origin(option)
    return isinstance(origin, type) and issubclass(origin, Mapping)

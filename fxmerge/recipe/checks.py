"""What fields of a recipe may be, told in one sentence."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from fxmerge.errors import OptionError


def wrong(part: object, name: str, wanted: str) -> OptionError:
    error = OptionError(f"{type(part).__name__}.{name} is {getattr(part, name)!r}; it must be {wanted}.")
    error.field = name
    return error


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def check_share(part: object, name: str) -> None:
    value = getattr(part, name)
    if not is_number(value) or not 0 <= value <= 1:
        raise wrong(part, name, "a number from 0 to 1")


def check_alpha(part: Any) -> None:
    numbers = part.alpha.values() if isinstance(part.alpha, Mapping) else [part.alpha]
    if not all(is_number(value) and 0 <= value <= 1 for value in numbers):
        raise wrong(
            part,
            "alpha",
            "a number from 0 (activations only) to 1 (weights only), or such numbers by the names of classes",
        )


def check_width(part: Any) -> None:
    numbers = part.width.values() if isinstance(part.width, Mapping) else [part.width]
    if not all(is_number(value) and value > 0 for value in numbers):
        raise wrong(
            part,
            "width",
            "a positive number, such numbers by the names or patterns of classes, or Budget(parameters=...)",
        )


def check_multiple(part: Any) -> None:
    whole = isinstance(part.multiple_of, int) and not isinstance(part.multiple_of, bool)
    if not whole or part.multiple_of < 1:
        raise wrong(part, "multiple_of", "a whole number from 1 on")


def check_word(part: object, name: str, words: Sequence[object]) -> None:
    value = getattr(part, name)
    if not any(type(value) is type(word) and value == word for word in words):
        raise wrong(part, name, " or ".join(map(repr, words)))


def check_scale(part: Any) -> None:
    if not is_number(part.scale):
        raise wrong(part, "scale", "a finite number")


def check_reference(part: Any) -> None:
    value = part.reference
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 0):
        raise wrong(part, "reference", "the number of a model, from 0, or None")


def check_weights(part: Any) -> None:
    if part.weights is None:
        return
    try:
        values = tuple(part.weights)
    except TypeError:
        values = ()
    if not values or not all(is_number(w) and w >= 0 for w in values) or not sum(values) > 0:
        raise wrong(part, "weights", "one number per model, none negative and at least one positive, or None")
    object.__setattr__(part, "weights", values)

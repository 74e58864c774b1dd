"""How models are merged: a frozen dataclass of parts, to plain data and back."""

from __future__ import annotations

import dataclasses
import difflib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args

from torch import nn

from fxmerge.errors import OptionError
from fxmerge.recipe.checks import check_word, is_number, wrong
from fxmerge.recipe.parts import (
    Align,
    Average,
    Budget,
    Combine,
    Fit,
    LeastSquares,
    Match,
    Readout,
    Repair,
    TaskArithmetic,
    Ties,
    Zip,
)

VERSION = 1

AUTO: Literal["auto"] = "auto"

NOTHING: Literal["nothing"] = "nothing"
"""What networks share that stand side by side."""

Targets = Literal["mean", "standardized"]

Outputs = Literal["tuple", "dict"]

PARTS: dict[str, tuple[type, ...]] = {
    "match": (Zip, Align),
    "combine": (Average, TaskArithmetic, Ties),
    "fit": (LeastSquares, Readout, Repair),
}


ERRORS = (LeastSquares, Readout)
"""The fits that measure how far the result is from the models."""


@dataclass(frozen=True)
class Recipe:
    """How models are merged.

    Attributes:
        match: which units belong together: `Zip` or `Align`. "auto" is `Zip()`, for task vectors `Align()`. None is for
            models that were fine-tuned from one: units with equal numbers belong together. Without data, a model then
            counts in running statistics by how many batches it has seen (arXiv 2407.13771).
        combine: what is made of the parameters: `Average`, or with a base `TaskArithmetic` or `Ties`. "auto" is
            `Average()`, with a base `TaskArithmetic()`.
        fit: what is fitted to data afterwards: `LeastSquares`, `Readout` or `Repair`. None fits nothing. "auto" is
            `LeastSquares()` where there are data and no base, else None.
        targets: what last layers learn: the weighted "mean" of the models' outputs; or, for models of different tasks
            whose outputs are compared with each other, that of "standardized" ones. Each output is then shifted to mean
            zero over all data, and all outputs of a model are scaled to one deviation.
        share: what the networks are to have once, as a trunk; what comes after it is a head of each network's own.
            "auto" is what they have in common, from the inputs on; if they are equal all through, everything. "trunk"
            is that without the last layers, even if these are equal in shape. "nothing" is no layer: the networks stand
            side by side in one graph, each as it is, and the recipe may not say how to match, combine or fit. The name
            of a module or node is all up to it. A number between 0 and 1 is all up to the last place that no more than
            that share of the first network's parameters comes before. A `Budget` finds the place.
        outputs: with heads apart, the outputs of all networks: a "tuple" in their order, or a "dict" by `names`.
        names: of the heads, one for each network; None numbers them "0", "1", ...
        free: names of outputs along which units may move, as in `find_symmetry`.

    Raises:
        OptionError: if a field is no such part, or the parts do not go together.

    Example:
        >>> recipe = Recipe(match=Align(alpha=1), fit=None)
        >>> Recipe.from_json(recipe.to_json()) == recipe
        True
    """

    match: Match | Literal["auto"] | None = AUTO
    combine: Combine | Literal["auto"] = AUTO
    fit: Fit | Literal["auto"] | None = AUTO
    targets: Targets = "mean"
    share: str | float | Budget = AUTO
    outputs: Outputs = "tuple"
    names: tuple[str, ...] | None = None
    free: str | tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name, kinds in PARTS.items():
            value = getattr(self, name)
            may_be_none = name in ("match", "fit")
            if not isinstance(value, kinds) and value != AUTO and not (may_be_none and value is None):
                listed = ", ".join(f"{kind.__name__}(...)" for kind in kinds)
                none = ", None" if may_be_none else ""
                raise wrong(self, name, f"{listed}{none} or {AUTO!r}")
        check_word(self, "targets", get_args(Targets))
        check_word(self, "outputs", get_args(Outputs))
        self._check_heads()
        if isinstance(self.match, Zip) and self.match.width != 1 and isinstance(self.fit, Repair):
            raise OptionError(
                "Recipe.fit is Repair, which compares units one by one, and Zip.width is not 1: pass LeastSquares(), "
                "Readout() or None."
            )
        if isinstance(self.free, Sequence) and not isinstance(self.free, str):
            object.__setattr__(self, "free", tuple(self.free))
        names = (self.free,) if isinstance(self.free, str) else self.free
        if not isinstance(names, tuple) or not all(isinstance(name, str) for name in names):
            raise wrong(self, "free", "the name of an output, or a sequence of names")
        if self.share == NOTHING:
            self._check_nothing()
        if isinstance(self.combine, TaskArithmetic | Ties):
            self._check_task_vectors()

    def _check_heads(self) -> None:
        share: Any = self.share
        named = isinstance(share, Budget) or (isinstance(share, str) and share)
        if not named and not (is_number(share) and 0 < share < 1):
            raise wrong(
                self, "share", "'auto', 'trunk', the name of a module or node, a number between 0 and 1 or Budget(...)"
            )
        if self.names is not None:
            if isinstance(self.names, Sequence) and not isinstance(self.names, str):
                object.__setattr__(self, "names", tuple(self.names))
            words = self.names if isinstance(self.names, tuple) else ()
            good = all(isinstance(word, str) and re.fullmatch(r"\w+", word) for word in words)
            if not words or not good or len(set(words)) < len(words) or any(hasattr(nn.Module(), w) for w in words):
                raise wrong(
                    self,
                    "names",
                    "one name for each network, all different, of letters, digits and underscores, and none that a "
                    "torch module uses itself, such as 'train'; or None",
                )
        if self.outputs == "dict" and self.names is None:
            raise OptionError("Recipe.outputs is 'dict', which needs names: pass names=('first', 'second').")

    def _check_nothing(self) -> None:
        """What is shared by no network is not matched, combined or fitted."""
        done: dict[str, tuple[str, tuple[object, ...]]] = {
            "match": ("matched", (AUTO, None, Zip())),
            "combine": ("combined", (AUTO, Average())),
            "fit": ("fitted", (AUTO, None)),
            "targets": ("fitted", ("mean",)),
        }
        for name, (what, may_be) in done.items():
            if getattr(self, name) not in may_be:
                error = OptionError(
                    "Recipe.share is 'nothing', so that the networks stand side by side, each as it is, and nothing is "
                    f"{what}: leave Recipe.{name} out, or let the networks share a trunk."
                )
                error.field = name
                raise error

    def _check_task_vectors(self) -> None:
        kind = type(self.combine).__name__
        if isinstance(self.match, Zip):
            raise OptionError(f"Recipe.match is Zip, but {kind} needs models aligned with their base: pass Align(...).")
        if self.fit is not None and self.fit != AUTO:
            raise OptionError(f"Recipe.fit is {type(self.fit).__name__}, but a fit knows no base of {kind}: pass None.")
        if self.targets != "mean":
            raise OptionError(f"Recipe.targets is {self.targets!r}, but {kind} has a base: pass 'mean'.")

    def settled(self, *, data: bool, base: bool) -> Recipe:
        """The recipe without "auto".

        Arguments:
            data: whether there are calibration data.
            base: whether there is a base.

        Raises:
            OptionError: if the recipe needs what is not there.

        Example:
            >>> Recipe().settled(data=False, base=False).fit is None
            True
        """
        vectors = isinstance(self.combine, TaskArithmetic | Ties)
        if base and not vectors and self.combine != AUTO:
            raise OptionError(
                "A base is given, and Recipe.combine is Average, which takes none: "
                "pass TaskArithmetic(...) or Ties(...)."
            )
        if vectors and not base:
            raise OptionError(
                f"Recipe.combine is {type(self.combine).__name__}, which needs a base: pass base=, the model that the "
                "others were fine-tuned from."
            )
        combine = (TaskArithmetic() if base else Average()) if self.combine == AUTO else self.combine
        match = (Align() if base else Zip()) if self.match == AUTO else self.match
        fits = data and not base and self.share != NOTHING
        fit = (LeastSquares() if fits else None) if self.fit == AUTO else self.fit
        found = dataclasses.replace(self, match=match, combine=combine, fit=fit)
        if isinstance(self.share, Budget) and self.share.distance is not None and not isinstance(fit, ERRORS):
            raise OptionError(
                "Recipe.share is a Budget with a distance, which is measured while layers are fitted: pass a loader, "
                "and LeastSquares() or Readout()."
            )
        if fit is not None and not data:
            raise OptionError(f"Recipe.fit is {type(fit).__name__}, which needs data: pass a loader, or fit=None.")
        if found.targets == "standardized" and not data:
            raise OptionError("Recipe.targets is 'standardized', which needs data: pass a loader, or targets='mean'.")
        return found

    # ---------------------------------------------------------------------- to data and back

    def to_dict(self) -> dict[str, Any]:
        """The recipe as plain data, with its version and without fields that have their default.

        Example:
            >>> Recipe(match=Align(alpha=0.25)).to_dict()
            {'version': 1, 'match': {'kind': 'Align', 'alpha': 0.25}}
        """
        found: dict[str, Any] = {"version": VERSION}
        for field in fields(self):
            value = getattr(self, field.name)
            if value != field.default:
                found[field.name] = _listed(value)
        return found

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> Recipe:
        """Reads what `to_dict` gave.

        Raises:
            OptionError: if the version, a field or a value is none of a recipe; it names the path to the field, and the
                nearest name that is valid.

        Example:
            >>> Recipe.from_dict({"version": 1, "match": {"kind": "Align", "alhpa": 1}})
            Traceback (most recent call last):
            fxmerge.errors.OptionError: recipe.match has no field 'alhpa'; did you mean 'alpha'?
        """
        if not isinstance(data, Mapping):
            raise OptionError(f"A recipe is a mapping of fields, not a {type(data).__name__}.")
        if data.get("version", VERSION) != VERSION:
            raise OptionError(f"recipe.version is {data['version']!r}; this fxmerge reads version {VERSION}.")
        given = {name: value for name, value in data.items() if name != "version"}
        _check_names("recipe", given, [field.name for field in fields(Recipe)])
        for name, kinds in (*PARTS.items(), ("share", (Budget,))):
            if isinstance(given.get(name), Mapping):
                given[name] = _part(f"recipe.{name}", given[name], kinds)
        for name in ("free", "names"):
            if isinstance(given.get(name), list):
                given[name] = tuple(given[name])
        return Recipe(**given)

    def to_json(self, path: str | Path | None = None) -> str:
        """The recipe as a JSON text; also written to `path` if one is given."""
        return _written(json.dumps(self.to_dict(), indent=2) + "\n", path)

    @staticmethod
    def from_json(source: str | Path) -> Recipe:
        """Reads what `to_json` gave: a text, or a file.

        Raises:
            OptionError: as `from_dict`; and if it is no JSON.
        """
        try:
            return Recipe.from_dict(json.loads(_read(source)))
        except json.JSONDecodeError as error:
            raise OptionError(f"The recipe is no JSON: {error}.") from error

    def to_yaml(self, path: str | Path | None = None) -> str:
        """The recipe as a YAML text; also written to `path` if one is given. Needs PyYAML."""
        text: str = _yaml().safe_dump(self.to_dict(), sort_keys=False)
        return _written(text, path)

    @staticmethod
    def from_yaml(source: str | Path) -> Recipe:
        """Reads what `to_yaml` gave: a text, or a file. Needs PyYAML.

        Raises:
            OptionError: as `from_dict`; and if it is no YAML.
        """
        yaml = _yaml()
        try:
            return Recipe.from_dict(yaml.safe_load(_read(source)))
        except yaml.YAMLError as error:
            raise OptionError(f"The recipe is no YAML: {error}.") from error


def _listed(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return _plain(value)
    return list(value) if isinstance(value, tuple) else dict(value) if isinstance(value, Mapping) else value


def _plain(part: Any) -> dict[str, Any]:
    own = {f.name: getattr(part, f.name) for f in fields(part)}
    given = {name: _listed(v) for (name, v), f in zip(own.items(), fields(part), strict=True) if v != f.default}
    return {"kind": type(part).__name__, **given}


def _part(path: str, data: Mapping[str, Any], kinds: Sequence[type]) -> Any:
    names = [kind.__name__ for kind in kinds]
    kind = data.get("kind")
    if kind not in names:
        raise OptionError(f"{path}.kind is {kind!r}; it must be {_or(names)}.{_nearest(kind, names)}")
    chosen = kinds[names.index(kind)]
    given = {name: value for name, value in data.items() if name != "kind"}
    _check_names(path, given, [field.name for field in fields(chosen)])
    if isinstance(given.get("weights"), list):
        given["weights"] = tuple(given["weights"])
    if chosen is Zip and isinstance(given.get("width"), Mapping) and "kind" in given["width"]:
        given["width"] = _part(f"{path}.width", given["width"], (Budget,))
    try:
        return chosen(**given)
    except OptionError as error:
        raise OptionError(f"{path}: {error}") from error


def _check_names(path: str, given: Mapping[str, Any], known: Sequence[str]) -> None:
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"its fields are {', '.join(known)}."
            raise OptionError(f"{path} has no field {name!r}; {hint}")


def _nearest(name: Any, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(str(name), known, n=1)
    return f" Did you mean {near[0]!r}?" if near else ""


def _or(names: Sequence[str]) -> str:
    return " or ".join([", ".join(map(repr, names[:-1])), repr(names[-1])])


def _written(text: str, path: str | Path | None) -> str:
    if path is not None:
        Path(path).write_text(text)
    return text


def _read(source: str | Path) -> str:
    """A text, or that of a file: a text has several lines or is a mapping in braces."""
    if isinstance(source, str) and ("\n" in source or source.lstrip().startswith("{")):
        return source
    try:
        return Path(source).read_text()
    except OSError as error:
        raise OptionError(f"The recipe {str(source)!r} cannot be read: {error.strerror}.") from error


def _yaml() -> Any:
    try:
        import yaml
    except ImportError as error:
        raise OptionError("Recipes in YAML need PyYAML: pip install 'fxmerge[yaml]'; or write JSON.") from error
    return yaml

"""How models are merged, and how the merge is run: frozen dataclasses that check themselves.

A `Recipe` says what the result is. A `Run` says how it is computed, and changes the result by rounding at most.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

import torch

from fxmerge.errors import OptionError

VERSION = 1

AUTO: Literal["auto"] = "auto"

Alpha = float | Mapping[str, float]
Similarity = Literal["pearson", "cosine"]
Outputs = Literal["mean", "standardized"]

DEFAULT_ALPHA = 0.5


# -------------------------------------------------------------------------- matching


@dataclass(frozen=True)
class Align:
    """Matches units one to one.

    The similarity is alpha times the cosine of the units' weights, plus (1 - alpha) times the similarity of their
    activations (MuDSC, arXiv 2403.01753, equation 5). With `alpha=1` this is the weight matching of Git Re-Basin (arXiv
    2209.04836). Without data, weights alone count.

    Attributes:
        alpha: weight of the weight-space similarity, from 0 (activations only) to 1 (weights only). A mapping gives it
            for classes by name, as in `Symmetry.names`; other classes have 0.5.
        similarity: how activations of units are compared: by "pearson" correlation or by "cosine".
        reference: the number of the model, from 0, to whose units all others are matched. None is the first of two
            models; three or more are all matched with each other (C2M3, arXiv 2405.17897).

    Raises:
        OptionError: if a field is out of range.

    Example:
        >>> Align(alpha=1)
        Align(alpha=1, similarity='pearson', reference=None)
    """

    alpha: Alpha = DEFAULT_ALPHA
    similarity: Similarity = "pearson"
    reference: int | None = None

    def __post_init__(self) -> None:
        _check_alpha(self)
        _check_word(self, "similarity", get_args(Similarity))
        _check_reference(self)


@dataclass(frozen=True)
class Zip:
    """Aligns units, then merges the most similar ones, also units of one and the same model.

    This is the greedy merge of ZipIt! (arXiv 2305.03053) with the similarity and the group zip of MuDSC (arXiv
    2403.01753, sections 4.2 and 4.3).

    Attributes:
        alpha: as for `Align`.
        budget: in [0, 1], the share of the merges that may be of two units of one model.
        damping: in [0, 1], what the similarities of a merged unit are multiplied with, so that it is less likely to be
            merged again.
        similarity: as for `Align`.
        reference: as for `Align`.

    Raises:
        OptionError: if a field is out of range.

    Example:
        >>> Zip(budget=0.5)
        Zip(alpha=0.5, budget=0.5, damping=0.5, similarity='pearson', reference=None)
    """

    alpha: Alpha = DEFAULT_ALPHA
    budget: float = 1.0
    damping: float = 0.5
    similarity: Similarity = "pearson"
    reference: int | None = None

    def __post_init__(self) -> None:
        _check_alpha(self)
        _check_share(self, "budget")
        _check_share(self, "damping")
        _check_word(self, "similarity", get_args(Similarity))
        _check_reference(self)


# -------------------------------------------------------------------------- combining


@dataclass(frozen=True)
class Average:
    """Averages the parameters of matched units.

    Attributes:
        weights: how much each model counts, in the average and in what layers are fitted to; normalized to sum to one.
            None: all alike.

    Raises:
        OptionError: if a weight is negative or not finite, or all are zero.
    """

    weights: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        _check_weights(self)


@dataclass(frozen=True)
class TaskArithmetic:
    """Adds the task vectors to the base (Ilharco et al., arXiv 2212.04089).

    Attributes:
        scale: what the sum of the task vectors is multiplied with. 0.4 is what the TIES paper takes for this
            method where no data is left to choose it on (arXiv 2306.01708, appendix C.4). A negative one makes
            the base forget.
        weights: how much each model counts; None: all alike.

    Raises:
        OptionError: if `scale` is not a finite number, or the weights are out of range.

    Example:
        >>> TaskArithmetic()
        TaskArithmetic(scale=0.4, weights=None)
    """

    scale: float = 0.4
    weights: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        _check_scale(self)
        _check_weights(self)


@dataclass(frozen=True)
class Ties:
    """Adds what is large in the task vectors and agrees in sign to the base (TIES-Merging, arXiv 2306.01708).

    Attributes:
        density: the share of its entries that a task vector keeps, in (0, 1]: those of largest magnitude.
        scale: what the combined task vector is multiplied with.
        weights: how much each model counts; None: all alike.

    Raises:
        OptionError: if a field is out of range.

    Example:
        >>> Ties(density=0.5)
        Ties(density=0.5, scale=1.0, weights=None)
    """

    density: float = 0.2
    scale: float = 1.0
    weights: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if not _is_number(self.density) or not 0 < self.density <= 1:
            raise _wrong(self, "density", "a number above 0, up to 1 (keep every entry)")
        _check_scale(self)
        _check_weights(self)


# -------------------------------------------------------------------------- fitting

OWN = 0.5
"""Where every model has data of its own, the share of its own outputs in what is to be learnt on these data."""


@dataclass(frozen=True)
class LeastSquares:
    """Fits every layer, in closed form and in graph order, to what the models compute there (a ridge regression).

    Attributes:
        own: with `loaders`, the share of a model's own output in the targets on its own data, from 0 to 1. The rest is
            the mean of all models' outputs.

    Raises:
        OptionError: if `own` is out of range.
    """

    own: float = OWN

    def __post_init__(self) -> None:
        _check_share(self, "own")


@dataclass(frozen=True)
class Readout:
    """Fits only the layers that no other layer comes after.

    Attributes:
        own: as for `LeastSquares`.

    Raises:
        OptionError: if `own` is out of range.
    """

    own: float = OWN

    def __post_init__(self) -> None:
        _check_share(self, "own")


@dataclass(frozen=True)
class Repair:
    """Gives every unit the mean and the deviation of the models' units (REPAIR, arXiv 2211.08403); fits nothing.

    Attributes:
        own: as for `LeastSquares`.

    Raises:
        OptionError: if `own` is out of range.
    """

    own: float = OWN

    def __post_init__(self) -> None:
        _check_share(self, "own")


# -------------------------------------------------------------------------- the recipe

Match = Zip | Align
Combine = Average | TaskArithmetic | Ties
Fit = LeastSquares | Readout | Repair

PARTS: dict[str, tuple[type, ...]] = {
    "match": (Zip, Align),
    "combine": (Average, TaskArithmetic, Ties),
    "fit": (LeastSquares, Readout, Repair),
}


@dataclass(frozen=True)
class Recipe:
    """How models are merged.

    Attributes:
        match: which units belong together: `Zip` or `Align`. "auto" is `Zip()`, for task vectors `Align()`.
        combine: what is made of the parameters: `Average`, or with a base `TaskArithmetic` or `Ties`. "auto" is
            `Average()`, with a base `TaskArithmetic()`.
        fit: what is fitted to data afterwards: `LeastSquares`, `Readout` or `Repair`. None fits nothing. "auto" is
            `LeastSquares()` where there are data and no base, else None.
        outputs: what last layers learn: the weighted "mean" of the models' outputs; or, for models of different tasks
            whose outputs are compared with each other, that of "standardized" ones. Each output is then shifted to mean
            zero over all data, and all outputs of a model are scaled to one deviation.
        free: names of outputs along which units may move, as in `find_symmetry`.

    Raises:
        OptionError: if a field is no such part, or the parts do not go together.

    Example:
        >>> recipe = Recipe(match=Align(alpha=1), fit=None)
        >>> Recipe.from_json(recipe.to_json()) == recipe
        True
    """

    match: Match | Literal["auto"] = AUTO
    combine: Combine | Literal["auto"] = AUTO
    fit: Fit | Literal["auto"] | None = AUTO
    outputs: Outputs = "mean"
    free: str | tuple[str, ...] = ()

    version: ClassVar[int] = VERSION

    def __post_init__(self) -> None:
        for name, kinds in PARTS.items():
            value = getattr(self, name)
            if not isinstance(value, kinds) and value != AUTO and not (name == "fit" and value is None):
                listed = ", ".join(f"{kind.__name__}(...)" for kind in kinds)
                none = ", None" if name == "fit" else ""
                raise _wrong(self, name, f"{listed}{none} or {AUTO!r}")
        _check_word(self, "outputs", get_args(Outputs))
        if isinstance(self.free, Sequence) and not isinstance(self.free, str):
            object.__setattr__(self, "free", tuple(self.free))
        names = (self.free,) if isinstance(self.free, str) else self.free
        if not isinstance(names, tuple) or not all(isinstance(name, str) for name in names):
            raise _wrong(self, "free", "the name of an output, or a sequence of names")
        if isinstance(self.combine, TaskArithmetic | Ties):
            self._check_task_vectors()

    def _check_task_vectors(self) -> None:
        kind = type(self.combine).__name__
        if isinstance(self.match, Zip):
            raise OptionError(f"Recipe.match is Zip, but {kind} needs models aligned with their base: pass Align(...).")
        if self.fit is not None and self.fit != AUTO:
            raise OptionError(f"Recipe.fit is {type(self.fit).__name__}, but a fit knows no base of {kind}: pass None.")
        if self.outputs != "mean":
            raise OptionError(f"Recipe.outputs is {self.outputs!r}, but {kind} has a base: pass 'mean'.")

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
        fit = (LeastSquares() if data and not base else None) if self.fit == AUTO else self.fit
        found = dataclasses.replace(self, match=match, combine=combine, fit=fit)
        if fit is not None and not data:
            raise OptionError(f"Recipe.fit is {type(fit).__name__}, which needs data: pass a loader, or fit=None.")
        if found.outputs == "standardized" and not data:
            raise OptionError("Recipe.outputs is 'standardized', which needs data: pass a loader, or outputs='mean'.")
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
                found[field.name] = _plain(value) if dataclasses.is_dataclass(value) else _listed(value)
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
        for name, kinds in PARTS.items():
            if isinstance(given.get(name), Mapping):
                given[name] = _part(f"recipe.{name}", given[name], kinds)
        if isinstance(given.get("free"), list):
            given["free"] = tuple(given["free"])
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


@dataclass(frozen=True)
class Run:
    """How a merge is computed. Nothing here changes the result, but for rounding and the random order of searches.

    Attributes:
        device: where to work, and where the result is. None is where the base or else the first model is.
        memory: GiB of activations that fitting keeps in memory; the rest goes to a temporary folder.
        seed: seed of the order of searches, and of the rows that fitting takes.
        progress: whether to show progress bars; None shows them on a terminal.
        verify: whether to prove the symmetry on the first model (or the base), in float64, before it is used.

    Raises:
        OptionError: if a field is out of range.

    Example:
        >>> Run(memory=0.5)
        Run(device=None, memory=0.5, seed=0, progress=None, verify=True)
    """

    device: str | torch.device | None = None
    memory: float = 2.0
    seed: int = 0
    progress: bool | None = None
    verify: bool = True

    def __post_init__(self) -> None:
        if not _is_number(self.memory) or not self.memory > 0:
            raise _wrong(self, "memory", "a positive number of GiB")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or self.seed < 0:
            raise _wrong(self, "seed", "a whole number, 0 or more")
        if self.progress not in (None, True, False):
            raise _wrong(self, "progress", "True, False or None")
        if self.verify not in (True, False):
            raise _wrong(self, "verify", "True or False")
        try:
            None if self.device is None else torch.device(self.device)
        except (RuntimeError, TypeError) as error:
            raise _wrong(self, "device", "a device of torch, such as 'cpu' or 'cuda:0', or None") from error


# -------------------------------------------------------------------------- checks


def _wrong(part: object, name: str, wanted: str) -> OptionError:
    return OptionError(f"{type(part).__name__}.{name} is {getattr(part, name)!r}; it must be {wanted}.")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _check_share(part: object, name: str) -> None:
    value = getattr(part, name)
    if not _is_number(value) or not 0 <= value <= 1:
        raise _wrong(part, name, "a number from 0 to 1")


def _check_alpha(part: Align | Zip) -> None:
    numbers = part.alpha.values() if isinstance(part.alpha, Mapping) else [part.alpha]
    if not all(_is_number(value) and 0 <= value <= 1 for value in numbers):
        raise _wrong(
            part,
            "alpha",
            "a number from 0 (activations only) to 1 (weights only), or such numbers by the names of classes",
        )


def _check_word(part: object, name: str, words: Sequence[str]) -> None:
    if getattr(part, name) not in words:
        raise _wrong(part, name, " or ".join(map(repr, words)))


def _check_scale(part: TaskArithmetic | Ties) -> None:
    if not _is_number(part.scale):
        raise _wrong(part, "scale", "a finite number")


def _check_reference(part: Align | Zip) -> None:
    value = part.reference
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 0):
        raise _wrong(part, "reference", "the number of a model, from 0, or None")


def _check_weights(part: Average | TaskArithmetic | Ties) -> None:
    if part.weights is None:
        return
    try:
        values = tuple(part.weights)
    except TypeError:
        values = ()
    if not values or not all(_is_number(w) and w >= 0 for w in values) or not sum(values) > 0:
        raise _wrong(part, "weights", "one number per model, none negative and at least one positive, or None")
    object.__setattr__(part, "weights", values)


# -------------------------------------------------------------------------- reading and writing


def _listed(value: Any) -> Any:
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

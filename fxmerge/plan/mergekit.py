"""Plans from the YAML files of mergekit (github.com/arcee-ai/mergekit). What cannot be expressed is refused by name."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from fxmerge import io
from fxmerge.errors import CheckpointError
from fxmerge.networks.building import HF
from fxmerge.plan import reading
from fxmerge.plan.parts import ModelFile, Plan
from fxmerge.plan.reading import Misfit
from fxmerge.recipe import Average, Recipe, TaskArithmetic, Ties

logger = logging.getLogger(__name__)

METHOD = "merge_method"
"""The key by which such a file is known."""

PARAMETERS = {
    "linear": ("weight", "normalize"),
    "task_arithmetic": ("weight", "lambda", "normalize", "int8_mask"),
    "ties": ("weight", "density", "lambda", "normalize", "int8_mask"),
}
"""The methods that fxmerge has, and their parameters. `int8_mask` saves memory there and changes no result."""

NEAREST = {
    "slerp": "linear, with the weights 1 - t and t",
    "nuslerp": "linear, or with a base task_arithmetic, with the same weights",
    "multislerp": "linear, or with a base task_arithmetic, with the same weights",
    "karcher": "linear",
    "model_stock": "task_arithmetic, with a lambda of your choice",
    "nearswap": "linear",
    "arcee_fusion": "linear",
    "dare_linear": "task_arithmetic, which drops no entries",
    "dare_ties": "ties, which keeps the largest entries and not random ones",
    "della": "ties",
    "della_linear": "task_arithmetic",
    "breadcrumbs": "task_arithmetic",
    "breadcrumbs_ties": "ties",
    "sce": "ties",
    "ram": "task_arithmetic",
    "ramplus_tl": "task_arithmetic",
    "passthrough": "linear: fxmerge merges whole networks, and stacks no layers",
}
"""The methods that fxmerge does not have, and what is nearest to each."""

REFUSED = {
    "modules": "fxmerge merges whole networks: write models",
    "tokenizer": "fxmerge copies the tokenizer of the first model: leave it out",
    "chat_template": "fxmerge copies that of the first model: leave it out, and edit the result",
}
"""Other keys that cannot be expressed, and what to do."""

KEYS = ("models", "slices", METHOD, "base_model", "parameters", "dtype", "out_dtype", "tokenizer_source", *REFUSED)

DTYPES = ("bfloat16", "float16", "float32")

LAYERS = ("num_hidden_layers", "n_layer", "num_layers")
"""Under what a configuration tells how many layers there are."""


@dataclass(frozen=True)
class _Input:
    """A model with the values that are its own, and where they stand."""

    model: ModelFile
    own: Mapping[str, Any]
    at: reading.Path


def plan_of(data: Mapping[str, Any]) -> Plan:
    """The plan of a file of mergekit: units with equal numbers are merged and nothing is fitted, as there.

    Arguments:
        data: what the file holds. Relative paths are relative to the working directory, as there.

    Raises:
        Misfit: if something in it cannot be expressed.

    Example:
        >>> import tempfile
        >>> folders = [tempfile.mkdtemp() for _ in range(2)]
        >>> models = [{"model": folders[0], "parameters": {"weight": 2}}, {"model": folders[1]}]
        >>> plan = plan_of({"merge_method": "linear", "models": models, "parameters": {"weight": 1}})
        >>> plan.recipe.match, plan.recipe.combine, plan.recipe.fit
        (None, Average(weights=(2.0, 1.0)), None)
    """
    for key in data:
        if key not in KEYS:
            near = get_close_matches(str(key), KEYS, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"mergekit has {', '.join(KEYS)}."
            raise Misfit((key,), f"mergekit has no key {key!r}; {hint}", of_key=True)
        if key in REFUSED:
            raise Misfit((key,), f"{key!r} cannot be expressed: {REFUSED[key]}.", of_key=True)
    method = _method(data[METHOD])
    shared = _mapping(data.get("parameters"), ("parameters",))
    inputs = _inputs(data)
    base = None if data.get("base_model") is None else _model(data["base_model"], ("base_model",))
    _check_base(method, base, inputs)
    inputs = [one for one in inputs if base is None or method == "linear" or one.model != base]
    for own, at in [(shared, ("parameters",)), *((one.own, (*one.at, "parameters")) for one in inputs)]:
        _check_names(method, own, at)
    _check_dtype(data, inputs)
    _check_tokenizer(data, inputs)
    weights = [_weight(one, shared) for one in inputs]
    combine = _average(weights, shared) if method == "linear" else _vectors(method, inputs, weights, shared)
    return Plan(
        tuple(one.model for one in inputs),
        HF,
        base=None if method == "linear" else base,
        recipe=Recipe(match=None, combine=combine, fit=None),
    )


def _method(name: Any) -> str:
    if name in PARAMETERS:
        return str(name)
    known = ", ".join(PARAMETERS)
    if name in NEAREST:
        nearest = f"The nearest is {NEAREST[name]}."
        raise Misfit((METHOD,), f"{METHOD} is {name!r}, which fxmerge does not have; it has {known}. {nearest}")
    near = get_close_matches(str(name), [*PARAMETERS, *NEAREST], n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise Misfit((METHOD,), f"{METHOD} is {name!r}; fxmerge has {known}.{hint}")


# -------------------------------------------------------------------------- models


def _inputs(data: Mapping[str, Any]) -> list[_Input]:
    """The models, which may stand in one slice of all of their layers."""
    if ("models" in data) == ("slices" in data):
        raise Misfit((), "give models, or slices.")
    if "models" in data:
        return [_input(one, ("models", i)) for i, one in enumerate(_list(data["models"], ("models",)))]
    slices = _list(data["slices"], ("slices",))
    first = _mapping(slices[0], ("slices", 0))
    at = ("slices", 0, "sources")
    inputs = [_input(one, (*at, i)) for i, one in enumerate(_list(first.get("sources"), at))]
    ranges = [one.get("layer_range") for one in first["sources"]]
    if len(slices) > 1 or any(own != [0, _layers(one.model)] for own, one in zip(ranges, inputs, strict=True)):
        raise Misfit(
            ("slices",),
            "slices of some layers cannot be expressed: fxmerge merges whole networks. The nearest is models, with the "
            "same ones.",
        )
    for key in set(first) - {"sources"}:
        raise Misfit(
            ("slices", 0, key), f"{key!r} of a slice cannot be expressed: write it under the models.", of_key=True
        )
    return inputs


def _input(one: Any, at: reading.Path) -> _Input:
    given = _mapping(one, at)
    for key in given:
        if key not in ("model", "parameters", "layer_range"):
            raise Misfit((*at, key), f"a model has no {key!r}; it has model and parameters.", of_key=True)
    if "model" not in given:
        raise Misfit(at, f"{reading.shown(at)} has no 'model', which it needs: a directory.")
    return _Input(_model(given["model"], (*at, "model")), _mapping(given.get("parameters"), (*at, "parameters")), at)


def _model(reference: Any, at: reading.Path) -> ModelFile:
    """A model by its directory. Adapters, revisions and names on a hub are refused."""
    path = reference
    if isinstance(path, Mapping):
        extra = sorted(set(path) - {"model"})
        path = reference.get("model")
        if isinstance(path, Mapping):
            extra += sorted(set(path) - {"path"})
            path = path.get("path")
        if extra:
            raise Misfit(at, f"{reading.shown(at)} has {extra[0]!r}, which cannot be expressed: write a directory.")
    if not isinstance(path, str) or not path:
        raise Misfit(at, f"{reading.shown(at)} is no directory of a model.")
    if Path(path).exists():
        return ModelFile(str(Path(path).absolute()))
    if "+" in path:
        raise Misfit(
            at,
            f"{path!r} is a model with an adapter, which cannot be expressed. Merge the adapter first, with "
            "merge_and_unload() of peft, and name the directory that save_pretrained wrote.",
        )
    raise Misfit(
        at,
        f"There is no directory {path!r}. fxmerge downloads nothing: fetch the model, as by hf download "
        f"{path.partition('@')[0]} --local-dir DIR, and name that directory.",
    )


def _layers(model: ModelFile) -> int | None:
    try:
        config = json.loads((Path(model.path) / "config.json").read_text(encoding="utf-8"))
        return next((int(config[name]) for name in LAYERS if name in config), None)
    except (OSError, ValueError, TypeError):
        return None


def _check_base(method: str, base: ModelFile | None, inputs: Sequence[_Input]) -> None:
    if method != "linear" and base is None:
        raise Misfit((METHOD,), f"{method} needs base_model: what the models were fine-tuned from.")
    if method == "linear" and base is not None and base not in [one.model for one in inputs]:
        raise Misfit(("base_model",), "linear takes no base_model but one of the models: leave it out.")


# -------------------------------------------------------------------------- parameters


def _check_names(method: str, own: Mapping[str, Any], at: reading.Path) -> None:
    known = PARAMETERS[method]
    for name in own:
        if name not in known:
            near = get_close_matches(str(name), known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(known)}."
            raise Misfit((*at, name), f"{method} has no parameter {name!r} in fxmerge; {hint}", of_key=True)


def _value(name: str, own: Mapping[str, Any], at: reading.Path) -> Any:
    """A parameter's value, which has to be the same for all layers and tensors."""
    value = own[name]
    if isinstance(value, list) and value and all(one == value[0] for one in value):
        value = value[0]
    if isinstance(value, Mapping) and value.get("filter") in (None, "*"):
        value = value.get("value")
    if isinstance(value, Mapping | list):
        raise Misfit(
            (*at, name),
            f"{name} has values for some layers or tensors, which cannot be expressed. The nearest is one number for "
            "all.",
        )
    return value


def _number(name: str, one: _Input | None, shared: Mapping[str, Any], default: float | None) -> float:
    """A number of a model, or of all."""
    own, at = (one.own, one.at) if one is not None and name in one.own else (shared, ())
    if name not in own:
        if default is None:
            at = () if one is None else one.at
            raise Misfit(at, f"{reading.shown(at)} has no {name!r}, which it needs: a number.")
        return default
    value = _value(name, own, (*at, "parameters"))
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise Misfit((*at, "parameters", name), f"{name} is {value!r}; it must be a number.")
    return float(value)


def _weight(one: _Input, shared: Mapping[str, Any]) -> float:
    return _number("weight", one, shared, None)


def _normalized(shared: Mapping[str, Any], default: bool) -> bool:
    return bool(_value("normalize", shared, ("parameters",))) if "normalize" in shared else default


def _average(weights: Sequence[float], shared: Mapping[str, Any]) -> Average:
    if not _normalized(shared, True) and abs(sum(weights) - 1) > 1e-6:
        raise Misfit(
            ("parameters", "normalize"),
            f"normalize is false, and the weights sum to {sum(weights):.6g}. fxmerge averages: let them sum to 1, or "
            "leave normalize out.",
        )
    if min(weights) < 0 or not sum(weights) > 0:
        raise Misfit(("models",), "a weight is negative or all are 0, and fxmerge averages: give weights from 0 on.")
    return Average(weights=tuple(weights))


def _vectors(
    method: str, inputs: Sequence[_Input], weights: Sequence[float], shared: Mapping[str, Any]
) -> TaskArithmetic | Ties:
    """How task vectors are combined. The weights of fxmerge are relative, and its scale is that of the whole."""
    scale = _number("lambda", None, shared, 1.0)
    sign = -1.0 if max(weights) <= 0 else 1.0
    counts = [sign * weight for weight in weights]
    if min(counts) < 0 or not sum(counts) > 0:
        raise Misfit(
            ("models",),
            "weights have different signs or all are 0, which cannot be expressed. The nearest are weights of one "
            "sign, and a second merge for those of the other.",
        )
    normalized = _normalized(shared, method == "ties")
    if method == "task_arithmetic":
        # Normalized, the sum of the weighted vectors is divided by the sum of the weights, sign and all.
        total = 1.0 if normalized else sign * sum(counts)
        return TaskArithmetic(scale=scale * total / len(counts), weights=tuple(counts))
    if not normalized or sign < 0:
        at = ("parameters", "normalize") if not normalized else ("models",)
        what = "normalize is false" if not normalized else "weights are negative"
        raise Misfit(
            at, f"{what}, and ties of fxmerge is a weighted mean. The nearest is normalize: true, with a lambda."
        )
    densities = [_number("density", one, shared, 1.0) for one in inputs]
    if len(set(densities)) > 1:
        raise Misfit(
            ("models",),
            f"the densities {', '.join(f'{own:g}' for own in densities)} differ, and ties of fxmerge has one. The "
            f"nearest is their mean, {sum(densities) / len(densities):.3g}.",
        )
    if densities[0] < 1:
        logger.warning(
            "ties keeps the largest %.3g of all entries of a task vector together, as in its paper. mergekit keeps as "
            "many of every tensor, so that its result is another one.",
            densities[0],
        )
    return Ties(density=densities[0], scale=scale, weights=tuple(counts))


# -------------------------------------------------------------------------- dtype and tokenizer


def _check_dtype(data: Mapping[str, Any], inputs: Sequence[_Input]) -> None:
    """The dtype has to be that of the files, which fxmerge keeps."""
    for key in ("dtype", "out_dtype"):
        name = data.get(key)
        if name is None:
            continue
        known = str(name).removeprefix("torch.")
        if known not in DTYPES:
            raise Misfit((key,), f"{key} is {name!r}; it must be {', '.join(DTYPES)}, or be left out.")
        for one in inputs:
            try:
                held = {entry.dtype for entry in io.load(one.model.path).entries.values()}
            except CheckpointError:
                continue  # What is wrong with the file is told when it is read.
            other = sorted(own for own in held if own in DTYPES and own != known)
            if other:
                raise Misfit(
                    (key,),
                    f"{key} is {name!r}, and {one.model.path} holds {other[0]}. fxmerge keeps the dtype of the files: "
                    f"leave {key} out, or save the models in {known}.",
                )


def _check_tokenizer(data: Mapping[str, Any], inputs: Sequence[_Input]) -> None:
    source = data.get("tokenizer_source")
    if source is None:
        return
    first = inputs[0].model
    if source in ("union", "base") or _model(source, ("tokenizer_source",)) != first:
        raise Misfit(
            ("tokenizer_source",),
            f"tokenizer_source is {source!r}, and fxmerge copies the tokenizer of the first model, {first.path}. Leave "
            "it out, or put the model with that tokenizer first.",
        )


# -------------------------------------------------------------------------- plain data


def _mapping(value: Any, at: reading.Path) -> Mapping[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise Misfit(at, f"{reading.shown(at)} must be a mapping.")
    return value


def _list(value: Any, at: reading.Path) -> Sequence[Any]:
    if not isinstance(value, list) or not value:
        raise Misfit(at, f"{reading.shown(at)} must be a list of one or more.")
    return value

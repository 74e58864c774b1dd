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
"""The methods that fxmerge has, and their parameters. `int8_mask` saves memory in mergekit and changes no result."""

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
"""The methods that fxmerge does not have, and the nearest method to each."""

REFUSED = {
    "modules": "fxmerge merges whole networks: write models",
    "tokenizer": "fxmerge copies the tokenizer of the first model: leave it out",
    "chat_template": "fxmerge copies that of the first model: leave it out, and edit the result",
}
"""Other keys that cannot be expressed, and what to do."""

KEYS = ("models", "slices", METHOD, "base_model", "parameters", "dtype", "out_dtype", "tokenizer_source", *REFUSED)

DTYPES = ("bfloat16", "float16", "float32")

LAYERS = ("num_hidden_layers", "n_layer", "num_layers")
"""The keys of config.json that hold the number of layers; each configuration has one of them."""


@dataclass(frozen=True)
class _Input:
    """An entry of the list of models.

    Attributes:
        model: the directory.
        parameters: the values for this model alone.
        at: the path to the entry in the file.
    """

    model: ModelFile
    parameters: Mapping[str, Any]
    at: reading.Path


def plan_of(data: Mapping[str, Any]) -> Plan:
    """The plan of a file of mergekit. As in mergekit, units with equal numbers are merged and nothing is fitted.

    Arguments:
        data: the content of the file. Paths are relative to the working directory, as in mergekit.

    Raises:
        Misfit: if an entry of the file cannot be expressed.

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
            hint = reading.meant(key, KEYS, f"mergekit has {', '.join(KEYS)}.")
            raise Misfit((key,), f"mergekit has no key {key!r}; {hint}", of_key=True)
        if key in REFUSED:
            raise Misfit((key,), f"{key!r} cannot be expressed: {REFUSED[key]}.", of_key=True)
    method = _method(data[METHOD])
    shared = _mapping(data.get("parameters"), ("parameters",))
    inputs = _inputs(data)
    base = None if data.get("base_model") is None else _model(data["base_model"], ("base_model",))
    _check_base(method, base, inputs)
    inputs = [entry for entry in inputs if base is None or method == "linear" or entry.model != base]
    _check_names(method, shared, ("parameters",))
    for entry in inputs:
        _check_names(method, entry.parameters, (*entry.at, "parameters"))
    _check_dtype(data, inputs)
    _check_tokenizer(data, inputs)
    weights = [_number("weight", entry, shared, None) for entry in inputs]
    combine = _average(weights, shared) if method == "linear" else _vectors(method, inputs, weights, shared)
    return Plan(
        tuple(entry.model for entry in inputs),
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
    """The models of the file: those of `models`, or of one slice with all layers."""
    if ("models" in data) == ("slices" in data):
        raise Misfit((), "give models, or slices.")
    if "models" in data:
        return [_input(entry, ("models", i)) for i, entry in enumerate(_list(data["models"], ("models",)))]
    slices = _list(data["slices"], ("slices",))
    first = _mapping(slices[0], ("slices", 0))
    at = ("slices", 0, "sources")
    inputs = [_input(source, (*at, i)) for i, source in enumerate(_list(first.get("sources"), at))]
    ranges = [source.get("layer_range") for source in first["sources"]]
    whole = [[0, _layers(entry.model)] for entry in inputs]
    if len(slices) > 1 or ranges != whole:
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


def _input(entry: Any, at: reading.Path) -> _Input:
    given = _mapping(entry, at)
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
    if method == "linear" and base is not None and base not in [entry.model for entry in inputs]:
        raise Misfit(("base_model",), "linear takes no base_model but one of the models: leave it out.")


# -------------------------------------------------------------------------- parameters


def _check_names(method: str, parameters: Mapping[str, Any], at: reading.Path) -> None:
    known = PARAMETERS[method]
    for name in parameters:
        if name not in known:
            hint = reading.meant(name, known, f"it has {', '.join(known)}.")
            raise Misfit((*at, name), f"{method} has no parameter {name!r} in fxmerge; {hint}", of_key=True)


def _value(name: str, parameters: Mapping[str, Any], at: reading.Path) -> Any:
    """A parameter's value, which has to be the same for all layers and tensors."""
    value = parameters[name]
    if isinstance(value, list) and value and all(part == value[0] for part in value):
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


def _number(name: str, entry: _Input | None, shared: Mapping[str, Any], default: float | None) -> float:
    """A parameter of one model or else of all models; without a default it is required."""
    parameters, at = (entry.parameters, entry.at) if entry is not None and name in entry.parameters else (shared, ())
    if name not in parameters:
        if default is None:
            at = () if entry is None else entry.at
            raise Misfit(at, f"{reading.shown(at)} has no {name!r}, which it needs: a number.")
        return default
    value = _value(name, parameters, (*at, "parameters"))
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise Misfit((*at, "parameters", name), f"{name} is {value!r}; it must be a number.")
    return float(value)


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
    """The combination of task vectors. Weights of fxmerge are relative, and its scale multiplies the whole sum."""
    scale = _number("lambda", None, shared, 1.0)
    sign = -1.0 if max(weights) <= 0 else 1.0
    relative = [sign * weight for weight in weights]
    if min(relative) < 0 or not sum(relative) > 0:
        raise Misfit(
            ("models",),
            "weights have different signs or all are 0, which cannot be expressed. The nearest are weights of one "
            "sign, and a second merge for those of the other.",
        )
    normalized = _normalized(shared, method == "ties")
    if method == "task_arithmetic":
        # If normalized, the sum of the weighted vectors is divided by the sum of the weights with their signs.
        total = 1.0 if normalized else sign * sum(relative)
        return TaskArithmetic(scale=scale * total / len(relative), weights=tuple(relative))
    if not normalized or sign < 0:
        at = ("parameters", "normalize") if not normalized else ("models",)
        what = "normalize is false" if not normalized else "weights are negative"
        raise Misfit(
            at, f"{what}, and ties of fxmerge is a weighted mean. The nearest is normalize: true, with a lambda."
        )
    densities = [_number("density", entry, shared, 1.0) for entry in inputs]
    if len(set(densities)) > 1:
        listed = ", ".join(f"{density:g}" for density in densities)
        raise Misfit(
            ("models",),
            f"the densities {listed} differ, and ties of fxmerge has one. The nearest is their mean, "
            f"{sum(densities) / len(densities):.3g}.",
        )
    if densities[0] < 1:
        logger.warning(
            "ties keeps the largest %.3g of all entries of a task vector together, as in its paper. mergekit keeps as "
            "many of every tensor, so that its result is another one.",
            densities[0],
        )
    return Ties(density=densities[0], scale=scale, weights=tuple(relative))


# -------------------------------------------------------------------------- dtype and tokenizer


def _check_dtype(data: Mapping[str, Any], inputs: Sequence[_Input]) -> None:
    """The dtype has to be that of the files, which fxmerge keeps."""
    for key in ("dtype", "out_dtype"):
        name = data.get(key)
        if name is None:
            continue
        dtype = str(name).removeprefix("torch.")
        if dtype not in DTYPES:
            raise Misfit((key,), f"{key} is {name!r}; it must be {', '.join(DTYPES)}, or be left out.")
        for path in (entry.model.path for entry in inputs):
            try:
                held = {tensor.dtype for tensor in io.load(path).entries.values()}
            except CheckpointError:
                continue  # The error is raised again when the file is read.
            other = sorted(held.intersection(DTYPES) - {dtype})
            if other:
                raise Misfit(
                    (key,),
                    f"{key} is {name!r}, and {path} holds {other[0]}. fxmerge keeps the dtype of the files: "
                    f"leave {key} out, or save the models in {dtype}.",
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

"""YAML files of mergekit as plans."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from fxmerge import Average, OptionError, Recipe, TaskArithmetic, Ties, io
from fxmerge.plan import from_yaml, recipe_from_yaml
from tests import files
from tests.cli.conftest import Call, call  # noqa: F401
from tests.slow import but_slow


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a tiny GPT-2, `base`, and three that lie near it."""
    folder = tmp_path_factory.mktemp("mergekit")
    files.gpt2(folder / "base", 0)
    for seed, name in enumerate("abc", start=1):
        files.gpt2(folder / name, 0)
        generator = torch.Generator().manual_seed(seed)
        state = dict(io.load(folder / name).items())
        moved = {n: t + 0.02 * torch.randn(t.shape, generator=generator) for n, t in state.items()}
        io.save(moved, folder / name / "model.safetensors", metadata={"format": "pt"})
    return folder


def weighted(*weights: Any, **more: Any) -> list[dict[str, Any]]:
    return [{"model": name, "parameters": {"weight": w, **more}} for name, w in zip("abc", weights, strict=False)]


@pytest.fixture
def read(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Reads a file of mergekit; paths are relative to the working directory."""
    monkeypatch.chdir(models)

    def of(**config: Any) -> Any:
        (tmp_path / "config.yml").write_text(yaml.safe_dump(config, sort_keys=False))
        return from_yaml(tmp_path / "config.yml")

    return of


VECTORS = {"merge_method": "task_arithmetic", "base_model": "base"}
SIGNS = {"merge_method": "ties", "base_model": "base"}


@pytest.mark.parametrize(
    ("config", "combine"),
    [
        ({"merge_method": "linear", "models": weighted(1, 3)}, Average(weights=(1, 3))),
        (
            {"merge_method": "linear", "models": weighted(0.2, 0.8), "parameters": {"normalize": False}},
            Average(weights=(0.2, 0.8)),
        ),
        (
            {"merge_method": "linear", "models": [{"model": "a"}, {"model": "b"}], "parameters": {"weight": 0.5}},
            Average(weights=(0.5, 0.5)),
        ),
        ({"merge_method": "linear", "models": weighted([1, 1], {"value": 2, "filter": "*"})}, Average(weights=(1, 2))),
        ({**VECTORS, "models": weighted(1, 1)}, TaskArithmetic(scale=1, weights=(1, 1))),
        ({**VECTORS, "models": weighted(0.3, 0.5)}, TaskArithmetic(scale=0.4, weights=(0.3, 0.5))),
        (
            {**VECTORS, "models": weighted(1, 3), "parameters": {"normalize": True, "lambda": 0.5}},
            TaskArithmetic(scale=0.25, weights=(1, 3)),
        ),
        ({**VECTORS, "models": weighted(-1, -2)}, TaskArithmetic(scale=-1.5, weights=(1, 2))),
        (
            {**VECTORS, "models": [{"model": "base"}, *weighted(1, 1)], "parameters": {"int8_mask": True}},
            TaskArithmetic(scale=1, weights=(1, 1)),
        ),
        ({**SIGNS, "models": weighted(1, 2)}, Ties(density=1, scale=1, weights=(1, 2))),
        (
            {**SIGNS, "models": weighted(1, 2, density=0.5), "parameters": {"lambda": 0.7}},
            Ties(density=0.5, scale=0.7, weights=(1, 2)),
        ),
    ],
)
def test_what_can_be_expressed(config: dict[str, Any], combine: Any, read: Any, models: Path) -> None:
    plan = read(**config, dtype="float32")
    assert plan.recipe.match is None and plan.recipe.fit is None and plan.arch == "hf"
    assert type(plan.recipe.combine) is type(combine)
    for name, value in vars(combine).items():
        assert getattr(plan.recipe.combine, name) == pytest.approx(value)
    assert [model.path for model in plan.models] == [str(models / "a"), str(models / "b")]
    assert (plan.base is not None) == (config["merge_method"] != "linear")


def test_one_slice_of_all_layers_is_the_model(read: Any) -> None:
    sources = [{"model": name, "layer_range": [0, 2], "parameters": {"weight": 1}} for name in "ab"]
    plan = read(merge_method="linear", slices=[{"sources": sources}])
    assert plan.recipe.combine == Average(weights=(1, 1))
    sources[1]["layer_range"] = [0, 1]
    with pytest.raises(OptionError, match=r"line 3, column 1: slices of some layers cannot be expressed"):
        read(merge_method="linear", slices=[{"sources": sources}])


TWO = weighted(1, 1)
LAYERS = {"filter": "mlp", "value": 1}


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        (
            {"merge_method": "slerp", "models": TWO},
            "line 1, column 15: merge_method is 'slerp', which fxmerge does not have; it has linear, task_arithmetic, "
            "ties. The nearest is linear, with the weights 1 - t and t.",
        ),
        ({"merge_method": "dare_ties", "models": TWO}, "The nearest is ties, which keeps the largest entries"),
        ({"merge_method": "passthrough", "models": TWO}, "merges whole networks, and stacks no layers."),
        ({"merge_method": "tiess", "models": TWO}, "Did you mean 'ties'?"),
        ({"merge_method": "linear", "modules": {}}, "'modules' cannot be expressed: fxmerge merges whole networks"),
        ({"merge_method": "linear", "models": TWO, "chat_template": "auto"}, "'chat_template' cannot be expressed"),
        ({"merge_method": "linear", "models": TWO, "tokenizer": {}}, "'tokenizer' cannot be expressed"),
        ({"merge_method": "linear", "models": TWO, "dtpye": "x"}, "no key 'dtpye'; did you mean 'dtype'?"),
        ({"merge_method": "linear", "models": TWO, "slices": []}, "give models, or slices."),
        ({"merge_method": "linear", "models": []}, "models must be a list of one or more."),
        ({"merge_method": "linear", "models": [{"path": "a"}]}, "a model has no 'path'; it has model and parameters."),
        ({"merge_method": "linear", "models": [{"parameters": {}}]}, "models[0] has no 'model', which it needs"),
        ({"merge_method": "linear", "models": weighted(1)}, "merge takes 2 or more models, and 1 is given."),
        ({"merge_method": "linear", "models": [{"model": "a"}]}, "models[0] has no 'weight', which it needs"),
        ({"merge_method": "linear", "models": weighted(1, "x")}, "weight is 'x'; it must be a number."),
        ({"merge_method": "linear", "models": weighted(1, [0, 1])}, "weight has values for some layers or tensors"),
        (
            {"merge_method": "linear", "models": weighted(1, [LAYERS, {"value": 0}])},
            "weight has values for some layers",
        ),
        ({"merge_method": "linear", "models": weighted(1, 1, t=1)}, "linear has no parameter 't' in fxmerge"),
        ({**SIGNS, "models": weighted(1, 1, densty=1)}, "no parameter 'densty' in fxmerge; did you mean 'density'?"),
        (
            {"merge_method": "linear", "models": TWO, "parameters": {"normalize": False}},
            "normalize is false, and the weights sum to 2. fxmerge averages: let them sum to 1",
        ),
        ({"merge_method": "linear", "models": weighted(-1, 1)}, "a weight is negative"),
        ({"merge_method": "linear", "models": TWO, "base_model": "c"}, "linear takes no base_model"),
        ({"merge_method": "ties", "models": TWO}, "ties needs base_model"),
        ({**VECTORS, "models": weighted(1, -1)}, "weights have different signs"),
        ({**SIGNS, "models": weighted(-1, -1)}, "weights are negative, and ties of fxmerge is a weighted mean"),
        ({**SIGNS, "models": TWO, "parameters": {"normalize": False}}, "normalize is false, and ties of fxmerge"),
        (
            {
                **SIGNS,
                "models": [*weighted(1, density=0.5), {"model": "b", "parameters": {"weight": 1, "density": 0.25}}],
            },
            "the densities 0.5, 0.25 differ, and ties of fxmerge has one. The nearest is their mean, 0.375.",
        ),
        ({"merge_method": "linear", "models": TWO, "dtype": "float16"}, "holds float32. fxmerge keeps the dtype"),
        ({"merge_method": "linear", "models": TWO, "out_dtype": "int3"}, "out_dtype is 'int3'; it must be bfloat16"),
        ({"merge_method": "linear", "models": TWO, "tokenizer_source": "union"}, "tokenizer_source is 'union'"),
        ({"merge_method": "linear", "models": TWO, "tokenizer_source": "b"}, "put the model with that tokenizer first"),
        ({"merge_method": "linear", "models": [{"model": "org/name@main"}]}, "hf download org/name --local-dir DIR"),
        ({"merge_method": "linear", "models": [{"model": "org/name+org/lora"}]}, "is a model with an adapter"),
        ({"merge_method": "linear", "models": [{"model": {"model": "a", "lora": "x"}}]}, "has 'lora', which cannot be"),
    ],
)
def test_what_cannot_be_expressed(config: dict[str, Any], sentence: str, read: Any) -> None:
    with pytest.raises(OptionError) as caught:
        read(**config)
    assert sentence in str(caught.value) and "config.yml" in str(caught.value)


def test_another_tokenizer_is_no_matter_if_it_is_the_first_models(read: Any) -> None:
    read(merge_method="linear", models=TWO, tokenizer_source="a", base_model="a")


CONFIGS: dict[str, dict[str, Any]] = {
    "linear": {"merge_method": "linear", "models": weighted(1, 3, 0.5)},
    "task_arithmetic": {**VECTORS, "models": weighted(0.7, 0.2), "parameters": {"lambda": 0.8}},
    "normalized": {**VECTORS, "models": weighted(0.7, 0.2), "parameters": {"normalize": True}},
    "negative": {**VECTORS, "models": weighted(-0.7, -0.2)},
    "ties": {**SIGNS, "models": weighted(1, 0.4), "parameters": {"lambda": 0.9}},
}


def by_hand(config: dict[str, Any], states: dict[str, dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """What the documentation of mergekit says of a method."""
    names = [one["model"] for one in config["models"]]
    weights = torch.tensor([float(one["parameters"]["weight"]) for one in config["models"]], dtype=torch.float64)
    shared, found = config.get("parameters", {}), {}
    for key, base in states["base"].items():
        stacked = torch.stack([states[name][key].double() for name in names])
        column = weights.reshape(-1, *[1] * base.ndim)
        if config["merge_method"] == "linear":
            found[key] = (column * stacked).sum(0) / weights.sum()
            continue
        vectors = column * (stacked - base.double())
        if config["merge_method"] == "ties":
            agreed = vectors.sign() == vectors.sum(0).sign()
            total = (vectors * agreed).sum(0) / (column * agreed).sum(0)
        else:
            total = vectors.sum(0) / (weights.sum() if shared.get("normalize") else 1)
        found[key] = base.double() + shared.get("lambda", 1) * total
    return found


Merge = Callable[[dict[str, Any]], dict[str, torch.Tensor]]


@pytest.fixture
def merge(
    call: Call,  # noqa: F811
    models: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Merge:
    """Merges into `merged` by a file of mergekit, and gives the tensors."""
    monkeypatch.chdir(models)

    def by(config: dict[str, Any]) -> dict[str, torch.Tensor]:
        (tmp_path / "config.yml").write_text(yaml.safe_dump(config))
        code, _, err = call("merge", tmp_path / "config.yml", "--out", tmp_path / "merged")
        assert code == 0, err
        return dict(io.load(tmp_path / "merged").items())

    return by


@pytest.mark.parametrize("name", but_slow(CONFIGS))
def test_a_merge_gives_what_mergekit_documents(name: str, merge: Merge, models: Path, tmp_path: Path) -> None:
    states = {folder: dict(io.load(models / folder).items()) for folder in ("base", "a", "b", "c")}
    expected = by_hand(CONFIGS[name], states)
    for key, value in merge(CONFIGS[name]).items():
        torch.testing.assert_close(value.double(), expected[key], rtol=0, atol=1e-6)
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["architectures"] == ["GPT2LMHeadModel"]


@pytest.mark.filterwarnings("ignore")  # Those of mergekit.
@pytest.mark.parametrize("name", but_slow(CONFIGS))
def test_a_merge_gives_what_mergekit_gives(name: str, merge: Merge, tmp_path: Path) -> None:
    pytest.importorskip("mergekit")
    from mergekit.config import MergeConfiguration
    from mergekit.merge import MergeOptions, run_merge

    config = {**CONFIGS[name], "dtype": "float32"}
    ours = merge(config)
    run_merge(MergeConfiguration.model_validate(config), str(tmp_path / "theirs"), MergeOptions(write_model_card=False))
    theirs = dict(io.load(tmp_path / "theirs").items())
    assert theirs.keys() >= ours.keys()
    for key, value in ours.items():
        torch.testing.assert_close(value, theirs[key], rtol=0, atol=1e-6)


def test_it_is_printed_as_a_recipe_of_fxmerge(
    call: Call,  # noqa: F811
    models: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(models)
    (tmp_path / "config.yml").write_text(yaml.safe_dump(CONFIGS["linear"]))
    code, out, _ = call("recipe", "--from", "merge", tmp_path / "config.yml")
    (tmp_path / "recipe.yaml").write_text(out)
    assert code == 0 and from_yaml(tmp_path / "recipe.yaml") == from_yaml(tmp_path / "config.yml")
    combine = Average(weights=(1, 3, 0.5))
    assert recipe_from_yaml(tmp_path / "config.yml") == Recipe(match=None, combine=combine, fit=None)
    code, out, _ = call("check", tmp_path / "config.yml")
    assert code == 0 and "100.0% of the parameters" in out


def test_trimming_is_told_to_be_another(read: Any, caplog: pytest.LogCaptureFixture) -> None:
    read(**SIGNS, models=weighted(1, 1, density=0.5))
    assert "ties keeps the largest 0.5 of all entries of a task vector together, as in its paper." in caplog.text

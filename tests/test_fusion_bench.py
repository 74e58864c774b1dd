"""The method of FusionBench, run by FusionBench."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fxmerge

fusion_bench = pytest.importorskip("fusion_bench")
pytestmark = pytest.mark.filterwarnings("ignore")  # Those of FusionBench.

TARGET = "fxmerge.fusion_bench.FxMergeAlgorithm"


def network(seed: int = 0, classes: int = 3, width: int = 8) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, classes))


class Rows(torch.utils.data.Dataset[tuple[torch.Tensor, int]]):
    """Inputs with labels, as a dataset of a pool."""

    def __init__(self, seed: int = 0, count: int = 96) -> None:
        self.rows = torch.randn(count, 4, generator=torch.Generator().manual_seed(seed))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.rows[index], 0


def pool(count: int = 2, **datasets: Any) -> Any:
    models = {f"m{i}": {"_target_": "tests.test_fusion_bench.network", "seed": i} for i in range(count)}
    return fusion_bench.BaseModelPool(models, **datasets)


def rows(*names: str, seed: int = 0) -> dict[str, Any]:
    return {name: {"_target_": "tests.test_fusion_bench.Rows", "seed": seed + i} for i, name in enumerate(names)}


def method(**settings: Any) -> Any:
    """The method as FusionBench makes it of a configuration."""
    from fusion_bench.utils import instantiate
    from omegaconf import OmegaConf

    return instantiate(OmegaConf.create({"_target_": TARGET, **settings}))


def same(one: nn.Module, other: nn.Module) -> bool:
    states = one.state_dict(), other.state_dict()
    return all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_it_gives_what_fxmerge_gives() -> None:
    algorithm = method(batch=32)
    assert isinstance(algorithm, fusion_bench.BaseAlgorithm)
    merged = algorithm.run(pool(train_datasets=rows("all")))
    batches = list(Rows().rows.split(32))
    expected = fxmerge.merge(network(0), network(1), batches)
    assert type(merged) is nn.Sequential and not merged.training
    assert same(merged, expected)
    assert fxmerge.report(merged).errors == fxmerge.report(expected).errors


def test_every_model_has_data_of_its_own() -> None:
    merged = method().run(pool(train_datasets=rows("m0", "m1")))
    loaders = [list(Rows(seed).rows.split(32)) for seed in range(2)]
    assert same(merged, fxmerge.merge(network(0), network(1), loaders=loaders))


def test_a_recipe_and_its_base() -> None:
    models = {"_pretrained_": network(0), "a": network(1), "b": network(2)}
    recipe = {"combine": {"kind": "Ties", "density": 0.5}}
    merged = method(recipe=recipe, inputs=["1x4"]).run(fusion_bench.BaseModelPool(dict(models)))
    told = fxmerge.Recipe(combine=fxmerge.Ties(density=0.5))
    expected = fxmerge.merge(
        models["a"], models["b"], recipe=told, base=models["_pretrained_"], example=torch.zeros(1, 4)
    )
    assert same(merged, expected)
    without = method(inputs=["1x4"]).run(fusion_bench.BaseModelPool(dict(models)))
    assert same(without, fxmerge.merge(models["a"], models["b"], example=torch.zeros(1, 4)))


def test_heads_of_their_own_are_a_graph() -> None:
    merged = method(datasets="val").run(
        fusion_bench.BaseModelPool({"a": network(0), "b": network(1, classes=5)}, val_datasets=rows("all"))
    )
    assert [tuple(v.shape) for v in merged(torch.zeros(2, 4))] == [(2, 3), (2, 5)]


def test_models_of_transformers_need_no_data(tmp_path: Path) -> None:
    from transformers import BertConfig, BertModel

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_hidden_layers": 1}
    models = [BertModel(BertConfig(vocab_size=40, **sizes)).eval() for _ in range(2)]
    merged = method().run(models)
    assert type(merged) is BertModel


def test_it_goes_to_yaml_and_back(tmp_path: Path) -> None:
    algorithm = method(recipe={"match": {"kind": "Align", "alpha": 0.25}}, samples=48)
    algorithm.to_yaml(tmp_path / "method.yaml")
    again = fusion_bench.BaseAlgorithm.from_yaml(tmp_path / "method.yaml")
    assert again.samples == 48
    pools = [pool(train_datasets=rows("all")) for _ in range(2)]
    one, two = (own.run(its) for own, its in zip((algorithm, again), pools, strict=True))
    assert same(one, two) and fxmerge.report(one).recipe["match"] == {"kind": "Align", "alpha": 0.25}  # type: ignore[index]


def test_errors_are_sentences() -> None:
    with pytest.raises(
        fxmerge.OptionError, match=r"no train datasets, and no example inputs: give datasets, or inputs"
    ):
        method().run(pool())
    with pytest.raises(fxmerge.OptionError, match="recipe has no field 'mtach'; did you mean 'match'"):
        method(recipe={"mtach": 1}).run(pool(train_datasets=rows("all")))
    models = [network(0), network(1)]
    models[0]._fusion_bench_target_modules = ["0"]  # type: ignore[assignment]
    with pytest.raises(fxmerge.OptionError, match="fxmerge merges whole networks"):
        method(inputs=["1x4"]).run(models)

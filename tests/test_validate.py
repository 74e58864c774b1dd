"""Bad input gets one clear error, before any work."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxmerge


def mlp(width: int = 4, activation: nn.Module | None = None) -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, width), activation or nn.ReLU(), nn.Linear(width, 2))


X = torch.randn(5, 3)


def spoiled(name: str, value: float) -> nn.Sequential:
    model = mlp()
    with torch.no_grad():
        model.get_parameter(name)[0] = value
    return model


class Counted(nn.Module):
    def __init__(self, table: list[int]) -> None:
        super().__init__()
        self.net = mlp()
        self.register_buffer("table", torch.tensor(table))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.net(x[:, self.table])
        return out


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        (
            mlp(),
            mlp(5, nn.Tanh()),
            r"'0\.weight' is torch\.float32 of shape \(4, 3\) in model A and .*\(5, 3\) in model B",
        ),
        (mlp(), nn.Sequential(nn.ReLU(), nn.Linear(3, 4)), r"'0\.weight' is in model A but not in model B"),
        (nn.Sequential(nn.ReLU(), nn.Linear(3, 4)), mlp(), r"'1\.weight' is in model A but not in model B"),
        (nn.Sequential(nn.ReLU(), mlp()), nn.Sequential(nn.Sigmoid(), mlp()), "compute different functions"),
        (Counted([0, 1, 2]), Counted([2, 1, 0]), r"'table' holds torch\.int64, .* differs between model A and model B"),
    ],
)
def test_architectures_that_differ(a: nn.Module, b: nn.Module, message: str) -> None:
    with pytest.raises(fxmerge.ArchitectureMismatchError, match=message):
        fxmerge.merge(a, b, [X])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(value: float) -> None:
    with pytest.raises(fxmerge.NonFiniteError, match=r"of '2\.bias' of model B \(shape \(2,\)\) are NaN or infinite"):
        fxmerge.merge(mlp(), spoiled("2.bias", value), [X])


def test_activations_that_are_not_finite() -> None:
    with pytest.raises(fxmerge.NonFiniteError, match="An activation of model A is NaN or infinite at graph node"):
        fxmerge.merge(mlp(), mlp(), [X, torch.full((5, 3), float("nan"))])


@pytest.mark.parametrize("weights", [(1,), (1, 1, 1)])
def test_every_model_has_a_weight(weights: tuple[float, ...]) -> None:
    message = f"The recipe has {len(weights)} weights for 2 models; give one for each model"
    with pytest.raises(fxmerge.OptionError, match=message):
        fxmerge.merge(mlp(), mlp(), [X], fxmerge.Recipe(combine=fxmerge.Average(weights)))
    with pytest.raises(fxmerge.OptionError, match=message):
        fxmerge.merge(mlp(), mlp(), [X], fxmerge.Recipe(combine=fxmerge.Ties(weights=weights)), base=mlp())


def test_a_recipe_and_a_run_are_what_they_are_called() -> None:
    wrong: Any
    for wrong in ({"match": "zip"}, fxmerge.Zip(), "recipe.yaml"):
        for call in (fxmerge.merge, fxmerge.align):
            with pytest.raises(
                fxmerge.OptionError, match=r"recipe is a \w+; give a fxmerge\.Recipe\(\.\.\.\), or None"
            ):
                call(mlp(), mlp(), [X], wrong)
    with pytest.raises(fxmerge.OptionError, match=r"run is a str; give a fxmerge\.Run\(\.\.\.\), or None"):
        fxmerge.merge(mlp(), mlp(), [X], run="cpu")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("loader", "message"),
    [
        ([], "The loader is empty"),
        ([torch.randn(5, 7)], r"The first batch does not fit the model: its inputs \[\(5, 7\)\]"),
        (["text"], "A batch is a str"),
        ([X, torch.randn(5, 7)], r"of a batch has shape \(5, 7\) .* takes \(any, 3\)"),
    ],
)
def test_loaders(loader: list[Any], message: str) -> None:
    with pytest.raises(fxmerge.LoaderError, match=message):
        fxmerge.merge(mlp(), mlp(), loader)


def test_an_empty_loader_is_refused_where_an_example_is_given() -> None:
    with pytest.raises(fxmerge.LoaderError, match="The loader is empty"):
        fxmerge.merge(mlp(), mlp(), [], recipe=fxmerge.Recipe(match=fxmerge.Zip(alpha=1.0)), example=X)


def test_without_data_an_example_is_needed() -> None:
    with pytest.raises(fxmerge.OptionError, match="pass example="):
        fxmerge.merge(mlp(), mlp())


def test_one_model_is_not_enough() -> None:
    with pytest.raises(fxmerge.OptionError, match="two or more models, not 1"):
        fxmerge.merge_many([mlp()], [X])


def test_parameters_on_several_devices() -> None:
    model = mlp()
    model[2].to("meta")
    with pytest.raises(fxmerge.OptionError, match="model A are on several devices"):
        fxmerge.merge(model, mlp(), [X])


def test_equal_integer_buffers_are_left_alone() -> None:
    merged = fxmerge.merge(Counted([0, 2, 1]), Counted([0, 2, 1]), [X])
    assert merged.state_dict()["table"].tolist() == [0, 2, 1]


def test_models_in_several_dtypes() -> None:
    with pytest.raises(
        fxmerge.OptionError, match=r"'0\.weight' is torch\.float32 in model A and torch\.bfloat16 in model"
    ):
        fxmerge.merge(mlp(), mlp().to(torch.bfloat16), [X])
    with pytest.raises(
        fxmerge.OptionError, match=r"'2\.bias' is torch\.float64 in model A .*by model\.to\(torch\.float64\)"
    ):
        partly = mlp()
        partly[2].bias.data = partly[2].bias.data.double()
        fxmerge.align(mlp(), to=partly, example=X)


@pytest.mark.parametrize("models", [mlp(), mlp().state_dict(), 3, "models"])
def test_a_model_in_place_of_several(models: Any) -> None:
    with pytest.raises(
        fxmerge.OptionError, match=r"merge_many takes a list of models, such as \[model_a, model_b\], not"
    ):
        fxmerge.merge_many(models, [X])


def test_models_in_a_module_list() -> None:
    models = [mlp(), mlp()]
    merged, expected = (fxmerge.merge_many(m, [X]).state_dict() for m in (nn.ModuleList(models), models))  # type: ignore[arg-type]
    assert all(torch.equal(expected[n], t) for n, t in merged.items())


@pytest.mark.parametrize("loaders", [3, X, {"a": [X], "b": [X]}])
def test_loaders_are_a_list(loaders: Any) -> None:
    with pytest.raises(fxmerge.OptionError, match="give a list with one loader for each model"):
        fxmerge.merge(mlp(), mlp(), loaders=loaders)

"""How batches become inputs of a model, and what is told of those that do not fit."""

from collections import UserDict
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fxmerge
from fxmerge.program.run import Inputs, batch_inputs


class Two(nn.Module):
    """Takes two inputs by name, one of which may be left out."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 6), nn.Linear(6, 2)

    def forward(self, pixels: Tensor, scale: Tensor | None = None) -> Tensor:
        out: Tensor = self.b(torch.relu(self.a(pixels)))
        return out if scale is None else out * scale


class Whole(Two):
    """Takes a mapping as its one argument."""

    def forward(self, features: Mapping[str, Tensor]) -> Tensor:  # type: ignore[override]
        return super().forward(features["x"])


class Options(Two):
    """Takes whatever there is by name."""

    def forward(self, pixels: Tensor, **others: Any) -> Tensor:  # type: ignore[override]
        assert "label" in others
        return super().forward(pixels)


X = torch.randn(16, 3)


class Encoding(UserDict[str, Tensor]):
    """A mapping that is no dict, as tokenizers give."""


@pytest.mark.parametrize("kind", [dict, Encoding])
def test_mappings(kind: Any) -> None:
    known = kind(pixels=X, scale=torch.ones(1), label=torch.zeros(16))
    args, kwargs = batch_inputs(Two())(known)
    assert args == () and set(kwargs) == {"pixels", "scale"}
    assert set(batch_inputs(Options())(known)[1]) == {"pixels", "scale", "label"}
    (whole,), kwargs = batch_inputs(Whole())(kind(x=X))
    assert dict(whole) == {"x": X} and kwargs == {}
    merged = fxmerge.merge(Two(), Two(), [known])
    assert merged(X, torch.ones(1)).shape == (16, 2)
    assert fxmerge.merge(Whole(), Whole(), [kind(x=X), kind(x=X[:5])])({"x": X}).shape == (16, 2)


@pytest.mark.parametrize(
    ("model", "batch", "message"),
    [
        (Two, {"image": X}, "with the keys 'image', and the model's forward takes 'pixels', 'scale'"),
        (Two, {"scale": X, "label": X}, "the keys 'scale', 'label', .* takes 'pixels', 'scale'; it has no 'pixels'"),
        (Options, {"label": X}, "takes 'pixels', 'others'; it has no 'pixels'"),
        (Whole, {"y": X}, "the keys 'y', .* takes 'features'.* raises KeyError: 'x'"),
        (lambda: nn.Bilinear(3, 3, 2), {"a": X, "b": X}, "takes 'input1', 'input2'; it has no 'input1', 'input2'"),
        (Two, {}, "with the keys of none"),
        (Two, Encoding(image=X), "with the keys 'image'"),
        (Two, np.zeros((4, 3)), r"A batch is a ndarray; .*torch\.from_numpy"),
        (Two, [np.zeros((4, 3)), 0], r"A batch is a ndarray; .*torch\.from_numpy"),
        (Two, {"pixels": np.zeros((4, 3))}, r"A batch holds a ndarray, .*torch\.from_numpy"),
        (Two, ([X, object()], 0), "A batch holds a object"),
        (Two, {X}, "A batch is a set"),
    ],
)
def test_batches_that_do_not_fit(model: Any, batch: Any, message: str) -> None:
    for loader in ([batch], [batch, batch]):
        with pytest.raises(fxmerge.LoaderError, match=message):
            fxmerge.merge(model(), model(), loader)


def test_a_later_batch_of_another_kind() -> None:
    with pytest.raises(fxmerge.LoaderError, match="with the keys 'image'"):
        fxmerge.merge(Two(), Two(), [{"pixels": X}, {"image": X}])


@pytest.mark.parametrize("inputs", [lambda batch: batch, lambda batch: (batch,), lambda batch: (batch, {})])
def test_inputs_that_give_no_call(inputs: Inputs) -> None:
    with pytest.raises(fxmerge.LoaderError, match=r"inputs gave a \w+ for a batch; it must give \(args, kwargs\)"):
        fxmerge.merge(Two(), Two(), [X], inputs=inputs)


@pytest.mark.parametrize(
    ("loader", "message"),
    [
        (3, "The loader is a int; give an iterable of batches"),
        (X, r"The loader is a Tensor, whose rows are no batches; give a list of batches: \[batch\]"),
        (np.zeros((4, 3)), r"The loader is a ndarray, .*torch\.from_numpy"),
        ({"pixels": X}, r"The loader is a dict, which gives its keys; give a list of batches: \[batch\]"),
        ("images", "The loader is a str; give an iterable"),
        (nn.Sequential(nn.ReLU()), "The loader is a Sequential; give an iterable"),
        (list, "The loader is a type; give an iterable"),
        (lambda: [X], "The loader is a function; give an iterable"),
    ],
)
def test_what_is_no_loader(loader: Any, message: str) -> None:
    for call in (
        lambda: fxmerge.merge(Two(), Two(), loader),
        lambda: fxmerge.merge(Two(), Two(), loaders=[[X], loader]),
        lambda: fxmerge.align(Two(), to=Two(), loader=loader),
    ):
        with pytest.raises(fxmerge.LoaderError, match=message):
            call()


def test_numbers_among_the_inputs_are_those_of_the_example() -> None:
    class Power(Two):
        def forward(self, pixels: Tensor, power: int = 1) -> Tensor:  # type: ignore[override]
            return super().forward(pixels) ** power

    a, b, c = Power(), Power(), Power()
    batches = [{"pixels": torch.randn(16, 3), "power": 3} for _ in range(3)]
    merged = fxmerge.merge(a, b, batches)
    c.load_state_dict(merged.state_dict())
    torch.testing.assert_close(merged(**batches[0]), c(**batches[0]))
    with pytest.raises(fxmerge.LoaderError, match="Input 'power' of a batch is 2, and the model was captured with 3"):
        fxmerge.merge(a, b, [*batches, {"pixels": X, "power": 2}])

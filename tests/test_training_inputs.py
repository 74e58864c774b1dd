"""Which inputs are for training only, told by what a model gives without them."""

import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxmerge
from fxmerge.program.training_inputs import left_out, training_only


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.outer = nn.Linear(3, 6), nn.Linear(6, 4)

    def scores(self, x: Tensor) -> Tensor:
        out: Tensor = self.outer(torch.relu(self.inner(x)))
        return out


class ByKey(Base):
    """A mask that is not for training, a flag, and two targets of which a loss needs both."""

    def forward(
        self, x: Tensor, mask: Tensor | None = None, begin: Any = None, end: Any = None, more: bool = False
    ) -> dict[str, Any]:
        y = self.scores(x if mask is None else x * mask)
        out = {} if begin is None or end is None else {"loss": (y.sum(1) - begin).square().mean() + end.sum()}
        return out | {"y": y} | ({"z": y + 1} if more else {})


class InOrder(Base):
    """Outputs move up where the loss is not computed, or are None."""

    def forward(self, x: Tensor, target: Tensor | None = None, last: bool = False) -> tuple[Any, ...]:
        y = self.scores(x)
        loss = None if target is None else (y - target).abs().mean()
        return (y, loss) if last else (y,) if loss is None else (loss, y)


class Needed(Base):
    """What the model computes its outputs from, as from labels that are shifted to be inputs."""

    def forward(self, x: Tensor | None = None, labels: Tensor | None = None) -> tuple[Tensor, Tensor]:
        assert labels is not None
        y = self.scores(labels)
        return y.mean(), y


class TwoTowers(Base):
    """An optional input with an output of its own: nobody is to lose that."""

    def forward(self, x: Tensor, other: Tensor | None = None) -> dict[str, Tensor]:
        out = {"x": self.scores(x)}
        return out if other is None else out | {"other": self.scores(other)}


X = torch.linspace(-1, 1, 12).reshape(4, 3)
T = torch.ones(4, 4)


@pytest.mark.parametrize(
    ("model", "args", "kwargs", "found"),
    [
        (ByKey(), (X,), {"mask": X > 0, "begin": T[:, 0], "end": T[:, 1]}, {"begin", "end"}),
        (ByKey(), (X, X > 0, T[:, 0], T[:, 1]), {}, {"begin", "end"}),
        (ByKey(), (X,), {"begin": T[:, 0], "more": True}, set()),
        (InOrder(), (X, T), {}, {"target"}),
        (InOrder(), (X,), {"target": T, "last": True}, {"target"}),
        (Needed(), (), {"labels": X}, set()),
        (TwoTowers(), (X,), {"other": X}, set()),
        (nn.Linear(3, 2), (X,), {}, set()),
    ],
)
def test_an_input_that_only_a_number_is_computed_from_is_for_training(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], found: set[str]
) -> None:
    assert training_only(model, (args, kwargs)) == found


def test_what_comes_after_an_input_that_is_left_out_is_given_by_name() -> None:
    assert left_out(InOrder(), ((X, T), {}), {"target"}) == ((X,), {})
    assert left_out(InOrder(), ((X, T, True), {}), {"target"}) == ((X,), {"last": True})
    assert left_out(InOrder(), ((X,), {"target": T}), {"target"}) == ((X,), {})


def test_what_is_merged_needs_no_targets(caplog: pytest.LogCaptureFixture) -> None:
    a, b = ByKey(), ByKey()
    nn.init.normal_(b.inner.weight)
    with caplog.at_level(logging.INFO, logger="fxmerge"):
        merged = fxmerge.merge(a, b, [{"x": X, "mask": X > 0, "begin": T[:, 0], "end": T[:, 1]}])
    assert [r.getMessage() for r in caplog.records if "loss" in r.getMessage()] == [
        "Inputs that only a loss is computed from are left out: begin, end"
    ]
    a.load_state_dict(merged.state_dict())
    torch.testing.assert_close(merged(x=X, mask=X < 0)["y"], a(X, X < 0)["y"])

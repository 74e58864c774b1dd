"""Warnings of poor results, and what is logged of the progress."""

import logging
import time
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxmerge
from fxmerge import progress
from fxmerge.notices import warn_of_few_rows
from fxmerge.progress import Ticker, timed
from tests.slow import but_slow

MATCH: dict[str, fxmerge.Align | fxmerge.Zip] = {"align": fxmerge.Align(), "zip": fxmerge.Zip()}


class Backbone(nn.Module):
    def __init__(self, seed: int, *, head: bool = False) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.stem, self.a, self.b = nn.Linear(3, 16), nn.Linear(16, 16), nn.Linear(16, 16)
        self.head = nn.Linear(16, 2) if head else nn.Identity()

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        h = self.stem(x)
        return {"features": self.head(h + self.b(torch.relu(self.a(h))))}


X = torch.randn(256, 3, generator=torch.Generator().manual_seed(0))


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    """But for those of a model that is nearer to the ensemble, which some of these may be."""
    found = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING and r.name == "fxmerge.notices"]
    return [text for text in found if "alone is nearer" not in text]


def test_outputs_that_hold_most_parameters_are_named(caplog: pytest.LogCaptureFixture) -> None:
    fxmerge.align(Backbone(0), to=Backbone(1), loader=[X])
    (text,) = warnings_of(caplog)
    assert (
        text.startswith("97% of the parameter entries")
        and "model: output['features']. If" in text
        and "Recipe(free=\"output['features']\")" in text
    )
    caplog.clear()
    fxmerge.merge(Backbone(0), Backbone(1), [X], recipe=fxmerge.Recipe(fit=None, free="output"))
    fxmerge.merge(Backbone(0, head=True), Backbone(1, head=True), [X], recipe=fxmerge.Recipe(fit=None))
    wide = [nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 500)) for _ in range(2)]
    fxmerge.merge(*wide, [X], recipe=fxmerge.Recipe(fit=None))
    assert warnings_of(caplog) == []


def test_few_rows_of_data_are_told_once(caplog: pytest.LogCaptureFixture) -> None:
    models = [nn.Sequential(nn.Linear(30, 40), nn.ReLU(), nn.Linear(40, 20), nn.ReLU(), nn.Linear(20, 2)) for _ in "ab"]
    x = torch.randn(64, 30)
    for rows, count in ((8, 1), (64, 0)):
        caplog.clear()
        fxmerge.merge(*models, [x[:rows]])
        told = warnings_of(caplog)
        assert len(told) == count
        if told:
            assert told[0].startswith("3 of 3 refitted layers had fewer rows of data than features ('0.weight', '2.")
            assert "'0.weight' had 8 rows and 31 features" in told[0]


def test_half_of_the_layers_with_few_rows_are_no_warning(caplog: pytest.LogCaptureFixture) -> None:
    warn_of_few_rows({"a": {"rows": 3, "features": 4}, "b": {"rows": 5, "features": 4}})
    warn_of_few_rows({"gain": {"gain": 1.0}})
    warn_of_few_rows({})
    assert warnings_of(caplog) == []


@pytest.mark.parametrize("match", MATCH.values(), ids=MATCH.keys())
def test_statistics_without_data_are_told(match: fxmerge.Align | fxmerge.Zip, caplog: pytest.LogCaptureFixture) -> None:
    def net(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        m = nn.Sequential(nn.Linear(3, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 2)).train()
        for _ in range(60):
            m(X)
        return m.eval()

    fxmerge.merge(net(0), net(1), recipe=fxmerge.Recipe(match=match), example=X)
    (text,) = warnings_of(caplog)
    assert text.startswith("1 layers normalize by running statistics, such as '1.running_mean'") and "loader" in text
    caplog.clear()
    fxmerge.merge(net(0), net(1), [X], recipe=fxmerge.Recipe(match=match, fit=None))
    fxmerge.merge(net(0), net(0), recipe=fxmerge.Recipe(match=match), example=X)
    assert warnings_of(caplog) == []


def test_a_fold_without_data_is_told_of_where_it_changes_what_is_computed(caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), torch.randn(5, 4)
    fxmerge.fold(model, [torch.randn(64, 4)], width=0.5)
    assert warnings_of(caplog) == []
    fxmerge.fold(model, width=0.5, example=x)
    (text,) = warnings_of(caplog)
    assert "its outputs on the example have changed: it may be near chance. Pass a loader" in text
    caplog.clear()
    with torch.no_grad():  # Every unit twice.
        for tensor in (model[0].weight, model[0].bias):
            tensor[4:] = tensor[:4]
    assert fxmerge.report(fxmerge.fold(model, width=0.5, example=x)).widths == {"0.weight[0]": (8, 4)}
    assert warnings_of(caplog) == []


def test_every_stage_is_logged(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "SECONDS", 0.0)
    models = [nn.Sequential(nn.Linear(3, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 2)) for _ in range(2)]
    with caplog.at_level(logging.INFO, logger="fxmerge"):
        fxmerge.merge(*models, [X, X])
        fxmerge.merge(*models, [X, X], recipe=fxmerge.Recipe(fit=None))
    told = [r.getMessage() for r in caplog.records if r.name.startswith("fxmerge") and r.levelno == logging.INFO]
    stages = ("capture", "symmetry", "verification", "activations", "matching", "combining", "fitting", "emitting")
    stages = (*stages, "calibration")
    for stage in stages:
        assert f"{stage} ..." in told, stage
        assert any(text.startswith(f"{stage}: ") and text.endswith(" s") for text in told), stage
    assert "refitting: layer 1 of 2" in told and "refitting: layer 2 of 2" in told
    assert "BatchNorm statistics: batch 2" in told


def test_progress_is_logged_now_and_then(caplog: pytest.LogCaptureFixture) -> None:
    logger, seconds = logging.getLogger("fxmerge.test"), {"stage": 1.0}
    with caplog.at_level(logging.INFO, logger="fxmerge"):
        ticker = Ticker(logger, "%d of %d")
        for i in range(3):
            ticker.last -= progress.SECONDS * (i > 0)
            ticker.tick(i, 3)
        with timed(logger, seconds, "stage"):
            time.sleep(0.01)
    assert seconds["stage"] > 1.0
    told = [r.getMessage() for r in caplog.records if r.name == "fxmerge.test"]
    assert told == ["1 of 3", "2 of 3", "stage ...", "stage: 0.0 s"]


def normalizing(seed: int, classes: int = 2, x: Tensor = X) -> nn.Module:
    """A network whose running statistics are those of some data."""
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Linear(3, 8),
        nn.BatchNorm1d(8),
        nn.ReLU(),
        nn.Linear(8, 8),
        nn.BatchNorm1d(8),
        nn.ReLU(),
        nn.Linear(8, classes),
    )
    for _ in range(60):
        model(x)
    return model.eval()


WRONG: list[Any] = [lambda x: 20 * x, lambda x: x + 4, lambda x: x / 5]


@pytest.mark.parametrize("change", but_slow(WRONG))
def test_data_that_running_statistics_are_not_of_are_told(change: Any, caplog: pytest.LogCaptureFixture) -> None:
    a, b = normalizing(0), normalizing(1)
    fxmerge.merge(a, b, [X[:128], X[128:]])
    fxmerge.fold(a, [X], 0.5)
    assert warnings_of(caplog) == []
    fxmerge.merge(a, b, [change(X[:128]), change(X[128:])], fxmerge.Recipe(fit=None))
    told = warnings_of(caplog)
    assert [text[: text.index(" was")] for text in told] == [
        f"The data are not like those that model {name}" for name in "AB"
    ]
    assert all(" of the 8 channels of '1.running_mean' are off by more than a deviation" in text for text in told)


def test_running_statistics_of_data_apart(caplog: pytest.LogCaptureFixture) -> None:
    a, b = normalizing(0), normalizing(1, x=20 * X)
    fxmerge.merge(a, b, loaders=[[X], [20 * X]])
    assert warnings_of(caplog) == []
    fxmerge.merge(a, b, loaders=[[20 * X], [X]])
    assert len(warnings_of(caplog)) == 2


def test_running_statistics_in_heads_are_of_their_own_model(caplog: pytest.LogCaptureFixture) -> None:
    a, b = normalizing(0), normalizing(1, classes=3)
    fxmerge.merge(a, b, [X], fxmerge.Recipe(share="2"))
    assert [text for text in warnings_of(caplog) if "trained on" in text] == []
    with torch.no_grad():
        b[4].running_mean += 50  # type: ignore[index,operator]
    fxmerge.merge(a, b, [X], fxmerge.Recipe(share="2"))
    (text,) = (text for text in warnings_of(caplog) if "trained on" in text)
    assert "model B was trained on: 8 of the 8 channels of 'heads.1." in text


@pytest.mark.parametrize("rows", [7, 8])
def test_few_rows_or_untrained_statistics_tell_nothing(rows: int, caplog: pytest.LogCaptureFixture) -> None:
    a, b = normalizing(0), normalizing(1)
    fxmerge.merge(a, b, [100 * X[:rows]], fxmerge.Recipe(fit=None))
    assert len(warnings_of(caplog)) == (0 if rows < 8 else 2)
    caplog.clear()
    for module in (*a, *b):
        if isinstance(module, nn.BatchNorm1d):
            module.reset_running_stats()
    fxmerge.merge(a, b, [100 * X], fxmerge.Recipe(fit=None))
    assert warnings_of(caplog) == []


def test_heads_that_are_far_from_their_models_are_told(caplog: pytest.LogCaptureFixture) -> None:
    """One unit in place of each model's thirty-two computes less than half of two random functions."""

    def network(seed: int, classes: int) -> nn.Module:
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(3, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, classes))

    pair = network(0, 4), network(1, 5)
    for width, count in ((1 / 32, 1), (2, 0)):
        caplog.clear()
        merged = fxmerge.merge(*pair, [X], fxmerge.Recipe(match=fxmerge.Zip(width=width)))
        told = [text for text in warnings_of(caplog) if "is far from its models" in text]
        assert len(told) == count
        if told:
            share = 100 * fxmerge.report(merged).errors["merged"]
            assert share > 50 and f"it misses {share:.0f}% of the variance of their outputs" in told[0]

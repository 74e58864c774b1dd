"""Networks beside the models that they are made of."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxmerge
from fxmerge.comparison import ENSEMBLE, PLAIN


def mlp(seed: int, outputs: int = 3) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, outputs)).eval()


def batches(count: int, seed: int = 0) -> list[Tensor]:
    return list(torch.randn(count, 50, 4, generator=torch.Generator().manual_seed(seed)))


FITTED, NEW = batches(4, 0), batches(5, 1)
QUIET = fxmerge.Run(progress=False)


def compared(networks: dict[str, nn.Module], models: list[nn.Module], **options: Any) -> fxmerge.Comparison:
    return fxmerge.compare(networks, models, NEW, run=QUIET, **options)


def test_distances_are_shares_of_the_variance_of_the_ensemble() -> None:
    a, b = mlp(0), mlp(1)
    table = compared({"other": mlp(2)}, [a, b])
    x = torch.cat(NEW)
    with torch.no_grad():
        mean = ((a(x) + b(x)) / 2).double()
        variance = (mean - mean.mean(0)).square().sum()
        for name, network in (("model A", a), ("model B", b), ("other", mlp(2))):
            expected = float((network(x).double() - mean).square().sum() / variance)
            assert table[name].distance == pytest.approx(expected, rel=1e-5)
    assert table[ENSEMBLE].distance == 0


@pytest.mark.slow
def test_the_standard_error_is_that_of_batches() -> None:
    """Over many samples of five batches, the distances scatter as the error says."""
    a, b = mlp(0), mlp(1)
    found = [fxmerge.compare({}, [a, b], batches(5, 10 + k), run=QUIET)["model A"] for k in range(25)]
    scatter = float(torch.tensor([row.distance for row in found]).std())
    error = sum(row.error for row in found) / len(found)
    assert 0.5 < error / scatter < 2


@pytest.mark.parametrize("change", [lambda y: 3 * y, lambda y: y + torch.tensor([5.0, -2.0, 100.0]), lambda y: -y])
def test_distances_do_not_depend_on_shift_and_scale(change: Callable[[Tensor], Tensor]) -> None:
    class Changed(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            return change(self.inner(x))

    plain = compared({}, [mlp(0), mlp(1)])
    changed = compared({}, [Changed(mlp(0)), Changed(mlp(1))])
    for name in ("model A", "model B", PLAIN):
        assert changed[name].distance == pytest.approx(plain[name].distance, rel=1e-4)


def test_rows_come_in_order_and_a_readout_helps_a_parent() -> None:
    models = [mlp(0), mlp(1)]
    merged = fxmerge.merge(*models, FITTED, run=QUIET)
    table = compared({"merge": merged}, models, calibration=FITTED)
    names = ["model A", "model B", "model A, new readout", "model B, new readout", ENSEMBLE, PLAIN, "merge"]
    assert [row.name for row in table.rows] == names
    for model in ("model A", "model B"):
        assert table[f"{model}, new readout"].distance < table[model].distance
    assert table["merge"].distance < table[PLAIN].distance
    assert set(table.networks) == {*names} - {ENSEMBLE}
    # A new readout changes the last layer only.
    own, new = models[0].state_dict(), table.networks["model A, new readout"].state_dict()
    assert torch.equal(own["0.weight"], new["0.weight"])
    assert not torch.equal(own["2.weight"], new["2.weight"])


def test_it_is_best_to_have_the_highest_score_or_else_the_least_distance() -> None:
    models = [mlp(0), mlp(1)]
    assert compared({"copy of A": mlp(0)}, models, weights=(1, 0)).best() in ("model A", "copy of A")
    wanted = mlp(1)

    def score(network: nn.Module) -> Tensor:
        assert not network.training
        assert not torch.is_grad_enabled()
        return -(network(NEW[0]) - wanted(NEW[0])).square().mean()

    table = compared({"other": mlp(2)}, models, score=score)
    assert table.best() == "model B"
    ensemble = ((mlp(0)(NEW[0]) + mlp(1)(NEW[0])) / 2).detach()
    expected = -float((ensemble - wanted(NEW[0]).detach()).square().mean())
    assert table[ENSEMBLE].score == pytest.approx(expected, rel=1e-5)
    assert table["model B"].score == pytest.approx(0, abs=1e-10)


def test_a_score_that_is_nan_wins_nothing() -> None:
    values = iter([math.nan, 1.0, math.nan, math.nan, 2.0])
    assert compared({"other": mlp(2)}, [mlp(0), mlp(1)], score=lambda network: next(values)).best() == "model B"


def test_the_table_as_a_text() -> None:
    text = str(compared({"other": mlp(2)}, [mlp(0), mlp(1)]))
    lines = text.splitlines()
    assert lines[0].split() == ["network", "distance"]
    assert [line.split("  ")[0] for line in lines[1:]] == ["model A", "model B", ENSEMBLE, PLAIN, "other"]


@pytest.mark.slow
def test_batch_norm_of_the_plain_average_is_of_the_calibration_data() -> None:
    def normal(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2)).eval()

    table = compared({}, [normal(0), normal(1)], calibration=FITTED)
    plain = table.networks[PLAIN]
    hidden = plain.get_submodule("0")(torch.cat(FITTED))
    torch.testing.assert_close(plain.state_dict()["1.running_mean"], hidden.mean(0), atol=1e-5, rtol=1e-4)


def test_networks_are_left_as_they_are() -> None:
    network = mlp(2).train()
    compared({"mine": network}, [mlp(0), mlp(1)])
    assert network.training


def test_outputs_of_several_kinds_count_alike() -> None:
    class Both(nn.Module):
        def __init__(self, seed: int) -> None:
            super().__init__()
            self.one, self.two = mlp(seed), mlp(seed + 10, 1)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.one(x), 1000 * self.two(x)

    table = compared({}, [Both(0), Both(1)])
    parts = [compared({}, [mlp(0), mlp(1)]), compared({}, [mlp(10, 1), mlp(11, 1)])]
    mean = sum(part["model A"].distance for part in parts) / 2
    assert table["model A"].distance == pytest.approx(mean, rel=1e-4)


@pytest.mark.parametrize(
    ("networks", "options", "message"),
    [
        ({"model A": mlp(0)}, {}, "'model A', which is a row of every comparison"),
        ({ENSEMBLE: mlp(0)}, {}, "'ensemble', which is a row"),
        ([mlp(0)], {}, "networks is no dict of networks by name"),
        ({"x": 3}, {}, "networks is no dict"),
        ({}, {"score": 0.9}, r"score is 0\.9; it must be a function"),
        ({}, {"score": lambda network: "good"}, "score gave 'good' for 'model A'"),
        ({}, {"weights": (1,)}, "1 weights for 2 models"),
    ],
)
def test_what_cannot_be_compared_is_told(networks: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(fxmerge.OptionError, match=message):
        compared(networks, [mlp(0), mlp(1)], **options)


def test_a_network_with_other_outputs_is_told() -> None:
    with pytest.raises(fxmerge.ArchitectureMismatchError, match=r"'wide' gives outputs of shapes \[\(50, 7\)\]"):
        compared({"wide": mlp(0, 7)}, [mlp(0), mlp(1)])


def test_there_must_be_batches() -> None:
    with pytest.raises(fxmerge.LoaderError, match="empty"):
        fxmerge.compare({}, [mlp(0), mlp(1)], [], run=QUIET)
    with pytest.raises(fxmerge.LoaderError, match="The loader is a Tensor"):
        fxmerge.compare({}, [mlp(0), mlp(1)], torch.zeros(4, 4), run=QUIET)
    with pytest.raises(fxmerge.OptionError, match="There is no row 'merge'"):
        compared({}, [mlp(0), mlp(1)])["merge"]


def test_calibration_data_may_be_an_iterator() -> None:
    models = [mlp(0), mlp(1)]
    listed, once = (compared({}, models, calibration=data) for data in (FITTED, iter(FITTED)))
    assert [row.distance for row in once.rows] == [row.distance for row in listed.rows]


def test_there_must_be_calibration_data() -> None:
    with pytest.raises(fxmerge.LoaderError, match="calibration is empty"):
        compared({}, [mlp(0), mlp(1)], calibration=[])


def test_names_are_checked_before_any_work() -> None:
    def inputs(batch: Tensor) -> tuple[tuple[Tensor], dict[str, Tensor]]:
        raise AssertionError("a batch was read")

    with pytest.raises(fxmerge.OptionError, match="'plain average', which is a row"):
        compared({PLAIN: mlp(2)}, [mlp(0), mlp(1)], inputs=inputs)

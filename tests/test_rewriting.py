import numpy as np
import pytest
import torch
from torch import nn

import fxmerge
from fxmerge.combine.average import average
from fxmerge.combine.batch_norm import batch_norm_statistics, recalibrate
from fxmerge.emit.bake import bake
from fxmerge.program.capture import capture_program
from fxmerge.program.run import Data, batch_inputs
from fxmerge.symmetry.flow import Flow, flows
from fxmerge.symmetry.group import analyse
from fxmerge.units.unit_map import UnitMap


def bn_net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 3), nn.BatchNorm2d(4), nn.Flatten()
    )


def test_recalibration_equals_batch_norm_in_train_mode() -> None:
    model = bn_net().eval()
    batches = [torch.randn(4, 3, 7, 7) * 3 + 1 for _ in range(3)]
    program = capture_program(model, (batches[0],))
    merged = bake(program, model.state_dict())
    assert recalibrate(merged, program, Data(batches, batch_inputs(model))) == 2
    for m in model:
        if isinstance(m, nn.BatchNorm2d):
            m.reset_running_stats()
            m.momentum = None
            m.train()
    with torch.no_grad():
        for x in batches:
            model(x)
    expected = model.state_dict()
    for name, value in merged.state_dict().items():
        if "running" in name:
            torch.testing.assert_close(value, expected[name])
    assert not any(m.training for m in merged.modules())


def test_recalibration_of_a_model_that_was_exported() -> None:
    model = bn_net().eval()
    exported = torch.export.export(model, (torch.randn(4, 3, 7, 7),))
    batches = [torch.randn(4, 3, 7, 7) * 3 + 1 for _ in range(2)]
    results = []
    for source in (model, exported):
        program = capture_program(source, (batches[0],))
        merged = bake(program, model.state_dict())
        recalibrate(merged, program, Data(batches, batch_inputs(model)))
        results.append(merged.state_dict())
    for name, value in results[0].items():
        if "running" in name:
            torch.testing.assert_close(value, results[1][name])


def test_pooled_moments_are_those_of_the_pooled_data() -> None:
    x, y = torch.randn(1000, 3) * 2 + 1, torch.randn(1000, 3) - 3
    states = [{"mean": data.mean(0), "var": data.var(0, correction=0)} for data in (x, y)]
    pooled = average(UnitMap.still(2), states, [0.5, 0.5], [("mean", "var")])
    both = torch.cat([x, y])
    torch.testing.assert_close(pooled["mean"], both.mean(0))
    torch.testing.assert_close(pooled["var"], both.var(0, correction=0))


def test_pooled_moments_of_merged_units_are_those_of_all_members() -> None:
    """The units of a convolution are merged at random; the inputs of BatchNorm show what moments these have."""
    models = [bn_net().eval() for _ in range(2)]
    data = [torch.randn(500, 6) * torch.rand(6) + torch.randn(6) for _ in models]
    for model, x in zip(models, data, strict=True):
        model[1].running_mean, model[1].running_var = x.mean(0), x.var(0, correction=0)
    found, symmetry = analyse(capture_program(models[0], (torch.randn(2, 3, 7, 7),)))
    consumed = frozenset(axis for axis, kind in flows(found).items() if kind is Flow.CONSUMES)
    into = [np.array([0, 0, 1, 2, 3, 5]), np.array([4, 0, 4, 4, 3, 5])]
    (size,) = (c.size for c in symmetry.units)
    units = UnitMap(symmetry.names, symmetry.layout, consumed, tuple((own,) for own in into), (size,))
    states = [model.state_dict() for model in models]
    pooled = average(units, states, [0.5, 0.5], [("1.running_mean", "1.running_var")])
    for unit in range(size):
        members = torch.cat([x[:, u] for x, own in zip(data, into, strict=True) for u in np.flatnonzero(own == unit)])
        torch.testing.assert_close(pooled["1.running_mean"][unit], members.mean())
        torch.testing.assert_close(pooled["1.running_var"][unit], members.var(correction=0))


def test_the_average_pools_statistics_and_keeps_counters_and_dtypes() -> None:
    state = {
        "w": torch.tensor([1.0, 2.0], dtype=torch.bfloat16),
        "mean": torch.tensor([0.0, 0.0]),
        "var": torch.tensor([1.0, 1.0]),
        "n": torch.tensor(7),
    }
    other = {"w": torch.tensor([3.0, 2.0], dtype=torch.bfloat16), "mean": torch.tensor([2.0, 0.0])}
    merged = average(UnitMap.still(2), [state, state | other], [0.5, 0.5], [("mean", "var")])
    assert merged["w"].tolist() == [2.0, 2.0]
    assert merged["w"].dtype is torch.bfloat16
    assert merged["mean"].tolist() == [1.0, 0.0]
    assert merged["var"].tolist() == [2.0, 1.0]
    assert merged["n"] == 7


def test_batch_norm_statistics_are_found_in_the_graph() -> None:
    names = batch_norm_statistics(capture_program(bn_net(), (torch.randn(2, 3, 7, 7),)))
    assert names == [("1.running_mean", "1.running_var"), ("4.running_mean", "4.running_var")]


def test_one_value_per_channel_cannot_be_estimated() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).eval()
    program = capture_program(model, (torch.randn(2, 3),))
    merged = bake(program, model.state_dict())
    with pytest.raises(fxmerge.LoaderError, match="use larger batches"):
        recalibrate(merged, program, Data([torch.randn(1, 3)], batch_inputs(model)))


def test_parameters_that_the_graph_does_not_use_are_kept() -> None:
    class Extra(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(2, 3), nn.Sequential(nn.Linear(2, 3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.used(x)
            return out

    model = Extra()
    merged = bake(capture_program(model, (torch.zeros(1, 2),)), model.state_dict())
    Extra().load_state_dict(merged.state_dict())

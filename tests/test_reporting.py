"""What is told of a result."""

import json
import pickle
from dataclasses import fields, replace

import pytest
import torch
from torch import nn

import fxmerge
from fxmerge.reporting import KEY, Report, named_errors


def net(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))


X = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def merged() -> nn.Module:
    return fxmerge.merge(net(0), net(1), [X], fxmerge.Recipe(combine=fxmerge.Average((3, 1))))


def test_all_of_a_merge_is_told(merged: nn.Module) -> None:
    report = fxmerge.report(merged)
    assert (report.models, report.weights, report.units_of, report.route) == (2, (0.75, 0.25), 0, "symbolic_trace")
    assert report.recipe is not None
    recipe = fxmerge.Recipe(fxmerge.Zip(), fxmerge.Average((3, 1)), fxmerge.LeastSquares())
    assert fxmerge.Recipe.from_dict(report.recipe) == recipe
    (one, two) = report.images
    assert one.keys() == two.keys() == {"0.weight[0]"}
    assert all(len(own["0.weight[0]"]) == 8 and set(own["0.weight[0]"]) <= set(range(8)) for own in (one, two))
    (quality,) = report.quality
    assert set(quality["0.weight[0]"]) == {"weights", "activations"}
    assert len(report.objective) == 1 and list(report.objective[0]) == sorted(report.objective[0])
    assert list(report.zip_objective) == sorted(report.zip_objective) != []
    several = [max(map(own["0.weight[0]"].count, own["0.weight[0]"])) > 1 for own in (one, two)]
    assert (report.zipped_within["0.weight[0]"] > 0) == any(several)
    assert report.layers.keys() == {"0.weight", "2.weight"}
    assert (dict(report.left), report.held_out) == ({}, True)
    assert set(report.errors) == {"merged", "models"} and set(report.errors["models"]) == {0, 1}
    assert (report.shared, report.demoted, dict(report.unknown_ops)) == ((), (), {})
    (found,) = (c for c in report.classes if c["structure"] == "free")
    assert (found["name"], found["size"]) == ("0.weight[0]", 8)
    assert ("0.weight", 0) in found["axes"] and ("2.weight", 1) in found["axes"]
    assert report.verification_error is not None and report.verification_error < 1e-12
    assert min(report.seconds.values()) >= 0 and "fitting" in report.seconds


def test_without_a_fit_nothing_is_told_of_one() -> None:
    report = fxmerge.report(fxmerge.merge(net(0), net(1), example=X))
    assert (dict(report.layers), dict(report.errors), report.held_out) == ({}, {}, False)
    assert set(report.quality[0]["0.weight[0]"]) == {"weights"}
    assert "distance" not in str(report) and "fitted" not in str(report) and "activations" not in str(report)


def test_what_is_not_verified_has_no_error_and_what_is_shared_is_named() -> None:
    a, b = net(0), net(1)
    b[2].load_state_dict(a[2].state_dict())
    recipe, run = fxmerge.Recipe(fit=None), fxmerge.Run(verify=False)
    report = fxmerge.report(fxmerge.merge(a, b, [X], recipe, run=run))
    assert report.verification_error is None
    assert report.shared == ("2.bias",)  # Units move along the other axis of its weight.


def test_a_report_is_plain_data(merged: nn.Module) -> None:
    told = merged.meta[KEY]  # type: ignore[union-attr]
    assert Report(**told) == fxmerge.report(merged)  # type: ignore[arg-type]
    assert fxmerge.report(merged).to_dict() == told
    assert {f.name for f in fields(Report)} == set(told)  # type: ignore[arg-type]
    assert b"fxmerge" not in pickle.dumps(told)
    json.dumps(told)


def test_it_is_printed_in_sentences(merged: nn.Module) -> None:
    report = fxmerge.report(merged)
    lines = str(report).splitlines()
    assert lines[0] == "2 models, merged; captured by symbolic_trace"
    weights = report.quality[0]["0.weight[0]"]["weights"]
    assert lines[1] == "the outputs stand for all models; Recipe(share='trunk') keeps their last layers apart"
    assert lines[2] == f"matched units are alike by {weights:.2f} in weights, on average"
    assert lines[3].startswith("matched units are alike by") and "in activations" in lines[3]
    assert lines[4] == "2 layers fitted, 0 parameters not fitted"
    models = ", ".join(f"{error:.3g}" for error in report.errors["models"].values())
    assert lines[5] == (
        "distance to the ensemble, as a share of its variance, on held-out data: "
        f"merged {report.errors['merged']:.3g}, models {models}"
    )
    assert lines[6].startswith("seconds: capture ") and len(lines) == 7
    fitted = str(replace(report, held_out=False, demoted=("a", "b"), recipe=None)).splitlines()
    assert "on the data of the fit: merged" in fitted[4]
    assert fitted[0] == "2 models, aligned; captured by symbolic_trace"
    assert fitted[5] == "failed verification: a, b"


def test_an_alignment_is_told_of_its_one_model() -> None:
    report = fxmerge.report(fxmerge.align(net(1), to=net(0), loader=[X]))
    assert (report.models, report.recipe, report.weights, len(report.images), len(report.quality)) == (
        2,
        None,
        (),
        1,
        1,
    )
    assert sorted(report.images[0]["0.weight[0]"]) == list(range(8))
    assert str(report).startswith("2 models, aligned")


def test_what_fxmerge_did_not_make_has_no_report(merged: nn.Module) -> None:
    other = torch.fx.symbolic_trace(net(0))
    older = torch.fx.symbolic_trace(net(0))
    older.meta[KEY] = {"method": "zip"}
    for module in (nn.Linear(2, 2), other, older):
        with pytest.raises(fxmerge.OptionError, match=rf"The {type(module).__name__} has no report, or one of another"):
            fxmerge.report(module)


def test_errors_by_the_names_of_a_report() -> None:
    assert named_errors({}) == {}
    assert named_errors({2: 0.5, None: 0.1, 0: 0.25}) == {"merged": 0.1, "models": {0: 0.25, 2: 0.5}}
    assert list(named_errors({2: 0.5, None: 0.1, 0: 0.25})["models"]) == [0, 2]

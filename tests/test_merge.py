import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import fxmerge
from tests.slow import crossed

MATCH: dict[str, fxmerge.Align | fxmerge.Zip] = {"align": fxmerge.Align(), "zip": fxmerge.Zip()}


class Net(nn.Module):
    def __init__(self, width: int = 8, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.stem = nn.Conv2d(2, width, 3, padding=1)
        self.norm = nn.BatchNorm2d(width)
        self.block = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        x = torch.relu(x + self.norm2(self.block(x)))
        out: Tensor = self.head(x.mean((2, 3)))
        return out


def data(count: int = 3) -> list[Tensor]:
    torch.manual_seed(9)
    return [torch.randn(6, 2, 5, 5) for _ in range(count)]


def settled(seed: int) -> Net:
    """A network whose BatchNorm statistics fit the data, as after training."""
    net = Net(seed=seed).train()
    for x in data():
        net(x)
    return net.eval()


def permuted(net: Net, seed: int) -> Net:
    symmetry = fxmerge.find_symmetry(net, (data()[0],))
    twin = Net()
    twin.load_state_dict(symmetry.sample_permutation(torch.Generator().manual_seed(seed)).apply(net.state_dict()))
    return twin.eval()


@pytest.mark.parametrize(("match", "loader"), crossed(MATCH.values(), [data(), None]))
def test_merging_a_permuted_copy_gives_the_model_back(
    loader: list[Tensor] | None, match: fxmerge.Align | fxmerge.Zip
) -> None:
    net = settled(0)
    merged = fxmerge.merge(
        net, permuted(net, 1), loader, recipe=fxmerge.Recipe(match=match, fit=None), example=data()[0]
    )
    weights = {k: v for k, v in net.state_dict().items() if "running" not in k and "num" not in k}
    for name, value in weights.items():
        torch.testing.assert_close(merged.state_dict()[name], value)


def test_align_keeps_the_function_and_finds_the_units() -> None:
    net = settled(0)
    other = permuted(net, 1)
    aligned = fxmerge.align(other, to=net, loader=data())
    x = data()[0]
    torch.testing.assert_close(aligned(x), other(x))
    for name, value in net.state_dict().items():
        assert torch.equal(aligned.state_dict()[name], value)


@pytest.mark.slow
def test_the_result_needs_nothing_of_fxmerge(tmp_path: Path) -> None:
    merged = fxmerge.merge(settled(0), settled(1), data())
    x = data()[0]
    torch.save(merged, tmp_path / "merged.pt")
    torch.save({"x": x, "y": merged(x)}, tmp_path / "xy.pt")
    torch.export.save(torch.export.export(merged, (x,)), tmp_path / "merged.pt2")
    script = f"""
import sys
sys.modules["fxmerge"] = None
import torch
xy = torch.load({str(tmp_path / "xy.pt")!r})
for model in (
    torch.load({str(tmp_path / "merged.pt")!r}, weights_only=False),
    torch.export.load({str(tmp_path / "merged.pt2")!r}).module(),
):
    torch.testing.assert_close(model(xy["x"]), xy["y"])
try:
    import fxmerge
except ImportError:
    print("ran without it")
"""
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert ran.stdout.strip() == "ran without it", ran.stderr


@pytest.mark.slow
def test_the_result_compiles_and_loads_into_the_original_class() -> None:
    merged = fxmerge.merge(settled(0), settled(1), data())
    x = data()[0]
    expected = merged(x)
    torch.testing.assert_close(torch.compile(merged, backend="aot_eager")(x), expected)
    original = Net()
    original.load_state_dict(merged.state_dict())
    torch.testing.assert_close(original.eval()(x), expected)


class Configured(nn.Module):
    """A model that symbolic tracing cannot capture, with dict inputs."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.a, self.b = nn.Linear(3, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor, scale: Tensor) -> dict[str, Tensor]:
        if x.shape[-1] != 3:
            raise ValueError("three features are needed")
        return {"logits": self.b(torch.relu(self.a(x)) * scale)}


def test_batches_may_be_dicts_with_keys_that_the_forward_does_not_take() -> None:
    batches = [{"x": torch.randn(n, 3), "scale": torch.rand(n, 1), "labels": torch.zeros(n)} for n in (4, 4, 1)]
    merged = fxmerge.merge(Configured(0), Configured(1), batches)
    for n in (1, 3):
        assert merged(x=torch.randn(n, 3), scale=torch.rand(n, 1))["logits"].shape == (n, 2)


def test_batches_may_be_tuples_or_need_a_function() -> None:
    pairs = [(x, torch.zeros(6)) for x in data()]
    a = fxmerge.merge(settled(0), settled(1), pairs)
    b = fxmerge.merge(settled(0), settled(1), [{"image": x} for x in data()], inputs=lambda d: ((d["image"],), {}))
    c = fxmerge.merge(settled(0), settled(1), iter(data()))
    for name, value in a.state_dict().items():
        assert torch.equal(b.state_dict()[name], value)
        assert torch.equal(c.state_dict()[name], value)


def test_inputs_are_never_modified() -> None:
    a, b = settled(0).train(), settled(1)
    before = [{k: v.clone() for k, v in m.state_dict().items()} for m in (a, b)]
    fxmerge.merge(a, b, data())
    assert all(m.training for m in a.modules())
    assert not any(m.training for m in b.modules())
    for m, state in zip((a, b), before, strict=True):
        assert all(torch.equal(v, state[k]) for k, v in m.state_dict().items())


@pytest.mark.slow
def test_the_same_inputs_and_seed_give_the_same_bytes() -> None:
    first, second = (
        fxmerge.merge(settled(0), settled(1), data(), run=fxmerge.Run(seed=5)).state_dict() for _ in range(2)
    )
    assert all(torch.equal(first[k], second[k]) for k in first)


def test_the_report_tells_what_was_done() -> None:
    recipe = fxmerge.Recipe(match=fxmerge.Zip(alpha=0.25))
    told = fxmerge.report(fxmerge.merge(settled(0), settled(1), data(), recipe))
    settled_recipe = replace(recipe, combine=fxmerge.Average(), fit=fxmerge.LeastSquares())
    assert told.recipe is not None and fxmerge.Recipe.from_dict(told.recipe) == settled_recipe
    assert (told.models, told.weights, told.units_of) == (2, (0.5, 0.5), 0)
    assert told.verification_error is not None and told.verification_error < 1e-12
    stages = {"capture", "symmetry", "verification", "activations", "matching", "combining", "emitting", "fitting"}
    assert set(told.seconds) == stages
    assert {"stem.weight", "head.weight"} <= told.layers.keys()
    assert all(layer["after"] <= layer["before"] for layer in told.layers.values())
    averaged = fxmerge.report(fxmerge.merge(settled(0), settled(1), data(), fxmerge.Recipe(fit=None)))
    assert set(averaged.seconds) == stages - {"fitting"} | {"calibration"}
    (free,) = (c for c in told.classes if c["structure"] == "free")
    assert free["size"] == 8
    assert set(told.quality[0][free["name"]]) == {"weights", "activations"}


def test_graph_modules_and_exported_programs_merge_too() -> None:
    a, b = settled(0), settled(1)
    expected = fxmerge.merge(a, b, data()).state_dict()
    traced = fxmerge.merge(torch.fx.symbolic_trace(a), torch.fx.symbolic_trace(b), data()).state_dict()
    exported = [torch.export.export(m, (data()[0],)) for m in (a, b)]
    for other in (traced, fxmerge.merge(*exported, data()).state_dict()):
        assert all(torch.equal(other[k], expected[k]) for k in expected)


def test_without_a_loader_moments_are_pooled() -> None:
    net = settled(0)
    twin = Net()
    twin.load_state_dict(net.state_dict() | {"norm.running_mean": net.norm.running_mean + 2})
    merged = fxmerge.merge(net, twin.eval(), example=data()[0])
    torch.testing.assert_close(merged.state_dict()["norm.running_mean"], net.norm.running_mean + 1)
    torch.testing.assert_close(merged.state_dict()["norm.running_var"], net.norm.running_var + 1)


@pytest.mark.slow
def test_weights_and_many_models() -> None:
    net = settled(0)
    copies = [net, permuted(net, 1), permuted(net, 2)]
    merged = fxmerge.merge_many(copies, data(), recipe=fxmerge.Recipe(match=fxmerge.Zip(reference=0), fit=None))
    torch.testing.assert_close(merged.state_dict()["head.weight"], net.head.weight)
    one = fxmerge.merge(
        net, settled(1), data(), recipe=fxmerge.Recipe(match=fxmerge.Align(), combine=fxmerge.Average((1, 0)), fit=None)
    )
    torch.testing.assert_close(one.state_dict()["head.weight"], net.head.weight)


def test_bfloat16_models_keep_their_dtype() -> None:
    a, b = (settled(s).bfloat16() for s in (0, 1))
    merged = fxmerge.merge(a, b, [x.bfloat16() for x in data()])
    assert merged.state_dict()["stem.weight"].dtype is torch.bfloat16


class Recurrent(nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.cell, self.out = nn.LSTM(3, 6, batch_first=True), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.out(self.cell(x)[0][:, -1])
        return out


@pytest.mark.slow
def test_a_graph_written_out_for_one_length_is_not_run_at_another() -> None:
    merged = fxmerge.merge(Recurrent(0), Recurrent(1), [torch.randn(4, 5, 3), torch.randn(2, 5, 3)])
    assert merged(torch.randn(3, 5, 3)).shape == (3, 2)
    with pytest.raises(fxmerge.LoaderError, match=r"has shape \(4, 7, 3\) .* takes \(any, 5, 3\)"):
        fxmerge.merge(Recurrent(0), Recurrent(1), [torch.randn(4, 5, 3), torch.randn(4, 7, 3)])


def test_activations_are_compared_by_correlation_or_by_cosine() -> None:
    """Activations with a large mean are alike by cosine, however they vary."""
    a, b = settled(0), settled(1)
    with torch.no_grad():
        for net in (a, b):
            net.norm.bias += 100
            net.norm2.bias += 100
    recipes = [fxmerge.Recipe(match=fxmerge.Align(alpha=0, similarity=kind)) for kind in ("pearson", "cosine")]
    correlation, cosine = (fxmerge.report(fxmerge.align(b, a, data(), recipe)).quality[0] for recipe in recipes)
    for name in correlation:
        assert correlation[name]["activations"] < 0.9 < cosine[name]["activations"]

"""Task vectors: the papers' formulas, entry for entry, and merges of models that were fine-tuned from one base."""

import copy
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import fxmerge
from fxmerge.combine.task_vectors import combine_task_vectors, task_arithmetic, ties
from tests.slow import but_slow, crossed

Floats = NDArray[np.float64]


class Net(nn.Module):
    """Channels, attention heads and BatchNorm: free and nested classes."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.stem, self.norm = nn.Conv2d(2, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.mix = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(x))).flatten(2).transpose(1, 2)
        x = x + self.mix(x, x, x, need_weights=False)[0]
        out: Tensor = self.head(x.mean(1))
        return out


torch.manual_seed(9)
DATA = [torch.randn(6, 2, 5, 5) for _ in range(2)]
RULES = [fxmerge.TaskArithmetic(), fxmerge.Ties()]


def tuned(base: Net, seed: int, change: float = 0.1) -> Net:
    """A model near the base, with statistics of its own."""
    net, generator = Net(), torch.Generator().manual_seed(seed)
    net.load_state_dict(base.state_dict())
    with torch.no_grad():
        for p in net.parameters():
            p += change * p.std() * torch.randn(p.shape, generator=generator)
        for x in DATA:
            net.train()(x + seed)
    return net.eval()


def permuted(net: Net, seed: int) -> Net:
    symmetry = fxmerge.find_symmetry(net, (DATA[0],))
    twin = Net()
    twin.load_state_dict(symmetry.sample_permutation(torch.Generator().manual_seed(seed)).apply(net.state_dict()))
    return twin.eval()


def literal_task_arithmetic(base: Floats, tuned: Sequence[Floats], weights: Sequence[float], scale: float) -> Floats:
    """theta_pre + lambda * sum_t tau_t, one entry after the other; a weight counts by how many times it is the mean."""
    result = base.copy()
    for i in range(len(base)):
        result[i] += scale * sum(w * len(tuned) * (t[i] - base[i]) for w, t in zip(weights, tuned, strict=True))
    return result


def literal_ties(
    base: Floats, tuned: Sequence[Floats], weights: Sequence[float], density: float, scale: float
) -> Floats:
    """Algorithm 1 of arXiv 2306.01708, one entry after the other, on flat vectors."""
    trimmed = []
    for t in tuned:
        tau = t - base
        keep = max(1, round(density * len(tau)))
        smallest = sorted(abs(tau), reverse=True)[keep - 1]
        trimmed.append([v if abs(v) >= smallest else 0.0 for v in tau])
    result = base.copy()
    for p in range(len(base)):
        mass = sum(w * tau[p] for w, tau in zip(weights, trimmed, strict=True))
        agreeing = [(w, tau[p]) for w, tau in zip(weights, trimmed, strict=True) if tau[p] * mass > 0 and w]
        if agreeing:
            result[p] += scale * sum(w * v for w, v in agreeing) / sum(w for w, _ in agreeing)
    return result


def flat_case(seed: int, models: int, coarse: bool) -> tuple[Floats, list[Floats]]:
    """Parameters of a base and of models; coarse ones in steps of 1/2, so that magnitudes tie and sums cancel."""
    rng = np.random.default_rng(seed)
    base, *tuned = rng.normal(size=(models + 1, 30)).round(3)
    if coarse:
        base, *tuned = rng.integers(-3, 4, size=(models + 1, 30)) / 2
    return base, list(tuned)


def as_state(flat: Floats) -> dict[str, Tensor]:
    """Thirty numbers as parameters of several shapes."""
    values = torch.from_numpy(flat)
    return {"a": values[:12].reshape(3, 4), "b": values[12:13].reshape(()), "c": values[13:].reshape(17, 1)}


def as_flat(state: dict[str, Tensor]) -> Floats:
    found: Floats = torch.cat([state[n].reshape(-1) for n in ("a", "b", "c")]).numpy()
    return found


WEIGHTS = [[1 / 2, 1 / 2], [3 / 4, 1 / 4], [1.0, 0.0], [1 / 3] * 3, [1 / 2, 1 / 4, 1 / 4]]


@pytest.mark.parametrize("coarse", [False, True], ids=["general", "ties in magnitude"])
@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
@pytest.mark.parametrize("seed", range(5))
def test_entries_are_those_of_the_formulas(seed: int, weights: list[float], coarse: bool) -> None:
    base, tuned = flat_case(seed, len(weights), coarse)
    state, states = as_state(base), [as_state(t) for t in tuned]
    sums = task_arithmetic(state, states, weights, [], scale=0.4)
    np.testing.assert_allclose(as_flat(sums), literal_task_arithmetic(base, tuned, weights, 0.4), rtol=0, atol=1e-12)
    for density in (0.001, 0.2, 0.5, 1.0):
        elected = ties(state, states, weights, [], density=density, scale=0.7)
        expected = literal_ties(base, tuned, weights, density, 0.7)
        np.testing.assert_allclose(as_flat(elected), expected, rtol=0, atol=1e-12)


def test_equal_magnitudes_are_kept_or_trimmed_together() -> None:
    base, tuned = torch.zeros(5), torch.tensor([3.0, -2.0, 2.0, 2.0, 1.0])
    trimmed = ties({"w": base}, [{"w": tuned}] * 2, [0.5, 0.5], [], density=0.4, scale=1.0)
    assert trimmed["w"].tolist() == [3.0, -2.0, 2.0, 2.0, 0.0]


def test_no_sign_is_elected_where_the_sum_is_zero() -> None:
    states = [{"w": torch.tensor([v, 1.0])} for v in (0.1, 0.1, -0.2)]
    merged = ties({"w": torch.zeros(2)}, states, [1 / 3] * 3, [], density=1.0, scale=1.0)
    torch.testing.assert_close(merged["w"], torch.tensor([0.0, 1.0]))
    assert merged["w"][0] == 0


def test_dtypes_complex_numbers_counters_and_statistics() -> None:
    base = {
        "w": torch.tensor([256.0, 1.0], dtype=torch.bfloat16),
        "z": torch.tensor([1 + 1j]),
        "n": torch.tensor(7),
        "mean": torch.tensor([9.0]),
        "var": torch.tensor([9.0]),
    }
    states = [
        {
            "w": torch.tensor([258.0, 1.0], dtype=torch.bfloat16),
            "z": torch.tensor([1 + shift + 1j * shift]),
            "n": torch.tensor(8),
            "mean": torch.tensor([shift]),
            "var": torch.tensor([1.0]),
        }
        for shift in (0.0, 2.0)
    ]
    rules = (fxmerge.TaskArithmetic(scale=0.5), fxmerge.Ties(density=1, scale=1.0))
    for rule in rules:
        merged = combine_task_vectors(rule, base, states, [0.5, 0.5], [("mean", "var")])
        assert list(merged) == list(base)
        # Added one by one in bfloat16, whose steps are 2 at 256, the halves of the two vectors would be lost.
        assert merged["w"].tolist() == [258.0, 1.0]
        assert merged["w"].dtype is torch.bfloat16
        assert merged["z"].dtype is torch.complex64
        assert merged["n"] == 7
        assert (merged["mean"].item(), merged["var"].item()) == (1.0, 2.0)
    # The imaginary parts changed by -1 and 1, so that no sign is elected for them.
    assert merged["z"].item() == 3 + 1j


def test_tied_parameters_count_once_in_the_density() -> None:
    shared = torch.zeros(3)
    moved = torch.tensor([3.0, 2.0, 1.0])
    base = {"in": shared, "out": shared, "b": torch.zeros(3)}
    state = {"in": moved, "out": moved, "b": torch.tensor([0.5, 0.4, 0.3])}
    merged = ties(base, [state, state], [0.5, 0.5], [], density=0.5, scale=1.0)
    assert merged["in"].tolist() == merged["out"].tolist() == [3.0, 2.0, 1.0]
    assert merged["b"].tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize(("rule", "loader"), crossed(RULES, [DATA, None]))
def test_models_in_the_units_of_the_base_stay_as_they_are(rule: Any, loader: list[Tensor] | None) -> None:
    base = Net().eval()
    models = [tuned(base, 1), tuned(base, 2)]
    merged = fxmerge.merge(*models, loader, base=base, recipe=fxmerge.Recipe(combine=rule), example=DATA[0])
    statistics = [("norm.running_mean", "norm.running_var")]
    states = [m.state_dict() for m in models]
    expected = combine_task_vectors(rule, base.state_dict(), states, [0.5, 0.5], statistics)
    expected["norm.num_batches_tracked"] = sum(s["norm.num_batches_tracked"] for s in states)  # As pooled statistics.
    for name, value in merged.state_dict().items():
        if loader is None or "running" not in name:
            assert torch.equal(value, expected[name]), name


@pytest.mark.slow
def test_units_that_are_alike_in_the_base_stay_too() -> None:
    base = mlp(8)
    with torch.no_grad():
        base[0].weight[4:], base[0].bias[4:], base[2].weight[:, 4:] = 0, 0, 0
        base[0].weight[1], base[0].bias[1], base[2].weight[:, 1] = base[0].weight[0], base[0].bias[0], 1
        base[2].weight[:, 0] = 1
    for seed in range(5):
        model = copy.deepcopy(base)
        torch.manual_seed(seed)
        with torch.no_grad():
            for p in model.parameters():
                p += 0.1 * torch.randn_like(p)
        aligned = fxmerge.align(model, to=base, example=torch.zeros(1, 3))
        assert torch.equal(aligned.state_dict()["0.weight"], model[0].weight)


@pytest.mark.parametrize(("rule", "loader"), but_slow(product(RULES, [DATA, None])))
def test_permuted_models_come_back_to_the_units_of_the_base(rule: Any, loader: list[Tensor] | None) -> None:
    base = Net().eval()
    models = [tuned(base, 1), tuned(base, 2), tuned(base, 3)]
    moved = [permuted(models[0], 5), models[1], permuted(models[2], 6)]
    assert not torch.equal(moved[0].stem.weight, models[0].stem.weight)
    recipe = fxmerge.Recipe(combine=replace(rule, weights=(2, 1, 1)))
    expected = fxmerge.merge_many(models, loader, recipe, base=base, example=DATA[0]).state_dict()
    found = fxmerge.merge_many(moved, loader, recipe, base=base, example=DATA[0]).state_dict()
    for name, value in found.items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.slow
def test_alignment_is_skipped_with_a_symmetry_that_pins_everything() -> None:
    base = Net().eval()
    models = [permuted(tuned(base, 1), 5), tuned(base, 2)]
    still = fxmerge.find_symmetry(base, (DATA[0],), pin=["*"])
    merged = fxmerge.merge(*models, base=base, symmetry=still, example=DATA[0]).state_dict()
    weights = [m.head.weight - base.head.weight for m in models]
    torch.testing.assert_close(merged["head.weight"], base.head.weight + 0.4 * (weights[0] + weights[1]))


def test_the_report_tells_how_task_vectors_were_combined() -> None:
    base = Net().eval()
    models = [tuned(base, 1), tuned(base, 2)]
    default = fxmerge.report(fxmerge.merge(*models, DATA, base=base))
    assert default.recipe == fxmerge.Recipe(fxmerge.Align(), fxmerge.TaskArithmetic(), fit=None).to_dict()
    assert (default.models, len(default.quality)) == (2, 2)
    assert default.units_of is None
    merged = fxmerge.merge(*models, DATA, fxmerge.Recipe(combine=fxmerge.Ties(density=0.5)), base=base)
    assert (fxmerge.report(merged).recipe or {})["combine"] == {"kind": "Ties", "density": 0.5}


def test_the_base_is_not_modified() -> None:
    base = Net().train()
    before = {k: v.clone() for k, v in base.state_dict().items()}
    fxmerge.merge(tuned(base, 1), tuned(base, 2), DATA, base=base)
    assert base.training
    assert all(torch.equal(v, before[k]) for k, v in base.state_dict().items())


def mlp(width: int = 4, activation: nn.Module | None = None) -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, width), activation or nn.ReLU(), nn.Linear(width, 2))


@pytest.mark.parametrize(
    ("base", "message"),
    [
        (mlp(5), r"of shape \(5, 3\) in the base and .*\(4, 3\) in model A"),
        (nn.Sequential(nn.Linear(3, 4)), r"'2\.weight' is in model A but not in the base"),
        (mlp(activation=nn.Sigmoid()), "the base and model A have equal parameter shapes but compute different"),
    ],
)
def test_bases_of_another_architecture(base: nn.Module, message: str) -> None:
    with pytest.raises(fxmerge.ArchitectureMismatchError, match=message):
        fxmerge.merge(mlp(), mlp(), [torch.randn(5, 3)], base=base)


def test_task_vectors_need_a_base_and_alignment() -> None:
    x = torch.randn(5, 3)
    with pytest.raises(fxmerge.OptionError, match=r"Recipe\.combine is Ties, which needs a base"):
        fxmerge.merge(mlp(), mlp(), [x], recipe=fxmerge.Recipe(combine=fxmerge.Ties()))
    with pytest.raises(fxmerge.OptionError, match="TaskArithmetic needs models aligned with their base"):
        fxmerge.merge(mlp(), mlp(), [x], fxmerge.Recipe(match=fxmerge.Zip()), base=mlp())
    with pytest.raises(fxmerge.OptionError, match=r"A base is given, and Recipe\.combine is Average, which takes none"):
        fxmerge.merge(mlp(), mlp(), [x], fxmerge.Recipe(combine=fxmerge.Average()), base=mlp())
    wrong: Any
    for wrong in ("ties", fxmerge.Ties):
        with pytest.raises(fxmerge.OptionError, match=r"combine is .*; it must be .* Ties\(\.\.\.\)"):
            fxmerge.Recipe(combine=wrong)


@pytest.mark.parametrize("density", [0, -0.5, 1.1, float("nan"), "half"])
def test_density_out_of_range(density: Any) -> None:
    with pytest.raises(fxmerge.OptionError, match=r"above 0, up to 1"):
        fxmerge.Ties(density=density)


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), "full", None])
def test_scales_that_are_no_numbers(scale: Any) -> None:
    for rule in (fxmerge.Ties, fxmerge.TaskArithmetic):
        with pytest.raises(fxmerge.OptionError, match="must be a finite number"):
            rule(scale=scale)

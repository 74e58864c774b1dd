from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fxmerge
from fxmerge.choose import CANDIDATES, DEFAULT, MARGIN, best, disagreement
from fxmerge.job import prepare
from fxmerge.matching.search import match
from fxmerge.run import Data, batch_inputs
from tests.slow import but_slow


class Net(nn.Module):
    """Two classes that share a parameter, normalised by running statistics, and one of which no two know anything."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.a, self.norm, self.b = nn.Linear(5, 12), nn.BatchNorm1d(12), nn.Linear(12, 10)
        self.head, self.apart = nn.Linear(10, 3), nn.Sequential(nn.Linear(5, 9), nn.Tanh(), nn.Linear(9, 3))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(torch.relu(self.b(torch.relu(self.norm(self.a(x)))))) + self.apart(x)
        return out


def data() -> list[Tensor]:
    torch.manual_seed(9)
    return [torch.randn(24, 5) for _ in range(3)]


def nets() -> tuple[Net, Net]:
    return Net(0).eval(), Net(1).eval()


class Counting:
    """A loader that counts how often it is read from the start."""

    def __init__(self) -> None:
        self.passes = 0

    def __iter__(self) -> Iterator[Tensor]:
        self.passes += 1
        yield from data()


def equal(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(v, b.state_dict()[k]) for k, v in a.state_dict().items())


# -------------------------------------------------------------------------- chosen


def test_what_is_chosen_is_the_merge_of_that_alpha_bit_for_bit() -> None:
    chosen = fxmerge.merge(*nets(), data(), alpha="auto")
    meta = chosen.meta["fxmerge"]
    assert tuple(meta["alpha_errors"]) == CANDIDATES
    assert meta["alpha"] == best(meta["alpha_errors"])
    assert equal(chosen, fxmerge.merge(*nets(), data(), alpha=meta["alpha"]))
    assert equal(chosen, fxmerge.merge(*nets(), data(), alpha="auto"))


def test_the_errors_are_those_of_the_merges() -> None:
    a, b = nets()
    errors = fxmerge.merge(a, b, data(), alpha="auto", weights=(3, 1)).meta["fxmerge"]["alpha_errors"]
    x = torch.cat(data())
    target = (3 * a(x) + b(x)) / 4
    for alpha, error in errors.items():
        merged = fxmerge.merge(a, b, data(), alpha=alpha, weights=(3, 1), combine="average")
        expected = ((merged(x) - target).square().sum() / target.square().sum()).detach()
        assert error == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize(
    ("errors", "alpha"),
    [
        ({0.0: 1.0, 0.5: 1.0, 1.0: 1.0}, DEFAULT),
        ({0.0: 0.9, 0.5: 1.0, 1.0: 0.8}, 1.0),
        ({0.0: 1 - MARGIN / 2, 0.5: 1.0, 1.0: 2.0}, DEFAULT),
        ({0.0: 1.0, 0.5: float("inf"), 1.0: float("inf")}, 0.0),
        ({0.0: float("inf"), 0.5: float("inf"), 1.0: float("inf")}, DEFAULT),
        ({0.0: 0.0, 0.5: 0.0, 1.0: 0.0}, DEFAULT),
    ],
)
def test_an_alpha_must_be_clearly_better(errors: dict[float, float], alpha: float) -> None:
    assert best(errors) == alpha


@pytest.mark.slow
def test_many_models_and_alignment_choose_too() -> None:
    many = fxmerge.merge_many([*nets(), Net(2).eval()], data(), alpha="auto").meta["fxmerge"]
    assert many["alpha"] == best(many["alpha_errors"])
    a, b = nets()
    aligned = fxmerge.align(b, a, data(), alpha="auto")
    assert (
        aligned.meta["fxmerge"]["alpha_errors"]
        == fxmerge.merge(a, b, data(), method="align", alpha="auto").meta["fxmerge"]["alpha_errors"]
    )
    torch.testing.assert_close(aligned(data()[0]), b(data()[0]))


@pytest.mark.slow
def test_a_permuted_copy_is_the_same_at_every_alpha() -> None:
    net, _ = nets()
    planted = fxmerge.find_symmetry(net, (data()[0],)).sample(torch.Generator().manual_seed(0))
    twin = Net(1).eval()
    twin.load_state_dict(planted.apply(net.state_dict()))
    meta = fxmerge.merge(net, twin, data(), method="align", alpha="auto").meta["fxmerge"]
    assert meta["alpha"] == DEFAULT
    assert len(set(meta["alpha_errors"].values())) == 1


def test_models_stay_as_they_are_and_the_loader_is_read_a_few_times() -> None:
    a, b = nets()
    before = [{k: v.clone() for k, v in m.state_dict().items()} for m in (a, b)]
    loader = Counting()
    fxmerge.merge(a, b, loader, alpha="auto")
    assert all(torch.equal(m.state_dict()[k], v) for m, s in zip((a, b), before, strict=True) for k, v in s.items())
    # The first batch, the shapes, the activations; statistics and judging of each candidate; statistics of the result.
    assert loader.passes == 3 + 2 * len(CANDIDATES) + 1


@pytest.mark.parametrize("alpha", but_slow(["auto", {"a.weight[0]": 0.0}, 0.25], 2))
def test_without_a_loader_alpha_is_one(alpha: Any) -> None:
    merged = fxmerge.merge(*nets(), alpha=alpha, args=(data()[0],))
    assert (merged.meta["fxmerge"]["alpha"], merged.meta["fxmerge"]["alpha_errors"]) == (1.0, {})
    assert equal(merged, fxmerge.merge(*nets(), alpha=1, args=(data()[0],)))


class Pair(nn.Module):
    """Two outputs of very different size, one that is zero, and one that is not floating-point."""

    def __init__(self) -> None:
        super().__init__()
        self.big, self.small = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"a": 1e3 * self.big(x), "b": self.small(x), "zero": 0 * x, "count": (x > 0).sum(1)}


def test_outputs_count_alike_whatever_their_size() -> None:
    models = (Pair().eval(), Pair().eval())
    job = prepare(models, data2(), 0.5, None, None, None, (), None)
    target, off = dict(models[0].state_dict()), dict(models[0].state_dict())
    off["small.weight"] = 2 * off["small.weight"]
    calibration = Data(data2(), batch_inputs(models[0]))
    assert disagreement(job.program, target, [target], [1.0], calibration) == 0
    assert disagreement(job.program, off, [target], [1.0], calibration) == pytest.approx(0.5)
    off["small.weight"] = off["small.weight"] * float("inf")
    assert disagreement(job.program, off, [target], [1.0], calibration) == float("inf")


def data2() -> list[Tensor]:
    return [torch.randn(6, 2, generator=torch.Generator().manual_seed(n)) for n in range(2)]


# -------------------------------------------------------------------------- by class


@pytest.mark.parametrize("alpha", but_slow([0.3, 0.0, 0.5, 1.0]))
def test_equal_alphas_by_class_are_one_alpha(alpha: float) -> None:
    names = fxmerge.find_symmetry(Net(0).eval(), (data()[0],)).names
    by_name = fxmerge.merge(*nets(), data(), alpha=dict.fromkeys(names, alpha))
    assert equal(by_name, fxmerge.merge(*nets(), data(), alpha=alpha))


def test_what_is_in_no_entry_is_matched_at_the_default_alpha() -> None:
    assert equal(fxmerge.merge(*nets(), data(), alpha={}), fxmerge.merge(*nets(), data(), alpha=DEFAULT))


@pytest.mark.parametrize("alpha", but_slow([0.0, 1.0]))
def test_a_class_apart_from_all_others_is_matched_by_its_own_alpha(alpha: float) -> None:
    a, b = nets()
    name = "apart.0.weight[0]"
    mixed, all_alike, default = (
        fxmerge.align(b, a, data(), alpha=own).meta["fxmerge"] for own in ({name: alpha}, alpha, DEFAULT)
    )
    assert mixed["images"][name] == all_alike["images"][name]
    assert {n: i for n, i in mixed["images"].items() if n != name} == {
        n: i for n, i in default["images"].items() if n != name
    }
    assert mixed["alpha"] == {n: alpha if n == name else DEFAULT for n in mixed["images"]}


def test_alphas_by_class_still_raise_one_objective() -> None:
    a, b = nets()
    symmetry = fxmerge.find_symmetry(a, (data()[0],))
    rng = np.random.default_rng(0)
    for _ in range(10):
        correlation = {n: torch.from_numpy(rng.uniform(-1, 1, (c.size,) * 2)) for n, c in enumerate(symmetry.units)}
        alpha = dict(enumerate(rng.uniform(size=len(symmetry.units)).tolist()))
        trace = match(symmetry, a.state_dict(), b.state_dict(), correlation, alpha=alpha).trace
        assert list(trace) == sorted(trace)


def test_nested_classes_have_names_too() -> None:
    def grouped(seed: int) -> nn.Sequential:
        torch.manual_seed(seed)
        layers = [nn.Conv2d(2, 6, 1), nn.GroupNorm(3, 6), nn.ReLU(), nn.Conv2d(6, 2, 1)]
        return nn.Sequential(*layers).eval()

    a, b, x = grouped(0), grouped(1), torch.randn(8, 2, 3, 3)
    names = fxmerge.find_symmetry(a, (x,)).names
    assert len(names) == 2
    for name in names:
        assert fxmerge.merge(a, b, [x], alpha={name: 0.75}).meta["fxmerge"]["alpha"][name] == 0.75


@pytest.mark.parametrize(
    ("alpha", "message"),
    [
        (
            {"a.weight": 0.3},
            r"alpha names 'a\.weight', which is no class of the symmetry\. Near it are 'a.*\[0\]'",
        ),
        ({"nothing like it": 1}, "no class of the symmetry"),
        ({"a.weight[0]": 1.5}, r"alpha of 'a\.weight\[0\]' is 1\.5; it must be a number from 0"),
        ("best", "alpha is 'best'; the only word for it is 'auto', other than a number from 0"),
        ([0.5], r"alpha is \[0\.5\]; it must be a number from 0"),
    ],
)
def test_alphas_that_are_none(alpha: Any, message: str) -> None:
    with pytest.raises(fxmerge.OptionError, match=message):
        fxmerge.merge(*nets(), data(), alpha=alpha)

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fxmerge


def chain() -> nn.Sequential:
    torch.manual_seed(0)  # Not one whose units are all dead on a few inputs.
    layers = [nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 2)]
    return nn.Sequential(*layers)


def test_a_sound_symmetry_passes_to_rounding() -> None:
    model, x = chain(), torch.randn(4, 3)
    verified = fxmerge.find_symmetry(model, (x,)).verify(model, (x,), trials=3)
    assert verified.demoted == ()
    assert verified.error is not None and verified.error < 1e-12


def test_an_unsound_class_is_found_demoted_and_named() -> None:
    model, x = chain(), torch.randn(4, 3)
    symmetry = fxmerge.find_symmetry(model, (x,))
    # Let the second class forget that it is also on the third layer's columns.
    broken = tuple(replace(a, roles=()) if (a.parameter, a.dim) == ("4.weight", 1) else a for a in symmetry.layout)
    unsound = replace(symmetry, layout=tuple(a for a in broken if a.roles))
    verified = unsound.verify(model, (x,))
    assert verified.demoted == ("2.weight[0]",)
    assert {c.name for c in verified.classes if c.structure != "pinned"} == {"0.weight[0]", "4.weight[0]"}
    assert verified.error is not None and verified.error < 1e-12
    assert "demoted: 2.weight[0]" in str(verified)


def test_outputs_that_are_true_or_false_are_compared() -> None:
    class Decided(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.chain = chain()

        def forward(self, x: Tensor) -> Tensor:
            y = self.chain(x)
            decided: Tensor = y > y.mean(0)
            return decided

    model, x = Decided(), torch.randn(200, 3)
    symmetry = fxmerge.find_symmetry(model, (x,))
    assert symmetry.verify(model, (x,)).demoted == ()
    broken = tuple(
        replace(a, roles=()) if (a.parameter, a.dim) == ("chain.4.weight", 1) else a for a in symmetry.layout
    )
    unsound = replace(symmetry, layout=tuple(a for a in broken if a.roles))
    assert unsound.verify(model, (x,)).demoted == ("chain.2.weight[0]",)


def test_what_initialisation_makes_constant_does_not_hide_a_wrong_permutation() -> None:
    """A fresh BatchNorm has all means 0 and variances 1: permuting or not permuting them looks the same."""
    model, x = nn.Sequential(nn.Linear(3, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 2)).eval(), torch.randn(4, 3)
    symmetry = fxmerge.find_symmetry(model, (x,))
    layout = tuple(a for a in symmetry.layout if a.parameter != "1.running_var")
    assert len(layout) < len(symmetry.layout)
    assert replace(symmetry, layout=layout).verify(model, (x,)).demoted == ("0.weight[0]",)


def test_signals_that_fade_in_a_fresh_network_do_not_hide_a_wrong_permutation() -> None:
    """Small convolutions before BatchNorm are as good as large ones, once its statistics are those of the data."""
    layers: list[nn.Module] = []
    for i in range(12):
        layers += [nn.Conv2d(6 if i else 3, 6, 1, bias=False), nn.BatchNorm2d(6), nn.SiLU()]
        nn.init.normal_(layers[-3].weight, std=0.01)  # type: ignore[arg-type]
    model, x = nn.Sequential(*layers, nn.Conv2d(6, 2, 1)).eval(), torch.randn(2, 3, 4, 4)
    symmetry = fxmerge.find_symmetry(model, (x,))
    layout = tuple(a for a in symmetry.layout if a.parameter != "1.weight")
    assert len(layout) < len(symmetry.layout)
    assert symmetry.verify(model, (x,)).demoted == ()
    assert replace(symmetry, layout=layout).verify(model, (x,)).demoted == ("0.weight[0]",)


def test_a_model_that_casts_to_lower_precision_is_verified_in_float64() -> None:
    class Casts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 50), nn.Linear(50, 2)

        def forward(self, x: Tensor) -> Tensor:
            h = self.a(x).to(torch.float32)
            return self.b((h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype))

    model, x = Casts(), torch.randn(4, 3)
    verified = fxmerge.find_symmetry(model, (x,)).verify(model, (x,))
    assert verified.error is not None and verified.error < 1e-13


def test_a_model_that_draws_random_numbers_is_verified_with_the_same_ones() -> None:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 5), nn.Linear(5, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(torch.relu(self.a(x))) + torch.rand_like(x[:, :2])

    model, x = Noisy(), torch.randn(4, 3)
    verified = fxmerge.find_symmetry(model, (x,)).verify(model, (x,))
    assert verified.demoted == ()
    assert verified.error is not None and verified.error < 1e-12


def test_a_model_that_is_not_deterministic_is_refused() -> None:
    class Counts(nn.Sequential):
        calls = 0

        def forward(self, x: Tensor) -> Tensor:
            Counts.calls += 1  # Of the class: copies of the model share it.
            return super().forward(x) * self.calls

    model, x = chain(), torch.randn(4, 3)
    symmetry = fxmerge.find_symmetry(model, (x,))
    with pytest.raises(fxmerge.FxmergeError, match="different outputs for the same inputs"):
        symmetry.verify(Counts(*model), (x,))


def test_the_model_is_not_changed() -> None:
    model, x = chain(), torch.randn(4, 3)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    fxmerge.find_symmetry(model, (x,)).verify(model, (x,))
    assert all(np.array_equal(v, before[k]) and v.dtype is torch.float32 for k, v in model.state_dict().items())


class Chaotic(nn.Module):
    """Multiplies whatever small differences there are, rounding errors among them, by a large number."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.a, self.b, self.factor = nn.Linear(3, 16), nn.Linear(16, 2), factor

    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(self.factor * self.b(torch.relu(self.a(x))))


def test_a_model_that_multiplies_rounding_errors_is_judged_by_what_rounding_does() -> None:
    model, x = Chaotic(1e9), torch.randn(4, 3)
    symmetry = fxmerge.find_symmetry(model, (x,))
    verified = symmetry.verify(model, (x,), trials=3)
    assert verified.demoted == ()
    assert verified.error is not None and verified.error > 1e-8
    layout = tuple(a for a in symmetry.layout if a.parameter != "a.bias")
    assert replace(symmetry, layout=layout).verify(model, (x,)).demoted == ("a.weight[0]",)


class Caches(nn.Module):
    """Keeps, in eval mode, what it has derived from a parameter, until it is trained again."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 5), nn.Linear(5, 2)
        self.scale = nn.Parameter(torch.rand(5))
        self.kept: dict[str, Tensor] = {}

    def train(self, mode: bool = True) -> "Caches":
        if mode:
            self.kept = {}
        return super().train(mode)

    def forward(self, x: Tensor) -> Tensor:
        if str(x.device) not in self.kept:
            self.kept[str(x.device)] = self.scale.exp()
        return self.b(torch.relu(self.a(x)) * self.kept[str(x.device)])


def test_what_a_module_keeps_of_its_parameters_is_not_taken_for_a_constant() -> None:
    model, x = Caches().eval(), torch.randn(4, 3)
    expected = model(x)
    symmetry = fxmerge.find_symmetry(model, (x,))
    assert any(a.parameter == "scale" for a in symmetry.layout)
    assert symmetry.verify(model, (x,)).demoted == ()
    assert torch.equal(model(x), expected), "capturing left something behind"
    layout = tuple(a for a in symmetry.layout if a.parameter != "scale")
    assert replace(symmetry, layout=layout).verify(model, (x,)).demoted == ("scale[0]",)


def test_a_symmetry_of_another_model_is_refused() -> None:
    x = (torch.randn(5, 3),)
    symmetry = fxmerge.find_symmetry(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), x)
    with pytest.raises(fxmerge.PermutationError, match=r"no parameter '2\.weight'"):
        symmetry.verify(nn.Sequential(nn.Linear(3, 4), nn.Tanh()), x)
    with pytest.raises(fxmerge.PermutationError, match=r"'0\.weight' has shape \(5, 3\).*\(4, 3\)"):
        symmetry.verify(nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2)), x)

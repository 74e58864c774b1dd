"""Networks with complex parameters: found, proven, matched and merged as real ones are."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fxmerge
from tests.slow import but_slow, crossed

MATCH: dict[str, fxmerge.Align | fxmerge.Zip] = {"align": fxmerge.Align(), "zip": fxmerge.Zip()}


class Spectral(nn.Module):
    """A Fourier layer: a complex matrix for each of the lowest frequencies."""

    def __init__(self, channels: int, modes: int) -> None:
        super().__init__()
        self.modes = modes
        self.weight = nn.Parameter(torch.randn(channels, channels, modes, dtype=torch.cfloat) / channels)

    def forward(self, x: Tensor) -> Tensor:
        spectrum = torch.fft.rfft(x)
        low = torch.einsum("bim,iom->bom", spectrum[..., : self.modes], self.weight)
        return torch.fft.irfft(F.pad(low, (0, spectrum.shape[-1] - self.modes)), n=x.shape[-1])


class FourierOperator(nn.Module):
    """A small Fourier neural operator: (batch, 2, places) to (batch, 1, places)."""

    def __init__(self, channels: int = 6, modes: int = 3, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.inward, self.outward = nn.Conv1d(2, channels, 1), nn.Conv1d(channels, 1, 1)
        self.spectral = nn.ModuleList(Spectral(channels, modes) for _ in range(2))
        self.beside = nn.ModuleList(nn.Conv1d(channels, channels, 1) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.inward(x)
        for spectral, beside in zip(self.spectral, self.beside, strict=True):
            x = F.gelu(spectral(x) + beside(x))
        return self.outward(x)  # type: ignore[no-any-return]


def data(count: int = 4) -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(16, 2, 12, generator=generator) for _ in range(count)]


def planted(model: nn.Module, symmetry: fxmerge.Symmetry) -> tuple[FourierOperator, fxmerge.Permutation]:
    """The model with its units permuted, and how."""
    permutation = symmetry.sample_permutation(torch.Generator().manual_seed(3))
    other = FourierOperator(seed=1)
    other.load_state_dict(permutation.apply(model.state_dict()))
    return other.eval(), permutation


def test_the_channels_of_a_fourier_operator_move() -> None:
    model, x = FourierOperator().eval(), data()[:1]
    symmetry = fxmerge.find_symmetry(model, (x[0],))
    assert symmetry.log_order() == pytest.approx(3 * math.lgamma(7))
    assert symmetry.unknown == symmetry.probed == {}
    verified = symmetry.verify(model, (x[0],), trials=3)
    assert verified.demoted == ()
    assert verified.error is not None
    assert verified.error < 1e-12


def test_a_wrong_permutation_of_complex_parameters_is_found() -> None:
    model, x = FourierOperator().eval(), data()[0]
    symmetry = fxmerge.find_symmetry(model, (x,))
    layout = tuple(a for a in symmetry.layout if (a.parameter, a.dim) != ("spectral.0.weight", 1))
    assert len(layout) < len(symmetry.layout)
    assert replace(symmetry, layout=layout).verify(model, (x,)).demoted != ()


@pytest.mark.parametrize(("match", "given"), crossed(MATCH.values(), [True, False]))
def test_a_planted_permutation_is_found_again(match: fxmerge.Align | fxmerge.Zip, given: bool) -> None:
    a, x = FourierOperator().eval(), data()
    symmetry = fxmerge.find_symmetry(a, (x[0],))
    b, _ = planted(a, symmetry)
    recipe = fxmerge.Recipe(match=match, fit=None)
    merged = fxmerge.merge(a, b, x if given else None, recipe, example=x[0])
    assert torch.allclose(merged(x[0]), a(x[0]), atol=1e-5)
    if isinstance(match, fxmerge.Align):
        aligned = fxmerge.align(b, to=a, loader=x if given else None, example=x[0])
        assert all(torch.allclose(v, a.state_dict()[n], atol=1e-6) for n, v in aligned.state_dict().items())


@pytest.mark.parametrize("match", but_slow(MATCH.values()))
def test_networks_with_complex_parameters_are_refitted_but_for_these(match: fxmerge.Align | fxmerge.Zip) -> None:
    a, b, x = FourierOperator(seed=0).eval(), FourierOperator(seed=1).eval(), data()
    merged = fxmerge.merge(a, b, x, fxmerge.Recipe(match=match))
    assert torch.isfinite(merged(x[0])).all()
    assert "complex" in fxmerge.report(merged).left["spectral.0.weight"]
    assert "inward.weight" in fxmerge.report(merged).layers
    FourierOperator().load_state_dict(merged.state_dict())


@pytest.mark.slow
def test_three_networks_with_complex_parameters_are_merged() -> None:
    x = data()
    models = [FourierOperator(seed=seed).eval() for seed in range(3)]
    assert torch.isfinite(fxmerge.merge_many(models, x)(x[0])).all()
    assert torch.isfinite(fxmerge.merge_many(models, example=x[0])(x[0])).all()


class Complex(nn.Module):
    """A network of complex numbers throughout, also in its output, and a cast of its own."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.a = nn.Parameter(torch.randn(6, 4, dtype=torch.cfloat))
        self.b = nn.Parameter(torch.randn(2, 6, dtype=torch.cfloat))

    def forward(self, x: Tensor) -> Tensor:
        h = F.linear(x.to(torch.complex64), self.a)
        return F.linear(h * h.abs(), self.b)


def test_complex_outputs_are_compared() -> None:
    a, b, x = Complex(0), Complex(1), torch.randn(64, 4)
    symmetry = fxmerge.find_symmetry(a, (x,))
    assert symmetry.log_order() == pytest.approx(math.lgamma(7))
    verified = symmetry.verify(a, (x,), trials=3)
    assert verified.demoted == ()
    assert verified.error is not None
    assert verified.error < 1e-12
    for match in MATCH.values():
        assert torch.isfinite(fxmerge.merge(a, b, [x], fxmerge.Recipe(match=match))(x)).all()
    errors = fxmerge.report(fxmerge.merge(a, b, [x])).errors
    assert min(errors["merged"], *errors["models"].values()) > 0


def test_complex_entries_that_are_not_finite_are_named() -> None:
    a, b = Complex(0), Complex(1)
    with torch.no_grad():
        b.b[0, 0] = complex(math.nan, 0)
    with pytest.raises(fxmerge.NonFiniteError, match="'b'"):
        fxmerge.merge(a, b, [torch.randn(8, 4)])


def test_a_real_network_and_a_complex_one_are_told_apart() -> None:
    a, b = nn.Linear(3, 2), nn.Linear(3, 2, dtype=torch.cfloat)
    with pytest.raises(fxmerge.ArchitectureMismatchError, match="complex64"):
        fxmerge.merge(a, b, example=torch.randn(8, 3))

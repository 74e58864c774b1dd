"""Changes of basis: how they act on parameters."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from fxmerge import Symmetry, UnitMapError, find_symmetry
from fxmerge.units.basis import Basis, centred_frame, gathered, plane, random_matrices
from fxmerge.units.kind import Kind
from tests.oracle.continuous_networks import NETWORKS, SEQUENCES, WORDS
from tests.oracle.nullity import generic

ATTENTION = "attention, packed, fused and causal"
TIED = "tied embedding, RMSNorm"


def planted(name: str, seed: int = 0) -> tuple[nn.Module, tuple[Tensor, ...], Symmetry, Basis]:
    model, args = generic(NETWORKS[name].model(), NETWORKS[name].args)
    symmetry = find_symmetry(model, args)
    return model, args, symmetry, symmetry.sample(torch.Generator().manual_seed(seed)).basis


def near(a: dict[str, Tensor], b: dict[str, Tensor], tolerance: float = 1e-12) -> bool:
    return a.keys() == b.keys() and all(torch.allclose(a[n], b[n], rtol=0, atol=tolerance) for n in a)


@pytest.mark.parametrize("name", [ATTENTION, TIED, "bilinear layer on two maps", "conv bottleneck"])
def test_a_change_of_basis_is_undone_by_its_inverse(name: str) -> None:
    model, args, symmetry, basis = planted(name)
    state = model.state_dict()
    moved = basis.apply(state)
    assert not near(moved, dict(state), 1e-2)
    assert near(basis.inverse().apply(moved), dict(state))
    assert near(symmetry.identity_basis().apply(state), dict(state), 0)
    with torch.no_grad():
        expected = model(*args)
        model.load_state_dict(moved)
        assert torch.allclose(model(*args), expected, rtol=0, atol=1e-10 * float(expected.abs().max()))


def test_products_apply_the_right_factor_first() -> None:
    model, _, symmetry, first = planted(ATTENTION)
    state = model.state_dict()
    then = symmetry.sample(torch.Generator().manual_seed(1)).basis
    only = Basis(then.mixed, {next(iter(then.matrices)): next(iter(then.matrices.values()))})
    for second in (then, only):
        assert near((second @ first).apply(state), second.apply(first.apply(state)))
        assert near((first @ second).apply(state), first.apply(second.apply(state)))
    assert not near((then @ first).apply(state), (first @ then).apply(state), 1e-2)
    assert near((first.inverse() @ first).apply(state), dict(state))


def test_all_names_of_a_tied_parameter_get_one_tensor() -> None:
    class TwoNames(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.read, self.write = nn.Embedding(5, 3), nn.Linear(3, 5, bias=False)
            self.write.weight = self.read.weight

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.write(nn.functional.rms_norm(self.read(x), (3,)))
            return y

    model = TwoNames()
    symmetry = find_symmetry(model, (torch.arange(5)[None],))
    assert symmetry.kind(0) == Kind.ORTHOGONAL
    moved = symmetry.sample().basis.apply(model.state_dict())
    assert moved["read.weight"] is moved["write.weight"]
    assert list(moved) == ["read.weight", "write.weight"]
    only = symmetry.sample().basis.apply({"read.weight": model.read.weight.detach()})
    assert list(only) == ["read.weight"], "an alias that is not there is not added"


def test_what_does_not_change_is_kept() -> None:
    model, _, _, basis = planted(ATTENTION)
    state = model.state_dict()
    before = {name: tensor.clone() for name, tensor in state.items()}
    moved = basis.apply(state)
    assert moved._metadata is state._metadata  # type: ignore[attr-defined]
    assert list(moved) == list(state)
    touched = {own.axis.parameter for axes in basis.mixed for own in axes}
    assert any(name not in touched for name in state)
    assert all((moved[name] is state[name]) == (name not in touched) for name in state)
    assert near(dict(state), before, 0), "the state dict that is given stays as it is"
    assert not hasattr(basis.apply(before), "_metadata")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_dtypes_are_kept_and_sums_are_taken_in_single_precision(dtype: torch.dtype) -> None:
    model, _, _, basis = planted(ATTENTION)
    state = {name: tensor.to(dtype) for name, tensor in model.state_dict().items()}
    moved, exact = basis.apply(state), basis.apply({name: tensor.double() for name, tensor in state.items()})
    size = max(float(tensor.abs().max()) for tensor in exact.values())
    for name, tensor in moved.items():
        assert tensor.dtype == dtype
        # A parameter has up to two axes, and is rounded after each.
        assert torch.allclose(tensor.double(), exact[name], rtol=0, atol=4 * size * torch.finfo(dtype).eps), name


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda s: s.pop("0.weight"), "no parameter '0.weight'"),
        (lambda s: s.update({"0.weight": torch.zeros(4, 7)}), r"'0.weight' has shape \(4, 7\), .* \(4, 6\)"),
    ],
)
def test_an_error_names_the_parameter(edit: Callable[[dict[str, Tensor]], object], message: str) -> None:
    model, _, _, basis = planted(ATTENTION)
    state = dict(model.state_dict())
    edit(state)
    with pytest.raises(UnitMapError, match=message):
        basis.apply(state)


@pytest.mark.parametrize("kind", [Kind.UNITARY, Kind.COMPLEX])
def test_random_turns(kind: Kind) -> None:
    drawn = random_matrices(kind, 50, 2, torch.Generator().manual_seed(0))
    assert drawn.shape == (50, 2, 2) and drawn.dtype == torch.float64
    assert torch.equal(drawn, random_matrices(kind, 50, 2, torch.Generator().manual_seed(0)))
    assert torch.allclose(drawn[:25] @ drawn[25:], drawn[25:] @ drawn[:25], rtol=0, atol=1e-12)
    values, ones = torch.linalg.svdvals(drawn), torch.ones(50, 2, dtype=torch.float64)
    assert torch.allclose(values[:, :1], values[:, 1:]) and bool((torch.linalg.det(drawn) > 0).all())
    assert torch.allclose(values, ones) == (kind == Kind.UNITARY)
    assert float(values.min()) > 0.5 - 1e-9 and float(values.max()) < 2 + 1e-9
    corners = {(bool(a > 0), bool(b > 0)) for a, b in drawn[:, :, 0]}
    assert len(corners) == 4  # All angles.


def test_a_plane_is_multiplied_by_complex_numbers() -> None:
    numbers = torch.randn(5, 2, dtype=torch.complex128)
    product = plane(numbers[:, 0]) @ torch.view_as_real(numbers[:, 1])[..., None]
    assert torch.allclose(torch.view_as_complex(product[..., 0]), numbers[:, 0] * numbers[:, 1])


@pytest.mark.parametrize("kind", [Kind.CENTRED, Kind.ORTHOGONAL, Kind.GENERAL_LINEAR])
def test_random_matrices(kind: Kind) -> None:
    drawn = random_matrices(kind, 50, 4, torch.Generator().manual_seed(0))
    again = random_matrices(kind, 50, 4, torch.Generator().manual_seed(0))
    assert drawn.shape == (50, 4, 4) and drawn.dtype == torch.float64 and torch.equal(drawn, again)
    ones, values = torch.ones(4, dtype=torch.float64), torch.linalg.svdvals(drawn)
    keeps_ones = torch.allclose(drawn @ ones, ones.expand(50, 4))
    assert keeps_ones == (kind == Kind.CENTRED)
    assert torch.allclose(values, torch.ones_like(values)) == (kind != Kind.GENERAL_LINEAR)
    assert float(values.min()) > 0.5 - 1e-9 and float(values.max()) < 2 + 1e-9
    assert (torch.linalg.det(drawn) > 0).any() and (torch.linalg.det(drawn) < 0).any()
    assert torch.linalg.matrix_rank((drawn - drawn[0])[1:].flatten(1)) >= kind.dimension(4)


@pytest.mark.parametrize("size", [2, 3, 7])
def test_centred_frame(size: int) -> None:
    frame = centred_frame(size)
    assert torch.allclose(frame.sum(0), torch.zeros(size - 1, dtype=torch.float64), atol=1e-12)
    assert torch.allclose(frame.T @ frame, torch.eye(size - 1, dtype=torch.float64), atol=1e-12)


def test_gathered_entries_are_those_that_a_change_of_basis_mixes() -> None:
    model, _, _, basis = planted(ATTENTION)
    state = model.state_dict()
    for number, matrix in basis.matrices.items():
        moved = Basis(basis.mixed, {number: matrix}).apply(state)
        for own in basis.mixed[number]:
            acting = torch.linalg.inv(matrix).mT if own.inverse else matrix
            before, after = (gathered(s[own.axis.parameter], own) for s in (state, moved))
            assert before.shape[:2] == matrix.shape[:2]
            axes = [a for a in basis.mixed[number] if a.axis.parameter == own.axis.parameter]
            if len(axes) == 1:
                assert torch.allclose(acting @ before, after)


def test_the_examples_are_what_the_tests_are_about() -> None:
    assert NETWORKS[ATTENTION].args is SEQUENCES and NETWORKS[TIED].args is WORDS

"""Inner products of parameter slices."""

import pytest
import torch

from fxmerge.evidence.weights import BLOCK, Placing, Similarities, add_products, inner, scale, similarity, slices
from fxmerge.matching.problem import floats
from fxmerge.program.capture import capture_program
from fxmerge.symmetry.group import analyse
from tests.networks import mlp, vectors


@pytest.mark.parametrize("rows", [1, BLOCK - 1, BLOCK, 2 * BLOCK + 3])
def test_products_of_rows_are_added_above_the_diagonal(rows: int) -> None:
    torch.manual_seed(0)
    x, total = torch.randn(rows, 5, dtype=torch.float64), torch.randn(rows, rows, dtype=torch.float64)
    expected = total + 3 * x @ x.T
    add_products(total, x, 3.0)
    torch.testing.assert_close(total.triu(), expected.triu())


def test_a_scale_makes_the_inner_product_the_number_of_entries_times_the_cosine() -> None:
    a, b = torch.tensor([[3.0, 0.0]]), torch.tensor([[6.0, 0.0]])
    assert inner(a, b) * scale(a, b) == 2
    assert scale(a, torch.zeros(1, 2)) == 0


def test_what_is_kept_of_a_class_gives_what_is_computed_anew() -> None:
    torch.manual_seed(0)
    model = mlp(0)
    symmetry = analyse(capture_program(model, (vectors()[0],)))[1]
    a = floats(symmetry, model.state_dict())
    b = {name: torch.randn_like(tensor) for name, tensor in a.items()}
    scales, where = {name: scale(a[name], b[name]) for name in a}, slices(symmetry)
    kept = Similarities(a, scales)
    identity = symmetry.identity()
    for seed in range(3):
        order = symmetry.sample_permutation(torch.Generator().manual_seed(seed)) if seed else identity
        moved = order.apply(b)
        stamps = {(axis.parameter, axis.dim): seed for axis in symmetry.layout}
        for number in symmetry.choices:
            found = kept.of(number, where[number], Placing(moved, order.images[number], stamps))
            torch.testing.assert_close(found, similarity(a, moved, where[number], scales))


def test_parameters_of_several_dtypes_are_compared_in_the_widest() -> None:
    torch.manual_seed(0)
    model = mlp(0)
    symmetry = analyse(capture_program(model, (vectors()[0],)))[1]
    a = floats(symmetry, model.state_dict())
    mixed = {name: tensor.double() if k % 2 else tensor for k, (name, tensor) in enumerate(a.items())}
    wide, scales = {name: tensor.double() for name, tensor in a.items()}, dict.fromkeys(a, 1.0)
    for number, where in slices(symmetry).items():
        kept = Similarities(mixed, scales)
        expected = similarity(wide, wide, where, scales)
        for stamp in range(2):
            stamps = {(axis.parameter, axis.dim): stamp for axis in symmetry.layout}
            got = kept.of(number, where, Placing(mixed, symmetry.identity().images[number], stamps))
            torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5)

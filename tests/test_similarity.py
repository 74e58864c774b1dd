import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fxmerge
from fxmerge.capture import capture_program
from fxmerge.run import Data, batch_inputs
from fxmerge.similarity import weights
from fxmerge.similarity.activations import MAX_ROWS, correlations, find_taps
from fxmerge.symmetry.group import Symmetry, analyse
from fxmerge.symmetry.propagate import Propagation


def analysed(model: nn.Module, x: Tensor) -> tuple[Propagation, Symmetry]:
    return analyse(capture_program(model.eval(), (x,)))


def cnn(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(2, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.Flatten(), nn.Linear(5 * 16, 3)).eval()


def test_activation_correlations_equal_numpy_on_all_data_at_once() -> None:
    a, b = cnn(0), cnn(1)
    batches = [torch.randn(4, 2, 6, 6) for _ in range(3)]
    found, symmetry = analysed(a, batches[0])
    states, pairs = (a.state_dict(), b.state_dict()), [(0, 0), (0, 1)]
    got = correlations(found, symmetry, states, Data(batches, batch_inputs(a)), ("model A", "model B"), pairs)[0]
    with torch.no_grad():
        units = [m[:3](torch.cat(batches)).transpose(0, 1).reshape(5, -1).numpy() for m in (a, b)]
    expected = np.corrcoef(*units)
    np.testing.assert_allclose(got[0, 0], expected[:5, :5], atol=1e-5)
    np.testing.assert_allclose(got[0, 1], expected[:5, 5:], atol=1e-5)


def test_activations_are_taken_where_a_contraction_consumes_them() -> None:
    found, symmetry = analysed(cnn(0), torch.randn(4, 2, 6, 6))
    (tap,) = find_taps(found, symmetry)
    # After the flatten, every channel shows at 16 places.
    assert tap.order.shape == (5, 16)
    assert tap.order[1].tolist() == list(range(16, 32))


def test_a_unit_that_never_varies_correlates_with_nothing() -> None:
    a, b = cnn(0), cnn(1)
    with torch.no_grad():
        a[1].bias[2] = -1e4
    x = torch.randn(4, 2, 6, 6)
    found, symmetry = analysed(a, x)
    got = correlations(
        found, symmetry, (a.state_dict(), b.state_dict()), Data([x], batch_inputs(a)), ("A", "B"), [(0, 1)]
    )[0][0, 1]
    assert torch.equal(got[2], torch.zeros(5))
    assert torch.isfinite(got).all()


def test_rows_are_subsampled_above_the_limit() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    x = torch.randn(3 * MAX_ROWS, 3)
    found, symmetry = analysed(model, x)
    state = model.state_dict()
    got = correlations(found, symmetry, (state, state), Data([x], batch_inputs(model)), ("A", "B"), [(0, 1)])[0][0, 1]
    assert torch.allclose(got.diagonal(), torch.ones(4), atol=1e-4)


def test_the_order_and_size_of_batches_do_not_matter_for_what_streams() -> None:
    a, b = cnn(0), cnn(1)
    x = torch.randn(8, 2, 6, 6)
    found, symmetry = analysed(a, x)
    states = (a.state_dict(), b.state_dict())
    one = correlations(found, symmetry, states, Data([x], batch_inputs(a)), ("A", "B"), [(0, 1)])[0][0, 1]
    two = correlations(found, symmetry, states, Data([x[:5], x[5:]], batch_inputs(a)), ("A", "B"), [(0, 1)])[0][0, 1]
    torch.testing.assert_close(one, two, atol=1e-5, rtol=0)


def test_a_nan_activation_is_refused_with_its_place() -> None:
    model = cnn(0)
    x = torch.randn(4, 2, 6, 6)
    found, symmetry = analysed(model, x)
    bad = x.clone()
    bad[0] = float("inf")
    state = model.state_dict()
    with pytest.raises(fxmerge.NonFiniteError, match=r"model B|model A.*graph node"):
        correlations(
            found, symmetry, (state, state), Data([bad], batch_inputs(model)), ("model A", "model B"), [(0, 1)]
        )


def test_weight_similarity_is_the_scaled_inner_product_of_slices() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    symmetry = fxmerge.find_symmetry(model, (torch.zeros(2, 3),))
    a = dict(model.state_dict())
    b = {k: torch.randn_like(v) for k, v in a.items()}
    scales = {"0.weight": 2.0, "0.bias": 3.0, "2.weight": 5.0}
    got = weights.similarity(a, b, weights.slices(symmetry)[0], scales)
    expected = (
        2 * a["0.weight"] @ b["0.weight"].T
        + 3 * torch.outer(a["0.bias"], b["0.bias"])
        + 5 * a["2.weight"].T @ b["2.weight"]
    )
    torch.testing.assert_close(got, expected)


def test_slices_of_grouped_weights_take_the_rows_of_their_group() -> None:
    model = nn.Sequential(nn.Conv2d(1, 6, 1), nn.ReLU(), nn.Conv2d(6, 4, 1, groups=2), nn.ReLU(), nn.Conv2d(4, 1, 1))
    symmetry = fxmerge.find_symmetry(model, (torch.zeros(1, 1, 2, 2),))
    weight = torch.arange(12.0).reshape(4, 3, 1, 1)
    on_columns = [
        s
        for found in weights.slices(symmetry).values()
        for s in found
        if (s.axis.parameter, s.axis.dim) == ("2.weight", 1)
    ]
    (columns,) = (s for s in on_columns if len(s.slots) == 6)
    assert sorted(map(tuple, columns.of(weight).tolist())) == [(0, 3), (1, 4), (2, 5), (6, 9), (7, 10), (8, 11)]

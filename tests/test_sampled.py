"""The similarities of some units that are kept of a merge."""

import numpy as np
import pytest
import torch
from torch import nn

import fxmerge
from fxmerge.evidence.sampled import ENTRIES, LEAST, MOST, Sample, units_kept
from fxmerge.reporting import made_with


def net(seed: int, hidden: int = 12) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, hidden), nn.Tanh(), nn.Linear(hidden, hidden), nn.Tanh(), nn.Linear(hidden, 2))


X = torch.randn(256, 4, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("data", [None, [X]])
@pytest.mark.parametrize("recipe", [fxmerge.Recipe(fxmerge.Align()), fxmerge.Recipe(fxmerge.Zip())])
def test_a_network_and_its_copy_in_another_order_are_alike_on_the_diagonal(
    data: list[torch.Tensor] | None, recipe: fxmerge.Recipe
) -> None:
    """The parameters differ a little, since of equal networks there is nothing to match."""
    a, b = net(0), net(0)
    with torch.no_grad():
        for parameter in b.parameters():
            parameter.mul_(1 + 0.01 * torch.randn_like(parameter))
    shuffle = fxmerge.find_symmetry(a, (X,)).sample_permutation(torch.Generator().manual_seed(0))
    b.load_state_dict(shuffle.apply(b.state_dict()))
    merged = fxmerge.merge(a, b, data, recipe, example=X)
    found = made_with(merged).similarities
    assert [one.name for one in found] == ["0.weight[0]", "2.weight[0]"]
    for one in found:
        assert one.space == ("weights" if data is None else "activations")
        assert {one.reference, one.model} == {"model A", "model B"} and one.before.shape == one.after.shape == (12, 12)
        assert one.after.diagonal().min() > 0.99 > one.before.diagonal().mean()
        # The same numbers in another order.
        assert np.allclose(np.sort(one.before.ravel()), np.sort(one.after.ravel()), atol=1e-5) or data is None


def test_the_mean_over_all_units_is_the_quality_of_the_report() -> None:
    aligned = fxmerge.align(net(1), net(0), [X])
    (quality,) = fxmerge.report(aligned).quality
    for one in made_with(aligned).similarities:
        assert one.means[1] == pytest.approx(quality[one.name]["activations"], abs=1e-5)


def test_weights_after_matching_are_those_of_the_aligned_network() -> None:
    a, b = net(0), net(1)
    aligned = fxmerge.align(b, a, example=X)
    first = made_with(aligned).similarities[0]

    def rows(model: nn.Module) -> torch.Tensor:
        state = model.state_dict()
        parts = [state["0.weight"], state["0.bias"][:, None], state["2.weight"].T]
        scaled = [part.double() * part.numel() ** 0.5 / part.double().norm() for part in parts]
        return nn.functional.normalize(torch.cat(scaled, 1), dim=1)

    assert np.allclose(first.after, rows(a) @ rows(aligned).T, atol=1e-5)
    assert np.allclose(first.before, rows(a) @ rows(b).T, atol=1e-5)


def test_large_classes_are_sampled_and_all_fits_into_what_is_kept() -> None:
    assert units_kept(0, 0) == MOST and units_kept(10**6, 1) == LEAST
    for classes, pairs in [(37, 1), (100, 2), (500, 3)]:
        assert 2 * classes * pairs * units_kept(classes, pairs) ** 2 <= max(ENTRIES, 2 * classes * pairs * LEAST**2)
    (one, _) = made_with(fxmerge.merge(net(0, 200), net(1, 200), example=X)).similarities
    assert one.size == 200 and len(one.units) == MOST and one.units[0] == 0 and one.units[-1] == 199
    assert (np.diff(one.units) > 0).all()


def test_the_units_that_are_matched_go_to_one_place() -> None:
    generator = np.random.default_rng(0)
    reference, model = generator.permutation(30), generator.permutation(30)
    sample = Sample.of(reference, model, 7)
    assert len(sample.units) == 7 and (reference[sample.units] == model[sample.matched]).all()


def test_several_models_are_each_compared_with_the_reference() -> None:
    merged = fxmerge.merge_many([net(0), net(1), net(2)], [X])
    found = made_with(merged).similarities
    assert len(found) == 4 and len({one.reference for one in found}) == 1
    assert len({one.model for one in found} | {one.reference for one in found}) == 3
    report = fxmerge.report(merged)
    assert found[0].reference == f"model {'ABC'[report.units_of or 0]}"


def test_nothing_is_kept_where_nothing_is_matched() -> None:
    assert made_with(fxmerge.merge(net(0), net(1), [X], fxmerge.Recipe(match=None))).similarities == ()
    assert made_with(fxmerge.fold(net(0), [X], 0.5)).similarities == ()

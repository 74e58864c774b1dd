from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import fxmerge
from fxmerge.program.capture import capture_program
from fxmerge.refitting.layers import find_layers
from fxmerge.refitting.routers import router_layers


class Mixture(nn.Module):
    """Four experts of one layer each, and a way to weigh them."""

    def __init__(self, weigh: Callable[[Tensor], Tensor], *, spread: float = 1.0) -> None:
        super().__init__()
        self.hidden, self.router = nn.Linear(5, 8), nn.Linear(8, 4)
        self.experts = nn.Parameter(torch.randn(4, 3, 8))
        self.weigh = weigh
        with torch.no_grad():
            self.router.weight.mul_(spread)

    def forward(self, x: Tensor) -> Tensor:
        h = self.hidden(x).relu()
        return (torch.einsum("...d,eod->...eo", h, self.experts) * self.weigh(self.router(h))[..., None]).sum(-2)


def softmax(scores: Tensor) -> Tensor:
    return scores.softmax(-1)


def in_wide_numbers(scores: Tensor) -> Tensor:
    return scores.double().softmax(-1).to(scores.dtype)


def best_of_softmax(scores: Tensor) -> Tensor:
    best, chosen = scores.softmax(-1).topk(2, -1)
    return torch.zeros_like(scores).scatter(-1, chosen, best / best.sum(-1, keepdim=True))


def softmax_of_best(scores: Tensor) -> Tensor:
    best, chosen = scores.topk(2, -1)
    return torch.zeros_like(scores).scatter(-1, chosen, best.softmax(-1))


def sigmoid(scores: Tensor) -> Tensor:
    return scores.sigmoid()


def over_rows(scores: Tensor) -> Tensor:
    return scores.softmax(0)


def also_as_they_are(scores: Tensor) -> Tensor:
    return scores.softmax(-1) + scores


def scaled_best(scores: Tensor) -> Tensor:
    best, chosen = scores.topk(2, -1)
    return torch.zeros_like(scores).scatter(-1, chosen, best)


@pytest.mark.parametrize("weigh", [softmax, in_wide_numbers, best_of_softmax, softmax_of_best])
def test_a_router_is_what_a_softmax_reads(weigh: Callable[[Tensor], Tensor]) -> None:
    layers = find_layers(capture_program(Mixture(weigh), (torch.randn(6, 5),)))
    assert [layer.name for layer in router_layers(layers.all)] == ["router.weight"]


@pytest.mark.parametrize("weigh", [sigmoid, over_rows, also_as_they_are, scaled_best])
def test_scores_that_count_for_themselves_are_left(weigh: Callable[[Tensor], Tensor]) -> None:
    layers = find_layers(capture_program(Mixture(weigh), (torch.randn(6, 5),)))
    assert "router.weight" in {layer.name for layer in layers.all}
    assert router_layers(layers.all) == []


@pytest.mark.parametrize("weigh", [softmax, best_of_softmax, softmax_of_best])
def test_a_router_is_fitted_to_the_mean_of_the_probabilities(weigh: Callable[[Tensor], Tensor]) -> None:
    torch.manual_seed(0)
    models = [Mixture(weigh, spread=6.0).eval() for _ in range(2)]
    data = [torch.randn(256, 5) for _ in range(6)]
    recipe = fxmerge.Recipe(match=fxmerge.Align(), fit=fxmerge.LeastSquares())
    told = fxmerge.report(fxmerge.merge(*models, data, recipe)).layers["router.weight"]
    assert told["entropy"] < told["cross_entropy_after"] < told["cross_entropy_before"]


def test_a_copy_with_its_experts_in_another_order_gives_the_router_back() -> None:
    torch.manual_seed(0)
    model = Mixture(best_of_softmax).double().eval()
    data = [torch.randn(256, 5, dtype=torch.float64) for _ in range(6)]
    symmetry = fxmerge.find_symmetry(model, (data[0],))
    copy = Mixture(best_of_softmax).double().eval()
    copy.load_state_dict(symmetry.sample_permutation(torch.Generator().manual_seed(1)).apply(model.state_dict()))
    assert not torch.equal(copy.router.weight, model.router.weight)
    merged = fxmerge.merge(model, copy, data)
    torch.testing.assert_close(merged(data[0]), model(data[0]))

"""How many batches a merged BatchNorm says to have seen."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxmerge
from fxmerge import Align, Recipe, TaskArithmetic
from fxmerge.combine.batch_norm import batches_seen

COUNT = "1.num_batches_tracked"


def network(seed: int, batches: int, classes: int = 3, dtype: torch.dtype = torch.int64) -> nn.Sequential:
    """A network that has seen some batches, whose statistics are averages of all of them."""
    torch.manual_seed(seed)
    norm = nn.BatchNorm1d(5, momentum=None)
    net = nn.Sequential(nn.Linear(4, 5), norm, nn.ReLU(), nn.Linear(5, classes))
    for _ in range(batches):
        net(torch.randn(16, 4) + seed)
    norm.num_batches_tracked = norm.num_batches_tracked.to(dtype)  # type: ignore[union-attr]
    return net.eval()


def seen(models: Sequence[nn.Module], loader: Any = None, **options: Any) -> Tensor:
    example = None if loader is not None else torch.randn(6, 4)
    merged: nn.Module = fxmerge.merge_many(models, loader, example=example, **options)
    count: Tensor = merged.state_dict()[COUNT]
    return count


@pytest.mark.parametrize("recipe", [None, Recipe(match=Align(), fit=None), Recipe(match=None)], ids=str)
@pytest.mark.parametrize("data", [True, False])
def test_a_merge_has_seen_the_batches_of_all(recipe: Recipe | None, data: bool) -> None:
    loader = [torch.randn(32, 4)] if data else None
    for dtype in (torch.int64, torch.int32):
        count = seen([network(i, i + 2, dtype=dtype) for i in range(3)], loader, recipe=recipe)
        assert count == 2 + 3 + 4 and count.dtype == dtype and count.shape == ()


def test_task_vectors_count_the_batches_of_the_models_and_not_of_the_base() -> None:
    recipe = Recipe(match=Align(), combine=TaskArithmetic(), fit=None)
    count = seen([network(0, 7), network(0, 9)], recipe=recipe, base=network(0, 5))
    assert count == 16


def test_statistics_that_are_the_same_in_all_are_of_the_same_batches() -> None:
    net, twin, x = network(0, 6), network(0, 0), torch.randn(6, 4)
    planted = fxmerge.find_symmetry(net, (x,)).sample_permutation(torch.Generator().manual_seed(0))
    twin.load_state_dict(planted.apply(net.state_dict()))
    assert seen([net, net], [x]) == seen([net, twin], [x]) == seen([net, twin]) == 6
    assert fxmerge.fold(net, [x], 0.6).state_dict()[COUNT] == 6


def test_a_head_keeps_its_own() -> None:
    def headed(seed: int, batches: int, classes: int) -> nn.Module:
        head = nn.Sequential(nn.Linear(5, classes), nn.BatchNorm1d(classes, momentum=None))
        net = nn.Sequential(*network(seed, 0)[:3], head)
        for _ in range(batches):
            net.train()(torch.randn(16, 4))
        return net.eval()

    merged = fxmerge.merge(headed(0, 3, 2), headed(1, 4, 6), [torch.randn(32, 4)])
    state = merged.state_dict()
    assert [int(state[name]) for name in (COUNT, *(f"heads.{i}.3.{COUNT}" for i in (0, 1)))] == [7, 3, 4]


def test_tied_layers_have_one_count() -> None:
    class Tied(nn.Module):
        def __init__(self, batches: int) -> None:
            super().__init__()
            self.first, self.norm = nn.Linear(4, 4), nn.BatchNorm1d(4)
            self.again = self.norm
            for _ in range(batches):
                self(torch.randn(8, 4))

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.again(self.first(self.norm(self.first(x)).relu()))
            return y

    merged = fxmerge.merge(Tied(1).eval(), Tied(2).eval(), [torch.randn(16, 4)])
    assert merged.state_dict()["norm.num_batches_tracked"] == merged.state_dict()["again.num_batches_tracked"] == 6


def test_pooled_statistics_of_a_merge_of_merges_are_those_of_a_merge_of_all() -> None:
    nets = [network(i, i + 1) for i in range(3)]
    how: dict[str, Any] = {"recipe": Recipe(match=None), "example": torch.randn(6, 4)}
    two = fxmerge.merge(nets[0], nets[1], **how)
    pair = network(0, 0)
    pair.load_state_dict(two.state_dict())
    together, apart = fxmerge.merge_many(nets, **how).state_dict(), fxmerge.merge(pair, nets[2], **how).state_dict()
    for name in ("1.running_mean", "1.running_var", COUNT):
        torch.testing.assert_close(together[name], apart[name])


def test_layers_that_do_not_count_are_left_alone() -> None:
    state = {"mean": torch.zeros(2), "var": torch.ones(2)}
    assert batches_seen([("mean", "var")], [state, {**state, "var": torch.zeros(2)}], {}, {}) == {}

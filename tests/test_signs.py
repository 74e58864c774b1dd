"""Signs and positive scales of units that were planted are found again."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import fxmerge
from fxmerge import Align, Recipe, find_symmetry
from fxmerge.evidence.weights import slices
from fxmerge.matching.signs import best, by_parities, chosen, of_activations, shown
from fxmerge.units.transformation import Transformation

pytestmark = pytest.mark.usefixtures("one_thread")


def trained(channels: int) -> nn.BatchNorm2d:
    """A batch norm with numbers as of a trained one."""
    norm, generator = nn.BatchNorm2d(channels), torch.Generator().manual_seed(0)
    for tensor, low, high in ((norm.weight, 0.5, 1.5), (norm.bias, -1, 1), (norm.running_mean, -1, 1)):
        assert tensor is not None
        tensor.data.uniform_(low, high, generator=generator)
    assert norm.running_var is not None
    norm.running_var.uniform_(0.5, 2, generator=generator)
    return norm


def mlp(act: Callable[[], nn.Module]) -> nn.Module:
    return nn.Sequential(nn.Linear(6, 12), act(), nn.Linear(12, 10), act(), nn.Linear(10, 4))


def cnn(norm: Callable[[int], nn.Module] | None) -> nn.Module:
    first, second = ([norm(n)] if norm else [] for n in (8, 10))
    layers = nn.Conv2d(3, 8, 3), *first, nn.ReLU(), nn.Conv2d(8, 10, 3), *second, nn.MaxPool2d(2), nn.LeakyReLU()
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(40, 4))


def apart() -> nn.Module:
    """A convolution of each channel by itself, and a BatchNorm that a layer reads as it is."""
    first, norm, own, between = nn.Conv2d(3, 8, 1), trained(8), nn.Conv2d(8, 8, 3, groups=8), trained(8)
    return nn.Sequential(
        first, norm, nn.ReLU(), own, between, nn.Conv2d(8, 10, 1), nn.GELU(), nn.Flatten(), nn.Linear(360, 4)
    )


def unshifted() -> nn.Module:
    """Biases of zeros tell no signs."""
    net = mlp(nn.Tanh)
    for name, parameter in net.named_parameters():
        if name.endswith("bias"):
            nn.init.zeros_(parameter)
    return net


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(6, 12), nn.Linear(6, 12), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(torch.sigmoid(self.gate(x)) * self.up(x))
        return y


class Bilinear(Gated):
    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(self.gate(x) * self.up(x))
        return y


NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int, int]] = {
    # How many signs and scales a unit has by which it is matched.
    "MLP, tanh": (lambda: mlp(nn.Tanh), (16, 6), 1, 0),
    "MLP, softsign": (lambda: mlp(nn.Softsign), (16, 6), 1, 0),
    "MLP, ReLU": (lambda: mlp(nn.ReLU), (16, 6), 0, 1),
    "MLP, leaky ReLU": (lambda: mlp(nn.LeakyReLU), (16, 6), 0, 1),
    "CNN": (lambda: cnn(None), (4, 3, 8, 8), 0, 1),
    "CNN, BatchNorm": (lambda: cnn(trained), (4, 3, 8, 8), 1, 1),
    "CNN, BatchNorm with shifts and means of zero": (lambda: cnn(nn.BatchNorm2d), (4, 3, 8, 8), 1, 1),
    "CNN, BatchNorm between two convolutions": (apart, (4, 3, 8, 8), 1, 1),
    "MLP, tanh, biases of zeros": (unshifted, (16, 6), 1, 0),
    "gate": (Gated, (16, 6), 1, 1),
    "bilinear gate": (Bilinear, (16, 6), 2, 2),
}


def pair(name: str, *, merges: bool = False) -> tuple[nn.Module, nn.Module, Tensor]:
    """A network and a copy transformed by a random element of the whole group, and inputs.

    For a merge, scales that running statistics have a part in are left out: they are not matched then, since these are
    estimated anew.
    """
    torch.manual_seed(0)
    make, shape, *_ = NETS[name]
    net, x = make().double().eval(), torch.randn(shape, dtype=torch.float64)
    change = find_symmetry(net, (x,)).sample(torch.Generator().manual_seed(1))
    running = {n for n, _ in net.named_buffers()}
    factors = {
        n: torch.stack(
            [
                torch.ones_like(own)
                if merges and (own > 0).all() and any(s.powers[k] and s.axis.parameter in running for s in axes)
                else own
                for k, own in enumerate(drawn)
            ]
        )
        for n, drawn in change.scaling.factors.items()
        for axes in [change.scaling.scaled[n]]
    }
    planted = Transformation(change.permutation, change.basis, replace(change.scaling, factors=factors))
    twin = copy.deepcopy(net)
    twin.load_state_dict(planted.apply(net.state_dict()))
    assert torch.allclose(twin(x), net(x))
    return net, twin, x


@pytest.mark.parametrize("data", [False, True])
@pytest.mark.parametrize("name", NETS)
def test_what_was_planted_is_found_exactly(name: str, data: bool) -> None:
    net, twin, x = pair(name)
    given = {"loader": [x]} if data else {"loader": None, "example": (x,)}
    before = net.state_dict()

    def off(recipe: Recipe) -> float:
        found = fxmerge.align(twin, net, recipe=recipe, **given).state_dict()  # type: ignore[arg-type]
        return max(float((found[n] - before[n]).abs().max()) for n in before if before[n].is_floating_point())

    alpha = 0.5 if data else 1.0
    assert off(Recipe(match=Align(alpha, continuous=True), fit=None)) < 1e-9
    assert off(Recipe(match=Align(alpha), fit=None)) > 0.1, "permutations alone do not"
    net, twin, x = pair(name, merges=True)
    merged = fxmerge.merge(net, twin, recipe=Recipe(match=Align(alpha, continuous=True), fit=None), **given)  # type: ignore[arg-type]
    if not (data and "BatchNorm" in name):  # Their statistics are estimated anew.
        assert torch.allclose(merged(x), net(x))
    signs, scales = NETS[name][2:]
    words = " and ".join(word for word, count in (("signs", signs), ("scales", scales)) if count)
    assert set(fxmerge.report(merged).bases.values()) == {words}
    assert fxmerge.report(merged).images, "units are permuted, too"


class Scaled(nn.Module):
    """A block that ends with a gain for each channel, behind a LayerNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.own, self.norm = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.LayerNorm(8)
        self.up, self.down, self.head = nn.Linear(8, 12), nn.Linear(12, 8), nn.Linear(8, 4)
        self.scale = nn.Parameter(torch.rand(8, 1, 1) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.norm(self.own(x).permute(0, 2, 3, 1))
        y = self.down(nn.functional.gelu(self.up(y))).permute(0, 3, 1, 2)
        z: Tensor = self.head((x + self.scale * y).tanh().mean((2, 3)))
        return z


def test_an_aligned_model_has_the_gains_of_the_canonical_one() -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 3, 6, 6, dtype=torch.float64)
    net = fxmerge.canonicalize(Scaled().double(), (x,))
    change = find_symmetry(net, (x,)).sample(torch.Generator().manual_seed(1))
    assert change.scaling.factors, "gains and the layers beside them have signs and scales"
    twin = copy.deepcopy(net)
    twin.load_state_dict(change.apply(net.state_dict()))
    recipe = Recipe(match=Align(1.0, continuous=True), fit=None)
    found = fxmerge.align(twin, net, recipe=recipe, example=(x,)).state_dict()
    for name, value in net.state_dict().items():
        torch.testing.assert_close(found[name], value)


def test_three_models_are_brought_together() -> None:
    net, twin, x = pair("MLP, tanh")
    third = copy.deepcopy(net)
    change = find_symmetry(net, (x,)).sample(torch.Generator().manual_seed(2))
    third.load_state_dict(change.apply(net.state_dict()))
    merged = fxmerge.merge_many([net, twin, third], [x], Recipe(match=Align(continuous=True), fit=None))
    assert torch.allclose(merged(x), net(x))


def test_signs_of_which_the_scores_are_largest() -> None:
    torch.manual_seed(0)
    net = Bilinear()
    symmetry = find_symmetry(net, (torch.randn(2, 6),))
    found = by_parities(symmetry, 0, slices(symmetry)[0])
    assert {parities: len(own) for parities, own in found.items()} == {(1, 0): 2, (0, 1): 2, (1, 1): 1}
    assert of_activations(symmetry, 0) == (1, 1)
    signs = torch.tensor([[1.0, -1.0], [-1.0, -1.0], [1.0, 2.0], [1.0, 1.0]])
    assert shown(symmetry, 0, signs).tolist() == [-1.0, 1.0]
    scores = {parities: torch.randn(5, 5, dtype=torch.float64).numpy() for parities in found}
    own = chosen(scores)
    total = sum(torch.from_numpy(s.diagonal().copy()) * own[0] ** a * own[1] ** b for (a, b), s in scores.items())
    assert isinstance(total, Tensor) and torch.allclose(total, torch.from_numpy(best(scores).diagonal().copy()))


def test_squares_hide_the_signs_of_what_is_squared() -> None:
    net = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))

    class Squared(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.square()

    net[1] = Squared()
    symmetry = find_symmetry(net, (torch.randn(2, 6),))
    assert symmetry.classes[0].signs == 1 and of_activations(symmetry, 0) == (0,)


def test_gains_keep_the_signs_that_most_have() -> None:
    """A filter is not matched with the negative of another one: the mean of their gains would be about zero."""
    nets = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        nets.append(cnn(trained).double().eval())
        for name, tensor in nets[-1].state_dict().items():
            if name.startswith(("1.", "4.")) and tensor.ndim:  # Of norms that two networks share, nothing would move.
                tensor.mul_(1 + torch.rand(tensor.shape).to(tensor.dtype) / 2)
    x = torch.randn(4, 3, 8, 8, dtype=torch.float64)
    aligned = fxmerge.align(nets[1], nets[0], recipe=Recipe(match=Align(1, continuous=True), fit=None), example=(x,))
    assert torch.allclose(aligned(x), nets[1](x))
    assert (aligned.state_dict()["1.weight"] > 0).all() and fxmerge.report(aligned).bases["0.weight[0]"] == "scales"

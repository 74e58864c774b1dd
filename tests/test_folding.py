"""Running variances without data: what averaged weights really give."""

import pytest
import torch
from torch import Tensor, nn

import fxmerge

MATCH: dict[str, fxmerge.Align | fxmerge.Zip] = {"align": fxmerge.Align(), "zip": fxmerge.Zip()}


class Normalized(nn.Module):
    """A convolution and a linear layer, each with BatchNorm."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.conv, self.norm1 = nn.Conv2d(12, 8, 3, bias=False), nn.BatchNorm2d(8)
        self.linear, self.norm2 = nn.Linear(8, 16), nn.BatchNorm1d(16)
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(self.conv(x)).relu().mean((2, 3))
        out: Tensor = self.head(self.norm2(self.linear(x)).relu())
        return out


def trained(seed: int, x: Tensor) -> nn.Module:
    """A network whose statistics are those of some inputs."""
    model = Normalized(seed).train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.momentum = None
    with torch.no_grad():
        model(x)
    return model.eval()


def real_variances(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """The variances of what the normalizations of a merged network get."""
    twin = Normalized(0)
    twin.load_state_dict(model.state_dict())
    seen: dict[str, Tensor] = {}
    for name in ("norm1", "norm2"):
        twin.get_submodule(name).register_forward_pre_hook(
            lambda _, inputs, name=name: seen.update({name: inputs[0].transpose(0, 1).flatten(1).var(1, correction=0)})
        )
    with torch.no_grad():
        twin.eval()(x)
    return seen


@pytest.mark.parametrize("match", MATCH.values(), ids=MATCH.keys())
def test_the_variance_of_a_mean_of_weights_is_estimated(match: fxmerge.Align | fxmerge.Zip) -> None:
    x = torch.randn(256, 12, 6, 6, generator=torch.Generator().manual_seed(0))
    a, b = trained(0, x), trained(1, x)
    merged = fxmerge.merge(a, b, recipe=fxmerge.Recipe(match=match), example=x[:2])
    estimated, real = merged.state_dict(), real_variances(merged, x)
    # The first layer sees inputs that vary alike and independently; the second does not.
    torch.testing.assert_close(estimated["norm1.running_var"], real["norm1"], rtol=0.1, atol=0)
    theirs = {n: sum(m.state_dict()[f"{n}.running_var"].mean() for m in (a, b)) / 2 for n in ("norm1", "norm2")}
    assert real["norm1"].mean() < 0.8 * theirs["norm1"]
    assert 0.9 * real["norm2"].mean() < estimated["norm2.running_var"].mean() < 0.8 * theirs["norm2"]
    assert estimated["norm2.running_var"].mean() < 2 * real["norm2"].mean()


def test_a_network_with_itself_keeps_its_statistics() -> None:
    x = torch.randn(64, 12, 6, 6)
    a = trained(0, x)
    merged = fxmerge.merge(a, a, recipe=fxmerge.Recipe(match=fxmerge.Align()), example=x[:2]).state_dict()
    for name, tensor in a.state_dict().items():
        torch.testing.assert_close(merged[name], tensor)


def test_with_data_statistics_are_those_of_the_data() -> None:
    x = torch.randn(256, 12, 6, 6)
    merged = fxmerge.merge(trained(0, x), trained(1, x), [x], recipe=fxmerge.Recipe(match=fxmerge.Align(), fit=None))
    estimated, real = merged.state_dict(), real_variances(merged, x)
    torch.testing.assert_close(estimated["norm2.running_var"], real["norm2"], rtol=1e-3, atol=0)

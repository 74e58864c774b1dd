"""The masks of pruned networks."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

import fxmerge
from fxmerge.combine.masks import masked, masks_of, pruned, voted
from fxmerge.program.capture import capture_program
from tests.slow import crossed

MATCH: dict[str, fxmerge.Align | fxmerge.Zip] = {"align": fxmerge.Align(), "zip": fxmerge.Zip()}

X = torch.randn(96, 3, 6, generator=torch.Generator().manual_seed(4))


def net(seed: int, kind: str = "unstructured") -> nn.Sequential:
    torch.manual_seed(seed)
    m = nn.Sequential(nn.Conv1d(3, 8, 3), nn.ReLU(), nn.Conv1d(8, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2))
    if kind == "unstructured":
        prune.l1_unstructured(m[0], "weight", 0.5)
        prune.random_unstructured(m[5], "bias", 1)
    elif kind == "structured":
        prune.ln_structured(m[2], "weight", 0.5, n=2, dim=0)
    else:
        prune.global_unstructured([(m[i], "weight") for i in (0, 2, 5)], prune.L1Unstructured, amount=0.6)
    return m.eval()


def mask_names(m: nn.Module) -> list[str]:
    return [name for name, _ in m.named_buffers()]


KINDS = ["unstructured", "structured", "global"]


@pytest.mark.parametrize(("kind", "match"), crossed(KINDS, MATCH.values()))
def test_masks_stay_masks(kind: str, match: fxmerge.Align | fxmerge.Zip) -> None:
    models = [net(seed, kind) for seed in (0, 1, 2)]
    for count, loader in ((2, [X]), (3, None)):
        merged = fxmerge.merge_many(models[:count], loader, fxmerge.Recipe(match=match), example=X)
        state = merged.state_dict()
        for name in mask_names(models[0]):
            assert set(state[name].unique().tolist()) <= {0.0, 1.0}, name
        original = net(3, kind)
        original.load_state_dict(state)
        torch.testing.assert_close(original.eval()(X), merged(X))


@pytest.mark.parametrize(("kind", "match"), crossed(KINDS, MATCH.values()))
def test_a_permuted_pruned_network_is_found_again(kind: str, match: fxmerge.Align | fxmerge.Zip) -> None:
    model, twin = net(0, kind), net(0, kind)
    symmetry = fxmerge.find_symmetry(model, (X,))
    twin.load_state_dict(symmetry.sample_permutation(torch.Generator().manual_seed(1)).apply(model.state_dict()))
    merged = fxmerge.merge(model, twin, [X], fxmerge.Recipe(match=match, fit=None))
    for name in mask_names(model):
        assert torch.equal(merged.state_dict()[name], model.state_dict()[name]), name
    torch.testing.assert_close(merged(X), model(X))


def test_what_one_model_has_pruned_does_not_leak_into_the_average() -> None:
    models = [nn.Sequential(nn.Linear(2, 1)) for _ in range(2)]
    for i, m in enumerate(models):
        nn.init.constant_(m[0].weight, 4.0)
        prune.custom_from_mask(m[0], "weight", torch.eye(2)[i : i + 1])
    merged = fxmerge.merge(*models, example=torch.randn(4, 2)).state_dict()
    assert merged["0.weight_mask"].tolist() == [[1.0, 1.0]]
    assert merged["0.weight_orig"].tolist() == [[2.0, 2.0]]


def test_a_mask_that_all_models_have_holds_its_units() -> None:
    """Which inputs a unit may see is part of the architecture here: units of other sets of inputs are not its match."""

    class Autoregressive(nn.Module):
        def __init__(self, seed: int) -> None:
            super().__init__()
            torch.manual_seed(seed)
            self.register_buffer("mask", (torch.arange(8)[:, None] % 3 >= torch.arange(3)).float())
            self.a, self.b = nn.Linear(3, 8), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.b(torch.relu(nn.functional.linear(x, self.a.weight * self.mask, self.a.bias)))
            return out

    a, b, x = Autoregressive(0), Autoregressive(1), torch.randn(64, 3)
    for match in MATCH.values():
        merged = fxmerge.merge(a, b, [x], fxmerge.Recipe(match=match))
        assert torch.equal(merged.state_dict()["mask"], a.mask)  # type: ignore[arg-type]
        assert fxmerge.report(merged).images[1]["a.weight[0]"] == list(range(8))


def test_masked_parameters_are_found_in_the_graph() -> None:
    model = net(0, "global")
    names = masks_of(mask_names(model), [model.state_dict()])
    assert names == set(mask_names(model))
    found = masked(capture_program(model, (X,)), names)
    assert found == {f"{i}.weight_orig": f"{i}.weight_mask" for i in (0, 2, 5)}
    one, _ = pruned([model.state_dict(), net(1, "global").state_dict()], found)
    assert torch.equal(one["0.weight_orig"], one["0.weight_orig"] * one["0.weight_mask"])
    same = pruned([model.state_dict()] * 2, found)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in same[0].items())
    assert voted({"m": torch.tensor([0.4, 0.5, 1.0])}, {"m"})["m"].tolist() == [0.0, 1.0, 1.0]

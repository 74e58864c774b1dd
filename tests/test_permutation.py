from pathlib import Path

import pytest
import torch
from torch import nn

import fxmerge
from tests.oracle.architectures import CASES
from tests.oracle.inferred import each, inferred

STRUCTURED = [name for name in CASES if "group" in name.lower() or "attention" in name.lower() or "mlp" in name.lower()]


def mlp() -> tuple[nn.Module, fxmerge.Symmetry]:
    model = nn.Sequential(nn.Linear(2, 6), nn.ReLU(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 1))
    return model, fxmerge.find_symmetry(model, (torch.zeros(1, 2),))


@each(STRUCTURED)
def test_group_laws(name: str) -> None:
    torch.manual_seed(0)
    model, symmetry = inferred(name).model, inferred(name).symmetry
    state = {k: torch.randn(v.shape) if v.is_floating_point() else v for k, v in model.state_dict().items()}
    g = torch.Generator().manual_seed(0)
    p, q = symmetry.sample_permutation(g), symmetry.sample_permutation(g)
    assert (p @ p.inverse()).is_identity()
    assert p.inverse().inverse() == p
    one_by_one, together = p.apply(q.apply(state)), (p @ q).apply(state)
    undone = p.inverse().apply(p.apply(state))
    tied: dict[int, str] = {}
    for name_, tensor in model.state_dict(keep_vars=True).items():
        if tied.setdefault(id(tensor), name_) == name_:
            assert torch.equal(one_by_one[name_], together[name_])
            assert torch.equal(undone[name_], state[name_])


def test_apply_keeps_dtype_and_leaves_the_input_alone() -> None:
    model, symmetry = mlp()
    state = {k: v.bfloat16() for k, v in model.state_dict().items()}
    before = {k: v.clone() for k, v in state.items()}
    p = symmetry.sample_permutation(torch.Generator().manual_seed(1))
    moved = p.apply(state)
    assert all(v.dtype is torch.bfloat16 for v in moved.values())
    assert all(torch.equal(v, before[k]) for k, v in state.items())
    assert not torch.equal(moved["0.weight"], state["0.weight"])


def test_samples_are_uniform() -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 1), nn.GroupNorm(2, 4), nn.ReLU(), nn.Conv2d(4, 1, 1))
    symmetry = fxmerge.find_symmetry(model, (torch.zeros(1, 1, 2, 2),))
    g = torch.Generator().manual_seed(0)
    counts: dict[int, int] = {}
    draws = 1600
    for _ in range(draws):
        p = hash(symmetry.sample_permutation(g))
        counts[p] = counts.get(p, 0) + 1
    assert len(counts) == 8  # 2! 2!^2
    assert all(abs(n - draws / 8) < 5 * (draws / 8) ** 0.5 for n in counts.values())


def test_save_and_load(tmp_path: Path) -> None:
    model, symmetry = mlp()
    p = symmetry.sample_permutation(torch.Generator().manual_seed(2))
    p.save(tmp_path / "p.npz")
    loaded = fxmerge.Permutation.load(tmp_path / "p.npz")
    assert loaded == p
    a, b = p.apply(model.state_dict()), loaded.apply(model.state_dict())
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_a_file_that_holds_no_permutation(tmp_path: Path) -> None:
    (tmp_path / "p.npz").write_bytes(b"nothing of the kind")
    with pytest.raises(fxmerge.PermutationError, match="does not hold a permutation"):
        fxmerge.Permutation.load(tmp_path / "p.npz")


def test_a_state_dict_that_does_not_fit() -> None:
    model, symmetry = mlp()
    state = dict(model.state_dict())
    p = symmetry.sample_permutation()
    with pytest.raises(fxmerge.PermutationError, match=r"'0\.weight' has shape \(6, 3\).*\(6, 2\)"):
        p.apply(state | {"0.weight": torch.zeros(6, 3)})
    del state["0.weight"]
    with pytest.raises(fxmerge.PermutationError, match=r"no parameter '0\.weight'"):
        p.apply(state)


def test_permutations_of_different_symmetries_do_not_compose() -> None:
    other = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
    with pytest.raises(fxmerge.PermutationError, match="different symmetries"):
        _ = mlp()[1].sample_permutation() @ fxmerge.find_symmetry(other, (torch.zeros(1, 2),)).sample_permutation()


def test_element_checks_its_images() -> None:
    symmetry = mlp()[1]
    with pytest.raises(fxmerge.PermutationError, match="not a permutation of its 6 units"):
        symmetry.element({symmetry.names[0]: [0, 0, 1, 2, 3, 4]})

"""Blocks of one model that are merged, and where what lies in them goes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fxmerge
from fxmerge.matching.nested import carry, is_block, merge_blocks, similar_blocks, whole_blocks
from fxmerge.symmetry.group import Symmetry
from tests.slow import but_slow


class Heads(nn.Module):
    """Attention with heads of three dimensions, which lie one after the other or, if turned, across each other."""

    def __init__(self, heads: int = 4, *, turned: bool = False) -> None:
        super().__init__()
        self.heads, self.turned = heads, turned
        self.q, self.k, self.v = (nn.Linear(5, 3 * heads) for _ in range(3))
        self.out = nn.Linear(3 * heads, 2)

    def forward(self, x: Tensor) -> Tensor:
        if self.turned:
            q, k, v = (f(x).unflatten(-1, (3, self.heads)).permute(0, 3, 1, 2) for f in (self.q, self.k, self.v))
        else:
            q, k, v = (f(x).unflatten(-1, (self.heads, 3)).transpose(1, 2) for f in (self.q, self.k, self.v))
        y = (q @ k.mT).softmax(-1) @ v
        y = y.permute(0, 2, 3, 1) if self.turned else y.transpose(1, 2)
        return self.out(y.flatten(2))  # type: ignore[no-any-return]


TOKENS = torch.randn(6, 7, 5, dtype=torch.float64)


def classes(model: nn.Module) -> tuple[Symmetry, int]:
    symmetry = fxmerge.find_symmetry(model, (TOKENS,))
    (heads,) = (n for n in symmetry.choices if is_block(symmetry, n))
    return symmetry, heads


def test_what_lies_in_a_block_goes_where_the_block_goes() -> None:
    symmetry, heads = classes(Heads().double())
    now = [np.arange(c.size) for c in symmetry.units]
    places = carry(symmetry, heads, np.array([0, 0, 2, 1]), now)
    assert places.keys() == set(range(len(symmetry.units)))
    for n in places.keys() - {heads}:
        assert places[n].tolist() == [0, 1, 2, 0, 1, 2, 6, 7, 8, 3, 4, 5]
    new = carry(symmetry, heads, np.array([0, 1, 4, 5]), now)
    for n in places.keys() - {heads}:
        assert new[n].tolist() == [*range(6), *range(12, 18)]


def test_members_of_merged_blocks_are_matched() -> None:
    symmetry, heads = classes(Heads().double())
    rng = np.random.default_rng(0)
    first = rng.normal(size=(6, 9))
    order = rng.permutation(3)
    gains = {}
    for n in symmetry.choices:
        if n != heads:
            units = np.concatenate([first[:3], first[3:], first[:3][order], first[3:][order]])
            gains[n] = np.corrcoef(units)
    similar = similar_blocks(symmetry, heads, 1, gains)
    best = similar[heads] - 10 * np.eye(4)
    assert best.argmax(axis=1).tolist() == [2, 3, 0, 1]
    now = [[np.arange(c.size) for c in symmetry.units]]
    (places,) = merge_blocks(symmetry, heads, np.array([[0, 1, 0, 1]]), now, similar)
    for n in gains:
        assert places[n].tolist() == [*range(6), *order, *(order + 3)]


@pytest.mark.parametrize("turned", but_slow([False, True]))
def test_heads_that_do_the_same_become_one(turned: bool) -> None:
    """Two of four heads are copies of the others, with their dimensions in another order: nothing is lost."""
    torch.manual_seed(0)
    model = Heads(turned=turned).double().eval()
    symmetry, heads = classes(model)
    state = model.state_dict()
    copies = carry(symmetry, heads, np.array([0, 1, 0, 1]), [np.arange(c.size) for c in symmetry.units])
    for axis in symmetry.layout:
        source = torch.from_numpy(axis.target([copies[n] for n in range(len(symmetry.units))]))
        state[axis.parameter] = state[axis.parameter].index_select(axis.dim, source)
    model.load_state_dict(symmetry.sample_permutation(torch.Generator().manual_seed(0)).apply(state))
    folded = fxmerge.fold(model, width={symmetry.names[heads]: 0.5}, example=TOKENS)
    assert fxmerge.report(folded).widths[symmetry.names[heads]] == (4, 2)
    torch.testing.assert_close(folded(TOKENS), model(TOKENS))


def test_there_may_be_more_blocks_where_they_come_one_after_the_other() -> None:
    for turned in (False, True):
        model = Heads(turned=turned).double()
        symmetry, heads = classes(model)
        assert whole_blocks(symmetry, heads) is not turned
    a, b = (Heads(turned=True).double().eval() for _ in range(2))
    recipe = fxmerge.Recipe(match=fxmerge.Zip(width={symmetry.names[heads]: 1.5}), share="trunk")
    with pytest.raises(fxmerge.OptionError, match="cannot have more units"):
        fxmerge.merge(a, b, recipe=recipe, example=TOKENS)


class Together(nn.Module):
    """Attention of which a layer gives queries, keys and values head by head, or channels that are shuffled."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.qkv, self.out, self.head = nn.Linear(5, 24), nn.Linear(8, 6), nn.Linear(6, classes)
        self.double().eval()

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (4, 3, 2)).permute(3, 0, 2, 1, 4).unbind()
        y = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.head(self.out(y).relu())  # type: ignore[no-any-return]


class Shuffled(nn.Sequential):
    """Channels that are shuffled."""

    def __init__(self, classes: int) -> None:
        layers = nn.Conv1d(7, 8, 1), nn.ChannelShuffle(4), nn.ReLU(), nn.Conv1d(8, 6, 1), nn.ReLU(), nn.Flatten()
        super().__init__(*layers, nn.Linear(30, classes))
        self.double().eval()


def test_classes_that_lie_across_each_other_cannot_have_more_blocks() -> None:
    symmetry, heads = classes(Together(2))
    assert not whole_blocks(symmetry, heads)


@pytest.mark.parametrize("kind", but_slow([Together, Shuffled]))
def test_no_more_of_what_an_op_knows_by_its_place(kind: type[nn.Module]) -> None:
    a, b = kind(2), kind(3)
    names = fxmerge.find_symmetry(a, (TOKENS,)).names
    for width in (1.5, fxmerge.Budget(parameters=9.0)):
        merged = fxmerge.merge(a, b, recipe=fxmerge.Recipe(match=fxmerge.Zip(width=width)), example=TOKENS)
        widths = fxmerge.report(merged).widths
        assert widths and not any(name in widths for name in names if name.endswith(("qkv.weight[0]", "0.weight[0]")))
    full = fxmerge.merge(a, b, recipe=fxmerge.Recipe(match=fxmerge.Zip(width=2.0)), example=TOKENS)
    for own, model in zip(full(TOKENS), (a, b), strict=True):
        torch.testing.assert_close(own, model(TOKENS))

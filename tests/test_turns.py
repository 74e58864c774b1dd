"""Planes that a network turns: which maps are turns, in whatever ops they are written, and which are not."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxmerge
from fxmerge import Symmetry, find_symmetry
from fxmerge.program.capture import capture_program
from fxmerge.symmetry.group import analyse
from fxmerge.units.kind import Kind
from tests.networks import groups
from tests.oracle.continuous_networks import rotary_complex, rotary_halves, rotary_pairs
from tests.oracle.nullity import generic
from tests.slow import but_slow

FREQUENCIES = (1.0, 0.3)
TOKENS = torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

Turn = Callable[..., Tensor]


class Scores(nn.Module):
    """The products of queries and keys in two heads of four units, of which both are changed by a function."""

    def __init__(self, turn: Turn, key_turn: Turn | None = None) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(6, 8, bias=False), nn.Linear(6, 8, bias=False)
        self.turn, self.key_turn = turn, key_turn or turn

    def forward(self, x: Tensor, *more: Tensor) -> Tensor:
        q, k = (layer(x).unflatten(-1, (2, 4)).transpose(1, 2) for layer in (self.q, self.k))
        return self.turn(q, *more) @ self.key_turn(k, *more).mT


def found(turn: Turn, *more: Tensor, key_turn: Turn | None = None) -> Symmetry:
    """The symmetry, after a proof that it is one as it was inferred."""
    model, args = generic(Scores(turn, key_turn), (TOKENS, *more))
    symmetry = find_symmetry(model, args)
    proven = symmetry.verify(model, args)
    assert proven.demoted == () and proven.kinds == symmetry.kinds
    assert proven.error is not None and proven.error < 1e-9
    return symmetry


def angles(x: Tensor) -> tuple[Tensor, Tensor]:
    both = torch.arange(x.shape[-2])[:, None] * torch.tensor(FREQUENCIES, dtype=x.dtype)
    return both.cos(), both.sin()


def halves(x: Tensor) -> Tensor:
    return rotary_halves(x, FREQUENCIES)


def scaled(x: Tensor) -> Tensor:
    """The lengths of the planes depend on the place, too."""
    return halves(x) * torch.linspace(1, 2, x.shape[-2], dtype=x.dtype)[:, None] / 3


def split(x: Tensor) -> Tensor:
    cos, sin = angles(x)
    a, b = x.split(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


def from_pairs_to_halves(x: Tensor) -> Tensor:
    cos, sin = angles(x)
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


def exchanged(x: Tensor) -> Tensor:
    cos, sin = angles(x)
    a, b = x[..., :2], x[..., 2:]
    return torch.cat((b * cos + a * sin, a * cos - b * sin), -1)


TURNS: dict[str, Turn] = {
    "halves": halves,
    "halves, scaled": scaled,
    "halves, split": split,
    "halves, exchanged in the result": exchanged,
    "neighbours": lambda x: rotary_pairs(x, FREQUENCIES),
    "neighbours, halves in the result": from_pairs_to_halves,
    "complex numbers": lambda x: rotary_complex(x, FREQUENCIES),
    "complex numbers, single precision": lambda x: rotary_complex(x.float(), FREQUENCIES).to(x.dtype),
}


@pytest.mark.parametrize("name", [n for n in TURNS if "single" not in n])
def test_turns_are_found(name: str) -> None:
    symmetry = found(TURNS[name])
    assert groups(symmetry) == ["C^4"] and symmetry.dimension() == 8
    ((number, own),) = [(n, own) for n, own in enumerate(symmetry.kinds) if own.kind > Kind.PERMUTATION]
    assert sorted(unit for plane in own.planes for unit in plane) == list(range(8))
    neighbours = {(0, 1), (2, 3), (4, 5), (6, 7)}
    index = {(s.parameter, s.dim): s.index[s.roles[0][1]] for s in symmetry.layout if s.roles[0][0] == number}
    planes = {tuple(sorted(index["q.weight", 0][list(plane)].tolist())) for plane in own.planes}
    assert planes == (neighbours if "n" in name[:2] or "complex" in name else {(0, 2), (1, 3), (4, 6), (5, 7)})


def test_a_turn_in_single_precision_is_found() -> None:
    model, args = generic(Scores(TURNS["complex numbers, single precision"]), (TOKENS,))
    assert groups(find_symmetry(model, args)) == ["C^4"]


def test_angles_may_depend_on_inputs() -> None:
    def turn(x: Tensor, places: Tensor) -> Tensor:
        both = torch.outer(places, torch.tensor(FREQUENCIES, dtype=x.dtype)).repeat(1, 2)
        a, b = x.chunk(2, -1)
        return x * both.cos() + torch.cat([-b, a], -1) * both.sin()

    assert groups(found(turn, torch.tensor([0.0, 3, 1, 2, 7], dtype=torch.float64))) == ["C^4"]


def test_what_is_not_turned_beside_planes_keeps_its_kind() -> None:
    def turn(x: Tensor) -> Tensor:
        return torch.cat([rotary_halves(x[..., :2], FREQUENCIES[:1]), x[..., 2:]], -1)

    symmetry = found(turn)
    assert groups(symmetry) == ["C^2", "GL(2)^2"]
    assert symmetry.dimension() == 2 * 2 + 2 * 4


def test_planes_of_one_frequency_are_exchanged_as_a_whole() -> None:
    symmetry = found(lambda x: rotary_halves(x, (0.5, 0.5)))
    assert groups(symmetry) == ["C^4"]
    assert symmetry.log_order() == pytest.approx(2 * math.log(2))


def reflected(x: Tensor) -> Tensor:
    """Without the sign: planes are multiplied by symmetric matrices."""
    cos, sin = (torch.cat([part, part], -1) for part in angles(x))
    return x * cos + torch.cat([x[..., 2:], x[..., :2]], -1) * sin


def two_angles(x: Tensor) -> Tensor:
    """The two units of a plane are turned by two angles."""
    cos, sin = (torch.cat([part, 2 * part], -1) for part in angles(x))
    return x * cos + torch.cat([-x[..., 2:], x[..., :2]], -1) * sin


def in_a_ring(x: Tensor) -> Tensor:
    cos, sin = (torch.cat([part, part], -1) for part in angles(x))
    return x * cos + x.roll(1, -1) * sin


def over_tokens(x: Tensor) -> Tensor:
    """One half comes from the token before."""
    cos, sin = (torch.cat([part, part], -1) for part in angles(x))
    before = x.roll(1, -2)
    return x * cos + torch.cat([-before[..., 2:], before[..., :2]], -1) * sin


def shifted(x: Tensor) -> Tensor:
    return halves(x + 1)


def bent(x: Tensor) -> Tensor:
    cos, sin = (torch.cat([part, part], -1) for part in angles(x))
    return x * cos + torch.cat([-x[..., 2:], x[..., :2]], -1).tanh() * sin


NO_TURNS: dict[str, Turn] = {
    "reflections": reflected,
    "two angles for a plane": two_angles,
    "a ring of units": in_a_ring,
    "over tokens": over_tokens,
    "shifted before": shifted,
    "an activation": bent,
    "an activation behind": lambda x: halves(x).relu(),
    "one unit is added to all": lambda x: halves(x) + x[..., :1],
    "an activation of what is turned": lambda x: torch.cat([halves(x), x.relu()], -1),
}


@pytest.mark.parametrize("name", NO_TURNS)
def test_what_is_no_turn_is_only_permuted(name: str) -> None:
    assert groups(found(NO_TURNS[name])) == []


def test_keys_that_are_turned_in_other_planes_are_not_mixed() -> None:
    assert groups(found(halves, key_turn=TURNS["neighbours"])) == []


def test_keys_that_are_not_turned_follow_the_queries() -> None:
    symmetry = found(halves, key_turn=lambda x: x)
    assert groups(symmetry) == ["C^4"]


def test_a_gain_of_each_unit_leaves_no_turn() -> None:
    class Gained(Scores):
        def __init__(self) -> None:
            super().__init__(halves)
            self.gain = nn.Parameter(torch.ones(4))

        def forward(self, x: Tensor, *more: Tensor) -> Tensor:
            q, k = (layer(x).unflatten(-1, (2, 4)).transpose(1, 2) for layer in (self.q, self.k))
            return halves(q * self.gain) @ halves(k).mT

    model, args = generic(Gained(), (TOKENS,))
    assert groups(find_symmetry(model, args)) == []


@pytest.mark.parametrize("name", ["halves", "an activation"])
def test_classes_do_not_depend_on_whether_kinds_are_asked_for(name: str) -> None:
    model, args = generic(Scores({**TURNS, **NO_TURNS}[name]), (TOKENS,))
    with_kinds, without = (analyse(capture_program(model, args), continuous=way)[1] for way in (True, False))
    assert without.kinds == () and len(with_kinds.kinds) == len(with_kinds.units)
    assert with_kinds.names == without.names
    assert [c.size for c in with_kinds.units] == [c.size for c in without.units]


SIZES: dict[str, Any] = {"vocab_size": 11, "hidden_size": 16, "intermediate_size": 12, "num_hidden_layers": 1}

PARTS = ["C^4", "GL(4)^2", "GL(8)^2", "O1(16)"]
"""Two heads of eight units, of which four are turned."""

PUBLISHED: dict[str, tuple[str, dict[str, Any], list[str]]] = {
    "Llama, one key head": (
        "Llama",
        {**SIZES, "num_attention_heads": 4, "num_key_value_heads": 1},
        ["C^2", "GL(4)", "O(16)"],
    ),
    "Qwen2, biases": (
        "Qwen2",
        {**SIZES, "num_attention_heads": 2, "num_key_value_heads": 2},
        ["C^8", "GL(8)^2", "O(16)"],
    ),
    "GPT-NeoX, a part of each head": ("GPTNeoX", {**SIZES, "num_attention_heads": 2, "rotary_pct": 0.5}, PARTS),
    "GPT-J, neighbours": (
        "GPTJ",
        {"vocab_size": 11, "n_embd": 16, "n_layer": 1, "n_head": 2, "rotary_dim": 4, "n_positions": 16},
        PARTS,
    ),
}


@pytest.mark.parametrize("name", but_slow(PUBLISHED, ["Llama, one key head"]))
def test_published_models(name: str) -> None:
    transformers = pytest.importorskip("transformers")
    kind, sizes, expected = PUBLISHED[name]
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, f"{kind}Config")(**sizes)).double().eval()
    args = (torch.arange(14).reshape(2, 7) % 11,)
    plain = fxmerge.canonicalize(model, args)
    symmetry = find_symmetry(plain, args)
    assert groups(symmetry) == expected, symmetry
    proven = symmetry.verify(plain, args)
    assert proven.kinds == symmetry.kinds and proven.error is not None and proven.error < 1e-9

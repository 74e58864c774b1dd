"""Configurations of transformers' classes for what a fold leaves of them."""

from typing import Any

import pytest
import torch
from torch import nn

import fxmerge
from fxmerge.emit.config import config_for
from tests.slow import but_slow, slow

transformers = pytest.importorskip("transformers")

SMALL = {"vocab_size": 40, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None}


def llama() -> nn.Module:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 4, "num_key_value_heads": 2}
    model: nn.Module = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, num_hidden_layers=2, **SMALL))
    return model.eval()


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(n_embd=16, n_head=4, n_layer=2, n_positions=16, **SMALL)
    model: nn.Module = transformers.GPT2LMHeadModel(config)
    return model.eval()


@pytest.mark.parametrize(
    ("build", "expected"),
    [slow((llama, {"hidden_size": 8, "intermediate_size": 12})), slow((gpt2, {"n_inner": 32}))],
    ids=["llama", "gpt2"],
)
def test_a_fold_loads_into_its_class(build: Any, expected: dict[str, int]) -> None:
    torch.manual_seed(0)
    model = build()
    batches = [{"input_ids": torch.randint(0, 40, (4, length))} for length in (8, 9)]
    state, before = torch.get_rng_state(), model.config.to_dict()
    folded = fxmerge.fold(model, batches, 0.5)
    assert fxmerge.report(folded).config == expected
    # It is found without a trace: neither the model's configuration nor random numbers drawn later change.
    assert torch.equal(torch.get_rng_state(), state) and model.config.to_dict() == before
    config = type(model.config).from_dict(model.config.to_dict() | expected)
    rebuilt = type(model)(config).eval()
    rebuilt.load_state_dict(folded.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(rebuilt(**batches[0]).logits, folded(**batches[0])["logits"])


ATTENTION = {"num_attention_heads": 2, "num_key_value_heads": 2}
MLP = {"intermediate_size": 12}
NARROW = {"hidden_size": 8, **MLP}
FOLDS: list[tuple[int, Any, int, dict[str, int] | None]] = [
    (2, 0.5, 1, NARROW),
    (2, 0.7, 1, None),  # Of a hidden size of 11, which is no multiple of the number of heads.
    (4, 0.7, 4, {"hidden_size": 12, "intermediate_size": 16}),
    (2, 0.7, 4, {"hidden_size": 12, "intermediate_size": 16}),
    (4, {"blocks of *": 0.5}, 1, ATTENTION),
    (2, {"blocks of *attn.v_proj*": 0.5}, 1, {"num_attention_heads": 2, "num_key_value_heads": 1}),
    (4, {"blocks of *": 0.7}, 1, None),  # Of three heads, of which the hidden size is no multiple.
    (4, {"blocks of *": 0.5, "*mlp*": 0.5}, 1, ATTENTION | MLP),
    (4, {"blocks of *": 0.5, "*mlp*": 0.5, "*embed*": 0.5}, 1, ATTENTION | NARROW),
    (2, {"blocks of *v_proj*": 0.5, "*mlp*": 0.5, "*embed*": 0.5}, 1, ATTENTION | NARROW | {"num_key_value_heads": 1}),
]  # fmt: skip


@pytest.mark.parametrize(("groups", "width", "multiple", "expected"), but_slow(FOLDS, [FOLDS[4]]))
def test_what_a_fold_of_a_llama_says_rebuilds_it(
    groups: int, width: Any, multiple: int, expected: dict[str, int] | None
) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 4, "num_key_value_heads": groups}
    config = transformers.LlamaConfig(**sizes, num_hidden_layers=1, **SMALL)
    model = transformers.LlamaForCausalLM(config).eval()
    batches = [{"input_ids": torch.randint(0, 40, (4, length))} for length in (8, 9)]
    recipe = fxmerge.Recipe(match=fxmerge.Zip(multiple_of=multiple))
    folded = fxmerge.fold(model, batches, width, recipe)
    assert fxmerge.report(folded).widths and fxmerge.report(folded).config == expected
    if expected is not None:
        rebuilt = type(model)(type(config).from_dict(config.to_dict() | expected)).eval()
        rebuilt.load_state_dict(folded.state_dict())
        with torch.no_grad():
            torch.testing.assert_close(rebuilt(**batches[0]).logits, folded(**batches[0])["logits"])


def test_a_network_whose_buffers_are_in_half_precision_has_a_configuration() -> None:
    """`bfloat16()` rounds the frequencies of rotary positions, too, which a new instance has in single precision."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, num_hidden_layers=1, **SMALL))
    model = model.eval().bfloat16()
    batches = [{"input_ids": torch.randint(0, 40, (4, length))} for length in (8, 9)]
    folded = fxmerge.fold(model, batches, {"*mlp*": 0.5})
    assert fxmerge.report(folded).config == MLP
    rebuilt = type(model)(type(model.config).from_dict(model.config.to_dict() | MLP)).eval().bfloat16()
    rebuilt.load_state_dict(folded.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(rebuilt(**batches[0]).logits, folded(**batches[0])["logits"], rtol=0.1, atol=0.02)


class Heads(nn.Module):
    """Attention without a configured size of a head, which may be given, as in many language models."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        width, self.heads = config.width, config.heads
        self.size = config.width // config.heads if config.head_dim is None else config.head_dim
        self.stem, self.out = nn.Linear(4, width), nn.Linear(width, 3)
        self.q, self.k, self.v = (nn.Linear(width, self.heads * self.size) for _ in range(3))
        self.o, self.up = nn.Linear(self.heads * self.size, width), nn.Linear(width, config.hidden)
        self.down = nn.Linear(config.hidden, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        q, k, v = (own(x).unflatten(-1, (self.heads, self.size)).transpose(1, 2) for own in (self.q, self.k, self.v))
        y = nn.functional.scaled_dot_product_attention(q, k, v, scale=0.5).transpose(1, 2).flatten(2)
        x = x + self.o(y)
        out: torch.Tensor = self.out(x + self.down(self.up(x).relu()))
        return out


class Attending:
    def __init__(self, **changes: Any) -> None:
        self.width, self.heads, self.head_dim, self.hidden, self.layers = 16, 4, None, 24, 1
        vars(self).update(changes)


@pytest.mark.parametrize(
    ("width", "expected"),
    [
        # With the stream alone, what a head has must be said; four is also the number of heads.
        ({"stem*": 0.5}, {"width": 8, "head_dim": 4}),
        ({"blocks of *": 0.5}, {"heads": 2, "head_dim": 4}),
        ({"blocks of *": 0.75}, {"heads": 3, "head_dim": 4}),
        # The size of a head is what it was: it follows from the two.
        ({"stem*": 0.5, "blocks of *": 0.5, "up*": 0.5}, {"width": 8, "heads": 2, "hidden": 12}),
    ],
)
def test_all_that_has_to_change_is_found(width: Any, expected: dict[str, int]) -> None:
    torch.manual_seed(0)
    model, x = Heads(Attending()).eval(), torch.randn(5, 6, 4)
    folded = fxmerge.fold(model, [x], width)
    assert fxmerge.report(folded).config == expected
    rebuilt = Heads(Attending(**expected)).eval()
    rebuilt.load_state_dict(folded.state_dict())
    torch.testing.assert_close(rebuilt(x), folded(x))


class Config:
    """Of a network whose inputs are scaled by its width."""

    def __init__(self) -> None:
        self.width = 8


class Twice(nn.Module):
    """Built from a configuration with one width for two layers."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.first, self.other = nn.Linear(4, config.width), nn.Linear(4, config.width)
        self.last, self.end = nn.Linear(config.width, 2), nn.Linear(config.width, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.last(self.first(x).relu()) + self.end(self.other(x).relu())
        return out


class Checked(Config):
    """Refuses odd widths when it is built, and not when a width is set."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.width = width
        if width % 2:
            raise ValueError("odd")

    def to_dict(self) -> dict[str, Any]:
        return {"width": self.width}

    @classmethod
    def from_dict(cls, entries: dict[str, Any]) -> "Checked":
        return cls(**entries)


@pytest.mark.parametrize(("width", "expected"), [(4, {"width": 4}), (3, None)])
def test_a_configuration_that_cannot_be_built_is_none(width: int, expected: dict[str, int] | None) -> None:
    torch.manual_seed(0)
    folded = fxmerge.fold(Twice(Checked()), width={"*": width}, example=torch.randn(5, 4))
    assert fxmerge.report(folded).widths and fxmerge.report(folded).config == expected


def test_other_models_have_none() -> None:
    model, other, call = nn.Linear(2, 3), nn.Linear(2, 2), ((torch.zeros(1, 2),), dict[str, Any]())
    assert config_for(model, other, call, [(3, 2)]) is None
    model.config = 3  # type: ignore[assignment]
    assert config_for(model, other, call, [(3, 2)]) is None


class Scaled(nn.Module):
    """Built from a configuration, of which it computes a scale too."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config, self.scale = config, config.width**0.5
        self.first, self.last = nn.Linear(4, config.width), nn.Linear(config.width, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.last(self.first(x * self.scale).relu())
        return out


def test_a_class_that_would_compute_something_else_has_none() -> None:
    torch.manual_seed(0)
    folded = fxmerge.fold(Scaled(Config()), width=0.5, example=torch.randn(5, 4))
    assert fxmerge.report(folded).widths == {"first.weight[0]": (8, 4)}
    assert fxmerge.report(folded).config is None


def test_sizes_that_no_configuration_has_give_none() -> None:
    torch.manual_seed(0)
    for width, config in ((0.5, {"width": 4}), ({"first.weight[0]": 0.5}, None)):
        folded = fxmerge.fold(Twice(Config()), width=width, example=torch.randn(5, 4))
        assert fxmerge.report(folded).widths
        assert fxmerge.report(folded).config == config

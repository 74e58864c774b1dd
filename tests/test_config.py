"""Configurations of transformers' classes for what a fold leaves of them."""

from typing import Any

import pytest
import torch
from torch import nn

import fxmerge
from fxmerge.emit.config import config_for
from tests.slow import slow

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


def test_other_models_have_none() -> None:
    model, other, call = nn.Linear(2, 3), nn.Linear(2, 2), ((torch.zeros(1, 2),), dict[str, Any]())
    assert config_for(model, other, call, [(3, 2)]) is None
    model.config = 3  # type: ignore[assignment]
    assert config_for(model, other, call, [(3, 2)]) is None


class Config:
    """Of a network whose inputs are scaled by its width."""

    def __init__(self) -> None:
        self.width = 8


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


def test_sizes_that_no_configuration_has_give_none() -> None:
    torch.manual_seed(0)
    for width, config in ((0.5, {"width": 4}), ({"first.weight[0]": 0.5}, None)):
        folded = fxmerge.fold(Twice(Config()), width=width, example=torch.randn(5, 4))
        assert fxmerge.report(folded).widths
        assert fxmerge.report(folded).config == config

"""Configurations of transformers' classes for what a fold leaves of them."""

from typing import Any

import pytest
import torch
from torch import nn

import fxmerge
from fxmerge.emit.config import config_for

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
    [(llama, {"hidden_size": 8, "intermediate_size": 12}), (gpt2, {"n_inner": 32})],
    ids=["llama", "gpt2"],
)
def test_a_fold_loads_into_its_class(build: Any, expected: dict[str, int]) -> None:
    torch.manual_seed(0)
    model = build()
    batches = [{"input_ids": torch.randint(0, 40, (4, length))} for length in (8, 9)]
    folded = fxmerge.fold(model, batches, 0.5)
    assert fxmerge.report(folded).config == expected
    config = type(model.config).from_dict(model.config.to_dict() | expected)
    rebuilt = type(model)(config).eval()
    rebuilt.load_state_dict(folded.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(rebuilt(**batches[0]).logits, folded(**batches[0])["logits"])


def test_other_models_have_none() -> None:
    model = nn.Linear(2, 3)
    assert config_for(model, {"weight": (2, 2), "bias": (2,)}, [(3, 2)]) is None
    model.config = 3  # type: ignore[assignment]
    assert config_for(model, {"weight": (2, 2), "bias": (2,)}, [(3, 2)]) is None


def test_sizes_that_no_configuration_has_give_none() -> None:
    torch.manual_seed(0)
    model = llama()
    shapes = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    assert config_for(model, shapes | {"model.layers.0.mlp.up_proj.weight": (12, 16)}, [(24, 12)]) is None

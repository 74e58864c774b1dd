"""Adapters of one base (LoRA, arXiv 2106.09685) are linear bottlenecks, and are merged and folded as such."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import peft
import pytest
import torch
import transformers
from torch import Tensor, nn

import fxmerge
from fxmerge import Align, Recipe, Zip
from tests.slow import but_slow

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),  # Peft itself calls that.
]

LAYERS = ("layers.0.self_attn.v_proj", "layers.1.mlp.down_proj")


@pytest.fixture(scope="module")
def base() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=False,
    )
    model: nn.Module = transformers.LlamaForCausalLM(config).eval()
    return model


TOKENS = {"input_ids": torch.arange(36).reshape(4, 9)}


def adapted(base: nn.Module, seed: int, rank: int) -> nn.Module:
    """The base with a random adapter."""
    torch.manual_seed(seed)
    targets = ["q_proj", "v_proj", "up_proj", "down_proj"]
    config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets)
    model: nn.Module = peft.get_peft_model(copy.deepcopy(base), config).eval()
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.3)
    return model


def factors(state: Mapping[str, Tensor], layer: str) -> tuple[Tensor, Tensor]:
    a, b = (next(t for n, t in state.items() if layer in n and f"lora_{half}" in n) for half in "AB")
    return a, b


def delta(model: nn.Module, layer: str) -> Tensor:
    """What an adapter adds to a layer of its base, but for its scale."""
    a, b = factors(model.state_dict(), layer)
    return b @ a


def off(expected: Tensor, got: Tensor) -> float:
    return float((expected - got).norm() / expected.norm())


@pytest.mark.parametrize(("first", "second"), but_slow([(4, 8), (4, 4)]))
def test_adapters_of_any_ranks_merge_in_the_space_that_they_span(base: nn.Module, first: int, second: int) -> None:
    """Their mean is exact, and the best one of lower rank is what a fold leaves (a truncated singular value
    decomposition, as KnOTS has it: arXiv 2410.19735)."""
    one, two = (adapted(base, seed, rank) for seed, rank in enumerate((first, second)))
    both = fxmerge.merge(one, two, recipe=Recipe(match=Zip(width=2.0), fit=None), example=TOKENS)
    small = fxmerge.fold(both, None, {"*lora_A*": 0.5}, Recipe(fit=None), example=TOKENS)
    for layer in LAYERS:
        mean = (delta(one, layer) + delta(two, layer)) / 2
        assert off(mean, delta(both, layer)) < 1e-6
        u, s, vh = torch.linalg.svd(mean)
        rank = len(factors(small.state_dict(), layer)[0])
        assert rank == max(first, second)
        best = (u[:, :rank] * s[:rank]) @ vh[:rank]
        assert off(mean, delta(small, layer)) == pytest.approx(off(mean, best), rel=1e-4)
    frozen = {name: tensor for name, tensor in one.state_dict().items() if "lora_" not in name}
    for made in (both, small):
        assert all(torch.equal(made.state_dict()[name], tensor) for name, tensor in frozen.items())


def test_an_adapter_in_another_basis_is_the_same_adapter(base: nn.Module) -> None:
    one = adapted(base, 0, 4)
    two = copy.deepcopy(one)
    state, turn = two.state_dict(), torch.eye(4) + 0.3 * torch.randn(4, 4, generator=torch.Generator().manual_seed(0))
    for name, tensor in state.items():
        if "lora_A" in name:
            state[name] = turn @ tensor
        elif "lora_B" in name:
            state[name] = tensor @ turn.inverse()
    two.load_state_dict(state)
    for continuous, nearness in ((True, 1e-4), (False, None)):
        merged = fxmerge.merge(one, two, recipe=Recipe(match=Align(continuous=continuous), fit=None), example=TOKENS)
        for layer in LAYERS:
            missed = off(delta(one, layer), delta(merged, layer))
            assert missed < nearness if nearness else missed > 0.01

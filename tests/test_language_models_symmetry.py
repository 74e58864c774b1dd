"""Language models with experts, as transformers defines them: experts move, and so do the units inside of each."""

import math
from itertools import product
from typing import Any

import pytest
import torch
import transformers

import fxmerge
from tests.slow import but_slow

EXPERTS, UNITS, STREAM, HEADS, LAYERS = 4, 8, 8, 2, 1
HEAD = STREAM // HEADS

SHARED: dict[str, Any] = {
    "vocab_size": 11,
    "hidden_size": STREAM,
    "intermediate_size": UNITS,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": HEADS,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 32,
    "use_cache": False,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}

MODELS: dict[str, dict[str, Any]] = {
    "Mixtral": {"num_local_experts": EXPERTS, "head_dim": HEAD},
    "Olmoe": {"num_experts": EXPERTS},
    "Qwen3Moe": {"num_experts": EXPERTS, "moe_intermediate_size": UNITS, "head_dim": HEAD},
}


@pytest.mark.parametrize(("name", "experts"), but_slow(product(MODELS, ["grouped_mm", "batched_mm"])))
def test_experts_and_the_units_inside_of_each_move(name: str, experts: str) -> None:
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**SHARED, **MODELS[name], experts_implementation=experts)
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    assert model.config._experts_implementation == experts
    for p in model.parameters():
        torch.nn.init.normal_(p, mean=float(p.ndim == 1))
    ids = torch.randint(0, 11, (2, 12))
    symmetry = fxmerge.find_symmetry(model, (ids,))
    # The stream; experts, and units of each; heads, and of these, which rotary positions leave, the values.
    sizes = [STREAM, EXPERTS, *[UNITS] * EXPERTS, HEADS, *[HEAD] * HEADS]
    assert symmetry.log_order() == pytest.approx(sum(math.lgamma(n + 1) for n in sizes), rel=1e-9), symmetry
    assert not symmetry.unknown
    verified = symmetry.verify(model, (ids,), trials=4)
    assert verified.demoted == ()
    assert verified.error is not None
    assert verified.error < 1e-9

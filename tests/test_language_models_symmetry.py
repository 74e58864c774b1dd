"""Language models with experts, as transformers defines them: experts move, and so do the units inside of each."""

import math
from typing import Any

import pytest
import torch
import transformers

import fxmerge
from tests.slow import but_slow

EXPERTS, UNITS, STREAM, HEADS, HEAD, SHARED_UNITS = 4, 8, 8, 2, 4, 6

SHARED: dict[str, Any] = {
    "vocab_size": 11,
    "hidden_size": STREAM,
    "intermediate_size": UNITS,
    "num_hidden_layers": 1,
    "num_attention_heads": HEADS,
    "num_key_value_heads": HEADS,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 32,
    "use_cache": False,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
LATENT = {"q_lora_rank": None, "kv_lora_rank": 4, "qk_rope_head_dim": 2, "qk_nope_head_dim": HEAD, "v_head_dim": HEAD}
SIGMOID = {"n_shared_experts": 1, "first_k_dense_replace": 0, "moe_intermediate_size": UNITS, "topk_group": 1}
ATTENTION = {"layer_types": ["full_attention"], "head_dim": HEAD}

ATTENDING = (HEADS, *[HEAD] * HEADS)
"""Heads, and of these, which rotary positions leave, the values."""
OF_LATENT = (HEADS, *[HEAD] * HEADS, *[HEAD] * HEADS, LATENT["kv_lora_rank"])
"""The queries and keys without positions, too, and the latent vector."""
ROUTED = (STREAM, EXPERTS, *[UNITS] * EXPERTS)
"""The stream; experts, and units of each."""
GROUPED = (STREAM, 2, 3, 3, *[UNITS] * 6)
"""Two groups of three experts each."""

MODELS: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    "Mixtral": ({"num_local_experts": EXPERTS, "head_dim": HEAD}, (*ROUTED, *ATTENDING)),
    "Olmoe": ({"num_experts": EXPERTS}, (*ROUTED, *ATTENDING)),
    "Qwen3Moe": (
        {"num_experts": EXPERTS, "moe_intermediate_size": UNITS, "head_dim": HEAD},
        (*ROUTED, *ATTENDING),
    ),
    "Qwen2Moe": (
        {
            "num_experts": EXPERTS,
            "moe_intermediate_size": UNITS,
            "shared_expert_intermediate_size": SHARED_UNITS,
            "decoder_sparse_step": 1,
        },
        (*ROUTED, *ATTENDING, SHARED_UNITS),
    ),
    "DeepseekV2": (
        {**LATENT, **SIGMOID, "n_routed_experts": 6, "n_group": 2, "topk_method": "group_limited_greedy"},
        (*GROUPED, *OF_LATENT, UNITS),
    ),
    "DeepseekV3": ({**LATENT, **SIGMOID, "n_routed_experts": 6, "n_group": 2}, (*GROUPED, *OF_LATENT, UNITS)),
    "Glm4Moe": (
        # Of a head, half of the dimensions are not turned: those of queries and keys move.
        {**SIGMOID, "n_routed_experts": EXPERTS, "n_group": 1, "head_dim": HEAD},
        (*ROUTED, *ATTENDING, 2, 2, UNITS),
    ),
    "Phimoe": ({"num_local_experts": EXPERTS}, (*ROUTED, *ATTENDING)),
    "GptOss": (
        {**ATTENTION, "num_local_experts": EXPERTS, "attn_implementation": "eager"},
        (*ROUTED, *ATTENDING),
    ),
    "GraniteMoe": ({"num_local_experts": EXPERTS}, (*ROUTED, *ATTENDING)),
    "Llama4": (
        {
            **ATTENTION,
            "num_local_experts": EXPERTS,
            "intermediate_size_mlp": SHARED_UNITS,
            "moe_layers": [0],
            "attn_temperature_tuning": False,
        },
        (*ROUTED, *ATTENDING, UNITS),
    ),
    "Jamba": (
        # There are no positions, so that the dimensions of queries and keys move, too.
        {"num_experts": EXPERTS, "attn_layer_period": 1, "attn_layer_offset": 0, "use_mamba_kernels": False}
        | {"expert_layer_period": 1, "expert_layer_offset": 0},
        (*ROUTED, *ATTENDING, HEAD, HEAD),
    ),
}
"""By name: the configuration, and the sizes of the symmetric groups whose product the symmetry is."""

IN_LOOPS: dict[str, dict[str, Any]] = {
    "Dbrx": {
        "d_model": STREAM,
        "n_heads": HEADS,
        "n_layers": 1,
        "max_seq_len": 32,
        "ffn_config": {"hidden_size": STREAM, "ffn_hidden_size": UNITS, "moe_num_experts": EXPERTS, "moe_top_k": 2},
        "attn_config": {"kv_n_heads": HEADS, "clip_qkv": 8, "rope_theta": 10000.0},
        "rope_theta": 10000.0,
        "vocab_size": 11,
        "use_cache": False,
    },
    "Mixtral": {
        **SHARED,
        "num_local_experts": EXPERTS,
        "head_dim": HEAD,
        "experts_implementation": "eager",
    },
}
"""Models that loop over the experts which some token chose: torch.export refuses this."""


def made(name: str, config: dict[str, Any]) -> torch.nn.Module:
    torch.manual_seed(0)
    kind = getattr(transformers, f"{name}TextConfig" if name == "Llama4" else f"{name}Config")
    model: torch.nn.Module = getattr(transformers, f"{name}ForCausalLM")(kind(**config)).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, mean=float(p.ndim == 1))
    for key, buffer in model.named_buffers():
        if key.endswith("correction_bias"):
            torch.nn.init.normal_(buffer)
    return model


@pytest.mark.parametrize(
    ("name", "experts"),
    but_slow([*((name, None) for name in MODELS), ("Mixtral", "batched_mm"), ("DeepseekV3", "batched_mm")]),
)
def test_experts_and_the_units_inside_of_each_move(name: str, experts: str | None) -> None:
    config, sizes = MODELS[name]
    model = made(name, {**SHARED, **config, **({} if experts is None else {"experts_implementation": experts})})
    ids = torch.randint(0, 11, (2, 6))
    symmetry = fxmerge.find_symmetry(torch.export.export(model, (ids,), strict=False), (ids,))
    assert symmetry.log_order() == pytest.approx(sum(math.lgamma(n + 1) for n in sizes), rel=1e-9), symmetry
    assert not symmetry.unknown
    assert not symmetry.probed
    verified = symmetry.verify(model, (ids,), trials=4)
    assert verified.demoted == ()
    assert verified.error is not None
    assert verified.error < 1e-9


@pytest.mark.slow
@pytest.mark.parametrize("name", IN_LOOPS)
def test_in_a_loop_over_experts_only_the_units_inside_of_each_move(name: str) -> None:
    model = made(name, IN_LOOPS[name])
    ids = torch.randint(0, 11, (2, 12))
    symmetry = fxmerge.find_symmetry(model, (ids,))
    expected = sum(math.lgamma(n + 1) for n in (STREAM, *[UNITS] * EXPERTS, *ATTENDING))
    assert symmetry.log_order() == pytest.approx(expected, rel=1e-9), symmetry
    assert symmetry.verify(model, (ids,), trials=4).demoted == ()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["DeepseekV3", "GptOss"])
def test_experts_in_another_order_are_found(name: str) -> None:
    model, ids = made(name, {**SHARED, **MODELS[name][0]}), torch.randint(0, 11, (4, 6))
    symmetry = fxmerge.find_symmetry(model, (ids,))
    planted = made(name, {**SHARED, **MODELS[name][0]})
    planted.load_state_dict(symmetry.sample_permutation(torch.Generator().manual_seed(1)).apply(model.state_dict()))
    aligned = fxmerge.align(planted, to=model, loader=[ids], symmetry=symmetry)
    for key, value in model.state_dict().items():
        torch.testing.assert_close(aligned.state_dict()[key], value, rtol=0, atol=1e-5, msg=key)

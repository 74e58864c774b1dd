"""Language models as transformers makes them: default configurations, only smaller, on batches of two lengths."""

import copy
import logging
from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import fxmerge
from tests.slow import but_slow

WORDS = 64
TOKENS = {"vocab_size": WORDS, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
WIDTHS: dict[str, Any] = {
    **TOKENS,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
}
GROUPED: dict[str, Any] = {**WIDTHS, "num_key_value_heads": 2, "head_dim": 4}

NEED_LABELS = ("t5", "whisper")
"""The models that compute what their decoders read from the labels."""

FREE = {"t5": ["output['encoder_last_hidden_state']"]}
"""The outputs whose features nothing reads by their order; they would pin the stream of tied embeddings."""

Build = Callable[[], nn.Module]


def causal(config: str, **sizes: Any) -> Build:
    return lambda: transformers.AutoModelForCausalLM.from_config(getattr(transformers, config)(**sizes))


def of(kind: str, config: str, **sizes: Any) -> Build:
    return lambda: getattr(transformers, kind)(getattr(transformers, config)(**sizes))


MODELS: dict[str, Build] = {
    "gpt2": causal("GPT2Config", **TOKENS, n_embd=16, n_layer=1, n_head=4, n_positions=32),
    "llama": causal("LlamaConfig", **GROUPED),
    "qwen3": causal("Qwen3Config", **GROUPED),
    "gemma2": causal("Gemma2Config", **GROUPED),
    "mixtral": causal("MixtralConfig", **GROUPED, num_local_experts=3),
    "bert": of("BertForMaskedLM", "BertConfig", **WIDTHS),
    "t5": of(
        "T5ForConditionalGeneration",
        "T5Config",
        **TOKENS,
        d_model=16,
        d_kv=4,
        d_ff=24,
        num_layers=1,
        num_heads=4,
        decoder_start_token_id=0,
    ),
    "whisper": of(
        "WhisperForConditionalGeneration",
        "WhisperConfig",
        **TOKENS,
        d_model=16,
        num_mel_bins=4,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=24,
        decoder_ffn_dim=24,
        max_source_positions=10,
        max_target_positions=32,
        decoder_start_token_id=1,
        begin_suppress_tokens=None,
    ),
}


def net(name: str, seed: int, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(seed)
    return MODELS[name]().to(dtype).eval()


def text(
    name: str, lengths: tuple[int, ...], dtype: torch.dtype = torch.float32, samples: int = 6
) -> list[dict[str, Tensor]]:
    """What a tokenizer and a collator give, the beginning of a sample padded."""
    g = torch.Generator().manual_seed(0)
    batches = []
    for length in lengths:
        ids = torch.randint(3, WORDS, (samples, length), generator=g)
        if name == "whisper":
            batches.append({"input_features": torch.randn(samples, 4, 20, generator=g).to(dtype), "labels": ids})
        else:
            mask = torch.ones_like(ids)
            mask[0, :2] = 0
            batches.append({"input_ids": ids.where(mask > 0, 0), "attention_mask": mask, "labels": ids})
    return batches


def generate(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """A few words more, or, of a model that fills gaps, the words that it would put."""
    given = {key: value for key, value in batch.items() if key != "labels"}
    if not model.can_generate():
        words: Tensor = model(**given).logits.argmax(-1)
        return words
    longest = given.get("input_ids", torch.zeros(1, 1)).shape[1] + 3
    words = model.generate(**given, max_length=longest, do_sample=False)
    return words


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
QUICK = [("gpt2", "bfloat16")]


@pytest.mark.parametrize(("name", "dtype"), but_slow(product(MODELS, DTYPES), QUICK))
def test_language_models_merge_as_they_come(name: str, dtype: str, caplog: pytest.LogCaptureFixture) -> None:
    kind = DTYPES[dtype]
    a, b = net(name, 0, kind), net(name, 1, kind)
    loader = text(name, (7, 11), kind)
    before = [(copy.deepcopy(m.state_dict()), m.config.to_dict()) for m in (a, b)]
    given = copy.deepcopy(loader)
    with caplog.at_level(logging.INFO, logger="fxmerge"):
        merged: Any = fxmerge.merge(a, b, loader, recipe=fxmerge.Recipe(free=FREE.get(name, ())))
    records = [r for r in caplog.records if r.name.startswith("fxmerge")]
    warned = [r.getMessage() for r in records if r.levelno > logging.INFO]
    # Of untrained networks a parent may well be nearer to the mean of both, which is worth a warning.
    assert [text for text in warned if "alone is nearer to the mean" not in text] == []
    kept = name in NEED_LABELS
    left_out = "Inputs that only a loss is computed from are left out: labels"
    assert (left_out in [r.getMessage() for r in records]) is not kept
    assert fxmerge.report(merged).layers
    for m, (state, config) in zip((a, b), before, strict=True):
        assert m.config.to_dict() == config
        assert all(torch.equal(value, state[key]) for key, value in m.state_dict().items())
    assert all(torch.equal(x[key], y[key]) for x, y in zip(loader, given, strict=True) for key in x)
    fresh = net(name, 2, kind)
    fresh.load_state_dict(merged.state_dict())
    for batch in text(name, (7, 11, 5, 16), kind, samples=3):
        call = {key: value for key, value in batch.items() if kept or key != "labels"}
        torch.testing.assert_close(merged(**call)["logits"], fresh(**call).logits)
    assert generate(fresh, text(name, (5,), kind, samples=2)[0]).shape[0] == 2

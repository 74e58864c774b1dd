"""Tiny networks of real architectures, with random parameters, by name: each with example inputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

WORDS = torch.arange(14).reshape(2, 7) * 5 % 11

LANGUAGE: dict[str, Any] = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}


class Logits(nn.Module):
    """The scores of a model of transformers, alone."""

    def __init__(self, model: nn.Module, **options: Any) -> None:
        super().__init__()
        self.model, self.options = model, options

    def forward(self, words: Tensor) -> Tensor:
        y: Tensor = self.model(words, **self.options).logits
        return y


class Translator(nn.Module):
    """The scores of an encoder and decoder, alone."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, words: Tensor, before: Tensor) -> Tensor:
        y: Tensor = self.model(input_ids=words, decoder_input_ids=before, use_cache=False).logits
        return y


def _timm(name: str, **options: Any) -> nn.Module:
    timm = pytest.importorskip("timm")
    model: nn.Module = timm.create_model(name, pretrained=False, num_classes=3, **options)
    return model


def _transformers(config: str, model: str, **options: Any) -> nn.Module:
    import transformers

    own: nn.Module = getattr(transformers, model)(getattr(transformers, config)(**LANGUAGE, **options))
    return own


def _gpt2() -> nn.Module:
    sizes = {"vocab_size": 11, "n_positions": 16, "n_embd": 8, "n_layer": 1, "n_head": 2}
    return Logits(_transformers("GPT2Config", "GPT2LMHeadModel", **sizes), use_cache=False)


def _t5() -> nn.Module:
    sizes = {"vocab_size": 11, "d_model": 8, "d_kv": 4, "d_ff": 12, "num_layers": 1, "num_heads": 2}
    return Translator(_transformers("T5Config", "T5ForConditionalGeneration", **sizes, decoder_start_token_id=0))


def _llama() -> nn.Module:
    sizes = {"vocab_size": 11, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 16}
    return Logits(_transformers("LlamaConfig", "LlamaForCausalLM", **sizes, **heads), use_cache=False)


def _bert() -> nn.Module:
    sizes = {"vocab_size": 11, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "max_position_embeddings": 16}
    return Logits(_transformers("BertConfig", "BertForSequenceClassification", **sizes, **heads))


def _mobilenet() -> nn.Module:
    import torchvision  # type: ignore[import-untyped]

    blocks = [[1, 16, 1, 1], [2, 24, 2, 2]]
    model: nn.Module = torchvision.models.MobileNetV2(num_classes=3, width_mult=0.25, inverted_residual_setting=blocks)
    return model


def _image(size: int) -> tuple[Tensor, ...]:
    return (torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0)),)


REAL: dict[str, tuple[Callable[[], nn.Module], tuple[Tensor, ...]]] = {
    "ViT": (
        lambda: _timm("vit_tiny_patch16_224", img_size=16, patch_size=8, embed_dim=8, depth=1, num_heads=2),
        _image(16),
    ),
    "GPT-2": (_gpt2, (WORDS,)),
    "T5": (_t5, (WORDS, WORDS)),
    "Llama": (_llama, (WORDS,)),
    "BERT": (_bert, (WORDS,)),
    "Swin": (
        lambda: _timm(
            "swin_tiny_patch4_window7_224",
            img_size=16,
            window_size=2,
            embed_dim=8,
            depths=(1, 1),
            num_heads=(2, 2),
        ),
        _image(16),
    ),
    "ConvNeXt": (lambda: _timm("convnext_atto", depths=(1, 1, 1, 1), dims=(4, 6, 8, 10)), _image(32)),
    "MobileNetV2": (_mobilenet, _image(16)),
}


def drawn(name: str) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """A network with parameters as after training: gains near one, and no two alike."""
    make, args = REAL[name]
    torch.manual_seed(0)
    model = make().eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            noise = torch.randn(p.shape, generator=generator)
            p.copy_(1 + 0.2 * noise if p.ndim == 1 and (p == 1).all() else 0.3 * noise)
        for own, buffer in model.named_buffers():
            if own.endswith(("running_mean", "running_var")):
                buffer.copy_(0.5 + torch.rand(buffer.shape, generator=generator))
    return model, args

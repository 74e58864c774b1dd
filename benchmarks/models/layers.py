"""Layers of torch.nn that are networks by themselves."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from models.example import Example, Factory, example

BATCH, TIME, SOURCE = 2, 7, 9


class _Head(nn.Module):
    """A layer, and a linear layer on its first output, so that what the layer puts out may move."""

    def __init__(self, layer: nn.Module, width: int) -> None:
        super().__init__()
        self.layer, self.head = layer, nn.Linear(width, 3)

    def forward(self, *inputs: Tensor) -> Tensor:
        out = self.layer(*inputs)
        first: Tensor = self.head(out[0] if isinstance(out, tuple) else out)
        return first


def torch_nn() -> dict[str, Factory]:
    """Recurrent layers, transformers, attention with every option, and layers that no model above has."""
    models: dict[str, Factory] = {}
    recurrent: dict[str, dict[str, Any]] = {
        "": {},
        " bidirectional": {"bidirectional": True},
        " stacked": {"num_layers": 3},
        " stacked bidirectional": {"num_layers": 2, "bidirectional": True},
        " without bias": {"bias": False},
        " batch first": {"batch_first": True},
    }
    for kind in ("LSTM", "GRU", "RNN"):
        for label, options in recurrent.items():
            models[kind + label] = _recurrent(kind, 6, **options)
    models["RNN relu"] = _recurrent("RNN", 6, nonlinearity="relu")
    models["LSTM proj_size"] = _recurrent("LSTM", 6, proj_size=4)
    models["LSTM proj_size stacked bidirectional"] = _recurrent(
        "LSTM", 6, proj_size=4, num_layers=2, bidirectional=True
    )
    for cell in ("LSTMCell", "GRUCell", "RNNCell"):
        models[cell] = _headed(cell, 6, (BATCH, 5), input_size=5, hidden_size=6)
    source, target = (BATCH, SOURCE, 16), (BATCH, TIME, 16)
    block: dict[str, Any] = {"d_model": 16, "nhead": 4, "dim_feedforward": 24, "batch_first": True}
    variants: dict[str, dict[str, Any]] = {
        "": {},
        " norm first": {"norm_first": True},
        " gelu": {"activation": "gelu"},
    }
    for label, more in variants.items():
        models["TransformerEncoderLayer" + label] = _headed("TransformerEncoderLayer", 16, target, **block, **more)
        models["TransformerDecoderLayer" + label] = _headed(
            "TransformerDecoderLayer", 16, target, source, **block, **more
        )
        models["Transformer" + label] = _headed(
            "Transformer", 16, source, target, num_encoder_layers=2, num_decoder_layers=2, **block, **more
        )
        models["TransformerEncoder" + label] = _stack("Encoder", (target,), **block, **more)
        models["TransformerDecoder" + label] = _stack("Decoder", (target, source), **block, **more)
    same = ((TIME, BATCH, 12),) * 3
    crossed = ((TIME, BATCH, 12), (SOURCE, BATCH, 12), (SOURCE, BATCH, 12))
    sized = ((TIME, BATCH, 12), (SOURCE, BATCH, 5), (SOURCE, BATCH, 7))
    first = ((BATCH, TIME, 12), (BATCH, SOURCE, 12), (BATCH, SOURCE, 12))
    attention: dict[str, tuple[tuple[tuple[int, ...], ...], dict[str, Any]]] = {
        "": (same, {}),
        " cross": (crossed, {}),
        " kdim vdim": (sized, {"kdim": 5, "vdim": 7}),
        " bias_kv": (same, {"add_bias_kv": True}),
        " bias_kv cross": (crossed, {"add_bias_kv": True}),
        " add_zero_attn": (same, {"add_zero_attn": True}),
        " bias_kv add_zero_attn": (same, {"add_bias_kv": True, "add_zero_attn": True}),
        " batch first": (first, {"batch_first": True}),
        " without bias": (same, {"bias": False}),
        " one head": (same, {"num_heads": 1}),
        " kdim vdim bias_kv batch first": (
            ((BATCH, TIME, 12), (BATCH, SOURCE, 5), (BATCH, SOURCE, 7)),
            {"kdim": 5, "vdim": 7, "add_bias_kv": True, "batch_first": True},
        ),
    }
    for label, (shapes, more) in attention.items():
        models["MultiheadAttention" + label] = _headed(
            "MultiheadAttention", 12, *shapes, **{"embed_dim": 12, "num_heads": 3, **more}
        )
    for mode in ("sum", "mean", "max"):
        models[f"EmbeddingBag {mode}"] = _bag(mode)
    models["Bilinear"] = _headed("Bilinear", 6, (BATCH, 4), (BATCH, 5), in1_features=4, in2_features=5, out_features=6)
    models["Bilinear of hidden units"] = _bilinear
    return models


def _headed(layer: str, width: int, *shapes: tuple[int, ...], **options: Any) -> Factory:
    return lambda: example(_Head(getattr(nn, layer)(**options), width), *(torch.randn(s) for s in shapes))


def _recurrent(kind: str, hidden: int, **options: Any) -> Factory:
    width = (options.get("proj_size") or hidden) * (2 if options.get("bidirectional") else 1)
    shape = (BATCH, TIME, 5) if options.get("batch_first") else (TIME, BATCH, 5)
    return _headed(kind, width, shape, input_size=5, hidden_size=hidden, **options)


def _stack(kind: str, shapes: tuple[tuple[int, ...], ...], **options: Any) -> Factory:
    def make() -> Example:
        layer = getattr(nn, f"Transformer{kind}Layer")(**options)
        # Nested tensors are of use only with a padding mask.
        more = {"enable_nested_tensor": False} if kind == "Encoder" else {}
        stack = getattr(nn, f"Transformer{kind}")(layer, 2, norm=nn.LayerNorm(16), **more)
        return example(_Head(stack, 16), *(torch.randn(s) for s in shapes))

    return make


def _bag(mode: str) -> Factory:
    return lambda: example(_Head(nn.EmbeddingBag(20, 6, mode=mode), 6), torch.randint(20, (BATCH, 5)))


class _Bilinear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(3, 6), nn.Linear(4, 7), nn.Bilinear(6, 7, 5)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        out: Tensor = self.c(self.a(x).relu(), self.b(y).relu())
        return out


def _bilinear() -> Example:
    return example(_Bilinear(), torch.randn(BATCH, 3), torch.randn(BATCH, 4))

"""Heads of their own on full-size models: does every head give what its network gives, and what does it cost?

Each pair shares a trunk: the second network has that of the first, its units in another order, and a head of its own.
Merged without data and in float64, both outputs must be those of the networks, up to rounding. Weights are random. Told
are the largest error of an output, relative to its largest value; the share of the first network's parameters that lie
in the trunk; and the seconds of the whole merge, of emitting, and of taking out both heads.

    python benchmarks/rewriting.py [--short] [--zoo] [--pairs NAME ...] [--models NAME ...] [--jobs 2] [--markdown FILE]

With `--zoo`, this is done for models of the zoo, all layers but the last in the trunk. Each is also merged with another
random model at full width, where no unit is merged with another, and all outputs must be those of the models.

Needs `pip install -e '.[zoo]'`.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from invariance import machine, table
from models import find_factory
from models.processes import Note, run_all
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import fxmerge
from fxmerge import Align, Recipe, Run, Zip
from fxmerge.program import models as running

Pair = tuple[nn.Module, nn.Module, Any]
"""Two networks, and inputs of both: a tensor, or a dict by keyword."""


def images(size: int) -> Tensor:
    return torch.randn(2, 3, size, size, dtype=torch.float64)


def tokens(vocabulary: int) -> dict[str, Tensor]:
    ids = torch.randint(2, vocabulary, (2, 16))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def segmentation(size: int = 128) -> Pair:
    """A ResNet-50 with an FCN head, and one with a DeepLab head for other classes."""
    from torchvision.models import segmentation as models

    options = {"weights": None, "weights_backbone": None}
    return (
        models.fcn_resnet50(num_classes=5, **options),
        models.deeplabv3_resnet50(num_classes=7, **options),
        images(size),
    )


def resnet18() -> Pair:
    from torchvision.models import resnet18 as build

    return build(num_classes=10), build(num_classes=37), images(64)


def timm(name: str, size: int) -> Callable[[], Pair]:
    def pair() -> Pair:
        from timm import create_model

        return create_model(name, num_classes=10), create_model(name, num_classes=37), images(size)

    return pair


def gpt2(**sizes: Any) -> Callable[[], Pair]:
    """A language model whose head is its embedding, and a classifier."""

    def pair() -> Pair:
        from transformers import GPT2Config, GPT2ForSequenceClassification, GPT2LMHeadModel

        config = GPT2Config(pad_token_id=0, **sizes)
        classifier = GPT2Config(pad_token_id=0, num_labels=3, **sizes)
        return GPT2LMHeadModel(config), GPT2ForSequenceClassification(classifier), tokens(config.vocab_size)

    return pair


def bert(**sizes: Any) -> Callable[[], Pair]:
    """A masked language model, and a tagger of words."""

    def pair() -> Pair:
        from transformers import BertConfig, BertForMaskedLM, BertForTokenClassification

        config, tagger = BertConfig(**sizes), BertConfig(num_labels=9, **sizes)
        return BertForMaskedLM(config), BertForTokenClassification(tagger), tokens(config.vocab_size)

    return pair


def t5(**sizes: Any) -> Callable[[], Pair]:
    """Two taggers of words with T5's encoder."""

    def pair() -> Pair:
        from transformers import T5Config, T5ForTokenClassification

        first, second = (T5Config(num_labels=count, **sizes) for count in (5, 9))
        return T5ForTokenClassification(first), T5ForTokenClassification(second), tokens(first.vocab_size)

    return pair


PAIRS: dict[str, Callable[[], Pair]] = {
    "ResNet-50: FCN and DeepLab": segmentation,
    "ResNet-50: 10 and 37 classes": timm("resnet50", 224),
    "ViT-B: 10 and 37 classes": timm("vit_base_patch16_224", 224),
    "Swin-T: 10 and 37 classes": timm("swin_tiny_patch4_window7_224", 224),
    "GPT-2: language and 3 classes": gpt2(),
    "BERT: masked language and tags": bert(),
    "T5: 5 and 9 tags": t5(),
}

TINY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, "vocab_size": 99}
SHORT: dict[str, Callable[[], Pair]] = {
    "ResNet-18: 10 and 37 classes": resnet18,
    "GPT-2: language and 3 classes": gpt2(
        n_embd=32, n_layer=2, n_head=4, vocab_size=99, bos_token_id=1, eos_token_id=1
    ),
    "BERT: masked language and tags": bert(**TINY),
}


def outputs(model: nn.Module, given: Any) -> list[Tensor]:
    """What a model gives, as a list of tensors of numbers."""
    with torch.no_grad():
        found = model(**given) if isinstance(given, Mapping) else model(given)
    return [v for v in pytree.tree_leaves(found) if isinstance(v, Tensor) and v.is_floating_point()]


def same_trunk(first: nn.Module, second: nn.Module, args: Any, kwargs: Any) -> None:
    """Gives the second network the tensors of the first that have its names and shapes, then moves its units."""
    own, theirs = first.state_dict(), second.state_dict()
    theirs.update({n: own[n] for n, t in theirs.items() if n in own and own[n].shape == t.shape})
    second.load_state_dict(theirs)
    symmetry = fxmerge.find_symmetry(second, args, kwargs)
    moved = symmetry.sample_permutation(torch.Generator().manual_seed(0)).apply(second.state_dict())
    second.load_state_dict(moved)


def row(name: str, build: Callable[[], Pair]) -> dict[str, str]:
    torch.manual_seed(0)
    first, second, given = build()
    first, second = first.double().eval(), second.double().eval()
    for config in (getattr(model, "config", None) for model in (first, second)):
        if config is not None:
            config.use_cache = False
    same_trunk(first, second, *(((), dict(given)) if isinstance(given, Mapping) else ((given,), {})))
    began = time.perf_counter()
    recipe = Recipe(match=Align(), fit=None)
    merged = fxmerge.merge(first, second, recipe=recipe, example=given, run=Run(progress=False))
    seconds = time.perf_counter() - began
    error = 0.0
    began = time.perf_counter()
    alone = [fxmerge.head(merged, number) for number in range(2)]
    taken = time.perf_counter() - began
    for network, model in zip(alone, (first, second), strict=True):
        for found, expected in zip(outputs(network, given), outputs(model, given), strict=True):
            error = max(error, float((found - expected).abs().max() / expected.abs().max()))
    shared = sum(p.numel() for n, p in merged.named_parameters() if not n.startswith("heads."))
    return {
        "pair": name,
        "error": f"{error:.0e}",
        "in the trunk": f"{shared / sum(p.numel() for p in first.parameters()):.0%}",
        "merge (s)": f"{seconds:.1f}",
        "emitting (s)": f"{fxmerge.report(merged).seconds['emitting']:.2f}",
        "both heads (s)": f"{taken:.1f}",
    }


# ------------------------------------------------------------------------------------ the zoo

ZOO = {
    "torch.nn": """LSTM, LSTM bidirectional, LSTM stacked, GRU, GRU bidirectional, RNN, RNN relu, LSTM proj_size,
        TransformerEncoder, TransformerEncoder norm first, MultiheadAttention, Bilinear of hidden units""",
    "transformers": """BERT classifier, RoBERTa, ALBERT, DistilBERT, DeBERTa, GPT-2, GPT-NeoX, OPT, BLOOM, Falcon,
        Mamba, Mamba2, RWKV, Llama, Mistral, Qwen2, Qwen3, Gemma 2, Phi, OLMo 2, Cohere, Granite,
        Mixtral, Qwen3-MoE, OLMoE, GPT-OSS, T5, mT5, BART, Whisper, Wav2Vec2, HuBERT, ViT, DeiT, BEiT,
        DINOv2, ConvNeXt, ConvNeXt V2, ResNet, RegNet, PoolFormer, Swin, Swin V2, SegFormer
        classifier, MobileViT, BiT, TextNet, MobileNet V1, MobileNet V2, LeViT, PVT, CvT, SwiftFormer,
        EfficientNet, Hiera, DPT, CLIP, PatchTST""",
    "torchvision": "shufflenet_v2_x0_5, mobilenet_v3_small, squeezenet1_1, mnasnet0_5, regnet_y_400mf, resnet18",
    "smp": "Unet, FPN, Linknet",
}
"""Convolutional networks with and without groups and GroupNorm, U-Nets, transformers for texts, images and speech, with
windows, grouped queries and experts, state-space models, recurrent layers."""
NAMES = tuple(f"{family}/{' '.join(name.split())}" for family, names in ZOO.items() for name in names.split(","))
SHORT_NAMES = ("torch.nn/LSTM", "transformers/BiT")
EXACT = 1e-6
"""Some have norms in float32, of which rounding depends on the order of units."""
TIME = 240
"""Seconds for each model."""


def work(task: dict[str, Any], note: Note) -> None:
    """Merges one model of the zoo with a copy in other units, and with another one at full width."""
    errors = {}
    for kind in ("in other units", "full width"):
        note(kind)
        (first, args, kwargs), (second, *_) = (find_factory(task["name"])() for _ in range(2))
        first, second = first.double().eval(), second.double().eval()
        args, kwargs = pytree.tree_map(lambda v: v.double() if _real(v) else v, (args, kwargs))
        for config in (getattr(model, "config", None) for model in (first, second)):
            if hasattr(config, "use_cache"):
                config.use_cache = False
        match: Align | Zip = Zip(width=2.0)
        if kind == "in other units":
            same_trunk(first, second, args, kwargs)
            match = Align()
        recipe = Recipe(match=match, fit=None, share="trunk")
        merged = fxmerge.merge(
            first, second, recipe=recipe, example=(args, kwargs), inputs=lambda given: given, run=Run(progress=False)
        )
        errors[kind] = max(
            error(model, fxmerge.head(merged, number), args, kwargs) for number, model in enumerate((first, second))
        )
        note(kind, **{kind: errors[kind]})
    note("done")


def error(model: nn.Module, head: nn.Module, args: Any, kwargs: Any) -> float:
    """The largest difference of an output, as a share of its largest value."""
    with torch.no_grad():
        leaves = [pytree.tree_leaves(running.run(own, args, kwargs)) for own in (model, head)]
    pairs = [(a, b) for a, b in zip(*leaves, strict=True) if _real(a)]
    return max(float((a - b).abs().max() / a.abs().max().clamp(min=1e-12)) for a, b in pairs)


def _real(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def zoo(names: Sequence[str], jobs: int) -> tuple[str, bool]:
    """The table, and whether every merge is exact."""
    rows, exact = [], True
    for row in run_all(work, [{"name": name} for name in names], jobs, TIME, 6):
        found = [row.get("in other units"), row.get("full width")]
        told = [f"{value:.0e}" if value is not None else "-" for value in found]
        rows.append({"model": row["name"], "in other units": told[0], "full width": told[1]})
        exact &= all(value is not None and value < EXACT for value in found)
        if "failure" in row:
            print(f"{row['name']}: {row['failure']}", flush=True)
        print(", ".join(rows[-1].values()), flush=True)
    return table(sorted(rows, key=lambda row: names.index(row["model"]))), exact


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="only small models")
    parser.add_argument("--pairs", nargs="+", choices=list(PAIRS), help="only these")
    parser.add_argument("--zoo", action="store_true", help="models of the zoo")
    parser.add_argument("--models", nargs="+", choices=NAMES, help="only these of the zoo")
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time, for the zoo")
    parser.add_argument("--markdown", type=Path, help="write the table to this file")
    options = parser.parse_args()
    if options.zoo:
        text, exact = zoo(options.models or (SHORT_NAMES if options.short else NAMES), options.jobs)
        print(text)
        if options.markdown:
            options.markdown.write_text(f"{machine()}\n\n{text}\n")
        return int(not exact)
    chosen = SHORT if options.short else {n: b for n, b in PAIRS.items() if n in (options.pairs or PAIRS)}
    rows = []
    for name, build in chosen.items():
        rows.append(row(name, build))
        print(", ".join(rows[-1].values()), flush=True)
    text = table(rows)
    print(text)
    if options.markdown:
        options.markdown.write_text(f"{machine()}\n\n{text}\n")
    return int(any(float(own["error"]) > 1e-6 for own in rows))  # T5 has norms in float32.


if __name__ == "__main__":
    sys.exit(main())

"""Inferred symmetries at full size: are they symmetries, and can a planted permutation be found again?

For every model, with random weights: the number of classes, the log order of the group, the relative
change of the outputs under a random group element in float64, and seconds for capture and inference. Then a
randomly permuted copy with 1% weight noise is aligned to the model, with data and in weight space alone,
and the found permutation compared with the planted one. Last, the same for the whole group, with changes of basis, of
the model with gains of one.

    python benchmarks/invariance.py [--short] [--models NAME ...] [--markdown FILE]

Needs `pip install -e '.[zoo]'`; models of packages that are not installed are listed as such.
"""

from __future__ import annotations

import argparse
import logging
import math
import os
import platform
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import fxmerge
from fxmerge.program.capture import capture_program
from fxmerge.symmetry.group import analyse

Factory = Callable[[], tuple[nn.Module, dict[str, Tensor] | Tensor]]

IMAGE = (2, 3, 224, 224)


def _torchvision(name: str, shape: tuple[int, ...] = IMAGE, **kwargs: Any) -> Factory:
    def make() -> tuple[nn.Module, Tensor]:
        from torchvision.models import get_model

        return get_model(name, weights=None, **kwargs), torch.randn(shape)

    return make


def _timm(name: str) -> Factory:
    def make() -> tuple[nn.Module, Tensor]:
        import timm

        return timm.create_model(name, pretrained=False), torch.randn(IMAGE)

    return make


def _transformers(config: str, model: str, *inputs: str, **options: Any) -> Factory:
    def make() -> tuple[nn.Module, dict[str, Tensor]]:
        import transformers

        transformers.logging.set_verbosity_error()
        settings = getattr(transformers, config)(vocab_size=120, **options)
        if config != "BertConfig":
            settings.use_cache = False
        return getattr(transformers, model)(settings), {name: torch.randint(3, 120, (4, 24)) for name in inputs}

    return make


MODELS: dict[str, Factory] = {
    "resnet18": _torchvision("resnet18"),
    "resnet50": _torchvision("resnet50"),
    "resnext50_32x4d": _torchvision("resnext50_32x4d"),
    "vgg16_bn": _torchvision("vgg16_bn"),
    "densenet121": _torchvision("densenet121"),
    "googlenet": _torchvision("googlenet", init_weights=False),
    "mobilenet_v3_small": _torchvision("mobilenet_v3_small"),
    "efficientnet_b0": _torchvision("efficientnet_b0"),
    "shufflenet_v2_x1_0": _torchvision("shufflenet_v2_x1_0"),
    "regnet_y_400mf": _torchvision("regnet_y_400mf"),
    "convnext_tiny": _torchvision("convnext_tiny"),
    "vit_b_16": _torchvision("vit_b_16"),
    "swin_t": _torchvision("swin_t"),
    "deeplabv3_resnet50": _torchvision("deeplabv3_resnet50", (2, 3, 128, 128), weights_backbone=None),
    "r3d_18": _torchvision("r3d_18", (2, 3, 8, 56, 56)),
    "timm vit_small_patch16_224": _timm("vit_small_patch16_224"),
    "timm resnet50_gn": _timm("resnet50_gn"),
    "timm mixer_s16_224": _timm("mixer_s16_224"),
    "GPT-2": _transformers(
        "GPT2Config", "GPT2LMHeadModel", "input_ids", n_layer=3, n_embd=96, n_head=6, bos_token_id=0, eos_token_id=0
    ),
    "BERT": _transformers(
        "BertConfig",
        "BertForMaskedLM",
        "input_ids",
        num_hidden_layers=3,
        hidden_size=96,
        num_attention_heads=6,
        intermediate_size=160,
    ),
    "T5": _transformers(
        "T5Config",
        "T5ForConditionalGeneration",
        "input_ids",
        "decoder_input_ids",
        num_layers=3,
        d_model=96,
        num_heads=6,
        d_kv=16,
        d_ff=160,
    ),
    "Llama (grouped queries)": _transformers(
        "LlamaConfig",
        "LlamaForCausalLM",
        "input_ids",
        num_hidden_layers=3,
        hidden_size=96,
        num_attention_heads=6,
        num_key_value_heads=3,
        intermediate_size=160,
    ),
}
BATCHES, BATCH = 2, 8
MOST_OFF = 5.0
"""The error in percent of a model's parameters up to which a planted element of the whole group counts as found."""
SHORT = ("resnet18", "shufflenet_v2_x1_0")


def example(inputs: Tensor | dict[str, Tensor]) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
    return ((inputs,), {}) if isinstance(inputs, Tensor) else ((), inputs)


def calibration(inputs: Tensor | dict[str, Tensor]) -> list[Tensor | dict[str, Tensor]]:
    """Batches whose activations vary: random pictures of several contrasts and scales, or random tokens."""
    if not isinstance(inputs, Tensor):
        return [{k: torch.randint(3, 120, (BATCH, v.shape[1])) for k, v in inputs.items()} for _ in range(BATCHES)]
    batches: list[Tensor | dict[str, Tensor]] = []
    for _ in range(BATCHES):
        images = []
        for i in range(BATCH):
            coarse = torch.randn(1, inputs.shape[1], *(max(n // 2 ** (i % 6), 1) for n in inputs.shape[2:]))
            picture = nn.functional.interpolate(coarse, size=inputs.shape[2:], mode="nearest")
            images.append(
                picture * (0.5 + 2 * torch.rand(())) + torch.randn(1, inputs.shape[1], *(1,) * (inputs.ndim - 2))
            )
        batches.append(torch.cat(images))
    return batches


def noisy_copy(model: nn.Module, state: dict[str, Tensor], noise: float, generator: torch.Generator) -> nn.Module:
    """A copy with the parameters `state` plus noise, relative to the deviation of each tensor; buffers are kept."""
    import copy

    twin = copy.deepcopy(model)
    trained = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    first: dict[int, Tensor] = {}
    noised = {}
    for name, value in state.items():
        if name in trained and value.numel() > 1:
            if id(value) not in first:
                first[id(value)] = value + noise * value.std() * torch.randn(value.shape, generator=generator)
            value = first[id(value)]
        noised[name] = value
    twin.load_state_dict(noised)
    return twin.eval()


def wrong_units(found: fxmerge.Permutation, planted: fxmerge.Permutation, names: tuple[str, ...]) -> dict[str, int]:
    """How many units of each class do not come back to where they were."""
    back = found @ planted
    moved = {n: int((i != np.arange(len(i))).sum()) for n, i in zip(names, back.images, strict=True)}
    return {n: count for n, count in moved.items() if count}


def run(name: str, factory: Factory) -> dict[str, Any]:
    torch.manual_seed(0)
    model, inputs = factory()
    model.eval()
    args, kwargs = example(inputs)
    began = time.perf_counter()
    program = capture_program(model, args, kwargs)
    captured = time.perf_counter()
    symmetry = analyse(program)[1]
    inferred = time.perf_counter()
    symmetry = symmetry.verify(model, args, kwargs)
    row: dict[str, Any] = {
        "model": name,
        "route": program.route,
        "classes": len(symmetry.choices),
        "log order": f"{symmetry.log_order():.1f}",
        "error": f"{symmetry.error:.0e}",
        "demoted": len(symmetry.demoted),
        "no rule": ", ".join(symmetry.unknown) or "-",
        "capture s": f"{captured - began:.1f}",
        "inference s": f"{inferred - captured:.2f}",
    }
    generator = torch.Generator().manual_seed(1)
    planted = symmetry.sample_permutation(generator)
    twin = noisy_copy(model, planted.apply(dict(model.state_dict())), 0.01, generator)
    for label, loader, alpha in (("with data", calibration(inputs), 0.5), ("weights only", None, 1.0)):
        began = time.perf_counter()
        recipe = fxmerge.Recipe(match=fxmerge.Align(alpha))
        aligned = fxmerge.align(twin, model, loader, recipe, example=inputs, run=fxmerge.Run(verify=False))
        wrong = wrong_units(symmetry.element(fxmerge.report(aligned).images[0]), planted, symmetry.names)
        row[label] = "exact" if not wrong else "; ".join(f"{n}: {c} units" for n, c in wrong.items())
        row[f"{label} s"] = f"{time.perf_counter() - began:.1f}"
    return row | bases(model, inputs, generator)


def bases(model: nn.Module, inputs: Any, generator: torch.Generator) -> dict[str, Any]:
    """The whole group of the model with gains of one: random elements of it in float64, and a planted one.

    The copy in which it is planted has noise of 1% on its weights, and is aligned by these alone. "found" is how far
    the parameters are off then, as a share of their norm. It is left out where there are permutations only.
    """
    args, kwargs = example(inputs)
    began = time.perf_counter()
    canonical = fxmerge.canonicalize(model, args, kwargs)
    moved = time.perf_counter()
    symmetry = fxmerge.find_symmetry(canonical, args, kwargs)
    verified = symmetry.verify(canonical, args, kwargs)
    row = {
        "dimension": symmetry.dimension(),
        "error of the whole group": f"{verified.error:.0e}",
        "lowered": sum(a != b for a, b in zip(symmetry.kinds, verified.kinds, strict=True)),
        "canonical s": f"{moved - began:.1f}",
    }
    if not symmetry.dimension():
        return row
    state = canonical.state_dict()
    planted = symmetry.sample(generator).apply(state)
    twin = noisy_copy(canonical, planted, 0.01, generator)
    aligning = time.perf_counter()
    recipe = fxmerge.Recipe(match=fxmerge.Align(1.0, continuous=True))
    aligned = fxmerge.align(twin, canonical, None, recipe, example=inputs, run=fxmerge.Run(verify=False)).state_dict()
    names = {name for name, _ in canonical.named_parameters()}
    off = sum(float((aligned[n] - state[n]).square().sum()) for n in names)
    return row | {
        "found": f"{(off / sum(float(state[n].square().sum()) for n in names)) ** 0.5:.1%}",
        "found s": f"{time.perf_counter() - aligning:.1f}",
    }


def table(rows: list[dict[str, Any]]) -> str:
    head = list(dict.fromkeys(key for row in rows for key in row))
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join(lines + ["| " + " | ".join(str(row.get(key, "")) for key in head) + " |" for row in rows])


def machine() -> str:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return (
        f"{platform.machine()}, {os.cpu_count()} cores, {math.ceil(memory)} GiB, Python {platform.python_version()}, "
        f"torch {torch.__version__}, {torch.get_num_threads()} threads"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help=f"only {', '.join(SHORT)}")
    parser.add_argument("--models", nargs="+", choices=list(MODELS), help="only these")
    parser.add_argument("--markdown", type=Path, help="write the table to this file, too")
    options = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    warnings.simplefilter("ignore")
    rows, failed = [], 0
    print(machine())
    for name in options.models or (SHORT if options.short else MODELS):
        try:
            row = run(name, MODELS[name])
        except ImportError as error:
            row = {"model": name, "route": f"not run: {error}"}
        else:
            failed += bool(row["demoted"]) or float(row["error"]) > 1e-9 or row["with data"] != "exact"
            failed += float(row["error of the whole group"]) > 1e-9 or bool(row["lowered"])
            failed += float(row.get("found", "0%").rstrip("%")) > MOST_OFF
        rows.append(row)
        print(" | ".join(f"{k}: {v}" for k, v in row.items()), flush=True)
    text = f"{machine()}\n\n{table(rows)}\n"
    print(text)
    if options.markdown:
        options.markdown.write_text(text)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())

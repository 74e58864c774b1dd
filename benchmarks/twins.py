"""Mixtures of up to 1B parameters in bfloat16 with planted twins: `fxmerge.fold` leaves out one of each pair.

Weights are random. A twin is the same expert with its inner units in another order, and with an equal row of the
router; all experts are shuffled. Two equal experts that a token goes to are not one: without the one, the token goes to
another. So the models are made such that a token has room for only one of two twins, and that rounding does not decide
where it goes. Each token is of a kind. For each kind there are experts without twins, to which all of its tokens go,
and which take all places but one. The last place is for one of a pair of twins, whichever `topk` takes of two equal
scores.

Told are the pairs of twins that became one expert, the time, the most memory in use, and how far outputs are from those
of the whole model: the largest difference of a logit in bfloat16, as a share of the largest logit. Nothing is fitted.

    OMP_NUM_THREADS=1 python benchmarks/twins.py [--short] [--sizes 20M 200M 1B] [--shapes Mixtral Qwen3-MoE]

`--short` folds models of a few thousand parameters. Needs Linux and `pip install -e '.[zoo]'`.
"""

from __future__ import annotations

import argparse
import json
import logging
import subprocess
import sys
import time
from dataclasses import dataclass
from typing import Any

import torch
from invariance import machine, table
from memory import Watch, status
from models.processes import Row
from torch import Tensor, nn

import fxmerge
from fxmerge import Recipe, Run

VOCABULARY = 4096
BATCHES, ROWS, TOKENS = 5, 2, 32

KIND = 0.5
"""The size of the entry of a token that tells its kind, in roots of the width of the stream."""

FIRST, LAST, OTHERS = 3.0, 2.0, 0.05
"""The scores of the experts that all tokens of a kind go to and of the twins that are last; the deviation of others."""


WRITTEN = 0.25
"""What layers add to the stream, as a share of what they would otherwise, so that it tells kinds in all layers."""


@dataclass(frozen=True)
class Shape:
    """The sizes of a model, and how many of its experts each token goes to."""

    hidden: int
    inner: int
    layers: int
    experts: int
    chosen: int
    heads: int = 16

    @property
    def leading(self) -> int:
        """How many experts have no twin: half of the kinds of tokens go to the one half of them."""
        return 2 * (self.chosen - 1)

    @property
    def left(self) -> int:
        """How many experts there are without twins."""
        return (self.experts + self.leading) // 2


SHAPES = {
    "Mixtral": {
        "tiny": Shape(32, 24, 2, 8, 2, heads=4),
        "20M": Shape(256, 896, 3, 8, 2),
        "200M": Shape(512, 1792, 9, 8, 2),
        "1B": Shape(1024, 3584, 11, 8, 2),
    },
    "Qwen3-MoE": {
        "tiny": Shape(32, 8, 2, 12, 3, heads=4),
        "20M": Shape(256, 96, 4, 64, 8),
        "200M": Shape(512, 192, 10, 64, 8),
        "1B": Shape(1024, 384, 12, 64, 8),
    },
}


def build(kind: str, shape: Shape) -> nn.Module:
    """A model with random weights, and twins among its experts."""
    import transformers

    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": shape.hidden,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.heads // 4,
        "head_dim": shape.hidden // shape.heads,
        "num_experts_per_tok": shape.chosen,
        "use_cache": False,
        "dtype": torch.bfloat16,
    }
    if kind == "Mixtral":
        sizes |= {"num_local_experts": shape.experts, "intermediate_size": shape.inner}
        config: Any = transformers.MixtralConfig(**sizes)
    else:
        sizes |= {"num_experts": shape.experts, "moe_intermediate_size": shape.inner, "norm_topk_prob": True}
        config = transformers.Qwen3MoeConfig(**sizes)
    torch.manual_seed(0)
    model: nn.Module = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    with torch.no_grad():
        plant(model, shape)
    return model


def plant(model: Any, shape: Shape) -> None:
    """Gives a model random weights, and twins."""
    width = shape.hidden**0.5
    for name, weight in model.named_parameters():
        if "norm" not in name:
            weight.normal_(0, weight.shape[-1] ** -0.5 if "embed" not in name else 1.0)
    pairs = (shape.experts - shape.leading) // 2
    kinds = torch.eye(pairs) * KIND * width
    model.model.embed_tokens.weight[:, :pairs] = kinds[torch.arange(VOCABULARY) % pairs].bfloat16()
    twin = shape.leading + torch.arange(pairs) * 2
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight *= WRITTEN
        layer.self_attn.o_proj.weight[:pairs] = 0
        experts, router = layer.mlp.experts, layer.mlp.gate.weight
        experts.down_proj *= WRITTEN
        experts.down_proj[:, :pairs] = 0
        router *= OTHERS
        router[:, :pairs] = 0
        for kind in range(pairs):
            router[kind % 2 : shape.leading : 2, kind] = FIRST / (KIND * width)
        router[twin, torch.arange(pairs)] = LAST / (KIND * width)
        for one in twin.tolist():
            order = torch.randperm(shape.inner)
            router[one + 1] = router[one]
            experts.gate_up_proj[one + 1] = experts.gate_up_proj[one][torch.cat([order, order + shape.inner])]
            experts.down_proj[one + 1] = experts.down_proj[one][:, order]
        shuffled = torch.randperm(shape.experts)
        for weight in (router, experts.gate_up_proj, experts.down_proj):
            weight.copy_(weight[shuffled])


def twins(weight: Tensor) -> list[tuple[int, int]]:
    """The pairs of experts with equal rows of the router."""
    equal = (weight[:, None] == weight).all(-1).triu(1)
    return [(int(i), int(j)) for i, j in equal.nonzero()]


def child(kind: str, size: str) -> None:
    """Folds a model, and prints what it took."""
    shape, watch = SHAPES[kind][size], Watch()
    handler = logging.StreamHandler(sys.stderr)
    handler.addFilter(watch.follow)
    logger = logging.getLogger("fxmerge")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    model: Any = build(kind, shape)
    loader = [torch.randint(VOCABULARY, (ROWS, TOKENS)) for _ in range(BATCHES)]
    name = "gate.weight[0]" if kind == "Mixtral" else "experts.gate_up_proj[0]"
    watch.start()
    began = time.perf_counter()
    small = fxmerge.fold(model, loader, {f"*.mlp.{name}": shape.left}, recipe=Recipe(fit=None), run=Run(progress=False))
    seconds = time.perf_counter() - began
    report = fxmerge.report(small)
    (images,) = report.images
    one = [
        images[f"model.layers.{n}.mlp.{name}"][i] == images[f"model.layers.{n}.mlp.{name}"][j]
        for n, layer in enumerate(model.model.layers)
        for i, j in twins(layer.mlp.gate.weight)
    ]
    tokens = torch.randint(VOCABULARY, (ROWS, TOKENS))
    with torch.no_grad():
        before, after = (network(tokens) for network in (model, small))
    before, after = (logits(own).float() for own in (before, after))
    found = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "left": sum(p.numel() for p in small.parameters()),
        "twins": [sum(one), len(one)],
        "difference": float((before - after).abs().max() / before.abs().max()),
        "seconds": seconds,
        "stages": report.seconds,
        "memory": watch.stages,
        "most": watch.most["RssAnon"],
        "peak": status()["VmHWM"],
    }
    print(json.dumps(found))


def logits(output: Any) -> Tensor:
    """The scores among what a model gives."""
    found: Tensor = output.logits if hasattr(output, "logits") else output[0] if isinstance(output, tuple) else output
    return found


def line(kind: str, size: str) -> Row:
    """The line of one model, which is folded in a process of its own."""
    done = subprocess.run(
        [sys.executable, __file__, "--child", kind, size], stdout=subprocess.PIPE, text=True, check=True
    )
    found = json.loads(done.stdout.strip().splitlines()[-1])
    print(found, flush=True)
    shape = SHAPES[kind][size]
    return {
        "model": kind,
        "parameters": f"{found['parameters'] / 1e6:,.0f}M, {found['left'] / 1e6:,.0f}M left",
        "experts": f"{shape.layers} x {shape.experts}, {shape.left} left",
        "twins found": "{} of {}".format(*found["twins"]),
        "largest difference": f"{found['difference']:.1e}",
        "seconds": f"{found['seconds']:.0f}",
        "in use at most GiB": f"{found['most']:.2f}",
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="models of a few thousand parameters alone")
    parser.add_argument("--sizes", nargs="+", default=["20M"], choices=["tiny", "20M", "200M", "1B"])
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    arguments = parser.parse_args()
    print(machine(), flush=True)
    rows = [
        line(kind, size) for size in (["tiny"] if arguments.short else arguments.sizes) for kind in arguments.shapes
    ]
    print(table(rows))
    return int(any(row["twins found"].split(" of ")[0] != row["twins found"].split(" of ")[1] for row in rows))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(*sys.argv[2:])
        sys.exit()
    sys.exit(main())

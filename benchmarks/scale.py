"""How inference grows with a model: large language models on the meta device, which holds no parameters.

For each, in a process of its own: seconds and peak memory of capture and of inference, and the classes found.

    OMP_NUM_THREADS=1 python benchmarks/scale.py [--short] [--models NAME ...]

Needs `pip install -e '.[zoo]'`.
"""

from __future__ import annotations

import argparse
import resource
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from invariance import table
from models import is_installed
from models.processes import Note, Row, run_all

from fxmerge.program.capture import capture_program
from fxmerge.symmetry.group import analyse

TOKENS = 16


def _llama(layers: int, hidden: int, inner: int, heads: int) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=128256,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=8,
        use_cache=False,
    )
    return LlamaForCausalLM(config)


def _mixtral() -> Any:
    from transformers import MixtralConfig, MixtralForCausalLM

    return MixtralForCausalLM(MixtralConfig(use_cache=False))  # The default is the 8x7B.


MODELS: dict[str, Callable[[], Any]] = {
    "Llama-3, 2 layers": lambda: _llama(2, 4096, 14336, 32),
    "Llama-3-8B": lambda: _llama(32, 4096, 14336, 32),
    "Llama-3-70B": lambda: _llama(80, 8192, 28672, 64),
    "Mixtral-8x7B": _mixtral,
}


def work(task: Row, note: Note) -> None:
    """Runs one model."""
    note("construct")
    with torch.device("meta"):
        model = MODELS[task["name"]]().eval()
        ids = torch.zeros(2, TOKENS, dtype=torch.long)
    note("capture", parameters=sum(p.numel() for p in model.parameters()))
    began = time.perf_counter()
    program = capture_program(model, (), {"input_ids": ids})
    captured = time.perf_counter()
    note("infer", capture_seconds=captured - began, nodes=len(program.graph.graph.nodes), capture_gib=_peak())
    _, symmetry = analyse(program)
    seconds = time.perf_counter() - captured
    note("done", seconds=seconds, gib=_peak(), classes=len(symmetry.choices), log_order=symmetry.log_order())


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def _line(row: Row) -> dict[str, str]:
    if "seconds" not in row:
        return {"model": row["name"], "parameters": row.get("failure", "failed")}
    return {
        "model": row["name"],
        "parameters": f"{row['parameters'] / 1e9:.1f}e9",
        "nodes": f"{row['nodes']:,}",
        "capture s": f"{row['capture_seconds']:.1f}",
        "inference s": f"{row['seconds']:.1f}",
        "peak GiB": f"{row['gib']:.1f}",
        "of that capture": f"{row['capture_gib']:.1f}",
        "classes": str(row["classes"]),
        "log order": f"{row['log_order']:.4g}",
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="only two layers")
    parser.add_argument("--models", nargs="+", choices=list(MODELS), help="only these")
    options = parser.parse_args()
    if not is_installed("transformers"):
        print("transformers is not installed: pip install -e '.[zoo]'")
        return 0
    names = options.models or list(MODELS)[: 1 if options.short else None]
    rows = list(run_all(work, [{"name": n, "family": "transformers"} for n in names], 1, 1200, 16))
    print(next((row["machine"] for row in rows if "machine" in row), ""), "\n")
    print(table([_line(row) for row in rows]))
    return int(any("seconds" not in row for row in rows))


if __name__ == "__main__":
    sys.exit(main())

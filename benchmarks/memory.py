"""How much memory a merge of large checkpoints takes, stage by stage.

Makes two checkpoints of the shape of Llama in bfloat16 shards, with random weights. The second one is the first with
its units in another order and 1% of noise. Aligns or zips them by weights from the command line, and tells

- the most memory in use in every stage that the system cannot take back: what is mapped from files, it can;
- the whole peak, with what is mapped from files;
- the same of a pair of a few thousand parameters: what torch, transformers and fxmerge take by themselves.

    OMP_NUM_THREADS=1 python benchmarks/memory.py [--short] [--sizes 300M ...] [--folder FOLDER] [--match Align]
        [--limit GIB]

`--short` measures the pair of a few thousand parameters alone. With `--limit` the system refuses the merge more memory
than that (`RLIMIT_DATA`), and a merge that asks for more fails. The limit counts all memory that the process may write
to and shares with no other, whether it is used or not. It also counts the files of weights, which are mapped like that,
though nothing writes to them and the system can drop them: so their bytes are added to the limit.

Needs Linux and `pip install -e '.[zoo,cli]'`.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import resource
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch
from invariance import machine, table
from models.processes import Row
from tasks_suite.training import cache_folder, default_cache

SIZES: dict[str, dict[str, int]] = {
    "tiny": {"vocab_size": 128, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2},
    "100M": {"vocab_size": 32000, "hidden_size": 768, "intermediate_size": 2560, "num_hidden_layers": 7},
    "300M": {"vocab_size": 32000, "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 16},
    "1B": {"vocab_size": 32000, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 14},
    "2B": {"vocab_size": 64000, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 28},
}

HEADS, GROUPS = 16, 4
NOISE = 0.01
SHARD = 200_000_000
SECONDS = 0.002
"""Between two looks at the memory."""


def make(folder: Path, size: str) -> tuple[Path, Path]:
    """Writes two checkpoints, if they are not there yet."""
    from transformers import LlamaConfig, LlamaForCausalLM

    heads = HEADS if size != "tiny" else GROUPS
    config = LlamaConfig(**SIZES[size], num_attention_heads=heads, num_key_value_heads=GROUPS, use_cache=False)
    places = folder / size / "a", folder / size / "b"
    if all((place / "config.json").is_file() for place in places):
        return places
    torch.manual_seed(0)
    model = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(places[0], max_shard_size=SHARD)
    stream, inner = (torch.randperm(SIZES[size][name]) for name in ("hidden_size", "intermediate_size"))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            own = weight.data
            if name.endswith(("o_proj.weight", "down_proj.weight")) or "norm" in name:
                own = own[stream]
            else:
                own = own[:, stream]
            if name.endswith(("gate_proj.weight", "up_proj.weight")):
                own = own[inner]
            elif name.endswith("down_proj.weight"):
                own = own[:, inner]
            weight.data = own + NOISE * own.float().std(correction=0).to(own) * torch.randn_like(own)
    model.save_pretrained(places[1], max_shard_size=SHARD)
    return places


class Watch(threading.Thread):
    """Looks at the memory of this process until it ends, and keeps the most of every stage that is logged."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.stage, self.stages, self.most = "start", dict[str, float](), dict[str, float]()

    def run(self) -> None:
        while True:
            own = status()
            held = own["RssAnon"] + own["RssShmem"]
            self.stages[self.stage] = max(self.stages.get(self.stage, 0.0), held)
            for name, value in own.items():
                self.most[name] = max(self.most.get(name, 0.0), value)
            time.sleep(SECONDS)

    def follow(self, record: logging.LogRecord) -> bool:
        if record.msg == "%s ..." and record.args:
            self.stage = str(record.args[0])
        return True


def status() -> dict[str, float]:
    """GiB of memory of this process, by kind."""
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    return {
        words[0].rstrip(":"): int(words[1]) / 2**20
        for words in lines
        if words[0] in ("RssAnon:", "RssShmem:", "RssFile:", "VmHWM:", "VmData:")
    }


def child(a: str, b: str, out: str, match: str, limit: str) -> None:
    """Merges two checkpoints, and prints what it took; the system refuses it more bytes than `limit`, unless empty."""
    if limit:
        resource.setrlimit(resource.RLIMIT_DATA, (int(limit), int(limit)))
    import transformers  # noqa: F401

    import fxmerge
    from fxmerge.cli import main

    start, watch = status(), Watch()
    handler = logging.StreamHandler(sys.stderr)
    handler.addFilter(watch.follow)
    root = logging.getLogger("fxmerge")
    root.addHandler(handler)
    root.setLevel(logging.INFO)
    watch.start()
    began = time.perf_counter()
    recipe = Path(out).with_suffix(".yaml")
    recipe.write_text(f"match: {{kind: {match}}}\ncombine: {{kind: Average}}\nfit: null\n")
    how = ["--arch", "hf", "--recipe", str(recipe), "--out", out, "--shard-size", "200MB", "-v"]
    failed = main(["merge", a, b, *how])
    found = {
        "failed": failed,
        "seconds": time.perf_counter() - began,
        "start": start,
        "stages": watch.stages,
        "most": watch.most | {"VmHWM": status()["VmHWM"]},
        "fxmerge": fxmerge.__file__,
    }
    print(json.dumps(found), file=sys.stderr)


def measure(places: tuple[Path, Path], match: str, limit: float | None) -> dict[str, Any]:
    """Merges two checkpoints in a process of its own, which has `limit` GiB beside the mapped files."""
    mapped = sum(file.stat().st_size for place in places for file in place.glob("*.safetensors"))
    allowed = "" if limit is None else str(int(limit * 2**30) + mapped)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "--child", *map(str, places), f"{folder}/out", match, allowed]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
    lines = done.stderr.strip().splitlines()
    try:
        found: dict[str, Any] = json.loads(lines[-1])
    except (ValueError, IndexError):
        sys.exit(f"{done.stdout}\n{done.stderr}\nThe merge ended before it could tell what it took; see above.")
    # The command line warns of a part of the result that there was no memory to write, and goes on with the others.
    missing = [own for own in f"{done.stdout}\n{done.stderr}".splitlines() if "was not written" in own]
    print(*missing, sep="\n", end="\n" if missing else "")
    return found | {"mapped": mapped / 2**30, "failed": found["failed"] or bool(missing)}


def line(size: str, found: dict[str, Any]) -> Row:
    """A line of the table, in GiB."""
    stages = {f"{stage} GiB": f"{held:.2f}" for stage, held in found["stages"].items()}
    whole = {
        "in use at most GiB": f"{found['most']['RssAnon']:.2f}",
        "reserved at most GiB": f"{found['most']['VmData'] - found['mapped']:.2f}",
        "with files GiB": f"{found['most']['VmHWM']:.2f}",
    }
    return {"size": size, "seconds": f"{found['seconds']:.0f}", **whole, **stages}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="the pair of a few thousand parameters alone")
    parser.add_argument("--sizes", nargs="+", default=["tiny", "300M"], choices=list(SIZES), help="what to merge")
    parser.add_argument("--folder", type=Path, default=default_cache().parent / "llamas", help="of checkpoints")
    parser.add_argument("--match", default="Align", choices=["Align", "Zip"], help="the recipe's match")
    parser.add_argument("--limit", type=float, help="GiB that the system grants a merge, beside the mapped files")
    arguments = parser.parse_args()
    print(machine(), flush=True)
    rows, failed = list[Row](), False
    with cache_folder(arguments.folder, short=arguments.short) as folder:
        for size in ["tiny"] if arguments.short else arguments.sizes:
            found = measure(make(folder, size), arguments.match, arguments.limit)
            failed |= bool(found["failed"])
            rows.append(line(size, found))
    print(table(rows))
    return int(failed)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(*sys.argv[2:])
        sys.exit()
    sys.exit(main())

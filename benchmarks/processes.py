"""Refitting by several processes of one thread each: seconds, CPU seconds of each process, and how far results differ.

    python benchmarks/processes.py [--short] [--counts 1 2]

Processes that share a machine with other work wait for cores. What each computes is then told by its CPU seconds: the
largest of them is about what a run takes on a machine with a free core for each.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from invariance import machine, table
from tasks_suite.networks import ResNet20
from torch import Tensor, multiprocessing, nn

import fxmerge
from fxmerge import Recipe, Run, pipeline

CASE = "ResNet20 of width 2, 1,000 images", 2, 1000, 50
SHORT = "ResNet20 of width 1, 64 images", 1, 64, 16
"""The name, the width of the networks, the number of images, and how many are in a batch."""


def work(rank: int, count: int, case: tuple[str, int, int, int], folder: str) -> None:
    """Refits the average of two networks as one of several processes, and writes what it took and gave."""
    _, width, images, batch = case
    torch.set_num_threads(1)
    group = f"file://{folder}/group"
    dist.init_process_group("gloo", group, timedelta(minutes=10), rank=rank, world_size=count)
    networks = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        networks.append(ResNet20(width, 2, nn.BatchNorm2d, 32).eval())
    batches: list[Tensor] = list(torch.randn(images, 1, 28, 28).split(batch))
    spent: dict[str, Any] = {}
    pipeline.refit = partial(_timed, pipeline.refit, spent)
    run = Run(progress=False, processes="auto", verify=False)
    merged = fxmerge.merge(*networks, batches, Recipe(match=None), run=run)
    torch.save({"state": merged.state_dict(), **spent}, Path(folder, f"{rank}.pt"))
    dist.destroy_process_group()


def _timed(refit: Any, spent: dict[str, Any], *args: Any, **options: Any) -> Any:
    dist.barrier()
    wall, cpu = time.perf_counter(), time.process_time()
    found = refit(*args, **options)
    spent |= {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
    return found


def measured(case: tuple[str, int, int, int], count: int) -> list[dict[str, Any]]:
    """What each of some processes took and gave."""
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(work, (count, case, folder), count)
        return [torch.load(Path(folder, f"{rank}.pt")) for rank in range(count)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="only a small network")
    parser.add_argument("--counts", type=int, nargs="+", default=[1, 2], help="numbers of processes, one first")
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    print(machine(), f"load {os.getloadavg()[0]:.1f}", "\n")
    case = SHORT if options.short else CASE
    rows, failed = [], False
    first: list[dict[str, Any]] = []
    for count in options.counts:
        found = measured(case, count)
        first = first or found
        off = max(float((own["state"][n] - t).abs().max()) for own in found for n, t in first[0]["state"].items())
        failed |= off > 1e-6
        wall, cpu = max(own["wall"] for own in found), max(own["cpu"] for own in found)
        rows.append(
            {
                "refit": case[0],
                "processes": count,
                "seconds": f"{wall:.1f}",
                "of one": f"{wall / first[0]['wall']:.2f}",
                "CPU seconds": " ".join(f"{own['cpu']:.1f}" for own in found),
                "most, of one": f"{cpu / first[0]['cpu']:.2f}",
                "differs by": f"{off:.0e}",
            }
        )
    print(table(rows))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())

"""Whole merges: seconds by stage and peak memory, each in a process of its own, of networks with random weights.

CPU seconds are shown beside, for machines on which other programs run; and in how many products of two matrices of
4,096 by 4,096 numbers, timed in the same process, they are, for machines of another speed. Where two networks are
aligned, a second table has the CPU seconds of its stages beside what they cannot do without, timed in the same process:
matrix products, assignments and passes, each of them once.

    python benchmarks/merging.py [--short] [--cases NAME ...] [--threads 2]

All but the first case need `pip install -e '.[zoo]'`; those whose package is not installed are left out.
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.util import find_spec

import torch
from invariance import machine, table
from models import floors
from models.processes import Note, Row, run_all
from tasks_suite.networks import ResNet20
from torch import Tensor, nn

import fxmerge
from fxmerge import Align, Recipe, Run


def _torchvision(name: str) -> nn.Module:
    from torchvision.models import get_model

    model: nn.Module = get_model(name, weights=None)
    return model


def _timm(name: str) -> nn.Module:
    import timm

    model: nn.Module = timm.create_model(name)
    return model


@dataclass(frozen=True)
class Case:
    """Two networks and how they are merged.

    Attributes:
        build: makes a network.
        shape: of one input.
        inputs: how many there are for calibration; none are given if it is zero.
        package: what has to be installed.
        batch: how many of them are in a batch.
        recipe: how they are merged.
    """

    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    inputs: int
    package: str = "torch"
    batch: int = 32
    recipe: Recipe = field(default_factory=Recipe)


CASES: dict[str, Case] = {
    "ResNet20 of width 2, 2,000 images": Case(
        partial(ResNet20, 2, 2, nn.BatchNorm2d, 32), (1, 28, 28), 2000, batch=250
    ),
    "ResNet-50, 256 images of 224 pixels": Case(partial(_torchvision, "resnet50"), (3, 224, 224), 256, "torchvision"),
    "ResNet-50 aligned by weights": Case(
        partial(_torchvision, "resnet50"), (3, 224, 224), 0, "torchvision", recipe=Recipe(match=Align())
    ),
    "ViT-S/16 zipped by weights": Case(partial(_timm, "vit_small_patch16_224"), (3, 224, 224), 0, "timm"),
}
SHORT = Case(partial(ResNet20, 1, 2, nn.BatchNorm2d, 32), (1, 28, 28), 128, batch=32)


def work(task: Row, note: Note) -> None:
    """Merges one pair."""
    case = SHORT if task["short"] else CASES[task["name"]]
    torch.set_num_threads(task["threads"])
    networks = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        networks.append(case.build().eval())
    batches: list[Tensor] = list(torch.randn(case.inputs or 1, *case.shape).split(case.batch))
    note("merge", machine=machine(), parameters=sum(p.numel() for p in networks[0].parameters()))
    clock, logger = floors.StageClock(), logging.getLogger("fxmerge")
    logger.addHandler(clock)
    logger.setLevel(logging.INFO)
    began, worked = time.perf_counter(), time.process_time()
    loader = batches if case.inputs else None
    merged = fxmerge.merge(
        networks[0], networks[1], loader, case.recipe, example=batches[0][:2], run=Run(progress=False)
    )
    spent = {"seconds": time.perf_counter() - began, "cpu": time.process_time() - worked}
    unit = floors.product(256 if task["short"] else floors.PRODUCT)
    note("floors", **spent, unit=unit, stages=dict(fxmerge.report(merged).seconds), cpu_stages=clock.seconds)
    if isinstance(case.recipe.match, Align):
        example = batches[0][:2]
        symmetry = fxmerge.find_symmetry(networks[0], (example,))
        states = [network.state_dict() for network in networks]
        least = {
            "verification": floors.passes(networks[0], example),
            "matching": floors.matching(replace(symmetry, kinds=()), *states),
        }
        note("floors", floors=least)
    note("done")


def beside_floors(row: Row) -> dict[str, str]:
    """A line of the table of CPU seconds beside what stages cannot do without."""
    line = {"merge": row["name"]}
    for stage, least in row["floors"].items():
        spent = row["cpu_stages"][stage]
        line |= {
            f"{stage} s": f"{spent:.2f}",
            f"{stage}, at least": f"{least:.2f}",
            f"{stage} ratio": f"{spent / least:.1f}",
        }
    return line


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="only a small network")
    parser.add_argument("--cases", nargs="+", choices=list(CASES), help="only these")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch")
    options = parser.parse_args()
    names = [n for n in options.cases or CASES if find_spec(CASES[n].package)]
    names = ["ResNet20 of width 1, 128 images"] if options.short else names
    tasks = [{"name": n, "short": options.short, "threads": options.threads, "family": ""} for n in names]
    rows = list(run_all(work, tasks, 1, 3600, 16))
    print(next((row["machine"] for row in rows if "machine" in row), ""), "\n")
    stages = list(dict.fromkeys(stage for row in rows for stage in row.get("stages", ())))
    lines = [
        {
            "merge": row["name"],
            "parameters": f"{row['parameters']:,}",
            "seconds": f"{row['seconds']:.1f}",
            "CPU seconds": f"{row['cpu']:.1f}",
            "in products": f"{row['cpu'] / row['unit']:.1f}",
        }
        | {stage: f"{row['stages'][stage]:.1f}" if stage in row["stages"] else "-" for stage in stages}
        | {"peak GiB": f"{row['peak_mib'] / 1024:.1f}"}
        if "seconds" in row
        else {"merge": row["name"], "parameters": row.get("failure", "failed")}
        for row in rows
    ]
    print(table(lines))
    aligned = [beside_floors(row) for row in rows if "floors" in row]
    if aligned:
        print("\n" + table(aligned))
    return int(any("seconds" not in row for row in rows))


if __name__ == "__main__":
    sys.exit(main())

"""Merging several networks that learnt the same from different seeds into one of their size.

Every parent, their ensemble, their plain average, the second, third and so on aligned to the running average one after
the other, or merged with the merge of those before it (chained), and what `fxmerge.merge_many` makes of all at once.
Parents are those of `benchmarks/tasks.py` in its setting `same`, trained once and kept in the same folder; the data,
and BatchNorm for all alike, are as there. With `--own`, each parent has learnt from 2,000 images that no other one has
seen, and that are not in the calibration data: who merges may have no access to what the networks learnt from.

    python benchmarks/many.py [--short] [--own] [--networks NAME ...] [--methods NAME ...] [--count 5]
        [--cache FOLDER] [--jobs 2] [--markdown FILE]

Needs what `benchmarks/tasks.py` needs.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from invariance import machine, table
from models.processes import Row, run_all
from tasks import PRELOAD
from tasks_suite import training
from tasks_suite.images import SHARES
from tasks_suite.methods import with_state_of
from tasks_suite.problem import Learnt, Problem
from tasks_suite.suite import NETWORKS, PROBLEMS
from tasks_suite.training import Parent, cache_folder, default_cache
from torch import Tensor, nn

import fxmerge
from fxmerge import Align, Average, Recipe, Run
from fxmerge.demo import recalibrated

LONG = ("mlp", "resnet20-1-bn", "resnet20-1-gn", "vit-fused", "gpt")
LONG_OWN = ("mlp", "vgg-bn", "resnet20-1-bn", "resnet20-1-gn", "vit-fused", "convnext")
SHORT = ("digits-mlp",)

WITH_SHARES = ("fashion", "digits")
"""The data that can be split for `--own`."""

Networks = Sequence[nn.Module]


def mean(networks: Networks, weights: Sequence[float] | None = None) -> nn.Module:
    """A network with the weighted mean of the parameters of several."""
    weights = weights or [1 / len(networks)] * len(networks)
    states = [n.state_dict() for n in networks]
    twin = copy.deepcopy(networks[0])
    twin.load_state_dict(
        {
            name: sum(w * s[name] for w, s in zip(weights, states, strict=True)) if v.is_floating_point() else v
            for name, v in states[0].items()
        }
    )
    return twin


def chained(networks: Networks, batches: list[Tensor]) -> nn.Module:
    """Each network aligned to the average of those before it, and averaged with them."""
    merged = networks[0]
    for count, other in enumerate(networks[1:], start=1):
        aligned = with_state_of(other, fxmerge.align(other, merged, batches, run=Run(progress=False)))
        merged = recalibrated(mean([merged, aligned], [count / (count + 1), 1 / (count + 1)]), batches)
    return merged


def chained_merges(networks: Networks, batches: list[Tensor]) -> nn.Module:
    """Each network merged by `fxmerge.merge` with the merge of those before it."""
    merged = networks[0]
    for count, other in enumerate(networks[1:], start=1):
        recipe = Recipe(combine=Average((count / (count + 1), 1 / (count + 1))))
        merged = with_state_of(other, fxmerge.merge(merged, other, batches, recipe, run=Run(progress=False)))
    return merged


def many(recipe: Recipe) -> Callable[[Networks, list[Tensor]], nn.Module]:
    """What `fxmerge.merge_many` gives by a recipe."""
    return lambda networks, batches: with_state_of(
        networks[0], fxmerge.merge_many(networks, batches, recipe, run=Run(progress=False))
    )


def nearest_readout(networks: Networks, batches: list[Tensor]) -> nn.Module:
    """The network that is nearest to the mean of all with its last layers fitted to that, on the same data."""
    table = fxmerge.compare({}, networks, batches, calibration=batches, run=Run(progress=False))
    name = min((row for row in table.rows if row.name.endswith("new readout")), key=lambda row: row.distance).name
    return with_state_of(networks[0], table.networks[name])


METHODS: dict[str, Callable[[Networks, list[Tensor]], nn.Module]] = {
    "plain average": lambda networks, batches: mean(networks),
    "chained, averaged": chained,
    "parent, new readout": nearest_readout,
    "merge_many, align, averaged": many(Recipe(match=Align(), fit=None)),
    "merge_many, zip, averaged": many(Recipe(fit=None)),
    "chained": chained_merges,
    "merge_many": many(Recipe()),
}


def judged(problem: Problem, networks: Networks) -> str:
    scores = problem.evaluate(networks)
    return f"{100 * scores['joint']:.1f} ({scores['loss']:.3f})"


def compare(network: str, parents: Networks, chosen: Sequence[str]) -> Row:
    """One line of the table: accuracy in percent, and the loss."""
    problem = PROBLEMS[NETWORKS[network].data]()
    own = [problem.evaluate([p])["joint"] for p in parents]
    row: Row = {
        "network": network,
        "parents, mean": f"{100 * statistics.fmean(own):.1f}",
        "best parent": judged(problem, [parents[own.index(max(own))]]),
        "ensemble": judged(problem, parents),
    }
    batches = problem.calibration()
    for name, method in ((name, METHODS[name]) for name in chosen):
        began, worked = time.perf_counter(), time.process_time()
        merged = recalibrated(method(parents, batches), batches)
        seconds = f"{time.perf_counter() - began:.0f} s, {time.process_time() - worked:.0f} s of CPU time"
        row[name] = judged(problem, [merged])
        print(f"{network}, {name}: {row[name]}, {seconds}", flush=True)
    return row


def arguments(description: str | None) -> argparse.ArgumentParser:
    """The options of a benchmark of parents that are kept."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="the smallest only, and nothing is kept")
    parser.add_argument("--networks", nargs="+", choices=list(NETWORKS), help="only these")
    parser.add_argument("--cache", type=Path, default=default_cache(), help="folder of the trained parents")
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time, for training")
    parser.add_argument("--markdown", type=Path, help="write the table to this file")
    return parser


@contextmanager
def trained(options: argparse.Namespace, parents: Iterable[Parent]) -> Iterator[Path]:
    """The folder of some parents, which are trained if they are not there yet."""
    with cache_folder(options.cache, short=options.short) as cache:
        for row in run_all(training.work, training.missing(parents, cache), options.jobs, 1800, 6, PRELOAD):
            said = row.get("failure", "done")
            print(f"trained {row['network']} on {row['part']}, seed {row['seed']}: {said}", flush=True)
        yield cache


@contextmanager
def parents_at_hand(options: argparse.Namespace, learnt: Learnt = "both") -> Iterator[dict[str, Networks]]:
    """The parents that learnt the same, by the network."""
    networks = options.networks or (SHORT if options.short else LONG_OWN if learnt == "own" else LONG)
    seeds = range(3 if options.short else options.count)
    with trained(options, [(n, learnt, seed) for n in networks for seed in seeds]) as cache:
        yield {n: [training.load((n, learnt, seed), cache) for seed in seeds] for n in networks}


def show(options: argparse.Namespace, caption: str, rows: list[Row]) -> None:
    """Prints a table, and writes it to the file that is asked for."""
    text = f"{machine()}\n\n{caption}\n\n{table(rows)}"
    print(text)
    if options.markdown:
        options.markdown.write_text(text + "\n")


def main() -> int:
    parser = arguments(__doc__)
    parser.add_argument("--count", type=int, default=5, help="how many parents")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS), help="only these")
    parser.add_argument("--own", action="store_true", help="parents that have learnt from images of their own")
    options = parser.parse_args()
    others = [name for name in options.networks or () if NETWORKS[name].data not in WITH_SHARES]
    if options.own and (others or options.count >= SHARES):
        parser.error(f"--own is for networks of images, and for fewer than {SHARES} parents.")
    torch.set_num_threads(1)
    with parents_at_hand(options, "own" if options.own else "both") as groups:
        rows = [compare(network, parents, options.methods) for network, parents in groups.items()]
        count = len(next(iter(groups.values())))
    show(options, f"{count} parents each; accuracy in percent, and the loss", rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())

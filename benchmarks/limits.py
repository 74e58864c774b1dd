"""What could be had from parents that learnt the same, other than by a merge, with the data that a merge has.

A merge of networks that learnt the same is to be as good as the best of them. Two ways lead there: to know which one is
best, or to make one that is better. For groups of parents that differ only in their seeds this tells

- how good the parent is that a criterion picks: the one whose outputs are nearest to the mean of all, which takes no
  label; the one that is most accurate on the calibration data, if their labels were known; and on validation data;
- what a parent gains, as the mean over parents, if it is trained by gradients to answer what the mean of all answers on
  the calibration data: the most over a grid of learning rates and epochs, picked by the test data themselves.

    python benchmarks/limits.py [--short] [--networks NAME ...] [--count 5] [--cache FOLDER] [--jobs 2]
        [--markdown FILE]

Parents are those of `benchmarks/many.py`. Needs what `benchmarks/tasks.py` needs.
"""

from __future__ import annotations

import copy
import statistics
import sys
from collections.abc import Callable, Sequence

import torch
from many import arguments, parents_at_hand, show
from models.processes import Row
from tasks_suite.problem import Problem
from tasks_suite.suite import NETWORKS, PROBLEMS
from torch import Tensor, nn

RATES, EPOCHS = (1e-5, 1e-4, 5e-4), (1, 3, 6, 10)
BATCH = 100


def nearest(networks: Sequence[nn.Module], batches: Sequence[Tensor]) -> int:
    """The number of the network whose outputs are nearest to the mean of all."""
    misses = [0.0] * len(networks)
    with torch.no_grad():
        for batch in batches:
            outputs = torch.stack([network(batch) for network in networks])
            for number, miss in enumerate((outputs - outputs.mean(0)).flatten(1).square().sum(1)):
                misses[number] += float(miss)
    return misses.index(min(misses))


def distilled(
    network: nn.Module, inputs: Tensor, targets: Tensor, rate: float, score: Callable[[nn.Module], float]
) -> list[float]:
    """The scores of a network after some epochs of learning what the mean of all answers."""
    student, scores = copy.deepcopy(network), []
    optimizer = torch.optim.Adam(student.parameters(), rate)
    generator = torch.Generator().manual_seed(0)
    for epoch in range(1, max(EPOCHS) + 1):
        for chosen in torch.randperm(len(inputs), generator=generator).split(BATCH):
            loss = (student(inputs[chosen]) - targets[chosen]).square().sum(-1).mean()
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        if epoch in EPOCHS:
            scores.append(score(student))
    return scores


def limits(network: str, parents: Sequence[nn.Module], problem: Problem) -> Row:
    """One line of the table: accuracies in percent."""

    def score(model: nn.Module) -> float:
        return 100 * problem.evaluate([model])["joint"]

    own, batches = [score(parent) for parent in parents], problem.calibration()
    inputs = torch.cat(batches)
    with torch.no_grad():
        targets = torch.cat([torch.stack([parent(batch) for parent in parents]).mean(0) for batch in batches])
    gains = [
        [
            [after - before for after in distilled(parent, inputs, targets, rate, score)]
            for parent, before in zip(parents, own, strict=True)
        ]
        for rate in RATES
    ]
    most = max(statistics.fmean(each) for by_parent in gains for each in zip(*by_parent, strict=True))
    picked = {
        "nearest to the mean": nearest(parents, batches),
        "by calibration labels": _best([problem.recognize(parent) for parent in parents]),
        "by validation": _best([problem.validate(parent) for parent in parents]),
    }
    return {
        "network": network,
        "parents": len(parents),
        "mean": f"{statistics.fmean(own):.1f}",
        "best": f"{max(own):.1f}",
        "ensemble": f"{100 * problem.evaluate(parents)['joint']:.1f}",
        **{name: f"{own[number]:.1f}" for name, number in picked.items()},
        "gained by distillation, at most": f"{most:+.2f}",
    }


def _best(scores: Sequence[float]) -> int:
    return scores.index(max(scores))


def main() -> int:
    parser = arguments(__doc__)
    parser.add_argument("--count", type=int, default=5, help="how many parents")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    with parents_at_hand(options) as groups:
        for network, parents in groups.items():
            rows.append(limits(network, parents, PROBLEMS[NETWORKS[network].data]()))
            print(rows[-1], flush=True)
    show(options, "Accuracy in percent", rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())

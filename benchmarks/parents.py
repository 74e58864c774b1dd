"""When a parent serves better than a merge of its size, and whether the rule for it sees that without labels.

`fxmerge.merge` returns a parent where errors on unlabelled data say so (the thresholds of `fxmerge.refitting.rivals`).
Here pairs and groups of parents are merged with test accuracy as the score, which tells how accurate the merged network
is, and the parents as they are and with last layers refitted; beside it, by how much the parents miss the mean of all,
the errors that the rule goes by, and what it returns.

    python benchmarks/parents.py [--short] [--networks NAME ...] [--cache FOLDER] [--jobs 2] [--markdown FILE]

Parents are those of `benchmarks/tasks.py`, first pairs, in its settings `disjoint` and `same`, and five of
`benchmarks/many.py`. Needs what `benchmarks/tasks.py` needs.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence

import torch
from many import arguments, show, trained
from models.processes import Row
from tasks_suite import training
from tasks_suite.suite import NETWORKS, PROBLEMS
from tasks_suite.training import Parent
from torch import nn

import fxmerge

LONG = ("mlp", "vgg", "vgg-bn", "resnet20-1-bn", "resnet20-1-gn", "vit-fused", "convnext", "mixer", "gpt", "lstm")
SHORT = ("digits-mlp",)
MANY = ("mlp", "resnet20-1-bn", "resnet20-1-gn", "vit-fused", "gpt")
"""The networks of which five learnt the same."""


def groups(networks: Sequence[str]) -> Iterator[tuple[str, str, tuple[Parent, ...]]]:
    """Networks, settings, and the parents to be merged."""
    for network in networks:
        for setting in ("disjoint", "same"):
            yield network, setting, training.parents_of(network, setting, 0)
        if network in MANY:
            yield network, "same, five", tuple((network, "both", seed) for seed in range(5))


def miss(networks: Sequence[nn.Module], batches: Sequence[torch.Tensor]) -> float:
    """The squared distance of the outputs from the mean of all, over the square of that, for the nearest network."""
    missed, squares = torch.zeros(len(networks), dtype=torch.float64), 0.0
    with torch.no_grad():
        for batch in batches:
            outputs = torch.stack([network(batch) for network in networks]).flatten(1).double()
            missed += (outputs - outputs.mean(0)).square().sum(1)
            squares += float(outputs.mean(0).square().sum())
    return float(missed.min()) / squares


def compare(network: str, setting: str, parents: Sequence[nn.Module]) -> Row:
    """One line of the table: accuracies in percent, errors as the rule has them."""
    problem = PROBLEMS[NETWORKS[network].data]()
    measure, batches = "per_task" if setting == "disjoint" else "joint", problem.calibration()

    def score(model: nn.Module) -> float:
        return 100 * problem.evaluate([model])[measure]

    judged = fxmerge.merge_many(parents, batches, score=score, progress=False).meta["fxmerge"]
    chosen = fxmerge.merge_many(parents, batches, progress=False).meta["fxmerge"]
    scores = {(one["parent"], one["refitted"]): one["score"] for one in judged["scores"]}
    errors = {j: error for j, error in judged["errors"].items() if j is not None}
    merged, best = judged["errors"][None], min(errors, key=errors.__getitem__)
    taken = (chosen["parent"], bool(chosen["layers"]))
    kind = "merged" if chosen["parent"] is None else "refitted parent" if taken[1] else "parent"
    return {
        "network": network,
        "setting": setting,
        "parents miss": f"{miss(parents, batches):.2f}",
        "error merged": f"{merged:.4f}",
        "error parent": f"{errors[best]:.4f}",
        "times": f"{merged / errors[best]:.2f}",
        "merged": f"{scores[None, True]:.1f}",
        "parents": f"{max(value for (j, layers), value in scores.items() if j is not None and not layers):.1f}",
        "parent refitted": f"{scores.get((best, True), float('nan')):.1f}",
        "returned": kind,
        "its": f"{scores[taken]:.1f}",
        "highest": f"{max(scores.values()):.1f}",
    }


def main() -> int:
    options = arguments(__doc__).parse_args()
    torch.set_num_threads(1)
    every = list(groups(options.networks or (SHORT if options.short else LONG)))
    rows = []
    with trained(options, [parent for _, _, parents in every for parent in parents]) as cache:
        for network, setting, parents in every:
            rows.append(compare(network, setting, [training.load(parent, cache) for parent in parents]))
            print(rows[-1], flush=True)
    show(options, "Accuracy in percent", rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())

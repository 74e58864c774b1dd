"""Mixtures of experts that were trained on two domains of text: averaged, matched, fitted, and with routers calibrated.

Two small language models (`experts-8`: two blocks of eight experts, of which every token goes to two) have learnt one
domain each (disjoint), or both from two initialisations (same). Told are the losses on both domains, in nats per
character, and the share of a token's experts that are still its own: of the two that the merged network sends it to,
how many its parent sends it to as well, on the domain of this parent.

Then the parents of the second pair get fewer experts: by `fxmerge.fold`, and in four ways of others
(`tasks_suite/fewer_experts.py`), with calibration data of both domains or of one.

    python benchmarks/experts.py [--short] [--cache FOLDER] [--markdown FILE]

`--short` merges two untrained ones. Needs `pip install -e '.[tasks]'`. Parents are trained once, in ten minutes, and
kept in the cache folder.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from unittest.mock import patch

import torch
from invariance import machine, table
from models.processes import Row
from tasks_suite import training
from tasks_suite.fewer_experts import (
    Observed,
    around_most_frequent,
    by_outputs,
    by_reap,
    grouped,
    most_frequent,
    observe,
    pruned,
)
from tasks_suite.methods import with_state_of
from tasks_suite.sequences import Experts
from tasks_suite.suite import NETWORKS, PROBLEMS
from torch import Tensor, nn

import fxmerge
from fxmerge import Align, LeastSquares, Recipe, Run

Choose = Callable[[Observed, int], Tensor]

NETWORK = "experts-8"
SETTINGS = ("disjoint", "same")

COUNTS = (6, 4, 2)
"""How many experts a block of eight is left with."""

MIXES = ("A and B", "A")
"""The domains that experts are chosen on."""

TIME = 3600
"""Seconds for the training of each parent."""


def averaged(a: nn.Module, b: nn.Module) -> nn.Module:
    """The mean of the parameters as they are."""
    own, other = a.state_dict(), b.state_dict()
    found = training.build(NETWORK, 0).eval()
    found.load_state_dict({name: (own[name] + other[name]) / 2 for name in own})
    return found


def merged(a: nn.Module, b: nn.Module, batches: Sequence[Tensor], recipe: Recipe, *, routers: bool = True) -> nn.Module:
    """By a recipe; without routers, these are fitted to the models' scores, as other layers are to their outputs."""
    run = Run(progress=False)
    if routers:
        return with_state_of(a, fxmerge.merge(a, b, batches, recipe, run=run))
    with patch("fxmerge.refitting.selection.router_layers", lambda layers: []):
        return with_state_of(a, fxmerge.merge(a, b, batches, recipe, run=run))


def choices(network: nn.Module, tokens: Tensor) -> list[Tensor]:
    """For every block, which experts each token goes to: shape (tokens, experts), true or false."""
    found = list[Tensor]()

    def note(module: nn.Module, args: tuple[Tensor], _: Tensor) -> None:
        scores = module.router(args[0]).flatten(0, -2)  # type: ignore[operator]
        found.append(torch.zeros_like(scores, dtype=torch.bool).scatter(1, scores.topk(2).indices, value=True))

    hooks = [m.register_forward_hook(note) for m in network.modules() if isinstance(m, Experts)]
    with torch.no_grad():
        network(tokens)
    for hook in hooks:
        hook.remove()
    return found


def kept(network: nn.Module, parents: Sequence[nn.Module], domains: Sequence[Sequence[Tensor]]) -> float:
    """The share of a token's experts that are those of its parent, whose experts must be in the network's order."""
    shares = [
        float((mine & its).sum() / its.sum())
        for parent, batches in zip(parents, domains, strict=True)
        for tokens in batches
        for mine, its in zip(choices(network, tokens), choices(parent, tokens), strict=True)
    ]
    return sum(shares) / len(shares)


def compare(setting: str, a: nn.Module, b: nn.Module, *, short: bool = False) -> list[Row]:
    """The lines of one pair; without those of fits, if they are to be few."""
    problem = PROBLEMS[NETWORKS[NETWORK].data]()
    batches, domains = problem.calibration(), problem.apart()
    match = Align(continuous=False)
    moved = with_state_of(a, fxmerge.align(b, a, batches, Recipe(match=match), run=Run(progress=False)))
    in_order = {"averaged as they are": [a, b], "matched": [a, moved]}
    fitted = Recipe(match=match, fit=LeastSquares())
    ways: dict[str, Callable[[], nn.Module]] = {
        "parent A": lambda: a,
        "parent B": lambda: b,
        "averaged as they are": partial(averaged, a, b),
        "matched, averaged": partial(merged, a, b, batches, Recipe(match=match, fit=None)),
        "matched, fitted": partial(merged, a, b, batches, fitted, routers=False),
        "matched, fitted, routers calibrated": partial(merged, a, b, batches, fitted),
        "default, routers not calibrated": partial(merged, a, b, batches, Recipe(), routers=False),
        "default": partial(merged, a, b, batches, Recipe()),
    }
    rows = list[Row]()
    ensemble = problem.evaluate([a, b])
    for name, way in list(ways.items())[: 4 if short else None]:
        network = way()
        scores = problem.evaluate([network])
        own = in_order.get(name.partition(",")[0])
        share = "" if own is None else f"{kept(network, own, domains):.2f}"
        rows.append(line(setting, name, scores) | {"experts kept": share})
        print(rows[-1], flush=True)
    return [*rows, line(setting, "ensemble", ensemble)]


def fewer(
    setting: str, network: nn.Module, counts: Sequence[int], mixes: Sequence[str], *, short: bool = False
) -> list[Row]:
    """The lines of one network with fewer experts, by what each mix of calibration data tells of them; if it is to be
    short, by a few rows of it, and without the line of fxmerge that fits nothing."""
    problem, build = PROBLEMS[NETWORKS[NETWORK].data](), NETWORKS[NETWORK].build
    data = {"A and B": problem.calibration(), "A": problem.apart()[0]}
    if short:
        data = {mix: [tokens[:8] for tokens in batches] for mix, batches in data.items()}
    rows = [line(setting, "whole", problem.evaluate([network]))]
    for mix in mixes:
        seen = observe(network, data[mix])

        def folded(count: int, recipe: Recipe, run: Run, batches: Sequence[Tensor] = data[mix]) -> nn.Module:
            return fxmerge.fold(network, batches, {"*.experts.gate_up[0]": count}, recipe=recipe, run=run)

        def kept(count: int, choose: Choose, seen: Sequence[Observed] = seen) -> nn.Module:
            small = build(experts=count)  # type: ignore[call-arg]
            return pruned(network, small, [choose(own, count) for own in seen])

        def in_groups(count: int, choose: Choose, seen: Sequence[Observed] = seen) -> nn.Module:
            return grouped(network, build(), [choose(own, count) for own in seen], seen)

        ways: dict[str, Callable[[int], nn.Module]] = {
            "fxmerge": partial(folded, recipe=Recipe(), run=Run(progress=False)),
            # The graph is that of the line before, and needs no second proof.
            "fxmerge, nothing fitted": partial(folded, recipe=Recipe(fit=None), run=Run(progress=False, verify=False)),
            "pruned by REAP's score": partial(kept, choose=by_reap),
            "pruned by frequency": partial(kept, choose=most_frequent),
            "merged as MC-SMoE, not aligned": partial(in_groups, choose=around_most_frequent),
            "merged as HC-SMoE": partial(in_groups, choose=by_outputs),
        }
        if short:
            del ways["fxmerge, nothing fitted"]
        for count in counts:
            for name, way in ways.items():
                scores = line(setting, name, problem.evaluate([way(count)]))
                rows.append(scores | {"experts": count, "calibrated on": mix})
                print(rows[-1], flush=True)
    return rows


def line(setting: str, name: str, scores: dict[str, float]) -> Row:
    """A network and its losses."""
    return {
        "setting": setting,
        "network": name,
        "loss A": f"{scores['loss_a']:.3f}",
        "loss B": f"{scores['loss_b']:.3f}",
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="networks that have learnt nothing")
    parser.add_argument("--cache", type=Path, default=training.default_cache(), help="folder of trained parents")
    parser.add_argument("--markdown", type=Path, help="write the table to this file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(machine(), flush=True)
    if options.short:
        rows = compare("untrained", *(training.build(NETWORK, seed).eval() for seed in range(2)), short=True)
        small = fewer("untrained", training.build(NETWORK, 0).eval(), COUNTS[:1], MIXES[:1], short=True)
    else:
        pairs = training.first_pairs(NETWORK, SETTINGS, options.cache, TIME)
        rows = [row for setting, pair in pairs.items() for row in compare(setting, *pair)]
        small = [row for i in range(2) for row in fewer(f"network {i + 1}", pairs[SETTINGS[-1]][i], COUNTS, MIXES)]
    text = table(rows) + "\n\n" + table(small)
    print(text)
    if options.markdown is not None:
        options.markdown.write_text(text + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())

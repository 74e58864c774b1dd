"""Tables of what was measured, and the page that holds them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from textwrap import fill

from invariance import table
from models.processes import Row

from tasks_suite.judging import POINTS
from tasks_suite.methods import (
    APART,
    BY_ALPHA,
    DEFAULTS,
    METHODS,
    OWN_DATA,
    PLAIN,
    REFITS,
    REPAIRS,
    SEARCHES,
    STANDARD,
    STANDARDIZED,
)
from tasks_suite.suite import NETWORKS

BEST = "best align"
"""The best of the grid over alpha, chosen for each pair by the accuracy itself."""

Key = tuple[object, ...]


def key(row: Row) -> Key:
    """What tells a row from others."""
    return tuple(row[name] for name in ("network", "setting", "seed", "method", "measure"))


class Results:
    """Numbers by network, setting, method and seed, from rows without a failure.

    Arguments:
        rows: of `judging.work`; of equal ones the last counts.
    """

    def __init__(self, rows: Iterable[Row]) -> None:
        self.rows = {key(row): row for row in rows if row["stage"] == "done" and row["measure"] == "merge"}

    @property
    def networks(self) -> list[str]:
        """The networks of which there is something, in the order of the suite."""
        found = {row["network"] for row in self.rows.values()}
        return [name for name in NETWORKS if name in found]

    @property
    def methods(self) -> list[str]:
        """The methods of which there is something, in the order of the registry."""
        found = {row["method"] for row in self.rows.values()}
        return [name for name in METHODS if name in found]

    def numbers(self, network: str, setting: str, method: str, name: str) -> dict[int, float]:
        """A score or another number, by seed."""
        if method == BEST:
            each = [self.numbers(network, setting, m, name) for m in BY_ALPHA.values()]
            return {seed: max(e[seed] for e in each) for seed in set.intersection(*map(set, each))}
        return {
            row["seed"]: row["scores"][name] if name in row["scores"] else row[name]
            for row in self.rows.values()
            if (row["network"], row["setting"], row["method"]) == (network, setting, method)
            and (name in row["scores"] or name in row)
        }

    def mean(self, network: str, setting: str, method: str, name: str) -> float | None:
        numbers = self.numbers(network, setting, method, name)
        return statistics.fmean(numbers.values()) if numbers else None


# ---------------------------------------------------------------------- cells


def percent(values: Iterable[float]) -> str:
    """The mean of some shares, and their deviation if there are several."""
    return spread([100 * value for value in values], 1)


def spread(values: Sequence[float], digits: int) -> str:
    if not values:
        return "-"
    text = f"{statistics.fmean(values):.{digits}f}"
    return text if len(values) < 2 else f"{text} ± {statistics.stdev(values):.{digits}f}"


def advantage(ours: dict[int, float], theirs: dict[int, float]) -> tuple[float, float]:
    """The mean of the differences of pairs, and its standard error (NaN for a single pair)."""
    differences = [ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())]
    error = statistics.stdev(differences) / math.sqrt(len(differences)) if len(differences) > 1 else math.nan
    return statistics.fmean(differences), error


# ---------------------------------------------------------------------- tables


def accuracies(results: Results, setting: str, name: str, only: Collection[str] | None = None) -> list[Row]:
    """Networks by methods, and the mean over those networks that every method handles; by default the methods that are
    no controls of refitting."""
    networks = [n for n in results.networks if name != "joint" or NETWORKS[n].data != "text"]
    networks = [n for n in networks if any(results.numbers(n, setting, m, name) for m in results.methods)]
    if not networks:
        return []
    apart = {*REFITS, *APART, *STANDARD, *SEARCHES, *REPAIRS} - {BY_ALPHA[0.5], "MuDSC zip"}
    averaged = [m for m in results.methods if m not in apart]
    known = [*averaged, DEFAULTS, BEST] if only is None else [m for m in results.methods if m in only]
    methods = [m for m in known if any(results.numbers(n, setting, m, name) for n in networks)]
    lines: list[Row] = []
    for network in networks:
        cells = {m: percent(results.numbers(network, setting, m, name).values()) for m in methods}
        lines.append({"network": network, **cells})
    means = {m: [results.mean(n, setting, m, name) for n in networks] for m in methods}
    whole = {m: [v for v in values if v is not None] for m, values in means.items()}
    lines.append(
        {"network": "mean"}
        | {m: f"{100 * statistics.fmean(v):.1f}" if v and len(v) == len(networks) else "-" for m, v in whole.items()}
    )
    return lines


def margins(results: Results, setting: str, name: str) -> list[Row]:
    """fxmerge's defaults against the best published method of each network."""
    lines: list[Row] = []
    for network in results.networks:
        ours = results.numbers(network, setting, DEFAULTS, name)
        rivals = {
            m: numbers
            for m in results.methods
            if METHODS[m].published and ours.keys() & (numbers := results.numbers(network, setting, m, name)).keys()
        }
        if not rivals:
            continue
        best = max(rivals, key=lambda m: statistics.fmean(rivals[m].values()))
        difference, error = advantage(ours, rivals[best])
        lines.append(
            {
                "network": network,
                DEFAULTS: percent(ours.values()),
                "best published": best,
                "its": percent(rivals[best].values()),
                "difference": f"{100 * difference:+.1f}",
                "standard error": "-" if math.isnan(error) else f"{100 * error:.1f}",
            }
        )
    return lines


def over_controls(results: Results, name: str, ours: str, controls: Sequence[str]) -> list[Row]:
    """By how much a refit of fxmerge is ahead of every control, the mean over networks and, of these, the least."""
    lines: list[Row] = []
    for control in controls:
        gaps = [
            100 * advantage(mine, theirs)[0]
            for network in results.networks
            if (name != "joint" or NETWORKS[network].data != "text")
            and (mine := results.numbers(network, "disjoint", ours, name)).keys()
            & (theirs := results.numbers(network, "disjoint", control, name)).keys()
        ]
        if gaps:
            lines.append(
                {
                    "control": control,
                    "networks": len(gaps),
                    "mean": f"{statistics.fmean(gaps):+.1f}",
                    "least": f"{min(gaps):+.1f}",
                    "ahead on": sum(gap > 0 for gap in gaps),
                }
            )
    return lines


def over_alpha(results: Results, setting: str, name: str) -> list[Row]:
    """Networks by the weight of the weight-space similarity."""
    return [
        {"network": n}
        | {f"alpha {alpha:g}": percent(results.numbers(n, setting, m, name).values()) for alpha, m in BY_ALPHA.items()}
        for n in results.networks
    ]


def barriers(results: Results) -> list[Row]:
    """Loss barriers of methods that permute, and what share is left of the plain average's."""
    lines: list[Row] = []
    methods = [m for m in results.methods if any(results.numbers(n, "same", m, "barrier") for n in results.networks)]
    for network in results.networks:
        plain = results.mean(network, "same", PLAIN, "barrier")
        if plain is None:
            continue
        line: Row = {"network": network}
        for method in methods:
            numbers = list(results.numbers(network, "same", method, "barrier").values())
            share = f" ({statistics.fmean(numbers) / plain:.0%})" if numbers and plain and method != PLAIN else ""
            line[method] = spread(numbers, 3) + share
        lines.append(line)
    return lines


def text_losses(results: Results) -> list[Row]:
    """Loss of the next character on each domain, for the networks that learn text."""
    return [
        {"network": network, "method": method}
        | {
            heading: spread(list(results.numbers(network, "disjoint", method, name).values()), 3)
            for heading, name in (("domain A", "loss_a"), ("domain B", "loss_b"), ("both", "loss"))
        }
        for network in results.networks
        if NETWORKS[network].data == "text"
        for method in results.methods
        if results.numbers(network, "disjoint", method, "loss")
    ]


def changes(results: Results) -> list[Row]:
    """The largest change of a parent's outputs by its alignment alone."""
    lines: list[Row] = []
    for network in results.networks:
        line: Row = {"network": network}
        for method in results.methods:
            if METHODS[method].aligned is None or method == PLAIN:
                continue
            found = [c for s in ("disjoint", "same") for c in results.numbers(network, s, method, "change").values()]
            line[method] = f"{max(found):.0e}" if found else "-"
        lines.append(line)
    return lines


def costs(results: Results) -> list[Row]:
    """Parameters of a network, what its training was, and seconds of each merge."""
    lines: list[Row] = []
    for network in results.networks:
        entry, first = NETWORKS[network], next(r for r in results.rows.values() if r["network"] == network)
        networks = 2 if first["method"] == "ensemble" else 1
        line: Row = {
            "network": network,
            "parameters": f"{first['parameters'] // networks:,}",
            "pairs": len({row["seed"] for row in results.rows.values() if row["network"] == network}),
            "steps": entry.steps,
            "batch": entry.batch,
        }
        for method in results.methods:
            if METHODS[method].merges and method != PLAIN:
                numbers = [
                    n for s in ("disjoint", "same") for n in results.numbers(network, s, method, "seconds").values()
                ]
                line[f"{method} s"] = f"{statistics.median(numbers):.1f}" if numbers else "-"
        lines.append(line)
    return lines


def failures(rows: Iterable[Row]) -> list[Row]:
    found = [r for r in rows if "failure" in r]
    return [
        {
            **{name: r[name] for name in ("network", "setting", "seed", "method", "stage")},
            "reason": r["failure"][:160].replace("|", "\\|"),
        }
        for r in found
    ]


def summary(rows: Sequence[Row]) -> str:
    """What is printed at the end of a run."""
    results = Results(rows)
    return "\n\n".join(
        f"{title}\n{table(lines)}"
        for title, lines in (
            ("disjoint, per task, %", accuracies(results, "disjoint", "per_task")),
            ("same, joint, %", accuracies(results, "same", "joint")),
            ("same, loss barrier (share of the plain average's)", barriers(results)),
            ("failures", failures(rows)),
        )
        if lines
    )


# ---------------------------------------------------------------------- the page

Section = tuple[str, str, Callable[[Results], list[Row]]]

SECTIONS: tuple[Section, ...] = (
    (
        "Disjoint tasks: accuracy per task",
        "In percent, the mean of both tasks, choosing among the classes of the task (for text: the next character, "
        f"mean of both domains). `{BEST}` is the best of the grid over alpha, chosen for each pair by this very "
        "number: no method that has no labels can be expected to reach it.",
        lambda r: accuracies(r, "disjoint", "per_task"),
    ),
    (
        "Defaults against the best published method",
        "The same accuracies; fxmerge zips as MuDSC does and then refits. The difference is the mean over pairs, with "
        "its standard error; the best published method is chosen for each network by its mean.",
        lambda r: margins(r, "disjoint", "per_task"),
    ),
    (
        "Disjoint tasks: joint accuracy",
        "In percent, on the images of both tasks, choosing among all ten classes.",
        lambda r: accuracies(r, "disjoint", "joint"),
    ),
    (
        "Refitting and its controls: accuracy per task",
        "All fitted on the same 2,000 images of both tasks (256 windows of text) to the mean of both parents. "
        "Controls: one parent, a random network, and the zipped average, of which only the last layer is fitted; and a "
        "refit of the plain average, nothing matched. fxmerge is the refit of the zipped average, or a parent with a "
        "new readout where that comes much nearer to the mean of both parents.",
        lambda r: accuracies(r, "disjoint", "per_task", REFITS),
    ),
    (
        "Refitting and its controls: joint accuracy",
        "The same networks, choosing among all ten classes.",
        lambda r: accuracies(r, "disjoint", "joint", REFITS),
    ),
    (
        "Refitting with few images: accuracy per task",
        "As above, with 200 images, 20 of each class (26 windows of text), for matching, BatchNorm and refitting.",
        lambda r: accuracies(r, "few", "per_task", ("ensemble", PLAIN, "MuDSC zip", *REFITS)),
    ),
    (
        "Refitting on data of each parent's own: accuracy per task",
        "The same inputs, but it is known which task each is of, and half of what is learnt is what the parent of that "
        "task gives.",
        lambda r: accuracies(r, "disjoint", "per_task", APART),
    ),
    (
        "Refitting on data of each parent's own: joint accuracy",
        "The same networks, choosing among all ten classes.",
        lambda r: accuracies(r, "disjoint", "joint", APART),
    ),
    (
        "Refitting to standardized outputs: accuracy per task",
        "One set of images for both, as above, but every output of both parents is first shifted to mean zero over "
        "these images, and scaled to equal deviations. That needs neither labels nor the task of an image. It is for "
        "parents that give different answers: on text, where both give the same, it takes away what they agree on.",
        lambda r: accuracies(r, "disjoint", "per_task", STANDARD),
    ),
    (
        "Refitting to standardized outputs: joint accuracy",
        "The same networks, choosing among all ten classes.",
        lambda r: accuracies(r, "disjoint", "joint", STANDARD),
    ),
    (
        f"{DEFAULTS} over its controls",
        "Accuracy per task, in points: the mean over networks, the least of them, and how many are above zero.",
        lambda r: (
            over_controls(r, "per_task", DEFAULTS, ("MuDSC zip", *REFITS[:-1]))
            + over_controls(r, "per_task", OWN_DATA, APART[:-1])
            + over_controls(r, "per_task", STANDARDIZED, STANDARD[:-1])
        ),
    ),
    (
        f"{DEFAULTS} over its controls, jointly",
        "The same for joint accuracy.",
        lambda r: (
            over_controls(r, "joint", DEFAULTS, ("MuDSC zip", *REFITS[:-1]))
            + over_controls(r, "joint", OWN_DATA, APART[:-1])
            + over_controls(r, "joint", STANDARDIZED, STANDARD[:-1])
        ),
    ),
    (
        "Over alpha",
        "Accuracy per task of alignment, in percent, by the weight of the weight-space similarity.",
        lambda r: over_alpha(r, "disjoint", "per_task"),
    ),
    (
        "Options of the search",
        "Accuracy per task, averaged, alpha 0.5: the defaults (Pearson correlation over every activation of a class, "
        "one search) beside each other choice.",
        lambda r: accuracies(r, "disjoint", "per_task", SEARCHES),
    ),
    (
        "REPAIR",
        "Accuracy per task, averaged, and with the means and deviations of every unit reset to those of the parents. "
        "BatchNorm, which is estimated anew for all, does the same by itself.",
        lambda r: accuracies(r, "disjoint", "per_task", REPAIRS),
    ),
    ("Loss on text", "Cross-entropy of the next character, in nats.", text_losses),
    (
        "Same tasks: accuracy",
        "In percent, of the merge of two networks that learnt the same from two initialisations.",
        lambda r: (
            accuracies(r, "same", "joint")
            + [
                line
                for line in accuracies(r, "same", "per_task")
                if NETWORKS.get(line["network"]) and NETWORKS[line["network"]].data == "text"
            ]
        ),
    ),
    (
        "Same tasks: loss barrier",
        f"The rise of the test loss above the straight line between the parents' losses, at most over {POINTS} evenly "
        "spaced points from one parent to the other, BatchNorm re-estimated at every point. In parentheses, the share "
        "that is left of the plain average's.",
        barriers,
    ),
    (
        "Function preserved",
        "The largest change of an output when one parent is permuted and nothing else, relative to the largest output, "
        "in float64, over all pairs. BatchNorm is estimated anew on both sides.",
        changes,
    ),
    ("Size and time", "Seconds of a merge: medians, on one thread, two processes at a time.", costs),
)

PICTURES = (
    ("Accuracy over alpha", "tasks-alpha.svg"),
    ("Loss between parents that learnt the same", "tasks-barrier.svg"),
    ("Loss on the plane through two parents and their merge", "tasks-plane.png"),
    ("One task for the other: parents that count unequally, from 0.1 to 0.9", "tasks-tradeoff.svg"),
)

PREFACE = """# Real tasks

What `python benchmarks/tasks.py` measured: networks trained apart, merged without training. One parent learns the
first and the other the last five classes of Fashion-MNIST, or one learns code about concurrency and the other code
about formats, from the sources of Python's own library; or both learn everything, from two initialisations. Images
are predicted into a space in which every class has a fixed direction, so that one head serves all classes. Published
methods average; fxmerge refits after averaging. All see the same 2,000 unlabelled training images, over which
BatchNorm statistics are re-estimated for all alike.
Numbers are means over pairs of parents and, where there are several, their standard deviation. No two pairs of a
setting share a parent."""


def page(rows: Sequence[Row], plots: Path | None) -> str:
    """The markdown page, with the pictures that are in a folder."""
    results = Results(rows)
    parts = [PREFACE, *dict.fromkeys(row["machine"] for row in rows if "machine" in row)]
    for title, text, make in SECTIONS:
        lines = make(results)
        parts += [f"## {title}", fill(text, 118, break_on_hyphens=False), table(lines)] if lines else []
    pictures = [f"![{title}]({name})" for title, name in PICTURES if plots is not None and (plots / name).is_file()]
    parts += ["## Pictures", *pictures] if pictures else []
    if failed := failures(rows):
        parts += ["## Failures", table(failed)]
    return "\n\n".join(parts) + "\n"

"""Tables of what was measured, and the page that holds them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Collection, Iterable, Sequence

from invariance import table
from models.processes import Row

from tasks_suite.methods import (
    APART,
    BY_ALPHA,
    DEFAULTS,
    METHODS,
    NO_DATA,
    PLAIN,
    REFITS,
    REPAIRS,
    SEARCHES,
    STANDARD,
)
from tasks_suite.suite import NETWORKS

BEST = "best align"
"""The best of the grid over alpha, chosen for each pair by the accuracy itself."""

VARIANTS = {*APART, *STANDARD, *SEARCHES, *REPAIRS, *NO_DATA} - {
    BY_ALPHA[0.5],
    BY_ALPHA[1.0],
    "MuDSC zip",
    "weight zip",
}
"""Methods that have tables of their own."""

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
        """The networks that choose among classes or characters of which there is something, in the order of the
        suite."""
        return self._networks(maps=False)

    @property
    def dense(self) -> list[str]:
        """The networks that give maps of which there is something, in the order of the suite."""
        return self._networks(maps=True)

    def _networks(self, *, maps: bool) -> list[str]:
        found = {row["network"] for row in self.rows.values()}
        return [name for name in NETWORKS if name in found and (NETWORKS[name].data == "dense") == maps]

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

    def side_by_side(self, network: str, setting: str, methods: Iterable[str], name: str) -> dict[str, list[float]]:
        """The numbers of several methods over those pairs that all of them have that have any."""
        found = {m: self.numbers(network, setting, m, name) for m in methods}
        pairs = set.intersection(*([set(numbers) for numbers in found.values() if numbers] or [set()]))
        return {m: [v for seed, v in numbers.items() if seed in pairs] for m, numbers in found.items()}


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
    averaged = [m for m in results.methods if m not in {*REFITS, *VARIANTS}]
    known = [*averaged, DEFAULTS, BEST] if only is None else [m for m in results.methods if m in only]
    methods = [m for m in known if any(results.numbers(n, setting, m, name) for n in networks)]
    lines: list[Row] = []
    means: dict[str, list[float]] = {m: [] for m in methods}
    for network in networks:
        cells = {m: list(results.numbers(network, setting, m, name).values()) for m in methods}
        if only is not None:
            cells = results.side_by_side(network, setting, methods, name)
        lines.append({"network": network} | {m: percent(values) for m, values in cells.items()})
        for m, values in cells.items():
            means[m] += [statistics.fmean(values)] if values else []
    lines.append(
        {"network": "mean"}
        | {m: f"{100 * statistics.fmean(v):.1f}" if len(v) == len(networks) else "-" for m, v in means.items()}
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


def over_controls(
    results: Results, name: str, ours: str, controls: Sequence[str], setting: str = "disjoint"
) -> list[Row]:
    """By how much a refit of fxmerge is ahead of every control, the mean over networks and, of these, the least."""
    lines: list[Row] = []
    for control in controls:
        gaps = [
            100 * advantage(mine, theirs)[0]
            for network in results.networks
            if (name != "joint" or NETWORKS[network].data != "text")
            and (mine := results.numbers(network, setting, ours, name)).keys()
            & (theirs := results.numbers(network, setting, control, name)).keys()
        ]
        if gaps:
            lines.append(
                {
                    "control": control + ("" if setting == "disjoint" else f", {setting} images"),
                    "networks": len(gaps),
                    "mean": f"{statistics.fmean(gaps):+.1f}",
                    "least": f"{min(gaps):+.1f}",
                    "ahead on": sum(gap > 0 for gap in gaps),
                }
            )
    return lines


def over_alpha(results: Results, setting: str, name: str) -> list[Row]:
    """Networks by the weight of the weight-space similarity."""
    lines: list[Row] = []
    for n in results.networks:
        cells = results.side_by_side(n, setting, BY_ALPHA.values(), name)
        lines.append({"network": n} | {f"alpha {alpha:g}": percent(cells[m]) for alpha, m in BY_ALPHA.items()})
    return lines


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


def without_data(results: Results) -> list[Row]:
    """What is merged by weights alone, for networks with BatchNorm."""
    lines = accuracies(results, "disjoint", "per_task", NO_DATA)
    return [line for line in lines if "-" not in list(line.values())[1:4] and line["network"].endswith("-bn")]


def dense_scores(results: Results) -> list[Row]:
    """The share of the variance of each map that is explained, for the networks that give maps."""
    return [
        {"network": network, "method": method}
        | {
            heading: percent(results.numbers(network, "disjoint", method, name).values())
            for heading, name in (("without noise", "task_a"), ("edges", "task_b"), ("mean", "per_task"))
        }
        for network in results.dense
        for method in results.methods
        if results.numbers(network, "disjoint", method, "per_task")
    ]


def changes(results: Results) -> list[Row]:
    """The largest change of a parent's outputs by its alignment alone."""
    lines: list[Row] = []
    for network in [*results.networks, *results.dense]:
        line: Row = {"network": network}
        for method in results.methods:
            if METHODS[method].aligned is None or method in {PLAIN, *VARIANTS}:
                continue
            found = [c for s in ("disjoint", "same") for c in results.numbers(network, s, method, "change").values()]
            line[method] = f"{max(found):.0e}" if found else "-"
        lines.append(line)
    return lines


def costs(results: Results) -> list[Row]:
    """Parameters of a network, what its training was, and seconds of each merge."""
    lines: list[Row] = []
    for network in [*results.networks, *results.dense]:
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
            if METHODS[method].merges and method not in {PLAIN, *VARIANTS}:
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

"""What other tools find of the permutation symmetry of models, beside fxmerge.

Three tools look at the same models, each in a process of its own, with random weights:

- torch-pruning, whose dependency graph says which channels have to be pruned together;
- rebasin, which permutes the layers of the paths through a model;
- fxmerge.

None gets a description of the architecture, so torch-pruning is not told the number of attention heads. A tool
handles a model if it ends without an error and says that some parameter axis can be permuted. The function is
preserved if one random permutation of all its classes changes no output by more than 1e-8 of the output's largest
value, in float64, with perturbed parameters and running statistics. Where it is not, a few classes drawn at random
are tried each alone. See the modules of `benchmarks/tools` for how each tool's answer is read.

    python benchmarks/rivals.py [--short] [--models NAME ...] [--tools NAME ...] [--families NAME ...]
        [--again NAME ... | failed] [--results FILE] [--jobs 1] [--timeout 120] [--memory 10]
        [--markdown FILE] [--report]

Needs `pip install -e '.[zoo,rivals]'`; tools that are not installed are left out. Each model and tool adds one JSON
line to the results file; those that have a line are skipped.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import time
from collections.abc import Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from invariance import table
from models import FAMILIES, Example, find_factory
from models.processes import Note, Row, append_row, read_rows, run_all
from tools import Axis, Found, rebasin_paths, torch_pruning_groups
from zoo import select

from fxmerge.program.capture import capture_program
from fxmerge.symmetry.group import Symmetry, analyse
from fxmerge.symmetry.verify import TOLERANCE, Probe

TOOLS = {"torch-pruning": "torch_pruning", "rebasin": "rebasin", "fxmerge": "fxmerge"}
"""The tools, and the packages to import."""

SHORT = ("torchvision/shufflenet_v2_x0_5", "torchvision/squeezenet1_1")
SAMPLE = 5
"""How many classes are tried each alone."""


# ---------------------------------------------------------------------- one model and tool, in the worker


def work(task: Row, note: Note) -> None:
    """Runs one tool on one model."""
    tool = task["tool"]
    note("construct", package=f"{tool} {version(tool)}", models=_package(task["name"]))
    example = find_factory(task["name"])()
    note("find", parameters=sum(p.numel() for p in example.model.parameters()))
    if tool == "fxmerge":
        _infer(example, note)
        return
    if example.kwargs:
        raise NotImplementedError("The tool takes no inputs by keyword.")
    began = time.perf_counter()
    find = torch_pruning_groups.find if tool == "torch-pruning" else rebasin_paths.find
    found = find(example.model, example.args)
    note("verify", seconds=time.perf_counter() - began, classes=found.classes, axes=len(found.axes))
    if found.classes:
        _compare(example, found, note)
    if tool == "torch-pruning":
        note("prune")
        note("prune", prunes=torch_pruning_groups.prune(example.model, example.args))
    note("done")


def _infer(example: Example, note: Note) -> None:
    """fxmerge on one model."""
    model, args, kwargs = example
    began = time.perf_counter()
    symmetry = analyse(capture_program(model, args, kwargs))[1]
    note(
        "verify",
        seconds=time.perf_counter() - began,
        classes=len(symmetry.choices),
        axes=len(_moving(symmetry) & {(n, d) for n, p in model.named_parameters() for d in range(p.ndim)}),
    )
    _probe(example)
    proven = symmetry.verify(model, args, kwargs)
    preserved = not proven.demoted and (proven.error or 0.0) <= TOLERANCE
    holding = 1 - len(proven.demoted) / max(len(symmetry.units), 1)
    note("done", error=proven.error, preserved=preserved, holding=holding)


def _moving(symmetry: Symmetry) -> set[Axis]:
    """The axes on which some index moves, when every unit goes to the place of another."""
    images = symmetry.build(lambda _, units, places: np.roll(places, 1, axis=1)).images
    moving = set()
    for axis in symmetry.layout:
        source = axis.source(images)
        if source is not None:
            here = np.arange(axis.shape[axis.dim]).reshape([-1 if d == axis.dim else 1 for d in axis.dims])
            if (source != here).any():
                moving.add((axis.parameter, axis.dim))
    return moving


def _compare(example: Example, found: Found, note: Note) -> None:
    """Whether the classes of a tool leave the outputs as they are: all at once, and if not, some each alone."""
    probe = _probe(example)
    numbers = range(found.classes)
    state = found.permute(probe.state, numbers)
    error = probe.change(state)
    row: Row = {"error": error, "preserved": error <= TOLERANCE, "holding": 1.0}
    if found.carry is not None:
        row["carried"] = probe.change(found.carry(state)) <= TOLERANCE
    note("sample", **row)
    if row["preserved"]:
        return
    tried = random.Random(0).sample(numbers, min(SAMPLE, len(numbers)))
    changes = [probe.change(found.permute(probe.state, {number})) for number in tried]
    note("sample", holding=sum(change <= TOLERANCE for change in changes) / len(tried))


def _probe(example: Example) -> Probe:
    """What compares the model's outputs before and after a permutation."""
    probe = Probe(*example, torch.Generator().manual_seed(0))
    if not any(output.numel() for output in probe.expected):
        raise ValueError("The outputs have no elements to compare.")
    return probe


def _package(name: str) -> str:
    package = FAMILIES[name.partition("/")[0]][0]
    return f"{package} {version(package)}"


# ---------------------------------------------------------------------- results


def is_handled(row: Row) -> bool:
    return bool(row.get("axes"))


def report(rows: Sequence[Row]) -> str:
    """A section of a page: a summary, a table of all models, and what was not handled."""
    machines = dict.fromkeys(r["machine"] for r in rows if "machine" in r)
    packages = dict.fromkeys(r[key] for key in ("package", "models") for r in rows if key in r)
    parts = [*machines, ", ".join(packages), table(summary(rows))]
    by_model: dict[str, dict[str, Row]] = {}
    for row in rows:
        by_model.setdefault(row["name"], {})[row["tool"]] = row
    parts += ["## By model", table([_line(name, found) for name, found in sorted(by_model.items())])]
    failed = sorted((r for r in rows if "failure" in r), key=lambda r: (r["name"], r["tool"]))
    if failed:
        lines = [
            {"model": _short(r["name"]), "tool": r["tool"], "stage": r["stage"], "reason": _essence(r["failure"])}
            for r in failed
        ]
        parts += ["## Failures", table(lines)]
    return "\n\n".join(parts) + "\n"


def summary(rows: Sequence[Row]) -> list[Row]:
    """One line for each tool."""
    of = {tool: {r["name"]: r for r in rows if r["tool"] == tool} for tool in TOOLS}
    of = {tool: found for tool, found in of.items() if found}
    common = (
        set.intersection(*({n for n, r in found.items() if is_handled(r)} for found in of.values())) if of else set()
    )
    return [_summary(tool, found, common) for tool, found in of.items()]


def _summary(tool: str, found: dict[str, Row], common: set[str]) -> Row:
    handled = [r for r in found.values() if is_handled(r)]
    preserved = [r for r in handled if r.get("preserved")]
    holding = [r["holding"] for r in handled if "holding" in r]
    return {
        "tool": tool,
        "models": len(found),
        "handled": len(handled),
        "preserved": len(preserved),
        "preserved, statistics carried": sum(bool(r.get("carried", r.get("preserved"))) for r in handled),
        "classes that hold, mean": f"{statistics.mean(holding):.0%}" if holding else "-",
        "free axes, median": f"{statistics.median(r['axes'] for r in handled):g}" if handled else "-",
        "free axes, total": sum(r["axes"] for r in handled),
        "of models preserved": sum(r["axes"] for r in preserved),
        f"of the {len(common)} models that all handle": sum(found[n]["axes"] for n in common),
        "pruned and runs": sum(bool(r.get("prunes")) for r in found.values()) if tool == "torch-pruning" else "-",
    }


def _line(name: str, found: dict[str, Row]) -> Row:
    line: Row = {"model": _short(name)}
    for tool in TOOLS:
        row = found.get(tool, {})
        line[tool] = _verdict(row)
        line[f"{tool} axes"] = row.get("axes", "-")
        if tool == "torch-pruning":
            line["pruned and runs"] = {True: "yes", False: "no"}.get(row.get("prunes", False)) if row else "-"
    return line


def _verdict(row: Row) -> str:
    """What is said of one model and tool, in one cell."""
    if not row:
        return "-"
    if not is_handled(row):
        return "not handled"
    if "preserved" not in row:
        return "not compared"
    if row["preserved"]:
        return "preserved"
    carried = "; preserved with statistics carried" if row.get("carried") else ""
    return f"changed by {row['error']:.0e}{carried}"


def _short(name: str) -> str:
    return name.removeprefix("torchvision/")


def _essence(failure: str) -> str:
    """What an error says, in one cell."""
    return failure.partition(" Pass example inputs")[0][:160].replace("|", "\\|")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help=f"only {', '.join(SHORT)}, and no results file")
    parser.add_argument("--models", nargs="+", help="only these, with or without family, as in torchvision/resnet18")
    parser.add_argument("--tools", nargs="+", choices=list(TOOLS), default=list(TOOLS), help="only these")
    parser.add_argument("--families", nargs="+", choices=list(FAMILIES), default=["torchvision"], help="only these")
    parser.add_argument("--again", nargs="+", default=[], help="run these models again; `failed` for all failures")
    parser.add_argument("--results", type=Path, default=Path("rivals.jsonl"), help="one JSON line a model and tool")
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time")
    parser.add_argument("--timeout", type=float, default=120, help="seconds for each model and tool")
    parser.add_argument("--memory", type=float, default=10, help="GiB for each model and tool")
    parser.add_argument("--markdown", type=Path, help="write the tables to this file")
    parser.add_argument("--report", action="store_true", help="run nothing, only report on the results file")
    options = parser.parse_args()
    names = select(options.families, SHORT if options.short else options.models, short=False)
    tools = [tool for tool in options.tools if find_spec(TOOLS[tool])]
    rows = {} if options.short else {(r["name"], r["tool"]): r for r in read_rows(options.results)}
    keys = [(name, tool) for name in names for tool in tools]
    again = set(options.again)
    tasks = [
        {"name": name, "tool": tool}
        for name, tool in keys
        if (name, tool) not in rows
        or {name, _short(name)} & again
        or ("failed" in again and "failure" in rows[name, tool])
    ]
    if not options.report:
        done = run_all(work, tasks, options.jobs, options.timeout, options.memory)
        for number, row in enumerate(done, start=1):
            rows[row["name"], row["tool"]] = row
            if not options.short:
                append_row(options.results, row)
            failure = f" ({row['stage']}: {row['failure'][:120]})" if "failure" in row else ""
            said = f"{_verdict(row)}, {row.get('axes', 0)} axes{failure}"
            print(f"[{number}/{len(tasks)}] {row['name']}, {row['tool']}: {said}", flush=True)
    chosen = [rows[key] for key in keys if key in rows]
    if options.markdown:
        options.markdown.write_text(report(chosen))
    print(table(summary(chosen)))
    ours = [r for r in chosen if r["tool"] == "fxmerge"]
    return int(
        any(is_handled(r) and r.get("preserved") is False for r in ours)
        or (options.short and any("failure" in r for r in ours))
    )


if __name__ == "__main__":
    sys.exit(main())

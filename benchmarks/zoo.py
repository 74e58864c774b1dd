"""How far inference reaches: the symmetry of every model of a large zoo, each in a process of its own.

For every model, with random weights: how it was captured, seconds for capture, inference and verification
(in float64, one random group element), the classes and what is pinned by which op, ops without a rule, demoted
classes, and whether what is emitted for other parameters loads strictly into the class and computes what that does.
Each model adds one JSON line to the results file; models that have a line are skipped.

    python benchmarks/zoo.py [--short] [--families NAME ...] [--models NAME ...] [--again NAME ... | failed]
        [--results FILE] [--jobs 2] [--timeout 600] [--memory 10] [--markdown FILE] [--note TEXT] [--report] [--list]

Needs `pip install -e '.[zoo]'`; families whose package is not installed are left out.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from invariance import table
from models import FAMILIES, find_factory, is_installed, list_models
from models.processes import Note, Row, append_row, read_rows, run_all
from models.timm_models import write_listing
from torch import Tensor
from torch.utils import _pytree as pytree

from fxmerge.emit.bake import bake
from fxmerge.program import models as running
from fxmerge.program.capture import Program, capture_program, other_values
from fxmerge.symmetry.group import Symmetry, analyse
from fxmerge.symmetry.propagation import Propagation
from fxmerge.symmetry.verify import TOLERANCE

SHORT = (
    "torch.nn/LSTM bidirectional",
    "torch.nn/TransformerEncoder",
    "torchvision/shufflenet_v2_x0_5",
    "torchvision/squeezenet1_1",
    "transformers/BERT",
    "smp/Unet",
)
STAGES = ("construct", "capture", "infer", "emit", "verify")


# ---------------------------------------------------------------------- one model, in the worker


def work(task: Row, note: Note) -> None:
    """Runs one model."""
    note("construct", package=_package(task["family"]))
    model, args, kwargs = find_factory(task["name"])()
    note("capture", parameters=sum(p.numel() for p in model.parameters()))
    began = time.perf_counter()
    program = capture_program(model, args, kwargs)
    captured = time.perf_counter()
    note("infer", route=program.route, capture_seconds=captured - began)
    began = time.perf_counter()
    found, symmetry = analyse(program)
    note("emit", infer_seconds=time.perf_counter() - began, **describe(program, found, symmetry))
    note("verify", **emit(program, symmetry, task["name"]))
    began = time.perf_counter()
    symmetry = symmetry.verify(model, args, kwargs, trials=1)
    note("done", verify_seconds=time.perf_counter() - began, error=symmetry.error, demoted=list(symmetry.demoted))


def _package(family: str) -> str:
    package = FAMILIES[family][0]
    return f"{package} {version(package)}"


def emit(program: Program, symmetry: Symmetry, name: str) -> Row:
    """Whether what is emitted loads into a fresh instance of the class, and computes what that does.

    The parameters and buffers are other ones than those that the model was captured with, permuted by a random element
    of the group.
    """
    generator = torch.Generator().manual_seed(0)
    fresh, args, kwargs = find_factory(name)()
    fresh.eval()
    state = {n: other_values(t, generator) for n, t in program.module.state_dict().items() if isinstance(t, Tensor)}
    emitted = bake(program, symmetry.sample_permutation(generator).apply(state))
    saved = emitted.state_dict()
    row: Row = {"ordered": list(saved) == list(fresh.state_dict())}
    try:
        fresh.load_state_dict(saved)
        row["loads"] = True
    except (RuntimeError, ValueError) as error:
        return {**row, "loads": False, "computes": False, "emit_failure": " ".join(str(error).split())[:500]}
    leaves = (pytree.tree_leaves(running.run(m, args, kwargs)) for m in (fresh, emitted))
    expected, got = ([v for v in values if isinstance(v, Tensor)] for values in leaves)
    try:
        torch.testing.assert_close(got, expected, equal_nan=True)
    except AssertionError as error:
        return {**row, "computes": False, "emit_failure": " ".join(str(error).split())[:500]}
    return {**row, "computes": True}


def describe(program: Program, found: Propagation, symmetry: Symmetry) -> Row:
    """What the row says of an inferred symmetry."""
    total = {axis: program.parameters[axis[0]].shape[axis[1]] for axis in found.axes}
    stuck = {
        axis: len({i for ids in reasons.values() for i in ids.tolist()}) for axis, reasons in symmetry.stuck.items()
    }
    row: Row = {
        "classes": len(symmetry.choices),
        "log_order": symmetry.log_order(),
        "axes": len(total),
        "indices": sum(total.values()),
        "free_share": 1 - sum(stuck.values()) / max(sum(total.values()), 1),
        "pins": pins(found, symmetry),
        "unknown": dict(symmetry.unknown),
    }
    for source in (symmetry, found):
        if hasattr(source, "probed"):
            row["probed"] = {str(op): n for op, n in dict(source.probed).items()}
    return row


def pins(found: Propagation, symmetry: Symmetry) -> dict[str, int]:
    """How many indices of parameter axes are pinned, by the op that pins them and why."""
    ops = {node.name: _op(node.target) for node in found.program.graph.graph.nodes if node.op == "call_function"}
    counts: Counter[str] = Counter()
    for reasons in symmetry.stuck.values():
        for reason, ids in reasons.items():
            head, _, why = reason.partition(": ")
            if head in found.program.parameters:
                head = "parameter"
            counts[": ".join(filter(None, (ops.get(head, head), why)))] += len(ids)
    return dict(counts.most_common())


def _op(target: Any) -> str:
    """`aten.conv2d` for `aten.conv2d.default`."""
    return str(getattr(target, "overloadpacket", getattr(target, "__name__", target)))


# ---------------------------------------------------------------------- results


def is_captured(row: Row) -> bool:
    return row["stage"] in STAGES[2:] or row["stage"] == "done"


def is_wrong(row: Row) -> bool:
    """Whether a group that was inferred is not a symmetry, or what is emitted is not the model."""
    return bool(row.get("demoted")) or row.get("error", 0.0) > TOLERANCE or ("computes" in row and not row["computes"])


def loads(row: Row) -> bool:
    """Whether the state dict of what was emitted has the keys of the class in their order, and loads strictly."""
    return bool(row.get("loads") and row.get("ordered"))


HEAD = """What `python benchmarks/zoo.py` found, with random weights and batches of two. How to read a row:

| column | meaning |
|---|---|
| route | how the model was captured |
| classes, log order | how many classes of units may move, and the natural logarithm of the number of permutations |
| free | the share of parameter entries that lie on an axis that moves |
| pinned by | the ops that pinned the most indices |
| no rule, probed | ops without a rule that were pinned, or whose behaviour was found by numeric trials |
| error | the largest relative change of an output under a random element of the group, in float64 |
| demoted | how many classes failed this check |
| loads | the emitted state dict loads strictly into a fresh instance of the class, with the keys in their order |
| computes | the emitted GraphModule computes what that instance computes |

What is emitted holds other parameters than those that the model was captured with."""


def report(rows: Sequence[Row], note: str = "") -> str:
    """The page: a note, a summary of all families, a table for each, and the models that failed."""
    families = {family: [r for r in rows if r["family"] == family] for family in FAMILIES}
    families = {family: found for family, found in families.items() if found}
    machines = dict.fromkeys(r["machine"] for r in rows if "machine" in r)
    packages = dict.fromkeys(r["package"] for r in rows if "package" in r)
    parts = ["# Coverage", HEAD, note, *machines]
    parts += [", ".join(packages), table([_summary(family, found) for family, found in families.items()])]
    unknown: dict[str, list[str]] = {}
    for row in rows:
        for op in row.get("unknown", {}):
            unknown.setdefault(op, []).append(row["name"])
    if unknown:
        parts += ["## Ops without a rule"]
        parts += [table([{"op": f"`{op}`", "models": ", ".join(names)} for op, names in sorted(unknown.items())])]
    for family, found in families.items():
        done = [r for r in sorted(found, key=lambda r: str(r["name"])) if "classes" in r]
        if done:
            parts += [f"## {family}", table([_line(r) for r in done])]
    failed = [r for r in sorted(rows, key=lambda r: str(r["name"])) if "failure" in r]
    if failed:
        lines = [{"model": r["name"], "stage": r["stage"], "reason": _essence(r["failure"])} for r in failed]
        parts += ["## Failed", table(lines)]
    return "\n\n".join(filter(None, parts)) + "\n"


def _essence(failure: str) -> str:
    """What an error says, in one cell; of the ways to capture a model, why torch.export failed."""
    return failure.rpartition("torch.export: ")[2].partition(" Pass example inputs")[0][:300].replace("|", "\\|")


def _summary(family: str, rows: Sequence[Row]) -> Row:
    seconds = sorted(r["infer_seconds"] for r in rows if "infer_seconds" in r)
    return {
        "family": family,
        "models": len(rows),
        "captured": sum(map(is_captured, rows)),
        "verified": sum(r["stage"] == "done" and not is_wrong(r) for r in rows),
        "demoted": sum(bool(r.get("demoted")) for r in rows),
        "loads": sum(loads(r) for r in rows),
        "computes": sum(r.get("computes", False) for r in rows),
        "op without rule": sum(bool(r.get("unknown")) for r in rows),
        "inference s, median": f"{statistics.median(seconds):.2f}" if seconds else "",
        "90th percentile": f"{seconds[math.ceil(0.9 * len(seconds)) - 1]:.2f}" if seconds else "",
    }


def _line(row: Row) -> Row:
    line = {
        "model": row["name"].partition("/")[2],
        "parameters": f"{row['parameters']:,}",
        "route": row["route"],
        "classes": row["classes"],
        "log order": f"{row['log_order']:.1f}",
        "free": f"{row['free_share']:.0%}",
        "pinned by": _most(row["pins"]),
        "no rule": _most(row["unknown"]),
        "error": f"{row['error']:.0e}" if "error" in row else "",
        "demoted": len(row.get("demoted", ())),
        "loads": _yes(row, loads(row)),
        "computes": _yes(row, row.get("computes", False)),
        "capture s": f"{row['capture_seconds']:.1f}",
        "inference s": f"{row['infer_seconds']:.2f}",
        "verification s": f"{row['verify_seconds']:.1f}" if "verify_seconds" in row else "",
        "MiB": row["peak_mib"],
    }
    return line if "probed" not in row else {**line, "probed": _most(row["probed"])}


def _yes(row: Row, holds: bool) -> str:
    return ("yes" if holds else "no") if "computes" in row else ""


def _most(counts: Mapping[str, int]) -> str:
    """The three largest of some counts."""
    top = [f"{key.replace('|', '/')} {n}" for key, n in Counter(counts).most_common(3)]
    return ", ".join([*top, *(["..."] if len(counts) > 3 else [])]) or "-"


def _brief(row: Row) -> str:
    if "failure" in row:
        return f"{row['name']}: failed to {row['stage']}: {row['failure'][:160]}"
    return (
        f"{row['name']}: {row['classes']} classes, {row['free_share']:.0%} free, error {row['error']:.0e}, "
        f"{len(row['demoted'])} demoted, inference {row['infer_seconds']:.2f} s, no rule: {_most(row['unknown'])}"
    )


def select(families: Sequence[str] | None, models: Sequence[str] | None, short: bool) -> list[str]:
    """The names of the models to run, of those families whose package is installed."""
    wanted = [f for f in FAMILIES if (not families or f in families) and is_installed(f)]
    if short:
        return [name for name in SHORT if name.partition("/")[0] in wanted]
    names = [name for family in wanted for name in list_models(family)]
    if not models:
        return names
    chosen = [n for n in names if n in models or n.partition("/")[2] in models]
    missing = [m for m in models if not any(m in (n, n.partition("/")[2]) for n in chosen)]
    if missing:
        raise SystemExit(f"There is no model {', '.join(missing)}. Call with --list to see the names.")
    return chosen


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="only a few small models, whatever the results file holds")
    parser.add_argument("--families", nargs="+", choices=list(FAMILIES), help="only these")
    parser.add_argument("--models", nargs="+", help="only these, with or without family, as in timm/resnet18")
    parser.add_argument("--again", nargs="+", default=[], help="run these again; `failed` for all that failed")
    parser.add_argument("--results", type=Path, default=Path("zoo.jsonl"), help="one JSON line for each model")
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time")
    parser.add_argument("--timeout", type=float, default=600, help="seconds for each model")
    parser.add_argument("--memory", type=float, default=10, help="GiB for each model")
    parser.add_argument("--markdown", type=Path, help="write the page to this file")
    parser.add_argument("--note", default="", help="what to say of this run at the head of the page")
    parser.add_argument("--report", action="store_true", help="run nothing, only report on the results file")
    parser.add_argument("--list", action="store_true", help="print the names of the models")
    parser.add_argument("--list-timm", action="store_true", help="write benchmarks/models/timm.txt anew")
    options = parser.parse_args()
    if options.list_timm:
        write_listing()
        return 0
    names = select(options.families, options.models, options.short)
    if options.list:
        print("\n".join(names))
        return 0
    rows = {row["name"]: row for row in read_rows(options.results)}
    failed = "failed" in options.again
    if not options.report:
        todo = [
            n
            for n in names
            if n not in rows
            or options.short
            or {n, n.partition("/")[2]} & set(options.again)
            or (failed and "failure" in rows[n])
        ]
        tasks = [{"name": n, "family": n.partition("/")[0]} for n in todo]
        for number, row in enumerate(run_all(work, tasks, options.jobs, options.timeout, options.memory), start=1):
            rows[row["name"]] = row
            append_row(options.results, row)
            print(f"[{number}/{len(todo)}] {_brief(row)}", flush=True)
    chosen = [rows[n] for n in names if n in rows]
    text = report(chosen, options.note)
    if options.markdown:
        options.markdown.write_text(text)
    print(table([_summary(f, found) for f in FAMILIES if (found := [r for r in chosen if r["family"] == f])]))
    return int(any(is_wrong(r) or (options.short and "failure" in r) for r in chosen))


if __name__ == "__main__":
    sys.exit(main())

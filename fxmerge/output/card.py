"""The model card of a result: README.md with the metadata of Hugging Face, warnings first."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fxmerge.plan.running import Result
from fxmerge.recipe import NOTHING
from fxmerge.reporting import Report
from fxmerge.sources import package
from fxmerge.validate import name_of

DONE = {
    "merge": "One network merged from",
    "align": "The function of the first in the units of the second of",
    "fold": "One network folded from",
}

FILES = """## Files

- `recipe.yaml`: all of this, for `fxmerge merge recipe.yaml`.
- `report.html`: the same with pictures, for a browser.
- `report.json`: every number.
- `symmetry.json`: which units of the architecture may move.
- `units.json`: where the units of each model went.
- `SHA256SUMS`: checksums, for `sha256sum -c SHA256SUMS`.
"""

METHOD = {
    "Zip": "units zipped by their similarity in weights and activations (MuDSC, arXiv 2403.01753)",
    "Align": "units aligned one to one by their similarity in weights and activations (MuDSC, arXiv 2403.01753)",
    "Average": "parameters averaged",
    "TaskArithmetic": "task vectors added to the base (arXiv 2212.04089)",
    "Ties": "task vectors trimmed, elected by sign and added to the base (TIES, arXiv 2306.01708)",
    "LeastSquares": "every layer fitted in closed form to what the models compute",
    "Readout": "the last layers fitted in closed form to what the models compute",
    "Repair": "means and deviations of units repaired (REPAIR, arXiv 2211.08403)",
}


def card(result: Result, report: Report, loads: Mapping[str, str], reasons: Mapping[str, str]) -> str:
    """The text of a model card.

    Arguments:
        result: what was done.
        report: of the result.
        loads: for every directory of a network that can be loaded, the code that does it.
        reasons: for every file or form that was not written, why.
    """
    plan = result.plan
    names = [Path(model.path).name for model in plan.models]
    warnings = warnings_of(result, reasons)
    parts = [_head(result, names), f"# {' + '.join(names)}\n"]
    if warnings:
        parts.append("## Warnings\n\n" + "\n".join(f"- {text}" for text in warnings) + "\n")
    listed = ", ".join(f"`{name}` ({name_of(i)})" for i, name in enumerate(names))
    parts.append(f"{DONE[plan.verb]} {listed}, by fxmerge, without training.\n")
    parts.append(f"## Load it\n\nFrom inside of this directory:\n\n```python\n{_loading(loads)}\n```\n")
    parts.append("## How it was made\n\n" + "\n".join(f"- {line}" for line in _method(report)) + "\n")
    parts.append(
        "## Figures\n\n"
        + "\n".join(f"| {a} | {b} |" for a, b in [("figure", "value"), ("---", "---"), *_figures(result, report)])
        + "\n"
    )
    parts.append(_inputs(result))
    parts.append(FILES)
    return "\n".join(parts)


def warnings_of(result: Result, reasons: Mapping[str, str]) -> list[str]:
    """The warnings of a run, and what was not written with the reason."""
    return [*result.warnings, *(f"{what} was not written: {why}." for what, why in reasons.items())]


def _loading(loads: Mapping[str, str]) -> str:
    """Python code that loads every network of a directory."""
    if not loads:
        return (
            "import safetensors.torch\n\n"
            "network = ...  # An instance of the class, of these sizes.\n"
            "network.load_state_dict(safetensors.torch.load_file('model.safetensors'))"
        )
    imports = dict.fromkeys(f"import {code.partition('.')[0]}" for code in loads.values())
    names = ("network" if name == "." else name.replace("heads/", "head_") for name in loads)
    return "\n".join([*imports, "", *(f"{own} = {code}" for own, code in zip(names, loads.values(), strict=True))])


def _head(result: Result, names: list[str]) -> str:
    kinds = {network.arch.partition(":")[0] for network in result.networks}
    library = {"hf": "transformers", "timm": "timm"}.get(kinds.pop() if len(kinds) == 1 else "", "pytorch")
    data: dict[str, Any] = {
        "base_model": names,
        "library_name": library,
        "tags": list(dict.fromkeys(["fxmerge", "merge", result.plan.verb])),
    }
    if result.plan.base is not None:
        data["base_model"] = [Path(result.plan.base.path).name, *names]
    text: str = package("yaml").safe_dump(data, sort_keys=False)
    return f"---\n{text}---\n"


def _method(report: Report) -> list[str]:
    recipe = report.recipe or {}
    parts = [recipe.get(name) for name in ("match", "combine", "fit")]
    lines = [METHOD[part["kind"]] for part in parts if isinstance(part, Mapping)]
    if report.recipe is None:
        lines = [METHOD["Align"]]
    if report.models == 1:
        lines = [line for line in lines if line != METHOD["Average"]]
    if report.heads:
        heads = ", ".join(f"`{head['name']}`" for head in report.heads)
        lines.append(
            f"nothing is shared, the networks {heads} stand side by side"
            if recipe.get("share") == NOTHING
            else f"one trunk with the heads {heads}"
        )
    return lines


def _figures(result: Result, report: Report) -> list[tuple[str, str]]:
    rows = [("parameters", f"{result.parameters:,}")]
    for path, network in zip(result.plan.models, result.networks, strict=True):
        rows.append((f"parameters of `{Path(path.path).name}`", f"{network.parameters:,}"))
    if report.errors:
        what = "each model's own outputs" if report.heads else "the ensemble's outputs"
        what = "the model's outputs" if report.models == 1 else what
        where = "held-out data" if report.held_out else "the data of the fit"
        rows.append((f"squared distance to {what}, in their variance, on {where}", f"{report.errors['merged']:.3g}"))
        for number, error in report.errors["models"].items() if report.models > 1 else ():
            name = Path(result.plan.models[int(number)].path).name
            rows.append((f"the same of `{name}` alone", f"{error:.3g}"))
    if report.verification_error is not None:
        rows.append(
            (
                "verification: largest relative change of an output by the symmetry, in float64",
                f"{report.verification_error:.0e}",
            )
        )
    if report.demoted:
        rows.append(("classes that failed verification and were not used", ", ".join(report.demoted)))
    if report.widths:
        before, after = (sum(pair[i] for pair in report.widths.values()) for i in (0, 1))
        rows.append(("units of classes of another width, before and after", f"{before:,} and {after:,}"))
    return rows


def _inputs(result: Result) -> str:
    rows = ["| input | what | SHA-256 |", "| --- | --- | --- |"]
    for model, network in zip(result.plan.models, result.networks, strict=True):
        for name, own in model.sha256.items():
            rows.append(f"| `{name}` | weights of `{Path(model.path).name}`, {network.arch} | `{own}` |")
        rows += [f"| | {note} | |" for note in network.checkpoint.notes]
    for one, found in zip(result.plan.data, result.data, strict=True):
        rows.append(f"| `{Path(one.path).name}` | {found.note} | {f'`{one.sha256}`' if one.sha256 else ''} |")
    return "## Inputs\n\n" + "\n".join(rows) + "\n"

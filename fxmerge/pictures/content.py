"""What a page shows, as plain data: names, numbers and sentences, and no HTML."""

from __future__ import annotations

import math
from base64 import b64encode
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fxmerge.evidence.sampled import Matrix, SampledSimilarity
from fxmerge.pictures.value import PageValues
from fxmerge.reporting import Report
from fxmerge.symmetry.describe import letters, moves, notes, within
from fxmerge.symmetry.group import Symmetry

SCALE = 127
"""A similarity of one, as a byte."""


def content(page: PageValues) -> dict[str, Any]:
    """What a page shows.

    Returns:
        `classes` and `layers` are lists, and refer to each other by their places in these. Matrices of similarities are
        signed bytes in base64, row by row; 127 is 1. Numbers that are not finite are None.
    """
    report = page.report
    found: dict[str, Any] = {
        "title": page.title,
        "warnings": list(page.warnings),
        "facts": [list(fact) for fact in (*_facts(page), *page.facts)],
        "nearness": _nearness(report, page.models),
        "classes": _classes(page.symmetry, report, page.similarities),
        "pinned": [
            {"parameter": name, "dim": dim, "count": len(ids), "why": why}
            for (name, dim), reasons in page.symmetry.stuck.items()
            for why, ids in reasons.items()
        ],
        "layers": _layers(page),
        "line": None
        if page.line is None
        else {"what": page.line.what, "seconds": page.line.seconds}
        | {key: list(getattr(page.line, key)) for key in ("fractions", "before", "after")},
        "seconds": dict(report.seconds),
        "memory": page.peak_memory,
        "missing": _missing(page),
    }
    return {key: finite(value) for key, value in found.items()}


def finite(value: Any) -> Any:
    """Plain data in which numbers that JSON does not have are null.

    Example:
        >>> finite({1: [math.nan, 2.0]})
        {'1': [None, 2.0]}
    """
    if isinstance(value, Mapping):
        return {str(key): finite(own) for key, own in value.items()}
    if isinstance(value, list | tuple):
        return [finite(own) for own in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


# -------------------------------------------------------------------------- the whole


def _facts(page: PageValues) -> list[tuple[str, str]]:
    """What was made, in words."""
    report = page.report
    facts = [("models", ", ".join(page.models)), ("parameters", f"{page.parameters:,}")]
    if report.recipe is not None:
        parts = [(name, report.recipe.get(name)) for name in ("match", "combine", "fit")]
        facts += [(name, part["kind"] if isinstance(part, Mapping) else "none") for name, part in parts]
    if len(set(report.weights)) > 1:
        facts.append(("weights", ", ".join(f"{weight:.3g}" for weight in report.weights)))
    if report.heads:
        facts.append(("heads", ", ".join(str(head["name"]) for head in report.heads)))
    for space in ("weights", "activations"):
        values = [own[space] for each in report.quality for own in each.values() if space in own]
        if values:
            facts.append(
                (f"match in {space}", f"{sum(values) / len(values):.2f}, the mean similarity of matched units")
            )
    if report.widths:
        before, after = (sum(pair[i] for pair in report.widths.values()) for i in (0, 1))
        facts.append(("units of other widths", f"{after:,}, from {before:,}"))
    if report.layers or report.left:
        facts.append(("layers fitted", f"{len(report.layers)}, {len(report.left)} parameters were not"))
    if report.verification_error is not None:
        facts.append(("verified in float64", f"outputs change by {report.verification_error:.0e} at most"))
    facts += [("symmetry", note) for note in notes(page.symmetry)]
    facts.append(("captured by", report.route))
    return facts


def _nearness(report: Report, models: Sequence[str]) -> dict[str, Any] | None:
    """How near the result and each parent are to the ensemble."""
    if not report.errors:
        return None
    rows = [{"name": report.kind, "error": report.errors["merged"], "result": True}]
    if report.models > 1:
        names = models[-report.models :]
        rows += [
            {"name": names[int(number)], "error": error, "result": False}
            for number, error in report.errors["models"].items()
        ]
    to = "model" if report.models == 1 else "models" if report.heads else "ensemble"
    return {"title": f"How near to the {to}", "what": report.distance, "rows": rows}


def _missing(page: PageValues) -> list[str]:
    """What was not computed, and how to have it."""
    report, found = page.report, []
    if not report.errors:
        found.append(
            "The distance to the ensemble was not measured. It is, where there are data and layers are fitted."
        )
    if not page.similarities:
        found.append("There are no similarities of units: no units of two models were matched one by one.")
    elif report.bases:
        found.append(
            "There are no similarities of classes that were matched by a change of basis: their units are mixed."
        )
    if not report.layers:
        found.append("No layer was fitted, so there are no errors of layers.")
    if report.heads:
        found.append("There is no line between the parents, since each has a head of its own.")
    elif page.line is None and report.models > 1:
        found.append(
            "Networks on the line between the parents were not measured. fxmerge.interpolate does that in Python, and "
            "--line 9 on the command line."
        )
    if page.peak_memory is None:
        found.append("The system does not tell how much memory was in use.")
    return found


# -------------------------------------------------------------------------- classes


def _classes(symmetry: Symmetry, report: Report, similarities: Sequence[SampledSimilarity]) -> list[dict[str, Any]]:
    """The classes whose units may move."""
    shown = defaultdict(list)
    for one in similarities:
        shown[one.name].append(_similarity(one))
    movable = symmetry.classes[: len(symmetry.units)]
    return [
        {
            "letter": letters(n),
            "name": c.name,
            "size": c.size,
            "merged": report.widths[c.name][1] if c.name in report.widths else c.size,
            "group": moves(symmetry, n),
            "structure": c.structure,
            "kind": str(c.kind),
            "limited": c.limited,
            "inside": within(symmetry, n),
            "axes": [{"parameter": axis.parameter, "dim": axis.dim, "count": len(axis.indices)} for axis in c.axes],
            "quality": _quality(report, c.name),
            "several": report.zipped_within.get(c.name, 0),
            "basis": report.bases.get(c.name, ""),
            "similarities": shown[c.name],
        }
        for n, c in enumerate(movable)
    ]


def _quality(report: Report, name: str) -> dict[str, float]:
    """How alike the matched units of a class are in each space, on average over models."""
    values = defaultdict(list)
    for each in report.quality:
        for space, value in each.get(name, {}).items():
            values[space].append(value)
    return {space: sum(own) / len(own) for space, own in values.items()}


def _similarity(one: SampledSimilarity) -> dict[str, Any]:
    before, after = one.means
    return {
        "reference": one.reference,
        "model": one.model,
        "space": one.space,
        "size": one.size,
        "units": one.units.tolist(),
        "before": _bytes(one.before),
        "after": _bytes(one.after),
        "mean_before": before,
        "mean_after": after,
    }


def _bytes(matrix: Matrix) -> str:
    """A matrix of numbers from -1 to 1 as bytes in base64."""
    scaled = np.nan_to_num(matrix).clip(-1, 1) * SCALE
    return b64encode(scaled.round().astype(np.int8).tobytes()).decode()


# -------------------------------------------------------------------------- layers


def _layers(page: PageValues) -> list[dict[str, Any]]:
    """The layers, with what lies along every axis of their parameters, and how well they were fitted."""
    along = _along(page.symmetry)
    canonical = {alias: axis.parameter for axis in page.symmetry.layout for alias in axis.aliases}
    found = []
    for layer in page.layers:
        parameters = []
        for name in layer.parameters:
            shape, own = page.shapes[name], canonical.get(name, name)
            axes = [{"size": size, "parts": along.get((own, dim), [])} for dim, size in enumerate(shape)]
            parameters.append({"name": name, "axes": axes})
        fits = [page.report.layers[name] for name in layer.parameters if name in page.report.layers]
        left = [page.report.left[name] for name in layer.parameters if name in page.report.left]
        found.append(
            {
                "name": layer.name,
                "op": layer.op,
                "inputs": list(layer.inputs),
                "parameters": parameters,
                "fit": dict(fits[0]) if fits else None,
                "left": left[0] if left else "",
            }
        )
    return found


def _along(symmetry: Symmetry) -> dict[tuple[str, int], list[dict[str, Any]]]:
    """What lies along every axis of the models' parameters: units of classes, and indices that do not move."""
    found: dict[tuple[str, int], list[dict[str, Any]]] = defaultdict(list)
    for n, c in enumerate(symmetry.classes[: len(symmetry.units)]):
        for axis in c.axes:
            found[axis.parameter, axis.dim].append({"class": n, "count": len(axis.indices)})
    for axis_name, reasons in symmetry.stuck.items():
        for why, ids in reasons.items():
            found[axis_name].append({"why": why, "count": len(ids)})
    return found

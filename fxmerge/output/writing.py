"""Writes what a plan gave: the weights, and everything that tells how they were made."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import fx

import fxmerge
from fxmerge import io
from fxmerge.api import head
from fxmerge.errors import first_line
from fxmerge.interpolation import Interpolation
from fxmerge.io.writing import told
from fxmerge.networks import Network
from fxmerge.output import exported, library
from fxmerge.output.card import card, warnings_of
from fxmerge.pictures.content import finite
from fxmerge.pictures.page import page
from fxmerge.plan import to_yaml
from fxmerge.plan.running import Result, checksum
from fxmerge.recipe import Recipe
from fxmerge.reporting import made_with, report

SUMS = "SHA256SUMS"

HEADS = "heads"
"""The directory of the networks, each the trunk with a head of its own."""


@dataclass(frozen=True)
class Written:
    """What a directory holds.

    Attributes:
        loads: for every directory of a network, "." or "heads/NAME", the code that loads it.
        reasons: for every form that was not written, why.
    """

    loads: Mapping[str, str]
    reasons: Mapping[str, str]


def write(result: Result, place: Path, line: Interpolation | None = None) -> Written:
    """Writes a result into an empty directory.

    Arguments:
        result: what was done.
        place: the directory.
        line: networks between its models, for the page of the report.

    Raises:
        OutputError: if a file cannot be written.
    """
    own, made, plan = report(result.module), made_with(result.module), result.plan
    with told(place):
        weights = _Weights(result, place)
        if own.heads:
            weights.alone(result.module)
            for one in own.heads:
                network, module = result.networks[one["number"]], head(result.module, one["name"])
                weights.network(network, module, None, f"{HEADS}/{one['name']}")
        else:
            weights.network(result.networks[0], result.module, own.config, ".")
        (place / "symmetry.json").write_text(made.symmetry.to_json(), encoding="utf-8")
        if made.units is not None:
            (place / "units.json").write_text(made.units.to_json(), encoding="utf-8")
        recipe = plan.recipe if own.recipe is None else Recipe.from_dict(own.recipe)
        output = plan.output and replace(plan.output, path=str(Path(plan.output.path).absolute()))
        (place / "recipe.yaml").write_text(to_yaml(replace(plan, recipe=recipe, output=output)), encoding="utf-8")
        written = Written(weights.loads, weights.reasons)
        try:
            drawn = _page(result, written, line)
        except Exception as error:  # Weights that took hours are not lost for a picture.
            why = f"it cannot be drawn ({type(error).__name__}: {first_line(error)})"
            written = replace(written, reasons={**written.reasons, "report.html": why})
        else:
            (place / "report.html").write_text(drawn, encoding="utf-8")
        text = json.dumps(finite(_summary(result, written)), indent=2, default=str) + "\n"
        (place / "report.json").write_text(text, encoding="utf-8")
        (place / "README.md").write_text(card(result, own, written.loads, written.reasons), encoding="utf-8")
        files = sorted(path for path in place.rglob("*") if path.is_file())
        lines = [f"{checksum(path)}  {path.relative_to(place).as_posix()}\n" for path in files]
        (place / SUMS).write_text("".join(lines), encoding="utf-8")
    return written


class _Weights:
    """Writes networks into a directory, and tells how to load them."""

    def __init__(self, result: Result, place: Path) -> None:
        self.call, self.place = result.call, place
        self.size = None if result.plan.output is None else result.plan.output.bytes
        self.loads: dict[str, str] = {}
        self.reasons: dict[str, str] = {}

    def network(self, network: Network, module: fx.GraphModule, config: Mapping[str, int] | None, name: str) -> None:
        """A network as its library has it, or by itself."""
        place = self.place / name
        place.mkdir(parents=True, exist_ok=True)
        written = library.write(network, module, config, place, self.call, self.size)
        if written.loads:
            self.loads[name] = written.loads.replace("DIRECTORY", name)
            return
        if written.reason:
            what = "The network" if name == "." else name
            self.reasons[f"{what} as a directory of {network.arch.partition(':')[0]}"] = written.reason
        self.alone(module, name)

    def alone(self, module: fx.GraphModule, name: str = ".") -> None:
        """The weights of a network, and its archive, which needs no class."""
        io.save(module.state_dict(), self.place / name, shard_size=self.size)
        path = exported.NAME if name == "." else f"{name}/{exported.NAME}"
        reason = exported.write(module, self.call, self.place / name)
        if reason:
            self.reasons[path] = reason
        else:
            self.loads[name] = f"torch.export.load('{path}').module()"


def _summary(result: Result, written: Written) -> dict[str, Any]:
    models = [
        {
            "path": model.path,
            "arch": network.arch,
            "set": dict(network.settings),
            "notes": list(network.checkpoint.notes),
            "parameters": network.parameters,
        }
        for model, network in zip(result.plan.models, result.networks, strict=True)
    ]
    return {
        "fxmerge": fxmerge.__version__,
        "verb": result.plan.verb,
        "warnings": list(result.warnings),
        "parameters": result.parameters,
        "loads": dict(written.loads),
        "not_written": dict(written.reasons),
        "models": models,
        "data": [found.note for found in result.data],
        "report": report(result.module).to_dict(),
    }


def _page(result: Result, written: Written, line: Interpolation | None) -> str:
    """The page of the report, with the models called as their files are."""
    files = [*([] if result.plan.base is None else [result.plan.base]), *result.plan.models]
    names = [Path(file.path).name for file in files]
    names = [name if names.count(name) == 1 else str(Path(file.path)) for name, file in zip(names, files, strict=True)]
    facts = [("architecture", arch) for arch in dict.fromkeys(network.arch for network in result.networks)]
    facts += [("data", found.note) for found in result.data]
    facts += [("to load it" if name == "." else name, code) for name, code in written.loads.items()]
    facts.append(("fxmerge", fxmerge.__version__))
    title = " + ".join(Path(name).name for name in names[-len(result.plan.models) :])
    warnings = warnings_of(result, written.reasons)
    return page(result.module, title=title, models=names, warnings=warnings, facts=facts, line=line).to_html()

"""What the commands do, from what was typed to what is printed."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import click

import fxmerge
from fxmerge import calibration, io, sources
from fxmerge.cli.console import Found, say, show, show_json, table
from fxmerge.cli.options import PLANS
from fxmerge.errors import ArchitectureMismatchError, OptionError
from fxmerge.inspection import inspect
from fxmerge.interpolation import Interpolation
from fxmerge.io import Checkpoint
from fxmerge.networks import Network
from fxmerge.output import reading
from fxmerge.output.target import stages_of, target
from fxmerge.output.writing import write
from fxmerge.plan import Plan, from_yaml
from fxmerge.plan.checking import Check, check
from fxmerge.plan.estimate import Estimate
from fxmerge.plan.parts import Data, settings
from fxmerge.plan.running import Result, build_of, execute, opened, whole
from fxmerge.plan.wording import worded
from fxmerge.processes import Processes, launched
from fxmerge.progress import timed
from fxmerge.recipe import Align, Recipe
from fxmerge.reporting import Report
from fxmerge.symmetry.group import Symmetry

logger = logging.getLogger(__name__)

WRITTEN = "a result that is written"
"""Where all processes wait before the result is put into its place."""


def run(plan: Plan, context: click.Context) -> None:
    """Does what a plan says, and writes the result."""
    given = context.params
    if given["dry_run"]:
        show_check(check_plan(plan, allow_pickle=given["allow_pickle"]), as_json=given["json"])
        return
    if plan.output is None:
        raise click.UsageError("--out is missing: name the directory to write.", context)
    if given.get("line") is not None and not (len(plan.models) == 2 and len(plan.data) == 1):
        raise click.UsageError("--line goes between two models, on one --data: give these, or leave it out.", context)
    with launched(plan.run.device) as processes, processes.together():
        if processes.size > 1 and given["resume"]:
            raise OptionError("--resume is of one process, and this run has several: leave it out.")
        checkpoints = opened(plan, allow_pickle=given["allow_pickle"])
        if processes.rank:
            execute(plan, checkpoints, replace(plan.run, processes=processes, progress=False))
            processes.gather(WRITTEN, None)
        else:
            _written(plan, checkpoints, processes, context)


def _written(plan: Plan, checkpoints: Sequence[Checkpoint], processes: Processes, context: click.Context) -> None:
    """Does what a plan says, as the first of some processes, and writes the result."""
    given = context.params
    assert plan.output is not None
    read = [path for one in checkpoints for path in one.files]
    with target(plan.output.path, force=given["force"], inputs=read, resume=given["resume"]) as place:
        stages = stages_of(plan.output.path) if processes.size == 1 else None
        result = execute(plan, checkpoints, replace(plan.run, processes=processes, resume=stages))
        for network in result.networks:
            for note in network.checkpoint.notes:
                say(f"{network.checkpoint.path}: {note}", "dim")
        with timed(logger, {}, "writing"):
            written = write(result, place, line_of(result, given.get("line")))
        summary = reading.summary_of(place)
        processes.gather(WRITTEN, None)  # If another process has ended meanwhile, nothing is put into place.
    if given["json"]:
        show_json({"out": plan.output.path, **summary})
        return
    show(worded(str(Report(**summary["report"]))))
    for found in result.data:
        show(f"data: {found.note}")
    for what, why in written.reasons.items():
        say(f"warning: {what} was not written: {why}", "yellow")
    show(f"\n{plan.output.path} is written. README.md in it is the model card. To load it, from inside of it:")
    for code in written.loads.values():
        show(f"  {code}")


def line_of(result: Result, points: int | None) -> Interpolation | None:
    """Networks on the line between the two models of a result, if it was asked for and both have one architecture."""
    if points is None:
        return None
    (a, b), match = (network.model for network in result.networks), result.plan.recipe.match
    recipe = Recipe(match=match) if isinstance(match, Align) and not match.continuous else None
    try:
        return fxmerge.interpolate(a, b, result.data[0], recipe, points=points, run=result.plan.run)
    except ArchitectureMismatchError as error:
        say(f"warning: no networks on the line between the models were measured: {error}", "yellow")
        return None


# -------------------------------------------------------------------------- check


def check_files(
    models: Sequence[str],
    arch: str | None,
    given: Sequence[str],
    inputs: Sequence[str],
    *,
    allow_pickle: bool,
    as_json: bool,
) -> None:
    """Compares headers, and prints what was found."""
    if len(models) == 1 and models[0].endswith(PLANS):
        if arch is not None or given or inputs:
            raise OptionError(f"{models[0]} says what to check; write --arch, --set and --input into the file.")
        found = check_plan(from_yaml(models[0]), allow_pickle=allow_pickle)
    else:
        checkpoints = [io.load(path, allow_pickle=allow_pickle) for path in models]
        count = len(models)
        found = check(checkpoints, [arch] * count, [settings(given)] * count, inputs, rows=Data("data"))
    show_check(found, as_json=as_json)


def check_plan(plan: Plan, *, allow_pickle: bool) -> Check:
    return check(
        opened(plan, allow_pickle=allow_pickle),
        [plan.arch_of(file) for file in plan.files],
        [plan.settings_of(file) for file in plan.files],
        plan.input,
        [one.path for one in plan.data],
        rows=plan.data[0] if plan.data else None,
        device=plan.run.device,
        fitted=plan.verb != "align" and plan.base is None and plan.recipe.fit is not None,
    )


def show_check(found: Check, *, as_json: bool) -> None:
    """Prints a pre-flight.

    Raises:
        Found: if there are problems.
    """
    if as_json:
        show_json(found.to_dict())
    else:
        rows = [
            (
                file.path,
                f"{file.tensors}",
                f"{file.parameters:,}",
                _size(file.bytes),
                ", ".join(f"{count} {dtype}" for dtype, count in file.dtypes.items()),
            )
            for file in found.files
        ]
        table(("model", "tensors", "parameters", "size", "dtypes"), rows)
        for file in found.files:
            for note in file.notes:
                show(f"{file.path}: {note}")
        if len(found.files) > 1:
            show(f"{found.equal:.1%} of the parameters are in tensors that all have, with equal shapes.")
            if found.first_difference:
                show(f"They first differ here: {found.first_difference}")
        show(f"At least {_size(found.memory)} of memory are needed, and for activations what --memory allows.")
        if found.estimate is not None:
            show(_time(found.estimate))
        for problem in found.problems:
            say(f"problem: {problem}", "red")
    if found.problems:
        raise Found


def _time(found: Estimate) -> str:
    """An estimate of the time in words."""
    return (
        f"At least about {found.seconds:.2g} s on {found.rows} rows of data, by estimate: to run the networks and to "
        f"fit their layers takes {(found.passes + found.fits) / 1e9:.3g} GFLOP, and this machine does "
        f"{found.speed / 1e9:.3g} in a second. Reading, capture, the proof of the symmetry, matching and writing come "
        "on top."
    )


def _size(count: int) -> str:
    """Bytes as they are written for people."""
    size, unit = float(count), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if size >= 1024:
            size, unit = size / 1024, larger
    return f"{size:.4g} {unit}"


# -------------------------------------------------------------------------- of results


def compare_results(
    results: Sequence[str], data: str, rows: Mapping[str, int], *, allow_pickle: bool, as_json: bool
) -> None:
    """Prints how near results and models are to the ensemble."""
    plans = {path: reading.plan_of(Path(path)) for path in results}
    plan = plans[results[0]]
    networks = _networks(plan, allow_pickle)
    loader = calibration.read(data, networks[0], **rows, seed=plan.run.seed)
    found = {Path(path).name: reading.network_of(Path(path), own) for path, own in plans.items()}
    models = [network.model for network in networks]
    share = plan.recipe.share if isinstance(plan.recipe.share, str | float) else "auto"
    compared = fxmerge.compare(found, models, loader, share=share, run=plan.run)
    if as_json:
        show_json([{"network": row.name, "distance": row.distance, "error": row.error} for row in compared.rows])
    else:
        show(compared)
        show(f"\nThe nearest to the ensemble is {compared.best()}.")


def _networks(plan: Plan, allow_pickle: bool) -> list[Network]:
    """The models of a plan."""
    return [build_of(plan, file, io.load(file.path, allow_pickle=allow_pickle)) for file in plan.models]


def verify_result(result: str, *, symmetry: bool, allow_pickle: bool, as_json: bool) -> None:
    """Prints what is wrong with a directory.

    Raises:
        Found: if anything is.
    """
    directory = Path(result)
    plan = reading.plan_of(directory)
    problems, error = reading.problems_of(directory, plan), None
    if symmetry and not problems:
        networks = _networks(plan, allow_pickle)
        apart = reading.summary_of(directory)["report"]["heads"]
        model, (args, kwargs) = whole(plan, networks, apart=bool(apart))
        proven = Symmetry.from_json(directory / "symmetry.json").verify(model, args, kwargs)
        error = proven.error
        problems += [f"Class {name!r} of symmetry.json failed verification." for name in proven.demoted]
    if as_json:
        show_json({"problems": problems, "verification_error": error})
    else:
        for problem in problems:
            say(f"problem: {problem}", "red")
        if error is not None:
            show(f"Elements of the symmetry change outputs by {error:.0e} at most, in float64.")
        if not problems:
            show(f"{result} is whole, and its inputs are unchanged where they are still there.")
    if problems:
        raise Found


def report_result(result: str, *, as_json: bool) -> None:
    """Prints how a result was made."""
    directory = Path(result)
    reading.plan_of(directory)
    found = reading.summary_of(directory)
    if as_json:
        show_json(found)
        return
    for text in found["warnings"]:
        show(f"warning: {text}")
    for what, why in found.get("not_written", {}).items():
        show(f"warning: {what} was not written: {why}")
    show(worded(str(Report(**found["report"]))))
    for name, code in found["loads"].items():
        show(f"{name}: {code}")


# -------------------------------------------------------------------------- inspect


def inspect_architecture(
    model: str,
    inputs: Sequence[str],
    config: Sequence[str],
    device: str | None,
    pin: Sequence[str],
    free: Sequence[str],
    *,
    verify: bool,
    chains: bool,
    file: Path | None,
) -> None:
    """Prints the symmetry of an architecture."""
    source = sources.load(model, inputs, settings(config), device)
    if verify and any(p.is_meta for p in source.model.parameters()):
        raise OptionError("A model on the meta device has no values to verify; make it smaller with --config.")
    found = inspect(source.model, source.args, source.kwargs, pin=pin, free=free, verify=verify)
    show(found)
    if chains:
        show("\n".join(["", *map(str, found.chains)]))
    if file is not None:
        try:
            found.symmetry.to_json(file)
        except OSError as error:
            raise OptionError(f"The spec cannot be written: {error}") from error

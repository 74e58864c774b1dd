"""The options that commands share, and the plan that they make."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

if TYPE_CHECKING:
    from fxmerge.plan import Plan
    from fxmerge.recipe import Recipe

PLANS = (".yaml", ".yml")

WITH_A_PLAN = {
    "models",
    "out",
    "shard_size",
    "device",
    "memory",
    "seed",
    "force",
    "resume",
    "allow_pickle",
    "dry_run",
    "line",
    "json",
    "verbose",
}
"""The options that may stand beside a YAML file, which says the rest."""

Command = Callable[..., Any]


def chain(*options: Callable[[Command], Command]) -> Callable[[Command], Command]:
    """Several options as one decorator, shown in this order."""

    def add(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return add


def verbose(command: Command) -> Command:
    """-v, which `fxmerge.cli.console` reads from the arguments."""
    return click.option("-v", "--verbose", is_flag=True, expose_value=False, help="log every stage")(command)


architecture = chain(
    click.option("--arch", metavar="ARCH", help="timm:NAME, torchvision:NAME, hf or package.module:factory"),
    click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="argument of the architecture"),
    click.option("--input", "inputs", multiple=True, metavar="SHAPE", help="shape of the inputs: 1x3x224x224"),
)

rows = chain(
    click.option("--samples", type=click.IntRange(1), metavar="N", default=1024, help="rows of data at most (1024)"),
    click.option("--batch", type=click.IntRange(1), metavar="N", default=32, help="rows in a batch at most (32)"),
    click.option(
        "--length", type=click.IntRange(1), metavar="N", default=128, help="tokens in a row of text at most (128)"
    ),
)

calibration = chain(
    click.option("--data", multiple=True, metavar="PATH", help="images/, .npz, .npy, .txt, .jsonl or module:loader"),
    rows,
)

running = chain(
    click.option("--device", metavar="DEVICE", help="where to compute, such as cuda:0"),
    click.option("--memory", type=float, metavar="X", default=2.0, help="GiB of activations to keep in memory (2)"),
    click.option("--seed", type=click.IntRange(0), metavar="N", default=0, help="seed of all random choices (0)"),
)

writing = chain(
    click.option("--out", type=click.Path(path_type=Path), metavar="DIR", help="the directory to write"),
    click.option("--shard-size", metavar="SIZE", help="bytes in a file of weights at most: 5GB"),
    click.option("--force", is_flag=True, help="replace a directory that fxmerge wrote"),
    click.option("--resume", is_flag=True, help="go on after the last finished stage of an interrupted run"),
)

allow_pickle = click.option("--allow-pickle", is_flag=True, help="unpickle files of torch, which can run code in them")

safety = chain(
    allow_pickle,
    click.option("--dry-run", is_flag=True, help="check the headers of all files, and stop"),
)

as_json = click.option("--json", is_flag=True, help="print JSON for machines")

models = click.argument("models", nargs=-1, required=True, metavar="MODEL...")

planned = chain(writing, running, safety, as_json, verbose)
"""What all commands have that do what a plan says."""


def recipe(what: str) -> Callable[[Command], Command]:
    """--recipe, which says how to do something."""
    text = f"a YAML file that says how to {what}"
    return click.option("--recipe", type=click.Path(path_type=Path), metavar="FILE", help=text)


def width(text: str) -> Callable[[Command], Command]:
    """--width, with what it is."""
    return click.option("--width", multiple=True, metavar="X", help=text + ", or CLASS=X for the classes that it fits")


def plan_of(verb: str, context: click.Context) -> Plan:
    """The plan that a command line makes, or that of its YAML file.

    Raises:
        click.UsageError: if something is missing, or does not go together.
        OptionError: if a value is out of range.
    """
    from fxmerge.plan import Data, ModelFile, Output, Plan
    from fxmerge.plan.parts import settings
    from fxmerge.recipe import Run

    given = context.params
    if any(path.endswith(PLANS) for path in given["models"]):
        return _of_file(verb, context)
    own = [settings(given.get(key) or ()) for key in ("settings_a", "settings_b")]
    files = [ModelFile(path, set=own[i] if i < 2 else {}) for i, path in enumerate(given["models"])]
    base = given.get("base")
    rows = {name: given[name] for name in ("samples", "batch", "length")}
    return Plan(
        tuple(files),
        given["arch"],
        verb,  # type: ignore[arg-type]
        settings(given["settings"]),
        given["inputs"],
        None if base is None else ModelFile(base),
        tuple(Data(path, **rows) for path in given["data"]),
        _recipe(given),
        Run(device=given["device"], memory=given["memory"], seed=given["seed"]),
        None if given["out"] is None else Output(str(given["out"]), given["shard_size"]),
    )


def _of_file(verb: str, context: click.Context) -> Plan:
    from dataclasses import replace

    from fxmerge.plan import Output, from_yaml

    given = context.params
    (path, *more) = given["models"]
    typed = [name for name in given if context.get_parameter_source(name) == ParameterSource.COMMANDLINE]
    other = [name for name in typed if name not in WITH_A_PLAN]
    if more or other:
        options = {p.name: p.opts[0] for p in context.command.params if p.name}
        what = f"{options[other[0]]} does" if other else "another model does"
        raise click.UsageError(f"{path} says what to do, and {what} not go with it; write it into the file.", context)
    plan = from_yaml(path)
    if plan.verb != verb:
        raise click.UsageError(f"{path} says {plan.verb}: run fxmerge {plan.verb} {path}.", context)
    run = {name: given[name] for name in ("device", "memory", "seed") if name in typed}
    output = plan.output
    if given["out"] is not None:
        output = Output(str(given["out"]), None if output is None else output.shard_size)
    if given["shard_size"] is not None and output is not None:
        output = replace(output, shard_size=given["shard_size"])
    return replace(plan, run=replace(plan.run, **run), output=output)


def _recipe(given: dict[str, Any]) -> Recipe:
    """The recipe of a file, with what options say of it."""
    from dataclasses import replace

    from fxmerge.plan import recipe_from_yaml
    from fxmerge.recipe import AUTO, Recipe, Zip

    recipe = Recipe() if given["recipe"] is None else recipe_from_yaml(given["recipe"])
    share, names, width = (given.get(name) for name in ("share", "name", "width"))
    if share is not None:
        recipe = replace(recipe, share=float(share) if _is_number(share) else share)
    if names:
        recipe = replace(recipe, names=tuple(names))
    if width:
        match = Zip() if recipe.match == AUTO else recipe.match
        if not isinstance(match, Zip):
            raise click.UsageError("--width is of Zip, and the recipe matches in another way.")
        recipe = replace(recipe, match=replace(match, width=_width(width)))
    return recipe


def _width(given: Sequence[str]) -> float | dict[str, float]:
    """A width for all classes, or one for each that is named: a share, or a whole number of units."""
    named = {name: x for name, sign, x in (text.rpartition("=") for text in given) if sign}
    numbers = list(named.values()) or list(given)
    if len(named) not in (0, len(given)) or (not named and len(given) > 1) or not all(map(_is_number, numbers)):
        raise click.UsageError("--width is a number, or CLASS=NUMBER for each class: --width 'mlp.up.weight[0]=0.5'.")
    return {name: int(x) if x.isdecimal() else float(x) for name, x in named.items()} if named else float(given[0])


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True

"""The commands. Each imports what it needs when it runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

import fxmerge
from fxmerge.cli import options
from fxmerge.cli.console import CODES, show, show_json

ARCHITECTURES = ("cnn", "vit")
"""Those of the demo."""

SETTINGS = {"max_content_width": 100, "help_option_names": ["-h", "--help"]}


class Listed(click.Group):
    """Lists its commands in the order in which they are needed."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)


EXIT_CODES = "Exit codes: " + "; ".join(f"{code} {meaning}" for code, meaning in CODES.items()) + "."


@click.group(cls=Listed, context_settings=SETTINGS, epilog=EXIT_CODES)
@click.version_option(fxmerge.__version__, prog_name="fxmerge", message="%(prog)s %(version)s")
def app() -> None:
    """Merge independently trained networks without training, from files to files.

    \b
    fxmerge merge a.safetensors b.safetensors --arch timm:resnet18 --data images/ --out merged/
    """


def _run(verb: str, context: click.Context) -> None:
    from fxmerge.cli.doing import run

    run(options.plan_of(verb, context), context)


@app.command()
@options.models
@options.architecture
@click.option("--set-a", "settings_a", multiple=True, metavar="KEY=VALUE", help="argument for the first model alone")
@click.option("--set-b", "settings_b", multiple=True, metavar="KEY=VALUE", help="argument for the second model alone")
@options.calibration
@options.recipe("merge")
@click.option("--share", metavar="WHERE", help="where heads begin: trunk, nothing, a layer, or a share: 0.8")
@click.option("--name", multiple=True, metavar="NAME", help="name of a head, one for each model")
@options.width("units, as a multiple of those of one model")
@click.option("--base", metavar="PATH", help="for task vectors: what all models were fine-tuned from")
@click.option("--line", type=click.IntRange(2), metavar="N", help="measure N networks between the two, for report.html")
@options.planned
@click.pass_context
def merge(context: click.Context, /, **_: Any) -> None:
    """Merge two or more models into one network.

    Or run what a YAML file says: fxmerge merge recipe.yaml

    \b
    fxmerge merge a.pt b.pt --arch timm:resnet18 --data images/ --out merged/
    """
    _run("merge", context)


@app.command()
@options.models
@options.architecture
@options.calibration
@options.recipe("match")
@options.planned
@click.pass_context
def align(context: click.Context, /, **_: Any) -> None:
    """Give the first model the units of the second. Its function stays the same.

    \b
    fxmerge align b.pt a.pt --arch timm:resnet18 --data images/ --out aligned/
    """
    _run("align", context)


@app.command()
@options.models
@options.architecture
@options.calibration
@options.recipe("fold")
@options.width("the share of units to keep (0.7)")
@options.planned
@click.pass_context
def fold(context: click.Context, /, **_: Any) -> None:
    """Make one model smaller: units that are alike become one.

    \b
    fxmerge fold model.pt --arch timm:resnet18 --width 0.7 --data images/ --out small/
    """
    _run("fold", context)


@app.command()
@options.models
@options.architecture
@options.allow_pickle
@options.as_json
@options.verbose
def check(
    models: tuple[str, ...],
    arch: str | None,
    settings: tuple[str, ...],
    inputs: tuple[str, ...],
    allow_pickle: bool,
    json: bool,
) -> None:
    """See whether files go together, from their headers alone.

    A YAML file may stand in place of the models.

    \b
    fxmerge check a.safetensors b.safetensors --arch timm:resnet18
    """
    from fxmerge.cli.doing import check_files

    check_files(models, arch, settings, inputs, allow_pickle=allow_pickle, as_json=json)


@app.command()
@click.argument("results", nargs=-1, required=True, metavar="DIR...")
@click.option("--data", required=True, metavar="PATH", help="data that nothing was fitted to, as for merge")
@options.rows
@options.allow_pickle
@options.as_json
@options.verbose
def compare(
    results: tuple[str, ...], data: str, samples: int, batch: int, length: int, allow_pickle: bool, json: bool
) -> None:
    """See whether results are nearer to the ensemble of their models than each model alone.

    The models are those of the first directory's recipe.yaml.

    \b
    fxmerge compare merged/ wider/ --data held-out/
    """
    from fxmerge.cli.doing import compare_results

    rows = {"samples": samples, "batch": batch, "length": length}
    compare_results(results, data, rows, allow_pickle=allow_pickle, as_json=json)


@app.command()
@click.argument("model")
@click.option("--input", "inputs", multiple=True, metavar="SHAPE", help="1x3x224x224, or 2x16:int64; one per input")
@click.option("--config", multiple=True, metavar="KEY=VALUE", help="entry of the configuration, or argument")
@click.option("--device", help="where to build the model; meta needs no memory for its weights")
@click.option("--pin", multiple=True, metavar="NAME", help="parameters that must not move: layer.weight[0], layer.*")
@click.option("--free", multiple=True, metavar="OUTPUT", help="outputs along which units may move: output, output[0]")
@click.option("--verify", is_flag=True, help="prove the symmetry on the model, in float64")
@click.option("--chains", is_flag=True, help="for every pinned axis, show the ops that pinned it")
@click.option("--json", "file", type=click.Path(path_type=Path), metavar="FILE", help="write the symmetry to this file")
@options.verbose
def inspect(
    model: str,
    inputs: tuple[str, ...],
    config: tuple[str, ...],
    device: str | None,
    pin: tuple[str, ...],
    free: tuple[str, ...],
    verify: bool,
    chains: bool,
    file: Path | None,
) -> None:
    """Show which units of an architecture may move, and what holds the rest.

    MODEL is package.module:factory, timm:NAME, torchvision:NAME or hf:TYPE. It has random weights.

    \b
    fxmerge inspect torchvision:resnet18 --device meta
    """
    from fxmerge.cli.doing import inspect_architecture

    inspect_architecture(model, inputs, config, device, pin, free, verify=verify, chains=chains, file=file)


@app.command()
@click.argument("result", metavar="DIR")
@click.option("--symmetry", is_flag=True, help="also prove symmetry.json on the models, in float64")
@options.allow_pickle
@options.as_json
@options.verbose
def verify(result: str, symmetry: bool, allow_pickle: bool, json: bool) -> None:
    """See whether a directory that fxmerge wrote is whole, and its inputs are unchanged.

    \b
    fxmerge verify merged/ --symmetry
    """
    from fxmerge.cli.doing import verify_result

    verify_result(result, symmetry=symmetry, allow_pickle=allow_pickle, as_json=json)


@app.command()
@click.argument("result", metavar="DIR")
@options.as_json
@options.verbose
def report(result: str, json: bool) -> None:
    """Show how a result was made, warnings first.

    \b
    fxmerge report merged/
    """
    from fxmerge.cli.doing import report_result

    report_result(result, as_json=json)


@app.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
@click.option("--schema", is_flag=True, help="print the JSON schema of YAML files, for editors")
@click.option("--from", "command", is_flag=True, help="print the YAML file for the command that follows")
@click.argument("words", nargs=-1, type=click.UNPROCESSED, metavar="[COMMAND...]")
@click.pass_context
def recipe(context: click.Context, /, schema: bool, command: bool, words: tuple[str, ...]) -> None:
    """Print the YAML file for a command line, or the schema of such files.

    \b
    fxmerge recipe --from merge a.pt b.pt --arch hf --data corpus.txt > recipe.yaml
    """
    verbs = {"merge": merge, "align": align, "fold": fold}
    if schema:
        from fxmerge.plan.schema import schema as made

        show_json(made())
        return
    if not command or not words or words[0] not in verbs:
        raise click.UsageError(f"write --schema, or --from and a command line of {', '.join(verbs)}.", context)
    from fxmerge.plan import to_yaml

    verb, *rest = words
    with verbs[verb].make_context(verb, rest, parent=context) as own:
        show(to_yaml(options.plan_of(verb, own)).rstrip())


@app.command()
@click.option("--arch", type=click.Choice(ARCHITECTURES), default="cnn", help="the architecture (cnn)")
@click.option(
    "--seed", type=click.IntRange(0, 2**31 - 1), metavar="N", default=0, help="seed of everything that is random (0)"
)
@options.verbose
def demo(arch: Any, seed: int) -> None:
    """Train two networks on different digits, merge them into one trunk with two heads, and compare.

    \b
    fxmerge demo --arch vit
    """
    from fxmerge import demo as demonstration

    show(demonstration.run(arch, seed))

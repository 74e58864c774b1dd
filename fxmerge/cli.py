"""The command line: `fxmerge demo` and `fxmerge inspect`. The only place of the package that prints."""

from __future__ import annotations

import argparse
import ast
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import fxmerge
from fxmerge import demo, sources
from fxmerge.errors import FxmergeError, OptionError
from fxmerge.inspection import inspect


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command.

    Arguments:
        argv: the arguments; those of the process if None.

    Returns:
        The exit code: 0, or 1 after an error that was told in a sentence. Wrong arguments exit with 2.
    """
    options = _parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO if options.verbose else logging.WARNING, format="%(levelname)s: %(message)s")
    try:
        options.run(options)
    except FxmergeError as error:
        print(f"fxmerge: {error}", file=sys.stderr)
        return 1
    return 0


def _demo(options: argparse.Namespace) -> None:
    print(demo.run(options.arch, options.seed))


def _inspect(options: argparse.Namespace) -> None:
    source = sources.load(options.model, options.input, dict(options.config), options.device)
    if options.verify and any(p.is_meta for p in source.model.parameters()):
        raise OptionError("A model on the meta device has no values to verify; make it smaller with --config.")
    found = inspect(source.model, source.args, source.kwargs, pin=options.pin, free=options.free, verify=options.verify)
    print(found)
    if options.chains:
        print("", *found.chains, sep="\n")
    if options.json is not None:
        try:
            found.symmetry.to_json(options.json)
        except OSError as error:
            raise OptionError(f"The spec cannot be written: {error}") from error


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fxmerge", description=fxmerge.__doc__)
    parser.add_argument("--version", action="version", version=f"fxmerge {fxmerge.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    command = commands.add_parser(
        "demo",
        help="train two networks on different digits, merge them into one trunk with two heads, and compare",
        description="Trains two networks from different initialisations on the digits 0-4 and 5-9, merges them into "
        "one trunk with two heads, and compares that with its parents and with other methods. Takes about a minute.",
    )
    command.add_argument(
        "--arch", choices=sorted(demo.TRAININGS), default="cnn", help="the architecture (default: cnn)"
    )
    command.add_argument("--seed", type=_seed, default=0, help="seed of everything that is random (default: 0)")
    command.set_defaults(run=_demo)
    _verbose(command)
    command = commands.add_parser(
        "inspect",
        help="show which permutations leave a model unchanged, and what holds the rest",
        description="Infers the permutation symmetry of a model with random weights: its classes, what is pinned and "
        "by which op, and how much of the model may move.",
    )
    command.add_argument("model", help="package.module:factory, timm:NAME, torchvision:NAME or hf:TYPE")
    command.add_argument(
        "--input",
        nargs="+",
        default=[],
        metavar="SHAPE",
        help="shapes of the inputs: 1x3x224x224, or 2x16:int64 (default: what the library says)",
    )
    command.add_argument(
        "--config",
        nargs="+",
        type=_setting,
        default=[],
        metavar="KEY=VALUE",
        help="entries of the model's configuration, or arguments of the factory",
    )
    command.add_argument("--device", help="where to build the model; meta needs no memory for its weights")
    command.add_argument(
        "--pin", nargs="+", default=[], metavar="NAME", help="parameters that must not move: layer.weight[0], layer.*"
    )
    command.add_argument(
        "--free", nargs="+", default=[], metavar="OUTPUT", help="outputs along which units may move: output, output[0]"
    )
    command.add_argument("--verify", action="store_true", help="prove the symmetry on the model, in float64")
    command.add_argument("--chains", action="store_true", help="for every pinned axis, show the ops that pinned it")
    command.add_argument("--json", type=Path, metavar="FILE", help="write the symmetry to this file")
    command.set_defaults(run=_inspect)
    _verbose(command)
    return parser


def _verbose(command: argparse.ArgumentParser) -> None:
    command.add_argument("-v", "--verbose", action="store_true", help="log what happens to stderr")


def _seed(text: str) -> int:
    if not text.isdecimal() or int(text) >= 2**31:
        raise argparse.ArgumentTypeError(f"a seed is a whole number from 0 to {2**31 - 1}, not {text!r}")
    return int(text)


def _setting(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not key or not equals:
        raise argparse.ArgumentTypeError(f"write key=value, not {text!r}")
    try:
        return key, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return key, value


if __name__ == "__main__":
    sys.exit(main())

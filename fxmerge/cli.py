"""The command line: `fxmerge demo`. The only place of the package that prints."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence

import fxmerge
from fxmerge import demo
from fxmerge.errors import FxmergeError


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
        print(demo.run(options.arch, options.seed))
    except FxmergeError as error:
        print(f"fxmerge: {error}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fxmerge", description=fxmerge.__doc__)
    parser.add_argument("--version", action="version", version=f"fxmerge {fxmerge.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    command = commands.add_parser(
        "demo",
        help="train two networks on different digits, merge them, and compare",
        description="Trains two networks from different initialisations on the digits 0-4 and 5-9, merges them, and "
        "compares the result with its parents, their ensemble and their plain average. Takes about a minute.",
    )
    command.add_argument("--arch", choices=sorted(demo.RECIPES), default="cnn", help="the architecture (default: cnn)")
    command.add_argument("--seed", type=_seed, default=0, help="seed of everything that is random (default: 0)")
    command.add_argument("-v", "--verbose", action="store_true", help="log what happens to stderr")
    return parser


def _seed(text: str) -> int:
    if not text.isdecimal() or int(text) >= 2**31:
        raise argparse.ArgumentTypeError(f"a seed is a whole number from 0 to {2**31 - 1}, not {text!r}")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())

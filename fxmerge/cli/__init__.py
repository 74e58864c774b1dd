"""The command line. The only place of the package that prints; torch is imported by the commands that need it."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from fxmerge.cli.console import reporting_errors

MISSING = "fxmerge: the command line needs click, rich and PyYAML: pip install 'fxmerge[cli]'"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command.

    Arguments:
        argv: the arguments; those of the process if None.

    Returns:
        The exit code: see `fxmerge.cli.console.CODES`.
    """
    given = list(sys.argv[1:] if argv is None else argv)
    try:
        from fxmerge.cli.app import app
    except ImportError as error:
        if error.name not in ("click", "rich", "yaml"):
            raise
        print(MISSING, file=sys.stderr)
        return 1
    return reporting_errors(lambda: app.main(given, prog_name="fxmerge", standalone_mode=False), given)

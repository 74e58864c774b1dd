"""What the command line prints: errors as sentences, warnings, tables; and its exit codes."""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn

from fxmerge.errors import CheckpointError, FxmergeError, OutputError, ProcessError, first_line

CODES = {
    0: "done",
    1: "an error of models, data, recipe or options, told in a sentence",
    2: "a command line that cannot be understood",
    3: "a file of weights that cannot be read, or does not fit",
    4: "a result that cannot be written",
    5: "check or verify found something wrong",
    6: "another process of the run has failed or ended",
    70: "a fault of fxmerge",
    130: "interrupted",
    141: "the reader of the output has gone",
}
"""The exit codes and what they mean."""

OF_ERRORS = {CheckpointError: 3, OutputError: 4, ProcessError: 6}
"""The exit codes of some kinds of errors; that of the others is 1."""

PATIENCE = 2.0
"""How many seconds a stage takes before it is told of on a terminal."""

WRONG, FAULT, INTERRUPTED, UNREAD = 5, 70, 130, 141


class Found(Exception):
    """Something was found wrong and has been told."""


def reporting_errors(run: Callable[[], Any], argv: Sequence[str]) -> int:
    """Runs a command; tells its errors in sentences, and gives the exit code.

    With --json among the arguments, an error is a JSON document on the standard output.
    """
    import click

    output = sys.stdout
    verbose, as_json = bool({"-v", "--verbose"} & set(argv)), "--json" in argv and argv[0] != "inspect"
    try:
        with _stopped(), _logging(verbose, argv):
            run()
            sys.stdout.flush()
    except click.exceptions.Abort:
        return _told("interrupted.", INTERRUPTED, as_json)
    except (KeyboardInterrupt, _Terminated):
        return _told("interrupted; nothing was written.", INTERRUPTED, as_json)
    except click.ClickException as error:
        context = getattr(error, "ctx", None)
        hint = f" See: {context.command_path} --help" if context is not None else ""
        return _told(f"{error.format_message()}{hint}", 2, as_json)
    except click.exceptions.Exit as error:
        return error.exit_code
    except Found:
        return WRONG
    except FxmergeError as error:
        code = next((code for kind, code in OF_ERRORS.items() if isinstance(error, kind)), 1)
        return _told(_worded(str(error), argv), code, as_json)
    except BrokenPipeError:
        return _unread()
    except SystemExit:
        if sys.stdout is output:
            raise
        return _unread()  # click has seen it, and put something else in place of the output.
    except Exception as error:
        if verbose:
            traceback.print_exc()
        hint = "-v shows where. Please report it with the command"
        return _told(
            f"an error that fxmerge does not know, {type(error).__name__}: {first_line(error)}. {hint}.", FAULT, as_json
        )
    return 0


def _worded(text: str, argv: Sequence[str]) -> str:
    """A message of fxmerge in the words of what was typed: of options, or of a YAML file."""
    from fxmerge.cli.options import PLANS
    from fxmerge.plan.wording import worded

    return worded(text, yaml=any(word.endswith(PLANS) for word in argv), typed=argv)


def _told(sentence: str, code: int, as_json: bool) -> int:
    if as_json:
        print(json.dumps({"error": sentence, "code": code}))
    else:
        say(f"fxmerge: {sentence}", "red")
    return code


def _unread() -> int:
    """Drops what is yet to be printed, which no one reads."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.__stdout__.fileno())  # type: ignore[union-attr]
    return UNREAD


class _Terminated(BaseException):
    """The process was asked to end."""


@contextmanager
def _stopped() -> Iterator[None]:
    """Turns the signal by which a process is asked to end into an exception, so that temporary files are removed."""

    def stop(number: int, frame: FrameType | None) -> NoReturn:
        raise _Terminated

    try:
        before = signal.signal(signal.SIGTERM, stop)
    except ValueError:  # Not in the main thread.
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _logging(verbose: bool, argv: Sequence[str]) -> Iterator[None]:
    """Shows what fxmerge logs on the standard error: warnings, with -v all of its stages, and on a terminal those that
    take long."""

    stages = _Stages()

    class Shown(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            warning = record.levelno >= logging.WARNING
            if warning or verbose:
                text = _worded(record.getMessage(), argv)
                say(f"warning: {text}" if warning else text, "yellow" if warning else "dim")
            else:
                stages.take(record)

    own, handler = logging.getLogger("fxmerge"), Shown()
    level = own.level
    own.addHandler(handler)
    own.setLevel(logging.INFO if verbose or sys.stderr.isatty() else logging.WARNING)
    try:
        with warnings.catch_warnings():
            if not verbose and not sys.warnoptions:
                warnings.simplefilter("ignore")  # Those of torch and others are of no use here.
            yield
    finally:
        stages.stop()
        own.removeHandler(handler)
        own.setLevel(level)


class _Stages:
    """Tells of every stage that has not ended after some seconds, and of its end."""

    def __init__(self) -> None:
        self.waiting: dict[str, threading.Timer] = {}
        self.told: set[str] = set()

    def take(self, record: logging.LogRecord) -> None:
        """Takes what is logged when a stage begins and when it ends."""
        from fxmerge.progress import BEGUN, DONE

        if record.msg not in (BEGUN, DONE) or not isinstance(record.args, tuple):
            return
        stage = str(record.args[0])
        if record.msg == BEGUN:
            timer = threading.Timer(PATIENCE, self._tell, [stage, record.getMessage()])
            timer.daemon = True
            self.waiting[stage] = timer
            timer.start()
        elif stage in self.waiting:
            self.waiting.pop(stage).cancel()
            if stage in self.told:
                self.told.remove(stage)
                self._tell("", record.getMessage())

    def _tell(self, stage: str, text: str) -> None:
        from tqdm import tqdm

        self.told.add(stage)
        with tqdm.external_write_mode(file=sys.stderr):  # A bar would be in the way.
            say(text, "dim")

    def stop(self) -> None:
        """No stage is told of any more."""
        for timer in self.waiting.values():
            timer.cancel()


def say(text: str, style: str = "") -> None:
    """Prints a line to the standard error."""
    from rich.console import Console

    Console(stderr=True, highlight=False, emoji=False, soft_wrap=True).print(text, style=style, markup=False)


def show(text: object) -> None:
    """Prints text to the standard output, as it is."""
    print(text)


def show_json(value: Any) -> None:
    """Prints a JSON document to the standard output."""
    print(json.dumps(value, indent=2, default=str))


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Prints a table to the standard output; on a terminal within its width, else as wide as it is."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    found = Table(box=box.SIMPLE, pad_edge=False)
    for name in head:
        found.add_column(name, overflow="fold")
    for row in rows:
        found.add_row(*(_escaped(cell) for cell in row))
    console = Console(highlight=False, emoji=False)
    console.print(found, width=None if console.is_terminal else 1000)


def _escaped(text: str) -> str:
    from rich.markup import escape

    return escape(text)

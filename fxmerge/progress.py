"""What is logged of long work: its progress, for who sees no progress bar, and what was warned of; and its memory."""

from __future__ import annotations

import ctypes
import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

SECONDS = 10.0
"""How long nothing is logged at most, of work that tells how far it is."""


BEGUN, DONE = "%s ...", "%s: %.1f s"
"""What is logged when a stage begins, and when it ends."""


class Ticker:
    """Logs how far some work is, every few seconds.

    Arguments:
        logger: where to log it, as INFO.
        text: what to log, with the place of the numbers that are given to `tick`.
    """

    def __init__(self, logger: logging.Logger, text: str) -> None:
        self.logger, self.text, self.last = logger, text, time.monotonic()

    def tick(self, *numbers: object) -> None:
        """Logs the numbers, if the last time is long enough ago."""
        now = time.monotonic()
        if now - self.last >= SECONDS:
            self.last = now
            self.logger.info(self.text, *numbers)


@contextmanager
def timed(logger: logging.Logger, seconds: dict[str, float], stage: str) -> Iterator[None]:
    """Adds the seconds spent inside to the entry of a stage, and logs when it begins and ends."""
    logger.info(BEGUN, stage)
    began = time.perf_counter()
    yield
    release_memory()
    spent = time.perf_counter() - began
    seconds[stage] = seconds.get(stage, 0.0) + spent
    logger.info(DONE, stage, spent)


@contextmanager
def warnings_logged() -> Iterator[list[logging.LogRecord]]:
    """Collects the warnings that fxmerge logs."""
    found: list[logging.LogRecord] = []

    class Collector(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            found.append(record)

    handler, root = Collector(logging.WARNING), logging.getLogger("fxmerge")
    root.addHandler(handler)
    try:
        yield found
    finally:
        root.removeHandler(handler)


def release_memory() -> None:
    """Gives memory back to the system that was freed: the allocator of Linux keeps what lies between tensors in use."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def peak_memory() -> int | None:
    """Bytes of memory that this process had in use at most so far; None where the system does not tell."""
    try:
        import resource
    except ImportError:  # Not on Windows.
        return None
    found = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return found if sys.platform == "darwin" else 1024 * found

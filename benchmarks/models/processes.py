"""Runs a function on many models, each in a process of its own, with limits of time and memory."""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import sys
import tempfile
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any, Protocol

import torch
from invariance import machine

Row = dict[str, Any]

POLL_SECONDS = 0.05
CONTEXT = multiprocessing.get_context("forkserver")
"""Processes are forked from one in which torch is imported already."""


class Note(Protocol):
    """Tells the stage that begins, and what the stage before it found."""

    def __call__(self, stage: str, **found: Any) -> None: ...


class Work(Protocol):
    """What runs in a process: it notes what it finds in the task's row, and "done" as its last stage."""

    def __call__(self, task: Row, note: Note) -> None: ...


def _enter(work: Work, task: Row, path: Path, log: Path) -> None:
    """Runs one task. The row is written after every stage, so that what was found outlives a killed process."""
    with log.open("wb") as out:
        os.dup2(out.fileno(), sys.stdout.fileno())
        os.dup2(out.fileno(), sys.stderr.fileno())
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    row: Row = {**task, "machine": machine(), "stage": "construct"}

    def note(stage: str, **found: Any) -> None:
        row.update(found, stage=stage, peak_mib=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
        path.write_text(json.dumps(row))

    try:
        work(task, note)
    except Exception as error:
        note(row["stage"], failure=f"{type(error).__name__}: {' '.join(str(error).split())}"[:2000])


@dataclass
class Worker:
    """A process that runs one task, and where it writes the task's row."""

    task: Row
    process: ForkServerProcess
    path: Path
    log: Path
    began: float
    peak: int = 0

    @classmethod
    def start(cls, work: Work, task: Row, folder: Path, number: int) -> Worker:
        path, log = folder / f"{number}.json", folder / f"{number}.log"
        process = CONTEXT.Process(target=_enter, args=(work, task, path, log))
        process.start()
        return cls(task, process, path, log, time.monotonic())

    def poll(self, timeout: float, memory: float) -> Row | None:
        """The row, when the process has ended or has been ended because it went beyond a limit."""
        if not self.process.is_alive():
            return self._row(None)
        self.peak = max(self.peak, _resident(self.process.pid or 0))
        if time.monotonic() - self.began > timeout:
            return self._row(f"took more than {timeout:g} seconds")
        if self.peak > memory * 1024:
            return self._row(f"took more than {memory:g} GiB of memory")
        return None

    def stop(self) -> None:
        self.process.kill()
        self.process.join()

    def _row(self, limit: str | None) -> Row:
        self.stop()
        try:
            row: Row = json.loads(self.path.read_text())
        except (OSError, json.JSONDecodeError):
            row = {**self.task, "stage": "construct"}
        if row["stage"] != "done" and "failure" not in row:
            last = (self.log.read_text(errors="replace").strip().splitlines() or [""])[-1]
            row["failure"] = limit or f"process ended with code {self.process.exitcode}: {last}"[:2000]
        row["peak_mib"] = max(row.get("peak_mib", 0), self.peak)
        return row


def _resident(pid: int) -> int:
    """Memory of a process in MiB, 0 where the system does not tell."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except (OSError, IndexError):
        return 0
    return pages * resource.getpagesize() // 2**20


def run_all(
    work: Work, tasks: Iterable[Row], jobs: int, timeout: float, memory: float, preload: Sequence[str] = ()
) -> Iterator[Row]:
    """The rows of tasks in the order in which they end. A row is the task and what was found of it.

    The modules in `preload` are imported once for all processes, if they are there.
    """
    os.environ |= dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    os.environ |= {"PYTHONPATH": os.pathsep.join(sys.path), "HF_HUB_OFFLINE": "1"}
    CONTEXT.set_forkserver_preload(["models.preload", *preload])
    waiting = list(enumerate(tasks))[::-1]
    running: list[Worker] = []
    with tempfile.TemporaryDirectory() as folder:
        try:
            while waiting or running:
                while waiting and len(running) < jobs:
                    number, task = waiting.pop()
                    running.append(Worker.start(work, task, Path(folder), number))
                for worker in list(running):
                    row = worker.poll(timeout, memory)
                    if row is not None:
                        running.remove(worker)
                        yield row
                time.sleep(POLL_SECONDS)
        finally:
            for worker in running:
                worker.stop()


def read_rows(path: Path) -> list[Row]:
    """The rows of a results file, later ones of the same task last."""
    return list(map(json.loads, path.read_text().splitlines())) if path.exists() else []


def append_row(path: Path, row: Row) -> None:
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")

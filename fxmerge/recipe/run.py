"""How a merge is computed."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch

from fxmerge.processes import Processes
from fxmerge.recipe.checks import is_number, wrong


@dataclass(frozen=True)
class Run:
    """How a merge is computed. Nothing here changes the result, but for rounding and the random order of searches.

    Attributes:
        device: where to work, and where the result is. None is where the base or else the first model is.
        memory: GiB of activations that fitting keeps in memory; the rest goes to a temporary folder.
        seed: seed of the order of searches, and of the rows that fitting takes.
        progress: whether to show progress bars; None shows them on a terminal.
        verify: whether to prove the symmetry on the first model (or the base), in float64, before it is used.
        resume: a folder in which finished stages of a merge, an alignment or a fold leave their results. A call that is
            given the same goes on after them, to the same result; one that is given something else is refused. The
            folder stays until you delete it. None keeps nothing.
        processes: "auto" shares the work out among the processes of torch's default process group, if it is
            initialized. All of them must make the same call, and all get the result. None computes all in this process.

    Raises:
        OptionError: if a field is out of range.

    Example:
        >>> Run(memory=0.5)
        Run(device=None, memory=0.5, seed=0, progress=None, verify=True, resume=None, processes=None)
    """

    device: str | torch.device | None = None
    memory: float = 2.0
    seed: int = 0
    progress: bool | None = None
    verify: bool = True
    resume: str | Path | None = None
    processes: Literal["auto"] | Processes | None = None

    def __post_init__(self) -> None:
        if not is_number(self.memory) or not self.memory > 0:
            raise wrong(self, "memory", "a positive number of GiB")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or self.seed < 0:
            raise wrong(self, "seed", "a whole number, 0 or more")
        if self.progress not in (None, True, False):
            raise wrong(self, "progress", "True, False or None")
        if self.verify not in (True, False):
            raise wrong(self, "verify", "True or False")
        if self.resume is not None and (not isinstance(self.resume, str | Path) or not str(self.resume)):
            raise wrong(self, "resume", "the path of a folder, or None")
        if self.processes not in (None, "auto") and not isinstance(self.processes, Processes):
            raise wrong(self, "processes", "'auto' or None")
        try:
            None if self.device is None else torch.device(self.device)
        except (RuntimeError, TypeError) as error:
            raise wrong(self, "device", "a device of torch, such as 'cpu' or 'cuda:0', or None") from error

    def within(self, name: str) -> Run:
        """The run of one of several merges of which one is kept: its stages are in a folder of their own."""
        return self if self.resume is None else replace(self, resume=Path(self.resume) / name)

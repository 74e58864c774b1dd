"""How a merge is computed."""

from __future__ import annotations

from dataclasses import dataclass

import torch

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

    Raises:
        OptionError: if a field is out of range.

    Example:
        >>> Run(memory=0.5)
        Run(device=None, memory=0.5, seed=0, progress=None, verify=True)
    """

    device: str | torch.device | None = None
    memory: float = 2.0
    seed: int = 0
    progress: bool | None = None
    verify: bool = True

    def __post_init__(self) -> None:
        if not is_number(self.memory) or not self.memory > 0:
            raise wrong(self, "memory", "a positive number of GiB")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or self.seed < 0:
            raise wrong(self, "seed", "a whole number, 0 or more")
        if self.progress not in (None, True, False):
            raise wrong(self, "progress", "True, False or None")
        if self.verify not in (True, False):
            raise wrong(self, "verify", "True or False")
        try:
            None if self.device is None else torch.device(self.device)
        except (RuntimeError, TypeError) as error:
            raise wrong(self, "device", "a device of torch, such as 'cpu' or 'cuda:0', or None") from error

"""Text that every Python brings along: the sources of its own library, in two domains, by characters.

Task A is code about doing many things at once, task B code about file and message formats. What is learnt is
the next character. One vocabulary serves both.
"""

from __future__ import annotations

import string
import sysconfig
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tasks_suite.problem import CHUNK, Part, Scores, mean_scores

DOMAINS: dict[str, tuple[str, ...]] = {
    "a": (
        "asyncio",
        "concurrent",
        "multiprocessing",
        "queue.py",
        "sched.py",
        "selectors.py",
        "socketserver.py",
        "subprocess.py",
        "threading.py",
    ),
    "b": ("configparser.py", "csv.py", "email", "html", "json", "mailbox.py", "plistlib.py", "tarfile.py", "xml"),
}
"""The packages and modules of each domain."""

VOCABULARY = "\n" + string.printable[:95]
"""The characters that are told apart: printable ASCII and the end of a line; others count as question marks."""

CONTEXT = 64
BLOCK = 2_048
"""Every tenth block of so many characters is for testing."""
CALIBRATION = 256
TEST = 512
"""How many windows of each domain are for calibration (half as many of each) and for testing."""


@dataclass(frozen=True)
class TextProblem:
    """Windows of characters, in two domains. A `Problem`; the joint accuracy is that on both domains together."""

    train: dict[str, Tensor]
    test: dict[str, Tensor]

    def batch(self, part: Part, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        parts = ("a", "b") if part == "both" else (part,)
        text = torch.cat([_draw(self.train[p], size // len(parts), generator) for p in parts])
        return text[:, :-1], text[:, 1:]

    def objective(self, outputs: Tensor, targets: Tensor, part: Part) -> Tensor:
        return F.cross_entropy(outputs.flatten(0, 1), targets.flatten())

    def calibration(self) -> list[Tensor]:
        return list(self._calibrating()[:, :-1].split(CHUNK // 4))

    def apart(self) -> tuple[list[Tensor], list[Tensor]]:
        generator = torch.Generator().manual_seed(0)
        a, b = (_draw(self.train[p], CALIBRATION // 2, generator)[:, :-1] for p in ("a", "b"))
        return list(a.split(CHUNK // 4)), list(b.split(CHUNK // 4))

    def evaluate(self, networks: Sequence[nn.Module]) -> Scores:
        found: Scores = {}
        for part in ("a", "b"):
            found[f"task_{part}"], found[f"loss_{part}"] = self._judge(networks, part, TEST)
        found["per_task"] = found["joint"] = (found["task_a"] + found["task_b"]) / 2
        found["loss"] = (found["loss_a"] + found["loss_b"]) / 2
        return found

    def validate(self, network: nn.Module) -> float:
        """On text that was learnt from, each part of it about once; all else is for testing."""
        windows = torch.cat([_draw(self.train[p], TEST, torch.Generator().manual_seed(2)) for p in ("a", "b")])
        return self._score([network], windows)[0]

    def recognize(self, network: nn.Module) -> float:
        return self._score([network], self._calibrating())[0]

    def loss(self, network: nn.Module) -> float:
        return sum(self._judge([network], part, TEST // 2)[1] for part in ("a", "b")) / 2

    def _calibrating(self) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        windows = torch.cat([_draw(self.train[p], CALIBRATION // 2, generator) for p in ("a", "b")])
        return windows[torch.randperm(len(windows), generator=generator)]

    def _judge(self, networks: Sequence[nn.Module], part: str, count: int) -> tuple[float, float]:
        return self._score(networks, _draw(self.test[part], count, torch.Generator().manual_seed(1)))

    @torch.no_grad()
    def _score(self, networks: Sequence[nn.Module], windows: Tensor) -> tuple[float, float]:
        """Accuracy and loss of next characters."""
        scores = torch.cat([mean_scores(networks, chunk[:, :-1]) for chunk in windows.split(CHUNK)]).flatten(0, 1)
        targets = windows[:, 1:].flatten()
        right = float((scores.argmax(1) == targets).double().mean())
        return right, float(F.cross_entropy(scores.double(), targets))


def _draw(text: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Windows of a text, one character longer than the context."""
    starts = torch.randint(len(text) - CONTEXT, (count, 1), generator=generator)
    return text[starts + torch.arange(CONTEXT + 1)]


def encode(text: str) -> Tensor:
    """The numbers of the characters of a text."""
    numbers = {character: number for number, character in enumerate(VOCABULARY)}
    other = numbers["?"]
    return torch.tensor([numbers.get(character, other) for character in text])


def split_blocks(text: Tensor) -> tuple[Tensor, Tensor]:
    """A text for training and one for testing: every tenth block, beginning with the first, is for testing."""
    blocks = text.split(BLOCK)
    return torch.cat([b for n, b in enumerate(blocks) if n % 10]), torch.cat(blocks[::10])


def sources(names: Iterable[str]) -> str:
    """The sources of modules of the standard library, one after the other."""
    root = Path(sysconfig.get_path("stdlib"))
    files = [
        f for name in names for f in (sorted((root / name).rglob("*.py")) if (root / name).is_dir() else [root / name])
    ]
    return "\n".join(file.read_text(encoding="utf-8") for file in files)


def library() -> TextProblem:
    """The two domains."""
    split = {domain: split_blocks(encode(sources(names))) for domain, names in DOMAINS.items()}
    return TextProblem({d: train for d, (train, _) in split.items()}, {d: test for d, (_, test) in split.items()})

"""Images in ten classes: Fashion-MNIST as packaged by Debian, and scikit-learn's digits.

Task A is the first five classes and task B the last five. A network gives an embedding, and every class has a
fixed direction in the space of embeddings, so that one head serves all classes.
"""

from __future__ import annotations

import gzip
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fxmerge.demo import TASKS, Split, load_split
from tasks_suite.problem import CHUNK, Part, Scores

FOLDER = Path("/usr/share/datasets/fashion-mnist")
INSTALL = "apt-get install dataset-fashion-mnist"
TRAINING = 30_000
"""How many of the 60,000 training images are used: as many as the networks have time for."""
VALIDATION = 10_000
"""How many of those that are left are to choose networks by, where labels are used for that."""
CALIBRATION = 2_000
SHARES = 15
"""In how many parts training images are split for networks that learn from images of their own: 2,000 each."""
CURVE = 1_000
"""How many test images a point of a curve is computed on."""

CLASSES = 10
EMBEDDING = 32
TEMPERATURE = 0.1
PARTS: dict[Part, range] = {"a": TASKS[0], "b": TASKS[1], "both": range(CLASSES)}


@dataclass(frozen=True)
class ImageProblem:
    """Images of ten classes, split in two tasks of five. A `Problem`."""

    train: Split
    validation: Split
    test: Split
    directions: Tensor

    def batch(self, part: Part, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        classes = PARTS[part]
        members = ((self.train.labels >= classes.start) & (self.train.labels < classes.stop)).nonzero().squeeze(1)
        chosen = members[torch.randint(len(members), (size,), generator=generator)]
        return self.train.images[chosen], self.train.labels[chosen]

    def objective(self, outputs: Tensor, targets: Tensor, part: Part) -> Tensor:
        classes = PARTS[part]
        return F.cross_entropy(logits(outputs, self.directions[classes.start : classes.stop]), targets - classes.start)

    def calibration(self) -> list[Tensor]:
        return list(self.train.images[self._calibrating()].split(CHUNK))

    def apart(self) -> tuple[list[Tensor], list[Tensor]]:
        chosen = self._calibrating()
        of_a = self.train.labels[chosen] < PARTS["b"].start
        a, b = (self.train.images[chosen[mine]] for mine in (of_a, ~of_a))
        return list(a.split(CHUNK)), list(b.split(CHUNK))

    def share(self, number: int) -> ImageProblem:
        """The same with a share of the training images. The last share of Fashion-MNIST is what merges calibrate on."""
        mine = self._order().flip(0).chunk(SHARES)[number]
        return replace(self, train=Split(self.train.images[mine], self.train.labels[mine]))

    def _calibrating(self) -> Tensor:
        return self._order()[:CALIBRATION]

    def _order(self) -> Tensor:
        return torch.randperm(len(self.train.images), generator=torch.Generator().manual_seed(0))

    def evaluate(self, networks: Sequence[nn.Module]) -> Scores:
        scores, labels = self._scores(networks, self.test.images), self.test.labels
        found: Scores = {}
        for part in ("a", "b"):
            classes = PARTS[part]
            mine = (labels >= classes.start) & (labels < classes.stop)
            found[f"task_{part}"] = accuracy(scores, labels, classes, classes)
            found[f"loss_{part}"] = _cross_entropy(
                scores[mine][:, classes.start : classes.stop], labels[mine] - classes.start
            )
        found["per_task"] = (found["task_a"] + found["task_b"]) / 2
        found["joint"] = accuracy(scores, labels, PARTS["both"], PARTS["both"])
        found["loss"] = _cross_entropy(scores, labels)
        return found

    def validate(self, network: nn.Module) -> float:
        return self._accuracy(network, self.validation)

    def recognize(self, network: nn.Module) -> float:
        chosen = self._calibrating()
        return self._accuracy(network, Split(self.train.images[chosen], self.train.labels[chosen]))

    def loss(self, network: nn.Module) -> float:
        return _cross_entropy(self._scores([network], self.test.images[:CURVE]), self.test.labels[:CURVE])

    def _accuracy(self, network: nn.Module, data: Split) -> float:
        return accuracy(self._scores([network], data.images), data.labels, PARTS["both"], PARTS["both"])

    @torch.no_grad()
    def _scores(self, networks: Sequence[nn.Module], images: Tensor) -> Tensor:
        chunks = images.split(CHUNK)
        each = [torch.cat([logits(network(chunk), self.directions) for chunk in chunks]) for network in networks]
        return torch.stack(each).mean(0)


def class_directions(seed: int) -> Tensor:
    """A unit vector for every class, at right angles to each other, shape (CLASSES, EMBEDDING)."""
    generator = torch.Generator().manual_seed(seed)
    directions: Tensor = torch.linalg.qr(torch.randn(EMBEDDING, CLASSES, generator=generator)).Q.T
    return directions


def logits(embedding: Tensor, directions: Tensor) -> Tensor:
    """Cosines between embeddings and class directions, over the temperature."""
    return F.normalize(embedding, dim=-1) @ directions.T / TEMPERATURE


def accuracy(scores: Tensor, labels: Tensor, task: range, among: range) -> float:
    """How often the best class `among` some is right, on the images of a task."""
    mask = torch.isin(labels, torch.tensor(task))
    best = scores[mask][:, among.start : among.stop].argmax(1) + among.start
    return float((best == labels[mask]).double().mean())


def _cross_entropy(scores: Tensor, labels: Tensor) -> float:
    return float(F.cross_entropy(scores.double(), labels))


def check_installed() -> None:
    """Ends the program if Fashion-MNIST is not there, and tells how to get it."""
    if not FOLDER.is_dir():
        raise SystemExit(f"Fashion-MNIST is not in {FOLDER}. On Debian or Ubuntu: {INSTALL}")


def fashion() -> ImageProblem:
    """Fashion-MNIST: 28 by 28 pixels."""
    read = _read("train", TRAINING + VALIDATION)
    parts = (x.split([TRAINING, VALIDATION]) for x in (read.images, read.labels))
    train, validation = (Split(*part) for part in zip(*parts, strict=True))
    return ImageProblem(train, validation, _read("t10k", 10_000), class_directions(0))


def digits() -> ImageProblem:
    """scikit-learn's digits: 8 by 8 pixels. There are few: every second one that is not learnt is for validation."""
    train, rest = load_split(0)
    validation, test = (Split(rest.images[n::2], rest.labels[n::2]) for n in range(2))
    return ImageProblem(train, validation, test, class_directions(0))


def _read(name: str, count: int) -> Split:
    """The first images of Fashion-MNIST's training or test files, in [0, 1], and their classes."""
    pixels = read_idx(FOLDER / f"{name}-images-idx3-ubyte.gz", count)
    labels = read_idx(FOLDER / f"{name}-labels-idx1-ubyte.gz", count)
    return Split(torch.from_numpy(pixels).float().unsqueeze(1) / 255, torch.from_numpy(labels).long())


def read_idx(path: Path, count: int) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    """The first entries of a compressed file of bytes in the IDX format.

    Raises:
        ValueError: if it is of another format.
    """
    with gzip.open(path) as file:
        zeros, kind, dims = file.read(2), file.read(1)[0], file.read(1)[0]
        if zeros != b"\0\0" or kind != 8:
            raise ValueError(f"{path} is not a file of bytes in the IDX format.")
        shape = np.frombuffer(file.read(4 * dims), ">u4").astype(int)
        shape[0] = min(count, shape[0])
        return np.frombuffer(file.read(int(shape.prod())), np.uint8).reshape(shape).copy()

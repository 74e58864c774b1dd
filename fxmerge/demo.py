"""The demonstration: two networks that know different digits become one trunk with two heads.

Two networks of one architecture are trained from different initialisations on disjoint halves of the classes of
scikit-learn's digits (real 8x8 images, part of scikit-learn, so nothing is downloaded). Then they are merged, each
with its own head, and compared with what else could be done with them.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from fxmerge.api import head, merge
from fxmerge.errors import OptionError
from fxmerge.recipe import Align, Average, Readout, Recipe, Run

logger = logging.getLogger(__name__)

Arch = Literal["cnn", "vit"]

TASKS = (range(5), range(5, 10))
CLASSES = 5
"""Of each task."""
BATCH = 64


# -------------------------------------------------------------------------- networks


class Residual(nn.Module):
    """Two convolutions with BatchNorm around a shortcut, which is a convolution where the shape changes."""

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(out)
        self.shortcut = (
            nn.Identity()
            if stride == 1 and channels == out
            else nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out))
        )

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(y)) + self.shortcut(x))


class CNN(nn.Module):
    """A residual network: a stem and three stages of one block each."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        self.stages = nn.Sequential(
            Residual(width, width, 1), Residual(width, 2 * width, 2), Residual(2 * width, 4 * width, 2)
        )
        self.head = nn.Linear(4 * width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        features: Tensor = self.stages(self.stem(x))
        scores: Tensor = self.head(features.mean((2, 3)))
        return scores


class Block(nn.Module):
    """A transformer block: attention and a two-layer perceptron, each behind a LayerNorm."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + self.proj(attended)
        y: Tensor = x + self.mlp(self.norm2(x))
        return y


class ViT(nn.Module):
    """A vision transformer over the sixteen 2x2 patches of an image."""

    def __init__(self, dim: int = 64, depth: int = 1, heads: int = 4) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, dim, 2, 2)
        self.position = nn.Parameter(0.02 * torch.randn(16, dim))
        self.blocks = nn.Sequential(*(Block(dim, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(x).flatten(2).transpose(1, 2) + self.position
        scores: Tensor = self.head(self.norm(self.blocks(tokens)).mean(1))
        return scores


@dataclass(frozen=True)
class Training:
    """How the networks of an architecture are made and trained."""

    build: Callable[[], nn.Module]
    epochs: int
    learning_rate: float
    weight_decay: float


TRAININGS: dict[Arch, Training] = {
    "cnn": Training(CNN, epochs=15, learning_rate=3e-3, weight_decay=0.05),
    "vit": Training(ViT, epochs=200, learning_rate=4e-3, weight_decay=0.2),
}


# -------------------------------------------------------------------------- data


@dataclass(frozen=True)
class Split:
    """Images in [0, 1], shape (n, 1, 8, 8), and their digits."""

    images: Tensor
    labels: Tensor

    def only(self, classes: range) -> Split:
        """The images of some classes."""
        mask = torch.isin(self.labels, torch.tensor(classes))
        return Split(self.images[mask], self.labels[mask])


def load_split(seed: int) -> tuple[Split, Split]:
    """The digits, three quarters to train on and one quarter to test on.

    Raises:
        OptionError: if scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        raise OptionError("The demo needs scikit-learn for its images: pip install 'fxmerge[demo]'.") from error
    digits = load_digits()
    train, test = train_test_split(range(len(digits.target)), random_state=seed, stratify=digits.target)
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(digits.target)
    return Split(images[train], labels[train]), Split(images[test], labels[test])


# -------------------------------------------------------------------------- training and evaluation


def shifted(images: Tensor, generator: torch.Generator) -> Tensor:
    """Every image moved by at most one pixel each way."""
    dy, dx = torch.randint(3, (2, len(images), 1, 1), generator=generator)
    at = torch.arange(8)
    rows, columns = (at.view(8, 1) + dy).clamp(0, 9), (at.view(1, 8) + dx).clamp(0, 9)
    return F.pad(images, (1, 1, 1, 1))[torch.arange(len(images)).view(-1, 1, 1), 0, rows, columns].unsqueeze(1)


def train(training: Training, data: Split, classes: range, seed: int, epochs: int, bar: tqdm[None]) -> nn.Module:
    """A network trained from its own initialisation to tell some of the classes apart."""
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = training.build()
    data = data.only(classes)
    steps = epochs * (len(data.labels) // BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), training.learning_rate, weight_decay=training.weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, training.learning_rate, max(steps, 2))
    model.train()
    for _ in range(epochs):
        order = torch.randperm(len(data.labels), generator=generator)
        for batch in order.split(BATCH):
            if len(batch) < BATCH:
                continue
            scores = model(shifted(data.images[batch], generator))
            loss = F.cross_entropy(scores, data.labels[batch] - classes.start)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        bar.update()
    return model.eval()


@torch.no_grad()
def accuracy(model: nn.Module, data: Split, task: range) -> float:
    """How often the best class of a task is right, on the images of it."""
    data = data.only(task)
    best = torch.cat([model(images).argmax(1) for images in data.images.split(256)])
    return float((best + task.start == data.labels).double().mean())


# -------------------------------------------------------------------------- the plain average


def average(model: nn.Module, other: nn.Module) -> nn.Module:
    """The first network with every parameter but those of its head the mean of both networks'."""
    merged, theirs = copy.deepcopy(model), other.state_dict()
    merged.load_state_dict(
        {
            name: (own + theirs[name]) / 2 if own.is_floating_point() and not name.startswith("head.") else own
            for name, own in model.state_dict().items()
        }
    )
    return merged


def _batch_norms(model: nn.Module) -> list[nn.BatchNorm2d]:
    return [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]


@torch.no_grad()
def recalibrated(model: nn.Module, batches: Iterable[Tensor]) -> nn.Module:
    """The model with its BatchNorm statistics re-estimated, in place, as `merge` does for what it returns."""
    norms = _batch_norms(model)
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
        norm.train()
    for batch in batches if norms else ():
        model(batch)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    return model.eval()


# -------------------------------------------------------------------------- the table

ROWS = (
    *("parent A (0-4)", "parent B (5-9)", "both parents", "plain average, two heads", "one common head"),
    *("A, two new heads", "MuDSC, two heads", "fxmerge, two heads"),
)


@dataclass(frozen=True)
class Row:
    """How one network (or two together) does on the test images; accuracies lie between 0 and 1.

    Attributes:
        name: what it is.
        task_a: accuracy on the first half of the classes, choosing among these; None if it has no head for them.
        task_b: the same for the second half.
        parameters: how many numbers have to be stored.
    """

    name: str
    task_a: float | None
    task_b: float | None
    parameters: int

    @property
    def per_task(self) -> float | None:
        """The mean accuracy of the two tasks."""
        return None if self.task_a is None or self.task_b is None else (self.task_a + self.task_b) / 2


@dataclass(frozen=True)
class Table:
    """The result of the demonstration. `str(table)` is what the command line shows."""

    arch: Arch
    seed: int
    rows: tuple[Row, ...]
    notes: tuple[str, ...] = ()

    def __getitem__(self, name: str) -> Row:
        return next(row for row in self.rows if row.name == name)

    def __str__(self) -> str:
        names = ("", "task A", "task B", "mean", "parameters")
        lines = [names] + [
            (r.name, *("-" if x is None else f"{x:.1%}" for x in (r.task_a, r.task_b, r.per_task)), f"{r.parameters:,}")
            for r in self.rows
        ]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        text = [
            "  ".join([line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))])
            for line in lines
        ]
        text.insert(1, "-" * len(text[0]))
        return "\n".join([*text, *([""] if self.notes else []), *self.notes])


def run(arch: Arch = "cnn", seed: int = 0, *, epochs: int | None = None, progress: bool | None = None) -> Table:
    """Trains two networks, merges them, and measures what came of it.

    Arguments:
        arch: "cnn", a residual network with BatchNorm, or "vit", a vision transformer.
        seed: seed of everything that is random: the split of the data, both initialisations, the order of
            the images.
        epochs: how often each network sees its images; by default as often as it takes to learn them well.
        progress: whether to show progress; None shows it on a terminal.

    Returns:
        One row for each parent, both together, and networks of the size of one: their plain average with both heads,
        fxmerge's merge with one head for both tasks, the first parent with two heads fitted to what the parents give,
        which a merge has to beat, and MuDSC's zip and fxmerge's merge with two heads.

    Raises:
        OptionError: if there is no such architecture, `epochs` is below one, or scikit-learn is not installed.
    """
    if arch not in TRAININGS:
        raise OptionError(f"There is no architecture {arch!r} in the demo; choose one of {', '.join(TRAININGS)}.")
    how_trained = TRAININGS[arch]
    epochs = how_trained.epochs if epochs is None else epochs
    if epochs < 1:
        raise OptionError(f"epochs is {epochs}; a network needs at least one to learn anything.")
    training, test = load_split(seed)
    parents = []
    disable = None if progress is None else not progress
    with tqdm(total=2 * epochs, desc="training", unit="epoch", disable=disable, leave=False) as bar:
        for number, task in enumerate(TASKS):
            parents.append(train(how_trained, training, task, 2 * seed + number, epochs, bar))
    calibration = list(training.images.split(256))
    a, b = parents
    logger.info("merging two networks of %d parameters", count_parameters(a))
    control = Recipe(match=Align(), combine=Average(weights=(1, 0)), fit=Readout(), share="trunk")
    recipes = {"A, two new heads": control, "MuDSC, two heads": Recipe(fit=None, share="trunk")}
    recipes["fxmerge, two heads"] = Recipe(share="trunk")
    forked = {
        name: merge(a, b, calibration, recipe, run=Run(seed=seed, progress=progress))
        for name, recipe in recipes.items()
    }
    common = merge(a, b, calibration, run=Run(seed=seed, progress=progress))
    plain = [recalibrated(average(*pair), calibration) for pair in ((a, b), (b, a))]
    size = count_parameters(forked["fxmerge, two heads"])
    rows = [
        Row(ROWS[0], accuracy(a, test, TASKS[0]), None, count_parameters(a)),
        Row(ROWS[1], None, accuracy(b, test, TASKS[1]), count_parameters(b)),
        row("both parents", parents, test, count_parameters(a) + count_parameters(b)),
        row("plain average, two heads", plain, test, size),
        row("one common head", [common, common], test, count_parameters(common)),
        *(row(name, [head(one, 0), head(one, 1)], test, size) for name, one in forked.items()),
    ]
    return Table(arch, seed, tuple(rows), _notes(a, len(training.labels)))


def _notes(parent: nn.Module, images: int) -> tuple[str, ...]:
    return (
        "Accuracy on test images: A and B are the digits 0-4 and 5-9, each told apart from the other four by the head",
        f"for its task. All but the parents saw the same {images} unlabelled images"
        + (", over which BatchNorm was re-estimated." if _batch_norms(parent) else "."),
    )


def row(name: str, networks: Sequence[nn.Module], test: Split, parameters: int) -> Row:
    """A row of the table, from the networks that do task A and task B."""
    for_a, for_b = (accuracy(own, test, task) for own, task in zip(networks, TASKS, strict=True))
    return Row(name, for_a, for_b, parameters)


def count_parameters(model: nn.Module) -> int:
    """How many parameters a model has."""
    return sum(p.numel() for p in model.parameters())

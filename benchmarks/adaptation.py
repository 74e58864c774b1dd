"""Networks that were adapted from one backbone to different domains, merged into one.

Scenes are made of garments: images of the first five classes of Fashion-MNIST, several on a canvas. A U-Net gives the
class of each pixel. A backbone learns scenes of a source domain. Copies of it are trained further, with labels, each on
scenes of a target domain, which looks different; the last target gets a quarter of the steps. The copies are merged, as
in "Training-Free Model Merging for Multi-target Domain Adaptation" (arXiv 2407.13771): parameters by their mean, the
running statistics of BatchNorm pooled as moments. Rows with data see 300 unlabelled scenes of the targets. The score is
the mean intersection over union of the classes, on scenes of test images. All this is done for targets that are near to
the source and for some that are far from it. For near ones, networks that learnt them from random weights are merged as
well.

    python benchmarks/adaptation.py [--short] [--targets NAME ...] [--gaps 0.25 1] [--seeds 1] [--cache FOLDER]
        [--markdown FILE]

Needs what `benchmarks/tasks.py` needs. With `--short`, the images are scikit-learn's digits.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import math
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from heads import CLASSES, QUIET, Row, percent
from invariance import machine, table
from many import mean
from tasks_suite import images, training
from tasks_suite.images import ImageProblem
from tasks_suite.networks import UNet
from tasks_suite.problem import CHUNK, Part, mean_scores
from tasks_suite.suite import PROBLEMS, Entry
from tasks_suite.training import cache_folder, default_cache
from torch import Tensor, nn
from torch.nn import functional as F

import fxmerge
from fxmerge import Recipe
from fxmerge.demo import Split, count_parameters, recalibrated

# ------------------------------------------------------------------------------------ scenes

PIECES = 4
"""How many images are put on a canvas; later ones hide earlier ones."""
THRESHOLD = 0.1
"""Pixels of an image that are brighter belong to its garment."""
NOISE = 0.05
"""The deviation of the noise in every domain."""

Appearance = Callable[[Tensor, Tensor, torch.Generator], Tensor]
"""What a domain makes of canvases in [0, 1], and of where their ground is, both (n, 1, size, size)."""


def clear(canvas: Tensor, ground: Tensor, generator: torch.Generator) -> Tensor:
    return canvas


def inverted(canvas: Tensor, ground: Tensor, generator: torch.Generator) -> Tensor:
    return 1 - canvas


def night(canvas: Tensor, ground: Tensor, generator: torch.Generator) -> Tensor:
    """Little light, which comes from one side."""
    across = torch.linspace(0, 1, canvas.shape[-1])
    mirrored = torch.rand((len(canvas), 1, 1, 1), generator=generator) < 0.5
    return canvas * (0.1 + 0.4 * torch.where(mirrored, 1 - across, across))


def fog(canvas: Tensor, ground: Tensor, generator: torch.Generator) -> Tensor:
    """Blurred, bright and of low contrast."""
    return 0.6 + 0.3 * F.avg_pool2d(canvas, 3, 1, padding=1)


def textured(canvas: Tensor, ground: Tensor, generator: torch.Generator) -> Tensor:
    """Stripes on the ground: of any direction, and 4 to 12 pixels wide."""
    angle, width, shift = torch.rand((3, len(canvas), 1, 1, 1), generator=generator)
    at = torch.arange(float(canvas.shape[-1]))
    along = (angle * math.pi).cos() * at + (angle * math.pi).sin() * at[:, None]
    stripes = 0.4 + 0.3 * (2 * math.pi * (along / (4 + 8 * width) + shift)).sin()
    return torch.where(ground, stripes, canvas)


SOURCE = "clear"
APPEARANCES: dict[str, Appearance] = {f.__name__: f for f in (clear, night, fog, textured, inverted)}
TARGETS = ("night", "fog", "textured")
GAPS = (0.25, 1.0)
"""How far targets are from the source; networks from random weights learn them at the first gap only."""


@dataclass(frozen=True)
class Scenes:
    """Scenes of images, in one domain or in several by turns. A `Course`.

    Attributes:
        images: what the scenes are made of.
        size: of the canvas.
        domains: names of appearances.
        gap: how far the domains are from the source: 0 is the source, 1 the appearance, between them a blend.
    """

    images: Split
    size: int
    domains: tuple[str, ...]
    gap: float

    def batch(self, part: Part, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Scenes, (n, 1, size, size), and the class of every pixel, (n, size, size); 0 is the ground."""
        canvas, classes = self._composed(size, generator)
        scenes = torch.empty_like(canvas)
        for number, name in enumerate(self.domains):
            mine = slice(number, None, len(self.domains))
            seen = APPEARANCES[name](canvas[mine], classes[mine, None] == 0, generator)
            scenes[mine] = torch.lerp(canvas[mine], seen, self.gap)
        return scenes + NOISE * torch.randn(scenes.shape, generator=generator), classes

    def objective(self, outputs: Tensor, targets: Tensor, part: Part) -> Tensor:
        return F.cross_entropy(outputs, targets)

    def _composed(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        side = self.images.images.shape[-1]
        canvas = torch.zeros(count, 1, self.size, self.size)
        classes = torch.zeros(count, self.size, self.size, dtype=torch.long)
        every = torch.arange(count)[:, None, None]
        for _ in range(PIECES):
            chosen = torch.randint(len(self.images.labels), (count,), generator=generator)
            corner = torch.randint(self.size - side + 1, (2, count, 1), generator=generator) + torch.arange(side)
            at = (every, corner[0][:, :, None], corner[1][:, None])
            garment = self.images.images[chosen, 0]
            inside = garment > THRESHOLD
            canvas[:, 0][at] = torch.where(inside, garment, canvas[:, 0][at])
            classes[at] = torch.where(inside, 1 + self.images.labels[chosen][:, None, None], classes[at])
        return canvas, classes


# ------------------------------------------------------------------------------------ networks


@dataclass(frozen=True)
class Setting:
    """What is learnt, of which size, and how long.

    Attributes:
        first: how a backbone is trained, and a network from random weights.
        further: how a copy of the backbone is trained.
        size: of the canvas.
        scenes: how many unlabelled scenes a merge sees.
        test: how many scenes of each domain a network is judged on.
        targets: the domains to adapt to. The last one gets a quarter of the steps.
        gap: how far they are from the source.
    """

    first: Entry
    further: Entry
    size: int
    scenes: int
    test: int
    targets: tuple[str, ...]
    gap: float

    def scenes_of(self, images: Split, *domains: str) -> Scenes:
        return Scenes(images, self.size, domains, self.gap)

    def tuning(self, domains: Sequence[str]) -> Entry:
        """How a copy of the backbone is trained on some targets: as long as copies for each of them together."""
        steps = [self.further.steps // (4 if name == self.targets[-1] else 1) for name in domains]
        return replace(self.further, steps=sum(steps))


def trained(
    setting: Setting, domains: tuple[str, ...], seed: int, cache: Path, base: nn.Module | None = None
) -> nn.Module:
    """A network that has learnt some domains, from random weights or from a backbone; trained once and kept."""
    entry = setting.first if base is None else setting.tuning(domains)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = entry.build() if base is None else copy.deepcopy(base)
    entries = (setting.first,) if base is None else (setting.first, entry)
    recipe = [(e.data, e.steps, e.learning_rate, e.batch, e.weight_decay) for e in entries]
    gap = None if domains == (SOURCE,) else setting.gap
    digest = hashlib.sha256(repr((recipe, setting.size, gap, PIECES, str(model))).encode()).hexdigest()[:8]
    path = cache / f"adaptation-{digest}-{'-'.join(domains)}-{seed}.pt"
    if path.exists():
        model.load_state_dict(torch.load(path, weights_only=True))
        return model.eval()
    scenes = setting.scenes_of(_images(setting).train, *domains)
    training.train(entry, model, scenes, "both", seed, entry.steps)
    torch.save(model.state_dict(), path)
    return model


def _images(setting: Setting) -> ImageProblem:
    """The images of the first five classes."""
    problem = PROBLEMS[setting.first.data]()
    assert isinstance(problem, ImageProblem)
    first = range(CLASSES)
    return replace(problem, train=problem.train.only(first), test=problem.test.only(first))


# ------------------------------------------------------------------------------------ what is made of them

Network = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Parents:
    """Networks of one domain each, batches of unlabelled scenes of all, and the same scenes by domain.

    Attributes:
        before: how many batches the networks had seen when they began to differ.
    """

    networks: tuple[nn.Module, ...]
    batches: list[Tensor]
    apart: list[list[Tensor]]
    before: int


@dataclass(frozen=True)
class Made:
    """A network for each domain, which may all be one; and how many parameters they have together."""

    networks: Sequence[Network]
    parameters: int


def one(network: nn.Module, parents: Parents) -> Made:
    """One network for all domains."""
    return Made([network] * len(parents.networks), count_parameters(network))


def several(parents: Parents, networks: Sequence[Network]) -> Made:
    """What needs all networks as they are."""
    return Made(networks, sum(map(count_parameters, parents.networks)))


def probabilities(networks: Sequence[nn.Module]) -> Network:
    """The mean of the probabilities of classes, as outputs that are far too large count no more than others there."""
    return lambda scenes: torch.stack([network(scenes).softmax(1) for network in networks]).mean(0)


def with_first_buffers(parents: Parents) -> Made:
    made = mean(parents.networks)
    made.load_state_dict(dict(parents.networks[0].named_buffers()), strict=False)
    return one(made, parents)


def counted(parents: Parents, count: Callable[[Tensor], Tensor]) -> Parents:
    """The same with other numbers of batches that the networks have seen."""
    copies = copy.deepcopy(parents.networks)
    for network in copies:
        for norm in (m for m in network.modules() if isinstance(m, nn.BatchNorm2d)):
            assert norm.num_batches_tracked is not None
            norm.num_batches_tracked.copy_(count(norm.num_batches_tracked))
    return replace(parents, networks=copies)


def without_data(share: str = "auto") -> Callable[[Parents], Made]:
    """What `fxmerge.merge_many` makes of equal units without data."""
    recipe = Recipe(match=None, share=share)

    def make(parents: Parents) -> Made:
        merged = fxmerge.merge_many(parents.networks, recipe=recipe, example=parents.batches[0], run=QUIET)
        return _made(merged, parents)

    return make


def fitted(recipe: Recipe, *, apart: bool = False) -> Callable[[Parents], Made]:
    """What `fxmerge.merge_many` makes with the scenes of all domains together, or of each domain apart."""

    def make(parents: Parents) -> Made:
        loader, loaders = (None, parents.apart) if apart else (parents.batches, None)
        return _made(fxmerge.merge_many(parents.networks, loader, recipe, loaders=loaders, run=QUIET), parents)

    return make


def _made(merged: torch.fx.GraphModule, parents: Parents) -> Made:
    if len(merged.graph.output_node().all_input_nodes) == 1:
        return one(merged, parents)
    heads = [fxmerge.head(merged, number) for number in range(len(parents.networks))]
    return Made(heads, count_parameters(merged))


DECODERS = "bottom"
"""The last module of the encoder: with a trunk up to it, decoders stay apart."""

NO_MATCH = Recipe(match=None)
Method = Callable[[Parents], Made]

AS_THEY_ARE: dict[str, Method] = {
    "each domain's own network (all networks)": lambda p: several(p, p.networks),
    "ensemble (all networks)": lambda p: several(p, [partial(mean_scores, p.networks)] * len(p.networks)),
    "ensemble of probabilities (all networks)": lambda p: several(p, [probabilities(p.networks)] * len(p.networks)),
}
NO_DATA: dict[str, Method] = {
    "no data: mean, BatchNorm of the first": with_first_buffers,
    "no data: mean, also of BatchNorm's buffers": lambda p: one(mean(p.networks), p),
    "no data: `match=None`, buffers pooled": without_data(),
}
COUNTS: dict[str, Method] = {
    "no data: pooled, all equal": lambda p: without_data()(counted(p, torch.ones_like)),
    "no data: pooled, by steps of fine-tuning": lambda p: without_data()(counted(p, lambda n: n - p.before)),
}
DATA: dict[str, Method] = {
    "data: mean, BatchNorm estimated anew": lambda p: one(recalibrated(mean(p.networks), p.batches), p),
    "data: `match=None`, fitted": fitted(NO_MATCH),
    "data: `match=None`, fitted, `loaders`": fitted(NO_MATCH, apart=True),
    "data: default": fitted(Recipe()),
    "data: default, `loaders`": fitted(Recipe(), apart=True),
}
HEADS: dict[str, Method] = {
    "no data: pooled, last layers apart": without_data("trunk"),
    "no data: pooled, decoders apart": without_data(DECODERS),
    "data: `match=None`, `loaders`, last layers apart": fitted(replace(NO_MATCH, share="trunk"), apart=True),
    "data: `match=None`, `loaders`, decoders apart": fitted(replace(NO_MATCH, share=DECODERS), apart=True),
    "data: default, `loaders`, last layers apart": fitted(Recipe(share="trunk"), apart=True),
    "data: default, `loaders`, decoders apart": fitted(Recipe(share=DECODERS), apart=True),
}
METHODS = {
    "backbone": AS_THEY_ARE | NO_DATA | COUNTS | DATA | HEADS,
    "random": AS_THEY_ARE | NO_DATA | DATA | HEADS,
}
"""By what the networks were trained from."""
APART = "data: default, `loaders`, decoders apart"
SHORT_METHODS = {"backbone": AS_THEY_ARE | NO_DATA | DATA | {APART: HEADS[APART]}}


# ------------------------------------------------------------------------------------ the two sizes of the benchmark


def _unet(widths: tuple[int, int, int]) -> Callable[[], nn.Module]:
    return partial(UNet, widths, nn.BatchNorm2d, CLASSES + 1)


LONG = Setting(
    Entry(_unet((16, 32, 64)), "fashion", 600, 3e-3, batch=32),
    Entry(_unet((16, 32, 64)), "fashion", 300, 1e-3, batch=32),
    size=56,
    scenes=300,
    test=500,
    targets=TARGETS,
    gap=GAPS[0],
)
SHORT = Setting(
    Entry(_unet((8, 16, 16)), "digits", 60, 1e-2, batch=16),
    Entry(_unet((8, 16, 16)), "digits", 30, 3e-3, batch=16),
    size=16,
    scenes=60,
    test=60,
    targets=("fog", "textured"),
    gap=GAPS[0],
)

# ------------------------------------------------------------------------------------ the table


@torch.no_grad()
def score(network: Network, scenes: Tensor, classes: Tensor) -> float:
    """The mean over classes of the intersection over union, of all scenes together."""
    given = torch.cat([network(chunk).argmax(1) for chunk in scenes.split(CHUNK)])
    pairs = (classes * (CLASSES + 1) + given).flatten().bincount(minlength=(CLASSES + 1) ** 2)
    confusion = pairs.view(CLASSES + 1, CLASSES + 1).double()
    both = confusion.diag()
    return float((both / (confusion.sum(0) + confusion.sum(1) - both)).mean())


BATCH = 30
"""How many unlabelled scenes a batch has."""

Found = dict[tuple[float, str, str], list[dict[str, float]]]
"""For every gap, start and row, the scores by domain of every seed, and "size"."""


def measure(setting: Setting, methods: dict[str, dict[str, Method]], seed: int, cache: Path, found: Found) -> None:
    """Adds the scores of one seed to all rows."""
    problem = _images(setting)
    generator = torch.Generator().manual_seed(1)
    test = {
        name: setting.scenes_of(problem.test, name).batch("both", setting.test, generator)
        for name in (SOURCE, *setting.targets)
    }
    scenes, _ = setting.scenes_of(problem.train, *setting.targets).batch("both", setting.scenes, generator)
    count = len(setting.targets)
    # Captured with heads apart, batches must lie in memory without gaps.
    apart = [list(scenes[n::count].contiguous().split(BATCH)) for n in range(count)]
    backbone = trained(setting, (SOURCE,), seed, cache)

    def add(start: str, name: str, made: Made) -> None:
        row = {domain: score(net, *test[domain]) for domain, net in zip(setting.targets, made.networks, strict=True)}
        if len(set(made.networks)) == 1:
            row[SOURCE] = score(made.networks[0], *test[SOURCE])
        row["size"] = made.parameters / count_parameters(backbone)
        found.setdefault((setting.gap, start, name), []).append(row)
        print(f"gap {setting.gap}, seed {seed}, {start}, {name}: {row}", flush=True)

    def add_all(start: str, networks: Sequence[nn.Module]) -> None:
        parents = Parents(tuple(networks), list(scenes.split(BATCH)), apart, setting.first.steps)
        for name, network in zip(setting.targets, networks, strict=True):
            add(start, f"network of {name}", one(network, parents))
        for name, method in methods[start].items():
            add(start, name, method(parents))

    tuned = [trained(setting, (name,), seed, cache, backbone) for name in setting.targets]
    everything = trained(setting, setting.targets, seed, cache, backbone)
    for name, network in (("the backbone", backbone), ("trained on all targets", everything)):
        add("backbone", name, Made([network] * count, count_parameters(network)))
    add_all("backbone", tuned)
    if "random" in methods:
        fresh = [trained(setting, (name,), count * seed + n, cache) for n, name in enumerate(setting.targets)]
        add_all("random", fresh)


def shown(found: Found, targets: Sequence[str]) -> list[Row]:
    rows = []
    for (gap, start, name), seeds in found.items():
        row = {"gap": f"{gap:g}", "from": start, "": name, "size": f"{statistics.fmean(s['size'] for s in seeds):.2f}"}
        row |= {d: percent([s[d] for s in seeds]) if d in seeds[0] else "-" for d in (SOURCE, *targets)}
        rows.append({**row, "mean of targets": percent([statistics.fmean(s[d] for d in targets) for s in seeds])})
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="digits, a tiny network, and nothing is kept")
    parser.add_argument("--targets", nargs="+", choices=[name for name in APPEARANCES if name != SOURCE])
    parser.add_argument("--gaps", nargs="+", type=float, default=list(GAPS), help="how far targets are from the source")
    parser.add_argument("--seeds", type=int, default=1, help="how many backbones")
    parser.add_argument("--cache", type=Path, default=default_cache(), help="folder of the trained networks")
    parser.add_argument("--markdown", type=Path, help="write the table to this file")
    options = parser.parse_args()
    setting, methods = (SHORT, SHORT_METHODS) if options.short else (LONG, METHODS)
    setting = replace(setting, targets=tuple(options.targets or setting.targets))
    if setting.first.data == "fashion":
        images.check_installed()
    found: Found = {}
    with cache_folder(options.cache, short=options.short) as cache:
        for gap in GAPS[:1] if options.short else options.gaps:
            for seed in range(1 if options.short else options.seeds):
                measure(replace(setting, gap=gap), methods, seed, cache, found)
            methods = {"backbone": methods["backbone"]}
    text = table(shown(found, setting.targets))
    print(text)
    if options.markdown:
        options.markdown.write_text(f"{machine()}\n\n{text}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Merges on an accelerator: whether they are those of the CPU, and how long they take beside it.

    python benchmarks/device.py [--short] [--device cuda] [--parts equal times] [--cases NAME ...] [--no-cpu]

"equal" merges small networks of the tests in float64 on both, in several ways, and tells how far parameters are apart.
"times" merges large networks. The second one is the first with its units in another order and 1% of noise on its
weights, so that both devices should find that order: the share of units that went where they belong is told.

Run it where `pip install -e '.[test,zoo]'` was run, which also makes `tests` importable. On a machine without an
accelerator it runs on the CPU alone, and compares nothing.
"""

from __future__ import annotations

import argparse
import copy
import gc
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from invariance import machine, table
from models import is_installed
from tasks_suite.networks import ResNet20
from torch import Tensor, nn

import fxmerge
from fxmerge import Align, Recipe, Run
from fxmerge.demo import recalibrated
from tests.accelerator import ALIKE, WAYS, compare

NOISE = 0.01
"""The standard deviation of the noise on a parameter, as a share of the parameter's own."""

EQUAL = (*ALIKE, "inverted residual, squeeze-excite", "LSTM", "packed attention, written out")
"""The tests' networks that are merged."""


@dataclass(frozen=True)
class Case:
    """Two networks and how they are merged.

    Attributes:
        build: makes a network.
        data: makes that many inputs.
        inputs: how many there are for calibration; none are given if it is zero.
        batch: how many of them are in a batch.
        package: what has to be installed.
        recipe: how they are merged.
    """

    build: Callable[[], nn.Module]
    data: Callable[[int], Tensor]
    inputs: int = 0
    batch: int = 16
    package: str = ""
    recipe: Recipe = field(default_factory=Recipe)


class Logits(nn.Module):
    """A language model that gives nothing but its logits."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.model(input_ids=ids).logits
        return logits


def _torchvision(name: str) -> nn.Module:
    from torchvision.models import get_model

    model: nn.Module = get_model(name, weights=None)
    return model


def _llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=2048,
        intermediate_size=5504,
        num_hidden_layers=24,
        num_attention_heads=16,
        num_key_value_heads=16,
        use_cache=False,
    )
    return Logits(LlamaForCausalLM(config))


def _images(channels: int, size: int, count: int) -> Tensor:
    return torch.randn(count, channels, size, size)


def _tokens(count: int) -> Tensor:
    return torch.randint(VOCABULARY, (count, 128))


FAILED = "failed"
VOCABULARY = 32000
SHORT = "ResNet20 of width 1, 64 images"
CASES: dict[str, Case] = {
    SHORT: Case(partial(ResNet20, 1, 2, nn.BatchNorm2d, 32), partial(_images, 1, 28), 64),
    "ResNet-50 aligned by weights": Case(
        partial(_torchvision, "resnet50"),
        partial(_images, 3, 224),
        package="torchvision",
        recipe=Recipe(match=Align()),
    ),
    "ResNet-50, 64 images": Case(
        partial(_torchvision, "resnet50"), partial(_images, 3, 224), 64, package="torchvision"
    ),
    "ViT-B/16, 64 images": Case(partial(_torchvision, "vit_b_16"), partial(_images, 3, 224), 64, package="torchvision"),
    "Llama of 1.3B aligned by weights": Case(
        _llama, _tokens, batch=4, package="transformers", recipe=Recipe(match=Align())
    ),
    "Llama of 1.3B, 64 x 128 tokens": Case(_llama, _tokens, 64, 8, package="transformers"),
}
ONLY_DEVICE = ("Llama of 1.3B, 64 x 128 tokens",)
"""What a CPU takes too long for."""


@dataclass
class Outcome:
    """What came of one merge: seconds, in all and by stage, where units went, and the parameters."""

    seconds: float
    stages: dict[str, float]
    images: Any
    state: dict[str, Tensor]
    peak: float | None


def planted(model: nn.Module, example: Tensor) -> tuple[nn.Module, fxmerge.Symmetry, fxmerge.Permutation]:
    """The model with its units in another order and with noise, its symmetry, and the order."""
    symmetry = fxmerge.find_symmetry(model, (example,))
    order = symmetry.sample_permutation(torch.Generator().manual_seed(1))
    twin = copy.deepcopy(model)
    twin.load_state_dict(order.apply(model.state_dict()))
    with torch.no_grad():
        for parameter in twin.parameters():
            spread = parameter.std() if parameter.numel() > 1 else parameter.abs().max()
            parameter += NOISE * spread * torch.randn_like(parameter)
    return twin, symmetry, order


def merge(case: Case, networks: tuple[nn.Module, nn.Module], data: list[Tensor], device: torch.device) -> Outcome:
    """One merge on a device."""
    there = [copy.deepcopy(network).to(device) for network in networks]
    batches = [x.to(device) for x in data]
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
    began = time.perf_counter()
    merged = fxmerge.merge(
        there[0],
        there[1],
        batches if case.inputs else None,
        case.recipe,
        example=batches[0][:2],
        run=Run(progress=False),
    )
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    seconds = time.perf_counter() - began
    peak = torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None
    report = fxmerge.report(merged)
    state = {name: tensor.cpu() for name, tensor in merged.state_dict().items()}
    return Outcome(seconds, dict(report.seconds), report.images, state, peak)


def in_place(outcome: Outcome, symmetry: fxmerge.Symmetry, order: fxmerge.Permutation) -> float:
    """The share of the second network's units that were merged with those of the first that they are."""
    right = total = 0
    first, second = outcome.images
    for number in symmetry.choices:
        name = symmetry.names[number]
        went_a, went_b = torch.tensor(first[name]), torch.tensor(second[name])
        right += int((went_b[torch.from_numpy(order.images[number])] == went_a).sum())
        total += len(went_a)
    return right / max(total, 1)


def apart(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """How far parameters are apart, as a share of their norm."""
    names = [name for name, tensor in expected.items() if tensor.is_floating_point()]
    rest = sum(float((found[n] - expected[n]).double().square().sum()) for n in names)
    return (rest / sum(float(expected[n].double().square().sum()) for n in names)) ** 0.5


def times(names: list[str], device: torch.device | None, with_cpu: bool) -> Iterator[dict[str, str]]:
    """A row for every large merge and device."""
    for name in names:
        case = CASES[name]
        if case.package and not is_installed(case.package):
            print(f"{name}: not run, {case.package} is not installed", flush=True)
            continue
        torch.manual_seed(0)
        model = case.build().eval()
        data = list(case.data(case.inputs or 2).split(case.batch))
        if case.inputs:
            recalibrated(model, data)
        twin, symmetry, order = planted(model, data[0][:2])
        outcomes: dict[str, Outcome] = {}
        devices = [*([device] if device else []), *([torch.device("cpu")] if with_cpu or not device else [])]
        for where in devices:
            if where.type == "cpu" and device and name in ONLY_DEVICE:
                continue
            try:
                found = outcomes[where.type] = merge(case, (model, twin), data, where)
            except Exception as error:
                yield {"merge": name, "device": where.type, FAILED: told(error)}
                continue
            row = {"merge": name, "device": where.type, "seconds": f"{found.seconds:.1f}"}
            row |= {stage: f"{seconds:.1f}" for stage, seconds in found.stages.items()}
            row |= {"GiB on the device": "-" if found.peak is None else f"{found.peak:.1f}"}
            row |= {"units in place": f"{in_place(found, symmetry, order):.1%}"}
            print(row, flush=True)
            yield row
            gc.collect()
        if len(outcomes) == 2:
            expected, other = outcomes["cpu"], next(o for kind, o in outcomes.items() if kind != "cpu")
            same = "the same" if expected.images == other.images else "not the same"
            print(f"{name}: {same} units merged, parameters {apart(other.state, expected.state):.1e} apart", flush=True)


def equal(names: tuple[str, ...], device: torch.device) -> Iterator[dict[str, str]]:
    """A row for every small network, and for every way of merging the first one."""
    for name, way in [*((name, next(iter(WAYS))) for name in names), *((names[0], way) for way in WAYS)]:
        row = {"network": name, "way": way}
        try:
            found = compare(name, way, device=str(device))
        except Exception as error:
            yield row | {FAILED: told(error)}
            continue
        yield row | {
            "on": ", ".join(found["devices"]),
            "units": "same" if found["same units"] else "others",
            "apart": f"{found['apart']:.1e}",
        }


def told(error: Exception) -> str:
    """The first line of an error, whose traceback is printed."""
    traceback.print_exception(error)
    return f"{type(error).__name__}: {error}".splitlines()[0]


def shown(rows: list[dict[str, str]]) -> bool:
    """Prints rows as a table; whether none failed."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    print("\n" + table([{column: row.get(column, "-") for column in columns} for row in rows]), "\n", flush=True)
    return all(FAILED not in row for row in rows)


def card(device: torch.device) -> str:
    """What the device is called."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help=f"only {SHORT}, and one small network")
    parser.add_argument("--device", help="the accelerator; by default the one that torch finds")
    parser.add_argument("--parts", nargs="+", choices=["equal", "times"], default=["equal", "times"])
    parser.add_argument("--cases", nargs="+", choices=list(CASES), help="only these of the large networks")
    parser.add_argument("--no-cpu", action="store_true", help="time nothing on the CPU")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    has = torch.accelerator.is_available()
    device = (
        torch.device(options.device) if options.device else torch.accelerator.current_accelerator() if has else None
    )
    print(
        machine() + (f", {card(device)}" if device else ", no accelerator: nothing to compare with"), "\n", flush=True
    )
    fine = True
    if device and "equal" in options.parts:
        fine &= shown(list(equal(EQUAL[: 1 if options.short else None], device)))
    if "times" in options.parts:
        names = options.cases or ([SHORT] if options.short else list(CASES))
        fine &= shown(list(times(names, device, not options.no_cpu)))
    return int(not fine)


if __name__ == "__main__":
    sys.exit(main())

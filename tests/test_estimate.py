"""How long a merge takes at least."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import fxmerge
from fxmerge import io
from fxmerge.networks import Network, build, skeleton
from fxmerge.plan.estimate import estimate, speed_of
from fxmerge.plan.parts import Data
from tests import files


def conv(width: int = 16) -> tuple[nn.Module, torch.Tensor]:
    """A factory."""
    layers = (nn.Conv2d(3, width, 3), nn.ReLU(), nn.Conv2d(width, width, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return nn.Sequential(*layers, nn.Linear(width, 3)), torch.zeros(2, 3, 10, 10)


def written(folder: Path, arch: str, **settings: Any) -> tuple[list[Network], list[Network]]:
    """Two networks of an architecture: without values, and with them."""
    paths = [io.save(conv(**settings)[0].state_dict(), folder / f"{i}.safetensors")[0] for i in range(2)]
    return [skeleton(io.load(p), arch, settings) for p in paths], [build(io.load(p), arch, settings) for p in paths]


def test_operations_are_those_that_torch_counts(tmp_path: Path) -> None:
    empty, _ = written(tmp_path, "tests.test_estimate:conv")
    found = estimate(empty, Data("x", samples=100))
    by_hand = 2 * (3 * 16 * 9 * 64 + 16 * 16 * 9 * 36 + 16 * 3)
    assert found.passes == 100 * 5 * by_hand
    assert found.seconds == (found.passes + found.fits) / found.speed
    equations = [100 * 64 * 28 * (28 + 16), 100 * 36 * 145 * (145 + 16), 100 * 17 * (17 + 3)]
    solved = [f**3 / 3 + 2 * f**2 * o for f, o in ((28, 16), (145, 16), (17, 3))]
    assert found.fits == pytest.approx(2 * sum(equations) + 2 * 6 * sum(solved))
    alone = estimate(empty, Data("x", samples=100), fitted=False)
    assert (alone.passes, alone.fits) == (100 * 2 * by_hand, 0)
    wider, _ = written(tmp_path, "tests.test_estimate:conv", width=32)
    more = estimate(wider, Data("x", samples=100))
    assert more.fits > 3 * found.fits


def test_rows_of_tokens_count_by_their_length(tmp_path: Path) -> None:
    own = skeleton(io.load(files.gpt2(tmp_path / "a")), "hf")
    short, long = (estimate([own, own], Data("x", samples=10, length=n)) for n in (16, 32))
    assert long.passes == 2 * short.passes


def test_of_a_network_that_needs_values_every_weight_counts_once(tmp_path: Path) -> None:
    io.save(files.Branching().state_dict(), tmp_path / "a.pt")
    own = skeleton(io.load(tmp_path / "a.pt"), "tests.files:branching")
    assert estimate([own, own], Data("x", samples=10)).passes == 10 * 5 * 2 * (4 * 8 + 8 * 3)


def test_embeddings_and_what_is_tied_to_them_are_not_fitted(tmp_path: Path) -> None:
    io.save(files.tied()[0].state_dict(), tmp_path / "a.pt")
    own = skeleton(io.load(tmp_path / "a.pt"), "tests.files:tied")
    assert estimate([own, own], Data("x")).fits == 0


def test_it_is_less_than_what_a_merge_takes(tmp_path: Path, one_thread: None) -> None:
    empty, networks = written(tmp_path, "tests.test_estimate:conv", width=64)
    found = estimate(empty, Data("x", samples=256))
    merged = fxmerge.merge(*(own.model for own in networks), [torch.randn(64, 3, 10, 10) for _ in range(4)])
    assert 0 < found.seconds < sum(fxmerge.report(merged).seconds.values())


def test_the_speed_is_that_of_this_machine() -> None:
    with FlopCounterMode(display=False) as counter:
        speed = speed_of()
    assert 1e8 < speed < 1e15 and counter.get_total_flops() > 0
    with pytest.raises(RuntimeError):
        speed_of("nowhere")

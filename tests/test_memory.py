"""How much memory capture and verification take beside the model."""

import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import gc
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

import fxmerge


def network(width, inner, layers):
    blocks = (nn.Sequential(nn.Linear(width, inner), nn.ReLU(), nn.Linear(inner, width)) for _ in range(layers))
    return nn.Sequential(nn.Linear(8, width), *blocks, nn.Linear(width, 8))


def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024


def taken(width, inner, layers):
    model, args = network(width, inner, layers).to(torch.bfloat16), (torch.zeros(2, 8, dtype=torch.bfloat16),)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    before = peak()
    symmetry = fxmerge.find_symmetry(model, args)
    found = peak()
    assert replace(symmetry, kinds=()).verify(model, args).demoted == ()
    return [(own - before) / sum(p.nbytes for p in model.parameters()) for own in (found, peak())]


taken(16, 32, 2)  # What torch imports and keeps is not counted.
print(*taken(1024, 2048, 16))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux tells the peak of a part of a run")
def test_capture_and_verification_take_little_beside_a_model_in_half_precision(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    done = subprocess.run(
        [sys.executable, str(program)], capture_output=True, text=True, check=True
    )  # In copies of it.
    capture, verification = map(float, done.stdout.split())
    assert capture < 2.5
    assert verification < 2.5

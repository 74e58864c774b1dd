"""How much memory a merge by weights takes beside the models."""

import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import gc
from pathlib import Path

import torch
from torch import nn

import fxmerge


class Block(nn.Module):
    def __init__(self, width, inner):
        super().__init__()
        self.wide, self.narrow = nn.Linear(width, inner), nn.Linear(inner, width)

    def forward(self, x):
        return x + self.narrow(self.wide(x).relu())


def network(width, inner, blocks):
    return nn.Sequential(nn.Linear(8, width), *(Block(width, inner) for _ in range(blocks)), nn.Linear(width, 8))


def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024


def merged(width, inner, blocks):
    torch.manual_seed(0)
    a, b = (network(width, inner, blocks).to(torch.bfloat16) for _ in range(2))
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    before = peak()
    fxmerge.merge(a, b, example=torch.zeros(2, 8, dtype=torch.bfloat16))
    return (peak() - before) / sum(p.nbytes for p in a.parameters())


merged(16, 32, 2)
print(merged(1024, 2048, 8))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux tells the peak of a part of a run")
def test_a_merge_by_weights_takes_a_few_copies_of_a_network_in_half_precision(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    done = subprocess.run([sys.executable, str(program)], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 8

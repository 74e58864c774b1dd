"""How much memory capture, verification and merges take beside the models."""

import os
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
    assert capture < 1
    assert verification < 1.6


MERGES = """
import re
import resource
import sys
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from fxmerge.cli import main


def make(folder, width, inner, words):
    torch.manual_seed(0)
    sizes = {"hidden_size": width, "intermediate_size": inner, "vocab_size": words, "num_hidden_layers": 4}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(**sizes, **heads)).to(torch.bfloat16)
    model.save_pretrained(folder / "a")
    with torch.no_grad():
        for layer in model.model.layers:
            order = torch.randperm(inner)
            layer.mlp.gate_proj.weight.data = layer.mlp.gate_proj.weight[order]
            layer.mlp.up_proj.weight.data = layer.mlp.up_proj.weight[order]
            layer.mlp.down_proj.weight.data = layer.mlp.down_proj.weight[:, order]
    model.save_pretrained(folder / "b")
    return sum(p.nbytes for p in model.parameters())


def merge(folder):
    recipe = folder / "recipe.yaml"  # The default without data: units are aligned, and then zipped.
    recipe.write_text("match: {kind: Zip}\\ncombine: {kind: Average}\\nfit: null\\n")
    how = ["--arch", "hf", "--recipe", str(recipe), "--out", str(folder / "merged")]
    assert main(["merge", str(folder / "a"), str(folder / "b"), *how]) == 0


def held():
    return int(re.search(r"VmData:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024


folder = Path(sys.argv[1])
for name, sizes in (("small", (32, 64, 128)), ("large", (1024, 2048, 8000))):
    (folder / name).mkdir()
    size = make(folder / name, *sizes)
    if name == "large":
        mapped = 2 * size  # What is mapped from the files of both models counts, too.
        resource.setrlimit(resource.RLIMIT_DATA, (int(held() + mapped + 2.6 * size),) * 2)
    merge(folder / name)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux limits what a process holds")
def test_a_merge_of_files_in_half_precision_takes_less_than_three_copies_of_one(tmp_path: Path) -> None:
    # The system refuses the process more: as many copies as are 1.5 GiB of a model of 308M parameters.
    pytest.importorskip("transformers")
    program = tmp_path / "program.py"
    program.write_text(MERGES)
    # The allocator of Linux else keeps most of what is freed for later.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**22), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(program), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr

"""The way of someone who has never seen fxmerge: networks of their own, as files, merged and loaded again."""

import shlex
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fxmerge import io
from tests import files
from tests.cli.conftest import Call

NAME = "test_resnet"
"""The smallest residual network of timm."""


def digits(folder: Path) -> tuple[np.ndarray[Any, Any], list[Path]]:
    """scikit-learn's digits as an image folder; the labels and the files."""
    Image: Any = pytest.importorskip("PIL.Image")
    from sklearn.datasets import load_digits

    found = load_digits()
    paths = []
    for number, (image, label) in enumerate(zip(found.images, found.target, strict=True)):
        (folder / str(label)).mkdir(parents=True, exist_ok=True)
        paths.append(folder / str(label) / f"{number:04d}.png")
        Image.fromarray((image * 15.9).astype(np.uint8)).convert("RGB").save(paths[-1])
    return found.target, paths


def tensors(paths: list[Path]) -> torch.Tensor:
    """The images as timm prepares them for the network."""
    import timm.data
    from PIL import Image

    model = timm.create_model(NAME)
    config = timm.data.resolve_model_data_config(model, args={"input_size": (3, 32, 32)})
    transform = timm.data.create_transform(**config, is_training=False)
    return torch.stack([transform(Image.open(path)) for path in paths])


def trained(x: torch.Tensor, y: torch.Tensor, seed: int) -> nn.Module:
    import timm

    torch.manual_seed(seed)
    model = timm.create_model(NAME, num_classes=5)
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    batches = [own for _ in range(10) for own in torch.randperm(len(x)).split(32)]
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=len(batches))
    model.train()
    for own in batches:
        optimizer.zero_grad()
        F.cross_entropy(model(x[own]), y[own]).backward()
        optimizer.step()
        schedule.step()
    return model.eval()


def accuracy(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> float:
    with torch.no_grad():
        return float((model(x).argmax(1) == y).float().mean())


@pytest.mark.slow
def test_two_networks_of_timm_with_heads_for_other_digits(call: Call, tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    labels, paths = digits(tmp_path / "images")
    x, y = tensors(paths), torch.from_numpy(labels)
    test = torch.arange(len(x)) % 5 == 0
    parents, masks = {}, {}
    for number, (name, wanted) in enumerate({"low": y < 5, "high": y >= 5}.items()):
        parents[name], masks[name] = trained(x[wanted & ~test], y[wanted & ~test] % 5, number), wanted & test
        io.save(parents[name].state_dict(), tmp_path / f"{name}.safetensors")
    pair = tmp_path / "low.safetensors", tmp_path / "high.safetensors"
    shared = ("--arch", f"timm:{NAME}", "--input", "1x3x32x32")
    code, out, err = call("check", *pair, *shared)
    assert code == 0, err
    assert "num_classes=5 follows from the shapes in the file." in out
    heads = ("--share", "trunk", "--name", "low", "--name", "high")
    data = ("--data", tmp_path / "images", "--samples", "512")
    code, out, err = call("merge", *pair, *shared, *data, *heads, "--out", tmp_path / "merged")
    assert code == 0, err
    assert call("report", tmp_path / "merged")[0] == call("verify", tmp_path / "merged")[0] == 0
    both = torch.export.load(tmp_path / "merged" / "model.pt2").module()
    for number, (name, mask) in enumerate(masks.items()):
        merged = timm.create_model(f"local-dir:{tmp_path / 'merged' / 'heads' / name}", pretrained=True).eval()
        assert torch.allclose(merged(x[:9]), both(x[:9])[number], atol=1e-4)
        before, after = (accuracy(model, x[mask], y[mask] % 5) for model in (parents[name], merged))
        sys.stdout.write(f"{name}: {before:.1%} alone, {after:.1%} merged\n")
        assert before > 0.9 and after > before - 0.1


def test_two_small_gpts_that_generate(call: Call, gpts: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    shared = ("--arch", "hf", "--data", gpts / "corpus.txt")
    assert call("check", gpts / "a", gpts / "b", "--arch", "hf")[0] == 0
    code, out, err = call("merge", gpts / "a", gpts / "b", *shared, "--out", tmp_path / "merged")
    assert code == 0 and "transformers.GPT2LMHeadModel.from_pretrained('.')" in out, err
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    tokens = tokenizer("the cat", return_tensors="pt")
    made = model.generate(**tokens, max_new_tokens=5, do_sample=False)
    assert made.shape == (1, 7) and all(
        word in [*files.WORDS, "<unk>", "<end>"] for word in tokenizer.decode(made[0]).split()
    )
    assert model.lm_head.weight is model.transformer.wte.weight
    assert call("compare", tmp_path / "merged", "--data", gpts / "corpus.txt")[0] == 0


def test_a_gpt_that_is_folded_is_built_from_its_configuration(call: Call, gpts: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    shared = ("--arch", "hf", "--data", gpts / "corpus.txt")
    code, _, err = call("fold", gpts / "a", *shared, "--width", "0.5", "--out", tmp_path / "small")
    assert code == 0, err
    small, large = (AutoModelForCausalLM.from_pretrained(path) for path in (tmp_path / "small", gpts / "a"))
    assert small.num_parameters() < large.num_parameters()
    inner = [model.transformer.h[0].mlp.c_fc.weight.shape[1] for model in (small, large)]
    assert inner == [32, 64]


@pytest.mark.slow
def test_a_mixture_gets_fewer_experts_as_the_page_has_it(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What "Merge and fold mixtures of experts" has to type, on a tiny model; `compare` has tests of its own."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    page = Path(__file__).parents[2] / "docs" / "pages" / "how-to" / "experts.md"
    lines = [line.strip() for line in page.read_text(encoding="utf-8").splitlines()]
    monkeypatch.chdir(tmp_path)
    files.qwen3_moe(Path("moe"))
    files.corpus(Path("corpus.txt"))
    typed = [shlex.split(line)[1:] for line in lines if line.startswith("fxmerge ")]
    assert [words[0] for words in typed] == ["fold", "fold", "compare"]
    code, _, err = call(*typed[0])
    assert code == 1 and "'model.layers.0.mlp.experts.gate_up_proj[0]'" in err, err
    code, _, err = call(*typed[1])
    assert code == 0, err
    (loaded,) = (line for line in lines if "from_pretrained(" in line)
    assert '"small"' in loaded
    small, large = (AutoModelForCausalLM.from_pretrained(path).eval() for path in ("small", "moe"))
    assert (small.config.num_experts, large.config.num_experts) == (4, 8)
    assert small.num_parameters() < 0.8 * large.num_parameters()
    tokens = AutoTokenizer.from_pretrained("small")("the cat", return_tensors="pt")
    assert small.generate(**tokens, max_new_tokens=5, do_sample=False).shape == (1, 7)


def test_two_classifiers_of_images(call: Call, tmp_path: Path) -> None:
    """Their image processor comes along."""
    from transformers import AutoImageProcessor, AutoModelForImageClassification

    pair = files.vit(tmp_path / "a", 0), files.vit(tmp_path / "b", 1)
    digits(tmp_path / "images")
    shared = ("--arch", "hf", "--data", tmp_path / "images", "--samples", "64")
    code, _, err = call("merge", *pair, *shared, "--out", tmp_path / "merged")
    assert code == 0, err
    image = torch.zeros(1, 3, 16, 16)
    assert AutoModelForImageClassification.from_pretrained(tmp_path / "merged")(image).logits.shape == (1, 3)
    assert AutoImageProcessor.from_pretrained(tmp_path / "merged").size["height"] == 16


@pytest.mark.slow
def test_shards_of_a_gpt(call: Call, gpts: Path, tmp_path: Path) -> None:
    shared = ("--arch", "hf", "--data", gpts / "corpus.txt", "--shard-size", "10KB")
    assert call("align", gpts / "a", gpts / "b", *shared, "--out", tmp_path / "aligned")[0] == 0
    assert len(io.load(tmp_path / "aligned").files) > 2
    assert call("merge", tmp_path / "aligned", gpts / "b", *shared, "--out", tmp_path / "merged")[0] == 0


@pytest.mark.slow
def test_a_network_that_its_library_cannot_build_has_an_archive(call: Call, tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    io.save(timm.create_model(NAME, num_classes=5).state_dict(), tmp_path / "w.safetensors")
    np.save(tmp_path / "x.npy", np.random.default_rng(0).normal(size=(64, 3, 32, 32)))
    shared = ("--arch", f"timm:{NAME}", "--input", "1x3x32x32", "--data", tmp_path / "x.npy")
    code, _, err = call("fold", tmp_path / "w.safetensors", *shared, "--width", "0.5", "--out", tmp_path / "small")
    assert code == 0
    assert "The network as a directory of timm was not written: the class of the architecture does not take" in err
    assert "size mismatch for" in err
    assert not (tmp_path / "small" / "config.json").exists()
    network = torch.export.load(tmp_path / "small" / "model.pt2").module()
    assert network(torch.zeros(3, 3, 32, 32)).shape == (3, 5)
    assert "## Warnings" in (tmp_path / "small" / "README.md").read_text()


@pytest.mark.slow
def test_how_images_are_prepared_is_kept_for_timm(call: Call, tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    image = pytest.importorskip("PIL.Image")
    for name in ("a", "b"):
        io.save(timm.create_model(NAME, num_classes=5).state_dict(), tmp_path / f"{name}.safetensors")
    (tmp_path / "images").mkdir()
    for i in range(8):
        pixels = np.random.default_rng(i).integers(0, 255, (32, 32, 3), dtype=np.uint8)
        image.fromarray(pixels).save(tmp_path / "images" / f"{i}.png")
    paths = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    way = 'pretrained_cfg_overlay={"mean": [0.5, 0.5, 0.5], "crop_pct": 1.0}'
    shared = ("--arch", f"timm:{NAME}", "--input", "1x3x32x32", "--data", tmp_path / "images", "--set", way)
    code, _, err = call("align", *paths, *shared, "--out", tmp_path / "out")
    assert code == 0 and "was not written" not in err
    loaded = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True)
    config = timm.data.resolve_model_data_config(loaded)
    assert tuple(config["mean"]) == (0.5, 0.5, 0.5) and config["crop_pct"] == 1.0

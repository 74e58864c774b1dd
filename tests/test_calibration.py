"""Calibration data from files."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from fxmerge import io
from fxmerge.calibration import read
from fxmerge.errors import LoaderError
from fxmerge.networks import Network, build
from tests import files


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Network:
    return build(io.load(files.weights(tmp_path_factory.mktemp("mlp") / "w.pt")), "tests.files:mlp")


@pytest.fixture(scope="module")
def language(tmp_path_factory: pytest.TempPathFactory) -> Network:
    return build(io.load(files.gpt2(tmp_path_factory.mktemp("gpt2"))), "hf")


# -------------------------------------------------------------------------- arrays


def test_rows_of_arrays(network: Network, tmp_path: Path) -> None:
    x = np.random.default_rng(0).normal(size=(50, 4))
    np.save(tmp_path / "x.npy", x)
    np.savez(tmp_path / "x.npz", images=x)
    np.savez(tmp_path / "named.npz", input=x, labels=np.arange(50))
    save_file({"x": torch.from_numpy(x)}, tmp_path / "x.safetensors")
    for name in ("x.npy", "x.npz", "x.safetensors"):
        found = read(str(tmp_path / name), network, batch=20)
        assert [len(batch) for batch in found] == [20, 20, 10]
        assert torch.equal(torch.cat(list(found)), torch.from_numpy(x).float())
        assert found.note == f"50 rows in 3 batches, arrays of {tmp_path / name}."
    named = read(str(tmp_path / "named.npz"), network)
    assert [sorted(batch) for batch in named] == [["input"], ["input"]]


def test_samples_are_a_random_choice_by_the_seed(network: Network, tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.arange(400.0).reshape(100, 4))
    one, same, other = (
        torch.cat(list(read(str(tmp_path / "x.npy"), network, samples=10, seed=seed))) for seed in (0, 0, 1)
    )
    assert torch.equal(one, same) and not torch.equal(one, other)
    assert len(one) == 10 and len(one.unique(dim=0)) == 10


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("x.npy", b"", "cannot be read as arrays of numbers"),
        ("x.npz", b"PK\x03\x04", "cannot be read as arrays of numbers"),
        ("x.safetensors", b"\x00" * 7, "ends within its header"),
        ("x.npy", np.zeros(()), "all must have as many, one or more"),
        ("x.npy", np.zeros((0, 4)), "all must have as many, one or more"),
        ("x.npy", np.array([{}], dtype=object), "cannot be read as arrays of numbers"),
        ("x.npz", {"a": np.zeros(2), "b": np.zeros(2)}, "and the network takes 'input'"),
        ("x.csv", b"1,2", "is no file of data by its name"),
    ],
)
def test_arrays_that_are_none(name: str, content: Any, sentence: str, network: Network, tmp_path: Path) -> None:
    path = tmp_path / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif isinstance(content, dict):
        np.savez(path, **content)
    else:
        np.save(path, content)
    with pytest.raises(LoaderError) as raised:
        read(str(path), network)
    assert sentence in str(raised.value)


# -------------------------------------------------------------------------- loaders


def test_loaders_of_the_users(network: Network) -> None:
    found = read("tests.files:batches", network, samples=40)
    assert [len(batch) for batch in found] == [16, 16, 16]
    assert found.files == ()


@pytest.mark.parametrize(
    ("path", "sentence"),
    [
        ("nowhere", "There are no data 'nowhere'"),
        ("tests.no_such:loader", "'tests.no_such' cannot be imported"),
        ("tests.files:loader", "'tests.files' has no 'loader'"),
        ("tests.files:empty", "is empty: it gave no batch"),
        ("tests.files:weights", "gives no batches: TypeError"),
    ],
)
def test_loaders_that_are_none(path: str, sentence: str, network: Network) -> None:
    with pytest.raises(LoaderError) as raised:
        read(path, network)
    assert sentence in str(raised.value)


# -------------------------------------------------------------------------- text


def test_text_for_a_network_that_generates_is_cut_in_blocks(language: Network, tmp_path: Path) -> None:
    path = files.corpus(tmp_path / "corpus.txt")
    found = list(read(str(path), language, length=20, batch=16))
    assert {tuple(batch["input_ids"].shape) for batch in found} == {(16, 20), (8, 20)}
    assert all(bool((batch["attention_mask"] == 1).all()) for batch in found)
    assert next(iter(read(str(path), language, samples=3)))["input_ids"].shape == (3, 32)
    words = [json.dumps({"text": line}) for line in path.read_text().splitlines()]
    (tmp_path / "corpus.jsonl").write_text("\n".join(words))
    again = list(read(str(tmp_path / "corpus.jsonl"), language, length=20, batch=16))
    assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(found, again, strict=True))


def test_text_for_a_network_that_classifies_is_read_line_by_line(tmp_path: Path) -> None:
    own = build(io.load(files.bert(tmp_path)), "hf")
    (tmp_path / "lines.txt").write_text("the cat sat\na dog ran\nthe big red cat\n")
    found = list(read(str(tmp_path / "lines.txt"), own))
    assert [tuple(batch["input_ids"].shape) for batch in found] == [(2, 5), (1, 6)]
    assert found[0]["input_ids"][:, 0].tolist() == [len(files.WORDS) + 1] * 2
    assert [tuple(b["input_ids"].shape) for b in read(str(tmp_path / "lines.txt"), own, length=4)] == [(3, 4)]


def test_a_text_that_is_shorter_than_a_block(language: Network, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("the cat sat\n")
    assert [batch["input_ids"].shape for batch in read(str(tmp_path / "short.txt"), language)] == [(1, 4)]


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("a.txt", b"\n \n", "has no text: every line is empty"),
        ("a.txt", b"caf\xe9", "is not text in UTF-8"),
        ("a.jsonl", b'{"text": "a"}\n{', "Line 2 of"),
        ("a.jsonl", b"[1]", "has no text under 'text', 'content', 'prompt'"),
    ],
)
def test_text_that_is_none(name: str, content: bytes, sentence: str, language: Network, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(LoaderError) as raised:
        read(str(tmp_path / name), language)
    assert sentence in str(raised.value)


def test_the_tokenizer_of_another_network(language: Network, tmp_path: Path) -> None:
    files.gpt2(tmp_path)
    tokenizer = json.loads((tmp_path / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"]["the"] = 900
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    own = build(io.load(tmp_path), "hf")
    with pytest.raises(LoaderError, match="gives token 900, and the network knows 22"):
        read(str(files.corpus(tmp_path / "corpus.txt")), own)


def test_a_directory_without_tokenizer_or_image_processor(tmp_path: Path) -> None:
    bare = build(io.load(files.gpt2(tmp_path / "bare", tokenizer=False)), "hf")
    with pytest.raises(LoaderError, match="has no tokenizer"):
        read(str(files.corpus(tmp_path / "corpus.txt")), bare)
    (bare.directory / "vocab.json").write_text("{")
    with pytest.raises(LoaderError, match=r"The tokenizer of .* cannot be read"):
        read(str(tmp_path / "corpus.txt"), bare)
    picture(tmp_path / "images" / "a.png")
    with pytest.raises(LoaderError, match="has no image processor"):
        read(str(tmp_path / "images"), bare)


# -------------------------------------------------------------------------- images


def picture(path: Path, size: int = 8) -> None:
    image = pytest.importorskip("PIL.Image")
    path.parent.mkdir(exist_ok=True)
    image.fromarray(np.full((size, size, 3), 100, np.uint8)).save(path)


@pytest.mark.parametrize("arch", ["torchvision:squeezenet1_1", "timm:resnet10t"])
def test_images_are_prepared_as_the_library_does(arch: str, tmp_path: Path) -> None:
    library, _, name = arch.partition(":")
    package = pytest.importorskip(library)
    made = package.models.squeezenet1_1() if library == "torchvision" else package.create_model(name)
    io.save(made.state_dict(), tmp_path / "w.safetensors")
    own = build(io.load(tmp_path / "w.safetensors"), arch, inputs=["1x3x32x32"])
    for number in range(3):
        picture(tmp_path / "images" / f"{number}.png")
    (tmp_path / "images" / "labels.csv").write_text("")
    found = read(str(tmp_path / "images"), own, samples=2)
    assert [batch.shape for batch in found] == [(2, 3, 32, 32)]
    assert len(found.files) == 2
    expected = (torch.tensor(100 / 255) - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor([0.229, 0.224, 0.225])
    assert torch.allclose(next(iter(found))[0, :, 5, 5], expected, atol=0.02)


def test_images_are_prepared_by_the_processor_of_a_directory(tmp_path: Path) -> None:
    own = build(io.load(files.vit(tmp_path)), "hf")
    picture(tmp_path / "images" / "a.png")
    (batch,) = read(str(tmp_path / "images"), own)
    assert batch.shape == (1, 3, 16, 16)
    assert torch.allclose(batch, torch.full_like(batch, 100 / 255 * 2 - 1), atol=1e-2)


def test_images_that_are_none(network: Network, tmp_path: Path) -> None:
    with pytest.raises(LoaderError, match="has no images"):
        read(str(tmp_path), network)
    picture(tmp_path / "a.png")
    with pytest.raises(LoaderError, match="says nothing of how images are prepared"):
        read(str(tmp_path), network)


def test_an_image_that_is_damaged(tmp_path: Path) -> None:
    models = pytest.importorskip("torchvision").models
    io.save(models.squeezenet1_1(num_classes=2).state_dict(), tmp_path / "w.safetensors")
    own = build(io.load(tmp_path / "w.safetensors"), "torchvision:squeezenet1_1")
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_bytes(b"\x89PNG")
    with pytest.raises(LoaderError, match=r"The image .* cannot be read"):
        read(str(tmp_path / "images"), own)

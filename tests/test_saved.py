"""Directories of datasets as calibration data."""

from pathlib import Path
from typing import Any

import pytest
import torch

from fxmerge import io
from fxmerge.calibration import read
from fxmerge.errors import LoaderError
from fxmerge.networks import Network, build
from tests import files
from tests.cli.conftest import Call, call  # noqa: F401

datasets = pytest.importorskip("datasets")
pytestmark = pytest.mark.filterwarnings("ignore")  # Those of datasets.


def saved(folder: Path, **columns: Any) -> Path:
    datasets.Dataset.from_dict(columns).save_to_disk(folder)
    return folder


def pictures(folder: Path, names: tuple[str, ...] = ("photo",), count: int = 5) -> Path:
    """Images of several sizes, with labels."""
    from PIL import Image

    generator = torch.Generator().manual_seed(0)

    def image(side: int) -> Any:
        pixels = torch.randint(256, (side, side + 3, 3), generator=generator, dtype=torch.uint8)
        return Image.fromarray(pixels.numpy())

    columns = {name: [image(20 + i) for i in range(count)] for name in names}
    kinds = datasets.Features({**{name: datasets.Image() for name in names}, "label": datasets.Value("int64")})
    datasets.Dataset.from_dict({**columns, "label": list(range(count))}, features=kinds).save_to_disk(folder)
    return folder


@pytest.fixture
def language(tmp_path: Path) -> Network:
    return build(io.load(files.gpt2(tmp_path / "gpt2")), "hf")


@pytest.fixture
def image_network(tmp_path: Path) -> Network:
    return build(io.load(files.vit(tmp_path / "vit")), "hf")


def test_images_are_prepared_as_those_of_a_directory(image_network: Network, tmp_path: Path) -> None:
    found = read(str(pictures(tmp_path / "data")), image_network, batch=2)
    (tmp_path / "files").mkdir()
    for i, row in enumerate(datasets.load_from_disk(str(tmp_path / "data"))):
        row["photo"].save(tmp_path / "files" / f"{i}.png")
    same = read(str(tmp_path / "files"), image_network, batch=2)
    assert [len(own) for own in found] == [2, 2, 1]
    assert all(torch.equal(a, b) for a, b in zip(found, same, strict=True))
    assert found.note.startswith(f"5 rows in 3 batches, the images 'photo' of {tmp_path / 'data'}, prepared by the ViT")
    assert [path.suffix for path in found.files] == [".arrow"]


def test_texts_are_read_as_lines(language: Network, tmp_path: Path) -> None:
    path = files.corpus(tmp_path / "corpus.txt")
    lines = path.read_text().splitlines()
    folder = saved(tmp_path / "data", title=["x"] * 82, text=[*lines, "", None], label=[0] * 82)
    found, same = (read(str(own), language, length=16) for own in (folder, path))
    assert len(found) == len(same)
    assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(found, same, strict=True))
    assert "the texts 'text' of" in found.note


def test_inputs_are_taken_as_they_are(language: Network, tmp_path: Path) -> None:
    rows = [[1, 2, 3], [4, 5], [6, 7, 8]]
    masks = [[1] * len(row) for row in rows]
    folder = saved(tmp_path / "data", input_ids=rows, attention_mask=masks, labels=rows, text=["a", "b", "c"])
    found = list(read(str(folder), language))
    assert [batch["input_ids"].tolist() for batch in found] == [[[1, 2, 3], [6, 7, 8]], [[4, 5]]]
    assert set(found[0]) == {"input_ids", "attention_mask", "labels"}
    labels = read(str(saved(tmp_path / "labels", labels=[0, 1], text=["the cat", "a dog"])), language)
    assert set(next(iter(labels))) == {"input_ids", "attention_mask"}


def test_samples_are_a_random_choice(image_network: Network, tmp_path: Path) -> None:
    folder = pictures(tmp_path / "data", count=12)
    one, two, again = (read(str(folder), image_network, samples=4, seed=seed) for seed in (0, 1, 0))
    first, second, third = (torch.cat(list(own)) for own in (one, two, again))
    assert len(first) == 4 and torch.equal(first, third) and not torch.equal(first, second)


def test_directories_that_are_none(language: Network, image_network: Network, tmp_path: Path) -> None:
    own = datasets.Dataset.from_dict({"text": ["a"]})
    datasets.DatasetDict({"train": own, "test": own}).save_to_disk(tmp_path / "both")
    with pytest.raises(
        LoaderError, match=f"several data sets: name one of {tmp_path}/both/train, {tmp_path}/both/test"
    ):
        read(str(tmp_path / "both"), language)
    assert len(read(str(tmp_path / "both" / "train"), language)) == 1
    with pytest.raises(LoaderError, match="has several columns of images, 'left', 'right'"):
        read(str(pictures(tmp_path / "pair", ("left", "right"))), image_network)
    with pytest.raises(LoaderError, match="has no images or texts, and none with the name of an input"):
        read(str(saved(tmp_path / "numbers", price=[1, 2])), language)
    with pytest.raises(LoaderError, match=r"has no rows|cannot be read by datasets"):
        read(str(saved(tmp_path / "empty", text=[])), language)
    folder = saved(tmp_path / "cut", text=["a"] * 9)
    next(folder.glob("*.arrow")).write_bytes(b"no arrow")
    with pytest.raises(LoaderError, match="cannot be read by datasets"):
        read(str(folder), language)


def test_a_merge_from_the_command_line(call: Call, tmp_path: Path) -> None:  # noqa: F811
    for seed in range(2):
        files.gpt2(tmp_path / "ab"[seed], seed)
    lines = files.corpus(tmp_path / "corpus.txt").read_text().splitlines()
    saved(tmp_path / "data", text=lines)
    typed = ("merge", tmp_path / "a", tmp_path / "b", "--arch", "hf", "--length", "16")
    code, out, err = call(*typed, "--data", tmp_path / "data", "--out", tmp_path / "merged")
    assert code == 0 and "the texts 'text' of" in out, err
    assert call(*typed, "--data", tmp_path / "corpus.txt", "--out", tmp_path / "again")[0] == 0
    states = [dict(io.load(tmp_path / own).items()) for own in ("merged", "again")]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    code, _, err = call("merge", tmp_path / "merged" / "recipe.yaml", "--out", tmp_path / "third")
    assert code == 0, err
    saved(tmp_path / "data2", text=lines[1:])
    text = (tmp_path / "merged" / "recipe.yaml").read_text().replace(str(tmp_path / "data"), str(tmp_path / "data2"))
    (tmp_path / "other.yaml").write_text(text)
    code, _, err = call("merge", tmp_path / "other.yaml", "--out", tmp_path / "fourth")
    assert code == 1 and "are not the data of the recipe" in err

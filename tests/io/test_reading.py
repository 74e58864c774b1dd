"""Files of weights: every form is read, every damage is a sentence."""

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from fxmerge.errors import CheckpointError, OutputError
from fxmerge.io import load, save
from tests.slow import slow


def state() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {
        **nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8)).state_dict(),
        "half": torch.randn(3, dtype=torch.bfloat16),
        "flags": torch.tensor([True, False]),
        "empty": torch.zeros(0, 3),
    }


def equal(one: Any, other: Any) -> bool:
    return sorted(one) == sorted(other) and all(torch.equal(one[n], other[n]) for n in one)


@pytest.mark.parametrize("name", ["w.safetensors", "w.pt", "w.pth", "w.bin", "w.ckpt", "folder"])
def test_what_is_saved_is_read_again(name: str, tmp_path: Path) -> None:
    save(state(), tmp_path / name)
    found = load(tmp_path / name)
    assert sorted(found) == sorted(state())
    assert all(torch.equal(found[n], tensor) for n, tensor in state().items())
    assert found.entries["half"].dtype == "bfloat16" and found.entries["empty"].shape == (0, 3)
    assert found.bytes == sum(t.numel() * t.element_size() for t in state().values())
    assert found.notes == ()
    assert not list(tmp_path.rglob("*.tmp"))


def test_shards_are_as_those_of_transformers(tmp_path: Path) -> None:
    files = save(state(), tmp_path, shard_size=100)
    assert len(files) > 3 and files[-1].name == "model.safetensors.index.json"
    assert all(torch.equal(load(tmp_path)[n], tensor) for n, tensor in state().items())
    assert set(load(files[-1]).files) == set(files)
    index = json.loads(files[-1].read_text())
    assert index["metadata"]["total_size"] == load(tmp_path).bytes


def test_old_files_of_torch_are_read(tmp_path: Path) -> None:
    torch.save(state(), tmp_path / "w.pt", _use_new_zipfile_serialization=False)
    assert equal(load(tmp_path / "w.pt"), state())


def test_tied_tensors_are_written_under_all_their_names(tmp_path: Path) -> None:
    weight = torch.randn(4, 4)
    save({"a": weight, "b": weight, "c": weight[1:]}, tmp_path / "w.safetensors")
    assert torch.equal(load(tmp_path / "w.safetensors")["c"], weight[1:])


# -------------------------------------------------------------------------- wrappers


@pytest.mark.parametrize(
    ("wrapped", "way"),
    [
        (lambda s: {"epoch": 1, "state_dict": s}, "state_dict"),
        (lambda s: {"model": s, "optimizer": {"lr": 0.1}}, "model"),
        (lambda s: {"state": 1, "model": {"module": s, "step": 3}}, "model.module"),
    ],
)
def test_entries_of_a_checkpoint_are_seen_through_and_told(wrapped: Any, way: str, tmp_path: Path) -> None:
    torch.save(wrapped(state()), tmp_path / "w.pt")
    found = load(tmp_path / "w.pt")
    assert equal(found, state())
    assert found.notes == (f"the state dict is its entry {way!r}.",)


def test_two_state_dicts_in_one_file_are_not_guessed_between(tmp_path: Path) -> None:
    torch.save({"model": state(), "state_dict": state()}, tmp_path / "w.pt")
    with pytest.raises(CheckpointError, match=r"several that may be one, 'state_dict' and 'model'. Save one"):
        load(tmp_path / "w.pt")


def entries_of(model: nn.Module) -> dict[str, Any]:
    from fxmerge.io.checkpoint import entry_of

    return {name: entry_of(tensor) for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "model.", "module._orig_mod."])
def test_prefixes_are_taken_away_where_it_is_needed(prefix: str, tmp_path: Path) -> None:
    model = nn.Linear(3, 2)
    save({prefix + name: tensor for name, tensor in model.state_dict().items()}, tmp_path / "w.safetensors")
    found = load(tmp_path / "w.safetensors").fitted(entries_of(model), {})
    assert equal(found, model.state_dict())
    assert found.notes == (f"{prefix!r} was taken from before every name.",)
    wrapped = nn.ModuleDict({"model": model})
    if prefix == "model.":
        kept = load(tmp_path / "w.safetensors").fitted(entries_of(wrapped), {})
        assert kept.prefix == "" and kept.notes == ()


def test_a_prefix_that_only_some_names_have_stays(tmp_path: Path) -> None:
    save({"module.weight": torch.zeros(2, 3), "bias": torch.zeros(2)}, tmp_path / "w.safetensors")
    with pytest.raises(CheckpointError, match=r"'weight' of the network is not in the file, and 'module.weight'"):
        load(tmp_path / "w.safetensors").fitted(entries_of(nn.Linear(3, 2)), {})


# -------------------------------------------------------------------------- what does not fit


@pytest.mark.parametrize(
    ("tensors", "sentence"),
    [
        ({"weight": torch.zeros(2, 3)}, "'bias' of the network is not in the file"),
        ({"weight": torch.zeros(2, 3), "bais": torch.zeros(2)}, "'bias' is near to 'bais'"),
        ({"weight": torch.zeros(2, 4), "bias": torch.zeros(2)}, "has shape (2, 4), and the network's has (2, 3)"),
        ({"weight": torch.zeros(2, 3).char(), "bias": torch.zeros(2)}, "holds int8, and the network's holds float32"),
    ],
)
def test_weights_that_do_not_fit_a_network(tensors: Any, sentence: str, tmp_path: Path) -> None:
    save(tensors, tmp_path / "w.safetensors")
    with pytest.raises(CheckpointError) as raised:
        load(tmp_path / "w.safetensors").fitted(entries_of(nn.Linear(3, 2)), {})
    assert sentence in str(raised.value)


def test_one_name_of_a_tied_tensor_is_enough(tmp_path: Path) -> None:
    save({"a": torch.zeros(2)}, tmp_path / "w.safetensors")
    wanted = {"a": load(tmp_path / "w.safetensors").entries["a"]}
    assert list(load(tmp_path / "w.safetensors").fitted(wanted | {"b": wanted["a"]}, {"a": "a", "b": "a"})) == ["a"]


# -------------------------------------------------------------------------- damage


class Payload:
    """What a stranger may have put into a pickle."""

    def __reduce__(self) -> Any:
        return (Path.touch, (Path("ran"),))


def test_nothing_is_unpickled_by_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": state(), "args": Payload()}, "w.pt")
    with pytest.raises(CheckpointError, match="reading it could run code"):
        load("w.pt")
    assert not Path("ran").exists()
    found = load("w.pt", allow_pickle=True)
    assert Path("ran").exists() and found.notes[0] == "the file was unpickled."
    assert "runs any code that is in the file" in caplog.text


def test_a_pickled_module_gives_its_state_dict(tmp_path: Path) -> None:
    torch.save(nn.Linear(3, 2), tmp_path / "w.pt")
    assert sorted(load(tmp_path / "w.pt", allow_pickle=True)) == ["bias", "weight"]


def test_what_is_no_file_of_weights(tmp_path: Path) -> None:
    (tmp_path / "w.txt").write_text("")
    torch.save([1], tmp_path / "list.pt")
    torch.save({"a": 1}, tmp_path / "number.pt")
    for path, sentence in [
        ("missing.pt", "There is no file or directory"),
        ("w.txt", "is no file of weights by its name"),
        (".", "has no weights: none of model.safetensors"),
        ("list.pt", "holds a list, and no state dict"),
        ("number.pt", "a state dict was looked for, and there is none"),
    ]:
        with pytest.raises(CheckpointError, match=sentence):
            load(tmp_path / path)


def test_shards_that_are_missing_or_not_as_the_index_says(tmp_path: Path) -> None:
    files = save(state(), tmp_path / "whole", shard_size=100)
    index = json.loads(files[-1].read_text())
    for change, sentence in [
        (lambda d, i: (d / files[0].name).unlink(), "which is not there. Copy all shards."),
        (lambda d, i: i["weight_map"].pop("half"), "holds 'half', which"),
        (lambda d, i: i["weight_map"].update(new=files[0].name), "says that 'new' is in the shard"),
        (lambda d, i: i["weight_map"].update(half="../other.safetensors"), "a shard is a file of weights beside"),
        (lambda d, i: i.pop("weight_map"), "is no index of shards: KeyError"),
        (lambda d, i: i.update(weight_map=3), "is no index of shards: TypeError"),
        (lambda d, i: i["weight_map"].update(half=3), "is no index of shards: TypeError"),
    ]:
        copy = Path(shutil.copytree(tmp_path / "whole", tmp_path / "copy", dirs_exist_ok=True))
        changed = json.loads(json.dumps(index))
        change(copy, changed)  # type: ignore[no-untyped-call]
        (copy / files[-1].name).write_text(json.dumps(changed))
        with pytest.raises(CheckpointError, match=sentence):
            load(copy)
        shutil.rmtree(copy)


def test_a_directory_with_several_weights(tmp_path: Path) -> None:
    """One of two forms of one format may be old; of two formats, the safer one is read, and that is told."""
    files = save(state(), tmp_path, shard_size=100)
    torch.save(state(), tmp_path / "pytorch_model.bin")
    assert load(tmp_path).notes == ("pytorch_model.bin beside model.safetensors.index.json was not read.",)
    with pytest.raises(OutputError, match=r"model.safetensors.index.json is there, and would stand beside other"):
        save(state(), tmp_path)
    save(state(), tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"holds model.safetensors and model.safetensors.index.json; give one"):
        load(tmp_path)
    assert equal(load(files[-1]), state())


def header(**entry: Any) -> bytes:
    text = json.dumps({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **entry}}).encode()
    return len(text).to_bytes(8, "little") + text + bytes(8)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "ends within its header"),
        (b"\xff" * 64, "ends within its header"),
        (header()[:-1], "ends before its last tensor: 7 bytes of tensors in place of 8"),
        (header() + b"x", "has more bytes than its tensors"),
        (header(dtype="F64"), "takes 16 bytes, but its data_offsets are"),
        (header(dtype="F3"), "has the dtype 'F3', which is none that torch has"),
        (header(shape=[-2]), "a shape or data_offsets that are not whole numbers"),
        (header(shape=[True, 2]), "a shape or data_offsets that are not whole numbers"),
        (header(shape="ab"), "a shape or data_offsets that are not whole numbers"),
        (header(data_offsets=[4, 12]), "begins at byte 4, not 0"),
        (header(data_offsets=[8]), "but its data_offsets are"),
        (header(more=1), "has no dtype, shape and data_offsets"),
        ((2).to_bytes(8, "little") + b"[]", "it is no mapping of names to tensors"),
        ((2).to_bytes(8, "little") + b"{}", "holds no tensor"),
        ((3).to_bytes(8, "little") + b"\xff{}", "has a header that cannot be read"),
        ((13).to_bytes(8, "little") + b'{"a":1,"a":2}', "it names one tensor twice"),
    ],
)
def test_broken_headers(content: bytes, sentence: str, tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError) as raised:
        load(path)
    assert sentence in str(raised.value)


def broken(content: bytes, rng: random.Random, kind: str) -> bytes:
    """A file cut short, or with a flipped bit in its header."""
    if kind == "cut":
        return content[: rng.randrange(len(content))]
    length = 8 + int.from_bytes(content[:8], "little")
    at, bit = rng.randrange(length), rng.randrange(8)
    return content[:at] + bytes([content[at] ^ (1 << bit)]) + content[at + 1 :]


@pytest.mark.parametrize("seed", [0, *map(slow, range(1, 5))])
@pytest.mark.parametrize("kind", ["cut", "flipped"])
def test_damaged_safetensors_are_refused_or_do_not_fit(kind: str, seed: int, tmp_path: Path) -> None:
    """A flipped bit in a name gives a whole file with another name, which then does not fit."""
    path, rng = tmp_path / "w.safetensors", random.Random(f"{kind}{seed}")
    own = {name: tensor for name, tensor in state().items() if name != "1.num_batches_tracked"}
    save_file(own, path)
    content, wanted = path.read_bytes(), load(path).entries
    for _ in range(60):
        path.write_bytes(broken(content, rng, kind))
        try:
            load(path).fitted(wanted, {})
        except CheckpointError as error:
            assert str(path) in str(error) and str(error).endswith(".")
        else:
            pytest.fail("a damaged file was taken")


@pytest.mark.parametrize("suffix", ["pt", "ckpt"])
def test_files_of_torch_that_are_cut_short(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"w.{suffix}"
    save(state(), path)
    content = path.read_bytes()
    for share in (0.0, 0.001, 0.1, 0.5, 0.9, 0.999):
        path.write_bytes(content[: int(share * len(content))])
        with pytest.raises(CheckpointError):
            load(path)


def test_a_flipped_bit_in_the_values_of_a_file_of_torch(tmp_path: Path) -> None:
    path, value = tmp_path / "w.pt", torch.randn(64)
    save({"a": value, "b": torch.zeros(8)}, path)
    content = path.read_bytes()
    at = content.index(value.numpy().tobytes()) + 17
    path.write_bytes(content[:at] + bytes([content[at] ^ 8]) + content[at + 1 :])
    found = load(path)
    with pytest.raises(CheckpointError, match=r"has a record 'archive/data/0' that is not as it was written"):
        found["b"]


def test_files_of_torch_without_checksums_are_read(tmp_path: Path) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(state(), tmp_path / "w.pt")
    finally:
        torch.serialization.set_crc32_options(True)
    assert equal(load(tmp_path / "w.pt"), state())

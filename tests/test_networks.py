"""Networks are built for the files that they are of."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fxmerge import io
from fxmerge.errors import CheckpointError, FxmergeError, OptionError
from fxmerge.networks import build, skeleton
from tests import files


def same(model: nn.Module, state: Any) -> bool:
    own = model.state_dict()
    return all(torch.equal(own[name], state[name]) for name in state)


@pytest.mark.parametrize("make", [build, skeleton])
def test_the_number_of_classes_follows_from_the_file(make: Any, tmp_path: Path) -> None:
    path = files.weights(tmp_path / "w.safetensors", num_classes=7)
    network = make(io.load(path), "tests.files:mlp")
    assert network.settings == {"num_classes": 7}
    assert network.checkpoint.notes == ("num_classes=7 follows from the shapes in the file.",)
    assert network.model[2].out_features == 7
    assert not network.model.training or make is skeleton
    if make is build:
        assert same(network.model, io.load(path))


def test_other_shapes_need_settings(tmp_path: Path) -> None:
    path = files.weights(tmp_path / "w.safetensors", hidden=6)
    with pytest.raises(CheckpointError, match=r"'0.weight' has shape \(6, 4\), and the network's has \(8, 4\)"):
        build(io.load(path), "tests.files:mlp")
    assert build(io.load(path), "tests.files:mlp", {"hidden": 6}).model[0].out_features == 6
    with pytest.raises(CheckpointError, match="Build the network for it with --set"):
        build(io.load(path), "tests.files:mlp", {"hidden": 6, "num_classes": 4})


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_a_network_has_the_dtype_of_its_file(dtype: torch.dtype, tmp_path: Path) -> None:
    state = {name: tensor.to(dtype) for name, tensor in files.mlp()[0].state_dict().items()}
    io.save(state, tmp_path / "w.safetensors")
    network = build(io.load(tmp_path / "w.safetensors"), "tests.files:mlp")
    assert {p.dtype for p in network.model.parameters()} == {dtype}
    assert same(network.model, state)


def test_files_are_not_mapped_into_the_network(tmp_path: Path) -> None:
    path = files.weights(tmp_path / "w.pt")
    network = build(io.load(path), "tests.files:mlp")
    with torch.no_grad():
        network.model[0].weight.zero_()
    assert io.load(path)["0.weight"].abs().sum() > 0


def test_tied_tensors_stay_tied_and_need_one_name(tmp_path: Path) -> None:
    value = torch.randn(5, 3)
    for state in ({"0.weight": value}, {"2.weight": value}, {"0.weight": value, "2.weight": value}):
        io.save(state, tmp_path / "w.safetensors")
        model: Any = build(io.load(tmp_path / "w.safetensors"), "tests.files:tied").model
        assert model[0].weight is model[2].weight and torch.equal(model[0].weight, value)
    io.save({"0.weight": value, "2.weight": value + 1}, tmp_path / "w.safetensors")
    with pytest.raises(CheckpointError, match=r"different values for '\d.weight' and '\d.weight'"):
        build(io.load(tmp_path / "w.safetensors"), "tests.files:tied")


def test_counters_of_batches_may_be_missing(tmp_path: Path) -> None:
    state = {n: t for n, t in files.unsettled()[0].state_dict().items() if "num_batches" not in n}
    io.save(state, tmp_path / "w.safetensors")
    assert same(build(io.load(tmp_path / "w.safetensors"), "tests.files:unsettled").model, state)


# -------------------------------------------------------------------------- libraries


def test_torchvision_takes_the_number_of_classes(tmp_path: Path) -> None:
    models = pytest.importorskip("torchvision").models
    state = models.squeezenet1_1(weights=None, num_classes=4).state_dict()
    io.save({f"module.{name}": tensor for name, tensor in state.items()}, tmp_path / "w.safetensors")
    network = build(io.load(tmp_path / "w.safetensors"), "torchvision:squeezenet1_1")
    assert network.settings == {"num_classes": 4} and same(network.model, state)
    assert len(network.checkpoint.notes) == 2


def test_directories_of_transformers(tmp_path: Path) -> None:
    network = build(io.load(files.gpt2(tmp_path)), "hf")
    assert type(network.model).__name__ == "GPT2LMHeadModel"
    assert same(network.model, io.load(tmp_path))
    assert network.source.kwargs["input_ids"].shape == (2, 16)
    shapes = skeleton(io.load(tmp_path), "hf")
    assert {p.device.type for p in shapes.model.parameters()} == {"meta"}


def changed(folder: Path, **entries: Any) -> Path:
    config = json.loads((folder / "config.json").read_text()) | entries
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    return folder


@pytest.mark.parametrize("make", [build, skeleton])
@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda d: (d / "config.json").unlink(), "is not there, and --arch hf builds the network from it"),
        (lambda d: (d / "config.json").write_text("{"), "is no configuration of transformers"),
        (lambda d: (d / "config.json").write_text("[]"), "is no configuration of transformers"),
        (lambda d: changed(d, architectures=None), "names no architectures"),
        (lambda d: changed(d, architectures=["Gpt2"]), "names the class 'Gpt2', which transformers does not have"),
        (lambda d: changed(d, model_type="gtp2"), "GPT2LMHeadModel cannot be built from"),
        (lambda d: changed(d, n_embd=18), "has shape"),
    ],
)
def test_configurations_that_do_not_fit(make: Any, change: Any, sentence: str, tmp_path: Path) -> None:
    change(files.gpt2(tmp_path, tokenizer=False))
    with pytest.raises(FxmergeError) as raised:
        make(io.load(tmp_path), "hf")
    assert sentence in str(raised.value)


def test_weights_that_miss_a_tensor_of_the_class(tmp_path: Path) -> None:
    files.gpt2(tmp_path, tokenizer=False)
    state = {name: tensor.clone() for name, tensor in io.load(tmp_path).items()}
    state.pop("transformer.ln_f.bias")
    io.save(state, tmp_path)
    with pytest.raises(CheckpointError, match=r"missing keys, 'transformer.ln_f.bias'"):
        build(io.load(tmp_path), "hf")


@pytest.mark.parametrize("arch", ["hf:gpt2", "mlp", "tests.files:none", "torchvision:resnet19"])
def test_what_is_no_architecture(arch: str, tmp_path: Path) -> None:
    with pytest.raises(OptionError):
        build(io.load(files.weights(tmp_path / "w.safetensors")), arch)

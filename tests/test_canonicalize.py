"""Gains and shifts of normalizations go into the layers around them, and the network computes the same."""

import copy
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fxmerge
from fxmerge.program import canonicalize as inner
from fxmerge.program.canonicalize import fold_norms, plan_folds
from fxmerge.program.capture import capture_program
from tests.slow import but_slow

Inputs = tuple[tuple[Any, ...], dict[str, Any]]
Made = tuple[nn.Module, Inputs]


def drawn(net: nn.Module, seed: int = 0) -> nn.Module:
    """A network of which no gain is one, no shift zero, and no statistic that of a fresh one."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in net.state_dict().items():
            if tensor.is_floating_point() and tensor.ndim <= 1 and "inv_freq" not in name:
                noise = torch.rand(tensor.shape, generator=g)
                positive = name.endswith("running_var") or bool((tensor > 0).all())
                tensor.copy_(0.5 + noise if positive else noise - 0.5)
    return net.eval()


def leaves(output: Any) -> list[Tensor]:
    if hasattr(output, "to_tuple"):
        output = output.to_tuple()
    return [t for t in torch.utils._pytree.tree_leaves(output) if isinstance(t, Tensor)]


def check(net: nn.Module, inputs: Inputs, folds: int) -> tuple[dict[str, Tensor], Any]:
    """What holds for every network: the same outputs, also in its own class, nothing modified, and the same again."""
    before = {name: t.clone() for name, t in net.state_dict().items()}
    wide = copy.deepcopy(net).double()
    call = torch.utils._pytree.tree_map(lambda t: t.double() if t.is_floating_point() else t, inputs)
    made = fxmerge.canonicalize(wide, *call)
    assert not made.training
    _compare(wide, made, call, 1e-9)
    _compare(wide, _loaded(wide, made.state_dict()), call, 1e-9)
    program = capture_program(net, *inputs)
    state, done = fold_norms(program, net.state_dict())
    _compare(net, _loaded(net, state), inputs, 2e-5)
    assert all(torch.equal(t, before[name]) and t.dtype == state[name].dtype for name, t in net.state_dict().items())
    assert len(done) == folds, [str(one) for one in done]
    assert len(plan_folds(program).choose([net.state_dict()])) == folds  # No move is undone.
    again, nothing = fold_norms(program, state)
    assert not nothing
    assert all(torch.equal(t, again[name]) for name, t in state.items())
    return state, done


def _loaded(net: nn.Module, state: dict[str, Tensor]) -> nn.Module:
    own = copy.deepcopy(net)
    own.load_state_dict(state, strict=True)
    return own


def _compare(net: nn.Module, other: nn.Module, inputs: Inputs, tolerance: float) -> None:
    args, kwargs = inputs
    with torch.no_grad():
        for a, b in zip(leaves(net(*args, **kwargs)), leaves(other(*args, **kwargs)), strict=True):
            assert float((a - b).abs().max()) <= tolerance * max(float(a.abs().max()), 1e-3)


def ones(tensor: Tensor) -> bool:
    return torch.equal(tensor, torch.ones_like(tensor))


def zeros(tensor: Tensor) -> bool:
    return torch.equal(tensor, torch.zeros_like(tensor))


# ------------------------------------------------------------------------------------ written by hand


class HandRMS(nn.Module):
    def __init__(self, width: int, offset: float = 0.0) -> None:
        super().__init__()
        self.weight, self.offset = nn.Parameter(torch.ones(width)), offset

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float() if x.dtype != torch.float64 else x
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
        return (self.weight + self.offset if self.offset else self.weight) * wide.to(x.dtype)


class HandLayer(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.gain, self.shift = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        return self.gain * (centred / (centred.var(-1, keepdim=True, correction=0) + 1e-5).sqrt()) + self.shift


NORMS: dict[str, Callable[[int], nn.Module]] = {
    "layer": nn.LayerNorm,
    "rms": nn.RMSNorm,
    "hand-rms": HandRMS,
    "hand-rms-offset": lambda width: HandRMS(width, 1.0),
    "hand-layer": HandLayer,
}


class PreNorm(nn.Module):
    def __init__(self, norm: Callable[[int], nn.Module], bias: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm1, self.norm2, self.last = norm(8), norm(8), norm(8)
        self.qkv, self.proj = nn.Linear(8, 24, bias=bias), nn.Linear(8, 8)
        self.up, self.down, self.head = nn.Linear(8, 12, bias=bias), nn.Linear(12, 8), nn.Linear(8, 3, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4).unbind(0)
        x = x + self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        x = x + self.down(F.gelu(self.up(self.norm2(x))))
        out: Tensor = self.head(self.last(x).mean(1))
        return out


TOKENS: Inputs = ((torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(1)),), {})
PIXELS: Inputs = ((torch.randn(2, 4, 9, 9, generator=torch.Generator().manual_seed(1)),), {})


@pytest.mark.parametrize("norm", NORMS)
def test_gains_and_shifts_of_a_transformer_go_into_what_reads_them(norm: str) -> None:
    net = drawn(PreNorm(NORMS[norm]))
    state, done = check(net, TOKENS, 3)
    assert {one.where for one in done} == {"readers"}
    for name in ("norm1", "norm2", "last"):
        own = [t for key, t in state.items() if key.startswith(name)]
        one = 0.0 if norm == "hand-rms-offset" else 1.0
        assert torch.equal(own[0], torch.full((8,), one))
        assert all(zeros(t) for t in own[1:])


def test_a_shift_that_no_bias_takes_stays_divided_by_its_gain() -> None:
    net = drawn(PreNorm(nn.LayerNorm, bias=False))
    state, done = check(net, TOKENS, 3)
    assert {one.where for one in done} == {"readers, shift kept"}
    assert ones(state["norm1.weight"])
    before = net.state_dict()
    torch.testing.assert_close(state["norm1.bias"], before["norm1.bias"] / before["norm1.weight"])


def test_a_gain_of_zero_divides_no_shift() -> None:
    net = drawn(PreNorm(nn.LayerNorm, bias=False))
    with torch.no_grad():
        net.norm1.weight[2] = 0.0  # type: ignore[index, union-attr, operator]
    state, _ = check(net, TOKENS, 2)
    assert torch.equal(state["norm1.weight"], net.state_dict()["norm1.weight"])


def test_a_gain_of_zero_is_moved_where_nothing_is_divided() -> None:
    net = drawn(PreNorm(nn.LayerNorm))
    with torch.no_grad():
        net.norm1.weight[2] = 0.0  # type: ignore[index, union-attr, operator]
    state, _ = check(net, TOKENS, 3)
    assert ones(state["norm1.weight"])
    assert zeros(state["qkv.weight"][:, 2])


class Around(nn.Module):
    """A norm, and what becomes of its result."""

    def __init__(self, then: Callable[["Around", Tensor], Tensor], **parts: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.then = then
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, x: Tensor) -> Tensor:
        return self.then(self, x)


def linear(width: int = 8, out: int = 6) -> nn.Linear:
    torch.manual_seed(3)
    return nn.Linear(width, out)


def _shared(net: Any, x: Tensor) -> Tensor:
    for _ in range(3):
        x = x + net.down(torch.relu(net.up(net.norm(x))))
    return x


def _sliced(net: Any, x: Tensor) -> Tensor:
    other = net.other(x)
    a, b = net.layer.weight[:3], net.layer.weight[3:]
    return F.linear(net.norm(x), a, net.layer.bias[:3]) * F.linear(other, b, net.layer.bias[3:])


def _windows(net: Any, x: Tensor) -> Tensor:
    x = net.norm(x).roll(2, 1)
    x = F.pad(x, (0, 0, 1, 2))[:, 1:7]
    x = x.reshape(-1, 2, 3, 8).transpose(1, 2).reshape(-1, 6, 8)
    return net.layer(torch.cat([x, x[:, :2]], 1))  # type: ignore[no-any-return]


CASES: dict[str, tuple[Callable[[Any, Tensor], Tensor], dict[str, nn.Module], int]] = {
    "scaled": (lambda m, x: m.layer(m.norm(x) * 0.25), {"layer": linear()}, 1),
    "two readers": (lambda m, x: m.layer(m.norm(x)) + m.layer2(m.norm(x)), {"layer": linear(), "layer2": linear()}, 1),
    "gated": (lambda m, x: m.layer(m.norm(x) * torch.sigmoid(x)), {"layer": linear()}, 1),
    "flattened": (lambda m, x: m.layer(m.norm(x).flatten(1)), {"layer": linear(40)}, 1),
    "beside others": (lambda m, x: m.layer(torch.cat([x, m.norm(x)], -1)), {"layer": linear(16)}, 1),
    "among others": (lambda m, x: m.layer(torch.cat([x, m.norm(x)], 1)), {"layer": linear()}, 0),
    "read by a sum": (lambda m, x: m.layer(m.norm(x)) + m.norm(x)[..., :6], {"layer": linear()}, 0),
    "given out": (lambda m, x: (m.layer(m.norm(x)), m.norm(x)), {"layer": linear()}, 0),  # type: ignore[dict-item]
    "activated": (lambda m, x: m.layer(torch.relu(m.norm(x))), {"layer": linear()}, 0),
    "two norms": (lambda m, x: m.layer(m.norm(m.other(x))), {"other": nn.LayerNorm(8), "layer": linear()}, 1),
    "weight read elsewhere": (lambda m, x: m.layer(m.norm(x)) + m.layer(x), {"layer": linear()}, 0),
    "layers shared": (_shared, {"up": linear(8, 6), "down": linear(6, 8)}, 1),
    "parts of a weight": (_sliced, {"other": nn.Tanh(), "layer": linear()}, 1),
    "windows": (_windows, {"layer": linear()}, 1),
    "einsum": (lambda m, x: torch.einsum("nti,oi->nto", m.norm(x), m.layer.weight), {"layer": linear()}, 1),
    "left": (lambda m, x: m.layer.weight @ m.norm(x[0]).T, {"layer": linear()}, 1),
    "conv": (lambda m, x: m.layer(m.norm(x).transpose(1, 2)), {"layer": nn.Conv1d(8, 6, 3)}, 1),
    "padded conv": (lambda m, x: m.layer(m.norm(x).transpose(1, 2)), {"layer": nn.Conv1d(8, 6, 3, padding=1)}, 1),
    "padded by name": (lambda m, x: m.layer(m.norm(x).mT), {"layer": nn.Conv1d(8, 6, 3, padding="same")}, 1),
    "grouped conv": (lambda m, x: m.layer(m.norm(x).mT), {"layer": nn.Conv1d(8, 6, 3, groups=2)}, 1),
    "transposed conv": (lambda m, x: m.layer(m.norm(x).mT), {"layer": nn.ConvTranspose1d(8, 6, 3, groups=2)}, 1),
    "padded before": (lambda m, x: m.layer(F.pad(m.norm(x).mT, (1, 1))), {"layer": nn.Conv1d(8, 6, 3)}, 1),
    "pooled": (lambda m, x: m.layer(F.adaptive_avg_pool1d(m.norm(x).mT, 1).squeeze(-1)), {"layer": linear()}, 1),
    "dropout": (lambda m, x: m.layer(m.drop(m.norm(x))), {"layer": linear(), "drop": nn.Dropout(0.5)}, 1),
}
"""What becomes of the result of a norm, and whether its gain is moved."""
KEEPS = ("windows", "gated", "einsum", "left", "padded conv", "padded by name", "transposed conv", "padded before")


@pytest.mark.parametrize("case", CASES)
def test_a_gain_is_moved_where_all_that_reads_it_is_a_layer(case: str) -> None:
    then, parts, moved = CASES[case]
    net = drawn(Around(then, norm=nn.LayerNorm(8), **parts))
    state, done = check(net, TOKENS, moved)
    if moved:
        assert done[0].where == ("readers, shift kept" if case in KEEPS else "readers")
        assert ones(state["norm.weight"])
        assert zeros(state["norm.bias"]) == (case not in KEEPS)
    else:
        assert torch.equal(state["norm.weight"], net.state_dict()["norm.weight"])


class Tied(nn.Module):
    def __init__(self, tied: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.tokens, self.norm, self.head = nn.Embedding(7, 8), nn.RMSNorm(8), nn.Linear(8, 7, bias=False)
        if tied:
            self.head.weight = self.tokens.weight

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.norm(self.tokens(x)))
        return out


@pytest.mark.parametrize("tied", [True, False])
def test_a_head_that_is_tied_to_an_embedding_takes_no_gain(tied: bool) -> None:
    state, _ = check(drawn(Tied(tied)), ((torch.tensor([[1, 2, 3], [4, 5, 6]]),), {}), 1 - tied)
    assert ones(state["norm.weight"]) is not tied


# ------------------------------------------------------------------------------------ batch norms and branches


class Bottleneck(nn.Module):
    """Convolutions with batch norms, the last of which meets a sum."""

    def __init__(self, affine: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.expand, self.norm1 = nn.Conv2d(4, 12, 1, bias=False), nn.BatchNorm2d(12)
        self.deep, self.norm2 = nn.Conv2d(12, 12, 3, padding=1, groups=12, bias=False), nn.BatchNorm2d(12)
        self.project, self.norm3 = nn.Conv2d(12, 4, 1, bias=False), nn.BatchNorm2d(4, affine=affine)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu6(self.norm2(self.deep(F.relu6(self.norm1(self.expand(x))))))
        x = x + self.norm3(self.project(y))
        out: Tensor = self.head(torch.relu(x).mean((2, 3)))
        return out


@pytest.mark.parametrize("affine", [True, False])
def test_the_scale_of_a_batch_norm_goes_into_the_convolution_before_it(affine: bool) -> None:
    net = drawn(Bottleneck(affine))
    state, done = check(net, PIXELS, 1)
    assert done[0].where == "writer" and done[0].into == ("project.weight",)
    if affine:
        assert zeros(state["norm3.running_mean"]) and ones(state["norm3.running_var"])
        torch.testing.assert_close(state["norm3.weight"], torch.full((4,), (1 + 1e-5) ** 0.5))
    else:
        torch.testing.assert_close(state["norm3.running_var"], torch.full((4,), 1 - 1e-5))


def test_a_batch_norm_before_a_layer_goes_into_it() -> None:
    net = drawn(nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.Conv2d(6, 5, 3), nn.ReLU()))
    state, done = check(net, PIXELS, 1)
    assert done[0].where == "readers" and done[0].into == ("2.weight", "2.bias")
    assert zeros(state["1.bias"]) and zeros(state["1.running_mean"])


@pytest.mark.parametrize("norm", [nn.GroupNorm(2, 6), nn.InstanceNorm2d(6, affine=True)])
def test_norms_over_places_go_into_the_layer_that_reads_them(norm: nn.Module) -> None:
    net = drawn(nn.Sequential(nn.Conv2d(4, 6, 3), norm, nn.Conv2d(6, 5, 3), nn.ReLU()))
    state, _ = check(net, PIXELS, 1)
    assert ones(state["1.weight"]) and zeros(state["1.bias"])


def _branch(net: Any, x: Tensor) -> Tensor:
    return x + net.layer(torch.relu(x)).mT.reshape(len(x), 8, -1).mT * net.norm.weight


def test_the_gain_of_a_branch_goes_into_the_layer_before_it() -> None:
    net = drawn(Around(_branch, layer=linear(8, 8), norm=nn.RMSNorm(8)))
    state, done = check(net, TOKENS, 1)
    assert done[0].where == "writer" and done[0].into == ("layer.weight", "layer.bias")
    assert ones(state["norm.weight"])


def test_a_norm_of_what_a_layer_writes_stays_where_a_sum_reads_it() -> None:
    """Its gain comes after it: the layer before cannot stand in for it."""
    net = Around(lambda m, x: x + m.norm(m.layer(x)), layer=linear(8, 8), norm=nn.LayerNorm(8))
    check(drawn(net), TOKENS, 0)


@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize("groups", [1, 2])
def test_writers_of_every_kind(groups: int, transposed: bool) -> None:
    kind = nn.ConvTranspose2d if transposed else nn.Conv2d
    net = Around(
        lambda m, x: x + m.norm(m.layer(x)), layer=kind(4, 4, 3, padding=1, groups=groups), norm=nn.BatchNorm2d(4)
    )
    _, done = check(drawn(net), PIXELS, 1)
    assert done[0].where == "writer"


# ------------------------------------------------------------------------------------ several states, and the check


def test_all_states_are_moved_alike() -> None:
    nets = [drawn(PreNorm(nn.LayerNorm, bias=False), seed) for seed in range(3)]
    with torch.no_grad():
        nets[1].norm2.weight[0] = 0.0  # type: ignore[index, union-attr, operator]
        nets[2].last.weight.fill_(1.0)  # type: ignore[union-attr, operator]
    plan = plan_folds(capture_program(nets[0], *TOKENS))
    states, done = plan.apply_all([net.state_dict() for net in nets])
    assert [one.parameters[0] for one in done] == ["norm1.weight", "last.weight"]
    for net, state in zip(nets, states, strict=True):
        with torch.no_grad():
            expected = net(*TOKENS[0])
            net.load_state_dict(state)
            torch.testing.assert_close(net(*TOKENS[0]), expected, rtol=1e-4, atol=1e-5)


def test_a_move_that_changes_outputs_is_undone(caplog: pytest.LogCaptureFixture, monkeypatch: Any) -> None:
    net = drawn(PreNorm(nn.LayerNorm))
    real = inner.Move.apply

    def wrong(self: Any, state: dict[str, Tensor], where: str) -> None:
        real(self, state, where)
        if "norm2.weight" in self.site.parameters:
            state["up.weight"] = state["up.weight"] * (1 + 1e-7)

    monkeypatch.setattr(inner.Move, "apply", wrong)
    with caplog.at_level(logging.WARNING):
        state, done = fold_norms(capture_program(net, *TOKENS), net.state_dict())
    assert [one.parameters[0] for one in done] == ["norm1.weight", "last.weight"]
    assert torch.equal(state["norm2.weight"], net.state_dict()["norm2.weight"])
    assert "'norm2.weight', 'norm2.bias' of layer_norm_1" in caplog.text


# ------------------------------------------------------------------------------------ networks of others


def _timm(make: Callable[[Any], nn.Module], size: int) -> Made:
    models = pytest.importorskip("timm").models
    torch.manual_seed(0)
    return make(models), ((torch.randn(2, 3, size, size),), {})


SIZES = {"vocab_size": 17, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def _text(kind: str, **sizes: Any) -> Made:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    name = kind.partition("For")[0]
    name = name.removesuffix("Model")
    config = getattr(transformers, f"{name.removesuffix('LMHead')}Config")(**SIZES, **sizes)
    tokens = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])
    kwargs = {"input_ids": tokens, **({"decoder_input_ids": tokens[:, :3]} if kind.startswith("T5") else {})}
    return getattr(transformers, kind)(config), ((), kwargs)


NETWORKS: dict[str, tuple[Callable[[], Made], int, tuple[str, ...]]] = {
    "vit": (
        lambda: _timm(
            lambda m: m.vision_transformer.VisionTransformer(
                img_size=16, patch_size=8, embed_dim=16, depth=2, num_heads=2, num_classes=3, init_values=0.1
            ),
            16,
        ),
        9,  # Two norms and two gains of branches in each block, and the last norm.
        (),
    ),
    "llama": (
        lambda: _text(
            "LlamaForCausalLM",
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
        ),
        5,
        (),
    ),
    "gpt2": (
        lambda: _text("GPT2LMHeadModel", n_embd=16, n_layer=2, n_head=2, n_positions=16),
        4,
        ("transformer.ln_f.weight",),  # Its reader is tied to the embedding.
    ),
    "bert": (
        lambda: _text("BertModel", hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4),
        0,
        ("encoder.layer.0.output.LayerNorm.weight",),
    ),
    "t5": (
        lambda: _text("T5ForConditionalGeneration", d_model=16, d_ff=24, num_layers=2, num_heads=2, d_kv=8),
        10,
        ("encoder.final_layer_norm.weight", "decoder.final_layer_norm.weight"),  # One is an output, one's head is tied.
    ),
    "swin": (
        lambda: _timm(
            lambda m: m.swin_transformer.SwinTransformer(
                img_size=16, patch_size=2, embed_dim=8, depths=(2, 2), num_heads=(2, 2), window_size=4, num_classes=3
            ),
            16,
        ),
        10,
        ("patch_embed.norm.weight",),
    ),
    "convnext": (
        lambda: _timm(lambda m: m.convnext.ConvNeXt(depths=(1, 1, 1, 1), dims=(4, 8, 8, 8), num_classes=3), 64),
        12,
        ("stem.1.weight",),
    ),
}


@pytest.mark.parametrize("name", but_slow(NETWORKS, ["vit", "llama", "bert"]))
@pytest.mark.filterwarnings("ignore")
def test_networks_of_others(name: str) -> None:
    make, moved, left = NETWORKS[name]
    net, inputs = make()
    state, _ = check(drawn(net), inputs, moved)
    before = net.state_dict()
    assert all(torch.equal(state[key], before[key]) for key in left)

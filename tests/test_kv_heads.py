"""Fewer key/value heads than query heads: what was planted comes back, and what cannot be is refused."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fxmerge
from fxmerge.program.run import Inputs
from tests.oracle import architectures
from tests.slow import but_slow, slow

SIZE = 4
"""The dimensions of a head."""


def split(x: Tensor) -> Tensor:
    """Heads in a dimension of their own: (n, heads, tokens, SIZE)."""
    return x.unflatten(-1, (-1, SIZE)).transpose(1, 2)


def joined(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(2)


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=q.shape[1] != k.shape[1])


def products(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = (q @ k.transpose(-1, -2) / 2).masked_fill(torch.ones(q.shape[2], k.shape[2]).triu(1).bool(), -1e9)
    return scores.softmax(-1) @ v


def einsums(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Keys come first, and scores have their dimensions in another order."""
    return torch.einsum("bhkq,bhkd->bhqd", torch.einsum("bhkd,bhqd->bhkq", k, q).softmax(-2), v)


def repeated(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    return products(q, k, v)


class Apart(nn.Module):
    """Attention with a layer for queries, keys and values each. These come from the input, or from another one."""

    def __init__(self, attend: Any, heads: int = 4, groups: int = 4, other: int = 16) -> None:
        super().__init__()
        self.attend, self.groups = attend, groups
        self.stem, self.q, self.o = nn.Linear(6, 16), nn.Linear(16, heads * SIZE), nn.Linear(heads * SIZE, 16)
        self.k, self.v = (nn.Linear(other, groups * SIZE) for _ in range(2))
        self.out = nn.Linear(16, 3)

    def forward(self, x: Tensor, memory: Tensor | None = None) -> Tensor:
        x = self.stem(x)
        q, k, v = self.q(x), *(own(x if memory is None else memory) for own in (self.k, self.v))
        y: Tensor = self.out(x + self.o(joined(self.attend(*map(split, (q, k, v))))))
        return y

    def pairs(self) -> list[list[Tensor]]:
        return [[layer.weight, layer.bias] for layer in (self.k, self.v)]


class Packed(nn.Module):
    """Attention with one layer for queries, keys and values."""

    def __init__(self, cut: str, heads: int = 4, groups: int = 4) -> None:
        super().__init__()
        self.cut, self.heads, self.groups = cut, heads, groups
        self.stem, self.qkv = nn.Linear(6, 16), nn.Linear(16, (heads + 2 * groups) * SIZE)
        self.o, self.out = nn.Linear(heads * SIZE, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        packed, a, b = self.qkv(x), self.heads * SIZE, (self.heads + self.groups) * SIZE
        if self.cut == "unflatten":
            q, k, v = packed.unflatten(-1, (3, self.heads, SIZE)).permute(2, 0, 3, 1, 4)
        else:
            parts = {
                "chunk": lambda: packed.chunk(3, -1),
                "split": lambda: packed.split(a, -1),
                "split with sizes": lambda: packed.split([a, b - a, b - a], -1),
                "slice": lambda: (packed[..., :a], packed[..., a:b], packed[..., b:]),
            }
            q, k, v = map(split, parts[self.cut]())
        y: Tensor = self.out(x + self.o(joined(sdpa(q, k, v))))
        return y

    def pairs(self) -> list[list[Tensor]]:
        own = [self.qkv.weight, self.qkv.bias]
        first, each = self.heads * SIZE, self.groups * SIZE
        return [[p[at : at + each] for p in own] for at in (first, first + each)]


def plant(pairs: Sequence[Sequence[Tensor]], heads: int, groups: int) -> None:
    """Makes the heads of random groups copies of each other, with the dimensions inside of them in other orders."""
    with torch.no_grad():
        for own in torch.randperm(heads).view(groups, -1).tolist():
            for head in own[1:]:
                for tensors in pairs:
                    order = torch.randperm(SIZE)
                    for tensor in tensors:
                        by_head = tensor.view(heads, SIZE, -1)
                        by_head[head] = by_head[own[0]][order]


def as_given(batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return (batch if isinstance(batch, tuple) else (batch,)), {}


GIVEN: Inputs = as_given


def fold(model: nn.Module, width: Any, args: tuple[Tensor, ...], loader: Any = None) -> Any:
    return fxmerge.fold(model, loader, width, example=args, inputs=GIVEN, run=fxmerge.Run(progress=False))


def tokens(count: int = 3, length: int = 5) -> Tensor:
    return torch.randn(count, length, 6, dtype=torch.float64)


CASES: dict[str, Any] = {
    "sdpa": lambda: Apart(sdpa),
    "matmul and softmax": lambda: Apart(products),
    "einsum, keys first": lambda: Apart(einsums),
    "grouped queries, native": lambda: Apart(sdpa, 8, 4),
    "grouped queries, repeated": lambda: Apart(repeated, 8, 4),
    "keys and values of another input": lambda: Apart(sdpa, other=5),
    "chunk": lambda: Packed("chunk"),
    "split": lambda: Packed("split"),
    "split with sizes": lambda: Packed("split with sizes", 8, 4),
    "slice": lambda: Packed("slice"),
}


@pytest.mark.parametrize("data", [False, True], ids=["no data", "data"])
@pytest.mark.parametrize("name", but_slow(CASES, 3))
def test_planted_groups_come_back(name: str, data: bool) -> None:
    torch.manual_seed(0)
    model = CASES[name]().double().eval()
    plant(model.pairs(), 4, 2)
    more = (torch.randn(3, 7, 5, dtype=torch.float64),) if "another" in name else ()
    args = (tokens(), *more)
    loader = [(tokens(8), *(torch.randn(8, 7, 5).double() for _ in more)) for _ in range(2)] if data else None
    folded = fold(model, {"kv heads of *": 0.5}, args, loader)
    assert (4, 2) in fxmerge.report(folded).widths.values()
    assert (folded(*args) - model(*args)).abs().max() < 1e-9
    folded.graph.lint()
    larger = tuple(torch.cat([a, a[:1]]) for a in args)
    assert (folded(*larger) - model(*larger)).abs().max() < 1e-9
    torch.testing.assert_close(torch.export.export(folded, args).module()(*args), folded(*args))
    torch.testing.assert_close(pickle.loads(pickle.dumps(folded))(*args), folded(*args))
    # All heads of queries are there, and half of the others.
    before = sum(p.numel() for tensors in model.pairs() for p in tensors)
    after = sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in folded.parameters())
    assert after == before // 2


def test_the_report_tells_where_units_went() -> None:
    """Units that became one were equal, and the query heads of a group are neighbours."""
    torch.manual_seed(0)
    model = Apart(sdpa).double()
    plant(model.pairs(), 4, 2)
    recipe = fxmerge.Recipe(match=fxmerge.Zip(continuous=False))
    folded = fxmerge.fold(model, None, {"kv heads of *": 2}, recipe, example=tokens())
    (images,) = fxmerge.report(folded).images
    for name, merged in (("k", folded.k), ("v", folded.v)):
        torch.testing.assert_close(merged.weight[images[f"{name}.weight[0]"]], getattr(model, name).weight)
    heads, queries = images["kv heads of q.weight[0]"], images["blocks of q.weight[0]"]
    assert sorted(queries) == [0, 1, 2, 3] and [q // 2 for q in queries] == heads
    torch.testing.assert_close(folded.q.weight[images["q.weight[0]"]], model.q.weight)


@pytest.mark.parametrize("width", [1, 1.0, 4])
def test_as_many_heads_are_the_same_network(width: float) -> None:
    model = Apart(sdpa).double()
    folded, x = fold(model, {"kv heads of *": width}, (tokens(),)), tokens()
    assert torch.equal(folded(x), model(x)) and not fxmerge.report(folded).widths


def test_other_classes_have_widths_of_their_own() -> None:
    torch.manual_seed(0)
    model, loader = Apart(sdpa), [tokens(16).float() for _ in range(4)]
    folded = fold(model, {"*": 0.5, "kv heads of *": 2}, (loader[0],), loader)
    widths = fxmerge.report(folded).widths
    assert widths["stem.weight[0]"] == (16, 8) and widths["kv heads of q.weight[0]"] == (4, 2)
    assert not {"blocks of q.weight[0]", "q.weight[0]"} & widths.keys()
    assert fxmerge.report(folded).recipe["match"]["width"] == {"*": 0.5, "kv heads of *": 2}


def test_a_fold_of_a_fold() -> None:
    torch.manual_seed(0)
    model = Apart(products).double()
    plant(model.pairs(), 4, 1)
    once = fold(model, {"kv heads of *": 2}, (tokens(),))
    twice, x = fold(once, {"kv heads of *": 0.5}, (tokens(),)), tokens()
    assert twice.k.weight.shape == (SIZE, 16) and (twice(x) - model(x)).abs().max() < 1e-9


REFUSED: list[tuple[Any, dict[str, float], str]] = [
    (lambda: Apart(sdpa), {"kv heads of *": 3}, "for 3 of the 4 heads 'kv heads of q.weight.0.'.*the nearest one is 2"),
    (lambda: Apart(sdpa), {"kv heads of *": 0.7}, "for 3 of the 4 heads"),
    (lambda: Apart(sdpa), {"kv heads of *": 8}, "for 8 of the 4 heads.*nearest one is 4"),
    (lambda: Apart(sdpa), {"kv heads of k*": 2}, "no such heads of keys and values. It has 'kv heads of q.weight.0.'"),
    (lambda: nn.Sequential(nn.Linear(6, 3)), {"kv heads of *": 2}, "It has none"),
    (lambda: Packed("unflatten"), {"kv heads of *": 2}, "cannot be had for 'kv heads of qkv.weight.0.': Graph node"),
]


@pytest.mark.parametrize(("build", "width", "match"), REFUSED)
def test_what_cannot_be_is_refused(build: Any, width: dict[str, float], match: str) -> None:
    with pytest.raises(fxmerge.OptionError, match=match):
        fold(build().double(), width, (tokens(),))


class Biased(nn.Module):
    """Attention in which each head has a constant of its own, so that none can take the place of another."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(16, 16) for _ in range(4))
        self.register_buffer("slopes", torch.arange(4.0)[:, None, None] * torch.arange(5.0), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (split(own(x)) for own in (self.q, self.k, self.v))
        y: Tensor = self.o(joined((q @ k.transpose(-1, -2) + self.slopes).softmax(-1) @ v))
        return y


def test_heads_that_cannot_move_are_none_to_merge() -> None:
    with pytest.raises(fxmerge.OptionError, match="It has none"):
        fxmerge.fold(Biased(), width={"kv heads of *": 2}, example=torch.zeros(2, 5, 16))


def test_a_merge_of_two_networks_refuses_them() -> None:
    match = fxmerge.Zip(width={"kv heads of *": 0.5})
    with pytest.raises(fxmerge.OptionError, match=r"fxmerge\.fold merges in one network"):
        fxmerge.merge(Apart(sdpa), Apart(sdpa), [tokens().float()], fxmerge.Recipe(match=match))


class Mixed(nn.Module):
    """Beside attention, queries and keys of a head are added: they are one class whatever attention does."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(6, 16) for _ in range(4))
        self.o = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (split(own(x)) for own in (self.q, self.k, self.v))
        y: Tensor = self.o(joined(sdpa(q, k, v) + (q + k).tanh()))
        return y


def test_heads_that_meet_those_of_queries_elsewhere_are_refused() -> None:
    with pytest.raises(fxmerge.OptionError, match="something else ties them to the heads of queries"):
        fold(Mixed().double(), {"kv heads of *": 2}, (tokens(),))


def turn(pairs: Sequence[Sequence[Tensor]], heads: int, groups: int) -> None:
    """Makes the heads of random groups copies of each other, each in a basis of its own."""
    with torch.no_grad():
        for own in torch.randperm(heads).view(groups, -1).tolist():
            for head in own[1:]:
                for tensors in pairs:
                    rotation = torch.linalg.qr(torch.randn(SIZE, SIZE, dtype=torch.float64))[0]
                    for tensor in tensors:
                        by_head = tensor.view(heads, SIZE, -1)
                        by_head[head] = rotation @ by_head[own[0]]


@pytest.mark.parametrize("data", [False, True], ids=["no data", "data"])
@pytest.mark.parametrize("name", but_slow(["sdpa", "matmul and softmax", "grouped queries, native", "chunk"]))
def test_rotated_heads_come_back_by_changes_of_basis(name: str, data: bool) -> None:
    torch.manual_seed(0)
    model = CASES[name]().double().eval()
    turn(model.pairs(), 4, 2)
    x, run = tokens(), fxmerge.Run(progress=False)
    loader = [tokens(8) for _ in range(2)] if data else None
    found = {}
    for continuous in (False, True):
        recipe = fxmerge.Recipe(match=fxmerge.Zip(continuous=continuous), fit=None)
        found[continuous] = fxmerge.fold(model, loader, {"kv heads of *": 0.5}, recipe, example=x, run=run)
    errors = {continuous: (folded(x) - model(x)).detach().abs().max().item() for continuous, folded in found.items()}
    # Products of activations are sums in single precision.
    assert errors[True] < (1e-5 if data else 1e-9) < 1e-4 < errors[False]
    report = fxmerge.report(found[True])
    assert "orthogonal" in report.bases.values() and report.images[0].keys().isdisjoint(report.bases)


def test_the_nearer_of_two_bases_is_kept() -> None:
    torch.manual_seed(0)
    model, data = Apart(sdpa), [tokens().float() for _ in range(4)]
    errors = {}
    for way in (True, False, "auto"):
        recipe = fxmerge.Recipe(match=fxmerge.Zip(continuous=way))
        report = fxmerge.report(fxmerge.fold(model, data, {"kv heads of *": 0.5}, recipe))
        errors[way] = report.errors["merged"]
        assert report.widths["kv heads of q.weight[0]"] == (4, 2)
    assert errors["auto"] == min(errors[True], errors[False]) != max(errors[True], errors[False])


ARCHITECTURES: dict[str, str] = {
    "grouped queries": "",
    "decoder layer": "rows of 'layer.multihead_attn.in_proj_weight' have inputs of their own",
    "grouped queries, native": "",
    "rotary attention, norms of queries and keys": "",
    "rotary attention over a plane, but for one token": "",
    "attention, three streams of three widths": "cannot be had for 'kv heads of attention.q_proj_weight.0.'",
    "ViT": "cannot be had for 'kv heads of attention.1.qkv.weight.0.'",
    "weights by head": "It has none",
}
"""Networks of the tests of symmetries, each with why its key/value heads cannot be merged, if they cannot."""


@pytest.mark.parametrize("name", but_slow(ARCHITECTURES, 2))
def test_an_architecture_has_fewer_heads_or_an_error_says_why_not(name: str) -> None:
    """That a result with merged heads is right, where these are equal, is proven before anything is returned."""
    model, args = architectures.CASES[name]()
    example: dict[str, Any] = {"example": args, "inputs": lambda given: (given, {})}
    why = ARCHITECTURES[name]
    with pytest.raises(fxmerge.OptionError, match=why) if why else nullcontext():
        folded = fxmerge.fold(model.eval(), width={"kv heads of *": 0.5}, **example)
        assert (2, 1) in fxmerge.report(folded).widths.values()


# ------------------------------------------------------------------------------------ transformers


def llama(heads: int, groups: int) -> Any:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "intermediate_size": 12, "num_attention_heads": heads, "num_key_value_heads": groups}
    none = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    config = transformers.LlamaConfig(**sizes, head_dim=SIZE, num_hidden_layers=2, vocab_size=40, **none)
    return transformers.LlamaForCausalLM(config).double().eval()


@pytest.mark.parametrize(("heads", "groups"), [(4, 4), slow((8, 4))])
def test_a_llama_is_rebuilt_with_fewer_heads(heads: int, groups: int) -> None:
    torch.manual_seed(0)
    model = llama(heads, groups)
    for layer in model.model.layers:
        with torch.no_grad():  # Rotary positions tell the dimensions of keys apart, not those of values.
            for one, two in torch.randperm(groups).view(2, -1).tolist():
                for projection, order in (
                    (layer.self_attn.k_proj, slice(None)),
                    (layer.self_attn.v_proj, [2, 0, 3, 1]),
                ):
                    by_head = projection.weight.view(groups, SIZE, -1)
                    by_head[two] = by_head[one][order]
    batches = [{"input_ids": torch.randint(0, 40, (4, length))} for length in (8, 9)]
    folded = fxmerge.fold(model, batches, {"kv heads of *": 2}, run=fxmerge.Run(progress=False))
    changes = fxmerge.report(folded).config
    assert changes == {"num_key_value_heads": 2}
    rebuilt = type(model)(type(model.config).from_dict(model.config.to_dict() | changes)).double().eval()
    rebuilt.load_state_dict(folded.state_dict())
    with torch.no_grad():
        expected = model(**batches[0]).logits
        for logits in (folded(**batches[0])["logits"], rebuilt(**batches[0]).logits):
            assert (logits - expected).abs().max() < 1e-9

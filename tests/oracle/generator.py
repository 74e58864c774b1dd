"""Random architectures: directed acyclic graphs of tiny layers, as plain data that can be kept.

A `Recipe` lists steps. Value 0 is the first input, and every step makes one more value out of earlier ones. `build`
turns a recipe into a module; `random_recipe` draws one. Layers name their parameters, and layers that use one name
share them. `tests/oracle/test_generator.py` holds the inferred symmetry of drawn recipes against the exact one;
`python -m tests.oracle.hunt` looks for failures among many, and cuts them down to short ones.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

Shape = tuple[int, ...]
Step = tuple[str, tuple[int, ...], tuple[Any, ...]]
"""An op, the values that it takes, and its options."""


@dataclass(frozen=True)
class Recipe:
    """An architecture as plain data: the shapes of its inputs, its steps, and the values that it returns."""

    inputs: tuple[Shape, ...]
    steps: tuple[Step, ...]
    outputs: tuple[int, ...]


Run = Callable[..., Tensor]
Propose = Callable[["Draft"], "tuple[tuple[int, ...], tuple[Any, ...]] | None"]

_RUN: dict[str, Run] = {}
_PROPOSE: dict[str, Propose] = {}


class Network(nn.Module):
    """Runs the steps of a recipe."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.recipe = recipe
        with torch.no_grad():  # The first run makes the parameters.
            self.eval()(*(torch.randn(s) for s in recipe.inputs))

    def weight(self, name: str, *shape: int) -> Tensor:
        """The parameter of this name."""
        if name not in self._parameters:
            self.register_parameter(name, nn.Parameter(torch.randn(shape)))
        found = self._parameters[name]
        assert found is not None
        if tuple(found.shape) != shape:
            raise ValueError(f"{name} has the shape {tuple(found.shape)}, not {shape}")
        return found

    def statistic(self, name: str, n: int) -> Tensor:
        """The buffer of this name, of positive numbers."""
        if name not in self._buffers:
            self.register_buffer(name, torch.rand(n) + 0.5)
        found = self._buffers[name]
        assert found is not None
        return found

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        values = [*inputs]
        for op, taken, options in self.recipe.steps:
            values.append(_RUN[op](self, *(values[i] for i in taken), *options))
        return tuple(values[i] for i in self.recipe.outputs)


def build(recipe: Recipe, seed: int = 0) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """The module of a recipe, and inputs for it."""
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        return Network(recipe), tuple(torch.randn(s) for s in recipe.inputs)


class _Cost(TorchDispatchMode):
    """Counts the scalar operations of what runs inside."""

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        size = sum(t.numel() for t in pytree.tree_leaves(result) if isinstance(t, Tensor))
        name = func._schema.name.removeprefix("aten::")
        if name in ("mm", "bmm", "addmm", "baddbmm"):
            size *= args[-1].shape[-2]
        elif name == "convolution":
            size *= args[1].numel() // args[1].shape[0]
        elif "attention" in name:
            size = 4 * args[0].numel() * args[1].shape[-2]
        self.total += size
        return result


def cost(recipe: Recipe) -> int:
    """An estimate of how many scalar operations a recipe writes out to."""
    model, args = build(recipe)
    with torch.no_grad(), _Cost() as counted:  # type: ignore[no-untyped-call]
        model(*args)
    return int(counted.total)


class Draft:
    """A recipe in the making."""

    def __init__(self, rng: Random, inputs: Sequence[Shape]) -> None:
        self.rng, self.inputs = rng, tuple(inputs)
        self.steps: list[Step] = []
        self.shapes: list[Shape] = [*inputs]
        self.network = Network(Recipe(self.inputs, (), ()))
        self.values = [torch.randn(s) for s in inputs]
        self.known: dict[tuple[Any, ...], list[str]] = {}
        self.names = 0

    def name(self, *key: Any) -> str:
        """A name for the parameters of a layer: a new one, or sometimes that of another layer with the same key."""
        others = self.known.setdefault(key, [])
        if others and self.rng.random() < 0.35:
            return self.rng.choice(others)
        self.names += 1
        others.append(f"p{self.names}")
        return others[-1]

    def value(self, *ranks: int) -> int | None:
        """One of the values, by preference a late one, whose rank is one of these (by default any)."""
        found = [i for i, s in enumerate(self.shapes) if not ranks or len(s) in ranks]
        if any(i >= len(self.inputs) for i in found) and self.rng.random() < 0.9:
            found = [i for i in found if i >= len(self.inputs)]
        found = found[-4:] if self.rng.random() < 0.8 else found
        return self.rng.choice(found) if found else None

    def like(self, i: int, matches: Callable[[Shape, Shape], bool]) -> int | None:
        """Another value whose shape matches that of value i (or the same one, if there is no other)."""
        found = [j for j, s in enumerate(self.shapes) if matches(self.shapes[i], s)]
        others = [j for j in found if j != i] or found
        return self.rng.choice(others) if others else None

    def size(self, low: int = 2, high: int = 5) -> int:
        return self.rng.randint(low, high)

    def dim(self, i: int, low: int = 0) -> int | None:
        """A dimension of two or more entries of value i."""
        found = [d for d, n in enumerate(self.shapes[i]) if n > 1 and d >= low]
        return self.rng.choice(found) if found else None

    def add(self, op: str, taken: tuple[int, ...], options: tuple[Any, ...] = ()) -> int | None:
        """The number of the value that a step makes; None if the step is not possible here."""
        try:
            with torch.no_grad():
                value = _RUN[op](self.network, *(self.values[i] for i in taken), *options)
        except (RuntimeError, ValueError, IndexError):
            return None
        if not 2 <= value.numel() <= 150 or value.ndim > 5 or max(value.shape) > 24:
            return None
        self.steps.append((op, taken, options))
        self.values.append(value)
        self.shapes.append(tuple(value.shape))
        return len(self.values) - 1

    def propose(self, op: str) -> int | None:
        proposed = _PROPOSE[op](self)
        return None if proposed is None else self.add(op, *proposed)


def op(name: str, propose: Propose) -> Callable[[Run], Run]:
    """Registers an op, and what draws values and options for it."""

    def register(run: Run) -> Run:
        _RUN[name], _PROPOSE[name] = run, propose
        return run

    return register


def unary(*ranks: int, options: Callable[[Draft, Shape], tuple[Any, ...] | None] = lambda d, s: ()) -> Propose:
    """Proposes an op of one value of one of these ranks (by default any)."""

    def propose(d: Draft) -> tuple[tuple[int, ...], tuple[Any, ...]] | None:
        i = d.value(*ranks)
        chosen = None if i is None else options(d, d.shapes[i])
        return None if i is None or chosen is None else ((i,), chosen)

    return propose


def along(*more: Sequence[Any], low: int = 0) -> Propose:
    """Proposes an op of one value, along a dimension of it, with further options."""

    def propose(d: Draft) -> tuple[tuple[int, ...], tuple[Any, ...]] | None:
        i = d.value()
        dim = None if i is None else d.dim(i, low)
        return None if i is None or dim is None else ((i,), (dim, *(d.rng.choice(m) for m in more)))

    return propose


def pairs(
    matches: Callable[[Shape, Shape], bool], options: Callable[[Draft, Shape], tuple[Any, ...]] = lambda d, s: ()
) -> Propose:
    """Proposes an op of two values whose shapes match."""

    def propose(d: Draft) -> tuple[tuple[int, ...], tuple[Any, ...]] | None:
        i = d.value()
        j = None if i is None else d.like(i, matches)
        return None if i is None or j is None else ((i, j), options(d, d.shapes[i]))

    return propose


def _broadcast(a: Shape, b: Shape) -> bool:
    return len(b) <= len(a) and all(n in (1, m) for m, n in zip(a[len(a) - len(b) :], b, strict=True))


def _divisors(n: int) -> list[int]:
    return [g for g in range(2, n) if n % g == 0]


# ------------------------------------------------------------------------------------ pointwise


@op("act", unary(options=lambda d, s: (d.rng.choice(["tanh", "sigmoid", "sin", "erf"]),)))
def act(net: Network, x: Tensor, kind: str) -> Tensor:
    y: Tensor = getattr(torch, kind)(x)
    return y


def _combination(d: Draft, s: Shape) -> tuple[str]:
    return (d.rng.choice(["add", "add", "mul", "mul", "maximum", "gate", "sub"]),)


@op("combine", pairs(_broadcast, _combination))
def combine(net: Network, a: Tensor, b: Tensor, kind: str) -> Tensor:
    if kind == "gate":
        return a * b.sigmoid()
    y: Tensor = getattr(torch, kind)(a, b)
    return y


def _subset(d: Draft, s: Shape) -> tuple[Any, ...] | None:
    dims = tuple(i for i, n in enumerate(s) if n > 1 and d.rng.random() < 0.6)
    shape = tuple(s[i] for i in dims)
    return (d.name("affine", shape), dims, d.rng.choice(["add", "mul"])) if dims else None


@op("affine", unary(options=_subset))
def affine(net: Network, x: Tensor, name: str, dims: Sequence[int], kind: str) -> Tensor:
    """A parameter that lies along some dimensions."""
    w = net.weight(name, *(x.shape[i] for i in dims)).reshape([n if i in dims else 1 for i, n in enumerate(x.shape)])
    return x + w if kind == "add" else x * w


@op("mask", along(["lower", "alternate", "first", "hide"]))
def mask(net: Network, x: Tensor, dim: int, kind: str) -> Tensor:
    """A constant factor (or a hidden part) along one dimension, or two."""
    n = x.shape[dim]
    if kind == "lower":
        return x.tril()
    if kind == "hide":
        place = (torch.arange(n) >= n - 1).reshape([n if i == dim else 1 for i in range(x.ndim)])
        return x.masked_fill(place, 0.0)
    value = torch.arange(n) % 2 + 1 if kind == "alternate" else 1 + (torch.arange(n) == 0).int()
    return x * value.float().reshape([n if i == dim else 1 for i in range(x.ndim)])


# ------------------------------------------------------------------------------------ contractions


def _layer(op: str, *more: Sequence[Any]) -> Callable[[Draft, Shape], tuple[Any, ...]]:
    def options(d: Draft, s: Shape) -> tuple[Any, ...]:
        out, rest = d.size(), [d.rng.choice(m) for m in more]
        return (d.name(op, s[-1], out, *rest), out, *rest)

    return options


@op("linear", unary(2, 3, 4, options=_layer("linear", [True, False])))
def linear(net: Network, x: Tensor, name: str, out: int, bias: bool) -> Tensor:
    return F.linear(x, net.weight(name, out, x.shape[-1]), net.weight(f"{name}_b", out) if bias else None)


def _tied(d: Draft) -> tuple[tuple[int, ...], tuple[Any, ...]] | None:
    """A weight of another linear layer, transposed."""
    i = d.value(2, 3, 4)
    layers = [(names, key) for key, names in d.known.items() if key[0] == "linear"]
    found = [(n, key[1]) for names, key in layers for n in names if i is not None and key[2] == d.shapes[i][-1]]
    return ((i,), d.rng.choice(found)) if i is not None and found else None


@op("tied", _tied)
def tied(net: Network, x: Tensor, name: str, inputs: int) -> Tensor:
    return F.linear(x, net.weight(name, x.shape[-1], inputs).T)


@op(
    "rows",
    unary(2, 3, options=lambda d, s: (d.name("rows", s[-1]), *d.rng.choice([(0, 3), (1, 4), (2, 6), (3, 6), (0, 6)]))),
)
def rows(net: Network, x: Tensor, name: str, start: int, stop: int) -> Tensor:
    """A linear layer with a slice of a weight."""
    return F.linear(x, net.weight(name, 6, x.shape[-1])[start:stop])


@op("low_rank", unary(2, 3, options=_layer("low_rank", ["product", "plus", "tanh", "flip", "standard"])))
def low_rank(net: Network, x: Tensor, name: str, out: int, kind: str) -> Tensor:
    """A linear layer with a weight that is computed."""
    n = x.shape[-1]
    if kind in ("product", "plus"):
        w = net.weight(f"{name}_u", out, 2) @ net.weight(f"{name}_d", 2, n)
        w = w + net.weight(name, out, n) if kind == "plus" else w
    else:
        w = net.weight(name, out, n)
        w = {"tanh": w.tanh(), "flip": w.flip(0), "standard": w - w.mean(1, keepdim=True)}[kind]
    return F.linear(x, w)


def _conv_options(op: str) -> Callable[[Draft, Shape], tuple[Any, ...]]:
    def options(d: Draft, s: Shape) -> tuple[Any, ...]:
        groups = d.rng.choice([1, 1, 1, *_divisors(s[1]), s[1]])
        out = groups * d.size(1, 2) if groups > 1 else d.size(2, 4)
        rest = (d.rng.choice([1, 1, 2]), groups, d.rng.choice([1, 1, 2]), d.rng.choice([0, 0, 1]))
        return (d.name(op, len(s), s[1], out, *rest), out, *rest)

    return options


@op("conv", unary(3, 4, options=_conv_options("conv")))
def conv(net: Network, x: Tensor, name: str, out: int, kernel: int, groups: int, stride: int, padding: int) -> Tensor:
    """A convolution of one or two dimensions; in two the kernel is (1, kernel)."""
    if x.ndim == 3:
        w = net.weight(name, out, x.shape[1] // groups, kernel)
        return F.conv1d(x, w, net.weight(f"{name}_b", out), stride, padding, groups=groups)
    w = net.weight(name, out, x.shape[1] // groups, 1, kernel)
    return F.conv2d(x, w, net.weight(f"{name}_b", out), (1, stride), (0, padding), groups=groups)


@op("deconv", unary(3, 4, options=_conv_options("deconv")))
def deconv(net: Network, x: Tensor, name: str, out: int, kernel: int, groups: int, stride: int, padding: int) -> Tensor:
    if x.ndim == 3:
        w = net.weight(name, x.shape[1], out // groups, kernel)
        return F.conv_transpose1d(x, w, net.weight(f"{name}_b", out), stride, padding, groups=groups)
    w = net.weight(name, x.shape[1], out // groups, 1, kernel)
    return F.conv_transpose2d(x, w, net.weight(f"{name}_b", out), (1, stride), (0, padding), groups=groups)


_EQUATIONS = {
    2: ("bi,ijk->bjk", "bi,i->bi", "bi,ij,jk->bk", "bi,bj,ijk->bk"),
    3: ("bij,ijk->bk", "bij,ikj->bik", "bij,kij->bkij", "bij,kj->bik", "bij,ik->bkj", "bij,ij->bi", "bij,jlk->bilk"),
    4: ("bijk,ikl->bijl", "bijk,ikl->bjl", "bijk,jk->bij", "bijk,ijk->bi", "bijk,kl->bijl", "bijk,il->bljk"),
}


def _equation(d: Draft, s: Shape) -> tuple[Any, ...]:
    equation, size = d.rng.choice(_EQUATIONS[len(s)]), d.size(2, 4)
    return (d.name("einsum", equation, s, size), equation, size)


@op("einsum", unary(2, 3, 4, options=_equation))
def einsum(net: Network, x: Tensor, name: str, equation: str, size: int) -> Tensor:
    """A contraction with parameters; the letters that x does not have are of one size."""
    first, *terms = equation.partition("->")[0].split(",")
    known = dict(zip(first, x.shape, strict=True))
    operands = [x]
    for number, term in enumerate(terms):
        if "b" in term:  # A second use of x.
            known.update(zip(term, x.shape, strict=True))
            operands.append(x)
        else:
            operands.append(net.weight(f"{name}_{number}", *(known.get(c, size) for c in term)))
    return torch.einsum(equation, *operands)


@op("bmm", unary(3, options=lambda d, s: (lambda n: (d.name("bmm", s, n), n))(d.size(2, 4))))
def bmm(net: Network, x: Tensor, name: str, out: int) -> Tensor:
    """Tokens with a weight each."""
    y = torch.bmm(x.transpose(0, 1), net.weight(name, x.shape[1], x.shape[2], out))
    return y.transpose(0, 1)


def _experts(d: Draft, s: Shape) -> tuple[Any, ...]:
    count, hidden, bias = d.size(2, 3), d.size(2, 3), d.rng.random() < 0.5
    return (d.name("experts", s[-1], count, hidden, bias), count, hidden, bias)


@op("experts", unary(2, options=_experts))
def experts(net: Network, x: Tensor, name: str, count: int, hidden: int, bias: bool) -> Tensor:
    """Stacked experts, mixed by a softmax router."""
    n = x.shape[-1]
    h = torch.einsum("bi,eih->beh", x, net.weight(f"{name}_u", count, n, hidden))
    h = (h + net.weight(f"{name}_b", count, hidden) if bias else h).tanh()
    gate = F.linear(x, net.weight(f"{name}_g", count, n)).softmax(-1)
    return torch.einsum("beh,eho,be->bo", h, net.weight(f"{name}_d", count, hidden, n), gate)


@op("gram", unary(3, 4, options=lambda d, s: (d.rng.choice(["rows", "columns"]),)))
def gram(net: Network, x: Tensor, kind: str) -> Tensor:
    return x @ x.mT if kind == "rows" else x.mT @ x


@op("matmul", pairs(lambda a, b: len(a) > 1 and len(b) > 1 and a[-1] == b[-2]))
def matmul(net: Network, a: Tensor, b: Tensor) -> Tensor:
    return a @ b


@op("apply", pairs(lambda a, b: len(b) == 2 and a[-1] == b[-1]))
def apply(net: Network, x: Tensor, w: Tensor) -> Tensor:
    return F.linear(x, w)


# ------------------------------------------------------------------------------------ sources


def _shape(d: Draft) -> tuple[tuple[int, ...], tuple[Any, ...]]:
    """A shape that fits to a value, or a matrix."""
    like = d.rng.choice(d.shapes)
    shape = like[1:] if len(like) > 2 and d.rng.random() < 0.5 else (d.size(), like[-1])
    return (), (d.name("parameter", shape), shape)


@op("parameter", _shape)
def parameter(net: Network, name: str, shape: Shape) -> Tensor:
    """A parameter as a value: a weight, learnt tokens, positions."""
    return net.weight(name, *shape)


def _table(d: Draft, s: Shape) -> tuple[Any, ...] | None:
    dim = d.rng.choice([i for i, n in enumerate(s[:-1]) if n > 1] or [0])
    count = d.size(2, 4)
    return (d.name("table", count, s[-1]), dim, count, tuple(d.rng.randrange(count) for _ in range(s[dim])))


@op("table", unary(2, 3, 4, options=_table))
def table(net: Network, x: Tensor, name: str, dim: int, count: int, chosen: Sequence[int]) -> Tensor:
    """Adds rows of a table, chosen by constants."""
    y = F.embedding(torch.tensor(chosen), net.weight(name, count, x.shape[-1]))
    return x + y.reshape([n if i in (dim, x.ndim - 1) else 1 for i, n in enumerate(x.shape)])


# ------------------------------------------------------------------------------------ movements


@op(
    "cat",
    pairs(
        lambda a, b: len(a) == len(b) and sum(m != n for m, n in zip(a, b, strict=True)) <= 1,
        lambda d, s: (d.rng.choice([0, 1, len(s) - 1, len(s) - 1]),),
    ),
)
def cat(net: Network, a: Tensor, b: Tensor, dim: int) -> Tensor:
    return torch.cat([a, b], dim)


@op("stack", pairs(lambda a, b: a == b, lambda d, s: (d.rng.randint(0, len(s)),)))
def stack(net: Network, a: Tensor, b: Tensor, dim: int) -> Tensor:
    return torch.stack([a, b], dim)


def _part(d: Draft) -> tuple[tuple[int, ...], tuple[Any, ...]] | None:
    i = d.value()
    dim = None if i is None else d.dim(i)
    if i is None or dim is None or d.shapes[i][dim] < 3:
        return None
    n = d.shapes[i][dim]
    start = d.rng.choice([0, 0, 1, n // 2])
    stop = d.rng.choice([n, n, n - 1, n // 2 + start])
    return ((i,), (dim, start, min(stop, n))) if start < stop and (start, stop) != (0, n) else None


@op("part", _part)
def part(net: Network, x: Tensor, dim: int, start: int, stop: int) -> Tensor:
    return x.narrow(dim, start, stop - start)


@op("glu", along(["halves", "pairs", "products"]))
def glu(net: Network, x: Tensor, dim: int, kind: str) -> Tensor:
    """A gated unit of two halves, or of neighbours."""
    if kind == "pairs":
        a, b = x.unflatten(dim, (-1, 2)).unbind(dim + 1)
    else:
        a, b = x.chunk(2, dim)
    return a * b if kind == "products" else a * b.sigmoid()


@op("select", along([0, -1]))
def select(net: Network, x: Tensor, dim: int, at: int) -> Tensor:
    return x.select(dim, at)


@op("flatten", unary(3, 4, 5, options=lambda d, s: (d.rng.randint(0, len(s) - 2),)))
def flatten(net: Network, x: Tensor, dim: int) -> Tensor:
    """Two dimensions as one."""
    return x.flatten(dim, dim + 1)


def _groups(d: Draft) -> tuple[tuple[int, ...], tuple[Any, ...]] | None:
    i = d.value(2, 3, 4)
    found = [(k, g) for k, n in enumerate(d.shapes[i]) for g in _divisors(n)] if i is not None else []
    return ((i,), d.rng.choice(found)) if i is not None and found else None


@op("unflatten", _groups)
def unflatten(net: Network, x: Tensor, dim: int, groups: int) -> Tensor:
    return x.unflatten(dim, (groups, -1))


@op("shuffle", _groups)
def shuffle(net: Network, x: Tensor, dim: int, groups: int) -> Tensor:
    """Groups and their members exchanged, as in a channel shuffle."""
    return x.unflatten(dim, (groups, -1)).transpose(dim, dim + 1).flatten(dim, dim + 1)


@op("group_mean", _groups)
def group_mean(net: Network, x: Tensor, dim: int, groups: int) -> Tensor:
    """Subtracts the mean of every group."""
    y = x.unflatten(dim, (groups, -1))
    return (y - y.mean(dim + 1, keepdim=True)).flatten(dim, dim + 1)


@op("pixel_shuffle", unary(4))
def pixel_shuffle(net: Network, x: Tensor) -> Tensor:
    return F.pixel_shuffle(x, 2)


@op("pixel_unshuffle", unary(4))
def pixel_unshuffle(net: Network, x: Tensor) -> Tensor:
    return F.pixel_unshuffle(x, 2)


@op("permute", unary(2, 3, 4, 5, options=lambda d, s: (tuple(d.rng.sample(range(len(s)), len(s))),)))
def permute(net: Network, x: Tensor, dims: Sequence[int]) -> Tensor:
    return x.permute(*dims)


@op("swap", unary(3, 4, options=lambda d, s: ()))
def swap(net: Network, x: Tensor) -> Tensor:
    """The last two dimensions exchanged."""
    return x.transpose(-1, -2)


@op("roll", along([1, 2]))
def roll(net: Network, x: Tensor, dim: int, by: int) -> Tensor:
    return x.roll(by, dim)


@op("flip", along())
def flip(net: Network, x: Tensor, dim: int) -> Tensor:
    return x.flip(dim)


@op("repeat", along(["repeat", "interleave"]))
def repeat(net: Network, x: Tensor, dim: int, kind: str) -> Tensor:
    if kind == "interleave":
        return x.repeat_interleave(2, dim)
    return x.repeat([2 if i == dim else 1 for i in range(x.ndim)])


@op("expand", unary(2, 3, options=lambda d, s: (d.rng.randint(0, len(s)), d.size(2, 3))))
def expand(net: Network, x: Tensor, dim: int, count: int) -> Tensor:
    """Copies along a new dimension."""
    return x.unsqueeze(dim).expand(*x.shape[:dim], count, *x.shape[dim:])


def _choice(d: Draft, s: Shape) -> tuple[Any, ...]:
    dim = d.rng.randrange(len(s))
    return dim, tuple(d.rng.randrange(s[dim]) for _ in range(d.size(2, 4)))


@op("take", unary(options=_choice))
def take(net: Network, x: Tensor, dim: int, chosen: Sequence[int]) -> Tensor:
    """Places along a dimension, chosen by constants."""
    return x.index_select(dim, torch.tensor(chosen))


@op("pad", along([1, 2]))
def pad(net: Network, x: Tensor, dim: int, width: int) -> Tensor:
    return F.pad(x, [0, 0] * (x.ndim - 1 - dim) + [width, 0])


@op("outer", pairs(lambda a, b: len(a) == len(b) and a[:-1] == b[:-1], lambda d, s: (d.rng.choice(["add", "mul"]),)))
def outer(net: Network, a: Tensor, b: Tensor, kind: str) -> Tensor:
    """Outer sums or products of the last dimensions."""
    a, b = a[..., :, None], b[..., None, :]
    return (a + b).tanh() if kind == "add" else a * b


# ------------------------------------------------------------------------------------ reductions and normalizations


@op("reduce", along(["mean", "sum", "amax", "norm"], [True, False]))
def reduce(net: Network, x: Tensor, dim: int, kind: str, keepdim: bool) -> Tensor:
    if kind == "norm":
        return (x * x).sum(dim, keepdim=keepdim)
    y: Tensor = getattr(x, kind)(dim, keepdim=keepdim)
    return y


@op("center", along(["mean", "amax"]))
def center(net: Network, x: Tensor, dim: int, kind: str) -> Tensor:
    y: Tensor = x - getattr(x, kind)(dim, keepdim=True)
    return y


@op("softmax", along())
def softmax(net: Network, x: Tensor, dim: int) -> Tensor:
    return x.softmax(dim)


@op("cumsum", along())
def cumsum(net: Network, x: Tensor, dim: int) -> Tensor:
    return torch.stack([x.narrow(dim, 0, n + 1).sum(dim) for n in range(x.shape[dim])], dim)


def _last(d: Draft, s: Shape) -> tuple[Any, ...]:
    count = d.rng.choice([1, 1, 1, 2]) if len(s) > 2 else 1
    kind = d.rng.choice(["layer", "layer", "rms", "plain"])
    return (d.name("norm", kind, s[-count:]), kind, count)


@op("norm", unary(2, 3, 4, options=_last))
def norm(net: Network, x: Tensor, name: str, kind: str, count: int) -> Tensor:
    """A normalization of the last dimensions."""
    shape = x.shape[-count:]
    if kind == "plain":
        return F.layer_norm(x, shape)
    if kind == "rms":
        return F.rms_norm(x, shape, net.weight(name, *shape))
    return F.layer_norm(x, shape, net.weight(name, *shape), net.weight(f"{name}_b", *shape))


def _channels(d: Draft, s: Shape) -> tuple[Any, ...]:
    kind = d.rng.choice(["batch", "group", "group", "instance"] if len(s) > 2 else ["batch", "group"])
    groups = d.rng.choice([*_divisors(s[1]), 1]) if kind == "group" else 0
    return (d.name("channels", kind, s[1], groups), kind, groups)


@op("channels", unary(2, 3, 4, options=_channels))
def channels(net: Network, x: Tensor, name: str, kind: str, groups: int) -> Tensor:
    """A normalization by channel or by groups of channels."""
    n = x.shape[1]
    scale, shift = net.weight(name, n), net.weight(f"{name}_b", n)
    if kind == "group":
        return F.group_norm(x, groups, scale, shift)
    if kind == "instance":
        return F.instance_norm(x, weight=scale, bias=shift)
    return F.batch_norm(x, net.statistic(f"{name}_m", n), net.statistic(f"{name}_v", n), scale, shift)


@op("pool", unary(3, 4, options=lambda d, s: (d.rng.choice(["avg", "max", "adaptive"]),)))
def pool(net: Network, x: Tensor, kind: str) -> Tensor:
    """Pooling over the last dimension."""
    if kind == "adaptive":
        return F.adaptive_avg_pool1d(x, 1) if x.ndim == 3 else F.adaptive_avg_pool2d(x, 1)
    if x.ndim == 3:
        return F.avg_pool1d(x, 2) if kind == "avg" else F.max_pool1d(x, 2)
    return F.avg_pool2d(x, (1, 2)) if kind == "avg" else F.max_pool2d(x, (1, 2))


@op("excite", unary(3, 4, options=lambda d, s: (lambda n: (d.name("excite", s[1], n), n))(d.size(2, 3))))
def excite(net: Network, x: Tensor, name: str, hidden: int) -> Tensor:
    """Squeeze and excitation of the channels."""
    n = x.shape[1]
    h = F.linear(x.flatten(2).mean(2), net.weight(name, hidden, n)).tanh()
    gate = F.linear(h, net.weight(f"{name}_u", n, hidden)).sigmoid()
    return x * gate.reshape(*gate.shape, *(1,) * (x.ndim - 2))


# ------------------------------------------------------------------------------------ attention, recurrence

_LAYOUTS = ("3hd", "h3d", "hd3", "3dh", "apart", "shared")


def _attention(d: Draft, s: Shape) -> tuple[Any, ...] | None:
    if s[1] < 2:  # Of one token, queries and keys could be exchanged.
        return None
    heads, dims, layout = d.size(1, 3), d.size(1, 3), d.rng.choice(_LAYOUTS)
    keys = d.rng.choice([1, heads]) if layout == "apart" else heads
    extra = d.rng.choice(["", "", "norm", "norm by head", "causal", "fused", "talking"])
    merged = d.rng.choice(["hd", "hd", "dh"])
    return d.name("attention", s[-1], heads, dims, layout, keys, extra), heads, dims, layout, keys, extra, merged


@op("attention", unary(3, options=_attention))
def attention(
    net: Network, x: Tensor, name: str, heads: int, dims: int, layout: str, keys: int, extra: str, merged: str
) -> Tensor:
    """Attention whose projections are laid out in some way; keys is the number of key and value heads."""
    b, t, n = x.shape
    if layout in ("apart", "shared"):
        q = F.linear(x, net.weight(f"{name}_q", heads * dims, n)).view(b, t, heads, dims).transpose(1, 2)
        k = F.linear(x, net.weight(f"{name}_k", keys * dims, n)).view(b, t, keys, dims).transpose(1, 2)
        v = k  # Keys that are values.
        if layout == "apart":
            v = F.linear(x, net.weight(f"{name}_v", keys * dims, n)).view(b, t, keys, dims).transpose(1, 2)
        if keys < heads:
            k, v = (y.repeat_interleave(heads // keys, 1) for y in (k, v))
    else:
        size = {"3": 3, "h": heads, "d": dims}
        y = F.linear(x, net.weight(name, 3 * heads * dims, n)).view(b, t, *(size[c] for c in layout))
        q, k, v = y.permute(2 + layout.index("3"), 0, 2 + layout.index("h"), 1, 2 + layout.index("d"))
    if extra.startswith("norm"):
        shape = (heads, 1, dims) if extra == "norm by head" else (dims,)
        q, k = (F.rms_norm(y, (dims,)) * net.weight(f"{name}_{part}n", *shape) for y, part in ((q, "q"), (k, "k")))
    if extra == "fused":
        y = F.scaled_dot_product_attention(q, k, v)
    else:
        scores = q @ k.mT
        if extra == "causal":
            scores = scores + torch.full((t, t), -torch.inf).triu(1)
        weights = scores.softmax(-1)
        if extra == "talking":
            weights = torch.einsum("bhqk,gh->bgqk", weights, net.weight(f"{name}_t", heads, heads))
        y = weights @ v
    return y.permute(0, 2, 1, 3).flatten(2) if merged == "hd" else y.permute(0, 2, 3, 1).flatten(2)


def _cell(d: Draft, s: Shape) -> tuple[Any, ...]:
    hidden, kind = d.size(2, 3), d.rng.choice(["lstm", "gru", "plain"])
    return (d.name("cell", s[-1], hidden, kind), hidden, kind)


@op("cell", unary(2, options=_cell))
def cell(net: Network, x: Tensor, name: str, hidden: int, kind: str) -> Tensor:
    """Two steps of a recurrent cell."""
    count = {"lstm": 4, "gru": 3, "plain": 1}[kind]
    w = net.weight(name, count * hidden, x.shape[-1]), net.weight(f"{name}_h", count * hidden, hidden)
    b = net.weight(f"{name}_b", count * hidden), net.weight(f"{name}_c", count * hidden)
    h = c = x.new_zeros(len(x), hidden)
    for _ in range(2):
        if kind == "lstm":
            h, c = torch.lstm_cell(x, (h, c), *w, *b)
        elif kind == "gru":
            h = torch.gru_cell(x, h, *w, *b)
        else:
            h = (F.linear(x, w[0], b[0]) + F.linear(h, w[1], b[1])).tanh()
    return h


# ------------------------------------------------------------------------------------ drawing

OPS = tuple(_PROPOSE)
"""The names of the ops that recipes are made of."""

LIMIT = 1000
"""The largest cost of a recipe that is drawn."""

_RARE = ("mask", "table", "cumsum", "pixel_shuffle", "pixel_unshuffle", "repeat", "expand", "cell", "tied")
_COMMON = ("linear", "combine", "affine", "unflatten", "flatten", "attention", "einsum", "channels")


def random_recipe(rng: Random) -> Recipe:
    """A recipe of a few steps that costs no more than `LIMIT`, and whose outputs depend on every parameter entry.

    The exact count leaves out entries on which no output depends, so it could not be compared with what is found.
    """
    while True:
        recipe = _draw(rng)
        if recipe.steps and cost(recipe) <= LIMIT and not _vanishes(recipe) and not has_unused_entries(recipe):
            return recipe


def _vanishes(recipe: Recipe) -> bool:
    """Whether an output is zero but for rounding, so that its relative error means nothing."""
    model, args = build(recipe)
    with torch.no_grad():
        return any(float(o.abs().max()) < 1e-5 for o in model(*args))


def has_unused_entries(recipe: Recipe) -> bool:
    """Whether there are parameter entries on which no output depends."""
    model, _ = build(recipe)
    moves = [torch.zeros_like(p) for p in model.parameters()]
    for seed in range(4):
        model, args = build(recipe, seed)
        outputs = [o for o in model(*args) if o.requires_grad]
        total = torch.stack([(o * torch.randn(o.shape)).sum() for o in outputs]).sum() if outputs else None
        if total is not None:
            gradients = torch.autograd.grad(total, [*model.parameters()], materialize_grads=True)
            moves = [m + g.abs() for m, g in zip(moves, gradients, strict=True)]
    return any(bool((m < 1e-10).any()) for m in moves)


def _draw(rng: Random) -> Recipe:
    shape = rng.choice([(1, 2), (2, 2), (1, 3, 2), (2, 2, 2), (1, 2, 1, 2), (1, 2, 2, 2)])
    d = Draft(rng, [shape])
    if len(shape) == 4:
        d.add("conv", (0,), (d.name("stem"), d.size(3, 6), 1, 1, 1, 0))
    else:
        out = d.size(3, 6)
        d.add("linear", (0,), (d.name("linear", shape[-1], out, False), out, False))
    every = [*_PROPOSE, *(k for k in _PROPOSE if k not in _RARE), *_COMMON]
    wanted, tries = rng.randint(2, 6), 0
    while len(d.steps) < wanted and tries < 40:
        tries += 1
        d.propose(rng.choice(every))
    used = {i for _, taken, _ in d.steps for i in taken}
    outputs = tuple(_close(d, i) for i in range(1, len(d.values)) if i not in used)
    return Recipe(d.inputs, tuple(d.steps), outputs)


def _close(d: Draft, i: int) -> int:
    """What is returned of a value that no step takes: often a linear map of it, or a mean."""
    kind = d.rng.choice(["linear", "linear", "linear", "flat", "mean", "as it is"])
    j: int | None = None
    if kind == "linear":
        j = d.add("linear", (i,), (d.name("linear", d.shapes[i][-1], 2, True), 2, True))
    elif kind == "flat":
        j = i
        while j is not None and len(d.shapes[j]) > 2:
            j = d.add("flatten", (j,), (1,))
        j = None if j is None else d.add("linear", (j,), (d.name("linear", d.shapes[j][-1], 2, False), 2, False))
    elif kind == "mean":
        dim = d.dim(i, 1)
        j = None if dim is None else d.add("reduce", (i,), (dim, "mean", True))
    return i if j is None else j

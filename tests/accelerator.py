"""A second device for machines that have none: its tensors lie on the CPU and are computed there, but no op takes some
of its tensors and some of the CPU's, as with a GPU.

    python -m tests.accelerator [--quick] CASE [CASE ...]

merges models of some of the tests' architectures on the CPU and on this device, the first one in several ways, with
`--quick` in two, and prints as JSON on which devices the results are and how far the two are apart. It changes torch
for its whole process, hence a process of its own.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

import fxmerge
from tests.oracle.architectures import CASES

NAME = "elsewhere"
aten = torch.ops.aten

HELD: dict[int, tuple[Tensor, Any]] = {}
"""By storage, what a tensor of the device holds on the CPU, and the storage, so that no other gets its address."""

INDEXED = (aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_)
"""What takes indices, its second argument, from the CPU for tensors of any device."""


def away(value: Any) -> bool:
    """Whether something is a tensor of the device; one without values, that only says that it is there, is not."""
    return isinstance(value, Tensor) and value.device.type == NAME and value.untyped_storage()._cdata in HELD


def held(tensor: Tensor) -> Tensor:
    return HELD[tensor.untyped_storage()._cdata][0]


class OnDevice(Tensor):
    """A tensor of the device."""

    @staticmethod
    def __new__(cls, value: Tensor) -> OnDevice:
        made = torch._C._acc.create_empty_tensor(value.shape, value.dtype)
        made.__class__ = cls
        storage = made.untyped_storage()
        HELD[storage._cdata] = value, storage
        return made

    def __init__(self, value: Tensor) -> None:
        pass


def compute(op: Any, *args: Any, **kwargs: Any) -> Any:
    """An op on tensors of the device."""
    if op is aten._copy_from.default:
        source, target = args[:2]
        (held(target) if away(target) else target).copy_(held(source) if away(source) else source)
        return target
    flat, spec = pytree.tree_flatten((args, kwargs))
    checked = (args[0], args[2:], kwargs) if op.overloadpacket in INDEXED else flat
    here = [x for x in pytree.tree_leaves(checked) if isinstance(x, Tensor) and x.device.type == "cpu" and x.ndim]
    if here:
        raise RuntimeError(f"{op} got tensors on the CPU, of shapes {[tuple(x.shape) for x in here]}")
    inner = [held(x) if away(x) else torch.device("cpu") if isinstance(x, torch.device) else x for x in flat]
    own_args, own_kwargs = pytree.tree_unflatten(inner, spec)
    # Views of the device do not know strides.
    result = own_args[0].reshape(own_args[1]) if op is aten.view.default else op(*own_args, **own_kwargs)
    written = {id(value): x for value, x in zip(inner, flat, strict=True) if away(x)}

    def given(x: Any) -> Any:
        return written[id(x)] if id(x) in written else OnDevice(x) if isinstance(x, Tensor) else x

    return pytree.tree_map(given, result)


LIBRARIES: list[torch.library.Library] = []
"""What torch knows of the device, for as long as these are kept."""


def set_up() -> None:
    """Makes the device known to torch."""
    _setup_privateuseone_for_python_backend(NAME)
    anything, own = torch.library.Library("_", "IMPL"), torch.library.Library("aten", "IMPL")
    LIBRARIES.extend((anything, own))
    anything.fallback(compute, "PrivateUse1")
    own.impl("convolution_overrideable", partial(compute, aten.convolution.default), "PrivateUse1")
    # What torch itself makes of these would write into tensors of another size, or ask for strides.
    for key in ("CompositeExplicitAutograd", "CompositeExplicitAutogradNonFunctional"):
        for name in torch._C._dispatch_get_registrations_for_dispatch_key(key):
            packet, _, overload = name.removeprefix("aten::").partition(".")
            op = getattr(getattr(aten, packet, None), overload or "default", None)
            if name.startswith("aten::") and "_copy" not in packet and op is not None and not op._schema.is_mutable:
                own.impl(name.removeprefix("aten::"), partial(compute, op), "PrivateUse1")
    address, copied = Tensor.data_ptr, Tensor.__deepcopy__

    def data_ptr(self: Tensor) -> int:
        return held(self).data_ptr() if away(self) else address(self)

    def deep_copy(self: Tensor, memo: dict[int, Any]) -> Tensor:
        if away(self) and id(self) not in memo:
            copy = self.detach().clone().requires_grad_(self.requires_grad)
            memo[id(self)] = nn.Parameter(copy, self.requires_grad) if isinstance(self, nn.Parameter) else copy
        return memo[id(self)] if away(self) else copied(self, memo)

    Tensor.data_ptr, Tensor.__deepcopy__ = data_ptr, deep_copy  # type: ignore[method-assign]


ALIKE = [
    "conv, BatchNorm, flatten",
    "residual CNN, projection shortcut",
    "transposed convolutions",
    "GroupNorm",
    "ConvNeXt block",
    "encoder layer, pre-norm",
    "grouped queries",
    "experts by bmm",
    "SwiGLU, packed",
]
"""Architectures of which torch makes much the same graph for either device; it takes some other ops apart for a device
that it does not know."""

Merge = Callable[[Sequence[nn.Module], list[Tensor]], fx.GraphModule]

WAYS: dict[str, Merge] = {
    "zip, refitted": lambda models, data: fxmerge.merge(*models[:2], data),
    "zip, without data": lambda models, data: fxmerge.merge(*models[:2], example=data[0]),
    "align, averaged": lambda models, data: fxmerge.merge(
        *models[:2], data, fxmerge.Recipe(match=fxmerge.Align(), fit=None)
    ),
    "align, repaired": lambda models, data: fxmerge.merge_many(
        models, data, recipe=fxmerge.Recipe(match=fxmerge.Align(), fit=fxmerge.Repair())
    ),
    "three, each on its own data": lambda models, data: fxmerge.merge_many(
        models, loaders=[data, data[1:], data[2:]], recipe=fxmerge.Recipe(targets="standardized")
    ),
    "task vectors": lambda models, data: fxmerge.merge(
        *models[:2],
        data,
        base=models[2],
        recipe=fxmerge.Recipe(match=fxmerge.Align(), combine=fxmerge.Ties(), fit=None),
    ),
}


def compare(name: str, way: str, data_there: bool = True, device: str = NAME) -> Mapping[str, Any]:
    """Merges models of an architecture on the CPU and on a device; where `data_there` is not set, the data stay on the
    CPU."""
    torch.manual_seed(0)
    models, size = [], ()
    for _ in range(3):
        model, (example,) = CASES[name]()
        models.append(model.double().eval())
        size = example.shape[1:]
    data = [torch.randn(8, *size, dtype=torch.float64) for _ in range(4)]
    there = [deepcopy(model).to(device) for model in models]
    merged = WAYS[way](models, data)
    merged_there = WAYS[way](there, [x.to(device) for x in data] if data_there else data)
    expected, found = merged.state_dict(), merged_there.state_dict()
    apart = [float((found[n].cpu() - x).abs().max() / x.abs().max().clamp(min=1)) for n, x in expected.items()]
    return {
        "case": name,
        "way": way,
        "devices": sorted({x.device.type for x in found.values()}),
        "apart": float(torch.tensor(apart).max()),
        "same units": fxmerge.report(merged).images == fxmerge.report(merged_there).images,
    }


def main() -> int:
    set_up()
    warnings.simplefilter("ignore")
    quick = sys.argv[1] == "--quick"
    names = sys.argv[2:] if quick else sys.argv[1:]
    results = [compare(name, "zip, refitted", data_there=False) for name in names]
    results += [compare(names[0], way) for way in [*WAYS][: 2 if quick else None]]
    sys.stdout.write(json.dumps(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())

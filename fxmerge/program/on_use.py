"""Runs a module with other values of its parameters, of which large ones are in memory only while an op uses them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from fxmerge.program import models

LARGE = 2**16
"""A parameter of this many entries has a stand-in."""

PIECE = 2**20
"""So many entries are changed at a time."""


class OnDemand(Mapping[str, Tensor]):
    """Tensors by name, each of which is made whenever it is asked for.

    Example:
        >>> ones = OnDemand(["a"], lambda name: torch.ones(2))
        >>> ones["a"], ones["a"] is ones["a"]
        (tensor([1., 1.]), False)
    """

    def __init__(self, names: Iterable[str], make: Callable[[str], Tensor]) -> None:
        self._names, self._make = dict.fromkeys(names), make

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        return self._make(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def by_pieces(change: Callable[[Tensor], Tensor], tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """What a change makes of the entries of a tensor, which it is given a few at a time, each of them in some dtype."""
    flat, made = tensor.reshape(-1), torch.empty(tensor.shape, dtype=dtype, device=tensor.device)
    for value, into in zip(flat.split(PIECE), made.view(-1).split(PIECE), strict=True):
        into.copy_(change(value.to(dtype)))
    return made


def with_stand_ins(model: nn.Module, dtype: Callable[[torch.dtype], torch.dtype] = lambda own: own) -> nn.Module:
    """A copy of a model in which large parameters have stand-ins: of their shapes, and of one number in memory.

    Arguments:
        model: the model.
        dtype: the dtype of a stand-in, by that of the parameter.
    """
    memo: dict[int, Any] = {}
    for module in model.modules():
        for own in module._parameters.values():
            if type(own) is nn.Parameter and own.numel() >= LARGE and not own.is_meta:
                number = torch.zeros((), dtype=dtype(own.dtype), device=own.device)
                memo[id(own)] = nn.Parameter(number.expand(own.shape), requires_grad=own.requires_grad)
    return models.copied(model, memo)


def is_stand_in(tensor: Tensor) -> bool:
    """Whether a tensor of a module has shape and dtype, and no values yet."""
    return tensor.layout is torch.strided and tensor.numel() >= LARGE and not any(tensor.stride())


def fill(tensors: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> OnUse:
    """Gives tensors their values: in place, or where a stand-in is used under the mode that is returned.

    Arguments:
        tensors: of a module, by name; they are changed.
        values: by the same names, in any dtype. Those of stand-ins are asked for at every use; they must be made anew
            then, since an op may write into them.
    """
    later: dict[int, tuple[Tensor, str]] = {}
    with torch.no_grad():
        for name, tensor in tensors.items():
            if is_stand_in(tensor):
                later[_storage(tensor)] = tensor, name
            else:
                tensor.copy_(values[name])
    return OnUse(later, values)


class OnUse(TorchDispatchMode):
    """Gives ops the values of stand-ins. A value lasts as long as what is computed from it in the same memory.

    What an op writes into a value, or into a view of it, is kept until the mode ends.
    """

    def __init__(self, stand_ins: Mapping[int, tuple[Tensor, str]], values: Mapping[str, Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._stand_ins, self._values = stand_ins, values
        self._kept: dict[str, Tensor] = {}
        # With a weak reference, no other tensor gets the same address.
        self._lent: dict[int, tuple[StorageWeakRef, str, tuple[tuple[int, ...], tuple[int, ...]]]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = self.with_values((args, kwargs or {}))
        if self._lent and func._schema.is_mutable:
            self._keep(func, args, kwargs)
        return func(*args, **kwargs)

    def with_values(self, given: Any) -> Any:
        """The same with values in place of the stand-ins in it, such as outputs of a module."""
        return pytree.tree_map_only(Tensor, self._value, given)

    def _value(self, tensor: Tensor) -> Tensor:
        if not (self._stand_ins and is_stand_in(tensor)):
            return tensor
        own, name = self._stand_ins.get(_storage(tensor), (tensor, None))
        if name is None:
            return tensor
        if name in self._kept:
            return self._kept[name]
        with _disable_current_modes():  # A value is none of what the module computes.
            value = self._values[name].detach().to(own.dtype)
        self._lent = {at: own for at, own in self._lent.items() if not own[0].expired()}
        self._lent[_storage(value)] = StorageWeakRef(value.untyped_storage()), name, (value.shape, value.stride())
        return value

    def _keep(self, func: Any, args: Any, kwargs: Any) -> None:
        """Keeps the values that an op is about to write into."""
        given = dict(zip((argument.name for argument in func._schema.arguments), args, strict=False)) | kwargs
        for argument in func._schema.arguments:
            written = argument.alias_info is not None and argument.alias_info.is_write
            for tensor in pytree.tree_leaves(given.get(argument.name)) if written else ():
                if isinstance(tensor, Tensor) and tensor.layout is torch.strided:
                    found = self._lent.get(_storage(tensor))
                    if found is not None:
                        self._kept[found[1]] = tensor.as_strided(*found[2], 0)


def _storage(tensor: Tensor) -> int:
    address: int = tensor.untyped_storage()._cdata
    return address

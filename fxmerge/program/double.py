"""How a module is run for its proof: in float64 throughout, and with running statistics that fit its activations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode


def in_double(value: Any) -> Any:
    """A tensor of real or complex numbers in double precision; anything else as it is."""
    return value.to(double(value.dtype)) if isinstance(value, Tensor) else value


def double(dtype: torch.dtype) -> torch.dtype:
    """Double precision for real and complex numbers; any other dtype as it is."""
    if dtype.is_complex:
        return torch.complex128
    return torch.float64 if dtype.is_floating_point else dtype


def largest_change(before: Sequence[Tensor], after: Sequence[Tensor], smallest: float = 0.0) -> float:
    """The largest change of an entry of a tensor, relative to the largest entry of that tensor.

    Arguments:
        before: tensors of numbers.
        after: as many, of the same shapes.
        smallest: a tensor of entries that are smaller than this counts as if its largest were this.

    Returns:
        The change; infinite where other entries are finite than before. Entries that are not finite do not count.

    Example:
        >>> largest_change([torch.tensor([1.0, -4.0])], [torch.tensor([2.0, -4.0])])
        0.25
    """
    changes = [0.0]
    for one, other in zip(before, after, strict=True):
        finite = one.isfinite()
        if not torch.equal(finite, other.isfinite()):
            return torch.inf
        if finite.any():
            scale = max(float(one[finite].abs().max()), smallest) or 1.0
            changes.append(float((one[finite] - other[finite]).abs().max()) / scale)
    return max(changes)


class InSingle(TorchDispatchMode):
    """Turns casts to less than single precision into casts to single precision."""

    wider: ClassVar[dict[torch.dtype, torch.dtype]] = {
        **dict.fromkeys((torch.float16, torch.bfloat16), torch.float32),
        torch.complex32: torch.complex64,
    }

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def raised(value: Any) -> Any:
            return self.wider.get(value, value) if isinstance(value, torch.dtype) else value

        args, kwargs = pytree.tree_map(raised, (args, kwargs or {}))
        return self.call(func, args, kwargs)

    def call(self, func: Any, args: Any, kwargs: Any) -> Any:
        return func(*args, **kwargs)


class InDouble(InSingle):
    """Turns what a model casts to a lower precision by itself into float64 or complex128; float64 is the default while
    it lasts."""

    wider: ClassVar[dict[torch.dtype, torch.dtype]] = {
        **dict.fromkeys((torch.float32, torch.float16, torch.bfloat16), torch.float64),
        **dict.fromkeys((torch.complex64, torch.complex32), torch.complex128),
    }

    def __enter__(self) -> InDouble:
        self.default = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        torch.set_default_dtype(self.default)

    def call(self, func: Any, args: Any, kwargs: Any) -> Any:
        return _WRITTEN_OUT.get(func, func)(*args, **kwargs)


def grouped_mm(a: Tensor, b: Tensor, offs: Tensor | None = None, *args: Any, **kwargs: Any) -> Tensor:
    """`torch._grouped_mm`, which has no float64 kernel, for the rows of a that end at `offs`, one matrix b for each."""
    if offs is None or a.ndim != 2 or b.ndim != 3:
        raise NotImplementedError("grouped_mm is written out for 2-dimensional rows and stacked matrices only")
    ends = offs.tolist()
    out = a.new_zeros(len(a), b.shape[-1])
    for i, (start, end) in enumerate(zip([0, *ends], ends, strict=False)):
        out[start:end] = a[start:end] @ b[i]
    return out


_WRITTEN_OUT = {torch.ops.aten._grouped_mm.default: grouped_mm}
"""Ops that torch has no float64 kernel for."""


class WithOwnStatistics(InDouble):
    """Writes moments of the activations into the running statistics by which they are to be normalized.

    Each statistic is written where it is first used, so that the outputs are those of the module as it then is.
    Normalized activations get deviations of one, and means of one half, so that their sums are not zero.

    Arguments:
        state: by address, what else is to receive the value of a tensor of the module.
    """

    def __init__(self, state: Mapping[int, Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.state = dict(state)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.native_batch_norm.default and isinstance(args[3], Tensor):
            for own, moment in zip(args[3:5], _moments(args[0]), strict=True):
                target = self.state.pop(own.data_ptr(), None)
                if target is not None:
                    target.copy_(torch.where(moment.isfinite(), moment, target))
                    own.copy_(target)
        return super().__torch_dispatch__(func, types, args, kwargs)


def _moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """A mean and a variance for every channel by which x is normalized well.

    What is nearly constant is not blown up to a deviation of one: rounding errors would grow along with it, from
    layer to layer.
    """
    variance, mean = torch.var_mean(x, [d for d in range(x.ndim) if d != 1], correction=0)
    variance = torch.maximum(variance, (variance + mean**2) / 100)
    return mean - variance.sqrt() / 2, torch.where(variance > 0, variance, 1.0)

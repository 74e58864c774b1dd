"""Several processes that make one network together: each runs the networks on its share of the batches."""

from __future__ import annotations

import io
import logging
import os
import pickle
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from datetime import timedelta
from functools import partial, wraps
from itertools import accumulate, islice
from typing import Any, ParamSpec, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils import _pytree as pytree

from fxmerge.errors import FxmergeError, OptionError, ProcessError, first_line

PATIENCE = timedelta(minutes=30)
"""How long the command line lets processes wait for each other. They do so while one of them solves or writes; that one
has ended, they see at once."""

SMALL = 2**16
"""Values of up to so many bytes are exchanged along with others."""

SAME = "Give all processes the same arguments."

P = ParamSpec("P")
T = TypeVar("T")
Item = TypeVar("Item")


@dataclass(frozen=True)
class _Word:
    """What a process tells the others: where it is in the program, and a value or the error that it has met."""

    place: str
    value: bytes = b""
    error: FxmergeError | None = None


@dataclass(eq=False)
class Processes:
    """The processes of a run, which are those of torch's default process group; by default, this one alone.

    Every process runs the same program on the same models and data, and takes part in the same exchanges in the same
    order. An exchange begins with a word of every process on where it is and how it fares, so that all end with the
    error of one. With one process, nothing is exchanged.

    Sums over data are added up in float64, and a decision that rounding could change is taken by one process for all.
    So all processes go on with the same numbers to the last bit.

    Attributes:
        rank: the number of this process.
        size: how many there are.

    Example:
        >>> alone = Processes()
        >>> alone.total("a sum", torch.ones(2)), alone.solve("squares", [2, 3], lambda n: n * n, [0, 0])
        (tensor([1., 1.]), [4, 9])
    """

    rank: int = 0
    size: int = 1
    _over: bool = field(default=False, init=False, repr=False)

    @staticmethod
    def of_group() -> Processes:
        """Those of the default process group; this one alone if there is none."""
        if dist.is_available() and dist.is_initialized():
            return Processes(dist.get_rank(), dist.get_world_size())
        return Processes()

    # ---------------------------------------------------------------------- work

    def owns(self, number: int) -> bool:
        """Whether a batch is of the share of this process, by its number among all."""
        return number % self.size == self.rank

    def share(self, batches: Iterable[T]) -> Iterator[T]:
        """The batches of the share of this process."""
        return islice(batches, self.rank, None, self.size)

    def deal(self, costs: Sequence[float]) -> list[int]:
        """Which process does each of some tasks: the most costly task goes first, to the process that has least to do.

        Example:
            >>> Processes(0, 2).deal([1.0, 3.0, 2.0, 2.0])
            [0, 0, 1, 1]
        """
        loads, owners = [0.0] * self.size, [0] * len(costs)
        for task in sorted(range(len(costs)), key=lambda task: -costs[task]):
            owners[task] = loads.index(min(loads))
            loads[owners[task]] += costs[task]
        return owners

    def split(self, costs: Sequence[float]) -> list[int]:
        """Which process does each of some tasks, if tasks that come one after the other have something in common: parts
        of about equal costs.

        Example:
            >>> Processes(0, 2).split([1.0, 1.0, 1.0, 3.0])
            [0, 0, 0, 1]
        """
        total, ends = sum(costs), accumulate(costs)
        return [
            min(int(self.size * (end - cost / 2) / total), self.size - 1) for end, cost in zip(ends, costs, strict=True)
        ]

    # ---------------------------------------------------------------------- exchanges

    def gather(self, place: str, value: T) -> list[T]:
        """What every process gives, by rank. Tensors come on the current device of the kind that they were on.

        Arguments:
            place: where in the program this is; it has to be the same in all processes.

        Raises:
            FxmergeError: that another process has met.
            ProcessError: if another process has ended, has met another error, or is elsewhere in the program.
        """
        if self.size == 1:
            return [value]
        words = self._words(_Word(place, _packed(value)))
        for rank, word in enumerate(words):
            if word.error is not None:
                raise self._ended(word.error)
            if word.place != place:
                raise self._ended(
                    ProcessError(
                        f"Process {rank} is at {word.place!r}, while process {self.rank} is at {place!r}. {SAME}"
                    )
                )
        return [pickle.loads(word.value) for word in words]

    def total(self, place: str, sums: T) -> T:
        """Sums over the data of all processes, from those of each over its share.

        Arguments:
            place: as for `gather`.
            sums: numbers, float64 tensors, and nested containers and `Moments` of these; 0.0 in place of a tensor where
                the share has no batch. They may be overwritten.
        """
        if self.size == 1:
            return sums
        leaves, structure = pytree.tree_flatten(sums)
        outlines = [(leaf.shape, leaf.device.type) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        found, tensors = [], []
        for leaf, all_ in zip(leaves, zip(*self.gather(place, outlines), strict=True), strict=True):
            shapes = {outline for outline in all_ if isinstance(outline, tuple)}
            if len(shapes) > 1:
                raise self._ended(ProcessError(f"The processes have sums of different shapes: {shapes}. {SAME}"))
            for shape, device in shapes:
                zeros = torch.zeros(shape, dtype=torch.float64, device=device)
                tensors.append(leaf.double().contiguous() if isinstance(leaf, Tensor) else zeros)
            found.append(tensors[-1] if shapes else sum(all_))
        self._add_up(tensors)
        return pytree.tree_unflatten(found, structure)  # type: ignore[no-any-return]

    def solve(self, place: str, items: Sequence[Item], function: Callable[[Item], T], owners: Sequence[int]) -> list[T]:
        """The results of a function for some items, each of which one process computes for all.

        Arguments:
            place: as for `gather`.
            items: the same in all processes.
            function: gives what can be pickled.
            owners: which process computes the result of each, as from `deal`.
        """
        if self.size == 1:
            return [function(item) for item in items]
        own = _packed({i: function(items[i]) for i, owner in enumerate(owners) if owner == self.rank})
        found: dict[int, T] = {}
        for owner, content in enumerate(self.gather(place, own if len(own) <= SMALL else None)):
            given = [content or own]
            if content is None:
                self._exchange(partial(dist.broadcast_object_list, given, src=owner))
            found |= pickle.loads(given[0])
        return [found[i] for i in range(len(items))]

    def once(self, place: str, function: Callable[[], T]) -> T:
        """What a function gives, which the first process computes for all; see `solve`."""
        (found,) = self.solve(place, [None], lambda _: function(), [0])
        return found

    @contextmanager
    def together(self) -> Iterator[None]:
        """A block of code that all processes leave together: if one raises an error, all do. Only the first process
        logs inside of it; what others have to tell, they raise."""
        if self.size == 1:
            yield
            return
        logger = logging.getLogger("fxmerge")
        level = logger.level
        if self.rank:
            logger.setLevel(logging.CRITICAL)
        try:
            yield
            self.gather("the end", None)
        except Exception as error:
            if not self._over:
                with suppress(ProcessError):
                    self._words(_Word("an error", error=self._told(error)))
            raise
        finally:
            logger.setLevel(level)

    # ---------------------------------------------------------------------- inner workings

    def _words(self, word: _Word) -> list[_Word]:
        """What all processes tell."""
        words: list[Any] = [None] * self.size
        self._exchange(partial(dist.all_gather_object, words, word))
        return words

    def _add_up(self, tensors: Sequence[Tensor]) -> None:
        """Adds up tensors of all processes, in place; small ones of a device together, which saves time."""
        small: dict[torch.device, list[Tensor]] = {}
        for tensor in tensors:
            if tensor.nbytes <= SMALL:
                small.setdefault(tensor.device, []).append(tensor)
            else:
                self._add(tensor)
        for own in small.values():
            joined = torch.cat([tensor.reshape(-1) for tensor in own])
            self._add(joined)
            for tensor, total in zip(own, joined.split([tensor.numel() for tensor in own]), strict=True):
                tensor.copy_(total.reshape(tensor.shape))

    def _add(self, tensor: Tensor) -> None:
        place = tensor.to(_reachable(tensor.device))
        self._exchange(partial(dist.all_reduce, place))
        if place is not tensor:
            tensor.copy_(place)

    def _exchange(self, exchange: Callable[[], Any]) -> None:
        try:
            exchange()
        except RuntimeError as error:
            said = re.sub(r"^\[\S+\] ", "", first_line(error)).partition(". ")[0]  # Without where, and without advice.
            raise self._ended(
                ProcessError(
                    f"Another process of the run has ended, or does not answer: {said}. Its own error says why. If it "
                    "was killed, it may have run out of memory."
                )
            ) from error

    def _ended(self, error: FxmergeError) -> FxmergeError:
        """An error after which nothing is exchanged any more."""
        self._over = True
        return error

    def _told(self, error: Exception) -> FxmergeError:
        """An error as other processes raise it."""
        text = f"Process {self.rank} has failed: "
        if isinstance(error, FxmergeError):
            return type(error)(text + str(error))
        return ProcessError(f"{text}{type(error).__name__}: {first_line(error)}.")


ALONE = Processes()
"""One process."""


def in_step(verb: Callable[P, T]) -> Callable[P, T]:
    """A verb that takes a `run`, as all processes call it together. Inside of the call, the run tells the processes.

    Raises:
        OptionError: if the run has several processes, and is to keep the results of stages.
    """

    @wraps(verb)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        run: Any = kwargs.get("run")
        if getattr(run, "processes", None) != "auto":
            return verb(*args, **kwargs)
        processes = Processes.of_group()
        with processes.together():
            if processes.size > 1 and run.resume is not None:
                raise OptionError("Run.resume is of one process, and this run has several: leave resume out.")
            kwargs["run"] = replace(run, processes=processes, progress=False if processes.rank else run.progress)
            return verb(*args, **kwargs)

    return call


@contextmanager
def launched(device: str | torch.device | None) -> Iterator[Processes]:
    """The processes that torchrun has launched, in a group of their own; without torchrun, this one alone.

    Arguments:
        device: where they work. Of "cuda", each takes the card of its number on the machine.

    Raises:
        ProcessError: if they do not find each other.
    """
    needed = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"}
    if not needed.issubset(os.environ) or os.environ["WORLD_SIZE"] == "1":
        yield ALONE
        return
    backend = "gloo"
    if device is not None and torch.device(device) == torch.device("cuda"):
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        backend = "cpu:gloo,cuda:nccl"
    try:
        dist.init_process_group(backend, timeout=PATIENCE)
    except (RuntimeError, ValueError) as error:
        raise ProcessError(f"The processes of torchrun do not find each other: {first_line(error)}.") from error
    try:
        yield Processes.of_group()
    finally:
        dist.destroy_process_group()


class _Pickler(pickle.Pickler):
    """Takes tensors from any device; they come out on the current device of the same kind."""

    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, Tensor) and value.device.type != "cpu":
            return Tensor.to, (value.cpu(), value.device.type)
        return NotImplemented


def _packed(value: Any) -> bytes:
    content = io.BytesIO()
    _Pickler(content, pickle.HIGHEST_PROTOCOL).dump(value)
    return content.getvalue()


def _reachable(device: torch.device) -> torch.device:
    """A device between which and those of other processes tensors can be exchanged: this one, if its kind can."""
    kinds = [pair.partition(":")[0] for pair in dist.get_backend_config().split(",")]
    return device if device.type in kinds else torch.device(kinds[0])

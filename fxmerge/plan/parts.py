"""The parts of a plan: frozen dataclasses that check themselves."""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from fxmerge.errors import OptionError
from fxmerge.recipe import AUTO, Recipe, Run, Zip
from fxmerge.recipe.checks import wrong

VERSION = 1

Verb = Literal["merge", "align", "fold"]

COUNTS: dict[str, tuple[int, int | None]] = {"merge": (2, None), "align": (2, 2), "fold": (1, 1)}
"""How many models each verb takes at least and at most."""

SIZES = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


def _check_count(part: object, name: str) -> None:
    value = getattr(part, name)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise wrong(part, name, "a whole number from 1 on")


@dataclass(frozen=True)
class ModelFile:
    """The weights of one model, and what it is built of.

    Attributes:
        path: a file or directory of weights, as for `fxmerge.io.load`.
        arch: the architecture; None is that of the plan.
        set: arguments of the architecture, beside those of the plan.
        sha256: the checksum of each file by name; a file that has changed is refused.

    Raises:
        OptionError: if a field is out of range.
    """

    path: str
    arch: str | None = None
    set: Mapping[str, Any] = field(default_factory=dict)
    sha256: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.path:
            raise wrong(self, "path", "a file or directory of weights")


@dataclass(frozen=True)
class Data:
    """Calibration data.

    Attributes:
        path: a file, a directory of images, or `package.module:loader`.
        samples: how many rows are read at most.
        batch: how many rows a batch has at most.
        length: how many tokens a row of text has at most.
        sha256: the checksum of the files that were read, all together; files that have changed are refused.

    Raises:
        OptionError: if a field is out of range.
    """

    path: str
    samples: int = 1024
    batch: int = 32
    length: int = 128
    sha256: str | None = None

    def __post_init__(self) -> None:
        if not self.path:
            raise wrong(self, "path", "a file, a directory of images or package.module:loader")
        for name in ("samples", "batch", "length"):
            _check_count(self, name)


@dataclass(frozen=True)
class Output:
    """Where the result goes.

    Attributes:
        path: the directory to write. It must not exist, unless it is to be replaced.
        shard_size: how many bytes of tensors a file may hold, such as "5GB" or 5000000000; None is one file.

    Raises:
        OptionError: if a field is out of range.

    Example:
        >>> Output("merged", "5GB").bytes
        5000000000
    """

    path: str
    shard_size: int | str | None = None

    def __post_init__(self) -> None:
        if not self.path:
            raise wrong(self, "path", "a directory")
        if self.shard_size is not None and not self.bytes:
            raise wrong(self, "shard_size", "a number of bytes, such as 500MB or 5GB, or None")

    @property
    def bytes(self) -> int | None:
        """The size of a shard in bytes."""
        found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)B?", str(self.shard_size), re.IGNORECASE)
        return None if found is None else int(float(found[1]) * SIZES[found[2].upper()])


@dataclass(frozen=True)
class Plan:
    """What is to be done: all that a command line says, in one value.

    Attributes:
        models: the weights of the models.
        arch: the architecture of all models that name none: `timm:NAME`, `torchvision:NAME`, `hf` or
            `package.module:factory`.
        verb: what is done: "merge"; "align" the first model to the second; or "fold" one model.
        set: arguments of the architecture.
        input: shapes of the inputs, such as "1x3x32x32"; by default what the library says.
        base: for task vectors, the model that the others were fine-tuned from.
        data: calibration data: none, one for all models, or one for each.
        recipe: how to merge.
        run: how to compute it.
        output: where the result goes.

    Raises:
        OptionError: if a field is out of range, or the parts do not go together.
    """

    models: tuple[ModelFile, ...]
    arch: str | None = None
    verb: Verb = "merge"
    set: Mapping[str, Any] = field(default_factory=dict)
    input: tuple[str, ...] = ()
    base: ModelFile | None = None
    data: tuple[Data, ...] = ()
    recipe: Recipe = field(default_factory=Recipe)
    run: Run = field(default_factory=Run)
    output: Output | None = None

    def __post_init__(self) -> None:
        least, most = COUNTS[self.verb]
        count = len(self.models)
        if count < least or (most is not None and count > most):
            needed = f"{least} or more models" if most is None else f"{least} model{'s' * (least > 1)}"
            raise _unfit("models", f"{self.verb} takes {needed}, and {count} {'is' if count == 1 else 'are'} given.")
        if self.base is not None and self.verb != "merge":
            raise _unfit("base", f"{self.verb} takes no base; leave it out.")
        for model in self.files:
            if self.arch_of(model) is None:
                raise _unfit("arch", f"{model.path} has no architecture: pass --arch, such as timm:resnet18 or hf.")
        if len(self.data) not in (0, 1, count):
            raise _unfit("data", f"data has {len(self.data)} entries for {count} models: give one, or one for each.")
        if self.run.resume is not None:
            raise _unfit(
                "run", "run.resume is for Python only: leave it out, and pass --resume to fxmerge " + self.verb + "."
            )
        if self.verb == "fold" and not (self.recipe.match == AUTO or isinstance(self.recipe.match, Zip)):
            raise _unfit("recipe", "fold merges units: recipe.match must be Zip, with the width to fold to.")

    @property
    def files(self) -> tuple[ModelFile, ...]:
        """The weights of all models, the base last."""
        return (*self.models, *([] if self.base is None else [self.base]))

    def arch_of(self, model: ModelFile) -> str | None:
        """The architecture of one of the models."""
        return model.arch or self.arch

    def settings_of(self, model: ModelFile) -> dict[str, Any]:
        """The arguments of the architecture of one of the models."""
        return {**self.set, **model.set}


def _unfit(name: str, sentence: str) -> OptionError:
    error = OptionError(sentence)
    error.field = name
    return error


def settings(texts: Sequence[str]) -> dict[str, Any]:
    """Arguments from texts such as "num_classes=5".

    Raises:
        OptionError: if a text is none.

    Example:
        >>> settings(["num_classes=5", "act_layer=gelu"])
        {'num_classes': 5, 'act_layer': 'gelu'}
    """
    found: dict[str, Any] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not key or not equals:
            raise OptionError(f"write key=value, not {text!r}")
        try:
            found[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            found[key] = value
    return found

"""The page of a result: how it was made, as one HTML file with pictures that needs no network."""

from __future__ import annotations

import json
from base64 import b64encode
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from hashlib import sha256
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

from torch import fx

from fxmerge.errors import OptionError, OutputError
from fxmerge.interpolation import Interpolation
from fxmerge.pictures.content import content
from fxmerge.pictures.layers import layers_of
from fxmerge.pictures.value import PageValues
from fxmerge.reporting import made_with, report

LIBRARIES = {"d3": "d3.min.js", "plot": "plot.umd.min.js", "dagre": "dagre.min.js"}
"""The libraries that draw, each with its licence beside it: `licence-d3.txt`."""

SCRIPTS = ("shared.js", "graph.js", "panel.js", "sections.js", "page.js")
"""What is drawn, in the order in which it runs."""


@dataclass(frozen=True, eq=False)
class Page(PageValues):
    """The page of a result. `page` makes it; the attributes are those of `PageValues`."""

    def to_dict(self) -> dict[str, Any]:
        """What is shown, as plain data: the page holds it as JSON."""
        return content(self)

    def to_html(self) -> str:
        """The page as one HTML file: no script, style or picture is loaded from elsewhere."""
        scripts = [_static(name) for name in (*(f"vendor/{file}" for file in LIBRARIES.values()), *SCRIPTS)]
        hashes = [b64encode(sha256(text.encode()).digest()).decode() for text in scripts]
        licences = "\n\n".join(_static(f"vendor/licence-{name}.txt") for name in LIBRARIES)
        data = json.dumps(self.to_dict(), allow_nan=False, separators=(",", ":"))
        return Template(_static("page.html")).substitute(
            title=escape(self.title),
            policy=" ".join(f"'sha256-{own}'" for own in hashes),
            style=_static("page.css"),
            scripts="\n".join(f"<script>{text}</script>" for text in scripts),
            licences=escape(licences),
            # No text inside may end the element, whatever layers and files are called.
            data=data.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e"),
        )

    def save(self, path: str | Path) -> None:
        """Writes the page to a file.

        Raises:
            OutputError: if that is not possible.
        """
        try:
            Path(path).write_text(self.to_html(), encoding="utf-8")
        except OSError as error:
            raise OutputError(f"The page cannot be written to {path}: {error.strerror or error}.") from error


def page(
    merged: fx.GraphModule,
    *,
    title: str = "",
    models: Sequence[str] = (),
    warnings: Sequence[str] = (),
    facts: Sequence[tuple[str, str]] = (),
    line: Interpolation | None = None,
) -> Page:
    """The report of a network that fxmerge made, as a page with pictures.

    Arguments:
        merged: what `merge`, `merge_many`, `fold` or `align` returned, in the same process.
        title: the heading; by default it says what was done.
        models: what to call the models, a base first; by default "model A" and so on.
        warnings: what to show first.
        facts: what else to say of the result: pairs of a word and a text.
        line: networks on the line between the parents, as `interpolate` measures them.

    Raises:
        OptionError: if fxmerge did not make the network, or it was copied or unpickled, or there are too many or too
            few names.

    Example:
        >>> import torch, fxmerge
        >>> def mlp():
        ...     return torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> merged = fxmerge.merge(mlp(), mlp(), [torch.randn(16, 4)])
        >>> html = fxmerge.page(merged, title="two small networks").to_html()
        >>> "<title>two small networks</title>" in html, "http-equiv" in html
        (True, True)
        >>> fxmerge.page(merged).save("report.html")  # doctest: +SKIP
    """
    told, made = report(merged), made_with(merged)
    if models and len(models) != len(made.names):
        raise OptionError(f"models has {len(models)} names, and there are {len(made.names)}: {', '.join(made.names)}.")
    called = dict(zip(made.names, models or made.names, strict=True))
    tensors = merged.state_dict(keep_vars=True)
    return Page(
        title or f"{told.kind[:1].upper()}{told.kind[1:]} network",
        tuple(called.values()),
        told,
        made.symmetry,
        layers_of(merged),
        {name: tuple(tensor.shape) for name, tensor in tensors.items()},
        sum(tensor.numel() for tensor in merged.parameters()),
        tuple(replace(s, reference=called[s.reference], model=called[s.model]) for s in made.similarities),
        made.peak_memory,
        tuple(warnings),
        tuple(facts),
        line,
    )


@cache
def _static(name: str) -> str:
    """A file of the page."""
    return files("fxmerge.pictures").joinpath(f"static/{name}").read_text(encoding="utf-8")

"""The value that a page shows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from fxmerge.evidence.sampled import SampledSimilarity
from fxmerge.interpolation import Interpolation
from fxmerge.pictures.layers import Layer
from fxmerge.reporting import Report
from fxmerge.symmetry.group import Symmetry


@dataclass(frozen=True, eq=False)
class PageValues:
    """What the page of a result shows.

    Attributes:
        title: the heading.
        models: what the models are called, in their order, a base first.
        report: how the result was made.
        symmetry: of the models.
        layers: of the result.
        shapes: of the parameters and buffers of the result, by name.
        parameters: how many entries its parameters have.
        similarities: how alike some units are, before and after they were matched.
        peak_memory: bytes that the process had in use at most when the result was ready; None if that is not known.
        warnings: in sentences.
        facts: what else is to be said of the result: pairs of a word and a text.
        line: networks on the line between the parents; None if they were not measured.
    """

    title: str
    models: tuple[str, ...]
    report: Report
    symmetry: Symmetry
    layers: tuple[Layer, ...]
    shapes: Mapping[str, tuple[int, ...]]
    parameters: int
    similarities: tuple[SampledSimilarity, ...] = ()
    peak_memory: int | None = None
    warnings: tuple[str, ...] = ()
    facts: tuple[tuple[str, str], ...] = ()
    line: Interpolation | None = None

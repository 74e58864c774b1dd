"""Draws the picture of the README, once for light and once for dark pages: `python docs/picture.py`.

Two networks have learnt the same features in different orders. The features are colours. Their hidden units are
matched, and those of the merged network are the matched pairs.

>>> all(path(theme).read_text(encoding="utf-8") == picture(theme) for theme in THEMES)
True
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

PAGES = Path(__file__).parent / "pages"
THEMES = {"light": ("#1f2328", "#8c959f"), "dark": ("#e6edf3", "#6e7681")}
"""The colours of text and of lines."""
FEATURES = ("#d1495b", "#edae49", "#00798c", "#66a182", "#8d6fd1")
ORDER_B = (2, 4, 0, 1, 3)
"""The features of B's hidden units, from top to bottom; those of A are in order."""
WIDTH, HEIGHT, TOP, STEP, RADIUS = 860, 300, 66, 42, 11
LAYER = 70
"""From one layer to the next."""


def path(theme: str) -> Path:
    """Where the picture of a theme is."""
    return PAGES / f"picture-{theme}.svg"


def picture(theme: str) -> str:
    """The picture, as SVG."""
    text, line = THEMES[theme]
    a, b, merged = 40, 330, 680
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
        f'font-family="system-ui, sans-serif" font-size="15" fill="{text}">',
        "<title>The units of two networks are matched, and merged into one network</title>",
        *_matches(a + LAYER, b + LAYER),
        *_network(a, FEATURES, "network A", line),
        *_network(b, [FEATURES[i] for i in ORDER_B], "network B", line),
        f'<path d="M545 150h74m-12 -9l12 9l-12 9" fill="none" stroke="{text}" stroke-width="2.5"/>',
        '<text x="582" y="132" text-anchor="middle">merge</text>',
        *_network(merged, FEATURES, "merged, the same size", line),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def _network(x: int, colors: Sequence[str], name: str, line: str) -> Iterator[str]:
    """Three inputs, the hidden units, and two outputs."""
    hidden = [TOP + STEP * i for i in range(len(colors))]
    middle = hidden[len(hidden) // 2]
    inputs = [middle + STEP * i for i in (-1, 0, 1)]
    outputs = [middle + STEP * i // 2 for i in (-1, 1)]
    ends = [(x, y) for y in inputs] + [(x + 2 * LAYER, y) for y in outputs]
    for y, color in zip(hidden, colors, strict=True):
        for u, v in ends:
            way = f"M{u} {v}L{x + LAYER} {y}"
            yield f'<path d="{way}" stroke="{color}" stroke-opacity="0.55" stroke-width="1.5"/>'
    yield from (f'<circle cx="{u}" cy="{v}" r="{RADIUS - 3}" fill="{line}"/>' for u, v in ends)
    for y, color in zip(hidden, colors, strict=True):
        yield f'<circle cx="{x + LAYER}" cy="{y}" r="{RADIUS}" fill="{color}"/>'
    yield f'<text x="{x + LAYER}" y="28" text-anchor="middle">{name}</text>'


def _matches(a: int, b: int) -> Iterator[str]:
    """A line from every unit of A to the unit of B that computes the same feature."""
    for i, color in enumerate(FEATURES):
        start, end = TOP + STEP * i, TOP + STEP * ORDER_B.index(i)
        yield (
            f'<path d="M{a} {start}C{a + 110} {start} {b - 110} {end} {b} {end}" fill="none" stroke="{color}" '
            f'stroke-width="3" stroke-dasharray="2 6" stroke-linecap="round"/>'
        )


if __name__ == "__main__":
    for name in THEMES:
        path(name).write_text(picture(name), encoding="utf-8")

"""Tables as HTML, for notebooks: no scripts, and colours that follow the page, light or dark."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

CELL = "text-align:left;vertical-align:top;padding:.2em .8em .2em 0;color:inherit;background:transparent"
"""The style of a cell. Colours are those of the page around it."""


def table(caption: str, head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A table with a caption and column headings that screen readers announce. All text is escaped.

    Example:
        >>> text = table("sizes", ("name", "units"), [("<b>", 3)])
        >>> "<b>" in text, "&lt;b&gt;" in text, '<th scope="col"' in text
        (False, True, True)
    """
    names = "".join(f'<th scope="col" style="{CELL}">{escape(name)}</th>' for name in head)
    lines = [
        "<tr>" + "".join(f'<td style="{CELL}">{escape(str(cell))}</td>' for cell in row) + "</tr>\n" for row in rows
    ]
    return (
        '<div style="overflow-x:auto"><table style="border-collapse:collapse;color:inherit">\n'
        f'<caption style="text-align:left;font-weight:600;color:inherit">{escape(caption)}</caption>\n'
        f"<thead><tr>{names}</tr></thead>\n<tbody>\n{''.join(lines)}</tbody>\n</table></div>\n"
    )


def folded(summary: str, content: str) -> str:
    """Content that a reader opens.

    Arguments:
        summary: what is shown before, as text.
        content: HTML.

    Example:
        >>> folded("2 < 3", "<p>yes</p>")
        '<details><summary>2 &lt; 3</summary>\\n<p>yes</p></details>\\n'
    """
    return f"<details><summary>{escape(summary)}</summary>\n{content}</details>\n"


def lines(text: str) -> str:
    """Text, with its line breaks.

    Example:
        >>> lines("a < b\\nc")
        '<p>a &lt; b<br>c</p>\\n'
    """
    return f"<p>{'<br>'.join(map(escape, text.splitlines()))}</p>\n"

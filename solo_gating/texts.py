"""Text for people: tables, and names that must not be read as anything but names."""

import html
import math
import re
import unicodedata
from collections.abc import Mapping, Sequence

_LONGEST = 120  # of a text in a picture


def one_line(text: str) -> str:
    """A text without line breaks, control characters and changes of the writing direction."""
    words = " ".join(text.split())
    return "".join("\ufffd" if _is_control(sign) else sign for sign in words)


def _is_control(sign: str) -> bool:
    return unicodedata.category(sign) in ("Cc", "Cs") or unicodedata.bidirectional(sign) in (
        *("LRE", "RLE", "PDF", "LRO", "RLO", "LRI", "RLI", "FSI", "PDI"),
    )


def in_html(text: str) -> str:
    """A text for a HTML page, in an element or in a quoted attribute."""
    return html.escape(one_line(text))


def in_markdown(text: str) -> str:
    """A text that Markdown shows as it is, in one line and, in a table, in one cell.

    HTML's own signs become entities, which readers without backslash escapes for them know, too.
    """
    escaped = html.escape(one_line(text), quote=False)
    escaped = re.sub(r"([\\`*\[\]|~$]|(?<!\w)_|_(?!\w))", r"\\\1", escaped)
    # What starts a heading, a rule or a list.
    return re.sub(r"^(\d*)([.)]|[#+=-]+)(?=\s|$)", r"\1\\\2", escaped)


def in_picture(text: str) -> str:
    """A text that matplotlib draws as it is, not as a formula, and in a legend, too."""
    line = one_line(text)
    line = line if len(line) <= _LONGEST else f"{line[: _LONGEST - 1]}…"
    return " " * line.startswith("_") + line.replace("$", r"\$")


def aligned(rows: Sequence[Sequence[str]], left: int = 1) -> list[str]:
    """The lines of a table, each column as wide as its widest cell.

    Args:
        rows: cells, the heading first; a row may lack its last cells.
        left: how many of the first columns are aligned on the left; the others are on the right.
    """
    columns = max(map(len, rows))
    widths = [max(len(row[i]) for row in rows if i < len(row)) for i in range(columns)]
    return [
        "  ".join(
            cell.ljust(width) if place < left else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=False))
        ).rstrip()
        for row in rows
    ]


def figure(value: float | None, kind: str) -> str:
    """A figure as text, or a dash for one that does not exist (None or NaN)."""
    return "–" if value is None or math.isnan(value) else format(value, kind)


def published_count(kind: str, figures: Mapping[str, float]) -> str:
    """A line with what `BackboneFlops.as_published` gives."""
    share = figures["gated_share"]
    line = (
        f"counted as papers on {kind} do, every convolution gated and nothing else: {share:.2%}, "
    )
    line += f"{1 / share:.2f}× fewer"
    if "skipped" in figures:
        line += f" ({figures['skipped']:.2%} of the conditional part skipped)"
    return line

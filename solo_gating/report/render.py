"""One report, as Markdown and as a HTML page that needs no other file."""

import base64
from collections.abc import Sequence
from dataclasses import dataclass

from ..texts import in_html, in_markdown
from .tables import Row, Table

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #222; background: #fff; max-width: 75rem;
       margin: 2rem auto; padding: 0 1rem; }
h1, h2 { line-height: 1.2; }
h2 { margin-top: 2.5rem; }
img { max-width: 100%; }
.table { overflow-x: auto; }
table { border-collapse: collapse; font-size: 0.875rem; font-variant-numeric: tabular-nums; }
th, td { padding: 0.25rem 0.6rem; text-align: left; border-bottom: 1px solid #ddd; }
th { vertical-align: bottom; border-bottom: 2px solid #444; }
td { white-space: nowrap; }
tr.measured td { background: #fff4e5; }
"""


@dataclass(frozen=True)
class Picture:
    """A PNG picture.

    Attributes:
        name: its file's, beside the report.
        png: its content.
        description: for those who do not see it.
    """

    name: str
    png: bytes
    description: str


@dataclass(frozen=True)
class Section:
    """A heading and what follows it, in this order.

    Attributes:
        heading: its title; the first section's is the report's.
        paragraphs: plain text.
        items: a list of plain texts.
        picture: a picture, or None.
        table: a table, or None.
    """

    heading: str
    paragraphs: tuple[str, ...] = ()
    items: tuple[str, ...] = ()
    picture: Picture | None = None
    table: Table | None = None


def to_markdown(sections: Sequence[Section]) -> str:
    """The report as Markdown, with links to its pictures."""
    parts: list[str] = []
    for level, section in zip([1] + [2] * len(sections), sections, strict=False):
        parts.append(f"{'#' * level} {in_markdown(section.heading)}")
        parts += [in_markdown(paragraph) for paragraph in section.paragraphs]
        if section.items:
            parts.append("\n".join(f"- {in_markdown(item)}" for item in section.items))
        if section.picture is not None:
            parts.append(f"![{in_markdown(section.picture.description)}]({section.picture.name})")
        if section.table is not None:
            parts.append(_markdown_table(section.table))
    return "\n\n".join(parts) + "\n"


def _markdown_table(table: Table) -> str:
    lines = [table.header, ("---",) * len(table.header), *(row.texts for row in table.rows)]
    return "\n".join(
        f"| {' | '.join(text if text == '---' else in_markdown(text) for text in line)} |"
        for line in lines
    )


def to_html(sections: Sequence[Section]) -> str:
    """The report as one HTML page with its style and pictures inside."""
    body: list[str] = []
    for level, section in zip([1] + [2] * len(sections), sections, strict=False):
        body.append(f"<h{level}>{in_html(section.heading)}</h{level}>")
        body += [f"<p>{in_html(paragraph)}</p>" for paragraph in section.paragraphs]
        if section.items:
            items = "\n".join(f"<li>{in_html(item)}</li>" for item in section.items)
            body.append(f"<ul>\n{items}\n</ul>")
        if section.picture is not None:
            content = base64.b64encode(section.picture.png).decode("ascii")
            description = in_html(section.picture.description)
            body.append(f'<p><img src="data:image/png;base64,{content}" alt="{description}"></p>')
        if section.table is not None:
            body.append(_html_table(section.table))
    title = in_html(sections[0].heading)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(body)
        + "\n</body>\n</html>\n"
    )


def _html_table(table: Table) -> str:
    head = "".join(f'<th scope="col">{in_html(text)}</th>' for text in table.header)
    rows = "\n".join(_html_row(row) for row in table.rows)
    return (
        f'<div class="table"><table>\n<thead><tr>{head}</tr></thead>\n'
        f"<tbody>\n{rows}\n</tbody>\n</table></div>"
    )


def _html_row(row: Row) -> str:
    kind = "measured" if row.measured else "published"
    cells = "".join(f"<td>{in_html(text)}</td>" for text in row.texts)
    return f'<tr class="{kind}">{cells}</tr>'

"""One report, written as Markdown or as a HTML page that needs no other file."""

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from ..texts import in_html, in_markdown
from .tables import Table

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
    return "\n\n".join(_rendered(sections, _Markdown())) + "\n"


def to_html(sections: Sequence[Section]) -> str:
    """The report as one HTML page with its style and pictures inside."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{in_html(sections[0].heading)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(_rendered(sections, _Html()))
        + "\n</body>\n</html>\n"
    )


class _Form(Protocol):
    """How a kind of file writes a report's parts; all texts but `text`'s are escaped already."""

    def text(self, text: str) -> str: ...
    def heading(self, text: str, level: int) -> str: ...
    def paragraph(self, text: str) -> str: ...
    def items(self, texts: list[str]) -> str: ...
    def picture(self, picture: Picture, description: str) -> str: ...
    def table(self, header: list[str], rows: list[tuple[list[str], bool]]) -> str: ...


def _rendered(sections: Sequence[Section], form: _Form) -> list[str]:
    """A report's parts in their order."""
    parts: list[str] = []
    for number, section in enumerate(sections):
        parts.append(form.heading(form.text(section.heading), 2 if number else 1))
        parts += [form.paragraph(form.text(paragraph)) for paragraph in section.paragraphs]
        if section.items:
            parts.append(form.items([form.text(item) for item in section.items]))
        if section.picture is not None:
            description = form.text(section.picture.description)
            parts.append(form.picture(section.picture, description))
        if section.table is not None:
            header = [form.text(text) for text in section.table.header]
            rows = [([form.text(t) for t in row.texts], row.measured) for row in section.table.rows]
            parts.append(form.table(header, rows))
    return parts


class _Markdown:
    def text(self, text: str) -> str:
        return in_markdown(text)

    def heading(self, text: str, level: int) -> str:
        return f"{'#' * level} {text}"

    def paragraph(self, text: str) -> str:
        return text

    def items(self, texts: list[str]) -> str:
        return "\n".join(f"- {text}" for text in texts)

    def picture(self, picture: Picture, description: str) -> str:
        return f"![{description}]({picture.name})"

    def table(self, header: list[str], rows: list[tuple[list[str], bool]]) -> str:
        lines = [header, ["---"] * len(header), *(cells for cells, _ in rows)]
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)


class _Html:
    def text(self, text: str) -> str:
        return in_html(text)

    def heading(self, text: str, level: int) -> str:
        return f"<h{level}>{text}</h{level}>"

    def paragraph(self, text: str) -> str:
        return f"<p>{text}</p>"

    def items(self, texts: list[str]) -> str:
        return "<ul>\n" + "\n".join(f"<li>{text}</li>" for text in texts) + "\n</ul>"

    def picture(self, picture: Picture, description: str) -> str:
        content = base64.b64encode(picture.png).decode("ascii")
        return f'<p><img src="data:image/png;base64,{content}" alt="{description}"></p>'

    def table(self, header: list[str], rows: list[tuple[list[str], bool]]) -> str:
        head = "".join(f'<th scope="col">{text}</th>' for text in header)
        body = "\n".join(
            f'<tr class="{"measured" if measured else "published"}">'
            f"{''.join(f'<td>{text}</td>' for text in cells)}</tr>"
            for cells, measured in rows
        )
        return (
            f'<div class="table"><table>\n<thead><tr>{head}</tr></thead>\n'
            f"<tbody>\n{body}\n</tbody>\n</table></div>"
        )

"""The findings of a study as files: Markdown, a page of the documentation, and a self-contained HTML page."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from rlaif.errors import DataError
from rlaif.report.figures import draw_figure
from rlaif.report.page import Block, Code, Figure, Figures, Page, Points, Prose, Section, Table, render
from rlaif.storage import write_atomic
from rlaif.tables import table
from tinyworld.lab.study import Study

BEGIN, END = "<!-- report: begin -->", "<!-- report: end -->"
"""Where the findings go in a page of the documentation."""


def write_report(out: Path, study: Study, sections: Sequence[Section], origin: str) -> str:
    """Write `NAME.md`, its figures under `images`, and `NAME.html` to `out`; returns the Markdown.

    Args:
        out: the folder.
        study: what was asked.
        sections: what was found.
        origin: a line on seeds, date, machine and time.
    """
    text = markdown(study, sections, origin)
    write_atomic(out / f"{study.name}.md", text)
    _write_figures(out, study, sections)
    write_atomic(
        out / f"{study.name}.html", render(Page(title=study.title, origin=origin, sections=sections))
    )
    return text


def insert_report(docs: Path, study: Study, sections: Sequence[Section], origin: str) -> None:
    """Put the findings between the marks of `DOCS/NAME.md`, and its figures into `DOCS/images`.

    Raises:
        DataError: there is no such page, or it has no marks.
    """
    page = docs / f"{study.name}.md"
    text = page.read_text(encoding="utf-8") if page.exists() else ""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise DataError(f"{page} has no {BEGIN} and {END} for the findings to go between")
    _write_figures(docs, study, sections)
    write_atomic(page, f"{before}{BEGIN}\n\n{markdown(study, sections, origin)}\n{END}{after}")


def markdown(study: Study, sections: Sequence[Section], origin: str) -> str:
    """The findings under headings of the third level; figures are links to `images/STUDY-FIGURE.svg`."""
    parts = []
    for section in sections:
        parts.append(f"### {section.title}")
        for block in section.blocks:
            parts += _block(study, block)
    return "\n\n".join((*parts, origin)) + "\n"


def _block(study: Study, block: Block) -> Iterator[str]:
    match block:
        case Prose():
            yield block.text
        case Points():
            yield "\n".join(f"- {point}" for point in block.points)
        case Code():
            yield f"```\n{block.text}\n```"
        case Table():
            rows = [["-" if cell is None else cell for cell in row] for row in block.rows]
            yield f"**{block.title}**"
            yield table(block.heads, rows)
            if block.note:
                yield block.note
        case Figures():
            yield "\n".join(f"![{f.title}](images/{_file(study, f)})" for f in block.figures)
            yield " ".join(dict.fromkeys(f.caption for f in block.figures))
        case _:
            raise TypeError(f"{type(block).__name__} has no form in Markdown")


def _write_figures(out: Path, study: Study, sections: Sequence[Section]) -> None:
    for section in sections:
        for block in section.blocks:
            if isinstance(block, Figures):
                for figure in block.figures:
                    svg = draw_figure(figure.panel, size=figure.size)
                    write_atomic(out / "images" / _file(study, figure), svg)


def _file(study: Study, figure: Figure) -> str:
    return f"{study.name}-{Section(figure.title, ()).anchor}.svg"

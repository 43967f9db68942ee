"""The findings of a study as files: Markdown, a page of the documentation, and a self-contained HTML page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markdown_it import MarkdownIt
from markdown_it.token import Token
from markupsafe import Markup, escape

from rlaif.errors import DataError
from rlaif.storage import write_atomic
from tinyworld.lab.study import Report, Study

BEGIN, END = "<!-- report: begin -->", "<!-- report: end -->"
"""Where the findings go in a page of the documentation."""


def write_report(out: Path, study: Study, report: Report) -> None:
    """Write `NAME.md`, its figures under `images`, and `NAME.html` to `out`."""
    _write_figures(out, study, report)
    write_atomic(out / f"{study.name}.md", report.text)
    write_atomic(out / f"{study.name}.html", render_page(study, report))


def insert_report(docs: Path, study: Study, report: Report) -> None:
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
    _write_figures(docs, study, report)
    write_atomic(page, f"{before}{BEGIN}\n\n{report.text.strip()}\n\n{END}{after}")


def _write_figures(out: Path, study: Study, report: Report) -> None:
    for name, svg in report.figures.items():
        write_atomic(out / "images" / f"{study.name}-{name}.svg", svg)


def render_page(study: Study, report: Report) -> str:
    """The findings as an HTML page that refers to nothing outside itself."""
    figures = {f"images/{study.name}-{name}.svg": svg for name, svg in report.figures.items()}

    def image(_: Any, tokens: Sequence[Token], i: int, *__: Any) -> str:
        return (
            f"<figure>{figures[str(tokens[i].attrs['src'])]}"
            f"<figcaption>{escape(tokens[i].content)}</figcaption></figure>"
        )

    markdown = MarkdownIt("commonmark", {"html": False}).enable("table")
    markdown.add_render_rule("image", image)
    tokens = markdown.parse(report.text)
    for token in tokens:
        if token.tag == "h3":  # the title stands right above the findings
            token.tag = "h2"
    html = markdown.renderer.render(tokens, markdown.options, {})
    # A figure is a block of its own, where Markdown has an image in a paragraph.
    findings = Markup(html.replace("<p><figure>", "<figure>").replace("</figure></p>", "</figure>"))
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined
    )
    context: Mapping[str, Any] = {"title": study.title, "findings": findings}
    return environment.get_template("page.html.jinja").render(context)

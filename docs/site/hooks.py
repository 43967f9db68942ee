"""What the site has beyond the Markdown files: navigation, reference pages, links into the repository, formulas.

Every page is readable where the repository is browsed, so nothing here adds a syntax of its own: the navigation is
the list in `docs/README.md`, formulas are `$...$` and ```` ```math ````, and links lead to files.
"""

from __future__ import annotations

import html
import re
from pathlib import Path
from posixpath import dirname, join, normpath

import latex2mathml.converter
import reference
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]
INDEX = "README.md"
LINK = re.compile(r"\[(?P<text>[^\[\]]+)\]\((?P<target>(?:\.\./)+[^()#\s]*)(?:#(?P<name>[\w.]+))?\)")
FORMULA = re.compile(
    r'<(?P<tag>span|div) class="arithmatex">\\[(\[](?P<latex>.*?)\\[)\]]</(?P=tag)>', re.DOTALL
)

_MODULES = {module for _, modules in reference.PYTHON.values() for module in modules}
_PAGES = {f"reference/{name}": text for name, text in reference.pages().items()}


def on_config(config: MkDocsConfig) -> None:
    """Take the navigation from the list in `docs/README.md`: a section for each heading, a page for each item."""
    titles = {path: text.partition("\n")[0].removeprefix("# ") for path, text in _PAGES.items()}
    made = [{title: path} for path, title in titles.items() if "/python/" not in path]
    python = [{title: path} for path, title in titles.items() if "/python/" in path]
    config.nav = read_navigation((Path(config.docs_dir) / INDEX).read_text(encoding="utf-8"))
    config.nav.insert(-1, {"Reference": [*made, {"Python": python}]})


def read_navigation(index: str) -> list[dict[str, object]]:
    """The navigation that an index page shows: `## Section`, then items that begin `- [Title](page.md)`."""
    sections: list[dict[str, object]] = [{"Home": INDEX}]
    pages: list[dict[str, str]] = []
    for line in index.splitlines():
        if line.startswith("## "):
            pages = []
            sections.append({line.removeprefix("## "): pages})
        elif item := re.match(r"- \[([^\]]+)\]\(([^)]+\.md)\)", line):
            pages.append({item[1]: item[2]})
    return [section for section in sections if all(section.values())]


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the reference pages."""
    for path, text in _PAGES.items():
        files.append(File.generated(config, path, content=text))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Lead links that leave `docs/` where the site has the same, and make plain text of the others.

    A link to a Python file goes to the module in the reference, with `#name` to the function or class; the contract's
    goes to its page.

    Raises:
        FileNotFoundError: there is no such file in the repository.
    """

    def replaced(link: re.Match[str]) -> str:
        path = normpath(join("docs", dirname(page.file.src_uri), link["target"]))
        if path.startswith("docs/"):
            return link[0]
        if not (ROOT / path).exists():
            raise FileNotFoundError(f"{page.file.src_uri} links to {path}, which is not in the repository")
        module = path.removesuffix(".py").replace("/", ".")
        if module in _MODULES:
            return f"[{link['text']}][{module}{'.' + link['name'] if link['name'] else ''}]"
        if path.endswith(".proto"):
            up = "../" * page.file.src_uri.count("/")
            return f"[{link['text']}]({up}reference/grpc.md)"
        return link["text"] if path in link["text"] else f"{link['text']} (`{path}`)"

    return LINK.sub(replaced, markdown)


def on_page_content(content: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Write formulas as MathML, which browsers show by themselves."""

    def replaced(formula: re.Match[str]) -> str:
        display = "block" if formula["tag"] == "div" else "inline"
        return latex2mathml.converter.convert(html.unescape(formula["latex"]).strip(), display=display)

    return FORMULA.sub(replaced, content)

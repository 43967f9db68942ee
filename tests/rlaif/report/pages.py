"""Reading HTML pages as a browser or a screen reader would."""

from __future__ import annotations

from dataclasses import dataclass, field
from html.parser import HTMLParser
from itertools import pairwise

VOID = frozenset({"meta", "link", "br", "hr", "img", "input"})


@dataclass
class Element:
    """An element, its attributes, and all text inside."""

    tag: str
    attributes: dict[str, str]
    path: tuple[str, ...]
    text: str = ""


@dataclass
class Read(HTMLParser):
    """A page's elements in the order of their start tags. Fails where tags do not match.

    Attributes:
        elements: all of them.
    """

    elements: list[Element] = field(default_factory=list)
    _open: list[Element] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """See `HTMLParser`."""
        path = tuple(element.tag for element in self._open)
        self.elements.append(Element(tag, {name: value or "" for name, value in attrs}, path))
        if tag not in VOID:
            self._open.append(self.elements[-1])

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """See `HTMLParser`."""
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self._open.pop()

    def handle_endtag(self, tag: str) -> None:
        """See `HTMLParser`."""
        assert self._open and self._open[-1].tag == tag, f"</{tag}> closes {self._open[-1:]}"
        self._open.pop()

    def handle_data(self, data: str) -> None:
        """See `HTMLParser`."""
        for element in self._open:
            element.text += data

    def all(self, tag: str, **attributes: str) -> list[Element]:
        """Elements of a tag with these attributes."""
        return [
            element
            for element in self.elements
            if element.tag == tag
            and all(element.attributes.get(k.rstrip("_")) == v for k, v in attributes.items())
        ]

    @property
    def text(self) -> str:
        """All of its text."""
        return self.elements[0].text

    @property
    def titles(self) -> list[str]:
        """What the figures show."""
        names = {e.attributes["id"]: e.text for e in self.all("title") if "id" in e.attributes}
        return [names[svg.attributes["aria-labelledby"]] for svg in self.all("svg")]

    def table(self, title: str) -> list[list[str]]:
        """Cells of the table with this caption, heads first."""
        rows: list[list[str]] = []
        inside = False
        for element in self.elements:
            if element.tag == "caption":
                inside = element.text == title
            elif inside and element.tag == "tr":
                rows.append([])
            elif inside and element.tag in ("td", "th"):
                rows[-1].append(element.text)
        assert rows, f"no table {title!r}; there are {[c.text for c in self.all('caption')]}"
        return rows

    def tiles(self) -> dict[str, str]:
        """Value by name of the figures to see first."""
        found: dict[str, str] = {}
        for place, element in enumerate(self.elements):
            if element.attributes.get("class") == "tile":
                parts = [e for e in self.elements[place + 1 : place + 5] if e.path[-1:] == ("li",)]
                found[parts[1].text] = parts[0].text
        return found


def read(html: str) -> Read:
    """The page, checked for what every page of ours must be: alone, without scripts, and fit for a screen reader."""
    page = Read()
    page.feed(html)
    page.close()
    assert not page._open, page._open
    assert_needs_nothing_else(page)
    assert_accessible(page)
    return page


def assert_needs_nothing_else(page: Read) -> None:
    """No script, no handler, and no address that a browser would fetch."""
    assert not page.all("script") and not page.all("link") and not page.all("iframe") and not page.all("img")
    for element in page.elements:
        for name, value in element.attributes.items():
            assert not name.startswith("on"), (element.tag, name)
            if name in ("src", "href", "xlink:href", "action", "data", "poster"):
                assert value.startswith("#"), (element.tag, name, value)
            assert "url(" not in value.replace("url(#", ""), (element.tag, name, value)
    for style in page.all("style"):
        assert "url(" not in style.text and "@import" not in style.text


def assert_accessible(page: Read) -> None:
    """Language, title, one h1, headings without gaps, named figures, heads of tables, ids and what refers to them."""
    assert page.all("html")[0].attributes["lang"] == "en"
    assert page.all("title")[0].text.strip()
    levels = [int(e.tag[1]) for e in page.elements if e.tag in ("h1", "h2", "h3", "h4")]
    assert levels.count(1) == 1 and levels[0] == 1
    assert all(after <= before + 1 for before, after in pairwise(levels)), levels
    ids = [e.attributes["id"] for e in page.elements if "id" in e.attributes]
    assert len(ids) == len(set(ids)), sorted({i for i in ids if ids.count(i) > 1})
    for element in page.elements:
        for name in ("aria-labelledby", "href", "xlink:href"):
            if name in element.attributes:
                assert element.attributes[name].removeprefix("#") in ids, element
    assert all(svg.attributes["role"] == "img" for svg in page.all("svg"))
    assert all(page.titles)
    assert len(page.all("figcaption")) == len(page.all("figure"))
    for table in page.all("table"):
        start = page.elements.index(table)
        within = [e for e in page.elements[start:] if e.path[: len(table.path) + 1] == (*table.path, "table")]
        assert any(e.tag == "caption" for e in within)
    assert all(th.attributes.get("scope") in ("col", "row") for th in page.all("th"))

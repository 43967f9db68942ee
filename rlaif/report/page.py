"""What a page is made of, and its HTML. Whoever has findings says what to show; how it looks is decided here.

A page loads nothing and runs nothing. All text is escaped, so that a response may hold anything.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import ChoiceLoader, Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from rlaif.report.figures import SIZE, Panel, draw_figure, inline

TEMPLATES = Path(__file__).parent / "templates"
MISSING = "missing"
"""What stands where a run does not say."""
LONGEST_TEXT = 4000
"""So many characters of a prompt or a response are shown."""

_CONTROLS = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)
"""Controls of terminals and of the direction of writing, and halves of characters."""

Value = str | None
"""Of a cell or a tile; None where it could not be had."""


@dataclass(frozen=True, slots=True)
class Tile:
    """A figure to see first.

    Attributes:
        value: the figure.
        name: what it is.
        note: what to know of it.
        interval: its 95 % interval, such as `0.5 to 0.7`.
    """

    value: Value
    name: str
    note: str = ""
    interval: str = ""

    @property
    def remark(self) -> str:
        """Interval and note together."""
        parts = (f"95 % interval {self.interval}" if self.interval else "", self.note)
        return "; ".join(part for part in parts if part)


@dataclass(frozen=True, slots=True)
class Tiles:
    """Figures to see first."""

    tiles: Sequence[Tile]
    kind = "tiles"


@dataclass(frozen=True, slots=True)
class Figure:
    """A picture.

    Attributes:
        title: what it shows, for those who do not see it too.
        caption: how to read it.
        panel: draws it.
        size: in inches.
    """

    title: str
    caption: str
    panel: Panel
    size: tuple[float, float] = SIZE

    def draw(self, key: str) -> Markup:
        """The element; `key` is its own on the page."""
        return inline(draw_figure(self.panel, size=self.size), key=key, title=self.title)


@dataclass(frozen=True, slots=True)
class Figures:
    """Pictures side by side, as many as there is room for."""

    figures: Sequence[Figure]
    kind = "figures"


@dataclass(frozen=True, slots=True)
class Table:
    """Rows under heads; the first cell of a row is its name.

    Attributes:
        title: what it holds.
        heads: of the columns.
        rows: as many cells as there are heads.
        note: what to know of it.
    """

    title: str
    heads: Sequence[str]
    rows: Sequence[Sequence[Value]]
    note: str = ""
    kind = "table"

    @property
    def numeric(self) -> list[bool]:
        """Which columns hold numbers alone, and are aligned by their last digit."""
        columns = [[row[k] for row in self.rows] for k in range(len(self.heads))]
        return [all(c is None or _NUMBER.fullmatch(c) for c in column) and bool(column) for column in columns]


@dataclass(frozen=True, slots=True)
class Prose:
    """A paragraph; `warning` gives it a frame and the word."""

    text: str
    warning: bool = False
    kind = "prose"


@dataclass(frozen=True, slots=True)
class Points:
    """A list of sentences."""

    points: Sequence[str]
    kind = "points"


@dataclass(frozen=True, slots=True)
class Text:
    """What somebody wrote, shown as it is.

    Attributes:
        label: who or what.
        text: hostile, perhaps.
        note: beside the label, such as a reward.
    """

    label: str
    text: str
    note: str = ""


@dataclass(frozen=True, slots=True)
class Example:
    """Texts that belong together: a prompt, and what was made of it.

    Attributes:
        title: of the example.
        texts: in order.
        note: what to know of it.
        open: whether all of it is seen at once; otherwise after a click on its title.
    """

    title: str
    texts: Sequence[Text]
    note: str = ""
    open: bool = True
    kind = "example"


@dataclass(frozen=True, slots=True)
class Code:
    """A command, settings, or other text whose lines are to stay; `label` is a heading above it."""

    text: str
    label: str = ""
    kind = "code"


@dataclass(frozen=True, slots=True)
class Folded:
    """Blocks that are seen after a click on their title."""

    title: str
    blocks: Sequence[Block]
    kind = "folded"


@dataclass(frozen=True, slots=True)
class Raw:
    """HTML of a template of one's own (see `environment`), which escapes what is not its own."""

    html: Markup
    kind = "raw"


Block = Tiles | Figures | Table | Prose | Points | Example | Code | Folded | Raw


@dataclass(frozen=True, slots=True)
class Section:
    """Part of a page under a heading."""

    title: str
    blocks: Sequence[Block]

    @property
    def anchor(self) -> str:
        """Its place on the page."""
        return "-".join("".join(c if c.isalnum() else " " for c in self.title.lower()).split())


@dataclass(frozen=True, slots=True)
class Page:
    """A whole page.

    Attributes:
        title: heading and window title.
        lead: a paragraph or two of what this is.
        origin: where and when it comes from, in a line.
        sections: in order.
        tiles: above the sections.
    """

    title: str
    lead: Sequence[str] = ()
    origin: str = ""
    sections: Sequence[Section] = ()
    tiles: Sequence[Tile] = ()


def render(page: Page) -> str:
    """The page as HTML text; the same for the same page."""
    return environment().get_template("page.html.jinja").render(page=page, keys=_Keys())


def environment(*folders: Path) -> Environment:
    """Templates that may extend `base.html.jinja` and import `blocks.html.jinja`.

    Args:
        folders: with templates of one's own.
    """
    made = Environment(
        loader=ChoiceLoader([FileSystemLoader(folder) for folder in (*folders, TEMPLATES)]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters["shown"] = shown
    made.globals["missing"] = MISSING
    return made


def shown(text: str, most: int = LONGEST_TEXT) -> str:
    """A text that cannot disturb those around it: control characters become visible, and what is too long is cut."""
    plain = _CONTROLS.sub("\N{REPLACEMENT CHARACTER}", text)
    left = len(plain) - most
    return plain if left <= 0 else f"{plain[:most]} … ({left:,} more characters)"


class _Keys:
    """Names for figures and tables, each its own on the page."""

    def __init__(self) -> None:
        self._count = 0

    def next(self, kind: str) -> str:
        self._count += 1
        return f"{kind}-{self._count}"


_NUMBER = re.compile(r"[-+−]?\$?\d[\d,]*(\.\d+)?(e[-+]?\d+)?( ?(%|s|ms|k|M|G))?( \[.*| to .*)?")
"""A number, perhaps with a unit and an interval."""

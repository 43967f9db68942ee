"""The look of pages: what is hostile stays text, figures are named and told apart, colours can be read."""

from __future__ import annotations

import re
from itertools import pairwise
from typing import TYPE_CHECKING

import pytest

from rlaif.report.figures import COLOURS, draw_figure, series
from rlaif.report.page import (
    TEMPLATES,
    Code,
    Example,
    Figure,
    Figures,
    Page,
    Points,
    Prose,
    Section,
    Table,
    Text,
    Tile,
    render,
)
from tests.rlaif.report.pages import read

if TYPE_CHECKING:
    from matplotlib.axes import Axes

HOSTILE = """</dd></style><script>alert(1)</script>&amp;{{ 1 }}" onload="x"""
NAME = "$a_b$ $x </text><script>"
"""What matplotlib would take for mathematics, and a browser for markup."""


def lines(ax: Axes) -> None:
    for number in range(3):
        ax.plot([0, 1, 2], [number, 2, 4], **series(number), marker="o", label=f"{number} {NAME}")
    ax.set_xlabel("比")  # which the font lacks that measures it
    ax.legend()


def whole_page(text: str) -> Page:
    """A page with every kind of block, and `text` in every place that takes one."""
    return Page(
        title=text,
        lead=[text],
        origin=text,
        tiles=[Tile(text, text, text), Tile(None, "unknown")],
        sections=[
            Section(text, [Figures([Figure(f"{text} {k}", text, lines) for k in range(2)])]),
            Section(
                f"More {text}",
                [
                    Table(text, [text, "n"], [[text, "1.5"], [text, None]], text),
                    Prose(text, warning=True),
                    Points([text]),
                    Code(text, text),
                ],
            ),
            *(
                Section(
                    f"Example {number}", [Example(text, [Text(text, text, text)], text, open=number == 1)]
                )
                for number in range(2)
            ),
        ],
    )


def test_hostile_text_stays_text_wherever_it_stands(recwarn: pytest.WarningsRecorder) -> None:
    page = read(render(whole_page(HOSTILE)))
    assert [str(w.message) for w in recwarn] == []
    assert f"2 {NAME}" in [e.text.strip() for e in page.all("text")]
    assert [e.text for e in page.all("dd")] == [HOSTILE] * 2
    assert page.all("h1")[0].text == HOSTILE
    assert page.titles == [f"{HOSTILE} 0", f"{HOSTILE} 1"]


def test_controls_of_a_terminal_or_of_the_direction_of_writing_become_visible_and_other_scripts_stay() -> (
    None
):
    text = "a\x1b[2J\u202eb\ud800 \u00a0é 한 👨‍👩‍👧\ttab\nline"
    page = read(render(whole_page(text)))
    assert page.all("dd")[0].text == "a�[2J�b� \u00a0é 한 👨‍👩‍👧\ttab\nline"


def test_a_long_text_says_how_much_of_it_is_left_out() -> None:
    page = read(render(whole_page("x" * 5000)))
    assert page.all("dd")[0].text == "x" * 4000 + " … (1,000 more characters)"


def test_what_is_missing_is_called_missing() -> None:
    page = read(render(whole_page("text")))
    assert page.table("text") == [["text", "n"], ["text", "1.5"], ["text", "missing"]]
    assert page.tiles() == {"text": "text", "unknown": "missing"}


def test_a_column_of_numbers_is_aligned_by_its_last_digit() -> None:
    cells = [["a", "-1.5 [-2, 0.1]", "12 %", "1 of 2"], ["b", None, "+3", "none"]]
    assert Table("t", ["a", "b", "c", "d"], cells).numeric == [False, True, True, False]


def test_a_figure_of_a_page_takes_the_colours_of_the_page_and_a_file_has_its_own() -> None:
    html = render(whole_page("text"))
    assert html == render(whole_page("text"))
    svg = html[html.index("<svg") : html.index("</svg>")]
    assert "currentColor" in svg and "var(--series-1)" in svg
    assert COLOURS[1] not in svg
    file = draw_figure(lines)
    assert COLOURS[1] in file and "var(" not in file


def luminance(colour: str) -> float:
    """Relative luminance of WCAG 2.2."""
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    r, g, b = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels)
    return 0.2126 * r + 0.7152 * g + 0.0722 * b


def contrast(one: str, other: str) -> float:
    """Contrast ratio of WCAG 2.2, from 1 to 21."""
    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_contrast_is_that_of_the_standard() -> None:
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    assert contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.01)


@pytest.mark.parametrize("mode", ["light", "dark"])
def test_text_has_a_contrast_of_at_least_4_5_and_lines_of_3(mode: str) -> None:
    light, dark = (
        dict(re.findall(r"--([\w-]+): (#\w{6})", block))
        for block in re.findall(r":root \{(.*?)\n *\}", (TEMPLATES / "style.css").read_text(), re.DOTALL)
    )
    colours = light if mode == "light" else dark
    for ground in ("paper", "card"):
        for ink in ("ink", "soft", "link", "good", "bad"):
            assert contrast(colours[ink], colours[ground]) >= 4.5, (ink, ground)
        for number in range(len(COLOURS)):
            assert contrast(colours[f"series-{number}"], colours[ground]) >= 3, (number, ground)
    assert contrast(colours["ink"], colours["warn"]) >= 4.5
    assert light["series-0"] == COLOURS[0] and len([c for c in light if c.startswith("series")]) == len(
        COLOURS
    )


def test_neighbouring_series_differ_in_more_than_colour() -> None:
    assert all(a["linestyle"] != b["linestyle"] for a, b in pairwise(series(k) for k in range(9)))

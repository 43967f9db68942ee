"""Twenty pairs marked from the keyboard in a real browser; browser and server close, and nothing is lost."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.labeler.commands import write_lines
from tests.labeler.review.serving import labelled, review

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = [
    "--no-sandbox",  # tests run as root in CI
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: apt-get install chromium"),
]


@contextmanager
def browsing(url: str, complaints: list[str]) -> Iterator[playwright.Page]:
    """A page of a browser of its own; what its console and its network complain of is collected.

    Chromium asks for a page's icon after its load event, and drops the request when a key leads on before the answer
    (`net::ERR_ABORTED`, its word for what it gave up itself): that is no complaint.
    """

    def failed(request: playwright.Request) -> None:
        if request.failure != "net::ERR_ABORTED":
            complaints.append(f"{request.url}: {request.failure}")

    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        page = browser.new_page()
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("requestfailed", failed)
        page.goto(url)
        yield page
        browser.close()


def press(page: playwright.Page, key: str) -> None:
    """Press a key that leads to another page."""
    with page.expect_navigation():
        page.keyboard.press(key)


def test_twenty_pairs_by_keyboard_survive_browser_and_server(tmp_path: Path) -> None:
    dataset, complaints = labelled(tmp_path, 22), []
    marked: dict[str, str] = {}
    with review(dataset) as served:
        with browsing(served.url, complaints) as page:
            press(page, "m")
            for i in range(20):
                heading = page.locator("h1").inner_text()
                good_is_a = page.locator("article .text").first.inner_text().startswith("good")
                is_right = i >= 4  # the first four against the judge, which likes what is called good
                press(page, "a" if good_is_a == is_right else "b")
                marked[heading] = "A" if good_is_a == is_right else "B"
                assert heading != page.locator("h1").inner_text()
            press(page, "j")
            press(page, "u")  # the last one back, from wherever one is, and again
            assert page.locator("h1").inner_text() == heading
            assert page.get_by_text("hidden until you have marked").is_visible()
            page.keyboard.press("w")
            page.keyboard.type("a note: x and b are no keys here")
            page.keyboard.press("Enter")
            press(page, marked[heading].lower())
            page.keyboard.press("?")
            assert page.get_by_role("dialog").is_visible()
            page.keyboard.press("Escape")
            press(page, "l")
        served.stop()
    records = [json.loads(line) for line in (dataset / "review" / "marks.jsonl").read_text().splitlines()]
    notes = [record["note"] for record in records if record["event"] == "mark"]
    assert notes[-1] == "a note: x and b are no keys here" and not any(notes[:-1])
    with review(dataset) as served, browsing(served.url, complaints) as page:
        assert page.get_by_text("20 of 22 marked").is_visible()
        assert page.get_by_text("80.0 %").first.is_visible()
        assert re.search(r"κ 0\.600 \[", page.locator(".tiles").inner_text())
        kept = dict(
            zip(
                page.locator(".number").all_inner_texts(),
                page.locator(".state").all_inner_texts(),
                strict=True,
            )
        )
        assert {f"Row {number}": state.split()[0] for number, state in kept.items() if state} == marked
        assert page.title().startswith("Review of")  # the hostile row of the dataset did nothing
    assert complaints == []


def test_a_ranking_by_keyboard(tmp_path: Path) -> None:
    row = {"prompt": "question", "responses": ["first", "second", "third"]}
    dataset, complaints = write_lines(tmp_path / "candidates.jsonl", [row]), []
    with review(dataset) as served:
        with browsing(served.url, complaints) as page:
            press(page, "m")
            page.keyboard.press("Enter")  # nothing is saved before every response has its rank
            for key in ("1", "2", "Backspace", "3", "4", "1"):  # there is no rank 4
                page.keyboard.press(key)
            press(page, "Enter")
            assert page.get_by_text("1 of 1 marked").is_visible()
            assert page.locator(".mark").inner_text() == "A = C > B"
        served.stop()
    pairs = (tmp_path / "candidates-review-ranking" / "human-pairs-blind.jsonl").read_text().splitlines()
    assert [json.loads(line)["human_p_a"] for line in pairs] == [1.0, 0.5, 0.0]  # A and B, A and C, B and C
    assert complaints == []

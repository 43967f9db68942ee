"""The documentation as a site: built without a warning, complete, and nothing in it is fetched from elsewhere."""

from __future__ import annotations

import html
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from rlaif import errors
from rlaif.cli import COMMANDS, parse_config

ELSEWHERE = re.compile(
    r"""<(?:script|img|iframe|source)\b[^>]*\bsrc=["']?(?:https?:)?//"""
    r"""|<link\b[^>]*\bhref=["']?(?:https?:)?//|url\(["']?(?:https?:)?//|@import\b"""
)


def build(repository: Path, folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(repository)}
    return subprocess.run(command, cwd=repository, env=environment, text=True, capture_output=True)


@pytest.fixture(scope="module")
def site(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("mkdocs", reason="the site is built with the extra `docs`")
    folder = tmp_path_factory.mktemp("site")
    done = build(repository, folder)
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr
    return folder


def text_of(page: Path) -> str:
    (article,) = re.findall(r"<article.*?</article>", page.read_text(encoding="utf-8"), re.DOTALL)
    return html.unescape(re.sub(r"<[^>]+>", "", article))


def test_nothing_is_fetched_from_elsewhere(site: Path) -> None:
    pages = [*site.rglob("*.html"), *site.rglob("*.css")]
    assert len(pages) > 20
    found = {str(p.relative_to(site)): m[0] for p in pages if (m := ELSEWHERE.search(p.read_text()))}
    assert not found


def test_every_flag_that_help_shows_is_in_the_reference(
    site: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = (site / "reference" / "commands.html").read_text(encoding="utf-8")
    sections = re.split(r'<h2 id="rlaif-', page)[1:]
    assert len(sections) == len(COMMANDS)
    for command, section in zip(COMMANDS, sections, strict=True):
        with pytest.raises(SystemExit):
            parse_config(command, ["--help"])
        shown = set(re.findall(r"^(?:│ |  )--(?!no_)(\w+)", capsys.readouterr().out, re.MULTILINE))
        told = set(re.findall(r"<code>--(\w+)</code>", section))
        assert told == shown, command.name


def test_errors_have_the_codes_that_commands_end_with(site: Path) -> None:
    text = " ".join(text_of(site / "reference" / "errors.html").split())
    for error in (errors.ConfigError, errors.DataError, errors.BudgetReached):
        assert f" {error.exit_code} {error.__name__} " in text


def test_the_contract_has_its_comments(site: Path) -> None:
    text = text_of(site / "reference" / "grpc.html")
    assert "ScoreStream(stream ScoreStreamRequest) → stream ScoreStreamResponse" in text
    assert "Full-vocabulary probability of all labels together, in [0, 1]" in text


def test_formulas_are_written_as_mathml(site: Path) -> None:
    page = (site / "explanation" / "maths.html").read_text(encoding="utf-8")
    assert page.count("<math ") > 40
    assert "arithmatex" not in page.partition("<article")[2]

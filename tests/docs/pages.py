"""Markdown pages as a reader follows them: their fenced blocks, and one shell script of those that are to be run."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from markdown_it import MarkdownIt

from tests.reward_server.process import free_port

NOT_RUN = re.compile(r"<!-- not run: (.+?) -->", re.DOTALL)
"""Directly before a block it is the reason why that block is not run; elsewhere, why none after it on the page is."""

FILE_NAME = re.compile(r"# ([\w.-]+)\n")
"""The first line of a block that the reader saves under this name."""

PORT = re.compile(r"\b(50051|50052|8000)\b")
"""Ports of the pages; a run takes free ones."""

PROGRAM = re.compile(r"(^|\s)rlaif(\.cli)? [a-z]")
"""A line of a shell block that calls `rlaif`, or `python -m rlaif.cli` (torchrun)."""


@dataclass(frozen=True, slots=True)
class Block:
    """A fenced block.

    Attributes:
        line: of the page, from 1.
        language: what stands after the fence.
        text: its content.
        reason: why it is not run; None if it is.
    """

    line: int
    language: str
    text: str
    reason: str | None

    def commands(self) -> Iterator[list[str]]:
        """The words of every `rlaif` command in a shell block, without redirections."""
        for line in self.text.replace("\\\n", " ").splitlines():
            if PROGRAM.search(line):
                words = shlex.split(line, comments=True)
                for n, word in enumerate(words):
                    if word in ("rlaif", "rlaif.cli"):
                        yield list(_until_operator(words[n + 1 :]))


def _until_operator(words: list[str]) -> Iterator[str]:
    for word in words:
        if word in ("&", "&&", "|", ";") or re.match(r"\d?>", word):
            return
        yield word


def read_blocks(page: str) -> list[Block]:
    """The fenced blocks of a page, in order."""
    blocks = []
    for_all: str | None = None
    tokens = MarkdownIt("commonmark").parse(page)
    for before, token in zip([None, *tokens], tokens, strict=False):
        said = NOT_RUN.fullmatch(before.content.strip()) if before and before.type == "html_block" else None
        if token.type == "fence":
            reason = said[1] if said else for_all
            assert token.map is not None
            blocks.append(Block(token.map[0] + 1, token.info.strip(), token.content, reason))
        elif said:
            for_all = said[1]
    return blocks


def script(page: str, folder: Path, tiny: Mapping[str, str]) -> Path:
    """The page as a shell script in `folder`: blocks with a file name are saved, shell blocks are typed.

    Args:
        page: Markdown.
        folder: where the reader begins.
        tiny: what a run has instead of the page's words, so that it takes seconds.

    Raises:
        LookupError: the page has not what should be replaced.
    """
    lines = ["set -euo pipefail", "trap 'kill $(jobs -p) 2>/dev/null || true' EXIT"]
    ports = {port: str(free_port()) for port in sorted(set(PORT.findall(page)))}
    blocks = [block for block in read_blocks(page) if block.reason is None]
    for words in tiny:
        if not any(words in block.text for block in blocks):
            raise LookupError(f"no block has {words!r}")
    for number, block in enumerate(blocks):
        text = PORT.sub(lambda port: ports[port[0]], block.text)
        for words, instead in tiny.items():
            text = text.replace(words, instead)
        if name := FILE_NAME.match(text):
            lines += [f"cat > {name[1]} <<'END-OF-BLOCK-{number}'", text + f"END-OF-BLOCK-{number}"]
        elif block.language == "bash":
            lines += [f'echo "@ line {block.line}, after $SECONDS s"', text]
    path = folder / "page.sh"
    path.write_text("\n".join(lines) + "\n")
    return path


def follow(
    page: str, folder: Path, repository: Path, tiny: Mapping[str, str], limit_s: int
) -> subprocess.CompletedProcess[str]:
    """Run a page's script with this environment's commands; what it prints is told together.

    Args:
        page: Markdown.
        folder: where the reader begins.
        repository: whose code runs.
        tiny: see `script`.
        limit_s: seconds after which it is ended, with what runs in the background.
    """
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(repository),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    command = ["timeout", str(limit_s), "bash", str(script(page, folder, tiny))]
    return subprocess.run(
        command, cwd=folder, text=True, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )

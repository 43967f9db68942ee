"""The review page as a user has it: a process of its own, over loopback, on a labeled dataset with known answers."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2

from tests.labeler.commands import label, pair, scripted, write_lines

HOSTILE = "</div><script>document.title = 'taken'</script><img src=x onerror=alert(1)> {{ 7 * 7 }}"


def labelled(folder: Path, count: int) -> Path:
    """A run of `rlaif label pairs`: each good response has label 7/9. The first row is suspicious, the last hostile."""
    same = "the same words " * 30
    rows: list[dict[str, Any]] = [pair(0, f"good {same}", f"bad {same}")]
    rows += [pair(i) for i in range(1, count - 1)]
    rows.append(pair(count, b=HOSTILE))
    data = write_lines(folder / "pairs.jsonl", rows)
    assert label(scripted(folder), data, folder / "labels") == 0
    return folder / "labels"


@dataclass(frozen=True, slots=True)
class Served:
    """A running `rlaif review`."""

    process: subprocess.Popen[str]
    url: str

    @property
    def base(self) -> str:
        return self.url.partition("/?")[0]

    @contextmanager
    def client(self) -> Iterator[httpx2.Client]:
        """A browser without scripts that was given the token."""
        with httpx2.Client(base_url=self.base, follow_redirects=True) as client:
            assert client.get(self.url).status_code == 200
            yield client

    def stop(self) -> str:
        """End it as Ctrl-C does, and give what it printed."""
        self.process.terminate()
        printed, _ = self.process.communicate(timeout=60)
        assert self.process.returncode == 0
        return printed


@contextmanager
def review(dataset: Path, *flags: str) -> Iterator[Served]:
    """Run `rlaif review DATASET` until the block ends."""
    process = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "rlaif.cli",
            "review",
            str(dataset),
            "--port",
            "0",
            "--annotator",
            "ann",
            *flags,
        ],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    try:
        assert process.stdout is not None
        url = next((m[0] for line in process.stdout if (m := re.search(r"http://\S+", line))), None)
        assert url is not None, "the server ended before it listened"
        yield Served(process, url)
    finally:
        process.kill()
        process.communicate()


def shown(page: str) -> dict[str, str]:
    """Letter -> response of a row's page."""
    blocks = re.findall(
        r'<span class="letter">(\w)</span>.*?<div class="text" dir="auto">(.*?)</div>', page, re.S
    )
    return dict(blocks)

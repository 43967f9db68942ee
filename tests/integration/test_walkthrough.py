"""Every command of docs/walkthrough-serving.md is executed, in one shell, as a reader would type it."""

from __future__ import annotations

import os
import re
import shutil
import sys
from pathlib import Path

import pytest

from tests.docs.pages import follow

PAGE = "docs/walkthrough-serving.md"


@pytest.mark.slow
def test_the_walk_through_runs_as_it_is_written(repository: Path, tmp_path: Path) -> None:
    pytest.importorskip("trl", reason="the walk-through takes a step with TRL")
    beside = Path(sys.executable).parent
    path = f"{beside}:{os.environ['PATH']}"
    for tool in ("rlaif", "buf"):
        if shutil.which(tool, path=path) is None:
            pytest.skip(f"the walk-through calls `{tool}`, which is not installed")
    done = follow((repository / PAGE).read_text(), tmp_path, repository, {}, limit_s=270)
    output = done.stdout
    log = (tmp_path / "serve.log").read_text() if (tmp_path / "serve.log").exists() else ""
    assert done.returncode == 0, f"{output}\n{log}"

    called = re.search(r"^rm-1 version (\w+)\n(-?[\d.e-]+) None$", output, re.MULTILINE)
    assert called is not None, output
    old, raw = called.groups()
    by_buf = re.search(r'"raw": (-?[\d.e-]+)', output)
    assert by_buf is not None and float(by_buf[1]) == pytest.approx(float(raw), abs=1e-6)
    assert re.search(r"^after 1 step: mean reward -?\d", output, re.MULTILINE)
    answered = set(re.findall(r"^\d+ calls answered by (\w+)$", output, re.MULTILINE))
    assert len(answered) == 2 and old in answered
    (new,) = answered - {old}
    assert f"\nunloaded  {old}\nactive    {new}  rm-2\n@ line" in output  # the last list has no other model

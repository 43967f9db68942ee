"""Every command of docs/walkthrough-serving.md is executed, in one shell, as a reader would type it."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

BLOCK = re.compile(r"^```(bash|python)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
PAGE = "docs/walkthrough-serving.md"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def write_script(page: str, folder: Path) -> Path:
    """The page's Python blocks as the files that their first line names, its shell blocks as one script."""
    page = page.replace("50051", str(free_port()))
    commands = ["set -euo pipefail", "trap 'kill $(jobs -p) 2>/dev/null || true' EXIT"]
    for language, text in BLOCK.findall(page):
        if language == "python":
            name = re.match(r"# (\w+\.py)\n", text)
            assert name is not None, "a Python block says which file it is"
            (folder / name[1]).write_text(text)
        else:
            commands.append(text)
    script = folder / "walkthrough.sh"
    script.write_text("\n".join(commands))
    return script


@pytest.mark.slow
def test_the_walk_through_runs_as_it_is_written(repository: Path, tmp_path: Path) -> None:
    pytest.importorskip("trl", reason="the walk-through takes a step with TRL")
    beside = Path(sys.executable).parent
    path = f"{beside}:{os.environ['PATH']}"
    for tool in ("rlaif", "buf"):
        if shutil.which(tool, path=path) is None:
            pytest.skip(f"the walk-through calls `{tool}`, which is not installed")
    script = write_script((repository / PAGE).read_text(), tmp_path)
    environment = {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    environment["PYTHONPATH"] = str(repository)
    command = ["timeout", "270", "bash", str(script)]  # ends what runs in the background too
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment)
    output = done.stdout
    log = (tmp_path / "serve.log").read_text() if (tmp_path / "serve.log").exists() else ""
    assert done.returncode == 0, f"{output}\n{done.stderr}\n{log}"

    called = re.search(r"^rm-1 version (\w+)\n(-?[\d.e-]+) None$", output, re.MULTILINE)
    assert called is not None, output
    old, raw = called.groups()
    by_buf = re.search(r'"raw": (-?[\d.e-]+)', output)
    assert by_buf is not None and float(by_buf[1]) == pytest.approx(float(raw), abs=1e-6)
    assert re.search(r"^after 1 step: mean reward -?\d", output, re.MULTILINE)
    answered = set(re.findall(r"^\d+ calls answered by (\w+)$", output, re.MULTILINE))
    assert len(answered) == 2 and old in answered
    (new,) = answered - {old}
    assert output.rstrip().endswith(f"unloaded  {old}\nactive    {new}  rm-2")

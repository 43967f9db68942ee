"""Every settings file in the repository is one that its command takes, as it stands."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
import yaml

from rlaif.cli import find_command, parse_config

ROOT = Path(__file__).parent.parent
SHIPPED = sorted(ROOT.glob("configs/**/*.yaml"))


def test_settings_are_shipped() -> None:
    assert len(SHIPPED) >= 8


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_shipped_config_is_taken_by_the_command_in_its_first_line(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    program, *words = shlex.split(path.read_text().splitlines()[0].removeprefix("# "))
    assert program == "rlaif" and str(path.relative_to(ROOT)) in words
    config = parse_config(*find_command(words))
    for name, value in yaml.safe_load(path.read_text()).items():
        assert str(getattr(config, name)) == str(tuple(value) if isinstance(value, list) else value)

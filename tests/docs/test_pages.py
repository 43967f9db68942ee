"""Commands in the documentation: tutorial and how-tos are followed, others are parsed and say why they are not run."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import fields
from functools import cache
from importlib import import_module
from pathlib import Path

import pytest

from rlaif.cli import COMMANDS, find_command, parse_config
from tests.docs.pages import Block, follow, read_blocks

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md"))]
OUTSIDE = sorted([*ROOT.glob("*.md"), *ROOT.glob("benchmarks/**/*.md"), *ROOT.glob("tinyworld/*.md")])
"""Pages whose links `mkdocs build` does not check."""
TUTORIAL = "tutorial.md"
HOW_TOS = ("own-rubric.md", "own-judge.md", "own-reward-model.md", "other-trainers.md", "several-gpus.md")
FOLLOWED = {f"docs/{TUTORIAL}", "docs/walkthrough-serving.md", *(f"docs/howto/{name}" for name in HOW_TOS)}
"""Pages whose blocks are run; the walk-through by `test_walkthrough.py`."""

TINY: Mapping[str, str] = {
    "range(400)": "range(16)",
    "range(200)": "range(8)",
    "first=1000), 200)": "first=1000), 30)",
    "--max_steps 30": "--max_steps 1",
    "--max_steps 8": "--max_steps 1",
    "--rollout_batch_size 64": "--rollout_batch_size 8",
    "--num_train_epochs 3": "--num_train_epochs 1 --eval_fraction 0.3",
}
"""The tutorial's sizes, and what a test has instead of them."""

FOREIGN_FLAGS = {
    "--logprobs-mode", "--tensor-parallel-size",  # vllm serve
    "--nproc_per_node",  # torchrun
    "--help", "--config", "--debug",
}  # fmt: skip
"""Flags in prose that belong to programs of others, or to every command."""


def relative(page: Path) -> str:
    return str(page.relative_to(ROOT))


@cache
def blocks_of(page: Path) -> list[Block]:
    return read_blocks(page.read_text(encoding="utf-8"))


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_every_shell_block_is_run_or_says_why_not(page: Path) -> None:
    for block in blocks_of(page):
        if block.language == "bash" and relative(page) not in FOLLOWED:
            assert block.reason, (
                f"{relative(page)}:{block.line} needs a `not run` comment (tests/docs/pages.py)"
            )


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_no_command_hides_in_a_block_without_a_language(page: Path) -> None:
    for block in blocks_of(page):
        if block.language != "bash":
            assert not re.match(r"rlaif |python |make ", block.text), f"{relative(page)}:{block.line}"


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_commands_are_taken_by_the_command_line(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)  # shipped settings files are named from here
    for block in blocks_of(page):
        if block.language != "bash" or block.reason is None:  # those that are run are taken, too
            continue
        for words in block.commands():
            command, rest = find_command(words)
            if "..." in rest:  # an excerpt: its flags are real
                flags = {flag.removeprefix("--") for flag in rest if flag.startswith("--")}
                assert flags <= flags_of(command.config), f"{relative(page)}:{block.line}"
            else:
                parse_config(command, rest)


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_flags_in_prose_exist(page: Path) -> None:
    known = {f"--{flag}" for command in COMMANDS for flag in flags_of(command.config)}
    prose = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    for quoted in re.findall(r"`([^`\n]+)`", prose):
        for flag in re.findall(r"(?<![\w-])--[a-z][\w-]*", quoted):
            plain = flag.replace("-", "_").replace("__", "--", 1).replace("--no_", "--", 1)
            assert flag in FOREIGN_FLAGS or plain in known or flag in known, f"{relative(page)}: {flag}"


@pytest.mark.parametrize("page", OUTSIDE, ids=relative)
def test_links_outside_the_site_lead_to_files(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if not re.match(r"https?:|#", target):
            assert (page.parent / target.partition("#")[0]).exists(), f"{relative(page)}: {target}"


@cache
def flags_of(config: str) -> frozenset[str]:
    module, _, name = config.partition(":")
    return frozenset(field.name for field in fields(getattr(import_module(module), name)) if field.init)


def checkout(folder: Path) -> Path:
    """A folder that has of the repository what a reader uses."""
    (folder / "examples").symlink_to(ROOT / "examples")
    return folder


@pytest.fixture(scope="module")
def tutorial(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Where the tutorial was followed, and what it printed."""
    folder = checkout(tmp_path_factory.mktemp("checkout"))
    done = follow((ROOT / "docs" / TUTORIAL).read_text(), folder, ROOT, TINY, limit_s=800)
    logs = "".join(f"\n{log.name}: {log.read_text()}" for log in sorted(folder.glob("runs/tutorial/*.log")))
    assert done.returncode == 0, done.stdout + logs
    return folder, done.stdout


@pytest.mark.slow
@pytest.mark.timeout(900)  # a machine may be busy
def test_the_tutorial_can_be_followed(tutorial: tuple[Path, str]) -> None:
    folder, printed = tutorial
    run = folder / "runs" / "tutorial"
    assert "nothing was sent" in printed
    assert (run / "labels" / "preferences.parquet").is_file()
    for made in ("rm", "ppo", "dpo"):
        assert (run / made / "model.safetensors").is_file(), made
    judged = json.loads((run / "judge" / "report.json").read_text())
    assert judged["agreement"]["value"] > 0.85, "with rationales this judge is right; a coin is not"
    compared = json.loads((run / "compare" / "metrics.json").read_text())
    assert [policy["name"] for policy in compared["policies"]] == ["tinyworld:policy", "ppo", "dpo"]
    assert len(compared["raters"]) == 3


@pytest.mark.slow
@pytest.mark.timeout(900)  # a machine may be busy
@pytest.mark.parametrize("name", HOW_TOS)
def test_a_how_to_can_be_followed(tutorial: tuple[Path, str], name: str) -> None:
    folder, _ = tutorial
    done = follow((ROOT / "docs" / "howto" / name).read_text(), folder, ROOT, {}, limit_s=800)
    logs = "".join(f"\n{log.name}: {log.read_text()}" for log in sorted(folder.glob("runs/tutorial/*.log")))
    assert done.returncode == 0, done.stdout + logs

"""`rlaif models` against running servers: each server is asked, and what cannot be done is one line."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from reward_server.scorers.base import Scorer
from rlaif.cli import main
from tests.reward_server.fakes import LengthScorer, Served, serving
from tests.reward_server.tiny import save_classifier


async def rlaif(*arguments: str) -> int:
    """The command, in a thread: the server has this one's event loop."""
    return await asyncio.to_thread(main, ["models", *arguments])


async def hold(served: Served, version: str) -> None:
    """Give the server a second model."""

    async def second() -> Scorer:
        scorer = LengthScorer()
        scorer.version = version
        return scorer

    assert served.server._registry is not None
    await served.server._registry.load(second)


def test_a_swap_is_for_every_server_that_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    async def scenario() -> None:
        async with serving(LengthScorer()) as a, serving(LengthScorer()) as b:
            for served in (a, b):
                await hold(served, "length-2")
            both = f"--reward_server={a.address},{b.address}"
            assert await rlaif("list", both) == 0
            listed = "active    length-1  length\nready     length-2  length\n"
            assert capsys.readouterr().out == f"{a.address}:\n{listed}{b.address}:\n{listed}"
            assert await rlaif("activate", both, "--version=length-2") == 0
            assert await rlaif("unload", both, "--version=length-1") == 0
            capsys.readouterr()
            assert await rlaif("list", f"--reward_server={b.address}") == 0
            assert capsys.readouterr().out == "active    length-2  length\n"

    asyncio.run(scenario())


def test_what_the_server_refuses_is_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serving(LengthScorer(), max_models=1) as served:
            at = f"--reward_server={served.address}"
            for arguments, words in (
                (("unload", "--version=length-1"), "version length-1 is active: activate another one first"),
                (("activate", "--version=length-9"), "no model of version length-9 is loaded, only length-1"),
                (("load", f"--model={tmp_path}"), "1 models are loaded, which is all that this server holds"),
            ):
                assert await rlaif(arguments[0], at, *arguments[1:]) == 6
                (line,) = capsys.readouterr().err.splitlines()
                assert (
                    line.startswith(f"rlaif: the reward server at {served.address} refused") and words in line
                )
        gone = ("list", f"--reward_server={served.address}", "--give_up_after_s=0")
        assert await rlaif(*gone) == 6
        assert "no reward server at" in capsys.readouterr().err

    asyncio.run(scenario())


def test_a_scoring_token_may_look_but_not_swap(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tokens").write_text("score s3cret\nadmin adm1n\n")

    async def scenario() -> None:
        async with serving(LengthScorer(), token_file=tmp_path / "tokens") as served:
            at = f"--reward_server={served.address}"
            monkeypatch.setenv("RLAIF_REWARD_TOKEN", "s3cret")
            assert await rlaif("list", at) == 0
            assert await rlaif("activate", at, "--version=length-1") == 6
            assert "this needs a token with the role admin" in capsys.readouterr().err
            monkeypatch.setenv("RLAIF_REWARD_TOKEN", "adm1n")
            assert await rlaif("activate", at, "--version=length-1") == 0

    asyncio.run(scenario())


def test_a_model_is_loaded_from_disk_and_takes_over(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    model = save_classifier(tmp_path / "rm")

    async def scenario() -> None:
        async with serving(LengthScorer(), device="cpu") as served:
            at = f"--reward_server={served.address}"
            assert await rlaif("load", at, f"--model={model}", "--activate") == 0
            state, version, name = capsys.readouterr().out.split()
            assert (state, name) == ("active", str(model))
            assert await rlaif("list", at) == 0
            assert capsys.readouterr().out.splitlines() == [
                "ready     length-1  length",
                f"active    {version}  {model}",
            ]

    asyncio.run(scenario())

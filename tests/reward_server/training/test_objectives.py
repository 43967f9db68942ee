"""Each loss from a file to a checkpoint, and ensembles."""

from __future__ import annotations

import asyncio
import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from reward_server.config import ServeConfig
from reward_server.scorers.base import Scored, ScoreTask
from reward_server.server import load_scorer
from reward_server.training.data import label
from reward_server.training.train import run
from rlaif.errors import ConfigError, DataError
from rlaif.types import Message, PreferenceRow, user_prompt
from tests.reward_server import tiny
from tests.reward_server.training.test_train import config, polite_rows, write


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_language_model(tmp_path_factory.mktemp("backbone"))


def card(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "reward_model.json").read_text())
    return content


def test_what_each_loss_reads_of_a_row() -> None:
    row = PreferenceRow(user_prompt("q"), "a", "b", 0.8, {"margin": 0.6})
    turned = PreferenceRow(user_prompt("q"), "b", "a", 0.2, {"margin": -0.6})
    assert [label(row, t) for t in ("soft_cross_entropy", "bradley_terry", "margin")] == [
        (0.8, 0.0), (1.0, 0.0), (1.0, 0.6),
    ]  # fmt: skip
    assert label(turned, "margin") == (0.0, -0.6)


def test_hard_labels_leave_ties_out_and_margins_must_be_there(
    backbone: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{**row, "chosen_prob": 0.5 if i % 4 == 0 else 0.9} for i, row in enumerate(polite_rows(40))]
    dataset = write(tmp_path / "pairs.jsonl", rows)
    run(
        config(backbone, dataset, tmp_path / "rm", loss_type="bradley_terry", center_rewards_coefficient=0.01)
    )
    assert "ties are left out" in capsys.readouterr().out
    written = card(tmp_path / "rm")
    assert written["train_rows"] + written["metrics"]["pairs"] < 40
    assert written["metrics"]["ties"] > 0  # held-out ties still count in the log loss
    with pytest.raises(DataError, match=r"training pairs .* have no margin"):
        run(config(backbone, dataset, tmp_path / "margin", loss_type="margin"))
    with pytest.raises(ConfigError, match="is for pairs"):
        config(backbone, dataset, tmp_path, loss_type="regression", center_rewards_coefficient=0.01)


def test_a_row_is_learnt_with_its_margin(backbone: Path, tmp_path: Path) -> None:
    """Scores begin near 0, where -log sigmoid(d - 3) is near 3.05 and -log sigmoid(d) near 0.69."""
    dataset = write(tmp_path / "pairs.jsonl", [{**row, "margin": 3.0} for row in polite_rows(40)])
    first = {}
    for loss_type in ("bradley_terry", "margin"):
        folder = tmp_path / loss_type
        run(config(backbone, dataset, folder, loss_type=loss_type, logging_steps=1))
        first[loss_type] = json.loads((folder / "metrics.jsonl").read_text().splitlines()[0])["loss"]
    assert first["bradley_terry"] == pytest.approx(0.69, abs=0.2)
    assert first["margin"] == pytest.approx(3.05, abs=0.6)


def test_scores_are_learnt_by_regression_on_their_own_scale(backbone: Path, tmp_path: Path) -> None:
    """Judges score from 1 to 10; the head has no bias."""
    rng = random.Random(0)
    rows = [
        {"prompt": f"{i}", "response": response * rng.randint(2, 6), "score": score}
        for i in range(150)
        for response, score in (("!", 8.0 + rng.random()), (".", 4.0 + rng.random()))
    ]
    run(config(backbone, write(tmp_path / "scores.jsonl", rows), tmp_path / "rm",
               loss_type="regression", num_train_epochs=4, learning_rate=1e-2))  # fmt: skip
    written = card(tmp_path / "rm")
    scores = written["metrics"]["scores"]
    assert written["score_scale"]["mean"] == pytest.approx(6.5, abs=0.2)
    assert scores["pearson"]["value"] > 0.9
    assert scores["rmse"] < 0.8 < scores["label_std"]
    assert written["metrics"]["accuracy"]["value"] > 0.95  # pairs of one prompt, by the scores' order
    same = [{**row, "score": 5.0} for row in rows]
    with pytest.raises(DataError, match="nothing to learn"):
        run(config(backbone, write(tmp_path / "same.jsonl", same), tmp_path / "same", loss_type="regression"))


def test_an_ensemble_is_trained_resumed_and_served_as_one(
    backbone: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dataset = write(tmp_path / "pairs.jsonl", polite_rows(80))
    settings = config(backbone, dataset, tmp_path / "rm", num_ensemble=3, seed=5)
    for number in (0, 2):  # as if it had been killed between members
        run(
            replace(
                settings, output_dir=tmp_path / "rm" / f"member-{number}", seed=5 + number, num_ensemble=1
            )
        )
    files = [tmp_path / "rm" / f"member-{k}" / "model.safetensors" for k in range(3)]
    before = files[0].stat().st_mtime_ns
    capsys.readouterr()
    run(settings)
    assert capsys.readouterr().out.count("holds the finished reward model already") == 2
    assert files[0].stat().st_mtime_ns == before
    assert len({file.read_bytes() for file in files}) == 3
    assert len({card(file.parent)["eval_hash"] for file in files}) == 1
    report = (tmp_path / "rm" / "report.md").read_text()
    assert "## Members" in report and "member-2" in report
    run(settings)
    assert "holds the finished ensemble already" in capsys.readouterr().out

    moved = (tmp_path / "rm").rename(tmp_path / "elsewhere")
    conversation = (*user_prompt("1 abc"), Message("assistant", "abc!"))

    async def reward(model: str) -> float:
        scorer = load_scorer(ServeConfig(model=model, device="cpu"))
        (outcome,) = await scorer.score([scorer.prepare(ScoreTask(conversation))])
        await scorer.close()
        assert isinstance(outcome, Scored)
        return (outcome.raw - scorer.normalization.center) / scorer.normalization.scale

    members = [asyncio.run(reward(str(moved / f"member-{k}"))) for k in range(3)]
    assert asyncio.run(reward(str(moved / "ensemble.yaml"))) == pytest.approx(sum(members) / 3, abs=1e-5)

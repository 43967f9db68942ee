"""An ensemble says what its members say, on the scale that they say it on."""

from __future__ import annotations

import asyncio
import json
import statistics
from pathlib import Path

import pytest

from reward_server.config import ServeConfig
from reward_server.evaluation.config import EvaluateConfig
from reward_server.evaluation.evaluate import run as evaluate
from reward_server.model import CARD
from reward_server.scorers.base import Compared, CompareTask, Scored, ScoreTask
from reward_server.server import load_scorer
from reward_server.training.train import composite
from rlaif.types import Pair, user_prompt, with_response
from tests.reward_server import tiny

PAIR = Pair(user_prompt("q"), "good", "poor")


def member(folder: Path, seed: int, mean: float, std: float) -> Path:
    tiny.save_classifier(folder, seed=seed)
    (folder / CARD).write_text(json.dumps({"mean": mean, "std": std, "source": "by hand"}))
    return folder


async def answers(model: Path) -> tuple[float, float, float]:
    """Raw score and reward of the first response, and P(first preferred)."""
    scorer = load_scorer(ServeConfig(model=str(model), device="cpu"))
    tasks = [ScoreTask(with_response(PAIR.prompt, PAIR.a)), CompareTask(PAIR)]
    scored, compared = await scorer.score([scorer.prepare(task) for task in tasks])
    await scorer.close()
    assert isinstance(scored, Scored) and isinstance(compared, Compared)
    scale = scorer.normalization
    return scored.raw, (scored.raw - scale.center) / scale.scale, compared.p_a


def test_two_members_that_agree_are_as_sure_as_one(tmp_path: Path) -> None:
    spreads = {f"member-{k}": 4.0 for k in range(2)}
    folders = [member(tmp_path / name, 0, 0.5, std) for name, std in spreads.items()]
    ensemble = tmp_path / "ensemble.yaml"
    ensemble.write_text(composite(spreads))

    raw, reward, p_a = asyncio.run(answers(folders[0]))
    assert reward == pytest.approx((raw - 0.5) / 4)
    assert abs(p_a - 0.5) > 0.01, "else any scale would do"
    # The raw score is the member's without its centre, which no comparison sees.
    assert asyncio.run(answers(ensemble)) == pytest.approx((raw - 0.5, reward, p_a), abs=1e-5)

    dataset = tmp_path / "pairs.jsonl"
    rows = [{"prompt": f"q{i}", "chosen": f"good {i}", "rejected": f"poor {i}"} for i in range(20)]
    dataset.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = []
    for model in (folders[0], ensemble):
        output = tmp_path / f"eval-{model.stem}"
        evaluate(EvaluateConfig(model=str(model), dataset=dataset, output_dir=output, device="cpu"))
        found.append(json.loads((output / "metrics.json").read_text()))
    assert found[1]["log_loss"] == pytest.approx(found[0]["log_loss"], abs=1e-5)
    assert found[1]["calibration"]["brier"] == pytest.approx(found[0]["calibration"]["brier"], abs=1e-5)


def test_the_reward_is_the_mean_of_rewards_and_a_comparison_takes_the_mean_standard_deviation(
    tmp_path: Path,
) -> None:
    spreads = {"a": 2.0, "b": 6.0}
    rewards = []
    for seed, (name, std) in enumerate(spreads.items()):
        rewards.append(asyncio.run(answers(member(tmp_path / name, seed, float(seed), std)))[1])
    ensemble = tmp_path / "ensemble.yaml"
    ensemble.write_text(composite(spreads))
    raw, reward, _ = asyncio.run(answers(ensemble))
    assert reward == pytest.approx(statistics.fmean(rewards), abs=1e-5)
    assert raw == pytest.approx(4 * reward)

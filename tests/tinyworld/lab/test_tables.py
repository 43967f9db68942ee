"""Tables of the studies of rewards and of noise, from measurements by hand."""

import json

import pytest

from tinyworld.lab import noise, rewards


def estimate(value):
    return {"value": value, "low": None, "high": None}


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def policy(folder, name, win_rate, controlled):
    rating = {"win_rate": estimate(win_rate), "length_controlled": estimate(controlled)}
    return {"name": str(folder / name), "ratings": [rating]}


def test_the_paper_stands_beside_the_same_comparisons(tmp_path):
    for seed, shift in ((0, -0.01), (1, 0.01)):
        folder = tmp_path / str(seed)
        over_sft = {rewards.DISTILLED: 0.9, rewards.DIRECT: 0.95, rewards.PEOPLE: 0.92, rewards.POOR: 0.6}
        policies = [policy(folder, arm.name, won + shift, won - 0.1) for arm, won in over_sft.items()]
        write(folder / "eval" / "rewards" / "metrics.json", {"policies": [{"name": "sft"}, *policies]})
        for i, (one, other) in enumerate(rewards.STUDY.versus):
            found = {"policies": [{"name": "baseline"}, policy(folder, one.name, 0.5 + i / 10, 0.4)]}
            write(folder / "eval" / f"{one.name}-over-{other.name}" / "metrics.json", found)
        for i, model in enumerate(("rm-human", "rm", "rm-no-cot")):
            write(folder / "eval" / model / "metrics.json", {"accuracy": estimate(0.8 - i / 10 + shift)})
    table = rewards.beside_the_paper(rewards.STUDY, {0: tmp_path / "0", 1: tmp_path / "1"})
    found = {what: (paper, here) for what, paper, here in table.rows}
    assert found["direct RLAIF over SFT"] == ("74 / 65", "95.0 / 85.0")
    assert found["RLHF over SFT"] == ("73 / 61", "92.0 / 82.0")
    assert found["direct over distilled RLAIF; labeler as large as the policy"] == ("60 / 56", "50.0 / 40.0")
    assert found["RLAIF over RLHF"] == ("50 / 47", "60.0 / 40.0")
    assert found["distilled RLAIF: best prompt over a poorer one"] == ("59 / 55", "70.0 / 40.0")
    assert found["reward model of the poorest labels does"] == ("66.4", "60.0")


def test_measures_of_an_arm_are_those_of_its_reward_model_and_of_its_policy(tmp_path):
    made = noise.ARMS[0.2, "hard"]
    policies = [policy(tmp_path, arm.name, 0.5, 0.5) for arm in noise.ARMS.values() if arm != made]
    evaluated = {"policies": [{"name": "sft"}, *policies, policy(tmp_path, made.name, 0.8, 0.7)]}
    write(tmp_path / "eval" / "noise" / "metrics.json", evaluated)
    metrics = {"accuracy": estimate(0.75), "log_loss": 0.6, "calibration": {"ece": 0.1}}
    write(tmp_path / "eval" / "rm-hard-20" / "metrics.json", metrics)
    found = noise.measures(made, "noise", {0: tmp_path})
    assert {name: [one["value"] for one in of] for name, of in found.items()} == {
        "accuracy": [0.75], "log_loss": [0.6], "ece": [0.1], "win_rate": [0.8], "length_controlled": [0.7],
    }  # fmt: skip


@pytest.mark.parametrize(("kind", "loss"), [("soft", "soft_cross_entropy"), ("hard", "bradley_terry")])
def test_soft_and_hard_reward_models_learn_from_the_same_labels(kind, loss):
    models = [noise.ARMS[wrong, kind].reward for wrong in noise.WRONG]
    others = [arm.reward for arm in noise.ARMS.values()]
    for wrong, model in zip(noise.WRONG, models, strict=True):
        assert model.options == ("--loss_type", loss)
        assert model.labels.options[:2] == ("--wrong", str(wrong))
        assert sum(other.labels == model.labels for other in others) == 2

"""`rlaif eval policy` as a user runs it, with tiny models and a real reward server over gRPC."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from policy_trainer.config import PPOConfig
from policy_trainer.evaluation.config import EvaluatePolicyConfig
from policy_trainer.evaluation.evaluate import run
from policy_trainer.evaluation.sides import Side, check_found
from policy_trainer.ppo import train
from policy_trainer.reward_source import FunctionReward
from rlaif.errors import ConfigError, DataError, ModelError, QualityError, RewardServerError, StorageError
from tests.policy_trainer import tiny
from tests.policy_trainer.reward_servers import NumberServer, free_port, serving

FUNCTION = "tests.policy_trainer.tiny:share_of_w0"


def even_words(text: str) -> float:
    """What `NumberServer` scores: words with an even number, unless `unscored`."""
    words = text.split()
    if unscored(text):
        raise ValueError(text)
    return float(sum(int(word[1:]) % 2 == 0 for word in words))


def unscored(text: str) -> bool:
    return bool(text) and int(text.split()[0][1:]) % 4 == 1


def server(**changes: Any) -> NumberServer:
    return NumberServer(score=even_words, center=0.0, scale=1.0, **changes)


@pytest.fixture
def world(tmp_path: Path) -> Path:
    """Policies `a` and `b`, 20 prompts."""
    tiny.save_policy(tmp_path / "a", seed=0)
    tiny.save_policy(tmp_path / "b", seed=1)
    tiny.save_prompts(tmp_path / "prompts.jsonl")
    return tmp_path


def config(world: Path, **changes: Any) -> EvaluatePolicyConfig:
    settings: dict[str, Any] = {
        "dataset": world / "prompts.jsonl",
        "output_dir": world / "out",
        "model_name_or_path": (str(world / "b"),),
        "baseline": str(world / "a"),
        "max_new_tokens": 8,
        "max_missing": 0.9,
        "resamples": 50,
        "batch_size": 3,
        "give_up_after_s": 5.0,
    }
    return EvaluatePolicyConfig(**{**settings, **changes})


def findings(world: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((world / "out" / "metrics.json").read_text())
    return found


def responses(world: Path, name: str) -> list[str]:
    (path,) = (world / "out" / "responses").glob(f"*{name}-????????.jsonl")
    records = [json.loads(line) for line in path.read_text().splitlines()][1:]
    return [response[0] for record in records for response in record["responses"]]


def test_the_win_rate_is_that_of_the_responses_that_were_kept(world: Path) -> None:
    run(config(world, reward_function=FUNCTION))
    ours, theirs = (tiny.share_of_w0([], responses(world, name)) for name in ("b", "a"))
    pairs = [(x, y) for x, y in zip(ours, theirs, strict=True) if x is not None and y is not None]
    wins = [1.0 if x > y else 0.0 if x < y else 0.5 for x, y in pairs]
    baseline, policy = findings(world)["policies"]
    assert policy["ratings"][0]["win_rate"]["value"] == sum(wins) / 20
    assert policy["ratings"][0]["score"]["value"] == pytest.approx(sum(x for x, _ in pairs) / 20)
    assert baseline["ratings"][0]["score"]["value"] == pytest.approx(sum(y for _, y in pairs) / 20)
    assert "win_rate" not in baseline["ratings"][0]
    assert "## Win rates by " + FUNCTION in (world / "out" / "report.md").read_text()


def test_kl_is_that_to_the_reference_and_0_for_its_twin(world: Path) -> None:
    twin = tiny.save_policy(world / "twin", seed=0)
    run(
        config(
            world,
            model_name_or_path=(str(world / "b"), str(twin)),
            ref_model=str(world / "a"),
            reward_function=FUNCTION,
        )
    )
    baseline, b, same = findings(world)["policies"]
    assert baseline["kl"]["value"] == 0.0
    assert same["kl"]["value"] == pytest.approx(0.0, abs=1e-5)
    assert b["kl"]["value"] > 1.0
    assert same["ratings"][0]["ties"] == 1.0  # the same weights, the same seed, the same words
    assert (world / "out" / "frontier.png").stat().st_size > 1000


def test_an_evaluation_whose_server_is_gone_has_on_record_how_it_ended(world: Path) -> None:
    with serving(server()) as at:
        pass
    with pytest.raises(RewardServerError):
        run(config(world, reward_server=at, give_up_after_s=0.0))
    reason = json.loads((world / "out" / "run.json").read_text())["ended"]["reason"]
    assert reason.startswith(f"no reward server at {at}")


def test_the_same_command_again_samples_and_asks_nothing(
    world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    both = server()
    with serving(both) as at:
        run(config(world, judge_server=at, reward_server=at))
    first = findings(world)
    assert first["policies"][1]["ratings"][1]["missing"]
    capsys.readouterr()
    (world / "out" / "metrics.json").unlink()
    with serving(again := server()) as at:
        run(config(world, judge_server=at, reward_server=at))
    assert findings(world) == first
    assert "sampling" not in capsys.readouterr().err
    # What had no number is asked again, and nothing else.
    texts = {item.conversation.messages[-1].content for call in again.calls for item in call.items}
    assert texts and all(map(unscored, texts))


def test_without_anything_left_to_ask_no_server_is_needed(world: Path) -> None:
    numbers = NumberServer(score=len, center=0.0, scale=1.0)
    with serving(numbers) as at:
        run(config(world, judge_server=at, reward_server=at))
    first = findings(world)
    gone = f"127.0.0.1:{free_port()}"
    run(config(world, judge_server=gone, reward_server=gone, give_up_after_s=0.0))
    assert findings(world) == first


def test_sampling_that_was_interrupted_goes_on_to_the_same_responses(
    world: Path,
) -> None:
    rows = [{"prompt": f"w{i % 24} w{i // 24} w5"} for i in range(150)]
    (world / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run(config(world, reward_function=FUNCTION))
    (path,) = (world / "out" / "responses").glob("*b-????????.jsonl")
    whole = path.read_text()
    lines = whole.splitlines(keepends=True)
    assert len(lines) > 3  # a header and chunks
    path.write_text("".join(lines[:2]) + lines[2][:40])  # a kill in the middle of a line
    run(config(world, reward_function=FUNCTION))
    assert path.read_text() == whole


def test_a_judge_is_asked_in_both_orders_and_inconsistent_pairs_may_be_ties(world: Path) -> None:
    """The server prefers by 1/4 and adds 0.2 to what it sees first: 0.95 and 0.55, or 0.45 and 0.05, or 0.7 and 0.3."""
    numbers = NumberServer(score=len, center=0.0, scale=1.0)
    with serving(numbers) as at:
        run(config(world, judge_server=at))
        (rating,) = findings(world)["policies"][1]["ratings"]
        equal = [len(x) == len(y) for x, y in zip(responses(world, "a"), responses(world, "b"), strict=True)]
        same = [x == y for x, y in zip(responses(world, "a"), responses(world, "b"), strict=True)]
        assert rating["ties"] == sum(equal) / 20
        assert rating["same_position"] == pytest.approx((sum(equal) - sum(same)) / (20 - sum(same)))
        numbers.preference = lambda difference: 0.6 if difference > 0 else 0.4  # 0.8 and 0.4, 0.6 and 0.2
        run(config(world, judge_server=at, output_dir=world / "other", on_inconsistent="tie"))
    other = json.loads((world / "other" / "metrics.json").read_text())["policies"][1]["ratings"][0]
    assert other["same_position"] == other["ties"] == 1.0


def test_what_has_no_score_is_left_out_counted_and_refused_beyond_a_share(world: Path) -> None:
    with serving(server()) as at, pytest.raises(QualityError, match=r"comparisons of .* are missing"):
        run(config(world, reward_server=at, max_missing=0.0))
    (rating,) = findings(world)["policies"][1]["ratings"]
    assert rating["missing"]["out_of_range"] + rating["comparisons"] == 20
    assert "Left out" in (world / "out" / "report.md").read_text()


def test_another_model_behind_the_same_address_is_refused(world: Path) -> None:
    tiny.save_policy(world / "c", seed=2)
    with serving(server()) as at:
        run(config(world, reward_server=at))
    with serving(server(version="v2")) as at, pytest.raises(StorageError, match=r"v1.*v2"):
        run(config(world, reward_server=at, model_name_or_path=(str(world / "c"),)))


def test_recorded_responses_stand_in_for_a_policy(world: Path) -> None:
    prompts = [json.loads(line)["prompt"] for line in (world / "prompts.jsonl").read_text().splitlines()]
    rows = [{"prompt": prompt, "response": "w0 w0"} for prompt in prompts[:15]]
    (world / "people.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run(config(world, baseline=str(world / "people.jsonl"), reward_function=FUNCTION))
    baseline, policy = findings(world)["policies"]
    assert baseline["responses"] == 15
    assert baseline["ratings"][0]["score"]["value"] == 1.0
    assert policy["ratings"][0]["comparisons"] == 15
    assert policy["ratings"][0]["missing"] == {"not_recorded": 5}


def test_outputs_of_alpaca_eval_are_compared_as_published_and_by_dataset(tmp_path: Path) -> None:
    def outputs(name: str, says: list[str]) -> str:
        rows = [
            {
                "instruction": f"task {i}",
                "output": said,
                "generator": name,
                "dataset": ("koala", "vicuna")[i % 2],
            }
            for i, said in enumerate(says)
        ]
        (tmp_path / f"{name}.json").write_text(json.dumps(rows, indent=1))
        return str(tmp_path / f"{name}.json")

    reference = outputs("davinci", ["w1", "w1 w1", "w0 w0 w0", "w1"])
    model = outputs("mine", ["w0", "w0", "w0 w0", "w1 w1"])
    run(
        config(
            tmp_path,
            dataset=reference,
            model_name_or_path=(model,),
            baseline=reference,
            reward_function=FUNCTION,
        )
    )
    (rating,) = findings(tmp_path)["policies"][1]["ratings"]
    assert (rating["win_rate"]["value"], rating["ties"]) == (0.75, 0.5)
    assert rating["length_controlled"]["value"] is not None
    by_dataset = {s["name"]: (s["comparisons"], s["win_rate"]["value"]) for s in rating["subsets"]}
    assert by_dataset == {"koala": (2, 0.75), "vicuna": (2, 0.75)}
    assert "| koala" in (tmp_path / "out" / "report.md").read_text()


def test_first_turns_of_mt_bench_answers_are_compared_by_category(tmp_path: Path) -> None:
    questions = [
        {"question_id": i, "category": c, "turns": ["q", f"{i}?"]}
        for i, c in ((81, "writing"), (111, "math"))
    ]
    questions[1]["turns"] = ["other q", "?"]
    (tmp_path / "question.jsonl").write_text("".join(json.dumps(q) + "\n" for q in questions))
    for name, says in (("a", ("w1", "w1")), ("b", ("w0", "w1 w0"))):
        rows = [
            {"question_id": number, "model_id": name, "choices": [{"index": 0, "turns": [said, "later"]}]}
            for number, said in zip((81, 111), says, strict=True)
        ]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    changes: dict[str, Any] = {
        "model_name_or_path": (str(tmp_path / "b.jsonl"),),
        "reward_function": FUNCTION,
    }
    run(config(tmp_path, dataset=tmp_path / "question.jsonl", baseline=str(tmp_path / "a.jsonl"), **changes))
    (rating,) = findings(tmp_path)["policies"][1]["ratings"]
    assert [(s["name"], s["win_rate"]["value"]) for s in rating["subsets"]] == [
        ("math", 1.0),
        ("writing", 1.0),
    ]


def test_every_checkpoint_of_a_run_is_a_policy_and_its_reference_the_baseline(world: Path) -> None:
    settings: PPOConfig = tiny.ppo_config(world, max_steps=2, save_steps=1, learning_rate=3e-2)
    train(settings, FunctionReward(tiny.share_of_w0))
    run(config(world, model_name_or_path=(), baseline=None, runs=(world / "run",), reward_function=FUNCTION))
    found = findings(world)
    assert found["baseline"] == str(world / "policy")
    assert [(p["run"], p["step"]) for p in found["policies"]] == [
        ("", None), (str(world / "run"), 1), (str(world / "run"), 2)
    ]  # fmt: skip
    kls = [p["kl"]["value"] for p in found["policies"]]
    assert kls[0] == 0.0 and kls[1] != 0.0 and kls[2] != 0.0
    # A single model out of a run directory, or a single checkpoint, knows its reference too.
    run(
        config(
            world,
            model_name_or_path=(str(world / "run"), str(world / "run" / "checkpoint-000001")),
            output_dir=world / "one",
            reward_function=FUNCTION,
        )
    )
    _, *two = json.loads((world / "one" / "metrics.json").read_text())["policies"]
    assert [policy["kl"]["value"] for policy in two] == [kls[2], kls[1]]


def test_a_reference_with_another_vocabulary_is_refused(world: Path) -> None:
    with pytest.raises(ModelError, match="different vocabularies"):
        run(config(world, ref_model="tinyworld:policy", reward_function=FUNCTION))
    assert not (world / "out" / "run.json").exists()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, "who judges"),
        ({"reward_function": FUNCTION, "baseline": None}, "compare with"),
        ({"reward_function": FUNCTION, "model_name_or_path": ()}, "which policies"),
        ({"reward_function": "tests.policy_trainer.tiny:nothing"}, "no function"),
        ({"reward_function": "tests.no.such.module:f"}, "no function"),
    ],
    ids=["no judge", "no baseline", "no policy", "no function", "no module"],
)
def test_what_cannot_work_is_said_in_one_line(world: Path, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        run(config(world, **changes))


@pytest.mark.parametrize(
    ("name", "changes", "error", "said"),
    [
        ("bb", {}, ModelError, "no folder .*bb"),
        ("empty", {}, ModelError, "empty"),
        ("answers.jsonl", {}, DataError, "answers.jsonl.*does not exist"),
        ("b", {"ref_model": "./aa"}, ModelError, "no folder ./aa"),
    ],
    ids=["no folder", "no model", "no file", "no reference"],
)
def test_a_policy_that_is_not_there_is_said_before_the_others_are_sampled(
    world: Path, name: str, changes: dict[str, Any], error: type[Exception], said: str
) -> None:
    """And nothing is left: the mended command may have other settings in the same folder."""
    (world / "empty").mkdir()
    names = (str(world / "b"), str(world / name))
    with pytest.raises(error, match=said):
        run(config(world, model_name_or_path=names, reward_function=FUNCTION, **changes))
    assert not (world / "out" / "run.json").exists()
    assert not (world / "out" / "responses").exists()


def test_a_mistyped_folder_that_could_be_a_name_of_the_hub_is_told_to_be_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match="no folder runs/bb here"):
        check_found([Side("runs/bb", "runs/bb")])


def test_a_folder_of_adapters_is_a_model_that_is_there(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "elsewhere"}')
    check_found([Side(str(tmp_path), str(tmp_path))])


def test_a_folder_that_is_no_run_is_refused(world: Path) -> None:
    with pytest.raises(DataError, match="the directory of a training run"):
        run(config(world, runs=(world / "a",), reward_function=FUNCTION))

"""Tiny runs of every kind, made by the commands themselves, with hostile text where people or models write it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from policy_trainer import best_of_n, dpo, ppo, sft
from policy_trainer.config import BestOfNConfig, DPOConfig, SFTConfig
from policy_trainer.evaluation.config import EvaluatePolicyConfig
from policy_trainer.evaluation.evaluate import run as evaluate_policy
from policy_trainer.reward_source import FunctionReward
from reward_server.training.train import run as train_reward_model
from rlaif.cli import main
from rlaif.types import Conversation
from tests.labeler.commands import RULES, label, pair, scripted, write_lines
from tests.labeler.tiny import save_tiny
from tests.policy_trainer import tiny
from tests.reward_server import tiny as rm_tiny
from tests.reward_server.training.test_train import config as rm_config
from tests.reward_server.training.test_train import polite_rows, write

HOSTILE = "</dd></details><script>alert(document.cookie)</script><img src=https://example.com/x>"


def hostile_judge(folder: Path) -> str:
    """Likes what is called good, and writes a rationale that would be a script."""
    return scripted(folder, [{**rule, **({"text": HOSTILE} if "text" in rule else {})} for rule in RULES])


def preferences(folder: Path, *flags: str) -> Path:
    """Eight pairs: one that fails, one broken line, one that people label otherwise, and hostile text."""
    folder.mkdir()
    rows: list[Any] = [pair(i, label="1") for i in range(4)]
    rows += [pair(4, "bad", "good", label="1"), pair(5, "broken", "bad"), "{no row"]
    rows += [{"prompt": HOSTILE, "response_a": f"good {HOSTILE}", "response_b": "bad"}]
    data = write_lines(folder / "pairs.jsonl", rows)
    code = label(hostile_judge(folder), data, folder / "run", "--max_unlabelled", "0.5", *flags)
    assert code == 0
    return folder / "run"


def candidates(folder: Path) -> Path:
    """Six prompts, three responses each."""
    folder.mkdir()
    model = save_tiny(folder / "tiny")
    data = write_lines(folder / "prompts.jsonl", [{"prompt": f"w{i} w2"} for i in range(6)])
    command = [
        "sample",
        "--model_name_or_path",
        str(model),
        "--dataset",
        str(data),
        "--num_return_sequences",
        "3",
    ]
    assert main([*command, "--max_new_tokens", "6", "--output_dir", str(folder / "run")]) == 0
    return folder / "run"


def scores(folder: Path) -> Path:
    """Six responses, one of them judged by a guard."""
    folder.mkdir()
    rows = [{"prompt": "q", "response": f"{'good' if i % 2 else 'bad'} {'x' * i}"} for i in range(5)]
    data = write_lines(folder / "r.jsonl", [*rows, {"prompt": "q", "response": "..."}])
    rules = [{"user": "good", "probs": [0.0] * 8 + [0.4, 0.4]}, {"probs": [0.4, 0.4] + [0.0] * 8}]
    assert label(scripted(folder, rules), data, folder / "run", kind="scores") == 0
    return folder / "run"


def revisions(folder: Path) -> Path:
    """Three responses, one of which the endpoint fails, and whose critique is hostile."""
    folder.mkdir()
    rules = [
        {"user": "lost", "fail": "the endpoint answered 500"},
        {"text": HOSTILE, "prefix": "Critique:$"},
        {"text": "Better.", "prefix": "Revised response:$"},
    ]
    rows = [{"prompt": "q", "response": text} for text in ("First.", "Better.", "lost")]
    data = write_lines(folder / "r.jsonl", rows)
    command = [
        "label",
        "revise",
        "--model_name_or_path",
        scripted(folder, rules),
        "--rubric",
        "revision",
    ]
    flags = ["--dataset", str(data), "--output_dir", str(folder / "run"), "--max_unlabelled", "0.5"]
    assert main([*command, *flags]) == 0
    return folder / "run"


def rankings(folder: Path) -> Path:
    """Two models, whose responses to three prompts are compared."""
    folder.mkdir()
    rows = [
        {
            "prompt": f"q {i}",
            "completions": [
                {"response": f"good {i}", "model": HOSTILE},
                {"response": f"bad {i}", "model": "b"},
            ],
        }
        for i in range(3)
    ]
    data = write_lines(folder / "c.jsonl", rows)
    assert label(scripted(folder), data, folder / "run", "--resamples", "20", kind="rank") == 0
    return folder / "run"


def judged(folder: Path, *flags: str) -> Path:
    """A judge on twelve pairs of two subsets; people disagree on four."""
    folder.mkdir()
    rows = [pair(i, label="2" if i < 4 else "1", subset="ab"[i % 2]) for i in range(12)]
    data = write_lines(folder / "pairs.jsonl", rows)
    command = ["eval", "judge", "--judge", scripted(folder), "--dataset", str(data), "--resamples", "20"]
    assert main([*command, "--output_dir", str(folder / "run"), *flags]) == 0
    return folder / "run"


def reward_model(folder: Path) -> Path:
    """One epoch on forty pairs; beside it `eval`, its evaluation by subset."""
    folder.mkdir()
    backbone = rm_tiny.save_language_model(folder / "backbone")
    rows = [{**row, "subset": "odd" if i % 2 else "even"} for i, row in enumerate(polite_rows(40))]
    data = write(folder / "pairs.jsonl", rows)
    train_reward_model(rm_config(backbone, data, folder / "run", num_train_epochs=1, logging_steps=1))
    command = ["eval", "rm", "--model", str(folder / "run"), "--dataset", str(data), "--resamples", "20"]
    assert main([*command, "--output_dir", str(folder / "eval")]) == 0
    return folder / "run"


def ensemble(folder: Path) -> Path:
    """Two reward models."""
    folder.mkdir()
    backbone = rm_tiny.save_language_model(folder / "backbone")
    data = write(folder / "pairs.jsonl", polite_rows(24))
    train_reward_model(rm_config(backbone, data, folder / "run", num_train_epochs=1, num_ensemble=2))
    return folder / "run"


def public(folder: Path) -> list[Path]:
    """A judge on PandaLM's and on RewardBench's shape, and classes of answers by model."""
    folder.mkdir()
    panda = [
        {
            "instruction": f"q{i}", "input": "", "response1": "a" * (i + 1), "response2": "b" * 4,
            "annotator1": 1 + i % 2, "annotator2": i % 3, "annotator3": 2,
        }
        for i in range(9)
    ]  # fmt: skip
    (folder / "panda.json").write_text(json.dumps(panda))
    bench = [
        {"prompt": f"q{i}", "chosen": "a" * (i + 1), "rejected": "b" * 4, "subset": subset}
        for i in range(4)
        for subset in ("alpacaeval-easy", "mt-bench-hard")
    ]
    write_lines(folder / "bench.jsonl", bench)
    for name in ("panda.json", "bench.jsonl"):
        command = [
            "eval",
            "judge",
            "--baseline",
            "longer",
            "--dataset",
            str(folder / name),
            "--resamples",
            "20",
        ]
        assert main([*command, "--output_dir", str(folder / name.partition(".")[0])]) == 0
    answers = [
        {"prompt": f"q{i}", "response": "sorry" if i % 2 else "sure", "model": "ab"[i // 2]} for i in range(4)
    ]
    rules = [{"user": "sorry", "probs": [0.8, 0.1, 0.1]}, {"probs": [0.1, 0.1, 0.8]}]
    data = write_lines(folder / "answers.jsonl", answers)
    assert label(scripted(folder, rules), data, folder / "classes", "--rubric", "refusal", kind="scores") == 0
    return [folder / "panda", folder / "bench", folder / "classes"]


def share_or_nothing(prompts: Sequence[Conversation], responses: Sequence[str]) -> list[float | None]:
    """The share of words that are `w0`; missing for some responses, which their text decides."""
    shares = tiny.share_of_w0(prompts, responses)
    return [None if sum(map(ord, r)) % 5 == 0 else s for r, s in zip(responses, shares, strict=True)]


def trained(method: str, folder: Path, **changes: Any) -> Path:
    """A run of `ppo`, `dpo` or `best_of_n` of a few steps, in whose prompts hostile text stands."""
    folder.mkdir()
    prompts = tiny.save_prompts(folder / "prompts.jsonl", 6)
    with prompts.open("a") as file:
        file.write(json.dumps({"prompt": HOSTILE}) + "\n")
    config: Any = {
        "ppo": lambda: tiny.ppo_config(folder, **changes),
        "dpo": lambda: tiny.round_config(DPOConfig, folder, **{"max_steps": 2, **changes}),
        "best_of_n": lambda: tiny.round_config(BestOfNConfig, folder, **{"max_steps": 2, **changes}),
    }[method]()
    source = FunctionReward(share_or_nothing)
    {"ppo": ppo.train, "dpo": dpo.train, "best_of_n": best_of_n.train}[method](config, source)
    source.close()
    return folder / "run"


def fine_tuned(folder: Path) -> Path:
    """Two steps of supervised fine-tuning."""
    folder.mkdir()
    policy = tiny.save_policy(folder / "policy")
    data = write_lines(folder / "data.jsonl", [{"prompt": "w1 w2", "completion": f"w{i}"} for i in range(8)])
    sft.run(
        SFTConfig(
            model_name_or_path=str(policy), dataset=data, output_dir=folder / "run", num_train_epochs=1,
            per_device_train_batch_size=4,
        )
    )  # fmt: skip
    return folder / "run"


def policies(folder: Path) -> Path:
    """Two policies beside a baseline, by a function."""
    folder.mkdir()
    for seed, name in enumerate("abc"):
        tiny.save_policy(folder / name, seed=seed)
    evaluate_policy(
        EvaluatePolicyConfig(
            dataset=tiny.save_prompts(folder / "prompts.jsonl", 8),
            output_dir=folder / "run",
            model_name_or_path=(str(folder / "b"), str(folder / "c")),
            baseline=str(folder / "a"),
            reward_function="tests.policy_trainer.tiny:share_of_w0",
            ref_model=str(folder / "a"),
            max_new_tokens=8,
            resamples=20,
        )
    )
    return folder / "run"

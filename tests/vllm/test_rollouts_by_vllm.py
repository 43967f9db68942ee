"""Rollouts by real vLLM, an engine of this process and a server, beside the trainer's own forward and HFRollout."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from policy_trainer.batching import collate, pad_right
from policy_trainer.config import PPOConfig
from policy_trainer.logprobs import token_logprobs
from policy_trainer.models import load_policy
from policy_trainer.ppo import train
from policy_trainer.reward_source import FunctionReward
from policy_trainer.rollout import RolloutEngine, Sampled
from policy_trainer.vllm_rollout import open_vllm

from .conftest import needs_vllm, serving

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(600), needs_vllm]

EOS = tuple(range(2, 40))
"""So many that responses of a model with random weights end; the model's own EOS are others."""
OWN_EOS = range(100, 200)
PROMPTS = [[1, *range(50 + i, 90 + i), 60 + i % 3] for i in range(6)]
TEMPERATURE = 0.7


@pytest.fixture(scope="module")
def policy_dir(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A policy whose files name another EOS and ask for greedy sampling with penalties."""
    folder = tmp_path_factory.mktemp("policy") / "model"
    shutil.copytree(tiny_llama, folder)
    wishes = {
        "eos_token_id": list(OWN_EOS),
        "do_sample": True,
        "temperature": 0.1,
        "top_k": 1,
        "top_p": 0.1,
    }
    (folder / "generation_config.json").write_text(json.dumps({**wishes, "repetition_penalty": 1.5}))
    return folder


def config(folder: Path, output_dir: Path, **changes: Any) -> PPOConfig:
    return PPOConfig(
        model_name_or_path=str(folder),
        dataset=output_dir / "none.jsonl",
        output_dir=output_dir,
        reward_server="127.0.0.1:1",
        use_vllm=True,
        max_prompt_length=256,
        **changes,
    )


@pytest.fixture(scope="module", params=["colocate", "server"])
def engine(
    request: pytest.FixtureRequest, policy_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RolloutEngine]:
    out = tmp_path_factory.mktemp("run")
    policy = load_policy(str(policy_dir)).model
    if request.param == "colocate":
        # On a CPU nothing is given back, but the engine is put to sleep and woken all the same.
        opened = open_vllm(config(policy_dir, out, vllm_enable_sleep_mode=True), policy, EOS)
        yield opened
        opened.close()
        assert not list(out.iterdir()), "the weights' folder is still there"
        return
    options = ("--logprobs-mode", "processed_logprobs")
    with serving(policy_dir, out / "vllm.log", *options, VLLM_SERVER_DEV_MODE="1") as url:
        changes: dict[str, Any] = {"vllm_mode": "server", "vllm_server_base_url": url}
        opened = open_vllm(config(policy_dir, out, **changes), policy, EOS)
        yield opened
        opened.close()


def changed_policy(folder: Path, seed: int) -> Any:
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def difference(model: Any, sampled: Sequence[Sampled]) -> float:
    """The largest between the engine's log-probabilities and the trainer's, in nats."""
    batch = collate([PROMPTS[s.prompt_index] for s in sampled], [s.response_ids for s in sampled])
    with torch.no_grad():
        ours = token_logprobs(
            model, batch.input_ids, batch.attention_mask, batch.response_len, TEMPERATURE
        ).logprobs
    engine = pad_right([torch.tensor(s.logprobs) for s in sampled], batch.response_len)
    return float((ours - engine)[batch.response_mask].abs().max())


def sample(engine: RolloutEngine, seed: int = 0, copies: int = 2) -> list[Sampled]:
    return engine.generate(
        PROMPTS, num_return_sequences=copies, max_new_tokens=24, temperature=TEMPERATURE, seed=seed
    )


def test_log_probabilities_are_the_trainers_before_and_after_new_weights(
    engine: RolloutEngine, policy_dir: Path
) -> None:
    """The same prompts each time: what the engine has cached of them belongs to the weights of before."""
    for version in (0, 1, 2):
        policy = changed_policy(policy_dir, seed=version)
        engine.sync(policy, version)
        sampled = sample(engine)
        assert difference(policy, sampled) < 1e-4
        assert difference(changed_policy(policy_dir, seed=version + 1), sampled) > 0.5
        assert {s.policy_version for s in sampled} == {version}
        assert [s.prompt_index for s in sampled] == [i for i in range(len(PROMPTS)) for _ in range(2)]


def test_equal_seeds_give_equal_responses_and_others_do_not(engine: RolloutEngine, policy_dir: Path) -> None:
    policy = changed_policy(policy_dir, seed=0)
    responses = []
    for version, model, seed in ((10, policy, 3), (11, policy, 4), (12, changed_policy(policy_dir, 1), 3)):
        engine.sync(model, version)
        responses.append([s.response_ids for s in sample(engine, seed=seed)])
    engine.sync(policy, 13)
    assert [s.response_ids for s in sample(engine, seed=3)] == responses[0]
    assert responses[0] != responses[1] and responses[0] != responses[2]
    engine.sync(policy, 13)
    same_prompt = engine.generate(
        [PROMPTS[0]] * 4, num_return_sequences=2, max_new_tokens=24, temperature=TEMPERATURE, seed=0
    )
    assert len({tuple(s.response_ids) for s in same_prompt}) == 8


def test_a_response_ends_at_the_trainers_eos_and_at_no_other(engine: RolloutEngine, policy_dir: Path) -> None:
    engine.sync(changed_policy(policy_dir, seed=0), 20)
    sampled = sample(engine, copies=16)
    for s in sampled:
        assert s.finished == (s.response_ids[-1] in EOS)
        assert not set(s.response_ids[:-1]) & set(EOS)
        assert len(s.response_ids) == len(s.logprobs) <= 24
        assert s.finished or len(s.response_ids) == 24
    assert {s.finished for s in sampled} == {True, False}
    assert any(t in OWN_EOS for s in sampled for t in s.response_ids[:-1])


def test_samples_follow_the_full_distribution(engine: RolloutEngine, policy_dir: Path) -> None:
    """First tokens of 4000 samples against the model's probabilities: chi-squared over tokens expected 5 times."""
    model = changed_policy(policy_dir, seed=0)
    engine.sync(model, 30)
    drawn = engine.generate(
        [PROMPTS[0]], num_return_sequences=4000, max_new_tokens=1, temperature=1.5, seed=0
    )
    with torch.no_grad():
        expected = (model(torch.tensor([PROMPTS[0]])).logits[0, -1] / 1.5).softmax(-1) * 4000
    counts = torch.bincount(torch.tensor([s.response_ids[0] for s in drawn]), minlength=len(expected))
    frequent = expected >= 5
    chi = ((counts - expected)[frequent].square() / expected[frequent]).sum()
    degrees = int(frequent.sum())
    assert degrees > 30
    assert chi < degrees + 4 * (2 * degrees) ** 0.5


@pytest.mark.parametrize("max_staleness", [0, 1])
def test_ppo_learns_from_vllm_and_gives_it_the_new_weights(
    policy_dir: Path, tmp_path: Path, max_staleness: int
) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"Say {i}."}) + "\n" for i in range(8)))
    settings = config(
        policy_dir, tmp_path / "run", max_staleness=max_staleness, learning_rate=1e-2, max_steps=4
    )
    settings = dataclasses.replace(settings, dataset=prompts, max_new_tokens=12, rollout_batch_size=4)
    train(settings, FunctionReward(lambda prompts, responses: [r.count("e") / 9 for r in responses]))
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert abs(rows[-1]["objective/kl"]) > 1.0, "the policy has not moved: nothing was given to vLLM"
    if max_staleness:
        assert [row["sample/staleness_mean"] for row in rows] == [0, 1, 1, 1]
    else:
        assert all(row["sampling/sampling_logp_difference/max"] < 1e-3 for row in rows)
        for row in rows:
            least, most = (row[f"sampling/importance_sampling_ratio/{of}"] for of in ("min", "max"))
            assert 0.999 < least <= 1.0 <= most < 1.001 and least < most
    assert not list((tmp_path / "run").glob(".vllm*"))

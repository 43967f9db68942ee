"""Evaluation while training: what the policy earns on prompts it does not learn from, beside the reference's answers.

Nothing here touches training: the samples have a seed of their own, so the weights are those of a run without it. What
it finds goes into `metrics.jsonl` as `eval/...`, and everything decided from it is a function of those lines, so
that a resumed run decides as the uninterrupted one does.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import TYPE_CHECKING, Any, NamedTuple

from policy_trainer.branches import sequence_logprobs
from policy_trainer.checkpoint import BEST_FILE, checkpoint_path
from policy_trainer.evaluation.assess import length_controlled, outcomes
from policy_trainer.reward_source import Reward
from policy_trainer.rollout import HFRollout, Sampled, decode_response
from rlaif.agreement import estimate_mean, finite
from rlaif.runs import Run
from rlaif.storage import write_atomic
from rlaif.types import Conversation, Pair, content_id, with_response

if TYPE_CHECKING:
    from policy_trainer.config import OnlineConfig
    from policy_trainer.online import OnlineTrainer, Prompts

BASELINE_FILE = "eval-reference.json"
"""The reference's responses to the held-out prompts and their rewards, in the run directory."""
WIN_RATE, REWARD = "eval/win_rate", "eval/reward"

Metrics = dict[str, float | None]


class Answer(NamedTuple):
    """A response to a held-out prompt; `reward` is normalised, None where it is missing."""

    response: str
    reward: float | None


class HeldOut:
    """The held-out prompts and what the reference answered to them.

    Args:
        trainer: its reference is sampled once for a run.
        prompts: held out.
        seed: of the samples, always the same: what differs is the policy.
    """

    def __init__(self, trainer: OnlineTrainer, prompts: Prompts, *, seed: int) -> None:
        self._trainer = trainer
        self._prompts = prompts
        self._seed = seed
        self._baseline = self._reference_answers()

    def is_due(self) -> bool:
        """Whether the step just completed is one to evaluate."""
        step, config = self._trainer.step, self._trainer.config
        return step % config.eval_steps == 0 or step == config.max_steps

    def evaluate(self) -> Metrics:
        """What the current policy does with the held-out prompts.

        Raises:
            RewardServerError: the server cannot be reached or used.
        """
        trainer, config = self._trainer, self._trainer.config
        sampled = trainer.answers(self._prompts.ids, seed=self._seed)
        answers = self._rewarded(sampled)
        pairs = [(self._prompts.ids[s.prompt_index], s.response_ids) for s in sampled]
        how = (config.temperature, config.micro_batch_tokens, trainer.world)
        reference = sequence_logprobs(trainer.reference, pairs, *how)
        rewards = [a.reward for a in answers if a.reward is not None]
        compared = [
            (p, len(ours.response) - len(theirs.response))
            for p, ours, theirs in zip(self._wins(answers), answers, self._baseline, strict=True)
            if p is not None
        ]
        wins = outcomes([p for p, _ in compared])
        return {
            **_with_interval(REWARD, rewards),
            **_with_interval(WIN_RATE, wins.tolist()),
            "eval/win_rate_length_controlled": finite(length_controlled(wins, [d for _, d in compared])),
            "eval/kl": fmean(sum(s.logprobs) - r for s, r in zip(sampled, reference, strict=True)),
            "eval/length": fmean(len(s.response_ids) for s in sampled),
            "eval/missing": float(len(answers) - len(compared)),
        }

    def _wins(self, answers: Sequence[Answer]) -> list[float | None]:
        """P(policy preferred) to the reference; None where it is missing. Equal responses are ties."""
        if self._trainer.config.eval_by == "score":
            return [
                None
                if ours.reward is None or theirs.reward is None
                else 0.5 + 0.5 * ((ours.reward > theirs.reward) - (ours.reward < theirs.reward))
                for ours, theirs in zip(answers, self._baseline, strict=True)
            ]
        pairs = [
            Pair(prompt, ours.response, theirs.response)
            for prompt, ours, theirs in zip(self._prompts.conversations, answers, self._baseline, strict=True)
        ]
        asked = [pair for pair in pairs if pair.a != pair.b]
        found = iter(self._trainer.source.submit_pairs(asked).result())
        return [0.5 if pair.a == pair.b else next(found).p_a for pair in pairs]

    def _reference_answers(self) -> list[Answer]:
        trainer = self._trainer
        path = trainer.config.output_dir / BASELINE_FILE
        key = content_id(
            trainer.reference_id,
            trainer.source.info().version,
            trainer.config.temperature,
            trainer.config.max_new_tokens,
            self._prompts.ids,
        )
        if path.is_file():
            kept = json.loads(path.read_text(encoding="utf-8"))
            if kept["key"] == key:
                return [Answer(*answer) for answer in kept["answers"]]
        engine = HFRollout(
            trainer.reference,
            trainer.eos_ids,
            batch_size=trainer.config.generation_batch_size,
            world=trainer.world,
        )
        sampled = engine.generate(
            self._prompts.ids,
            max_new_tokens=trainer.config.max_new_tokens,
            temperature=trainer.config.temperature,
            seed=self._seed,
        )
        answers = self._rewarded(sampled)
        if trainer.world.is_main:
            write_atomic(path, json.dumps({"key": key, "answers": answers}) + "\n")
        return answers

    def _rewarded(self, sampled: Sequence[Sampled]) -> list[Answer]:
        trainer = self._trainer
        texts = [
            decode_response(trainer.tokenizer, self._prompts.ids[s.prompt_index], s, trainer.eos_ids)
            for s in sampled
        ]
        conversations: list[Conversation] = [
            with_response(prompt, text)
            for prompt, text in zip(self._prompts.conversations, texts, strict=True)
        ]
        rewards: list[Reward] = trainer.source.score(conversations)
        return [Answer(text, reward.value) for text, reward in zip(texts, rewards, strict=True)]


def _with_interval(name: str, values: Sequence[float]) -> Metrics:
    found = estimate_mean(values)
    return {name: found["value"], f"{name}_low": found["low"], f"{name}_high": found["high"]}


# ---- what follows from the metrics ----


def best_step(rows: Sequence[Mapping[str, Any]]) -> int | None:
    """The step with the highest held-out win rate, the first one of equals; None without evaluations."""
    known = [row for row in rows if row.get(WIN_RATE) is not None]
    return max(known, key=lambda row: (row[WIN_RATE], -row["step"]))["step"] if known else None


def mark_best(run: Run, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write `best.json`, which names the checkpoint with the highest held-out win rate, unless it is gone.

    Raises:
        StorageError: it cannot be written.
    """
    step = best_step(rows)
    if step is None or not checkpoint_path(run.directory, step).is_dir():
        return
    row = next(row for row in rows if row["step"] == step)
    found = {name: value for name, value in row.items() if name.startswith("eval/")}
    record = {"step": step, "checkpoint": checkpoint_path(run.directory, step).name, **found}
    write_atomic(run.directory / BEST_FILE, json.dumps(record, indent=2) + "\n")


def reason_to_stop(config: OnlineConfig, rows: Sequence[Mapping[str, Any]]) -> str | None:
    """Why the run should end now, or None.

    Args:
        config: its `early_stop_kl` and `early_stopping_patience`.
        rows: of `metrics.jsonl`, up to the step just completed.
    """
    if not rows:
        return None
    last = rows[-1]
    kl = last.get("objective/kl")
    if config.early_stop_kl is not None and kl is not None and kl > config.early_stop_kl:
        return (
            f"KL to the reference is {kl:.3g} nats per response, above early_stop_kl {config.early_stop_kl:g}"
        )
    if config.early_stopping_patience is None or last.get(WIN_RATE) is None:
        return None
    best = best_step(rows)
    since = [row for row in rows if row.get(WIN_RATE) is not None and best is not None and row["step"] > best]
    if len(since) < config.early_stopping_patience:
        return None
    row = next(row for row in rows if row["step"] == best)
    return (
        f"the held-out win rate has not risen for {len(since)} evaluations: {last[WIN_RATE]:.3g} now, "
        f"{row[WIN_RATE]:.3g} at step {best}"
    )

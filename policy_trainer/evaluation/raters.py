"""Who says which response is better: a server that compares, a server that scores, or a Python function.

What a server answered is journalled and never asked again; what failed is asked again by the next run.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

from policy_trainer.answers import Answer, ask_all, read_journal, same_asker
from policy_trainer.client import RewardClient
from policy_trainer.evaluation.config import EvaluatePolicyConfig
from policy_trainer.evaluation.responses import Response
from policy_trainer.reward_source import Comparison, FunctionReward, Reward, RewardSource
from rlaif.errors import ConfigError
from rlaif.storage import Journal
from rlaif.types import Conversation, Pair, content_id, with_response

Responses = Sequence[Response | None]
NOT_RECORDED = "not_recorded: the file has no response to this prompt"


@dataclass(frozen=True, slots=True)
class Rating:
    """What one rater says of one policy; every list is in the order of the prompts.

    Attributes:
        wins: P(policy preferred) to the baseline; None where nobody knows.
        reasons: why, for each None.
        scores: of the policy's own responses, raw; None where there is none. Empty for a rater that only compares.
        orders: both orders' P(policy preferred) (policy shown first, shown second), where there are orders.
    """

    wins: list[float | None]
    reasons: list[str] = field(default_factory=list)
    scores: list[float | None] = field(default_factory=list)
    orders: list[tuple[float, float]] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Rater:
    """A rater and its ratings of every policy, the baseline included, by name.

    Attributes:
        name: what answers.
        version: of it; empty for a function.
        compares: whether it compares pairs instead of scoring responses.
    """

    name: str
    version: str
    compares: bool
    ratings: Mapping[str, Rating]


def rate_all(
    config: EvaluatePolicyConfig,
    prompts: Sequence[Conversation],
    answers: Mapping[str, Responses],
    baseline: str,
    folder: Path,
) -> list[Rater]:
    """The ratings of everyone who was asked for, in the order of the flags.

    Args:
        config: says who.
        prompts: N of them.
        answers: N responses of each policy by its name, the baseline among them.
        baseline: its name.
        folder: where answers of servers are kept.

    Raises:
        RewardServerError: a server cannot be reached or used.
        StorageError: another model gave the answers that are kept.
        ConfigError: there is no such function.
    """
    raters = []
    if config.judge_server is not None:
        raters.append(_compared(config, prompts, answers, baseline, folder / "comparisons.jsonl"))
    if config.reward_server is not None:
        wanted = _conversations(prompts, answers)
        with Server(config, config.reward_server, folder / "scores.jsonl") as server:
            rewards = {k: Reward(*v) for k, v in server.kept.items()}
            server.ask(wanted, rewards, what="scoring responses")
            scored = _scored(prompts, answers, baseline, rewards)
            raters.append(Rater(server.name, server.version, compares=False, ratings=scored))
    if config.reward_function is not None:
        source = load_function(config.reward_function)
        wanted = _conversations(prompts, answers)
        try:
            rewards = dict(zip(wanted, source.score(list(wanted.values())), strict=True))
        finally:
            source.close()
        scored = _scored(prompts, answers, baseline, rewards)
        raters.append(Rater(config.reward_function, "", compares=False, ratings=scored))
    return raters


def load_function(name: str) -> RewardSource:
    """The function that `MODULE:FUNCTION` names, as a reward source.

    Raises:
        ConfigError: there is none.
    """
    module, _, attribute = name.partition(":")
    if "" not in sys.path:
        sys.path.insert(0, "")  # a command, unlike `python -m`, does not look in the current folder
    try:
        function: Any = getattr(import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as err:
        raise ConfigError(
            f"there is no function {name!r} ({err}): write MODULE:FUNCTION, of a module in this folder or "
            "that is installed"
        ) from err
    return FunctionReward(function, name=name)


class Server:
    """A reward server behind a journal: it is connected to only if something is left to ask."""

    def __init__(self, config: EvaluatePolicyConfig, address: str, path: Path) -> None:
        self._config = config
        self._address = address
        self._stack = ExitStack()
        self._journal = self._stack.enter_context(Journal(path))
        self._header, self.kept = read_journal(self._journal)

    @property
    def name(self) -> str:
        """What is served, as the server was told; the address if nothing had to be asked."""
        return self._address if self._header is None else str(self._header["model"])

    @property
    def version(self) -> str:
        """The version of what is served."""
        return "" if self._header is None else str(self._header["version"])

    def ask(self, questions: Mapping[str, Any], answers: dict[str, Answer], *, what: str) -> None:
        """Ask what has no answer yet: pairs to compare, or conversations to score."""
        todo = {key: question for key, question in questions.items() if key not in answers}
        if not todo:
            return
        config = self._config
        client = self._stack.enter_context(
            RewardClient(
                self._address,
                timeout_s=config.timeout_s,
                give_up_after_s=config.give_up_after_s,
                max_in_flight=config.max_in_flight,
                truncation="left",
            )
        )
        info = client.wait_ready(config.give_up_after_s)
        same_asker(self._journal, read_journal(self._journal), info)
        self._header = {"model": info.name, "version": info.version}
        submit: Any = client.submit_pairs if isinstance(next(iter(todo.values())), Pair) else client.submit
        ask_all(
            todo,
            submit,
            self._journal,
            answers,
            batch_size=config.batch_size,
            max_in_flight=config.max_in_flight,
            what=what,
        )

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()


# ---- from answers to ratings ----


def _conversations(
    prompts: Sequence[Conversation], answers: Mapping[str, Responses]
) -> dict[str, Conversation]:
    """Every distinct response with its prompt, by id."""
    found = (
        with_response(prompt, response.text)
        for responses in answers.values()
        for prompt, response in zip(prompts, responses, strict=True)
        if response is not None
    )
    return {content_id(conversation): conversation for conversation in found}


def _scored(
    prompts: Sequence[Conversation],
    answers: Mapping[str, Responses],
    baseline: str,
    rewards: Mapping[str, Reward],
) -> dict[str, Rating]:
    """Ratings by scores: the higher one wins."""

    def rewards_of(name: str) -> list[Reward]:
        return [
            Reward(None, None, NOT_RECORDED)
            if response is None
            else rewards[content_id(with_response(prompt, response.text))]
            for prompt, response in zip(prompts, answers[name], strict=True)
        ]

    theirs = rewards_of(baseline)
    found = {}
    for name in answers:
        ours = rewards_of(name)
        rating = Rating(wins=[], scores=[reward.raw for reward in ours])
        for mine, other in zip(ours, theirs, strict=True):
            if mine.raw is None or other.raw is None:
                rating.wins.append(None)
                rating.reasons.append(_code(mine.reason or other.reason))
            else:
                rating.wins.append(0.5 + 0.5 * ((mine.raw > other.raw) - (mine.raw < other.raw)))
        found[name] = rating
    return found


def _compared(
    config: EvaluatePolicyConfig,
    prompts: Sequence[Conversation],
    answers: Mapping[str, Responses],
    baseline: str,
    path: Path,
) -> Rater:
    """Ratings by a server's comparisons. Equal responses are ties that nobody is asked about."""
    assert config.judge_server is not None

    def pairs(name: str) -> list[Pair | None]:
        return [
            None if ours is None or theirs is None else Pair(prompt, ours.text, theirs.text)
            for prompt, ours, theirs in zip(prompts, answers[name], answers[baseline], strict=True)
        ]

    others = [name for name in answers if name != baseline]
    questions = {
        pair.id: pair for name in others for pair in pairs(name) if pair is not None and pair.a != pair.b
    }
    with Server(config, config.judge_server, path) as server:
        comparisons = {key: Comparison(*values) for key, values in server.kept.items()}
        server.ask(questions, comparisons, what="comparing responses")
        found = {}
        for name in others:
            rating = Rating(wins=[])
            for pair in pairs(name):
                if pair is None:
                    comparison = Comparison(None, reason=NOT_RECORDED)
                elif pair.a == pair.b:
                    comparison = Comparison(0.5)
                else:
                    comparison = comparisons[pair.id]
                _add(rating, comparison, config.on_inconsistent)
            found[name] = rating
        return Rater(server.name, server.version, compares=True, ratings=found)


def _add(rating: Rating, comparison: Comparison, on_inconsistent: str) -> None:
    first, second = comparison.p_a_first, comparison.p_a_second
    if comparison.p_a is None:
        rating.wins.append(None)
        rating.reasons.append(_code(comparison.reason))
        return
    p = comparison.p_a
    if first is not None and second is not None:
        rating.orders.append((first, second))
        if on_inconsistent == "tie" and (first > 0.5) != (second > 0.5):
            p = 0.5
    rating.wins.append(p)


def _code(reason: str | None) -> str:
    """What the report counts: a reason without the words that differ from item to item."""
    return (reason or "unknown").partition(":")[0]

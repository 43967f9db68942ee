"""A language model that follows a script: `scripted:FILE.yaml`, or a Python function. An ordinary back end.

It answers exactly what it is told to, so that tests and dry runs of a pipeline are exact.
"""

from __future__ import annotations

import math
import re
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from labeler.llm import Abilities, Generation, LabelReading, RequestFailed
from rlaif.errors import ConfigError
from rlaif.types import Conversation, LabelDistribution, content_id


@dataclass(frozen=True, slots=True)
class Asked:
    """A request as the script sees it; `labels` is None when text is wanted."""

    user: str
    prefix: str
    labels: tuple[str, ...] | None = None
    max_tokens: int = 1
    temperature: float = 0.0
    seed: int = 0
    stop: tuple[str, ...] = ()


Reply = Callable[[Asked], "str | Generation | LabelDistribution | Sequence[float]"]
"""Answers a request: text, or the probability of each label; may raise `RequestFailed`."""


class ScriptedModel:
    """An LLM whose answers are a function of the request.

    Args:
        reply: the function; probabilities are in full-vocabulary terms and need not sum to 1.
        name: recorded with the labels.
        before: awaited before each answer, e.g. to pass control to other requests.
    """

    def __init__(
        self,
        reply: Reply,
        *,
        name: str = "scripted:function",
        before: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        self._reply = reply
        self._name = name
        self._before = before
        self.asked: list[Asked] = []

    @property
    def name(self) -> str:
        """The script's name."""
        return self._name

    @property
    def version(self) -> str:
        """The script's name: a script file's name carries a hash of its content."""
        return self._name

    @property
    def special_tokens(self) -> tuple[str, ...]:
        """None: a script has no tokenizer."""
        return ()

    async def generate(
        self,
        messages: Conversation,
        prefix: str = "",
        *,
        max_tokens: int,
        temperature: float = 0.0,
        seed: int = 0,
        stop: Sequence[str] = (),
    ) -> Generation:
        """See `labeler.llm.LLM.generate`; tokens are counted as words."""
        asked = Asked(messages[-1].content, prefix, None, max_tokens, temperature, seed, tuple(stop))
        answer = await self._answer(asked)
        if isinstance(answer, Generation):
            return answer
        if not isinstance(answer, str):
            raise ConfigError(f"{self._name} has no text for {asked.user[:60]!r}")
        words = len(answer.split())
        return Generation(answer, "stop", len(asked.user.split()), words)

    async def probe(self) -> Abilities:
        """Everything, exactly."""
        return Abilities("exact", note="a script")

    async def label_logprobs(
        self,
        messages: Conversation,
        prefix: str,
        labels: Sequence[str],
        *,
        after: Generation | None = None,
    ) -> LabelReading:
        """See `labeler.llm.LLM.label_logprobs`."""
        asked = Asked(messages[-1].content, prefix, tuple(labels))
        answer = await self._answer(asked)
        if isinstance(answer, (str, Generation)):
            raise ConfigError(f"{self._name} has no probabilities for {asked.user[:60]!r}")
        if not isinstance(answer, LabelDistribution):
            logprobs = tuple(math.log(p) if p > 0 else -1e3 for p in answer)
            answer = LabelDistribution(logprobs, mass=min(1.0, math.fsum(answer)))
        return LabelReading(answer, len(asked.user.split()), 1)

    async def close(self) -> None:
        """Nothing to free."""

    async def _answer(self, asked: Asked) -> str | Generation | LabelDistribution | Sequence[float]:
        self.asked.append(asked)
        if self._before is not None:
            await self._before()
        return self._reply(asked)


class _Rule(BaseModel):
    """One rule of a script; it applies when both patterns are found in the request."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    user: str = ""
    prefix: str = ""
    text: str | None = None
    finish_reason: str = "stop"
    probs: tuple[float, ...] | None = None
    fail: str | None = None


class _Script(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    rules: tuple[_Rule, ...]


def load_script(path: str) -> ScriptedModel:
    """A model from a YAML or JSON file of `rules`: regular expressions `user` and `prefix`, and an answer.

    An answer is `text` (and `finish_reason`), `probs` (one per label), or `fail` (a reason). The first rule
    that applies and has the wanted kind of answer is taken.

    Raises:
        ConfigError: the file cannot be read or is no script.
    """
    try:
        content: Any = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        script = _Script.model_validate(content)
    except (OSError, yaml.YAMLError, ValidationError) as err:
        raise ConfigError(f"script {path} cannot be used: {' '.join(str(err).split())[:300]}") from err
    name = f"scripted:{Path(path).name}#{content_id(content)}"

    def reply(asked: Asked) -> str | Generation | Sequence[float]:
        for rule in script.rules:
            applies = re.search(rule.user, asked.user) and re.search(rule.prefix, asked.prefix)
            if applies and rule.fail is not None:
                raise RequestFailed(rule.fail)
            if applies and asked.labels is not None and rule.probs is not None:
                if len(rule.probs) != len(asked.labels):
                    raise ConfigError(
                        f"script {path}: {len(rule.probs)} probs for {len(asked.labels)} labels"
                    )
                return rule.probs
            if applies and asked.labels is None and rule.text is not None:
                return Generation(
                    rule.text, rule.finish_reason, len(asked.user.split()), len(rule.text.split())
                )
        raise RequestFailed("no rule of the script applies")

    return ScriptedModel(reply, name=name)

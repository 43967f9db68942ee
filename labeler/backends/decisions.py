"""Decision models behind `/v1/decisions`: `decisions:NAME@BASE_URL`. They choose among options and write no text.

vLLM offers the endpoint for some architectures (as `/v1/systemone` in 0.32), SGLang for chat models, and others for
models made for it (https://docs.vllm.ai/en/v0.32.0/serving/online_serving/structured_decisions/). The rubric's user
message is the *state*, the text that forces the label is the *question*, and the labels are its *options*. The
endpoint puts its own prompt around them, so these labels are not those that the same model gives by
`openai:NAME@BASE_URL`, where the rubric alone decides what is asked.
"""

from __future__ import annotations

import asyncio
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

from labeler.backends.abilities import PROBE, check_model
from labeler.backends.completions import plain_text
from labeler.backends.endpoint import Endpoints, HTTPWire, Refused
from labeler.backends.labels import FLOOR
from labeler.llm import Abilities, Generation, LabelReading, LLMOptions, RequestFailed
from rlaif.errors import ConfigError, EndpointError, ModelError
from rlaif.models import ModelRef
from rlaif.types import Conversation, LabelDistribution

_PATHS = ("/decisions", "/systemone")

_QUESTION = "label"
"""Id of the one question that a request asks."""


class DecisionModel:
    """A decision model behind one or several endpoints. The key is read from OPENAI_API_KEY.

    Args:
        ref: model name and base URLs.
        options: limits, time-out and retries.

    Raises:
        ConfigError: no URL is given.
    """

    def __init__(self, ref: ModelRef, options: LLMOptions) -> None:
        base_url = ref.base_url or os.environ.get("OPENAI_BASE_URL")
        if not base_url:
            raise ConfigError(f"{ref} needs an endpoint: {ref}@http://HOST:PORT/v1")
        key = os.environ.get("OPENAI_API_KEY") or "none"
        wires = [HTTPWire(url, key, options.max_in_flight + 8) for url in base_url.split(",")]
        self._ref = ref
        self._endpoints = Endpoints(wires, ref.name, options)
        self._path: str | None = None
        self._probing = asyncio.Lock()

    @property
    def name(self) -> str:
        """The model's name as the user wrote it."""
        return str(self._ref)

    @property
    def version(self) -> str:
        """The name: an endpoint does not show its weights."""
        return str(self._ref)

    @property
    def special_tokens(self) -> tuple[str, ...]:
        """Unknown here; the markers of the common model families are broken up in any case."""
        return ()

    async def close(self) -> None:
        """Close the connections."""
        await self._endpoints.close()

    async def probe(self) -> Abilities:
        """See `labeler.llm.LLM.probe`."""
        path = await self._offered()
        return Abilities(
            "exact", continues=False, note=f"decision model by {path}: labels without a rationale"
        )

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
        """Never possible.

        Raises:
            ModelError: always.
        """
        raise ModelError(f"{self.name} decides and writes no text: ask it without a rationale (--no_cot)")

    async def label_logprobs(
        self,
        messages: Conversation,
        prefix: str,
        labels: Sequence[str],
        *,
        after: Generation | None = None,
    ) -> LabelReading:
        """See `labeler.llm.LLM.label_logprobs`. The mass of the labels is 1 where the endpoint does not report it."""
        path = await self._offered()
        reply = await self._endpoints.ask(path, self._body(messages, prefix, labels), urgent=True)
        return read_decision(reply, labels)

    def _body(self, messages: Conversation, prefix: str, labels: Sequence[str]) -> dict[str, Any]:
        question = {"type": "choice", "instructions": prefix.strip(), "criteria": dict.fromkeys(labels)}
        return {
            "model": self._ref.name,
            "state": plain_text(messages, ""),
            "questions": {_QUESTION: question},
        }

    async def _offered(self) -> str:
        """The path under which the endpoint decides; asked once.

        Raises:
            EndpointError: it offers none.
        """
        async with self._probing:
            if self._path is None:
                await check_model(
                    lambda path, body: self._endpoints.ask(path, body), self._ref.name, self._endpoints.where
                )
                self._path = await self._find_path()
        return self._path

    async def _find_path(self) -> str:
        said = ""
        for path in _PATHS:
            try:
                await self._endpoints.ask(path, self._body(PROBE, "Which?", ("1", "2")))
                return path
            except Refused as err:
                said = str(err)
        raise EndpointError(
            f"{self._endpoints.where} does not decide with {self._ref.name} ({said}); "
            f"use openai:{self._ref.name}@BASE_URL, which reads labels by its own prompt"
        )


def read_decision(reply: Any, labels: Sequence[str]) -> LabelReading:
    """The label distribution of a decision.

    Args:
        reply: the endpoint's JSON value: `answers`, and in vLLM `diagnostics` with the mass of the labels.
        labels: the options that were offered.

    Raises:
        RequestFailed: the reply has no probability for a label.
    """
    try:
        told: Mapping[str, float] = reply["answers"][_QUESTION]["probabilities"]
        probs = [float(told[label]) for label in labels]
        mass = float((reply.get("diagnostics") or {}).get(_QUESTION, {}).get("label_mass", 1.0))
        usage = reply.get("usage") or {}
        tokens = int(usage.get("input_tokens") or 0), int(usage.get("output_tokens") or 0)
    except (AttributeError, KeyError, TypeError, ValueError) as err:
        raise RequestFailed(f"the endpoint's answer has no decision that can be read: {err!r}") from err
    logprobs = tuple(max(math.log(p * mass), FLOOR) if p * mass > 0 else FLOOR for p in probs)
    return LabelReading(LabelDistribution(logprobs, min(1.0, mass)), *tokens)

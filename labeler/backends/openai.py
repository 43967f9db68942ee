"""Any OpenAI-compatible endpoint: `openai:NAME@BASE_URL`. Chat completions; the retry policy is ours.

Where the endpoint is vLLM (0.22 or later), label probabilities are exact: label token ids are resolved by its
`/tokenize` and read with `logprob_token_ids`. Elsewhere labels are looked up among the top 20 tokens; one that
is missing gets a bound and the reading is `censored`. An endpoint without log-probabilities is refused.
"""

from __future__ import annotations

import asyncio
import math
import os
import random
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import openai
from openai import AsyncOpenAI

from labeler.backends.labels import logsumexp, read_top_tokens, resolve_label
from labeler.llm import Abilities, Generation, LabelReading, LLMOptions, RequestFailed
from rlaif.errors import ConfigError, EndpointError, ModelError
from rlaif.models import ModelRef
from rlaif.types import Conversation, LabelDistribution, Message, to_dicts, user_prompt

T = TypeVar("T")

_CONTINUE = {"continue_final_message": True, "add_generation_prompt": False}
"""Fields by which vLLM and its kin continue a trailing assistant message instead of opening a new one."""

_TOP_LOGPROBS = 20
"""As many as OpenAI reports."""

_MAX_WAIT_S = 60.0


@dataclass(frozen=True, slots=True)
class _Abilities:
    """What the probe found.

    Attributes:
        continues: the endpoint accepts the fields of `_CONTINUE`.
        token_ids: it is a vLLM that tokenises and reads given token ids.
    """

    continues: bool
    token_ids: bool


class OpenAIModel:
    """A model behind an OpenAI-compatible endpoint. The key is read from OPENAI_API_KEY.

    Args:
        ref: model name and base URL; without a URL, OPENAI_BASE_URL or OpenAI itself.
        options: time-out and retries.

    Raises:
        ConfigError: OpenAI itself is meant and there is no key.
    """

    def __init__(self, ref: ModelRef, options: LLMOptions) -> None:
        base_url = ref.base_url or os.environ.get("OPENAI_BASE_URL")
        key = os.environ.get("OPENAI_API_KEY")
        if not base_url and not key:
            raise ConfigError(
                f"{ref} needs OPENAI_API_KEY, or an endpoint of your own: {ref}@http://HOST:PORT/v1"
            )
        self._ref = ref
        self._options = options
        self._client = AsyncOpenAI(
            base_url=base_url, api_key=key or "none", max_retries=0, timeout=options.timeout_s
        )
        self._where = str(self._client.base_url).rstrip("/")
        self._chance = random.Random()
        self._known = False
        self._abilities: _Abilities | None = None
        self._probing = asyncio.Lock()
        self._label_ids: dict[tuple[str, ...], tuple[tuple[int, ...], ...]] = {}

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
        """See `labeler.llm.LLM.generate`."""
        extra: dict[str, Any] = {}
        if prefix:
            extra = _CONTINUE if (await self._probe(messages)).continues else {}
        else:
            await self._check_model()
        done = await self._chat(
            messages,
            prefix,
            max_tokens=max_tokens,
            temperature=temperature,
            seed=seed,
            stop=list(stop) or openai.omit,
            extra_body=extra or None,
        )
        choice = done.choices[0]
        text = choice.message.content or ""
        for end in stop:  # some servers include the stop string
            text = text.split(end)[0]
        reason = "length" if choice.finish_reason == "length" else "stop"
        return Generation(text, reason, *_usage(done))

    async def probe(self) -> Abilities:
        """See `labeler.llm.LLM.probe`."""
        found = await self._probe(())
        return Abilities("exact" if found.token_ids else "top_k", found.continues)

    async def label_logprobs(
        self,
        messages: Conversation,
        prefix: str,
        labels: Sequence[str],
        *,
        after: Generation | None = None,
    ) -> LabelReading:
        """See `labeler.llm.LLM.label_logprobs`."""
        abilities = await self._probe(messages)
        ids = await self._resolve(prefix, tuple(labels)) if abilities.token_ids else None
        extra: dict[str, Any] = dict(_CONTINUE) if abilities.continues and prefix else {}
        if ids is not None:
            extra |= {"logprob_token_ids": sorted({i for group in ids for i in group})}
            extra |= {"return_tokens_as_token_ids": True}
        done = await self._read_one(messages, prefix, extra)
        top = _top_tokens(done)
        if top is None:
            raise self._no_logprobs()
        if ids is None:
            return LabelReading(read_top_tokens(top, labels), *_usage(done))
        by_token = dict(top)
        logprobs = []
        for label, group in zip(labels, ids, strict=True):
            read = [by_token[f"token_id:{i}"] for i in group if f"token_id:{i}" in by_token]
            if len(read) < len(group):
                raise RequestFailed(f"the endpoint left out the log-probability of label {label!r}")
            logprobs.append(logsumexp(read))
        mass = min(1.0, math.fsum(map(math.exp, logprobs)))
        return LabelReading(LabelDistribution(tuple(logprobs), mass), *_usage(done))

    async def close(self) -> None:
        """Close the connections."""
        await self._client.close()

    # ---- what the endpoint can do ----

    async def _check_model(self) -> None:
        """Ask for the list of models once, so that a wrong name costs one request."""
        async with self._probing:
            await self._check_model_locked()

    async def _check_model_locked(self) -> None:
        if self._known:
            return
        try:
            listed = await self._attempt(lambda: self._client.get("/models", cast_to=object))
        except RequestFailed:  # not every endpoint lists its models
            listed = None
        entries = listed.get("data") if isinstance(listed, dict) else None
        names = [str(e.get("id")) for e in entries or () if isinstance(e, dict)]
        if names and self._ref.name not in names:
            raise ModelError(
                f"the endpoint {self._where} has no model {self._ref.name!r}; it has: {', '.join(names[:10])}"
            )
        self._known = True

    async def _probe(self, messages: Conversation) -> _Abilities:
        """Find out once, with at most three small requests, before anything is paid for.

        Raises:
            EndpointError: the endpoint gives no log-probabilities.
        """
        async with self._probing:
            if self._abilities is None:
                await self._check_model_locked()
                question = user_prompt("Say 1 or 2.")
                continues = True
                try:
                    done = await self._read_one(question, "Answer:", _CONTINUE)
                except RequestFailed:  # an endpoint that refuses fields it does not know
                    continues = False
                    done = await self._read_one(question, "Answer:", {})
                if not _top_tokens(done):
                    raise self._no_logprobs()
                self._abilities = _Abilities(continues, continues and await self._reads_token_ids(question))
            return self._abilities

    async def _reads_token_ids(self, question: Conversation) -> bool:
        """Whether `/tokenize` answers and a reading of one given token id comes back as asked."""
        try:
            ids = await self._tokenize("1")
            extra = {**_CONTINUE, "logprob_token_ids": ids[-1:], "return_tokens_as_token_ids": True}
            done = await self._read_one(question, "Answer:", extra)
        except RequestFailed:
            return False
        return f"token_id:{ids[-1]}" in dict(_top_tokens(done) or ())

    def _no_logprobs(self) -> EndpointError:
        return EndpointError(
            f"{self._where} gives no log-probabilities for {self._ref.name}, which soft labels are read from; "
            "use a model or server that supports `logprobs`, such as vLLM"
        )

    async def _resolve(self, prefix: str, labels: tuple[str, ...]) -> tuple[tuple[int, ...], ...]:
        """Ids of every label after the end of `prefix`, by the endpoint's own tokenizer."""
        tail = prefix[-32:]
        key = (tail, *labels)
        if key not in self._label_ids:
            texts = [tail, *(tail + gap + label for label in labels for gap in ("", " "))]
            ids = await asyncio.gather(*(self._tokenize(text) for text in texts))
            encoded = dict(zip(texts, ids, strict=True))
            self._label_ids[key] = tuple(
                resolve_label(encoded.__getitem__, tail, label, self.name) for label in labels
            )
        return self._label_ids[key]

    async def _tokenize(self, text: str) -> list[int]:
        url = self._where.removesuffix("/v1") + "/tokenize"
        body = {"model": self._ref.name, "prompt": text, "add_special_tokens": False}
        answer = await self._attempt(lambda: self._client.post(url, cast_to=object, body=body))
        tokens = answer.get("tokens") if isinstance(answer, dict) else None
        if not isinstance(tokens, list) or not tokens:
            raise RequestFailed("the endpoint does not tokenise")
        return [int(t) for t in tokens]

    # ---- requests ----

    async def _read_one(self, messages: Conversation, prefix: str, extra: dict[str, Any]) -> Any:
        # Temperature 1: servers that report processed log-probabilities leave them as they are.
        return await self._chat(
            messages,
            prefix,
            max_tokens=1,
            temperature=1.0,
            logprobs=True,
            top_logprobs=_TOP_LOGPROBS,
            extra_body=extra or None,
        )

    async def _chat(self, messages: Conversation, prefix: str, **options: Any) -> Any:
        turns = (*messages, Message("assistant", prefix)) if prefix else messages
        body: Any = to_dicts(turns)
        done = await self._attempt(
            lambda: self._client.chat.completions.create(model=self._ref.name, messages=body, **options)
        )
        if not done.choices:
            raise RequestFailed("the endpoint answered without a choice")
        return done

    async def _attempt(self, request: Callable[[], Awaitable[T]]) -> T:
        """Send a request, again after a transient failure, `max_retries` times at most."""
        for attempt in range(self._options.max_retries + 1):
            last = attempt == self._options.max_retries
            try:
                return await request()
            except openai.APITimeoutError as err:
                if last:
                    raise RequestFailed(f"no answer within {self._options.timeout_s:g} s") from err
                wait = None
            except openai.APIConnectionError as err:
                if last:
                    raise EndpointError(
                        f"no connection to {self._where} after {attempt + 1} attempts: is the server running? "
                        "Answers so far are kept; run the same command again to go on"
                    ) from err
                wait = None
            except openai.APIStatusError as err:
                wait = _retry_after(err)
                self._refuse(err, last)
            except (openai.APIError, ValueError) as err:
                raise RequestFailed(f"the endpoint's answer cannot be read: {_line(err)}") from err
            if wait is None:
                wait = self._options.backoff_s * 2**attempt * self._chance.uniform(0.5, 1.0)
            await asyncio.sleep(min(wait, _MAX_WAIT_S))
        raise AssertionError("unreachable")

    def _refuse(self, err: openai.APIStatusError, last: bool) -> None:
        """Raise unless another attempt may help."""
        status = err.status_code
        if status in (401, 403):
            raise EndpointError(f"{self._where} refuses the key ({status}): set OPENAI_API_KEY") from err
        if status == 404 and self._known and "model" in str(err).lower():
            raise ModelError(f"{self._where} does not know {self._ref.name!r}: {_line(err)}") from err
        if last or (status not in (408, 409, 429) and status < 500):
            raise RequestFailed(f"the endpoint answered {status}: {_line(err)}") from err


def _retry_after(err: openai.APIStatusError) -> float | None:
    try:
        return float(err.response.headers.get("retry-after", ""))
    except ValueError:
        return None


def _line(err: Exception) -> str:
    return " ".join(str(err).split())[:200]


def _usage(done: Any) -> tuple[int, int, int]:
    """Prompt, completion and cached tokens; 0 where the endpoint does not say."""
    usage = done.usage
    if usage is None:
        return 0, 0, 0
    details = usage.prompt_tokens_details
    return usage.prompt_tokens, usage.completion_tokens, (details and details.cached_tokens) or 0


def _top_tokens(done: Any) -> list[tuple[str, float]] | None:
    """(token, log-probability) of the likeliest first tokens; None if the endpoint gave none."""
    logprobs = done.choices[0].logprobs
    if logprobs is None or not logprobs.content or not logprobs.content[0].top_logprobs:
        return None
    return [(t.token, float(t.logprob)) for t in logprobs.content[0].top_logprobs]

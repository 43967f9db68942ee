"""Any OpenAI-compatible endpoint: `openai:NAME@BASE_URL`, or several: `openai:NAME@URL,URL`.

Where the endpoint is vLLM (0.22 or later), label probabilities are exact: label token ids are resolved by its
`/tokenize` and read with `logprob_token_ids`, and a label after a rationale is read with the very token ids that the
rationale was generated with, so that the prefix cache holds all of it. Elsewhere labels are looked up among the
likeliest tokens; one that is missing gets a bound and the reading is `censored`. A model without a chat template is
asked by text completions.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from labeler.backends.abilities import check_model, describe, find_features, tokenize
from labeler.backends.completions import (
    PATHS,
    Choice,
    Features,
    Json,
    ask_ids,
    ask_top,
    check_ended,
    ids_body,
    listed_tokens,
    read_choice,
    read_ids,
    request_body,
    text_ids,
    written_text,
)
from labeler.backends.endpoint import Endpoint, Endpoints, HTTPWire, Wire
from labeler.backends.labels import (
    Tokens,
    find_spellings,
    label_distribution,
    label_reads,
    read_top_tokens,
)
from labeler.backends.top_tokens import read_top_tokens_in_parts, tokens_to_continue
from labeler.llm import Abilities, Generation, LabelReading, LLMOptions, RequestFailed
from rlaif.errors import ConfigError, EndpointError, ModelError, RlaifError
from rlaif.models import ModelRef
from rlaif.types import Conversation, user_prompt

_SEAM = "x"
"""Text that is tokenised together with what follows it, because some tokenizers treat the start of a text apart."""

_MEMORY = 4096
"""Most texts whose tokens are remembered."""


class OpenAIModel:
    """A model behind OpenAI-compatible endpoints. The key is read from OPENAI_API_KEY.

    Args:
        ref: model name and base URLs; without a URL, OPENAI_BASE_URL or OpenAI itself.
        options: limits, time-out and retries.
        wires: how the servers are reached, instead of by HTTP at the URLs.

    Raises:
        ConfigError: OpenAI itself is meant and there is no key.
    """

    def __init__(self, ref: ModelRef, options: LLMOptions, wires: Sequence[Wire] = ()) -> None:
        base_url = ref.base_url or os.environ.get("OPENAI_BASE_URL")
        key = os.environ.get("OPENAI_API_KEY")
        if not wires and not base_url and not key:
            raise ConfigError(
                f"{ref} needs OPENAI_API_KEY, or an endpoint of your own: {ref}@http://HOST:PORT/v1"
            )
        if not wires:
            urls = base_url.split(",") if base_url else [None]
            wires = [HTTPWire(url, key or "none", options.max_in_flight + 8) for url in urls]
        self._ref = ref
        self._options = options
        self._endpoints = Endpoints(wires, ref.name, options)
        self._found: Features | None = None
        self._probing = asyncio.Lock()
        self._tokens_per_char = 0.3
        self._tokenized: dict[str, asyncio.Task[tuple[int, ...]]] = {}
        self._spellings: dict[tuple[str, ...], tuple[tuple[Tokens, ...], ...]] = {}
        self._whole: dict[str, bool | None] = {}
        self._looking = asyncio.Lock()

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
        return describe(await self._features())

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
        features = await self._features()
        body = request_body(
            features,
            self._ref.name,
            messages,
            prefix,
            max_tokens=max_tokens,
            temperature=temperature,
            seed=seed,
            stop=stop,
        )
        if features.token_ids:
            body["return_token_ids"] = True
            if stop:  # the tokens' bytes show where the stop string begins
                body.update(ask_top(replace(features, top_logprobs=0), features.route))
        written = partial(written_text, continued=bool(prefix) and features.continues)
        choice = await self._complete(PATHS[features.route], body, messages, max_tokens, check=written)
        whole = text = written(choice)
        for end in stop:  # some servers include the stop string
            text = text.split(end, 1)[0]
        ids = text_ids(replace(choice, text=whole), text)
        return Generation(text, choice.finish_reason, *choice.usage, ids)

    async def label_logprobs(
        self,
        messages: Conversation,
        prefix: str,
        labels: Sequence[str],
        *,
        after: Generation | None = None,
    ) -> LabelReading:
        """See `labeler.llm.LLM.label_logprobs`."""
        features = await self._features()
        if features.token_ids:
            return await self._read_exactly(features, messages, prefix, tuple(labels), after)
        if features.top_logprobs:
            return await self._read_listed(features, messages, prefix, tuple(labels))
        raise EndpointError(
            f"{self._endpoints.where} gives no log-probabilities for {self._ref.name}, which soft labels are read "
            "from; use a model or server that supports `logprobs`, such as vLLM"
        )

    # ---- labels by token ids ----

    async def _read_exactly(
        self,
        features: Features,
        messages: Conversation,
        prefix: str,
        labels: tuple[str, ...],
        after: Generation | None,
    ) -> LabelReading:
        spellings = await self._spell(prefix, labels)
        reads = label_reads(spellings)
        ids = await self._context_ids(prefix, after)
        if ids:
            first = await self._read_after(features, ids, reads[()], messages)
        else:
            body = self._one_token(features, messages, prefix)
            body.update(ask_ids(reads[()], features.route))
            first = await self._complete(PATHS[features.route], body, messages, 1, urgent=True)
            ids = first.prompt_ids
        further = [tokens for tokens in reads if tokens]
        choices = await asyncio.gather(
            *(self._read_after(features, (*ids, *tokens), reads[tokens], messages) for tokens in further)
        )
        readings: dict[Tokens, dict[int, float]] = {(): read_ids(first, reads[()])}
        for tokens, choice in zip(further, choices, strict=True):
            readings[tokens] = read_ids(choice, reads[tokens])
        return LabelReading(label_distribution(spellings, readings), *_sum_usage(first, *choices))

    async def _read_after(
        self, features: Features, ids: Tokens, wanted: Sequence[int], messages: Conversation
    ) -> Choice:
        """Log-probabilities of token ids after a context of token ids."""
        body = ids_body(features, self._ref.name, ids, max_tokens=1, temperature=1.0)
        body.update(ask_ids(wanted, "completions"))
        return await self._complete(PATHS["completions"], body, messages, 1, urgent=True)

    async def _context_ids(self, prefix: str, after: Generation | None) -> tuple[int, ...]:
        """Ids of everything before the label, going on from a generation's; empty if they cannot be had."""
        if after is None or not after.context_ids or not after.text or prefix.count(after.text) != 1:
            return ()
        rest = prefix.partition(after.text)[2]
        if not rest:
            return after.context_ids
        seam, both = await self._tokenize(_SEAM), await self._tokenize(_SEAM + rest)
        return (*after.context_ids, *both[len(seam) :]) if both[: len(seam)] == seam else ()

    async def _spell(self, prefix: str, labels: tuple[str, ...]) -> tuple[tuple[Tokens, ...], ...]:
        """How the endpoint's tokenizer spells each label after the end of `prefix`."""
        tail = _last_words(prefix)
        key = (tail, *labels)
        if key not in self._spellings:
            texts = [tail, *(tail + gap + label for label in labels for gap in ("", " "))]
            ids = await asyncio.gather(*(self._tokenize(text) for text in texts))
            encoded = dict(zip(texts, ids, strict=True))
            found = tuple(find_spellings(encoded.__getitem__, tail, label, self.name) for label in labels)
            if len(self._spellings) >= _MEMORY:
                self._spellings.clear()
            self._spellings[key] = found
        return self._spellings[key]

    async def _tokenize(self, text: str) -> tuple[int, ...]:
        """Token ids; each text is asked once, however many rows wait for it."""
        if not text:
            return ()
        if text not in self._tokenized:
            if len(self._tokenized) >= _MEMORY:
                self._tokenized.clear()
            self._tokenized[text] = asyncio.create_task(tokenize(self._ask, self._ref.name, text))
        task = self._tokenized[text]
        try:
            return await asyncio.shield(task)
        except RlaifError:
            self._tokenized.pop(text, None)
            raise

    # ---- labels among the likeliest tokens ----

    async def _read_listed(
        self, features: Features, messages: Conversation, prefix: str, labels: tuple[str, ...]
    ) -> LabelReading:
        split = await self._split_labels(features, labels)
        if split and not features.continues:
            raise ModelError(
                f"the tokenizer of {self.name} splits the label {split[0]!r} into several tokens, and the endpoint "
                "does not continue a text, so its parts cannot be read: use a rubric with one-token labels, such as "
                "helpfulness-score-5"
            )

        def says_one(choice: Choice) -> None:
            top = listed_tokens(choice)[: features.top_logprobs]
            if not tokens_to_continue(top, split):
                read_top_tokens(top, labels)

        first, cost = await self._list(features, messages, prefix, says_one)
        if not split:
            return LabelReading(read_top_tokens(first, labels), *cost.usage, top=first)
        started = tokens_to_continue(first, split)
        lists = await asyncio.gather(
            *(self._list(features, messages, prefix + t, listed_tokens) for t in started.values())
        )
        after = {text: top for text, (top, _) in zip(started, lists, strict=True)}
        distribution = read_top_tokens_in_parts(first, after, labels)
        return LabelReading(distribution, *_sum_usage(cost, *(choice for _, choice in lists)))

    async def _list(
        self,
        features: Features,
        messages: Conversation,
        prefix: str,
        check: Callable[[Choice], object],
    ) -> tuple[tuple[tuple[str, float], ...], Choice]:
        """The likeliest tokens after `prefix`, and the reply that they are from."""
        body = self._one_token(features, messages, prefix)
        body.update(ask_top(features, features.route))
        choice = await self._complete(PATHS[features.route], body, messages, 1, check=check, urgent=True)
        # vLLM lists the sampled token beyond those asked for; it may be far less likely than what is left out.
        return choice.top[: features.top_logprobs], choice

    async def _split_labels(self, features: Features, labels: tuple[str, ...]) -> tuple[str, ...]:
        """Labels of several characters that are not known to be one token, found out once by having them said."""
        async with self._looking:
            for label in labels:
                if len(label) > 1 and label not in self._whole:
                    self._whole[label] = await self._is_whole(features, label)
        return tuple(label for label in labels if len(label) > 1 and not self._whole[label])

    async def _is_whole(self, features: Features, label: str) -> bool:
        question = user_prompt(f"Write {label} and nothing else.")
        body = request_body(features, self._ref.name, question, "", max_tokens=8, temperature=0.0)
        body.update(ask_top(features, features.route))
        choice = await self._complete(
            PATHS[features.route], body, question, 8, check=check_ended, urgent=True
        )
        return any(piece.decode(errors="replace").strip() == label for piece in choice.pieces)

    # ---- requests ----

    def _one_token(self, features: Features, messages: Conversation, prefix: str) -> Json:
        # Temperature 1: servers that report processed log-probabilities leave them as they are.
        return request_body(features, self._ref.name, messages, prefix, max_tokens=1, temperature=1.0)

    async def _complete(
        self,
        path: str,
        body: Json,
        messages: Conversation,
        max_tokens: int,
        *,
        check: Callable[[Choice], object] | None = None,
        urgent: bool = False,
    ) -> Choice:
        """The reply to a request, which `check` refuses by a `RequestFailed` if it is no answer."""
        characters = sum(len(m.content) for m in messages)
        reply = await self._endpoints.ask(
            path,
            body,
            urgent=urgent,
            tokens=self._tokens_per_char * characters + max_tokens,
            affinity="\n".join(m.content for m in messages) if len(self._endpoints.all) > 1 else "",
        )
        choice = read_choice(reply)
        if choice.prompt_tokens and characters:
            self._tokens_per_char += 0.05 * (choice.prompt_tokens / characters - self._tokens_per_char)
        if check is not None:
            check(choice)
        return choice

    async def _ask(self, path: str, body: Mapping[str, Any] | None) -> Any:
        return await self._endpoints.ask(path, body, urgent=True)

    async def _features(self) -> Features:
        """Probe every server once, before anything is paid for.

        Raises:
            ModelError: a server does not have the model.
            EndpointError: no server answers, or they differ in what they give.
        """
        if self._found is not None:
            return self._found
        async with self._probing:
            if self._found is None:
                endpoints = self._endpoints.all
                found = await asyncio.gather(
                    *(self._probe_one(e) for e in endpoints), return_exceptions=len(endpoints) > 1
                )
                errors = [f for f in found if isinstance(f, BaseException)]
                there = [f for f in found if isinstance(f, Features)]
                for error in errors:
                    if not there or not isinstance(error, EndpointError):
                        raise error
                if len(set(there)) > 1:
                    notes = "; ".join(sorted({describe(f).note for f in there}))
                    raise EndpointError(f"the endpoints of {self.name} differ in what they give: {notes}")
                self._found = there[0]
            return self._found

    async def _probe_one(self, endpoint: Endpoint) -> Features:
        async def ask(path: str, body: Mapping[str, Any] | None) -> Any:
            return await self._endpoints.ask(path, body, urgent=True, only=endpoint)

        where = endpoint.wire.where
        try:
            await check_model(ask, self._ref.name, where)
            return await find_features(ask, self._ref.name, where, self._options)
        except RequestFailed as err:
            raise EndpointError(
                f"{where} does not answer as OpenAI's API does: {err}; the base URL of a server usually ends in /v1"
            ) from err


def _last_words(text: str) -> str:
    """The end of a text, from the start of its last line on: as much as decides how a label after it is tokenised."""
    tail = text[-16:]
    return tail[tail.rfind("\n", 0, -1) + 1 :]


def _sum_usage(*choices: Choice) -> tuple[int, int, int]:
    return (
        sum(c.prompt_tokens for c in choices),
        sum(c.completion_tokens for c in choices),
        sum(c.cached_tokens for c in choices),
    )

"""Endpoints that are not asked, for dry runs: every request is built as for sending, and its tokens are counted.

vLLM's `/tokenize` counts them exactly and free of charge. Elsewhere they are counted by a tokenizer in this process,
or estimated.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

from labeler.backends.abilities import PROBE
from labeler.backends.completions import PATHS, Choice, Features, Json, ask_top, read_choice
from labeler.backends.endpoint import HTTPWire
from labeler.backends.local import load_tokenizer
from labeler.backends.openai import OpenAIModel
from labeler.backends.scripted import load_script
from labeler.backends.unloaded import Unloaded
from labeler.dry_run import PrefixCache
from labeler.llm import LLM, Generation, LabelReading, LLMOptions, RequestFailed
from rlaif.errors import EndpointError
from rlaif.models import HOSTED, ModelRef
from rlaif.types import Conversation, LabelDistribution

_CHARACTERS = 4
"""Characters per token of English text, by OpenAI's rule of thumb."""

Encode = Callable[[str], Sequence[object]]


class UnaskedEndpoint(OpenAIModel):
    """An OpenAI-compatible endpoint whose completions are never asked for.

    A generation has no text, and a reading gives all labels the same probability.

    Args:
        ref: the model.
        options: as of the run.
    """

    def __init__(self, ref: ModelRef, options: LLMOptions) -> None:
        urls = ref.base_url or os.environ.get("OPENAI_BASE_URL")
        wire = HTTPWire(
            urls.split(",")[0] if urls else None,
            os.environ.get("OPENAI_API_KEY") or "none",
            options.max_in_flight,
        )
        super().__init__(ref, replace(options, max_retries=0), [wire])
        self._hosted = "api.openai.com" in wire.where
        self._cache = PrefixCache(128, least=1024) if self._hosted else PrefixCache(16)
        self._encode: Encode = _quarters
        self._counted = "exactly, by the endpoint's /tokenize"

    @property
    def counted(self) -> str:
        """How tokens are counted, in words."""
        return self._counted

    async def label_logprobs(
        self,
        messages: Conversation,
        prefix: str,
        labels: Sequence[str],
        *,
        after: Generation | None = None,
    ) -> LabelReading:
        """All labels alike, and the tokens of the requests that read them."""
        features = await self._features()
        if features.token_ids:
            return await super().label_logprobs(messages, prefix, labels)
        body = {**self._one_token(features, messages, prefix), **ask_top(features, features.route)}
        choice = await self._complete(PATHS[features.route], body, messages, 1)
        even = LabelDistribution((-math.log(len(labels)),) * len(labels), 1.0)
        return LabelReading(even, *choice.usage)

    async def _features(self) -> Features:
        """A vLLM if it tokenises; else what an endpoint that can serve as judge has at least."""
        async with self._probing:
            if self._found is None:
                self._found = Features(continue_fields=False)
                if not self._hosted and await self._tokenizes(Features(token_ids=True)):
                    self._found = Features(token_ids=True)
                elif not self._hosted and await self._tokenizes(Features("completions", token_ids=True)):
                    self._found = Features("completions", token_ids=True)
                if not self._found.token_ids:
                    self._encode, self._counted = _encoding(self._ref.name)
            return self._found

    async def _tokenizes(self, features: Features) -> bool:
        try:
            return bool(await self._ids(self._one_token(features, PROBE, "")))
        except (RequestFailed, EndpointError):
            return False

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
        features = await self._features()
        tokens = await self._ids(body) if features.token_ids else self._layout(body)
        wanted = body.get("logprob_token_ids", ())
        even = {f"token_id:{i}": -math.log(len(wanted)) for i in wanted}
        choice = {
            "text": "",
            "finish_reason": "stop",  # an empty text is an answer only where it ended by itself
            "prompt_token_ids": tokens if features.token_ids else [],
            "logprobs": {"tokens": list(even), "top_logprobs": [even]},
        }
        usage = {
            "prompt_tokens": len(tokens),
            "completion_tokens": 1,
            "prompt_tokens_details": {"cached_tokens": self._cache.meet(tokens)},
        }
        return read_choice({"choices": [choice], "usage": usage})

    async def _ids(self, body: Json) -> Sequence[object]:
        """The prompt's token ids, by vLLM's `/tokenize`."""
        prompt = body.get("prompt")
        if isinstance(prompt, list):
            return prompt
        if prompt is not None:
            asked = {"prompt": prompt}
        else:
            continued = body.get("continue_final_message", False)
            asked = {
                "messages": body["messages"],
                "continue_final_message": continued,
                "add_generation_prompt": not continued,
            }
        answer = await self._ask("//tokenize", {"model": body["model"], **asked})
        tokens = answer.get("tokens") if isinstance(answer, dict) else None
        if not isinstance(tokens, list):
            raise RequestFailed("the endpoint does not tokenise")
        return tokens

    def _layout(self, body: Json) -> Sequence[object]:
        """The prompt in the layout of OpenAI's models.

        Each message takes three tokens besides its role and content, and the reply is opened with three (OpenAI
        Cookbook, "How to count tokens with tiktoken").
        """
        tokens: list[object] = []
        for message in body["messages"]:
            tokens += ["<", *self._encode(message["role"]), ">", *self._encode(message["content"]), "."]
        return [*tokens, "<", "assistant", ">"]


def _encoding(model: str) -> tuple[Encode, str]:
    """Text to tokens, and in words how: by tiktoken where it is installed and has its tables, or roughly."""
    roughly = f"ESTIMATED at {_CHARACTERS} characters per token; --tokenizer NAME_OR_PATH counts them"
    try:
        import tiktoken  # type: ignore[import-not-found, unused-ignore]
    except ImportError:
        return _quarters, roughly
    try:
        try:
            encoding = tiktoken.encoding_for_model(model)
        except KeyError:
            encoding = tiktoken.get_encoding("o200k_base")
    except OSError:  # it downloads its tables when they are first used
        return _quarters, f"{roughly}; tiktoken cannot download its tables"
    return partial(encoding.encode, disallowed_special=()), f"with tiktoken's {encoding.name}"


def _quarters(text: str) -> list[str]:
    return [text[i : i + _CHARACTERS] for i in range(0, len(text), _CHARACTERS)]


def open_unasked(
    ref: ModelRef, options: LLMOptions, tokenizer: str | None = None
) -> tuple[LLM, Callable[[], str]]:
    """What tells the tokens of a model's requests without asking it.

    Args:
        ref: the model.
        options: as of the run.
        tokenizer: Hugging Face name or path, for an endpoint.

    Returns:
        The stand-in; and a function that says, afterwards, how it counted.

    Raises:
        ModelError: there is no such model or tokenizer.
        ConfigError: the script of a `scripted:` model cannot be read.
    """
    if ref.backend == "scripted":
        return load_script(ref.name), lambda: "as the script counts"
    if ref.backend not in HOSTED:
        return Unloaded.load(ref), lambda: "exactly, with the model's tokenizer"
    if tokenizer is None:
        endpoint = UnaskedEndpoint(ref, options)
        return endpoint, lambda: endpoint.counted
    named = Unloaded(
        load_tokenizer(ModelRef("hf", tokenizer), tokenizer),
        name=str(ref),
        version=str(ref),
        rows=lambda reads: [()],
        cache=PrefixCache(16),
    )
    return named, lambda: f"exactly, if {tokenizer} is the model's tokenizer"

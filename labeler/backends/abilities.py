"""What an OpenAI-compatible server can give, found out with a few requests of a token each before anything is paid for.

Nothing is concluded from a server's name: each feature is asked for, and the reply must show that it was heeded. Nor
from a reply that is no answer (filtered, broken off): it is asked for again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace
from typing import Any

from labeler.backends.completions import (
    PATHS,
    Choice,
    Features,
    ask_ids,
    ask_top,
    check_ended,
    ids_body,
    read_choice,
    request_body,
)
from labeler.backends.endpoint import Refused
from labeler.llm import Abilities, LLMOptions, NoAnswer, RequestFailed
from rlaif.errors import EndpointError, ModelError
from rlaif.types import user_prompt

Ask = Callable[[str, Mapping[str, Any] | None], Awaitable[Any]]
"""(path, body) -> the reply's JSON value; raises `Refused` for a request that is not accepted."""

PROBE = user_prompt("Say 1 or 2.")
_PREFIX = "Answer:"

_TOP_LOGPROBS = (20, 10, 5, 1, 0)
"""Numbers of likeliest tokens to ask for, in turn: OpenAI's chat gives 20, its text completions 5."""

_THINKING_TOKENS = 1024
"""Room for a short answer of a model that thinks first."""

_TOO_FEW = ("output limit was reached", "higher max_tokens")
"""What OpenAI says to a request that leaves a reasoning model no room to answer."""

_FILTERED = (
    "filtered",
    "content_filter",
    "content policy",
    "content management policy",
    "moderation",
    "flagged",
)
"""Words of a refusal by a filter, which says nothing of the request's fields (Azure; OpenAI; OpenRouter)."""

_DECODING = ("max_tokens", "temperature", "seed", "stop")


async def check_model(ask: Ask, model: str, where: str) -> None:
    """Look for the model in the endpoint's list, so that a wrong name costs nothing.

    Raises:
        ModelError: the endpoint lists other models.
    """
    try:
        listed = await ask("/models", None)
    except RequestFailed:  # not every endpoint lists its models
        return
    entries = listed.get("data") if isinstance(listed, dict) else None
    names = [str(e.get("id")) for e in entries or () if isinstance(e, dict)]
    if names and model not in names:
        raise ModelError(f"the endpoint {where} has no model {model!r}; it has: {', '.join(names[:10])}")


async def find_features(ask: Ask, model: str, where: str, options: LLMOptions) -> Features:
    """What the server takes and gives.

    Args:
        ask: sends a request to it.
        model: the model's name there.
        where: named in errors.
        options: how often a request is sent again whose reply is no answer, and after what wait.

    Raises:
        EndpointError: it refuses even the simplest request, or a reply is no answer each time.
    """
    ask = _until_answered(ask, model, where, options)
    features, tokens = Features(), 1
    while True:
        try:
            choice = await _ask_one(ask, model, features, _PREFIX, max_tokens=tokens)
            if tokens == 1 and choice.finish_reason == "length" and _is_empty(choice):
                features, tokens = replace(features, top_logprobs=0), _THINKING_TOKENS
                continue
            break
        except Refused as err:
            if tokens == 1 and any(words in err.detail.lower() for words in _TOO_FEW):
                # Where one token is no answer, there is no place to read a label at.
                features, tokens = replace(features, top_logprobs=0), _THINKING_TOKENS
                continue
            fewer = _without(features, err)
            if fewer is None:
                hint = "; the base URL of a server usually ends in /v1" if err.status == 404 else ""
                raise EndpointError(f"{where} refuses the simplest request for {model}: {err}{hint}") from err
            features = fewer
    if not choice.top:
        features = replace(features, top_logprobs=0)
    if features.top_logprobs and await _reads_token_ids(ask, model, features):
        return replace(features, token_ids=True)
    if features.route == "chat":
        features = replace(features, continues=await _continues(ask, model, features, choice, tokens))
    return features


def describe(features: Features) -> Abilities:
    """The abilities of an endpoint, with a line for people."""
    route = "chat completions" if features.route == "chat" else "text completions (no chat template)"
    if features.token_ids:
        return Abilities("exact", True, f"vLLM, {route}: exact log-probabilities by token ids")
    if not features.top_logprobs:
        return Abilities("none", features.continues, f"{route}: no log-probabilities")
    note = f"{route}: log-probabilities of the {features.top_logprobs} likeliest tokens"
    return Abilities("top_k", features.continues, note)


def _until_answered(ask: Ask, model: str, where: str, options: LLMOptions) -> Ask:
    """Ask, and again where the reply is no answer: nothing can be seen in it of what the server gives."""

    async def answered(path: str, body: Mapping[str, Any] | None) -> Any:
        for attempt in range(options.max_retries + 1):
            if attempt:
                await asyncio.sleep(options.backoff_s * 2.0 ** (attempt - 1))
            try:
                reply = await ask(path, body)
            except Refused as err:
                if not any(words in err.detail.lower() for words in _FILTERED):
                    raise
                said = str(err)
                continue
            if path not in PATHS.values():
                return reply
            choice = read_choice(reply)
            try:
                check_ended(choice)
            except NoAnswer as err:
                said = str(err)
                continue
            if choice.finish_reason == "stop" and choice.text is None and _is_empty(choice):
                said = "the endpoint's answer has no text"
                continue
            return reply
        raise EndpointError(
            f"{where} does not answer the simplest request for {model}, so what it can give is not known: {said}, "
            f"{options.max_retries + 1} times; run the same command again, or ask another endpoint"
        )

    return answered


def _is_empty(choice: Choice) -> bool:
    return not (choice.text or choice.thought or choice.top)


async def _ask_one(
    ask: Ask, model: str, features: Features, prefix: str, *, max_tokens: int = 1, **more: Any
) -> Choice:
    """One token after the probe's question, or more, with every field that a run may send."""
    body = request_body(
        features, model, PROBE, prefix, max_tokens=max_tokens, temperature=0.0, seed=0, stop=("\n\n\n",)
    )
    if more:
        body.update(more)
    elif features.top_logprobs:
        body.update(ask_top(features, features.route))
    return read_choice(await ask(PATHS[features.route], body))


def _without(features: Features, err: Refused) -> Features | None:
    """Features less the one that a refusal speaks of; None if there is nothing left to do without."""
    said = f"{err.param} {err.detail}".lower()
    if features.route == "chat" and (err.status in (404, 405, 501) or "chat template" in said):
        return replace(features, route="completions", continue_fields=False)
    extras = features.continue_fields and ("continue_final" in said or "add_generation" in said)
    if not extras and "logprobs" in said and features.top_logprobs:
        return _fewer(features)
    if not extras:
        for name in _DECODING:
            if name in said and name not in features.refused:
                return replace(features, refused=features.refused | {name})
    if features.continue_fields:  # unknown fields are refused in many words
        return replace(features, continue_fields=False)
    return _fewer(features) if features.top_logprobs else None


def _fewer(features: Features) -> Features:
    at = _TOP_LOGPROBS.index(features.top_logprobs)
    return replace(features, top_logprobs=_TOP_LOGPROBS[at + 1])


async def _reads_token_ids(ask: Ask, model: str, features: Features) -> bool:
    """Whether it is a vLLM (0.22 or later) that tokenises, reads given token ids, and takes ids for a prompt."""
    if features.route == "chat" and not features.continue_fields:
        return False
    try:
        last = (await tokenize(ask, model, "1"))[-1]
        told = f"token_id:{last}"
        choice = await _ask_one(ask, model, features, _PREFIX, **ask_ids([last], features.route))
        if told not in dict(choice.top) or not choice.prompt_ids:
            return False
        body = ids_body(features, model, choice.prompt_ids, max_tokens=1, temperature=1.0)
        choice = read_choice(await ask(PATHS["completions"], {**body, **ask_ids([last], "completions")}))
        return told in dict(choice.top)
    except RequestFailed:
        return False


async def tokenize(ask: Ask, model: str, text: str) -> tuple[int, ...]:
    """Token ids by vLLM's `/tokenize`, without added special tokens.

    Raises:
        RequestFailed: the endpoint does not tokenise.
    """
    answer = await ask("//tokenize", {"model": model, "prompt": text, "add_special_tokens": False})
    tokens = answer.get("tokens") if isinstance(answer, dict) else None
    if not isinstance(tokens, list) or not tokens:
        raise RequestFailed("the endpoint does not tokenise")
    return tuple(int(t) for t in tokens)


async def _continues(ask: Ask, model: str, features: Features, once: Choice, tokens: int) -> bool:
    """Whether the last assistant message is continued in place, as the count of prompt tokens shows.

    A message that was closed, and a turn opened after it, cost tokens beyond the text: then the first `Answer:`
    adds more of them than a second one does.
    """
    bare = await _ask_one(ask, model, features, "", max_tokens=tokens)
    twice = await _ask_one(ask, model, features, f"{_PREFIX} {_PREFIX}", max_tokens=tokens)
    if not (bare.prompt_tokens and once.prompt_tokens and twice.prompt_tokens):
        return features.continue_fields
    return once.prompt_tokens - bare.prompt_tokens <= twice.prompt_tokens - once.prompt_tokens

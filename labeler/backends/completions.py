"""What is sent to the two completion routes of an OpenAI-compatible server, and what is read from their replies.

Pure functions of JSON values, so a recorded reply is read like a fresh one. OpenAI's API reference and vLLM's
`ChatCompletionRequest` / `CompletionRequest` name the fields.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from labeler.backends.labels import read_top_tokens
from labeler.llm import LabelReading, NoAnswer, RequestFailed
from rlaif.types import Conversation, to_dicts

Json = dict[str, Any]
Route = Literal["chat", "completions"]

PATHS: dict[Route, str] = {"chat": "/chat/completions", "completions": "/completions"}

CONTINUE = {"continue_final_message": True, "add_generation_prompt": False}
"""Fields by which vLLM and its kin continue a trailing assistant message instead of opening a new one."""

_ENDS = frozenset({"stop", "eos", "eos_token", "stop_sequence", "end_turn", "complete"})
"""`finish_reason` of a text that is whole: OpenAI's and vLLM's word, then those of Together, TGI, Anthropic, Cohere."""

_CUTS = frozenset({"length", "max_tokens", "model_length"})
"""`finish_reason` of a text that was cut at a limit of tokens: OpenAI's and vLLM's word, Anthropic's, Mistral's.

Any other word (`content_filter`, `abort`, `error`, `tool_calls`, `insufficient_system_resource`) ends no answer.
"""

_NEVER = -9999.0
"""OpenAI's mark for a token that is "very unlikely": no reading."""


@dataclass(frozen=True, slots=True)
class Features:
    """What a server takes and gives, as the probe found it.

    Attributes:
        route: chat completions, or text completions where the model has no chat template.
        top_logprobs: how many likeliest tokens it reports; 0 for none.
        continue_fields: it takes the fields of `CONTINUE`.
        continues: an assistant turn that was begun is continued in place.
        token_ids: it is a vLLM: reads the log-probabilities of given token ids, tells the ids of prompt and text,
            and takes ids as a prompt.
        refused: fields that it does not take, of `temperature`, `seed`, `stop`, `max_tokens`.
    """

    route: Route = "chat"
    top_logprobs: int = 20
    continue_fields: bool = True
    continues: bool = True
    token_ids: bool = False
    refused: frozenset[str] = frozenset()


def request_body(
    features: Features,
    model: str,
    messages: Conversation,
    prefix: str,
    *,
    max_tokens: int,
    temperature: float,
    seed: int | None = None,
    stop: Sequence[str] = (),
) -> Json:
    """The body of a request that continues `prefix`, an assistant turn that was begun."""
    body: Json = {"model": model}
    if features.route == "completions":
        body["prompt"] = plain_text(messages, prefix)
    else:
        body["messages"] = to_dicts(messages)
        if prefix:
            body["messages"].append({"role": "assistant", "content": prefix})
            if features.continue_fields:
                body.update(CONTINUE)
    body.update(_decoding(features, max_tokens, temperature, seed, stop))
    return body


def ids_body(
    features: Features, model: str, ids: Sequence[int], *, max_tokens: int, temperature: float
) -> Json:
    """The body of a text completion after token ids."""
    return {"model": model, "prompt": list(ids), **_decoding(features, max_tokens, temperature, None, ())}


def _decoding(
    features: Features, max_tokens: int, temperature: float, seed: int | None, stop: Sequence[str]
) -> Json:
    fields: Json = {"max_tokens": max_tokens, "temperature": temperature}
    if seed is not None:
        fields["seed"] = seed
    if stop:
        fields["stop"] = list(stop)[:4]  # OpenAI takes four; the text is cut at all of them in any case
    for name in features.refused & fields.keys():
        value = fields.pop(name)
        if name == "max_tokens":  # the newer name, which reasoning models insist on
            fields["max_completion_tokens"] = value
    return fields


def plain_text(messages: Conversation, prefix: str) -> str:
    """The text that a model without a chat template is given: the turns, separated by blank lines."""
    return "\n\n".join(m.content for m in messages) + ("\n\n" + prefix if prefix else "")


def ask_top(features: Features, route: Route) -> Json:
    """Fields that ask for the likeliest next tokens."""
    if route == "completions":
        return {"logprobs": features.top_logprobs}
    return {"logprobs": True, "top_logprobs": features.top_logprobs}


def ask_ids(ids: Sequence[int], route: Route) -> Json:
    """Fields that ask vLLM for the log-probabilities of given token ids, from the full vocabulary.

    Tokens are reported as `token_id:N`, because two ids may read as the same text.
    """
    plain: Json = {"logprobs": 0} if route == "completions" else {"logprobs": True, "top_logprobs": 0}
    return {
        **plain,
        "logprob_token_ids": list(ids),
        "return_tokens_as_token_ids": True,
        "return_token_ids": True,
    }


@dataclass(frozen=True, slots=True)
class Choice:
    """A reply's first choice.

    Attributes:
        text: generated text; None where the reply has none.
        thought: what the server set apart as the model's thinking.
        finish_reason: `stop`, `length`, or the server's word for any other end.
        stop: the stop string that ended the text, where the server says so.
        prompt_tokens: tokens read; 0 where the server does not say.
        completion_tokens: tokens generated.
        cached_tokens: prompt tokens that the server did not compute again.
        prompt_ids: token ids of the prompt; empty if not told.
        ids: token ids generated, the end-of-turn token included; empty if not told.
        pieces: bytes of each generated token; empty if not told.
        top: (token, natural-log probability) reported for the first position, the likeliest first; empty without
            log-probabilities.
    """

    text: str | None
    thought: str
    finish_reason: str
    stop: str | None
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    prompt_ids: tuple[int, ...]
    ids: tuple[int, ...]
    pieces: tuple[bytes, ...]
    top: tuple[tuple[str, float], ...]

    @property
    def usage(self) -> tuple[int, int, int]:
        """Prompt, completion and cached tokens."""
        return self.prompt_tokens, self.completion_tokens, self.cached_tokens


def read_choice(reply: object) -> Choice:
    """Read a chat completion or a text completion object.

    Raises:
        RequestFailed: it is neither, or it has no choice.
    """
    try:
        return _read_choice(reply)
    except (AttributeError, KeyError, IndexError, TypeError, ValueError) as err:
        raise RequestFailed(f"the endpoint's answer has no choice that can be read: {err!r}") from err


def _read_choice(reply: Any) -> Choice:
    choice = reply["choices"][0]
    chat = "message" in choice
    logprobs = choice.get("logprobs") or {}
    if chat:
        content = logprobs.get("content") or ()
        pieces = [_piece(entry) for entry in content]
        first = (
            [(str(t["token"]), float(t["logprob"])) for t in content[0].get("top_logprobs") or ()]
            if content
            else []
        )
    else:
        tokens = logprobs.get("tokens") or ()
        pieces = [str(token).encode() for token in tokens]
        reported = logprobs.get("top_logprobs") or ()
        first = [(str(t), float(p)) for t, p in (reported[0] or {}).items()] if reported else []
    usage = reply.get("usage") or {}
    details = usage.get("prompt_tokens_details") or {}
    stop = choice.get("stop_reason")
    said = choice["message"] if chat else {"content": choice["text"]}
    return Choice(
        text=_text(said.get("content")),
        thought=_text(said.get("reasoning_content") or said.get("reasoning")) or "",
        finish_reason=_finish(choice.get("finish_reason")),
        stop=stop if isinstance(stop, str) else None,
        prompt_tokens=int(usage.get("prompt_tokens") or 0),
        completion_tokens=int(usage.get("completion_tokens") or 0),
        cached_tokens=int(details.get("cached_tokens") or 0),
        prompt_ids=tuple(reply.get("prompt_token_ids") or choice.get("prompt_token_ids") or ()),
        ids=tuple(choice.get("token_ids") or ()),
        pieces=tuple(pieces),
        top=tuple(sorted(((t, p) for t, p in first if p > _NEVER), key=lambda entry: -entry[1])),
    )


def _text(content: object) -> str | None:
    """The text of a message: a string, or parts, of which Mistral's reasoning models have one for thinking."""
    if content is None or isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise TypeError(f"content of type {type(content).__name__}")
    texts = [str(part["text"]) for part in content if part["type"] == "text"]
    return "".join(texts) if texts else None


def _finish(word: str | None) -> str:
    """`stop` or `length` where the server's word means one of them; not every server gives one."""
    told = (word or "stop").lower()
    return "stop" if told in _ENDS else "length" if told in _CUTS else told


def check_ended(choice: Choice) -> None:
    """Refuse a reply that was ended neither by the model nor at a limit of tokens.

    Raises:
        NoAnswer: it was filtered or broken off.
    """
    if choice.finish_reason not in ("stop", "length"):
        raise NoAnswer(f"the endpoint ended the reply with {choice.finish_reason!r}", *choice.usage)


def written_text(choice: Choice, *, continued: bool) -> str:
    """The text that was generated. An empty one is an answer only if the model ended it itself.

    Args:
        choice: a reply to a request for text.
        continued: the text goes on from an assistant turn that was begun. What follows it is its continuation, also
            where vLLM's reasoning parser takes it for thinking (vllm-project/vllm#38749).

    Raises:
        NoAnswer: the reply was filtered or broken off, or has no text.
    """
    check_ended(choice)
    if choice.text:
        return choice.text
    if continued and choice.thought:
        return choice.thought
    if choice.finish_reason == "length":
        raise NoAnswer(
            "the reply was cut before any text, as by long thinking: allow it more tokens", *choice.usage
        )
    if choice.thought:
        raise NoAnswer("the reply is thinking without an answer", *choice.usage)
    if choice.text is None:
        raise NoAnswer("the endpoint's answer has no text", *choice.usage)
    return ""


def listed_tokens(choice: Choice) -> tuple[tuple[str, float], ...]:
    """The likeliest tokens of the first position, as `Choice.top`.

    Raises:
        NoAnswer: the reply was filtered or broken off, or has no log-probabilities.
    """
    check_ended(choice)
    if not choice.top:
        raise NoAnswer("the endpoint left out the log-probabilities of this answer", *choice.usage)
    return choice.top


def _piece(entry: Mapping[str, Any]) -> bytes:
    return bytes(entry["bytes"]) if entry.get("bytes") is not None else str(entry["token"]).encode()


def read_recorded(reply: object, labels: Sequence[str]) -> LabelReading:
    """Label probabilities from a recorded reply: a chat completion or text completion object with log-probabilities.

    The label is read at the first generated position.

    Args:
        reply: the JSON value as the server gave it.
        labels: the closed set, in order.

    Raises:
        RequestFailed: the reply has no log-probabilities, or no label is among its likeliest tokens.
    """
    choice = read_choice(reply)
    top = listed_tokens(choice)
    return LabelReading(read_top_tokens(top, labels), *choice.usage, top=top)


def read_ids(choice: Choice, ids: Sequence[int]) -> dict[int, float]:
    """Log-probability by token id, as `ask_ids` asked for them.

    Raises:
        NoAnswer: the reply was filtered or broken off.
        RequestFailed: the server left one out.
    """
    check_ended(choice)
    told = dict(choice.top)
    try:
        return {i: told[f"token_id:{i}"] for i in ids}
    except KeyError as err:
        raise RequestFailed(f"the endpoint left out the log-probability of {err}") from err


def text_ids(choice: Choice, text: str) -> tuple[int, ...]:
    """Ids of the prompt and of the tokens that spell `text`, the beginning of what was generated.

    Empty if the server does not tell ids, or `text` ends inside a token. The end-of-turn token spells nothing and is
    left out.

    Args:
        choice: a reply with token ids and, if it was cut at a stop string, with the tokens' bytes.
        text: the choice's text, or a beginning of it.
    """
    if not choice.prompt_ids or not choice.ids or text.endswith("\ufffd"):
        return ()
    if choice.stop is None and text == choice.text:
        ended = choice.finish_reason == "stop"  # by the end-of-turn token, which is the last one
        return (*choice.prompt_ids, *(choice.ids[:-1] if ended else choice.ids))
    if len(choice.pieces) != len(choice.ids):
        return ()
    wanted, seen = text.encode(), b""
    for n, piece in enumerate((*choice.pieces, b"")):
        if seen == wanted:
            return (*choice.prompt_ids, *choice.ids[:n])
        seen += piece
    return ()

"""An OpenAI-compatible server with a known judge, a fixed speed and faults on order.

`python benchmarks/scripted_server.py --port 0` prints its address, then serves until it is terminated.

Routes: `/v1/models`, `/v1/chat/completions`, `/v1/completions` (text or token ids), `/tokenize`, and
`/control/configure` (POST, any field of `Behaviour`), `/control/stats`, `/control/reset` (POST). With `--kind vllm`
it has vLLM's extensions (`logprob_token_ids`, `continue_final_message`, `return_token_ids`, ...), with `--kind plain`
it refuses them and reports the 20 likeliest tokens at most.

Speed: a request is in service for `latency_s`, at most `capacity` of them at a time, first come, first served.
"""

from __future__ import annotations

import argparse
import asyncio
import heapq
import json
import math
import re
import socket
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from hashlib import blake2b
from typing import Any

import uvicorn
from literal_judge import Template
from literal_judge import first_wins as literal_first_wins
from scripted_judge import (
    RATIONALE,
    label_probs,
    next_digit,
    next_tokens,
    row_key,
    service_time,
    tags_in,
    unlucky,
)

Json = dict[str, Any]
Send = Callable[[Any], Awaitable[None]]

_TOKEN = re.compile(r" ?\d{1,6}|.", re.DOTALL)
_DIGIT_TOKEN = re.compile(r" ?\d|.", re.DOTALL)
_NUMBER, _SPACE_NUMBER = 1 << 21, 1 << 22
"""Offsets of the ids of numbers, alone and after a space; below them an id is a code point."""


@dataclass
class Behaviour:
    """What may be changed while the server runs.

    Attributes:
        kind: `vllm` or `plain`.
        latency_s: time in service of a request.
        capacity: requests in service at a time; 0 for no limit.
        straggler_share: share of judgements, by their tags, that take `straggler_factor` times as long.
        rpm: requests per minute that are let in; 0 for no limit. Refused ones get 429 and `Retry-After`.
        burst_s: so many seconds' worth of requests may come at once.
        limit_headers: say with every answer what the limit is and what is left of it, as OpenAI does.
        faults: shares of requests, by content, whose first `fault_attempts` attempts fail: `429`, `500`, `hang`,
            `truncate`.
        poison: shares of rows, by content, all of whose attempts fail: `400`, `500`, `hang`, `truncate`.
        hang_s: how long a hanging request is held.
        pair_labels: what stands for "the first" and "the second".
        levels: size of the scale for single responses.
        split_digits: the tokenizer has one token per digit, so that `10` is two.
        template: fields of `literal_judge.Template`; the judge is then the one that obeys all it reads.
    """

    kind: str = "vllm"
    latency_s: float = 0.0
    capacity: int = 0
    straggler_share: float = 0.0
    straggler_factor: float = 100.0
    rpm: float = 0.0
    burst_s: float = 1.0
    limit_headers: bool = True
    faults: dict[str, float] = field(default_factory=dict)
    fault_attempts: int = 1
    poison: dict[str, float] = field(default_factory=dict)
    hang_s: float = 3600.0
    pair_labels: tuple[str, str] = ("1", "2")
    levels: int = 10
    split_digits: bool = False
    template: dict[str, str] = field(default_factory=dict)


@dataclass
class Stats:
    """What was asked of the server. A request is known by its content: the same bytes are the same request."""

    answered: int = 0
    refused: int = 0
    probes: int = 0
    tokenized: int = 0
    in_service: int = 0
    peak_in_service: int = 0
    statuses: Counter[str] = field(default_factory=Counter)
    times_asked: dict[bytes, int] = field(default_factory=dict)
    admitted_at: Counter[int] = field(default_factory=Counter)
    refused_at: Counter[int] = field(default_factory=Counter)
    prompt_tokens: int = 0
    first_at: float = 0.0
    last_at: float = 0.0

    def report(self) -> Json:
        """As JSON values."""
        asked = sum(self.times_asked.values())
        return {
            "requests": asked,
            "distinct": len(self.times_asked),
            "repeated": asked - len(self.times_asked),
            "answered": self.answered,
            "refused": self.refused,
            "probes": self.probes,
            "tokenized": self.tokenized,
            "in_service": self.in_service,
            "peak_in_service": self.peak_in_service,
            "statuses": dict(self.statuses),
            "prompt_tokens": self.prompt_tokens,
            "busy_s": max(0.0, self.last_at - self.first_at),
            "first_at": self.first_at,
            "last_at": self.last_at,
            "now": time.time(),
            "admitted_at": dict(self.admitted_at),
            "refused_at": dict(self.refused_at),
        }


class Refusal(Exception):
    """An answer with a status other than 200."""

    def __init__(self, status: int, message: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.status, self.headers = status, dict(headers or {})


class Server:
    """The ASGI application."""

    def __init__(self, behaviour: Behaviour) -> None:
        self.behaviour = behaviour
        self.stats = Stats()
        self.free_at: list[float] = []
        self.allowance, self.allowance_at = 0.0, 0.0
        self.fill()

    def fill(self) -> None:
        """Start the rate limiter with a full bucket."""
        b = self.behaviour
        self.allowance, self.allowance_at = b.rpm / 60 * b.burst_s, time.monotonic()

    async def __call__(self, scope: Json, receive: Callable[[], Awaitable[Json]], send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            return
        body = b""
        while True:
            event = await receive()
            if event["type"] == "http.disconnect":
                return
            body += event.get("body", b"")
            if not event.get("more_body"):
                break
        status, headers, cut = 200, {}, False
        try:
            answer, headers, cut = await self.route(scope["path"], body)
        except Refusal as err:
            status, headers = err.status, err.headers
            answer = {"error": {"message": str(err), "type": "scripted", "param": None, "code": status}}
        await reply(send, status, json.dumps(answer).encode(), headers, cut=cut)

    async def route(self, path: str, body: bytes) -> tuple[Json, Mapping[str, str], bool]:
        """(answer, headers, whether to cut it short)."""
        if path in ("/v1/chat/completions", "/v1/completions"):
            return await self.complete(path, body)
        if path == "/v1/models":
            owner = "vllm" if self.behaviour.kind == "vllm" else "scripted"
            return {"object": "list", "data": [model_card("judge", owner)]}, {}, False
        if path == "/tokenize" and self.behaviour.kind == "vllm":
            self.stats.tokenized += 1
            return self.tokenize(json.loads(body)), {}, False
        if path in ("/version", "/health") and self.behaviour.kind == "vllm":
            return {"version": "0.32.0"}, {}, False
        if path == "/control/stats":
            return self.stats.report(), {}, False
        if path == "/control/reset":
            self.stats, self.free_at = Stats(), []
            return {}, {}, False
        if path == "/control/configure":
            for name, value in json.loads(body).items():
                if name not in {f.name for f in fields(Behaviour)}:
                    raise Refusal(400, f"no setting {name}")
                setattr(self.behaviour, name, tuple(value) if name == "pair_labels" else value)
            self.fill()
            return asdict(self.behaviour), {}, False
        raise Refusal(404, "no such route")

    async def complete(self, path: str, raw: bytes) -> tuple[Json, Mapping[str, str], bool]:
        """One chat or text completion."""
        b, stats = self.behaviour, self.stats
        body = json.loads(raw)
        question = read_question(path, body, b)
        tags = tags_in(question.text)
        now = time.time()
        headers = self.let_in(now)
        if not tags:
            stats.probes += 1
            return self.answer(path, body, question, tags), headers, False
        key = blake2b(raw, digest_size=8).digest()
        attempt = stats.times_asked[key] = stats.times_asked.get(key, 0) + 1
        stats.first_at = stats.first_at or now
        stats.in_service += 1
        stats.peak_in_service = max(stats.peak_in_service, stats.in_service)
        try:
            fault = self.fault(key, row_key(tags), attempt)
            await self.serve("+".join(tags))
            if fault == "hang":
                await asyncio.sleep(b.hang_s)
        finally:
            stats.in_service -= 1
        if fault == "429":
            stats.refused += 1
            raise Refusal(429, "rate limit reached", {"retry-after": "0.2"})
        if fault in ("400", "500"):
            stats.statuses[fault] += 1
            raise Refusal(int(fault), "scripted failure")
        stats.statuses[fault or "200"] += 1
        stats.answered += fault is None
        stats.last_at = time.time()
        return self.answer(path, body, question, tags), headers, fault == "truncate"

    def let_in(self, now: float) -> Mapping[str, str]:
        """A token bucket; returns the headers that OpenAI sends.

        Raises:
            Refusal: 429, with the seconds until a request is let in.
        """
        b, stats = self.behaviour, self.stats
        if not b.rpm:
            return {}
        rate, moment = b.rpm / 60, time.monotonic()
        self.allowance = min(rate * b.burst_s, self.allowance + rate * (moment - self.allowance_at))
        self.allowance_at = moment
        headers = {}
        if b.limit_headers:
            headers = {
                "x-ratelimit-limit-requests": f"{b.rpm:.0f}",
                "x-ratelimit-remaining-requests": f"{max(0, int(self.allowance) - 1)}",
                "x-ratelimit-reset-requests": f"{(rate * b.burst_s - self.allowance) / rate:.3f}s",
            }
        if self.allowance < 1.0:
            stats.refused += 1
            stats.refused_at[int(now)] += 1
            stats.statuses["429"] += 1
            wait = (1.0 - self.allowance) / rate
            raise Refusal(429, "rate limit reached", {**headers, "retry-after": f"{max(wait, 0.001):.3f}"})
        self.allowance -= 1.0
        stats.admitted_at[int(now)] += 1
        return headers

    def fault(self, key: bytes, row: str, attempt: int) -> str | None:
        """What goes wrong with this attempt, if anything."""
        for kind, share in self.behaviour.poison.items():
            if unlucky(f"poison {kind}", row, share):
                return kind
        if attempt <= self.behaviour.fault_attempts:
            for kind, share in self.behaviour.faults.items():
                if unlucky(kind, key.hex(), share):
                    return kind
        return None

    async def serve(self, judged: str) -> None:
        """Wait for a place and stay in it."""
        b = self.behaviour
        length = service_time(judged, b.latency_s, b.straggler_share, b.straggler_factor)
        now = start = time.monotonic()
        if b.capacity:
            while len(self.free_at) > b.capacity:
                heapq.heappop(self.free_at)
            if len(self.free_at) == b.capacity:
                start = max(now, heapq.heappop(self.free_at))
            heapq.heappush(self.free_at, start + length)
        if start + length > now:
            await asyncio.sleep(start + length - now)

    def answer(self, path: str, body: Json, question: Question, tags: Sequence[str]) -> Json:
        """The body of a completion."""
        b = self.behaviour
        short = int(body.get("max_tokens") or body.get("max_completion_tokens") or 512)
        labels = self.labels(question, tags)
        if b.split_digits:
            digit = re.search(r"\d?\Z", question.text)
            distribution = next_digit(labels, digit[0] if digit else "")
        else:
            distribution = next_tokens(labels, row_key(tags))
        best = max(distribution, key=distribution.__getitem__)
        text = best if short <= 16 else RATIONALE
        ids = encode(text, b.split_digits) if body.get("return_token_ids") else None
        wanted = body.get("logprobs")
        logprobs: Json | None = None
        if wanted is not None and wanted is not False:
            top = self.top(body, distribution, path)
            if path == "/v1/completions":
                logprobs = {"tokens": [best], "token_logprobs": [top[0][1]], "top_logprobs": [dict(top)]}
            else:
                entries = [{"token": t, "logprob": lp, "bytes": None} for t, lp in top]
                first = {"token": best, "logprob": math.log(distribution[best]), "bytes": None}
                logprobs = {"content": [{**first, "top_logprobs": entries}]}
        choice: Json = {
            "index": 0,
            "finish_reason": "length" if short <= 16 else "stop",
            "logprobs": logprobs,
        }
        if path == "/v1/completions":
            choice["text"] = text
        else:
            choice["message"] = {"role": "assistant", "content": text}
        prompt_tokens = len(question.ids) or len(question.text)
        self.stats.prompt_tokens += prompt_tokens
        spent = 1 if short <= 16 else len(text)
        done: Json = {
            "id": "scripted",
            "object": "text_completion" if path == "/v1/completions" else "chat.completion",
            "created": 0,
            "model": "judge",
            "choices": [choice],
            "usage": {
                "prompt_tokens": prompt_tokens,
                "completion_tokens": spent,
                "total_tokens": prompt_tokens + spent,
            },
        }
        if ids is not None and b.kind == "vllm":
            choice["token_ids"] = ids
            prompt_ids = list(question.ids or encode(question.text, b.split_digits))
            if path == "/v1/completions":
                choice["prompt_token_ids"] = prompt_ids
            else:
                done["prompt_token_ids"] = prompt_ids
        return done

    def labels(self, question: Question, tags: Sequence[str]) -> Mapping[str, float]:
        """What the judge thinks: the probabilities of the labels."""
        b = self.behaviour
        if b.template and len(tags):
            p = literal_first_wins(question.turns, Template(**b.template))
            return {b.pair_labels[0]: p, b.pair_labels[1]: 1.0 - p}
        return label_probs(tags, b.pair_labels, b.levels)

    def top(self, body: Json, distribution: Mapping[str, float], path: str) -> list[tuple[str, float]]:
        """(token, log-probability): the sampled token, then the given ids, or the likeliest tokens."""
        ranked = sorted(distribution.items(), key=lambda item: -item[1])
        given = body.get("logprob_token_ids")
        as_ids = bool(body.get("return_tokens_as_token_ids"))
        split = self.behaviour.split_digits

        def shown(token: str) -> str:
            return f"token_id:{encode(token, split)[0]}" if as_ids else token

        if given is None:
            count = int(body["logprobs"] if path == "/v1/completions" else body.get("top_logprobs") or 0)
            return [(shown(t), math.log(p)) for t, p in ranked[: min(20, count)]]
        found = {shown(ranked[0][0]): math.log(ranked[0][1])}
        for i in given:
            text = decode([i])
            found.setdefault(f"token_id:{i}" if as_ids else text, math.log(distribution.get(text, 1e-30)))
        return list(found.items())

    def tokenize(self, body: Json) -> Json:
        """The `/tokenize` of vLLM, of a text or of a conversation."""
        if "messages" in body:
            text = transcript(body["messages"], bool(body.get("continue_final_message")))
        else:
            text = body["prompt"]
        ids = encode(text, self.behaviour.split_digits)
        return {"count": len(ids), "max_model_len": 1 << 20, "tokens": ids}


@dataclass(slots=True)
class Question:
    """What is judged.

    Attributes:
        text: all the judge reads.
        ids: its token ids where it came as ids.
        turns: (role, text) of its messages.
    """

    text: str
    ids: Sequence[int] = ()
    turns: Sequence[tuple[str, str]] = ()


_EXTENSIONS = {"logprob_token_ids", "continue_final_message", "add_generation_prompt", "return_token_ids"}


def read_question(path: str, body: Json, behaviour: Behaviour) -> Question:
    """The text that a request asks to continue.

    Raises:
        Refusal: 400, as the real servers do.
    """
    if behaviour.kind == "plain" and (unknown := _EXTENSIONS & body.keys()):
        raise Refusal(400, f"unknown field {min(unknown)}")
    wanted = body.get("logprobs")
    if "logprob_token_ids" in body and (wanted is None or wanted is False):
        raise Refusal(400, "logprob_token_ids needs logprobs")
    if path == "/v1/completions":
        prompt = body["prompt"]
        if isinstance(prompt, str):
            return Question(prompt)
        return Question(decode(prompt), prompt)
    if (body.get("top_logprobs") or 0) > 20:
        raise Refusal(400, "Requested sample logprobs is greater than max allowed: 20")
    turns = [(m["role"], content_of(m)) for m in body["messages"]]
    if body.get("return_token_ids"):
        return Question(transcript(body["messages"], bool(body.get("continue_final_message"))), turns=turns)
    return Question("\n".join(text for _, text in turns), turns=turns)


def content_of(message: Json) -> str:
    """A message's text; content parts are joined."""
    content = message["content"]
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)


def transcript(messages: Sequence[Json], continues: bool) -> str:
    """A conversation as this model's chat template writes it."""
    turns = [f"<|{m['role']}|>{content_of(m)}" for m in messages]
    return "".join(turns) if continues else "".join([*turns, "<|assistant|>"])


def encode(text: str, split_digits: bool) -> list[int]:
    """Ids of a text: a number is one token (each digit one, if `split_digits`), any other character is one."""
    ids = []
    for token in (_DIGIT_TOKEN if split_digits else _TOKEN).findall(text):
        digits = token.lstrip(" ")
        if digits.isascii() and digits.isdigit() and digits == str(int(digits)):
            ids.append((_SPACE_NUMBER if token[0] == " " else _NUMBER) + int(digits))
        else:
            ids.extend(map(ord, token))
    return ids


def decode(ids: Sequence[int]) -> str:
    """The inverse of `encode`."""
    return "".join(
        chr(i) if i < _NUMBER else str(i - _NUMBER) if i < _SPACE_NUMBER else f" {i - _SPACE_NUMBER}"
        for i in ids
    )


def model_card(name: str, owner: str) -> Json:
    """An entry of `/v1/models`."""
    return {"id": name, "object": "model", "created": 0, "owned_by": owner, "max_model_len": 1 << 20}


async def reply(send: Send, status: int, content: bytes, headers: Mapping[str, str], *, cut: bool) -> None:
    """Send an answer; one that is cut ends, with its connection, in the middle."""
    fields = [(b"content-type", b"application/json"), (b"content-length", str(len(content)).encode())]
    fields += [(k.encode(), v.encode()) for k, v in headers.items()]
    await send({"type": "http.response.start", "status": status, "headers": fields})
    await send({"type": "http.response.body", "body": content[: len(content) // 2] if cut else content})


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--behaviour", type=json.loads, default={}, help="fields of Behaviour as JSON")
    args = parser.parse_args()
    listener = socket.create_server(("127.0.0.1", args.port), backlog=2048)
    print(f"http://127.0.0.1:{listener.getsockname()[1]}", flush=True)
    config = uvicorn.Config(
        Server(Behaviour(**args.behaviour)), log_level="critical", access_log=False, lifespan="off"
    )
    uvicorn.Server(config).run(sockets=[listener])


if __name__ == "__main__":
    main()

"""An OpenAI-compatible server on loopback that answers from a script, with exact log-probabilities.

It counts what it is asked and can fail on purpose. Its tokenizer has one token per character, so `10` is two.
"""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any

Reply = Callable[[str, str, bool], "str | Mapping[str, float]"]
"""(user message, assistant prefix, whether log-probabilities are wanted) -> text, or token probabilities."""

PROBE = "Say 1 or 2."

USER, ASSISTANT, END = "\x01", "\x02", "\x03"
"""The server's chat template: the user's turn, the assistant's, the end of a turn; each is a token."""


@dataclass
class Fault:
    """An answer other than the scripted one: a status with headers, or a hang of some seconds before it."""

    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    message: str = "scripted failure"
    hang_s: float = 0.0


class ScriptedServer:
    """The server; use as a context manager.

    Args:
        reply: the script.
        vllm: behave like vLLM: continue assistant messages, tokenise, read given token ids, tell token ids, take
            them for a prompt, honour stop strings.
        logprobs: give log-probabilities at all.
        top_k: how many of them without given token ids; asking for more than `most_top` is refused.
        most_top: how many likeliest tokens a request may ask for.
        template: the model has a chat template; without one, vLLM refuses chats.
        prefills: a server other than vLLM that continues assistant messages without being told to.
        refuses: fields that a request must not have.
        fault: called with the request body before each completion (probe requests excepted).
        amend: called with the request body and the choice that answers it, which it may change (probes excepted).
        amend_probe: the same for the choices that answer probes.
    """

    def __init__(
        self,
        reply: Reply,
        *,
        vllm: bool = False,
        logprobs: bool = True,
        top_k: int = 20,
        most_top: int = 20,
        template: bool = True,
        prefills: bool = False,
        refuses: tuple[str, ...] = (),
        fault: Callable[[dict[str, Any]], Fault | None] = lambda body: None,
        amend: Callable[[dict[str, Any], dict[str, Any]], None] = lambda body, choice: None,
        amend_probe: Callable[[dict[str, Any], dict[str, Any]], None] = lambda body, choice: None,
    ) -> None:
        self.amend, self.amend_probe = amend, amend_probe
        self.reply, self.vllm, self.logprobs, self.top_k, self.fault = reply, vllm, logprobs, top_k, fault
        self.most_top, self.template, self.prefills, self.refuses = most_top, template, prefills, refuses
        self.asked: list[dict[str, Any]] = []
        self.tokenized: list[str] = []
        self.lock = threading.Lock()
        self.stopping = threading.Event()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                self.send(*outer.route("GET", self.path, b"", self.headers))

            def do_POST(self) -> None:
                data = self.rfile.read(int(self.headers["Content-Length"]))
                self.send(*outer.route("POST", self.path, data, self.headers))

            def send(self, content: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> None:
                data = content if isinstance(content, bytes) else json.dumps(content).encode()
                self.send_response(status)
                for name, value in (headers or {}).items():
                    self.send_header(name, value)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 128

            def handle_error(self, request: Any, client_address: Any) -> None:
                pass  # clients that are killed leave broken pipes behind

        self.server = Server(("127.0.0.1", 0), Handler)
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01})

    @property
    def ref(self) -> str:
        return f"openai:judge@http://127.0.0.1:{self.server.server_port}/v1"

    def __enter__(self) -> ScriptedServer:
        self.thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stopping.set()
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()

    def route(
        self, method: str, path: str, data: bytes, headers: Mapping[str, str]
    ) -> tuple[Any, int, Mapping[str, str]]:
        """(content, status, headers) for a request."""
        if method == "GET":
            owner = "vllm" if self.vllm else "someone"
            model = {"id": "judge", "object": "model", "owned_by": owner}
            return {"object": "list", "data": [model]}, 200, {}
        if path in ("/v1/chat/completions", "/v1/completions"):
            return self.answer(json.loads(data))
        if path == "/tokenize" and self.vllm:
            body = json.loads(data)
            if "prompt" in body or self.template:
                text = self.read(body)[0]
                self.tokenized.append(text)
                return {"tokens": [ord(c) for c in text]}, 200, {}
        return {"error": {"message": "no such route"}}, 404, {}

    def answer(self, body: dict[str, Any]) -> tuple[Any, int, Mapping[str, str]]:
        refusal = self.refusal(body)
        if refusal is not None:
            return {"error": {"message": refusal}}, 400, {}
        text, user, prefix = self.read(body)
        if PROBE not in user:
            with self.lock:
                self.asked.append(body)
                fault = self.fault(body)
            if fault is not None:
                self.stopping.wait(fault.hang_s)
                if fault.status != 200:
                    return {"error": {"message": fault.message}}, fault.status, fault.headers
        wanted = asks_logprobs(body) and body.get("max_tokens") == 1
        said = {"1": 0.5, "2": 0.5} if PROBE in user else self.reply(user, prefix, wanted)
        choice = self.generated(said, body) if isinstance(said, str) else self.read_out(said, body)
        told = {"prompt_token_ids": [ord(c) for c in text]} if self.tells_ids(body) else {}
        if "messages" in body:
            choice["message"] = {"role": "assistant", "content": choice.pop("text")}
        else:
            choice.update(told)
            told = {}
        (self.amend_probe if PROBE in user else self.amend)(body, choice)
        usage = {"prompt_tokens": len(text), "completion_tokens": 1, "total_tokens": len(text) + 1}
        done = {"id": "x", "object": "chat.completion", "created": 0, "model": "judge"}
        return {**done, **told, "choices": [choice], "usage": usage}, 200, {}

    def refusal(self, body: dict[str, Any]) -> str | None:
        """Why a request is not accepted."""
        if "messages" in body and not self.template:
            return "default chat template is no longer allowed, so you must provide a chat template"
        if not self.vllm:
            unknown = [
                f for f in ("logprob_token_ids", "continue_final_message", "return_token_ids") if f in body
            ]
            if unknown:
                return f"Unrecognized request arguments supplied: {', '.join(unknown)}"
            if isinstance(body.get("prompt"), list):
                return "prompt must be a string"
        for name in self.refuses:
            if name in body:
                return f"Unsupported parameter: '{name}' is not supported with this model."
        top = (
            body["top_logprobs"] if "messages" in body and "top_logprobs" in body else body.get("logprobs", 0)
        )
        if top > self.most_top:
            return f"top_logprobs must be at most {self.most_top}"
        return None

    def read(self, body: dict[str, Any]) -> tuple[str, str, str]:
        """(the prompt as the model sees it, user message, assistant prefix); token ids are code points."""
        if "messages" in body:
            turns = body["messages"]
            prefix = turns[-1]["content"] if turns[-1]["role"] == "assistant" else ""
            user = next(t["content"] for t in reversed(turns) if t["role"] == "user")
            closed = bool(prefix) and not self.prefills and not body.get("continue_final_message")
            return USER + user + ASSISTANT + prefix + (END + ASSISTANT if closed else ""), user, prefix
        prompt = body["prompt"]
        text = prompt if isinstance(prompt, str) else "".join(map(chr, prompt))
        if USER not in text:
            return text, text, ""
        user, _, prefix = text.removeprefix(USER).partition(ASSISTANT)
        return text, user, prefix

    def tells_ids(self, body: dict[str, Any]) -> bool:
        return self.vllm and bool(body.get("return_token_ids"))

    def generated(self, said: str, body: dict[str, Any]) -> dict[str, Any]:
        """A choice with text. Like vLLM, ids and log-probabilities go up to the end of the stop string."""
        choice: dict[str, Any] = {"index": 0, "finish_reason": "stop", "stop_reason": None, "text": said}
        tokens = [*said, END]
        stops = [s for s in body.get("stop") or () if s in said] if self.vllm else []
        if stops:
            at = said.index(stops[0])
            choice |= {"text": said[:at], "stop_reason": stops[0]}
            tokens = list(said[: at + len(stops[0])])
        if self.tells_ids(body):
            choice["token_ids"] = [ord(c) for c in tokens]
        if asks_logprobs(body) and self.logprobs:
            entries = [{"token": t, "logprob": -0.1, "bytes": list(t.encode())} for t in tokens]
            if "messages" in body:
                choice["logprobs"] = {"content": [{**e, "top_logprobs": [e]} for e in entries]}
            else:
                choice["logprobs"] = {"tokens": tokens, "top_logprobs": [{t: -0.1} for t in tokens]}
        return choice

    def read_out(self, said: Mapping[str, float], body: dict[str, Any]) -> dict[str, Any]:
        """A choice of one token with log-probabilities."""
        tokens = sorted(said.items(), key=lambda item: -item[1])
        choice: dict[str, Any] = {"index": 0, "finish_reason": "length", "text": tokens[0][0]}
        if not self.logprobs:
            return choice
        ids = body.get("logprob_token_ids")
        top = (
            tokens[: self.top_k] if ids is None else [(f"token_id:{i}", said.get(chr(i), 1e-30)) for i in ids]
        )
        if "messages" in body:
            entries = [{"token": t, "logprob": math.log(p), "bytes": None} for t, p in top]
            first = {"token": tokens[0][0], "logprob": math.log(tokens[0][1]), "bytes": None}
            choice["logprobs"] = {"content": [{**first, "top_logprobs": entries}]}
        else:
            choice["logprobs"] = {
                "tokens": [tokens[0][0]],
                "token_logprobs": [math.log(tokens[0][1])],
                "top_logprobs": [{t: math.log(p) for t, p in top}],
            }
        return choice


def asks_logprobs(body: Mapping[str, Any]) -> bool:
    """A chat says true; a text completion says how many, and 0 still asks for those of the sampled token."""
    return body.get("logprobs") is not None and body["logprobs"] is not False

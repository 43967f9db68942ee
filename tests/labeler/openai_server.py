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
        vllm: behave like vLLM: continue assistant messages, tokenise, read given token ids.
        logprobs: give log-probabilities at all.
        top_k: how many of them without given token ids.
        fault: called with the request body before each chat completion (probe requests excepted).
    """

    def __init__(
        self,
        reply: Reply,
        *,
        vllm: bool = False,
        logprobs: bool = True,
        top_k: int = 20,
        fault: Callable[[dict[str, Any]], Fault | None] = lambda body: None,
    ) -> None:
        self.reply, self.vllm, self.logprobs, self.top_k, self.fault = reply, vllm, logprobs, top_k, fault
        self.asked: list[dict[str, Any]] = []
        self.lock = threading.Lock()
        self.stopping = threading.Event()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                owner = "vllm" if outer.vllm else "someone"
                self.send({"object": "list", "data": [{"id": "judge", "object": "model", "owned_by": owner}]})

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                if self.path == "/tokenize" and outer.vllm:
                    self.send({"tokens": [ord(c) for c in body["prompt"]]})
                elif self.path == "/v1/chat/completions":
                    self.send(*outer.answer(body))
                else:
                    self.send({"error": {"message": "no such route"}}, 404)

            def send(self, content: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> None:
                data = json.dumps(content).encode()
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

    def answer(self, body: dict[str, Any]) -> tuple[Any, int, Mapping[str, str]]:
        turns = body["messages"]
        prefix = turns[-1]["content"] if turns[-1]["role"] == "assistant" else ""
        user = next(t["content"] for t in reversed(turns) if t["role"] == "user")
        if not self.vllm and "logprob_token_ids" in body:
            return {"error": {"message": "unknown field"}}, 400, {}
        if user != PROBE:
            with self.lock:
                self.asked.append(body)
                fault = self.fault(body)
            if fault is not None:
                self.stopping.wait(fault.hang_s)
                if fault.status != 200:
                    return {"error": {"message": fault.message}}, fault.status, fault.headers
        wanted = bool(body.get("logprobs"))
        said = {"1": 0.5, "2": 0.5} if user == PROBE else self.reply(user, prefix, wanted)
        choice: dict[str, Any] = {"index": 0, "finish_reason": "stop"}
        if isinstance(said, str):
            choice["message"] = {"role": "assistant", "content": said}
        else:
            tokens = sorted(said.items(), key=lambda item: -item[1])
            choice["message"] = {"role": "assistant", "content": tokens[0][0]}
            choice["finish_reason"] = "length"
            if self.logprobs:
                choice["logprobs"] = {"content": [self.content(tokens, body)]}
        usage = {"prompt_tokens": len(user), "completion_tokens": 1, "total_tokens": len(user) + 1}
        done = {"id": "x", "object": "chat.completion", "created": 0, "model": "judge"}
        return {**done, "choices": [choice], "usage": usage}, 200, {}

    def content(self, tokens: list[tuple[str, float]], body: dict[str, Any]) -> dict[str, Any]:
        ids = body.get("logprob_token_ids")
        if ids is not None:
            probs = dict(tokens)
            top = [(f"token_id:{i}", probs.get(chr(i), 1e-30)) for i in ids]
        else:
            top = tokens[: self.top_k]
        entries = [{"token": t, "logprob": math.log(p), "bytes": None} for t, p in top]
        return {
            "token": tokens[0][0],
            "logprob": math.log(tokens[0][1]),
            "bytes": None,
            "top_logprobs": entries,
        }

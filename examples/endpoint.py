"""A small model behind an OpenAI-compatible endpoint, for trying what needs one: `/v1/models`, `/v1/chat/completions`.

    python examples/endpoint.py --model tinyworld:judge --served_model_name judge --port 8000

The model is named as everywhere (`hf:NAME_OR_PATH`, `tinyworld:judge`); requests in flight share batches. Of the
protocol it has what a judge is asked with: an assistant turn that was begun is continued, and the likeliest tokens
are told with their log-probabilities. For work, serve a model with vLLM or SGLang.
"""

from __future__ import annotations

import argparse
import asyncio
from heapq import nlargest
from typing import Any

from aiohttp import web

from labeler.backends.hf import HFModel
from labeler.backends.local import Decoded, Request
from labeler.llm import LLMOptions, RequestFailed
from rlaif.models import ModelRef
from rlaif.types import Conversation, Message

MOST_TOP_LOGPROBS = 20
"""As many likeliest tokens as OpenAI's chat completions give."""


class Endpoint(HFModel):
    """A model that answers chat completions, under the name that it is asked for."""

    served_name = ""

    async def models(self, request: web.Request) -> web.Response:
        """`GET /v1/models`."""
        return web.json_response({"object": "list", "data": [{"id": self.served_name, "object": "model"}]})

    async def chat(self, request: web.Request) -> web.Response:
        """`POST /v1/chat/completions`."""
        body = await request.json()
        top = int(body.get("top_logprobs") or 0) if body.get("logprobs") else None
        if top is not None and top > MOST_TOP_LOGPROBS:
            return refusal(f"top_logprobs is {MOST_TOP_LOGPROBS} at most")
        *messages, last = [Message(m["role"], m["content"]) for m in body["messages"]]
        begun = last.role == "assistant" and body.get("continue_final_message")
        conversation: Conversation = tuple(messages) if begun else (*messages, last)
        try:
            ids = self._encode(self._render(conversation, last.content if begun else ""))
            self._check_room(len(ids) + 1)
        except RequestFailed as err:
            return refusal(str(err))
        room = self._context - len(ids)
        limit = body.get("max_completion_tokens") or body.get("max_tokens") or room
        stop = body.get("stop") or ()
        done = await self._decode(
            Request(
                ids,
                max_new_tokens=min(int(limit), room),
                temperature=float(body.get("temperature", 1.0)),
                seed=int(body.get("seed") or 0),
                stop=(stop,) if isinstance(stop, str) else tuple(stop),
            )
        )
        logprobs = None if top is None else {"content": await self._likeliest(ids, done, top)}
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": done.text},
            "finish_reason": done.finish_reason,
            "logprobs": logprobs,
        }
        usage = {
            "prompt_tokens": len(ids),
            "completion_tokens": len(done.ids),
            "total_tokens": len(ids) + len(done.ids),
        }
        answer = {"object": "chat.completion", "model": self.served_name, "choices": [choice], "usage": usage}
        return web.json_response(answer)

    async def _likeliest(self, ids: tuple[int, ...], done: Decoded, top: int) -> list[dict[str, Any]]:
        """Each generated token with its log-probability, and the `top` likeliest in its place."""
        everything = tuple(range(len(self._tokenizer)))
        read = await self._read(ids, {done.ids[:n]: everything for n in range(len(done.ids))})
        told = []
        for n, token in enumerate(done.ids):
            logprobs = read.logprobs[done.ids[:n]]
            best = nlargest(top, logprobs, key=logprobs.__getitem__)
            told.append(
                {**self._entry(token, logprobs), "top_logprobs": [self._entry(t, logprobs) for t in best]}
            )
        return told

    def _entry(self, token: int, logprobs: Any) -> dict[str, Any]:
        text = str(self._tokenizer.decode([token]))
        return {"token": text, "logprob": logprobs[token], "bytes": list(text.encode())}


def refusal(message: str) -> web.Response:
    """A bad request, in the protocol's shape."""
    return web.json_response({"error": {"message": message, "type": "invalid_request_error"}}, status=400)


async def serve(model: str, served_name: str, port: int) -> None:
    """Answer until the process is ended."""
    endpoint = Endpoint.load(ModelRef.parse(model), LLMOptions())
    endpoint.served_name = served_name
    app = web.Application()
    app.router.add_get("/v1/models", endpoint.models)  # type: ignore[attr-defined]
    app.router.add_post("/v1/chat/completions", endpoint.chat)  # type: ignore[attr-defined]
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", port).start()
    print(f"{model} answers as {served_name} at http://127.0.0.1:{port}/v1", flush=True)
    await asyncio.Event().wait()


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="tinyworld:judge", help="hf:NAME_OR_PATH, tinyworld:judge|policy")
    parser.add_argument("--served_model_name", help="the name to ask for; --model if not given")
    parser.add_argument("--port", type=int, default=8000)
    args = parser.parse_args()
    asyncio.run(serve(args.model, args.served_model_name or args.model, args.port))


if __name__ == "__main__":
    main()

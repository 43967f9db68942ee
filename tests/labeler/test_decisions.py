"""Decision models behind a scripted endpoint in the shape of vLLM's: what is asked, what is read, what is refused."""

from __future__ import annotations

import asyncio
import json
import math
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from labeler.judge import Judge
from labeler.llm import LLMOptions, RequestFailed, open_llm
from labeler.rubric import load_rubric
from rlaif.errors import EndpointError, ModelError
from rlaif.models import ModelRef
from rlaif.types import Pair, Preference, user_prompt


class Decider(ThreadingHTTPServer):
    """Prefers the response that says `good`: P("1") = 0.8 where it is shown first, 0.4 where second; mass 0.5."""

    def __init__(self, path: str, *, missing: int = 404) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.path = path
        self.missing = missing
        self.diagnoses = True
        self.asked: list[dict[str, Any]] = []
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def ref(self) -> ModelRef:
        return ModelRef.parse(f"decisions:judge@http://127.0.0.1:{self.server_port}/v1")


class _Handler(BaseHTTPRequestHandler):
    server: Decider

    def do_GET(self) -> None:
        self._answer(200, {"data": [{"id": "judge"}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path != self.server.path:
            return self._answer(self.server.missing, {"detail": "Not Found"})
        self.server.asked.append(body)
        ((question_id, question),) = body["questions"].items()
        first = body["state"].find("good") < body["state"].find("bad")
        one = 0.8 if first else 0.4
        answer = {"probabilities": dict(zip(question["criteria"], (one, 1 - one), strict=False))}
        diagnosis = {"diagnostics": {question_id: {"label_mass": 0.5, "argmax_is_label": True}}}
        self._answer(
            200,
            {
                "answers": {question_id: answer},
                "usage": {"input_tokens": 30, "output_tokens": 1},
                **(diagnosis if self.server.diagnoses else {}),
            },
        )

    def _answer(self, status: int, value: object) -> None:
        content = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture(params=["/v1/decisions", "/v1/systemone"])
def decider(request: pytest.FixtureRequest) -> Iterator[Decider]:
    with Decider(request.param) as server:
        yield server
        server.shutdown()


PAIR = Pair(user_prompt("Bread?"), "good", "bad")


def judge(server: Decider, *, cot: bool = False) -> Preference:
    async def run() -> Preference:
        llm = open_llm(server.ref, LLMOptions(max_retries=0))
        try:
            rubric = load_rubric("helpfulness-pair").with_options(cot=cot)
            return await Judge(llm, rubric).judge_pair(PAIR)
        finally:
            await llm.close()

    return asyncio.run(run())


def test_the_decision_over_the_labels_is_the_label_of_a_pair(decider: Decider) -> None:
    preference = judge(decider)
    # 1/2 (0.8 + (1 - 0.4))
    assert preference.p_a == pytest.approx(0.7)
    assert preference.ab is not None and preference.ab.labels is not None
    assert preference.ab.labels.mass == 0.5
    assert [math.exp(x) for x in preference.ab.labels.logprobs] == pytest.approx([0.4, 0.1])
    assert (preference.ab.prompt_tokens, preference.ab.completion_tokens) == (30, 1)
    question = decider.asked[-1]["questions"]["label"]
    assert question == {
        "type": "choice",
        "instructions": "More helpful response:",
        "criteria": {"1": None, "2": None},
    }
    assert "<<< RESPONSE 1 >>>" in decider.asked[-1]["state"]


def test_an_endpoint_that_does_not_tell_the_mass_chooses_among_the_labels_alone(decider: Decider) -> None:
    decider.diagnoses = False
    preference = judge(decider)
    assert preference.ab is not None and preference.ab.labels is not None
    assert preference.ab.labels.mass == 1.0
    assert preference.p_a == pytest.approx(0.7)


def test_a_rationale_is_refused_with_what_to_do(decider: Decider) -> None:
    with pytest.raises(ModelError, match="writes no text: ask it without a rationale"):
        judge(decider, cot=True)


@pytest.mark.parametrize("status", [404, 501])  # vLLM answers 501 for a model that it cannot decide with
def test_an_endpoint_without_decisions_is_refused_with_what_to_do(status: int) -> None:
    with Decider("/nowhere", missing=status) as server:
        with pytest.raises(EndpointError, match=rf"does not decide with judge .*{status}.* use openai:judge"):
            judge(server)
        server.shutdown()


def test_an_answer_without_the_labels_is_a_failure_and_no_label(decider: Decider) -> None:
    async def run() -> None:
        llm = open_llm(decider.ref, LLMOptions(max_retries=0))
        with pytest.raises(RequestFailed, match="no decision that can be read"):
            await llm.label_logprobs(user_prompt("x"), "Best:", ("1", "2", "3"))
        await llm.close()

    asyncio.run(run())

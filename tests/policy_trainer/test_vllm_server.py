"""What the trainer says of a vLLM server that is not there, not the right one, or not the one it was."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import torch
from transformers import AutoModelForCausalLM

from policy_trainer.models import load_trained
from policy_trainer.rollout import Sampled
from policy_trainer.vllm_rollout import Server, VLLMRollout, save_weights
from rlaif.errors import EndpointError
from tests.policy_trainer import tiny


class FakeVLLM(ThreadingHTTPServer):
    """Answers each prompt with its own ids, `n` times, and remembers what it was asked.

    Attributes:
        calls: path and body of each request that changes something.
        version: name of the weights.
        missing: paths that this server does not have.
        loads: last weight of each checkpoint that was read.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.calls: list[tuple[str, Any]] = []
        self.version = "default"
        self.missing: set[str] = set()
        self.loads: list[float] = []
        self.on_completion = lambda: None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def answer(self, path: str, body: Any) -> tuple[int, Any]:
        if path in self.missing:
            return 404, {"detail": "Not Found"}
        if path == "/v1/models":
            return 200, {"data": [{"id": "served"}]}
        if path == "/weight_info":
            return 200, {"weight_version": self.version}
        self.calls.append((path, body))
        if path == "/update_weight_version":
            self.version = body["new_version"]
        if path == "/collective_rpc":
            model = AutoModelForCausalLM.from_pretrained(body["kwargs"]["weights_path"])
            self.loads.append(model.lm_head.weight[0, 0].item())
        if path == "/v1/completions":
            self.on_completion()
            ids = body["prompt"]
            choice = {"token_ids": ids, "logprobs": {"token_logprobs": [-1.0] * len(ids)}}
            return 200, {"choices": [choice] * body["n"]}
        return 200, {"success": True, "results": [None]}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FakeVLLM

    def do_GET(self) -> None:
        self._answer(None)

    def do_POST(self) -> None:
        raw = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self._answer(json.loads(raw) if raw else None)

    def _answer(self, body: Any) -> None:
        status, answer = self.server.answer(urlsplit(self.path).path, body)
        payload = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(payload)))
        self.end_headers()
        self.wfile.write(payload)

    def log_message(self, format: str, *arguments: Any) -> None:
        """Silence."""


@pytest.fixture
def server() -> Iterator[FakeVLLM]:
    with FakeVLLM() as fake:
        threading.Thread(target=fake.serve_forever, daemon=True).start()
        yield fake
        fake.shutdown()


@pytest.fixture
def engine(server: FakeVLLM, tmp_path: Path) -> Iterator[VLLMRollout]:
    opened = VLLMRollout(Server(f"{server.url}/v1", timeout_s=5), [2], tmp_path / "weights")
    yield opened
    opened.close()
    assert not (tmp_path / "weights").exists()


def sample(engine: VLLMRollout) -> list[Sampled]:
    return engine.generate(
        [[5, 6], [7, 2]], num_return_sequences=2, max_new_tokens=4, temperature=0.5, seed=0
    )


def test_new_weights_are_loaded_while_nothing_is_sampled(engine: VLLMRollout, server: FakeVLLM) -> None:
    model = tiny.model()
    engine.sync(model, 3)
    engine.sync(model, 3)
    assert [path for path, _ in server.calls] == [
        "/pause",
        "/collective_rpc",
        "/reset_prefix_cache",
        "/update_weight_version",
        "/resume",
    ]
    assert server.loads == [model.lm_head.weight[0, 0].item()]
    sampled = sample(engine)
    assert [(s.prompt_index, s.response_ids, s.finished, s.policy_version) for s in sampled] == [
        (0, [5, 6], False, 3),
        (0, [5, 6], False, 3),
        (1, [7, 2], True, 3),
        (1, [7, 2], True, 3),
    ]
    bodies = [body for path, body in server.calls if path == "/v1/completions"]
    assert len({body["seed"] for body in bodies}) == 2
    for body in bodies:
        assert (body["top_k"], body["top_p"], body["min_p"], body["temperature"]) == (0, 1.0, 0.0, 0.5)
        assert (body["stop_token_ids"], body["ignore_eos"], body["n"]) == ([2], True, 2)


def test_a_server_that_was_started_anew_gets_the_weights_again(engine: VLLMRollout, server: FakeVLLM) -> None:
    engine.sync(tiny.model(), 3)
    server.version = "default"
    engine.sync(tiny.model(), 3)
    assert len(server.loads) == 2
    assert len(sample(engine)) == 4


def test_weights_that_somebody_else_changed_are_not_sampled_from_unnoticed(
    engine: VLLMRollout, server: FakeVLLM
) -> None:
    engine.sync(tiny.model(), 3)
    server.on_completion = lambda: setattr(server, "version", "of another run")
    with pytest.raises(EndpointError, match=r"'of another run'.*a server of its own"):
        sample(engine)


@pytest.mark.parametrize("path", ["/collective_rpc", "/weight_info"])
def test_a_server_without_developer_mode_is_named(engine: VLLMRollout, server: FakeVLLM, path: str) -> None:
    server.missing.add(path)
    with pytest.raises(EndpointError, match=f"has no {path}: .*VLLM_SERVER_DEV_MODE=1"):
        engine.sync(tiny.model(), 0)
        sample(engine)
    assert server.calls[-1][0] == "/resume"


def test_a_server_that_is_not_there_is_named(tmp_path: Path) -> None:
    engine = VLLMRollout(Server("http://127.0.0.1:9", timeout_s=0.1), [2], tmp_path / "weights")
    with pytest.raises(EndpointError, match=r"no answer from the vLLM server http://127\.0\.0\.1:9 "):
        engine.sync(tiny.model(), 0)
    engine.close()


def test_adapters_are_added_into_the_weights_that_vllm_gets(tmp_path: Path) -> None:
    config = tiny.ppo_config(tmp_path, use_peft=True)
    policy = load_trained(config, None).model
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                parameter.normal_(generator=torch.Generator().manual_seed(0))
    save_weights(policy, tmp_path / "weights")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "weights")
    ids = torch.tensor([[1, 4, 7, 8, 9]])
    with torch.no_grad():
        expected, found, before = (m(ids).logits for m in (policy, plain, tiny.model()))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    assert (before - expected).abs().max() > 0.1

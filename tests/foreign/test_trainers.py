"""The reward clients of OpenRLHF and verl, from their own packages, against the HTTP doors."""

from __future__ import annotations

import asyncio
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from reward_server.config import ServeConfig
from reward_server.server import load_scorer
from tests.foreign.conftest import installed
from tests.reward_server.facade.doors import SequenceScorer, doors
from tests.reward_server.tiny import byte_tokenizer, save_classifier


class Absent(ModuleType):
    """Stands for a package that the file imports for other work than asking for a reward."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


@pytest.fixture
def imports(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    before = set(sys.modules)
    yield monkeypatch
    for name in set(sys.modules) - before:
        if name.partition(".")[0] in ("openrlhf", "verl"):
            del sys.modules[name]


def bare_package(monkeypatch: pytest.MonkeyPatch, name: str, folder: Path) -> None:
    """Let modules of a package be imported without its `__init__`, which wants GPUs."""
    package = ModuleType(name)
    package.__path__ = [str(folder)]
    monkeypatch.setitem(sys.modules, name, package)


class Engine:
    """A vLLM engine that always says the same."""

    def __init__(self, ids: list[int]) -> None:
        self.ids = ids

    async def generate(self, prompt: list[int], params: Any, multi_modal_data: Any = None) -> Any:
        output = SimpleNamespace(token_ids=self.ids, finish_reason="stop", logprobs=None)
        return SimpleNamespace(outputs=[output])


def test_openrlhf_takes_the_reward_of_its_rollout(imports: pytest.MonkeyPatch) -> None:
    folder = installed("openrlhf/openrlhf")
    bare_package(imports, "openrlhf", folder)
    bare_package(imports, "openrlhf.utils", folder / "utils")
    agent = importlib.import_module("openrlhf.utils.agent")
    tokenizer = byte_tokenizer()
    params = SimpleNamespace(max_tokens=20, logprobs=None)

    async def rollout(executor: Any, response: str) -> Any:
        engine = Engine(tokenizer(response)["input_ids"])
        return await executor.execute("2+2?", "4", params, 64, tokenizer, engine)

    async def scenario() -> None:
        async with doors(SequenceScorer()) as first, doors(SequenceScorer()) as second:
            executor = agent.SingleTurnAgentExecutor([f"{d.url}/get_reward" for d in (first, second)])
            rollouts = await asyncio.gather(*(rollout(executor, "x" * n) for n in range(1, 9)))
            # The reward is (characters of prompt and response - 10) / 5.
            assert [r["reward"] for r in rollouts] == [[(4 + n - 10) / 5] for n in range(1, 9)]
            assert [r["scores"] for r in rollouts] == [r["reward"] for r in rollouts]
            assert rollouts[0]["extra_logs"] == {"raw_score": [5.0], "reward_tokens": [5]}

    asyncio.run(scenario())


def test_verl_takes_the_logit_of_its_chat(imports: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder = installed("verl/verl")
    bare_package(imports, "verl", folder)
    for name in ("experimental", "experimental.reward_loop"):
        bare_package(imports, f"verl.{name}", folder / name.replace(".", "/"))
    for name in (
        "ray",
        "ray.actor",
        "omegaconf",
        "tensordict",
        "verl.protocol",
        "verl.single_controller",
        "verl.single_controller.ray",
        "verl.single_controller.ray.base",
        "verl.trainer",
        "verl.trainer.ppo",
        "verl.trainer.ppo.reward",
        "verl.utils",
        "verl.utils.fs",
        "verl.utils.ray_utils",
        "verl.experimental.reward_loop.reward_model",
    ):
        imports.setitem(sys.modules, name, Absent(name))
    loop = importlib.import_module("verl.experimental.reward_loop.reward_loop")

    checkpoint = save_classifier(tmp_path / "rm")
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    )
    scorer = load_scorer(ServeConfig(model=str(checkpoint), device="cpu"))
    reward_model = SimpleNamespace(model_path=str(checkpoint), rollout=SimpleNamespace(name="vllm"))
    worker = object.__new__(loop.RewardLoopWorker)
    worker.config = SimpleNamespace(reward=SimpleNamespace(reward_model=reward_model))
    worker.input_tokenizer = worker.reward_model_tokenizer = tokenizer

    response = torch.tensor([*tokenizer("four")["input_ids"], 1, 2, 2])  # EOS and padding
    mask = torch.tensor([1] * 6 + [1] * 5 + [0] * 2)
    item = SimpleNamespace(
        non_tensor_batch={"raw_prompt": [{"role": "user", "content": "2+2?"}]},
        batch={"responses": response, "attention_mask": mask},
    )

    async def scenario() -> dict[str, float]:
        async with doors(scorer) as served:
            worker.reward_router_address = served.url.removeprefix("http://")
            return dict(await worker.compute_score_disrm([item]))

    scored = asyncio.run(scenario())
    model = AutoModelForSequenceClassification.from_pretrained(checkpoint).eval()
    # verl takes the template's BOS away, since vLLM's tokenizer adds one where it is one that does; this one is not.
    ids = tokenizer("user: 2+2?\nassistant: four\n", return_tensors="pt")
    with torch.no_grad():
        logit = float(model(input_ids=ids["input_ids"]).logits[0, 0])
    assert scored == {"reward_score": pytest.approx(logit, abs=1e-5)}

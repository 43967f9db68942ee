"""`--torch_compile`: other code, the same scores; and without a compiler, the same code."""

from __future__ import annotations

import logging
import random
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from shutil import which

import pytest
import torch
from torch import nn

from reward_server.compiled import PackedLinear, pack_linear_layers, unpack_linear_layers
from reward_server.config import ServeConfig
from reward_server.forward import BatchedForward
from reward_server.model import load_reward_model
from reward_server.scorers.learned import LearnedScorer
from rlaif.errors import ConfigError
from tests.reward_server import tiny

pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_classifier(tmp_path_factory.mktemp("model") / "rm", num_hidden_layers=1)


@pytest.fixture(scope="module")
def compiled_code(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the compiler keeps what it has compiled, so that each graph is compiled once for all tests."""
    return tmp_path_factory.mktemp("inductor")


def sequences(seed: int) -> list[list[int]]:
    """Some alone, some after a common prefix, and several of one length."""
    rng = random.Random(seed)

    def ids(count: int) -> list[int]:
        return [rng.randrange(3, 250) for _ in range(count)]

    prefix = ids(rng.randint(100, 150))
    alone = [ids(rng.randint(1, 90)) for _ in range(10)]
    return alone + [prefix + ids(rng.randint(1, 40)) for _ in range(5)] + [ids(33) for _ in range(3)]


@pytest.mark.slow
@pytest.mark.skipif(not (which("g++") or which("clang++")), reason="there is no C++ compiler")
def test_compiled_scores_are_those_of_the_plain_model_and_shapes_to_come_compile_nothing(
    checkpoint: Path, compiled_code: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(compiled_code))
    plain = BatchedForward(load_reward_model(str(checkpoint), device="cpu").model)
    forward = BatchedForward(load_reward_model(str(checkpoint), device="cpu").model)
    forward.compile()
    made = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert made
    for seed in range(20):
        batch = sequences(seed)
        expected, cached = plain.scores(batch)
        found, not_computed = forward.scores(batch)
        assert not_computed == cached and max(cached) > 0
        assert torch.allclose(found, expected, rtol=0, atol=1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == made


@pytest.mark.slow
@pytest.mark.skipif(not (which("g++") or which("clang++")), reason="there is no C++ compiler")
def test_a_model_is_compiled_while_another_one_scores_and_however_many_there_are(
    checkpoint: Path, compiled_code: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(compiled_code))
    serving, loaded, third = (
        BatchedForward(load_reward_model(str(checkpoint), device="cpu").model) for _ in range(3)
    )
    graphs = torch._dynamo.utils.counters["stats"]
    serving.compile()
    made = graphs["unique_graphs"]
    begun, compiled = threading.Event(), threading.Event()

    class Held(list[int]):
        """Is scored when the other model is compiled."""

        def __len__(self) -> int:
            begun.set()
            assert compiled.wait(300)
            return super().__len__()

    with ThreadPoolExecutor(max_workers=1) as thread:
        scoring = thread.submit(serving.scores, [Held(range(3, 40))])
        assert begun.wait(300)
        try:
            loaded.compile()
        finally:
            compiled.set()
        scoring.result()
    second = graphs["unique_graphs"]
    assert second > made
    third.compile()
    assert graphs["unique_graphs"] > second


@pytest.mark.slow
def test_without_a_compiler_the_model_is_served_as_it_is_and_one_line_says_so(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import torch._inductor.config as inductor

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(inductor.cpp, "cxx", ("/no/such/compiler",))
    reward_model = load_reward_model(str(checkpoint), device="cpu")
    expected = BatchedForward(reward_model.model).scores(sequences(0))[0]
    scorer = LearnedScorer("rm", reward_model, torch_compile=True)
    with caplog.at_level(logging.WARNING):
        scorer._compile()
    (said,) = (record.message for record in caplog.records if record.name.startswith("reward_server"))
    assert said.startswith("rm is served without being compiled: ") and "\n" not in said
    assert torch.equal(BatchedForward(reward_model.model).scores(sequences(0))[0], expected)


def test_a_packed_layer_computes_what_the_layer_does_and_goes_with_it() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(48, 96), nn.ReLU(), nn.Linear(96, 32, bias=False), nn.Linear(32, 1))
    layers = list(model)
    x = torch.randn(5, 7, 48)
    with torch.inference_mode():
        expected = model(x)
        assert pack_linear_layers(model) == 2, "the head is left as it is"
        assert isinstance(model[0], PackedLinear)
        assert torch.allclose(model(x), expected, rtol=0, atol=1e-6)
    gone = weakref.ref(model[0])
    unpack_linear_layers(model)
    assert list(model) == layers
    assert gone() is None, "the packed weights are freed"


def test_a_judge_is_not_compiled() -> None:
    with pytest.raises(ConfigError, match="--torch_compile is for a reward model"):
        ServeConfig(judge="tinyworld:judge", torch_compile=True)

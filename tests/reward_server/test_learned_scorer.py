"""A reward model behind the service: what it serves is what transformers computes."""

from __future__ import annotations

import asyncio
import gc
import hashlib
import json
import os
import random
import shutil
import signal
import struct
import weakref
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from protos.rlaif.reward.v1 import reward_pb2 as pb
from protos.rlaif.reward.v1 import reward_pb2_grpc
from reward_server.config import ServeConfig
from reward_server.files import files_of
from reward_server.forward import scores
from reward_server.model import load_backbone, load_reward_model
from reward_server.scorers.base import Scored, ScoreTask
from reward_server.scorers.learned import LearnedScorer
from reward_server.server import RewardServer, load_scorer, serve
from rlaif.chat import BUILTIN_TEMPLATES
from rlaif.errors import ModelError
from rlaif.types import Message, to_dicts, user_prompt
from tests.reward_server import tiny
from tests.reward_server.fakes import conversation, score_request, serving


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_classifier(tmp_path_factory.mktemp("classifier"))


def load(folder: Path) -> LearnedScorer:
    return LearnedScorer(str(folder), load_reward_model(str(folder), device="cpu"))


def test_the_served_score_is_the_forward_pass_of_transformers(checkpoint: Path) -> None:
    responses = ["yes", "no, not at all", "a" * 60, "?"]

    async def scenario() -> pb.ScoreResponse:
        async with serving(load(checkpoint)) as served:
            answer: pb.ScoreResponse = await served.stub.Score(score_request(*responses))
            return answer

    answer = asyncio.run(scenario())
    model = AutoModelForSequenceClassification.from_pretrained(checkpoint).eval()
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    tokenizer.chat_template = BUILTIN_TEMPLATES["plain"]  # what a tokenizer without a template gets
    for response, outcome in zip(responses, answer.outcomes, strict=True):
        messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": response}]
        ids = tokenizer.apply_chat_template(messages, return_tensors="pt", return_dict=True)["input_ids"]
        with torch.no_grad():
            expected = model(input_ids=ids).logits.item()
        assert outcome.score.raw == pytest.approx(expected, abs=1e-5)
        assert outcome.score.normalized == outcome.score.raw  # a plain checkpoint has no statistics
        assert outcome.score.tokens == ids.shape[1]


def test_a_score_does_not_depend_on_its_batch(checkpoint: Path) -> None:
    scorer = load(checkpoint)
    rng = random.Random(0)
    items = [
        scorer.prepare(ScoreTask((*user_prompt("p" * rng.randint(1, 40)), Message("assistant", "r" * n))))
        for n in range(1, 60)
    ]

    async def score(batch: list[int]) -> list[float]:
        outcomes = await scorer.score([items[i] for i in batch])
        return [o.raw for o in outcomes if isinstance(o, Scored)]

    async def scenario() -> None:
        alone = [(await score([i]))[0] for i in range(len(items))]
        assert max(alone) - min(alone) > 0.1
        for _ in range(20):
            batch = rng.sample(range(len(items)), rng.randint(2, 30))
            for i, value in zip(batch, await score(batch), strict=True):
                assert value == pytest.approx(alone[i], abs=1e-5)
        await scorer.close()

    asyncio.run(scenario())


def test_fingerprints_are_of_the_tokens_of_transformers(checkpoint: Path) -> None:
    scorer = load(checkpoint)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    tokenizer.chat_template = BUILTIN_TEMPLATES["plain"]
    rng = random.Random(1)
    alphabet = "abc 019\n\t.,'\"<>|{}[]éß漢字🙂\u202e\x00"
    for _ in range(1000):
        turns = [
            Message(role, "".join(rng.choices(alphabet, k=rng.randint(1, 20))))
            for role in ("user", "assistant") * rng.randint(1, 2)
        ]
        prepared = scorer.prepare(ScoreTask(tuple(turns), "left"))
        ids = tokenizer.apply_chat_template(to_dicts(tuple(turns)), return_dict=True)["input_ids"]
        ids = prepared.sequences[0] if prepared.truncated else ids
        assert (
            prepared.fingerprint == hashlib.sha256(b"".join(struct.pack("<I", i) for i in ids)).digest()[:8]
        )
        assert ids.count(tokenizer.bos_token_id) == 1


def test_comparison_is_the_sigmoid_of_the_difference(checkpoint: Path) -> None:
    async def scenario() -> None:
        async with serving(load(checkpoint)) as served:
            items = [
                pb.CompareItem(id=i, prompt=conversation("q"), response_a=a, response_b=b)
                for i, (a, b) in enumerate([("yes", "no"), ("no", "yes"), ("same", "same")])
            ]
            compared = (await served.stub.Compare(pb.CompareRequest(items=items))).outcomes
            scored = (await served.stub.Score(score_request("yes", "no"))).outcomes
            difference = torch.tensor(scored[0].score.raw - scored[1].score.raw, dtype=torch.float64)
            p_a = [o.comparison.p_a for o in compared]
            assert p_a[0] == pytest.approx(torch.sigmoid(difference).item(), abs=1e-5)
            assert p_a[0] + p_a[1] == pytest.approx(1.0, abs=1e-6)
            assert p_a[2] == pytest.approx(0.5, abs=1e-6)
            assert not compared[0].comparison.HasField("p_a_first")

    asyncio.run(scenario())


def test_a_long_conversation_is_refused_or_loses_the_start_of_its_prompt(checkpoint: Path) -> None:
    async def scenario() -> None:
        async with serving(load(checkpoint)) as served:
            long = pb.ScoreItem(id=1, conversation=conversation("x" * 500 + "the end", "fine"))
            refused = await served.stub.Score(pb.ScoreRequest(items=[long]))
            assert "128" in refused.outcomes[0].error.message
            request = pb.ScoreRequest(items=[long], truncation=pb.TRUNCATION_LEFT)
            score = (await served.stub.Score(request)).outcomes[0].score
            assert score.truncated and score.tokens == 128

    asyncio.run(scenario())


def test_the_version_follows_weights_template_and_scale(checkpoint: Path, tmp_path: Path) -> None:
    version = load_reward_model(str(checkpoint), device="cpu").version
    assert load_reward_model(str(checkpoint), device="cpu").version == version
    other = tiny.save_classifier(tmp_path / "other", seed=1)
    assert load_reward_model(str(other), device="cpu").version != version
    templated = tiny.save_classifier(tmp_path / "templated")
    (templated / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}|{% endfor %}")
    assert load_reward_model(str(templated), device="cpu").version != version
    scaled = tiny.save_classifier(tmp_path / "scaled")
    versions = {version}
    for mean, std in ((1.0, 1.0), (0.0, 2.0)):
        (scaled / "reward_model.json").write_text(json.dumps({"mean": mean, "std": std, "source": "a test"}))
        model = load_reward_model(str(scaled), device="cpu")
        assert (model.normalization.center, model.normalization.scale) == (mean, std)
        versions.add(model.version)
    assert len(versions) == 3


def edit(file: Path, **changes: object) -> None:
    """Change what a JSON file of a checkpoint says."""
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


CHANGES: dict[str, tuple[str, dict[str, object]]] = {
    "positions": ("config.json", {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0}}),
    "activation": ("config.json", {"hidden_act": "relu"}),
    "normalizer": (
        "tokenizer.json",
        {"normalizer": {"type": "Replace", "pattern": {"String": "e"}, "content": "z"}},
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_the_version_follows_what_no_weight_says(change: str, checkpoint: Path, tmp_path: Path) -> None:
    file, changes = CHANGES[change]
    other = shutil.copytree(checkpoint, tmp_path / "other")
    edit(other / file, **changes)

    async def scenario() -> None:
        config = ServeConfig(model=str(checkpoint), port=0, device="cpu")
        server = RewardServer(config)
        address = await server.start()
        await server.open(load_scorer(config))
        async with grpc.aio.insecure_channel(address) as channel:
            stub: Any = reward_pb2_grpc.RewardServiceStub(channel)  # type: ignore[no-untyped-call]
            admin: Any = reward_pb2_grpc.ModelAdminServiceStub(channel)  # type: ignore[no-untyped-call]
            before = await stub.Score(score_request("yes, yes"))
            await admin.LoadModel(pb.LoadModelRequest(model=str(other), activate=True))
            after = await stub.Score(score_request("yes, yes"))
            assert after.model.version != before.model.version
            task = ScoreTask((*user_prompt("q"), Message("assistant", "yes, yes")))
            (expected,) = await (scorer := load(other)).score([scorer.prepare(task)])
            assert isinstance(expected, Scored)
            assert after.outcomes[0].score.raw == pytest.approx(expected.raw, abs=1e-5)
            assert abs(after.outcomes[0].score.raw - before.outcomes[0].score.raw) > 1e-3
        await server.drain()

    asyncio.run(scenario())


def test_a_checkpoint_has_one_version_wherever_it_lies_and_whatever_was_computed(
    checkpoint: Path, tmp_path: Path
) -> None:
    model = load_reward_model(str(checkpoint), device="cpu")
    version = model.version
    LearnedScorer("rm", model)  # its attention is another one
    model.tokenizer(["a", "long text"], padding=True, truncation=True, max_length=4)
    assert model.version == version
    moved = shutil.copytree(checkpoint, tmp_path / "moved")
    edit(moved / "config.json", transformers_version="5.0.0", _name_or_path="elsewhere")
    assert load_reward_model(str(moved), device="cpu").version == version


def test_what_is_no_reward_model_is_refused_by_name(tmp_path: Path) -> None:
    three = tiny.save_classifier(tmp_path / "three", num_labels=3)
    with pytest.raises(ModelError, match=r"one output .*\(3, 32\)"):
        load_reward_model(str(three))
    language_model = tiny.save_language_model(tmp_path / "lm")
    with pytest.raises(ModelError, match=r"no trained scalar head .*rlaif train rm"):
        load_reward_model(str(language_model))
    with pytest.raises(ModelError, match="cannot load"):
        load_reward_model(str(tmp_path))  # no model in it
    damaged = tiny.save_classifier(tmp_path / "damaged")
    for card in (
        '{"mean": 0.0, "std": 0.0, "source": ""}',
        '{"mean": 0.0, "std": 1.0}',
        '{"mean": 0.0, "std": Infinity, "source": ""}',
        '{"mean": 0.0, "std": 1.0, "source": "", "max_length": "64"}',
    ):
        (damaged / "reward_model.json").write_text(card)
        with pytest.raises(ModelError, match=r"reward_model\.json is damaged"):
            load_reward_model(str(damaged))


@pytest.mark.parametrize("kept", [0.0, 0.5], ids=["empty", "truncated"])
def test_damaged_weights_are_one_line(kept: float, checkpoint: Path, tmp_path: Path) -> None:
    damaged = shutil.copytree(checkpoint, tmp_path / "damaged")
    weights = (damaged / "model.safetensors").read_bytes()
    (damaged / "model.safetensors").write_bytes(weights[: int(kept * len(weights))])
    with pytest.raises(ModelError, match="cannot load"):
        load_reward_model(str(damaged))


@pytest.mark.parametrize("device", ["gpu", "cuda:99", "xpu"])
def test_a_device_that_is_not_there_is_one_line(device: str, checkpoint: Path) -> None:
    with pytest.raises(ModelError, match=f"cannot be moved to {device}: choose another --device"):
        load_reward_model(str(checkpoint), device=device)


def test_a_causal_language_model_gets_a_seeded_head_and_a_pad_of_its_own(tmp_path: Path) -> None:
    folder = tiny.save_language_model(tmp_path)
    tokenizer = tiny.byte_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(folder)
    model, tokenizer = load_backbone(str(folder), chat_template="transcript", seed=3)
    assert tokenizer.pad_token_id not in (tokenizer.eos_token_id, tokenizer.bos_token_id)
    assert model.config.pad_token_id == tokenizer.pad_token_id
    assert model.score.weight.std().item() == pytest.approx(1 / 33**0.5, rel=0.4)
    assert not torch.equal(model.score.weight, torch.zeros_like(model.score.weight))
    again, _ = load_backbone(str(folder), chat_template="transcript", seed=3)
    other, _ = load_backbone(str(folder), chat_template="transcript", seed=4)
    assert torch.equal(again.score.weight, model.score.weight)
    assert not torch.equal(other.score.weight, model.score.weight)


def test_a_pad_that_is_no_token_is_none(checkpoint: Path, tmp_path: Path) -> None:
    other = shutil.copytree(checkpoint, tmp_path / "other")
    edit(other / "config.json", pad_token_id=-1)
    model = load_reward_model(str(other), device="cpu").model
    assert model.config.pad_token_id == tiny.byte_tokenizer().pad_token_id
    batch = [[0, 70, 71, 1], [0, *range(60, 80)]]
    with torch.no_grad():
        alone = [scores(model, [ids]).item() for ids in batch]
        assert scores(model, batch).tolist() == pytest.approx(alone, abs=1e-5)


def test_the_last_token_is_read_even_when_it_is_eos(tmp_path: Path) -> None:
    """With PAD = EOS the pooling would step back over a final EOS, and only then."""
    model, tokenizer = load_backbone(str(tiny.save_language_model(tmp_path)), chat_template=None, seed=0)
    model.eval()
    ids = [0, 70, 71, tokenizer.eos_token_id]
    with torch.no_grad():
        hidden = model.model(input_ids=torch.tensor([ids])).last_hidden_state
        by_hand = (hidden @ model.score.weight.T)[0, -1, 0].item()
        padded = scores(model, [ids, [0, *range(60, 80)]])[0].item()
    assert padded == pytest.approx(by_hand, abs=1e-5)


def test_an_unloaded_model_is_freed_without_a_garbage_collection(checkpoint: Path, tmp_path: Path) -> None:
    """A server keeps what it has loaded from the collector, so nothing but reference counts may have to free it."""
    ready = tmp_path / "address"
    weights: list[weakref.ref[torch.Tensor]] = []

    async def first() -> LearnedScorer:
        scorer = load(checkpoint)
        weights.extend(map(weakref.ref, scorer._forward._model.parameters()))
        return scorer

    async def swap() -> None:
        config = ServeConfig(model=str(checkpoint), port=0, ready_file=ready, device="cpu")
        serving = asyncio.create_task(serve(config, first))
        while not ready.exists():
            await asyncio.sleep(0.01)
        async with grpc.aio.insecure_channel(ready.read_text()) as channel:
            stub: Any = reward_pb2_grpc.RewardServiceStub(channel)  # type: ignore[no-untyped-call]
            admin: Any = reward_pb2_grpc.ModelAdminServiceStub(channel)  # type: ignore[no-untyped-call]
            old = (await stub.Score(score_request("a", "a" * 40))).model.version
            other = tiny.save_classifier(tmp_path / "other", seed=1)
            await admin.LoadModel(pb.LoadModelRequest(model=str(other), activate=True))
            await stub.Score(score_request("a"))
            assert all(weight() is not None for weight in weights)
            await admin.UnloadModel(pb.UnloadModelRequest(version=old))
            assert weights and not any(weight() is not None for weight in weights)
        os.kill(os.getpid(), signal.SIGTERM)
        await serving

    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    gc.disable()
    try:
        asyncio.run(swap())
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        gc.unfreeze()
        gc.enable()


def test_load_goes_back_to_a_model_that_a_full_server_holds(tmp_path: Path) -> None:
    old = tiny.save_classifier(tmp_path / "old", seed=1)
    new = tiny.save_classifier(tmp_path / "new", seed=2)

    async def scenario() -> None:
        config = ServeConfig(model=str(old), port=0, max_models=2, device="cpu")
        server = RewardServer(config)
        address = await server.start()
        try:
            await server.open(load_scorer(config))
            async with grpc.aio.insecure_channel(address) as channel:
                admin: Any = reward_pb2_grpc.ModelAdminServiceStub(channel)  # type: ignore[no-untyped-call]

                async def load(model: str) -> pb.LoadedModel:
                    answer = await admin.LoadModel(pb.LoadModelRequest(model=model, activate=True))
                    found: pb.LoadedModel = answer.model
                    return found

                await load(str(new))
                back = await load(os.path.relpath(old))
                assert (back.model.name, back.state) == (str(old), pb.MODEL_STATE_ACTIVE)
                tiny.save_classifier(new, seed=3)
                with pytest.raises(grpc.aio.AioRpcError) as failed:  # other weights under an old name
                    await load(str(new))
                assert failed.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
                assert back.model.version in str(failed.value.details())
        finally:
            await server.drain()

    asyncio.run(scenario())


def test_files_are_the_same_as_long_as_nothing_is_written(tmp_path: Path) -> None:
    folder = tiny.save_classifier(tmp_path / "rm")
    known = files_of(str(folder))
    assert known is not None and known == files_of(f"hf:{folder}")
    (folder / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    assert files_of(str(folder)) not in (None, known)
    (folder / "adapter_config.json").write_text("{}")  # what it adapts lies elsewhere
    assert files_of(str(folder)) is None
    composite = tmp_path / "both.yaml"
    composite.write_text("parts: {}")
    for name in (str(composite), str(tmp_path), "gpt2", "vllm:gpt2", "tinyworld:none", ""):
        assert files_of(name) is None

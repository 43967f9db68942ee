"""Training a reward model: what it learns, and what must not change the result."""

from __future__ import annotations

import copy
import json
import math
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

from reward_server.config import RewardModelConfig
from reward_server.loss import preference_loss
from reward_server.model import load_backbone, load_reward_model
from reward_server.train import (
    EncodedRow,
    accumulate_gradient,
    cut,
    encode,
    epoch_order,
    freeze,
    is_held_out,
    learning_rate_factor,
    optimise,
    read_split,
    run,
    score_rows,
)
from rlaif.errors import ConfigError, DataError, StorageError
from rlaif.runs import Run
from rlaif.types import PreferenceRow, user_prompt
from tests.reward_server import tiny


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_language_model(tmp_path_factory.mktemp("backbone"))


def write(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def polite_rows(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """The response with a `!` is preferred; lengths are no help."""
    rng = random.Random(seed)
    word = lambda: "".join(rng.choices("abcdefgh", k=rng.randint(2, 9)))  # noqa: E731
    return [
        {"prompt": f"{i} {word()}", "chosen": f"{word()}!", "rejected": f"{word()}."} for i in range(count)
    ]


def config(backbone: Path, dataset: Path, output_dir: Path, **changes: Any) -> RewardModelConfig:
    defaults: dict[str, Any] = {
        "model_name_or_path": str(backbone),
        "dataset": dataset,
        "output_dir": output_dir,
        "eval_fraction": 0.25,
        "learning_rate": 3e-3,
        "per_device_train_batch_size": 8,
        "chat_template": "transcript",
        "max_length": 64,
    }
    return RewardModelConfig(**{**defaults, **changes})


def test_it_learns_from_preferences_and_its_checkpoint_is_served(backbone: Path, tmp_path: Path) -> None:
    dataset = write(tmp_path / "pairs.jsonl", polite_rows(160))
    settings = config(backbone, dataset, tmp_path / "rm", num_train_epochs=6)
    run(settings)
    card = json.loads((tmp_path / "rm" / "reward_model.json").read_text())
    metrics = card["metrics"]
    assert metrics["accuracy"] > 0.9 > metrics["longer_wins"]
    assert metrics["log_loss"] < 0.5 < metrics["chance_log_loss"]
    assert metrics["pairs"] + card["train_pairs"] == 160

    model = load_reward_model(str(tmp_path / "rm"), device="cpu")
    assert model.max_length == 64
    assert (model.normalization.center, model.normalization.scale) == (card["mean"], card["std"])
    rows = [PreferenceRow(user_prompt(r["prompt"]), r["chosen"], r["rejected"]) for r in polite_rows(160)]
    trained_on = [r for r in rows if not is_held_out(r, 0.25, 0)]
    raw = score_rows(model.model, encode(trained_on, model.tokenizer, 64), 4096)
    values = torch.tensor(raw, dtype=torch.float64)
    assert (values.mean() - card["mean"]).abs() < 1e-4
    assert (values.std(unbiased=False) - card["std"]).abs() < 1e-4


def test_soft_labels_are_learnt_as_probabilities(backbone: Path, tmp_path: Path) -> None:
    """One pair labelled 0.7 over and over: the model ends at 0.7, and its loss at the entropy of the label."""
    model, tokenizer = load_backbone(str(backbone), chat_template="plain", seed=0)
    row = EncodedRow(tuple(tokenizer.encode("yes")), tuple(tokenizer.encode("no")), 0.7)
    settings = config(
        backbone,
        tmp_path,
        tmp_path / "rm",
        num_train_epochs=60,
        weight_decay=0.0,
        per_device_train_batch_size=1,
    )
    with Run.open(settings.output_dir, settings, command="train rm") as directory:
        optimise(model, [row], settings, directory)
        last = directory.metrics()[-1]["loss"]
    ((chosen, rejected),) = score_rows(model, [row], 4096)
    assert 1 / (1 + math.exp(rejected - chosen)) == pytest.approx(0.7, abs=0.01)
    assert last == pytest.approx(-0.7 * math.log(0.7) - 0.3 * math.log(0.3), abs=1e-3)


def encoded(count: int, seed: int = 0) -> list[EncodedRow]:
    rng = random.Random(seed)
    ids = lambda: tuple(rng.randint(3, 250) for _ in range(rng.randint(1, 40)))  # noqa: E731
    return [EncodedRow(ids(), ids(), rng.random()) for _ in range(count)]


def test_a_step_does_not_depend_on_its_micro_batches(backbone: Path) -> None:
    """The reference is the plain definition: the mean loss of the batch, one pair at a time without padding."""
    model, _ = load_backbone(str(backbone), chat_template="plain", seed=0)
    model.eval()
    batch = encoded(13)
    reference = copy.deepcopy(model)
    losses = [
        preference_loss(
            reference(input_ids=torch.tensor([r.chosen])).logits[:, 0],
            reference(input_ids=torch.tensor([r.rejected])).logits[:, 0],
            torch.tensor([r.chosen_prob]),
        )
        for r in batch
    ]
    expected = torch.cat(losses).mean()
    expected.backward()  # type: ignore[no-untyped-call]
    wanted = {n: p.grad for n, p in reference.named_parameters()}
    for micro_batch_tokens in (1, 100, 10_000):
        model.zero_grad()
        loss, _ = accumulate_gradient(model, batch, micro_batch_tokens)
        assert loss == pytest.approx(expected.item(), abs=1e-6)
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None
            torch.testing.assert_close(parameter.grad, wanted[name], atol=1e-6, rtol=1e-4)


def test_micro_batches_hold_each_pair_once_within_the_budget() -> None:
    rows = encoded(50)
    batches = list(cut(rows, 200))
    assert sorted(id(r) for b in batches for r in b) == sorted(map(id, rows))
    for batch in batches:
        assert 2 * len(batch) * max(r.width for r in batch) <= 200 or len(batch) == 1
    assert len(batches) < 25


class Killed(BaseException):
    """Stands for `kill -9`: nothing may be cleaned up."""


@pytest.mark.parametrize("dropout", [False, True])
def test_a_killed_run_goes_on_to_the_same_weights(tmp_path: Path, dropout: bool) -> None:
    backbone = tiny.save_language_model(tmp_path / "backbone", attention_dropout=0.3)
    dataset = write(tmp_path / "pairs.jsonl", polite_rows(60))
    whole = config(
        backbone,
        dataset,
        tmp_path / "whole",
        num_train_epochs=3,
        save_steps=4,
        logging_steps=1,
        disable_dropout=not dropout,
    )
    killed = replace(whole, output_dir=tmp_path / "killed")
    run(whole)

    model, tokenizer = load_backbone(str(backbone), chat_template="transcript", seed=0)
    training, _ = read_split(killed, tmp_path / "quarantine.jsonl")
    rows = encode(training, tokenizer, 64)

    class KilledRun(Run):
        def log(self, step: int, metrics: Any) -> None:
            super().log(step, metrics)
            if step == 10:
                raise Killed

    with pytest.raises(Killed):
        optimise(model, rows, killed, _open(KilledRun, killed))
    run(killed)

    for name in ("model.safetensors", "reward_model.json"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "killed" / name).read_bytes()
    lines = (tmp_path / "whole" / "metrics.jsonl").read_text()
    assert (tmp_path / "killed" / "metrics.jsonl").read_text() == lines
    assert not (tmp_path / "killed" / "checkpoint.pt").exists()


def _open(kind: type[Run], settings: RewardModelConfig) -> Run:
    return kind.open(settings.output_dir, settings, command="train rm")


def test_a_finished_run_is_not_repeated_and_not_overwritten(
    backbone: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dataset = write(tmp_path / "pairs.jsonl", polite_rows(40))
    settings = config(backbone, dataset, tmp_path / "rm")
    run(settings)
    before = (tmp_path / "rm" / "model.safetensors").stat().st_mtime_ns
    run(settings)
    assert "finished" in capsys.readouterr().out
    assert (tmp_path / "rm" / "model.safetensors").stat().st_mtime_ns == before
    with pytest.raises(StorageError, match="learning_rate"):
        run(replace(settings, learning_rate=1e-5))


def test_prompts_never_straddle_the_split() -> None:
    rows = [PreferenceRow(user_prompt(f"prompt {i % 50}"), f"a{i}", f"b{i}") for i in range(500)]
    sides = {r.prompt: is_held_out(r, 0.3, 7) for r in rows}
    assert all(is_held_out(r, 0.3, 7) == sides[r.prompt] for r in rows)
    many = [is_held_out(PreferenceRow(user_prompt(str(i)), "a", "b"), 0.3, 0) for i in range(2000)]
    assert 0.26 < sum(many) / 2000 < 0.34


def test_an_epoch_visits_every_pair_in_an_order_of_its_own() -> None:
    assert sorted(epoch_order(100, 0, 0)) == list(range(100))
    assert epoch_order(100, 0, 0) == epoch_order(100, 0, 0)
    assert epoch_order(100, 0, 0) != epoch_order(100, 0, 1) != epoch_order(100, 1, 0)


@pytest.mark.parametrize(("shape", "middle"), [("linear", 0.5), ("cosine", 0.5), ("constant", 1.0)])
def test_the_learning_rate_warms_up_and_decays(
    backbone: Path, tmp_path: Path, shape: str, middle: float
) -> None:
    settings = config(backbone, tmp_path, tmp_path, lr_scheduler_type=shape, warmup_ratio=0.1)
    factors = [learning_rate_factor(step, 100, settings) for step in range(101)]
    assert factors[:10] == pytest.approx([0.1 * i for i in range(1, 11)])
    assert factors[10] == 1.0
    assert factors[55] == pytest.approx(middle)
    assert factors[100] == pytest.approx(1.0 if shape == "constant" else 0.0, abs=1e-12)


def test_frozen_layers_keep_their_weights(backbone: Path, tmp_path: Path) -> None:
    dataset = write(tmp_path / "pairs.jsonl", polite_rows(40))
    run(config(backbone, dataset, tmp_path / "rm", freeze_layers=1))
    start, _ = load_backbone(str(backbone), chat_template=None, seed=0)
    trained = load_reward_model(str(tmp_path / "rm"), device="cpu").model
    before, after = start.state_dict(), trained.state_dict()
    same = {name for name in before if torch.equal(before[name], after[name])}
    assert {n for n in same if "layers" in n} == {n for n in before if "layers.0." in n}
    assert "model.embed_tokens.weight" in same
    with pytest.raises(ConfigError, match="2 layers"):
        run(config(backbone, dataset, tmp_path / "deep", freeze_layers=3))


def test_freezing_layers_of_an_encoder_freezes_its_positions_and_embedding_norm_too() -> None:
    sizes = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2}
    encoder = BertForSequenceClassification(BertConfig(**sizes, num_hidden_layers=2, num_labels=1))
    freeze(encoder, 1)
    trained = {name for name, p in encoder.named_parameters() if p.requires_grad}
    after = ("bert.encoder.layer.1.", "bert.pooler.", "classifier.")
    assert trained == {name for name, _ in encoder.named_parameters() if name.startswith(after)}


def test_data_that_cannot_be_used_is_named(backbone: Path, tmp_path: Path) -> None:
    rows = polite_rows(40)
    path = write(tmp_path / "pairs.jsonl", rows)
    path.write_text(path.read_text() + '{"prompt": "x"\n{"prompt": "no responses"}\n')
    run(config(backbone, path, tmp_path / "rm"))
    bad = (tmp_path / "rm" / "quarantine.jsonl").read_text().splitlines()
    assert [json.loads(line)["line"] for line in bad] == [41, 42]
    one = write(tmp_path / "one.jsonl", rows[:1])
    with pytest.raises(DataError, match="no pairs are held out"):
        run(config(backbone, one, tmp_path / "one"))
    with pytest.raises(DataError, match="nowhere"):
        run(config(backbone, tmp_path / "nowhere.jsonl", tmp_path / "missing"))

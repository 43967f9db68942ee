"""Training a reward model: what it learns, and what must not change the result."""

from __future__ import annotations

import copy
import json
import math
import os
import random
import signal
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
    OPTConfig,
    OPTForSequenceClassification,
    PreTrainedModel,
)

from reward_server.forward import BatchedForward
from reward_server.model import load_backbone, load_reward_model
from reward_server.training.config import RewardModelConfig
from reward_server.training.data import (
    Comparison,
    PromptUnits,
    Unit,
    by_prompt,
    cut,
    epoch_order,
    is_held_out,
    linked,
    plan_steps,
    read_split,
)
from reward_server.training.loop import accumulate_gradient, freeze, learning_rate_factor, optimise
from reward_server.training.loss import preference_loss
from reward_server.training.train import run
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
    assert metrics["accuracy"]["value"] > 0.9 > metrics["longer_wins"]
    assert metrics["log_loss"] < 0.5
    assert metrics["pairs"] + card["train_rows"] == 160
    assert "better than preferring the longer answer" in (tmp_path / "rm" / "report.md").read_text()

    model = load_reward_model(str(tmp_path / "rm"), device="cpu")
    assert model.max_length == 64
    assert (model.normalization.center, model.normalization.scale) == (card["mean"], card["std"])
    assert model.version == metrics["version"]
    rows = [PreferenceRow(user_prompt(r["prompt"]), r["chosen"], r["rejected"]) for r in polite_rows(160)]
    trained_on = [r for r in rows if not is_held_out(r, 0.25, 0)]
    prompts = by_prompt(trained_on, model.tokenizer, 64, "soft_cross_entropy")
    sequences = [ids for units in prompts for unit in units for ids in unit.sequences]
    raw, _ = BatchedForward(model.model).scores(sequences)
    assert (raw.double().mean() - card["mean"]).abs() < 1e-4
    assert (raw.double().std(unbiased=False) - card["std"]).abs() < 1e-4


def test_soft_labels_are_learnt_as_probabilities(backbone: Path, tmp_path: Path) -> None:
    """One pair labelled 0.7 over and over: the model ends at 0.7, and its loss at the entropy of the label."""
    model, tokenizer = load_backbone(str(backbone), chat_template="plain", seed=0)
    sequences = (tuple(tokenizer.encode("yes")), tuple(tokenizer.encode("no")))
    unit = Unit(sequences, (Comparison(0, 1, 0.7),))
    settings = config(
        backbone,
        tmp_path,
        tmp_path / "rm",
        num_train_epochs=60,
        weight_decay=0.0,
        per_device_train_batch_size=1,
    )
    with Run.open(settings.output_dir, settings, command="train rm") as directory:
        optimise(model, [(unit,)], settings, directory)
        last = directory.metrics()[-1]["loss"]
    chosen, rejected = BatchedForward(model).scores(sequences)[0].tolist()
    assert 1 / (1 + math.exp(rejected - chosen)) == pytest.approx(0.7, abs=0.01)
    assert last == pytest.approx(-0.7 * math.log(0.7) - 0.3 * math.log(0.3), abs=1e-3)


def units(count: int, seed: int = 0) -> list[Unit]:
    """Prompts with 2 to 5 responses of random tokens, all their pairs compared with random labels."""
    rng = random.Random(seed)
    made = []
    for _ in range(count):
        k = rng.randint(2, 5)
        sequences = tuple(tuple(rng.randint(3, 250) for _ in range(rng.randint(1, 40))) for _ in range(k))
        pairs = tuple(Comparison(i, j, rng.random()) for i in range(k) for j in range(i))
        made.append(Unit(sequences, pairs))
    return made


class Counting:
    """How many sequences a model is asked to compute."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.sequences = 0
        model.register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, _: torch.nn.Module, __: tuple[Any, ...], inputs: dict[str, Any]) -> None:
        self.sequences += len(inputs["input_ids"])


@pytest.mark.parametrize("micro_batch_tokens", [1, 100, 10_000])
def test_each_response_is_computed_once_and_the_gradient_is_that_of_pairs_one_by_one(
    backbone: Path, tmp_path: Path, micro_batch_tokens: int
) -> None:
    """The reference is the plain definition: each pair encoded and computed anew, without padding, and their mean."""
    model, _ = load_backbone(str(backbone), chat_template="plain", seed=0)
    model.eval()
    step = units(7)
    pairs = [(unit, pair) for unit in step for pair in unit.comparisons]
    reference = copy.deepcopy(model)
    losses = [
        preference_loss(
            reference(input_ids=torch.tensor([unit.sequences[pair.chosen]])).logits[:, 0],
            reference(input_ids=torch.tensor([unit.sequences[pair.rejected]])).logits[:, 0],
            torch.tensor([pair.chosen_prob]),
        )
        for unit, pair in pairs
    ]
    expected = torch.cat(losses).mean()
    expected.backward()  # type: ignore[no-untyped-call]
    wanted = {n: p.grad for n, p in reference.named_parameters()}

    counting = Counting(model)
    settings = config(backbone, tmp_path, tmp_path, micro_batch_tokens=micro_batch_tokens)
    assert accumulate_gradient(model, step, settings).loss == pytest.approx(expected.item(), abs=1e-6)
    assert counting.sequences == sum(len(unit.sequences) for unit in step) < 2 * len(pairs)
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, wanted[name], atol=1e-6, rtol=1e-4)


def test_responses_of_a_prompt_are_encoded_once_and_stay_with_those_they_are_compared_to(
    backbone: Path,
) -> None:
    _, tokenizer = load_backbone(str(backbone), chat_template="plain", seed=0)
    prompt, other = user_prompt("Q"), user_prompt("R")
    rows = [
        PreferenceRow(prompt, "a", "b", 0.9),
        PreferenceRow(other, "a", "b", 0.6),
        PreferenceRow(prompt, "d", "e", 0.8),
        PreferenceRow(prompt, "c", "b", 0.7),
    ]
    (first, second), (third,) = by_prompt(rows, tokenizer, 64, "soft_cross_entropy")
    assert [tokenizer.decode(ids) for ids in first.sequences] == [f"<s>Q{r}</s>" for r in "abc"]
    assert first.comparisons == (Comparison(0, 1, 0.9), Comparison(2, 1, 0.7))
    assert [tokenizer.decode(ids) for ids in second.sequences] == [f"<s>Q{r}</s>" for r in "de"]
    assert third.comparisons == (Comparison(0, 1, 0.6),)
    assert linked(5, [(3, 1), (4, 3)]) == [[0], [1, 3, 4], [2]]


def test_a_step_holds_whole_prompts_and_an_epoch_all_of_them() -> None:
    terms = [1, 6, 3, 10, 1, 2, 6, 1]
    steps = plan_steps(terms, 8, seed=0, epochs=2)
    for _, step in steps:
        assert sum(terms[i] for i in step) <= 8 or step == [3]
    for epoch in range(2):
        seen = [i for e, step in steps if e == epoch for i in step]
        assert seen == epoch_order(8, 0, epoch)
    assert [len(step) for _, step in plan_steps([1] * 20, 8, 0, 1)] == [8, 8, 4]


def test_micro_batches_hold_each_unit_once_within_the_budget() -> None:
    made = units(50)
    batches = list(cut(made, 400))
    assert sorted(id(u) for b in batches for u in b) == sorted(map(id, made))
    for batch in batches:
        rows = sum(len(unit.sequences) for unit in batch)
        assert rows * max(unit.width for unit in batch) <= 400 or len(batch) == 1
    assert len(batches) < 25


class Killed(BaseException):
    """Stands for `kill -9`: nothing may be cleaned up."""


def begin(settings: RewardModelConfig, set_aside: Path) -> tuple[PreTrainedModel, list[PromptUnits]]:
    """The model and the data that `run` begins with."""
    model, tokenizer = load_backbone(settings.model_name_or_path, chat_template="transcript", seed=0)
    training, _ = read_split(settings, set_aside)
    return model, by_prompt(training, tokenizer, 64, "soft_cross_entropy")


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

    model, prompts = begin(killed, tmp_path / "quarantine.jsonl")

    class KilledRun(Run):
        def log(self, step: int, metrics: Any) -> None:
            super().log(step, metrics)
            if step == 10:
                raise Killed

    with pytest.raises(Killed):
        optimise(model, prompts, killed, _open(KilledRun, killed))
    run(killed)

    for name in ("model.safetensors", "golden.json"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "killed" / name).read_bytes()
    cards = [json.loads((tmp_path / n / "reward_model.json").read_text()) for n in ("whole", "killed")]
    assert cards[0]["metrics"].pop("model") != cards[1]["metrics"].pop("model")
    assert cards[0] == cards[1]
    lines = (tmp_path / "whole" / "metrics.jsonl").read_text()
    assert (tmp_path / "killed" / "metrics.jsonl").read_text() == lines
    assert not (tmp_path / "killed" / "checkpoint.pt").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_at_a_checkpoint_and_the_run_goes_on_to_the_same_weights(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], number: signal.Signals
) -> None:
    """Long before a checkpoint is due, in the middle of an epoch, with dropout drawing from the generator."""
    backbone = tiny.save_language_model(tmp_path / "backbone", attention_dropout=0.3)
    dataset = write(tmp_path / "pairs.jsonl", polite_rows(60))
    whole = config(
        backbone, dataset, tmp_path / "whole", num_train_epochs=3, logging_steps=1, disable_dropout=False
    )
    stopped = replace(whole, output_dir=tmp_path / "stopped")
    run(whole)

    model, prompts = begin(stopped, tmp_path / "quarantine.jsonl")

    class SignalledRun(Run):
        def log(self, step: int, metrics: Any) -> None:
            super().log(step, metrics)
            if step == 8:
                os.kill(os.getpid(), number)

    handler = signal.getsignal(number)
    with _open(SignalledRun, stopped) as directory, pytest.raises(KeyboardInterrupt):
        optimise(model, prompts, stopped, directory)
    assert signal.getsignal(number) == handler
    steps = plan_steps([sum(u.terms for u in units) for units in prompts], 8, 0, 3)
    assert steps[8][0] == steps[7][0]  # no epoch ends there
    assert torch.load(stopped.output_dir / "checkpoint.pt", weights_only=True)["step"] == 8
    assert "going on" not in capsys.readouterr().out
    run(stopped)
    assert "going on from step 8\n" in capsys.readouterr().out

    for name in ("model.safetensors", "golden.json", "metrics.jsonl"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "stopped" / name).read_bytes()


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


def test_an_epoch_visits_every_prompt_in_an_order_of_its_own() -> None:
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


def test_freezing_layers_freezes_what_comes_before_them_and_no_more_wherever_it_is_kept() -> None:
    sizes = {
        "vocab_size": 60,
        "hidden_size": 16,
        "num_attention_heads": 2,
        "num_hidden_layers": 2,
        "num_labels": 1,
    }
    opt = OPTForSequenceClassification(OPTConfig(**sizes, ffn_dim=16, word_embed_proj_dim=8, pad_token_id=1))
    normed = OPTForSequenceClassification(
        OPTConfig(**sizes, ffn_dim=16, word_embed_proj_dim=16, pad_token_id=1)
    )
    relative = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_buckets": 8}
    deberta = DebertaV2ForSequenceClassification(DebertaV2Config(**sizes, intermediate_size=16, **relative))
    after = {
        opt: (
            "model.decoder.layers.1.",
            "model.decoder.final_layer_norm.",
            "model.decoder.project_out.",
            "score.",
        ),
        normed: ("model.decoder.layers.1.", "model.decoder.final_layer_norm.", "score."),
        deberta: ("deberta.encoder.layer.1.", "pooler.", "classifier."),
    }
    for model, names in after.items():
        freeze(model.eval(), 1)
        trained = {name for name, p in model.named_parameters() if p.requires_grad}
        assert trained == {name for name, _ in model.named_parameters() if name.startswith(names)}
        assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


def test_data_that_cannot_be_used_is_named(backbone: Path, tmp_path: Path) -> None:
    rows = polite_rows(40)
    path = write(tmp_path / "pairs.jsonl", rows)
    path.write_text(path.read_text() + '{"prompt": "x"\n{"prompt": "no responses"}\n')
    run(config(backbone, path, tmp_path / "rm"))
    bad = (tmp_path / "rm" / "quarantine.jsonl").read_text().splitlines()
    assert [json.loads(line)["line"] for line in bad] == [41, 42]
    one = write(tmp_path / "one.jsonl", rows[:1])
    with pytest.raises(DataError, match="no prompts are held out"):
        run(config(backbone, one, tmp_path / "one"))
    with pytest.raises(DataError, match="nowhere"):
        run(config(backbone, tmp_path / "nowhere.jsonl", tmp_path / "missing"))

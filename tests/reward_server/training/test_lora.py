"""LoRA: what is trained, what comes out, and going on after a kill."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification, BertConfig, BertForSequenceClassification

from reward_server.model import load_backbone
from reward_server.training.data import by_prompt, read_split
from reward_server.training.loop import optimise
from reward_server.training.lora import add_adapters
from reward_server.training.train import run
from rlaif.errors import ConfigError
from rlaif.runs import Run
from tests.reward_server import tiny
from tests.reward_server.training.test_train import Killed, config, polite_rows, write

pytest.importorskip("peft")


def test_a_merged_checkpoint_is_an_ordinary_one_and_a_killed_run_goes_on_to_it(tmp_path: Path) -> None:
    backbone = tiny.save_language_model(tmp_path / "backbone")
    dataset = write(tmp_path / "pairs.jsonl", polite_rows(100))
    whole = config(
        backbone, dataset, tmp_path / "whole", use_peft=True, lora_r=4, num_train_epochs=6, save_steps=3
    )
    whole = replace(whole, learning_rate=1e-2, logging_steps=1)
    run(whole)
    card = json.loads((tmp_path / "whole" / "reward_model.json").read_text())
    assert card["metrics"]["accuracy"]["value"] > 0.9

    start, _ = load_backbone(str(backbone), chat_template=None, seed=0)
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "whole")
    before, after = start.state_dict(), plain.state_dict()
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert {name.split(".")[-2] for name in changed} == {"q_proj", "v_proj", "score"}
    for name in changed - {"score.weight"}:
        assert torch.linalg.matrix_rank(after[name] - before[name], tol=1e-4) <= 4

    killed = replace(whole, output_dir=tmp_path / "killed")
    model, tokenizer = load_backbone(str(backbone), chat_template="transcript", seed=0)
    prompts = by_prompt(read_split(killed, tmp_path / "q")[0], tokenizer, 64, "soft_cross_entropy")
    add_adapters(model, killed)

    class KilledRun(Run):
        def log(self, step: int, metrics: object) -> None:
            if step == 8:
                raise Killed

    with pytest.raises(Killed):
        optimise(model, prompts, killed, KilledRun.open(killed.output_dir, killed, command="train rm"))
    small = (tmp_path / "killed" / "checkpoint.pt").stat().st_size
    assert small < (backbone / "model.safetensors").stat().st_size  # adapters and head alone
    run(killed)
    for name in ("model.safetensors", "golden.json"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "killed" / name).read_bytes()


def test_an_encoders_new_pooler_and_head_are_trained_whole() -> None:
    sizes = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2}
    encoder = BertForSequenceClassification(BertConfig(**sizes, num_hidden_layers=1, num_labels=1))
    settings = config(Path(), Path(), Path(), use_peft=True)
    names = {n for n, _ in encoder.named_parameters()}
    adapted = add_adapters(encoder, settings)
    trained = {n for n, p in encoder.named_parameters() if p.requires_grad and "lora_" not in n}
    assert {n.split(".modules_to_save")[0] for n in trained} == {"classifier", "bert.pooler"}
    adapted.merge_and_unload()
    assert {n for n, _ in encoder.named_parameters()} == names


def test_what_cannot_be_adapted_is_said_in_a_line(tmp_path: Path) -> None:
    model, _ = load_backbone(str(tiny.save_language_model(tmp_path)), chat_template=None, seed=0)
    with pytest.raises(ConfigError, match="LoRA cannot be applied to nothere: "):
        add_adapters(model, config(Path(), Path(), Path(), use_peft=True, lora_target_modules=("nothere",)))
    with pytest.raises(ConfigError, match="--no_disable_dropout"):
        config(Path(), Path(), Path(), use_peft=True, lora_dropout=0.1)
    with pytest.raises(ConfigError, match="--lora_target_modules needs --use_peft"):
        config(Path(), Path(), Path(), lora_target_modules=("q_proj",))
    with pytest.raises(ConfigError, match="--freeze_layers"):
        config(Path(), Path(), Path(), use_peft=True, freeze_layers=1)

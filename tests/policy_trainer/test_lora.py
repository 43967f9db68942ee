"""Models with adapters as files: what was trained is what is read back, whoever wrote it and whoever reads it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from policy_trainer import sft
from policy_trainer.config import SFTConfig
from policy_trainer.models import load_policy, load_trained
from rlaif.errors import ModelError
from tests.policy_trainer import tiny

IDS = torch.arange(4, 28).view(2, 12)


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(IDS).logits
        return found


def first_loss(config: SFTConfig) -> float:
    return float(json.loads((config.output_dir / "metrics.jsonl").read_text().splitlines()[0])["loss"])


def tuned(folder: Path, policy: Path) -> SFTConfig:
    """A run of one step over the whole dataset that has trained adapters to `policy`; its checkpoint holds them."""
    rows = [{"prompt": f"w{i}", "completion": f"w{i + 1} w{i % 5}"} for i in range(20)]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = SFTConfig(
        model_name_or_path=str(policy),
        dataset=folder / "data.jsonl",
        output_dir=folder / "run",
        per_device_train_batch_size=20,
        num_train_epochs=1,
        use_peft=True,
        learning_rate=0.1,
    )
    sft.run(config)
    return config


def save_policy_without_pad(folder: Path) -> Path:
    """Its tokenizer has nothing that could be PAD, so one is added, and a row of the embedding with it."""
    tiny.save_policy(folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    del settings["pad_token"], settings["unk_token"]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    vocabulary = folder / "tokenizer.json"
    vocabulary.write_text(vocabulary.read_text().replace("<pad>", "<nothing>"))
    return folder


def test_a_checkpoint_with_adapters_is_a_policy_like_any_other(tmp_path: Path) -> None:
    config = tuned(tmp_path, tiny.save_policy(tmp_path / "policy"))
    checkpoint = config.output_dir / "checkpoint-000001"
    loaded = load_policy(str(checkpoint))
    assert_close(logits(loaded.model), logits(AutoModelForCausalLM.from_pretrained(checkpoint)))
    assert (logits(loaded.model) - logits(load_policy(config.model_name_or_path).model)).abs().max() > 0.1
    assert len(loaded.tokenizer) == len(tiny.VOCABULARY)
    # It is trained further, and begins where the adapters ended, whatever is trained.
    losses = []
    for name, start, adapters in (
        ("merged", config.output_dir, False),
        ("all", checkpoint, False),
        ("adapters", checkpoint, True),
    ):
        further = dataclasses.replace(
            config, model_name_or_path=str(start), output_dir=tmp_path / name, use_peft=adapters
        )
        sft.run(further)
        losses.append(first_loss(further))
        assert (logits(load_policy(str(further.output_dir)).model) - logits(loaded.model)).abs().max() > 0.1
    assert losses == pytest.approx([losses[0]] * 3, abs=1e-5)


def test_adapters_to_a_model_with_adapters_keep_both(tmp_path: Path) -> None:
    config = tuned(tmp_path, tiny.save_policy(tmp_path / "policy"))
    checkpoint = config.output_dir / "checkpoint-000001"
    further = dataclasses.replace(config, model_name_or_path=str(checkpoint), output_dir=tmp_path / "further")
    begun = load_trained(further, None)
    expected = logits(AutoModelForCausalLM.from_pretrained(checkpoint))
    assert_close(logits(begun.model), expected)
    assert_close(logits(begun.base), expected)  # what KL is measured against
    sft.run(further)
    saved = logits(AutoModelForCausalLM.from_pretrained(further.output_dir))
    assert_close(logits(load_policy(str(further.output_dir / "checkpoint-000001")).model), saved)


def test_a_checkpoint_with_adapters_and_an_added_pad_loads(tmp_path: Path) -> None:
    config = tuned(tmp_path, save_policy_without_pad(tmp_path / "policy"))
    loaded = load_policy(str(config.output_dir / "checkpoint-000001"))
    assert loaded.model.get_input_embeddings().weight.shape[0] == len(tiny.VOCABULARY) + 1
    assert_close(logits(loaded.model), logits(AutoModelForCausalLM.from_pretrained(config.output_dir)))


def test_adapters_whose_model_is_gone_are_one_clear_line(tmp_path: Path) -> None:
    config = tuned(tmp_path, tiny.save_policy(tmp_path / "policy"))
    (tmp_path / "policy").rename(tmp_path / "moved")
    with pytest.raises(ModelError, match=r"adapters to another model: there is no folder .*policy") as caught:
        load_policy(str(config.output_dir / "checkpoint-000001"))
    assert "\n" not in str(caught.value)

"""Models with adapters as files: what was trained is what is read back, whoever wrote it and whoever reads it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.testing import assert_close
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM

from policy_trainer import sft
from policy_trainer.config import SFTConfig
from policy_trainer.models import load_policy, load_trained
from policy_trainer.vllm_rollout import save_weights
from rlaif.errors import ConfigError, ModelError
from tests.policy_trainer import tiny

IDS = torch.arange(4, 28).view(2, 12)
_WIDTH = {
    "vocab_size": len(tiny.VOCABULARY),
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "initializer_range": 0.3,
}
_EXPERTS = {"mixtral": "num_local_experts", "qwen3_moe": "num_experts"}


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(IDS).logits
        return found


def draw_adapters(model: torch.nn.Module) -> None:
    """As after training: adapters begin at 0."""
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)


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


# ---- shared weights ----


def save_tied_policy(folder: Path) -> Path:
    config = tiny.model().config
    config.tie_word_embeddings = True
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
def test_adapters_to_one_use_of_a_shared_weight_are_refused(tmp_path: Path, target: str) -> None:
    policy = save_tied_policy(tmp_path / "policy")
    config = tiny.ppo_config(tmp_path, use_peft=True, lora_target_modules=("q_proj", target))
    with pytest.raises(ConfigError, match="share their weight"):
        load_trained(config, None)
    # Those that somebody else has trained cannot be merged either.
    adapters = LoraConfig(task_type="CAUSAL_LM", target_modules=[target])
    get_peft_model(AutoModelForCausalLM.from_pretrained(policy), adapters).save_pretrained(
        tmp_path / "theirs"
    )
    tiny.tokenizer().save_pretrained(tmp_path / "theirs")
    with pytest.raises(ConfigError, match="share their weight"):
        load_policy(str(tmp_path / "theirs"))


@pytest.mark.parametrize(
    ("tied", "targets"), [(True, ("q_proj",)), (True, ("all-linear",)), (False, ("embed_tokens", "lm_head"))]
)
def test_other_adapters_are_merged_into_what_was_trained(
    tmp_path: Path, tied: bool, targets: tuple[str, ...]
) -> None:
    (save_tied_policy if tied else tiny.save_policy)(tmp_path / "policy")
    trained = load_trained(tiny.ppo_config(tmp_path, use_peft=True, lora_target_modules=targets), None)
    draw_adapters(trained.model)
    expected = logits(trained.model)
    assert (expected - logits(trained.base)).abs().max() > 0.1
    assert_close(logits(trained.merged()), expected, atol=1e-4, rtol=1e-4)


# ---- weights for vLLM ----


@pytest.mark.parametrize("kind", ["llama", "mixtral", "qwen3_moe"])
def test_the_weights_that_vllm_gets_have_the_adapters_in_them(tmp_path: Path, kind: str) -> None:
    """peft gives fused experts an adapter for each of their two parameters, one around the other."""
    config = AutoConfig.for_model(
        kind,
        **_WIDTH,
        **(
            {}
            if kind == "llama"
            else {"moe_intermediate_size": 8, "num_experts_per_tok": 2, _EXPERTS[kind]: 4}
        ),
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "policy")
    tiny.tokenizer().save_pretrained(tmp_path / "policy")
    settings = tiny.ppo_config(tmp_path, use_peft=True, lora_target_modules=("all-linear",))
    trained = load_trained(settings, None)
    draw_adapters(trained.model)
    assert (logits(trained.model) - logits(trained.base)).abs().max() > 0.1
    save_weights(trained.model, tmp_path / "weights")
    written = AutoModelForCausalLM.from_pretrained(tmp_path / "weights")
    assert_close(logits(written), logits(trained.model), atol=1e-4, rtol=1e-4)

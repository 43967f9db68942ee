from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import LlamaForSequenceClassification, OPTConfig, OPTForCausalLM

from policy_trainer import ppo, sft
from policy_trainer.batching import collate
from policy_trainer.config import PPOConfig, SFTConfig
from policy_trainer.logprobs import token_logprobs
from policy_trainer.models import (
    ActorCritic,
    build_critic,
    build_value_head,
    eos_token_ids,
    fingerprint,
    load_policy,
)
from policy_trainer.optim import lr_factor, shuffled_stream
from policy_trainer.reward_source import FunctionReward
from rlaif.errors import ConfigError, DataError, ModelError
from tests.policy_trainer import tiny


def save_reward_model(
    folder: Path, *, vocab_size: int = len(tiny.VOCABULARY)
) -> LlamaForSequenceClassification:
    torch.manual_seed(5)
    config = tiny.model().config
    config.num_labels, config.vocab_size = 1, vocab_size
    rm = LlamaForSequenceClassification(config).eval()
    rm.save_pretrained(folder)
    (folder / "reward_model.json").write_text(json.dumps({"mean": 0.5, "std": 2.0}))
    return rm


def test_a_critic_from_the_policy_starts_at_0_and_shares_no_weight() -> None:
    policy = tiny.model()
    critic = build_critic(policy, "policy")
    batch = collate([[1, 5, 6]], [[7, 8, 2]])
    assert critic(batch.input_ids, batch.attention_mask, batch.response_len).tolist() == [[0.0, 0.0, 0.0]]
    with torch.no_grad():
        for p in critic.parameters():
            p.add_(1.0)
    assert fingerprint(policy) == fingerprint(tiny.model())


def test_a_critic_from_a_reward_model_values_a_whole_response_as_the_server_rewards_it(
    tmp_path: Path,
) -> None:
    """V before token t is the normalised reward of what came before it; so V after the EOS would be the reward."""
    rm = save_reward_model(tmp_path)
    critic = build_critic(tiny.model(), str(tmp_path))
    ids = [1, 5, 6, 7, 8, 2]
    with torch.no_grad():
        raw = rm(torch.tensor([ids])).logits[0, 0]
        # One more token makes the state after the EOS the one from which it would be sampled.
        batch = collate([ids[:3]], [[*ids[3:], 9]])
        values = critic(batch.input_ids, batch.attention_mask, batch.response_len)
    assert values[0, -1].item() == pytest.approx((raw.item() - 0.5) / 2.0, abs=1e-5)


def test_values_are_read_from_a_trunk_whose_output_is_narrower_than_its_layers() -> None:
    """OPT-350m: 24 layers of width 1024, and an output of width 512."""
    config = OPTConfig(
        vocab_size=30, hidden_size=16, ffn_dim=32, num_hidden_layers=1, num_attention_heads=2,
        word_embed_proj_dim=8, do_layer_norm_before=False,
    )  # fmt: skip
    policy = OPTForCausalLM(config).eval()
    batch = collate([[1, 5, 6]], [[7, 8, 2]])
    for model in (build_critic(policy, "policy"), ActorCritic(policy, build_value_head(policy))):
        read = model.values if isinstance(model, ActorCritic) else model
        values = read(batch.input_ids, batch.attention_mask, batch.response_len)
        assert values is not None and values.tolist() == [[0.0, 0.0, 0.0]]


def test_a_reward_model_with_another_vocabulary_cannot_be_a_critic(tmp_path: Path) -> None:
    save_reward_model(tmp_path, vocab_size=99)
    with pytest.raises(ModelError, match="reads 99 token ids"):
        build_critic(tiny.model(), str(tmp_path))


def test_an_unknown_model_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="cannot load") as caught:
        load_policy(str(tmp_path))  # an empty folder
    assert "\n" not in str(caught.value)


def test_a_model_without_a_head_over_the_vocabulary_is_no_policy(tmp_path: Path) -> None:
    """A random one would be trained."""
    tiny.save_policy(tmp_path)
    tiny.model().model.save_pretrained(tmp_path)
    with pytest.raises(
        ModelError, match=r"no causal language model: it lacks weights, such as lm_head\.weight"
    ):
        load_policy(str(tmp_path))


@pytest.mark.parametrize("tied", [False, True])
def test_a_reward_model_is_no_policy(tied: bool, tmp_path: Path) -> None:
    """With tied embeddings it would sample, as no weight is missing."""
    tiny.save_policy(tmp_path)
    config = tiny.model().config
    config.num_labels, config.tie_word_embeddings = 1, tied
    LlamaForSequenceClassification(config).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="is a reward model and no policy") as caught:
        load_policy(str(tmp_path))
    assert "\n" not in str(caught.value)


def test_a_folder_with_the_card_of_a_reward_model_is_no_policy(tmp_path: Path) -> None:
    """Whatever its architecture is called."""
    tiny.save_policy(tmp_path)
    (tmp_path / "reward_model.json").write_text("{}")
    with pytest.raises(ModelError, match="is a reward model and no policy"):
        load_policy(str(tmp_path))


def test_a_pad_beyond_the_embedding_gets_a_row_and_policies_stay_equal(tmp_path: Path) -> None:
    folder = tiny.save_policy(tmp_path)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    vocabulary = json.loads((folder / "tokenizer.json").read_text())
    for name in ("pad_token", "unk_token"):
        settings.pop(name, None)
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    renamed = json.dumps(vocabulary).replace("<pad>", "<nothing>")
    (folder / "tokenizer.json").write_text(renamed)
    policy, tokenizer = load_policy(str(folder))
    assert tokenizer.pad_token_id not in (None, tokenizer.eos_token_id)
    assert policy.get_input_embeddings().weight.shape[0] >= len(tokenizer)
    assert fingerprint(policy) == fingerprint(load_policy(str(folder)).model)


def test_fingerprints_tell_weights_apart() -> None:
    assert fingerprint(tiny.model()) == fingerprint(tiny.model()) != fingerprint(tiny.model(seed=1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"rollout_batch_size": 1}, "rollout_batch_size must be at least 2"),
        ({"num_mini_batches": 9}, "num_mini_batches must be between"),
        ({"value_head": "shared", "critic_init": "rm"}, "critic_init"),
        ({"max_missing_rewards": 1.0}, "max_missing_rewards"),
        ({"advantage_estimator": "rloo"}, "num_generations must be at least 2"),
        ({"advantage_estimator": "reinforce", "critic_warmup_steps": 1}, "has no critic"),
        ({"advantage_estimator": "grpo", "num_generations": 2, "whiten_rewards": True}, "whiten_rewards"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_settings_that_cannot_work_are_refused(
    tmp_path: Path, change: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        PPOConfig(
            **{  # type: ignore[arg-type]
                "model_name_or_path": "x",
                "dataset": tmp_path,
                "output_dir": tmp_path,
                "reward_server": "h:1",
                "rollout_batch_size": 8,
                **change,
            }
        )


def test_learning_rate_schedules_by_hand() -> None:
    assert [lr_factor("linear", s, 6, 2) for s in range(6)] == [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]
    assert [lr_factor("constant", s, 6, 2) for s in range(6)] == [0.5, 1.0, 1.0, 1.0, 1.0, 1.0]
    assert lr_factor("cosine", 2, 4) == pytest.approx(0.5)


def test_the_stream_of_prompts_is_the_same_however_it_is_read() -> None:
    whole = shuffled_stream(7, seed=3, start=0, count=28)
    assert [i for s in range(0, 28, 4) for i in shuffled_stream(7, seed=3, start=s, count=4)] == whole
    for epoch in range(4):
        assert sorted(whole[7 * epoch : 7 * epoch + 7]) == list(range(7))
    assert whole[:7] != whole[7:14]


# ---- supervised fine-tuning ----


def sft_config(folder: Path, **changes: object) -> SFTConfig:
    if not (folder / "policy").exists():
        tiny.save_policy(folder / "policy")
    data = folder / "data.jsonl"
    if not data.exists():
        rows = [
            {"prompt": f"w{i % 6}", "completion": " ".join([f"w{i % 6}"] * (1 + i % 5))} for i in range(24)
        ]
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {
        "model_name_or_path": str(folder / "policy"),
        "dataset": data,
        "output_dir": folder / "run",
        "per_device_train_batch_size": 8,
        "learning_rate": 1e-2,
        "num_train_epochs": 8,
    }
    return SFTConfig(**{**settings, **changes})  # type: ignore[arg-type]


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_fine_tuning_learns_responses_and_their_end(tmp_path: Path) -> None:
    config = sft_config(tmp_path)
    sft.run(config)
    found = losses(config.output_dir)
    assert found[-1] < 0.5 * found[0]
    policy, _ = load_policy(str(config.output_dir))
    batch = collate([[1, 4, 8, 5]], [[8, 2]])  # <bos> <user> w2 <assistant> | w2 <eos>
    trained = token_logprobs(policy, batch.input_ids, batch.attention_mask, 2, 1.0).logprobs
    before = token_logprobs(tiny.model(), batch.input_ids, batch.attention_mask, 2, 1.0).logprobs
    assert (trained > before + 0.5).all()


def test_the_first_loss_is_the_mean_over_response_tokens_of_the_whole_step(tmp_path: Path) -> None:
    config = sft_config(tmp_path, per_device_train_batch_size=24, num_train_epochs=1)
    sft.run(config)
    policy, tokenizer = load_policy(config.model_name_or_path)
    total, tokens = 0.0, 0
    for line in config.dataset.read_text().splitlines():
        row = json.loads(line)
        prompt = tokenizer(f"<bos> <user> {row['prompt']} <assistant>", add_special_tokens=False)["input_ids"]
        answer = tokenizer(f"{row['completion']} <eos>", add_special_tokens=False)["input_ids"]
        labels = torch.tensor([[-100] * len(prompt) + answer])
        with torch.no_grad():
            total += policy(torch.tensor([prompt + answer]), labels=labels).loss.item() * len(answer)
        tokens += len(answer)
    assert losses(config.output_dir)[0] == pytest.approx(total / tokens, abs=1e-5)


def test_fine_tuning_does_not_depend_on_micro_batches(tmp_path: Path) -> None:
    runs = []
    for tokens in (10, 8192):
        config = sft_config(
            tmp_path, micro_batch_tokens=tokens, output_dir=tmp_path / str(tokens), num_train_epochs=2
        )
        sft.run(config)
        runs.append(losses(config.output_dir))
    assert runs[0] == pytest.approx(runs[1], abs=1e-4)


def test_the_chosen_side_of_pairs_can_be_learned_from(tmp_path: Path) -> None:
    data = tmp_path / "pairs.jsonl"
    data.write_text(json.dumps({"prompt": "w1", "chosen": "w2", "rejected": "w3"}) + "\n")
    config = sft_config(tmp_path, dataset=data)
    (example,) = sft.load_examples(config, tiny.tokenizer())
    assert tiny.tokenizer().decode(example.response_ids) == "w2 <eos>"


def test_a_conversation_that_the_template_refuses_is_set_aside_with_its_line(tmp_path: Path) -> None:
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system turns here') }}{% endif %}"
        + tiny.TEMPLATE
    )
    answer = {"role": "assistant", "content": "w2"}
    rows = [
        {"messages": [{"role": "user", "content": "w1"}, answer]},
        {"messages": [{"role": "system", "content": "w3"}, {"role": "user", "content": "w1"}, answer]},
        {"messages": [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2 " * 20}]},
    ]
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = sft_config(tmp_path, dataset=data, max_length=12)
    assert len(sft.load_examples(config, tokenizer)) == 1
    aside = [json.loads(line) for line in (config.output_dir / "quarantine.jsonl").read_text().splitlines()]
    assert [row["line"] for row in aside] == [2, 3]
    assert "no system turns here" in aside[0]["reason"] and "max_length 12" in aside[1]["reason"]


def test_responses_that_are_learned_end_where_generation_would(tmp_path: Path) -> None:
    """A turn ends with <unk>, which the generation config names, and the template writes on after it."""
    folder = tiny.save_policy(tmp_path / "policy")
    generation = folder / "generation_config.json"
    generation.write_text(json.dumps({**json.loads(generation.read_text()), "eos_token_id": [2, 3]}))
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = tiny.TEMPLATE.replace("eos_token", "'<unk> w0'")
    tokenizer.save_pretrained(folder)
    config = sft_config(tmp_path, num_train_epochs=1, per_device_train_batch_size=24)
    sft.run(config)
    (row,) = (config.output_dir / "metrics.jsonl").read_text().splitlines()
    assert json.loads(row)["num_tokens"] == sum(1 + i % 5 + 1 for i in range(24))  # the words and <unk>
    mixed = tiny.ppo_config(tmp_path, ptx_dataset=config.dataset, output_dir=tmp_path / "ppo")
    trainer = ppo.Trainer.start(mixed, FunctionReward(tiny.share_of_w0))
    assert trainer.text is not None
    assert [e.response_ids.index(3) for e in trainer.text.examples] == [
        len(e.response_ids) - 1 for e in trainer.text.examples
    ]


def test_a_conversation_that_is_too_long_is_set_aside_with_its_reason(tmp_path: Path) -> None:
    config = sft_config(tmp_path, max_length=8)
    kept = sft.load_examples(config, tiny.tokenizer())
    quarantined = (config.output_dir / "quarantine.jsonl").read_text().splitlines()
    assert len(kept) + len(quarantined) == 24 and quarantined
    assert "max_length 8" in quarantined[0]
    with pytest.raises(DataError, match="longer than max_length 4 tokens"):
        sft.load_examples(sft_config(tmp_path, max_length=4), tiny.tokenizer())


# ---- tokens that end a response ----


@pytest.mark.parametrize(
    ("configured", "expected"), [(None, (2,)), (2, (2,)), (3, (3, 2)), ([2, 0], (2, 0)), ([3, 0], (3, 0, 2))]
)
def test_a_response_ends_at_every_eos_of_the_generation_config_and_at_the_tokenizers(
    configured: int | list[int] | None, expected: tuple[int, ...]
) -> None:
    """A base model that was taught a chat template keeps its own EOS there, and its answers end with the template's."""
    model = tiny.model()
    model.generation_config.eos_token_id = configured
    assert eos_token_ids(model, tiny.tokenizer()) == expected


def test_a_model_whose_responses_could_never_end_is_refused() -> None:
    model, tokenizer = tiny.model(), tiny.tokenizer()
    model.generation_config.eos_token_id = tokenizer.eos_token = None
    with pytest.raises(ModelError, match="no EOS token"):
        eos_token_ids(model, tokenizer)


# ---- references ----


def test_a_reference_with_other_tokens_under_the_same_ids_is_refused(tmp_path: Path) -> None:
    folder = tiny.save_policy(tmp_path / "reference")
    file = folder / "tokenizer.json"
    file.write_text(file.read_text().replace('"w1"', '"x1"'))
    config = tiny.ppo_config(tmp_path, ref_model=str(folder))
    with pytest.raises(ModelError, match="different vocabularies"):
        ppo.Trainer.start(config, FunctionReward(tiny.share_of_w0))


@pytest.mark.parametrize(("template", "warnings"), [("transcript", 0), (None, 1)], ids=["given", "none"])
def test_a_missing_chat_template_is_the_policys_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], template: str | None, warnings: int
) -> None:
    """A reference reads the ids that the policy's template made."""
    config = tiny.ppo_config(tmp_path, chat_template=template)
    (Path(config.model_name_or_path) / "chat_template.jinja").unlink()
    ppo.Trainer.start(config, FunctionReward(tiny.share_of_w0))
    assert capsys.readouterr().err.count("has no chat template") == warnings


def test_a_reference_may_have_rows_that_no_token_has(tmp_path: Path) -> None:
    """Embeddings are padded to round numbers, and models of one family to different ones."""
    folder = tiny.save_policy(tmp_path / "reference")
    wider = tiny.model()
    wider.resize_token_embeddings(64)
    wider.save_pretrained(folder)
    config = tiny.ppo_config(tmp_path, ref_model=str(folder))
    trainer = ppo.Trainer.start(config, FunctionReward(tiny.share_of_w0))
    assert trainer.reference.get_output_embeddings().weight.shape[0] == 64

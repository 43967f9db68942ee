"""Scores do not depend on the batch: whatever is computed together, each is that of transformers for it alone."""

from __future__ import annotations

from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    LlamaForSequenceClassification,
    MistralConfig,
    MistralForSequenceClassification,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForSequenceClassification,
)

from reward_server.forward import BatchedForward
from reward_server.padding_free import attention_forward, bounds
from reward_server.passes import pad
from reward_server.plan import Costs, Group, common_prefix, families, plan
from tests.reward_server import tiny

CHEAP = Costs(overhead=2, best_tokens=64)
"""A device on which sharing and splitting pay for the shortest sequences."""

SMALL = {
    "vocab_size": 259,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "pad_token_id": 2,
    "num_labels": 1,
}


def spread_out(model: PreTrainedModel) -> PreTrainedModel:
    """Scores of order 1, so that a wrong one shows."""
    for name, parameter in model.named_parameters():
        if name in ("score.weight", "classifier.weight"):
            torch.nn.init.normal_(parameter)
    return model.eval()  # type: ignore[no-untyped-call]


def llama(**changes: object) -> PreTrainedModel:
    torch.manual_seed(0)
    return spread_out(LlamaForSequenceClassification(tiny.config(num_labels=1, **changes)))


def qwen3() -> PreTrainedModel:
    torch.manual_seed(0)
    return spread_out(
        Qwen3ForSequenceClassification(Qwen3Config(**SMALL, num_key_value_heads=1, head_dim=16))
    )


def bert() -> PreTrainedModel:
    torch.manual_seed(0)
    return spread_out(BertForSequenceClassification(BertConfig(**SMALL, max_position_embeddings=128)))


def sliding() -> PreTrainedModel:
    torch.manual_seed(0)
    config = MistralConfig(**SMALL, num_key_value_heads=2, sliding_window=8)
    return spread_out(MistralForSequenceClassification(config))


def gpt2() -> PreTrainedModel:
    """Learned positions, which a row of several sequences begins anew."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=259, n_embd=32, n_layer=2, n_head=2, n_positions=128, pad_token_id=2, num_labels=1
    )
    return spread_out(GPT2ForSequenceClassification(config))


def eager() -> PreTrainedModel:
    """Without the attention of PyTorch, sequences stay in rows of their own."""
    return llama(attn_implementation="eager")


MODELS = {"llama": llama, "qwen3": qwen3, "gpt2": gpt2, "eager": eager, "bert": bert, "sliding": sliding}


@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    made: PreTrainedModel = MODELS[request.param]()
    return made


def alone(model: PreTrainedModel, ids: tuple[int, ...]) -> float:
    with torch.no_grad():
        logits: Tensor = model(input_ids=torch.tensor([ids])).logits
    return logits.item()


token = st.integers(3, 258)
texts = st.lists(token, min_size=1, max_size=40).map(tuple)
pieces = st.lists(token, min_size=0, max_size=25).map(tuple)


@st.composite
def batches(draw: st.DrawFn) -> list[tuple[int, ...]]:
    """Sequences of any lengths, some of which begin alike, with prefixes inside prefixes and copies."""
    batch = draw(st.lists(texts, max_size=5))
    for _ in range(draw(st.integers(0, 3))):
        parts = draw(st.lists(pieces, min_size=1, max_size=3))
        for prefix in accumulate(parts):
            ends = draw(st.lists(texts, max_size=4))
            batch += [prefix + end for end in ends]
    if batch and draw(st.booleans()):
        batch.append(batch[0])
    return draw(st.permutations(batch)) or [draw(texts)]


@settings(max_examples=60, deadline=None)
@given(batch=batches())
def test_scores_are_those_of_each_sequence_alone(
    model: PreTrainedModel, batch: list[tuple[int, ...]]
) -> None:
    raw, cached = BatchedForward(model, CHEAP).scores(batch)
    assert raw.tolist() == pytest.approx([alone(model, ids) for ids in batch], abs=1e-5)
    assert all(0 <= saved < len(ids) for saved, ids in zip(cached, batch, strict=True))


@settings(max_examples=200, deadline=None)
@given(batch=batches(), share=st.booleans(), pads=st.booleans())
def test_every_sequence_is_in_one_pass_and_a_group_begins_alike(
    batch: list[tuple[int, ...]], share: bool, pads: bool
) -> None:
    groups = plan(batch, CHEAP, share=share, pads=pads, pad_id=2)
    assert sorted(i for g in groups for rows in g.passes for i in rows) == list(range(len(batch)))
    for group in groups:
        prefixes = {batch[i][: group.prefix] for rows in group.passes for i in rows}
        assert group.prefix == 0 or (share and len(prefixes) == 1)
        assert all(len(batch[i]) > group.prefix for rows in group.passes for i in rows)
    computed = sum(g.tokens(batch) for g in groups)
    passes = sum(len(g.passes) + bool(g.prefix) for g in groups)
    one = Group(0, (tuple(range(len(batch))),), pads).tokens(batch)
    if one <= CHEAP.best_tokens:
        assert computed + passes * CHEAP.overhead <= one + CHEAP.overhead


def test_only_causal_models_with_full_attention_share_prefixes() -> None:
    shares = {name: BatchedForward(make()).shares_prefixes for name, make in MODELS.items()}
    assert shares == {
        "llama": True, "qwen3": True, "gpt2": True, "eager": True, "bert": False, "sliding": False
    }  # fmt: skip
    stretched = llama(rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0})
    assert not BatchedForward(stretched).shares_prefixes


def test_causal_models_with_the_attention_of_pytorch_compute_no_padding() -> None:
    pads = {name: BatchedForward(make()).pads for name, make in MODELS.items()}
    assert pads == {
        "llama": False, "qwen3": False, "gpt2": False, "eager": True, "bert": True, "sliding": True
    }  # fmt: skip
    model = llama()
    batch = [tuple(range(3, 3 + n)) for n in (5, 60, 11)]
    assert BatchedForward(model).tokens(batch) == 76
    with torch.no_grad():
        padded, mask = pad(batch, 2)
        logits = model(input_ids=padded, attention_mask=mask).logits
    assert logits.squeeze(-1).tolist() == pytest.approx([alone(model, ids) for ids in batch], abs=1e-5), (
        "the model can be used in other ways as before"
    )


def test_the_last_layer_is_computed_for_the_tokens_that_are_read_and_left_as_it_was() -> None:
    model = llama()
    names = list(model.state_dict())
    forward = BatchedForward(model)
    seen: dict[str, list[int]] = {}
    for name, module in model.named_modules():
        if name.endswith((".mlp", ".q_proj", ".k_proj", ".o_proj")):
            note = seen.setdefault(name.removeprefix("model.layers."), [])
            module.register_forward_pre_hook(lambda _, args, note=note: note.append(args[0].shape[1]))
    forward.scores([(*range(3, 8), 2), tuple(range(9, 69)), tuple(range(3, 14))])
    read, every = [3], [76]  # the final PAD of the first is not computed at all
    assert seen == {
        "0.mlp": every, "0.self_attn.q_proj": every, "0.self_attn.k_proj": every, "0.self_attn.o_proj": every,
        "1.mlp": read, "1.self_attn.q_proj": read, "1.self_attn.k_proj": every, "1.self_attn.o_proj": read,
    }  # fmt: skip
    assert list(model.state_dict()) == names


def test_a_model_that_gives_something_else_in_one_row_keeps_its_padding() -> None:
    class Absolute(LlamaForSequenceClassification):
        """Knows better than its caller where tokens are."""

        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.model.register_forward_pre_hook(self._renumber, with_kwargs=True)

        @staticmethod
        def _renumber(module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            past = kwargs.get("past_key_values")
            first = 0 if past is None else past.get_seq_length()
            ids = args[0] if args else kwargs["input_ids"]
            return args, {**kwargs, "position_ids": torch.arange(first, first + ids.shape[1])[None]}

    torch.manual_seed(0)
    model = spread_out(Absolute(tiny.config(num_labels=1)))
    forward = BatchedForward(model)
    assert forward.shares_prefixes and forward.pads
    batch = [tuple(range(3, 3 + n)) for n in (5, 60, 11)]
    assert forward.scores(batch)[0].tolist() == pytest.approx([alone(model, ids) for ids in batch], abs=1e-5)


@pytest.mark.parametrize("own", ["sliding_window", "softcap", "s_aux", "position_bias"])
def test_an_attention_of_another_kind_is_not_computed_as_if_it_were_this_one(own: str) -> None:
    x = torch.zeros(1, 2, 3, 4)
    with pytest.raises(NotImplementedError, match=own):
        attention_forward(torch.nn.Identity(), x, x, x, bounds([1, 2]), **{own: 1})


def test_a_model_that_does_not_read_its_cache_as_it_should_computes_every_prefix() -> None:
    class Forgetful(LlamaForSequenceClassification):
        """Takes a cache, and gives every later token the position of a first one."""

        def forward(
            self, *args: Any, past_key_values: Any = None, use_cache: Any = None, **kwargs: Any
        ) -> Any:
            if past_key_values is not None:
                kwargs["position_ids"] = torch.arange(kwargs["input_ids"].shape[1])[None]
            return super().forward(*args, past_key_values=past_key_values, use_cache=use_cache, **kwargs)

    torch.manual_seed(0)
    model = spread_out(Forgetful(tiny.config(num_labels=1)))
    assert not BatchedForward(model).shares_prefixes


def test_the_prefix_of_a_group_is_computed_once() -> None:
    forward = BatchedForward(llama())
    prompt = tuple(range(3, 103))
    batch = [(*prompt, *range(200, 210 + n)) for n in range(4)]
    _, cached = forward.scores(batch)
    # three of the four find the 110 - 10 + 10 tokens that all begin with
    assert sorted(cached) == [0, 109, 109, 109]
    assert forward.tokens(batch) == 109 + 1 + 2 + 3 + 4
    assert BatchedForward(eager()).tokens(batch) == 109 + 4 * 4


def test_a_final_pad_is_stepped_over_as_transformers_does() -> None:
    """A model whose PAD is its EOS pools the token before; a shared prefix must leave it to be pooled."""
    model = llama()
    prompt = tuple(range(3, 60))
    batch = [(*prompt, 7, 2), (*prompt, 7, 2, 2), (*prompt, 7)]
    raw, _ = BatchedForward(model, CHEAP).scores(batch)
    assert raw.tolist() == pytest.approx([alone(model, batch[2])] * 3, abs=1e-5)


def test_families_of_prompts_inside_a_common_system_prompt() -> None:
    system, one, two = (1,) * 100, (2,) * 400, (3,) * 300
    batch = [system + one + (10 + i,) * 50 for i in range(4)] + [
        system + two + (10 + i,) * 50 for i in range(4)
    ]
    found = families([batch[i] for i in (0, 4, 1, 5, 2, 6, 3, 7)], overhead=48)
    assert found == [(500, [0, 2, 4, 6]), (400, [1, 3, 5, 7])]
    alike = [system + (10 + i,) * 50 for i in range(4)]
    assert families(alike, overhead=200) == [(0, [0]), (0, [1]), (0, [2]), (0, [3])]  # not worth two passes


@settings(deadline=None)
@given(texts, texts, pieces)
def test_common_prefix(a: tuple[int, ...], b: tuple[int, ...], prefix: tuple[int, ...]) -> None:
    a, b = prefix + a, prefix + b
    same = [x == y for x, y in zip(a, b, strict=False)]
    assert common_prefix(a, b) == (same.index(False) if False in same else len(same))


def test_prefixes_nested_without_end_are_planned() -> None:
    batch = [(5,) * n for n in range(1, 1500)]
    groups = plan(batch, CHEAP, share=True)
    assert sum(len(rows) for g in groups for rows in g.passes) == len(batch)


@pytest.mark.parametrize("lengths", [[8, 500] * 8, [1] * 100 + [60]])
def test_unequal_lengths_go_in_separate_passes(lengths: list[int]) -> None:
    batch = [(3 + i,) * n for i, n in enumerate(lengths)]
    computed = sum(g.tokens(batch) for g in plan(batch, CHEAP, share=False))
    assert computed == sum(lengths)


def load_from(folder: Path) -> BatchedForward:
    return BatchedForward(LlamaForSequenceClassification.from_pretrained(folder).eval())


def test_a_checkpoint_that_others_published(tmp_path: Path) -> None:
    forward = load_from(tiny.save_classifier(tmp_path))
    assert forward.shares_prefixes

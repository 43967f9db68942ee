"""Templates, special tokens and truncation, on small real tokenizers."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from rlaif import chat
from rlaif.errors import ConfigError, ContextTooLong, DataError
from rlaif.types import Conversation, Message, user_prompt, with_response

CHARACTERS = "abcdefghijklmnopqrstuvwxyz HA:\n"
IM_TEMPLATE = (
    "{% for m in messages %}<s>{{ m.role[0] }}:{{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>a:{% endif %}"
)


def character_tokenizer(
    *, specials: dict[str, str] | None = None, merged: str = ""
) -> PreTrainedTokenizerBase:
    """One token per character (and one for `merged`), with the special tokens given."""
    if specials is None:
        specials = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    vocabulary = {
        token: i for i, token in enumerate(dict.fromkeys([*specials.values(), "<unk>", *CHARACTERS, merged]))
    }
    model = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    model.pre_tokenizer = Split(Regex(f"{merged}|[\\s\\S]" if merged else "[\\s\\S]"), "isolated")
    if bos := specials.get(
        "bos_token"
    ):  # as Llama's: BOS comes with any text unless special tokens are refused
        model.post_processor = TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, vocabulary[bos])])
    return PreTrainedTokenizerFast(tokenizer_object=model, **specials)


def plain(**options: dict[str, str]) -> PreTrainedTokenizerBase:
    tokenizer = character_tokenizer(**options)  # type: ignore[arg-type]
    chat.ensure_template(tokenizer)
    return tokenizer


def text(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    return "".join(tokenizer.convert_ids_to_tokens(ids))


DIALOGUE: Conversation = (Message("user", "hi"), Message("assistant", "yes"), Message("user", "ok"))


def test_plain_is_bos_contents_and_eos_after_the_final_answer_only() -> None:
    tokenizer = plain()
    encoded = chat.encode_conversation(
        tokenizer, with_response(DIALOGUE, "go"), max_length=99, truncation="reject"
    )
    assert (text(tokenizer, encoded.ids), encoded.truncated) == ("<s>hiyesokgo</s>", False)
    assert text(tokenizer, chat.encode_prompt(tokenizer, DIALOGUE, max_length=99)) == "<s>hiyesok"


def test_plain_works_for_a_tokenizer_without_special_tokens() -> None:
    tokenizer = plain(specials={})
    conversation = with_response(user_prompt("hi"), "go")
    assert text(
        tokenizer, chat.encode_conversation(tokenizer, conversation, max_length=9, truncation="left").ids
    ) == ("higo")


def test_transcript_writes_hh_turns_and_asks_for_an_answer() -> None:
    tokenizer = character_tokenizer()
    chat.ensure_template(tokenizer, "transcript")
    assert chat.render(tokenizer, DIALOGUE, add_generation_prompt=True) == (
        "<s>\n\nHuman: hi\n\nAssistant: yes\n\nHuman: ok\n\nAssistant:"
    )
    assert chat.render(tokenizer, with_response(user_prompt("hi"), "go"), add_generation_prompt=False) == (
        "<s>\n\nHuman: hi\n\nAssistant: go</s>"
    )


def test_a_tokenizer_keeps_its_own_template_unless_another_is_asked_for(tmp_path: Path) -> None:
    tokenizer = character_tokenizer()
    tokenizer.chat_template = IM_TEMPLATE
    chat.ensure_template(tokenizer)
    assert tokenizer.chat_template == IM_TEMPLATE
    (tmp_path / "t.jinja").write_text("{{ messages[0].content }}")
    chat.ensure_template(tokenizer, str(tmp_path / "t.jinja"))
    assert chat.render(tokenizer, DIALOGUE, add_generation_prompt=False) == "hi"


def test_a_tokenizer_without_a_template_is_warned_of(capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = character_tokenizer()
    chat.ensure_template(tokenizer, "plain")
    chat.ensure_template(tokenizer)
    assert capsys.readouterr().err == ""
    tokenizer.chat_template = None
    chat.ensure_template(tokenizer)
    assert tokenizer.chat_template == chat.BUILTIN_TEMPLATES["plain"]
    assert "has no chat template" in capsys.readouterr().err


def test_a_missing_or_broken_template_file_is_one_clear_line(tmp_path: Path) -> None:
    tokenizer = character_tokenizer()
    with pytest.raises(ConfigError, match="neither a readable file nor one of plain, transcript"):
        chat.ensure_template(tokenizer, "plian")
    (tmp_path / "t.jinja").write_text("ok\n{% for %}")
    with pytest.raises(ConfigError, match=r"t\.jinja line 2 is not valid Jinja"):
        chat.ensure_template(tokenizer, str(tmp_path / "t.jinja"))
    assert tokenizer.chat_template is None


def test_a_conversation_the_template_refuses_is_a_data_error() -> None:
    tokenizer = character_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(DataError, match=r"refuses a conversation of turns user, assistant, user: roles must"):
        chat.encode_prompt(tokenizer, DIALOGUE, max_length=9)


@pytest.mark.parametrize(
    ("max_length", "kept"), [(8, "<s>hiyesok"), (7, "<s>iyesok"), (3, "<s>ok"), (2, "<s>k")]
)
def test_left_truncation_drops_the_oldest_tokens_and_keeps_bos(max_length: int, kept: str) -> None:
    tokenizer = plain()
    ids = chat.encode_prompt(tokenizer, DIALOGUE, max_length=max_length)
    assert (text(tokenizer, ids), len(ids)) == (kept, min(8, max_length))


def test_left_truncation_without_bos_keeps_the_newest_tokens() -> None:
    tokenizer = plain(specials={})
    assert text(tokenizer, chat.encode_prompt(tokenizer, DIALOGUE, max_length=3)) == "sok"


def test_a_truncated_conversation_says_so_and_keeps_its_end() -> None:
    tokenizer = plain()
    encoded = chat.encode_conversation(
        tokenizer, with_response(DIALOGUE, "go"), max_length=5, truncation="left"
    )
    assert (text(tokenizer, encoded.ids), encoded.truncated) == ("<s>kgo</s>", True)


def test_a_context_that_is_too_long_is_refused_with_both_numbers() -> None:
    tokenizer = plain()
    with pytest.raises(ContextTooLong, match="the prompt has 8 tokens, more than the limit of 7"):
        chat.encode_prompt(tokenizer, DIALOGUE, max_length=7, truncation="reject")
    with pytest.raises(ContextTooLong, match="the conversation has 11 tokens"):
        chat.encode_conversation(tokenizer, with_response(DIALOGUE, "go"), max_length=10, truncation="reject")


def test_a_conversation_to_score_must_end_with_an_answer() -> None:
    with pytest.raises(DataError, match="does not end with an assistant turn"):
        chat.encode_conversation(plain(), DIALOGUE, max_length=9, truncation="left")


@pytest.mark.parametrize(
    ("specials", "pad"),
    [
        pytest.param({"eos_token": "</s>", "pad_token": "<pad>"}, "<pad>", id="its-own"),
        pytest.param({"eos_token": "</s>", "pad_token": "</s>", "unk_token": "<unk>"}, "<unk>", id="unk"),
        pytest.param({"eos_token": "<unk>", "unk_token": "<unk>"}, "<|pad|>", id="added"),
        pytest.param(
            {"eos_token": "</s>", "unk_token": "<unk>", "additional": "[PAD]"},
            "[PAD]",
            id="from-the-vocabulary",
        ),
    ],
)
def test_pad_is_never_eos(specials: dict[str, str], pad: str) -> None:
    additional = specials.pop("additional", None)
    tokenizer = character_tokenizer(specials=specials)
    if additional:
        tokenizer.add_tokens([additional])
    chat.ensure_pad_token(tokenizer)
    assert tokenizer.pad_token == pad
    assert tokenizer.pad_token_id not in (None, tokenizer.eos_token_id)


def test_prompt_and_response_ids_join_to_the_tokenised_conversation() -> None:
    tokenizer = plain()
    pair = chat.encode_pair(tokenizer, DIALOGUE, "go")
    whole = chat.encode_conversation(
        tokenizer, with_response(DIALOGUE, "go"), max_length=99, truncation="reject"
    )
    assert pair.prompt_ids + pair.response_ids == whole.ids
    assert text(tokenizer, pair.response_ids) == "go</s>"


def test_a_response_ends_at_its_first_eos_even_if_the_template_writes_on() -> None:
    tokenizer = character_tokenizer()
    tokenizer.chat_template = IM_TEMPLATE
    pair = chat.encode_pair(tokenizer, user_prompt("hi"), "go")
    assert text(tokenizer, pair.prompt_ids) == "<s>u:hi</s>\n<s>a:"
    assert text(tokenizer, pair.response_ids) == "go</s>"


def test_a_response_ends_where_its_turn_does_if_a_model_stops_there() -> None:
    """Gemma-it: <end_of_turn> ends the turn and is in its generation config; the tokenizer's EOS is another."""
    tokenizer = character_tokenizer(merged="<end>")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}<end>\n{% endfor %}"
        "{% if add_generation_prompt %}a:{% endif %}"
    )
    ends = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<end>")]
    pair = chat.encode_pair(tokenizer, user_prompt("hi"), "go", eos_ids=ends)
    assert text(tokenizer, pair.prompt_ids) == "u:hi<end>\na:"
    assert text(tokenizer, pair.response_ids) == "go<end>"


def test_a_response_gets_eos_where_the_template_writes_none() -> None:
    tokenizer = character_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    assert text(tokenizer, chat.encode_pair(tokenizer, user_prompt("hi"), "go").response_ids) == "go</s>"


def test_a_token_across_the_boundary_never_changes_the_prompt_ids() -> None:
    tokenizer = character_tokenizer(merged="ig")
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    pair = chat.encode_pair(tokenizer, user_prompt("hi"), "go")
    assert tokenizer.tokenize("higo") == ["h", "ig", "o"]
    assert pair.prompt_ids == chat.encode_prompt(tokenizer, user_prompt("hi"), max_length=9)
    assert text(tokenizer, pair.response_ids) == "go</s>"


def test_the_template_hash_follows_what_is_rendered() -> None:
    one, same, other, eos = plain(), plain(), character_tokenizer(), plain(specials={"eos_token": "</e>"})
    chat.ensure_template(other, "transcript")
    assert chat.template_hash(one) == chat.template_hash(same)
    assert len({chat.template_hash(t) for t in (one, other, eos)}) == 3


def test_a_real_tokenizer_round_trips_a_story(shared_data: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(shared_data / "models" / "stories260K")
    chat.ensure_template(tokenizer)
    chat.ensure_pad_token(tokenizer)
    assert tokenizer.pad_token == "<unk>"
    pair = chat.encode_pair(tokenizer, user_prompt("Once upon a time"), ", there was a dog.")
    assert pair.prompt_ids[0] == tokenizer.bos_token_id and pair.response_ids[-1] == tokenizer.eos_token_id
    whole = tokenizer.decode(pair.prompt_ids + pair.response_ids, skip_special_tokens=True)
    assert whole == "Once upon a time, there was a dog."

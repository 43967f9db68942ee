"""Conversations to token ids: templates, special tokens and truncation, in one place for trainer and reward server.

Only the side that owns a model owns its chat template. Text is rendered by the tokenizer's template and tokenised
without further special tokens, so a token that the template writes is never written twice.
"""

from __future__ import annotations

import sys
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

from rlaif.errors import ConfigError, ContextTooLong, DataError
from rlaif.types import Conversation, content_id, to_dicts, with_response

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Truncation = Literal["reject", "left"]

BUILTIN_TEMPLATES = {
    "plain": (
        "{{ bos_token if bos_token else '' }}"
        "{% for message in messages %}{{ message['content'] }}"
        "{% if loop.last and message['role'] == 'assistant' and eos_token %}{{ eos_token }}{% endif %}"
        "{% endfor %}"
    ),
    "transcript": (
        "{{ bos_token if bos_token else '' }}"
        "{% for message in messages %}"
        "{% if message['role'] == 'user' %}{{ '\n\nHuman: ' + message['content'] }}"
        "{% elif message['role'] == 'assistant' %}{{ '\n\nAssistant: ' + message['content'] }}"
        "{% else %}{{ message['content'] }}{% endif %}"
        "{% if loop.last and message['role'] == 'assistant' and eos_token %}{{ eos_token }}{% endif %}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ '\n\nAssistant:' }}{% endif %}"
    ),
}
"""`plain`: contents one after the other, for models that continue text. `transcript`: HH-RLHF `Human:`/`Assistant:`.

Both write BOS first and EOS after a final assistant turn, where the tokenizer has them.
"""

_PAD_NAMES = ("<|finetune_right_pad_id|>", "<|pad|>", "<pad>", "[PAD]")


class Encoded(NamedTuple):
    """Token ids of a conversation, and whether its beginning was cut off to fit."""

    ids: list[int]
    truncated: bool


class EncodedPair(NamedTuple):
    """Token ids of a prompt (with the generation prompt) and of the response that follows (with its EOS)."""

    prompt_ids: list[int]
    response_ids: list[int]


def ensure_template(tokenizer: PreTrainedTokenizerBase, template: str | None = None) -> None:
    """Give the tokenizer a chat template: the one asked for, else its own, else `plain`, which is said on stderr.

    Args:
        tokenizer: changed in place.
        template: a name in `BUILTIN_TEMPLATES`, or a Jinja file.

    Raises:
        ConfigError: no such template, or it is not valid Jinja.
    """
    if template is None:
        if not tokenizer.chat_template:
            tokenizer.chat_template = BUILTIN_TEMPLATES["plain"]
            print(
                f"warning: {tokenizer.name_or_path} has no chat template: the turns of a conversation are joined with "
                "nothing between them (give it one, or --chat_template where a command has it)",
                file=sys.stderr,
            )
        return
    if template in BUILTIN_TEMPLATES:
        tokenizer.chat_template = BUILTIN_TEMPLATES[template]
        return
    try:
        source = Path(template).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as err:
        raise ConfigError(
            f"chat template {template!r} is neither a readable file nor one of {', '.join(BUILTIN_TEMPLATES)}"
        ) from err
    from jinja2 import TemplateSyntaxError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    try:
        # The statements that transformers adds to Jinja: `break`, `continue` and `{% generation %}`.
        ImmutableSandboxedEnvironment(extensions=["jinja2.ext.loopcontrols"]).parse(
            source.replace("{% generation %}", "").replace("{% endgeneration %}", "")
        )
    except TemplateSyntaxError as err:
        raise ConfigError(
            f"chat template {template} line {err.lineno} is not valid Jinja: {err.message}"
        ) from err
    tokenizer.chat_template = source


def ensure_pad_token(tokenizer: PreTrainedTokenizerBase) -> None:
    """Give the tokenizer a PAD that is not EOS: a padding token in its vocabulary, else UNK, else an added `<|pad|>`.

    With PAD = EOS a mask made from ids would hide the end of every response, and the policy would never learn to
    stop. If a token is added, `len(tokenizer)` grows: resize the model's embeddings when they have fewer rows.
    """
    taken = {tokenizer.eos_token_id, tokenizer.bos_token_id, None}
    if tokenizer.pad_token_id not in taken:
        return
    vocabulary = tokenizer.get_vocab()
    for name in (*_PAD_NAMES, tokenizer.unk_token):
        if name is not None and vocabulary.get(name) not in taken:
            tokenizer.pad_token = name
            return
    tokenizer.add_special_tokens({"pad_token": "<|pad|>"})


def render(
    tokenizer: PreTrainedTokenizerBase, conversation: Conversation, *, add_generation_prompt: bool
) -> str:
    """The conversation as the tokenizer's template writes it.

    Raises:
        DataError: the template refuses the conversation, for instance two user turns in a row.
    """
    from jinja2 import TemplateError

    try:
        text = tokenizer.apply_chat_template(
            to_dicts(conversation), tokenize=False, add_generation_prompt=add_generation_prompt
        )
    except TemplateError as err:
        roles = ", ".join(m.role for m in conversation)
        raise DataError(f"the chat template refuses a conversation of turns {roles}: {err}") from err
    assert isinstance(text, str)
    return text


def _tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def _fit(
    tokenizer: PreTrainedTokenizerBase, ids: list[int], max_length: int, truncation: Truncation, what: str
) -> Encoded:
    if max_length < 2:
        raise ConfigError(f"max_length must be at least 2 tokens, not {max_length}")
    if len(ids) <= max_length:
        return Encoded(ids, truncated=False)
    if truncation == "reject":
        raise ContextTooLong(f"{what} has {len(ids)} tokens, more than the limit of {max_length}; shorten it")
    if ids[0] == tokenizer.bos_token_id:
        return Encoded([ids[0], *ids[len(ids) - max_length + 1 :]], truncated=True)
    return Encoded(ids[len(ids) - max_length :], truncated=True)


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase,
    prompt: Conversation,
    *,
    max_length: int,
    truncation: Truncation = "left",
) -> list[int]:
    """Token ids of a prompt, ready for the assistant's turn (generation prompt included).

    Args:
        tokenizer: must have a chat template (`ensure_template`).
        prompt: ends with a user turn.
        max_length: limit in tokens.
        truncation: `left` drops the oldest tokens but keeps BOS; `reject` raises.

    Raises:
        ContextTooLong: `reject` and the prompt is longer than `max_length`.
        DataError: the template refuses the conversation.
    """
    ids = _tokens(tokenizer, render(tokenizer, prompt, add_generation_prompt=True))
    return _fit(tokenizer, ids, max_length, truncation, "the prompt").ids


def encode_conversation(
    tokenizer: PreTrainedTokenizerBase, conversation: Conversation, *, max_length: int, truncation: Truncation
) -> Encoded:
    """Token ids of a conversation that ends with an assistant turn, as a reward model reads it.

    Raises:
        ContextTooLong: `reject` and the conversation is longer than `max_length` tokens.
        DataError: the conversation does not end with an assistant turn, or the template refuses it.
    """
    if not conversation or conversation[-1].role != "assistant":
        raise DataError("the conversation to score does not end with an assistant turn")
    ids = _tokens(tokenizer, render(tokenizer, conversation, add_generation_prompt=False))
    return _fit(tokenizer, ids, max_length, truncation, "the conversation")


def encode_pair(
    tokenizer: PreTrainedTokenizerBase,
    prompt: Conversation,
    response: str,
    *,
    eos_ids: Collection[int] = (),
) -> EncodedPair:
    """Token ids to train on a written response: what follows the prompt's ids, up to and including one EOS.

    The two lists joined are the tokenised conversation wherever the template and the tokenizer allow a cut there.
    Where they do not (a token spans the boundary, or the template rewrites earlier turns) the response is tokenised
    by itself, which is what generation from these prompt ids would have to produce.

    Args:
        tokenizer: must have a chat template (`ensure_template`).
        prompt: ends with a user turn.
        response: of the assistant.
        eos_ids: tokens that end a response beside the tokenizer's EOS, such as the end of a turn.
    """
    prompt_text = render(tokenizer, prompt, add_generation_prompt=True)
    whole_text = render(tokenizer, with_response(prompt, response), add_generation_prompt=False)
    prompt_ids = _tokens(tokenizer, prompt_text)
    whole = _tokens(tokenizer, whole_text)
    if whole[: len(prompt_ids)] == prompt_ids:
        response_ids = whole[len(prompt_ids) :]
    elif whole_text.startswith(prompt_text):
        response_ids = _tokens(tokenizer, whole_text[len(prompt_text) :])
    else:
        response_ids = _tokens(tokenizer, response)
    eos = tokenizer.eos_token_id
    for at, token in enumerate(response_ids):
        if token == eos or token in eos_ids:
            # Templates often write a newline after it, which generation never reaches.
            return EncodedPair(prompt_ids, response_ids[: at + 1])
    return EncodedPair(prompt_ids, response_ids if eos is None else [*response_ids, eos])


def template_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """A content id of the chat template and the special tokens it may write: equal hashes render equal text."""
    tokens = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    return content_id(str(tokenizer.chat_template), tokens)

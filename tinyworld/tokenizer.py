"""The tokenizer of the embedded world: one token per word, and a chat template.

Text of this world has single spaces between words, so decoding what was encoded gives the same text.
A colon, a bar, a full stop and a question mark are tokens of their own even without spaces around them, so a
label keeps its token when an ending such as `better :` is directly followed by it.
"""

from __future__ import annotations

import re

from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from labeler.rubric import Rubric, load_rubric
from tinyworld import WORLD_DIR
from tinyworld.grammar import WORDS
from tinyworld.rationale import MARKS, TALLIES

PAD, BOS, EOS, UNK = "<pad>", "<bos>", "<eos>", "<unk>"
ROLES = ("<system>", "<user>", "<assistant>")
_SEPARATORS = Regex(r"[:|?,]|(?<![0-9])\.(?![0-9])")

CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{{ ' <' + message['role'] + '> ' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ ' ' + eos_token }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ ' <assistant>' }}{% endif %}"
)
"""`<bos> <user> ... <assistant> ... <eos>`: only an assistant turn is closed, with EOS."""


def rubric(kind: str) -> Rubric:
    """The rubric of this world for `pair` or `score` judgments."""
    return load_rubric(str(WORLD_DIR / "rubrics" / f"{kind}.yaml"))


def vocabulary() -> list[str]:
    """All tokens in id order: special ones, the words of the grammar, the words of rubrics and rationales."""
    words = [PAD, BOS, EOS, UNK, *ROLES, *WORDS, *MARKS, *TALLIES, "of"]
    for kind in ("pair", "score"):
        r = rubric(kind)
        words += r.labels
        for text in (r.file.sample, r.file.ask, r.file.ask_rationale, r.file.rationale_cue, r.file.ending):
            words += re.findall(r"\w+|[^\w\s]", re.sub(r"\{\{.*?\}\}", " ", text))
    return list(dict.fromkeys(words))


def build_tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer that both shipped models use."""
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(vocabulary())}, unk_token=UNK))
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(_SEPARATORS, "isolated")]
    )
    tokenizer = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=core,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        unk_token=UNK,
        additional_special_tokens=list(ROLES),
        clean_up_tokenization_spaces=False,
        model_max_length=512,
        padding_side="left",
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer

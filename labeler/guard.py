"""Candidate text is hostile: it must not forge the judge's delimiters, nor win by saying nothing.

Attacks this answers: forged chat markers and label cues, and content-free answers, which alone fool strong
judges up to 35 % of the time (arXiv 2507.08794). Persuasion in plain words is beyond it; both orders are
asked, so that "pick number 1" cancels.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import lru_cache

_CHAT_MARKERS = re.compile(
    r"<\|[^|<>\n]{1,40}\|>|</?s>|\[/?INST\]|<</?SYS>>|</?(?:start|end)_of_turn>|<(?:bos|eos|pad|unk)>",
    re.IGNORECASE,
)
"""Control tokens of the common model families, for endpoints whose tokenizer cannot be seen."""

_OPENERS = re.compile(
    r"(?:thought process|solution|answer|final answer|response|explanation|reasoning|let'?s think|"
    r"let'?s (?:think|solve)(?: (?:this|the)(?: problem)?)? step by step)\s*[:.…]*",
    re.IGNORECASE,
)
"""Openers that promise an answer and give none: the "master keys" of 2507.08794, as a whole response."""

_BREAK = "_"


def is_content_free(response: str) -> bool:
    """Whether a response says nothing: no letter or digit, or only an opener such as `Thought process:`.

    A bare word without punctuation ("Solution") may be an honest answer and counts as content.
    """
    text = response.strip()
    if not any(c.isalnum() for c in text):
        return True
    opener = _OPENERS.fullmatch(text)
    return opener is not None and (text[-1] in ":…" or len(text.split()) > 2)


def neutralise(text: str, markers: Iterable[str] = ()) -> str:
    """Break every chat marker and every given marker in a text by an underscore after its first character.

    `<|im_end|>` becomes `<_|im_end|>`. Case and the amount of white space inside a marker do not matter.
    The result holds no marker, so neutralising it again changes nothing.

    Args:
        text: a candidate response or a prompt.
        markers: the tokenizer's control tokens, and the delimiters and cues of the rubric.
    """
    pattern = _pattern(tuple(sorted({m for m in markers if len("".join(m.split())) > 1})))
    while pattern.search(text) is not None:
        text = pattern.sub(lambda m: m[0][0] + _BREAK + m[0][1:], text)
    return text


@lru_cache(maxsize=64)
def _pattern(markers: tuple[str, ...]) -> re.Pattern[str]:
    flexible = [r"\s+".join(re.escape(word) for word in m.split()) for m in markers]
    longest_first = sorted(flexible, key=len, reverse=True)
    return re.compile("|".join([_CHAT_MARKERS.pattern, *longest_first]), re.IGNORECASE)

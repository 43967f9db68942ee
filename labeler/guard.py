"""Candidate text is hostile: it must not forge the judge's delimiters, nor win by saying nothing.

Attacks this answers: forged delimiters, label cues and chat markers, also when they are written in look-alike,
fullwidth or styled characters, or with invisible ones between; and content-free answers, which alone fool strong
judges up to 35 % of the time (arXiv 2507.08794). Persuasion in plain words is beyond it; both orders are
asked, so that "pick number 1" cancels.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Iterator
from functools import lru_cache

from labeler.homoglyphs import HOMOGLYPHS

_CHAT_MARKERS = (
    r"<\|[^|<>]{1,40}\|>|</?s>|<(?:bos|eos|pad|unk|mask)>|</?(?:start|end)_of_(?:turn|image)>|</?think>|</?tool_call>|"
    r"</?tool_response>|\[/?(?:inst|system_prompt|available_tools|tool_results)\]|\[tool_calls\]|<</?sys>>"
)
"""Control tokens of the common model families as folded text has them, for tokenizers that cannot be seen."""

_OPENERS = re.compile(
    r"(?:thought process|solution|answer|final answer|response|explanation|reasoning|let'?s think|"
    r"let'?s (?:think|solve)(?: (?:this|the)(?: problem)?)? step by step)\s*[:.…]*",
    re.IGNORECASE,
)
"""Openers that promise an answer and give none: the "master keys" of 2507.08794, as a whole response."""

_FILLERS = frozenset("\u115f\u1160\u2800\u3164\uffa0")
"""Letters and symbols that are drawn as nothing."""

_LATIN = re.compile(
    r"(?:LATIN (?:SMALL|CAPITAL) LETTER|LATIN LETTER SMALL CAPITAL|INDICATOR SYMBOL LETTER)(?: DOTLESS)? "
    r"([A-Z])(?: WITH|$)"
)
"""Unicode names of Latin letters with strokes and hooks, small capitals, letters in circles and squares."""

_TAGS = re.compile("[\U000e0020-\U000e007e]")
"""Invisible doubles of ASCII: a reader sees nothing, a model may read them as text."""

_LONG = 6
"""From this length on, a marker is recognised through look-alikes within ASCII as well (UTS #39)."""

_BREAKS = ("_", "-", "~", "^", "=", "+", *map(chr, range(0x4E2D, 0x9FA5)))


def is_content_free(response: str) -> bool:
    """Whether a response says nothing: no letter or digit, or only an opener such as `Thought process:`.

    A bare word without punctuation ("Solution") may be an honest answer and counts as content. Invisible
    characters say nothing.
    """
    text = response
    if not text.isascii():
        text = "".join(c for c in unicodedata.normalize("NFKC", text) if c.isspace() or not _is_hidden(c))
    text = text.strip()
    if not any(c.isalnum() for c in text):
        return True
    opener = _OPENERS.fullmatch(text)
    return opener is not None and (text[-1] in ":…." or len(text.split()) > 2)


def neutralise(text: str, markers: Iterable[str] = ()) -> str:
    """Break every chat marker and every given marker in a text, by an underscore after its first character.

    `<|im_end|>` becomes `<_|im_end|>`. A marker is recognised by how it reads: white space, case, accents, invisible
    and control characters do not matter, and look-alikes (fullwidth, styled, Cyrillic `е`, `1` for `l`) count as the
    letters that they look like. A text without markers is returned as it is, character for character. The result holds
    no marker, so neutralising it again changes nothing. Leetspeak, translations and markers that are described rather
    than written are left alone.

    Args:
        text: a candidate response or a prompt.
        markers: the tokenizer's control tokens, and the delimiters and cues of the rubric; markers that fold to less
            than two characters are ignored.
    """
    guard = _guard(tuple(markers))
    while found := guard.find(text):
        text = _broken(text, found, guard.breaker)
    return text


class _Folding(dict[int, str | None]):
    """For each code point, what it reads as: lower-case plain characters, or None for what is not seen.

    A table for `str.translate` that fills itself. Each character folds by itself, so positions can be traced back.
    """

    def __missing__(self, code: int) -> str | None:
        self[code] = _folded(chr(code)) or None
        return self[code]


class _DecodingTags(_Folding):
    """The same, but invisible tag characters read as the ASCII that they double."""

    def __missing__(self, code: int) -> str | None:
        if _TAGS.match(chr(code)):
            self[code] = _FOLD[code - 0xE0000]
            return self[code]
        return super().__missing__(code)


_FOLD = _Folding()
_FOLD_TAGS = _DecodingTags()


class _Guard:
    """The markers of one judge, folded and compiled."""

    def __init__(self, markers: Iterable[str]) -> None:
        chat = re.compile(_CHAT_MARKERS)
        folded = {m.translate(_FOLD) for m in markers}
        folded = {m for m in folded if len(m) > 1 and not chat.fullmatch(m)}
        short = {m for m in folded if len(m) < _LONG}
        long = {_ascii_shapes(m) for m in folded - short}
        # With a break that begins no marker and is second in none, a marker can only arise further left: it ends.
        self.breaker = next(b for b in _BREAKS if not any(b in m[:2] for m in short | long))
        self._plain_short = tuple(m for m in short if m[0] not in "<[")
        self._plain_long = tuple(m for m in long if m[0] not in "<[")
        self._short = re.compile("|".join([_CHAT_MARKERS, *_longest_first(short)]))
        self._long = re.compile("|".join(_longest_first(long)) or "(?!)")

    def find(self, text: str) -> dict[int, int]:
        """Characters where a marker begins: index -> offset within what the character folds to, the first one."""
        starts = self._starts(text, _FOLD)
        if not text.isascii() and _TAGS.search(text):
            starts |= self._starts(text, _FOLD_TAGS)
        return dict(sorted(starts, reverse=True))

    def _starts(self, text: str, fold: _Folding) -> set[tuple[int, int]]:
        view = _view(text, fold)
        alike = _ascii_shapes(view)
        if (
            "<" not in view
            and "[" not in view
            and not any(m in view for m in self._plain_short)
            and not any(m in alike for m in self._plain_long)
        ):
            return set()
        found = {m.start() for m in self._short.finditer(view)}
        found |= {m.start() for m in self._long.finditer(alike)}
        return set(_origins(text, fold, found)) if found else set()


def _view(text: str, fold: _Folding) -> str:
    """`text.translate(fold)`, faster where few characters recur: a fold is final, so they can go one by one."""
    if text.isascii():
        return text.translate(fold)
    chars = set(text)
    if 10 * len(chars) > len(text):
        return text.translate(fold)
    for char in chars:
        if (reads_as := fold[ord(char)] or "") != char:
            text = text.replace(char, reads_as)
    return text


@lru_cache(maxsize=64)
def _guard(markers: tuple[str, ...]) -> _Guard:
    return _Guard(markers)


def _origins(text: str, fold: _Folding, positions: set[int]) -> Iterator[tuple[int, int]]:
    """Where positions of the folded text come from: (index of the character, offset in its folding)."""
    position = 0
    for index, char in enumerate(text):
        for offset in range(len(fold[ord(char)] or "")):
            if position in positions:
                yield index, offset
            position += 1


def _broken(text: str, starts: dict[int, int], breaker: str) -> str:
    """The text with a break after the first folded character of each marker.

    A character that folds to more of the marker than its beginning (a ligature, a double bracket) is written out.
    """
    parts, done = [], 0
    for index, offset in sorted(starts.items()):
        reads_as = _FOLD_TAGS[ord(text[index])] or ""
        whole = offset == len(reads_as) - 1
        parts.append(text[done : index + 1] if whole else text[done:index] + reads_as[: offset + 1])
        parts.append(breaker if whole else breaker + reads_as[offset + 1 :])
        done = index + 1
    return "".join([*parts, text[done:]])


def _longest_first(markers: Iterable[str]) -> list[str]:
    return [re.escape(m) for m in sorted(markers, key=lambda m: (-len(m), m))]


def _ascii_shapes(folded: str) -> str:
    """One spelling for ASCII characters that are drawn alike; positions stay."""
    return folded.replace("1", "l").replace("i", "l").replace("|", "l").replace("0", "o")


def _is_hidden(char: str) -> bool:
    """White space, control and format characters, combining marks, unassigned code points, fillers."""
    category = unicodedata.category(char)
    return category[0] in "CZ" or category in ("Mn", "Me") or char in _FILLERS


def _folded(char: str) -> str:
    """What one character reads as; folding the result again does not change it."""
    if char.isascii():
        return "" if _is_hidden(char) else char.lower()
    whole = HOMOGLYPHS.get(char) or unicodedata.normalize("NFKD", char)
    seen = (_shape(c) for c in whole if not _is_hidden(c))
    folded = "".join(seen).casefold()
    return folded if folded == char else "".join(map(_folded, folded))


def _shape(char: str) -> str:
    # A small letter may be drawn as its capital (Cyrillic `м`, `н`).
    if (plain := HOMOGLYPHS.get(char) or HOMOGLYPHS.get(char.upper())) is not None:
        return plain
    if (digit := unicodedata.digit(char, None)) is not None:
        return str(digit)
    if unicodedata.category(char) == "Pd":
        return "-"
    latin = _LATIN.search(unicodedata.name(char, ""))
    return latin[1] if latin else char

"""Reading a judge's answer from text, where an endpoint gives no log-probabilities.

Prose is never searched for a label: an answer counts only in a declared form, on a line of its own, from a closed
menu. Everything else is no answer, and the row stays unlabelled.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Iterator, Sequence
from itertools import pairwise

VERDICT_LABELS = ("1>>2", "1>2", "1=2", "2>1", "2>>1")
"""A graded verdict in one order, from "response 1 is far better" to "response 2 is far better"."""

VERDICT_PROBS = (0.95, 0.75, 0.5, 0.25, 0.05)
"""P(response 1 preferred) that each graded verdict stands for: a convention, to be calibrated like any label."""

VERDICT_ASK = (
    "End with one line that holds your verdict and nothing else, in one of these five forms:\n"
    "Verdict: 1>>2 (response 1 is far better)\n"
    "Verdict: 1>2 (response 1 is better)\n"
    "Verdict: 1=2 (they are equally good)\n"
    "Verdict: 2>1 (response 2 is better)\n"
    "Verdict: 2>>1 (response 2 is far better)\n"
    "Leave out what stands in parentheses."
)
"""Closes the user message of a judge that answers with a graded verdict."""

_THINKING, _THOUGHT = "<think>", "</think>"

_MARKUP = " \t*_`\"'“”‘’[]{}()<>$"
_NOUN = re.compile(
    r"(?:the )?(?:response|answer|option|summary|assistant|candidate|number|choice|label|score|rating|grade) *#? *"
    r"(?=\S+$)",
    re.IGNORECASE,
)
_CUE = re.compile(r"[^.?!;,\n]{0,80}:")
_FINAL_REMARK = re.compile(r"(?<=\S) \([^()]*\)\.?$")
_NUMBER = r"(\d{1,3}(?:\.\d{1,3})?)"
_REMARK = r"(?: ?/ ?10)?(?: \([^()]*\))?"
_TWO_SCORES = re.compile(rf"\(?{_NUMBER}(?: ?, ?| ){_NUMBER}\)?")
_DECLARED = re.compile(
    rf"(?:final |overall )?(?:output|scores?|ratings?|verdict) ?: ?\(?{_NUMBER}(?: ?, ?| ){_NUMBER}\)?\.?",
    re.IGNORECASE,
)
_SENTENCE = re.compile(rf"\bthe scores are:? ?\({_NUMBER} ?, ?{_NUMBER}\)", re.IGNORECASE)
_OF_ASSISTANT = re.compile(
    rf"(?:assistant|response) ([12])(?:'s score)? ?: ?{_NUMBER}{_REMARK}", re.IGNORECASE
)


def after_thinking(text: str) -> str:
    """What a model says once it has thought aloud, in `<think>` tags; empty while it thinks.

    A chat template may have opened the tag, so that the text has the closing one alone.
    """
    said = text.rpartition(_THOUGHT)[2]
    return "" if _THINKING in said else said


def read_label(text: str, labels: Sequence[str]) -> int | None:
    """The index of the label that a text declares, thinking aside.

    A verdict line is a label alone (`1`, `**1**`, `[[A]]`, `Response 1`), or a label after a short cue that ends in a
    colon (`Verdict: 1`, `Score: 8/10` on a scale that ends in 10); a remark in parentheses may follow. The last verdict
    line counts. Labels are matched whole and in their case: `downgrade: i` declares neither `I` nor anything else.

    Args:
        text: what the judge wrote.
        labels: the closed menu.

    Returns:
        An index into `labels`; None when no line declares an answer, or the last one declares none of the labels.
    """
    menu = {_plain(label): index for index, label in enumerate(labels)}
    lines = [_plain(line) for line in after_thinking(text).splitlines()]
    for line in reversed(lines):
        values = tuple(_values(line))
        for value in values:
            if value in menu:
                return menu[value]
            part, slash, whole = value.partition("/")
            if slash and whole.strip() == _plain(labels[-1]) and part.strip() in menu:
                return menu[part.strip()]
        if any(" " not in value and any(map(str.isalnum, value)) for value in values):
            return None
    return None


def read_first_label(text: str, labels: Sequence[str]) -> int | None:
    """The index of the label that the first line of a text declares: all that counts where the text was cut off.

    What follows a label that came at once explains it; a label further down may have been a step on the way. A line
    that was cut itself declares none if it may go on to another label, `1` to `10`.

    Args:
        text: the beginning of what the judge would have written.
        labels: the closed menu.
    """
    line, whole, _ = after_thinking(text).lstrip().partition("\n")
    index = read_label(line, labels)
    if index is None or whole:
        return index
    longer = (label for label in labels if label != labels[index] and label.startswith(labels[index]))
    return None if any(longer) else index


def read_verdict(text: str) -> float | None:
    """P(response 1 preferred) of a graded verdict (see `VERDICT_ASK`), or None when there is none."""
    index = read_label(re.sub(r"[^\S\n]*(>+|=)[^\S\n]*", r"\1", text), VERDICT_LABELS)
    return None if index is None else VERDICT_PROBS[index]


def read_score_pair(text: str, *, lowest: float = 0.0, highest: float = 10.0) -> tuple[float, float] | None:
    """The two scores of a recorded review of two answers (the format of FastChat's first judge prompts).

    Declared forms: a line of two numbers and nothing else (`9 8.5`, `(1, 7)`); `Output: (1, 7)`; neighbouring lines
    `Assistant 1: 1/10` and `Assistant 2: 2/10`, each with an optional remark in parentheses; "the scores are (1, 5)".
    Numbers elsewhere are prose.

    Args:
        text: the review.
        lowest: low end of the scale.
        highest: high end of the scale.

    Returns:
        (score of the first answer, score of the second), each in [lowest, highest]; None where nothing is declared,
        where two declarations differ, or where one is off the scale.
    """
    declared = set(_score_pairs([_plain(line, strip="*_` \t") for line in text.splitlines()]))
    if len(declared) != 1:
        return None
    first, second = declared.pop()
    return (first, second) if all(lowest <= x <= highest for x in (first, second)) else None


def smoothed(counts: Sequence[int], alpha: float = 1.0) -> tuple[float, ...]:
    """Label probabilities from counts of sampled verdicts, by Laplace's rule.

    Args:
        counts: verdicts per label, each >= 0.
        alpha: pseudo-count of each label, >= 0; with 0 at least one count must be positive.

    Returns:
        (count + alpha) / (sum of counts + alpha * labels) for each label; sums to 1.
    """
    total = math.fsum(counts) + alpha * len(counts)
    return tuple((count + alpha) / total for count in counts)


def _values(line: str) -> Iterator[str]:
    """What a line declares if it is a verdict line: the line itself, or what follows its cue; less a remark."""
    for told in dict.fromkeys((line, _FINAL_REMARK.sub("", line))):
        bare = _unwrapped(told)
        yield _NOUN.sub("", bare)
        head, colon, value = bare.rpartition(":")
        if colon and _CUE.fullmatch(head + colon) and len(head.split()) <= 8:
            yield _NOUN.sub("", _unwrapped(value))


def _unwrapped(text: str) -> str:
    return text.strip(_MARKUP).rstrip(".").strip(_MARKUP)


def _score_pairs(lines: Sequence[str]) -> Iterator[tuple[float, float]]:
    for line in lines:
        if match := _TWO_SCORES.fullmatch(line) or _DECLARED.fullmatch(line) or _SENTENCE.search(line):
            yield float(match[1]), float(match[2])
    told = [line for line in lines if line]
    for one, two in pairwise(told):
        first, second = _OF_ASSISTANT.fullmatch(one), _OF_ASSISTANT.fullmatch(two)
        if first and second and (first[1], second[1]) == ("1", "2"):
            yield float(first[2]), float(second[2])


def _plain(line: str, strip: str = " \t") -> str:
    """One spelling of a line: compatibility forms resolved, white space single, ends stripped."""
    return " ".join(unicodedata.normalize("NFKC", line).split()).strip(strip)

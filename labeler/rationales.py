"""Which response a rationale declares the better one. A check on labels, never their source."""

from __future__ import annotations

import re

from labeler.verdicts import read_label

_NOUN = r"(?:response|summary|answer|assistant|candidate|reply) *#? *"
_SOME = rf"{_NOUN}(?:1|2|one|two)\b"
_NAMED = rf"{_NOUN}(1|2|one|two)\b"
_HOW = r"(?:(?:overall|clearly|much|far|slightly|somewhat|significantly|therefore|thus|the|a|more) )*"
_CLOSING = r"(?:overall|therefore|thus|hence|so|in summary|in conclusion|on balance|ultimately|in short|all in all),? "
_STATED = re.compile(
    rf"(?:{_CLOSING})?(?:I (?:would |therefore |clearly )*(?:prefer|choose|pick) {_NAMED}"
    rf"|(?:I (?:think|believe|find) (?:that )?)?{_NAMED} (?:wins|performed better|(?:is|was|seems) {_HOW}"
    r"(?:better|best|preferable|preferred|superior|stronger|(?:more|most) helpful))"
    rf"(?: (?:response|summary|answer|one|choice|overall))?(?: than (?:{_NAMED}|the other(?: one)?))?)[.!]?",
    re.IGNORECASE,
)
"""A sentence that says which response is better, and nothing else."""
_CLOSED = re.compile(
    rf"{_CLOSING}{_NAMED}(?:'s \w+)? (?:is|was|performed|provided|provides|offers|offered|gave|gives) {_HOW}"
    r"(?:better|superior|stronger|preferable|more helpful)\b",
    re.IGNORECASE,
)
"""The beginning of a closing sentence that says so, and may go on to say why."""
_SCORED = re.compile(
    rf"{_NAMED}(?:(?!{_SOME}).)*?(?:, which is why it |, so it | )"
    r"(?:receives|received|gets|got|earns|earned|deserves|deserved) "
    rf"(?:a |the ){_HOW}higher (?:score|rating)\b",
    re.IGNORECASE,
)
"""A sentence that gives the higher score to the response that it named last."""
_OBJECTS = re.compile(
    r"\b(?:but|however|although|though|yet|while|whereas|except|not|neither|nor|if)\b", re.IGNORECASE
)
_SENTENCE_END = re.compile(r"(?<=[.!?:])\W+")
_VERDICT_LINE = re.compile(
    r"\W*(?:final |overall )?(?:verdict|preference|preferred|winner|better|best|choice|decision|judge?ment)\b",
    re.IGNORECASE,
)
_MARKUP = " *_#>`\"'"
_NUMBERS = {"1": 1, "one": 1, "2": 2, "two": 2}


def named_better(rationale: str) -> int | None:
    """Which response a rationale declares the better one: 1 as shown first, 2 as shown second.

    Declared means a verdict line ("Verdict: 2"), a sentence that says it and no more ("Response 2 is better.", "I
    prefer answer 1."), a closing one that says why ("Overall, answer 1 is more helpful because ..."), or one that
    gives a higher score. What is better in something, not better, or better if, declares nothing.

    Returns:
        None where nothing is declared, or both are.
    """
    named: set[int] = set()
    for line in rationale.splitlines():
        if _VERDICT_LINE.match(line) and (label := read_label(line, ("1", "2"))) is not None:
            named.add(label + 1)
        named.update(filter(None, map(_named_in, _SENTENCE_END.split(line))))
    return named.pop() if len(named) == 1 else None


def _named_in(sentence: str) -> int | None:
    """Which response a sentence declares the better one."""
    sentence = sentence.strip(_MARKUP)
    match = _STATED.fullmatch(sentence)
    if match is None and "higher" in sentence.lower():  # a word of `_SCORED`, which is slow on long sentences
        match = _SCORED.search(sentence)
    if match is None and (closed := _CLOSED.match(sentence)) and _OBJECTS.search(sentence) is None:
        match = closed
    return None if match is None else _NUMBERS[next(filter(None, match.groups())).lower()]

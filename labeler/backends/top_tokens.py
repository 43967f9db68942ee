"""Labels that an endpoint's tokenizer splits, read from lists of likeliest tokens: one list per part."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from labeler.backends.labels import FLOOR, logsumexp, read_top_tokens, unlisted_bound
from rlaif.types import LabelDistribution

TopTokens = Sequence[tuple[str, float]]
"""(token text, natural-log probability) of the likeliest next tokens."""


def tokens_to_continue(top: TopTokens, labels: Sequence[str]) -> dict[str, str]:
    """The listed tokens after which a label goes on.

    Args:
        top: the list at the label's position.
        labels: labels that the tokenizer may split.

    Returns:
        For each text that begins a label, the token that is likeliest to stand for it, white space included.
    """
    started: dict[str, str] = {}
    for token, _ in sorted(top, key=lambda entry: -entry[1]):
        text = token.strip()
        if text and any(label.startswith(text) and label != text for label in labels):
            started.setdefault(text, token)
    return started


def read_top_tokens_in_parts(
    first: TopTokens, after: Mapping[str, TopTokens], labels: Sequence[str]
) -> LabelDistribution:
    """A label distribution from lists of likeliest tokens, where a label may be two tokens.

    By the chain rule P("10") = P(10) + P(1) P(0 | 1), of which the first term is the label as one token, and
    P("1") = P(1) (1 - P(0 | 1)). What is not listed gets the bound of `unlisted_bound`, and the distribution is
    `censored`.

    Args:
        first: the list at the label's position.
        after: the list after each of `tokens_to_continue`.
        labels: the closed set.

    Raises:
        RequestFailed: no label, nor the beginning of one, is in the list.
    """
    texts = [*labels, *(text for text in after if text not in labels)]
    begun = dict(zip(texts, read_top_tokens(first, texts).logprobs, strict=True))
    listed = {token.strip() for token, _ in first}
    censored = False
    logprobs = []
    for label in labels:
        parts = [(text, label[len(text) :]) for text in after if label.startswith(text) and label != text]
        ways = [begun[text] + _next(after[text], rest) for text, rest in parts]
        if label in listed or not parts:
            ways.append(begun[label] + _unless_continued(label, after, labels))
        censored |= not (label in listed or parts)
        censored |= any(rest not in dict(after[text]) for text, rest in parts)
        logprobs.append(max(logsumexp(ways), FLOOR))
    return LabelDistribution(tuple(logprobs), min(1.0, math.fsum(map(math.exp, logprobs))), censored)


def _unless_continued(label: str, after: Mapping[str, TopTokens], labels: Sequence[str]) -> float:
    """Log-probability that `label`, once written, does not go on to a longer one."""
    if label not in after:
        return 0.0
    longer = [text[len(label) :] for text in labels if text.startswith(label) and text != label]
    left = 1.0 - math.fsum(math.exp(_next(after[label], rest)) for rest in longer)
    return math.log(left) if left > 0.0 else FLOOR


def _next(top: TopTokens, text: str) -> float:
    """Log-probability, or its bound, of the token `text`."""
    return dict(top).get(text, unlisted_bound(top))

"""Labels that an endpoint's tokenizer splits, read from lists of likeliest tokens: one list per part."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from labeler.backends.labels import FLOOR, logsumexp, unlisted_bound
from labeler.llm import RequestFailed
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
    `censored`. The mass is that of what is listed: a bound is no reading.

    Args:
        first: the list at the label's position.
        after: the list after each of `tokens_to_continue`.
        labels: the closed set.

    Raises:
        RequestFailed: no label, nor the beginning of one, is in the list.
    """
    begun = _by_text(first)
    then = {text: _read_rests(after[text], text, labels) for text in after}

    def spelled(label: str) -> float:
        """Log-probability of all ways to write a label; -inf if none is listed."""
        ways = [begun[text] + rests[label] for text, rests in then.items() if label in rests]
        if label in begun:
            ways.append(begun[label] + _log_complement(then.get(label, {}).values()))
        return logsumexp(ways)

    read = [spelled(label) for label in labels]
    unlisted = read.count(-math.inf)
    if unlisted == len(labels):
        raise RequestFailed(f"none of the labels {', '.join(labels)} is among the top {len(first)} tokens")
    bound = unlisted_bound(first, max(1, unlisted))
    guessed = any(not _is_listed(after[text], text, label) for text, rests in then.items() for label in rests)
    return LabelDistribution(
        tuple(bound if r == -math.inf else max(r, FLOOR) for r in read),
        min(1.0, _mass(begun, after, labels)),
        censored=unlisted > 0 or guessed,
    )


def _by_text(top: TopTokens) -> dict[str, float]:
    """Log-probability by text without the white space around it; tokens of one text are summed."""
    aliases: dict[str, list[float]] = {}
    for token, logprob in top:
        aliases.setdefault(token.strip(), []).append(logprob)
    return {text: logsumexp(logprobs) for text, logprobs in aliases.items()}


def _read_rests(top: TopTokens, begun: str, labels: Sequence[str]) -> dict[str, float]:
    """For each label that goes on from `begun`, the log-probability of its rest in the list after it, or the bound."""
    longer = [label for label in labels if label.startswith(begun) and label != begun]
    unlisted = sum(not _is_listed(top, begun, label) for label in longer)
    bound = unlisted_bound(top, max(1, unlisted))
    return {label: dict(top).get(label[len(begun) :], bound) for label in longer}


def _is_listed(top: TopTokens, begun: str, label: str) -> bool:
    """Whether the list after `begun` holds the rest of `label`."""
    return label[len(begun) :] in dict(top)


def _log_complement(logprobs: Iterable[float]) -> float:
    """Log-probability that none of several outcomes comes."""
    left = 1.0 - math.fsum(map(math.exp, logprobs))
    return math.log(left) if left > 0.0 else FLOOR


def _mass(begun: Mapping[str, float], after: Mapping[str, TopTokens], labels: Sequence[str]) -> float:
    """Probability of what is listed of the labels.

    A token that is a label by itself counts whole: it is one whether it goes on to a longer one or not. Of one that
    only begins labels, what counts are the rests listed after it.
    """
    whole = [math.exp(begun[label]) for label in labels if label in begun]
    parts = [
        math.exp(begun[text] + logprob)
        for text, top in after.items()
        if text not in labels
        for rest, logprob in dict(top).items()
        if text + rest in labels
    ]
    return math.fsum([*whole, *parts])

"""Which tokens spell a label, and its probability. Wrong ids give plausible, wrong ones, so nothing is guessed."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence

from labeler.llm import RequestFailed
from rlaif.errors import ModelError
from rlaif.types import LabelDistribution

Encode = Callable[[str], Sequence[int]]
Tokens = tuple[int, ...]

FLOOR = -1e4
"""Log-probability that stands for a label which the model rules out; files hold finite numbers."""

_HIDDEN = 2.0**-24
"""Probability that may be left over beside one of 1: servers sum in fp32, where 1 + 2**-24 is 1."""


def find_spellings(encode: Encode, text: str, label: str, model: str) -> tuple[Tokens, ...]:
    """The token sequences that spell `label` after `text`, found by tokenising both together.

    The label may follow directly or after a space; each may be one token or several (`10` as `1`, `0`).

    Args:
        encode: text to ids, without adding special tokens.
        text: everything before the label, as the model sees it.
        label: e.g. `1` or `10`.
        model: named in errors.

    Raises:
        ModelError: the tokenizer melts the label into the text before it.
    """
    before = list(encode(text))
    found: list[Tokens] = []
    for spelling in (label, " " + label):
        both = list(encode(text + spelling))
        if both[: len(before)] == before and len(both) > len(before):
            found.append(tuple(both[len(before) :]))
        if found and text[-1:].isspace():
            break  # the text has the space already
    if not found:
        raise ModelError(
            f"label {label!r} melts into the text before it with the tokenizer of {model}: "
            f"end the rubric's `ending` {text[-12:]!r} differently (without a trailing space)"
        )
    return tuple(dict.fromkeys(found))


def label_reads(spellings: Sequence[Sequence[Tokens]]) -> dict[Tokens, Tokens]:
    """What must be read to know the probability of every spelling.

    Args:
        spellings: of each label, the token sequences that spell it.

    Returns:
        For each continuation of the context, the ids whose next-token log-probabilities are needed there, both in
        a fixed order. One entry, the empty continuation, where every spelling is one token.

    Raises:
        ModelError: two labels have a spelling in common, such as the token for all that the tokenizer does not know.
    """
    of_all = [spelling for group in spellings for spelling in set(group)]
    if len(set(of_all)) < len(of_all):
        raise ModelError(
            "two labels of the rubric are the same tokens to this model, so it cannot tell them apart: choose another "
            "judge, or a rubric with labels that its tokenizer knows"
        )
    reads: dict[Tokens, set[int]] = {(): set()}
    for tokens in itertools.chain.from_iterable(spellings):
        for i, token in enumerate(tokens):
            reads.setdefault(tokens[:i], set()).add(token)
    return {after: tuple(sorted(reads[after])) for after in sorted(reads)}


def longest_reads(reads: Iterable[Tokens]) -> list[Tokens]:
    """The continuations that begin no other one.

    A forward pass gives the probabilities after each of its tokens, so one over each of these reads them all.
    """
    every = list(reads)
    return [a for a in every if not any(len(b) > len(a) and b[: len(a)] == a for b in every)]


def label_distribution(
    spellings: Sequence[Sequence[Tokens]], readings: Mapping[Tokens, Mapping[int, float]]
) -> LabelDistribution:
    """The exact distribution over labels from what `label_reads` asked for.

    A spelling has the product of its tokens' probabilities (chain rule). One that begins another one (`1` and
    `1`, `0`) has the probability of not being continued to it: P("1") = P(1) (1 - P(0 | 1)). The spellings of a
    label are summed.

    Args:
        spellings: as given to `label_reads`.
        readings: for each continuation, natural-log probability by token id; -inf is allowed.

    Raises:
        RequestFailed: a reading is no number.
    """
    if any(math.isnan(logprob) for told in readings.values() for logprob in told.values()):
        raise RequestFailed("the model computed NaN in place of a label's probability")
    log_p = {
        tokens: math.fsum(readings[tokens[:i]][token] for i, token in enumerate(tokens))
        for tokens in itertools.chain.from_iterable(spellings)
    }
    logprobs = tuple(
        max(logsumexp([_unless_continued(tokens, log_p) for tokens in group]), FLOOR) for group in spellings
    )
    return LabelDistribution(logprobs, min(1.0, math.fsum(map(math.exp, logprobs))))


def _unless_continued(tokens: Tokens, log_p: Mapping[Tokens, float]) -> float:
    """Log of the probability of `tokens` not going on to any of the longer spellings in `log_p`."""
    longer = [t for t in log_p if len(t) > len(tokens) and t[: len(tokens)] == tokens]
    first = [t for t in longer if not any(len(s) < len(t) and t[: len(s)] == s for s in longer)]
    if log_p[tokens] == -math.inf or not first:
        return log_p[tokens]
    continued = math.fsum(math.exp(log_p[t] - log_p[tokens]) for t in first)
    return log_p[tokens] + math.log1p(-continued) if continued < 1.0 else -math.inf


def find_aliases(vocabulary: Mapping[int, str], label: str) -> list[int]:
    """Ids of all tokens that read as `label` once white space around them is gone, in id order.

    Args:
        vocabulary: the *decoded* text of every id that is not a control token.
        label: the label's text.
    """
    return sorted(i for i, text in vocabulary.items() if text.strip() == label)


def logsumexp(values: Sequence[float]) -> float:
    """Log of the sum of exponentials; -inf for no values."""
    top = max(values, default=-math.inf)
    if top == -math.inf:
        return -math.inf
    return top + math.log(math.fsum(math.exp(v - top) for v in values))


def read_top_tokens(top: Sequence[tuple[str, float]], labels: Sequence[str]) -> LabelDistribution:
    """A label distribution from the list of likeliest next tokens that an endpoint reports.

    Tokens that equal a label up to surrounding white space are its aliases and are summed. Labels that are
    not in the list get the bound of `unlisted_bound`, and the distribution is `censored`. The mass is that of the
    listed labels: a bound is no reading.

    Args:
        top: (token text, natural-log probability) of the likeliest tokens.
        labels: the closed set.

    Raises:
        RequestFailed: no label is in the list, so nothing is known of their order.
    """
    aliases: dict[str, list[float]] = {}
    for text, lp in top:
        aliases.setdefault(text.strip(), []).append(lp)
    readings = [logsumexp(aliases.get(label, ())) for label in labels]
    if all(reading == -math.inf for reading in readings):
        raise RequestFailed(f"none of the labels {', '.join(labels)} is among the top {len(top)} tokens")
    mass = math.fsum(math.exp(r) for r in readings)
    unlisted = readings.count(-math.inf)
    bound = unlisted_bound(top, max(1, unlisted))
    return LabelDistribution(
        tuple(bound if r == -math.inf else r for r in readings), mass=min(mass, 1.0), censored=unlisted > 0
    )


def unlisted_bound(top: Sequence[tuple[str, float]], count: int = 1) -> float:
    """The largest log-probability that each of some tokens outside the list can have at once.

    None is likelier than the last of the list, and together they have at most what it leaves over. A list that sums
    to 1 leaves what rounding hides.

    Args:
        top: (token text, natural-log probability) of the likeliest tokens.
        count: how many tokens share what is left, > 0.
    """
    last = min(lp for _, lp in top)
    left = 1.0 - math.fsum(math.exp(lp) for _, lp in top)
    return min(last, math.log(max(left, _HIDDEN) / count))

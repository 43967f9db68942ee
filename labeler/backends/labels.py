"""Which token ids stand for a label. Wrong ids give plausible, wrong probabilities, so nothing is guessed."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from labeler.llm import RequestFailed
from rlaif.errors import ModelError
from rlaif.types import LabelDistribution

Encode = Callable[[str], Sequence[int]]


def resolve_label(encode: Encode, text: str, label: str, model: str) -> tuple[int, ...]:
    """Ids of the tokens that spell `label` after `text`, found by tokenising both together.

    The label may follow directly or after a space; which of them is one token depends on the tokenizer.

    Args:
        encode: text to ids, without adding special tokens.
        text: everything before the label, as the model sees it.
        label: e.g. `1` or `10`.
        model: named in errors.

    Raises:
        ModelError: the tokenizer splits the label into several tokens, or melts it into the text before.
    """
    before = list(encode(text))
    found, split = [], False
    for spelling in (label, " " + label):
        both = list(encode(text + spelling))
        if both[: len(before)] != before:
            continue
        rest = both[len(before) :]
        if len(rest) == 1:
            found.append(rest[0])
        else:
            split = True
    if found:
        return tuple(dict.fromkeys(found))
    if split:
        raise ModelError(
            f"the tokenizer of {model} splits the label {label!r} into several tokens, so the first would "
            "absorb other labels: use a rubric with one-token labels (such as 1 to 9, or A to J)"
        )
    raise ModelError(
        f"label {label!r} melts into the text before it with the tokenizer of {model}: "
        f"end the rubric's `ending` {text[-12:]!r} differently (without a trailing space)"
    )


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

    Tokens that equal a label up to surrounding white space are its aliases and are summed. A label that is
    not in the list is at most as likely as the last token of it, and as what the list leaves over: it gets
    the smaller of these bounds, and the distribution is `censored`.

    Args:
        top: (token text, natural-log probability) of the likeliest tokens.
        labels: the closed set.

    Raises:
        RequestFailed: no label is in the list, so nothing is known of their order.
    """
    readings = [logsumexp([lp for text, lp in top if text.strip() == label]) for label in labels]
    if all(reading == -math.inf for reading in readings):
        raise RequestFailed(f"none of the labels {', '.join(labels)} is among the top {len(top)} tokens")
    mass = math.fsum(math.exp(r) for r in readings)
    left = 1.0 - math.fsum(math.exp(lp) for _, lp in top)
    bound = min(lp for _, lp in top)
    if left > 0.0:
        bound = min(bound, math.log(left))
    censored = any(r == -math.inf for r in readings)
    return LabelDistribution(
        tuple(bound if r == -math.inf else r for r in readings), mass=min(mass, 1.0), censored=censored
    )

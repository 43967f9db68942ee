"""Pairs of summaries of posts that training never drew, to measure judges on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import count

from tinyworld.gold import gold_prefers
from tinyworld.grammar import SO_SO, make_behaviour, make_post, make_summary, make_variant

UNSEEN = 1 << 50
"""Seeds from here on are never drawn in training, whose seeds of posts have 48 bits."""

Triple = tuple[str, str, str]
"""A post and two summaries."""

Writer = Callable[[int], Triple]
"""Makes the pair of this number."""


def so_so_pair(i: int) -> Triple:
    """An unseen post with two summaries in the manner of the shipped policy."""
    post = make_post(UNSEEN + i)
    return post.text, make_summary(post, 2 * i, SO_SO), make_summary(post, 2 * i + 1, SO_SO)


def mixed_pair(i: int) -> Triple:
    """An unseen post with two summaries of random quality, or one and a variant of it; some are damaged."""
    post = make_post(UNSEEN + i)
    first = make_summary(post, 2 * i, make_behaviour(2 * i))
    second = (
        make_variant(post, first, i) if i % 2 else make_summary(post, 2 * i + 1, make_behaviour(2 * i + 1))
    )
    return (post.text, first, second) if i % 4 < 2 else (post.text, second, first)


WRITERS: dict[str, Writer] = {"so_so": so_so_pair, "mixed": mixed_pair}


def decided(writer: Writer, first: int = 0) -> Iterator[Triple]:
    """The writer's pairs from number `first` on, without those that gold ties; without end."""
    return (triple for triple in map(writer, count(first)) if gold_prefers(*triple) != 0.5)

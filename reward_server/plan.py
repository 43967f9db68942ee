"""How the sequences of a batch are computed: which ones share a prefix, and which ones share a forward pass.

Pure functions on token ids, without a model. A prefix that several sequences begin with is computed once; what is
left is sorted by length and cut where padding would cost more than one more forward pass.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

Ids = Sequence[int]

Key = Callable[[Ids], Hashable]
"""Sequences with equal keys may share a padded pass; of others, one would change the score of another."""

_CUTS = 32
"""Places where a batch may be cut, at most: finding the best of all places takes quadratic time."""

_DEPTH = 32
"""Prefixes within prefixes that are looked at: a caller chooses the texts, and with them the depth."""


@dataclass(frozen=True, slots=True)
class Costs:
    """What a device makes of forward passes.

    Attributes:
        overhead: fixed cost of a forward pass, in tokens that could have been computed instead.
        best_tokens: beyond so many tokens, padding included, a forward pass is no longer cheaper per token.
    """

    overhead: int
    best_tokens: int


@dataclass(frozen=True, slots=True)
class Group:
    """Sequences that begin with the same tokens, and how what follows is computed.

    Attributes:
        prefix: tokens computed once for all of them; 0 if nothing is shared.
        passes: rows of each forward pass over what follows, as indices into the batch.
        pads: whether the rows of a pass are as long as the longest.
    """

    prefix: int
    passes: tuple[tuple[int, ...], ...]
    pads: bool = True

    def tokens(self, sequences: Sequence[Ids]) -> int:
        """Tokens that the device computes, padding included."""
        found = self.prefix
        for rows in self.passes:
            lengths = [len(sequences[i]) - self.prefix for i in rows]
            found += len(rows) * max(lengths) if self.pads else sum(lengths)
        return found


def plan(
    sequences: Sequence[Ids],
    costs: Costs,
    *,
    share: bool,
    pads: bool = True,
    pad_id: int | None = None,
    key: Key | None = None,
) -> list[Group]:
    """Every sequence in one pass of one group, at the least cost found.

    Args:
        sequences: token ids, none empty.
        costs: of the device.
        share: whether the model can compute a prefix once.
        pads: whether the rows of a pass are as long as the longest.
        pad_id: PAD, which pooling by the last other token steps over.
        key: which sequences may share a pass; None lets any. Those that share a prefix are not asked.
    """
    alone = [(0, [i]) for i in range(len(sequences))]
    found = families(sequences, costs.overhead, pad_id) if share else alone
    single = [i for prefix, rows in found if not prefix for i in rows]
    groups = [(prefix, rows) for prefix, rows in found if prefix]
    groups += [(0, rows) for rows in companies(sequences, single, key)]
    return [
        Group(prefix, tuple(_passes(rows, [len(sequences[i]) - prefix for i in rows], costs, pads)), pads)
        for prefix, rows in groups
    ]


def companies(sequences: Sequence[Ids], rows: Iterable[int], key: Key | None) -> list[list[int]]:
    """Rows, as indices into the sequences, apart by their key; all together without one."""
    found: dict[Hashable, list[int]] = {}
    for i in rows:
        found.setdefault(key and key(sequences[i]), []).append(i)
    return list(found.values())


def families(
    sequences: Sequence[Ids], overhead: int, pad_id: int | None = None
) -> list[tuple[int, list[int]]]:
    """Sequences that are best computed after a common prefix, as (length of the prefix, indices); 0 for one alone.

    In lexicographic order all that share a prefix are neighbours. A run of them is cut at its shortest common prefix
    as long as its parts, each with a longer one, cost less than the whole; `overhead` is that of `Costs`.
    """
    order = sorted(range(len(sequences)), key=lambda i: tuple(sequences[i]))
    last = [pooled(sequences[i], pad_id) for i in order]
    common = [  # the token that the head reads must not be part of a shared prefix
        min(common_prefix(sequences[a], sequences[b]), last[n], last[n + 1])
        for n, (a, b) in enumerate(pairwise(order))
    ]
    lengths = [len(sequences[i]) for i in order]
    found: list[tuple[int, list[int]]] = []
    for start, end in _runs(common, 0, len(order), 2 * overhead):
        found += [(prefix, order[a:b]) for prefix, a, b in _best(common, lengths, start, end, overhead)[1]]
    return found


def common_prefix(a: Ids, b: Ids) -> int:
    """Tokens that both begin with; by bisection, since comparing slices is fast."""
    low, high = 0, min(len(a), len(b))
    if a[:high] == b[:high]:
        return high
    while high - low > 1:
        middle = (low + high) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle
    return low


def pooled(sequence: Ids, pad_id: int | None) -> int:
    """Index of the token that the head of a causal model reads: the last one that is not PAD."""
    last = len(sequence) - 1
    while last > 0 and sequence[last] == pad_id:
        last -= 1
    return last


def _runs(common: Sequence[int], start: int, end: int, above: int) -> list[tuple[int, int]]:
    """Cut [start, end) between neighbours with no more than `above` tokens in common."""
    edges = [start, *(i + 1 for i in range(start, end - 1) if common[i] <= above), end]
    return [(a, b) for a, b in pairwise(edges) if a < b]


def _best(
    common: Sequence[int], lengths: Sequence[int], start: int, end: int, overhead: int, depth: int = 0
) -> tuple[int, list[tuple[int, int, int]]]:
    """Least cost of a run in tokens, and its families as (prefix, start, end)."""
    if end - start == 1:
        return lengths[start], [(0, start, end)]
    prefix = min(common[start : end - 1])
    # A family takes two passes of its own: its prefix, and what follows.
    whole = 2 * overhead + sum(lengths[start:end]) - (end - start - 1) * prefix
    if depth == _DEPTH:
        return whole, [(prefix, start, end)]
    parts = [_best(common, lengths, a, b, overhead, depth + 1) for a, b in _runs(common, start, end, prefix)]
    apart = sum(cost for cost, _ in parts)
    if whole < apart:
        return whole, [(prefix, start, end)]
    return apart, [family for _, found in parts for family in found]


def _passes(rows: Sequence[int], lengths: Sequence[int], costs: Costs, pads: bool) -> list[tuple[int, ...]]:
    """Cut rows, sorted by length, into forward passes: shortest path over the places where they may be cut."""
    order = sorted(range(len(rows)), key=lengths.__getitem__)
    step = math.ceil(len(rows) / _CUTS)
    cuts = [*range(0, len(rows), step), len(rows)]
    before = [0, *accumulate(lengths[i] for i in order)]
    least = [0.0] + [math.inf] * (len(cuts) - 1)
    back = [0] * len(cuts)
    for end in range(1, len(cuts)):
        width = lengths[order[cuts[end] - 1]]
        for start in range(end - 1, -1, -1):
            real = before[cuts[end]] - before[cuts[start]]
            tokens = (cuts[end] - cuts[start]) * width if pads else real
            if tokens > costs.best_tokens and start < end - 1:
                break
            cost = least[start] + tokens + costs.overhead
            if cost < least[end]:
                least[end], back[end] = cost, start
    found = []
    end = len(cuts) - 1
    while end:
        found.append(tuple(rows[i] for i in order[cuts[back[end]] : cuts[end]]))
        end = back[end]
    return found

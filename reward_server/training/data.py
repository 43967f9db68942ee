"""What a reward model is trained on: labelled responses, prompt by prompt, each response encoded once.

All that is known of a prompt shares a step, and in a step each response is computed once however many comparisons it is
in. Shuffled into different steps, each of K responses would be learnt from K - 1 times in an epoch, and overfitted
(InstructGPT, arXiv 2203.02155, "Reward modeling").
"""

from __future__ import annotations

import hashlib
import math
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from transformers import PreTrainedTokenizerBase

from reward_server.training.config import LossType, RewardModelConfig
from rlaif.chat import encode_conversation
from rlaif.errors import DataError
from rlaif.records import Quarantine, read_preferences, read_scored
from rlaif.types import Conversation, PreferenceRow, ScoredRow, content_id, with_response

Ids = tuple[int, ...]
Row = PreferenceRow | ScoredRow
R = TypeVar("R", bound=Row)


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two responses of a unit and their label.

    Attributes:
        chosen: place of one of them among the unit's sequences.
        rejected: place of the other.
        chosen_prob: P(chosen preferred), in [0, 1].
        margin: by how much the score of the chosen one should be higher.
    """

    chosen: int
    rejected: int
    chosen_prob: float
    margin: float = 0.0


@dataclass(frozen=True, slots=True)
class Unit:
    """Responses to one prompt that are computed together, and what is known of them.

    Attributes:
        sequences: token ids of prompt and response, one for each distinct response.
        comparisons: labelled pairs of them; empty if they are scored.
        scores: the score of each; empty if they are compared.
    """

    sequences: tuple[Ids, ...]
    comparisons: tuple[Comparison, ...] = ()
    scores: tuple[float, ...] = ()

    @property
    def terms(self) -> int:
        """Terms of the loss: comparisons or scores."""
        return len(self.comparisons) or len(self.scores)

    @property
    def width(self) -> int:
        """Length of the longest sequence in tokens."""
        return max(map(len, self.sequences))


PromptUnits = tuple[Unit, ...]
"""All that is known of one prompt. Comparisons that share a response are in one unit."""


@dataclass(frozen=True, slots=True)
class Scale:
    """How scores become targets: (score - mean) / std, whatever their scale, and although most heads have no bias."""

    mean: float
    std: float

    @classmethod
    def of(cls, rows: Iterable[ScoredRow]) -> Scale:
        """The scale of the rows' scores.

        Raises:
            DataError: all scores are the same, so that there is nothing to learn.
        """
        scores = [row.score for row in rows]
        std = statistics.pstdev(scores)
        if std == 0:
            raise DataError(
                f"all {len(scores)} scores are {scores[0]:g}: there is nothing to learn from them"
            )
        return cls(statistics.fmean(scores), std)


# ---- reading ----


def read_split(config: RewardModelConfig, quarantine_path: Path) -> tuple[list[Row], list[Row]]:
    """Training and held-out rows; bad rows go to the quarantine file with their line number.

    Raises:
        DataError: either part is empty, or a margin is missing that the loss needs.
    """
    quarantine = Quarantine(quarantine_path)
    rows = list(_read(config.dataset, config.loss_type, quarantine))
    if config.eval_dataset is not None:
        training, held_out = rows, list(_read(config.eval_dataset, config.loss_type, quarantine))
    else:
        training, held_out = [], []
        for row in rows:
            (held_out if is_held_out(row, config.eval_fraction, config.split_seed) else training).append(row)
    if quarantine.count:
        print(f"{quarantine.count} rows could not be used: {quarantine_path} says why", flush=True)
    training = _learnable(training, config)
    if not training:
        raise DataError(f"{config.dataset} has nothing to train on for --loss_type {config.loss_type}")
    if not held_out:
        raise DataError("no prompts are held out to measure on: raise --eval_fraction or give --eval_dataset")
    return training, held_out


def _read(path: Path, loss_type: LossType, quarantine: Quarantine) -> Iterator[Row]:
    return read_scored(path, quarantine) if loss_type == "regression" else read_preferences(path, quarantine)


def _learnable(rows: list[Row], config: RewardModelConfig) -> list[Row]:
    """Rows that the loss can learn from: hard labels leave ties out."""
    if config.loss_type not in ("bradley_terry", "margin"):
        return rows
    decided = [row for row in rows if isinstance(row, PreferenceRow) and row.chosen_prob != 0.5]
    if len(decided) < len(rows):
        print(
            f"{len(rows) - len(decided)} ties are left out: --loss_type {config.loss_type} reads hard labels",
            flush=True,
        )
    lacking = sum(_margin(row) is None for row in decided)
    if config.loss_type == "margin" and lacking:
        raise DataError(
            f"{lacking} of {len(decided)} training pairs in {config.dataset} have no margin: --loss_type margin "
            "needs a column `margin` of finite numbers"
        )
    return list(decided)


def _margin(row: PreferenceRow) -> float | None:
    margin = row.extra.get("margin")
    is_number = isinstance(margin, int | float) and not isinstance(margin, bool) and math.isfinite(margin)
    return float(margin) if is_number else None  # type: ignore[arg-type]


def is_held_out(row: Row, fraction: float, seed: int) -> bool:
    """Whether a row is measured on: a function of its prompt and the seed alone, so prompts never straddle."""
    return int(content_id(seed, row.prompt), 16) / 16**16 < fraction


def data_hash(rows: Sequence[Row]) -> str:
    """Content hash of rows; 16 hex digits."""
    digest = hashlib.sha256()
    for row in rows:
        if isinstance(row, ScoredRow):
            parts: tuple[object, ...] = (row.prompt, row.response, row.score)
        else:
            parts = (row.prompt, row.chosen, row.rejected, row.chosen_prob)
        digest.update(content_id(*parts).encode())
    return digest.hexdigest()[:16]


# ---- encoding ----


def by_prompt(
    rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, max_length: int, loss_type: LossType
) -> list[PromptUnits]:
    """Everything that rows say of each prompt; too long conversations lose the oldest tokens of their prompt.

    Raises:
        DataError: the chat template refuses a conversation, or all scores are the same.
    """

    def encode(prompt: Conversation, response: str) -> Ids:
        conversation = with_response(prompt, response)
        return tuple(
            encode_conversation(tokenizer, conversation, max_length=max_length, truncation="left").ids
        )

    scored = [row for row in rows if isinstance(row, ScoredRow)]
    if scored:
        scale = Scale.of(scored)
        return [_scored_units(prompt, same, encode, scale) for prompt, same in _grouped(scored).items()]
    compared = [row for row in rows if isinstance(row, PreferenceRow)]
    return [_compared_units(prompt, same, encode, loss_type) for prompt, same in _grouped(compared).items()]


Encode = Callable[[Conversation, str], Ids]


def _grouped(rows: Sequence[R]) -> dict[Conversation, list[R]]:
    grouped: dict[Conversation, list[R]] = {}
    for row in rows:
        grouped.setdefault(row.prompt, []).append(row)
    return grouped


def _scored_units(
    prompt: Conversation, rows: Sequence[ScoredRow], encode: Encode, scale: Scale
) -> PromptUnits:
    """One unit for each distinct response; scores of the same response are averaged."""
    scores: dict[str, list[float]] = {}
    for row in rows:
        scores.setdefault(row.response, []).append((row.score - scale.mean) / scale.std)
    return tuple(
        Unit((encode(prompt, response),), scores=(statistics.fmean(given),))
        for response, given in scores.items()
    )


def _compared_units(
    prompt: Conversation, rows: Sequence[PreferenceRow], encode: Encode, loss_type: LossType
) -> PromptUnits:
    """One unit for each set of responses that comparisons link."""
    responses = list(dict.fromkeys(text for row in rows for text in (row.chosen, row.rejected)))
    place = {text: i for i, text in enumerate(responses)}
    sequences = [encode(prompt, text) for text in responses]
    units = []
    for members in linked(len(responses), [(place[row.chosen], place[row.rejected]) for row in rows]):
        inside = {i: position for position, i in enumerate(members)}
        comparisons = tuple(
            Comparison(inside[place[row.chosen]], inside[place[row.rejected]], *label(row, loss_type))
            for row in rows
            if place[row.chosen] in inside
        )
        units.append(Unit(tuple(sequences[i] for i in members), comparisons))
    return tuple(units)


def label(row: PreferenceRow, loss_type: LossType) -> tuple[float, float]:
    """(P(chosen preferred), margin) as the loss reads them."""
    if loss_type == "soft_cross_entropy":
        return row.chosen_prob, 0.0
    margin = _margin(row) if loss_type == "margin" else 0.0
    assert margin is not None  # rows without one were refused when they were read
    return float(row.chosen_prob > 0.5), margin


def linked(count: int, edges: Iterable[tuple[int, int]]) -> list[list[int]]:
    """Connected components of a graph with nodes 0 to `count` - 1; nodes ascend within each."""
    parent = list(range(count))

    def root(node: int) -> int:
        while parent[node] != node:
            parent[node] = parent[parent[node]]
            node = parent[node]
        return node

    for a, b in edges:
        parent[root(a)] = root(b)
    found: dict[int, list[int]] = {}
    for node in range(count):
        found.setdefault(root(node), []).append(node)
    return list(found.values())


# ---- steps and micro-batches ----


def plan_steps(terms: Sequence[int], size: int, seed: int, epochs: int) -> list[tuple[int, list[int]]]:
    """(epoch, places of the prompts) of every step of a run: whole prompts, up to `size` terms of the loss together.

    A function of its arguments, so that a resumed run needs no cursor. A prompt with more terms is a step of its own.

    Args:
        terms: of the loss, for each prompt.
        size: terms of a step.
        seed: of the order.
        epochs: passes over all prompts.
    """
    steps: list[tuple[int, list[int]]] = []
    for epoch in range(epochs):
        step: list[int] = []
        filled = 0
        for i in epoch_order(len(terms), seed, epoch):
            if step and filled + terms[i] > size:
                steps.append((epoch, step))
                step, filled = [], 0
            step.append(i)
            filled += terms[i]
        steps.append((epoch, step))
    return steps


def epoch_order(count: int, seed: int, epoch: int) -> list[int]:
    """The order of prompts in an epoch: a function of seed and epoch."""
    generator = torch.Generator().manual_seed(int(content_id(seed, epoch), 16) % 2**63)
    order: list[int] = torch.randperm(count, generator=generator).tolist()
    return order


def cut(units: Iterable[Unit], micro_batch_tokens: int) -> Iterator[list[Unit]]:
    """Micro-batches of neighbours in length, each at most `micro_batch_tokens` when padded, or a single unit."""
    micro_batch: list[Unit] = []
    rows = 0
    for unit in sorted(units, key=lambda u: u.width):
        if micro_batch and (rows + len(unit.sequences)) * unit.width > micro_batch_tokens:
            yield micro_batch
            micro_batch, rows = [], 0
        micro_batch.append(unit)
        rows += len(unit.sequences)
    if micro_batch:
        yield micro_batch


def describe(prompts: Sequence[PromptUnits]) -> str:
    """How much there is to learn from, for people."""
    units = [unit for prompt in prompts for unit in prompt]
    count = Counter[str]()
    for unit in units:
        count["responses"] += len(unit.sequences)
        count["pairs"] += len(unit.comparisons)
    pairs = f"{count['pairs']} pairs of " if count["pairs"] else ""
    return f"{pairs}{count['responses']} responses to {len(prompts)} prompts"

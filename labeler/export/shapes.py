"""Labelled pairs in the shapes that trainers read: pure functions from a row to rows.

TRL's dataset formats, conversational form (https://huggingface.co/docs/trl/dataset_formats): preference with an
explicit prompt, unpaired preference, and preference with a `margin`, which its RewardTrainer subtracts from the reward
difference.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from typing import Any

import pyarrow as pa

from labeler.export.config import Format
from labeler.outputs import MESSAGES
from labeler.preferences import is_tie
from rlaif.types import Conversation, Message, PreferenceRow, content_id, to_dicts

Rows = list[dict[str, Any]]

_PAIR = [("prompt", MESSAGES), ("chosen", MESSAGES), ("rejected", MESSAGES), ("chosen_prob", pa.float64())]
SCHEMAS: Mapping[Format, pa.Schema] = {
    "trl-preference": pa.schema([*_PAIR, ("id", pa.string())]),
    "trl-reward": pa.schema([*_PAIR, ("margin", pa.float64()), ("id", pa.string())]),
    "trl-unpaired": pa.schema(
        [
            ("prompt", MESSAGES),
            ("completion", MESSAGES),
            ("label", pa.bool_()),
            ("preferred_prob", pa.float64()),
            ("id", pa.string()),
        ]
    ),
    "parquet": pa.schema([*_PAIR, ("extra", pa.string())]),
}
"""Columns by format. That of `parquet` is for rows from JSON, whose further columns have no types to rely on; rows
from Parquet keep theirs."""


def as_preferred(row: PreferenceRow) -> PreferenceRow:
    """The row with the response that its label prefers as the chosen one; a margin changes its sign with it.

    TRL reads the order alone, so a row with `chosen_prob` below 1/2 would teach the contrary of its label. Of further
    columns only `id` and `margin` stay: what the others say of chosen and rejected is not known here.
    """
    kept = {name: row.extra[name] for name in ("id", "margin") if name in row.extra}
    if row.chosen_prob >= 0.5:
        return PreferenceRow(row.prompt, row.chosen, row.rejected, row.chosen_prob, kept)
    if _is_number(kept.get("margin")):
        kept["margin"] = -kept["margin"]
    return PreferenceRow(row.prompt, row.rejected, row.chosen, 1.0 - row.chosen_prob, kept)


def reason_to_drop(row: PreferenceRow, min_margin: float, ties: str) -> str | None:
    """Why a labelled pair is left out, or None.

    Args:
        row: labelled.
        min_margin: least |2 chosen_prob - 1|, in [0, 1].
        ties: `drop` or `keep`.
    """
    if is_tie(row.chosen_prob):
        return None if ties == "keep" and min_margin == 0 else "tie"
    if abs(2.0 * row.chosen_prob - 1.0) < min_margin:
        return f"margin below {min_margin:g}"
    return None


def shape(row: PreferenceRow, form: Format) -> Rows | str:
    """The row in a format: one row or two, or the reason why it has none."""
    return _SHAPES[form](row)


def _preference(row: PreferenceRow) -> Rows:
    row = as_preferred(row)
    return [{**_pair(row), "id": _id(row)}]


def _reward(row: PreferenceRow) -> Rows | str:
    row = as_preferred(row)
    margin = row.extra.get("margin", 2.0 * row.chosen_prob - 1.0)
    if not _is_number(margin):
        return "no margin"
    return [{**_pair(row), "margin": float(margin), "id": _id(row)}]


def _unpaired(row: PreferenceRow) -> Rows:
    row = as_preferred(row)
    sides = ((row.chosen, True, row.chosen_prob), (row.rejected, False, 1.0 - row.chosen_prob))
    return [
        {
            "prompt": to_dicts(row.prompt),
            "completion": _answer(response),
            "label": good,
            "preferred_prob": prob,
            "id": _id(row),
        }
        for response, good, prob in sides
    ]


def as_columns(row: PreferenceRow) -> dict[str, Any]:
    """All columns of a row, as the labelled dataset has them."""
    return {**_pair(row), **row.extra}


def as_known_columns(row: PreferenceRow) -> dict[str, Any]:
    """The columns whose meaning is known: all of a labelled dataset of ours, the pair's alone of any other."""
    return as_columns(row) if "rubric_hash" in row.extra else _pair(row)


def _everything(row: PreferenceRow) -> Rows:
    return [as_columns(row)]


_SHAPES: Mapping[Format, Callable[[PreferenceRow], Rows | str]] = {
    "trl-preference": _preference,
    "trl-reward": _reward,
    "trl-unpaired": _unpaired,
    "jsonl": _everything,
    "parquet": _everything,
}


def with_extra_as_json(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row of all columns under the schema of `parquet`: what has no column of its own becomes JSON text."""
    names = [name for name, _ in _PAIR]
    rest = {name: value for name, value in row.items() if name not in names}
    text = json.dumps(rest, ensure_ascii=False, default=str) if rest else None
    return {**{name: row[name] for name in names}, "extra": text}


def is_held_out(prompt: Conversation, share: float) -> bool:
    """Whether a prompt belongs to the held-out split: a function of its content, the same in every dataset.

    Args:
        prompt: all pairs of it fall on one side.
        share: of all prompts, in [0, 1).
    """
    return int(content_id("split", prompt), 16) < share * 2.0**64


def _pair(row: PreferenceRow) -> dict[str, Any]:
    return {
        "prompt": to_dicts(row.prompt),
        "chosen": _answer(row.chosen),
        "rejected": _answer(row.rejected),
        "chosen_prob": row.chosen_prob,
    }


def _answer(response: str) -> list[dict[str, str]]:
    return to_dicts((Message("assistant", response),))


def _id(row: PreferenceRow) -> str:
    given = row.extra.get("id")
    return str(given) if given is not None else content_id(row.prompt, row.chosen, row.rejected)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)

"""What a labeling run leaves behind beside its data file: report, dataset card, the list of what stays open."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from rlaif.errors import QualityError
from rlaif.runs import write_atomic
from rlaif.types import Judgment, LabelDistribution

MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
"""A conversation in the form that chat templates and TRL read."""


def judgment_to_dict(judgment: Judgment | None) -> dict[str, Any] | None:
    """A judgment as JSON values; a failed one is not meant to be kept."""
    if judgment is None or judgment.labels is None:
        return None
    return {
        "logprobs": list(judgment.labels.logprobs),
        "mass": judgment.labels.mass,
        "censored": judgment.labels.censored,
        "rationale": judgment.rationale,
        "prompt_tokens": judgment.prompt_tokens,
        "completion_tokens": judgment.completion_tokens,
        "cached_tokens": judgment.cached_tokens,
    }


def judgment_from_dict(record: Mapping[str, Any] | None) -> Judgment | None:
    """The inverse of `judgment_to_dict`."""
    if record is None:
        return None
    labels = LabelDistribution(tuple(record["logprobs"]), record["mass"], record["censored"])
    return Judgment(
        labels,
        record["rationale"],
        None,
        record["prompt_tokens"],
        record["completion_tokens"],
        record["cached_tokens"],
    )


def tokens_of(*judgments: Judgment | None) -> dict[str, int]:
    """Token counts of judgments together, under the names that records and datasets use."""
    given = [j for j in judgments if j is not None]
    return {
        "prompt_tokens": sum(j.prompt_tokens for j in given),
        "completion_tokens": sum(j.completion_tokens for j in given),
        "cached_tokens": sum(j.cached_tokens for j in given),
    }


def write_report(folder: Path, report: Mapping[str, Any]) -> None:
    """Write `report.json`."""
    write_atomic(folder / "report.json", json.dumps(report, indent=2, ensure_ascii=False) + "\n")


def write_unlabelled(folder: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write `unlabelled.jsonl`: what has no answer, each with its reason. No file when nothing is open."""
    path = folder / "unlabelled.jsonl"
    if rows or path.exists():
        write_atomic(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def write_card(folder: Path, title: str, data_file: str, text: str, report: Mapping[str, Any]) -> None:
    """Write `README.md`, the dataset card; its header tells `datasets.load_dataset` which file to read."""
    facts = "\n".join(f"| {name} | {_cell(value)} |" for name, value in report.items())
    card = f"""---
configs:
- config_name: default
  data_files: {data_file}
tags:
- rlaif
- preference
---

# {title}

{text}

| | |
| --- | --- |
{facts}
"""
    write_atomic(folder / "README.md", card)


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{k}: {_cell(v)}" for k, v in value.items()) or "none"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(_cell, value)) + "]"
    return str(value)


def print_summary(title: str, report: Mapping[str, Any]) -> None:
    """Print the report on standard output, one fact per line."""
    print(title)
    width = max(map(len, report))
    for name, value in report.items():
        print(f"  {name:<{width}}  {_cell(value)}")


def by_reason(reasons: Iterable[str]) -> dict[str, int]:
    """How often each reason occurs, most frequent first."""
    return dict(Counter(reasons).most_common())


def refuse_if_too_many_open(
    reasons: Mapping[str, int], total: int, allowed: float, folder: Path, what: str
) -> None:
    """Raise if too many rows stayed without an answer; everything is written by then.

    Args:
        reasons: number of open rows by reason.
        total: rows in all.
        allowed: share of `total` in [0, 1] that may stay open.
        folder: the run's directory.
        what: e.g. `pairs are unlabelled`.

    Raises:
        QualityError: the share is larger.
    """
    count = sum(reasons.values())
    if total and count / total > allowed:
        first = next(iter(reasons))
        raise QualityError(
            f"{count} of {total} {what} (most often: {first}); see {folder / 'unlabelled.jsonl'}, "
            "then run the same command again: it asks for these alone"
        )

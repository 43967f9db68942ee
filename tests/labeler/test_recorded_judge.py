"""Replies of a commercial judge, with its recorded log-probabilities, against the preferences published from them.

The recordings and the preferences are AlpacaEval's (see `source` in the file): GPT-4 Turbo with five likeliest tokens,
answering with the identifier `m` or `M` of the better model; published is 1 + P(output_2 preferred).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from labeler.backends.completions import read_recorded
from labeler.llm import RequestFailed

FILE = Path(__file__).parent / "recorded" / "gpt4_turbo_top5.json"
ROWS: list[dict[str, Any]] = json.loads(FILE.read_text())["rows"]


def completion(row: dict[str, Any]) -> dict[str, Any]:
    return {"choices": [row["raw_completion"]], "usage": {"prompt_tokens": 900, "completion_tokens": 1}}


@pytest.mark.parametrize("row", ROWS, ids=range(len(ROWS)))
def test_recorded_log_probabilities_become_the_published_soft_label(row: dict[str, Any]) -> None:
    reading = read_recorded(completion(row), row["labels"])
    assert reading.distribution.probs[1] == pytest.approx(row["preference"] - 1, abs=1e-4)
    assert not reading.distribution.censored
    assert 0.99 < reading.distribution.mass <= 1.0


def test_upper_and_lower_case_are_different_labels() -> None:
    one, other = (read_recorded(completion(ROWS[0]), labels) for labels in (("m", "M"), ("M", "m")))
    assert one.distribution.probs == other.distribution.probs[::-1]
    with pytest.raises(RequestFailed, match="none of the labels"):
        read_recorded(completion(ROWS[0]), ("A", "B"))

"""Biases, baselines and lineage: small cases by hand."""

from __future__ import annotations

import asyncio
import math

import pytest

from labeler.audit.baselines import Baseline, BaselineJudge
from labeler.audit.biases import formatting, lean, length
from labeler.audit.lineage import families, relatives
from rlaif.types import Pair, user_prompt

NAN = float("nan")


@pytest.mark.parametrize(
    ("text", "marks"),
    [
        ("plain text with 2 * 3 and a - b", 0),
        ("# Title\n\ntext", 1),
        ("#hashtag", 0),
        ("- one\n- two\n  * three", 3),
        ("1. one\n2) two\n1999 was a year", 2),
        ("some **bold** and `code`", 2),
        ("```\nx = 1\n```", 2),
        ("| a | b |\n|---|---|", 2),
        ("> quoted", 1),
        ("snake_case_name and __init__", 1),
    ],
    ids=[
        "plain",
        "heading",
        "hashtag",
        "bullets",
        "numbers",
        "spans",
        "fence",
        "table",
        "quote",
        "underscores",
    ],
)
def test_markdown_marks_are_counted(text: str, marks: int) -> None:
    assert formatting(text) == marks


def test_white_space_around_a_text_adds_no_length() -> None:
    assert length("  four\n\n") == 4


def test_lean_by_hand() -> None:
    # A is longer in the first three pairs, B in the next two, the last is even and left out. The judge takes the
    # longer one in four of five (1, 1, 0, 1, 1); people decide four of them and take the longer one in two.
    found = lean(
        p=[0.9, 0.8, 0.3, 0.1, 0.2, 0.9],
        more=[5, 1, 2, -3, -1, 0],
        human=[1, 0, 1, 1, NAN, 0],
    )
    assert found.pairs == 5
    assert found.judge == pytest.approx(4 / 5)
    assert found.people == pytest.approx(2 / 4)
    assert found.excess == pytest.approx(3 / 4 - 2 / 4)
    # It errs on the second (longer), third (shorter) and fourth (longer).
    assert found.errors == pytest.approx(2 / 3)


def test_lean_counts_ties_of_the_judge_as_half_and_leaves_out_those_of_people() -> None:
    found = lean(p=[0.5, 1.0], more=[1, 1], human=[1.0, 0.5])
    assert (found.judge, found.people, found.excess) == (0.75, 1.0, -0.5)


def test_lean_does_not_care_which_response_is_called_a() -> None:
    p, more, human = [0.9, 0.3, 0.6], [1, -2, 3], [1.0, 1.0, 0.0]
    swapped = lean([1 - x for x in p], [-x for x in more], [1 - x for x in human])
    assert swapped == lean(p, more, human)


def test_lean_without_people_or_without_pairs_is_unknown() -> None:
    assert math.isnan(lean([0.9], [1], [NAN]).people)
    assert math.isnan(lean([0.9], [0], [1.0]).judge)


@pytest.mark.parametrize(
    ("kind", "p"),
    [("longer", 1.0), ("shorter", 0.0), ("formatted", 0.0)],
    ids=["longer", "shorter", "formatted"],
)
def test_a_baseline_judges_by_its_rule_and_is_symmetric(kind: Baseline, p: float) -> None:
    pair = Pair(user_prompt("?"), "a much longer answer", "**short**")
    judge = BaselineJudge(kind)
    assert asyncio.run(judge.judge_pair(pair)).p_a == p
    assert asyncio.run(judge.judge_pair(pair.swapped())).p_a == 1 - p
    assert asyncio.run(judge.judge_pair(Pair(user_prompt("?"), "abc", "xyz"))).p_a == 0.5


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("openai:meta-llama/Llama-3.1-8B-Instruct@http://mistral.example/v1", {"Llama"}),
        ("hf:mistralai/Mixtral-8x7B-v0.1", {"Mistral"}),
        ("HuggingFaceH4/zephyr-7b-beta", {"Mistral"}),
        ("deepseek-ai/DeepSeek-R1-Distill-Qwen-7B", {"DeepSeek", "Qwen"}),
        ("openai:gpt-4o-mini", {"GPT"}),
        ("openai/o3-mini", {"GPT"}),
        ("google/gemma-3-4b-it", {"Gemini/Gemma"}),
        ("microsoft/phi-4", {"Phi"}),
        ("cognitivecomputations/dolphin", set()),
        ("EleutherAI/gpt-neo-2.7B", set()),
        ("philosopher-7b", set()),
        ("tinyworld:judge", {"tinyworld"}),
    ],
)
def test_families_are_read_from_names(name: str, expected: set[str]) -> None:
    assert families(name) == expected


def test_relatives_are_named_once_each_and_strangers_are_not() -> None:
    found = relatives(
        ["openai:Qwen/Qwen3-32B@http://host/v1"], ["Qwen2.5-7B", "Qwen2.5-7B", "llama-3", "", "unknown"]
    )
    assert len(found) == 1
    assert "Qwen2.5-7B are both of the Qwen family" in found[0]


def test_a_judge_of_its_own_answers_is_named_even_if_its_family_is_unknown() -> None:
    (found,) = relatives(["openai:My_Model@http://host/v1"], ["my-model"])
    assert "are the same model" in found

"""The shipped models, measured on posts that training never drew."""

from pathlib import Path

import pytest

from tinyworld import WORLD_DIR
from tinyworld.measure import load, measure_pairs, measure_policy, measure_scores
from tinyworld.pairs import mixed_pair, so_so_pair
from tinyworld.tokenizer import build_tokenizer

WEIGHTS = WORLD_DIR / "weights"
MODELS = ("judge", "judge-fewshot", "judge-medium", "judge-small", "judge-tiny", "policy")


@pytest.fixture(scope="module")
def judge():
    return load(WEIGHTS / "judge")


def test_all_weights_together_are_at_most_nine_mebibytes():
    files = list(WEIGHTS.glob("*/*.safetensors"))
    assert {f.parent.name for f in files} == set(MODELS)
    assert sum(f.stat().st_size for f in files) <= 9 * 2**20


@pytest.mark.parametrize("name", MODELS)
def test_the_shipped_tokenizer_is_the_one_the_code_builds(name):
    _, shipped = load(Path(WEIGHTS / name))
    built = build_tokenizer()
    assert shipped.get_vocab() == built.get_vocab()
    assert shipped.chat_template == built.chat_template
    assert (shipped.pad_token, shipped.eos_token) == (built.pad_token, built.eos_token)


@pytest.mark.slow
@pytest.mark.parametrize(("writer", "least"), [(so_so_pair, 0.95), (mixed_pair, 0.93)])
def test_the_judge_agrees_with_gold_once_it_reasons_and_less_when_it_must_answer_at_once(
    judge, writer, least
):
    reasoned = measure_pairs(*judge, writer, 200, cot=True)
    at_once = measure_pairs(*judge, writer, 200, cot=False)
    assert reasoned["both_orders"] >= least
    assert at_once["both_orders"] <= reasoned["both_orders"] - 0.05


@pytest.mark.slow
@pytest.mark.parametrize(
    "asked", [{}, {"preamble": "base", "num_exemplars": 1}, {"preamble": "detailed", "num_exemplars": 2}]
)
def test_preambles_and_exemplars_do_not_throw_the_fewshot_judge_off(asked):
    figures = measure_pairs(*load(WEIGHTS / "judge-fewshot"), so_so_pair, 100, cot=True, **asked)
    assert figures["both_orders"] >= 0.93


@pytest.mark.slow
def test_a_smaller_judge_agrees_less_and_prefers_positions_more():
    medium, small, tiny = (
        measure_pairs(*load(WEIGHTS / name), mixed_pair, 100, cot=True)
        for name in ("judge-medium", "judge-small", "judge-tiny")
    )
    assert medium["both_orders"] >= 0.93  # as much as is asked of the large one
    assert 0.85 > small["both_orders"] > tiny["both_orders"] + 0.05
    assert medium["same_position"] + 0.1 < small["same_position"] < tiny["same_position"] - 0.1


@pytest.mark.slow
def test_the_judges_expected_score_ranks_as_gold_does(judge):
    assert measure_scores(*judge, mixed_pair, 200, cot=True)["spearman"] >= 0.85


@pytest.mark.slow
def test_the_policy_is_fluent_varied_and_mediocre():
    figures = measure_policy(*load(WEIGHTS / "policy"), 200)
    assert figures["fluent"] >= 0.97
    assert 0.0 <= figures["gold"] <= 0.5  # the middle third of [-1/2, 1]
    assert figures["distinct"] >= 0.8

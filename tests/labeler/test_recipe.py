"""The options of the recipe: fallbacks, self-consistency, one order, graded labels."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from typing import Any

import pytest

from labeler.backends.scripted import Asked, ScriptedModel
from labeler.judge import Judge, Recipe, average
from labeler.llm import Abilities, Generation, RequestFailed
from labeler.preferences import graded_margin
from labeler.rubric import Rubric, RubricFile, load_rubric
from labeler.verdicts import VERDICT_ASK
from rlaif.errors import EndpointError
from rlaif.types import Judgment, LabelDistribution, Pair, Preference, user_prompt

PAIR = Pair(user_prompt("Which?"), "an answer", "some other answer")


class Mute(ScriptedModel):
    """A model without log-probabilities."""

    async def probe(self) -> Abilities:
        return Abilities("none")


def first_is_a(asked: Asked) -> bool:
    return asked.user.index(PAIR.a) < asked.user.index(PAIR.b)


def judged(
    model: ScriptedModel, rubric: str = "helpfulness-pair", cot: bool = False, **recipe: Any
) -> Preference:
    judge = Judge(model, load_rubric(rubric).with_options(cot=cot), Recipe(**recipe))
    return asyncio.run(judge.judge_pair(PAIR))


def never(asked: Asked) -> str:
    raise AssertionError("nothing may be asked")


def test_a_model_without_log_probabilities_is_refused_before_anything_is_paid_for() -> None:
    judge = Judge(Mute(never), load_rubric("helpfulness-pair"))
    with pytest.raises(EndpointError, match="--fallback samples"):
        asyncio.run(judge.prepare())


def test_samples_of_the_label_follow_the_rule_of_succession() -> None:
    said = iter("1112" * 2)

    def reply(asked: Asked) -> str:
        assert (asked.temperature, asked.max_tokens) == (1.0, 16)
        letter = next(said)
        return letter if first_is_a(asked) else {"1": "2", "2": "1"}[letter]

    preference = judged(Mute(reply), fallback="samples", num_samples=4)
    assert preference.p_a == pytest.approx((3 + 1) / (4 + 2))
    assert preference.ab is not None and preference.ab.source == "samples"


def test_samples_have_seeds_of_their_own() -> None:
    model = Mute(lambda asked: "1")
    judged(model, fallback="samples", num_samples=5)
    assert len({(a.user, a.seed) for a in model.asked}) == len(model.asked) == 10


def test_off_menu_samples_lower_the_mass_and_nothing_but_them_leaves_the_pair_unlabelled() -> None:
    said = iter(["1", "I cannot say.", "2", "1"] * 2)
    preference = judged(Mute(lambda asked: next(said)), fallback="samples", num_samples=4)
    assert preference.ab is not None and preference.ab.labels is not None
    assert preference.ab.labels.mass == pytest.approx(3 / 4)
    silent = judged(Mute(lambda asked: "I cannot say."), fallback="samples", num_samples=4)
    assert (silent.p_a, silent.reason) == (None, "none of 4 samples is one of the labels")


def test_a_graded_verdict_is_asked_for_in_place_of_the_rubrics_closing() -> None:
    def reply(asked: Asked) -> str:
        assert asked.user.endswith(VERDICT_ASK) and asked.prefix == ""
        return "Both try.\n\nVerdict: " + ("1>2" if first_is_a(asked) else "2>>1")

    model = Mute(reply)
    preference = judged(model, cot=True, fallback="verdict")
    # By hand: 0.75 for A as number 1, 0.95 for A as number 2.
    assert preference.p_a == pytest.approx((0.75 + 0.95) / 2)
    assert preference.ab is not None and preference.ab.source == "verdict"
    assert preference.ab.rationale == "Both try.\n\nVerdict: 1>2"
    assert len(model.asked) == 2


def test_a_reply_without_a_verdict_leaves_the_pair_unlabelled() -> None:
    preference = judged(Mute(lambda asked: "Response 1 gets 7 points."), fallback="verdict")
    assert (preference.p_a, preference.reason) == (None, "the reply has no verdict")


def cut(text: str) -> Mute:
    """Every reply is this text, cut off at its limit."""
    return Mute(lambda asked: Generation(text, "length", 9, 512))


def test_a_verdict_on_the_way_to_one_that_was_cut_off_is_none() -> None:
    preference = judged(cut("First thought.\nVerdict: 1>2\nBut wait, response 2 covers"), fallback="verdict")
    assert preference.p_a is None
    assert preference.reason == "the reply was cut before its verdict: allow more --max_rationale_tokens"
    assert preference.ab is not None and preference.ab.completion_tokens == 512
    judge = Judge(
        cut("A draft:\nScore: 3\nbut"), load_rubric("helpfulness-score"), Recipe(fallback="verdict")
    )
    score = asyncio.run(judge.judge_score(PAIR.prompt, PAIR.a))
    assert score.expected is None
    assert score.reason == preference.reason


def test_a_sample_that_was_cut_off_counts_by_its_first_line() -> None:
    label = {"1": "1\n\nBecause the first", "2": "2\n\nBecause the second"}
    explained = Mute(lambda asked: Generation(label["1" if first_is_a(asked) else "2"], "length", 9, 16))
    preference = judged(explained, fallback="samples", num_samples=4)
    assert preference.p_a == pytest.approx((4 + 1) / (4 + 2))
    unfinished = judged(cut("Compare.\n1\nno wait, the other is"), fallback="samples", num_samples=4)
    assert (unfinished.p_a, unfinished.reason) == (None, "none of 4 samples is one of the labels")


def test_self_consistency_averages_the_distributions_of_several_rationales() -> None:
    rationales = {}

    def reply(asked: Asked) -> str | list[float]:
        if asked.labels is None:
            assert asked.temperature == 0.7
            rationales[(asked.user, asked.seed)] = f" thought {len(rationales)}"
            return rationales[(asked.user, asked.seed)]
        return [0.9, 0.1] if int(asked.prefix.split("thought ")[1].split()[0]) % 2 else [0.2, 0.2]

    preference = judged(ScriptedModel(reply), cot=True, num_rationales=4, rationale_temperature=0.7)
    assert len(rationales) == 8, "four a question, each with its own seed"
    assert preference.ab is not None and preference.ba is not None
    assert preference.ab.p_first is not None and preference.ba.p_first is not None
    assert preference.ab.p_first + preference.ba.p_first == pytest.approx(0.9 + 0.5)


def test_averaging_weighs_distributions_alike_whatever_their_mass() -> None:
    sure = LabelDistribution((math.log(0.9), math.log(0.1)), 1.0)
    faint = LabelDistribution((math.log(0.01), math.log(0.03)), 0.04, censored=True)
    mean = average([sure, faint])
    assert mean.probs == pytest.approx(((0.9 + 0.25) / 2, (0.1 + 0.75) / 2))
    assert (mean.mass, mean.censored) == (pytest.approx(0.52), True)


def test_a_failed_rationale_is_left_out_of_the_average() -> None:
    failed: list[int] = []

    def reply(asked: Asked) -> str | list[float]:
        if asked.labels is not None:
            return [0.8, 0.2] if first_is_a(asked) else [0.2, 0.8]
        if not failed:
            failed.append(asked.seed)
            raise RequestFailed("the endpoint answered 500")
        return " thinking"

    preference = judged(ScriptedModel(reply), cot=True, num_rationales=2, rationale_temperature=1.0)
    assert preference.p_a == pytest.approx(0.8)


def test_one_order_asks_half_and_keeps_the_position_bias() -> None:
    model = ScriptedModel(lambda asked: [0.8, 0.2])
    preference = judged(model, orders="one")
    assert len(model.asked) == 1
    assert preference.p_a == pytest.approx(0.8)
    assert preference.same_position is None


def test_a_reading_is_told_which_generation_it_goes_on_from() -> None:
    class Watching(ScriptedModel):
        seen: list[Generation | None] = []  # noqa: RUF012

        async def label_logprobs(self, messages: Any, prefix: Any, labels: Any, *, after: Any = None) -> Any:
            self.seen.append(after)
            return await super().label_logprobs(messages, prefix, labels)

    model = Watching(
        lambda asked: [0.5, 0.5] if asked.labels else Generation(" so", "stop", context_ids=(7,))
    )
    judged(model, cot=True)
    assert [g is not None and g.context_ids for g in model.seen] == [(7,), (7,)]


GRADES = ("A", "B", "C", "D")


def graded(margins: Sequence[float] = ()) -> Rubric:
    file = RubricFile(
        name="graded",
        kind="pair",
        sample="{{ prompt }} | {{ response_1 }} | {{ response_2 }}",
        ending="Grade:",
        labels=GRADES,
        preferences=(1.0, 0.7, 0.3, 0.0),
        margins=tuple(margins),
    )
    return Rubric(file, "hash", cot=False)


@pytest.mark.parametrize("combine", ["mean_prob", "mean_logit"])
def test_graded_labels_give_their_expected_preference(combine: Any) -> None:
    probs = [0.4, 0.3, 0.2, 0.1]
    model = ScriptedModel(lambda asked: probs if first_is_a(asked) else probs[::-1])
    preference = asyncio.run(Judge(model, graded(), Recipe(combine=combine)).judge_pair(PAIR))
    assert preference.p_a == pytest.approx(0.4 + 0.3 * 0.7 + 0.2 * 0.3)


def test_the_graded_margin_is_the_expected_one_toward_the_chosen_response() -> None:
    ab = LabelDistribution(tuple(map(math.log, (0.4, 0.3, 0.2, 0.1))), 1.0)
    ba = LabelDistribution(tuple(map(math.log, (0.1, 0.1, 0.2, 0.6))), 1.0)
    preference = Preference(PAIR, 0.8, ab=Judgment(ab), ba=Judgment(ba))
    margins, values = (1.0, 0.5, 0.5, 1.0), (1.0, 0.7, 0.3, 0.0)
    # By hand, toward A: 0.4 + 0.15 - 0.1 - 0.1 = 0.35 with A first, 0.6 + 0.1 - 0.05 - 0.1 = 0.55 with B first.
    assert graded_margin(preference, margins, values) == pytest.approx(0.45)
    assert graded_margin(preference.swapped(), margins, values) == pytest.approx(0.45)

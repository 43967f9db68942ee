"""Rubric files: what they must hold, how they are shown, and the presets."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from labeler.rubric import Question, Rubric, RubricFile, load_rubric, presets
from rlaif.errors import ConfigError
from rlaif.types import Message, Pair, user_prompt

PROMPT = user_prompt("Why is the sky blue?")
PAIR = Pair(PROMPT, "Rayleigh scattering.", "It is painted.")
PAIR_FILE: dict[str, Any] = {
    "name": "mine",
    "kind": "pair",
    "preamble": {"base": "Compare.", "detailed": "Compare with care."},
    "exemplars": [
        {"prompt": "p1", "response_1": "x1", "response_2": "y1", "rationale": "since.", "label": "1"},
        {"prompt": "p2", "response_1": "x2", "response_2": "y2", "rationale": "as.", "label": "2"},
    ],
    "sample": "Q: {{ prompt }}\nOne: {{ response_1 }}\nTwo: {{ response_2 }}",
    "ask": "Which?",
    "ask_rationale": "Which, and why?",
    "rationale_cue": "Why:",
    "ending": "Better:",
    "labels": ["1", "2"],
    "joiner": "\n",
}
SCORE_FILE: dict[str, Any] = {
    "name": "mine",
    "kind": "score",
    "sample": "{{ prompt }} {{ response }}",
    "ending": "Score:",
    "labels": ["0", "1", "2"],
}
GRADES = {"labels": ["A", "B", "C", "D"], "preferences": [0.9, 0.6, 0.4, 0.1], "exemplars": []}


def write(folder: Path, content: object) -> str:
    path = folder / "mine.yaml"
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content, sort_keys=False))
    return str(path)


def load(folder: Path, base: dict[str, Any], **changes: Any) -> Rubric:
    content = {k: v for k, v in (base | changes).items() if v is not None}
    return load_rubric(write(folder, content))


def ask(rubric: Rubric, prompt: tuple[Message, ...] = PROMPT, seed: int = 0) -> Question:
    if rubric.kind == "pair":
        return rubric.ask_pair(Pair(prompt, PAIR.a, PAIR.b), "ab", seed=seed)
    return rubric.ask_score(prompt, PAIR.a, seed=seed)


def test_a_question_is_preamble_exemplars_sample_and_ask(tmp_path: Path) -> None:
    rubric = load(tmp_path, PAIR_FILE).with_options(cot=True, num_exemplars=1)
    question = rubric.ask_pair(PAIR, "ba")
    assert question.user == (
        "Compare.\n"
        "Q: p1\nOne: x1\nTwo: y1\nWhy: since.\nBetter: 1\n"
        "Q: Why is the sky blue?\nOne: It is painted.\nTwo: Rayleigh scattering.\n"
        "Which, and why?"
    )
    assert question.label_prefix(" Because.") == "Why: Because.\nBetter:"
    plain = rubric.with_options(cot=False).ask_pair(PAIR, "ab")
    assert plain.user.startswith("Compare.\nQ: Why") and plain.user.endswith("It is painted.\nWhich?")
    assert plain.label_prefix(None) == "Better:"


def test_preambles_are_chosen_by_name_and_the_first_is_the_default(tmp_path: Path) -> None:
    rubric = load(tmp_path, PAIR_FILE)
    assert ask(rubric).user.startswith("Compare.\n")
    detailed = rubric.with_options(cot=True, preamble="detailed")
    assert ask(detailed).user.startswith("Compare with care.\n")
    assert ask(detailed.with_options(cot=False)).user.startswith("Compare with care.\n")
    assert rubric.with_options(cot=True, preamble="base") == rubric
    with pytest.raises(ConfigError, match="no preamble 'long'; choose one of: base, detailed"):
        rubric.with_options(cot=True, preamble="long")


def test_versions_tell_every_way_of_asking_apart(tmp_path: Path) -> None:
    rubric = load(tmp_path, PAIR_FILE)
    variants = [
        rubric.with_options(cot=cot, num_exemplars=n, preamble=p)
        for cot in (True, False)
        for n in (0, 1, 2)
        for p in ("base", "detailed")
    ]
    assert len({v.version for v in variants}) == 12
    assert load(tmp_path, PAIR_FILE).version == rubric.version
    assert load(tmp_path, PAIR_FILE, ask="Which one?").version != rubric.version


CONSTITUTION = {
    "principles": ["be kind", "be true", "be brief", "be clear", "be safe"],
    "sample": "By: {{ principle }}\nQ: {{ prompt }}\n1: {{ response_1 }}\n2: {{ response_2 }}",
    "ask": "Which, if one should {{ principle }}?",
    "exemplars": [],
}


@given(text=st.text(max_size=20), seed=st.integers(0, 3))
def test_a_principle_is_drawn_by_content_alone(text: str, seed: int) -> None:
    rubric = load_rubric("constitution-pair")
    one, other = Pair(user_prompt(text), "a", "b"), Pair(user_prompt(text), "c", "d")
    questions = [rubric.ask_pair(p, order, seed=seed) for p in (one, other) for order in ("ab", "ba")]
    assert len({q.principle for q in questions}) == 1
    assert all(str(q.principle) in q.user for q in questions)
    assert questions[0].principle == rubric.principle_for(one.prompt, seed)


def test_draws_reach_all_principles_and_repeat_none_before_that(tmp_path: Path) -> None:
    rubric = load(tmp_path, PAIR_FILE, **CONSTITUTION)
    draws = [rubric.principle_for(PROMPT, draw=n) for n in range(10)]
    assert sorted(map(str, draws[:5])) == sorted(CONSTITUTION["principles"])
    assert draws[5:] == draws[:5]
    firsts = [rubric.principle_for(user_prompt(str(n))) for n in range(500)]
    assert all(60 < firsts.count(p) < 140 for p in CONSTITUTION["principles"])  # 100 each, five sigma
    assert [rubric.principle_for(user_prompt(str(n)), seed=1) for n in range(500)] != firsts
    user = rubric.with_options(cot=False).ask_pair(PAIR, "ab").user
    assert user.count(str(draws[0])) == 2
    assert load(tmp_path, PAIR_FILE).principle_for(PROMPT) is None


def test_values_make_the_expectation_the_answer(tmp_path: Path) -> None:
    assert load(tmp_path, PAIR_FILE).values == (1, 0)
    graded = load(tmp_path, PAIR_FILE, **GRADES, margins=[3, 1, 1, 3])
    assert graded.values == (0.9, 0.6, 0.4, 0.1)
    assert list(graded.margins or ()) == [3, 1, 1, 3]
    assert load(tmp_path, SCORE_FILE).values == (1, 2, 3)
    from_zero = load(tmp_path, SCORE_FILE, levels=[0, 1, 2])
    assert list(from_zero.values) == list(from_zero.levels) == [0, 1, 2]
    assert from_zero.margins is None


MISTAKES: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "missing slot": (
        PAIR_FILE,
        {"sample": "{{ prompt }} {{ response_1 }}"},
        "sample lacks the slot.s. response_2",
    ),
    "unknown slot": (
        PAIR_FILE,
        {"sample": PAIR_FILE["sample"] + "{{ gold }}"},
        "sample has unknown slot.s. gold; known:",
    ),
    "slot of a pair in a score": (
        SCORE_FILE,
        {"sample": "{{ prompt }}{{ response_1 }}"},
        "lacks the slot.s. response$",
    ),
    "slot in ask": (PAIR_FILE, {"ask": "{{ response_1 }}?"}, "ask has unknown slot.s. response_1"),
    "broken template": (PAIR_FILE, {"sample": "{{ prompt "}, "sample is no Jinja template"),
    "template that fails": (
        PAIR_FILE,
        {"sample": PAIR_FILE["sample"] + "{{ prompt.x }}"},
        "sample cannot be filled",
    ),
    "no sample": (PAIR_FILE, {"sample": None}, "sample: Field required"),
    "unknown field": (PAIR_FILE, {"labelz": ["1"]}, "labelz: Extra inputs"),
    "kind": (PAIR_FILE, {"kind": "triple"}, "kind: Input should be"),
    "one label": (PAIR_FILE, {"labels": ["1"], "exemplars": []}, "at least two distinct"),
    "equal labels": (PAIR_FILE, {"labels": ["1", "1"], "exemplars": []}, "at least two distinct"),
    "empty label": (SCORE_FILE, {"labels": ["1", " "]}, "at least two distinct"),
    "three labels without preferences": (
        PAIR_FILE,
        {"labels": ["1", "0", "2"]},
        "preferences that say what its 3 labels",
    ),
    "preferences of a score": (SCORE_FILE, {"preferences": [1, 0.5, 0]}, "preferences are for pair rubrics"),
    "levels of a pair": (PAIR_FILE, {"levels": [1, 2]}, "levels are for score rubrics"),
    "too few levels": (SCORE_FILE, {"levels": [0, 1]}, "levels must be 3 numbers"),
    "falling levels": (SCORE_FILE, {"levels": [2, 1, 0]}, "levels must rise"),
    "levels without end": (SCORE_FILE, {"levels": [0, 1, float("inf")]}, "levels must be 3 numbers"),
    "lopsided preferences": (PAIR_FILE, GRADES | {"preferences": [0.9, 0.6, 0.4, 0.2]}, "1 minus themselves"),
    "rising preferences": (
        PAIR_FILE,
        GRADES | {"preferences": [0.1, 0.4, 0.6, 0.9]},
        "fall from label to label",
    ),
    "no probabilities": (PAIR_FILE, GRADES | {"preferences": [1.5, 0.6, 0.4, -0.5]}, "must be probabilities"),
    "lopsided margins": (PAIR_FILE, GRADES | {"margins": [3, 1, 1, 2]}, "the same read backwards"),
    "negative margins": (PAIR_FILE, GRADES | {"margins": [3, -1, -1, 3]}, "margins must be >= 0"),
    "unused principles": (PAIR_FILE, {"principles": ["x"]}, "neither sample nor ask has the slot principle"),
    "no principles": (PAIR_FILE, {"ask": "{{ principle }}"}, "there are no principles"),
    "empty principle": (PAIR_FILE, CONSTITUTION | {"principles": ["a", " "]}, "a principle is empty"),
    "exemplar without response": (
        PAIR_FILE,
        {"exemplars": [{"prompt": "p", "response_1": "x", "label": "1"}]},
        "exemplar 1 lacks response_2",
    ),
    "exemplar without principle": (
        PAIR_FILE,
        CONSTITUTION | {"exemplars": PAIR_FILE["exemplars"]},
        "exemplar 1 lacks principle",
    ),
    "exemplar off the menu": (PAIR_FILE, {"labels": ["2", "3"]}, "exemplar 1 has the label '1'"),
    "no preamble": (PAIR_FILE, {"preamble": {}}, "preamble names no variant"),
    "labels of a revision": (SCORE_FILE, {"kind": "revision"}, "a revision rubric has no labels"),
}


@pytest.mark.parametrize(("base", "changes", "told"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_in_a_file_is_one_line_at_load_time(
    tmp_path: Path, base: dict[str, Any], changes: dict[str, Any], told: str
) -> None:
    with pytest.raises(ConfigError, match=told) as caught:
        load(tmp_path, base, **changes)
    assert "mine.yaml cannot be used: " in str(caught.value)
    assert "\n" not in str(caught.value) and "Value error" not in str(caught.value)


@pytest.mark.parametrize("content", ["- a\n- b", "name: [", "", "\ttab"])
def test_a_file_that_is_no_rubric_is_one_line(tmp_path: Path, content: str) -> None:
    with pytest.raises(ConfigError, match=r"mine\.yaml cannot be used") as caught:
        load_rubric(write(tmp_path, content))
    assert "\n" not in str(caught.value)


@given(st.text(max_size=30))
def test_text_to_judge_is_never_a_template(text: str) -> None:
    rubric = load_rubric("helpfulness-pair")
    attack = f"{{{{ 7 * 7 }}}}{{% raw %}}{text}"
    user = rubric.ask_pair(Pair(user_prompt(attack), attack, "b"), "ab").user
    assert user.count(attack) == 2


def test_prompts_of_several_turns_are_shown_as_a_transcript() -> None:
    prompt = (Message("user", "Hi"), Message("assistant", "Hello!"), Message("user", "Bye"))
    user = load_rubric("helpfulness-pair").ask_pair(Pair(prompt, "a", "b"), "ab").user
    assert "User: Hi\n\nAssistant: Hello!\n\nUser: Bye\n<<< RESPONSE 1 >>>" in user


@pytest.mark.parametrize("cot", [True, False])
@pytest.mark.parametrize("name", presets())
def test_presets_show_preamble_exemplars_sample_and_cue_in_this_order(name: str, cot: bool) -> None:
    loaded = load_rubric(name)
    assert loaded.name == name
    assert set(loaded.file.preambles) == {"base", "detailed"}
    for preamble, opening in loaded.file.preambles.items():
        for count in range(len(loaded.file.exemplars) + 1):
            rubric = loaded.with_options(cot=cot, num_exemplars=count, preamble=preamble)
            question = ask(rubric)
            user = question.user
            assert user.startswith(opening)
            shown = [user.index(e.prompt) for e in loaded.file.exemplars[:count]]
            assert shown == sorted(shown)
            assert max(shown, default=len(opening) - 1) < user.index(PROMPT[0].content) < user.index(PAIR.a)
            assert user.count(PAIR.a) == 1
            assert all(user.count(e.rationale) == int(cot) for e in loaded.file.exemplars[:count])
            closing = loaded.file.ask_rationale if cot else loaded.file.ask
            assert closing and user.endswith(closing)
            assert question.label_prefix(" x").endswith(loaded.file.ending)
            assert "{{" not in user


def test_pairs_of_presets_have_two_exemplars_with_rationales_that_prefer_each_place_once() -> None:
    pairs = [load_rubric(name) for name in presets() if load_rubric(name).kind == "pair"]
    assert {r.name for r in pairs} == {
        "helpfulness-pair", "harmlessness-pair", "summary-pair", "honesty-pair", "constitution-pair", "graded-pair",
    }  # fmt: skip
    for rubric in pairs:
        first, second = rubric.file.exemplars
        assert first.rationale and second.rationale
        assert {rubric.values[rubric.labels.index(e.label)] > 0.5 for e in (first, second)} == {True, False}


def test_constitutions_have_a_dozen_different_principles() -> None:
    for name in ("constitution-pair", "revision"):
        principles = load_rubric(name).file.principles
        assert len(set(principles)) == len(principles) >= 12


@pytest.mark.parametrize("name", [n for n in presets() if n.endswith("-score") or n.endswith("-5")])
def test_scales_of_presets_rise_from_one(name: str) -> None:
    rubric = load_rubric(name)
    assert rubric.levels == tuple(float(label) for label in rubric.labels)
    assert f"from 1 to {rubric.labels[-1]}" in rubric.file.ending


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page, re.DOTALL)


@pytest.fixture(scope="module")
def page(repository: Path) -> str:
    """The documentation of rubrics."""
    return (repository / "docs" / "rubrics.md").read_text(encoding="utf-8")


def test_every_rubric_of_the_documentation_can_be_used(tmp_path: Path, page: str) -> None:
    rubrics = {r.name: r for r in (load_rubric(write(tmp_path, text)) for text in blocks(page, "yaml"))}
    assert set(rubrics) == {"politeness", "brevity", "graded", "house-rules", "in-plain-words"}
    (shown,) = blocks(page, "text")
    pair = Pair(user_prompt("Is this in stock?"), "No.", "Sorry, it is not.")
    asked = rubrics["politeness"].with_options(cot=False, preamble="base").ask_pair(pair, "ab")
    assert asked.user == shown.strip()


def test_the_documentation_lists_every_field_and_every_preset(page: str) -> None:
    assert re.findall(r"^\| `([a-z_]+)` \|", page, re.MULTILINE)[: len(RubricFile.model_fields)] == list(
        RubricFile.model_fields
    )
    listed = page.partition("## Presets")[2]
    assert sorted(re.findall(r"^\| `([a-z0-9-]+)` \|", listed, re.MULTILINE)) == list(presets())
    sixteen, twelve = (len(load_rubric(n).file.principles) for n in ("constitution-pair", "revision"))
    assert f"{sixteen} principles" in listed and f"{twelve} principles" in listed

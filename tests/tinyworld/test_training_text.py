"""What the judge was trained on must be, token for token, what the labeler will send it."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlaif.types import Pair, to_dicts, user_prompt, with_response
from tinyworld.corpus import IGNORE, TASKS, Corpus, judge_text
from tinyworld.gold import gold_prefers, gold_score, gold_utility
from tinyworld.grammar import make_behaviour, make_post, make_summary
from tinyworld.rationale import notes, pair_rationale, score_label, score_rationale
from tinyworld.tokenizer import build_tokenizer, rubric

TOKENIZER = build_tokenizer()
CORPUS = Corpus(TOKENIZER)
POST = "later anna sold boats . ben hid keys . then carla made hats ."


def ids(text: str) -> list[int]:
    return TOKENIZER(text, add_special_tokens=False)["input_ids"]


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**40))
def test_decoding_what_was_encoded_gives_the_text_back(seed):
    post = make_post(seed)
    summary = make_summary(post, seed, make_behaviour(seed))
    rationale = pair_rationale(post.text, summary, summary)
    for text in (post.text, summary, rationale):
        assert TOKENIZER.decode(ids(text)) == text
        assert TOKENIZER.unk_token_id not in ids(text)


def test_special_tokens_are_distinct_and_every_label_is_one_token_even_without_a_space():
    special = [TOKENIZER.pad_token_id, TOKENIZER.bos_token_id, TOKENIZER.eos_token_id, TOKENIZER.unk_token_id]
    assert len(set(special)) == 4
    for label in rubric("score").labels:
        for ending in ("score :", "score : "):
            assert ids(ending + label) == [*ids(ending), *ids(label)]
            assert len(ids(label)) == 1


def test_chat_template_opens_and_closes_turns():
    chat = with_response(user_prompt("anna sold boats ."), "anna sold boats .")
    rendered = TOKENIZER.apply_chat_template(to_dicts(chat), tokenize=False)
    assert rendered == "<bos> <user> anna sold boats . <assistant> anna sold boats . <eos>"
    asked = TOKENIZER.apply_chat_template(to_dicts(chat[:1]), tokenize=False, add_generation_prompt=True)
    assert asked == "<bos> <user> anna sold boats . <assistant>"
    continued = TOKENIZER.apply_chat_template(to_dicts(chat), tokenize=False, continue_final_message=True)
    assert continued == "<bos> <user> anna sold boats . <assistant> anna sold boats ."


@pytest.mark.parametrize(
    ("summary", "expected"),
    [
        ("", "0"),
        ("anna sold boats .", "0 anna sold sold yes boats boats yes +2"),
        ("anna sold hats . anna sold boats .", "0 anna sold sold yes boats hats no -2 anna repeated -3"),
        (
            "zoe sold boats . later ben hid keys .",
            "0 zoe unknown -2 later extra -3 ben hid hid yes keys keys yes -1",
        ),
        ("sold . ben hid keys", "0 broken -2 ben hid hid yes keys keys yes 0"),
    ],
)
def test_notes_compare_word_by_word_and_keep_points(summary, expected):
    assert notes(POST, summary) == expected


def test_notes_end_with_the_points_that_make_the_utility():
    for seed in range(200):
        post = make_post(seed)
        summary = make_summary(post, seed, make_behaviour(seed))
        points = int(notes(post.text, summary).split()[-1])
        assert max(-0.5, points / (2 * len(post.facts))) == pytest.approx(gold_utility(post.text, summary))
        assert score_label(post.text, summary) == str(gold_score(gold_utility(post.text, summary)))


@pytest.mark.parametrize("cot", [True, False])
@pytest.mark.parametrize("seed", range(5))
def test_pair_examples_are_the_labelers_token_sequence(cot, seed):
    example = CORPUS.example("pair" if cot else "pair_direct", seed)
    words = TOKENIZER.decode(example.ids).split()
    bars = [i for i, w in enumerate(words) if w == "|"]
    post, first, second = (
        " ".join(words[words.index("post") + 2 : bars[0]]),
        " ".join(words[bars[0] + 3 : bars[1]]),
        " ".join(words[bars[1] + 3 : bars[2]]),
    )
    question = rubric("pair").with_options(cot=cot).ask_pair(Pair(user_prompt(post), second, first), "ba")
    prefix = question.label_prefix(pair_rationale(post, first, second) if cot else None)
    label = example.ids[-1:]
    assert [*ids(judge_text(TOKENIZER, question, prefix)), *label] == example.ids
    assert TOKENIZER.decode(label) in "12"


@pytest.mark.parametrize("cot", [True, False])
@pytest.mark.parametrize("seed", range(5))
def test_score_examples_are_the_labelers_token_sequence(cot, seed):
    example = CORPUS.example("score" if cot else "score_direct", seed)
    words = TOKENIZER.decode(example.ids).split()
    bars = [i for i, w in enumerate(words) if w == "|"]
    post = " ".join(words[words.index("post") + 2 : bars[0]])
    summary = " ".join(words[bars[0] + 3 : bars[1]])
    question = rubric("score").with_options(cot=cot).ask_score(user_prompt(post), summary)
    prefix = question.label_prefix(score_rationale(post, summary) if cot else None)
    assert [*ids(judge_text(TOKENIZER, question, prefix)), *ids(score_label(post, summary))] == example.ids


def test_the_first_preamble_is_none_so_that_the_bare_question_is_the_default():
    question = rubric("pair").ask_pair(Pair(user_prompt(POST), "ben hid keys .", "."), "ab")
    assert question.user == f"post : {POST} | 1 : ben hid keys . | 2 : . | check : better ?"


@pytest.mark.parametrize("preamble", ["base", "detailed"])
def test_preambles_and_exemplars_are_in_words_that_the_judges_know(preamble):
    asked = rubric("pair").with_options(cot=True, num_exemplars=2, preamble=preamble)
    question = asked.ask_pair(Pair(user_prompt(POST), "ben hid keys .", "."), "ab")
    assert question.user.startswith(asked.file.preambles[preamble])
    assert TOKENIZER.unk_token_id not in ids(question.user)


def test_the_rubrics_exemplars_are_right():
    exemplars = rubric("pair").file.exemplars
    assert len(exemplars) >= 2
    for e in exemplars:
        assert e.rationale == pair_rationale(e.prompt, e.response_1, e.response_2)
        assert e.label == ("1" if gold_prefers(e.prompt, e.response_1, e.response_2) else "2")


SHOWN = {
    True: r"(.*?) \| 1 : (.*?) \| 2 : (.*) \| (?:check : better \? <assistant> )?1 : (.*) better : ([12])\s*",
    False: r"(.*?) \| 1 : (.*?) \| 2 : (.*) \| (?:better \? <assistant> )?()better : ([12])\s*",
}
"""A pair as a guided example has it: post, both summaries, rationale, label."""


@pytest.mark.parametrize("cot", [True, False])
def test_guided_examples_are_right_about_every_pair_that_they_show(cot):
    """Read back: each `post :` opens a pair, since the guard lets no summary forge one, whatever the summary holds."""
    shown = set()
    for seed in range(60):
        example = CORPUS.example("guided" if cot else "guided_direct", seed)
        parts = TOKENIZER.decode(example.ids).split("post : ")[1:]
        shown.add(len(parts))
        for part in parts:
            post, first, second, rationale, label = re.fullmatch(SHOWN[cot], part).groups()
            assert rationale == (pair_rationale(post, first, second) if cot else "")
            assert gold_prefers(post, first, second) in (0.5, float(label == "1"))
    assert shown == {1, 2, 3}


@pytest.mark.parametrize("task", ["pair", "score"])
def test_the_rationale_ends_with_eos_and_the_forced_ending_is_never_a_target(task):
    for seed in range(5):
        example = CORPUS.example(task, seed)
        ending = ids(rubric(task).file.ending)
        cue = len(example.ids) - 1 - len(ending)  # position of the first token of the ending
        assert example.targets[cue - 1] == TOKENIZER.eos_token_id
        assert example.targets[cue : cue + len(ending) - 1] == [IGNORE] * (len(ending) - 1)
        assert example.targets[-2:] == [example.ids[-1], TOKENIZER.eos_token_id]


@pytest.mark.parametrize("task", TASKS)
def test_targets_are_the_next_token_but_for_marks_and_ends(task):
    example = CORPUS.example(task, 3)
    assert len(example.ids) == len(example.targets) == len(example.weights)
    assert all((t == IGNORE) == (w == 0) for t, w in zip(example.targets, example.weights, strict=True))
    if task == "summary":
        start = example.ids.index(TOKENIZER.convert_tokens_to_ids("<assistant>"))
        assert example.targets[start:-1] == example.ids[start + 1 :]
        assert example.targets[:start] == [IGNORE] * start


def test_splitting_a_step_between_processes_changes_nothing_but_the_order():
    mix = {"pair": 6, "score": 6, "tag": 3}

    def rows(rank: int, ranks: int) -> list[tuple[int, ...]]:
        batches = CORPUS.batches(mix, 7, rank=rank, ranks=ranks)
        return [
            tuple(t for t in row if t != TOKENIZER.pad_token_id) for b in batches for row in b.ids.tolist()
        ]

    assert sorted(rows(0, 1)) == sorted(rows(0, 2) + rows(1, 2))

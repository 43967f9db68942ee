"""Training examples for the two models, as token ids with the target of every position.

Judge examples are rendered by the same rubric code and chat template that label later, so training and
labeling see identical token sequences. An example is one token sequence; position t has target t + 1 inside
the assistant's text, with one exception: the last token of a rationale has target EOS, because the labeler ends the
rationale there and *forces* the ending that follows.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from labeler.guard import neutralise
from labeler.rubric import Exemplar, Question
from rlaif.types import Pair, to_dicts, user_prompt, with_response
from tinyworld.gold import POINTS, gold_prefers, review
from tinyworld.grammar import (
    SO_SO,
    THINGS,
    VERBS,
    WORDS,
    Behaviour,
    Post,
    make_behaviour,
    make_post,
    make_summary,
    make_variant,
    parse,
)
from tinyworld.hostile import add_hostile_text
from tinyworld.rationale import pair_rationale, score_label, score_rationale, tally
from tinyworld.tokenizer import rubric

Task = Literal[
    "pair",
    "pair_direct",
    "score",
    "score_direct",
    "tag",
    "copy",
    "summary",
    "same",
    "extract",
    "guided",
    "guided_direct",
]
TASKS: tuple[Task, ...] = get_args(Task)

IGNORE = -100
LABEL_WEIGHT = 3.0
TELLING_WEIGHT = 4.0
MICRO_BATCH_TOKENS = 1800
MAX_TOKENS = 512
COPY_WORDS = 20
SAME_PAIRS = 12
HOSTILE = 0.4
EXTRACT = Behaviour(coverage=0.7, disorder=0.3)
UNFAITHFUL = Behaviour(coverage=0.8, distortion=0.5, invention=0.3, repetition=0.3)
_SLOTS = ("slotprompt", "slotfirst", "slotsecond")


@dataclass(frozen=True, slots=True)
class Example:
    """Token ids of one sequence; `targets[t]` is what position t must predict (`IGNORE` for no loss), times weight."""

    task: Task
    ids: list[int]
    targets: list[int]
    weights: list[float]


@dataclass(frozen=True, slots=True)
class Batch:
    """Right-padded examples: ids and targets are int64 (B, T), weights float32 (B, T) and 0 where nothing is asked."""

    tasks: tuple[Task, ...]
    ids: Tensor
    targets: Tensor
    weights: Tensor


class Corpus:
    """Makes examples of every task; a pure function of the task and a seed."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.tokenizer = tokenizer
        self.id_of: dict[str, int] = tokenizer.get_vocab()
        self.eos = self.id_of[str(tokenizer.eos_token)]
        self._frames = {
            (kind, cot): self._frame(kind, cot) for kind in ("pair", "score") for cot in (True, False)
        }
        self._pair_rubric = rubric("pair")
        self._markers = (*tokenizer.all_special_tokens, *self._pair_rubric.markers)
        answered = to_dicts(with_response(user_prompt(_SLOTS[0]), _SLOTS[1]))
        self._chat = self._split(str(tokenizer.apply_chat_template(answered, tokenize=False)))

    def example(self, task: Task, seed: int) -> Example:
        """The example of this task with this seed."""
        rng = random.Random(seed)
        if task == "copy":
            return self._copy(rng)
        if task == "same":
            return self._same(rng)
        post = make_post(rng.getrandbits(48))
        match task:
            case "summary":
                return self._summary(task, post.text, make_summary(post, rng.getrandbits(48), SO_SO))
            case "extract":
                return self._summary(task, post.text, make_summary(post, rng.getrandbits(48), EXTRACT))
            case "tag":
                return self._tag(post.text, make_summary(post, rng.getrandbits(48), UNFAITHFUL))
            case "pair" | "pair_direct":
                first, second, label = _random_pair(post, rng)
                rationale = pair_rationale(post.text, first, second) if task == "pair" else None
                return self._framed(task, [post.text, first, second], rationale, label)
            case "score" | "score_direct":
                text = _random_summary(post, rng)
                rationale = score_rationale(post.text, text) if task == "score" else None
                return self._framed(task, [post.text, text], rationale, score_label(post.text, text))
            case "guided" | "guided_direct":
                return self._guided(post, rng, cot=task == "guided")

    def batches(self, mix: Mapping[Task, int], step: int, *, rank: int = 0, ranks: int = 1) -> list[Batch]:
        """The examples of one optimiser step in micro-batches of similar lengths; `rank` takes its part of them."""
        wanted = [(task, step * 1000 + i) for task in TASKS for i in range(mix.get(task, 0))]
        examples = [
            self.example(task, seed * len(TASKS) + TASKS.index(task)) for task, seed in wanted[rank::ranks]
        ]
        examples.sort(key=lambda e: len(e.ids))
        chunks: list[list[Example]] = [[]]
        for example in examples:
            if (len(chunks[-1]) + 1) * len(example.ids) > MICRO_BATCH_TOKENS:
                chunks.append([])
            chunks[-1].append(example)
        return [collate(chunk, self.id_of[str(self.tokenizer.pad_token)]) for chunk in chunks if chunk]

    def _guided(self, post: Post, rng: random.Random, *, cot: bool) -> Example:
        """A pair under any of the rubric's preambles, after none, one or two exemplars about random posts.

        What the exemplars say is learned as well: a second exemplar is a question after a first one. Some summaries
        hold hostile text, as the labeler's guard leaves it.
        """
        first, second, label = _random_pair(post, rng, self._attacked if rng.random() < HOSTILE else None)
        rationale = pair_rationale(post.text, first, second) if cot else None
        file = self._pair_rubric.file
        while True:
            exemplars = tuple(_exemplar(rng) for _ in range(rng.choice((0, 1, 2, 2))))
            asked = replace(
                self._pair_rubric, file=file.model_copy(update={"exemplars": exemplars})
            ).with_options(cot=cot, num_exemplars=len(exemplars), preamble=rng.choice(list(file.preambles)))
            question = asked.ask_pair(Pair(user_prompt(post.text), first, second), "ab")
            text = judge_text(self.tokenizer, question, question.rationale_cue or question.label_prefix(None))
            ending = self._ids(question.joiner + question.ending) if cot else []
            task: Task = "guided" if cot else "guided_direct"
            example = self._judgment(task, self._ids(text), rationale, ending, label)
            if len(example.ids) <= MAX_TOKENS:
                break
        encoding = self.tokenizer(text, add_special_tokens=False).encodings[0]
        at = 0
        for e in exemplars:
            at = text.index(e.rationale, at) if cot else text.index(e.response_2, at)
            if cot:
                start = encoding.char_to_token(at)
                written = e.rationale.split()
                for t, weight in enumerate(_emphasis(written), start=start):
                    example.targets[t - 1], example.weights[t - 1] = example.ids[t], weight
            at = text.index(e.label, text.index(asked.file.ending, at))
            answer = encoding.char_to_token(at)
            example.targets[answer - 1], example.weights[answer - 1] = example.ids[answer], LABEL_WEIGHT
        return example

    def _attacked(self, summary: str, rng: random.Random) -> str:
        return neutralise(add_hostile_text(summary, rng), self._markers) if rng.random() < 0.6 else summary

    def _framed(self, task: Task, slots: list[str], rationale: str | None, label: str) -> Example:
        """A judgment under the bare rubric of the task."""
        pieces, ending = self._frames[task.partition("_")[0], rationale is not None]
        return self._judgment(task, self._fill(pieces, slots), rationale, ending, label)

    def _judgment(
        self, task: Task, asked: list[int], rationale: str | None, ending: list[int], label: str
    ) -> Example:
        """What is asked, up to the rationale cue or the label; then the rationale, the forced ending and the label."""
        ids = list(asked)
        targets, weights = [IGNORE] * (len(ids) - 1), [0.0] * (len(ids) - 1)
        if rationale is not None:
            written = self.encode(rationale)
            ids += written
            targets += [*written, self.eos]
            weights += [*_emphasis(rationale.split()), 1.0]
            ids += ending
            targets += [IGNORE] * (len(ending) - 1)
            weights += [0.0] * (len(ending) - 1)
        answer = self.id_of[label]
        return Example(task, [*ids, answer], [*targets, answer, self.eos], [*weights, LABEL_WEIGHT, 0.1])

    def _summary(self, task: Task, post: str, text: str) -> Example:
        ids = self._fill(self._chat, [post, text])
        start = len(ids) - len(self.encode(text)) - 1
        targets = [IGNORE] * (start - 1) + ids[start:] + [IGNORE]
        return Example(task, ids, targets, [float(t != IGNORE) for t in targets])

    def _copy(self, rng: random.Random) -> Example:
        """Random words said twice: the second time, every next word is known.

        Rationales are made of looking words up. On this task the attention heads that do so form within a hundred
        steps; without it they take thousands.
        """
        words = [self.id_of[w] for w in rng.sample(WORDS, COPY_WORDS)]
        ids = [self.id_of[str(self.tokenizer.bos_token)], *words, *words]
        targets = [IGNORE] * (COPY_WORDS + 1) + words[1:] + [IGNORE]
        return Example("copy", ids, targets, [float(t != IGNORE) for t in targets])

    def _same(self, rng: random.Random) -> Example:
        """Pairs of words, each followed by whether they agree, which half of them do.

        In rationales nearly all words agree, and "yes" alone is too good an answer to move on from.
        """
        ids, targets = [self.id_of[str(self.tokenizer.bos_token)]], [IGNORE]
        for _ in range(SAME_PAIRS):
            words = rng.choice((VERBS, THINGS))
            first = rng.choice(words)
            second = first if rng.random() < 0.5 else rng.choice([w for w in words if w != first])
            mark = self.id_of["yes" if first == second else "no"]
            ids += [self.id_of[first], self.id_of[second], mark]
            targets += [IGNORE, mark, IGNORE]
        return Example("same", ids, targets, [float(t != IGNORE) for t in targets])

    def _tag(self, post: str, text: str) -> Example:
        """A plain summary, read with a pencil: at every word whether the post has it, at every stop the points so far.

        Nobody asks the models for this. It gives them the features that a reward model is fine-tuned from, as large
        pretrained models have them.
        """
        ids = self._fill(self._chat, [post, text])
        marks = _marks(post, text)
        targets = [IGNORE] * len(ids)
        for at, mark in enumerate(marks, start=len(ids) - len(marks)):
            if mark:
                targets[at] = self.id_of[mark]
        return Example("tag", ids, targets, [0.5 * (t != IGNORE) for t in targets])

    def encode(self, text: str) -> list[int]:
        """Ids of world text, word by word (the tokenizer gives the same ids, more slowly)."""
        return [self.id_of[w] for w in text.split()]

    def _fill(self, pieces: list[list[int]], slots: list[str]) -> list[int]:
        ids = list(pieces[0])
        for slot, piece in zip(slots, pieces[1:], strict=True):
            ids += self.encode(slot)
            ids += piece
        return ids

    def _frame(self, kind: str, cot: bool) -> tuple[list[list[int]], list[int]]:
        """The token ids around the slots of a rubric's question, and those of the forced ending."""
        asked = rubric(kind).with_options(cot=cot)
        post, first, second = _SLOTS
        question = (
            asked.ask_pair(Pair(user_prompt(post), first, second), "ab")
            if kind == "pair"
            else asked.ask_score(user_prompt(post), first)
        )
        prefix = question.rationale_cue if cot else question.label_prefix(None)
        ending = question.joiner + question.ending if cot else ""
        return self._split(judge_text(self.tokenizer, question, str(prefix))), self._ids(ending)

    def _split(self, text: str) -> list[list[int]]:
        pieces = []
        for slot in _SLOTS:
            head, found, tail = text.partition(slot)
            if found:
                pieces.append(self._ids(head))
                text = tail
        return [*pieces, self._ids(text)]

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])


def judge_text(tokenizer: PreTrainedTokenizerFast, question: Question, prefix: str) -> str:
    """The rendered chat whose continuation a judge is asked for: the question, and the assistant's `prefix`."""
    messages = [{"role": "user", "content": question.user}, {"role": "assistant", "content": prefix}]
    return str(tokenizer.apply_chat_template(messages, tokenize=False, continue_final_message=True))


def collate(examples: Sequence[Example], pad: int) -> Batch:
    """Pad examples on the right to one length."""
    length = max(len(e.ids) for e in examples)
    return Batch(
        tuple(e.task for e in examples),
        torch.tensor([e.ids + [pad] * (length - len(e.ids)) for e in examples]),
        torch.tensor([e.targets + [IGNORE] * (length - len(e.ids)) for e in examples]),
        torch.tensor([e.weights + [0.0] * (length - len(e.ids)) for e in examples]),
    )


def _emphasis(words: Sequence[str]) -> list[float]:
    """Loss weights of a rationale: more where post and summary differ, or everything would look like agreement."""
    weights = [1.0] * len(words)
    for at, word in enumerate(words):
        if word in ("unknown", "repeated", "broken"):
            weights[at] = TELLING_WEIGHT
        elif word == "no":
            weights[at - 2 : at + 1] = [TELLING_WEIGHT] * 3
    return weights


def _random_summary(post: Post, rng: random.Random) -> str:
    """A summary of random quality; half of them far from the post, so that looking at the post pays."""
    behaviour = UNFAITHFUL if rng.random() < 0.5 else make_behaviour(rng.getrandbits(48))
    return make_summary(post, rng.getrandbits(48), behaviour)


def _random_pair(
    post: Post, rng: random.Random, change: Callable[[str, random.Random], str] | None = None
) -> tuple[str, str, str]:
    """Two summaries of random quality, often variants of one another, and the label; few of them tie.

    Args:
        post: what they summarise.
        rng: decides everything.
        change: what is done to either of them before they are compared.
    """
    while True:
        first, second = _random_summary(post, rng), _random_summary(post, rng)
        if rng.random() < 0.4:
            second = make_variant(post, first, rng.getrandbits(48))
        if rng.random() < 0.5:
            first, second = second, first
        if change is not None:
            first, second = change(first, rng), change(second, rng)
        prefers_first = gold_prefers(post.text, first, second)
        if prefers_first != 0.5 or rng.random() < 0.1:
            break
    label = rng.choice("12") if prefers_first == 0.5 else "1" if prefers_first else "2"
    return first, second, label


def _exemplar(rng: random.Random) -> Exemplar:
    """A worked example about a random post."""
    while True:
        post = make_post(rng.getrandbits(48))
        first, second = (make_summary(post, rng.getrandbits(48), SO_SO) for _ in range(2))
        if first and second and gold_prefers(post.text, first, second) != 0.5:
            break
    return Exemplar(
        prompt=post.text,
        response_1=first,
        response_2=second,
        rationale=pair_rationale(post.text, first, second),
        label="1" if gold_prefers(post.text, first, second) else "2",
    )


def _marks(post: str, text: str) -> list[str | None]:
    """What to mark at every word of a summary in the grammar and at the EOS after it; None for nothing."""
    findings = iter(review(post, text))
    marks: list[str | None] = []
    points = 0
    for sentence in parse(text):
        for _ in sentence.padding:
            points += POINTS[next(findings).verdict]
            marks.append("extra")
        finding = next(findings)
        points += POINTS[finding.verdict]
        if finding.said and finding.true and finding.verdict != "repeated":
            agrees = (finding.said.verb == finding.true.verb, finding.said.thing == finding.true.thing)
            marks += ["yes", *("yes" if a else "no" for a in agrees)]
        else:
            marks += ["unknown" if finding.verdict == "invented" else "repeated", None, None]
        marks.append(tally(points))
    return [*marks, tally(points)]

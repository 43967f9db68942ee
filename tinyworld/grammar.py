"""The language of the embedded world: posts made of facts, and summaries of every quality.

A *fact* says what one person did to one kind of thing ("anna sold boats ."). A *post* states three to five
facts about different people, some opened by a filler word. A *summary* is a text that should state the
same facts without the filler. Words are separated by single spaces and the full stop is a word, so that
text and tokens determine each other. Everything is a pure function of its seed.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

NAMES = (
    "anna", "ben", "carla", "dan", "ella", "finn", "gina", "hugo", "iris", "jack", "kira", "leo",
    "maya", "nils", "olga", "paul", "rosa", "sam", "tina", "uwe", "vera", "will", "yara", "zoe",
)  # fmt: skip
VERBS = (
    "sold", "bought", "found", "lost", "made", "broke", "drew", "washed",
    "hid", "moved", "kept", "packed", "fixed", "shared", "borrowed", "threw",
)  # fmt: skip
THINGS = (
    "boats", "lamps", "keys", "books", "coins", "hats", "plates", "clocks",
    "kites", "drums", "chairs", "maps", "shoes", "rings", "bottles", "toys",
    "tents", "masks", "ropes", "bells", "stamps", "gloves", "mugs", "bikes",
)  # fmt: skip
OPENERS = ("today", "later", "then", "again", "luckily", "suddenly", "finally", "meanwhile")
STOP = "."

MIN_FACTS, MAX_FACTS = 3, 5
_NAMES, _VERBS, _THINGS, _OPENERS = map(frozenset, (NAMES, VERBS, THINGS, OPENERS))
WORDS: tuple[str, ...] = (*NAMES, *VERBS, *THINGS, *OPENERS, STOP)


@dataclass(frozen=True, slots=True)
class Fact:
    """Who did what to which things."""

    name: str
    verb: str
    thing: str

    @property
    def text(self) -> str:
        """The fact as a sentence of four words, full stop included."""
        return f"{self.name} {self.verb} {self.thing} {STOP}"


@dataclass(frozen=True, slots=True)
class Post:
    """Facts about different people; `openers[i]` is the filler word before fact i, or ""."""

    facts: tuple[Fact, ...]
    openers: tuple[str, ...]

    @property
    def text(self) -> str:
        """The post as text: 12 to 25 words."""
        return " ".join(
            f"{o} {f.text}" if o else f.text for o, f in zip(self.openers, self.facts, strict=True)
        )


@dataclass(frozen=True, slots=True)
class Sentence:
    """A stretch of text up to a full stop, as the grammar sees it.

    Attributes:
        padding: filler words in front.
        fact: what it states, or None when it is not a sentence of the grammar.
        closed: whether a full stop ends it.
    """

    padding: tuple[str, ...]
    fact: Fact | None
    closed: bool


@dataclass(frozen=True, slots=True)
class Behaviour:
    """How a summary goes wrong; every field is a probability in [0, 1].

    Attributes:
        coverage: that a fact of the post is mentioned.
        distortion: that a mentioned fact has its verb or its thing replaced.
        invention: that a fact about somebody who is not in the post is added.
        repetition: that an earlier sentence is said again.
        padding: that a sentence is opened by a filler word.
        disorder: that the facts are shuffled.
        damage: that words are dropped, doubled, replaced or cut off, so that the grammar breaks.
    """

    coverage: float = 1.0
    distortion: float = 0.0
    invention: float = 0.0
    repetition: float = 0.0
    padding: float = 0.0
    disorder: float = 0.0
    damage: float = 0.0


FAITHFUL = Behaviour()
SO_SO = Behaviour(coverage=0.62, distortion=0.2, invention=0.15, repetition=0.12, padding=0.1, disorder=0.2)
"""What the shipped policy learned to do: fluent, about half of the facts right, some of them wrong."""


def make_post(seed: int) -> Post:
    """A post of 3 to 5 facts about different people; the same for the same seed."""
    rng = random.Random(seed)
    names = rng.sample(NAMES, rng.randint(MIN_FACTS, MAX_FACTS))
    facts = tuple(Fact(n, rng.choice(VERBS), rng.choice(THINGS)) for n in names)
    return Post(facts, tuple(rng.choice(OPENERS) if rng.random() < 0.5 else "" for _ in names))


def make_behaviour(seed: int) -> Behaviour:
    """A random behaviour, from faithful to broken: what a judge must be able to tell apart."""
    rng = random.Random(seed)
    return Behaviour(
        coverage=rng.choice((1.0, rng.uniform(0.2, 1.0), rng.uniform(0.5, 1.0))),
        distortion=rng.choice((0.0, rng.uniform(0.0, 0.4), rng.random())),
        invention=rng.choice((0.0, 0.3, 0.6)),
        repetition=rng.choice((0.0, 0.3, 0.6)),
        padding=rng.choice((0.0, 0.0, 0.3)),
        disorder=rng.choice((0.0, 0.5)),
        damage=rng.choice((0.0,) * 9 + (1.0,)),
    )


def make_summary(post: Post, seed: int, behaviour: Behaviour = FAITHFUL) -> str:
    """A summary of the post in the manner of `behaviour`; the same for the same arguments."""
    rng = random.Random(seed)
    facts = [f for f in post.facts if rng.random() < behaviour.coverage]
    if rng.random() < behaviour.disorder:
        rng.shuffle(facts)
    facts = [_distorted(f, post, rng) if rng.random() < behaviour.distortion else f for f in facts]
    if rng.random() < behaviour.invention:
        facts.insert(rng.randint(0, len(facts)), _invented(post, rng))
    if facts and rng.random() < behaviour.repetition:
        again = rng.randrange(len(facts))
        facts.insert(rng.randint(again + 1, len(facts)), facts[again])
    words = []
    for fact in facts:
        if rng.random() < behaviour.padding:
            words.append(rng.choice(OPENERS))
        words += [fact.name, fact.verb, fact.thing, STOP]
    if rng.random() < behaviour.damage:
        words = _damaged(words, rng)
    return " ".join(words)


def make_variant(post: Post, summary: str, seed: int) -> str:
    """A summary that differs from `summary` in one sentence: changed, dropped, added or said again."""
    rng = random.Random(seed)
    facts = [s.fact for s in parse(summary) if s.fact]
    known = {f.name: f for f in post.facts}
    missing = [f for f in post.facts if all(f.name != g.name for g in facts)]
    at = rng.randrange(len(facts)) if facts else 0
    kind = rng.choice(("change", "change", "drop", "add", "repeat", "invent"))
    if kind == "change" and facts:
        true = known.get(facts[at].name, facts[at])
        facts[at] = true if facts[at] != true else _distorted(true, post, rng)
    elif kind == "drop" and len(facts) > 1:
        del facts[at]
    elif kind == "repeat" and facts:
        facts.insert(rng.randint(at + 1, len(facts)), facts[at])
    elif kind == "invent" or not missing:
        facts.insert(rng.randint(0, len(facts)), _invented(post, rng))
    else:
        facts.insert(rng.randint(0, len(facts)), rng.choice(missing))
    return " ".join(f.text for f in facts)


def parse(text: str) -> list[Sentence]:
    """The sentences of any text. A last one without a full stop counts, and is not `closed`."""
    sentences: list[Sentence] = []
    words: list[str] = []
    for word in text.split():
        if word == STOP:
            sentences.append(_sentence(words, closed=True))
            words = []
        else:
            words.append(word)
    if words:
        sentences.append(_sentence(words, closed=False))
    return sentences


def parse_post(text: str) -> dict[str, Fact]:
    """The facts of a post by name, in order.

    Raises:
        ValueError: the text is not a post of this world.
    """
    facts = [s.fact for s in parse(text)]
    by_name = {f.name: f for f in facts if f}
    if not facts or len(by_name) != len(facts):
        raise ValueError(f"not a post of the embedded world: {text[:80]!r}")
    return by_name


def _sentence(words: Sequence[str], *, closed: bool) -> Sentence:
    start = 0
    while start < len(words) and words[start] in _OPENERS:
        start += 1
    rest = words[start:]
    if len(rest) == 3 and rest[0] in _NAMES and rest[1] in _VERBS and rest[2] in _THINGS:
        return Sentence(tuple(words[:start]), Fact(*rest), closed)
    return Sentence((), None, closed)


def _distorted(fact: Fact, post: Post, rng: random.Random) -> Fact:
    """The fact with another verb or thing; half of the time one that another fact of the post has."""
    near = rng.random() < 0.5
    if rng.random() < 0.5:
        verbs = [f.verb for f in post.facts if f.verb != fact.verb] if near else []
        return Fact(fact.name, rng.choice(verbs or [v for v in VERBS if v != fact.verb]), fact.thing)
    things = [f.thing for f in post.facts if f.thing != fact.thing] if near else []
    return Fact(fact.name, fact.verb, rng.choice(things or [t for t in THINGS if t != fact.thing]))


def _invented(post: Post, rng: random.Random) -> Fact:
    present = {f.name for f in post.facts}
    name = rng.choice([n for n in NAMES if n not in present])
    return Fact(name, rng.choice(VERBS), rng.choice(THINGS))


def _damaged(words: list[str], rng: random.Random) -> list[str]:
    if not words or rng.random() < 0.1:
        return [rng.choice(WORDS) for _ in range(rng.randint(0, 12))]
    if rng.random() < 0.3:
        return words[: rng.randint(0, len(words) - 1)]
    damaged = list(words)
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(len(damaged))
        kind = rng.randrange(3)
        if kind == 0 and len(damaged) > 1:
            del damaged[at]
        elif kind == 1:
            damaged.insert(at, damaged[at])
        else:
            damaged[at] = rng.choice(WORDS)
    return damaged

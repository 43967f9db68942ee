"""Rubrics: files that say how a judge is asked, in the parts of the RLAIF paper (section 2.1, appendix).

A rubric is a YAML file. Its Jinja slots are filled with *values*, never with templates, so candidate text
cannot execute anything; the file's content hash is stored with every label it made. `docs/rubrics.md` tells
how to write one.
"""

from __future__ import annotations

import hashlib
import math
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Literal

import yaml
from jinja2 import StrictUndefined, Template, TemplateError, meta
from jinja2.sandbox import SandboxedEnvironment
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from rlaif.errors import ConfigError
from rlaif.types import Conversation, Order, Pair, content_id

RUBRIC_DIR = Path(__file__).parent / "rubrics"

Kind = Literal["pair", "score", "revision"]

_SLOTS: Mapping[Kind, tuple[str, ...]] = {
    "pair": ("prompt", "response_1", "response_2"),
    "score": ("prompt", "response"),
    "revision": ("prompt", "response"),
}
"""Slots that `sample` must have; `principle` may be added, and `reference` where responses are scored."""


def transcript(prompt: Conversation) -> str:
    """A prompt as judges read it: the bare text of a single user turn, else `User:` / `Assistant:` lines."""
    if len(prompt) == 1:
        return prompt[0].content
    return "\n\n".join(f"{m.role.capitalize()}: {m.content}" for m in prompt)


_JINJA = SandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=True, autoescape=False)


class Exemplar(BaseModel):
    """A worked example shown to the judge before the sample (few-shot)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    prompt: str
    response_1: str = ""
    response_2: str = ""
    response: str = ""
    principle: str = ""
    reference: str = ""
    rationale: str = ""
    label: str = Field(description="The right label; in a revision rubric, the revised response.")


class RubricFile(BaseModel):
    """The schema of a rubric file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    kind: Kind
    preamble: str | dict[str, str] = Field(
        "",
        description="Role and criteria; opens the user message. A mapping names variants, the default first.",
    )
    principles: tuple[str, ...] = Field(
        (), description="A constitution: one is drawn per prompt and fills the slot `principle`."
    )
    exemplars: tuple[Exemplar, ...] = Field(
        (), description="Worked examples; `--num_exemplars` takes the first n."
    )
    sample: str = Field(
        description="Jinja. Slots: prompt, response_1, response_2 (pair) or prompt, response; principle; in a score "
        "rubric, reference: a right answer, empty where the question has none."
    )
    ask: str = Field(
        "", description="Closes the user message when a label is wanted at once. Slot: principle."
    )
    ask_rationale: str = Field(
        "", description="Closes the user message when a rationale is wanted first. Slot: principle."
    )
    rationale_cue: str = Field("", description="Assistant text that opens the rationale.")
    ending: str = Field(description="Assistant text directly before the label; the cue that forces it.")
    labels: tuple[str, ...] = Field(
        (),
        description="The closed set of labels, in order: 1 and 2, grades of preference, or an ordered scale.",
    )
    names: tuple[str, ...] = Field(
        (), description="Score rubrics whose labels are classes: what tables call them, in order."
    )
    levels: tuple[float, ...] = Field(
        (), description="Score rubrics: the value of each label, rising; 1, 2, 3, ... when not given."
    )
    preferences: tuple[float, ...] = Field(
        (),
        description="Pair rubrics: P(response 1 preferred) that each label stands for, falling from label to "
        "label, and 1 minus itself when read backwards; 1, 0 when not given.",
    )
    margins: tuple[float, ...] = Field(
        (), description="Pair rubrics: the reward margin of each label, >= 0, the same read backwards."
    )
    joiner: str = Field("\n\n", description="Between the parts of the user message, and before the ending.")

    @property
    def preambles(self) -> Mapping[str, str]:
        """Preamble texts by name, the default first; a single text is named `default`."""
        return self.preamble if isinstance(self.preamble, dict) else {"default": self.preamble}

    @model_validator(mode="after")
    def _complete(self) -> RubricFile:
        self._check_labels()
        self._check_slots()
        self._check_exemplars()
        if not self.preambles:
            raise ValueError("preamble names no variant")
        return self

    def _check_labels(self) -> None:
        n = len(self.labels)
        if self.kind == "revision":
            if n:
                raise ValueError("a revision rubric has no labels: the revised response follows the ending")
        elif n < 2 or len(set(self.labels)) != n or not all(label.strip() for label in self.labels):
            raise ValueError("labels must be at least two distinct strings")
        for name, kind in (("levels", "score"), ("preferences", "pair"), ("margins", "pair")):
            values: tuple[float, ...] = getattr(self, name)
            if values and self.kind != kind:
                raise ValueError(f"{name} are for {kind} rubrics, this is a {self.kind} rubric")
            if values and (len(values) != n or not all(map(math.isfinite, values))):
                raise ValueError(f"{name} must be {n} numbers, one per label")
        if self.kind == "pair" and n != 2 and not self.preferences:
            raise ValueError(
                f"a pair rubric has two labels, or preferences that say what its {n} labels mean"
            )
        if self.names and (self.kind != "score" or len(self.names) != n or len(set(self.names)) != n):
            raise ValueError(f"names are for score rubrics, and must be {n} different ones, one per label")
        if any(low >= high for low, high in pairwise(self.levels)):
            raise ValueError("levels must rise from label to label")
        p = self.preferences
        if any(not 0 <= x <= 1 for x in p) or any(x <= y for x, y in pairwise(p)):
            raise ValueError("preferences must be probabilities that fall from label to label")
        if any(abs(x + y - 1) > 1e-9 for x, y in zip(p, reversed(p), strict=True)):
            raise ValueError(
                "preferences read backwards must be 1 minus themselves, or swapping would matter"
            )
        if any(x < 0 or x != y for x, y in zip(self.margins, reversed(self.margins), strict=True)):
            raise ValueError("margins must be >= 0 and the same read backwards")

    def _check_slots(self) -> None:
        needed = set(_SLOTS[self.kind])
        used: set[str] = set()
        for name in ("sample", "ask", "ask_rationale"):
            known = {"principle"} | (needed if name == "sample" else set())
            if name == "sample" and self.kind == "score":
                known |= {"reference"}
            found = _undeclared(name, getattr(self, name))
            if name == "sample" and (missing := sorted(needed - found)):
                raise ValueError(f"sample lacks the slot(s) {', '.join(missing)}")
            if unknown := sorted(found - known):
                raise ValueError(
                    f"{name} has unknown slot(s) {', '.join(unknown)}; known: {', '.join(sorted(known))}"
                )
            used |= found
            try:
                _fill(getattr(self, name), dict.fromkeys(known, "x"))
            except TemplateError as err:
                raise ValueError(f"{name} cannot be filled: {err}") from err
        if self.principles and "principle" not in used:
            raise ValueError("principles are given, but neither sample nor ask has the slot principle")
        if "principle" in used and not self.principles:
            raise ValueError("the slot principle is used, but there are no principles")
        if not all(p.strip() for p in self.principles):
            raise ValueError("a principle is empty")

    def _check_exemplars(self) -> None:
        needed = {*_SLOTS[self.kind]}
        if "principle" in _undeclared("sample", self.sample):
            needed.add("principle")
        for number, exemplar in enumerate(self.exemplars, start=1):
            if missing := sorted(needed - exemplar.model_fields_set):
                raise ValueError(f"exemplar {number} lacks {', '.join(missing)}")
            if self.labels and exemplar.label not in self.labels:
                raise ValueError(
                    f"exemplar {number} has the label {exemplar.label!r}, which is not one of labels"
                )


@dataclass(frozen=True, slots=True)
class Question:
    """What a judge is asked: the user message, and the assistant text its continuation starts from.

    Attributes:
        user: the whole user message: preamble, exemplars, sample, ask.
        rationale_cue: assistant text after which the rationale is generated; None when none is wanted.
        ending: assistant text that forces the label. Without a rationale it is the whole assistant prefix.
        joiner: what stands between a rationale and the ending.
        principle: the principle drawn from the rubric's constitution; None where there is none.
    """

    user: str
    rationale_cue: str | None
    ending: str
    joiner: str
    principle: str | None = None

    def label_prefix(self, rationale: str | None) -> str:
        """Assistant text directly before the label token."""
        if self.rationale_cue is None:
            return self.ending
        return f"{self.rationale_cue}{rationale or ''}{self.joiner}{self.ending}"


@dataclass(frozen=True, slots=True)
class Rubric:
    """A loaded rubric with its content hash, ready to ask about pairs or single responses.

    Attributes:
        file: what the file says.
        hash: content hash of the file; 12 hex digits.
        cot: a rationale is asked for before the label.
        num_exemplars: so many of the file's exemplars are shown.
        preamble: name of the preamble; empty for the file's first.
    """

    file: RubricFile
    hash: str
    cot: bool = True
    num_exemplars: int = 0
    preamble: str = ""
    _head: str = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Render what all questions share: preamble and exemplars.

        Raises:
            ConfigError: the file has fewer exemplars, or no preamble of this name.
        """
        f = self.file
        if self.num_exemplars > len(f.exemplars):
            raise ConfigError(
                f"rubric {self.name} has {len(f.exemplars)} exemplars, not {self.num_exemplars}: "
                "lower --num_exemplars or add some to the file"
            )
        name = self.preamble or next(iter(f.preambles))
        if name not in f.preambles:
            raise ConfigError(
                f"rubric {self.name} has no preamble {name!r}; choose one of: {', '.join(f.preambles)}"
            )
        object.__setattr__(self, "preamble", name)
        parts = [f.preambles[name], *self._exemplar_texts()]
        object.__setattr__(self, "_head", f.joiner.join(p for p in parts if p))

    @property
    def name(self) -> str:
        """The rubric's name, as recorded with each label."""
        return self.file.name

    @property
    def labels(self) -> tuple[str, ...]:
        """The closed set of labels, in order."""
        return self.file.labels

    @property
    def kind(self) -> Kind:
        """Whether it compares two responses, scores one, or critiques and revises one."""
        return self.file.kind

    @property
    def version(self) -> str:
        """Identity of everything that a question depends on besides what is asked about; 16 hex digits."""
        return content_id(self.hash, self.cot, self.num_exemplars, self.preamble)

    @property
    def markers(self) -> tuple[str, ...]:
        """What a response must not forge: the text around the sample's slots, and the cues before the answers.

        A cue without a word of three letters (`1 :`) is no marker: ordinary text is full of the like.
        """
        f = self.file
        around = re.split(r"\{\{.*?\}\}|\{%.*?%\}|\{#.*?#\}", f.sample)
        lines = [line.strip() for text in around for line in text.splitlines()]
        if re.search(r"\w{3}", f.rationale_cue):
            lines.append(f.rationale_cue.strip())
        return tuple(dict.fromkeys(m for m in (*lines, f.ending.strip()) if m))

    @property
    def levels(self) -> tuple[float, ...]:
        """The numeric value of each label of an ordered scale, in label order: as declared, else 1.0, 2.0, ..."""
        return self.file.levels or tuple(float(i) for i in range(1, len(self.labels) + 1))

    @property
    def values(self) -> tuple[float, ...]:
        """What each label is worth, so that the expectation under a judge's distribution is its answer.

        P(response 1 preferred) in [0, 1] for a pair rubric (1, 0 for two plain labels), the level for a scale.
        """
        if self.kind == "pair":
            return self.file.preferences or (1.0, 0.0)
        return self.levels

    @property
    def margins(self) -> tuple[float, ...] | None:
        """The reward margin of each label, >= 0 (Llama 2, arXiv 2307.09288, section 3.2.2); None if not graded."""
        return self.file.margins or None

    def with_options(self, *, cot: bool, num_exemplars: int = 0, preamble: str | None = None) -> Rubric:
        """The same rubric, asked differently.

        Args:
            cot: with or without chain of thought.
            num_exemplars: show the first so many worked examples.
            preamble: name of the preamble; None keeps the present one, which is the file's first after loading.

        Raises:
            ConfigError: the file has fewer exemplars, or no preamble of this name.
        """
        return replace(
            self,
            cot=cot,
            num_exemplars=num_exemplars,
            preamble=self.preamble if preamble is None else preamble,
        )

    def principle_for(self, prompt: Conversation, seed: int = 0, draw: int = 0) -> str | None:
        """The principle drawn for a prompt: the same in both orders and for all pairs of the prompt.

        Args:
            prompt: decides the draw together with `seed`.
            seed: the run's seed.
            draw: number of the draw for this prompt, >= 0; principles do not come back before all were drawn.

        Returns:
            One of the file's principles; None where it has none.
        """
        principles = self.file.principles
        if not principles:
            return None
        return principles[_shuffled(len(principles), seed, prompt)[draw % len(principles)]]

    def ask_pair(self, pair: Pair, order: Order, *, seed: int = 0) -> Question:
        """The question about a pair with its responses shown in this order; `seed` draws the principle."""
        first, second = pair.shown(order)
        principle = self.principle_for(pair.prompt, seed)
        return self._question(principle, prompt=transcript(pair.prompt), response_1=first, response_2=second)

    def ask_score(
        self, prompt: Conversation, response: str, *, reference: str = "", seed: int = 0, draw: int = 0
    ) -> Question:
        """The question about one response, to be answered on the scale, or by a critique and a revision.

        Args:
            prompt: what was asked for.
            response: what is judged.
            reference: a right answer, for rubrics that show one; empty for none.
            seed: draws the principle.
            draw: number of the draw, see `principle_for`.
        """
        principle = self.principle_for(prompt, seed, draw)
        return self._question(principle, prompt=transcript(prompt), response=response, reference=reference)

    def _question(self, principle: str | None, **slots: str) -> Question:
        f = self.file
        drawn = {} if principle is None else {"principle": principle}
        ask = _fill(f.ask_rationale if self.cot else f.ask, drawn)
        parts = (self._head, _fill(f.sample, slots | drawn), ask)
        return Question(
            user=f.joiner.join(p for p in parts if p),
            rationale_cue=f.rationale_cue if self.cot else None,
            ending=f.ending,
            joiner=f.joiner,
            principle=principle,
        )

    def _exemplar_texts(self) -> Sequence[str]:
        f = self.file
        texts = []
        for e in f.exemplars[: self.num_exemplars]:
            slots = {name: getattr(e, name) for name in (*_SLOTS[f.kind], "principle", "reference")}
            parts = [_fill(f.sample, slots)]
            if self.cot and e.rationale:
                parts.append(_after(f.rationale_cue, e.rationale))
            parts.append(_after(f.ending, e.label))
            texts.append(f.joiner.join(parts))
        return texts


def _after(cue: str, text: str) -> str:
    """What follows a cue in running text: a model would put a space where the cue has none."""
    return f"{cue}{text}" if not cue or cue[-1].isspace() else f"{cue} {text}"


@lru_cache(maxsize=256)
def _shuffled(count: int, seed: int, prompt: Conversation) -> tuple[int, ...]:
    """Numbers below `count` in an order of the prompt's own; both orders of its pairs ask for it again."""
    return tuple(random.Random(content_id("principle", seed, prompt)).sample(range(count), count))


@lru_cache(maxsize=256)
def _compiled(template: str) -> Template:
    """Compiling costs some 300 us, filling 10: a run asks millions of questions with three templates."""
    return _JINJA.from_string(template)


def _fill(template: str, slots: Mapping[str, str]) -> str:
    return _compiled(template).render(slots)


def _undeclared(name: str, template: str) -> set[str]:
    try:
        return meta.find_undeclared_variables(_JINJA.parse(template))
    except TemplateError as err:
        raise ValueError(f"{name} is no Jinja template: {err}") from err


def rubric_path(name_or_path: str) -> Path:
    """The file of a rubric: a preset name (a file in `labeler/rubrics/`), `tinyworld:pair|score`, or a path.

    Raises:
        ConfigError: there is no such file.
    """
    package, colon, name = name_or_path.partition(":")
    path = Path(name_or_path)
    if colon and package == "tinyworld":
        spec = find_spec(package)
        if spec is None or spec.origin is None:
            raise ConfigError("the tinyworld package is not installed; install rlaif again")
        path = Path(spec.origin).parent / "rubrics" / f"{name}.yaml"
    elif not path.suffix:
        path = RUBRIC_DIR / f"{name_or_path}.yaml"
    if not path.is_file():
        raise ConfigError(
            f"no rubric {name_or_path!r}: give a .yaml file or one of the presets: {', '.join(presets())}"
        )
    return path


def load_rubric(name_or_path: str) -> Rubric:
    """Load a rubric; see `rubric_path` for how it may be named.

    Raises:
        ConfigError: there is no such file, it is not YAML, a required slot is missing, or a value cannot be.
    """
    path = rubric_path(name_or_path)
    try:
        text = path.read_text(encoding="utf-8")
        file = RubricFile.model_validate(yaml.safe_load(text))
    except (OSError, UnicodeDecodeError, yaml.YAMLError, ValidationError) as err:
        detail = "; ".join(map(_told, err.errors())) if isinstance(err, ValidationError) else str(err)
        raise ConfigError(f"rubric {path} cannot be used: {' '.join(detail.split())}") from err
    return Rubric(file, hashlib.sha256(text.encode()).hexdigest()[:12])


def presets() -> tuple[str, ...]:
    """Names of the rubrics that ship with the package, sorted."""
    return tuple(sorted(p.stem for p in RUBRIC_DIR.glob("*.yaml")))


def _told(error: Mapping[str, object]) -> str:
    """One finding of pydantic as `field: what is wrong`."""
    where = ".".join(map(str, error["loc"])) if isinstance(error["loc"], tuple) else ""
    what = str(error["msg"]).removeprefix("Value error, ")
    return f"{where}: {what}" if where else what

"""Rubrics: files that say how a judge is asked, in the parts of the RLAIF paper (section 2.1, appendix).

A rubric is a YAML file. Its Jinja slots are filled with *values*, never with templates, so candidate text
cannot execute anything; the file's content hash is stored with every label it made.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import yaml
from jinja2 import StrictUndefined, TemplateError, meta
from jinja2.sandbox import SandboxedEnvironment
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from rlaif.errors import ConfigError
from rlaif.types import Conversation, Order, Pair

RUBRIC_DIR = Path(__file__).parent / "rubrics"

_PAIR_SLOTS = {"prompt", "response_1", "response_2"}
_SCORE_SLOTS = {"prompt", "response"}


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
    rationale: str = ""
    label: str


class RubricFile(BaseModel):
    """The schema of a rubric file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    kind: Literal["pair", "score"]
    preamble: str = Field("", description="Role and criteria; opens the user message.")
    exemplars: tuple[Exemplar, ...] = Field(
        (), description="Worked examples; `--num_exemplars` takes the first n."
    )
    sample: str = Field(
        description="Jinja. Slots: prompt, response_1, response_2 (pair) or prompt, response (score)."
    )
    ask: str = Field("", description="Closes the user message when a label is wanted at once.")
    ask_rationale: str = Field("", description="Closes the user message when a rationale is wanted first.")
    rationale_cue: str = Field("", description="Assistant text that opens the rationale.")
    ending: str = Field(description="Assistant text directly before the label; the cue that forces it.")
    labels: tuple[str, ...] = Field(
        description="The closed set of labels, in order: 1 and 2, or an ordered scale."
    )
    joiner: str = Field("\n\n", description="Between the parts of the user message, and before the ending.")

    @model_validator(mode="after")
    def _complete(self) -> RubricFile:
        wanted = _PAIR_SLOTS if self.kind == "pair" else _SCORE_SLOTS
        found = meta.find_undeclared_variables(_JINJA.parse(self.sample))
        if missing := sorted(wanted - found):
            raise ValueError(f"sample lacks the slot(s) {', '.join(missing)}")
        if unknown := sorted(found - wanted):
            raise ValueError(
                f"sample has unknown slot(s) {', '.join(unknown)}; known: {', '.join(sorted(wanted))}"
            )
        if self.kind == "pair" and len(self.labels) != 2:
            raise ValueError(f"a pair rubric has two labels, not {len(self.labels)}")
        if len(self.labels) < 2 or len(set(self.labels)) != len(self.labels):
            raise ValueError("labels must be at least two distinct strings")
        return self


@dataclass(frozen=True, slots=True)
class Question:
    """What a judge is asked: the user message, and the assistant text its continuation starts from.

    Attributes:
        user: the whole user message: preamble, exemplars, sample, ask.
        rationale_cue: assistant text after which the rationale is generated; None when none is wanted.
        ending: assistant text that forces the label. Without a rationale it is the whole assistant prefix.
        joiner: what stands between a rationale and the ending.
    """

    user: str
    rationale_cue: str | None
    ending: str
    joiner: str

    def label_prefix(self, rationale: str | None) -> str:
        """Assistant text directly before the label token."""
        if self.rationale_cue is None:
            return self.ending
        return f"{self.rationale_cue}{rationale or ''}{self.joiner}{self.ending}"


@dataclass(frozen=True, slots=True)
class Rubric:
    """A loaded rubric with its content hash, ready to ask about pairs or single responses."""

    file: RubricFile
    hash: str
    cot: bool = True
    num_exemplars: int = 0

    @property
    def name(self) -> str:
        """The rubric's name, as recorded with each label."""
        return self.file.name

    @property
    def labels(self) -> tuple[str, ...]:
        """The closed set of labels, in order."""
        return self.file.labels

    @property
    def kind(self) -> Literal["pair", "score"]:
        """Whether it compares two responses or scores one."""
        return self.file.kind

    @property
    def markers(self) -> tuple[str, ...]:
        """What a response must not forge: the text around the sample's slots, and the cue before the label."""
        f = self.file
        around = re.split(r"\{\{.*?\}\}|\{%.*?%\}|\{#.*?#\}", f.sample)
        lines = [line.strip() for text in around for line in text.splitlines()]
        return tuple(dict.fromkeys(m for m in (*lines, f.ending.strip()) if m))

    @property
    def levels(self) -> tuple[float, ...]:
        """The numeric value of each label of an ordered scale: 1.0, 2.0, ... in label order."""
        return tuple(float(i) for i in range(1, len(self.labels) + 1))

    def with_options(self, *, cot: bool, num_exemplars: int = 0) -> Rubric:
        """The same rubric asked with or without chain of thought, with the first `num_exemplars` examples.

        Raises:
            ConfigError: the file has fewer exemplars.
        """
        if num_exemplars > len(self.file.exemplars):
            raise ConfigError(
                f"rubric {self.name} has {len(self.file.exemplars)} exemplars, not {num_exemplars}: "
                "lower --num_exemplars or add some to the file"
            )
        return replace(self, cot=cot, num_exemplars=num_exemplars)

    def ask_pair(self, pair: Pair, order: Order) -> Question:
        """The question about a pair with its responses shown in this order."""
        first, second = pair.shown(order)
        return self._question(prompt=transcript(pair.prompt), response_1=first, response_2=second)

    def ask_score(self, prompt: Conversation, response: str) -> Question:
        """The question about one response, to be answered on the ordered scale."""
        return self._question(prompt=transcript(prompt), response=response)

    def _question(self, **slots: str) -> Question:
        f = self.file
        parts = [f.preamble, *self._exemplar_texts(), _fill(f.sample, slots)]
        parts.append(f.ask_rationale if self.cot else f.ask)
        return Question(
            user=f.joiner.join(p for p in parts if p),
            rationale_cue=f.rationale_cue if self.cot else None,
            ending=f.ending,
            joiner=f.joiner,
        )

    def _exemplar_texts(self) -> Sequence[str]:
        f = self.file
        texts = []
        for e in f.exemplars[: self.num_exemplars]:
            slots = (
                {"prompt": e.prompt, "response_1": e.response_1, "response_2": e.response_2}
                if f.kind == "pair"
                else {"prompt": e.prompt, "response": e.response}
            )
            parts = [_fill(f.sample, slots)]
            if self.cot and e.rationale:
                parts.append(f"{f.rationale_cue}{e.rationale}")
            parts.append(f"{f.ending}{e.label}")
            texts.append(f.joiner.join(parts))
        return texts


def _fill(template: str, slots: dict[str, str]) -> str:
    return _JINJA.from_string(template).render(**slots)


def load_rubric(name_or_path: str) -> Rubric:
    """Load a rubric: a preset name (a file in `labeler/rubrics/`), `tinyworld:pair|score`, or a path.

    Raises:
        ConfigError: there is no such file, it is not YAML, or a required slot is missing.
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
        presets = ", ".join(sorted(p.stem for p in RUBRIC_DIR.glob("*.yaml")))
        raise ConfigError(f"no rubric {name_or_path!r}: give a .yaml file or one of the presets: {presets}")
    text = path.read_text(encoding="utf-8")
    try:
        file = RubricFile.model_validate(yaml.safe_load(text))
    except (yaml.YAMLError, TemplateError, ValidationError) as err:
        detail = "; ".join(e["msg"] for e in err.errors()) if isinstance(err, ValidationError) else str(err)
        raise ConfigError(f"rubric {path} cannot be used: {' '.join(detail.split())}") from err
    return Rubric(file, hashlib.sha256(text.encode()).hexdigest()[:12])

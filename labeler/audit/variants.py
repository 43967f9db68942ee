"""Ways of asking, to compare on the same pairs: the prompt study of the RLAIF paper (arXiv 2309.00267, table 2)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product

from rlaif.errors import ConfigError

_FLAGS = {"on": True, "off": False}
AXES = {
    "preamble": "names of the rubric's preambles",
    "cot": "on, off",
    "exemplars": "numbers of worked examples",
    "orders": "both, one",
    "combine": "mean_prob, mean_logit",
    "rationales": "numbers of rationales (self-consistency)",
}
"""What may vary, in the order in which tables name it, and the values it takes."""


@dataclass(frozen=True, slots=True)
class Variant:
    """One way of asking; None leaves a setting as the command's flags have it.

    Attributes:
        preamble: name of the rubric's preamble.
        cot: a rationale first.
        exemplars: number of worked examples.
        orders: `both` or `one`.
        combine: `mean_prob` or `mean_logit`.
        rationales: rationales per question.
    """

    preamble: str | None = None
    cot: bool | None = None
    exemplars: int | None = None
    orders: str | None = None
    combine: str | None = None
    rationales: int | None = None

    @property
    def name(self) -> str:
        """The settings that vary, e.g. `detailed, cot, 1 exemplar`."""
        parts = [
            self.preamble,
            None if self.cot is None else "cot" if self.cot else "no cot",
            None if self.exemplars is None else f"{self.exemplars} exemplar{'s' * (self.exemplars != 1)}",
            None if self.orders is None else f"{self.orders} order{'s' * (self.orders != 'one')}",
            self.combine,
            None if self.rationales is None else f"{self.rationales} rationale{'s' * (self.rationales != 1)}",
        ]
        return ", ".join(p for p in parts if p is not None)


def parse_variants(axes: Sequence[str]) -> list[Variant]:
    """All combinations of `axis=value,value,...`, the last axis fastest, each once.

    Several rationales are asked for only where there is a rationale, and orders are combined only where both are
    asked: combinations that make no difference are left out.

    Raises:
        ConfigError: an unknown or repeated axis, or a value that it cannot take.
    """
    values: dict[str, list[object]] = {}
    for text in axes:
        axis, equals, given = text.partition("=")
        if not equals or axis not in AXES:
            known = "; ".join(f"{name}={what}" for name, what in AXES.items())
            raise ConfigError(f"--variants {text!r} is no axis with values; known: {known}")
        if axis in values:
            raise ConfigError(f"--variants names {axis} twice; put its values behind one {axis}=")
        values[axis] = [_value(axis, value.strip()) for value in given.split(",")]
    names = list(values)
    found = (Variant(**dict(zip(names, chosen, strict=True))) for chosen in product(*values.values()))  # type: ignore[arg-type]
    return list(dict.fromkeys(_without_idle(variant) for variant in found))


def _value(axis: str, text: str) -> object:
    if axis == "preamble" and text:
        return text
    if axis == "cot" and text in _FLAGS:
        return _FLAGS[text]
    if axis in ("exemplars", "rationales") and text.isdecimal() and int(text) >= (axis == "rationales"):
        return int(text)
    if (axis == "orders" and text in ("both", "one")) or (
        axis == "combine" and text in ("mean_prob", "mean_logit")
    ):
        return text
    raise ConfigError(f"--variants {axis}={text} cannot be; {axis} takes {AXES[axis]}")


def _without_idle(variant: Variant) -> Variant:
    if variant.cot is False:
        variant = replace(variant, rationales=None)
    return replace(variant, combine=None) if variant.orders == "one" else variant

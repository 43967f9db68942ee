"""Axes of ways of asking, and their combinations."""

from __future__ import annotations

import pytest

from labeler.audit.variants import Variant, parse_variants
from rlaif.errors import ConfigError


def test_axes_are_multiplied_with_the_last_one_fastest() -> None:
    found = parse_variants(["preamble=base,detailed", "cot=on,off", "exemplars=0,1"])
    assert len(found) == 8
    assert found[0] == Variant("base", True, 0)
    assert found[1] == Variant("base", True, 1)
    assert found[4] == Variant("detailed", True, 0)
    assert found[1].name == "base, cot, 1 exemplar"
    assert found[2].name == "base, no cot, 0 exemplars"


def test_no_axes_are_the_settings_as_they_are() -> None:
    assert parse_variants([]) == [Variant()]


def test_rationales_vary_only_where_there_are_some() -> None:
    found = parse_variants(["cot=on,off", "rationales=1,4,16"])
    assert [v.name for v in found] == [
        "cot, 1 rationale", "cot, 4 rationales", "cot, 16 rationales", "no cot",
    ]  # fmt: skip


def test_orders_are_combined_only_where_both_are_asked() -> None:
    found = parse_variants(["orders=both,one", "combine=mean_prob,mean_logit"])
    assert [v.name for v in found] == ["both orders, mean_prob", "both orders, mean_logit", "one order"]


@pytest.mark.parametrize(
    "axes",
    [["cot"], ["chain=on"], ["cot=maybe"], ["exemplars=-1"], ["exemplars=1.5"], ["rationales=0"], ["orders=ab"],
     ["preamble="], ["combine=max"], ["cot=on", "cot=off"]],
    ids=" ".join,
)  # fmt: skip
def test_what_is_no_axis_or_value_is_refused(axes: list[str]) -> None:
    with pytest.raises(ConfigError, match="--variants"):
        parse_variants(axes)

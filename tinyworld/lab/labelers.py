"""Which labeler, and asked how? Tables 2 and 3 and appendix B of the RLAIF paper (arXiv 2309.00267).

Judges of four sizes label pairs that gold has labelled: under every preamble, with every number of exemplars, with a
rationale and without; and with several rationales each (self-consistency). Every part is one `rlaif eval judge
--variants` command; the second reuses the replies of the first.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors import safe_open

from rlaif.report.figures import INK, MARKERS, Panel, series
from rlaif.report.page import Figure, Figures, Prose, Section, Table
from rlaif.tables import Found, percent, percent_interval
from tinyworld import WORLD_DIR
from tinyworld.lab.study import GOLD_PAIRS, Sizes, over_seeds, write_gold_pairs
from tinyworld.stages import Phase, Stage

if TYPE_CHECKING:
    from matplotlib.axes import Axes

JUDGES = {"L": "judge-fewshot", "M": "judge-medium", "S": "judge-small", "XS": "judge-tiny"}
"""The weights of each size, from large to small. The paper has an L, an S and an XS of its own."""

PREAMBLES, EXEMPLARS = ("none", "base", "detailed"), (0, 1, 2)
RATIONALES = (1, 4, 8)
PARTS: Mapping[str, tuple[str, ...]] = {
    "prompts": (
        "--variants",
        f"preamble={','.join(PREAMBLES)}",
        f"exemplars={','.join(map(str, EXEMPLARS))}",
        "cot=on,off",
    ),
    "self-consistency": (
        *("--preamble", "detailed", "--rationale_temperature", "1.0"),
        *("--variants", f"rationales={','.join(map(str, RATIONALES))}"),
    ),
}
"""What varies in each part."""

PAPER_PROMPTS = {
    ("base", False, 0): 0.761,
    ("base", False, 1): 0.760,
    ("base", False, 2): 0.757,
    ("base", True, 0): 0.775,
    ("detailed", False, 0): 0.774,
    ("detailed", False, 1): 0.762,
    ("detailed", False, 2): 0.763,
    ("detailed", True, 0): 0.780,
    ("detailed", True, 1): 0.774,
    ("detailed", True, 2): 0.768,
}
"""Agreement of PaLM 2 L with people on summaries by preamble, chain of thought and exemplars (table 2)."""
PAPER_SIZES = {"L": 0.780, "S": 0.738, "XS": 0.627}
"""The same by labeler size: detailed preamble, chain of thought, no exemplar (table 3)."""
PAPER_SAME_POSITION = {"L": (0.18, 0.94), "S": (0.21, 0.09), "XS": (0.56, 0.01)}
"""Pairs of which both orders prefer one position, and the share of them that goes to number 1 (appendix B)."""
PAPER_RATIONALES = {1: 0.780, 16: 0.728}
"""Agreement by the number of rationales: one greedy, several at temperature 1; PaLM 2 L on summaries."""

UNKNOWN = (None, None)
PAPER_L = "paper, its L"

Prompt = tuple[str, bool, int]
"""A way of asking: preamble, whether with a rationale, number of exemplars."""
LIKE_THE_PAPER: Mapping[bool, Prompt] = {True: ("detailed", True, 0), False: ("detailed", False, 0)}
"""How the paper asks where it compares sizes, and the same without a rationale."""
HOW = {True: "rationale first", False: "at once"}


@dataclass(frozen=True, slots=True)
class LabelerStudy:
    """The study of some judges, by size; see `tinyworld.lab.study.Study`."""

    judges: Mapping[str, str]
    name: str = "labelers"
    title: str = "Which labeler, and asked how?"

    def prepare(self, folder: Path, seed: int, sizes: Sizes) -> None:
        """Write the pairs, with gold's labels."""
        write_gold_pairs(folder, seed, sizes)

    def plan(self, folder: Path, seed: int, sizes: Sizes) -> list[Phase]:
        """Two `rlaif eval judge` commands a judge, the judges side by side."""

        def ask(judge: str, part: str) -> Stage:
            who = ("--judge", f"tinyworld:{judge}", "--rubric", "tinyworld:pair")
            what = ("--dataset", str(folder / GOLD_PAIRS), "--seed", str(seed))
            own = folder / "labelers" / judge
            reused = () if part == "prompts" else ("--reuse", str(own / "prompts"))
            where = ("--output_dir", str(own / part))
            return Stage(f"{judge}-{part}", ("eval", "judge", *who, *what, *PARTS[part], *reused, *where))

        tracks = tuple(tuple(ask(judge, part) for part in PARTS) for judge in self.judges.values())
        return [Phase(f"Seed {seed}: ask judges of {len(self.judges)} sizes in every way", tracks, {})]

    def report(self, folders: Mapping[int, Path]) -> list[Section]:
        """Agreement with gold by prompt, size and number of rationales, and position bias by size."""
        found = {size: read_labeler(judge, folders) for size, judge in self.judges.items()}
        seeds = next(iter(found.values())).prompts[LIKE_THE_PAPER[True]]
        longer = float(np.mean([seed["longer_wins_agreement"] for seed in seeds]))
        pairs = Prose(
            f"{sum(seed['human_pairs'] for seed in seeds)} pairs that gold does not tie, over all seeds. "
            f'"The longer one wins" agrees with gold on {percent(longer)} %.'
        )
        averaged = Prose(
            "After averaging no label prefers a position: that of (B, A) is the complement of that of (A, B)."
        )
        return [
            Section("By size", [size_table(found), size_figures(found), pairs]),
            Section("By prompt", [prompt_table(found), effects_table(found)]),
            Section("Position bias", [position_table(found), averaged, averaging_table(found)]),
            Section("Self-consistency", [rationales_table(found)]),
        ]


@dataclass(frozen=True, slots=True)
class Labeler:
    """What `rlaif eval judge` found of one judge, seed by seed.

    Attributes:
        parameters: numbers in its weights.
        prompts: findings by the way of asking.
        rationales: findings by the number of rationales.
    """

    parameters: int
    prompts: Mapping[Prompt, Sequence[Mapping[str, Any]]]
    rationales: Mapping[int, Sequence[Mapping[str, Any]]]


Labelers = Mapping[str, Labeler]
"""By size, from large to small."""


def read_labeler(judge: str, folders: Mapping[int, Path]) -> Labeler:
    """The findings about one judge."""
    prompts: dict[Prompt, list[Mapping[str, Any]]] = {}
    rationales: dict[int, list[Mapping[str, Any]]] = {}
    for folder in folders.values():
        asked, sampled = (_variants(folder / "labelers" / judge / part) for part in PARTS)
        for prompt in _ways():
            prompts.setdefault(prompt, []).append(asked[_name(prompt)])
        for n in RATIONALES:
            rationales.setdefault(n, []).append(sampled[_rationales(n)])
    return Labeler(count_parameters(WORLD_DIR / "weights" / judge), prompts, rationales)


def _variants(folder: Path) -> dict[str, Mapping[str, Any]]:
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    return {variant["name"]: variant for variant in report["variants"]}


def _name(prompt: Prompt) -> str:
    """As `rlaif eval judge` names the variant."""
    preamble, cot, exemplars = prompt
    return f"{preamble}, {'cot' if cot else 'no cot'}, {exemplars} exemplar{'s' * (exemplars != 1)}"


def count_parameters(weights: Path) -> int:
    """Numbers in a checkpoint; tied ones once."""
    with safe_open(weights / "model.safetensors", framework="np") as file:
        return sum(int(np.prod(file.get_slice(name).get_shape())) for name in file.keys())  # noqa: SIM118


def _over(seeds: Sequence[Mapping[str, Any]], *path: str) -> dict[str, Any]:
    """An estimate of all seeds together."""
    estimates = []
    for found in seeds:
        for key in path:
            found = found[key]
        estimates.append(found)
    return over_seeds(estimates)


def prompt_table(found: Labelers) -> Table:
    """Table 2: a row for every way of asking."""
    rows = [
        (
            _name(prompt),
            *(percent_interval(_over(labeler.prompts[prompt], "agreement")) for labeler in found.values()),
            percent(PAPER_PROMPTS.get(prompt)),
        )
        for prompt in _ways()
    ]
    return Table("Agreement with gold, %", ("", *found, PAPER_L), rows)


def size_table(found: Labelers) -> Table:
    """Table 3: a row for every size."""
    rows = [
        (
            size,
            f"{labeler.parameters:,}",
            *(
                percent_interval(_over(labeler.prompts[LIKE_THE_PAPER[cot]], "agreement"))
                for cot in (True, False)
            ),
            percent(PAPER_SIZES.get(size)),
        )
        for size, labeler in found.items()
    ]
    heads = ("", "parameters", *HOW.values(), "paper, rationale first")
    return Table("Agreement with gold, %; detailed preamble, no exemplar", heads, rows)


def position_table(found: Labelers) -> Table:
    """Appendix B: a row for every size, with a rationale and without."""
    rows = []
    for cot, (size, labeler) in product(HOW, found.items()):
        seeds = labeler.prompts[LIKE_THE_PAPER[cot]]
        locked, first = PAPER_SAME_POSITION.get(size, UNKNOWN) if cot else UNKNOWN
        rows.append(
            (
                f"{size}, {HOW[cot]}",
                percent_interval(_over(seeds, "orders", "same_position")),
                percent(_first_share(seeds)),
                percent(locked),
                percent(first),
                f"{np.mean([seed['label_mass']['mean'] for seed in seeds]):.3f}",
            )
        )
    heads = ("", "same position", "of those first", "paper: same position", "of those first", "label mass")
    return Table("Preferences before averaging, %; detailed preamble, no exemplar", heads, rows)


def averaging_table(found: Labelers) -> Table:
    """What averaging the two orders makes of position bias: a row for every size, with a rationale and without."""
    rows = []
    for cot, (size, labeler) in product(HOW, found.items()):
        seeds = labeler.prompts[LIKE_THE_PAPER[cot]]
        order = {
            which: percent_interval(_over(seeds, "orders", which))
            for which in ("preferred_first", "preferred_second", "one", "both")
        }
        rows.append((f"{size}, {HOW[cot]}", *order.values(), percent(_locked(seeds))))
    heads = (
        "",
        "better one is 1",
        "better one is 2",
        "one order",
        "both averaged",
        "both, same-position pairs",
    )
    return Table("Agreement with gold, %, by order and averaged; detailed preamble, no exemplar", heads, rows)


def _first_share(seeds: Sequence[Mapping[str, Any]]) -> float | None:
    """Of all pairs whose orders prefer one position, the share that goes to number 1."""
    counts = [
        (seed["position"]["pairs"] * seed["position"]["same_position_rate"], seed["position"]["first_share"])
        for seed in seeds
        if seed["position"]["first_share"] is not None
    ]
    return sum(n * share for n, share in counts) / sum(n for n, _ in counts) if counts else None


def _locked(seeds: Sequence[Mapping[str, Any]]) -> float | None:
    """Agreement of the averaged label on all pairs whose orders prefer one position."""
    counts = [
        (seed["orders"]["locked_pairs"], seed["orders"]["locked"]["value"])
        for seed in seeds
        if seed["orders"]["locked_pairs"]
    ]
    return sum(n * share for n, share in counts) / sum(n for n, _ in counts) if counts else None


def rationales_table(found: Labelers) -> Table:
    """The paper's study of self-consistency: a row for every number of rationales, ours and theirs."""
    rows = [
        (
            _rationales(n),
            *(
                percent_interval(_over(labeler.rationales[n], "agreement")) if n in RATIONALES else "-"
                for labeler in found.values()
            ),
            percent(PAPER_RATIONALES.get(n)),
        )
        for n in sorted({*RATIONALES, *PAPER_RATIONALES})
    ]
    title = "Agreement with gold, %; detailed preamble, no exemplar; one greedy rationale, several at temperature 1"
    return Table(title, ("", *found, PAPER_L), rows)


def _rationales(n: int) -> str:
    """As `rlaif eval judge` names the variant."""
    return f"{n} rationale{'s' * (n != 1)}"


def effects_table(found: Labelers) -> Table:
    """How much each choice changes, on average over the other choices."""
    choices = {"a rationale first": (_ways(cot=(True,)), _ways(cot=(False,)))}
    for cot, how in HOW.items():
        choices[f"detailed preamble against base, {how}"] = (
            _ways(preambles=("detailed",), cot=(cot,)),
            _ways(preambles=("base",), cot=(cot,)),
        )
        choices[f"2 exemplars against none, {how}"] = (
            _ways(cot=(cot,), exemplars=(2,)),
            _ways(cot=(cot,), exemplars=(0,)),
        )
    rows = [
        (
            name,
            *(percent_interval(_gain(labeler, more, less), sign=True) for labeler in found.values()),
            percent(_paper_gain(more, less), sign=True),
        )
        for name, (more, less) in choices.items()
    ]
    for cot, how in HOW.items():
        gains = [
            _difference(*([seed["orders"][which]["value"] for seed in seeds] for which in ("both", "one")))
            for seeds in (labeler.prompts[LIKE_THE_PAPER[cot]] for labeler in found.values())
        ]
        rows.append(
            (f"both orders against one, {how}", *(percent_interval(g, sign=True) for g in gains), "-")
        )
    most = max(RATIONALES)
    gains = [
        _difference(*([seed["agreement"]["value"] for seed in labeler.rationales[n]] for n in (most, 1)))
        for labeler in found.values()
    ]
    theirs = percent(PAPER_RATIONALES[max(PAPER_RATIONALES)] - PAPER_RATIONALES[1], sign=True)
    rows.append((f"{most} rationales against one", *(percent_interval(g, sign=True) for g in gains), theirs))
    note = f"The paper's several rationales are {max(PAPER_RATIONALES)}."
    return Table("What every choice changes, in points of agreement", ("", *found, PAPER_L), rows, note)


def _ways(
    preambles: Sequence[str] = PREAMBLES,
    cot: Sequence[bool] = (True, False),
    exemplars: Sequence[int] = EXEMPLARS,
) -> list[Prompt]:
    return list(product(preambles, cot, exemplars))


def _gain(labeler: Labeler, more: Sequence[Prompt], less: Sequence[Prompt]) -> dict[str, Any]:
    """Agreement under some ways of asking minus that under others, each a mean."""
    seeds = range(len(labeler.prompts[more[0]]))
    means = [[_mean_agreement(labeler, prompts, seed) for seed in seeds] for prompts in (more, less)]
    return _difference(*means)


def _paper_gain(more: Sequence[Prompt], less: Sequence[Prompt]) -> float | None:
    """The same over the pairs of prompts of which the paper has both."""
    gains = [
        PAPER_PROMPTS[a] - PAPER_PROMPTS[b]
        for a, b in zip(more, less, strict=True)
        if a in PAPER_PROMPTS and b in PAPER_PROMPTS
    ]
    return float(np.mean(gains)) if gains else None


def _mean_agreement(labeler: Labeler, prompts: Sequence[Prompt], seed: int) -> float:
    return float(np.mean([labeler.prompts[prompt][seed]["agreement"]["value"] for prompt in prompts]))


def _difference(more: Sequence[float], less: Sequence[float]) -> dict[str, Any]:
    """Of two lists, seed by seed; a single seed has no interval."""
    return over_seeds([{"value": a - b, "low": None, "high": None} for a, b in zip(more, less, strict=True)])


def size_figures(found: Labelers) -> Figures:
    """Agreement, same-position preferences and what averaging gains, from the smallest judge to the largest."""
    sizes = list(found)[::-1]
    theirs: Mapping[str, Mapping[str, float]] = {
        "Agreement by size": PAPER_SIZES,
        "Position bias by size": {size: locked for size, (locked, _) in PAPER_SAME_POSITION.items()},
    }

    def ours(cot: bool, *path: str) -> list[dict[str, Any]]:
        return [_over(found[size].prompts[LIKE_THE_PAPER[cot]], *path) for size in sizes]

    def panel(title: str, ylabel: str, lines: Mapping[str, Sequence[Found]]) -> Panel:
        def draw(ax: Axes) -> None:
            x = np.arange(len(sizes))
            for k, (label, estimates) in enumerate(lines.items()):
                values, low, high = (
                    100 * np.array([e[key] for e in estimates], dtype=np.float64)
                    for key in ("value", "low", "high")
                )
                ax.errorbar(
                    x,
                    values,
                    (values - low, high - values),
                    label=label,
                    marker=MARKERS[k],
                    capsize=3,
                    **series(k),
                )
            if title in theirs:
                known = [k for k, size in enumerate(sizes) if size in theirs[title]]
                values = 100 * np.array([theirs[title][sizes[k]] for k in known])
                ax.plot(known, values, color=INK, linestyle=":", marker="x", label="paper")
            ax.set_xticks(x, [f"{size}\n{found[size].parameters:,}" for size in sizes])
            ax.set(ylabel=ylabel, xlabel="judge, parameters", xlim=(-0.3, len(sizes) - 0.7), ylim=(-3, 103))
            ax.legend(fontsize=8)

        return draw

    note = "Detailed preamble, no exemplar; bars are 95 % intervals. The paper's sizes are those of PaLM 2."
    by_how = {how: cot for cot, how in HOW.items()}
    orders = {
        "preferred_first": "the better one is 1",
        "preferred_second": "the better one is 2",
        "both": "averaged",
    }
    panels = (
        (
            "Agreement by size",
            "agreement with gold, %",
            {how: ours(cot, "agreement") for how, cot in by_how.items()},
        ),
        (
            "Position bias by size",
            "same position in both orders, %",
            {how: ours(cot, "orders", "same_position") for how, cot in by_how.items()},
        ),
        (
            "Agreement by order, answered at once",
            "agreement with gold, %",
            {label: ours(False, "orders", which) for which, label in orders.items()},
        ),
    )
    return Figures([Figure(title, note, panel(title, ylabel, lines)) for title, ylabel, lines in panels])


STUDY = LabelerStudy(JUDGES)

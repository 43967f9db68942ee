"""What the arms of a study learned: read from their runs, held against gold utility; tables and pictures."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from rlaif.agreement import bootstrap_interval, mean
from rlaif.errors import DataError
from rlaif.storage import write_atomic
from rlaif.tables import number, percent_interval, table
from tinyworld.arms import REWARD_MODELS, Arm, Study
from tinyworld.gold import gold_utility
from tinyworld.report import INK, draw_figure
from tinyworld.results import Estimate, gold_curve, machine, metric_curve, responses

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Floats = NDArray[np.float64]

REPORT = "learning.md"
BEGIN, END = "<!-- report: begin -->", "<!-- report: end -->"
"""Where the report goes in a page."""

COLOURS = ("#3b7dd8", "#d9822b", "#2a9d6f", "#b04a9c", "#8a6d3b", "#c0392b")
LAST = 0.1
"""Share of an arm's steps that "at the end of training" averages over."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """One arm at one seed.

    Attributes:
        gold: (N,) utility of its response to each unseen post.
        words: mean length of those.
        seen: (T,) responses sampled up to each step of training.
        curves: (T,) each: mean `gold` and `reward` (normalised) of a step's responses, and their `kl` to the SFT
            policy, in nats per response.
    """

    gold: Floats
    words: float
    seen: Floats
    curves: Mapping[str, Floats]


Outcomes = Mapping[str, Sequence[Outcome]]
"""By arm, one for each seed in the same order. `start` is the SFT policy, which has no curves."""


def outcomes(out: Path, arms: Sequence[Arm], seeds: Sequence[int]) -> Outcomes:
    """Read what finished.

    Raises:
        DataError: a file is missing or unreadable.
    """
    folders = [out / f"seed-{seed}" for seed in seeds]
    return {
        name: [_outcome(folder, name) for folder in folders]
        for name in ("start", *(arm.name for arm in arms))
    }


def _outcome(folder: Path, name: str) -> Outcome:
    posts = list(responses(folder / "eval" / "start"))
    written = responses(folder / "eval" / name)
    if missing := [post for post in posts if post not in written]:
        raise DataError(f"{folder / 'eval' / name} has no response to {len(missing)} of {len(posts)} posts")
    gold = np.array([gold_utility(post, written[post]) for post in posts])
    words = float(np.mean([len(written[post].split()) for post in posts]))
    if name == "start":
        return Outcome(gold, words, np.empty(0), {})
    run = folder / name
    by_step = {
        "gold": gold_curve(run),
        "reward": metric_curve(run, "objective/scores"),
        "kl": metric_curve(run, "objective/kl"),
    }
    seen = metric_curve(run, "episode")
    for curve in by_step.values():
        if curve.steps != seen.steps:
            raise DataError(f"{run} lacks samples or metrics of some steps")
    return Outcome(
        gold, words, np.array(seen.values, float), {k: np.array(c.values) for k, c in by_step.items()}
    )


def wins(a: Floats, b: Floats) -> Floats:
    """(N,) 1 where `a` is higher, 0 where `b` is, 1/2 where they are equal."""
    return np.where(np.isclose(a, b), 0.5, (a > b).astype(np.float64))


def over_seeds(rows: Sequence[Floats]) -> Estimate:
    """Mean of all rows, with a 95 % bootstrap interval that draws whole seeds, or rows where there is one seed."""
    seeds = [i for i, of_seed in enumerate(rows) for _ in of_seed] if len(rows) > 1 else None
    values = np.concatenate(rows)
    low, high = bootstrap_interval(values, mean, groups=seeds)
    return Estimate(mean(values), low, high)


def window(steps: int) -> int:
    """How many steps "at the end" and "highest" average over."""
    return max(1, round(LAST * steps))


def smoothed(curve: Floats) -> Floats:
    """(T,) mean of each step and those before it within the window; the first ones have fewer."""
    n = window(len(curve))
    return np.array([curve[max(0, i + 1 - n) : i + 1].mean() for i in range(len(curve))])


def mean_curve(of: Sequence[Outcome], name: str) -> Floats:
    """(T,) a curve's mean over seeds."""
    return np.asarray(np.mean([outcome.curves[name] for outcome in of], axis=0), dtype=np.float64)


def study_tables(study: Study, found: Outcomes, seeds: Sequence[int]) -> Iterator[str]:
    """The study's table over seeds, and its win rates seed by seed, as Markdown."""
    first, starts = study.arms[0], found["start"]
    rows: list[tuple[str, ...]] = []
    for arm in study.arms:
        of = found[arm.name]
        over_start = [wins(mine.gold, start.gold) for mine, start in zip(of, starts, strict=True)]
        over_first = [wins(a.gold, b.gold) for a, b in zip(of, found[first.name], strict=True)]
        gold = smoothed(mean_curve(of, "gold"))
        end = {name: smoothed(mean_curve(of, name))[-1] for name in ("reward", "kl")}
        rows.append(
            (
                arm.title,
                _rate(over_seeds(over_start)),
                "-" if arm is first else _rate(over_seeds(over_first)),
                number(float(np.mean([outcome.gold.mean() for outcome in of]))),
                f"{gold.max():.3f}, {gold[-1]:.3f}",
                f"{end['reward']:.2f}",
                f"{end['kl']:.1f}",
                f"{np.mean([outcome.words for outcome in of]):.1f}",
            )
        )
    start = (
        number(float(np.mean([s.gold.mean() for s in starts]))),
        f"{np.mean([s.words for s in starts]):.1f}",
    )
    rows.append(("SFT policy", "-", "-", start[0], "-", "-", "0.0", start[1]))
    heads = (
        "", "gold win rate over SFT, %", f"over {first.title.partition(':')[0]}, %", "gold utility",
        "gold in training: highest, at the end", "reward at the end", "KL at the end", "words",
    )  # fmt: skip
    yield table(heads, rows)
    if len(seeds) > 1:
        by_seed = []
        for arm in study.arms:
            pairs = zip(found[arm.name], starts, strict=True)
            by_seed.append((arm.title, *(_rate(over_seeds([wins(a.gold, b.gold)])) for a, b in pairs)))
        yield table(("gold win rate over SFT, %", *(f"seed {seed}" for seed in seeds)), by_seed)


def _rate(found: Estimate) -> str:
    return percent_interval({"value": found.value, "low": found.low, "high": found.high})


def reward_model_table(out: Path, names: Sequence[str], seeds: Sequence[int]) -> str:
    """What the reward models are worth on pairs that gold has labelled, as Markdown; means over seeds."""
    rows = []
    for name in names:
        read = [
            json.loads((out / f"seed-{seed}" / "eval" / name / "metrics.json").read_text(encoding="utf-8"))
            for seed in seeds
        ]
        accuracy = [found["accuracy"]["value"] for found in read]
        rows.append(
            (
                name,
                REWARD_MODELS[name].title,
                f"{100 * np.mean(accuracy):.1f} ({100 * min(accuracy):.1f} to {100 * max(accuracy):.1f})",
                number(float(np.mean([found["log_loss"] for found in read]))),
                number(float(np.mean([found["calibration"]["ece"] for found in read]))),
            )
        )
    return table(("reward model", "learned from", "agrees with gold, %", "log loss", "ECE"), rows)


def draw_study(study: Study, found: Outcomes) -> str:
    """Gold and reward against the responses sampled, and gold against KL: mean over seeds, and their range."""

    def panel(y: str, x: str, ylabel: str, xlabel: str) -> Callable[[Axes], None]:
        def draw(ax: Axes) -> None:
            for colour, arm in zip(COLOURS, study.arms, strict=False):
                of = found[arm.name]
                across = of[0].seen if x == "seen" else smoothed(mean_curve(of, x))
                lines = np.array([smoothed(outcome.curves[y]) for outcome in of])
                ax.plot(across, lines.mean(axis=0), color=colour, label=arm.title, linewidth=1.8)
                if x == "seen" and len(of) > 1:
                    low, high = lines.min(axis=0), lines.max(axis=0)
                    ax.fill_between(across, low, high, color=colour, alpha=0.15, linewidth=0)
            if y == "gold":
                start = float(np.mean([outcome.gold.mean() for outcome in found["start"]]))
                ax.axhline(start, color=INK, linestyle=":", label="SFT policy")
            ax.set(xlabel=xlabel, ylabel=ylabel)
            ax.legend(fontsize=8)

        return draw

    return draw_figure(
        panel("gold", "seen", "gold utility", "responses sampled"),
        panel("reward", "seen", "reward (normalised)", "responses sampled"),
        panel("gold", "kl", "gold utility", "KL to the SFT policy (nats per response)"),
    )


def write_report(out: Path, studies: Sequence[Study], seeds: Sequence[int]) -> str:
    """Write `learning.md` and its pictures to `out`, and return the text.

    Raises:
        DataError: a run's file is missing or unreadable.
    """
    arms = list(dict.fromkeys(arm for study in studies for arm in study.arms))
    found = outcomes(out, arms, seeds)
    parts = []
    for study in studies:
        parts += [f"### {study.title}", *study_tables(study, found, seeds)]
        if study.curves:
            name = f"images/learning-{study.name}.svg"
            write_atomic(out / name, draw_study(study, found))
            parts.append(f"![gold and reward by responses sampled, gold by KL]({name})")
    models = [name for name in REWARD_MODELS if any(arm.reward == name for arm in arms)]
    parts += ["### Reward models", reward_model_table(out, models, seeds)]
    seconds = [_seconds(out / f"seed-{seed}") for seed in seeds]
    posts = len(found["start"][0].gold)
    parts.append(
        f"Seeds {', '.join(map(str, seeds))}; {posts} unseen posts each; {date.today().isoformat()}; {machine()}; "
        f"processes at work for {np.mean(seconds) / 60:.1f} minutes a seed, two side by side."
    )
    text = "\n\n".join(parts) + "\n"
    write_atomic(out / REPORT, text)
    return text


def _seconds(folder: Path) -> float:
    """Wall-clock seconds of all stages of a seed together."""
    stages = (folder / "stages").glob("*.json")
    return math.fsum(json.loads(path.read_text(encoding="utf-8"))["seconds"] for path in stages)


def insert_report(out: Path, docs: Path) -> None:
    """Put the report and its pictures into `docs`: `learning.md` takes it between its marks.

    Raises:
        DataError: the page has no marks.
    """
    page = docs / REPORT
    text = page.read_text(encoding="utf-8")
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise DataError(f"{page} has no {BEGIN} and {END} for the report to go between")
    report = (out / REPORT).read_text(encoding="utf-8")
    for picture in sorted((out / "images").glob("*.svg")):
        write_atomic(docs / "images" / picture.name, picture.read_text(encoding="utf-8"))
    write_atomic(page, f"{before}{BEGIN}\n\n{report}\n{END}{after}")

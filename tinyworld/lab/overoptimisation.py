"""When does a policy that earns more reward become worse? Reward and gold against the square root of KL.

After Gao, Schulman and Hilton, "Scaling laws for reward model overoptimization" (arXiv 2210.10760): reward models that
learned from few labels and from many, optimised by best of n and by reinforcement learning, with the KL term and
without.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from rlaif.errors import DataError
from rlaif.report.figures import INK, MARKERS, Panel, series
from rlaif.report.page import Block, Figure, Figures, Prose, Section, Table
from rlaif.storage import write_atomic
from rlaif.tables import number
from tinyworld.gold import gold_utility
from tinyworld.lab.arms import JUDGED, RM, Arm, RewardModel
from tinyworld.lab.findings import START, Outcome, Outcomes, outcomes, report_policies, smoothed
from tinyworld.lab.policies import PolicyStudy
from tinyworld.lab.rewards import POORER
from tinyworld.lab.scaling import Curve, Floats, Shape, best_of_n, fit, kl_best_of_n
from tinyworld.lab.study import Sizes, mean_over_seeds
from tinyworld.stages import POLICY, Phase, Stage

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FEW = RewardModel("rm-few", "a twenty-fifth of the judge's labels", JUDGED, ("--eval_fraction", "0.96"))
FIFTH = RewardModel("rm-fifth", "a fifth of them", JUDGED, ("--eval_fraction", "0.8"))
MODELS = (FEW, FIFTH, RM, POORER)
"""From few labels to many, and of labels that are poor."""

BON_PROMPTS = 50
BON_SAMPLES = 100
"""Samples of each prompt, from which the best of every n is estimated."""
NS = (1, 2, 4, 8, 16, 32, 64)

LEAST_KL = 0.01
"""In nats; estimates below it are noise about zero and no point of a curve."""


FREE, SHORT, SHORTER = ("--kl_coef", "0"), ("--max_steps", "60"), ("--max_steps", "40")
WITHOUT_KL = (
    Arm("no-kl-few", "few labels, without KL term", "ppo", "long", FEW, (*FREE, *SHORT)),
    Arm("no-kl", "a fifth, without KL term", "ppo", "long", FIFTH, FREE),
    Arm("no-kl-all", "all labels, without KL term", "ppo", "long", RM, (*FREE, *SHORT)),
    Arm("no-kl-poor", "poor labels, without KL term", "ppo", "long", POORER, (*FREE, *SHORTER)),
)
"""One for each of `MODELS`."""
WITH_KL = (
    Arm("with-kl", "a fifth, with KL term", "ppo", "long", FIFTH),
    Arm("with-kl-poor", "poor labels, with KL term", "ppo", "long", POORER, SHORTER),
)


@dataclass(frozen=True, slots=True)
class BestOfN:
    """Best of n by one reward model, at one seed.

    Attributes:
        gold: (len(NS),) expected gold utility of the best of each n.
        reward: (len(NS),) its expected reward, normalised.
    """

    gold: Floats
    reward: Floats


@dataclass(frozen=True, slots=True)
class OverOptimisationStudy(PolicyStudy):
    """Policies that learn for long, and the best of many samples, by several reward models."""

    def prepare(self, folder: Path, seed: int, sizes: Sizes) -> None:
        """What the policies need, and the posts for best of n, which are the first of the unseen ones.

        Raises:
            StorageError: the settings are not what they were.
        """
        PolicyStudy.prepare(self, folder, seed, sizes)
        posts = (folder / "eval-prompts.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
        write_atomic(folder / "bon-prompts.jsonl", "".join(posts[:BON_PROMPTS]))

    def plan(self, folder: Path, seed: int, sizes: Sizes) -> list[Phase]:
        """The policies' commands; beside them, sample many responses of the SFT policy, and score them."""
        labelling, distilling, training, comparing = PolicyStudy.plan(self, folder, seed, sizes)
        bon = folder / "bon"
        what = ("--model_name_or_path", POLICY, "--dataset", str(folder / "bon-prompts.jsonl"))
        many = ("--num_return_sequences", str(BON_SAMPLES), "--max_new_tokens", "40")
        to = ("--output_dir", str(bon / "candidates"), "--seed", str(seed))
        responses = ("--candidates", str(bon / "candidates"), "--output", str(bon / "responses.jsonl"))
        sampling = (
            Stage("bon-sample", ("sample", *what, *many, *to)),
            Stage("bon-responses", responses, module="tinyworld.lab.responses"),
        )
        scoring = tuple(
            Stage(
                f"bon-{model.name}",
                ("score", "--dataset", str(bon / "responses.jsonl"), "--output", str(bon / f"{model.name}.jsonl"),
                 "--reward_server", "{server}"),
                model.name,
            )
            for model in MODELS
        )  # fmt: skip
        return [
            replace(labelling, tracks=(*labelling.tracks, sampling)),
            distilling,
            replace(training, tracks=(scoring, *training.tracks)),
            comparing,
        ]

    def report(self, folders: Mapping[int, Path]) -> list[Section]:
        """Curves over the square root of KL with their fits, and what became of every policy."""
        found = outcomes(self, folders)
        bon = {
            model.name: [
                read_best_of_n(folder / "bon" / f"{model.name}.jsonl") for folder in folders.values()
            ]
            for model in MODELS
        }
        pairs = {model.name: _learned_from(model, folders) for model in MODELS}
        policies, models = report_policies(self, folders)
        return [
            Section("Best of n", _best_of_n(bon, pairs)),
            Section("Reinforcement learning", _learning(self.arms, found, list(folders))),
            Section("Fitted curves", [_fits(bon, found, pairs)]),
            policies,
            models,
        ]


def read_best_of_n(scored: Path) -> BestOfN:
    """Best of every n, from the scored samples of the SFT policy.

    Raises:
        DataError: a reward is missing.
    """
    by_post: dict[str, list[tuple[float, float]]] = {}
    for row in map(json.loads, scored.read_text(encoding="utf-8").splitlines()):
        if row["reward"] is None:
            raise DataError(f"{scored} lacks a reward: {row['reward_reason']}")
        post = row["prompt"][-1]["content"]
        by_post.setdefault(post, []).append((row["reward"], gold_utility(post, row["response"])))
    reward, gold = np.moveaxis(np.array(list(by_post.values()), dtype=np.float64), 2, 0)
    return BestOfN(
        gold=np.array([best_of_n(reward, gold, n) for n in NS]),
        reward=np.array([best_of_n(reward, reward, n) for n in NS]),
    )


def rl_points(outcome: Outcome, start: float) -> tuple[Floats, Floats]:
    """(N,) square roots of the KL of training, in nats, and (N,) gold utilities above `start`, smoothed."""
    kl, gold = smoothed(outcome.curves["kl"]), smoothed(outcome.curves["gold"])
    taken = kl > LEAST_KL
    return np.sqrt(kl[taken]), gold[taken] - start


def _learned_from(model: RewardModel, folders: Mapping[int, Path]) -> str:
    """How many pairs a reward model learned from, and whose labels if not the judge's best."""
    counts = [
        json.loads((folder / model.name / "reward_model.json").read_text(encoding="utf-8"))["train_rows"]
        for folder in folders.values()
    ]
    return f"{np.mean(counts):.0f} {'pairs' if model.labels == JUDGED else 'pairs, poor labels'}"


def _best_of_n(bon: Mapping[str, Sequence[BestOfN]], pairs: Mapping[str, str]) -> list[Block]:
    rows = []
    for model, of in bon.items():
        gold, reward = (
            map(number, np.mean([getattr(one, name) for one in of], axis=0)) for name in ("gold", "reward")
        )
        rows.append((f"{pairs[model]}: gold utility", *gold))
        rows.append((f"{pairs[model]}: reward", *reward))
    kls = ("KL, nats", *(f"{kl_best_of_n(n):.2f}" for n in NS))
    d = np.sqrt([kl_best_of_n(n) for n in NS])

    def panel(name: str, ylabel: str) -> Panel:
        def draw(ax: Axes) -> None:
            for i, (model, of) in enumerate(bon.items()):
                mean = np.mean([getattr(one, name) for one in of], axis=0)
                style = {
                    "color": series(i)["color"],
                    "marker": MARKERS[i],
                    "linestyle": "none",
                    "markersize": 4,
                }
                ax.plot(d, mean, **style, label=pairs[model])
                curve, across = fit("bon", d[1:], mean[1:] - mean[0]), np.linspace(0.05, d[-1], 60)
                ax.plot(across, mean[0] + curve(across), **series(i), linewidth=1.2)
            ax.set(xlabel="√KL (square roots of nats)", ylabel=ylabel)
            ax.legend(fontsize=8)

        return draw

    note = "Points: best of n, means over seeds; lines: the curve d (α − β d) nearest to them."
    return [
        Table("Expected worth of the best of n", ("n", *map(str, NS)), [kls, *rows]),
        Figures(
            (
                Figure("Gold utility of the best of n", note, panel("gold", "gold utility")),
                Figure("Reward of the best of n", note, panel("reward", "reward (normalised)")),
            )
        ),
        Prose(
            f"{BON_SAMPLES} samples of the SFT policy to each of {BON_PROMPTS} posts a seed, by the unbiased estimator "
            "over all choices of n of them. The KL is log n − (n − 1) / n."
        ),
    ]


def _learning(arms: Sequence[Arm], found: Outcomes, seeds: Sequence[int]) -> list[Block]:
    start = float(np.mean([outcome.gold["score"]["value"] for outcome in found[START]]))
    rows = [row for arm in arms for row in _rise_and_fall(arm, found[arm.name])]

    def panel(name: str, ylabel: str) -> Panel:
        def draw(ax: Axes) -> None:
            for i, arm in enumerate(arms):
                for k, outcome in enumerate(found[arm.name]):
                    kl, value = smoothed(outcome.curves["kl"]), smoothed(outcome.curves[name])
                    label = arm.title if k == 0 else None
                    ax.plot(np.sqrt(kl.clip(0)), value, **series(i), linewidth=1.2, label=label)
            if name == "gold":
                ax.axhline(start, color=INK, linestyle=":", label="SFT policy")
            ax.set(xlabel="√KL (square roots of nats)", ylabel=ylabel)
            ax.legend(fontsize=7)

        return draw

    note = "A line for each seed, from the start of training to its end."
    heads = ("where gold is highest → at the end", *(f"seed {seed}" for seed in seeds))
    return [
        Table("Rise and fall of gold in training", heads, rows),
        Figures(
            (
                Figure("Gold utility by √KL", note, panel("gold", "gold utility"), (5.6, 3.8)),
                Figure("Reward by √KL", note, panel("reward", "reward (normalised)"), (5.6, 3.8)),
            )
        ),
    ]


def _rise_and_fall(arm: Arm, of: Sequence[Outcome]) -> list[tuple[str, ...]]:
    """Gold, reward and KL of an arm where its gold is highest, and at the end of training; a column for each seed."""
    rows = []
    for name, title in (("gold", f"{arm.title}: gold"), ("reward", "reward"), ("kl", "KL")):
        cells = []
        for outcome in of:
            top = int(smoothed(outcome.curves["gold"]).argmax())
            curve = smoothed(outcome.curves[name])
            cells.append(f"{curve[top]:.2f} → {curve[-1]:.2f}")
        rows.append((title, *cells))
    return rows


def _fits(bon: Mapping[str, Sequence[BestOfN]], found: Outcomes, pairs: Mapping[str, str]) -> Table:
    d = np.sqrt([kl_best_of_n(n) for n in NS])[1:]
    starts = [outcome.gold["score"]["value"] for outcome in found[START]]
    rows = []
    for model, arm in zip(MODELS, WITHOUT_KL, strict=True):
        chosen = [(d, one.gold[1:] - one.gold[0]) for one in bon[model.name]]
        learned = [rl_points(*of) for of in zip(found[arm.name], starts, strict=True)]
        rows += [
            _fit_row(f"{pairs[model.name]}; best of n", "bon", chosen),
            _fit_row(f"{pairs[model.name]}; RL without KL term", "rl", learned),
        ]
    heads = ("gold utility above the SFT policy's", "α", "β", "R²", "highest at a KL of, by seed")
    note = (
        "Best of n: d (α − β d); RL: d (α − β log d); d is the square root of KL. Least squares for each seed; "
        "means and intervals over seeds. Where the curve is highest beyond the KL that was reached, or does not fall, "
        "it says so."
    )
    return Table("Coefficients", heads, rows, note)


def _fit_row(name: str, shape: Shape, points: Sequence[tuple[Floats, Floats]]) -> tuple[str, ...]:
    curves = [fit(shape, d, gold) for d, gold in points]
    coefficients = (
        mean_over_seeds([getattr(curve, coefficient) for curve in curves])
        for coefficient in ("alpha", "beta", "r2")
    )
    peaks = (_peak(curve, float(d.max())) for curve, (d, _) in zip(curves, points, strict=True))
    return (name, *coefficients, ", ".join(peaks))


def _peak(curve: Curve, furthest: float) -> str:
    if curve.peak is None:
        return "does not fall"
    return "beyond" if curve.peak > furthest else f"{curve.peak**2:.1f}"


STUDY = OverOptimisationStudy(
    "overoptimisation",
    "When does a policy that earns more reward become worse?",
    (*WITHOUT_KL, *WITH_KL),
)

"""The pages of `rlaif train ppo`, `train dpo`, `train best_of_n` and `train sft`, and the curves that runs share."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlaif.report import plots
from rlaif.report.findings import Findings, section, table
from rlaif.report.page import Block, Example, Figure, Figures, Prose, Section, Text, Tile
from rlaif.report.source import Row, Source, open_parquet, read_lines
from rlaif.report.wording import figure, rate, rate_range, text_of, whole

EXAMPLES = 4
MOST_FILES = 200
"""So many of the first and of the last sample files are looked through."""

METHODS = {
    "train ppo": "Online policy optimisation against a reward server",
    "train dpo": "Preference optimisation on the policy's own responses, labelled by a reward server",
    "train best_of_n": "Fine-tuning on the best of n of the policy's own responses, by a reward server",
    "train sft": "Supervised fine-tuning",
}


@dataclass(frozen=True, slots=True)
class Shown:
    """A picture of metrics over steps.

    Attributes:
        title: of the picture.
        metrics: each a line, with its name in the legend; those that a run has not are left out.
        ylabel: of the axis.
        caption: how to read it.
        group: the section that it stands in.
        reference: a dotted line across.
    """

    title: str
    metrics: Mapping[str, str]
    ylabel: str
    caption: str
    group: str = "Reward and drift"
    reference: float | None = None


PICTURES = (
    Shown(
        "Reward", {"objective/scores": "training"}, "reward (normalised)",
        "Mean normalised reward of a step's responses: what training sees.",
    ),
    Shown(
        "Held-out reward", {"eval/reward": "held out"}, "reward (normalised)",
        "On prompts that are not trained on, with 95 % bootstrap intervals.",
    ),
    Shown(
        "Held-out win rate",
        {"eval/win_rate": "win rate", "eval/win_rate_length_controlled": "length-controlled"},
        "win rate over the reference",
        "On prompts that are not trained on, with 95 % bootstrap intervals; ties count half.",
        reference=0.5,
    ),
    Shown(
        "KL to the reference", {"objective/kl": "training", "eval/kl": "held out"}, "nats per response",
        "How far the policy has moved from where its KL is measured.",
    ),
    Shown(
        "Entropy", {"objective/entropy": "entropy"}, "nats per response",
        "What is left of the policy's uncertainty; near 0 it always says the same.",
    ),
    Shown(
        "Response length", {"response/length": "training", "eval/length": "held out"}, "tokens",
        "Mean length of the responses: a reward that likes length shows here.",
    ),
    Shown(
        "Selected for training",
        {"selected/scores": "best", "selected/scores_1": "best", "selected/scores_2": "second"},
        "reward (normalised)", "Mean reward of the responses that are trained on.",
    ),
    Shown(
        "Policy loss",
        {"loss": "loss", "loss/policy_avg": "policy", "loss/dpo": "loss", "loss/sft": "loss"},
        "loss", "Of each step. In policy-gradient methods its level means nothing.", "Losses and updates",
    ),
    Shown(
        "Value loss", {"loss/value_avg": "value"}, "loss", "How badly the critic predicts returns.",
        "Losses and updates",
    ),
    Shown(
        "Clipped share", {"policy/clipfrac_avg": "policy", "val/clipfrac_avg": "value"}, "share of tokens",
        "Tokens whose ratio left the trust region; near 0 the updates are small.", "Losses and updates",
    ),
    Shown(
        "Implicit rewards", {"rewards/chosen": "chosen", "rewards/rejected": "rejected"}, "β log ratio",
        "How much likelier than under the reference the policy holds chosen and rejected responses.",
        "Losses and updates", 0.0,
    ),
    Shown(
        "Accuracy on pairs", {"rewards/accuracies": "accuracy"}, "share of pairs",
        "Pairs whose chosen response has the higher implicit reward.", "Losses and updates", 0.5,
    ),
    Shown(
        "Labels of pairs", {"pairs/chosen_prob": "P(chosen preferred)"}, "probability",
        "Mean soft label of the pairs that are trained on.", "Losses and updates",
    ),
    Shown(
        "Norm of the gradient", {"grad_norm": "norm"}, "norm", "Before clipping.", "Losses and updates",
    ),
    Shown(
        "Learning rate", {"lr": "policy", "learning_rate": "model"}, "learning rate", "", "Losses and updates",
    ),
    Shown(
        "Missing rewards", {"reward/missing": "missing"}, "responses of a step",
        "Responses whose reward could not be had: they leave the loss and the statistics.",
        "What was missing, and time",
    ),
    Shown(
        "Time of a step", {"time/step": "step"}, "seconds", "", "What was missing, and time",
    ),
)  # fmt: skip
"""In the order of the page. A metric without a value at any step is not drawn."""

FINAL = (
    ("reward", "objective/scores"),
    ("KL, nats", "objective/kl"),
    ("entropy, nats", "objective/entropy"),
    ("response length, tokens", "response/length"),
    ("loss", "loss"),
    ("DPO loss", "loss/dpo"),
    ("SFT loss", "loss/sft"),
)
"""Tiles of the last step."""


def trained(source: Source) -> Findings:
    """The page of a training run."""
    online = source.command != "train sft"
    config = source.config
    began = config.get("model_name_or_path", "a model that is not on record")
    data = config.get("dataset", "not on record")
    lead = [f"{METHODS[source.command]}. The policy began as {began}; data: {data}."]
    sections: list[Section] = []
    for group in dict.fromkeys(shown.group for shown in PICTURES):
        drawn = [
            p for shown in PICTURES if shown.group == group and (p := picture(shown, source.rows)) is not None
        ]
        if group == "Reward and drift":
            drawn += against_kl({"": source.rows})
            drawn += _rewards_before_and_after(source)
        blocks: list[Block | None] = [Figures(drawn) if drawn else None]
        if group == "What was missing, and time":
            blocks += [_nothing_missing(source.rows), _where_time_went(source.rows)]
        sections += section(group, *blocks)
    sections += _before_and_after(source)
    return Findings(
        lead=lead,
        tiles=final_tiles(source),
        sections=sections,
        absent=list(_absent(source)) if online else [],
    )


def picture(shown: Shown, rows: Sequence[Row]) -> Figure | None:
    """The picture of one run; None without any of its metrics."""
    names = dict.fromkeys(shown.metrics.values())
    lines = []
    for name in names:
        first = next((m for m, n in shown.metrics.items() if n == name and plots.curve(rows, m)), None)
        line = None if first is None else plots.curve(rows, first, name)
        if line is not None and not (shown.title == "Missing rewards" and not any(line.y)):
            lines.append(line)
    if not lines:
        return None
    return Figure(
        shown.title, shown.caption, plots.curves(lines, "step", shown.ylabel, reference=shown.reference)
    )


def against_kl(runs: Mapping[str, Sequence[Row]]) -> list[Figure]:
    """Reward over KL, a path for each run; none where no run has both."""
    lines = []
    for number, (name, rows) in enumerate(runs.items()):
        both = [
            r for r in rows if r.get("objective/kl") is not None and r.get("objective/scores") is not None
        ]
        if len(both) > 1:
            kl, reward = (plots.smoothed([r[m] for r in both]) for m in ("objective/kl", "objective/scores"))
            lines.append(plots.Curve(name, kl, reward, number=number))
    if not lines:
        return []
    return [
        Figure(
            "Reward against KL",
            "What is gained for how far the policy moves, from the hollow point (first step) to the filled one (last); "
            "each step averaged with those before it, over a tenth of the run.",
            plots.path(lines, "KL (nats per response)", "reward (normalised)"),
        )
    ]


def final_tiles(source: Source) -> list[Tile]:
    """The figures of the last step, and of the best evaluation."""
    rows = source.rows
    if not rows:
        return [Tile(None, "steps")]
    last = rows[-1]
    total = source.config.get("max_steps")
    ended = source.record.get("ended")
    tiles = [
        Tile(
            whole(last["step"]),
            "steps",
            (f"of {total:,}; " if total else "")
            + (
                "no end on record"
                if ended is None
                else f"ended: {ended['reason'].replace('max_steps', 'all done')}"
            ),
        )
    ]
    best = [row for row in rows if row.get("eval/win_rate") is not None]
    if best:
        top = max(best, key=lambda row: (row["eval/win_rate"], -row["step"]))
        for name, row in (("held-out win rate, last", best[-1]), ("held-out win rate, best", top)):
            interval = {"low": row.get("eval/win_rate_low"), "high": row.get("eval/win_rate_high")}
            tiles.append(
                Tile(rate(row["eval/win_rate"]), name, f"at step {row['step']}", rate_range(interval))
            )
    for name, metric in FINAL:
        known = [row for row in rows if metric in row]
        if known:
            first = known[0][metric]
            note = f"at step {known[-1]['step']}" + (
                "" if first is None else f"; {figure(first)} at step {known[0]['step']}"
            )
            tiles.append(Tile(figure(known[-1][metric]), name, note))
    if any("reward/missing" in row for row in rows):
        missing = math.fsum(row.get("reward/missing") or 0 for row in rows)
        responses = last.get("episode")
        tiles.append(
            Tile(whole(missing), "rewards missing", f"of {whole(responses)} responses" if responses else "")
        )
    seconds = [row["time/step"] for row in rows if row.get("time/step") is not None]
    if seconds:
        tiles.append(
            Tile(
                f"{math.fsum(seconds):,.0f} s",
                "time of all steps",
                f"{figure(math.fsum(seconds) / len(seconds))} s a step",
            )
        )
    return tiles


def _absent(source: Source) -> Iterator[str]:
    if not source.rows:
        yield "Curves: metrics.jsonl is not there or has no line."
    elif not any("eval/win_rate" in row for row in source.rows):
        yield "Held-out win rate: the run had no --eval_dataset."
    if not source.samples():
        yield "Samples: the run kept none (--samples_per_step)."
    if not source.completions():
        yield "All responses of every step: the run did not keep them (--log_completions)."
    if not source.has("README.md"):
        yield "Model card: the run has not written its final model."


# ---- what was missing, and time ----


def _nothing_missing(rows: Sequence[Row]) -> Block | None:
    counted = [row["reward/missing"] for row in rows if row.get("reward/missing") is not None]
    return Prose("No reward was missing.") if counted and not any(counted) else None


def time_shares(rows: Sequence[Row]) -> dict[str, float]:
    """Seconds of each part of all steps; `rest` is what the parts leave."""
    timed = [row for row in rows if row.get("time/step") is not None]
    names = dict.fromkeys(n for row in timed for n in row if n.startswith("time/") and n != "time/step")
    parts = {n.removeprefix("time/"): math.fsum(row.get(n) or 0.0 for row in timed) for n in names}
    total = math.fsum(row["time/step"] for row in timed)
    return {**parts, "rest": max(0.0, total - math.fsum(parts.values()))} if parts else {}


def _where_time_went(rows: Sequence[Row]) -> Block | None:
    shares = time_shares(rows)
    total = math.fsum(shares.values())
    if not total:
        return None
    return table(
        "Where the time went",
        ("part of a step", "seconds", "share"),
        [(name, f"{seconds:,.1f}", rate(seconds / total)) for name, seconds in shares.items()],
        "Seconds of all steps together. The reward's are those that were waited for it.",
    )


# ---- responses ----


def responses(source: Source, step: int) -> list[Row]:
    """All responses of a step if the run kept them, else its transcripts."""
    if (path := source.completions().get(step)) is not None:
        rows: list[dict[str, Any]] = open_parquet(path).read().to_pylist()
        return [{**row, "response": row["completion"]} for row in rows]
    path = source.samples().get(step)
    return [] if path is None else list(read_lines(path))


def _rewards_before_and_after(source: Source) -> list[Figure]:
    steps = sorted({*source.samples(), *source.completions()})
    if len(steps) < 2:
        return []
    named = {
        f"step {step}": [row["reward"] for row in responses(source, step) if row.get("reward") is not None]
        for step in (steps[0], steps[-1])
    }
    if not all(named.values()):
        return []
    counts = " and ".join(str(len(values)) for values in named.values())
    return [
        Figure(
            "Rewards of the first and the last step",
            f"Share of {counts} responses by their normalised reward; a mean hides a tail.",
            plots.distributions(named, "reward (normalised)", bins=16),
        )
    ]


def _before_and_after(source: Source) -> list[Section]:
    """Responses to the same prompt early and late; of different prompts where none came twice."""
    first, last = seen_twice(list(source.samples().items()))
    both = [prompt for prompt in last if prompt in first and first[prompt][0] < last[prompt][0]]
    if both:
        chosen = sorted(both, key=lambda p: (last[p][0] - first[p][0], last[p][0]), reverse=True)[:EXAMPLES]
        return section(
            "Before and after",
            *(
                Example(
                    f"Step {first[prompt][0]} and step {last[prompt][0]}",
                    [
                        Text("prompt", prompt),
                        *(_response(f"step {step}", row) for step, row in (first[prompt], last[prompt])),
                    ],
                    open=k < 2,
                )
                for k, prompt in enumerate(chosen)
            ),
        )
    steps = list(source.samples())
    if not steps:
        return []
    ends = dict.fromkeys((steps[0], steps[-1]))
    return section(
        "Samples",
        *(
            Example(
                f"Step {step}",
                [Text("prompt", text_of(row["prompt"])), _response("response", row)],
                open=k == 0,
            )
            for step in ends
            for k, row in enumerate(responses(source, step)[: EXAMPLES // 2])
        ),
    )


Seen = dict[str, tuple[int, Row]]


def seen_twice(files: Sequence[tuple[int, Path]]) -> tuple[Seen, Seen]:
    """By prompt, the first and the last step at which it was answered, with that transcript."""
    if len(files) > 2 * MOST_FILES:
        files = [*files[:MOST_FILES], *files[-MOST_FILES:]]
    first: Seen = {}
    last: Seen = {}
    for step, path in files:
        for row in read_lines(path):
            prompt = text_of(row["prompt"])
            first.setdefault(prompt, (step, row))
            if prompt not in last or last[prompt][0] < step:
                last[prompt] = (step, row)
    return first, last


def _response(label: str, row: Row) -> Text:
    notes = ["reward missing" if row.get("reward") is None else f"reward {row['reward']:.3f}"]
    if row.get("kl") is not None:
        notes.append(f"KL {row['kl']:.2f}")
    if row.get("finished") is False:
        notes.append("cut at its greatest length")
    return Text(label, row["response"], ", ".join(notes))

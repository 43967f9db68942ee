"""The findings about policies as Markdown, for people, and the frontier of reward against KL as a plot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlaif.storage import replacing, storing
from rlaif.tables import interval, percent, percent_interval, table

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Found = Mapping[str, Any]
FRONTIER = "frontier.png"


def render(findings: Found, *, frontier: bool) -> str:
    """The whole report; `frontier` says whether there is a plot."""
    parts = [_head(findings), *(_win_rates(findings, i) for i in range(len(findings["raters"])))]
    parts.append(_policies(findings))
    if frontier:
        parts.append(f"![reward against KL]({FRONTIER})")
    return "\n\n".join(parts) + "\n"


def _head(found: Found) -> str:
    lines = [
        f"# Against {found['baseline']}",
        "",
        f"{found['prompts']} prompts of {found['dataset']}, one response each, sampled at temperature "
        f"{found['temperature']:g}. Intervals are 95 %, bootstrapped over prompts.",
    ]
    return "\n".join(lines)


def _win_rates(found: Found, index: int) -> str:
    rater = found["raters"][index]
    how = "comparing pairs, a judge in both orders" if rater["compares"] else "scoring: the higher score wins"
    version = f" (version {rater['version']})" if rater["version"] else ""
    ratings = [(policy["name"], policy["ratings"][index]) for policy in found["policies"][1:]]
    heads = ["policy", "win rate, %", "length-controlled, %", "ties, %", "longer wins, %", "comparisons"]
    rows: list[list[object]] = [
        [name, percent_interval(r["win_rate"]), percent_interval(r["length_controlled"]), percent(r["ties"]),
         percent(r["longer_wins"]), r["comparisons"]]
        for name, r in ratings
    ]  # fmt: skip
    if rater["compares"]:
        heads += ["mean P, %", "same position, %"]
        for row, (_, r) in zip(rows, ratings, strict=True):
            row += [percent_interval(r["mean_probability"]), percent(r["same_position"])]
    left_out = [
        f"{name}: " + ", ".join(f"{count} x {reason}" for reason, count in r["missing"].items())
        for name, r in ratings
        if r["missing"]
    ]
    notes = f"\n\nLeft out: {'; '.join(left_out)}." if left_out else ""
    subsets = [
        [name, s["name"] or "-", percent_interval(s["win_rate"]), percent_interval(s["length_controlled"]),
         percent(s["ties"]), percent(s["longer_wins"]), s["comparisons"]]
        for name, r in ratings
        for s in r.get("subsets", ())
    ]  # fmt: skip
    if subsets:
        notes += "\n\n" + table([heads[0], "subset", *heads[1:6]], subsets)
    return (
        f"## Win rates by {rater['name']}\n\n{rater['name']}{version}, {how}.\n\n{table(heads, rows)}{notes}"
    )


def _policies(found: Found) -> str:
    scoring = [i for i, rater in enumerate(found["raters"]) if not rater["compares"]]
    heads = ["policy", "step", "KL, nats", *(f"score by {found['raters'][i]['name']}" for i in scoring)]
    rows = []
    for policy in found["policies"]:
        scores = [interval(policy["ratings"][i]["score"]) for i in scoring]
        lengths = _or_dash(policy["tokens"]), percent(policy["finished"]), _or_dash(policy["characters"])
        rows.append([policy["name"], _or_dash(policy["step"]), interval(policy["kl"]), *scores, *lengths])
    text = table([*heads, "tokens", "finished, %", "characters"], rows)
    return (
        "## Reward against KL\n\nKL is to the reference, per response, at the sampling temperature; scores are raw "
        f"means.\n\n{text}"
    )


def _or_dash(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


# ---- the plot ----


def draw_frontier(findings: Found, path: Path) -> bool:
    """Plot scores and win rates over KL, a line per run; returns whether there was anything to plot.

    Raises:
        StorageError: the file cannot be written.
    """
    known = [policy for policy in findings["policies"] if policy["kl"]["value"] is not None]
    panels = [(i, rater) for i, rater in enumerate(findings["raters"])]
    if len(known) < 2 or not panels:
        return False
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(
        1, len(panels), figsize=(5.4 * len(panels), 3.8), layout="constrained", squeeze=False
    )
    for axis, (index, rater) in zip(axes[0], panels, strict=True):
        _panel(axis, known, index, rater, findings["baseline"])
    with replacing(path) as temporary, storing(path):
        figure.savefig(temporary, format="png", dpi=150)
    plt.close(figure)
    return True


def _panel(axis: Axes, policies: Sequence[Found], index: int, rater: Found, baseline: str) -> None:
    what = "win_rate" if rater["compares"] else "score"
    lines: dict[str, list[Found]] = {}
    for policy in policies:
        found = policy["ratings"][index]
        if found is not None and found.get(what) and found[what]["value"] is not None:
            lines.setdefault(policy["run"] or policy["name"], []).append(
                {"kl": policy["kl"], "y": found[what], "step": policy["step"]}
            )
    names = list(dict.fromkeys(policy["run"] or policy["name"] for policy in policies))
    for name, points in lines.items():
        x, y = [p["kl"]["value"] for p in points], [p["y"]["value"] for p in points]
        below = [p["y"]["value"] - p["y"]["low"] for p in points]
        above = [p["y"]["high"] - p["y"]["value"] for p in points]
        colour = f"C{names.index(name)}"
        axis.errorbar(x, y, yerr=[below, above], marker="o", capsize=2, color=colour, label=name)
        for point in points:
            if point["step"] is not None:
                at = point["kl"]["value"], point["y"]["value"]
                axis.annotate(str(point["step"]), at, (4, 4), textcoords="offset points", fontsize=7)
    axis.set_xlabel("KL to the reference, nats per response")
    axis.set_ylabel(f"win rate over {baseline}" if rater["compares"] else f"score by {rater['name']}")
    axis.legend(fontsize=7)

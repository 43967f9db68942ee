"""Tables of public sets' own scores, which both judges and reward models have."""

from __future__ import annotations

from rlaif.report.findings import table
from rlaif.report.page import Block
from rlaif.report.source import Facts
from rlaif.report.wording import rate_estimate, whole


def own_scores(found: Facts) -> list[Block | None]:
    """RewardBench's sections and RewardBench 2's best of several, where the data was theirs."""
    sections, best = found.get("rewardbench") or (), found.get("best_of") or ()
    left_out: list[str] = next((f["missing"] for f in sections if f["name"] == "score"), [])
    return [
        table(
            "RewardBench",
            ("section", "pairs", "right, %"),
            [(f["name"], whole(f["pairs"]), rate_estimate(f)) for f in sections],
            "Subsets weigh as on its leaderboard; the score is the mean of the sections."
            + (f" Without pairs, and so left out: {', '.join(left_out)}." if left_out else ""),
        ),
        table(
            "Best of several",
            ("subset", "right answers", "preferred to every wrong one, %"),
            [(f["name"] or "all", whole(f["answers"]), rate_estimate(f)) for f in best],
            "Among three wrong ones, chance is 25 %. The score is the mean of the subsets but Ties.",
        ),
    ]

"""The rationale a judge of the embedded world is taught to write: every word compared, points kept.

For each sentence of a summary it writes the name, then each word that the *post* has for that name, the word that
the summary has, and whether they agree; then the points so far. A small transformer can do every one of these steps by
looking up one earlier word; it cannot compare whole summaries in one glance. That is why it needs the rationale.

    0 anna sold sold yes boats hats no -2 ben found found yes keys keys yes 0 zoe unknown -2
"""

from __future__ import annotations

from tinyworld.gold import POINTS, gold_score, gold_utility, review
from tinyworld.grammar import parse_post

MIN_TALLY, MAX_TALLY = -12, 10
TALLIES = tuple(f"{t:+d}" if t else "0" for t in range(MIN_TALLY, MAX_TALLY + 1))
MARKS = ("yes", "no", "unknown", "repeated", "extra", "broken")


def notes(post: str, summary: str) -> str:
    """The comparison of one summary with its post; ends with its points, clamped to the written range.

    Raises:
        ValueError: `post` is not a post of this world.
    """
    points = 0
    words = [tally(points)]
    for finding in review(post, summary):
        if finding.word:
            words.append(finding.word)
        match finding.verdict:
            case "covered" | "distorted":
                assert finding.said and finding.true
                for true, said in (
                    (finding.true.verb, finding.said.verb),
                    (finding.true.thing, finding.said.thing),
                ):
                    words += [true, said, "yes" if said == true else "no"]
            case "invented":
                words.append("unknown")
            case "repeated":
                words.append("repeated")
            case "filler":
                words.append("extra")
            case "broken":
                words.append("broken")
        points += POINTS[finding.verdict]
        words.append(tally(points))
    return " ".join(words)


def pair_rationale(post: str, first: str, second: str) -> str:
    """What a judge writes about two summaries between the rationale cue and the ending."""
    return f"{notes(post, first)} | 2 : {notes(post, second)}"


def score_rationale(post: str, summary: str) -> str:
    """What a judge writes about one summary: its points, and out of how many facts."""
    return f"{notes(post, summary)} of {len(parse_post(post))}"


def score_label(post: str, summary: str) -> str:
    """The label of a summary on the scale of 1 to 10."""
    return str(gold_score(gold_utility(post, summary)))


def tally(points: int) -> str:
    """Points as a word, clamped to the range that has words."""
    return TALLIES[min(max(points, MIN_TALLY), MAX_TALLY) - MIN_TALLY]

"""Which labels to look at first: every row is checked for what commonly goes wrong, the worst are kept with reasons.

A suspicion is a number in [0, 1] for sorting, made of declared rules, not a probability. Found are: orders that
contradict each other, little label mass, censored labels, much longer responses that win with certainty, rationales
that name the other response, cut rationales, responses that are almost the same, pairs that occur again, labels near
1/2, split juries, and people who disagree.
"""

from __future__ import annotations

import heapq
import json
import math
import sqlite3
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from labeler.rationales import named_better
from rlaif.errors import StorageError
from rlaif.storage import write_atomic
from rlaif.types import LOW_LABEL_MASS, content_id

Row = Mapping[str, Any]

WORST = 100
"""Rows kept for validation.json; memory does not grow with the dataset."""
SHOWN = 20
"""Rows shown in validation.md."""

_GAP = 0.4
_SURE = 0.9
_LENGTH_RATIO = 2.0
_LENGTH_EXCESS = 200
_SAME_WORDS = 0.95
_CLOSE = 0.55
_LEAST_TENTH = 20


class Finding(NamedTuple):
    """One reason to look at a row."""

    check: str
    suspicion: float
    why: str


@dataclass(frozen=True, slots=True)
class Suspect:
    """A row with what is suspicious of it, worst first."""

    suspicion: float
    row: int
    id: str
    findings: tuple[Finding, ...]
    chosen_prob: float
    prompt: str
    chosen: str
    rejected: str

    def record(self) -> dict[str, Any]:
        """As JSON holds it."""
        return {
            "suspicion": round(self.suspicion, 4),
            "row": self.row,
            "id": self.id,
            "findings": [f._asdict() for f in self.findings],
            "chosen_prob": self.chosen_prob,
            "prompt": self.prompt,
            "chosen": self.chosen,
            "rejected": self.rejected,
        }


# ---- checks: a row -> a finding, or None ----


def orders_disagree(row: Row) -> Finding | None:
    """Both orders prefer one position, and by far: the label in the middle hides two opposite ones."""
    first, second = row.get("chosen_prob_first"), row.get("chosen_prob_second")
    if first is None or second is None or (first - 0.5) * (second - 0.5) >= 0 or abs(first - second) < _GAP:
        return None
    return Finding(
        "orders_disagree",
        abs(first - second),
        f"P(chosen preferred) is {first:.2f} shown first and {second:.2f} shown second",
    )


def low_label_mass(row: Row) -> Finding | None:
    """The judge wanted to say something other than a label."""
    masses = [m for m in (row.get("label_mass_ab"), row.get("label_mass_ba")) if m is not None]
    if not masses or min(masses) >= LOW_LABEL_MASS:
        return None
    return Finding(
        "low_label_mass", 1.0 - min(masses), f"all labels together had probability {min(masses):.2g}"
    )


def censored(row: Row) -> Finding | None:
    """A label was not among the tokens that the endpoint told; its probability is a bound."""
    if not row.get("censored"):
        return None
    return Finding("censored", 0.2, "a label was outside the endpoint's list of likeliest tokens")


def long_beats_short(row: Row) -> Finding | None:
    """The judge is sure of a response that is far longer: judges like length (arXiv 2306.05685, section 3.3)."""
    long, short = len(_text(row["chosen"])), len(_text(row["rejected"]))
    if row["chosen_prob"] < _SURE or long < _LENGTH_RATIO * short or long - short < _LENGTH_EXCESS:
        return None
    ratio = long / max(short, 1)
    return Finding(
        "long_beats_short",
        min(0.6, 0.2 * math.log2(ratio)),
        f"the chosen response has {long} characters, the rejected one {short}",
    )


def rationale_contradicts(row: Row) -> Finding | None:
    """A rationale declares one response the better one, and the label read after it prefers the other."""
    for order, p_first in _by_order(row):
        named = named_better(row.get(f"rationale_{order}") or "")
        if named is not None and p_first is not None and abs(p_first - 0.5) > 0.05:
            prefers = 1 if p_first > 0.5 else 2
            if named != prefers:
                return Finding(
                    "rationale_contradicts",
                    0.9,
                    f"the rationale in order {order} names response {named}, its label prefers response {prefers}",
                )
    return None


def truncated(row: Row) -> Finding | None:
    """The rationale was cut before its end."""
    if not row.get("truncated"):
        return None
    return Finding("truncated", 0.5, "a rationale was cut at its greatest length before the label was read")


def near_identical(row: Row) -> Finding | None:
    """Two responses with the same words: whatever the label says, there is little to learn."""
    chosen, rejected = _text(row["chosen"]), _text(row["rejected"])
    if min(len(chosen), len(rejected)) < 0.8 * max(
        len(chosen), len(rejected)
    ):  # spares most rows the counting
        return None
    same = same_words(chosen, rejected)
    if same < _SAME_WORDS:
        return None
    return Finding(
        "near_identical", 0.4 + 0.3 * same, f"the responses share {100 * same:.0f} % of their words"
    )


def close_call(row: Row) -> Finding | None:
    """The label is hardly a preference."""
    p = max(row["chosen_prob"], 1.0 - row["chosen_prob"])
    if p >= _CLOSE:
        return None
    return Finding(
        "close_call", 0.3 * (_CLOSE - p) / (_CLOSE - 0.5), f"chosen_prob is {row['chosen_prob']:.3f}"
    )


def against_people(row: Row) -> Finding | None:
    """People preferred the other response; the surer the judge, the more it matters."""
    human, p = row.get("human_chosen_prob"), row["chosen_prob"]
    if human is None or human == 0.5 or (human > 0.5) == (p > 0.5):
        return None
    sure = abs(2.0 * p - 1.0) * abs(2.0 * human - 1.0)
    return Finding(
        "against_people", 0.3 + 0.6 * sure, f"people: {human:.2f}, label: {p:.2f}, for the chosen response"
    )


def split_jury(row: Row) -> Finding | None:
    """The judges of a jury stand against each other, or one did not vote."""
    votes = [vote.get("chosen_prob") for vote in row.get("votes") or ()]
    given = [v for v in votes if v is not None]
    against = sum(v < 0.5 for v in given)
    if 3 * min(against, len(given) - against) >= len(votes) > 0:
        return Finding("split_jury", 0.5, f"{against} of {len(given)} judges prefer the rejected response")
    if len(given) < len(votes):
        return Finding("split_jury", 0.3, f"{len(votes) - len(given)} of {len(votes)} judges gave no vote")
    return None


CHECKS: tuple[Callable[[Row], Finding | None], ...] = (
    orders_disagree,
    low_label_mass,
    censored,
    long_beats_short,
    rationale_contradicts,
    truncated,
    near_identical,
    close_call,
    against_people,
    split_jury,
)
MEANINGS: Mapping[str, str] = {
    "orders_disagree": "both orders prefer one position, and by far",
    "low_label_mass": "the judge wanted to say something other than a label",
    "censored": "a label's probability is a bound",
    "long_beats_short": "the judge is sure of a response that is far longer",
    "rationale_contradicts": "a rationale names the other response as the better one",
    "truncated": "a rationale was cut",
    "near_identical": "both responses have the same words",
    "close_call": "hardly a preference",
    "against_people": "people preferred the other response",
    "split_jury": "the judges stand against each other, or some gave no vote",
    "duplicate": "the same two responses to the same prompt occurred before",
}

DUPLICATE = Finding("duplicate", 0.4, MEANINGS["duplicate"])


def _by_order(row: Row) -> Iterator[tuple[str, float | None]]:
    """(order, P(number 1 preferred)) for both orders, from what the columns say of the chosen response."""
    first, second = row.get("chosen_prob_first"), row.get("chosen_prob_second")
    as_second = None if second is None else 1.0 - second
    yield ("ab", first) if row.get("chosen_is_a", True) else ("ab", as_second)
    yield ("ba", as_second) if row.get("chosen_is_a", True) else ("ba", first)


def same_words(a: str, b: str) -> float:
    """Share of words in common, in [0, 1]: two bags of words, overlap over union (Jaccard); 1 if both are empty."""
    one, two = Counter(a.lower().split()), Counter(b.lower().split())
    shared = sum(min(one[word], two[word]) for word in one.keys() & two.keys())
    union = one.total() + two.total() - shared
    return shared / union if union else 1.0


# ---- all rows ----


class Validation:
    """Checks rows one by one; use as a context manager.

    Rows have the columns of `preferences.parquet`; where one is missing, its checks find nothing. Memory holds the
    worst rows and five bytes of every row; pairs seen before are looked up on the disk.

    Attributes:
        suspicious: rows with something to look at.
    """

    def __init__(self, worst: int = WORST) -> None:
        self._most = worst
        self._worst: list[tuple[float, int, Suspect]] = []
        self._found: Counter[str] = Counter()
        self.suspicious = 0
        self._probs, self._chosen_is_a = array("f"), array("b")
        self._seen = sqlite3.connect("")  # a temporary database, on the disk once it outgrows its cache
        self._seen.execute("PRAGMA journal_mode=OFF")
        self._seen.execute("CREATE TABLE seen (key INTEGER PRIMARY KEY)")

    def add(self, row: Row) -> Suspect | None:
        """Check a row of the dataset; give what is suspicious of it."""
        self._probs.append(row["chosen_prob"])
        chosen_is_a = row.get("chosen_is_a")
        self._chosen_is_a.append(-1 if chosen_is_a is None else int(chosen_is_a))
        found = [finding for check in CHECKS if (finding := check(row)) is not None]
        if self._is_known(row):
            found.append(DUPLICATE)
        if not found:
            return None
        self.suspicious += 1
        self._found.update(f.check for f in found)
        suspect = _suspect(row, len(self._probs), found)
        entry = (suspect.suspicion, -suspect.row, suspect)  # of equals, the earlier row is kept
        if len(self._worst) < self._most:
            heapq.heappush(self._worst, entry)
        else:
            heapq.heappushpop(self._worst, entry)
        return suspect

    def watch(self, rows: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """The same rows, each checked as it passes."""
        for row in rows:
            self.add(row)
            yield row

    def worst(self) -> list[Suspect]:
        """The most suspicious rows, worst first."""
        return [suspect for _, _, suspect in sorted(self._worst, key=lambda e: e[:2], reverse=True)]

    def result(self) -> dict[str, Any]:
        """What validation.json holds: counts by check, the distribution of labels, and the worst rows."""
        n = len(self._probs)
        return {
            "rows": n,
            "suspicious": self.suspicious,
            "checks": {
                name: {"rows": count, "share": count / n, "meaning": MEANINGS[name]}
                for name, count in self._found.most_common()
            },
            "labels": distribution(self._probs),
            "drift": drift(self._probs, self._chosen_is_a),
            "worst": [suspect.record() for suspect in self.worst()],
        }

    def close(self) -> None:
        """Remove the temporary database."""
        self._seen.close()

    def __enter__(self) -> Validation:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _is_known(self, row: Row) -> bool:
        responses = sorted((_text(row["chosen"]), _text(row["rejected"])))
        key = int(content_id(_text(row["prompt"]), responses), 16) - 2**63
        try:
            return self._seen.execute("INSERT OR IGNORE INTO seen VALUES (?)", (key,)).rowcount == 0
        except sqlite3.Error as err:
            raise StorageError(
                f"cannot note which pairs were seen: {err}; set TMPDIR to a folder with free space"
            ) from err


def together(findings: Iterable[Finding]) -> float:
    """One suspicion for several findings, in [0, 1]: each takes its share of what the others leave of 1."""
    return 1.0 - math.prod(1.0 - f.suspicion for f in findings)


def _suspect(row: Row, number: int, found: list[Finding]) -> Suspect:
    found.sort(key=lambda f: -f.suspicion)
    return Suspect(
        suspicion=together(found),
        row=number,
        id=str(row.get("id") or ""),
        findings=tuple(found),
        chosen_prob=row["chosen_prob"],
        prompt=_excerpt(_text(row["prompt"][-1:] if isinstance(row["prompt"], list) else row["prompt"])),
        chosen=_excerpt(_text(row["chosen"])),
        rejected=_excerpt(_text(row["rejected"])),
    )


def _text(value: Any) -> str:
    """The text of a column: messages joined, or the text itself."""
    return value if isinstance(value, str) else "\n\n".join(message["content"] for message in value)


def _excerpt(text: str, most: int = 400) -> str:
    text = " ".join(text.split())
    return text if len(text) <= most else f"{text[: most - 3]}..."


def distribution(probs: Sequence[float]) -> dict[str, Any]:
    """How sure the labels are.

    Args:
        probs: `chosen_prob` of every row.

    Returns:
        Mean, standard deviation, quartiles, and counts in bins of 0.05 from 0.5 to 1; labels below 1/2 (files that
        others made) are counted in `below_half`.
    """
    values = np.asarray(probs, dtype=np.float64)
    if not len(values):
        return {"mean": None, "histogram": {}}
    edges = np.linspace(0.5, 1.0, 11)
    counts, _ = np.histogram(values, edges)
    return {
        "mean": float(values.mean()),
        "deviation": float(values.std()),
        "quartiles": np.quantile(values, [0.25, 0.5, 0.75]).tolist(),
        "histogram": {f"{low:.2f}": int(count) for low, count in zip(edges, counts, strict=False)},
        "below_half": int((values < 0.5).sum()),
    }


def drift(probs: Sequence[float], chosen_is_a: Sequence[int]) -> dict[str, Any] | None:
    """Whether the last tenth of the rows has other labels than the first.

    A judge that changed under its name, or a dataset that is sorted, shows here.

    Args:
        probs: `chosen_prob` in the order of the dataset.
        chosen_is_a: whether the input's first response was chosen: 1 or 0, and -1 where it is not known.

    Returns:
        Means of both tenths, the Kolmogorov-Smirnov distance of their labels and its asymptotic p-value (small: more
        than chance), and the shares in which the input's first response was chosen; None below 20 rows a tenth.
    """
    size = len(probs) // 10
    if size < _LEAST_TENTH:
        return None
    first, last = np.asarray(probs[:size], dtype=np.float64), np.asarray(probs[-size:], dtype=np.float64)
    distance = ks_distance(first, last)
    a_first, a_last = np.asarray(chosen_is_a[:size]), np.asarray(chosen_is_a[-size:])
    known = min(a_first.min(), a_last.min()) >= 0
    return {
        "rows": size,
        "first_mean": float(first.mean()),
        "last_mean": float(last.mean()),
        "distance": distance,
        "p_value": ks_p_value(distance, size),
        "first_chosen_is_a": float(a_first.mean()) if known else None,
        "last_chosen_is_a": float(a_last.mean()) if known else None,
    }


def ks_distance(a: np.ndarray[Any, Any], b: np.ndarray[Any, Any]) -> float:
    """Greatest distance of two empirical distribution functions, in [0, 1] (Kolmogorov-Smirnov)."""
    points = np.sort(np.concatenate([a, b]))
    below_a = np.searchsorted(np.sort(a), points, side="right") / len(a)
    below_b = np.searchsorted(np.sort(b), points, side="right") / len(b)
    return float(np.abs(below_a - below_b).max())


def ks_p_value(distance: float, size: int) -> float:
    """P of a distance at least so large between two samples of `size` each, asymptotically (Smirnov 1948)."""
    x = distance * math.sqrt(size / 2)
    if x < 0.2:  # the series converges slowly there, and the value is 1 to ten digits
        return 1.0
    total = 2.0 * math.fsum((-1) ** (k - 1) * math.exp(-2.0 * (k * x) ** 2) for k in range(1, 101))
    return min(1.0, max(0.0, total))


# ---- for people ----


def write_validation(folder: Path, validation: Validation, name: str = "validation") -> None:
    """Write `validation.json` and `validation.md`.

    Raises:
        StorageError: the folder cannot be written.
    """
    found = validation.result()
    write_atomic(folder / f"{name}.json", json.dumps(found, indent=2, ensure_ascii=False) + "\n")
    write_atomic(folder / f"{name}.md", markdown(found))


def markdown(found: Mapping[str, Any]) -> str:
    """The report of `Validation.result` as a page: suspicious rows first, then what all labels look like."""
    return "\n".join(_page(found)) + "\n"


def _page(found: Mapping[str, Any]) -> Iterator[str]:
    rows, suspicious = found["rows"], found["suspicious"]
    share = f" ({100 * suspicious / rows:.1f} %)" if rows else ""
    yield from ("# Validation", "", f"{suspicious:,} of {rows:,} rows{share} have something to look at.", "")
    if found["checks"]:
        yield from ("| found | rows | share | meaning |", "| --- | ---: | ---: | --- |")
        for name, check in found["checks"].items():
            yield f"| {name} | {check['rows']:,} | {100 * check['share']:.2f} % | {check['meaning']} |"
        yield from ("", f"## The worst {min(SHOWN, len(found['worst']))} rows", "")
        yield "All of them, and more, with their numbers, are in `validation.json`."
        for suspect in found["worst"][:SHOWN]:
            yield from _shown(suspect)
    yield from ("", "## All labels", "")
    yield from _histogram(found["labels"])
    yield from _drift(found["drift"])


def _shown(suspect: Mapping[str, Any]) -> Iterator[str]:
    yield from (
        "",
        f"### Row {suspect['row']}, suspicion {suspect['suspicion']:.2f}, chosen_prob {suspect['chosen_prob']:.3f}",
        "",
    )
    yield from (f"- {f['check']}: {f['why']}" for f in suspect["findings"])
    yield ""
    for name in ("prompt", "chosen", "rejected"):  # indented: whatever a response contains, it stays text
        yield f"      {name + ':':<9} {suspect[name]}"


def _histogram(labels: Mapping[str, Any]) -> Iterator[str]:
    if labels["mean"] is None:
        yield "There are none."
        return
    low, median, high = labels["quartiles"]
    yield f"chosen_prob: mean {labels['mean']:.3f}, quartiles {low:.3f}, {median:.3f}, {high:.3f}."
    yield from ("", "```")
    most = max(labels["histogram"].values()) or 1
    for edge, count in labels["histogram"].items():
        yield f"{edge}  {'#' * round(40 * count / most):<40}  {count:,}"
    yield "```"
    if labels["below_half"]:
        yield from (
            "",
            f"{labels['below_half']:,} rows have a label below 1/2: it prefers the rejected response.",
        )


def _drift(found: Mapping[str, Any] | None) -> Iterator[str]:
    if found is None:
        return
    told = (
        f"First and last tenth ({found['rows']:,} rows each): mean {found['first_mean']:.3f} and "
        f"{found['last_mean']:.3f}, Kolmogorov-Smirnov distance {found['distance']:.3f} (p = {found['p_value']:.2g})"
    )
    if found["p_value"] < 0.001:
        told += ". **The labels drift**: the dataset is sorted, or the judge changed on the way"
    yield from ("", f"{told}.")

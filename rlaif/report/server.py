"""The page of a reward server's load: a file that holds what its `/metrics` said (`rlaif serve --metrics_port`).

One scrape tells what happened since the server started; it has no clock, so the page gives no rates.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from rlaif.errors import DataError
from rlaif.report import plots
from rlaif.report.figures import Panel
from rlaif.report.findings import Findings, section, table
from rlaif.report.page import Figure, Figures, Tile
from rlaif.report.source import Source
from rlaif.report.wording import figure, rate, whole

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COMMAND = "serve"
MARK = "rlaif_calls"
"""The metric that tells a reward server's file from another."""
QUANTILES = (0.5, 0.9, 0.99)


@dataclass(slots=True)
class Histogram:
    """A Prometheus histogram.

    Attributes:
        below: by upper edge, how many observations were at most that.
        sum: of all observations.
    """

    below: dict[float, float] = field(default_factory=dict)
    sum: float = 0.0

    @property
    def count(self) -> float:
        """Observations."""
        return max(self.below.values(), default=0.0)

    @property
    def mean(self) -> float | None:
        """Of all observations; None without any."""
        return self.sum / self.count if self.count else None

    def bins(self) -> list[tuple[float, float, float]]:
        """(low, high, count) of each bucket."""
        edges = sorted(self.below)
        if not edges:
            return []
        lows = [0.0 if edges[0] > 0 else -math.inf, *edges[:-1]]
        befores = [0.0, *(self.below[edge] for edge in edges[:-1])]
        return [
            (low, high, self.below[high] - before)
            for low, high, before in zip(lows, edges, befores, strict=True)
        ]

    def quantile(self, q: float) -> float | None:
        """An estimate that takes observations as spread evenly over their bucket, as PromQL's histogram_quantile.

        The last bucket has no upper edge: what lies there is given as its lower one. None without observations.
        """
        wanted, seen = q * self.count, 0.0
        for low, high, count in self.bins():
            if count and seen + count >= wanted:
                return low if math.isinf(high) else low + (high - low) * (wanted - seen) / count
            seen += count
        return None


@dataclass(slots=True)
class Scrape:
    """What a server said.

    Attributes:
        counts: by metric and labels, values of counters and gauges.
        histograms: by metric and labels.
    """

    counts: dict[str, dict[tuple[tuple[str, str], ...], float]] = field(default_factory=dict)
    histograms: dict[str, dict[tuple[tuple[str, str], ...], Histogram]] = field(default_factory=dict)

    def total(self, name: str) -> float | None:
        """A counter over all of its labels; None where the server does not have it."""
        return math.fsum(self.counts[name].values()) if name in self.counts else None

    def by(self, name: str, label: str) -> dict[str, float]:
        """A counter by one of its labels."""
        found: dict[str, float] = {}
        for labels, value in self.counts.get(name, {}).items():
            key = dict(labels)[label]
            found[key] = found.get(key, 0.0) + value
        return found

    def histogram(self, name: str) -> Histogram:
        """A histogram without labels; empty where the server does not have it."""
        return self.histograms.get(name, {}).get((), Histogram())


def parse(text: str) -> Scrape:
    """Read Prometheus' text format.

    Raises:
        ValueError: it is another format.
    """
    from prometheus_client.parser import text_string_to_metric_families

    scrape = Scrape()
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            edge = sample.labels.get("le")
            labels = tuple(sorted((k, v) for k, v in sample.labels.items() if k != "le"))
            if family.type == "histogram":
                one = scrape.histograms.setdefault(family.name, {}).setdefault(labels, Histogram())
                if edge is not None:
                    one.below[float(edge)] = sample.value
                elif sample.name.endswith("_sum"):
                    one.sum = sample.value
            elif not sample.name.endswith("_created"):
                scrape.counts.setdefault(family.name, {})[labels] = sample.value
    return scrape


def read(path: Path) -> Source:
    """A file of a server's metrics as a source.

    Raises:
        DataError: it holds none.
    """
    if not _is_of_a_server(path):
        raise DataError(
            f"{path} is neither a run directory nor the metrics of a reward server: save those with "
            "curl http://HOST:METRICS_PORT/metrics > FILE"
        )
    return Source(path, COMMAND)


def _is_of_a_server(path: Path) -> bool:
    """Whether a line of the file, which may be anything, is of a reward server's metrics."""
    try:
        with path.open(encoding="utf-8", errors="replace") as lines:
            if not any(line.startswith(MARK) for line in lines):
                return False
    except OSError as err:
        raise DataError(f"{path} cannot be read: {err}") from err
    return MARK in _parsed(path).counts


def _parsed(path: Path) -> Scrape:
    try:
        return parse(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as err:
        raise DataError(f"{path} cannot be read as Prometheus metrics: {err}") from err


def load(source: Source) -> Findings:
    """The page of a server's load."""
    scrape = _parsed(source.folder)
    calls, items = scrape.by("rlaif_calls", "code"), scrape.by("rlaif_items", "outcome")
    good = calls.get("OK", 0.0) + calls.get("200", 0.0)
    scored, asked = items.get("score", 0.0), math.fsum(items.values())
    real, padded = scrape.total("rlaif_tokens"), scrape.total("rlaif_padded_tokens")
    batch = scrape.histogram("rlaif_batch_seconds")
    wait = scrape.histogram("rlaif_queue_seconds")
    total = math.fsum(calls.values())
    model = next((dict(labels) for labels in scrape.counts.get("rlaif_active_model", {})), None)
    tiles = [
        Tile(whole(total), "calls", f"{whole(good)} of them answered" if total else ""),
        Tile(whole(scored), "items scored", f"of {whole(asked)} whose outcome is known"),
        _duration("wait in the queue", wait),
        _duration("model time of a batch", batch),
        Tile(
            None if not real or not batch.sum else whole(real / batch.sum), "tokens a second of model time",
            f"{whole(real)} tokens in {figure(batch.sum)} s",
        ),
        Tile(rate(real / padded) if real and padded else None, "tokens that are no padding", "of those computed"),
        Tile(whole(scrape.total("rlaif_out_of_memory")), "batches split", "for lack of memory"),
        Tile(whole(scrape.total("rlaif_cancelled_items")), "items dropped", "their caller went away while they waited"),
    ]  # fmt: skip
    figures = []
    for title, name, unit, caption in (
        ("Duration of calls", "rlaif_call_seconds", "seconds", "From arrival to answer, all methods."),
        ("Wait in the queue", "rlaif_queue_seconds", "seconds", "From admission to the batch."),
        ("Model time of a batch", "rlaif_batch_seconds", "seconds", "The forward pass, or the judge."),
        ("Items of a batch", "rlaif_batch_items", "items", "How many were computed together."),
        ("Tokens of a batch", "rlaif_batch_tokens", "tokens", "Padding not counted."),
        ("Raw scores", "rlaif_score", "score", "Before normalisation."),
    ):
        merged = _merged(list(scrape.histograms.get(name, {}).values()))
        if merged.count:
            figures.append(Figure(title, f"{caption} In the server's own buckets.", _buckets(merged, unit)))
    duration_rows = [
        (title, whole(h.count), *(_seconds(h.quantile(q)) for q in QUANTILES), _seconds(h.mean))
        for title, h in _durations(scrape, wait, batch)
        if h.count
    ]
    heads = ("what", "count", *(f"{100 * q:g} % within" for q in QUANTILES), "mean")
    return Findings(
        lead=[
            "What a reward server did since it started, as its metrics told at one moment."
            + ("" if model is None else f" It serves {model['name']}, version {model['version']}.")
        ],
        tiles=tiles,
        sections=[
            *section(
                "Calls",
                table(
                    "By method and how they ended",
                    ("method", "status", "calls"),
                    [
                        (dict(k)["method"], dict(k)["code"], whole(v))
                        for k, v in sorted(scrape.counts["rlaif_calls"].items())
                    ],
                ),
                table(
                    "Outcomes of items",
                    ("outcome", "items", "share"),
                    [(name, whole(count), rate(count / asked)) for name, count in items.items()],
                ),
            ),
            *section(
                "Times and sizes",
                Figures(figures) if figures else None,
                table("Durations in seconds", heads, duration_rows,
                      "Estimated from the buckets, as PromQL's histogram_quantile does; the true value lies in the "
                      "same bucket."),
            ),
        ],
        absent=[
            "Rates over time: one scrape has no clock. Scrape the server with Prometheus to see them.",
            "Prompts and responses: a server's metrics never hold text.",
        ],
    )  # fmt: skip


def _durations(scrape: Scrape, wait: Histogram, batch: Histogram) -> list[tuple[str, Histogram]]:
    calls = scrape.histograms.get("rlaif_call_seconds", {})
    named = [(f"call of {dict(labels)['method']}", h) for labels, h in sorted(calls.items())]
    return [*named, ("wait in the queue", wait), ("model time of a batch", batch)]


def _merged(parts: Sequence[Histogram]) -> Histogram:
    below: dict[float, float] = {}
    for part in parts:
        for edge, count in part.below.items():
            below[edge] = below.get(edge, 0.0) + count
    return Histogram(below, math.fsum(part.sum for part in parts))


def _buckets(found: Histogram, unit: str) -> Panel:
    """A bar for each bucket from the first to the last that holds something."""
    bins = found.bins()
    held = [k for k, (_, _, count) in enumerate(bins) if count]
    shown = bins[held[0] : held[-1] + 1]
    names: Mapping[str, float] = {
        _bucket(-math.inf if held[0] == 0 and k == 0 else low, high): count
        for k, (low, high, count) in enumerate(shown)
    }

    def draw(ax: Axes) -> None:
        plots.bars(names, "count")(ax)
        ax.set(ylabel=unit)

    return draw


def _bucket(low: float, high: float) -> str:
    if math.isinf(high):
        return f"> {low:g}"
    return f"≤ {high:g}" if math.isinf(low) else f"{low:g} to {high:g}"


def _seconds(value: float | None) -> str | None:
    return None if value is None else f"{value:.4g}"


def _duration(name: str, found: Histogram) -> Tile:
    most = _milliseconds(found.quantile(0.99))
    return Tile(
        _milliseconds(found.quantile(0.5)), name, "" if most is None else f"median; 99 % within {most}"
    )


def _milliseconds(value: float | None) -> str | None:
    if value is None:
        return None
    return f"{1000 * value:.3g} ms" if value < 1 else f"{value:.3g} s"

"""Settings of `rlaif review`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rlaif.errors import ConfigError

Mode = Literal["preference", "grades", "ranking"]


@dataclass(frozen=True, kw_only=True)
class ReviewConfig:
    """Look at a labelled dataset in the browser, the most suspicious rows first, and mark what you prefer.

    Marks are on the disk before the page goes on. They are the human labels of `rlaif eval judge --dataset`.
    """

    dataset: str
    """What to review: a directory of `rlaif label pairs|rank|scores`, or pairs or candidates as JSONL, JSON, CSV or
    Parquet. Its name may come first: rlaif review DIR."""
    output_dir: str | None = None
    """Where the marks go; DIR/review without it, or FILE-review beside a file. A mode has a folder of its own."""
    mode: Literal["preference", "grades", "ranking"] | None = None
    """What a person says of a row: which of two responses is better, a grade from 1 to 7 for each response, or a
    ranking, as InstructGPT's labelers did. Without it: preference for pairs, grades for scores, ranking for several."""
    annotator: str | None = None
    """Who marks; the name of the user without it."""
    blind: bool = True
    """Hide what the judge said of a row until you have marked it, so that your mark is your own."""
    port: int = 8750
    """Port on the loopback address, the only one that is listened on; 0 takes a free one."""

    def __post_init__(self) -> None:
        """Refuse values that cannot work."""
        if not self.dataset:
            raise ConfigError("say what to review: rlaif review DIR")
        if not 0 <= self.port < 65536:
            raise ConfigError(f"--port {self.port} cannot be: give 1 to 65535, or 0 for a free one")
        if self.annotator is not None and not self.annotator.strip():
            raise ConfigError("--annotator is empty: give a name")

    def marks_dir(self, mode: Mode) -> Path:
        """The folder of the marks."""
        if self.output_dir is not None:
            return Path(self.output_dir)
        name = "review" if mode == "preference" else f"review-{mode}"
        source = Path(self.dataset)
        return source / name if source.is_dir() else source.with_name(f"{source.stem}-{name}")

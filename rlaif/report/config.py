"""The flags of `rlaif report`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rlaif.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """Write one HTML page, which needs nothing else, about a run or about several side by side."""

    runs: tuple[Path, ...]
    """Run directories of `rlaif sample`, `label`, `train` or `eval`; or files with what a reward server's /metrics
    said. Several are compared."""
    output: Path | None = None
    """The page. By default report.html in the run directory; several runs need it."""

    def __post_init__(self) -> None:
        """Refuse what cannot work.

        Raises:
            ConfigError: no run, the same run twice, or nowhere to write.
        """
        if not self.runs:
            raise ConfigError("say which run: rlaif report --runs RUN_DIR [RUN_DIR ...]")
        if len({path.resolve() for path in self.runs}) < len(self.runs):
            raise ConfigError("--runs names a run twice")
        if self.output is None and (len(self.runs) > 1 or self.runs[0].is_file()):
            raise ConfigError("say where the page goes: --output report.html")

    @property
    def page(self) -> Path:
        """Where the page goes."""
        return self.output if self.output is not None else self.runs[0] / "report.html"

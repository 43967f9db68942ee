"""`rlaif report`: one self-contained HTML page about a run, or about several side by side.

Reads what runs write, on the disk alone, and touches nothing of it.
"""

from __future__ import annotations

from rlaif.report.compare import compare
from rlaif.report.config import ReportConfig
from rlaif.report.kinds import open_source, page_of
from rlaif.report.page import render
from rlaif.storage import write_atomic


def run(config: ReportConfig) -> None:
    """Write the page and say where it is.

    Raises:
        DataError: a directory is not that of a run, or its files are broken.
        StorageError: the page cannot be written.
    """
    sources = [open_source(path) for path in config.runs]
    page = page_of(sources[0]) if len(sources) == 1 else compare(sources)
    html = render(page)
    write_atomic(config.page, html)
    print(f"{page.title} -> {config.page} ({len(html.encode()) / 1024:.0f} kB)")

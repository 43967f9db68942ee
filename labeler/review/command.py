"""`rlaif review`: read the dataset, serve the page until Ctrl-C, say what the marks are worth."""

from __future__ import annotations

import asyncio
import getpass
from collections.abc import Iterable, Iterator

from labeler.outputs import write_report
from labeler.review.config import ReviewConfig
from labeler.review.desk import Desk
from labeler.review.index import Index
from labeler.review.items import Item, load_items, mode_of, shape_of
from labeler.review.marks import BLIND_FILE, JOURNAL_FILE, MarkBook, Opened, now
from labeler.review.server import Server
from labeler.review.summary import in_words
from rlaif.errors import ConfigError
from rlaif.records import Quarantine
from rlaif.runs import progress
from rlaif.signals import termination
from rlaif.tables import interval, percent_interval


def run(config: ReviewConfig) -> None:
    """Serve the page until it is interrupted, then write the datasets and print the agreement.

    Raises:
        ConfigError: the port is taken, or the mode does not suit the dataset.
        DataError: the dataset is missing or has no usable row, or the journal is damaged.
        StorageError: the marks cannot be written, or another process writes them.
    """
    shape, path = shape_of(config.dataset, config.mode)
    mode = mode_of(shape, config.mode)
    annotator = (config.annotator or _user()).strip()
    folder = config.marks_dir(mode)
    opened = Opened(at=now(), by=annotator, dataset=config.dataset, mode=mode, blind=config.blind)
    book = MarkBook(folder, opened)
    try:
        quarantine = Quarantine(folder / "quarantine.jsonl")
        index = Index(_watched(load_items(path, shape, quarantine)))
        desk = Desk(index, book, by=annotator, mode=mode, blind=config.blind)
        book.write_datasets()  # what a kill may have left behind the journal
        if quarantine.count:
            print(f"{quarantine.count} rows cannot be read: {quarantine.path}")
        asyncio.run(_serve(Server(desk, title=config.dataset, port=config.port), len(index)))
        _conclude(config, desk)
    finally:
        book.close()


def _watched(items: Iterable[Item]) -> Iterator[Item]:
    with progress(None, "reading rows") as bar:
        for item in items:
            yield item
            bar.advance()


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError) as err:
        raise ConfigError("nobody knows your name here; give --annotator NAME") from err


async def _serve(server: Server, rows: int) -> None:
    stop = termination()
    url = await server.start()
    print(f"{rows:,} rows to review; open this address, and end with Ctrl-C:\n\n  {url}\n", flush=True)
    await stop.wait()
    await server.stop()


def _conclude(config: ReviewConfig, desk: Desk) -> None:
    found, folder = desk.summary(), desk.book.folder
    write_report(folder, found)
    print(
        f"{found['marked']} marks of {', '.join(found['annotators']) or 'nobody'} ({found['bad']} bad rows) in "
        f"{folder / JOURNAL_FILE}"
    )
    for name, what in (
        ("blind", "agreement with the labels, marks made without seeing them"),
        ("sample", "of these, on a random sample of the rows"),
        ("all", "agreement of all marks"),
    ):
        print(f"  {what}: {in_words(found['agreement'][name])}")
    if found["scores"]["responses"]:
        print(f"  rank correlation of grades and scores: {interval(found['scores'])}")
    if over := found["people"]["over"]:
        print(f"  annotators said the same: {percent_interval(found['people'])} % of {over}, ties included")
    if (folder / BLIND_FILE).is_file():
        labels = config.dataset
        print(
            f"next: rlaif eval judge --labels {labels} --dataset {folder / BLIND_FILE} --output_dir runs/judge"
        )

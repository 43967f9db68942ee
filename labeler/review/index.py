"""All rows of a dataset, in the order and the selection that somebody asks for.

Texts stay on the disk, in a temporary database that vanishes with the process; memory holds a few numbers of each row,
so that a hundred thousand rows are sorted and filtered at once.
"""

from __future__ import annotations

import re
import sqlite3
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from labeler.review.items import Item
from labeler.review.suspicion import NAMES, TELLING, flags
from labeler.validation import DUPLICATE, together
from rlaif.errors import StorageError

Order = Literal["suspicion", "random", "unsure", "dataset"]
Status = Literal["all", "unmarked", "marked", "bad", "differs"]
ORDERS: tuple[Order, ...] = get_args(Order)
STATUSES: tuple[Status, ...] = get_args(Status)

Positions = NDArray[np.int64]
Mask = NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Query:
    """Which rows, in which order.

    Attributes:
        order: the most suspicious first, drawn by content, the least sure label first, or as the dataset has them.
        q: words that prompt or responses contain, without regard to case; all of them.
        reason: name of a finding.
        subset: of the dataset.
        status: what the annotator has done with the row.
    """

    order: Order = "suspicion"
    q: str = ""
    reason: str = ""
    subset: str = ""
    status: Status = "all"

    @property
    def is_sample(self) -> bool:
        """Whether the first rows of it are a random sample of the dataset; skipping what is done changes nothing."""
        whole = not (self.q or self.reason or self.subset) and self.status in ("all", "unmarked")
        return self.order == "random" and whole


class Index:
    """The rows, read once.

    Args:
        items: in the order of the dataset.

    Raises:
        StorageError: the temporary disk is full.
    """

    def __init__(self, items: Iterable[Item]) -> None:
        self._database = sqlite3.connect("", check_same_thread=False)
        self._database.execute("PRAGMA journal_mode=OFF")
        self._database.execute("CREATE TABLE items (position INTEGER PRIMARY KEY, item TEXT)")
        self._database.execute("CREATE TABLE texts (position INTEGER PRIMARY KEY, text TEXT)")
        suspicion, sureness = array("f"), array("f")
        bits, subset, keys = array("H"), array("i"), array("Q")
        self.subsets: dict[str, int] = {}
        self._places: dict[int, int] = {}
        try:
            for position, item in enumerate(items):
                key = int(item.key, 16)
                if self._places.setdefault(key, position) != position:
                    item = item.model_copy(update={"findings": (*item.findings, DUPLICATE)})
                suspicion.append(together(item.findings))
                sureness.append(_sureness(item))
                bits.append(flags(item.findings))
                subset.append(self.subsets.setdefault(item.subset, len(self.subsets)))
                keys.append(key)
                self._database.execute("INSERT INTO items VALUES (?, ?)", (position, item.model_dump_json()))
                self._database.execute("INSERT INTO texts VALUES (?, ?)", (position, item.text.casefold()))
            self._database.commit()
        except sqlite3.Error as err:
            raise StorageError(
                f"cannot keep the rows: {err}; set TMPDIR to a folder with twice the space of the dataset's text"
            ) from err
        self.suspicion, self._bits = np.array(suspicion), np.array(bits)
        self._subset, self.keys = np.array(subset), np.array(keys)
        self._ranks: dict[Order, Positions] = {
            "suspicion": np.argsort(-self.suspicion, kind="stable"),
            "random": np.argsort(self.keys, kind="stable"),
            "unsure": np.argsort(np.array(sureness), kind="stable"),
            "dataset": np.arange(len(self.keys)),
        }
        self._found: tuple[str, Mask] | None = None

    def __len__(self) -> int:
        return len(self.keys)

    def item(self, position: int) -> Item:
        """The row at a place of the dataset, from 0."""
        ((text,),) = self._database.execute("SELECT item FROM items WHERE position = ?", (position,))
        return Item.model_validate_json(text)

    def place(self, key: str) -> int | None:
        """The first position of the rows with a key; None if the dataset has none."""
        return self._places.get(int(key, 16))

    def reasons(self) -> dict[str, int]:
        """How many rows have which finding, most frequent first."""
        counts = {name: int((self._bits >> bit & 1).sum()) for bit, name in enumerate(NAMES)}
        return dict(sorted(((n, c) for n, c in counts.items() if c), key=lambda pair: -pair[1]))

    def select(self, query: Query, shown: Mask, status: Mask | None) -> Positions:
        """Positions of the rows of a query, in its order.

        Args:
            query: what is wanted.
            shown: (N,) rows whose label may be seen; findings that tell it are looked for among these alone.
            status: (N,) rows that have the query's status; None for all.
        """
        mask = np.ones(len(self), dtype=np.bool_) if status is None else status.copy()
        if query.reason in NAMES:
            mask &= (self._bits >> NAMES.index(query.reason) & 1).astype(np.bool_)
            if query.reason in TELLING:
                mask &= shown
        if query.subset:
            mask &= self._subset == self.subsets.get(query.subset, -1)
        if query.q.strip():
            mask &= self._containing(query.q)
        order = self._ranks[query.order]
        chosen: Positions = order[mask[order]]
        return chosen

    def following(self, query: Query, chosen: Positions, position: int, step: int) -> int | None:
        """The next row of a selection after (step 1) or before (-1) another, which need not be in it; None at its end.

        Args:
            query: decides the order.
            chosen: its selection.
            position: of the row one is at.
            step: 1 or -1.
        """
        rank = np.empty(len(self), dtype=np.int64)
        rank[self._ranks[query.order]] = np.arange(len(self))
        ranks = rank[chosen]
        at = int(np.searchsorted(ranks, rank[position], "right" if step > 0 else "left"))
        at += 0 if step > 0 else -1
        return int(chosen[at]) if 0 <= at < len(chosen) else None

    def _containing(self, q: str) -> Mask:
        """Rows whose text has every word; the last search is remembered, since pages of it follow."""
        if self._found is None or self._found[0] != q:
            words = [re.sub(r"([%_\\])", r"\\\1", word) for word in q.casefold().split()]
            where = " AND ".join(r"text LIKE ? ESCAPE '\'" for _ in words)
            patterns = [f"%{word}%" for word in words]
            mask = np.zeros(len(self), dtype=np.bool_)
            hits = self._database.execute(f"SELECT position FROM texts WHERE {where}", patterns)
            mask[[position for (position,) in hits]] = True
            self._found = (q, mask)
        return self._found[1]

    def close(self) -> None:
        """Remove the temporary database."""
        self._database.close()


def _sureness(item: Item) -> float:
    """Distance of a pair's label from 1/2; rows without such a label come last."""
    p = item.label and len(item.responses) > 1 and item.label.prefers(0, 1)
    return abs(p - 0.5) if isinstance(p, float) else 1.0


def windows(chosen: Positions, size: int, page: int) -> Iterator[int]:
    """Positions of a page, pages counted from 1."""
    return map(int, chosen[(page - 1) * size : page * size])

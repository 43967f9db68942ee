"""One person at a dataset: what may be seen, which row comes next, and what a mark does. No HTTP here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from labeler.review.config import Mode
from labeler.review.index import Index, Mask, Positions, Query, Status
from labeler.review.items import Item, Label
from labeler.review.marks import Mark, MarkBook, Revealed, Withdrawn, now
from labeler.review.summary import Found, summarise, verdict_on
from labeler.review.suspicion import TELLING


@dataclass(frozen=True, slots=True)
class Seen:
    """A row as it may be shown now.

    Attributes:
        position: its place in the dataset, from 0.
        item: the row; without label and findings where they are hidden.
        mark: what the annotator said of it.
        hidden: whether there is a label that is hidden.
        suspicion: None where it is hidden.
    """

    position: int
    item: Item
    mark: Mark | None
    hidden: bool
    suspicion: float | None

    @property
    def verdict(self) -> Literal["agrees", "differs"] | None:
        """How the annotator's mark stands to the label."""
        return None if self.mark is None else verdict_on(self.mark, self.item.label)


class Desk:
    """Where somebody marks.

    Args:
        index: the rows.
        book: the marks.
        by: the annotator.
        mode: what is said of a row.
        blind: whether labels are hidden until a row is marked.
    """

    def __init__(self, index: Index, book: MarkBook, *, by: str, mode: Mode, blind: bool) -> None:
        self.index, self.book, self.by, self.mode, self.blind = index, book, by, mode, blind
        self._labels: dict[str, Label | None] = {}
        self._numbers = {int(key): n for n, key in enumerate(dict.fromkeys(index.keys.tolist()))}
        self._of = np.array([self._numbers[key] for key in index.keys.tolist()], dtype=np.int64)
        self._states = np.zeros(len(self._numbers), dtype=np.int8)
        self._summary: tuple[int, Found] | None = None
        for key, _ in book.marks.standing:
            self._learn(key)

    def _learn(self, key: str) -> None:
        """Note how a row stands, and what the dataset says of it, after its marks changed."""
        place = self.index.place(key)
        if place is None:  # a mark on something that this dataset does not have
            return
        if key not in self._labels:
            self._labels[key] = self.index.item(place).label
        mark = self.book.marks.standing.get((key, self.by))
        self._states[self._numbers[int(key, 16)]] = 0 if mark is None else 2 if mark.verdict == "bad" else 1

    # ---- looking ----

    def counts(self) -> dict[str, int]:
        """Rows in all, marked and bad."""
        states = self._states[self._of]
        return {
            "rows": len(states),
            "marked": int((states > 0).sum()),
            "bad": int((states == 2).sum()),
        }

    def select(self, query: Query) -> Positions:
        """Positions of a query's rows, in its order."""
        return self.index.select(query, self._shown(), self._with_status(query.status))

    def neighbour(self, query: Query, position: int, step: int) -> int | None:
        """The next row of a query (step 1), or the one before (-1)."""
        return self.index.following(query, self.select(query), position, step)

    def unmarked_after(self, query: Query, position: int | None = None) -> int | None:
        """The next row of a query that waits for a mark, going on from its beginning at the end; None if none does."""
        chosen = self.select(query)
        waiting = chosen[self._states[self._of[chosen]] == 0]
        if not len(waiting):
            return None
        found = None if position is None else self.index.following(query, waiting, position, 1)
        return int(waiting[0]) if found is None else found

    def after(self, query: Query, position: int) -> int | None:
        """Where to go after a mark: to the next row that waits for one; among marked rows, to the next of them."""
        if query.status in ("all", "unmarked"):
            return self.unmarked_after(query, position)
        return self.neighbour(query, position, 1)

    def see(self, position: int) -> Seen:
        """A row, without what must stay hidden. Of a marked row the label is seen, once and for all."""
        item = self.index.item(position)
        mark = self.mark_on(item)
        if mark is not None:
            self.book.marks.seen.add((item.key, self.by))
        if self._has_seen(item.key):
            return Seen(position, item, mark, False, float(self.index.suspicion[position]))
        bare = item.model_copy(update={"label": None, "findings": ()})
        return Seen(position, bare, mark, item.label is not None, None)

    def mark_on(self, item: Item) -> Mark | None:
        """What the annotator said of a row."""
        return self.book.marks.standing.get((item.key, self.by))

    def reasons(self) -> dict[str, int]:
        """Findings to filter by; those that tell a label are not counted while labels are hidden."""
        return {n: c for n, c in self.index.reasons().items() if not (self.blind and n in TELLING)}

    def _shown(self) -> Mask:
        if not self.blind:
            return np.ones(len(self.index), dtype=np.bool_)
        known = np.zeros(len(self._numbers), dtype=np.bool_)
        for key, by in self.book.marks.seen:
            if by == self.by and (number := self._numbers.get(int(key, 16))) is not None:
                known[number] = True
        shown: Mask = known[self._of]
        return shown

    def _with_status(self, status: Status) -> Mask | None:
        states = self._states[self._of]
        if status == "all":
            return None
        if status == "differs":
            wrong = np.zeros(len(self._numbers), dtype=np.bool_)
            for (key, by), mark in self.book.marks.standing.items():
                if by == self.by and verdict_on(mark, self._labels.get(key)) == "differs":
                    wrong[self._numbers[int(key, 16)]] = True
            differing: Mask = wrong[self._of]
            return differing
        masks: dict[Status, Mask] = {"unmarked": states == 0, "marked": states > 0, "bad": states == 2}
        return masks[status]

    def summary(self) -> Found:
        """Agreement, computed anew after marks have changed."""
        version = self.book.version
        if self._summary is None or self._summary[0] != version:
            self._summary = (version, summarise(self.book.marks, self._labels))
        return self._summary[1]

    # ---- marking ----

    def mark(self, position: int, verdict: str, values: tuple[int, ...], note: str, query: Query) -> Mark:
        """Say something of a row; it is on the disk when this returns.

        Raises:
            ValueError: values that are none.
            StorageError: the disk is full; nothing has changed then.
        """
        item = self.index.item(position)
        mark = Mark.model_validate(
            {
                "at": now(),
                "by": self.by,
                "key": item.key,
                "row": item.row,
                "prompt": item.prompt,
                "responses": item.responses,
                "verdict": verdict,
                "values": values,
                "note": note,
                "label_seen": item.label is not None and self._has_seen(item.key),
                "sample": query.is_sample,
                "subset": item.subset,
            }
        )
        self.book.add(mark)
        self._learn(item.key)
        return mark

    def reveal(self, position: int) -> None:
        """Let the annotator see a label before marking; that they did is on record.

        Raises:
            StorageError: the disk is full.
        """
        key = self.index.item(position).key
        if not self._has_seen(key):
            self.book.add(Revealed(at=now(), by=self.by, key=key))

    def last_mark(self) -> Mark | None:
        """What `undo` would take back; None if there is nothing."""
        return self.book.marks.last(self.by)

    def undo(self) -> int | None:
        """Take back the annotator's last mark, and give the position of its row in this dataset; None if there is none.

        Raises:
            StorageError: the disk is full.
        """
        mark = self.last_mark()
        if mark is None:
            return None
        self.book.add(Withdrawn(at=now(), by=self.by, key=mark.key, label_seen=self._has_seen(mark.key)))
        self._learn(mark.key)
        return self.index.place(mark.key)

    def _has_seen(self, key: str) -> bool:
        return not self.blind or (key, self.by) in self.book.marks.seen

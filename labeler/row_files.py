"""Data files that are written row by row and appear whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from rlaif.storage import replacing, storing

Row = dict[str, Any]

_GROUP = 1024
"""Rows in memory at a time."""


class RowFile:
    """A data file that is being written; see `open_rows`.

    Attributes:
        path: its name.
        rows: written so far.
    """

    def __init__(self, path: Path, put: Callable[[list[Row]], None]) -> None:
        self.path = path
        self.rows = 0
        self._put = put
        self._waiting: list[Row] = []

    def write(self, row: Row) -> None:
        """Add a row.

        Raises:
            StorageError: the disk is full.
            pyarrow.ArrowException: a row does not fit the schema.
        """
        self.rows += 1
        self._waiting.append(row)
        if len(self._waiting) == _GROUP:
            self.flush()

    def flush(self) -> None:
        """Hand over what waits."""
        if self._waiting:
            self._put(self._waiting)
            self._waiting = []


@contextmanager
def open_rows(path: Path, schema: pa.Schema) -> Iterator[RowFile]:
    """Open a data file, Parquet or JSONL by its name. It takes its place when the block ends without an error.

    Args:
        path: ends in .parquet or .jsonl.
        schema: columns of a Parquet file.

    Raises:
        StorageError: the disk is full or the folder cannot be written.
    """
    with replacing(path) as temporary:
        with storing(path):
            if path.suffix == ".parquet":
                sink = pq.ParquetWriter(temporary, schema)
            else:
                sink = temporary.open("w", encoding="utf-8")

        def put(rows: list[Row]) -> None:
            if path.suffix == ".parquet":
                table = pa.Table.from_pylist(rows, schema=schema)
                with storing(path):
                    sink.write_table(table)
            else:
                text = "".join(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows)
                with storing(path):
                    sink.write(text)

        file = RowFile(path, put)
        try:
            yield file
            file.flush()
        finally:
            with storing(path):
                sink.close()

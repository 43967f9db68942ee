"""Files that survive a kill and a full disk: whole-file writes are atomic, appends are one line each.

Every failure to write becomes one `StorageError` line; what was there before stays as it was.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from rlaif.errors import DataError, RlaifError, StorageError

if TYPE_CHECKING:
    import pyarrow

_ADVICE = {
    errno.ENOSPC: "free some space and run the same command again",
    errno.EDQUOT: "your quota is used up; free some space and run the same command again",
    errno.EROFS: "choose a writable folder",
    errno.EACCES: "choose a folder you may write to",
    errno.EPERM: "choose a folder you may write to",
}

LOCK_FILE = ".lock"
"""In a folder, for `only_writer` and the run directory; it stays, and says nothing by being there."""

_ROWS_AT_A_TIME = 1024

_ROW_GROUP_BYTES = 4 << 20
"""Size of a row group before compression: what is in memory at a time, several times over while it is encoded, and
large enough that a file of a million rows has few. The writer keeps what it will say of each group until the end."""


@contextmanager
def storing(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turn an OSError raised while writing `path` into a StorageError that names the path and the way out.

    Wrap the write alone, never the code that makes the data: a network error is an OSError too.
    """
    try:
        yield
    except RlaifError:
        raise
    except OSError as err:
        refuse_file_as_folder(Path(path).parent)
        what = os.strerror(err.errno).lower() if err.errno else str(err)
        advice = _ADVICE.get(err.errno or 0, "check the path")
        raise StorageError(f"cannot write {os.fspath(path)}: {what}; {advice}") from err


def refuse_file_as_folder(folder: Path) -> None:
    """Refuse a place for files that is a file itself, or would lie below one.

    Raises:
        StorageError: it does.
    """
    for place in (folder, *folder.parents):
        if os.path.exists(place):  # unlike Path's, also where one may not look
            if not os.path.isdir(place):
                raise StorageError(
                    f"cannot write below {place}: it is a file and not a directory; choose another folder"
                )
            return


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary sibling of `path` that takes its place, fsynced, if the block succeeds and vanishes if not.

    Makes parent folders. Close the temporary file inside the block.

    Raises:
        StorageError: the disk is full or the folder cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with storing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with storing(path):
            _fsync(temporary)
            os.replace(temporary, path)
            _fsync(path.parent)
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomic(path: str | os.PathLike[str], content: str | bytes) -> None:
    """Write the whole file or nothing: a temporary file in the same folder, fsync, rename. Makes parent folders.

    Raises:
        StorageError: the disk is full or the folder cannot be written.
    """
    target = Path(path)
    with replacing(target) as temporary, storing(target):
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


def write_parquet(
    path: str | os.PathLike[str], rows: Iterable[dict[str, Any]], schema: pyarrow.Schema
) -> int:
    """Stream `rows` into a Parquet file, one row group in memory at a time; the file appears whole or not at all.

    Returns:
        The number of rows written.

    Raises:
        StorageError: the disk is full or the folder cannot be written.
        pyarrow.ArrowException: a row does not fit the schema.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    target = Path(path)
    source = iter(rows)
    count = 0
    with replacing(target) as temporary:
        with storing(target):
            writer = pq.ParquetWriter(temporary, schema)
        group: list[pyarrow.RecordBatch] = []

        def write() -> None:
            with storing(target):
                writer.write_table(pa.Table.from_batches(group, schema))
            group.clear()

        try:
            while batch := list(islice(source, _ROWS_AT_A_TIME)):
                group.append(pa.RecordBatch.from_pylist(batch, schema=schema))
                count += len(batch)
                if sum(part.nbytes for part in group) >= _ROW_GROUP_BYTES:
                    write()
            if group:
                write()
        finally:
            with storing(target):
                writer.close()
    return count


def cut_torn_line(path: Path) -> None:
    """Remove what follows the last newline: a line that a kill or a full disk left unfinished."""
    if not path.is_file():
        return
    with storing(path), path.open("rb+") as file:
        end = at = file.seek(0, os.SEEK_END)
        while at:
            start = max(0, at - 65536)
            file.seek(start)
            newline = file.read(at - start).rfind(b"\n")
            if newline >= 0:
                at = start + newline + 1
                break
            at = start
        if at < end:
            file.truncate(at)


def lock_file(path: Path, *, held: Path | None = None) -> int:
    """Open a file for appending as its only writer; closing the descriptor, or the end of the process, ends that.

    Args:
        path: of the file; made if it is not there, with its folder.
        held: what is held by it, for the message; the file itself by default.

    Raises:
        StorageError: another process has it, or it cannot be written.
    """
    with storing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as err:
        os.close(descriptor)
        raise StorageError(
            f"{held or path} is being written by another process; wait for it or choose another --output_dir"
        ) from err
    except OSError as err:  # some file systems of clusters know no locks, and must do for a run
        print(
            f"warning: {held or path} cannot be locked ({err.strerror}): start one command at a time",
            file=sys.stderr,
        )
    return descriptor


@contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """Hold a folder against other processes that would write it.

    Raises:
        StorageError: as `lock_file`.
    """
    descriptor = lock_file(folder / LOCK_FILE, held=folder)
    try:
        yield
    finally:
        os.close(descriptor)


class Journal:
    """A file of JSON lines that only grows; a line counts once `append` has returned.

    Finished paid work goes here first. A writer holds a lock, so the same command started twice cannot buy the
    same work twice. Exactly-once is the caller's: put a key in each record and skip the keys `records` yields.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._descriptor: int | None = None

    def append(self, record: dict[str, Any]) -> None:
        """Write one record and wait until it is on the disk.

        Raises:
            StorageError: the disk is full (the journal keeps all earlier records), or another process writes here.
            ValueError: the record holds NaN or an infinity.
        """
        line = (json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n").encode()
        descriptor = self._descriptor if self._descriptor is not None else self._open()
        with storing(self.path):
            size = os.fstat(descriptor).st_size
            try:
                written = 0
                while written < len(line):
                    written += os.write(descriptor, line[written:])
                os.fsync(descriptor)
            except OSError:
                with suppress(OSError):
                    os.ftruncate(descriptor, size)
                raise

    def _open(self) -> int:
        descriptor = lock_file(self.path)
        cut_torn_line(self.path)
        self._descriptor = descriptor
        return descriptor

    def records(self) -> Iterator[dict[str, Any]]:
        """All whole records in order. A torn last line, left by a kill, is not a record.

        Raises:
            DataError: a line before the last one is not a JSON object; someone edited the file.
        """
        if not self.path.is_file():
            return
        with self.path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if not line.endswith(b"\n"):
                    return
                try:
                    record = json.loads(line)
                except ValueError:
                    record = None
                if not isinstance(record, dict):
                    raise DataError(
                        f"{self.path} line {number} is not a record; remove that line and run again"
                    )
                yield record

    def close(self) -> None:
        """Release the lock. Appending again takes it again."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()

"""What is on the disk after a kill, a full disk, or a second writer."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pytest

from rlaif.errors import DataError, StorageError
from rlaif.storage import Journal, lock_file, only_writer, storing, write_atomic, write_parquet
from tests.disks import small_disk


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 64 KiB."""
    with small_disk(tmp_path / "disk", kib=64) as folder:
        yield folder


def test_a_journal_gives_back_what_was_appended(tmp_path: Path) -> None:
    with Journal(tmp_path / "deep" / "journal.jsonl") as journal:
        for i in range(3):
            journal.append({"key": i, "text": "zwölf\n"})
        assert [r["key"] for r in journal.records()] == [0, 1, 2]
    assert list(Journal(tmp_path / "none.jsonl").records()) == []


@pytest.mark.parametrize("torn", ['{"key": 2', '{"key": 2}', "\x00\x00"], ids=["half", "no-newline", "nul"])
def test_a_torn_last_line_is_no_record_and_is_cut_before_the_next(tmp_path: Path, torn: str) -> None:
    path = tmp_path / "journal.jsonl"
    path.write_text('{"key": 1}\n' + torn)
    with Journal(path) as journal:
        assert list(journal.records()) == [{"key": 1}]
        journal.append({"key": 3})
        assert list(journal.records()) == [{"key": 1}, {"key": 3}]


def test_a_torn_only_line_longer_than_a_read_block_is_cut(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    path.write_text("x" * 200_000)
    with Journal(path) as journal:
        journal.append({"key": 1})
    assert path.read_text() == '{"key": 1}\n'


def test_a_broken_line_in_the_middle_is_reported_by_number(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    path.write_text('{"key": 1}\n{"ke\n{"key": 3}\n')
    with pytest.raises(DataError, match="line 2 is not a record"):
        list(Journal(path).records())


def test_a_full_device_is_one_clear_line() -> None:
    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    with pytest.raises(
        StorageError, match=r"cannot write /dev/full: no space left on device; free some space"
    ):
        Journal("/dev/full").append({"key": 1})


def test_a_full_disk_keeps_every_record_that_append_returned_for(tiny_disk: Path) -> None:
    path = tiny_disk / "journal.jsonl"
    journal = Journal(path)
    written = 0
    with pytest.raises(StorageError, match="no space left"):
        for _ in range(1000):
            journal.append({"key": written, "text": "x" * 999})
            written += 1
    assert written > 10
    assert [r["key"] for r in journal.records()] == list(range(written))
    assert path.read_bytes().endswith(b"\n"), "the half line is gone"
    journal.close()


def test_a_full_disk_leaves_the_earlier_file_and_no_rest(tiny_disk: Path) -> None:
    write_atomic(tiny_disk / "file", "before")
    with pytest.raises(StorageError, match="no space left"):
        write_atomic(tiny_disk / "file", "x" * 100_000)
    schema = pa.schema([("text", pa.string())])
    with pytest.raises(StorageError, match="no space left"):
        write_parquet(tiny_disk / "file", ({"text": os.urandom(500).hex()} for _ in range(500)), schema)
    assert (tiny_disk / "file").read_text() == "before"
    assert [p.name for p in tiny_disk.iterdir()] == ["file"]


def test_two_writers_of_one_journal_are_refused(tmp_path: Path) -> None:
    with Journal(tmp_path / "j") as first:
        first.append({"key": 1})
        with pytest.raises(StorageError, match="being written by another process"):
            Journal(tmp_path / "j").append({"key": 2})
    with Journal(tmp_path / "j") as second:
        second.append({"key": 2})
        assert [r["key"] for r in second.records()] == [1, 2]


def test_a_folder_has_one_writer_at_a_time(tmp_path: Path) -> None:
    with (
        only_writer(tmp_path / "seed-0"),
        pytest.raises(StorageError, match="seed-0 is being written by another process"),
        only_writer(tmp_path / "seed-0"),
    ):
        pass
    with only_writer(tmp_path / "seed-0"):
        pass


def test_nan_never_reaches_a_journal(tmp_path: Path) -> None:
    with Journal(tmp_path / "j") as journal, pytest.raises(ValueError, match="not JSON compliant"):
        journal.append({"p": float("nan")})
    assert list(Journal(tmp_path / "j").records()) == []


def test_kill_dash_nine_loses_no_record_that_was_acknowledged(tmp_path: Path) -> None:
    program = textwrap.dedent("""
        import itertools, sys
        from rlaif.storage import Journal
        journal = Journal(sys.argv[1])
        for i in itertools.count():
            journal.append({"key": i, "text": "x" * 5000})
            print(i, flush=True)
    """)
    with subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path / "j")], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if int(line) >= 20:
                process.send_signal(signal.SIGKILL)
                break
        acknowledged = 21 + len(process.stdout.read().splitlines())
    keys = [r["key"] for r in Journal(tmp_path / "j").records()]
    assert keys == list(range(len(keys))) and len(keys) >= acknowledged


def test_a_folder_in_the_way_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    with pytest.raises(StorageError, match=r"cannot write .*taken: is a directory"):
        write_atomic(tmp_path / "taken", "x")
    assert [p.name for p in tmp_path.iterdir()] == ["taken"]


@pytest.mark.parametrize("below", ["x", "deeper/x"])
def test_a_file_in_the_place_of_a_folder_is_called_that(tmp_path: Path, below: str) -> None:
    (tmp_path / "prompts.jsonl").write_text("{}")
    for write in (lambda path: write_atomic(path, "x"), lock_file):
        with pytest.raises(
            StorageError, match=r"prompts\.jsonl: it is a file and not a directory; choose another"
        ):
            write(tmp_path / "prompts.jsonl" / below)


def test_storing_translates_the_system_s_errors_only() -> None:
    with pytest.raises(KeyError), storing("x"):
        raise KeyError("not about storage")
    with pytest.raises(DataError), storing("x"):
        raise DataError("already ours")

"""A reply that the journal has taken is there after a kill, once, and nothing that is wrong with the file is silent."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from labeler.journal import JOURNAL_FILE, ReplyJournal, Totals, Usage, request_key
from rlaif.errors import DataError, StorageError
from rlaif.types import user_prompt

WRITER = """
import sys
from pathlib import Path
from labeler.journal import ReplyJournal, Usage
journal = ReplyJournal(Path(sys.argv[1]))
number = 0
while True:
    journal.put(number, "generate", {"text": "x" * 100, "n": number}, Usage(1, 1))
    print(number, flush=True)
    number += 1
"""


def count(folder: Path) -> int:
    with ReplyJournal(folder, read_only=True) as journal:
        return journal.totals().replies.get("generate", 0)


@pytest.mark.parametrize("told", [1, 50, 400])
def test_what_was_put_before_a_kill_is_there_after_it(tmp_path: Path, told: int) -> None:
    with subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE) as writer:
        assert writer.stdout is not None
        for _ in range(told):
            last = int(writer.stdout.readline())
        writer.send_signal(signal.SIGKILL)
        last = int((writer.stdout.read().split() or [last])[-1])  # what it told before it died
    with ReplyJournal(tmp_path) as journal:
        assert all(journal.get(n) == {"text": "x" * 100, "n": n} for n in range(last + 1))
        assert journal.totals().replies["generate"] in (last + 1, last + 2)  # put, and killed before it told
        journal.put(-1, "generate", {"text": "after"})
        assert journal.get(-1) == {"text": "after"}


def test_the_first_reply_to_a_request_stays_and_is_counted_once(tmp_path: Path) -> None:
    with ReplyJournal(tmp_path) as journal:
        journal.put(7, "label", {"logprobs": [-0.1]}, Usage(10, 1, 4))
        journal.put(7, "label", {"logprobs": [-0.2]}, Usage(10, 1, 4))
        assert journal.get(7) == {"logprobs": [-0.1]}
        assert journal.totals() == Totals({"label": 1}, Usage(10, 1, 4))


Kept = tuple[str, float, int, int]
texts = st.text(st.characters(exclude_categories=["Cs"]))
floats = st.floats(allow_nan=False, allow_infinity=False)
numbers = st.integers(0, 2**40)


@given(
    st.dictionaries(
        st.integers(-(2**63), 2**63 - 1),
        st.tuples(texts, floats, numbers, numbers),
        max_size=8,
    )
)
def test_replies_come_back_as_they_were(
    tmp_path_factory: pytest.TempPathFactory, replies: dict[int, Kept]
) -> None:
    folder = tmp_path_factory.mktemp("journal")
    with ReplyJournal(folder) as journal:
        for key, (text, number, prompt, completion) in replies.items():
            journal.put(key, "generate", {"text": text, "number": number}, Usage(prompt, completion))
    with ReplyJournal(folder) as journal:
        for key, (text, number, _, _) in replies.items():
            assert journal.get(key) == {"text": text, "number": number}
        used = [Usage(prompt, completion) for _, _, prompt, completion in replies.values()]
        assert journal.totals().usage == sum(used, Usage())


def test_a_journal_of_an_older_version_can_be_read(tmp_path: Path) -> None:
    with ReplyJournal(tmp_path) as journal:
        journal.put(7, "label", {}, Usage(10, 1, 4))
    with sqlite3.connect(tmp_path / "journal.sqlite") as file:
        file.execute("DROP TABLE lost")
    file.close()
    with ReplyJournal(tmp_path, read_only=True) as journal:
        assert journal.totals().usage == Usage(10, 1, 4)


def test_failures_are_counted_by_reason_until_there_is_a_reply(tmp_path: Path) -> None:
    with ReplyJournal(tmp_path) as journal:
        for key in (1, 2, 3):
            journal.fail(key, "the endpoint answered 500")
        journal.fail(3, "no answer within 5 s")
        assert journal.totals().failures == {"the endpoint answered 500": 2, "no answer within 5 s": 1}
    with ReplyJournal(tmp_path) as journal:
        journal.put(1, "label", {})
        assert journal.failure(1) is None
        assert journal.failure(2) == "the endpoint answered 500"
        assert journal.get(2) is None
        assert journal.failure(9) is None


def test_numbers_that_are_none_are_refused(tmp_path: Path) -> None:
    with ReplyJournal(tmp_path) as journal:
        with pytest.raises(ValueError):
            journal.put(1, "label", {"logprobs": [float("nan")]})
        assert journal.get(1) is None


def test_one_process_writes_and_others_read(tmp_path: Path) -> None:
    with ReplyJournal(tmp_path) as journal:
        journal.put(1, "generate", {"text": "one"})
        with pytest.raises(StorageError, match="being written by another process"):
            ReplyJournal(tmp_path)
        with ReplyJournal(tmp_path, read_only=True) as reader:
            assert reader.get(1) == {"text": "one"}
            journal.put(2, "generate", {"text": "two"})
            assert reader.get(2) == {"text": "two"}
            with pytest.raises(StorageError, match="cannot read"):
                reader.put(3, "generate", {})
        journal.put(3, "generate", {})
    with ReplyJournal(tmp_path) as journal:  # the lock is gone with its owner
        assert journal.totals().replies == {"generate": 3}


def test_the_lock_is_gone_with_a_killed_writer(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE) as writer:
        assert writer.stdout is not None and writer.stdout.readline()
        with pytest.raises(StorageError):
            ReplyJournal(tmp_path)
        writer.kill()
    ReplyJournal(tmp_path).close()


def test_replies_of_other_runs_answer_and_are_not_taken_over(tmp_path: Path) -> None:
    for name, key in (("a", 1), ("b", 2)):
        with ReplyJournal(tmp_path / name) as journal:
            journal.put(key, "generate", {"from": name}, Usage(5, 5))
            journal.put(9, "generate", {"from": name}, Usage(5, 5))
    with ReplyJournal(tmp_path / "c", reuse=[tmp_path / "a", tmp_path / "b"]) as journal:
        assert [journal.get(key) for key in (1, 2, 3)] == [{"from": "a"}, {"from": "b"}, None]
        journal.put(9, "generate", {"from": "c"})
        assert journal.get(9) == {"from": "c"}  # its own come first
        assert journal.totals() == Totals({"generate": 1})
    for name in ("a", "b"):
        assert count(tmp_path / name) == 2


def test_there_must_be_something_to_reuse_or_to_read(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none/journal\.sqlite does not exist"):
        ReplyJournal(tmp_path / "out", reuse=[tmp_path / "none"])
    with pytest.raises(DataError, match="give the directory of a labeling run"):
        ReplyJournal(tmp_path / "none", read_only=True)
    ReplyJournal(tmp_path / "out").close()  # the failed attempt holds no lock


def test_a_full_disk_is_one_line_and_earlier_replies_stay(tmp_path: Path) -> None:
    program = WRITER.replace(
        "while True",
        "import resource, signal\nsignal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))\nwhile True",
    )
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True)
    last = int(done.stdout.split()[-1])
    assert "StorageError: cannot write" in done.stderr.splitlines()[-1]
    assert "free some space" in done.stderr.splitlines()[-1]
    assert last > 10
    with ReplyJournal(tmp_path) as journal:
        assert journal.totals().replies == {"generate": last + 1}
        journal.put(-1, "generate", {})


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot write"):
        ReplyJournal(tmp_path / "file")


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def overwrite(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[4096:] = b"\xa5" * (len(data) - 4096)
    path.write_bytes(data)


def replace(path: Path) -> None:
    path.write_bytes(b"no database at all" * 1000)


def spoil_a_reply(path: Path) -> None:
    sql = sqlite3.connect(path)
    sql.execute("UPDATE replies SET reply = substr(reply, 1, 5)")
    sql.commit()
    sql.close()


@pytest.mark.parametrize("damage", [cut, overwrite, replace, spoil_a_reply])
def test_a_damaged_file_is_one_line_and_never_an_empty_journal(
    tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    with ReplyJournal(tmp_path) as journal:
        for key in range(500):
            journal.put(key, "generate", {"text": "x" * 200})
    damage(tmp_path / JOURNAL_FILE)
    before = (tmp_path / JOURNAL_FILE).read_bytes()
    with (
        pytest.raises(StorageError, match=r"journal.sqlite is damaged \(.*\): restore it from a copy"),
        ReplyJournal(tmp_path) as journal,
    ):
        for key in range(500):
            journal.get(key)
    if damage is replace:
        assert (tmp_path / JOURNAL_FILE).read_bytes() == before


def test_a_write_ahead_log_torn_in_its_last_page_loses_the_last_reply_at_most(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE) as writer:
        assert writer.stdout is not None
        for _ in range(20):
            writer.stdout.readline()
        writer.kill()
        told = writer.stdout.read().split()
    last = int(told[-1]) if told else 19
    log = tmp_path / f"{JOURNAL_FILE}-wal"
    os.truncate(log, log.stat().st_size - 1000)
    with ReplyJournal(tmp_path) as journal:
        kept = journal.totals().replies["generate"]
        assert last <= kept <= last + 2
        assert [journal.get(n) is not None for n in range(last)] == [True] * last


def test_keys_depend_on_every_part_and_on_nothing_else() -> None:
    one = request_key("label", "judge", user_prompt("q"), "prefix", ["1", "2"])
    # The first 16 digits of `printf %s '["label", "x"]' | sha256sum`, less 2**63: the same on every machine.
    assert request_key("label", "x") == 0x59E79BFF4F3E9E68 - 2**63
    others = [
        request_key("generate", "judge", user_prompt("q"), "prefix", ["1", "2"]),
        request_key("label", "judge2", user_prompt("q"), "prefix", ["1", "2"]),
        request_key("label", "judge", user_prompt("q "), "prefix", ["1", "2"]),
        request_key("label", "judge", user_prompt("q"), "prefi", ["1", "2"]),
        request_key("label", "judge", user_prompt("q"), "prefix", ["1,2"]),
    ]
    assert len({one, *others}) == 6
    assert all(-(2**63) <= key < 2**63 for key in [one, *others])


def test_pace_is_replies_by_the_time_of_all_runs(tmp_path: Path) -> None:
    with ReplyJournal(tmp_path) as journal:
        assert journal.totals().pace is None
        journal.note_pace(90, 3.0)
        journal.note_pace(10, 7.0)
        assert journal.totals().pace == 10.0
        journal.put(1, "generate", {}, Usage(1, 30))
        journal.put(2, "generate", {}, Usage(1, 50))
        journal.put(3, "label", {}, Usage(1, 1))
        assert journal.mean_completion_tokens("generate") == 40
        assert journal.mean_completion_tokens("probe") is None

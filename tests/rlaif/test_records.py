"""Readers at the file edge: what is kept, what is put aside with a reason, and when a whole file is refused."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rlaif.errors import DataError, StorageError
from rlaif.records import (
    Quarantine,
    read_candidates,
    read_conversations,
    read_pairs,
    read_preferences,
    read_prompts,
    read_rows,
    write_parquet,
)
from rlaif.types import user_prompt

GOOD = '{"prompt": "a", "chosen": "x", "rejected": "y"}'
SCHEMA = pa.schema([("prompt", pa.string()), ("chosen", pa.string()), ("rejected", pa.string())])


def lines(path: Path, *content: str | bytes) -> Path:
    path.write_bytes(b"".join((c.encode() if isinstance(c, str) else c) + b"\n" for c in content))
    return path


def test_a_bad_row_is_put_aside_with_its_line_number_and_the_rest_is_read(tmp_path: Path) -> None:
    path = lines(
        tmp_path / "in.jsonl", GOOD, '{"prompt": "a", "chosen": ', "", '{"prompt": "a", "chosen": "x"}', GOOD
    )
    quarantine = Quarantine(tmp_path / "quarantine.jsonl")
    assert len(list(read_pairs(path, quarantine))) == 2
    rows = [json.loads(line) for line in (tmp_path / "quarantine.jsonl").read_text().splitlines()]
    assert rows == [
        {
            "line": 2,
            "reason": "broken JSON: Expecting value at column 27",
            "raw": '{"prompt": "a", "chosen": ',
        },
        {"line": 4, "reason": "rejected is missing", "raw": '{"prompt": "a", "chosen": "x"}'},
    ]
    assert quarantine.count == 2


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        pytest.param(b'{"prompt": "\xff"}', "not UTF-8 text (byte 13)", id="not-utf8"),
        pytest.param(b'["prompt"]', "not a JSON object", id="a-list"),
        pytest.param(b'{"prompt": NaN}', "broken JSON: NaN is not JSON", id="nan"),
        pytest.param(b'{"a":' * 100_000, "broken JSON: nested too deeply", id="nested"),
        pytest.param(b'{"prompt": "' + b"9" * 10 + b"\x00", "broken JSON", id="truncated"),
    ],
)
def test_lines_that_are_not_json_are_put_aside(tmp_path: Path, line: bytes, reason: str) -> None:
    quarantine = Quarantine(tmp_path / "q.jsonl")
    assert list(read_prompts(lines(tmp_path / "in.jsonl", GOOD, line), quarantine)) == [user_prompt("a")]
    (found,) = quarantine.reasons
    assert found.startswith(reason)


def test_no_row_is_lost_between_the_readers_and_the_quarantine(tmp_path: Path) -> None:
    path = lines(tmp_path / "in.jsonl", *[GOOD if i % 3 else '{"id": 1}' for i in range(100)])
    quarantine = Quarantine(None)
    assert len(list(read_pairs(path, quarantine))) + quarantine.count == 100
    assert quarantine.reasons == Counter({"no pair of responses: the row has id": 34})


def test_a_quarantine_file_exists_only_for_a_run_that_put_a_row_aside(tmp_path: Path) -> None:
    bad, good, file = tmp_path / "bad.jsonl", tmp_path / "good.jsonl", tmp_path / "q.jsonl"
    lines(bad, GOOD, "{")
    lines(good, GOOD)
    for _ in range(2):
        list(read_pairs(bad, Quarantine(file)))
        assert len(file.read_text().splitlines()) == 1
    list(read_pairs(good, Quarantine(file)))
    assert not file.exists()


def test_a_file_without_a_usable_row_is_refused_with_its_first_reason_and_the_shapes(tmp_path: Path) -> None:
    path = lines(tmp_path / "in.jsonl", '{"prompt": "a"}', "{")
    with pytest.raises(
        DataError, match=r"no usable row; line 1: no pair of responses.*Understood are a prompt with"
    ):
        list(read_pairs(path, Quarantine(None)))


def test_an_empty_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="has no rows"):
        list(read_prompts(lines(tmp_path / "in.jsonl", ""), Quarantine(None)))


def test_a_missing_file_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nope\.jsonl: does not exist"):
        list(read_prompts(tmp_path / "nope.jsonl", Quarantine(None)))


def test_a_file_that_is_no_parquet_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="not a readable Parquet file"):
        list(read_rows(lines(tmp_path / "x.parquet", "PAR1 no"), Quarantine(None)))


def test_line_numbers_are_those_of_the_file_and_a_byte_order_mark_is_skipped(tmp_path: Path) -> None:
    path = lines(tmp_path / "in.jsonl", b"\xef\xbb\xbf" + b'{"n": 0}', "", '{"n": 1}\r')
    assert list(read_rows(path, Quarantine(None))) == [(1, {"n": 0}), (3, {"n": 1})]


def test_a_json_array_is_read_like_lines(tmp_path: Path) -> None:
    path = tmp_path / "sharegpt.json"
    path.write_text(json.dumps([{"prompt": "a"}, 3, {"prompt": "b"}], indent=1))
    quarantine = Quarantine(None)
    assert list(read_prompts(path, quarantine)) == [user_prompt("a"), user_prompt("b")]
    assert quarantine.reasons == Counter({"not a JSON object": 1})


def test_parquet_in_conversational_form_reads_back_as_it_was(tmp_path: Path) -> None:
    message = pa.struct([("role", pa.string()), ("content", pa.string())])
    schema = pa.schema(
        [(name, pa.list_(message)) for name in ("prompt", "chosen", "rejected")]
        + [("chosen_prob", pa.float64())]
    )
    rows = [
        {
            "prompt": [{"role": "user", "content": f"q{i}"}],
            "chosen": [{"role": "assistant", "content": "good"}],
            "rejected": [{"role": "assistant", "content": ""}],
            "chosen_prob": 0.5 + i / 10_000,
        }
        for i in range(2500)
    ]
    assert write_parquet(tmp_path / "preferences.parquet", iter(rows), schema) == 2500
    read = list(read_preferences(tmp_path, Quarantine(None)))
    assert [(r.prompt, r.rejected, r.chosen_prob) for r in read] == [
        (user_prompt(f"q{i}"), "", 0.5 + i / 10_000) for i in range(2500)
    ]


def test_a_folder_of_runs_says_which_it_holds(tmp_path: Path) -> None:
    for name in ("labels", "candidates"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "run.json").write_text("{}")
        (tmp_path / name / "journal.jsonl").write_text("{}\n")
    with pytest.raises(DataError, match="holds runs, name one of those: candidates, labels"):
        list(read_pairs(tmp_path, Quarantine(None)))


def test_a_folder_without_data_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no Parquet file"):
        list(read_preferences(tmp_path, Quarantine(None)))


def test_a_row_that_fails_while_parquet_is_written_leaves_no_file(tmp_path: Path) -> None:
    def rows() -> Any:
        yield {"prompt": "a", "chosen": "b", "rejected": "c"}
        raise ConnectionResetError("the endpoint went away")

    with pytest.raises(ConnectionResetError):
        write_parquet(tmp_path / "out.parquet", rows(), SCHEMA)
    assert list(tmp_path.iterdir()) == []


def test_a_long_dataset_has_few_row_groups_and_they_are_bounded(tmp_path: Path) -> None:
    text = "x" * 1000
    rows = ({"prompt": f"{i} {text}", "chosen": text, "rejected": "c"} for i in range(20_000))
    assert write_parquet(tmp_path / "out.parquet", rows, SCHEMA) == 20_000
    metadata = pq.ParquetFile(tmp_path / "out.parquet").metadata
    groups = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
    assert sum(groups) == 20_000 and max(groups) * 2000 <= 2 * 4 * 2**20 and len(groups) <= 10


def test_a_failed_rewrite_leaves_the_earlier_parquet_file(tmp_path: Path) -> None:
    path = tmp_path / "out.parquet"
    write_parquet(path, [{"prompt": "a", "chosen": "b", "rejected": "c"}], SCHEMA)
    before = path.read_bytes()
    with pytest.raises(pa.ArrowException):
        write_parquet(path, [{"prompt": 1, "chosen": "b", "rejected": "c"}, {"prompt": b"\xff"}], SCHEMA)
    assert path.read_bytes() == before


def test_a_quarantine_that_cannot_be_written_stops_the_run(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    quarantine = Quarantine(None)
    quarantine.path = tmp_path / "file" / "q.jsonl"
    with pytest.raises(StorageError, match="cannot write"):
        quarantine.add(1, "reason", "raw")


@pytest.mark.parametrize(
    ("name", "count"),
    [("hh_helpful_1000.jsonl", 1000), ("hh_harmless_1000.jsonl", 1000), ("llmbar_gold.jsonl", 675)],
)
def test_every_row_of_real_pair_files_is_usable(shared_data: Path, name: str, count: int) -> None:
    quarantine = Quarantine(None)
    pairs = list(read_pairs(shared_data / name, quarantine))
    assert (len(pairs), quarantine.count) == (count, 0)
    assert all(pair.human_p_a is not None for pair in pairs)


def test_llmbar_labels_name_the_output_that_is_right(shared_data: Path) -> None:
    first = next(read_pairs(shared_data / "llmbar_gold.jsonl", Quarantine(None)))
    assert first.a.startswith("My girlfriend's visa") and first.human_p_a == 1.0


@pytest.mark.parametrize(
    ("name", "count"), [("mt_bench_questions.jsonl", 80), ("xstest_prompts_450.jsonl", 450)]
)
def test_every_row_of_real_prompt_files_is_usable(shared_data: Path, name: str, count: int) -> None:
    quarantine = Quarantine(None)
    assert (len(list(read_prompts(shared_data / name, quarantine))), quarantine.count) == (count, 0)


def test_candidates_and_conversations_stream_from_files(tmp_path: Path) -> None:
    path = lines(tmp_path / "in.jsonl", '{"prompt": "a", "responses": ["x"], "response": "x", "id": 7}')
    (found,) = read_candidates(path, Quarantine(None))
    assert found.candidates[0].response == "x"
    ((row, conversation),) = read_conversations(path, Quarantine(None))
    assert (row["id"], conversation[-1].content) == (7, "x")

"""Labels through the Batch API equal those asked for one by one, whatever happens to the batches and to the program."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from labeler.batch import BatchStore, read_line, split_lines
from labeler.journal import Usage
from rlaif.errors import EndpointError
from rlaif.types import content_id
from tests.labeler.batch_server import Answer, BatchServer
from tests.labeler.commands import label, pair, preferences, replies, report, scripted, write_lines
from tests.labeler.openai_server import PROBE, Fault, ScriptedServer

Online = dict[bool, list[dict[str, Any]]]
BATCH = ("--batch", "--batch_interval_s", "0.01", "--max_retries", "0")
LABELS = ("chosen_prob", "chosen_is_a", "rationale_ab", "rationale_ba", "prompt_tokens", "id")


def judges(user: str, prefix: str, wanted: bool) -> str | dict[str, float]:
    p = (int(content_id(user), 16) % 400) / 1000 + 0.05
    if not wanted:
        return f" Weighing {p}."
    return {"1": 0.95 - p, "2": p} if user.index("good") < user.index("bad") else {"1": p, "2": 0.95 - p}


def rows(path: Path, n: int = 6) -> Path:
    return write_lines(path / "pairs.jsonl", [pair(i) for i in range(n)])


def labels(out: Path) -> list[dict[str, Any]]:
    return [{name: row[name] for name in LABELS} for row in preferences(out)]


@pytest.fixture(scope="module")
def online(tmp_path_factory: pytest.TempPathFactory) -> Online:
    """Labels of six pairs asked for one by one, with rationales and without."""
    folder = tmp_path_factory.mktemp("online")
    with ScriptedServer(judges) as server:
        for cot in (True, False):
            assert label(server.ref, rows(folder), folder / str(cot), "--cot" if cot else "--no-cot") == 0
    return {cot: labels(folder / str(cot)) for cot in (True, False)}


def sent(server: BatchServer) -> Counter[str]:
    """How often each request was in a batch that was created."""
    return Counter(
        json.loads(line)["custom_id"]
        for batch in server.batches.values()
        if batch["status"] != "failed"
        for line in server.files[batch["input_file_id"]].splitlines()
    )


@pytest.mark.parametrize(("flags", "rounds"), [((), 2), (("--no-cot",), 1)], ids=["cot", "direct"])
def test_labels_equal_those_of_an_online_run(
    tmp_path: Path, flags: tuple[str, ...], rounds: int, online: Online
) -> None:
    data = rows(tmp_path)
    with BatchServer(judges) as server:
        assert label(server.ref, data, tmp_path / "out", *flags, *BATCH) == 0
        assert len(server.batches) == rounds
        assert sent(server).total() == 12 * rounds == replies(tmp_path / "out")
        # The same command again has nothing to ask.
        assert label(server.ref, data, tmp_path / "out", *flags, *BATCH) == 0
        assert len(server.batches) == rounds
    assert labels(tmp_path / "out") == online[rounds == 2]


def test_replies_that_list_no_label_are_asked_for_again_by_the_next_run_as_online(
    tmp_path: Path, online: Online, capsys: pytest.CaptureFixture[str]
) -> None:
    data, elsewhere = rows(tmp_path), True

    def reply(user: str, prefix: str, wanted: bool) -> str | dict[str, float]:
        return {"A": 0.9} if elsewhere and wanted else judges(user, prefix, wanted)

    with BatchServer(reply) as server:
        assert label(server.ref, data, tmp_path / "out", *BATCH) == 8
        assert "none of the labels 1, 2 is among the top" in capsys.readouterr().err
        elsewhere = False
        assert label(server.ref, data, tmp_path / "out", *BATCH) == 0
        assert sent(server).total() == 12 + 12 + 12
    assert labels(tmp_path / "out") == online[True]


def test_an_online_run_goes_on_from_batches_and_the_other_way_round(tmp_path: Path, online: Online) -> None:
    data = rows(tmp_path)
    with BatchServer(judges) as server:
        assert label(server.ref, data, tmp_path / "out", "--limit", "2", *BATCH) == 0
        assert sent(server).total() == 8
        server.asked.clear()
        assert label(server.ref, data, tmp_path / "out", "--limit", "4") == 0
        assert len(server.asked) == 8
        assert label(server.ref, data, tmp_path / "out", *BATCH) == 0
        assert sent(server).total() == 16
    assert labels(tmp_path / "out") == online[True]


def test_batches_are_cut_at_their_size(tmp_path: Path, online: Online) -> None:
    data = rows(tmp_path)
    with BatchServer(judges) as server:
        assert label(server.ref, data, tmp_path / "out", "--no-cot", "--batch_size", "5", *BATCH) == 0
        sizes = [b["request_counts"]["total"] for b in server.batches.values()]
        assert sizes == [5, 5, 2]
        assert sent(server).most_common(1)[0][1] == 1
    assert labels(tmp_path / "out") == online[False]


def test_a_file_stays_below_its_limit_in_bytes_and_holds_one_model_and_one_path(tmp_path: Path) -> None:
    store = BatchStore(tmp_path)
    for i in range(10):
        store.add(f"{i:016x}", f"model {i % 2}", "/chat/completions", {"n": "ü" * 50}, Usage(10, 1))
    store.add("f" * 16, "model 0", "/completions", {}, Usage(1, 1))
    length = len(next(iter(_lines_of_one(store))))
    assert store.cut(4, 3 * length, lambda most: True) == 0
    batches = store.open()
    assert [(b.model, b.path, b.requests) for b in batches] == [
        ("model 0", "/chat/completions", 3),
        ("model 0", "/chat/completions", 2),
        ("model 0", "/completions", 1),
        ("model 1", "/chat/completions", 3),
        ("model 1", "/chat/completions", 2),
    ]
    assert all(sum(map(len, store.lines(b.number))) <= 3 * length for b in batches)
    line = json.loads(next(store.lines(1)))
    assert line == {
        "custom_id": f"{0:016x}",
        "method": "POST",
        "url": "/v1/chat/completions",
        "body": {"n": "ü" * 50},
    }


def _lines_of_one(store: BatchStore) -> list[bytes]:
    return [line for _, line in store._waiting("model 0", "/chat/completions")]


def test_failed_items_stay_open_with_their_reason_and_the_next_run_asks_for_them_alone(
    tmp_path: Path, online: Online
) -> None:
    data = rows(tmp_path)
    failing = True

    def fault(body: dict[str, Any]) -> Fault | None:
        return (
            Fault(500, message="overloaded")
            if failing and "bad 1" in body["messages"][0]["content"]
            else None
        )

    with BatchServer(judges, fault=fault) as server:
        assert label(server.ref, data, tmp_path / "out", "--no-cot", *BATCH) == 8
        assert report(tmp_path / "out")["unlabelled"] == {"the endpoint answered 500: overloaded": 1}
        assert len(preferences(tmp_path / "out")) == 5
        assert len(server.batches) == 1
        failing = False
        assert label(server.ref, data, tmp_path / "out", "--no-cot", *BATCH) == 0
        assert [b["request_counts"]["total"] for b in server.batches.values()] == [12, 2]
    assert labels(tmp_path / "out") == online[False]


def test_a_reply_that_is_no_answer_is_asked_for_again_by_the_next_run(tmp_path: Path, online: Online) -> None:
    data = rows(tmp_path)
    filtering = True

    def amend(body: dict[str, Any], choice: dict[str, Any]) -> None:
        if filtering and body["max_tokens"] > 1 and "bad 1" in body["messages"][0]["content"]:
            choice.update(message={"role": "assistant", "content": None}, finish_reason="content_filter")

    prices = ("--price_per_million", "1", "1")
    with BatchServer(judges, amend=amend) as server:
        assert label(server.ref, data, tmp_path / "out", *BATCH, *prices) == 8
        labelled = sum(row["cost_usd"] for row in preferences(tmp_path / "out"))
        assert report(tmp_path / "out")["cost_usd"] > labelled
        assert report(tmp_path / "out")["unlabelled"] == {
            "the endpoint ended the reply with 'content_filter'": 1
        }
        filtering = False
        assert label(server.ref, data, tmp_path / "out", *BATCH) == 0
        assert [b["request_counts"]["total"] for b in server.batches.values()] == [12, 10, 2, 2]
    assert labels(tmp_path / "out") == online[True]


@pytest.mark.parametrize("status", ["expired", "cancelled"])
def test_what_a_batch_answered_before_its_end_is_kept(tmp_path: Path, status: str, online: Online) -> None:
    data = rows(tmp_path)
    with BatchServer(judges, ends=lambda n: status if n == 0 else "completed", answers=8) as server:
        assert label(server.ref, data, tmp_path / "out", "--no-cot", *BATCH) == 8
        assert replies(tmp_path / "out") == 8
        [reason] = report(tmp_path / "out")["unlabelled"]
        assert status in reason
        assert label(server.ref, data, tmp_path / "out", "--no-cot", *BATCH) == 0
        assert [b["request_counts"]["total"] for b in server.batches.values()] == [12, 4]
    assert labels(tmp_path / "out") == online[False]


def test_a_batch_that_the_endpoint_refuses_is_one_line_and_the_next_run_begins_anew(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], online: Online
) -> None:
    data = rows(tmp_path)
    with BatchServer(judges, ends=lambda n: "failed" if n == 0 else "completed") as server:
        assert label(server.ref, data, tmp_path / "out", "--no-cot", *BATCH) == 5
        assert "refuses the batch batch-0: line 1 is not JSON" in capsys.readouterr().err
        assert label(server.ref, data, tmp_path / "out", "--no-cot", *BATCH) == 0
    assert labels(tmp_path / "out") == online[False]


def test_batches_wait_for_room_at_the_endpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], online: Online
) -> None:
    data = rows(tmp_path)
    with BatchServer(judges, room=5) as server:
        assert label(server.ref, data, tmp_path / "out", "--no-cot", "--batch_size", "5", *BATCH) == 0
        assert set(sent(server).values()) == {1} and sent(server).total() == 12
        capsys.readouterr()
        assert label(server.ref, data, tmp_path / "other", "--no-cot", *BATCH) == 5
        assert "--batch_size" in capsys.readouterr().err
        assert label(server.ref, data, tmp_path / "other", "--no-cot", "--batch_size", "5", *BATCH) == 0
    assert labels(tmp_path / "out") == labels(tmp_path / "other") == online[False]


# Every request to the batch API in turn, answered by 500: before it does anything, and after.
STEPS = [("POST", "files"), ("POST", "batches"), ("GET", "batches/"), ("GET", "files/")]


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("step", range(len(STEPS)), ids=[f"{m}-{p.strip('/')}" for m, p in STEPS])
def test_a_run_that_broke_off_anywhere_goes_on_and_sends_nothing_twice(
    tmp_path: Path, step: int, after: bool, online: Online
) -> None:
    data = rows(tmp_path)
    broken: list[str] = []

    class Breaking(BatchServer):
        def route(self, method: str, path: str, content: bytes, headers: Any) -> Answer:
            at = (
                method,
                path.removeprefix("/v1/").rstrip("0123456789-").replace("batches/batch", "batches/"),
            )
            hit = not broken and at[0] == STEPS[step][0] and at[1].startswith(STEPS[step][1])
            if hit:
                broken.append(path)
                if after:
                    super().route(method, path, content, headers)
                return {"error": {"message": "gone"}}, 500, {}
            return super().route(method, path, content, headers)

    with Breaking(judges) as server:
        assert label(server.ref, data, tmp_path / "out", *BATCH) == 5
        assert label(server.ref, data, tmp_path / "out", *BATCH) == 0
        assert broken
        assert set(sent(server).values()) == {1} and sent(server).total() == 24
    assert labels(tmp_path / "out") == online[True]


@pytest.mark.parametrize(
    "moment", ["POST /v1/batches", "GET /v1/batches/batch-0", "GET /v1/files/file-1/content"]
)
def test_killed_at_any_moment_the_same_command_fetches_what_it_sent(
    tmp_path: Path, moment: str, online: Online
) -> None:
    data = rows(tmp_path)
    reached, killed = threading.Event(), threading.Event()

    class Hanging(BatchServer):
        def route(self, method: str, path: str, content: bytes, headers: Any) -> Answer:
            answer = super().route(method, path, content, headers)
            if f"{method} {path}" == moment and not killed.is_set():
                reached.set()
                killed.wait(60)
            return answer

    with Hanging(judges) as server:
        flags = ["--dataset", str(data), "--judge", server.ref, "--output_dir", str(tmp_path / "out"), *BATCH]
        process = subprocess.Popen(
            [sys.executable, "-m", "rlaif.cli", "label", "pairs", *flags],
            start_new_session=True,
            stderr=subprocess.DEVNULL,
        )
        assert reached.wait(60), process.poll()
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        killed.set()
        assert label(server.ref, data, tmp_path / "out", *BATCH) == 0
        assert set(sent(server).values()) == {1} and sent(server).total() == 24
        assert len(server.batches) == 2
    assert labels(tmp_path / "out") == online[True]


def test_a_probe_that_finds_otherwise_later_changes_no_request(tmp_path: Path, online: Online) -> None:
    class Moody(BatchServer):
        moody = False

        def refusal(self, body: dict[str, Any]) -> str | None:
            if self.moody and PROBE in self.read(body)[1] and "temperature" in body:
                return "Unsupported parameter: 'temperature' is not supported."
            return super().refusal(body)

    data = rows(tmp_path)
    with Moody(judges, before=lambda method, path: gone if "batch-0" in path else None) as server:
        gone: Answer | None = ({"error": {"message": "gone"}}, 500, {})
        assert label(server.ref, data, tmp_path / "out", "--no-cot", *BATCH) == 5
        gone, server.moody = None, True
        assert label(server.ref, data, tmp_path / "out", "--no-cot", *BATCH) == 0
        assert len(server.batches) == 1
    assert labels(tmp_path / "out") == online[False]


def test_a_budget_sends_what_it_covers_and_goes_on_with_what_is_left(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = rows(tmp_path, 20)
    prices = ("--no-cot", "--price_per_million", "1000", "2000")
    with ScriptedServer(judges) as server:
        assert label(server.ref, data, tmp_path / "online", *prices) == 0
    cost = report(tmp_path / "online")["cost_usd"]
    with BatchServer(judges) as server:
        assert label(server.ref, data, tmp_path / "out", *prices, *BATCH, "--max_cost", str(0.7 * cost)) == 10
        assert "--max_cost" in capsys.readouterr().err
        bought = preferences(tmp_path / "out")
        assert 0 < report(tmp_path / "out")["cost_usd"] <= 0.7 * cost
        assert 0 < len(bought) < 20
        assert len(server.batches) > 1  # real costs, below the bounds, left room for more
        assert label(server.ref, data, tmp_path / "out", *prices, *BATCH) == 0
        assert set(sent(server).values()) == {1}
    assert labels(tmp_path / "out") == labels(tmp_path / "online")


def test_a_reply_may_hold_any_end_of_line_that_unicode_has(tmp_path: Path) -> None:
    text = " One.\u2028Two.\u2029Three.\x85Four."

    def reply(user: str, prefix: str, wanted: bool) -> str | dict[str, float]:
        return {"1": 0.6, "2": 0.3} if wanted else text

    with BatchServer(reply) as server:
        assert label(server.ref, rows(tmp_path, 2), tmp_path / "out", "--ties", "keep", *BATCH) == 0
    assert {row["rationale_ab"] for row in preferences(tmp_path / "out")} == {text}


@given(st.binary(max_size=30), st.lists(st.integers(0, 30), max_size=4))
def test_lines_do_not_depend_on_the_pieces_that_they_come_in(noise: bytes, cuts: list[int]) -> None:
    content = noise.replace(b"a", b"\n") + b"\xe2\x80\xa8\nlast"
    ends = [0, *sorted(cuts), len(content)]

    async def pieces() -> AsyncIterator[bytes]:
        for start, end in itertools.pairwise(ends):
            yield content[start:end]

    async def read() -> list[bytes]:
        return [line async for line in split_lines(pieces())]

    assert asyncio.run(read()) == content.split(b"\n")


def test_an_endpoint_without_batches(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with ScriptedServer(judges) as server:
        assert label(server.ref, rows(tmp_path), tmp_path / "out", *BATCH) == 5
    assert "offers no batches" in capsys.readouterr().err


def test_models_that_have_no_batches(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert label(scripted(tmp_path), rows(tmp_path), tmp_path / "out", *BATCH) == 2
    assert "--batch needs models of one endpoint" in capsys.readouterr().err


def test_lines_of_results_as_the_documentation_has_them() -> None:
    body = {"choices": [{"message": {"content": "x"}}]}
    line = {
        "id": "batch_req_1",
        "custom_id": "a",
        "response": {"status_code": 200, "request_id": "r", "body": body},
    }
    assert read_line(json.dumps({**line, "error": None}).encode()) == ("a", body, None)
    refused = {"status_code": 400, "request_id": "r", "body": {"error": {"message": "too\nlong"}}}
    assert read_line(json.dumps({**line, "response": refused}).encode()) == (
        "a",
        None,
        "the endpoint answered 400: too long",
    )
    expired = {"code": "batch_expired", "message": "not executed"}
    said = read_line(json.dumps({"id": "x", "custom_id": "a", "response": None, "error": expired}).encode())
    assert said == ("a", None, "the batch answered batch_expired: not executed")
    torn = {
        **line,
        "response": {"status_code": 200, "body": {"choices": [{"message": {"content": "\ud800"}}]}},
    }
    assert read_line(json.dumps(torn).encode()) == ("a", None, "the reply is no Unicode text")
    for broken in ("{", "[]", '{"custom_id": "a"}', '{"custom_id": "a", "response": {"status_code": 200}}'):
        with pytest.raises(EndpointError, match="cannot be read"):
            read_line(broken.encode())
    with pytest.raises(EndpointError, match="cannot be read"):
        read_line(b'{"custom_id": "\xff"}')

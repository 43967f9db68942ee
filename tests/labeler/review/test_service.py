"""The review page over HTTP: who may come in, what a page holds and hides, and that a mark survives a kill."""

from __future__ import annotations

import json
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from rlaif.cli import main
from tests.labeler.commands import report, write_lines
from tests.labeler.review.serving import HOSTILE, Served, labelled, review, shown


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with review(labelled(tmp_path_factory.mktemp("service"), 60)) as running:
        yield running


@pytest.fixture
def client(served: Served) -> Iterator[httpx2.Client]:
    with served.client() as client:
        yield client


def journal(served_dataset: Path) -> list[dict[str, Any]]:
    lines = (served_dataset / "review" / "marks.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_the_token_opens_the_page_and_leaves_the_address(served: Served) -> None:
    with httpx2.Client(base_url=served.base) as stranger:
        assert stranger.get("/").status_code == 403
        assert stranger.get("/?token=" + "x" * 43).status_code == 403
        assert stranger.get("/rows/1").status_code == 403
        assert stranger.post("/rows/1/mark", data={"verdict": "a"}).status_code == 403
        answer = stranger.get(served.url)
        assert (answer.status_code, answer.headers["location"]) == (303, "/")
        cookie = answer.headers["set-cookie"]
        assert "HttpOnly" in cookie and "SameSite=Strict" in cookie
        assert stranger.get("/").status_code == 200
        assert "token" not in stranger.get("/").text


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example", "", "[::1"])
def test_another_host_name_is_refused_even_with_the_token(client: httpx2.Client, host: str) -> None:
    assert client.get("/", headers={"Host": host}).status_code in (400, 421)


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Origin": "http://127.0.0.1:1"},
        {"Sec-Fetch-Site": "cross-site"},
    ],
    ids=["site", "null", "port", "fetch"],
)
def test_no_other_origin_may_post(served: Served, client: httpx2.Client, headers: dict[str, str]) -> None:
    assert client.post("/rows/1/mark", data={"verdict": "a"}, headers=headers).status_code == 403
    assert client.post("/undo", headers=headers).status_code == 403
    own = client.post("/rows/2/reveal", headers={"Origin": served.base, "Sec-Fetch-Site": "same-origin"})
    assert own.status_code == 200


def test_every_answer_forbids_scripts_frames_and_other_sites(served: Served, client: httpx2.Client) -> None:
    for path in ("/", "/rows/1", "/static/review.js", "/nothing", "/rows/999"):
        answer = client.get(path)
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'" in policy and "script-src 'self';" in policy and "unsafe" not in policy
        assert "frame-ancestors 'none'" in policy and answer.headers["x-content-type-options"] == "nosniff"
        assert "http" not in re.sub(r"http://www\.w3\.org/\S+", "", answer.text) or path.endswith(".js")
    assert client.get("/static/../server.py").status_code in (403, 404)


def test_a_hostile_response_stays_text(client: httpx2.Client) -> None:
    found = client.get("/", params={"q": "document.title"}).text
    number = re.search(r'href="/rows/(\d+)', found)
    assert number is not None
    page = client.get(f"/rows/{number[1]}").text
    assert "<script>document" not in page and "<img" not in page
    assert (
        HOSTILE.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").replace("'", "&#39;") in page
    )


def test_the_browser_gets_a_window_of_rows(client: httpx2.Client) -> None:
    def numbers(**asked: str) -> list[int]:
        page = client.get("/", params={"order": "dataset", **asked}).text
        return [int(n) for n in re.findall(r'class="number">(\d+)<', page)]

    assert numbers() == [*range(1, 51)]
    assert numbers(page="2") == [*range(51, 61)]
    assert numbers(page="99") == [*range(51, 61)]
    assert numbers(q="question 17") == [18]
    assert numbers(q="no such words") == []
    assert numbers(order="nonsense", status="nonsense", reason="nonsense", page="x") != []


def test_forms_that_say_nothing_mark_nothing(served: Served, client: httpx2.Client) -> None:
    before = client.get("/").text
    for form in (
        {},
        {"verdict": "c"},
        {"verdict": "ranks", "value-0": "1"},
        {"verdict": "grades", "value-0": "8", "value-1": "1"},
    ):
        assert client.post("/rows/1/mark", data=form).status_code == 400
    assert client.post("/rows/1/mark", data={"verdict": "a", "note": "x" * 100_000}).status_code == 413
    assert client.post("/rows/1/mark", files={"verdict": ("a.txt", b"a")}).status_code == 400
    assert client.post("/rows/61/mark", data={"verdict": "a"}).status_code == 404
    assert client.get("/").text == before


def test_the_label_is_hidden_until_the_row_is_marked_and_the_record_says_what_was_seen(
    tmp_path: Path,
) -> None:
    dataset = labelled(tmp_path, 6)
    with review(dataset) as served, served.client() as client:
        page = client.get("/rows/1?order=dataset").text
        assert "hidden until you have marked" in page and "They differ." not in page and "0.778" not in page
        listed = client.get("/").text
        assert (
            re.findall(r'class="number">(\d+)', listed)[0] == "1"
        )  # the suspicious row is first, its reason is hidden
        assert 'class="chip"' not in listed and "They differ." not in listed
        after = client.post("/rows/1/mark?order=dataset", data={"verdict": "a"})
        assert after.url.path == "/rows/2" and "Saved: row 1" in after.text
        client.post(
            "/undo?order=dataset"
        )  # a slip of the finger: nothing was seen, so the next mark is blind too
        client.post("/rows/1/mark?order=dataset", data={"verdict": "b", "note": "shorter"})
        page = client.get("/rows/1?order=dataset").text
        assert "They differ." in page and "0.778" in page and "shorter" in page
        assert len(re.findall('class="chip".*near identical', client.get("/").text)) == 1
        client.post("/rows/1/mark?order=dataset", data={"verdict": "a"})
        client.post("/rows/2/reveal?order=dataset")
        assert "They differ." in client.get("/rows/2?order=dataset").text
        client.post("/rows/2/mark?order=random", data={"verdict": "tie"})
        client.post("/rows/3/mark?order=random", data={"verdict": "bad"})
        client.post("/rows/4/mark?order=random&q=question", data={"verdict": "a"})
        assert len(re.findall('class="number"', client.get("/?status=marked").text)) == 4
        assert len(re.findall('class="number"', client.get("/?status=bad").text)) == 1
    marks = [r for r in journal(dataset) if r["event"] == "mark"]
    assert [(m["row"], m["values"], m["label_seen"], m["sample"]) for m in marks] == [
        (1, [1, 2], False, False),
        (1, [2, 1], False, False),
        (1, [1, 2], True, False),
        (2, [1, 1], True, True),
        (3, [], False, True),
        (4, [1, 2], False, False),  # a search is no random sample
    ]
    assert {m["by"] for m in marks} == {"ann"} and all(m["at"] for m in marks)


def test_marks_survive_kill_9_and_are_human_labels_for_eval_judge(tmp_path: Path) -> None:
    dataset = labelled(tmp_path, 8)
    with review(dataset) as served, served.client() as client:
        for number in range(1, 7):  # the good one six times out of eight rows, the other one once
            responses = shown(client.get(f"/rows/{number}?order=dataset").text)
            good = next(letter for letter, text in responses.items() if text.startswith("good")).lower()
            verdict = good if number > 1 else {"a": "b", "b": "a"}[good]
            assert (
                client.post(f"/rows/{number}/mark?order=dataset", data={"verdict": verdict}).status_code
                == 200
            )
        served.process.send_signal(signal.SIGKILL)
        served.process.wait()
    with review(dataset) as served, served.client() as client:
        page = client.get("/").text
        assert "6 of 8 marked" in page and "83.3 %" in page
        served.stop()
    agreed = report(dataset / "review")["agreement"]["blind"]
    out = tmp_path / "judge"
    human = dataset / "review" / "human-pairs-blind.jsonl"
    assert (
        main(["eval", "judge", "--labels", str(dataset), "--dataset", str(human), "--output_dir", str(out)])
        == 0
    )
    found = report(out)
    assert found["agreement"]["value"] == pytest.approx(5 / 6)
    assert (found["agreement"], found["kappa"], found["human_pairs"]) == (
        agreed["agreement"], agreed["kappa"], agreed["human_pairs"],
    )  # fmt: skip


def test_a_second_reviewer_is_told_to_wait(
    served: Served, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_lines(tmp_path / "pairs.jsonl", [{"prompt": "p", "chosen": "a", "rejected": "b"}])
    with review(data):
        assert main(["review", str(data), "--port", "0"]) == 7  # the journal is locked
    assert "written by another process" in capsys.readouterr().err
    taken = served.base.rpartition(":")[2]
    assert main(["review", str(data), "--port", taken]) == 2
    assert "is in use" in capsys.readouterr().err
    assert main(["review", str(tmp_path / "nothing.jsonl")]) == 3

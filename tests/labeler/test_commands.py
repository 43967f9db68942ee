"""`rlaif label pairs`, `rlaif label scores` and `rlaif sample` as a user runs them: outputs, resume, bad input."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from labeler.pairs import pair_up
from labeler.preferences import PreferenceReport
from rlaif.cli import main
from rlaif.types import Candidate, CandidateSet, Pair, Preference, content_id, user_prompt
from tests.labeler.commands import label, pair, preferences, replies, report, scripted, write_lines
from tests.labeler.openai_server import Fault, ScriptedServer
from tests.labeler.tiny import save_tiny


def test_the_dataset_holds_the_soft_label_and_where_it_came_from(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [pair(0, label="1"), pair(1, "bad", "good", label="1"), pair(2, "meh", "hm")]
    out = tmp_path / "out"
    assert label(scripted(tmp_path), write_lines(tmp_path / "pairs.jsonl", rows), out) == 0
    first, second = preferences(out)  # the third is a tie
    # By hand: 8/9 with the good one first, 6/9 with it second.
    assert first["chosen_prob"] == pytest.approx(7 / 9)
    assert (first["chosen_prob_first"], first["chosen_prob_second"]) == pytest.approx((8 / 9, 6 / 9))
    assert first["chosen"] == [{"role": "assistant", "content": "good 0"}]
    assert first["prompt"] == [{"role": "user", "content": "question 0"}]
    assert first["rationale_ab"] == " They differ."
    assert (first["chosen_is_a"], first["human_chosen_prob"]) == (True, 1.0)
    assert (second["chosen_is_a"], second["human_chosen_prob"]) == (False, 0.0)
    assert second["chosen"][0]["content"] == "good 1"
    summary = report(out)
    assert (summary["labelled"], summary["ties"], summary["rows_written"]) == (3, 1, 2)
    assert summary["human_agreement"] == 0.5
    assert "label_mass_mean" in capsys.readouterr().out


def test_ties_are_kept_on_request(tmp_path: Path) -> None:
    data = write_lines(tmp_path / "pairs.jsonl", [pair(0, "meh", "hm")])
    assert label(scripted(tmp_path), data, tmp_path / "out", "--ties", "keep") == 0
    assert [r["chosen_prob"] for r in preferences(tmp_path / "out")] == [0.5]


def test_datasets_reads_the_folder_in_conversational_form(tmp_path: Path) -> None:
    from datasets import load_dataset

    data = write_lines(tmp_path / "pairs.jsonl", [pair(i) for i in range(3)] + ["{broken"])
    assert label(scripted(tmp_path), data, tmp_path / "out") == 0
    dataset = load_dataset(str(tmp_path / "out"), split="train", cache_dir=str(tmp_path / "cache"))
    assert len(dataset) == 3
    assert dataset[0]["rejected"] == [{"role": "assistant", "content": "bad 0"}]


def test_bad_rows_are_quarantined_and_the_rest_is_labelled(tmp_path: Path) -> None:
    rows = [pair(0), "{broken json", {"prompt": "no responses"}, pair(1)]
    assert label(scripted(tmp_path), write_lines(tmp_path / "pairs.jsonl", rows), tmp_path / "out") == 0
    assert len(preferences(tmp_path / "out")) == 2
    lines = [json.loads(x) for x in (tmp_path / "out" / "quarantine.jsonl").read_text().splitlines()]
    assert [x["line"] for x in lines] == [2, 3]


def test_a_probe_without_a_verdict_or_logprobs_is_asked_again_by_the_next_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    filtered = True

    def amend(body: dict[str, Any], choice: dict[str, Any]) -> None:
        if filtered:
            choice |= {"finish_reason": "content_filter", "logprobs": None}

    data = write_lines(tmp_path / "pairs.jsonl", [pair(0)])
    flags = ("--max_retries", "0", "--no-cot")
    with ScriptedServer(prefers_good, amend_probe=amend, logprobs=False) as server:
        assert label(server.ref, data, tmp_path / "out", *flags) == 5
        assert "ended the reply with 'content_filter'" in capsys.readouterr().err
        filtered = False
        assert label(server.ref, data, tmp_path / "out", *flags) == 5
        assert "gives no log-probabilities" in capsys.readouterr().err
        server.logprobs = True
        assert label(server.ref, data, tmp_path / "out", *flags) == 0


def test_a_run_by_a_fallback_keeps_to_it(tmp_path: Path) -> None:
    data = write_lines(tmp_path / "pairs.jsonl", [pair(i) for i in range(3)])
    flags = ("--no-cot", "--fallback", "samples", "--num_samples", "2")
    with ScriptedServer(lambda *asked: {"1": 0.6, "2": 0.4} if asked[2] else "1", logprobs=False) as server:
        assert label(server.ref, data, tmp_path / "out", *flags, "--ties", "keep", "--limit", "1") == 0
        server.logprobs = True
        assert label(server.ref, data, tmp_path / "out", *flags, "--ties", "keep") == 0
    assert len(server.asked) == 3 * 2 * 2
    assert [row["source"] for row in preferences(tmp_path / "out")] == ["samples"] * 3


def test_sampling_counts_the_prompts_that_have_responses(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    policy = scripted(tmp_path, [{"user": "long", "fail": "context too long"}, {"text": "said"}])
    data = write_lines(tmp_path / "prompts.jsonl", [{"prompt": p} for p in ("a long one", "b", "c")])
    command = ["sample", "--model_name_or_path", policy, "--dataset", str(data), "--max_unlabelled", "0.5"]
    assert main([*command, "--output_dir", str(tmp_path / "out")]) == 0
    found = report(tmp_path / "out")
    rows = pq.read_table(tmp_path / "out" / "candidates.parquet").num_rows
    assert (found["prompts"], found["prompts_unanswered"]) == (rows, 1) == (2, 1)
    assert "prompts_unanswered" in capsys.readouterr().out
    assert "| prompts without a response | 1 |" in (tmp_path / "out" / "README.md").read_text()


def test_a_run_with_too_many_open_rows_says_which_of_them_another_run_may_mend(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    judge = scripted(tmp_path, [{"fail": "context too long: the model takes 16 tokens"}])
    data = write_lines(tmp_path / "pairs.jsonl", [pair(0)])
    assert label(judge, data, tmp_path / "out", "--no-cot") == 8
    error = capsys.readouterr().err
    assert "save those whose reply is on record and says nothing; what is too long fails again" in error
    assert "--max_unlabelled" in error


def test_failed_rows_stay_unlabelled_with_a_reason_and_the_next_run_asks_for_them_alone(
    tmp_path: Path,
) -> None:
    failing = True

    def fault(body: dict[str, Any]) -> Fault | None:
        return Fault(500) if failing and "bad 1" in body["messages"][0]["content"] else None

    data = write_lines(tmp_path / "pairs.jsonl", [pair(i) for i in range(3)])
    flags = ("--max_retries", "0", "--no-cot")
    with ScriptedServer(prefers_good, fault=fault) as server:
        assert label(server.ref, data, tmp_path / "out", *flags) == 8
        assert len(preferences(tmp_path / "out")) == 2
        row = json.loads((tmp_path / "out" / "unlabelled.jsonl").read_text())
        assert row["response_b"] == "bad 1" and "500" in row["reason"]
        failing = False
        server.asked.clear()
        assert label(server.ref, data, tmp_path / "out", *flags) == 0
        assert len(server.asked) == 2
        assert all("bad 1" in b["messages"][0]["content"] for b in server.asked)
    assert [r["chosen"][0]["content"] for r in preferences(tmp_path / "out")] == [
        "good 0",
        "good 1",
        "good 2",
    ]
    assert not (tmp_path / "out" / "unlabelled.jsonl").exists()


def prefers_good(user: str, prefix: str, wanted: bool) -> str | dict[str, float]:
    if not wanted:
        return " Weighing."
    p = (int(content_id(user), 16) % 400) / 1000 + 0.05
    return {"1": 0.95 - p, "2": p} if user.index("good") < user.index("bad") else {"1": p, "2": 0.95 - p}


@pytest.mark.slow
def test_killed_at_any_moment_the_same_command_goes_on_and_asks_nothing_twice(tmp_path: Path) -> None:
    n, in_flight = 60, 4
    data = write_lines(tmp_path / "pairs.jsonl", [pair(i) for i in range(n)])
    slow = lambda body: Fault(hang_s=0.02)  # noqa: E731
    with ScriptedServer(prefers_good, fault=slow) as server:
        flags = ["--max_in_flight", str(in_flight), "--dataset", str(data), "--judge", server.ref]
        command = [sys.executable, "-m", "rlaif.cli", "label", "pairs", *flags, "--output_dir"]
        cut, whole = str(tmp_path / "cut"), str(tmp_path / "whole")
        process = subprocess.Popen([*command, cut], start_new_session=True, stderr=subprocess.DEVNULL)
        while len(server.asked) < 48:
            assert process.poll() is None, "it ended before it could be killed"
            time.sleep(0.005)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        assert 0 < replies(tmp_path / "cut") < 4 * n
        assert subprocess.run([*command, cut], capture_output=True).returncode == 0
        asked = Counter(json.dumps([b["messages"], b["max_tokens"]]) for b in server.asked)
        assert len(asked) == 4 * n  # two orders, a rationale and a label each
        assert sum(asked.values()) - len(asked) <= in_flight
        assert max(asked.values()) <= 2
        assert subprocess.run([*command, whole], capture_output=True).returncode == 0
    assert preferences(tmp_path / "cut") == preferences(tmp_path / "whole")
    assert replies(tmp_path / "cut") == 4 * n


def test_a_pair_and_its_swap_in_one_file_are_asked_once(tmp_path: Path) -> None:
    rows = [pair(0), {**pair(0), "response_a": "bad 0", "response_b": "good 0"}, pair(0)]
    with ScriptedServer(prefers_good) as server:
        assert label(server.ref, write_lines(tmp_path / "p.jsonl", rows), tmp_path / "out", "--no-cot") == 0
        assert len(server.asked) == 2
    written = preferences(tmp_path / "out")
    assert [r["chosen_is_a"] for r in written] == [True, False, True]
    assert len({r["chosen_prob"] for r in written}) == 1


def test_candidates_are_paired_with_each_other(tmp_path: Path) -> None:
    row = {"prompt": "q", "completions": [{"response": r} for r in ("good", "bad", "good", "meh")]}
    data = write_lines(tmp_path / "candidates.jsonl", [row])
    assert label(scripted(tmp_path), data, tmp_path / "out", "--ties", "keep") == 0
    pairs = {(r["chosen"][0]["content"], r["rejected"][0]["content"]) for r in preferences(tmp_path / "out")}
    assert pairs == {("good", "bad"), ("good", "meh"), ("bad", "meh")}


def test_kappa_means_something_although_the_file_always_names_the_preferred_response_first() -> None:
    # The judge errs on the last of four pairs. Taken both ways round, chance agrees on one half: (3/4 - 1/2) / (1/2).
    texts = [("a", "z"), ("b", "y"), ("z", "a"), ("y", "b")]
    prompt = user_prompt("which?")
    judged = [
        Preference(Pair(prompt, a, b, human_p_a=1.0), p)
        for (a, b), p in zip(texts, (0.9, 0.8, 0.7, 0.1), strict=True)
    ]
    report = PreferenceReport()
    for preference in judged:
        report.add(preference, preference.p_a)
    summary = report.result()
    assert summary["human_agreement"] == 0.75
    assert summary["human_kappa"] == pytest.approx(0.5)


def test_drawn_pairs_depend_on_content_and_seed_alone() -> None:
    candidates = CandidateSet(user_prompt("q"), tuple(Candidate(str(i)) for i in range(8)))
    assert len(pair_up(candidates, 0, 0)) == 28
    assert pair_up(candidates, 5, 0) == pair_up(candidates, 5, 0)
    assert pair_up(candidates, 5, 0) != pair_up(candidates, 5, 1)
    assert len({p.id for p in pair_up(candidates, 5, 0)}) == 5


def test_scores_are_written_with_their_distribution(tmp_path: Path) -> None:
    rows = [{"prompt": "q", "response": "fine"}, {"prompt": "q", "response": "..."}]
    probs = [0.0] * 7 + [0.25, 0.25, 0.0]
    judge = scripted(tmp_path, [{"probs": probs}])
    assert label(judge, write_lines(tmp_path / "r.jsonl", rows), tmp_path / "out", kind="scores") == 0
    first, second = pq.read_table(tmp_path / "out" / "scores.parquet").to_pylist()
    assert first["score"] == pytest.approx(8.5)
    assert first["probs"] == pytest.approx([2 * p for p in probs])
    assert (second["score"], second["probs"], second["source"]) == (
        1.0,
        None,
        "guard: the response says nothing",
    )


@pytest.mark.parametrize("kind", ["pairs", "scores"])
def test_labels_that_hold_little_of_the_probability_are_warned_of(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    labels = 2 if kind == "pairs" else 10
    row = pair(0) if kind == "pairs" else {"prompt": "p", "response": "good"}
    rubric = "helpfulness-pair" if kind == "pairs" else "helpfulness-score"
    data = write_lines(tmp_path / "d.jsonl", [row])
    for share, warned in ((0.1, True), (0.9, False)):
        probs = [share] + [0.0] * (labels - 1)
        judge = scripted(tmp_path, [{"probs": probs, "text": "a rationale"}])
        assert label(judge, data, tmp_path / str(share), "--rubric", rubric, kind=kind) == 0
        assert ("wanted to say something else" in capsys.readouterr().err) == warned


def test_sampling_writes_candidates_that_labeling_reads(tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "tiny")
    prompts = write_lines(
        tmp_path / "prompts.jsonl", [{"prompt": "w1 w2"}, {"prompt": "w3"}, {"prompt": "w3"}]
    )

    def sample(out: str, *flags: str) -> list[dict[str, Any]]:
        command = ["sample", "--model_name_or_path", str(model), "--dataset", str(prompts)]
        options = [
            "--num_return_sequences",
            "3",
            "--max_new_tokens",
            "6",
            "--output_dir",
            str(tmp_path / out),
        ]
        assert main([*command, *options, *flags]) == 0
        return pq.read_table(tmp_path / out / "candidates.parquet").to_pylist()

    rows = sample("a")
    assert [len(r["completions"]) for r in rows] == [3, 3, 3]
    assert rows == sample("b", "--max_in_flight", "1")
    assert rows != sample("c", "--seed", "1")
    assert rows[1]["completions"] != rows[2]["completions"], "a repeated prompt gets further responses"
    assert label(scripted(tmp_path), tmp_path / "a", tmp_path / "labels", "--ties", "keep") == 0


def test_a_response_that_the_endpoint_did_not_give_is_no_candidate(tmp_path: Path) -> None:
    def amend(body: dict[str, Any], choice: dict[str, Any]) -> None:
        if "hostile" in body["messages"][0]["content"]:
            choice.update(message={"role": "assistant", "content": None}, finish_reason="content_filter")

    prompts = write_lines(tmp_path / "p.jsonl", [{"prompt": "plain"}, {"prompt": "hostile"}])
    with ScriptedServer(lambda user, prefix, wanted: "An answer.", amend=amend) as server:
        flags = ["--dataset", str(prompts), "--output_dir", str(tmp_path / "out"), "--max_unlabelled", "0.9"]
        assert (
            main(["sample", "--model_name_or_path", server.ref, "--num_return_sequences", "1", *flags]) == 0
        )
    [row] = pq.read_table(tmp_path / "out" / "candidates.parquet").to_pylist()
    assert [c["response"] for c in row["completions"]] == ["An answer."]
    assert report(tmp_path / "out")["unlabelled"] == {"the endpoint ended the reply with 'content_filter'": 1}


# ---- bad input: one clear line, its own exit code ----


def refused(capsys: pytest.CaptureFixture[str], code: int, exit_code: int, says: str) -> None:
    assert code == exit_code
    lines = capsys.readouterr().err.strip().splitlines()
    message = [line for line in lines if line.startswith("rlaif: ")]
    assert len(message) == 1 and says in message[0]


def test_a_missing_dataset(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    refused(capsys, label(scripted(tmp_path), tmp_path / "none.jsonl", tmp_path / "out"), 3, "does not exist")


def test_an_unknown_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write_lines(tmp_path / "p.jsonl", [pair(0)])
    refused(capsys, label(f"hf:{tmp_path / 'none'}", data, tmp_path / "out"), 4, "there is no folder")


def test_an_endpoint_that_dies_keeps_what_was_bought(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_lines(tmp_path / "p.jsonl", [pair(i) for i in range(6)])
    flags = ("--no-cot", "--max_retries", "1", "--max_in_flight", "1", "--timeout_s", "5")
    with ScriptedServer(prefers_good) as server:
        assert label(server.ref, data, tmp_path / "out", *flags, "--limit", "2") == 0
        ref = server.ref
    capsys.readouterr()
    refused(capsys, label(ref, data, tmp_path / "out", *flags), 5, "no connection")
    assert replies(tmp_path / "out") == 4


def test_a_context_that_is_too_long(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = save_tiny(tmp_path / "tiny", context=64)
    rows = [pair(0), {"prompt": "w1 " * 80, "response_a": "w1", "response_b": "w2"}]
    data = write_lines(tmp_path / "p.jsonl", rows)
    flags = ("--rubric", "tinyworld:pair", "--no-cot")
    refused(capsys, label(f"hf:{model}", data, tmp_path / "out", *flags), 8, "context too long")
    assert report(tmp_path / "out")["labelled"] == 1


def test_a_full_disk_keeps_what_was_bought(tmp_path: Path) -> None:
    data = write_lines(tmp_path / "p.jsonl", [pair(i) for i in range(40)])
    command = [sys.executable, "-m", "rlaif.cli", "label", "pairs", "--judge", scripted(tmp_path)]
    command += ["--dataset", str(data), "--output_dir", str(tmp_path / "out")]

    def small_disk() -> None:
        # A limit on file size fails writes as a full disk does.
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (250_000, 250_000))

    cut = subprocess.run(command, capture_output=True, text=True, preexec_fn=small_disk)
    assert cut.returncode == 7, cut.stderr
    assert sum(line.startswith("rlaif: ") for line in cut.stderr.splitlines()) == 1
    kept = replies(tmp_path / "out")
    assert 0 < kept < 160
    assert subprocess.run(command, capture_output=True).returncode == 0
    assert replies(tmp_path / "out") == 160
    assert len(preferences(tmp_path / "out")) == 40


def test_another_judge_in_the_same_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write_lines(tmp_path / "p.jsonl", [pair(0)])
    assert label(scripted(tmp_path), data, tmp_path / "out") == 0
    capsys.readouterr()
    refused(capsys, label(scripted(tmp_path), data, tmp_path / "out", "--no-cot"), 7, "cot=True")


def test_an_endpoint_that_fails_every_time_is_given_up(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_lines(tmp_path / "p.jsonl", [pair(i) for i in range(300)])
    judge = scripted(tmp_path, [{"fail": "the endpoint answered 500"}])
    refused(capsys, label(judge, data, tmp_path / "out"), 8, "questions all failed")

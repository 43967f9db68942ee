"""`rlaif export`: the shapes of trainers, what is left out, held-out splits, and the hub."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from labeler.export.shapes import as_preferred, is_held_out, shape
from rlaif.cli import main
from rlaif.types import PreferenceRow, user_prompt
from tests.labeler.hub_server import OWNER, TOKEN, HubServer


def row(i: int, p: float, **more: Any) -> dict[str, Any]:
    return {
        "prompt": f"question {i}",
        "chosen": f"one {i}",
        "rejected": f"other {i}",
        "chosen_prob": p,
        **more,
    }


def dataset(tmp_path: Path, rows: list[dict[str, Any]]) -> Path:
    path = tmp_path / "labelled.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


def export(source: Path, out: Path, form: str, *flags: str) -> int:
    return main(["export", "--dataset", str(source), "--format", form, "--output_file", str(out), *flags])


def read(path: Path) -> list[dict[str, Any]]:
    if path.suffix == ".parquet":
        return pq.read_table(path).to_pylist()
    return [json.loads(line) for line in path.read_text().splitlines()]


def said(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


def asked(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl"])
def test_preferences_name_the_response_that_the_label_prefers(tmp_path: Path, suffix: str) -> None:
    out = tmp_path / f"out{suffix}"
    assert export(dataset(tmp_path, [row(0, 0.8, id="x"), row(1, 0.1)]), out, "trl-preference") == 0
    first, second = read(out)
    assert first == {
        "prompt": asked("question 0"),
        "chosen": said("one 0"),
        "rejected": said("other 0"),
        "chosen_prob": 0.8,
        "id": "x",
    }
    assert (second["chosen"], second["rejected"], second["chosen_prob"]) == (
        said("other 1"),
        said("one 1"),
        0.9,
    )


def test_unpaired_rows_say_of_each_response_whether_it_was_preferred(tmp_path: Path) -> None:
    assert export(dataset(tmp_path, [row(0, 0.75)]), tmp_path / "out.jsonl", "trl-unpaired") == 0
    good, bad = read(tmp_path / "out.jsonl")
    assert (good["completion"], good["label"], good["preferred_prob"]) == (said("one 0"), True, 0.75)
    assert (bad["completion"], bad["label"], bad["preferred_prob"]) == (said("other 0"), False, 0.25)
    assert good["prompt"] == bad["prompt"] == asked("question 0")
    assert good["id"] == bad["id"]


def test_margins_are_the_datasets_own_or_what_the_label_says(tmp_path: Path) -> None:
    rows = [row(0, 0.75), row(1, 0.9, margin=2.5), row(2, 0.2, margin=-1.5), row(3, 1.0, margin=None)]
    assert export(dataset(tmp_path, rows), tmp_path / "out.parquet", "trl-reward") == 0
    assert [r["margin"] for r in read(tmp_path / "out.parquet")] == [0.5, 2.5, 1.5]


def test_ties_and_small_margins_are_left_out_and_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = dataset(tmp_path, [row(0, 0.5), row(1, 0.55), row(2, 0.45), row(3, 0.75), row(4, 0.2)])
    assert export(source, tmp_path / "out.jsonl", "trl-preference", "--min_margin", "0.5") == 0
    assert [r["prompt"][0]["content"] for r in read(tmp_path / "out.jsonl")] == ["question 3", "question 4"]
    assert "tie: 1" in capsys.readouterr().out
    assert export(source, tmp_path / "out.jsonl", "trl-preference", "--ties", "keep") == 0
    assert len(read(tmp_path / "out.jsonl")) == 5


def test_equal_responses_are_never_exported(tmp_path: Path) -> None:
    same = {**row(0, 1.0), "rejected": "one 0"}
    assert export(dataset(tmp_path, [same, row(1, 1.0)]), tmp_path / "out.jsonl", "trl-preference") == 0
    assert len(read(tmp_path / "out.jsonl")) == 1
    (kept,) = read(tmp_path / "out-report/quarantine.jsonl")
    assert "same text" in kept["reason"]


def test_all_columns_survive_a_round_trip(tmp_path: Path) -> None:
    votes = pa.list_(pa.struct([("judge", pa.string()), ("chosen_prob", pa.float64())]))
    more = [{"judge": "a", "chosen_prob": 0.5}]
    text = dataset(tmp_path, [row(0, 0.3, rationale="because", votes=more)])
    assert export(text, tmp_path / "text.parquet", "parquet") == 0
    (kept,) = read(tmp_path / "text.parquet")
    assert json.loads(kept["extra"]) == {"rationale": "because", "votes": more}
    assert kept["chosen_prob"] == 0.3, "all columns speak of chosen and rejected as they are"
    assert export(text, tmp_path / "text.jsonl", "jsonl") == 0
    assert read(tmp_path / "text.jsonl")[0]["votes"] == more

    typed = tmp_path / "typed.parquet"
    columns = {"prompt": ["q"], "chosen": ["a"], "rejected": ["b"], "chosen_prob": [0.7]}
    pq.write_table(pa.table(columns).append_column("votes", pa.array([more], votes)), typed)
    assert export(typed, tmp_path / "out.parquet", "parquet") == 0
    written = pq.read_table(tmp_path / "out.parquet")
    assert written.schema.field("votes").type == votes
    assert written.to_pylist()[0]["votes"] == more


def test_columns_of_other_tools_mean_what_they_like(tmp_path: Path) -> None:
    foreign = dataset(tmp_path, [row(0, 0.9, votes=12, rationale_ab=["x"], source=3)])
    assert export(foreign, tmp_path / "out.jsonl", "jsonl") == 0
    (kept,) = read(tmp_path / "out.jsonl")
    assert (kept["votes"], kept["rationale_ab"], kept["source"]) == (12, ["x"], 3)


# ---- the split ----


def test_all_pairs_of_a_prompt_fall_on_one_side(tmp_path: Path) -> None:
    rows = [{**row(i % 40, 0.9), "rejected": f"other {i}"} for i in range(200)]
    assert export(dataset(tmp_path, rows), tmp_path / "out.parquet", "trl-preference", "--split", "0.3") == 0
    train, test = read(tmp_path / "out-train.parquet"), read(tmp_path / "out-test.parquet")
    assert len(train) + len(test) == 200
    prompts = [{r["prompt"][0]["content"] for r in side} for side in (train, test)]
    assert not prompts[0] & prompts[1]
    assert not (tmp_path / "out.parquet").exists()
    assert (
        export(dataset(tmp_path, rows[::-1]), tmp_path / "b.parquet", "trl-preference", "--split", "0.3") == 0
    )
    again = {r["prompt"][0]["content"] for r in read(tmp_path / "b-test.parquet")}
    assert again == prompts[1], "it depends on the prompts alone"


def test_the_split_holds_out_about_its_share_and_grows_with_it() -> None:
    prompts = [user_prompt(f"q{i}") for i in range(2000)]
    small = {p for p in prompts if is_held_out(p, 0.05)}
    large = {p for p in prompts if is_held_out(p, 0.2)}
    assert 60 < len(small) < 140  # 100 expected, deviation 9.7
    assert small < large
    assert not any(is_held_out(p, 0.0) for p in prompts)


# ---- properties ----

texts = st.text(max_size=8)


@given(texts, texts, st.floats(0, 1), st.floats(-3, 3))
def test_turning_a_row_round_changes_nothing(a: str, b: str, p: float, margin: float) -> None:
    prompt = user_prompt("q")
    one = PreferenceRow(prompt, a, b, p, {"margin": margin, "id": "x"})
    other = PreferenceRow(prompt, b, a, 1.0 - p, {"margin": -margin, "id": "x"})
    first, second = as_preferred(one), as_preferred(other)
    assert min(first.chosen_prob, second.chosen_prob) >= 0.5
    if abs(p - 0.5) > 1e-9:
        assert (first.chosen, first.extra) == (second.chosen, second.extra)
        assert first.chosen_prob == pytest.approx(second.chosen_prob)


@given(st.floats(0, 1))
def test_an_unpaired_pair_has_one_good_and_one_bad_response_whose_probabilities_add_up(p: float) -> None:
    rows = shape(PreferenceRow(user_prompt("q"), "a", "b", p), "trl-unpaired")
    assert [r["label"] for r in rows] == [True, False]  # type: ignore[index]
    assert sum(r["preferred_prob"] for r in rows) == pytest.approx(1.0)  # type: ignore[index]


# ---- refusals ----


def refused(capsys: pytest.CaptureFixture[str], code: int, exit_code: int, says: str) -> None:
    assert code == exit_code
    (message,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("rlaif: ")]
    assert says in message


@pytest.mark.parametrize(
    ("flags", "exit_code", "says"),
    [
        pytest.param(["--format", "jsonl", "--output_file", "x.parquet"], 2, "--format says", id="suffix"),
        pytest.param(["--format", "trl-reward"], 2, "--output_file FILE", id="nowhere"),
        pytest.param(
            ["--format", "trl-unpaired", "--output_file", "x.jsonl", "--ties", "keep"],
            2,
            "tied pair",
            id="tie",
        ),
        pytest.param(["--output_file", "x.csv"], 2, ".parquet or .jsonl", id="csv"),
        pytest.param(
            ["--output_file", "x.jsonl", "--min_margin", "0.9"], 3, "lower --min_margin", id="empty"
        ),
        pytest.param(["--output_file", "x.jsonl", "--split", "0.00001"], 3, "raise --split", id="no-test"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], exit_code: int, says: str
) -> None:
    source = dataset(tmp_path, [row(0, 0.6)])
    flags = [str(tmp_path / f) if f.startswith("x.") else f for f in flags]
    refused(capsys, main(["export", "--dataset", str(source), *flags]), exit_code, says)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["labelled.jsonl"], "nothing half-written stays"


# ---- the hub ----


def push(source: Path, hub: str, *flags: str, token: str = TOKEN) -> subprocess.CompletedProcess[str]:
    """A process of its own, since the hub's address is read from the environment once."""
    command = [sys.executable, "-m", "rlaif.cli", "export", "--dataset", str(source)]
    environment = {
        **os.environ,
        "HF_ENDPOINT": hub,
        "HF_TOKEN": token,
        "HF_HOME": str(source.parent / "hf"),  # no other token
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }
    return subprocess.run([*command, *flags], capture_output=True, text=True, env=environment, check=False)


def test_the_hub_gets_the_data_and_the_card_in_one_commit(tmp_path: Path) -> None:
    source = dataset(tmp_path, [row(i, 0.9) for i in range(30)])
    with HubServer() as hub:
        done = push(source, hub.url, "--push_to_hub", "prefs", "--split", "0.3", "--private")
        first = hub.repositories[f"{OWNER}/prefs"]
        again = push(source, hub.url, "--push_to_hub", "team/prefs", "--format", "jsonl")
    assert (done.returncode, again.returncode) == (0, 0), done.stderr + again.stderr
    assert f"{hub.url}/datasets/{OWNER}/prefs/commit/" in done.stdout
    assert hub.visibility == {f"{OWNER}/prefs": "private", "team/prefs": None}
    assert hub.commits == ["Upload preferences"] * 2
    assert set(first) == {"train.parquet", "test.parquet", "README.md"}
    rows = {name: len(pq.read_table(io.BytesIO(first[name]))) for name in ("train.parquet", "test.parquet")}
    assert sum(rows.values()) == 30
    assert len(hub.repositories["team/prefs"]["train.jsonl"].splitlines()) == 30


def test_a_held_out_split_does_not_outlive_an_export_without_one(tmp_path: Path) -> None:
    source = dataset(tmp_path, [row(i, 0.9) for i in range(30)])
    with HubServer() as hub:
        assert push(source, hub.url, "--push_to_hub", "prefs", "--split", "0.3").returncode == 0
        assert push(source, hub.url, "--push_to_hub", "prefs").returncode == 0
    files = hub.repositories[f"{OWNER}/prefs"]
    assert set(files) == {"train.parquet", "README.md"}
    assert len(pq.read_table(io.BytesIO(files["train.parquet"]))) == 30


def test_a_hub_that_refuses_is_asked_before_any_work(tmp_path: Path) -> None:
    source = dataset(tmp_path, [row(0, 0.9)])
    out = ("--output_file", str(tmp_path / "out.parquet"))
    with HubServer() as hub:
        told = {
            "unknown": push(source, hub.url, "--push_to_hub", "prefs", *out, token="hf_wrong"),
            "nobody": push(source, hub.url, "--push_to_hub", "prefs", *out, token=""),
            "strange": push(source, hub.url, "--push_to_hub", "a/b/c", *out),
        }
        url = hub.url
    told["absent"] = push(source, url, "--push_to_hub", "prefs", *out)
    assert hub.repositories == {}
    codes = {name: done.returncode for name, done in told.items()}
    assert codes == {"unknown": 2, "nobody": 2, "strange": 2, "absent": 5}, told
    assert "hf auth login" in told["unknown"].stderr and "hf auth login" in told["nobody"].stderr
    for done in told.values():
        assert sum(line.startswith("rlaif: ") for line in done.stderr.splitlines()) == 1
        assert "Traceback" not in done.stderr
    assert not (tmp_path / "out.parquet").exists()

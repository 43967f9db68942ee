import json
from pathlib import Path
from typing import Any

import grpc
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from policy_trainer.config import ScoreConfig
from policy_trainer.score import histogram, run
from rlaif.cli import main
from rlaif.errors import ConfigError, DataError, QualityError, RewardServerError, StorageError
from tests.policy_trainer.reward_servers import NumberServer, free_port, refusing, serving


def write_rows(path: Path, texts: list[str]) -> Path:
    rows = [{"id": i, "prompt": "say a number", "response": text} for i, text in enumerate(texts)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read_rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def config(folder: Path, address: str, **changes: Any) -> ScoreConfig:
    settings: dict[str, Any] = {
        "reward_server": address,
        "dataset": folder / "in.jsonl",
        "output": folder / "out.jsonl",
        "batch_size": 3,
        "max_in_flight": 1,
        "give_up_after_s": 10.0,
        "max_missing": 0.9,
    }
    return ScoreConfig(**{**settings, **changes})


def asked(server: NumberServer) -> list[str]:
    return [item.conversation.messages[-1].content for call in server.calls for item in call.items]


def test_rows_come_out_in_order_with_their_rewards(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_rows(tmp_path / "in.jsonl", [str(i) for i in range(8)])
    with serving(NumberServer()) as at:
        run(config(tmp_path, at))
    rows = read_rows(tmp_path / "out.jsonl")
    assert [row["id"] for row in rows] == list(range(8))
    assert [row["reward_raw"] for row in rows] == [float(i) for i in range(8)]
    assert [row["reward"] for row in rows] == [(i - 1.0) / 2.0 for i in range(8)]
    assert {row["reward_model"] for row in rows} == {"v1"}
    # normalised (0..7 - 1) / 2: mean 1.25; raw mean 3.5, population sd of 0..7 is sqrt(5.25) = 2.291
    out = capsys.readouterr().out
    assert "scored 8 of 8 conversations: reward mean 1.250, sd 1.146 (raw mean 3.500, sd 2.291)" in out


def test_an_item_error_is_null_with_a_reason(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_rows(tmp_path / "in.jsonl", ["1", "many", "3"])
    with serving(NumberServer()) as at:
        run(config(tmp_path, at))
    rows = read_rows(tmp_path / "out.jsonl")
    assert [row["reward_raw"] for row in rows] == [1.0, None, 3.0]
    assert rows[1]["reward"] is None and rows[1]["reward_reason"] == "out_of_range: many is no number"
    assert "missing: 1 out_of_range" in capsys.readouterr().out


def test_candidates_become_a_row_for_each_response(tmp_path: Path) -> None:
    """The file of a `rlaif sample` run, found by its folder; prompt, model and seed stay beside the reward."""
    said = [{"role": "user", "content": "say a number"}]
    drawn = [[("3", 11), ("5", 12)], [("3", 13)]]
    rows = [
        {
            "prompt": said,
            "completions": [{"response": text, "model": "hf:policy", "seed": seed} for text, seed in group],
        }
        for group in drawn
    ]
    (tmp_path / "candidates").mkdir()
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "candidates" / "candidates.parquet")
    for name in ("out.jsonl", "out.parquet"):
        with serving(NumberServer()) as at:
            run(config(tmp_path, at, dataset=tmp_path / "candidates", output=tmp_path / name))
    found = read_rows(tmp_path / "out.jsonl")
    assert [(row["response"], row["seed"], row["reward_raw"]) for row in found] == [
        ("3", 11, 3.0),
        ("5", 12, 5.0),
        ("3", 13, 3.0),
    ]
    assert all(row["prompt"] == said and row["model"] == "hf:policy" for row in found)
    assert not any("completions" in row for row in found)
    assert pq.read_table(tmp_path / "out.parquet").to_pylist() == found


def test_plain_responses_become_rows_and_a_broken_list_is_set_aside(tmp_path: Path) -> None:
    rows = [{"prompt": "p", "responses": ["1", "2"], "rewards": [0.5, 0.7]}, {"prompt": "p", "responses": []}]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with serving(NumberServer()) as at:
        run(config(tmp_path, at))
    assert [(row["response"], row["reward_raw"]) for row in read_rows(tmp_path / "out.jsonl")] == [
        ("1", 1.0),
        ("2", 2.0),
    ]
    (set_aside,) = read_rows(tmp_path / "out.quarantine.jsonl")
    assert set_aside["line"] == 2 and "at least one response" in set_aside["reason"]


def test_listed_responses_are_scored_and_not_the_answer_that_the_messages_end_with(tmp_path: Path) -> None:
    """As for whoever else reads candidates, such an answer is no part of the prompt."""
    turns = [{"role": "user", "content": "say a number"}, {"role": "assistant", "content": "9"}]
    row = {"messages": turns, "responses": ["1", "2"]}
    (tmp_path / "in.jsonl").write_text(json.dumps(row) + "\n")
    numbers = NumberServer()
    with serving(numbers) as at:
        run(config(tmp_path, at))
    assert [(row["response"], row["reward_raw"]) for row in read_rows(tmp_path / "out.jsonl")] == [
        ("1", 1.0),
        ("2", 2.0),
    ]
    asked = [[message.content for message in item.conversation.messages] for item in numbers.calls[0].items]
    assert asked == [["say a number", "1"], ["say a number", "2"]]


def test_a_file_of_another_origin_is_not_overwritten(tmp_path: Path) -> None:
    write_rows(tmp_path / "in.jsonl", ["1"])
    mine = write_rows(tmp_path / "out.jsonl", ["years of work"])
    before = mine.read_text()
    with serving(NumberServer()) as at, pytest.raises(StorageError, match=r"no out\.jsonl\.journal"):
        run(config(tmp_path, at))
    assert mine.read_text() == before


def test_another_model_is_asked_for_everything_once_journal_and_output_are_removed(tmp_path: Path) -> None:
    write_rows(tmp_path / "in.jsonl", ["1"])
    with serving(NumberServer()) as at:
        run(config(tmp_path, at))
    with serving(NumberServer(version="v2")) as at:
        with pytest.raises(StorageError, match="remove that file to ask for everything again"):
            run(config(tmp_path, at))
        (tmp_path / "out.jsonl.journal").unlink()
        with pytest.raises(StorageError, match=r"no out\.jsonl\.journal beside it .* remove it"):
            run(config(tmp_path, at))
        (tmp_path / "out.jsonl").unlink()
        run(config(tmp_path, at))
    (row,) = read_rows(tmp_path / "out.jsonl")
    assert row["reward_model"] == "v2"


def test_bad_rows_are_set_aside_with_their_line(tmp_path: Path) -> None:
    write_rows(tmp_path / "in.jsonl", ["1", "2"])
    with (tmp_path / "in.jsonl").open("a") as file:
        file.write('{"prompt": "no response"}\n{"broken\n')
    with serving(NumberServer()) as at:
        run(config(tmp_path, at))
    assert len(read_rows(tmp_path / "out.jsonl")) == 2
    assert [row["line"] for row in read_rows(tmp_path / "out.quarantine.jsonl")] == [3, 4]


def test_an_interrupted_run_goes_on_and_asks_for_nothing_twice(tmp_path: Path) -> None:
    write_rows(tmp_path / "in.jsonl", [str(i) for i in range(12)])
    first = NumberServer(moods=[lambda _: None, lambda _: None, refusing(grpc.StatusCode.INTERNAL, "crash")])
    with serving(first) as at, pytest.raises(RewardServerError, match="INTERNAL: crash"):
        run(config(tmp_path, at))
    assert not (tmp_path / "out.jsonl").exists()
    second = NumberServer()
    with serving(second) as at:
        run(config(tmp_path, at))
    journalled = [str(i) for i in range(6)]
    assert asked(first)[:6] == journalled
    assert sorted(asked(second), key=int) == [str(i) for i in range(6, 12)]
    assert [row["reward_raw"] for row in read_rows(tmp_path / "out.jsonl")] == [float(i) for i in range(12)]


def test_a_missing_reward_is_asked_for_again_by_the_next_run(tmp_path: Path) -> None:
    write_rows(tmp_path / "in.jsonl", ["1", "2", "many"])
    with serving(NumberServer()) as at:
        run(config(tmp_path, at))
    wiser = NumberServer(score=lambda text: 7.0 if text == "many" else -1.0)
    with serving(wiser) as at:
        run(config(tmp_path, at))
    assert asked(wiser) == ["many"]
    assert [row["reward_raw"] for row in read_rows(tmp_path / "out.jsonl")] == [1.0, 2.0, 7.0]


def test_the_same_conversation_is_scored_once(tmp_path: Path) -> None:
    write_rows(tmp_path / "in.jsonl", ["1", "1", "2", "1"])
    server = NumberServer()
    with serving(server) as at:
        run(config(tmp_path, at))
    assert sorted(asked(server)) == ["1", "2"]
    assert [row["reward_raw"] for row in read_rows(tmp_path / "out.jsonl")] == [1.0, 1.0, 2.0, 1.0]


def test_rewards_of_two_models_are_not_mixed(tmp_path: Path) -> None:
    write_rows(tmp_path / "in.jsonl", ["1"])
    with serving(NumberServer(version="v1")) as at:
        run(config(tmp_path, at))
    with serving(NumberServer(version="v2")) as at, pytest.raises(StorageError, match="another --output"):
        run(config(tmp_path, at))


def test_parquet_holds_the_columns_of_the_input_and_the_rewards(tmp_path: Path) -> None:
    write_rows(tmp_path / "in.jsonl", ["1", "many"])
    with serving(NumberServer()) as at:
        run(config(tmp_path, at, output=tmp_path / "out.parquet"))
    rows = pq.read_table(tmp_path / "out.parquet").to_pylist()
    assert [(r["id"], r["response"], r["reward_raw"]) for r in rows] == [(0, "1", 1.0), (1, "many", None)]


def test_columns_that_parquet_cannot_hold_are_said_before_anything_is_asked(tmp_path: Path) -> None:
    rows = [{"prompt": "p", "response": "1"}, {"prompt": [{"role": "user", "content": "p"}], "response": "2"}]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    numbers = NumberServer()
    with serving(numbers) as at, pytest.raises(DataError, match=r"FILE\.jsonl"):
        run(config(tmp_path, at, output=tmp_path / "out.parquet"))
    assert numbers.calls == []


def test_no_reward_at_all_is_an_error_after_the_reasons_are_written(tmp_path: Path) -> None:
    write_rows(tmp_path / "in.jsonl", ["few", "many"])
    with serving(NumberServer()) as at, pytest.raises(QualityError, match="2 of 2 rewards are missing"):
        run(config(tmp_path, at))
    assert len(read_rows(tmp_path / "out.jsonl")) == 2


def test_too_many_missing_rewards_are_an_error_after_all_is_written_and_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One of 20 is the share that may be missing, two are more; the next run asks for those alone."""
    numbers = [str(i) for i in range(19)]
    write_rows(tmp_path / "in.jsonl", [*numbers, "many"])
    write_rows(tmp_path / "worse.jsonl", [*numbers, "few 7", "few 12"])
    with serving(NumberServer(max_items=64)) as at:
        assert main(score_flags(at, tmp_path / "in.jsonl", tmp_path / "out.jsonl")) == 0
        capsys.readouterr()
        worse = score_flags(at, tmp_path / "worse.jsonl", tmp_path / "worse-out.jsonl")
        assert main(worse) == 8
    (error,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("rlaif:")]
    assert "2 of 21 rewards are missing, 2 because: out_of_range: few 7 is no number" in error
    assert "--truncation left" in error and "another --output" in error
    rows = read_rows(tmp_path / "worse-out.jsonl")
    assert [row["reward"] is None for row in rows] == [False] * 19 + [True] * 2
    wiser = NumberServer(score=lambda text: -1.0)
    with serving(wiser) as at:
        assert main([at if word == worse[2] else word for word in worse]) == 0
    assert asked(wiser) == ["few 7", "few 12"]


def score_flags(at: str, dataset: Path, output: Path) -> list[str]:
    return ["score", "--reward_server", at, "--dataset", str(dataset), "--output", str(output)]


@pytest.mark.parametrize("name", ["out.csv", "out.json", "out.jsonl.gz", "out"])
def test_an_output_that_would_not_be_what_its_name_says_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match=r"must end in \.parquet or \.jsonl"):
        config(tmp_path, "127.0.0.1:1", output=tmp_path / name)


def test_a_dead_server_is_one_line_and_exit_code_6(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_rows(tmp_path / "in.jsonl", ["1"])
    at = f"127.0.0.1:{free_port()}"
    flags = {
        "reward_server": at,
        "dataset": tmp_path / "in.jsonl",
        "output": tmp_path / "out.jsonl",
        "wait_s": 0.2,
    }
    code = main(["score", *(str(part) for name, value in flags.items() for part in (f"--{name}", value))])
    assert code == 6
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("rlaif:")]
    assert len(lines) == 1 and f"no reward server at {at} (connection refused)" in lines[0]


def test_the_output_must_not_be_the_input(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="another file"):
        config(tmp_path, "127.0.0.1:1", output=tmp_path / "in.jsonl")


def test_histogram_by_hand() -> None:
    # four bins over 0..4: counts 2, 0, 1, 1 -> heights 8/8, none, 4/8, 4/8
    assert histogram([0.0, 0.5, 2.5, 4.0], bins=4) == "█ ▄▄"
    assert histogram([3.0, 3.0], bins=3) == "█  "

"""The run directory: one run per folder, metrics that resume cleanly, nothing non-finite."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from rlaif.errors import ConfigError, DataError, QualityError, StorageError
from rlaif.runs import Run, library_versions, progress


@dataclass(frozen=True)
class Config:
    output_dir: Path
    learning_rate: float = 1e-5
    betas: tuple[float, ...] = (0.9, 0.95)
    dataset: Path | None = None
    max_in_flight: int = 4
    VOLATILE: ClassVar[frozenset[str]] = frozenset({"max_in_flight"})


def open_run(folder: Path, **changes: Any) -> Run:
    return Run.open(folder, replace(Config(folder), **changes), command="train ppo")


def test_run_json_says_what_was_asked_and_by_which_code(tmp_path: Path) -> None:
    run = open_run(tmp_path / "a" / "run", dataset=Path("x.jsonl"))
    assert not run.resumed
    record = json.loads((tmp_path / "a" / "run" / "run.json").read_text())
    assert record["command"] == "train ppo"
    assert record["config"] == {
        "output_dir": str(tmp_path / "a" / "run"),
        "learning_rate": 1e-5,
        "betas": [0.9, 0.95],
        "dataset": "x.jsonl",
        "max_in_flight": 4,
    }
    assert {"rlaif", "python", "torch", "transformers"} <= record["versions"].keys()


def test_versions_are_found_without_importing_the_libraries() -> None:
    code = "import sys, rlaif.runs as r; print(r.library_versions()['torch'], 'torch' in sys.modules)"
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    assert out == [library_versions()["torch"], "False"]


def test_the_same_configuration_continues_the_run(tmp_path: Path) -> None:
    started = json.loads((open_run(tmp_path).directory / "run.json").read_text())["started"]
    assert open_run(tmp_path).resumed
    record = json.loads((tmp_path / "run.json").read_text())
    assert (record["started"], len(record["resumed"])) == (started, 1)


def test_a_run_that_failed_before_it_had_a_result_leaves_its_folder_to_the_mended_command(
    tmp_path: Path,
) -> None:
    with pytest.raises(DataError), open_run(tmp_path, dataset=Path("nosuch")):
        (tmp_path / "quarantine.jsonl").write_text("")
        raise DataError("cannot read nosuch")
    with pytest.raises(QualityError), open_run(tmp_path, dataset=Path("x")) as run:
        run.log(1, {"loss": 1.0})
        raise QualityError("the loss is not finite")
    with pytest.raises(StorageError, match="dataset"):  # there is a metric to protect
        open_run(tmp_path, dataset=Path("y"))


def test_a_run_that_was_interrupted_keeps_its_folder(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), open_run(tmp_path):
        raise KeyboardInterrupt
    assert open_run(tmp_path).resumed


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (KeyboardInterrupt(), "interrupted"),
        (QualityError("too many\nare missing"), "too many are missing"),
        (ZeroDivisionError("by 0"), "ZeroDivisionError: by 0"),
    ],
)
def test_how_a_command_without_steps_ended_is_on_record_until_it_is_run_again(
    error: BaseException, reason: str, tmp_path: Path
) -> None:
    with pytest.raises(type(error)), open_run(tmp_path) as run, run.noting_errors():
        (tmp_path / "answers.jsonl").write_text("paid\n")
        raise error
    ended = json.loads((tmp_path / "run.json").read_text())["ended"]
    assert (ended["step"], ended["reason"]) == (None, reason)
    with open_run(tmp_path) as run, run.noting_errors():
        assert "ended" not in json.loads((tmp_path / "run.json").read_text())
    assert "ended" not in json.loads((tmp_path / "run.json").read_text())


def test_a_volatile_field_or_another_path_to_the_folder_may_differ(tmp_path: Path) -> None:
    open_run(tmp_path)
    assert open_run(tmp_path, max_in_flight=9, output_dir=tmp_path / ".." / tmp_path.name).resumed


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"learning_rate": 3e-6}, "learning_rate=1e-05, this one has 3e-06"),
        ({"betas": (0.9,)}, r"betas=\[0.9, 0.95\], this one has \[0.9\]"),
        ({"dataset": Path("y")}, "dataset=None, this one has 'y'"),
    ],
    ids=["float", "tuple", "path"],
)
def test_another_configuration_is_refused_by_the_field_that_differs(
    tmp_path: Path, change: dict[str, Any], said: str
) -> None:
    open_run(tmp_path)
    before = (tmp_path / "run.json").read_bytes()
    with pytest.raises(StorageError, match=said):
        open_run(tmp_path, **change)
    assert (tmp_path / "run.json").read_bytes() == before


def test_a_run_that_another_process_writes_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    with open_run(tmp_path):
        before = (tmp_path / "run.json").read_bytes()
        with pytest.raises(StorageError, match="being written by another process"):
            open_run(tmp_path, max_in_flight=9)
        assert (tmp_path / "run.json").read_bytes() == before
    assert open_run(tmp_path).resumed


class SlowTracker:
    """Tries to open the run a second time while it flushes."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.refused = folder, False

    def log(self, step: int, values: Mapping[str, float | int]) -> None:
        """Nothing to buffer."""

    def close(self) -> None:
        with pytest.raises(StorageError, match="being written by another process"):
            open_run(self.folder)
        self.refused = True


@pytest.mark.parametrize("how", ["close", "exit"])
def test_a_run_is_held_until_its_trackers_have_flushed(tmp_path: Path, how: str) -> None:
    run, tracker = open_run(tmp_path), SlowTracker(tmp_path)
    run._trackers = [tracker]
    if how == "close":
        run.close()
    else:
        with run:
            pass
    assert tracker.refused
    assert open_run(tmp_path).resumed


def test_another_command_is_refused(tmp_path: Path) -> None:
    open_run(tmp_path)
    with pytest.raises(StorageError, match="holds a run of `rlaif train ppo`, this is `rlaif train dpo`"):
        Run.open(tmp_path, Config(tmp_path), command="train dpo")


def test_a_run_of_an_earlier_release_goes_on_if_what_it_could_not_set_is_at_its_default(
    tmp_path: Path,
) -> None:
    @dataclass(frozen=True)
    class Later(Config):
        clip: float = 0.2

    open_run(tmp_path)
    with pytest.raises(StorageError, match=r"clip=0\.2, this one has 0\.5"):
        Run.open(tmp_path, Later(tmp_path, clip=0.5), command="train ppo")
    assert Run.open(tmp_path, Later(tmp_path), command="train ppo").resumed
    with pytest.raises(StorageError, match="holds a run with learning_rate"):
        Run.open(tmp_path, Later(tmp_path, learning_rate=1.0), command="train ppo")


@pytest.mark.parametrize("content", ["{", "[]", "{}"])
def test_a_run_json_of_something_else_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(StorageError, match="choose another --output_dir"):
        open_run(tmp_path)


def test_a_volatile_name_that_is_no_field_is_a_mistake() -> None:
    @dataclass(frozen=True)
    class Wrong:
        seed: int = 0
        VOLATILE: ClassVar[frozenset[str]] = frozenset({"sede"})

    with pytest.raises(ConfigError, match="sede"):
        Run.identity(Wrong())


def test_metrics_are_lines_and_tensorboard_scalars(tmp_path: Path) -> None:
    with open_run(tmp_path) as run:
        run.log(1, {"loss/policy_avg": 0.5, "episode": 8, "reward/mean": None, "kl": np.float32(0.25)})
        run.log(2, {"loss/policy_avg": 0.25})
        assert run.metrics() == [
            {"step": 1, "loss/policy_avg": 0.5, "episode": 8, "reward/mean": None, "kl": 0.25},
            {"step": 2, "loss/policy_avg": 0.25},
        ]
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(tmp_path / "tb"))  # type: ignore[no-untyped-call]
    board.Reload()  # type: ignore[no-untyped-call]
    scalars = [(s.step, s.value) for s in board.Scalars("loss/policy_avg")]  # type: ignore[no-untyped-call]
    assert scalars == [(1, 0.5), (2, 0.25)]
    assert "reward/mean" not in board.Tags()["scalars"]  # type: ignore[no-untyped-call]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), np.float32("nan")])
def test_a_non_finite_metric_is_refused_and_nothing_is_written(tmp_path: Path, value: float) -> None:
    with open_run(tmp_path) as run:
        with pytest.raises(QualityError, match=r"loss is .* at step 3"):
            run.log(3, {"fine": 1.0, "loss": value})
        assert run.metrics() == []


def test_a_metric_must_be_a_number(tmp_path: Path) -> None:
    with open_run(tmp_path) as run, pytest.raises(TypeError, match="metric loss must be a number"):
        run.log(1, {"loss": "0.5"})  # type: ignore[dict-item]


def test_resuming_from_a_step_drops_later_metrics_and_a_torn_line(tmp_path: Path) -> None:
    with open_run(tmp_path) as run:
        for step in range(1, 6):
            run.log(step, {"loss": 1 / step})
        kept = run.metrics()[:3]
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')
    with open_run(tmp_path) as run:
        run.truncate_metrics(3)
        run.log(4, {"loss": 0.25})
        assert run.metrics() == [*kept, {"step": 4, "loss": 0.25}]


def test_a_torn_line_is_cut_before_the_next_metric_is_appended(tmp_path: Path) -> None:
    open_run(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"st')
    with open_run(tmp_path) as run:
        run.log(2, {})
        assert run.metrics() == [{"step": 1}, {"step": 2}]


def test_samples_are_one_file_per_step(tmp_path: Path) -> None:
    path = open_run(tmp_path).samples(7, [{"prompt": "p", "response": "ü"}, {"prompt": "q", "response": ""}])
    assert path == tmp_path / "samples" / "step-000007.jsonl"
    assert [json.loads(line)["response"] for line in path.read_text().splitlines()] == ["ü", ""]


def test_progress_off_a_terminal_ends_with_one_plain_line(capsys: pytest.CaptureFixture[str]) -> None:
    with progress(4, "labeling pairs") as bar:
        bar.advance(1, tokens=100, loss=0.123456)
        bar.advance(2, tokens=300)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert re.fullmatch(r"labeling pairs: 3/4 in 0:00, [\d.]+/s, 0:00 left tokens=300 loss=0.1235", lines[0])


def test_the_rate_and_the_time_left_do_not_count_what_an_earlier_run_has_done(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """One item in a few microseconds is no 10**9 of them in a second, whatever was there before."""
    with progress(10**9 + 2, "steps", done=10**9) as bar:
        bar.advance(1)
    with progress(6, "steps", done=6):
        pass
    resumed, finished = capsys.readouterr().err.splitlines()
    found = re.fullmatch(r"steps: 1000000001/1000000002 in [\d:]+, ([\d.]+)/s, [\d:]+ left", resumed)
    assert found is not None and float(found[1]) < 10**9
    assert finished == "steps: 6/6 in 0:00"

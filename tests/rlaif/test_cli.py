"""The command line: flags, config files, one clear line per mistake, exit codes, signals."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rlaif import cli, errors
from tests.rlaif.example_command import ExampleConfig

EXAMPLE = cli.Command(
    "train example",
    "an example",
    "tests.rlaif.example_command:ExampleConfig",
    "tests.rlaif.example_command:run",
)
# A job that a shell started in the background inherits an ignored SIGINT; the command is tried as a terminal starts it.
PROGRAM = f"""
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
from rlaif import cli
from rlaif.cli import Command
sys.exit(cli.main(commands=[{EXAMPLE!r}]))
"""


def words(value: object) -> str | None:
    """Ids of parametrised command lines; other values get none of their own."""
    return " ".join(value) or "nothing" if isinstance(value, list) else ""


def parse(*arguments: str) -> ExampleConfig:
    config: ExampleConfig = cli.parse_config(EXAMPLE, ["--output_dir", "out", *arguments])
    return config


def rlaif(repository: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", PROGRAM, *arguments],
        capture_output=True,
        text=True,
        check=False,
        cwd=repository,
    )


@pytest.mark.parametrize(
    ("arguments", "field", "value"),
    [
        (["--learning_rate", "3e-6"], "learning_rate", 3e-6),
        (["--learning-rate=3e-6"], "learning_rate", 3e-6),
        (["--learning_rate", "1", "--learning_rate", "2"], "learning_rate", 2.0),
        (["--kind", "hinge"], "kind", "hinge"),
        (["--no_cot"], "cot", False),
        (["--no-cot"], "cot", False),
        (["--no_cot", "--cot"], "cot", True),
        (["--names", "a", "b"], "names", ("a", "b")),
        (["--names", "a", "b", "--names", "c"], "names", ("c",)),
        (["--eval_dataset", "x.jsonl"], "eval_dataset", Path("x.jsonl")),
        (["--eval_dataset", "x.jsonl", "--eval_dataset", "None"], "eval_dataset", None),
    ],
    ids=words,
)
def test_flags(arguments: list[str], field: str, value: object) -> None:
    assert getattr(parse(*arguments), field) == value


FILE = """\
learning_rate: 3e-6
kind: hinge
cot: false
names: [a, b]
eval_dataset: null
seed: 7
"""


def test_a_config_file_fills_flags_and_the_command_line_wins_wherever_it_stands(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(FILE)
    assert parse("--config", str(path)) == ExampleConfig(
        Path("out"), 3e-6, "hinge", False, ("a", "b"), None, 7
    )
    changed = ExampleConfig(Path("out"), 3e-6, "sigmoid", True, ("c",), Path("e"), 8)
    flags = ["--kind", "sigmoid", "--cot", "--names", "c", "--eval_dataset", "e", "--seed", "8"]
    assert parse(*flags, "--config", str(path)) == changed
    assert parse(f"--config={path}", *flags) == changed


def test_of_two_config_files_the_later_wins(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("seed: 1\nkind: hinge\n")
    (tmp_path / "b.yaml").write_text("seed: 2\n")
    config = parse("--config", str(tmp_path / "a.yaml"), "--config", str(tmp_path / "b.yaml"))
    assert (config.seed, config.kind) == (2, "hinge")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("learning_rat: 1", "has the key 'learning_rat', which is no flag; did you mean learning_rate?"),
        ("zzz: 1", "has the key 'zzz', which is no flag; see rlaif train example --help"),
        ("- 1", "must hold `flag: value` lines"),
        ("a: [", "cannot be read"),
        ("learning_rate: fast", "Error parsing --learning_rate"),
        ("seed: -1", "--seed must not be negative, not -1"),
    ],
)
def test_a_wrong_config_file_gets_one_line(tmp_path: Path, content: str, said: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(content)
    with pytest.raises(errors.ConfigError) as caught:
        parse("--config", str(path))
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nope"], "no command 'nope'; choose one of: demo, lab, sample,"),
        (["train", "nope"], "no command 'train nope'; choose one of: train sft, train rm,"),
        (["train", "grpo"], "no command 'train grpo'; it is `rlaif train ppo --advantage_estimator grpo`"),
        (["train", "best-of-n"], "no command 'train best-of-n'; it is `rlaif train best_of_n`"),
        (["train", "example"], "`rlaif train example` needs --output_dir"),
        (
            ["train", "example", "--output_dir", "x", "--lerning_rate", "1"],
            "no flag --lerning_rate; did you mean --learn",
        ),
        (["sample", "--model", "hf:m"], "has no flag --model; did you mean --model_name_or_path?"),
        (["label", "pairs", "--model=hf:m"], "has no flag --model; did you mean --judge?"),
        (["label", "pairs", "--model-name-or-path", "m"], "_path; did you mean --judge?"),
        (["serve", "--model_name_or_path", "m"], "did you mean --model?"),
        (["label", "pairs", "--out", "x"], "has no flag --out; did you mean --output_dir?"),
        (["export", "--out", "x"], "has no flag --out; did you mean --output_file?"),
        (["train", "example", "--output_dir", "x", "--seed", "many"], "Error parsing --seed"),
        (
            ["train", "example", "--output_dir", "x", "--kind", "l2"],
            "invalid choice 'l2' for argument '--kind'",
        ),
        (["train", "example", "--output_dir", "x", "more"], "Unrecognized options: more"),
        (["train", "example", "--output_dir", "x", "--seed", "-1"], "--seed must not be negative, not -1"),
        (["train", "example", "--config", "nope.yaml"], "config file nope.yaml cannot be read"),
        (["train", "example", "--config"], "--config needs a file"),
    ],
    ids=words,
)
def test_a_wrong_command_line_gets_one_line_and_exit_code_2(
    capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    assert with_example(*arguments) == errors.ConfigError.exit_code == 2
    captured = capsys.readouterr()
    assert said in captured.err
    assert (captured.err.count("\n"), captured.out) == (1, "")
    assert captured.err.startswith("rlaif: ")


def with_example(*arguments: str) -> int:
    """`rlaif ...` in this process, with the example among its commands."""
    return cli.main(arguments, (*cli.COMMANDS, EXAMPLE))


def test_an_error_of_a_command_is_one_line_with_its_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    code = with_example("train", "example", "--output_dir", "x", "--do", "fail")
    assert (code, capsys.readouterr().err) == (
        errors.DataError.exit_code,
        "rlaif: in.jsonl has no usable row\n",
    )


def test_debug_shows_where_an_error_came_from(capsys: pytest.CaptureFixture[str]) -> None:
    assert with_example("--debug", "train", "example", "--output_dir", "x", "--do", "fail") == 3
    assert "Traceback" in capsys.readouterr().err


def test_a_full_disk_anywhere_is_a_storage_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        with_example("train", "example", "--output_dir", "x", "--do", "disk_full")
        == errors.StorageError.exit_code
    )
    assert capsys.readouterr().err.splitlines() == [
        "rlaif: [Errno 28] No space left on device: 'somewhere'; free some space and run the same command again"
    ]


def test_a_bug_keeps_its_traceback() -> None:
    with pytest.raises(ZeroDivisionError, match="a bug"):
        with_example("train", "example", "--output_dir", "x", "--do", "crash")


def signalled(repository: Path, do: str, says: str, number: int) -> tuple[int, str, str]:
    """What a command that does this ends with, when a signal comes after it `says` so: code, stdout, stderr."""
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM, "train", "example", "--output_dir", "x", "--do", do],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=repository,
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        while not process.stdout.readline().startswith(says):
            assert process.poll() is None, process.stderr.read()
        process.send_signal(number)
        out, err = process.communicate(timeout=30)
    return process.returncode, out, err


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_a_command_with_one_line(repository: Path, number: int, code: int) -> None:
    ended = signalled(repository, "wait", "ExampleConfig", number)
    assert ended == (code, "", "rlaif: interrupted; run the same command again to go on\n")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_after_the_first_do_not_fail_a_command_that_serves(repository: Path, number: int) -> None:
    """One comes while it drains, the others when its event loop is gone; a supervisor reads the exit code."""
    assert signalled(repository, "serve", "serving", number) == (0, "drained\n", "")


def test_exit_codes_reach_the_shell(repository: Path) -> None:
    done = rlaif(repository, "train", "example", "--output_dir", "x", "--do", "fail")
    assert (done.returncode, done.stderr) == (3, "rlaif: in.jsonl has no usable row\n")


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"], ["train"], ["label", "--help"]], ids=words)
def test_help_lists_every_command(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    assert cli.main(arguments) == 0
    out = capsys.readouterr().out
    assert all(command.name in out for command in cli.COMMANDS)


def test_help_of_a_command_shows_flags_with_underscores_and_their_docstrings(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as ended:
        with_example("train", "example", "--help")
    assert ended.value.code == 0
    out = capsys.readouterr().out
    assert "--learning_rate" in out and "Step size." in out and "--cot, --no_cot" in out


def test_the_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("rlaif 0.")


def test_every_error_has_an_exit_code_that_a_script_can_tell_apart() -> None:
    own: dict[int, type[Any]] = {}
    for kind in vars(errors).values():
        if isinstance(kind, type) and issubclass(kind, errors.RlaifError) and "exit_code" in vars(kind):
            assert own.setdefault(kind.exit_code, kind) is kind
    assert sorted(own) == list(range(1, len(own) + 1))


@pytest.mark.parametrize("meant", sorted(set(cli.SPELLED_ELSEWHERE.values())))
def test_a_method_under_its_own_name_is_a_command_with_flags_that_exist(meant: str) -> None:
    command, flags = cli.find_command(meant.split())
    given = ["--model_name_or_path", "m", "--dataset", "d", "--output_dir", "o"]
    if command.name != "train rm":
        given += ["--reward_server", "localhost:1", "--num_generations", "2"]
    config = cli.parse_config(command, [*flags, *given])
    for flag, value in zip(flags[::2], flags[1::2], strict=True):
        assert getattr(config, flag[2:]) == value

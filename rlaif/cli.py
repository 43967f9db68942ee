"""The one command. Parses first and imports the heavy libraries after, so that `rlaif --help` answers at once.

Each command is a frozen dataclass in a torch-free `config` module (its fields are the flags) and a `run`
function that takes it. `--config FILE.yaml` fills flags of the same names; flags on the command line win.
"""

from __future__ import annotations

import errno
import io
import os
import signal
import sys
import threading
import traceback
from collections.abc import Container, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import MISSING, dataclass, fields
from difflib import get_close_matches
from importlib import import_module
from itertools import takewhile
from pathlib import Path
from types import FrameType
from typing import Any

from rlaif.errors import ConfigError, RlaifError, StorageError


@dataclass(frozen=True, slots=True)
class Command:
    """One subcommand: where its config class and its run function live (`module:attribute`).

    Words before the first flag stand for the flag `takes`: `rlaif review DIR` is `rlaif review --dataset DIR`.
    """

    name: str
    help: str
    config: str
    run: str
    takes: str = ""


COMMANDS = (
    Command(
        "demo", "the whole loop in the embedded world; ends with a report",
        "tinyworld.config:DemoConfig", "tinyworld.demo:run",
    ),
    Command(
        "lab", "studies in the embedded world: what labels and rewards are worth",
        "tinyworld.lab.config:LabConfig", "tinyworld.lab.command:run", takes="study",
    ),
    Command(
        "sample", "candidates from a policy",
        "labeler.config:SampleConfig", "labeler.sample:run",
    ),
    Command(
        "label pairs", "a judge compares pairs -> preference dataset",
        "labeler.config:PairsConfig", "labeler.pairs:run",
    ),
    Command(
        "label scores", "a judge scores responses 1-10 -> score dataset",
        "labeler.config:ScoresConfig", "labeler.scores:run",
    ),
    Command(
        "label rank", "a judge ranks several responses -> rankings, leaderboard",
        "labeler.config:RankConfig", "labeler.rank:run",
    ),
    Command(
        "label revise", "critique and revision by principles -> data for SFT",
        "labeler.config:ReviseConfig", "labeler.revise:run",
    ),
    Command(
        "label status", "how far a labeling run is, while it runs or after",
        "labeler.config:StatusConfig", "labeler.status:run",
    ),
    Command(
        "review", "people look at labels in a browser, and mark what they prefer",
        "labeler.review.config:ReviewConfig", "labeler.review.command:run", takes="dataset",
    ),
    Command(
        "export", "a preference dataset -> TRL, JSONL, Parquet, the hub",
        "labeler.export.config:ExportConfig", "labeler.export.command:run",
    ),
    Command(
        "eval judge", "what labels are worth: agreement with people, biases, calibration, attacks",
        "labeler.audit.config:EvaluateConfig", "labeler.audit.evaluate:run",
    ),
    Command(
        "eval rm", "what a reward model is worth: accuracy, calibration, length bias",
        "reward_server.evaluation.config:EvaluateConfig", "reward_server.evaluation.evaluate:run",
    ),
    Command(
        "eval policy", "what a policy is worth: win rates, length-controlled too, reward against KL",
        "policy_trainer.evaluation.config:EvaluatePolicyConfig", "policy_trainer.evaluation.evaluate:run",
    ),
    Command(
        "train sft", "supervised fine-tuning",
        "policy_trainer.config:SFTConfig", "policy_trainer.sft:run",
    ),
    Command(
        "train rm", "reward model, or an ensemble, from preferences or scores",
        "reward_server.training.config:RewardModelConfig", "reward_server.training.train:run",
    ),
    Command(
        "train ppo", "online PPO against a reward server",
        "policy_trainer.config:PPOConfig", "policy_trainer.ppo:run",
    ),
    Command(
        "train dpo", "iterative DPO against a reward server",
        "policy_trainer.config:DPOConfig", "policy_trainer.dpo:run",
    ),
    Command(
        "train best_of_n", "fine-tuning on the best of n responses against a reward server",
        "policy_trainer.config:BestOfNConfig", "policy_trainer.best_of_n:run",
    ),
    Command(
        "watch", "training runs side by side, while they run or after",
        "rlaif.watch:WatchConfig", "rlaif.watch:run", takes="runs",
    ),
    Command(
        "report", "one HTML page about a run, or about several side by side",
        "rlaif.report.config:ReportConfig", "rlaif.report.command:run", takes="runs",
    ),
    Command(
        "serve", "reward server (gRPC): a learned RM or a direct judge",
        "reward_server.config:ServeConfig", "reward_server.server:run",
    ),
    Command(
        "score", "score a file of conversations with a reward server",
        "policy_trainer.config:ScoreConfig", "policy_trainer.score:run",
    ),
    Command(
        "models list", "the models that a reward server holds",
        "policy_trainer.config:ModelsConfig", "policy_trainer.admin:list_models",
    ),
    Command(
        "models load", "load a reward model beside the one that serves, or swap to it",
        "policy_trainer.config:LoadModelConfig", "policy_trainer.admin:load",
    ),
    Command(
        "models activate", "let a loaded model serve from now on",
        "policy_trainer.config:ActivateModelConfig", "policy_trainer.admin:activate",
    ),
    Command(
        "models unload", "free a model that does not serve",
        "policy_trainer.config:UnloadModelConfig", "policy_trainer.admin:unload",
    ),
)  # fmt: skip


SPELLED_ELSEWHERE = {
    "train grpo": "train ppo --advantage_estimator grpo",
    "train dr_grpo": "train ppo --advantage_estimator dr_grpo",
    "train rloo": "train ppo --advantage_estimator rloo",
    "train reinforce": "train ppo --advantage_estimator reinforce",
    "train online_dpo": "train dpo",
    "train iterative_dpo": "train dpo",
    "train kto": "train dpo --loss_type kto",
    "train ipo": "train dpo --loss_type ipo",
    "train raft": "train best_of_n",
    "train rejection_sampling": "train best_of_n",
    "train reward": "train rm",
    "train reward_model": "train rm",
}
"""Methods that people look for by their own names, and the commands that are them."""


FLAGS_ELSEWHERE = {
    "model": ("model_name_or_path", "judge"),
    "model_name_or_path": ("model", "judge"),
    "out": ("output_dir", "output_file", "output"),
    "output": ("output_dir", "output_file"),
}
"""What a flag that another command has, or people look for, is called; the first that the command has is meant."""


def usage(commands: Sequence[Command] = COMMANDS) -> str:
    """The text of `rlaif --help`."""
    width = max(len(c.name) for c in commands)
    lines = [f"  {c.name:<{width}}  {c.help}" for c in commands]
    return "\n".join(
        [
            "usage: rlaif COMMAND [--config FILE.yaml] [--flag VALUE ...]",
            "",
            "Reinforcement learning from AI feedback: label, serve, train.",
            "",
            "commands:",
            *lines,
            "",
            "A model is named BACKEND:NAME everywhere: openai:NAME@BASE_URL, hf:NAME_OR_PATH, tinyworld:judge|policy.",
            "Each command explains its flags: rlaif COMMAND --help. Add --debug for tracebacks.",
        ]
    )


def find_command(argv: Sequence[str], commands: Sequence[Command] = COMMANDS) -> tuple[Command, list[str]]:
    """The command that `argv` names, and the arguments that remain.

    Raises:
        ConfigError: no such command.
    """
    for words in (2, 1):
        name = " ".join(argv[:words])
        for command in commands:
            if command.name == name:
                return command, list(argv[words:])
    plain = " ".join(argv[:2]).replace("-", "_")
    names = [c.name for c in commands]
    if meant := SPELLED_ELSEWHERE.get(plain, plain if plain in names else None):
        raise ConfigError(f"no command {' '.join(argv[:2])!r}; it is `rlaif {meant}`")
    group = [c.name for c in commands if c.name.startswith(f"{argv[0]} ")]
    named = argv[:2] if group else argv[:1]
    known = ", ".join(group or names)
    raise ConfigError(f"no command {' '.join(named)!r}; choose one of: {known} (rlaif --help)")


def parse_config(command: Command, argv: Sequence[str]) -> Any:
    """Build the command's config from `--config FILE` and flags.

    Raises:
        ConfigError: the file, a flag or a value cannot be used, or a required flag is missing.
        SystemExit: `--help` was asked for (code 0).
    """
    import tyro

    config_class: type[Any] = _load(command.config)
    names = [field.name for field in fields(config_class) if field.init]
    if command.takes and argv and not argv[0].startswith("-"):
        argv = [f"--{command.takes}", *argv]
    # Types are read as written: every config has postponed annotations.
    switches = {field.name for field in fields(config_class) if field.type in ("bool", bool)}
    arguments = _file_flags(argv, names, switches, command)
    if not {"-h", "--help"} & set(arguments):
        _check_flags(arguments, config_class, command)
    # tyro reports every ValueError as its own; building the config apart from it lets a ConfigError through untouched.
    unchecked = type(
        config_class.__name__,
        (config_class,),
        {"__post_init__": lambda self: None, "__doc__": config_class.__doc__},
    )
    report = io.StringIO()
    try:
        with redirect_stderr(report):
            parsed: Any = tyro.cli(
                unchecked,
                prog=f"rlaif {command.name}",
                description=config_class.__doc__,
                args=arguments,
                use_underscores=True,
            )
    except SystemExit as err:
        if not err.code:
            raise
        raise ConfigError(f"{_first_paragraph(report.getvalue())} (rlaif {command.name} --help)") from err
    return config_class(**{name: getattr(parsed, name) for name in names})


def _check_flags(arguments: Sequence[str], config_class: type[Any], command: Command) -> None:
    """Refuse flags that do not exist and name those that are missing, in one line each."""
    names = [field.name for field in fields(config_class) if field.init]
    given = [a[2:].partition("=")[0].replace("-", "_") for a in arguments if a.startswith("--")]
    for name in given:
        if name not in names and name.removeprefix("no_") not in names:
            raise ConfigError(
                f"`rlaif {command.name}` has no flag --{name}; {_nearest(name, names, command, '--')}"
            )
    required = [
        f.name
        for f in fields(config_class)
        if f.init and f.default is MISSING and f.default_factory is MISSING
    ]
    if missing := [f"--{name}" for name in required if name not in given]:
        raise ConfigError(
            f"`rlaif {command.name}` needs {' and '.join(missing)} (rlaif {command.name} --help)"
        )


def _nearest(name: str, names: Sequence[str], command: Command, dashes: str = "") -> str:
    meant = FLAGS_ELSEWHERE.get(name, ())
    close = [flag for flag in meant if flag in names] or get_close_matches(name, names, n=1)
    return f"did you mean {dashes}{close[0]}?" if close else f"see rlaif {command.name} --help"


def _first_paragraph(box: str) -> str:
    """The text of a tyro error box down to its first rule, on one line."""
    lines = [line.strip("│ ") for line in box.splitlines() if line.startswith("│")]
    text = takewhile(lambda line: not line.startswith("─"), lines)
    return " ".join(" ".join(text).split()) or " ".join(box.split())


def _file_flags(
    argv: Sequence[str], names: Sequence[str], switches: Container[str], command: Command
) -> list[str]:
    """Replace `--config FILE` by the flags that FILE holds, placed first so that the command line wins.

    `switches` are the flags that are there or not; `bool | None` takes a value.
    """
    rest: list[str] = []
    flags: list[str] = []
    arguments = iter(argv)
    for argument in arguments:
        name, _, file = argument.partition("=")
        if name != "--config":
            rest.append(argument)
            continue
        file = file or next(arguments, "")
        if not file:
            raise ConfigError("--config needs a file: --config run.yaml")
        flags += _read_flags(Path(file), names, switches, command)
    return flags + rest


def _read_flags(path: Path, names: Sequence[str], switches: Container[str], command: Command) -> list[str]:
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as err:
        raise ConfigError(f"config file {path} cannot be read: {' '.join(str(err).split())}") from err
    if not isinstance(content, dict):
        raise ConfigError(f"config file {path} must hold `flag: value` lines")
    flags = []
    for key, value in content.items():
        if key not in names:
            hint = _nearest(str(key), names, command)
            raise ConfigError(f"config file {path} has the key {key!r}, which is no flag; {hint}")
        flags += _flag(key, value, is_switch=key in switches)
    return flags


def _flag(key: str, value: object, *, is_switch: bool) -> list[str]:
    if isinstance(value, bool) and is_switch:
        return [f"--{key}" if value else f"--no_{key}"]
    if isinstance(value, list):
        return [f"--{key}", *map(str, value)]
    return [f"--{key}={value}"]


def _load(target: str) -> Any:
    module, _, attribute = target.partition(":")
    return getattr(import_module(module), attribute)


class _Terminated(KeyboardInterrupt):
    """SIGTERM, which ends a command as Ctrl-C does: what is on the disk stays usable."""


@contextmanager
def _sigterm_interrupts() -> Iterator[None]:
    """Let SIGTERM unwind the stack unless the command installs a handler of its own, as the server does."""

    def terminate(signum: int, frame: FrameType | None) -> None:
        raise _Terminated

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        if signal.getsignal(signal.SIGTERM) is terminate:
            signal.signal(signal.SIGTERM, before)


def main(argv: Sequence[str] | None = None, commands: Sequence[Command] = COMMANDS) -> int:
    """Run one command and return its exit code; errors are one line on stderr (see `rlaif.errors`)."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    arguments = [a for a in arguments if a != "--debug"]
    groups = {c.name.partition(" ")[0] for c in commands if " " in c.name}
    if arguments and arguments[0] in groups and (arguments[1:2] or ["-h"])[0] in ("-h", "--help"):
        arguments = arguments[1:]
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage(commands))
        return 0
    if arguments[0] == "--version":
        from rlaif import __version__

        print(f"rlaif {__version__}")
        return 0
    try:
        with _sigterm_interrupts():
            command, rest = find_command(arguments, commands)
            config = parse_config(command, rest)
            _load(command.run)(config)
    except RlaifError as err:
        return _failed(str(err), err.exit_code, debug)
    except BrokenPipeError:  # the reader of our output has seen enough, as in `rlaif ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as err:
        if err.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        return _failed(
            f"{err}; free some space and run the same command again", StorageError.exit_code, debug
        )
    except KeyboardInterrupt as err:
        code = 143 if isinstance(err, _Terminated) else 130
        return _failed("interrupted; run the same command again to go on", code, debug)
    return 0


def _failed(message: str, exit_code: int, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    print(f"rlaif: {' '.join(message.split())}", file=sys.stderr)
    return exit_code


if __name__ == "__main__":
    sys.exit(main())

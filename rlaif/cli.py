"""The one command. Parses first and imports the heavy libraries after, so that `rlaif --help` answers at once.

Each command is a frozen dataclass in a torch-free `config` module (its fields are the flags) and a `run`
function that takes it. `--config FILE.yaml` fills flags of the same names; flags on the command line win.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, is_dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from rlaif.errors import ConfigError, RlaifError


@dataclass(frozen=True, slots=True)
class Command:
    """One subcommand: where its config class and its run function live (`module:attribute`)."""

    name: str
    help: str
    config: str
    run: str


COMMANDS = (
    Command(
        "demo", "the whole loop in the embedded world; ends with a report",
        "tinyworld.config:DemoConfig", "tinyworld.demo:run",
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
        "train sft", "supervised fine-tuning",
        "policy_trainer.config:SFTConfig", "policy_trainer.sft:run",
    ),
    Command(
        "train rm", "reward model from soft preferences",
        "reward_server.config:RewardModelConfig", "reward_server.train:run",
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
        "serve", "reward server (gRPC): a learned RM or a direct judge",
        "reward_server.config:ServeConfig", "reward_server.server:run",
    ),
    Command(
        "score", "score a file of conversations with a reward server",
        "policy_trainer.config:ScoreConfig", "policy_trainer.score:run",
    ),
)  # fmt: skip


def usage() -> str:
    """The text of `rlaif --help`."""
    width = max(len(c.name) for c in COMMANDS)
    lines = [f"  {c.name:<{width}}  {c.help}" for c in COMMANDS]
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


def find_command(argv: Sequence[str]) -> tuple[Command, list[str]]:
    """The command that `argv` names, and the arguments that remain.

    Raises:
        ConfigError: no such command.
    """
    for words in (2, 1):
        name = " ".join(argv[:words])
        for command in COMMANDS:
            if command.name == name:
                return command, list(argv[words:])
    group = [c.name for c in COMMANDS if c.name.startswith(f"{argv[0]} ")]
    known = ", ".join(group or [c.name for c in COMMANDS])
    raise ConfigError(f"no command {' '.join(argv[:2])!r}; choose one of: {known} (rlaif --help)")


def parse_config(command: Command, argv: Sequence[str]) -> Any:
    """Build the command's config from `--config FILE` and flags.

    Raises:
        ConfigError: the file or a value cannot be used.
        SystemExit: a flag is unknown or missing (code 2), or `--help` was asked for (code 0).
    """
    import tyro

    config_class = _load(command.config)
    assert is_dataclass(config_class)
    arguments = _file_flags(argv)
    return tyro.cli(
        config_class,
        prog=f"rlaif {command.name}",
        description=config_class.__doc__,
        args=arguments,
    )


def _file_flags(argv: Sequence[str]) -> list[str]:
    """Replace `--config FILE` by the flags that FILE holds, placed first so that the command line wins."""
    import yaml

    rest = list(argv)
    flags: list[str] = []
    while "--config" in rest:
        at = rest.index("--config")
        if at + 1 == len(rest):
            raise ConfigError("--config needs a file: --config run.yaml")
        path = Path(rest[at + 1])
        del rest[at : at + 2]
        try:
            content = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, yaml.YAMLError) as err:
            raise ConfigError(f"config file {path} cannot be read: {' '.join(str(err).split())}") from err
        if not isinstance(content, dict):
            raise ConfigError(f"config file {path} must hold `flag: value` lines")
        for key, value in content.items():
            flags += _flag(str(key), value)
    return flags + rest


def _flag(key: str, value: object) -> list[str]:
    name = f"--{key}"
    if isinstance(value, bool):
        return [name if value else f"--no-{key}"]
    if isinstance(value, list):
        return [name, *map(str, value)]
    if value is None:
        return [name, "None"]
    return [name, str(value)]


def _load(target: str) -> Any:
    module, _, attribute = target.partition(":")
    return getattr(import_module(module), attribute)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; errors are one line on stderr (see `rlaif.errors`)."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    arguments = [a for a in arguments if a != "--debug"]
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage())
        return 0
    if arguments[0] == "--version":
        from rlaif import __version__

        print(f"rlaif {__version__}")
        return 0
    try:
        command, rest = find_command(arguments)
        config = parse_config(command, rest)
        _load(command.run)(config)
    except RlaifError as err:
        if debug:
            traceback.print_exc()
        print(f"rlaif: {err}", file=sys.stderr)
        return err.exit_code
    except KeyboardInterrupt:
        print("rlaif: interrupted; run the same command again to go on", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())

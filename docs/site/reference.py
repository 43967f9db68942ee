"""The reference pages, as Markdown made of the code: nothing of it is written by hand or kept.

Flags come from the commands' config classes, errors from their tree, the wire contract from the comments of its
`.proto` file, the Python API from docstrings (by mkdocstrings, which the page only tells what to show).
"""

from __future__ import annotations

import ast
import inspect
import json
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, Field, fields
from functools import cache
from importlib import import_module
from pathlib import Path
from shutil import copytree
from typing import Any

from google.rpc import status_pb2

from rlaif import errors
from rlaif.cli import COMMANDS, Command

ROOT = Path(__file__).parents[2]

PYTHON: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "reward-client.md": ("Reward client and adapters", ("policy_trainer.client", "policy_trainer.adapters")),
    "policy-maths.md": (
        "Maths of the policy trainer",
        (
            "policy_trainer.rewards",
            "policy_trainer.advantages",
            "policy_trainer.kl",
            "policy_trainer.ppo_losses",
            "policy_trainer.importance",
            "policy_trainer.preference_losses",
            "policy_trainer.pairs",
            "policy_trainer.logprobs",
            "policy_trainer.evaluation.assess",
        ),
    ),
    "reward-models.md": (
        "Reward models",
        ("reward_server.training.loss", "reward_server.model", "reward_server.evaluation.assess"),
    ),
    "judging.md": (
        "Judging",
        (
            "labeler.llm",
            "labeler.rubric",
            "labeler.judge",
            "labeler.backends.labels",
            "labeler.guard",
            "labeler.ranking",
            "labeler.audit.biases",
            "labeler.audit.calibration",
            "labeler.audit.canaries",
        ),
    ),
    "data.md": (
        "Types, records and measures",
        ("rlaif.types", "rlaif.records", "rlaif.models", "rlaif.chat", "rlaif.agreement", "rlaif.measures"),
    ),
    "tinyworld.md": ("The embedded world", ("tinyworld.grammar", "tinyworld.gold", "tinyworld.pairs")),
}
"""Public modules of the Python API by page, with the page's title."""


def pages() -> dict[str, str]:
    """Every page of the reference by its path under `reference/`; the first line of each is its title."""
    return {
        "commands.md": commands(),
        "errors.md": exit_codes(),
        "grpc.md": contract(),
        **{f"python/{name}": python_api(title, modules) for name, (title, modules) in PYTHON.items()},
    }


# ---- commands ----


def commands() -> str:
    """Every command with its flags: name, type, default, and what it is."""
    listed = "\n".join(
        f"| [`rlaif {c.name}`](#rlaif-{c.name.replace(' ', '-')}) | {cell(c.help)} |" for c in COMMANDS
    )
    head = (
        "# Commands and flags\n\nEvery flag can stand in a YAML file: `rlaif COMMAND --config FILE.yaml`; flags on the "
        "command line win. A flag of type `bool` is switched by `--name` and `--no-name`. What cannot be left out has "
        "no default. `--debug` shows tracebacks.\n\n| command | for |\n| --- | --- |\n"
    )
    return head + listed + "\n" + "".join(map(command_section, COMMANDS))


def command_section(command: Command) -> str:
    """One command: what its config class says, and a table of flags."""
    module, _, name = command.config.partition(":")
    config: type[Any] = getattr(import_module(module), name)
    about = inspect.cleandoc(config.__doc__ or "")
    if command.takes:
        about += f"\n\nWords before the first flag are `--{command.takes}`."
    rows = "".join(
        f"| `--{field.name}` | {code(type_of(field))} | {default_of(field)} | {cell(line)} |\n"
        for field, line in documented_fields(config)
    )
    return f"\n## rlaif {command.name}\n\n{about}\n\n| flag | type | default | |\n| --- | --- | --- | --- |\n{rows}"


def documented_fields(config: type[Any]) -> Iterator[tuple[Field[Any], str]]:
    """The flags of a config class, each with the docstring under it; inherited ones first.

    Raises:
        LookupError: a field has no docstring.
    """
    for field in fields(config):
        if not field.init:
            continue
        for owner in config.__mro__:
            if field.name in field_docstrings(owner):
                yield field, field_docstrings(owner)[field.name]
                break
        else:
            raise LookupError(f"{config.__name__}.{field.name} has no docstring")


@cache
def field_docstrings(owner: type[Any]) -> dict[str, str]:
    """The string under each annotated field in the body of a class, itself and not its parents."""
    if owner.__module__ == "builtins":
        return {}
    (body,) = ast.parse(textwrap.dedent(inspect.getsource(owner))).body
    assert isinstance(body, ast.ClassDef)
    found = {}
    for field, after in zip(body.body, body.body[1:], strict=False):
        if not (isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)):
            continue
        if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
            found[field.target.id] = " ".join(str(after.value.value).split())
    return found


def type_of(field: Field[Any]) -> str:
    """The type of a flag as its class writes it."""
    return field.type if isinstance(field.type, str) else field.type.__name__


def default_of(field: Field[Any]) -> str:
    """A flag's default as code, or "required"."""
    if field.default is not MISSING:
        return code(str(field.default) if isinstance(field.default, Path) else repr(field.default))
    if field.default_factory is not MISSING:
        return code(repr(field.default_factory()))
    return "*required*"


# ---- errors ----


def exit_codes() -> str:
    """The error classes with their exit codes, from the class statements of `rlaif.errors`."""
    classes = [c for c in vars(errors).values() if inspect.isclass(c) and c.__module__ == errors.__name__]
    rows = "".join(
        f"| {c.exit_code} | {code(c.__name__)} | {cell(inspect.cleandoc(c.__doc__ or ''))} |\n"
        for c in sorted(classes, key=lambda c: c.exit_code)
    )
    return (
        "# Errors and exit codes\n\nA command that fails prints one line that says what is wrong and what to do, and "
        "ends with the code of its class. In Python they are the classes of `rlaif.errors`.\n\n"
        f"| code | class | means |\n| --- | --- | --- |\n| 0 | | done |\n{rows}"
        "| 130, 143 | | ended by Ctrl-C, by SIGTERM; the same command goes on |\n"
    )


# ---- the wire contract ----


def contract() -> str:
    """The gRPC API, from the comments of the `.proto` file as buf reads them."""
    file = described("rlaif/reward/v1/reward.proto")
    said = {tuple(place["path"]): place.get("leadingComments", "") for place in file["sourceCodeInfo"]["location"]
            if "path" in place}  # fmt: skip

    def comment(*path: int) -> str:
        return " ".join(said.get(path, "").split())

    # Field numbers of descriptor.proto: service 6 (method 2), message 4 (field 2), enum 5 (value 2), syntax 12.
    about = comment(12)
    parts = [f"# The gRPC API\n\nPackage `{file['package']}`. {about}\n"]
    for i, service in enumerate(file["service"]):
        parts.append(f"\n## {service['name']}\n\n{comment(6, i)}\n\n| call | |\n| --- | --- |\n")
        for j, method in enumerate(service["method"]):
            asked = ("stream " if method.get("clientStreaming") else "") + short(method["inputType"])
            told = ("stream " if method.get("serverStreaming") else "") + short(method["outputType"])
            parts.append(f"| `{method['name']}({asked}) → {told}` | {cell(comment(6, i, 2, j))} |\n")
    parts.append("\n## Messages\n")
    for i, message in enumerate(file["messageType"]):
        parts.append(f"\n### {message['name']}\n\n{comment(4, i)}\n\n")
        rows = [
            f"| {field['number']} | `{field['name']}` | {code(field_type(field))} | {cell(comment(4, i, 2, j))} |\n"
            for j, field in enumerate(message.get("field", ()))
        ]
        parts += ["| | field | type | |\n| --- | --- | --- | --- |\n", *rows] if rows else ["No fields.\n"]
    parts.append("\n## Enumerations\n")
    for i, enum in enumerate(file["enumType"]):
        parts.append(f"\n### {enum['name']}\n\n{comment(5, i)}\n\n| | value | |\n| --- | --- | --- |\n")
        parts += [
            f"| {value.get('number', 0)} | `{value['name']}` | {cell(comment(5, i, 2, j))} |\n"
            for j, value in enumerate(enum["value"])
        ]
    return "".join(parts)


def described(name: str) -> dict[str, Any]:
    """The descriptor of a `.proto` file under `protos/`, comments included.

    buf wants all sources in one folder, google/rpc/status.proto among them.

    Raises:
        subprocess.CalledProcessError: buf cannot read it.
    """
    with tempfile.TemporaryDirectory() as folder:
        copytree(ROOT / "protos" / "rlaif", Path(folder) / "rlaif")
        google = Path(folder) / "google" / "rpc"
        google.mkdir(parents=True)
        (google / "status.proto").write_bytes(
            Path(status_pb2.__file__).with_name("status.proto").read_bytes()
        )
        buf = Path(sys.executable).with_name("buf")  # of this environment, whatever PATH says
        built = subprocess.run(
            [buf, "build", "--output", "-#format=json"], cwd=folder, check=True, stdout=subprocess.PIPE
        )
    (file,) = (f for f in json.loads(built.stdout)["file"] if f["name"] == name)
    return dict(file)


def field_type(field: Mapping[str, Any]) -> str:
    """A field's type as a `.proto` file writes it, with what sets it apart."""
    plain = short(field["typeName"]) if "typeName" in field else field["type"].removeprefix("TYPE_").lower()
    if field.get("label") == "LABEL_REPEATED":
        return f"repeated {plain}"
    if field.get("proto3Optional"):
        return f"optional {plain}"
    return f"oneof {plain}" if "oneofIndex" in field else plain


def short(name: str) -> str:
    """A type's name without the package of this contract."""
    return name.removeprefix(".rlaif.reward.v1.").removeprefix(".")


# ---- Python ----


def python_api(title: str, modules: tuple[str, ...]) -> str:
    """A page on which mkdocstrings writes the docstrings of modules."""
    return f"# {title}\n" + "".join(f"\n## {name}\n\n::: {name}\n" for name in modules)


# ---- Markdown ----


def code(text: str) -> str:
    """Text as code in a table's cell, without the marks that would end the cell or read as Markdown."""
    return f"<code>{text.translate({ord(mark): f'&#{ord(mark)};' for mark in '|<*_'})}</code>"


def cell(text: str) -> str:
    """Prose in a table's cell: one line, without the marks that would end it or read as HTML."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")

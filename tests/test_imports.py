"""The architecture as imports: arrows point one way, and the command line answers without the heavy libraries."""

from __future__ import annotations

import ast
import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from rlaif.cli import COMMANDS

PACKAGES = ("rlaif", "protos", "labeler", "reward_server", "policy_trainer", "tinyworld")
ARROWS = {
    "rlaif": (),
    "protos": (),
    "labeler": ("rlaif",),
    "reward_server": ("rlaif", "protos", "labeler"),
    "policy_trainer": ("rlaif", "protos"),
    "tinyworld": ("rlaif", "labeler.rubric", "labeler.guard"),
}
HEAVY = ("torch", "transformers", "grpc", "openai", "pyarrow", "numpy", "vllm")
LIGHT = ["rlaif.cli", *sorted({command.config.partition(":")[0] for command in COMMANDS})]

BLOCKED = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {heavy!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Absent())
{program}
"""


def imports(path: Path, package: str) -> Iterator[tuple[int, str]]:
    """(line, module) of every import statement in a file, wherever it stands, relative ones made absolute."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for name in node.names:
                yield node.lineno, name.name
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                yield node.lineno, package
            elif node.module is not None:
                yield node.lineno, node.module
                for name in node.names:
                    yield node.lineno, f"{node.module}.{name.name}"


def within(module: str, parent: str) -> bool:
    return module == parent or module.startswith(f"{parent}.")


@pytest.mark.parametrize("package", PACKAGES)
def test_arrows_point_one_way(repository: Path, package: str) -> None:
    allowed = (package, *ARROWS[package])
    wrong = []
    for path in sorted((repository / package).rglob("*.py")):
        for line, module in imports(path, package):
            ours = any(within(module, other) for other in PACKAGES)
            # `from labeler import rubric` names the allowed module one level further down.
            if ours and not any(within(module, other) or within(other, module) for other in allowed):
                wrong.append(f"{path.relative_to(repository)}:{line} imports {module}")
    assert wrong == []


def test_only_the_judge_scorer_of_the_reward_server_knows_the_labeler(repository: Path) -> None:
    users = {
        path.relative_to(repository / "reward_server").as_posix()
        for path in (repository / "reward_server").rglob("*.py")
        if any(within(module, "labeler") for _, module in imports(path, "reward_server"))
    }
    assert users <= {"scorers/judge.py"}


@pytest.mark.parametrize("folder", ["benchmarks", "examples", "docs"])
def test_what_programs_outside_the_packages_import_from_them_is_there(repository: Path, folder: str) -> None:
    """No test runs a benchmark to its end, and one that cannot start would be noticed when it is needed."""
    missing = []
    for path in sorted((repository / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and any(within(node.module or "", one) for one in PACKAGES):
                module = importlib.import_module(node.module or "")
                missing += [
                    f"{path.relative_to(repository)}:{node.lineno} {node.module}.{alias.name}"
                    for alias in node.names
                    if not hasattr(module, alias.name)
                    and not (
                        hasattr(module, "__path__")
                        and importlib.util.find_spec(f"{node.module}.{alias.name}")
                    )
                ]
    assert missing == []


def test_a_forbidden_import_is_seen(tmp_path: Path) -> None:
    (tmp_path / "x.py").write_text("def f():\n    from labeler import judge\n    import torch.nn as nn\n")
    assert list(imports(tmp_path / "x.py", "rlaif")) == [
        (2, "labeler"),
        (2, "labeler.judge"),
        (3, "torch.nn"),
    ]


def run_without(heavy: tuple[str, ...], program: str, repository: Path) -> subprocess.CompletedProcess[str]:
    code = BLOCKED.format(heavy=set(heavy), program=program)
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=repository
    )


@pytest.mark.parametrize("module", LIGHT)
def test_configs_and_the_command_line_import_none_of_the_heavy_libraries(
    repository: Path, module: str
) -> None:
    program = (
        f"import {module}\nprint(*sorted({{m.partition('.')[0] for m in sys.modules}} & {set(HEAVY)!r}))"
    )
    done = run_without((), program, repository)
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "", "")


@pytest.mark.parametrize("command", ["", *(command.name for command in COMMANDS)])
def test_help_works_without_the_heavy_libraries(repository: Path, command: str) -> None:
    program = f"from rlaif.cli import main\nsys.exit(main({[*command.split(), '--help']!r}))"
    done = run_without(HEAVY, program, repository)
    assert (done.returncode, done.stderr) == (0, "")
    assert f"usage: rlaif {command or 'COMMAND'}" in done.stdout


def test_every_command_names_a_run_function_that_exists(repository: Path) -> None:
    for command in COMMANDS:
        module, _, function = command.run.partition(":")
        tree = ast.parse(
            (repository / module.replace(".", "/")).with_suffix(".py").read_text(encoding="utf-8")
        )
        assert function in {n.name for n in tree.body if isinstance(n, ast.FunctionDef)}, command.run

"""The examples for deployment: readable, and with flags that the commands know."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from rlaif.cli import COMMANDS, parse_config

SERVE = next(c for c in COMMANDS if c.name == "serve")
PPO = next(c for c in COMMANDS if c.name == "train ppo")


def documents(repository: Path, name: str) -> list[Any]:
    return list(yaml.safe_load_all((repository / "deploy" / name).read_text()))


@pytest.mark.parametrize("name", ["kubernetes.yaml", "envoy.yaml", "compose.yaml"])
def test_the_files_are_yaml(repository: Path, name: str) -> None:
    assert all(documents(repository, name))


def test_the_kubernetes_server_starts_with_flags_that_exist(repository: Path) -> None:
    _, replicas = documents(repository, "kubernetes.yaml")
    (server,) = replicas["spec"]["template"]["spec"]["containers"]
    assert server["args"][0] == "serve"
    config = parse_config(SERVE, server["args"][1:])
    assert (config.host, config.port, config.metrics_port) == ("0.0.0.0", 50051, 9100)
    grace = replicas["spec"]["template"]["spec"]["terminationGracePeriodSeconds"]
    assert grace > config.drain_timeout_s, "SIGKILL must not come before the drain ends"


def test_the_composed_server_and_trainer_start_with_flags_that_exist(repository: Path) -> None:
    services = documents(repository, "compose.yaml")[0]["services"]
    assert parse_config(SERVE, services["reward-0"]["command"]).insecure
    assert services["reward-0"]["command"] == services["reward-1"]["command"]
    trainer = services["trainer"]["command"]
    assert trainer[0] == "ppo"
    assert parse_config(PPO, trainer[1:]).reward_server == "reward-0:50051,reward-1:50051"

"""How models are named."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlaif.errors import ConfigError, ModelError
from rlaif.models import ModelRef


@pytest.mark.parametrize(
    ("text", "ref"),
    [
        ("gpt2", ModelRef("hf", "gpt2")),
        ("./runs/policy", ModelRef("hf", "./runs/policy")),
        ("hf:org/name", ModelRef("hf", "org/name")),
        ("C:/models/x", ModelRef("hf", "C:/models/x")),
        ("tinyworld:judge", ModelRef("tinyworld", "judge")),
        ("scripted:judge.yaml", ModelRef("scripted", "judge.yaml")),
        ("openai:gpt-5", ModelRef("openai", "gpt-5")),
        ("openai:org/m@http://127.0.0.1:8000/v1", ModelRef("openai", "org/m", "http://127.0.0.1:8000/v1")),
        ("openai:m@http://a/v1,https://b/v1", ModelRef("openai", "m", "http://a/v1,https://b/v1")),
        ("openai:m@http://user@host/v1", ModelRef("openai", "m", "http://user@host/v1")),
        ("openai:m@20240620", ModelRef("openai", "m@20240620")),
        ("openai:@cf/org/m@http://h/v1", ModelRef("openai", "@cf/org/m", "http://h/v1")),
        ("decisions:m@http://h/v1", ModelRef("decisions", "m", "http://h/v1")),
    ],
)
def test_names_are_read_and_written_one_way(text: str, ref: ModelRef) -> None:
    assert ModelRef.parse(text) == ref
    assert ModelRef.parse(str(ref)) == ref


@pytest.mark.parametrize("text", ["", "hf:", "openai:", "openai:@http://h", "tinyworld:"])
def test_a_name_without_a_model_says_how_to_write_one(text: str) -> None:
    with pytest.raises(ConfigError, match="write hf:NAME_OR_PATH"):
        ModelRef.parse(text)


def test_an_endpoint_without_a_scheme_is_not_taken_for_a_name() -> None:
    with pytest.raises(ConfigError, match=r"needs its scheme: openai:NAME@http://HOST:PORT/v1"):
        ModelRef.parse("openai:m@localhost:8000/v1")


def test_an_endpoint_has_no_weights_to_load() -> None:
    with pytest.raises(ModelError, match="openai:m has no weights here"):
        ModelRef.parse("openai:m").pretrained_path()


def test_an_unknown_embedded_model_is_refused_by_name() -> None:
    with pytest.raises(ModelError, match="no embedded model 'jugde'"):
        ModelRef.parse("tinyworld:jugde").pretrained_path()


@pytest.mark.parametrize("name", ["./policy", "/no/where", "~/policy", "runs/ppo/checkpoint-000050"])
def test_what_can_only_be_a_folder_and_is_none_is_not_looked_for_on_the_hub(name: str) -> None:
    with pytest.raises(ModelError, match=f"there is no folder {name}"):
        ModelRef.parse(name).pretrained_path()


def test_a_name_of_the_hub_and_a_folder_are_taken_as_they_are(tmp_path: Path) -> None:
    for name in ("org/model", "gpt2", str(tmp_path)):
        assert ModelRef.parse(name).pretrained_path() == name

"""How models are named."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from huggingface_hub import constants

from rlaif.errors import ConfigError, ModelError
from rlaif.models import ModelRef, reason, require_pretrained


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


@contextmanager
def hub(status: int, error: str = "") -> Iterator[tuple[str, list[str]]]:
    """A hub that gives one answer to everything; its address, and the paths that it was asked for."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            asked.append(self.path)
            self.send_response(status)
            for name, value in (("X-Error-Code", error), ("ETag", "e"), ("X-Repo-Commit", "0" * 40)):
                self.send_header(name, value)
            self.end_headers()

        def log_message(self, *args: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the hub."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    return tmp_path / "cache"


@pytest.mark.parametrize("name", ["rm9", "runs/sft"])
def test_a_name_that_is_neither_here_nor_on_the_hub_is_refused_after_one_question(
    name: str, cache: Path
) -> None:
    with hub(404, "RepoNotFound") as (address, asked):
        with pytest.raises(
            ModelError, match=f"there is no folder {name} here, and no model of this name on the hub"
        ):
            require_pretrained(name, endpoint=address)
        assert asked == [f"/{name}/resolve/main/config.json"]
    with pytest.raises(ModelError, match=f"no folder {name} here, and the hub at {address} cannot be asked"):
        require_pretrained(name, endpoint=address)  # nobody listens there now


def test_the_hub_is_not_asked_for_what_its_cache_holds_nor_offline(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository = cache / "models--org--model"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    require_pretrained("org/model", endpoint="http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    require_pretrained("org/model")
    with pytest.raises(
        ModelError, match=r"no folder rm9 here, and none of .* .HF_HUB_OFFLINE is set\); or so"
    ):
        require_pretrained("rm9", hint="; or so")


@pytest.mark.parametrize(
    ("status", "error"), [(200, ""), (403, "GatedRepo"), (404, "EntryNotFound"), (503, "")]
)
def test_what_the_hub_has_or_does_not_say_is_left_to_the_loading(
    status: int, error: str, cache: Path
) -> None:
    with hub(status, error) as (address, asked):
        require_pretrained("org/model", endpoint=address)
        assert len(asked) == 1


def test_what_cannot_be_a_name_of_the_hub_is_said_to_be_no_folder(cache: Path) -> None:
    with pytest.raises(ModelError, match="no folder my model here, and a model of the hub cannot have"):
        require_pretrained("my model")


def test_the_folder_of_a_run_without_a_model_says_what_it_is(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(json.dumps({"command": "sample"}))
    with pytest.raises(ModelError, match=f"{tmp_path} holds a run of `rlaif sample` and no model"):
        require_pretrained(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")  # a trained model lies beside the run that trained it
    require_pretrained(str(tmp_path))


def test_an_error_of_a_library_is_cut_between_words() -> None:
    url = "https://huggingface.co/" + "x" * 40
    text = reason(OSError("We could\nnot " + "connect " * 17 + url + " at all"))
    assert text == "We could not " + "connect " * 17 + "..."
    assert reason(OSError()) == "OSError"

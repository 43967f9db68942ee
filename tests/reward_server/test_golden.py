"""The golden set: what was trained is what is loaded, or it is refused with the cause."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from reward_server import golden
from reward_server.model import load_reward_model
from reward_server.training.train import run
from rlaif.errors import ModelError
from tests.reward_server import tiny
from tests.reward_server.training.test_train import config, polite_rows, write


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("golden")
    backbone = tiny.save_language_model(folder / "backbone")
    dataset = write(folder / "pairs.jsonl", polite_rows(60))
    run(config(backbone, dataset, folder / "rm", golden_items=5))
    return folder / "rm"


@pytest.fixture
def copied(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "rm"))


def change(folder: Path, name: str, by: float) -> None:
    weights = load_file(folder / "model.safetensors")
    weights[name] = weights[name] + by * torch.randn_like(weights[name])
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def test_it_holds_short_conversations_with_the_scores_of_transformers(trained: Path) -> None:
    items = json.loads((trained / "golden.json").read_text())["items"]
    assert len(items) == 5
    reward_model = load_reward_model(str(trained), device="cpu")
    for item in items:
        ids = reward_model.tokenizer.apply_chat_template(item["messages"], return_dict=True)["input_ids"]
        assert ids == item["ids"]
        with torch.no_grad():
            assert reward_model.model(input_ids=torch.tensor([ids])).logits.item() == pytest.approx(
                item["score"], abs=1e-5
            )
    assert len({item["score"] for item in items}) == 5


def test_bfloat16_is_within_its_own_tolerance(trained: Path) -> None:
    load_reward_model(str(trained), device="cpu", dtype="bfloat16")


def test_a_changed_head_is_named(copied: Path) -> None:
    change(copied, "score.weight", 1e-2)
    with pytest.raises(ModelError, match=r"item \d of golden.json scores .* the head changed since"):
        load_reward_model(str(copied), device="cpu")


def test_a_changed_body_is_named(copied: Path) -> None:
    change(copied, "model.layers.0.mlp.down_proj.weight", 1e-1)
    with pytest.raises(ModelError, match=r"the weights of the body"):
        load_reward_model(str(copied), device="cpu")


def test_a_changed_template_is_named(copied: Path) -> None:
    (copied / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}|{% endfor %}")
    with pytest.raises(ModelError, match="other tokens than in training: the chat template"):
        load_reward_model(str(copied), device="cpu")


def test_a_changed_tokenizer_is_named(copied: Path) -> None:
    path = copied / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["e"], vocabulary["a"] = vocabulary["a"], vocabulary["e"]
    path.write_text(json.dumps(tokenizer))
    with pytest.raises(ModelError, match="other tokens than in training: the tokenizer"):
        load_reward_model(str(copied), device="cpu")


def test_a_template_that_writes_the_date_is_checked_by_its_ids_alone(copied: Path) -> None:
    path = copied / "chat_template.jinja"
    path.write_text("{# strftime_now #}" + path.read_text() + "{{ 'another day' }}")
    load_reward_model(str(copied), device="cpu")
    change(copied, "score.weight", 1e-2)
    with pytest.raises(ModelError, match="the head"):
        load_reward_model(str(copied), device="cpu")


def test_a_damaged_set_is_named(copied: Path) -> None:
    (copied / "golden.json").write_text("{")
    with pytest.raises(ModelError, match=r"golden.json is damaged"):
        load_reward_model(str(copied), device="cpu")


def test_items_are_short_and_spread() -> None:
    encoded = [[0] * n for n in (9, 1, 8, 2, 7, 3, 6, 4, 5, 10)]
    lengths = [len(encoded[i]) for i in golden.choose(encoded, 2)]
    assert lengths == [1, 3]
    assert golden.choose(encoded, 0) == []
    assert sorted(golden.choose(encoded, 20)) == list(range(10))

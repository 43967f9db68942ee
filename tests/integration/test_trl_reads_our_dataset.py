"""TRL's own trainers read what `rlaif label pairs` and `rlaif export` wrote, unchanged."""

from __future__ import annotations

import json
import math
import runpy
from pathlib import Path

import pytest
from datasets import Dataset, load_dataset

from rlaif.cli import main

EXAMPLES = Path(__file__).parents[2] / "examples"

PROMPTS = [f"Name a colour that goes with number {i}." for i in range(6)]


@pytest.fixture(scope="module")
def labeled_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six pairs labelled by a script that dislikes the word "no"."""
    folder = tmp_path_factory.mktemp("labeled")
    rows = [
        {"prompt": p, "response_a": "It is blue.", "response_b": "There is no such colour."} for p in PROMPTS
    ]
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    script = {
        "rules": [
            {"text": "The second one refuses.", "user": "It is blue.*no such"},
            {"probs": [0.7, 0.2], "user": "(?s)It is blue.*no such"},
            {"probs": [0.1, 0.8]},
            {"text": "The first one refuses."},
        ]
    }
    (folder / "judge.yaml").write_text(json.dumps(script))
    command = ["label", "pairs", "--judge", f"scripted:{folder / 'judge.yaml'}"]
    assert (
        main([*command, "--dataset", str(folder / "pairs.jsonl"), "--output_dir", str(folder / "out")]) == 0
    )
    return folder / "out"


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    make = runpy.run_path(str(EXAMPLES / "make_tiny_llama.py"))
    folder = tmp_path_factory.mktemp("tiny-llama")
    tokenizer = make["make_tokenizer"](iter(PROMPTS), vocab_size=300)
    tokenizer.save_pretrained(folder)
    make["make_model"](tokenizer, seed=0).save_pretrained(folder)
    return folder


def test_load_dataset_gives_the_conversational_preference_format(labeled_dir: Path) -> None:
    from trl.data_utils import is_conversational

    dataset = load_dataset(str(labeled_dir), split="train")
    assert len(dataset) == len(PROMPTS)
    for row in dataset:
        assert is_conversational(row)
        assert row["prompt"][-1]["role"] == "user"
        assert row["chosen"] == [{"role": "assistant", "content": "It is blue."}]
        assert row["rejected"] == [{"role": "assistant", "content": "There is no such colour."}]
        # By hand: P(A) is 7/9 when A comes first and 8/9 when it comes second.
        assert row["chosen_prob"] == pytest.approx((7 / 9 + 8 / 9) / 2)


def one_step(trainer: str, dataset: Dataset, model_dir: Path, tmp_path: Path) -> float:
    step = runpy.run_path(str(EXAMPLES / "trl_one_step.py"))[trainer]
    loss = float(step(dataset, str(model_dir), str(tmp_path / "model")))
    assert math.isfinite(loss)
    return loss


# Policy and reference are equal at the first step: every margin is 0, so DPO's loss is log 2 and KTO's
# 1 - sigmoid(0) (arXiv 2402.01306, equation 8).
@pytest.mark.parametrize(
    ("trainer", "first_loss"), [("reward_step", None), ("dpo_step", math.log(2)), ("kto_step", 0.5)]
)
def test_a_trl_trainer_takes_one_step(
    labeled_dir: Path, model_dir: Path, tmp_path: Path, trainer: str, first_loss: float | None
) -> None:
    loss = one_step(trainer, load_dataset(str(labeled_dir), split="train"), model_dir, tmp_path)
    if first_loss is not None:
        assert loss == pytest.approx(first_loss, abs=1e-4)


@pytest.mark.parametrize("suffix", ["parquet", "jsonl"])
@pytest.mark.parametrize(
    ("form", "trainer"),
    [("trl-preference", "dpo_step"), ("trl-unpaired", "kto_step"), ("trl-reward", "reward_step")],
)
def test_a_trl_trainer_takes_one_step_on_an_export(
    labeled_dir: Path, model_dir: Path, tmp_path: Path, form: str, trainer: str, suffix: str
) -> None:
    file = tmp_path / f"export.{suffix}"
    command = ["export", "--dataset", str(labeled_dir), "--format", form, "--output_file", str(file)]
    assert main(command) == 0
    how = "json" if suffix == "jsonl" else "parquet"
    dataset = load_dataset(how, data_files=str(file), split="train", cache_dir=str(tmp_path / "cache"))
    loss = one_step(trainer, dataset, model_dir, tmp_path)
    if form == "trl-reward":
        # Its loss is -log sigmoid(difference - margin): the margins of the file are in it.
        without = one_step(trainer, dataset.remove_columns("margin"), model_dir, tmp_path)
        assert loss > without

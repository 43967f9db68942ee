"""Dataset cards: true to the run, complete in their columns, readable by `datasets`, and fit to be published."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import yaml

from labeler import columns, preferences, rank, revise, sample, scores
from labeler.card import KINDS, read_source, size_category, table
from labeler.export.shapes import SCHEMAS
from labeler.rubric import rubric_path
from rlaif.cli import COMMANDS, Command, find_command, main, parse_config
from rlaif.records import Quarantine, read_prompts
from tests.labeler.commands import label, pair, scripted, write_lines

HEADER = re.compile(r"\A---\n(.*?)\n---\n", re.DOTALL)


def card(folder: Path) -> tuple[dict[str, Any], str]:
    """The header's fields, and the text."""
    text = (folder / "README.md").read_text()
    match = HEADER.match(text)
    assert match is not None
    return yaml.safe_load(match[1]), text


@pytest.mark.parametrize(
    ("meaning", "schema"),
    [
        pytest.param(columns.PREFERENCES, preferences.SCHEMA, id="preferences"),
        pytest.param(columns.RANKINGS, rank.SCHEMA, id="rankings"),
        pytest.param(columns.SCORES, scores.SCHEMA, id="scores"),
        pytest.param(columns.CANDIDATES, sample.SCHEMA, id="candidates"),
        pytest.param(columns.REVISIONS, revise.SCHEMA, id="revisions"),
        pytest.param(columns.TRL_PREFERENCE, SCHEMAS["trl-preference"], id="trl-preference"),
        pytest.param(columns.TRL_REWARD, SCHEMAS["trl-reward"], id="trl-reward"),
        pytest.param(columns.TRL_UNPAIRED, SCHEMAS["trl-unpaired"], id="trl-unpaired"),
    ],
)
def test_every_column_is_explained_and_no_other(meaning: dict[str, str], schema: pa.Schema) -> None:
    assert sorted(meaning) == sorted(schema.names)


@pytest.mark.parametrize(
    ("rows", "category"),
    [(0, "n<1K"), (999, "n<1K"), (1000, "1K<n<10K"), (12_345, "10K<n<100K"), (5_000_000, "1M<n<10M")],
)
def test_sizes_have_the_hubs_names(rows: int, category: str) -> None:
    # https://huggingface.co/docs/hub/datasets-cards: size_categories
    assert size_category(rows) == category


def test_the_card_of_pairs_says_what_the_report_says(tmp_path: Path) -> None:
    rows = [pair(i, *sides, label="1") for i in range(10) for sides in (("good", "bad"), ("bad", "good"))]
    out = tmp_path / "private" / "out"
    data = write_lines(tmp_path / "pairs.jsonl", [*rows[:12], "not json"])
    flags = ("--num_exemplars", "1", "--price_per_million", "1", "2")
    assert label(scripted(tmp_path), data, out, *flags) == 0
    header, text = card(out)
    assert header["configs"] == [
        {"config_name": "default", "data_files": [{"split": "train", "path": "preferences.parquet"}]}
    ]
    assert header["size_categories"] == ["n<1K"]
    assert "license" not in header
    report = json.loads((out / "report.json").read_text())
    assert "agreement with people | 50.0 % [" in text and "on 12 pairs" in text
    assert f"{report['human_kappa']:.2f} [" in text
    assert "1 broken JSON" in text
    assert f"{report['cost_usd']:.2f} USD" in text
    assert "exemplars shown | 1" in text
    rubric = rubric_path("helpfulness-pair").read_text()
    assert rubric.rstrip() in text
    assert report["rubrics"]["helpfulness-pair"] in text
    assert str(tmp_path) not in text, "a card is published; where its files lay is nobody's business"


def commands_of(text: str) -> list[list[str]]:
    """The `rlaif` commands that a card shows, as arguments."""
    return [shlex.split(line)[1:] for line in text.splitlines() if line.startswith("rlaif ")]


def test_the_commands_of_a_card_are_whole_and_its_prompts_and_labels_are_read(tmp_path: Path) -> None:
    data = write_lines(tmp_path / "pairs.jsonl", [pair(0), pair(1)])
    assert label(scripted(tmp_path), data, tmp_path / "lab") == 0
    _, text = card(tmp_path / "lab")
    found = {command.name: config for command, config in map(parse, commands_of(text))}
    assert list(found) == ["train rm", "serve", "train dpo", "train ppo", "export"]
    for name in ("train rm", "train dpo", "train ppo", "export"):
        assert str(found[name].dataset) == "lab"
    assert str(found["serve"].model) == str(found["train rm"].output_dir)
    for name in ("train dpo", "train ppo"):
        assert found[name].reward_server == f"127.0.0.1:{found['serve'].port}"
    assert "`rlaif train dpo` learn from `chosen_prob`" not in text
    assert len(list(read_prompts(tmp_path / "lab", Quarantine(None)))) == 2
    assert (
        main(["export", "--dataset", str(tmp_path / "lab"), "--output_file", str(tmp_path / "p.parquet")])
        == 0
    )
    _, text = card(tmp_path / "p-report")
    assert [command.name for command, _ in map(parse, commands_of(text))] == list(found)[:4]


def parse(argv: list[str]) -> tuple[Command, Any]:
    command, rest = find_command(argv, COMMANDS)
    return command, parse_config(command, rest)


def test_without_people_the_card_says_that_agreement_is_not_known(tmp_path: Path) -> None:
    data = write_lines(tmp_path / "pairs.jsonl", [pair(0)])
    assert label(scripted(tmp_path), data, tmp_path / "out") == 0
    _, text = card(tmp_path / "out")
    assert "agreement is not known" in text
    assert "kappa" not in text


def test_rankings_are_a_configuration_of_their_own_with_a_leaderboard(tmp_path: Path) -> None:
    responses = [{"response": "good", "model": "m|1"}, {"response": "bad", "model": "m2"}]
    data = write_lines(
        tmp_path / "c.jsonl", [{"prompt": f"q {i}", "completions": responses} for i in range(3)]
    )
    assert label(scripted(tmp_path), data, tmp_path / "out", kind="rank") == 0
    header, text = card(tmp_path / "out")
    assert [config["config_name"] for config in header["configs"]] == ["default", "rankings"]
    assert 'rankings = load_dataset("out", "rankings", split="train")' in text
    assert "| 1 | m\\|1 |" in text
    from datasets import load_dataset

    cache = str(tmp_path / "cache")
    assert len(load_dataset(str(tmp_path / "out"), split="train", cache_dir=cache)) == 3
    assert len(load_dataset(str(tmp_path / "out"), "rankings", split="train", cache_dir=cache)) == 3


def test_the_card_of_scores(tmp_path: Path) -> None:
    data = write_lines(tmp_path / "r.jsonl", [{"prompt": "q", "response": "fine"}])
    judge = scripted(tmp_path, [{"probs": [0.0] * 7 + [0.25, 0.25, 0.0]}])
    assert label(judge, data, tmp_path / "out", kind="scores") == 0
    header, text = card(tmp_path / "out")
    assert "mean score | 8.50" in text
    assert "TRL" not in text
    assert header["configs"][0]["data_files"][0]["path"] == "scores.parquet"


def test_a_rubric_that_holds_fences_stays_inside_its_own(tmp_path: Path) -> None:
    text = rubric_path("helpfulness-pair").read_text()
    hostile = tmp_path / "fenced.yaml"
    hostile.write_text(f"{text}# ````\n# # A heading\n# ````\n")
    data = write_lines(tmp_path / "pairs.jsonl", [pair(0)])
    assert label(scripted(tmp_path), data, tmp_path / "out", "--rubric", str(hostile)) == 0
    assert "\n`````yaml\n" in card(tmp_path / "out")[1]


def test_an_export_carries_the_facts_of_its_run(tmp_path: Path) -> None:
    data = write_lines(tmp_path / "pairs.jsonl", [pair(i, label="1") for i in range(30)])
    out = tmp_path / "out"
    assert label(scripted(tmp_path), data, out) == 0
    command = ["export", "--dataset", str(out), "--format", "trl-unpaired", "--split", "0.3"]
    assert main([*command, "--output_file", str(tmp_path / "kto.parquet")]) == 0
    header, text = card(tmp_path / "kto-report")
    files = {file["split"]: file["path"] for file in header["configs"][0]["data_files"]}
    assert files == {"train": "kto-train.parquet", "test": "kto-test.parquet"}
    assert "KTOTrainer" in text and "`preferred_prob`" in text
    assert "agreement with people | 100.0 %" in text
    assert "30 % of the prompts" in text
    assert (tmp_path / "kto-report" / "validation.md").is_file()


def test_a_folder_that_no_run_made_has_no_facts(tmp_path: Path) -> None:
    assert read_source(tmp_path) is None
    (tmp_path / "report.json").write_text("{}")
    (tmp_path / "run.json").write_text('{"command": "train rm"}')
    assert read_source(tmp_path) is None


def test_what_is_not_known_is_left_out() -> None:
    assert table([("known", "1"), ("unknown", None)]).splitlines()[2:] == ["| known | 1 |"]


def test_every_labeling_command_that_writes_data_has_a_card() -> None:
    assert {"sample", "label pairs", "label rank", "label scores", "label revise"} == set(KINDS)

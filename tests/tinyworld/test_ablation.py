"""The prompt study: its pairs carry gold's labels, its commands are ones that `rlaif` takes."""

import json
import subprocess
import sys

import pytest

from labeler.audit.variants import parse_variants
from rlaif.cli import find_command, parse_config
from tinyworld.ablation import STUDIES, commands, gold_pairs
from tinyworld.gold import gold_utility
from tinyworld.pairs import WRITERS


@pytest.mark.parametrize("writer", WRITERS.values(), ids=WRITERS)
def test_the_labelled_response_is_the_one_of_higher_utility(writer):
    labels = []
    for row in gold_pairs(writer, 50, seed=0):
        a, b = (gold_utility(row["prompt"], row[name]) for name in ("response_a", "response_b"))
        assert row["label"] == (1 if a > b else 2)
        assert a != b
        labels.append(row["label"])
    assert 10 < labels.count(1) < 40  # the order of a pair says nothing about its label


def test_every_seed_has_other_posts():
    first, second = ({row["prompt"] for row in gold_pairs(WRITERS["so_so"], 50, seed)} for seed in (0, 1))
    assert not first & second


def test_the_studies_are_commands_that_rlaif_takes(tmp_path):
    for study, arguments in commands(tmp_path, "tinyworld:judge-fewshot", 3).items():
        command, rest = find_command(arguments)
        config = parse_config(command, rest)
        assert config.judge == ("tinyworld:judge-fewshot",)
        assert config.seed == 3
        assert (
            len(parse_variants(config.variants)) == {"prompts": 18, "orders": 4, "self-consistency": 3}[study]
        )


def test_what_the_others_are_compared_with_is_the_question_that_labels_by_default():
    for options in STUDIES.values():
        first = parse_variants([o for o in options if "=" in o])[0]
        assert first.preamble in (None, "none")
        assert first.exemplars in (None, 0)
        assert first.cot in (None, True)
        assert first.rationales in (None, 1)


@pytest.mark.slow
def test_the_study_runs_in_one_command_and_again_without_asking(tmp_path):
    command = [sys.executable, "-m", "tinyworld.ablation", "--output_dir", str(tmp_path), "--n", "8"]
    first = subprocess.run(command, check=True, capture_output=True, text=True)
    table = (tmp_path / "ablation.md").read_text(encoding="utf-8")
    assert table.count("\n| ") == 3 * 2 + 18 + 4 + 3
    assert table.count("## ") == 3
    report = json.loads((tmp_path / "prompts" / "report.json").read_text(encoding="utf-8"))
    assert report["variants"][0]["human_pairs"] == 8
    subprocess.run(command, check=True, capture_output=True, text=True)
    assert (tmp_path / "ablation.md").read_text(encoding="utf-8") == table
    assert "none, cot, 0 exemplars" in first.stdout

"""The prompt study: commands that `rlaif` takes, and a table over seeds by hand."""

import json
from pathlib import Path

from labeler.audit.variants import parse_variants
from rlaif.cli import find_command, parse_config
from tinyworld.lab.prompts import PARTS, STUDY
from tinyworld.lab.study import Sizes


def test_its_parts_are_commands_that_rlaif_takes(tmp_path):
    (phase,) = STUDY.plan(tmp_path, 3, Sizes(8, 8, 8))
    combinations = {"judge-prompts": 18, "judge-orders": 4, "judge-self-consistency": 3}
    (track,) = phase.tracks
    assert [stage.name for stage in track] == list(combinations)
    for stage in track:
        config = parse_config(*find_command(stage.args))
        assert config.judge == ("tinyworld:judge-fewshot",)
        assert config.seed == 3
        assert len(parse_variants(config.variants)) == combinations[stage.name]


def test_what_the_others_are_compared_with_is_the_question_that_labels_by_default():
    for _, options in PARTS.values():
        first = parse_variants([o for o in options if "=" in o])[0]
        assert first.preamble in (None, "none")
        assert first.exemplars in (None, 0)
        assert first.cot in (None, True)
        assert first.rationales in (None, 1)


def estimate(value):
    return {"value": value, "low": value - 0.1, "high": value + 0.1}


def test_the_table_over_seeds_by_hand(tmp_path):
    folders: dict[int, Path] = {}
    for seed, agreement, locked, first in ((0, 0.6, 0.2, 0.5), (1, 0.8, 0.0, None)):
        folders[seed] = tmp_path / str(seed)
        for part in PARTS:
            variant = {
                "name": "base", "agreement": estimate(agreement), "kappa": estimate(0.5), "human_pairs": 8,
                "longer_wins_agreement": 0.5, "position": {"same_position_rate": locked, "first_share": first},
            }  # fmt: skip
            where = folders[seed] / "judge" / part
            where.mkdir(parents=True)
            (where / "report.json").write_text(json.dumps({"variants": [variant]}))
    (section,) = STUDY.report(folders)
    *tables, note = section.blocks
    # Nobody is locked to a position at seed 1, which then has no share of first positions either.
    row = ("base", "70.0 [60.0, 80.0]", "0.500 [0.500, 0.500]", "10.0", "50.0")
    assert [table.rows for table in tables] == [[row]] * 3
    assert "16 pairs that gold does not tie" in note.text

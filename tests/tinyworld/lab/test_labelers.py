"""The study of labelers: its commands are ones that `rlaif` takes, and its tables say what was observed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from labeler.audit.assess import assess
from labeler.audit.observations import Observation
from labeler.audit.variants import parse_variants
from rlaif.cli import find_command, main, parse_config
from rlaif.report.page import Section, Table
from tinyworld import WORLD_DIR
from tinyworld.lab.labelers import JUDGES, PARTS, RATIONALES, STUDY, LabelerStudy, count_parameters
from tinyworld.lab.page import markdown, write_report
from tinyworld.lab.study import Sizes
from tinyworld.pretrain import RECIPES, new_model
from tinyworld.tokenizer import build_tokenizer

RIGHT, WRONG = (0.9, 0.1), (0.2, 0.7)
FIRST, SECOND = (0.9, 0.8), (0.3, 0.2)
"""P(number 1) with the better summary shown first, and with the worse one; `FIRST` and `SECOND` never look at them."""


def commands(study: LabelerStudy, folder: Path, sizes: Sizes) -> list[tuple[str, ...]]:
    return [s.args for phase in study.plan(folder, 3, sizes) for track in phase.tracks for s in track]


def test_the_parts_are_commands_that_rlaif_takes(tmp_path: Path) -> None:
    asked = commands(STUDY, tmp_path, Sizes(8, 8, 8))
    assert len(asked) == len(JUDGES) * len(PARTS)
    for arguments in asked:
        command, rest = find_command(list(arguments))
        config = parse_config(command, rest)
        part = Path(config.output_dir).name
        assert (
            len(parse_variants(config.variants)) == {"prompts": 18, "self-consistency": len(RATIONALES)}[part]
        )


def report(folder: Path, names: Sequence[str], rows: dict[str, list[tuple[float, float]]]) -> None:
    """A report of `rlaif eval judge` whose variants saw the better summary as A; `rows` has one entry for each kind."""
    variants = []
    for name in names:
        seen = [
            Observation(
                str(k), "", p := (ab + 1 - ba) / 2, p, 1.0, first_ab=ab, first_ba=ba, masses=(0.5, 0.5)
            )
            for k, (ab, ba) in enumerate(rows["no cot" if "no cot" in name else "cot"])
        ]
        variants.append({"name": name, **assess(seen, resamples=2)})
    folder.mkdir(parents=True)
    (folder / "report.json").write_text(json.dumps({"variants": variants}))


def cells(sections: Sequence[Section], title: str) -> dict[str, list[str]]:
    """The rows of the table whose title begins so, by their first cell; intervals are cut off."""
    tables = [block for section in sections for block in section.blocks if isinstance(block, Table)]
    (found,) = (table for table in tables if table.title.startswith(title))
    rows = [[str(cell).split(" [")[0] for cell in row] for row in found.rows]
    return {row[0]: row[1:] for row in rows}


def test_the_tables_by_hand(tmp_path: Path) -> None:
    said = {
        "judge-fewshot": {"cot": [RIGHT] * 4, "no cot": [RIGHT, RIGHT, RIGHT, WRONG]},
        "judge-medium": {"cot": [RIGHT] * 4, "no cot": [RIGHT] * 4},
        "judge-small": {"cot": [RIGHT, RIGHT, RIGHT, FIRST], "no cot": [RIGHT, RIGHT, WRONG, WRONG]},
        "judge-tiny": {"cot": [SECOND, SECOND, SECOND, FIRST], "no cot": [WRONG] * 4},
    }
    folders = {seed: tmp_path / str(seed) for seed in (0, 1)}
    for folder in folders.values():
        for judge, rows in said.items():
            prompts = [
                f"{preamble}, {cot}, {n} exemplar{'s' * (n != 1)}"
                for preamble in ("none", "base", "detailed") for cot in ("cot", "no cot") for n in (0, 1, 2)
            ]  # fmt: skip
            report(folder / "labelers" / judge / "prompts", prompts, rows)
            names = ["1 rationale", "4 rationales", "8 rationales"]
            report(folder / "labelers" / judge / "self-consistency", names, rows)
    found = STUDY.report(folders)

    (by_prompt,) = (cells([s], "Agreement") for s in found if s.title == "By prompt")
    assert by_prompt["detailed, cot, 0 exemplars"] == ["100.0", "100.0", "100.0", "100.0", "78.0"]
    assert by_prompt["base, no cot, 1 exemplar"] == ["75.0", "100.0", "50.0", "0.0", "76.0"]
    assert by_prompt["none, cot, 0 exemplars"][-1] == "-"  # the paper always has a preamble
    sizes = cells(found[:1], "Agreement")
    assert sizes["XS"][1:] == ["100.0", "0.0", "62.7"]
    assert sizes["M"][1:] == ["100.0", "100.0", "-"]  # the paper has no such size
    position = cells(found, "Preferences before")
    assert position["L, rationale first"] == ["0.0", "-", "18.0", "94.0", "0.500"]
    assert position["S, rationale first"] == ["25.0", "100.0", "21.0", "9.0", "0.500"]
    assert position["XS, rationale first"] == ["100.0", "25.0", "56.0", "1.0", "0.500"]
    averaged = cells(found, "Agreement with gold, %, by order")
    assert averaged["L, rationale first"] == ["100.0", "100.0", "100.0", "100.0", "-"]
    assert averaged["S, rationale first"] == ["100.0", "75.0", "87.5", "100.0", "100.0"]
    assert averaged["XS, rationale first"] == ["25.0", "75.0", "50.0", "100.0", "100.0"]
    assert averaged["S, at once"] == ["50.0", "50.0", "50.0", "50.0", "-"]
    assert cells(found[-1:], "Agreement")["16 rationales"] == ["-", "-", "-", "-", "72.8"]
    assert cells(found[-1:], "Agreement")["8 rationales"] == ["100.0", "100.0", "100.0", "100.0", "-"]
    effects = cells(found, "What every choice")
    assert effects["a rationale first"] == [
        "+25.0",
        "+0.0",
        "+50.0",
        "+100.0",
        "+0.9",
    ]  # (1.4 + 0.6 + 1.2 + 0.5) / 4
    assert effects["detailed preamble against base, rationale first"][-1] == "+0.5"
    assert effects["both orders against one, rationale first"] == ["+0.0", "+0.0", "+12.5", "+50.0", "-"]
    assert effects["8 rationales against one"] == ["+0.0", "+0.0", "+0.0", "+0.0", "-5.2"]
    text = markdown(STUDY, found, "origin")
    assert "8 pairs that gold does not tie" in text
    assert text.count("](images/labelers-") == 3


@pytest.mark.parametrize("judge", JUDGES.values())
def test_parameters_are_counted_in_the_weights(judge: str) -> None:
    recipe = RECIPES[judge]
    size = RECIPES[recipe.init].size if recipe.init else recipe.size
    model = new_model(build_tokenizer(), 0, size)
    assert count_parameters(WORLD_DIR / "weights" / judge) == model.num_parameters()


@pytest.mark.slow
def test_a_study_of_shipped_judges_from_end_to_end(tmp_path: Path) -> None:
    study = LabelerStudy({"S": "judge-small", "XS": "judge-tiny"})
    sizes = Sizes(num_prompts=1, num_eval_prompts=1, num_pairs=2)
    study.prepare(tmp_path, 0, sizes)
    for arguments in commands(study, tmp_path, sizes):
        assert main(list(arguments)) == 0
    found = study.report({0: tmp_path})
    write_report(tmp_path, study, found, "origin")
    assert (tmp_path / "labelers.html").read_text(encoding="utf-8").count("<svg") == 3
    by_size = cells(found[:1], "Agreement")
    assert [by_size[size][0] for size in study.judges] == ["26,376", "12,464"]
    assert all(0 <= float(by_size[size][k]) <= 100 for size in study.judges for k in (1, 2))

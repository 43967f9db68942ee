"""`rlaif lab`: studies are named as the command names them, run in one command, go on after a kill, and make pages."""

import re
import subprocess
import sys
from typing import get_args

import pytest

from rlaif.errors import ConfigError, DataError, StorageError
from rlaif.report.page import Figure, Figures, Prose, Section
from rlaif.storage import only_writer
from tinyworld.gold import gold_utility
from tinyworld.lab.command import STUDIES, run_study
from tinyworld.lab.config import LabConfig, StudyName
from tinyworld.lab.methods import RLOO
from tinyworld.lab.page import BEGIN, END, insert_report, write_report
from tinyworld.lab.policies import PolicyStudy
from tinyworld.lab.study import Sizes, beside, gold_pairs, mean_over_seeds, over_seeds
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


def test_the_command_knows_every_study():
    assert set(get_args(StudyName)) == set(STUDIES)
    for name, study in STUDIES.items():
        assert study.name == name


@pytest.mark.parametrize("wrong", [{"seeds": ()}, {"seeds": (1, 1)}, {"num_pairs": 3}, {"max_steps": 0}])
def test_what_leaves_nothing_to_do_is_refused(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        LabConfig(**{"study": ("methods",), **wrong})


def test_stages_of_one_name_are_one_stage_in_all_studies(tmp_path):
    sizes = Sizes(8, 8, 8)
    seen = {}
    for study in STUDIES.values():
        stages = [s for phase in study.plan(tmp_path, 0, sizes) for track in phase.tracks for s in track]
        assert len(stages) == len({stage.name for stage in stages})
        for stage in stages:
            assert seen.setdefault(stage.name, stage) == stage


def test_a_seed_that_another_process_works_on_is_left_alone(tmp_path):
    config = LabConfig(study=("methods",), seeds=(0,), output_dir=tmp_path)
    with only_writer(tmp_path / "seed-0"), pytest.raises(StorageError, match="seed-0 is being written"):
        run_study(STUDIES["methods"], config)


def estimate(value, low=0.0, high=1.0):
    return {"value": value, "low": low, "high": high}


def test_the_interval_over_seeds_is_that_of_the_seeds_and_of_one_seed_its_own():
    apart = over_seeds([estimate(0.0), estimate(1.0)])
    assert (apart["value"], apart["low"], apart["high"]) == (0.5, 0.0, 1.0)
    assert over_seeds([estimate(0.7, 0.6, 0.8)]) == estimate(0.7, 0.6, 0.8)
    assert over_seeds([estimate(0.7), estimate(None, None, None)])["value"] is None
    assert (mean_over_seeds([0.5]), mean_over_seeds([0.0, 1.0])) == ("0.500", "0.500 [0.000, 1.000]")


def draw(ax):
    ax.plot([0, 1], [1, 2])


FOUND = [
    Section(
        "What was found",
        [
            beside([("won, %", "71", "93")]),
            Figures((Figure("A <line>", "How it rises.", draw),)),
            Prose("So it is."),
        ],
    )
]
MARKDOWN = """### What was found

**Beside the paper**

|        | paper | here |
| ------ | ----- | ---- |
| won, % | 71    | 93   |

![A <line>](images/methods-a-line.svg)

How it rises.

So it is.

Seed 0.
"""


def test_the_findings_go_between_the_marks_of_a_page(tmp_path):
    (tmp_path / "methods.md").write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    insert_report(tmp_path, STUDIES["methods"], FOUND, "Seed 0.")
    page = (tmp_path / "methods.md").read_text()
    assert page == f"before\n{BEGIN}\n\n{MARKDOWN}\n{END}\nafter\n"
    assert (tmp_path / "images" / "methods-a-line.svg").read_text().startswith("<svg")
    with pytest.raises(DataError, match="no <!--"):
        insert_report(tmp_path, STUDIES["noise"], FOUND, "Seed 0.")


def test_the_html_page_holds_the_same_and_refers_to_nothing(tmp_path):
    assert write_report(tmp_path, STUDIES["methods"], FOUND, "Seed 0.") == MARKDOWN
    page = (tmp_path / "methods.html").read_text()
    assert STUDIES["methods"].title in page
    assert page.count("<svg") == 1
    assert "Seed 0." in page
    assert not re.search(r"""(src|href)\s*=\s*["']?(https?:|images)""", page)


@pytest.mark.slow
def test_a_study_that_was_killed_goes_on_and_then_has_nothing_to_do(tmp_path, capsys):
    sizes = {"num_prompts": 24, "num_eval_prompts": 8, "num_pairs": 8, "max_steps": 1}
    flags = [text for name, size in sizes.items() for text in (f"--{name}", str(size))]
    command = [sys.executable, "-m", "rlaif.cli", "lab", "--study", "methods", "--seeds", "0", *flags]
    killed = subprocess.Popen([*command, "--output_dir", str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert killed.stdout is not None
    for line in killed.stdout:
        if " label | " in line:  # sampling is done, labelling at work
            break
    killed.kill()
    killed.communicate()  # until what ends its stages and servers, which holds its output too, is done
    sampled = (tmp_path / "seed-0" / "stages" / "sample.json").read_bytes()

    study = PolicyStudy("small", "One arm", (RLOO,), curves=True)
    config = LabConfig(study=("methods",), seeds=(0,), output_dir=tmp_path, **sizes)
    run_study(study, config)
    printed = capsys.readouterr().out
    report = (tmp_path / "small.md").read_text(encoding="utf-8")
    assert report in printed
    assert "$ rlaif sample" not in printed
    assert (tmp_path / "seed-0" / "stages" / "sample.json").read_bytes() == sampled
    assert "| RLOO " in report
    assert "commands at work for" in report
    page = (tmp_path / "small.html").read_text(encoding="utf-8")
    assert ">Reward models</h2>" in page
    assert page.count("<svg") == 3

    run_study(study, config)
    assert "$ rlaif" not in capsys.readouterr().out
    assert (tmp_path / "small.md").read_text(encoding="utf-8") == report

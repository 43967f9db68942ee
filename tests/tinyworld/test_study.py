"""The studies: equal budgets, commands that `rlaif` takes, gold in none of them, and figures by hand."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from rlaif.cli import find_command, parse_config
from rlaif.errors import DataError, StorageError
from tinyworld.arms import METHODS, REWARD_MODELS, STUDIES, Arm, Study, arms_of
from tinyworld.learning import BEGIN, END, Outcome, insert_report, over_seeds, smoothed, study_tables
from tinyworld.study import Sizes, plan, prepare

ARMS = arms_of(STUDIES)


def configs(tmp_path, studies):
    phases = plan(tmp_path, 3, studies, Sizes(800, 300))
    stages = [
        stage for phase in phases for track in phase.tracks for stage in track if stage.module == "rlaif.cli"
    ]
    found = {}
    for stage in stages:
        taken, rest = find_command([a.replace("{server}", "localhost:1") for a in stage.args])
        found[stage.name] = parse_config(taken, rest)
    return found


def test_every_stage_is_a_command_that_rlaif_takes(tmp_path):
    found = configs(tmp_path, STUDIES)
    for arm in ARMS:
        assert found[arm.name].seed == 3
        assert str(tmp_path / arm.name) in found["eval-all"].model_name_or_path
    assert {name for name in found if name.startswith("rm")} == set(REWARD_MODELS)


def test_all_methods_sample_the_same_number_of_responses_and_are_rewarded_alike(tmp_path):
    found = configs(tmp_path, STUDIES)
    assert len({found[arm.name].max_steps * found[arm.name].responses_per_step for arm in METHODS}) == 1
    assert {arm.reward for arm in METHODS} == {"rm"}


def test_online_dpo_takes_one_update_per_round(tmp_path):
    config = configs(tmp_path, STUDIES)["online-dpo"]
    assert config.num_train_epochs == 1
    assert config.per_device_train_batch_size >= config.rollout_batch_size


def test_the_arms_of_the_over_optimisation_differ_in_the_kl_term_alone(tmp_path):
    without, with_kl = (arm.name for arm in next(s for s in STUDIES if s.name == "overoptimisation").arms)
    found = configs(tmp_path, STUDIES)
    assert found[without].kl_coef == 0 < found[with_kl].kl_coef
    fields = {k: v for k, v in vars(found[without]).items() if k not in ("kl_coef", "output_dir")}
    assert fields == {k: vars(found[with_kl])[k] for k in fields}


def test_every_curve_has_its_samples(tmp_path):
    found = configs(tmp_path, STUDIES)
    for arm in ARMS:
        assert found[arm.name].samples_per_step >= found[arm.name].responses_per_step


def test_gold_reaches_nothing_that_is_trained():
    for phase in plan(Path("out"), 0, STUDIES, Sizes(800, 300)):
        for stage in (stage for track in phase.tracks for stage in track):
            assert stage.args[0] == "eval" or not any("gold" in argument for argument in stage.args)


def test_what_the_arms_share_is_made_once(tmp_path):
    names = [
        s.name for phase in plan(tmp_path, 0, STUDIES, Sizes(8, 8)) for track in phase.tracks for s in track
    ]
    assert len(names) == len(set(names))


def estimate(value, low=0.0, high=1.0):
    return {"value": value, "low": low, "high": high}


def outcome(win_rate, score, curve=(0.1, 0.3)):
    rating = {"win_rate": estimate(win_rate), "length_controlled": estimate(0.5), "score": estimate(score)}
    measured = {"ratings": [rating], "kl": estimate(2.0), "tokens": 14.0}
    curves = {name: np.array(curve) for name in ("gold", "reward", "kl")}
    return Outcome(measured, 64 * np.arange(1.0, 1 + len(curve)), curves)


def test_the_interval_over_seeds_is_that_of_the_seeds_and_of_one_seed_its_own():
    apart = over_seeds([estimate(0.0), estimate(1.0)])
    assert (apart["value"], apart["low"], apart["high"]) == (0.5, 0.0, 1.0)
    assert over_seeds([estimate(0.7, 0.6, 0.8)]) == estimate(0.7, 0.6, 0.8)
    assert over_seeds([estimate(0.7), estimate(None, None, None)])["value"] is None


def test_a_curve_is_averaged_over_the_last_tenth_of_its_steps():
    curve = np.arange(20.0)
    assert smoothed(curve)[[0, 1, 19]].tolist() == [0.0, 0.5, 18.5]
    assert smoothed(curve[:5]).tolist() == curve[:5].tolist()


def test_the_tables_by_hand():
    study = Study("x", "X", (Arm("a", "first", "ppo", "ppo"), Arm("b", "second", "dpo", "dpo")))
    found = {
        "start": [outcome(None, 0.1), outcome(None, 0.3)],
        "a": [outcome(0.75, 0.5, (0.1, 0.3, 0.2)), outcome(0.75, 0.6, (0.3, 0.5, 0.2))],
        "b": [outcome(0.5, 0.5), outcome(1.0, 0.9)],
    }
    over, by_seed = (
        [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
        for text in study_tables(study, found, [0, 1])
    )
    first = ["first", "75.0 [75.0, 75.0]", "50.0", "0.550", "2.000", "14.0", "0.400, 0.200", "0.40, 0.20"]
    assert over[2] == first
    assert over[3][:4] == ["second", "75.0 [50.0, 100.0]", "50.0", "0.700"]
    assert over[4][3] == "0.200"
    assert by_seed[3] == ["second", "50.0 [0.0, 100.0]", "100.0 [0.0, 100.0]"]


def test_a_folder_of_other_settings_is_refused_and_further_arms_are_not(tmp_path):
    one = Study("x", "X", METHODS[:1])
    prepare(tmp_path, 0, [one], Sizes(8, 8))
    prepare(tmp_path, 0, STUDIES, Sizes(8, 8))
    with pytest.raises(StorageError, match="other settings"):
        prepare(tmp_path, 0, STUDIES, Sizes(8, 9))
    renamed = replace(METHODS[0], title="proximal policy optimisation")
    prepare(tmp_path, 0, [Study("x", "X", (renamed,))], Sizes(8, 8))
    changed = replace(METHODS[0], settings="rloo")
    with pytest.raises(StorageError, match="holds a ppo with other settings"):
        prepare(tmp_path, 0, [Study("x", "X", (changed,))], Sizes(8, 8))


def test_the_report_goes_between_the_marks_of_a_page(tmp_path):
    out, docs = tmp_path / "out", tmp_path / "docs"
    docs.mkdir()
    (out / "images").mkdir(parents=True)
    (out / "learning.md").write_text("figures\n")
    (out / "images" / "learning-x.svg").write_text("<svg/>")
    (docs / "learning.md").write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    insert_report(out, docs)
    assert (docs / "learning.md").read_text() == f"before\n{BEGIN}\n\nfigures\n\n{END}\nafter\n"
    assert (docs / "images" / "learning-x.svg").read_text() == "<svg/>"
    (docs / "learning.md").write_text("no marks\n")
    with pytest.raises(DataError, match="no <!--"):
        insert_report(out, docs)


@pytest.mark.slow
def test_a_study_runs_in_one_command_and_again_without_training(tmp_path):
    what = ["--studies", "direct", "--seeds", "0", "--num_prompts", "24", "--num_eval_prompts", "8"]
    run = [sys.executable, "-m", "tinyworld.study", *what, "--max_steps", "1", "--output_dir", str(tmp_path)]
    first = subprocess.run(run, check=True, capture_output=True, text=True)
    report = (tmp_path / "learning.md").read_text(encoding="utf-8")
    assert report in first.stdout
    assert "| RLOO, direct |" in report
    kept = json.loads((tmp_path / "seed-0" / "settings" / "rloo.json").read_text(encoding="utf-8"))
    assert "advantage_estimator: rloo" in kept["settings"]
    again = subprocess.run(run, check=True, capture_output=True, text=True)
    assert "$ rlaif" not in again.stdout
    assert (tmp_path / "learning.md").read_text(encoding="utf-8") == report

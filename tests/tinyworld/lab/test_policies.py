"""Studies that train: equal budgets, commands that `rlaif` takes, gold in none of them, and figures by hand."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from rlaif.cli import find_command, parse_config
from rlaif.errors import StorageError
from tinyworld.lab.arms import RM, Arm, reward_models_of
from tinyworld.lab.command import STUDIES
from tinyworld.lab.findings import Outcome, policy_tables, smoothed
from tinyworld.lab.methods import METHODS
from tinyworld.lab.overoptimisation import WITH_KL, WITHOUT_KL
from tinyworld.lab.policies import PolicyStudy
from tinyworld.lab.study import Sizes

TRAINING = [study for study in STUDIES.values() if isinstance(study, PolicyStudy)]
ARMS = list(dict.fromkeys(arm for study in TRAINING for arm in study.arms))


def stages(folder, study, seed=0):
    return [
        stage
        for phase in study.plan(folder, seed, Sizes(800, 300, 400))
        for track in phase.tracks
        for stage in track
    ]


def configs(tmp_path, studies):
    found = {}
    for stage in (stage for study in studies for stage in stages(tmp_path, study, 3)):
        if stage.module == "rlaif.cli":
            taken, rest = find_command([a.replace("{server}", "localhost:1") for a in stage.args])
            found[stage.name] = parse_config(taken, rest)
    return found


def test_every_stage_is_a_command_that_rlaif_takes(tmp_path):
    found = configs(tmp_path, TRAINING)
    for study in TRAINING:
        for arm in study.arms:
            assert found[arm.name].seed == 3
            assert str(tmp_path / arm.name) in found[f"eval-{study.name}"].model_name_or_path
    assert {name for name in found if name.startswith("rm")} == {
        model.name for model in reward_models_of(ARMS)
    }


def test_all_methods_sample_the_same_number_of_responses_and_are_rewarded_alike(tmp_path):
    found = configs(tmp_path, TRAINING)
    assert len({found[arm.name].max_steps * found[arm.name].responses_per_step for arm in METHODS}) == 1
    assert {arm.reward for arm in METHODS} == {RM}


def test_online_dpo_takes_one_update_per_round(tmp_path):
    config = configs(tmp_path, TRAINING)["online-dpo"]
    assert config.num_train_epochs == 1
    assert config.per_device_train_batch_size >= config.rollout_batch_size


def test_the_arms_of_the_over_optimisation_differ_in_the_kl_term_alone(tmp_path):
    found = configs(tmp_path, TRAINING)
    of = {arm.reward: arm for arm in WITHOUT_KL}
    for without, with_kl in ((of[arm.reward], arm) for arm in WITH_KL):
        free, bound = found[without.name], found[with_kl.name]
        assert free.kl_coef == 0 < bound.kl_coef
        fields = {k: v for k, v in vars(free).items() if k not in ("kl_coef", "output_dir")}
        assert fields == {k: vars(bound)[k] for k in fields}


def test_every_curve_has_its_samples(tmp_path):
    found = configs(tmp_path, TRAINING)
    for arm in ARMS:
        assert found[arm.name].samples_per_step >= found[arm.name].responses_per_step


def test_gold_reaches_nothing_that_is_trained():
    for study in TRAINING:
        for stage in stages(Path("out"), study):
            assert stage.args[0] == "eval" or not any("gold" in argument for argument in stage.args)
            assert stage.module != "tinyworld.lab.human_labeler" or study.name == "rewards"


def estimate(value, low=0.0, high=1.0):
    return {"value": value, "low": low, "high": high}


def outcome(win_rate, score, curve=(0.1, 0.3)):
    rating = {"win_rate": estimate(win_rate), "length_controlled": estimate(0.5), "score": estimate(score)}
    measured = {"ratings": [rating], "kl": estimate(2.0), "tokens": 14.0}
    curves = {name: np.array(curve) for name in ("gold", "reward", "kl")}
    return Outcome(measured, 64 * np.arange(1.0, 1 + len(curve)), curves)


def test_a_curve_is_averaged_over_the_last_tenth_of_its_steps():
    curve = np.arange(20.0)
    assert smoothed(curve)[[0, 1, 19]].tolist() == [0.0, 0.5, 18.5]
    assert smoothed(curve[:5]).tolist() == curve[:5].tolist()


def test_the_tables_by_hand():
    arms = (Arm("a", "first", "ppo", "ppo"), Arm("b", "second", "dpo", "dpo"))
    found = {
        "start": [outcome(None, 0.1), outcome(None, 0.3)],
        "a": [outcome(0.75, 0.5, (0.1, 0.3, 0.2)), outcome(0.75, 0.6, (0.3, 0.5, 0.2))],
        "b": [outcome(0.5, 0.5), outcome(1.0, 0.9)],
    }
    over, by_seed = (list(map(list, table.rows)) for table in policy_tables(arms, found, [0, 1]))
    first = ["first", "75.0 [75.0, 75.0]", "50.0", "0.550", "2.000", "14.0", "0.400, 0.200", "0.40, 0.20"]
    assert over[0] == first
    assert over[1][:4] == ["second", "75.0 [50.0, 100.0]", "50.0", "0.700"]
    assert over[2][3] == "0.200"
    assert by_seed[1] == ["second", "50.0 [0.0, 100.0]", "100.0 [0.0, 100.0]"]


def test_arms_of_other_settings_are_refused_and_further_arms_are_not(tmp_path):
    def prepare(*arms):
        PolicyStudy("x", "X", arms).prepare(tmp_path, 0, Sizes(8, 8, 8))

    prepare(METHODS[0])
    prepare(*METHODS)
    prepare(replace(METHODS[0], title="proximal policy optimisation"))
    with pytest.raises(StorageError, match="holds a ppo with other settings"):
        prepare(replace(METHODS[0], settings="rloo"))

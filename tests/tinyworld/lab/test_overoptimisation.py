"""Over-optimisation: best of n read from scored samples, points of training, and labels of other labelers, by hand."""

import json
import subprocess
import sys

import numpy as np
import pytest

from rlaif.errors import DataError
from rlaif.records import Quarantine, read_preferences
from tinyworld.lab.findings import Outcome
from tinyworld.lab.overoptimisation import NS, read_best_of_n, rl_points

POST = "anna sold boats . ben found keys ."
RIGHT, HALF, WRONG = POST, "anna sold boats .", "anna sold lamps . ben found keys ."  # gold 1, 1/2, 0


def scored(reward, response):
    return {"prompt": [{"role": "user", "content": POST}], "response": response, "reward": reward}


def test_best_of_n_by_a_reward_that_prefers_the_wrong_response(tmp_path):
    rows = [scored(float(i < 32), WRONG if i < 32 else RIGHT) for i in range(64)]
    path = tmp_path / "rm.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = read_best_of_n(path)
    # Both of a pair earn nothing with probability 1/2 * 31/63, and then only is the right response taken.
    spared = 31 / 126
    assert found.gold[:2].tolist() == pytest.approx([0.5, spared])
    assert found.reward[:2].tolist() == pytest.approx([0.5, 1 - spared])
    assert len(found.gold) == len(NS)
    path.write_text(json.dumps({**scored(None, RIGHT), "reward_reason": "too long"}) + "\n")
    with pytest.raises(DataError, match="too long"):
        read_best_of_n(path)


def test_the_points_of_training_leave_out_where_it_had_not_begun():
    curves = {"kl": np.array([0.0, 4.0, 9.0]), "gold": np.array([0.1, 0.5, 0.3])}
    d, gold = rl_points(Outcome({}, np.empty(0), curves), start=0.1)
    assert d.tolist() == [2.0, 3.0]
    assert gold.tolist() == pytest.approx([0.4, 0.2])


def labelled(tmp_path, module, *options):
    pairs = [(WRONG, RIGHT, 0.9), (RIGHT, HALF, 0.8), (HALF, "ben found keys .", 0.7)]
    rows = [{"prompt": POST, "chosen": c, "rejected": r, "chosen_prob": p} for c, r, p in pairs]
    source, target = tmp_path / "labels.jsonl", tmp_path / "again.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    what = ["--labels", str(source), "--output", str(target), *options]
    subprocess.run([sys.executable, "-m", module, *what], check=True)
    return [(row.chosen, row.chosen_prob) for row in read_preferences(target, Quarantine(None))]


def test_people_turn_the_labels_that_are_wrong_and_leave_out_ties(tmp_path):
    assert labelled(tmp_path, "tinyworld.lab.human_labeler") == [(RIGHT, 1.0), (RIGHT, 1.0)]


def test_a_labeler_without_noise_leaves_the_first_labels_as_they_are(tmp_path):
    found = labelled(tmp_path, "tinyworld.lab.noisy_labeler", "--wrong", "0", "--limit", "2")
    assert found == [(WRONG, 0.9), (RIGHT, 0.8)]

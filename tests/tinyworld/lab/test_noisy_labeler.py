"""A noisy labeler knows how sure it can be: its labels are Bayes' posterior, and as many are wrong as asked for."""

import json
import subprocess
import sys
from statistics import NormalDist

import pytest

from rlaif.records import Quarantine, read_preferences
from tinyworld.lab.noisy_labeler import blurred, noise_scale

POST = "anna sold boats . ben found keys ."


@pytest.mark.parametrize("wrong", [0.05, 0.25, 0.4])
@pytest.mark.parametrize("e", [-2.0, -0.3, 0.0, 1.1])
def test_the_label_of_a_clear_pair_is_the_posterior_under_the_noise(wrong: float, e: float) -> None:
    scale = noise_scale(wrong)
    if_a, if_b = NormalDist(1.0, scale).pdf(1.0 + scale * e), NormalDist(-1.0, scale).pdf(1.0 + scale * e)
    assert blurred(1.0, scale, e) == pytest.approx(if_a / (if_a + if_b))


@pytest.mark.parametrize("wrong", [0.05, 0.25, 0.4])
def test_the_share_of_wrong_labels_is_the_one_asked_for(wrong: float) -> None:
    n = 10_000  # the quantiles of the noise, one each
    noise = [NormalDist().inv_cdf((i + 0.5) / n) for i in range(n)]
    assert sum(blurred(0.0, noise_scale(wrong), e) > 0.5 for e in noise) / n == pytest.approx(wrong, abs=1e-3)


def test_labels_of_the_two_orders_are_complements() -> None:
    assert blurred(0.8, 1.5, 0.7) + blurred(1 - 0.8, 1.5, -0.7) == pytest.approx(1.0)


def test_a_labelled_set_becomes_a_noisy_one_whatever_the_order_of_its_rows(tmp_path) -> None:
    rows = [
        {"prompt": POST, "chosen": f"anna sold boats . {i}", "rejected": f"ben found keys . {i}", "chosen_prob": 1.0}
        for i in range(400)
    ]  # fmt: skip

    def noisy(given: list[dict[str, object]], seed: int = 0) -> dict[str, tuple[bool, float]]:
        source, target = tmp_path / "labels.jsonl", tmp_path / "noisy.jsonl"
        source.write_text("".join(json.dumps(row) + "\n" for row in given))
        what = ["--labels", str(source), "--wrong", "0.25", "--seed", str(seed), "--output", str(target)]
        subprocess.run([sys.executable, "-m", "tinyworld.lab.noisy_labeler", *what], check=True)
        found = list(read_preferences(target, Quarantine(None)))
        return {r.chosen.split()[-1]: (r.chosen.startswith("ben"), r.chosen_prob) for r in found}

    first = noisy(rows)
    turned = [probability for is_turned, probability in first.values() if is_turned]
    assert len(first) == 400
    assert 70 < len(turned) < 130  # 100 expected, standard deviation 8.7
    assert all(0.5 <= probability <= 1 for _, probability in first.values())
    # As sure as it is right: the expected number of wrong labels, by its own account.
    assert sum(1 - probability for _, probability in first.values()) == pytest.approx(len(turned), abs=25)
    assert noisy(rows[::-1]) == first
    assert noisy(rows, seed=1) != first

"""Calibration maps: symmetric, monotone, equal to scipy's and scikit-learn's fits, and honest about their gain."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from labeler.audit.calibration import Calibration, fit, fit_isotonic, fit_temperature, monotone
from rlaif.errors import ConfigError, DataError, QualityError
from rlaif.measures import log_loss

PROBABILITIES = st.floats(0, 1, allow_nan=False)


def overconfident(count: int, temperature: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Labels of a judge whose log-odds are `temperature` times too large, and what people said."""
    rng = np.random.default_rng(seed)
    true = rng.normal(0, 1.5, count)
    human = (rng.uniform(size=count) < 1 / (1 + np.exp(-true))).astype(float)
    return 1 / (1 + np.exp(-temperature * true)), human


def fitted(method: str, count: int = 2000) -> Calibration:
    p, human = overconfident(count, 3.0)
    return fit(method, p, human, judge="hf:judge", rubric_hash="abc")  # type: ignore[arg-type]


def test_temperature_finds_the_factor_of_an_overconfident_judge() -> None:
    p, human = overconfident(20_000, 3.0)
    assert fit_temperature(p, human) == pytest.approx(3.0, rel=0.05)


def test_temperature_is_the_slope_that_scikit_learn_finds() -> None:
    linear = pytest.importorskip("sklearn.linear_model")
    p, human = overconfident(400, 2.0)
    x = np.log(p / (1 - p))
    smooth = (400 * human + 1) / 402
    design = np.concatenate([x, x])[:, None]
    model = linear.LogisticRegression(C=np.inf, fit_intercept=False, tol=1e-12)
    model.fit(design, np.repeat([1, 0], 400), sample_weight=np.concatenate([smooth, 1 - smooth]))
    assert 1 / fit_temperature(p, human) == pytest.approx(model.coef_[0, 0], rel=1e-4)


def test_a_judge_that_never_errs_stays_finite() -> None:
    temperature = fit_temperature([0.9] * 30, [1.0] * 30)
    assert 1 / (1 + math.exp(-math.log(9) / temperature)) == pytest.approx(31 / 32)


@pytest.mark.parametrize("fitting", [fit_temperature, fit_isotonic], ids=["temperature", "isotonic"])
def test_a_judge_that_disagrees_with_people_cannot_be_calibrated(fitting: Callable[..., object]) -> None:
    for p in ([0.9] * 30, [0.5] * 30):
        with pytest.raises(QualityError, match="no better than a coin"):
            fitting(p, [0.0] * 30)


@given(st.lists(st.tuples(st.floats(-5, 5), st.floats(0.1, 3)), max_size=30))
def test_monotone_fit_is_that_of_scipy(rows: list[tuple[float, float]]) -> None:
    optimize = pytest.importorskip("scipy.optimize")
    values, weights = [r[0] for r in rows], [r[1] for r in rows]
    expected = optimize.isotonic_regression(values, weights=weights).x if rows else []
    assert monotone(values, weights) == pytest.approx(np.asarray(expected), abs=1e-9)


def test_isotonic_by_hand() -> None:
    # Confidence 0.6 is right once in two, 0.9 three times in four; six pairs smooth y to (6 y + 1) / 8.
    knots = fit_isotonic([0.6, 0.6, 0.9, 0.9, 0.1, 0.9], [1, 0, 1, 1, 0, 0])
    smooth = (6 * 0.75 + 1) / 8
    assert knots == ((0.5, 0.5), (pytest.approx(0.6), pytest.approx(0.5)), (0.9, pytest.approx(smooth)))


@pytest.mark.parametrize("method", ["temperature", "isotonic"])
def test_a_map_is_symmetric_monotone_and_keeps_ties(method: str) -> None:
    calibration = fitted(method)
    p = np.linspace(0, 1, 1001)
    mapped = calibration.apply_all(p)
    assert mapped + calibration.apply_all(1 - p) == pytest.approx(np.ones(1001), abs=1e-12)
    assert (np.diff(mapped) >= -1e-12).all()
    assert calibration.apply(0.5) == 0.5
    assert 0 < mapped[0] < mapped[-1] < 1


@pytest.mark.parametrize("method", ["temperature", "isotonic"])
def test_calibration_brings_an_overconfident_judge_closer_to_people(method: str) -> None:
    calibration = fitted(method)
    assert calibration.helps
    assert calibration.after["ece"] < calibration.before["ece"] / 3
    assert calibration.after["brier"] < calibration.before["brier"]


def test_the_gain_is_measured_on_labels_the_map_has_not_seen() -> None:
    # Labels of a coin with all different values: isotonic fits them in-sample, and loses out of sample.
    rng = np.random.default_rng(2)
    p, human = rng.uniform(size=60), rng.integers(0, 2, 60).astype(float)
    calibration = fit("isotonic", p, human, judge="j", rubric_hash="r")
    assert log_loss(calibration.apply_all(p), human) < math.log(2)
    assert calibration.after["log_loss"] > log_loss(calibration.apply_all(p), human) + 0.02


def test_rows_of_one_prompt_stay_in_one_fold() -> None:
    # Every row occurs ten times. Copies in other folds would teach isotonic the answers of the rows held out.
    rng = np.random.default_rng(2)
    p, human = rng.uniform(size=40), rng.integers(0, 2, 40).astype(float)
    groups = [f"prompt {k}" for k in range(40) for _ in range(10)]
    p, human = np.repeat(p, 10), np.repeat(human, 10)
    grouped = fit("isotonic", p, human, judge="j", rubric_hash="r", groups=groups)
    leaking = fit("isotonic", p, human, judge="j", rubric_hash="r")
    assert grouped.after["log_loss"] > leaking.after["log_loss"] + 0.02


def test_a_calibration_comes_back_from_its_file(tmp_path: Path) -> None:
    calibration = fitted("isotonic")
    calibration.save(tmp_path / "calibration.json")
    again = Calibration.load(tmp_path / "calibration.json")
    assert again == calibration
    assert again.apply(0.83) == calibration.apply(0.83)
    assert json.loads((tmp_path / "calibration.json").read_text())["pairs"] == 2000


@pytest.mark.parametrize("content", [None, "", "{}", "[1]", '{"method": "magic"}', "\xff"])
def test_a_file_that_is_no_calibration_is_refused(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "calibration.json"
    if content is not None:
        path.write_bytes(content.encode("latin-1"))
    with pytest.raises(DataError):
        Calibration.load(path)


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"judge": "hf:other"}, "another judge"),
        ({"rubric_hash": "xyz"}, "another rubric hash"),
    ],
    ids=["judge", "rubric"],
)
def test_a_calibration_refuses_labels_of_another_kind(other: dict[str, str], said: str) -> None:
    calibration = fitted("temperature")
    calibration.require(judge="hf:judge", rubric_hash="abc", version="any")
    with pytest.raises(ConfigError, match=said):
        calibration.require(**{"judge": "hf:judge", "rubric_hash": "abc", **other})


def test_a_known_version_must_match() -> None:
    p, human = overconfident(100, 2.0)
    calibration = fit("temperature", p, human, judge="j", rubric_hash="r", version="with rationale")
    calibration.require(judge="j", rubric_hash="r", version="with rationale")
    with pytest.raises(ConfigError, match="settings"):
        calibration.require(judge="j", rubric_hash="r", version="without")


@pytest.mark.parametrize(("count", "groups"), [(19, None), (30, ["a", "b"] * 15)], ids=["pairs", "prompts"])
def test_too_little_data_is_refused(count: int, groups: list[str] | None) -> None:
    with pytest.raises(DataError, match="too few"):
        fit("temperature", [0.9] * count, [1.0] * count, judge="j", rubric_hash="r", groups=groups)

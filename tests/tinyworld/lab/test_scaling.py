"""The maths of over-optimisation, from values by hand and from brute force."""

import math
from itertools import combinations

import numpy as np
import pytest

from tinyworld.lab.scaling import Curve, best_of_n, best_of_n_weights, fit, kl_best_of_n


def test_the_kl_of_best_of_n_by_hand():
    assert kl_best_of_n(1) == 0.0
    assert kl_best_of_n(2) == pytest.approx(0.6931472 - 0.5)
    assert kl_best_of_n(4) == pytest.approx(1.3862944 - 0.75)


def test_the_weights_by_hand():
    # Of three samples, two of the three pairs have the highest as their best, one the middle one.
    assert best_of_n_weights(3, 2).tolist() == pytest.approx([0, 1 / 3, 2 / 3])
    assert best_of_n_weights(3, 1).tolist() == pytest.approx([1 / 3] * 3)
    assert best_of_n_weights(3, 3).tolist() == [0, 0, 1]
    with pytest.raises(ValueError, match="best of 4"):
        best_of_n_weights(3, 4)


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_the_estimator_is_the_mean_over_all_choices_of_n_samples(n):
    rng = np.random.default_rng(0)
    proxy, gold = rng.integers(0, 4, (2, 6)).astype(float), rng.normal(size=(2, 6))  # with equal proxies

    def best(prompt, chosen):
        highest = max(proxy[prompt, i] for i in chosen)
        return np.mean([gold[prompt, i] for i in chosen if proxy[prompt, i] == highest])

    expected = [best(prompt, chosen) for prompt in range(2) for chosen in combinations(range(6), n)]
    assert best_of_n(proxy, gold, n) == pytest.approx(np.mean(expected))


def test_the_fits_find_the_curves_that_the_points_are_on():
    d = np.array([0.5, 1.0, 2.0, 3.0])
    bon = fit("bon", d, d * (2.0 - 0.5 * d))
    assert (bon.alpha, bon.beta, bon.r2) == pytest.approx((2.0, 0.5, 1.0))
    assert bon.peak == pytest.approx(2.0)  # 2 - d = 0
    assert bon(np.array([2.0])) == pytest.approx(2.0)
    rl = fit("rl", d, d * (2.0 - 1.0 * np.log(d)))
    assert (rl.alpha, rl.beta, rl.r2) == pytest.approx((2.0, 1.0, 1.0))
    assert rl.peak == pytest.approx(math.e)  # 2 - log d - 1 = 0
    assert fit("bon", d, d * (2.0 + 0.5 * d)).peak is None
    assert fit("bon", d, d * (-2.0 - 0.5 * d)).peak == 0.0  # it falls from the start
    assert fit("rl", d, d * (-1.0 - np.log(d))).peak == pytest.approx(math.exp(-2))
    far = Curve("rl", alpha=2.0, beta=1e-3, r2=1.0).peak  # e^1999, which no float holds
    assert far is not None and far > 1e300


def test_a_fit_is_the_least_squares_one():
    # Two equal abscissas with rewards 1 and 3: the curve goes through their mean.
    curve = fit("bon", np.array([1.0, 1.0, 2.0]), np.array([1.0, 3.0, 2.0]))
    assert curve(np.array([1.0, 2.0])) == pytest.approx([2.0, 2.0])
    assert curve.r2 == pytest.approx(0.0)  # residuals 1, 1, 0 about a mean of 2

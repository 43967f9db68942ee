"""The maths of reward model over-optimisation: best of n, its KL, and curves over the square root of KL.

Gao, Schulman and Hilton, "Scaling laws for reward model overoptimization" (arXiv 2210.10760). Their gold reward as a
function of d = sqrt(KL to the initial policy), measured from what the initial policy earns, is

    R_bon(d) = d (alpha - beta d)        for best of n
    R_RL(d)  = d (alpha - beta log d)    for reinforcement learning
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Shape = Literal["bon", "rl"]


def kl_best_of_n(n: int) -> float:
    """KL of the best of n samples to the policy that they come from, in nats: log n - (n - 1) / n.

    Exact where no two samples are alike; an upper bound otherwise.
    """
    return math.log(n) - (n - 1) / n


def best_of_n_weights(samples: int, n: int) -> Floats:
    """(samples,) chance of each sample, from the lowest reward to the highest, to be the best of n drawn of them.

    C(i - 1, n - 1) / C(samples, n) for the i-th lowest: the unbiased estimator of WebGPT (arXiv 2112.09332,
    appendix I), which Gao et al. use too.

    Raises:
        ValueError: n is not in [1, samples].
    """
    if not 1 <= n <= samples:
        raise ValueError(f"the best of {n} cannot be had from {samples} samples")
    ways = math.comb(samples, n)
    return np.array([math.comb(i, n - 1) / ways for i in range(samples)])


def best_of_n(proxy: Floats, value: Floats, n: int) -> float:
    """Expected mean of `value` over prompts where the sample of highest `proxy` of n is taken.

    Args:
        proxy: (prompts, samples) what the best is chosen by. Samples of equal proxy are taken with equal chance.
        value: (prompts, samples) what the choice is worth; `proxy` itself for the reward.
        n: samples to choose from, in [1, samples].
    """
    weights = best_of_n_weights(proxy.shape[1], n)
    means = []
    for row, worth in zip(proxy, value, strict=True):
        _, place, counts = np.unique(row, return_inverse=True, return_counts=True)
        # Equal rewards share the weights of their ranks.
        shares = np.add.reduceat(weights, np.concatenate(([0], np.cumsum(counts)[:-1]))) / counts
        means.append(float(shares[place] @ worth))
    return float(np.mean(means))


@dataclass(frozen=True, slots=True)
class Curve:
    """A fitted curve: see the module's docstring.

    Attributes:
        shape: which of the two.
        alpha, beta: its coefficients.
        r2: share of the points' variance that it explains.
    """

    shape: Shape
    alpha: float
    beta: float
    r2: float

    def __call__(self, d: Floats) -> Floats:
        """(N,) its value at d > 0, in square roots of nats."""
        return np.asarray(_terms(self.shape, d) @ np.array([self.alpha, self.beta]), dtype=np.float64)

    @property
    def peak(self) -> float | None:
        """Where it is highest, in square roots of nats; None for a curve that does not fall."""
        if self.beta <= 0:
            return None
        if self.shape == "rl":
            return math.exp(min(self.alpha / self.beta - 1, 700.0))  # beyond that, no float holds it
        return max(0.0, self.alpha / (2 * self.beta))


def fit(shape: Shape, d: Floats, reward: Floats) -> Curve:
    """The curve nearest to (N,) points by least squares; both shapes are linear in their coefficients.

    Args:
        shape: which curve.
        d: (N,) square roots of KL, positive.
        reward: (N,) above what the initial policy earns.
    """
    terms = _terms(shape, d)
    coefficients = np.linalg.lstsq(terms, reward, rcond=None)[0]
    rest = reward - terms @ coefficients
    spread = reward - reward.mean()
    alpha, beta = map(float, coefficients)
    return Curve(shape, alpha, beta, 1.0 - float(rest @ rest) / float(spread @ spread))


def _terms(shape: Shape, d: Floats) -> Floats:
    """(N, 2) what alpha and beta are multiplied by."""
    return np.stack([d, -d * d if shape == "bon" else -d * np.log(d)], axis=1)

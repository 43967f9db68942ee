"""Maps from a judge's probabilities to those at which people agree, fitted on human labels.

A judge that says 0.99 and is right seven times in ten is overconfident, and its soft labels teach a reward model so.
A map repairs that without another question. Every map is symmetric, `apply(1 - p) = 1 - apply(p)`, and monotone, so
it never reverses a label. It belongs to the judge and the rubric it was fitted on and refuses others.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from rlaif.errors import ConfigError, DataError, QualityError
from rlaif.measures import brier, expected_calibration_error, log_loss
from rlaif.storage import write_atomic

Floats = NDArray[np.float64]
Method = Literal["temperature", "isotonic"]

FOLDS = 5
LEAST_PAIRS = 20
_EDGE = 1e-6
"""Labels nearer to 0 or 1 have no finite log-odds worth the name; they are read as this near."""

_NO_BETTER = (
    "the judge agrees with people no better than a coin, so there is nothing to calibrate; "
    "try another judge or rubric"
)


@dataclass(frozen=True, slots=True)
class Scores:
    """How well labels are calibrated; see `rlaif.measures`."""

    brier: float
    ece: float
    log_loss: float

    @classmethod
    def of(cls, p: ArrayLike, human: ArrayLike) -> Scores:
        """The scores of (N,) labels beside (N,) human labels."""
        return cls(brier(p, human), expected_calibration_error(p, human), log_loss(p, human))


class Calibration(BaseModel):
    """A fitted map, and what it did for labels that it had not seen.

    Make it with `fit`, keep it with `save`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    method: Method
    temperature: float | None = Field(None, gt=0, description="Divides the log-odds; above 1 softens labels.")
    knots: tuple[tuple[float, float], ...] = Field(
        (), description="Isotonic: (label, calibrated) from (0.5, 0.5) upwards; linear between, level after."
    )
    judge: str = Field(description="The judge whose labels these were.")
    rubric_hash: str = Field(description="Content hash of the rubric it was asked with.")
    version: str = Field(
        "", description="Identity of everything else that labels depend on; empty if unknown."
    )
    pairs: int = Field(description="Human-labelled pairs it was fitted on.")
    before: dict[str, float] = Field(description="Scores of the labels as they were.")
    after: dict[str, float] = Field(
        description="Cross-validated scores: each label mapped by a fit without it."
    )

    def apply(self, p: float) -> float:
        """The calibrated probability of one label; 1/2 stays 1/2."""
        return float(self.apply_all([p])[0])

    def apply_all(self, p: ArrayLike) -> Floats:
        """(N,) calibrated probabilities of (N,) labels in [0, 1]."""
        return _mapped(np.asarray(p, dtype=np.float64), self.temperature, self.knots)

    @property
    def helps(self) -> bool:
        """Whether labels that the map had not seen came closer to people by the log loss."""
        return self.after["log_loss"] < self.before["log_loss"]

    def require(self, *, judge: str, rubric_hash: str, version: str = "") -> None:
        """Refuse to be used for other labels than those it was fitted on.

        Raises:
            ConfigError: another judge, rubric or way of asking.
        """
        for what, mine, given in (
            ("judge", self.judge, judge),
            ("rubric hash", self.rubric_hash, rubric_hash),
            ("settings of the judge (version)", self.version, version),
        ):
            if mine and given and mine != given:
                raise ConfigError(
                    f"the calibration was fitted on another {what}: {mine}, not {given}; "
                    "fit one for this judge with `rlaif eval judge --calibrate temperature`"
                )

    def save(self, path: str | Path) -> None:
        """Write the map as JSON.

        Raises:
            StorageError: the file cannot be written.
        """
        write_atomic(Path(path), json.dumps(self.model_dump(), indent=2) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Calibration:
        """Read what `save` wrote.

        Raises:
            DataError: there is no such file, or it is no calibration.
        """
        try:
            text = Path(path).read_text(encoding="utf-8")
            return cls.model_validate_json(text)
        except OSError as err:
            raise DataError(f"calibration {path} cannot be read: {err.strerror}; check the path") from err
        except (ValidationError, UnicodeDecodeError) as err:
            raise DataError(
                f"{path} is no calibration; make one with `rlaif eval judge --calibrate temperature`"
            ) from err


def fit(
    method: Method,
    p: ArrayLike,
    human: ArrayLike,
    *,
    judge: str,
    rubric_hash: str,
    version: str = "",
    groups: Sequence[str] | None = None,
) -> Calibration:
    """Fit a map on human-labelled pairs and measure it by cross-validation.

    Args:
        method: `temperature` divides the log-odds by one number (Guo et al. 2017); `isotonic` is the best monotone
            map (Zadrozny and Elkan 2002), which needs some hundred pairs.
        p: (N,) P(A preferred) by the judge.
        human: (N,) P(A preferred) by people; ties as 1/2 belong in.
        judge: name of the judge.
        rubric_hash: of its rubric.
        version: of the judge, if known.
        groups: (N,) content ids; rows of one id (one prompt) fall into one fold. None: every row by itself.

    Raises:
        DataError: fewer than `LEAST_PAIRS` pairs.
        QualityError: the labels are no better than a coin, so that there is nothing to calibrate.
    """
    ours, theirs = np.asarray(p, dtype=np.float64), np.asarray(human, dtype=np.float64)
    if len(ours) < LEAST_PAIRS:
        raise DataError(
            f"{len(ours)} pairs with a human label are too few to calibrate on; give {LEAST_PAIRS} or more"
        )
    names = [str(k) for k in range(len(ours))] if groups is None else list(groups)
    if len(set(names)) < FOLDS:
        raise DataError(f"{len(set(names))} prompts are too few to cross-validate on; give {FOLDS} or more")
    fold = {name: k % FOLDS for k, name in enumerate(sorted(set(names)))}
    folds = np.array([fold[name] for name in names])
    held_out = np.full(len(ours), 0.5)
    for k in range(FOLDS):
        rest, mine = folds != k, folds == k
        held_out[mine] = _mapped(ours[mine], *_fitted(method, ours[rest], theirs[rest]))
    temperature, knots = _fitted(method, ours, theirs)
    return Calibration(
        method=method,
        temperature=temperature,
        knots=knots,
        judge=judge,
        rubric_hash=rubric_hash,
        version=version,
        pairs=len(ours),
        before=asdict(Scores.of(ours, theirs)),
        after=asdict(Scores.of(held_out, theirs)),
    )


Knots = tuple[tuple[float, float], ...]


def _fitted(method: Method, p: Floats, human: Floats) -> tuple[float | None, Knots]:
    return (None, fit_isotonic(p, human)) if method == "isotonic" else (fit_temperature(p, human), ())


def _mapped(p: Floats, temperature: float | None, knots: Knots) -> Floats:
    """The map on confidence max(p, 1 - p), reflected: symmetric to the last bit."""
    confidence = np.maximum(p, 1 - p)
    if temperature is not None:
        sure = 1 / (1 + np.exp(-_log_odds(confidence) / temperature))
    else:
        sure = np.interp(confidence, [k[0] for k in knots], [k[1] for k in knots])
    return np.where(p > 0.5, sure, np.where(p < 0.5, 1 - sure, 0.5))


def _log_odds(p: Floats) -> Floats:
    inside = np.clip(p, _EDGE, 1 - _EDGE)
    return np.log(inside) - np.log1p(-inside)


def _smoothed(human: Floats) -> Floats:
    """Human labels moved inside (0, 1) as if one pair more had gone each way (Platt 1999, section 2.2).

    Without it, a judge that never errs on the pairs at hand would be made infinitely sure.
    """
    return (len(human) * human + 1) / (len(human) + 2)


def fit_temperature(p: ArrayLike, human: ArrayLike) -> float:
    """The temperature T that minimises the log loss of sigmoid(log-odds(p) / T).

    Args:
        p: (N,) P(A preferred) by the judge.
        human: (N,) P(A preferred) by people.

    Raises:
        QualityError: no positive temperature is better than a coin.
    """
    x, y = _log_odds(np.asarray(p, dtype=np.float64)), _smoothed(np.asarray(human, dtype=np.float64))

    def slope(b: float) -> float:
        """Derivative of the log-likelihood by the inverse temperature; falls as b rises."""
        return float(np.sum((y - 1 / (1 + np.exp(-b * x))) * x))

    low, high = 0.0, 1.0
    if slope(low) <= 0:
        raise QualityError(_NO_BETTER)
    while slope(high) > 0 and high < 2.0**20:
        low, high = high, 2 * high
    for _ in range(100):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if slope(middle) > 0 else (low, middle)
    return 1.0 / high


def fit_isotonic(p: ArrayLike, human: ArrayLike) -> Knots:
    """The monotone symmetric map with the least squared error, from (0.5, 0.5) upwards.

    Both (p, y) and (1 - p, 1 - y) enter, whichever response is called A; the best monotone map of such data is
    symmetric itself, so the half above 1/2 says it all.

    Args:
        p: (N,) P(A preferred) by the judge.
        human: (N,) P(A preferred) by people.

    Returns:
        Ends of the level stretches, (label, calibrated), ascending in both.

    Raises:
        QualityError: the best map is level: 1/2 for every pair.
    """
    ours, theirs = np.asarray(p, dtype=np.float64), _smoothed(np.asarray(human, dtype=np.float64))
    confidence, right = np.maximum(ours, 1 - ours), np.where(ours >= 0.5, theirs, 1 - theirs)
    x, where = np.unique(np.concatenate([confidence, 1 - confidence]), return_inverse=True)
    y, count = np.zeros(len(x)), np.bincount(where)
    np.add.at(y, where, np.concatenate([right, 1 - right]))
    level = monotone(y / count, count)
    keep = np.ones(len(x), dtype=np.bool_)
    keep[1:-1] = (level[1:-1] != level[:-2]) | (level[1:-1] != level[2:])
    upper = [(float(a), float(b)) for a, b in zip(x[keep], level[keep], strict=True) if a > 0.5]
    if not upper or upper[-1][1] <= 0.5 + _EDGE:
        raise QualityError(_NO_BETTER)
    return ((0.5, 0.5), *upper)


def monotone(values: ArrayLike, weights: ArrayLike) -> Floats:
    """Weighted least-squares fit of a nondecreasing sequence, by pooling adjacent violators (Ayer et al. 1955).

    Args:
        values: (N,) in order.
        weights: (N,) > 0.

    Returns:
        (N,) fitted values.
    """
    blocks: list[tuple[float, float, int]] = []
    for value, weight in zip(np.asarray(values, np.float64), np.asarray(weights, np.float64), strict=True):
        mean, total, length = float(value), float(weight), 1
        while blocks and blocks[-1][0] >= mean:
            before, heavy, long = blocks.pop()
            mean = (mean * total + before * heavy) / (total + heavy)
            total, length = total + heavy, length + long
        blocks.append((mean, total, length))
    return np.concatenate([np.full(length, mean) for mean, _, length in blocks]) if blocks else np.zeros(0)

"""Means over samples, with the interval in which they would be for others; and rank correlations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

import numpy as np


@dataclass(frozen=True)
class Estimate:
    """A mean with the interval in which it would be for other samples.

    Attributes:
        value: the mean, or whatever `of` says.
        low: lower end of the 95% bootstrap interval.
        high: upper end.
        each: what it is made of, one for each sample.
    """

    value: float
    low: float
    high: float
    each: np.ndarray

    def __str__(self) -> str:
        return f"{self.value:.3f} ({self.low:.3f} to {self.high:.3f})"

    @classmethod
    def of(cls, statistic: Callable[..., Any], *samples: np.ndarray) -> Self:
        """A statistic of samples that are drawn again with replacement, together (percentile bootstrap).

        Of a single sample the interval is NaN.
        """
        from scipy import stats  # noqa: PLC0415 - takes as long to import as all else but torch

        value = float(statistic(*samples))
        if len(samples[0]) < 2:
            return cls(value, np.nan, np.nan, samples[0])
        drawn = stats.bootstrap(
            samples, statistic, paired=True, vectorized=False, n_resamples=1000, method="percentile", rng=0
        )
        low, high = drawn.confidence_interval
        return cls(value, float(low), float(high), samples[0])


def ranks(values: np.ndarray) -> np.ndarray:
    """From one on, each column on its own; of equal values the mean of theirs."""
    from scipy import stats  # noqa: PLC0415 - see `Estimate.of`

    found: np.ndarray = stats.rankdata(values, axis=0)
    return found


def rank_correlations(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Spearman's, of each column of a with that of b; zero where one of them is constant."""
    sides = [ranks(side) for side in (a, b)]
    sides = [side - side.mean(0) for side in sides]
    sizes = np.sqrt(np.prod([(side**2).sum(0) for side in sides], axis=0))
    correlations: np.ndarray = np.zeros_like(sizes)
    np.divide((sides[0] * sides[1]).sum(0), sizes, out=correlations, where=sizes > 0)
    return correlations

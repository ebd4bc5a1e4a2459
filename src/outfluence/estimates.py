"""Means over samples, with the interval in which they would be for others; and rank correlations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

import numpy as np

#: Samples drawn again of the samples, and the ends of the interval in percent.
_DRAWS, _INTERVAL = 1000, (2.5, 97.5)


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
        value, n = float(statistic(*samples)), len(samples[0])
        if n < 2:
            return cls(value, np.nan, np.nan, samples[0])
        draws = np.random.default_rng(0).integers(0, n, (_DRAWS, n))
        drawn = [statistic(*(sample[draw] for sample in samples)) for draw in draws]
        low, high = np.percentile(drawn, _INTERVAL)
        return cls(value, float(low), float(high), samples[0])


def ranks(values: np.ndarray) -> np.ndarray:
    """From one on, each column on its own; of equal values the mean of theirs."""
    result = np.empty(values.shape)
    for column, into in zip(values.T, result.T, strict=True):
        _, place, counts = np.unique(column, return_inverse=True, return_counts=True)
        into[:] = (counts.cumsum() - (counts - 1) / 2)[place]
    return result


def rank_correlations(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Spearman's, of each column of a with that of b; zero where one of them is constant."""
    sides = [ranks(side) for side in (a, b)]
    sides = [side - side.mean(0) for side in sides]
    sizes = np.sqrt(np.prod([(side**2).sum(0) for side in sides], axis=0))
    correlations: np.ndarray = np.zeros_like(sizes)
    np.divide((sides[0] * sides[1]).sum(0), sizes, out=correlations, where=sizes > 0)
    return correlations

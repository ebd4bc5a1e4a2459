"""The inverse harmonic mean: the mean of the inverses of damped rank-one terms, instead of the inverse of their mean.

Per block ``(H + lambda)^-1`` is taken to be ``1/N sum_i (g_i g_i^T + lambda)^-1``, g_i a training gradient.
By Sherman & Morrison that is ``1/lambda (1 - 1/N sum_i g_i g_i^T / (lambda + |g_i|^2))`` (DataInf: Kwon et al. 2024).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from outfluence.data import Batch, Data
from outfluence.errors import ProblemError
from outfluence.problem import Problem
from outfluence.rows import DenseRows, GradientRows, check_finite
from outfluence.solvers import ReadingInverse, Regularization, per_block


@dataclass(frozen=True)
class HarmonicSolver:
    """Inverse harmonic mean.

    Args:
        regularization: lambda > 0, one for all blocks or one for each.
    """

    regularization: Regularization

    def fit(self, problem: Problem, data: Data) -> HarmonicInverse:
        """Reads nothing."""
        return HarmonicInverse(problem, data, per_block(self.regularization, problem))

    def restore(self, problem: Problem, data: Data, tensors: Mapping[str, Tensor]) -> HarmonicInverse:  # noqa: ARG002
        """See `Solver`."""
        return self.fit(problem, data)

    def options(self) -> dict[str, Any]:
        """None."""
        return {}


@dataclass(frozen=True)
class HarmonicInverse(ReadingInverse):
    """See the module; the mean is over all N samples, whatever the batches."""

    def __post_init__(self) -> None:
        for block, damping in self.regularization.items():
            if not damping > 0:
                raise ProblemError(
                    f"the inverse harmonic mean divides by the regularization: that of block {block!r} must be > 0"
                )

    def solve(self, gradients: GradientRows) -> tuple[DenseRows, dict[str, dict[str, Any]]]:
        """One pass over the data, whose gradients it computes again."""
        total = self.source.total(HarmonicSum(self.problem, gradients.by_block(), self.regularization))
        solved = [
            (rows - total[block] / len(self.source)) / self.regularization[block]
            for block, rows in gradients.by_block().items()
        ]
        return DenseRows(torch.cat(solved, dim=1), gradients.sections), {}


@dataclass(frozen=True)
class HarmonicSum:
    """A statistic: ``sum_i g_i g_i^T / (lambda + |g_i|^2)`` of each block, times gradients."""

    problem: Problem
    gradients: Mapping[str, Tensor]
    regularization: Mapping[str, float]

    def __call__(self, batch: Batch, start: int) -> dict[str, Tensor]:
        """See `Statistic`."""
        terms = self.problem.gradients(*batch)
        for array in terms.arrays.values():
            check_finite(array, "gradients", "training", start)
        sums = {}
        for block, g in terms.by_block().items():
            weight = 1 / (self.regularization[block] + g.square().sum(1))
            sums[block] = ((self.gradients[block] @ g.T) * weight) @ g
        return sums

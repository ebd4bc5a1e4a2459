"""No inverse at all: a score is the product of two gradients."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from torch import Tensor

from outfluence.data import Data
from outfluence.errors import ProblemError
from outfluence.problem import Problem
from outfluence.rows import DenseRows, GradientRows
from outfluence.solvers import Inverse, Regularization, per_block


@dataclass(frozen=True)
class IdentitySolver:
    """Nothing is fitted."""

    regularization: Regularization = None

    def fit(self, problem: Problem, data: Data) -> IdentityInverse:  # noqa: ARG002
        """See `Solver`."""
        return IdentityInverse(per_block(self.regularization, problem))

    def restore(self, problem: Problem, data: Data, tensors: Mapping[str, Tensor]) -> IdentityInverse:  # noqa: ARG002
        """See `Solver`."""
        return IdentityInverse(per_block(self.regularization, problem))

    def options(self) -> dict[str, Any]:
        """None."""
        return {}


@dataclass(frozen=True)
class IdentityInverse(Inverse):
    """The identity.

    Attributes:
        regularization: zero, per block.
    """

    regularization: Mapping[str, float]

    def left(self, gradients: GradientRows) -> GradientRows:
        """The gradients themselves."""
        return gradients

    def dense(self, left: GradientRows) -> DenseRows:
        """The gradients as vectors."""
        return left.dense()

    def with_regularization(self, regularization: Mapping[str, float]) -> Self:
        """There is nothing to regularize.

        Raises:
            ProblemError: unless it is zero.
        """
        if any(regularization.values()):
            raise ProblemError("products of gradients have no regularization: nothing is inverted")
        return self

    @property
    def tensors(self) -> dict[str, Tensor]:
        """None."""
        return {}

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> Self:  # noqa: ARG002
        """See `Inverse`."""
        return self

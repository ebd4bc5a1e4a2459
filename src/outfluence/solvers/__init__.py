"""Ways to invert the curvature, one family a file.

A solver is a frozen configuration. Its ``fit(problem, data)`` gives an `Inverse`: the state that is reused, kept, and
applied to rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, Self

from torch import Tensor

from outfluence.data import Data
from outfluence.errors import ProblemError
from outfluence.problem import Problem
from outfluence.rows import DenseRows

#: One number for all blocks, or one for each.
Regularization = float | Mapping[str, float] | None


class Inverse(Protocol):
    """A fitted inverse: the two encoders that turn gradients into left and right rows."""

    def left(self, gradients: DenseRows) -> DenseRows:
        """Influence factors: ``g^T (H + lambda 1)^-1``."""

    def right(self, gradients: DenseRows) -> DenseRows:
        """What a left row is multiplied with: for exact methods the gradients themselves."""

    def quadratic(self, gradients: DenseRows) -> Tensor:
        """``g^T (H + lambda 1)^-1 g`` of each sample, its self-influence: ``(n,)``."""

    def with_regularization(self, regularization: Mapping[str, float]) -> Self:
        """The same curvature with other regularizations, without fitting again."""

    @property
    def tensors(self) -> dict[str, Tensor]:
        """All it consists of besides its configuration, by name: what is moved, measured and kept."""

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> Self:
        """This inverse with other tensors of the same names."""


class Solver(Protocol):
    """A frozen configuration that fits an `Inverse`."""

    @property
    def regularization(self) -> Regularization:
        """As the user gave it."""

    def fit(self, problem: Problem, data: Data) -> Inverse:
        """Read the data, in as many passes as the method needs."""

    def options(self) -> dict[str, Any]:
        """What distinguishes two results of this method, as plain values."""


def per_block(regularization: Regularization, problem: Problem) -> dict[str, float]:
    """A regularization for every block.

    Raises:
        ProblemError: if one is negative or not a number, or a mapping names other blocks than the problem has.
    """
    blocks = list(problem.blocks)
    if not isinstance(regularization, Mapping):
        regularization = dict.fromkeys(blocks, regularization or 0.0)
    if set(regularization) != set(blocks):
        raise ProblemError(
            f"the regularization names blocks {sorted(regularization)}, but the blocks are {sorted(blocks)}; give one "
            "number for all, or one for each block"
        )
    result = {}
    for block in blocks:
        try:
            result[block] = float(regularization[block])
        except (TypeError, ValueError) as error:
            raise ProblemError(
                f"the regularization of block {block!r} is no number: {regularization[block]!r}"
            ) from error
        if not 0 <= result[block] < float("inf"):
            raise ProblemError(f"the regularization of block {block!r} must be finite and >= 0: {result[block]}")
    return result

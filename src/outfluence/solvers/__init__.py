"""Ways to invert the curvature, one family a file.

A solver is a frozen configuration. Its ``fit(problem, data)`` gives an `Inverse`: the state that is reused, kept, and
applied to rows.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol, Self

import numpy as np
from torch import Tensor

from outfluence.data import Data
from outfluence.errors import ProblemError
from outfluence.problem import Problem
from outfluence.rows import DenseRows, GradientRows

#: One number for all blocks, or one for each.
Regularization = float | Mapping[str, float] | None


class Inverse(ABC):
    """A fitted inverse: the two encoders that turn gradients into left and right rows.

    What is written here holds where a left row is the influence factor itself.

    Attributes:
        regularization: lambda, per block.
    """

    regularization: Mapping[str, float]

    @abstractmethod
    def left(self, gradients: GradientRows) -> Any:
        """Left rows: influence factors ``g^T (H + lambda 1)^-1``, or what stands for them."""

    def right(self, gradients: GradientRows) -> Any:
        """What a left row is multiplied with: for exact methods the gradients themselves."""
        return gradients

    def dense(self, left: Any) -> DenseRows:
        """Left rows as influence factors, as long as the model has parameters."""
        rows: DenseRows = left
        return rows

    def quadratic(self, gradients: GradientRows) -> Tensor:
        """``g^T (H + lambda 1)^-1 g`` of each sample, its self-influence: ``(n,)``."""
        each: Tensor = self.left(gradients).dot_each(self.right(gradients))
        return each

    def solve(self, gradients: GradientRows) -> tuple[DenseRows, dict[str, dict[str, Any]]]:
        """Influence factors, and per block what is known of how they came about."""
        return self.dense(self.left(gradients)), self.info

    @property
    def info(self) -> dict[str, dict[str, Any]]:
        """What the fit found out, per block."""
        return {}

    @abstractmethod
    def with_regularization(self, regularization: Mapping[str, float]) -> Self:
        """The same curvature with other regularizations, without fitting again."""

    @property
    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """All it consists of besides its configuration, by name: what is moved, measured and kept."""

    @abstractmethod
    def with_tensors(self, tensors: Mapping[str, Tensor]) -> Self:
        """This inverse with other tensors of the same names."""

    @property
    def nbytes(self) -> int:
        """Bytes of what it holds, of what it makes of that for itself, too."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @property
    def takes_factors(self) -> bool:
        """Whether it makes use of the factors of gradients also where the gradients themselves are smaller."""
        return False

    @property
    def in_basis(self) -> bool:
        """Whether rows are numbers in a basis that belongs to this very fit."""
        return False

    @property
    def data(self) -> Data | None:
        """The data of the fit, if it is read again whenever the inverse is applied."""
        return None

    def reading(self, problem: Problem, data: Data) -> Self:  # noqa: ARG002 - most read nothing
        """The same, on another device, or with another handle on the same data."""
        return self


@dataclass(frozen=True)
class ReadingInverse(Inverse):
    """An inverse that is not kept: it is applied by passes over the data of the fit, of which it holds a handle.

    Attributes:
        problem: model and loss.
        source: the data.
        regularization: lambda, per block.
    """

    problem: Problem
    source: Data
    regularization: Mapping[str, float]

    def left(self, gradients: GradientRows) -> DenseRows:
        """See `Inverse`; all samples share the passes."""
        return self.solve(gradients)[0] if len(gradients) else gradients.dense()

    def with_regularization(self, regularization: Mapping[str, float]) -> Self:
        """Nothing depends on it but the solves to come."""
        return replace(self, regularization=dict(regularization))

    @property
    def tensors(self) -> dict[str, Tensor]:
        """None."""
        return {}

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> Self:  # noqa: ARG002
        """See `Inverse`."""
        return self

    @property
    def data(self) -> Data:
        """See `Inverse`."""
        return self.source

    def reading(self, problem: Problem, data: Data) -> Self:
        """See `Inverse`."""
        return replace(self, problem=problem, source=data)


class Solver(Protocol):
    """A frozen configuration that fits an `Inverse`."""

    @property
    def regularization(self) -> Regularization:
        """As the user gave it."""

    def fit(self, problem: Problem, data: Data) -> Inverse:
        """Read the data, in as many passes as the method needs."""

    def restore(self, problem: Problem, data: Data, tensors: Mapping[str, Tensor]) -> Inverse:
        """What `fit` made, from its `Inverse.tensors`; the data is not read."""

    def options(self) -> dict[str, Any]:
        """What distinguishes two results of this method, as plain values."""


def grouped(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Tensors named ``GROUP/NAME``, by group."""
    groups: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        group, _, name = key.partition("/")
        groups.setdefault(group, {})[name] = tensor
    return groups


def check_rank(rank: Any) -> None:
    """Refuse what is no whole number of one or more.

    Raises:
        ProblemError: saying so.
    """
    if isinstance(rank, bool) or not isinstance(rank, (int, np.integer)) or rank < 1:
        raise ProblemError(f"rank must be a whole number, at least 1, not {rank!r}")


def asked(solver: Any, problem: Any) -> dict[str, float | None]:
    """The regularization of every block as it was asked for; None where it was not.

    Raises:
        ProblemError: see `per_block`.
    """
    if solver.regularization is None:
        solvers = getattr(solver, "members", None)  # of an ensemble
        if solvers is None:
            return dict.fromkeys(problem.blocks)
        each = enumerate(zip(solvers, problem.members, strict=True))
        return {f"{i}.{block}": value for i, one in each for block, value in asked(*one).items()}
    return dict(per_block(solver.regularization, problem))


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

"""The exact inverse: build the matrix, factorise it once, solve."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from outfluence.curvature import Curvature
from outfluence.data import Data
from outfluence.errors import SingularMatrixError
from outfluence.modes import SecondOrderMode
from outfluence.problem import Problem
from outfluence.rows import DenseRows, GradientRows
from outfluence.solvers import Inverse, Regularization, grouped, per_block


@dataclass(frozen=True)
class DirectSolver:
    """Dense blocks of the second-order matrix, ``(P_block, P_block)`` each; P_block squared numbers of memory.

    Args:
        regularization: lambda, one for all blocks or one for each.
        second_order_mode: which matrix.
    """

    regularization: Regularization = None
    second_order_mode: SecondOrderMode = SecondOrderMode.HESSIAN

    def fit(self, problem: Problem, data: Data) -> DirectInverse:
        """One pass over the data per block."""
        regularization = per_block(self.regularization, problem)
        matrices = {block: Curvature(problem, data, block, self.second_order_mode).dense() for block in problem.blocks}
        return DirectInverse.of(matrices, regularization)

    def restore(self, problem: Problem, data: Data, tensors: Mapping[str, Tensor]) -> DirectInverse:  # noqa: ARG002
        """See `Solver`."""
        parts = grouped(tensors)
        pivots = parts.get("pivots", {})
        factors = {name: Factor(factor, pivots.get(name)) for name, factor in parts["factor"].items()}
        return DirectInverse(parts["matrix"], factors, per_block(self.regularization, problem))

    def options(self) -> dict[str, Any]:
        """The matrix chosen."""
        return {"second_order_mode": str(self.second_order_mode)}


@dataclass(frozen=True)
class DirectInverse(Inverse):
    """Factorised ``H + lambda 1``, block by block.

    Attributes:
        matrices: H, per block.
        factors: those of ``H + lambda 1``, per block.
        regularization: lambda, per block.
    """

    matrices: Mapping[str, Tensor]
    factors: Mapping[str, Factor]
    regularization: Mapping[str, float]

    @classmethod
    def of(cls, matrices: Mapping[str, Tensor], regularization: Mapping[str, float]) -> Self:
        """Factorise.

        Raises:
            SingularMatrixError: if a block has no inverse at working precision.
        """
        factors = {name: _factorise(name, h, regularization[name]) for name, h in matrices.items()}
        return cls(matrices, factors, regularization)

    def left(self, gradients: GradientRows) -> DenseRows:
        """``(H + lambda 1)^-1 g`` per block."""
        solved = [self.factors[name].solve(part.T).T for name, part in gradients.by_block().items()]
        return DenseRows(torch.cat(solved, dim=1), gradients.sections)

    @property
    def info(self) -> dict[str, dict[str, Any]]:
        """The matrices, without regularization."""
        return {name: {"matrix": h} for name, h in self.matrices.items()}

    def with_regularization(self, regularization: Mapping[str, float]) -> Self:
        """Factorises again; the matrix is kept."""
        return self.of(self.matrices, regularization)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The matrices and their factors."""
        named = {f"matrix/{name}": h for name, h in self.matrices.items()}
        for name, factor in self.factors.items():
            named[f"factor/{name}"] = factor.factor
            if factor.pivots is not None:
                named[f"pivots/{name}"] = factor.pivots
        return named

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> Self:
        """See `Inverse`."""
        return type(self)(
            {name: tensors[f"matrix/{name}"] for name in self.matrices},
            {name: Factor(tensors[f"factor/{name}"], tensors.get(f"pivots/{name}")) for name in self.matrices},
            self.regularization,
        )


@dataclass(frozen=True)
class Factor:
    """Cholesky (``pivots`` is None), or LDL^T for an indefinite matrix."""

    factor: Tensor
    pivots: Tensor | None

    def solve(self, columns: Tensor) -> Tensor:
        """The solution for each column of ``(P, k)``."""
        if self.pivots is None:
            return torch.cholesky_solve(columns, self.factor)
        solution: Tensor = torch.linalg.ldl_solve(self.factor, self.pivots, columns.contiguous())
        return solution


def _factorise(block: str, matrix: Tensor, regularization: float) -> Factor:
    regularized = matrix.clone()
    regularized.diagonal().add_(regularization)
    factor, failed = torch.linalg.cholesky_ex(regularized)
    pivots = None
    if failed:
        factor, pivots = torch.linalg.ldl_factor_ex(regularized)[:2]
    result = Factor(factor, pivots)
    condition = _condition(regularized, result)  # NaN where a pivot is zero
    if not condition * torch.finfo(matrix.dtype).eps < 1:
        raise SingularMatrixError(
            f"block {block!r} has no inverse at regularization {regularization:g}: its condition number is about "
            f"{condition:.0e}, which {str(matrix.dtype).removeprefix('torch.')} does not resolve. Raise the "
            f"regularization (the mean diagonal entry is {matrix.diagonal().mean().item():.1e}), or fit in float64."
        )
    return result


def _condition(matrix: Tensor, factor: Factor) -> float:
    """An estimate of the condition number from below: a few steps of power iteration on the matrix and its inverse."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(len(matrix), 1, generator=generator, dtype=torch.float64).to(matrix)
    norms = []
    for apply in (matrix.matmul, factor.solve):
        vector, norm = start / start.norm(), 0.0
        for _ in range(8):
            image = apply(vector)
            norm = image.norm().item()
            vector = image / norm if norm else image
        norms.append(norm)
    return norms[0] * norms[1]

"""Low-rank inverses: Arnoldi (leading eigenpairs) and Nystroem (a random sketch).

Both know eigenpairs ``V diag(mu) V^T`` of an approximation of H. Restricted to their space the inverse of
``H + lambda`` is ``V (mu + lambda)^-1 V^T``: a sample is its coordinates ``V^T g`` (Schioppa et al. 2022). On all of
space, the approximation plus lambda has the inverse (Woodbury)

    1/lambda - V diag(mu / (lambda (mu + lambda))) V^T

and a sample is its coordinates, and its gradient besides.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor

from outfluence.curvature import Curvature
from outfluence.data import Data
from outfluence.errors import SingularMatrixError
from outfluence.linalg import eigenpairs, nystroem
from outfluence.modes import SecondOrderMode
from outfluence.problem import Problem
from outfluence.rows import CoordinateRows, DenseRows, GradientRows
from outfluence.solvers import Inverse, Regularization, check_rank, grouped, per_block


@dataclass(frozen=True)
class ArnoldiSolver:
    """Leading eigenpairs of each block; see `linalg.eigenpairs` and `methods.ArnoldiInfluence`.

    Args:
        regularization: lambda, one for all blocks or one for each.
        second_order_mode: which matrix.
        rank: eigenpairs per block.
        krylov_dimension: vectors kept while iterating.
        tol: residual of the eigenvectors, relative to the eigenvalue.
        max_iter: most restarts.
        eigen_computation_on_gpu: iterate with CuPy.
        use_woodbury: act as ``1/lambda`` on what the eigenvectors do not span, instead of dropping it.
    """

    regularization: Regularization = None
    second_order_mode: SecondOrderMode = SecondOrderMode.HESSIAN
    rank: int = 10
    krylov_dimension: int | None = None
    tol: float = 1e-6
    max_iter: int | None = None
    eigen_computation_on_gpu: bool = False
    use_woodbury: bool = False

    def fit(self, problem: Problem, data: Data) -> LowRankInverse:
        """One pass over the data for each step of the iteration, which takes up to ``rank`` vectors at once."""
        check_rank(self.rank)
        regularization = per_block(self.regularization, problem)
        pairs = {}
        for block in problem.blocks:
            curvature = Curvature(problem, data, block, self.second_order_mode)
            pairs[block] = eigenpairs(
                curvature.matmat,
                curvature.size,
                self.rank,
                like=curvature.like,
                krylov_dimension=self.krylov_dimension,
                tol=self.tol,
                maxiter=self.max_iter,
                on_gpu=self.eigen_computation_on_gpu,
            )
        return LowRankInverse.of(pairs, regularization, self.use_woodbury, problem.sections)

    def restore(self, problem: Problem, data: Data, tensors: Mapping[str, Tensor]) -> LowRankInverse:  # noqa: ARG002
        """See `Solver`."""
        return _restored(tensors, per_block(self.regularization, problem), self.use_woodbury, problem)

    def options(self) -> dict[str, Any]:
        """What the fit depends on."""
        return {
            "second_order_mode": str(self.second_order_mode),
            "rank": int(self.rank),
            "krylov_dimension": self.krylov_dimension,
            "tol": self.tol,
            "max_iter": self.max_iter,
            "use_woodbury": self.use_woodbury,
        }


@dataclass(frozen=True)
class NystroemSolver:
    """A random sketch of each block; see `linalg.nystroem` and `methods.NystroemSketchInfluence`.

    Args:
        regularization: lambda > 0, one for all blocks or one for each.
        rank: columns of the sketch, per block.
        second_order_mode: which matrix.
        seed: of the sketch.
    """

    regularization: Regularization
    rank: int
    second_order_mode: SecondOrderMode = SecondOrderMode.HESSIAN
    seed: int = 0

    def fit(self, problem: Problem, data: Data) -> LowRankInverse:
        """One pass over the data per block."""
        check_rank(self.rank)
        regularization = per_block(self.regularization, problem)
        pairs = {}
        for block in problem.blocks:
            curvature = Curvature(problem, data, block, self.second_order_mode)
            rank = min(self.rank, curvature.size)
            pairs[block] = nystroem(curvature.matmat, curvature.size, rank, like=curvature.like, seed=self.seed)
        return LowRankInverse.of(pairs, regularization, True, problem.sections)

    def restore(self, problem: Problem, data: Data, tensors: Mapping[str, Tensor]) -> LowRankInverse:  # noqa: ARG002
        """See `Solver`."""
        return _restored(tensors, per_block(self.regularization, problem), True, problem)

    def options(self) -> dict[str, Any]:
        """What the fit depends on."""
        return {"second_order_mode": str(self.second_order_mode), "rank": int(self.rank), "seed": self.seed}


@dataclass(frozen=True)
class LowRankInverse(Inverse):
    """See the module.

    Attributes:
        values: eigenvalues mu, per block ``(k,)``.
        vectors: eigenvectors V, per block ``(P_block, k)``.
        regularization: lambda, per block.
        everywhere: whether it acts as ``1/lambda`` on what V does not span (Woodbury).
        sections: for each block its columns in a gradient.
    """

    values: Mapping[str, Tensor]
    vectors: Mapping[str, Tensor]
    regularization: Mapping[str, float]
    everywhere: bool
    sections: Mapping[str, slice]

    @classmethod
    def of(
        cls,
        pairs: Mapping[str, tuple[Tensor, Tensor]],
        regularization: Mapping[str, float],
        everywhere: bool,
        sections: Mapping[str, slice],
    ) -> Self:
        """From eigenpairs per block.

        Raises:
            SingularMatrixError: if there is no such inverse.
        """
        values = {block: pair[0] for block, pair in pairs.items()}
        # A vector after the other, as gradients are multiplied with them: the product takes an eighth less time.
        vectors = {block: pair[1].T.contiguous().T for block, pair in pairs.items()}
        inverse = cls(values, vectors, regularization, everywhere, sections)
        inverse._check()
        return inverse

    def left(self, gradients: GradientRows) -> CoordinateRows:
        """Coordinates, weighted; and where the identity has a part, the gradients over lambda."""
        return self._weighted(self.right(gradients))

    def right(self, gradients: GradientRows) -> CoordinateRows:
        """Coordinates; and where the identity has a part, the gradients."""
        coordinates = [*self._projected(gradients).values()]
        identity = gradients if any(map(self._beyond, self.sections)) else None
        return CoordinateRows(torch.cat(coordinates, dim=1), self._columns, identity)

    def quadratic(self, gradients: GradientRows) -> Tensor:
        """With one projection."""
        right = self.right(gradients)
        return self._weighted(right).dot_each(right)

    def _weighted(self, right: CoordinateRows) -> CoordinateRows:
        weights, of_identity = [], {}
        for block, mu in self.values.items():
            damping, beyond = self.regularization[block], self._beyond(block)
            weights.append(-mu / damping / (mu + damping) if beyond else 1 / (mu + damping))
            of_identity[block] = 1 / damping if beyond else 0.0
        identity = None if right.identity is None else right.identity.scaled(of_identity)
        return CoordinateRows(right.coordinates * torch.cat(weights), right.sections, identity)

    def _projected(self, gradients: GradientRows) -> dict[str, Tensor]:
        """The coordinates of gradients, per block."""
        vectors = {block: v.T for block, v in self.vectors.items()}
        return {block: products.T for block, products in gradients.multiplied_by_block(vectors).items()}

    def dense(self, left: CoordinateRows) -> DenseRows:
        """``(n, P)``, from coordinates back to parameters."""
        parts = [left.coordinates[:, s] @ self.vectors[block].T for block, s in self._columns.items()]
        values = torch.cat(parts, dim=1)
        if left.identity is not None:
            values += left.identity.dense().values
        return DenseRows(values, self.sections)

    @property
    def info(self) -> dict[str, dict[str, Any]]:
        """Eigenvalues and eigenvectors, without regularization."""
        return {
            block: {"eigenvalues": self.values[block], "eigenvectors": self.vectors[block]} for block in self.sections
        }

    def with_regularization(self, regularization: Mapping[str, float]) -> Self:
        """The same eigenpairs."""
        other = replace(self, regularization=dict(regularization))
        other._check()
        return other

    @property
    def in_basis(self) -> bool:
        """They are."""
        return True

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Eigenvalues and eigenvectors."""
        return {f"values/{block}": t for block, t in self.values.items()} | {
            f"vectors/{block}": t for block, t in self.vectors.items()
        }

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> Self:
        """See `Inverse`."""
        return replace(
            self,
            values={block: tensors[f"values/{block}"] for block in self.values},
            vectors={block: tensors[f"vectors/{block}"] for block in self.vectors},
        )

    @property
    def _columns(self) -> dict[str, slice]:
        columns, start = {}, 0
        for block, values in self.values.items():
            columns[block] = slice(start, start + len(values))
            start += len(values)
        return columns

    def _beyond(self, block: str) -> bool:
        """Whether there is anything beyond the eigenvectors of a block that counts."""
        return self.everywhere and self.vectors[block].shape[1] < self.vectors[block].shape[0]

    def _check(self) -> None:
        for block, values in self.values.items():
            damping = self.regularization[block]
            if self._beyond(block) and not damping > 0:
                raise SingularMatrixError(
                    f"block {block!r} is approximated with rank {len(values)} of {len(self.vectors[block])}: without a "
                    "regularization > 0 that has no inverse"
                )
            sizes = (values + damping).abs()
            if len(values) and not sizes.min() > torch.finfo(values.dtype).eps * max(float(sizes.max()), damping):
                raise SingularMatrixError(
                    f"block {block!r} has no inverse at regularization {damping:g}: an eigenvalue of the regularized "
                    f"matrix is {float(sizes.min()):.0e}, the largest is {float(sizes.max()):.0e}. Raise the "
                    "regularization, or lower the rank."
                )


def _restored(
    tensors: Mapping[str, Tensor], regularization: Mapping[str, float], everywhere: bool, problem: Problem
) -> LowRankInverse:
    parts = grouped(tensors)
    pairs = {block: (parts["values"][block], parts["vectors"][block]) for block in problem.blocks}
    return LowRankInverse.of(pairs, regularization, everywhere, problem.sections)

"""Preconditioners of conjugate gradient: cheap approximations of ``(A + lambda 1)^-1``, symmetric and positive.

A preconditioner is a configuration; ``fit`` looks at one block's matrix and gives its `Fitted` state.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, Self

import torch
from torch import Tensor

from outfluence.curvature import Curvature
from outfluence.errors import ProblemError
from outfluence.linalg import nystroem


class Fitted(Protocol):
    """A preconditioner of one block."""

    @property
    def tensors(self) -> dict[str, Tensor]:
        """All it consists of, by name."""

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> Self:
        """The same with other tensors of these names."""

    def solve(self, columns: Tensor, regularization: float) -> Tensor:
        """About ``(A + lambda 1)^-1`` times columns ``(P, k)``, up to a factor."""


class Preconditioner(Protocol):
    """How to make one."""

    def fit(self, curvature: Curvature) -> Fitted:
        """Look at the matrix of a block."""

    def restore(self, curvature: Curvature, tensors: Mapping[str, Tensor]) -> Fitted:
        """What `fit` made, from its tensors; the data is not read."""


@dataclass(frozen=True)
class JacobiPreconditioner:
    """The inverse of the diagonal, which is estimated from products with random signs (Hutchinson; Bekas et al. 2007).

    Args:
        num_samples_estimator: how many random vectors; all in one pass over the data. The estimate of an entry has the
            variance of twice the squares of the others in its row, over this number.
        seed: of the signs.
    """

    num_samples_estimator: int = 1
    seed: int = 0

    def fit(self, curvature: Curvature) -> FittedJacobi:
        """One pass over the data."""
        if self.num_samples_estimator < 1:
            raise ProblemError(f"num_samples_estimator must be at least 1: {self.num_samples_estimator}")
        generator = torch.Generator().manual_seed(self.seed)
        bits = torch.randint(0, 2, (curvature.size, self.num_samples_estimator), generator=generator)
        signs = (2 * bits - 1).to(curvature.like)
        # An estimate may be below zero where the entry is not; its size still says how large the entry is.
        return FittedJacobi((signs * curvature.matmat(signs)).mean(1).abs())

    def restore(self, curvature: Curvature, tensors: Mapping[str, Tensor]) -> FittedJacobi:  # noqa: ARG002
        """See `Preconditioner`."""
        return FittedJacobi(tensors["diagonal"])


@dataclass(frozen=True)
class FittedJacobi:
    """See `JacobiPreconditioner`.

    Attributes:
        diagonal: ``(P,)``, none below zero.
    """

    diagonal: Tensor

    @property
    def tensors(self) -> dict[str, Tensor]:
        """See `Fitted`."""
        return {"diagonal": self.diagonal}

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> Self:
        """See `Fitted`."""
        return replace(self, diagonal=tensors["diagonal"])

    def solve(self, columns: Tensor, regularization: float) -> Tensor:
        """See `Fitted`."""
        damped = self.diagonal + regularization
        return columns / damped.clamp(min=torch.finfo(damped.dtype).eps * max(float(damped.amax()), 1e-30))[:, None]


@dataclass(frozen=True)
class NystroemPreconditioner:
    """The inverse of a low-rank approximation, made by a random sketch (Frangella, Tropp & Udell 2023).

    Args:
        rank: of the approximation; one pass over the data multiplies all its vectors, P x rank numbers are kept.
        seed: of the sketch.
    """

    rank: int
    seed: int = 0

    def fit(self, curvature: Curvature) -> FittedNystroem:
        """One pass over the data."""
        if self.rank < 1:
            raise ProblemError(f"rank must be at least 1: {self.rank}")
        rank = min(self.rank, curvature.size)
        values, vectors = nystroem(curvature.matmat, curvature.size, rank, like=curvature.like, seed=self.seed)
        return FittedNystroem(values[values > 0], vectors[:, values > 0])

    def restore(self, curvature: Curvature, tensors: Mapping[str, Tensor]) -> FittedNystroem:  # noqa: ARG002
        """See `Preconditioner`."""
        return FittedNystroem(tensors["values"], tensors["vectors"])


@dataclass(frozen=True)
class FittedNystroem:
    """See `NystroemPreconditioner`.

    Attributes:
        values: ``(k,)``, positive, the largest first.
        vectors: ``(P, k)``.
    """

    values: Tensor
    vectors: Tensor

    @property
    def tensors(self) -> dict[str, Tensor]:
        """See `Fitted`."""
        return {"values": self.values, "vectors": self.vectors}

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> Self:
        """See `Fitted`."""
        return replace(self, values=tensors["values"], vectors=tensors["vectors"])

    def solve(self, columns: Tensor, regularization: float) -> Tensor:
        """``(l + lambda) U (L + lambda)^-1 U^T + 1 - U U^T``, l the least of L (Frangella et al. 2023, section 5)."""
        if len(self.values) == 0:
            return columns
        inside = self.vectors.T @ columns
        scale = (self.values[-1] + regularization) / (self.values + regularization)
        return columns + self.vectors @ ((scale - 1)[:, None] * inside)


@dataclass(frozen=True)
class EkfacPreconditioner:
    """A Kronecker-factored inverse of the Fisher, for solves with the Gauss-Newton or Fisher matrix.

    It pays where inputs are badly scaled, samples outnumber parameters and lambda is small: a fifth of the products on
    a small network on raw pixels. Where the network has more parameters than the data determine, or lambda is large,
    plain conjugate gradient may need fewer (``benchmarks/solvers.py`` counts both).

    Args:
        model: an `EkfacInfluence` of the same torch model. If it is not fitted, its factors are computed from the data
            of the solver. They are damped as the matrix they stand for is, whatever its own regularization.
    """

    model: Any = field(repr=False)

    def fit(self, curvature: Curvature) -> FittedEkfac:
        """Two passes over the data for EK-FAC, one for K-FAC; none if the model is fitted."""
        self._layers(curvature)
        model = self.model
        # Its own damping is of no account here: without any, the Fisher of a classifier's last layer has no inverse.
        inverse = (
            model.inverse
            if model.is_fitted
            else replace(model.solver, regularization=1.0, tolerance=0.0, rank=None).fit(model.problem, curvature.data)
        )
        return self._fitted(curvature, inverse, inverse.tensors)

    def restore(self, curvature: Curvature, tensors: Mapping[str, Tensor]) -> FittedEkfac:
        """See `Preconditioner`."""
        solver = replace(self.model.solver, regularization=1.0, tolerance=0.0, rank=None)
        return self._fitted(curvature, solver.restore(self.model.problem, curvature.data, tensors), tensors)

    def _fitted(self, curvature: Curvature, inverse: Any, tensors: Mapping[str, Tensor]) -> FittedEkfac:
        problem = curvature.problem
        dtypes = {k: problem.dtype if t.is_floating_point() else t.dtype for k, t in tensors.items()}
        moved = inverse.with_tensors({k: t.to(problem.device, dtypes[k]) for k, t in tensors.items()})
        sizes = {name: p.numel() for name, p in problem.parameters.items()}
        return FittedEkfac(
            moved, {name: sizes[name] for name in problem.blocks[curvature.block]}, self._layers(curvature)
        )

    def _layers(self, curvature: Curvature) -> dict[str, tuple[str, ...]]:
        """The layers that a block consists of, and their parameters."""
        model, problem = self.model, curvature.problem
        if not hasattr(model, "explore_hessian_regularization"):
            raise ProblemError(f"EkfacPreconditioner takes an EkfacInfluence, not a {type(model).__name__}")
        names = set(problem.blocks[curvature.block])
        blocks = {block: members for block, members in model.problem.blocks.items() if names & set(members)}
        covered = {name for members in blocks.values() for name in members}
        if covered != names:
            raise ProblemError(
                f"EkfacPreconditioner: block {curvature.block!r} must consist of whole layers of the EkfacInfluence; "
                f"these parameters are not common to both: {', '.join(sorted(covered ^ names))}"
            )
        return blocks


class _Layerwise(Protocol):
    @property
    def tensors(self) -> dict[str, Tensor]: ...
    def with_tensors(self, tensors: Mapping[str, Tensor]) -> Self: ...
    def precondition(self, block: str, rows: Tensor, regularization: float) -> Tensor: ...


@dataclass(frozen=True)
class FittedEkfac:
    """See `EkfacPreconditioner`.

    Attributes:
        inverse: the Kronecker-factored one.
        sizes: of the parameters, in the order of the columns.
        layers: the parameters of each layer, in the order of the inverse.
    """

    inverse: _Layerwise
    sizes: Mapping[str, int]
    layers: Mapping[str, tuple[str, ...]]

    @property
    def tensors(self) -> dict[str, Tensor]:
        """See `Fitted`."""
        return dict(self.inverse.tensors)

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> Self:
        """See `Fitted`."""
        return replace(self, inverse=self.inverse.with_tensors(tensors))

    def solve(self, columns: Tensor, regularization: float) -> Tensor:
        """See `Fitted`."""
        by_name = dict(zip(self.sizes, torch.split(columns.T, list(self.sizes.values()), dim=1), strict=True))
        for layer, names in self.layers.items():
            rows = torch.cat([by_name[name] for name in names], dim=1)
            solved = self.inverse.precondition(layer, rows, regularization)
            by_name |= dict(zip(names, torch.split(solved, [self.sizes[name] for name in names], dim=1), strict=True))
        return torch.cat([by_name[name] for name in self.sizes], dim=1).T


def check_preconditioner(preconditioner: Any) -> None:
    """Refuse what is none.

    Raises:
        ProblemError: naming what is taken.
    """
    if preconditioner is not None and not callable(getattr(preconditioner, "fit", None)):
        raise ProblemError(
            f"a preconditioner must be a JacobiPreconditioner, NystroemPreconditioner or EkfacPreconditioner, not "
            f"{preconditioner!r}"
        )

"""Influence models: fit on training data, then factors, gradients and scores of batches in memory.

    I(test_i, train_j) = g_i^T (H + lambda 1)^-1 g_j            mode "up"
    I(test_i, train_j) = g_i^T (H + lambda 1)^-1 d/dx g_j       mode "perturbation"

g is the gradient of the loss of one sample with respect to the parameters, H a mean over the training set. A positive
score: weighting the training sample up lowers the loss of the test sample (Koh & Liang 2017).

`InfluenceModel` holds everything; the named models differ in their solver only.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import wraps
from typing import Any, Self, TypeVar, cast, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from outfluence.data import Batch, Data, DataLike, Tree, tree_leaves, tree_map
from outfluence.errors import DataError, NotFittedError, OutfluenceError, ProblemError
from outfluence.machine import float32_products, keep_memory
from outfluence.modes import BlockMode, FisherMode, InfluenceMode, SecondOrderMode, WeightSharing
from outfluence.preconditioners import EkfacPreconditioner, Preconditioner
from outfluence.problem import Loss, Problem
from outfluence.rows import DenseRows, GradientRows, Rows, check_finite
from outfluence.solvers import Inverse, Regularization, Solver, per_block
from outfluence.solvers.direct import DirectSolver
from outfluence.solvers.harmonic import HarmonicSolver
from outfluence.solvers.iterative import CgSolver, LissaSolver
from outfluence.solvers.kronecker import KroneckerSolver
from outfluence.solvers.lowrank import ArnoldiSolver, NystroemSolver

Blocks = Mapping[str, Iterable[str]]


_Method = TypeVar("_Method", bound=Callable[..., Any])


def _computed(method: _Method) -> _Method:
    """In the best way that the machine has; see `machine`."""

    @wraps(method)
    def computed(model: Any, *args: Any, **kwargs: Any) -> Any:
        keep_memory()
        with float32_products(model.problem.device):
            return method(model, *args, **kwargs)

    return cast(_Method, computed)


class InfluenceModel:
    """Influence of training samples, for batches in memory. Users make one of the named models below.

    A fitted model pickles, copies and saves: it holds the model and the inverse, and no data; at most a handle on them,
    where the method reads the data again (`CgInfluence`, `LissaInfluence`, `InverseHarmonicMeanInfluence`). Inputs
    ``x`` are a tensor, or a tuple or dict of tensors, first axis samples. P is the number of trainable parameters.

    Args:
        problem: model, loss and blocks.
        solver: how the curvature is inverted.
    """

    def __init__(self, problem: Problem, solver: Solver) -> None:
        self.problem = problem
        self.solver = solver
        self._inverse: Inverse | None = None
        self._empty: GradientRows | None = None
        self._regularization: dict[str, float] = {}
        self._fitted_on: dict[str, Any] = {}
        self._versions: list[tuple[int, int]] = []

    @_computed
    def fit(self, data: DataLike) -> Self:
        """Fit the inverse on training data.

        Args:
            data: anything `Data.of` takes: a DataLoader, a Dataset, a pair of arrays.

        Returns:
            This model.

        Raises:
            DataError: if the data cannot be read twice in the same order.
            ProblemError: if the model or the loss cannot be differentiated on its first sample.
            NonFiniteError: if gradients are not finite.
            SingularMatrixError: if the regularized matrix has no inverse.
        """
        data = Data.of(data)
        self.look_at(data)
        try:
            with torch.enable_grad():  # also where the user has switched gradients off
                self._inverse = self.solver.fit(self.problem, data)
        except (OutfluenceError, OSError):
            raise
        except Exception as error:
            raise ProblemError(
                f"{type(self).__name__} cannot be fitted to this model and data: {type(error).__name__}: {error}"
            ) from error
        return self._fitted(data)

    def look_at(self, data: Data) -> None:
        """Find out on its first samples how the gradients are computed; see `Problem.structured`.

        Raises:
            ProblemError: see `Problem.check`.
        """
        self.problem = replace(self.problem).check(_first(data), "training")

    def _fitted(self, data: Data) -> Self:
        self._regularization = per_block(self.solver.regularization, self.problem)
        self._fitted_on = {"fit_data": data.fingerprint, **self.problem.fingerprint()}
        self._versions = self._parameter_versions()
        self._empty = self.empty_gradients(data.rows(slice(0, 1)))
        return self

    def unfitted(self) -> Self:
        """This model before `fit`; that one stays as it is."""
        other = copy.copy(self)
        other._inverse = None
        return other

    def restore(self, data: DataLike, tensors: Mapping[str, Tensor]) -> Self:
        """Make this model what it was after ``fit(data)``, from the `tensors` of its inverse.

        Of the data only the first samples are read.

        Raises:
            ProblemError: if the tensors are not those of a fit of this method and problem.
        """
        data = Data.of(data)
        self.problem = self.problem.structured(_first(data))
        device = self.problem.device
        try:
            moved = {name: tensor.to(device) for name, tensor in tensors.items()}
            self._inverse = self.solver.restore(self.problem, data, moved)
        except KeyError as error:
            raise ProblemError(f"these are not the tensors of a fitted {type(self).__name__}: no {error}") from error
        return self._fitted(data)

    @property
    def is_fitted(self) -> bool:
        """Whether `fit` was called."""
        return self._inverse is not None

    @property
    def inverse(self) -> Inverse:
        """What `fit` made.

        Raises:
            NotFittedError: before `fit`.
        """
        if self._inverse is None:
            raise NotFittedError(f"this {type(self).__name__} is not fitted: call .fit(training_data) first")
        return self._inverse

    @property
    def n_parameters(self) -> int:
        """P, the number of trainable parameters."""
        return self.problem.n_parameters

    @property
    def regularization(self) -> dict[str, float]:
        """The regularization of each block of the fitted model."""
        _ = self.inverse
        return dict(self._regularization)

    def to(self, device: torch.device | str) -> Self:
        """Work on a device from now on; the user's module stays where it is.

        Returns:
            This model.
        """
        self.problem = self.problem.to(device)
        if self._empty is not None:
            self._empty = self._empty.with_arrays({name: a.to(device) for name, a in self._empty.arrays.items()})
        if self._inverse is not None:
            moved = self._inverse.with_tensors({k: t.to(device) for k, t in self._inverse.tensors.items()})
            self._inverse = moved.reading(self.problem, moved.data) if moved.data is not None else moved
        return self

    def with_regularization(self, regularization: float | Mapping[str, float]) -> Self:
        """The same fit with another regularization; the data is not read again.

        Args:
            regularization: one number, or one for each block.

        Returns:
            A new model. This one is unchanged.

        Raises:
            ProblemError: if it does not name the blocks.
            SingularMatrixError: if a block has no inverse at this regularization.
        """
        lambdas = per_block(regularization, self.problem)
        other = self.with_inverse(self.inverse.with_regularization(lambdas))
        other._regularization = lambdas
        other.solver = replace(self.solver, regularization=lambdas)  # type: ignore[type-var]
        return other

    def with_inverse(self, inverse: Inverse) -> Self:
        """This model with another inverse, of the same fit."""
        other = copy.copy(self)
        other._inverse = inverse
        return other

    @_computed
    def influence_factors(self, x: Tree, y: Tree) -> Tensor:
        """Influence factors ``g^T (H + lambda 1)^-1`` of samples: ``(n, P)``.

        Raises:
            NonFiniteError: with the index of the sample.
        """
        return self.dense(self.left_rows(x, y)).values

    @_computed
    def influence_factors_by_block(self, x: Tree, y: Tree) -> dict[str, Tensor]:
        """Influence factors of each block, in order: ``(n, P_block)``."""
        return self.dense(self.left_rows(x, y)).by_block()

    @_computed
    def influences(
        self,
        x_test: Tree,
        y_test: Tree,
        x: Tree = None,
        y: Tree = None,
        mode: InfluenceMode | str = InfluenceMode.Up,
    ) -> Tensor:
        """Influences of training samples on test samples.

        Args:
            x_test: inputs of the test samples.
            y_test: their labels.
            x: inputs of the training samples; None: the test samples themselves.
            y: their labels.
            mode: perturb weights or features.

        Returns:
            ``(n_test, n)``; in perturbation mode ``(n_test, n, *features)``.
        """
        x, y = _same_if_none(x_test, y_test, x, y)
        return self._influences(self.left_rows(x_test, y_test), x, y, mode)

    @_computed
    def influences_by_block(
        self,
        x_test: Tree,
        y_test: Tree,
        x: Tree = None,
        y: Tree = None,
        mode: InfluenceMode | str = InfluenceMode.Up,
    ) -> dict[str, Tensor]:
        """Like `influences`, for each block; the sum over blocks is the influence."""
        x, y = _same_if_none(x_test, y_test, x, y)
        return self._influences_by_block(self.left_rows(x_test, y_test), x, y, mode)

    @_computed
    def influences_from_factors(
        self, factors: Tensor, x: Tree, y: Tree, mode: InfluenceMode | str = InfluenceMode.Up
    ) -> Tensor:
        """Influences from factors ``(n_test, P)`` computed before."""
        return self._influences(self.as_rows(factors), x, y, mode)

    @_computed
    def influences_from_factors_by_block(
        self, factors: Mapping[str, Tensor], x: Tree, y: Tree, mode: InfluenceMode | str = InfluenceMode.Up
    ) -> dict[str, Tensor]:
        """Influences of each block, from the factors of each block ``(n_test, P_block)``."""
        if list(factors) != list(self.problem.blocks):
            raise DataError(f"factors are of blocks {list(factors)}, the model's are {list(self.problem.blocks)}")
        rows = self.as_rows(torch.cat([torch.as_tensor(f) for f in factors.values()], dim=1))
        return self._influences_by_block(rows, x, y, mode)

    @_computed
    def self_influences(self, x: Tree, y: Tree) -> Tensor:
        """Influence of each sample on itself, ``g^T (H + lambda 1)^-1 g``: ``(n,)``."""
        selves = self.inverse.quadratic(self.gradient_rows(x, y, "training"))
        check_finite(selves, "self-influences", "training")
        return selves

    # What calculators use: rows instead of numbers, and indices for messages.

    def gradient_rows(self, x: Tree, y: Tree, samples: str = "training", start: int = 0) -> GradientRows:
        """Gradients of samples, factored where that is known how and smaller.

        Args:
            x: inputs.
            y: labels.
            samples: whose samples they are, for messages.
            start: index of the first of them, for messages.

        Raises:
            NonFiniteError: with the index of the sample.
        """
        self._check_unchanged()
        takes_factors = self._inverse is not None and self._inverse.takes_factors
        x, y = _tensors((x, y))
        rows = self.problem.gradients(x, y, compact=not takes_factors)
        for piece in rows.pieces:
            check_finite(piece, "gradients", samples, start)
        return rows

    def left_rows(self, x: Tree, y: Tree, samples: str = "test", start: int = 0) -> Rows:
        """Left rows of samples; see `gradient_rows`.

        Warns:
            ConvergenceWarning: if an iteration stopped before its tolerance.
        """
        return self.encode(self.gradient_rows(x, y, samples, start), samples, start)

    def encode(self, gradients: GradientRows, samples: str = "test", start: int = 0) -> Rows:
        """Left rows of samples, from their gradients; see `gradient_rows`."""
        rows: Rows = self.inverse.left(gradients)
        for piece in rows.pieces:
            check_finite(piece, "influence factors", samples, start)
        return rows

    def right_rows(self, gradients: GradientRows, left: Rows | None = None) -> Rows:
        """Right rows of samples, from their gradients: for left rows of `left_rows`, or for those of `as_rows`."""
        rows: Rows = gradients.compact() if isinstance(left, DenseRows) else self.inverse.right(gradients)
        return rows

    def dense(self, left: Rows) -> DenseRows:
        """Left rows as influence factors, ``(n, P)``."""
        return left if isinstance(left, DenseRows) else self.inverse.dense(left)

    def perturbations(self, left: Rows, x: Tree, y: Tree) -> Tensor:
        """Scores in perturbation mode, ``(n_left, n, *features)``."""
        return self.problem.mixed_derivatives(self.dense(left).values, *_tensors((x, y)))

    def empty_gradients(self, like: Batch | None = None) -> GradientRows:
        """Gradients of no samples: what arrays they consist of, of which shapes.

        Args:
            like: a sample; None: the first of the data of the fit.
        """
        if like is None:
            assert self._empty is not None
            return self._empty
        gradients = self.gradient_rows(*like)
        return gradients.with_arrays({name: array[:0].clone() for name, array in gradients.arrays.items()})

    def as_rows(self, factors: Tensor) -> DenseRows:
        """Influence factors ``(n, P)`` as left rows.

        Raises:
            DataError: if they have another shape.
        """
        factors = torch.as_tensor(factors, dtype=self.problem.dtype, device=self.problem.device)
        if factors.ndim != 2 or factors.shape[1] != self.n_parameters:
            raise DataError(
                f"factors must be (n_test, {self.n_parameters}), one column for each parameter; got "
                f"{tuple(factors.shape)}"
            )
        return DenseRows(factors, self.problem.sections)

    def reading(self, data: Data) -> Self:
        """This model with another handle on the data of the fit; the same, if it reads none."""
        if self.inverse.data is None:
            return self
        return self.with_inverse(self.inverse.reading(self.problem, data))

    def identity(self) -> dict[str, Any]:
        """What the scores depend on besides test and training data: method, options, weights, data of the fit."""
        _ = self.inverse
        return self._method() | {"regularization": self._regularization, **self._fitted_on}

    def identity_on(self, data: Data) -> dict[str, Any]:
        """What `identity` would be after ``fit(data)``."""
        regularization = per_block(self.solver.regularization, self.problem)
        fitted_on = {"fit_data": data.fingerprint, **self.problem.fingerprint()}
        return self._method() | {"regularization": regularization, **fitted_on}

    def _method(self) -> dict[str, Any]:
        return {"method": type(self).__name__, "options": self.solver.options()}

    def check(self, data: Data, whose: str) -> None:
        """Refuse before any work what cannot work.

        Raises:
            NotFittedError: before `fit`.
            ProblemError: if the weights have changed since `fit`, or the first sample cannot be differentiated.
            NonFiniteError: if the first sample's gradient is not finite.
        """
        _ = self.inverse
        self._versions = []  # look again, whatever the counters of the parameters say
        self._check_unchanged()
        source = self.inverse.data
        if source is not None and source.fingerprint != self._fitted_on["fit_data"]:
            raise ProblemError(
                f"the data that {type(self).__name__} was fitted on have changed since, and it reads them again: "
                "fit again"
            )
        self.problem.check(_first(data), whose)

    def assume_unchanged(self) -> None:
        """Take the weights for those of the fit: for a copy that was sent to a worker after `check`."""
        self._versions = self._parameter_versions()

    def _check_unchanged(self) -> None:
        """Refuse a model that went on training; the weights are read again only if torch says that they may differ."""
        versions = self._parameter_versions()
        if versions == self._versions or not self.is_fitted:
            return
        now = self.problem.fingerprint()
        # Not "model": modules may keep counters or caches that change with every call.
        changed = [key for key in ("weights", "loss", "blocks") if self._fitted_on[key] != now[key]]
        if changed:
            raise ProblemError(
                f"the model has changed since fit ({', '.join(changed)} differ): fit again, or keep a copy of the "
                "model that was fitted (copy.deepcopy)"
            )
        self._versions = versions

    def _parameter_versions(self) -> list[tuple[int, int]]:
        return [(id(p), p._version) for p in self.problem.model.parameters()]

    def _influences(self, left: Rows, x: Tree, y: Tree, mode: InfluenceMode | str) -> Tensor:
        if InfluenceMode(mode) is InfluenceMode.Perturbation:
            return self.perturbations(left, x, y)
        scores = left.dot(self.right_rows(self.gradient_rows(x, y), left))
        check_finite(scores, "scores", "test")
        return scores

    def _influences_by_block(self, left: Rows, x: Tree, y: Tree, mode: InfluenceMode | str) -> dict[str, Tensor]:
        if InfluenceMode(mode) is InfluenceMode.Perturbation:
            factors = self.dense(left)
            return {name: self.perturbations(factors.block(name), x, y) for name in factors.sections}
        return left.dot_by_block(self.right_rows(self.gradient_rows(x, y), left))


@final
class DirectInfluence(InfluenceModel):
    """The exact inverse of a dense matrix: for models of up to some ten thousand parameters per block.

    Args:
        model: the trained model.
        loss: see `Problem`.
        regularization: lambda >= 0, one for all blocks or one for each; None: 0.
        block_structure: blocks of parameters between which curvature is ignored.
        second_order_mode: which matrix; see `SecondOrderMode`.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        regularization: Regularization = None,
        block_structure: BlockMode | str | Blocks = BlockMode.FULL,
        second_order_mode: SecondOrderMode | str = SecondOrderMode.HESSIAN,
    ) -> None:
        solver = DirectSolver(regularization, SecondOrderMode(second_order_mode))
        super().__init__(Problem(model, loss, block_structure), solver)


@final
class CgInfluence(InfluenceModel):
    """The exact inverse, applied by conjugate gradient: no matrix is built; each product is a pass over the data.

    All test samples share the passes. The matrix plus lambda should be positive definite: with the Hessian of a network
    that takes a regularization, the Gauss-Newton matrix is so for convex losses. Fitting reads the data for the
    preconditioner only; the data is read again whenever factors are computed. Literature: Hestenes & Stiefel 1952;
    Martens 2010; Ji & Li 2017.

    Args:
        model: the trained model.
        loss: see `Problem`.
        regularization: lambda >= 0, one for all blocks or one for each; None: 0.
        rtol: a right-hand side is done when its residual is below ``max(rtol |g|, atol)``.
        atol: see ``rtol``. Gradients smaller than this have factors of zero; with 0 only ``rtol`` counts.
        maxiter: most products; None: 10 P, at most 1,000.
        progress: show a bar over products.
        precompute_grad: keep what does not change between products in memory, for all of the data: faster by the
            forward and the first backward pass, but its memory grows with the data.
        preconditioner: `JacobiPreconditioner`, `NystroemPreconditioner` or `EkfacPreconditioner`.
        solve_simultaneously: block conjugate gradient: fewer products, for more arithmetic between them.
        warn_on_max_iteration: warn, with the residual, if the tolerance was not reached.
        block_structure: blocks of parameters between which curvature is ignored.
        second_order_mode: which matrix; see `SecondOrderMode`.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        regularization: Regularization = None,
        rtol: float = 1e-4,
        atol: float = 1e-6,
        maxiter: int | None = None,
        progress: bool = False,
        precompute_grad: bool = False,
        preconditioner: Preconditioner | None = None,
        solve_simultaneously: bool = False,
        warn_on_max_iteration: bool = True,
        block_structure: BlockMode | str | Blocks = BlockMode.FULL,
        second_order_mode: SecondOrderMode | str = SecondOrderMode.HESSIAN,
    ) -> None:
        solver = CgSolver(
            regularization,
            SecondOrderMode(second_order_mode),
            rtol,
            atol,
            maxiter,
            progress,
            precompute_grad,
            preconditioner,
            solve_simultaneously,
            warn_on_max_iteration,
        )
        super().__init__(Problem(model, loss, block_structure), solver)


@final
class LissaInfluence(InfluenceModel):
    """The exact inverse, applied by a stochastic recursion: a batch a step (LiSSA, Agarwal et al. 2017).

    ``x <- x + (b - (H_batch + lambda) x) / scale``, with reduced variance (Johnson & Zhang 2013): it converges to the
    solution, not to a noisy neighbourhood of it. Batches are those of the training DataLoader. Divergence is an
    error that names the scale that would have worked. The data is read again whenever factors are computed.

    Args:
        model: the trained model.
        loss: see `Problem`.
        regularization: lambda >= 0, one for all blocks or one for each; None: 0.
        maxiter: most steps.
        dampen: d; the matrix becomes ``H + lambda + scale d``, as in the implementation of Koh & Liang 2017.
        scale: what a step is divided by: at least the largest eigenvalue of the matrix (half of it just converges); the
            smaller, the faster.
        rtol: a right-hand side is done when its residual is below ``rtol |g|``.
        progress: show a bar over steps.
        warn_on_max_iteration: warn, with the residual, if the tolerance was not reached.
        block_structure: blocks of parameters between which curvature is ignored.
        second_order_mode: which matrix; see `SecondOrderMode`.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        regularization: Regularization = None,
        maxiter: int = 1000,
        dampen: float = 0.0,
        scale: float = 10.0,
        rtol: float = 1e-4,
        progress: bool = False,
        warn_on_max_iteration: bool = True,
        block_structure: BlockMode | str | Blocks = BlockMode.FULL,
        second_order_mode: SecondOrderMode | str = SecondOrderMode.HESSIAN,
    ) -> None:
        solver = LissaSolver(
            regularization,
            SecondOrderMode(second_order_mode),
            maxiter,
            dampen,
            scale,
            rtol,
            progress,
            warn_on_max_iteration,
        )
        super().__init__(Problem(model, loss, block_structure), solver)


@final
class ArnoldiInfluence(InfluenceModel):
    """A low-rank inverse from the eigenvalues of largest magnitude (Schioppa et al. 2022).

    A sample is encoded to ``rank`` numbers per block; scores are products of these. What the eigenvectors do not span
    is dropped, or with ``use_woodbury`` treated as if the matrix were lambda there, which takes the gradient besides.
    With as high a rank as there are parameters both are exact.

    Args:
        model: the trained model.
        loss: see `Problem`.
        regularization: lambda >= 0, one for all blocks or one for each; None: 0.
        rank: eigenpairs per block.
        krylov_dimension: vectors that the iteration keeps; None: ``4 rank``, at least 20. If the block has no more
            parameters its matrix is built instead.
        tol: residual of the eigenvectors, relative to the eigenvalue; down to rounding errors of the model's type.
        max_iter: most restarts; None: 10 P.
        eigen_computation_on_gpu: iterate on the GPU, with CuPy; the model must be there.
        block_structure: blocks of parameters between which curvature is ignored.
        second_order_mode: which matrix; see `SecondOrderMode`.
        use_woodbury: see above; takes a regularization > 0.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        regularization: Regularization = None,
        rank: int = 10,
        krylov_dimension: int | None = None,
        tol: float = 1e-6,
        max_iter: int | None = None,
        eigen_computation_on_gpu: bool = False,
        block_structure: BlockMode | str | Blocks = BlockMode.FULL,
        second_order_mode: SecondOrderMode | str = SecondOrderMode.HESSIAN,
        use_woodbury: bool = False,
    ) -> None:
        solver = ArnoldiSolver(
            regularization,
            SecondOrderMode(second_order_mode),
            rank,
            krylov_dimension,
            tol,
            max_iter,
            eigen_computation_on_gpu,
            use_woodbury,
        )
        super().__init__(Problem(model, loss, block_structure), solver)


@final
class NystroemSketchInfluence(InfluenceModel):
    """A low-rank approximation plus lambda, inverted exactly; the approximation takes one pass (Hataya & Yamada 2023).

    Exact if the matrix has no higher rank. A sample is encoded to ``rank`` numbers per block and its gradient.

    Args:
        model: the trained model.
        loss: see `Problem`.
        regularization: lambda > 0, one for all blocks or one for each.
        rank: columns of the random sketch, per block.
        block_structure: blocks of parameters between which curvature is ignored.
        second_order_mode: which matrix; see `SecondOrderMode`.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        regularization: float | Mapping[str, float],
        rank: int,
        block_structure: BlockMode | str | Blocks = BlockMode.FULL,
        second_order_mode: SecondOrderMode | str = SecondOrderMode.HESSIAN,
    ) -> None:
        solver = NystroemSolver(regularization, rank, SecondOrderMode(second_order_mode))
        super().__init__(Problem(model, loss, block_structure), solver)


@final
class EkfacCgInfluence(InfluenceModel):
    """The exact inverse of the Gauss-Newton matrix, by block conjugate gradient with EK-FAC as preconditioner.

    Of all methods here the one that predicts retraining best. For many test samples at once it takes few passes over
    the data: the first search directions are their EK-FAC factors, and each sample uses those of all. `CgInfluence`
    with an `EkfacPreconditioner` is the same with more to choose.

    Args:
        model: the trained model.
        loss: see `Problem`; of a known distribution (see `EkfacInfluence`).
        regularization: lambda > 0: the Gauss-Newton matrix of a network is singular.
        rtol: a test sample is done when its residual is below ``rtol |g|``. Scores are off by some tenth of that.
        maxiter: most products.
        progress: show a bar over products.
        seed: of the labels that EK-FAC draws.
        warn_on_max_iteration: warn, with the residual, if the tolerance was not reached.
        block_structure: blocks of parameters between which curvature is ignored.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        regularization: Regularization,
        rtol: float = 0.1,
        maxiter: int = 100,
        progress: bool = False,
        seed: int = 0,
        warn_on_max_iteration: bool = True,
        block_structure: BlockMode | str | Blocks = BlockMode.FULL,
    ) -> None:
        solver = CgSolver(
            regularization,
            SecondOrderMode.GAUSS_NEWTON,
            rtol,
            0.0,
            maxiter,
            progress,
            preconditioner=EkfacPreconditioner(EkfacInfluence(model, True, loss=loss, seed=seed)),
            solve_simultaneously=True,
            warn_on_max_iteration=warn_on_max_iteration,
        )
        super().__init__(Problem(model, loss, block_structure), solver)


@final
class InverseHarmonicMeanInfluence(InfluenceModel):
    """The mean of the inverses ``(g_i g_i^T + lambda)^-1`` of all training samples (DataInf: Kwon et al. 2024).

    Cheap: one pass over the data for all test samples of a chunk. For small lambda a good approximation only where
    gradients are alike. The data is read again whenever factors are computed.

    Args:
        model: the trained model.
        loss: see `Problem`.
        regularization: lambda > 0, one for all blocks or one for each.
        block_structure: blocks of parameters between which curvature is ignored.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        regularization: float | Mapping[str, float],
        block_structure: BlockMode | str | Blocks = BlockMode.FULL,
    ) -> None:
        super().__init__(Problem(model, loss, block_structure), HarmonicSolver(regularization))


@final
class EkfacInfluence(InfluenceModel):
    """Kronecker-factored inverse of the Fisher (K-FAC), with corrected eigenvalues if asked (EK-FAC).

    For linear layers, convolutions, embeddings, attention and normalisations; other trainable parameters are refused.
    Blocks are layers. Literature: Martens & Grosse 2015; George et al. 2018; Grosse et al. 2023; Eschenhagen et al.
    2023.

    Args:
        model: the trained model.
        update_diagonal: correct the eigenvalues (EK-FAC), at the cost of a second pass over the data.
        hessian_regularization: lambda >= 0, one for all layers or one for each. The Fisher alone is usually singular;
            a tenth of its mean eigenvalue is a usual choice.
        progress: show a bar over the data in `fit`.
        loss: one that a distribution of labels belongs to: cross entropy (classes; also one label for each of many
            positions, some of which may be ignored or masked), squared error (Gaussian) or binary cross entropy with
            logits (Bernoulli), with any reduction or factor; any loss with ``fisher="empirical"``.
        fisher: labels drawn from the model ("sampled"), their expectation ("exact": as many backward passes as
            the model has outputs a sample), or those of the data ("empirical").
        seed: of the sampled labels.
        tolerance: error of scores that is aimed at, relative to their root mean square. A sample is then encoded to the
            entries of the largest eigenvalues: in the eigenbasis the inverse is nearly constant at all others. How many
            that takes follows from the eigenvalues, and is tried on scores of training samples on each other; of
            others it may be a little more. With another regularization it is not tried again. 0: exact.
        weight_sharing: what the covariances take of layers that are applied to several positions.
    """

    def __init__(
        self,
        model: nn.Module,
        update_diagonal: bool = False,
        hessian_regularization: float | Mapping[str, float] = 0.0,
        progress: bool = False,
        *,
        loss: Loss = F.cross_entropy,
        fisher: FisherMode | str = FisherMode.SAMPLED,
        seed: int = 0,
        tolerance: float = 0.0,
        weight_sharing: WeightSharing | str = WeightSharing.EXPAND,
    ) -> None:
        sharing = WeightSharing(weight_sharing)
        solver = KroneckerSolver(
            hessian_regularization, update_diagonal, FisherMode(fisher), seed, progress, tolerance, sharing
        )
        super().__init__(Problem(model, loss, BlockMode.LAYER_WISE), solver)

    influence_factors_by_layer = InfluenceModel.influence_factors_by_block
    influences_by_layer = InfluenceModel.influences_by_block
    influences_from_factors_by_layer = InfluenceModel.influences_from_factors_by_block

    @_computed
    def explore_hessian_regularization(
        self, x: Tree, y: Tree, values: Iterable[float]
    ) -> dict[float, dict[str, Tensor]]:
        """Influences of samples on each other, by layer, for several regularizations; gradients are computed once.

        Args:
            x: inputs.
            y: labels.
            values: the regularizations to try.

        Returns:
            For each value and layer ``(n, n)``.
        """
        gradients = self.gradient_rows(x, y)
        models = {value: self.with_regularization(value) for value in values}
        return {
            value: model.encode(gradients).dot_by_block(model.right_rows(gradients)) for value, model in models.items()
        }


def _same_if_none(x_test: Tree, y_test: Tree, x: Tree, y: Tree) -> tuple[Tree, Tree]:
    if x is None and y is not None:
        raise DataError("y was given without x")
    return (x_test, y_test) if x is None else (x, y)


def _first(data: Data) -> Batch:
    return data.rows(slice(0, 3))


def _tensors(tree: Tree) -> Tree:
    tree = tree_map(torch.as_tensor, tree)
    lengths = {leaf.shape[0] if leaf.ndim else None for leaf in tree_leaves(tree)}
    if len(lengths) > 1:
        raise DataError(f"the arrays of a batch differ in their number of samples: {sorted(map(str, lengths))}")
    return tree

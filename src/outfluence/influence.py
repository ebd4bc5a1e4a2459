"""Influence models: fit on training data, then factors, gradients and scores of batches in memory.

    I(test_i, train_j) = g_i^T (H + lambda 1)^-1 g_j            mode "up"
    I(test_i, train_j) = g_i^T (H + lambda 1)^-1 d/dx g_j       mode "perturbation"

g is the gradient of the loss of one sample with respect to the parameters, H a mean over the training set. A positive
score: weighting the training sample up lowers the loss of the test sample (Koh & Liang 2017).

`InfluenceModel` holds everything; the named models differ in their solver only.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, Self, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from outfluence.data import Batch, Data, DataLike, Tree, tree_leaves, tree_map
from outfluence.errors import DataError, NotFittedError, OutfluenceError, ProblemError
from outfluence.modes import BlockMode, FisherMode, InfluenceMode, SecondOrderMode
from outfluence.problem import Loss, Problem
from outfluence.rows import DenseRows, check_finite
from outfluence.solvers import Inverse, Regularization, Solver, per_block
from outfluence.solvers.direct import DirectSolver
from outfluence.solvers.kronecker import KroneckerSolver

Blocks = Mapping[str, Iterable[str]]


class InfluenceModel:
    """Influence of training samples, for batches in memory. Users make one of the named models below.

    A fitted model pickles, copies and saves: it holds the model and the inverse, and no data. Inputs ``x`` are a
    tensor, or a tuple or dict of tensors, first axis samples. P is the number of trainable parameters.

    Args:
        problem: model, loss and blocks.
        solver: how the curvature is inverted.
    """

    def __init__(self, problem: Problem, solver: Solver) -> None:
        self.problem = problem
        self.solver = solver
        self._inverse: Inverse | None = None
        self._regularization: dict[str, float] = {}
        self._fitted_on: dict[str, Any] = {}
        self._versions: list[tuple[int, int]] = []

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
        self.problem.check(_first(data), "training")
        try:
            with torch.enable_grad():  # also where the user has switched gradients off
                self._inverse = self.solver.fit(self.problem, data)
        except OutfluenceError:
            raise
        except Exception as error:
            raise ProblemError(
                f"{type(self).__name__} cannot be fitted to this model and data: {type(error).__name__}: {error}"
            ) from error
        self._regularization = per_block(self.solver.regularization, self.problem)
        self._fitted_on = {"fit_data": data.fingerprint, **self.problem.fingerprint()}
        self._versions = self._parameter_versions()
        return self

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
        if self._inverse is not None:
            self._inverse = self._inverse.with_tensors({k: t.to(device) for k, t in self._inverse.tensors.items()})
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

    def influence_factors(self, x: Tree, y: Tree) -> Tensor:
        """Influence factors ``g^T (H + lambda 1)^-1`` of samples: ``(n, P)``.

        Raises:
            NonFiniteError: with the index of the sample.
        """
        return self.left_rows(x, y).values

    def influence_factors_by_block(self, x: Tree, y: Tree) -> dict[str, Tensor]:
        """Influence factors of each block, in order: ``(n, P_block)``."""
        return self.left_rows(x, y).by_block()

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

    def influences_from_factors(
        self, factors: Tensor, x: Tree, y: Tree, mode: InfluenceMode | str = InfluenceMode.Up
    ) -> Tensor:
        """Influences from factors ``(n_test, P)`` computed before."""
        return self._influences(self._as_rows(factors), x, y, mode)

    def influences_from_factors_by_block(
        self, factors: Mapping[str, Tensor], x: Tree, y: Tree, mode: InfluenceMode | str = InfluenceMode.Up
    ) -> dict[str, Tensor]:
        """Influences of each block, from the factors of each block ``(n_test, P_block)``."""
        if list(factors) != list(self.problem.blocks):
            raise DataError(f"factors are of blocks {list(factors)}, the model's are {list(self.problem.blocks)}")
        rows = self._as_rows(torch.cat([torch.as_tensor(f) for f in factors.values()], dim=1))
        return self._influences_by_block(rows, x, y, mode)

    def self_influences(self, x: Tree, y: Tree) -> Tensor:
        """Influence of each sample on itself, ``g^T (H + lambda 1)^-1 g``: ``(n,)``."""
        selves = self.inverse.quadratic(self.gradient_rows(x, y, "training"))
        check_finite(selves, "self-influences", "training")
        return selves

    # What calculators use: rows instead of numbers, and indices for messages.

    def gradient_rows(self, x: Tree, y: Tree, samples: str = "training", start: int = 0) -> DenseRows:
        """Gradients of samples.

        Args:
            x: inputs.
            y: labels.
            samples: whose samples they are, for messages.
            start: index of the first of them, for messages.

        Raises:
            NonFiniteError: with the index of the sample.
        """
        self._check_unchanged()
        rows = self.problem.gradients(*_tensors((x, y)))
        check_finite(rows.values, "gradients", samples, start)
        return rows

    def left_rows(self, x: Tree, y: Tree, samples: str = "test", start: int = 0) -> DenseRows:
        """Left rows of samples; see `gradient_rows`."""
        inverse = self.inverse
        rows = inverse.left(self.gradient_rows(x, y, samples, start))
        check_finite(rows.values, "influence factors", samples, start)
        return rows

    def right_rows(self, gradients: DenseRows) -> DenseRows:
        """Right rows of samples, from their gradients."""
        return self.inverse.right(gradients)

    def perturbations(self, left: DenseRows, x: Tree, y: Tree) -> Tensor:
        """Scores in perturbation mode, ``(n_left, n, *features)``."""
        return self.problem.mixed_derivatives(left.values, *_tensors((x, y)))

    def identity(self) -> dict[str, Any]:
        """What the scores depend on besides test and training data: method, options, weights, data of the fit."""
        _ = self.inverse
        return {
            "method": type(self).__name__,
            "options": self.solver.options(),
            "regularization": self._regularization,
            **self._fitted_on,
        }

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

    def _influences(self, left: DenseRows, x: Tree, y: Tree, mode: InfluenceMode | str) -> Tensor:
        if InfluenceMode(mode) is InfluenceMode.Perturbation:
            return self.perturbations(left, x, y)
        scores = left.dot(self.right_rows(self.gradient_rows(x, y)))
        check_finite(scores, "scores", "test")
        return scores

    def _influences_by_block(self, left: DenseRows, x: Tree, y: Tree, mode: InfluenceMode | str) -> dict[str, Tensor]:
        if InfluenceMode(mode) is InfluenceMode.Perturbation:
            return {name: self.perturbations(left.block(name), x, y) for name in left.sections}
        return left.dot_by_block(self.right_rows(self.gradient_rows(x, y)))

    def _as_rows(self, factors: Tensor) -> DenseRows:
        factors = torch.as_tensor(factors, dtype=self.problem.dtype, device=self.problem.device)
        if factors.ndim != 2 or factors.shape[1] != self.n_parameters:
            raise DataError(
                f"factors must be (n_test, {self.n_parameters}), one column for each parameter; got "
                f"{tuple(factors.shape)}"
            )
        return DenseRows(factors, self.problem.sections)


@final
class DirectInfluence(InfluenceModel):
    """The exact inverse of a dense matrix: for models of up to some ten thousand parameters per block.

    Args:
        model: the trained model.
        loss: see `Problem`.
        regularization: lambda >= 0, one for all blocks or one for each; None: 0.
        block_structure: blocks of parameters between which curvature is ignored.
        second_order_mode: the Hessian or the Gauss-Newton matrix.
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
class EkfacInfluence(InfluenceModel):
    """Kronecker-factored inverse of the Fisher (K-FAC), with corrected eigenvalues if asked (EK-FAC).

    For models whose trainable layers are linear. Blocks are layers. Literature: Martens & Grosse 2015; George et al.
    2018; Grosse et al. 2023.

    Args:
        model: the trained model, giving class scores ``(n, classes)``.
        update_diagonal: correct the eigenvalues (EK-FAC), at the cost of a second pass over the data.
        hessian_regularization: lambda >= 0, one for all layers or one for each. The Fisher alone is usually singular;
            a tenth of its mean eigenvalue is a usual choice.
        progress: show a bar over the data in `fit`.
        loss: cross entropy; any other loss with ``fisher="empirical"``.
        fisher: labels drawn from the model ("sampled"), their expectation ("exact": as many backward passes as
            classes), or those of the data ("empirical").
        seed: of the sampled labels.
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
    ) -> None:
        solver = KroneckerSolver(hessian_regularization, update_diagonal, FisherMode(fisher), seed, progress)
        super().__init__(Problem(model, loss, BlockMode.LAYER_WISE), solver)

    influence_factors_by_layer = InfluenceModel.influence_factors_by_block
    influences_by_layer = InfluenceModel.influences_by_block
    influences_from_factors_by_layer = InfluenceModel.influences_from_factors_by_block

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
            value: model.inverse.left(gradients).dot_by_block(model.right_rows(gradients))
            for value, model in models.items()
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

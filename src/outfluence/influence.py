"""Influence models: fit on training data, then factors, gradients and scores of batches in memory.

    I(test_i, train_j) = g_i^T (H + lambda 1)^-1 g_j            mode "up"
    I(test_i, train_j) = g_i^T (H + lambda 1)^-1 d/dx g_j       mode "perturbation"

g is the gradient of the loss of one sample with respect to the parameters, H a mean over the training set. A positive
score: weighting the training sample up lowers the loss of the test sample (Koh & Liang 2017).

`InfluenceModel` holds everything; the named models (`methods`) differ in their solver only.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import wraps
from typing import Any, Self, TypeVar, cast

import torch
from torch import Tensor

from outfluence.data import Batch, Data, DataLike, Tree, tree_leaves, tree_map
from outfluence.errors import DataError, NotFittedError, OutfluenceError, ProblemError
from outfluence.machine import float32_products, keep_memory
from outfluence.modes import InfluenceMode
from outfluence.problem import Problem
from outfluence.rows import DenseRows, GradientRows, Rows, check_finite
from outfluence.solvers import Inverse, Solver, asked, per_block

_Method = TypeVar("_Method", bound=Callable[..., Any])


def computed(method: _Method) -> _Method:
    """In the best way that the machine has; see `machine`."""

    @wraps(method)
    def call(model: Any, *args: Any, **kwargs: Any) -> Any:
        keep_memory()
        with float32_products(model.problem.device):
            return method(model, *args, **kwargs)

    return cast(_Method, call)


class InfluenceModel:
    """Influence of training samples, for batches in memory. Users make one of the named models (`methods`).

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
        self._fitted_on: dict[str, Any] = {}
        self._versions: list[tuple[int, int]] = []

    @computed
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
        self.problem = self.problem.unstructured().check(_first(data), "training")

    def _fitted(self, data: Data) -> Self:
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
        return dict(self.inverse.regularization)

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
        other.solver = replace(self.solver, regularization=lambdas)  # type: ignore[type-var]
        return other

    def with_inverse(self, inverse: Inverse) -> Self:
        """This model with another inverse, of the same fit."""
        other = copy.copy(self)
        other._inverse = inverse
        return other

    @computed
    def influence_factors(self, x: Tree, y: Tree) -> Tensor:
        """Influence factors ``g^T (H + lambda 1)^-1`` of samples: ``(n, P)``.

        Raises:
            NonFiniteError: with the index of the sample.
        """
        return self.dense(self.left_rows(x, y)).values

    @computed
    def influence_factors_by_block(self, x: Tree, y: Tree) -> dict[str, Tensor]:
        """Influence factors of each block, in order: ``(n, P_block)``."""
        return self.dense(self.left_rows(x, y)).by_block()

    @computed
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

    @computed
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

    @computed
    def influences_from_factors(
        self, factors: Tensor, x: Tree, y: Tree, mode: InfluenceMode | str = InfluenceMode.Up
    ) -> Tensor:
        """Influences from factors ``(n_test, P)`` computed before."""
        return self._influences(self.as_rows(factors), x, y, mode)

    @computed
    def influences_from_factors_by_block(
        self, factors: Mapping[str, Tensor], x: Tree, y: Tree, mode: InfluenceMode | str = InfluenceMode.Up
    ) -> dict[str, Tensor]:
        """Influences of each block, from the factors of each block ``(n_test, P_block)``."""
        if list(factors) != list(self.problem.blocks):
            raise DataError(f"factors are of blocks {list(factors)}, the model's are {list(self.problem.blocks)}")
        rows = self.as_rows(torch.cat([torch.as_tensor(f) for f in factors.values()], dim=1))
        return self._influences_by_block(rows, x, y, mode)

    @computed
    def self_influences(self, x: Tree, y: Tree) -> Tensor:
        """Influence of each sample on itself, ``g^T (H + lambda 1)^-1 g``: ``(n,)``."""
        selves = self.inverse.quadratic(self.gradient_rows(x, y, "training"))
        check_finite(selves, "self-influences", "training")
        return selves

    # What calculators use: rows instead of numbers, and indices for messages.

    def gradient_rows(
        self, x: Tree, y: Tree, samples: str = "training", start: int = 0, into: Tensor | None = None
    ) -> GradientRows:
        """Gradients of samples, factored where that is known how and smaller.

        Args:
            x: inputs.
            y: labels.
            samples: whose samples they are, for messages.
            start: index of the first of them, for messages.
            into: see `Problem.gradients`.

        Raises:
            NonFiniteError: with the index of the sample.
        """
        self._check_unchanged()
        takes_factors = self._inverse is not None and self._inverse.takes_factors
        x, y = _tensors((x, y))
        rows = self.problem.gradients(x, y, not takes_factors, into)
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
        return self._method() | {"regularization": self.regularization, **self._fitted_on}

    def identity_on(self, data: Data) -> dict[str, Any]:
        """What `identity` would be after ``fit(data)``."""
        regularization = asked(self.solver, self.problem)
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

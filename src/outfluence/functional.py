"""One-call front door: influences, influence factors and inverse products of a problem over data in memory."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from outfluence.curvature import Curvature
from outfluence.data import BATCH_SIZE, Data, DataLike, Tree
from outfluence.errors import DataError, ProblemError
from outfluence.influence import InfluenceModel
from outfluence.methods import (
    ArnoldiInfluence,
    CgInfluence,
    DirectInfluence,
    EkfacCgInfluence,
    EkfacInfluence,
    InverseHarmonicMeanInfluence,
    LissaInfluence,
    NystroemSketchInfluence,
    ProjectedInfluence,
)
from outfluence.modes import BlockMode, InfluenceMode, SecondOrderMode
from outfluence.problem import Loss, Problem
from outfluence.rows import DenseRows
from outfluence.solvers.direct import DirectInverse

METHODS: dict[str, Any] = {
    "direct": DirectInfluence,
    "cg": CgInfluence,
    "lissa": LissaInfluence,
    "arnoldi": ArnoldiInfluence,
    "nystroem": NystroemSketchInfluence,
    "ekfac": EkfacInfluence,
    "ekfac_cg": EkfacCgInfluence,
    "projected": ProjectedInfluence,
    "harmonic": InverseHarmonicMeanInfluence,
}

#: Options of the constructors that come from elsewhere.
_GIVEN = {"self", "model", "loss", "regularization", "hessian_regularization", "block_structure", "progress"}


@dataclass(frozen=True)
class InverseHvpResult:
    """Solutions of ``(H + lambda 1) x = b``, and how they came about.

    Attributes:
        x: as long as the right-hand sides, ``(n, P)`` or ``(P,)``.
        info: by name; with several blocks each entry is a dict by block. direct: ``matrix``, not regularized. cg:
            ``iterations``, ``residual`` (relative) and ``converged`` per right-hand side. lissa: ``max_error`` and
            ``mean_error`` (of the relative residuals), and what cg has. arnoldi, nystroem: ``eigenvalues`` and
            ``eigenvectors``. ekfac: ``eigenvalues``. projected: ``kernel``. harmonic: nothing.
    """

    x: Tensor
    info: dict[str, Any]


class TorchTwiceDifferentiable(Problem):
    """A `Problem` on a device, and its derivatives on batches. Means over the batch's samples, all parameters in a row.

    Args:
        model: the trained model; it stays where it is.
        loss: see `Problem`.
        device: where to compute; None: where the model is.
    """

    def __init__(self, model: nn.Module, loss: Loss, device: torch.device | str | None = None) -> None:
        super().__init__(model, loss)
        if device is not None:
            moved = Problem(model, loss).to(device)
            object.__setattr__(self, "model", moved.model)

    def to(self, device: torch.device | str) -> TorchTwiceDifferentiable:
        """This problem on a device; the user's model stays where it is."""
        return TorchTwiceDifferentiable(self.model, self.loss, device)

    @property
    def num_params(self) -> int:
        """P, the number of trainable parameters."""
        return self.n_parameters

    def grad(self, x: Tree, y: Tree) -> Tensor:
        """The gradient of the mean loss, ``(P,)``."""
        return self.gradients(x, y).dense().values.mean(0)

    def hessian(self, x: Tree, y: Tree) -> Tensor:
        """The Hessian of the mean loss, ``(P, P)``."""
        return self._curvature(x, y).dense()

    def mvp(self, x: Tree, y: Tree, vectors: Tensor) -> Tensor:
        """The Hessian of the mean loss times vectors, ``(P,)`` or ``(k, P)``, of the same shape."""
        columns = _right_hand_sides(self, vectors).T
        return self._curvature(x, y).matmat(columns).T.reshape(vectors.shape)

    def _curvature(self, x: Tree, y: Tree) -> Curvature:
        return Curvature(self, Data.from_arrays(x, y), next(iter(self.blocks)), SecondOrderMode.HESSIAN)


def compute_influences(
    problem: Problem,
    training_data: DataLike,
    *,
    test_data: DataLike | None = None,
    input_data: DataLike | None = None,
    inversion_method: str = "direct",
    influence_type: InfluenceMode | str = InfluenceMode.Up,
    hessian_regularization: float | Mapping[str, float] = 0.0,
    progress: bool = False,
    **options: Any,
) -> Tensor:
    """Influences of samples on test samples, in memory. For what does not fit there are the calculators.

    Args:
        problem: model, loss and blocks.
        training_data: what the curvature is taken over; anything `Data.of` takes, as the two that follow.
        test_data: whose loss is influenced; None: the training data.
        input_data: whose influence it is; None: the training data.
        inversion_method: direct, cg, ekfac_cg, lissa, arnoldi, nystroem, ekfac, projected or harmonic.
        influence_type: perturb weights ("up") or features ("perturbation").
        hessian_regularization: lambda, one for all blocks or one for each.
        progress: show bars.
        options: of the method: those of its influence model.

    Returns:
        ``(n_test, n_input)``; in perturbation mode ``(n_test, n_input, *features)``.

    Raises:
        ProblemError: if there is no such method, or it does not take an option; the message lists what there is.
    """
    mode = InfluenceMode(influence_type)
    train = Data.of(training_data)
    test = train if test_data is None else Data.of(test_data)
    inputs = train if input_data is None else Data.of(input_data)
    model = _model(inversion_method, problem, hessian_regularization, progress, options).fit(train)
    model.check(test, "test")
    model.check(inputs, "input")
    left = model.encode(_gradients(model, test, "test", progress))
    columns = []
    for start, batch in _batches(inputs, "scores", progress):
        if mode is InfluenceMode.Perturbation:
            columns.append(model.perturbations(left, *batch))
        else:
            columns.append(left.dot(model.right_rows(model.gradient_rows(batch.x, batch.y, "input", start), left)))
    return torch.cat(columns, dim=1)


def compute_influence_factors(
    problem: Problem,
    training_data: DataLike,
    test_data: DataLike,
    inversion_method: str,
    *,
    hessian_regularization: float | Mapping[str, float] = 0.0,
    progress: bool = False,
    **options: Any,
) -> InverseHvpResult:
    """Influence factors ``g^T (H + lambda 1)^-1`` of test samples, ``(n_test, P)``; see `compute_influences`."""
    test = Data.of(test_data)
    model = _model(inversion_method, problem, hessian_regularization, progress, options).fit(training_data)
    model.check(test, "test")
    return _solve(model, _gradients(model, test, "test", progress).values)


def solve_hvp(
    inversion_method: str,
    problem: Problem,
    training_data: DataLike,
    b: Tensor,
    *,
    hessian_regularization: float | Mapping[str, float] = 0.0,
    **options: Any,
) -> InverseHvpResult:
    """Solve ``(H + lambda 1) x = b``, H over the training data.

    Args:
        inversion_method: see `compute_influences`.
        problem: model, loss and blocks.
        training_data: anything `Data.of` takes.
        b: right-hand sides ``(n, P)``, or one, ``(P,)``; parameters in the order of `Problem.names`.
        hessian_regularization: lambda, one for all blocks or one for each.
        options: of the method, and ``progress``.
    """
    progress = bool(options.pop("progress", False))
    rows = _right_hand_sides(problem, b)
    if not rows.isfinite().all():
        raise DataError("a right-hand side has NaN or infinite entries")
    model = _model(inversion_method, problem, hessian_regularization, progress, options).fit(training_data)
    result = _solve(model, rows)
    return InverseHvpResult(result.x.reshape(b.shape), result.info)


def compute_linear_influences(
    x_train: Any,
    y_train: Any,
    x_test: Any,
    y_test: Any,
    influence_type: InfluenceMode | str = InfluenceMode.Up,
    hessian_regularization: float = 0.0,
) -> Tensor:
    """Influences of a linear model with intercept, fitted here by least squares, in closed form.

    For the loss ``|W x + b - y|^2 / d`` of a sample with d targets. With ``a = (x, 1)``, residuals r and C the mean of
    ``a a^T`` over the training samples, ``I(i, j) = (2/d)^2 (r_i . r_j) a_i^T (2/d C + lambda)^-1 a_j``.

    Args:
        x_train: ``(n_train, d_in)``, numpy or torch.
        y_train: ``(n_train, d)`` or ``(n_train,)``.
        x_test: ``(n_test, d_in)``.
        y_test: ``(n_test, d)`` or ``(n_test,)``.
        influence_type: "up" or "perturbation".
        hessian_regularization: lambda.

    Returns:
        float64, ``(n_test, n_train)``; in perturbation mode ``(n_test, n_train, d_in)``.

    Raises:
        DataError: if shapes do not fit.
        SingularMatrixError: if the regularized matrix has no inverse.
    """
    x, y = _matrix(x_train, "x_train"), _matrix(y_train, "y_train")
    xt, yt = _matrix(x_test, "x_test"), _matrix(y_test, "y_test")
    if len(x) != len(y) or len(xt) != len(yt) or x.shape[1] != xt.shape[1] or y.shape[1] != yt.shape[1]:
        raise DataError(
            f"shapes do not fit: x_train {tuple(x.shape)}, y_train {tuple(y.shape)}, x_test {tuple(xt.shape)}, y_test "
            f"{tuple(yt.shape)}"
        )
    mode = InfluenceMode(influence_type)
    a, at = (torch.cat([part, torch.ones(len(part), 1, dtype=part.dtype)], dim=1) for part in (x, xt))
    weights = torch.linalg.lstsq(a, y, driver="gelsd").solution
    r, rt, factor = a @ weights - y, at @ weights - yt, 2 / y.shape[1]
    inverse = DirectInverse.of({"all": factor * a.T @ a / len(a)}, {"all": float(hessian_regularization)})
    h = inverse.left(DenseRows(at, {"all": slice(0, a.shape[1])})).values
    scores: Tensor = factor**2 * (rt @ r.T) * (h @ a.T)
    if mode is InfluenceMode.Up:
        return scores
    # d/dx of (r . r_i) (h . a): r and a both depend on x.
    d_in = x.shape[1]
    by_residual = (rt @ weights[:d_in].T)[:, None, :] * (h @ a.T)[:, :, None]
    scores = factor**2 * (by_residual + (rt @ r.T)[:, :, None] * h[:, None, :d_in])
    return scores


def _model(
    method: str,
    problem: Problem,
    regularization: float | Mapping[str, float],
    progress: bool,
    options: Mapping[str, Any],
) -> InfluenceModel:
    if method not in METHODS:
        raise ProblemError(f"there is no inversion_method {method!r}; choose one of {', '.join(METHODS)}")
    kind = METHODS[method]
    takes = inspect.signature(kind.__init__).parameters
    known = [name for name in takes if name not in _GIVEN]
    for name in options:
        if name not in known:
            close = difflib.get_close_matches(name, known, 1)
            raise ProblemError(
                f"{method!r} takes no option {name!r}{f' (did you mean {close[0]!r}?)' if close else ''}; it takes "
                f"{', '.join(known) or 'none'}"
            )
    missing = [name for name in known if takes[name].default is inspect.Parameter.empty and name not in options]
    if missing:
        raise ProblemError(f"{method!r} needs the option {', '.join(map(repr, missing))}")
    given: dict[str, Any] = {"model": problem.model, "loss": problem.loss, **options}
    if method == "ekfac":
        given["hessian_regularization"] = regularization
        if isinstance(problem.block_structure, Mapping) or problem.block_structure == BlockMode.PARAMETER_WISE:
            raise ProblemError("ekfac works layer by layer: leave the problem's block_structure alone")
    else:
        given |= {"regularization": regularization, "block_structure": problem.blocks}
    if "progress" in takes:
        given["progress"] = progress
    model: InfluenceModel = kind(**given)
    return model


def _solve(model: InfluenceModel, rows: Tensor) -> InverseHvpResult:
    solved, by_block = model.inverse.solve(model.as_rows(rows))
    keys = {key: None for block in by_block.values() for key in block}
    info: dict[str, Any] = {key: {name: block[key] for name, block in by_block.items()} for key in keys}
    if len(model.problem.blocks) == 1:
        info = {key: next(iter(values.values())) for key, values in info.items()}
    return InverseHvpResult(solved.values, info)


def _gradients(model: InfluenceModel, data: Data, whose: str, progress: bool) -> DenseRows:
    parts = [
        model.gradient_rows(batch.x, batch.y, whose, start).dense().values
        for start, batch in _batches(data, f"{whose} gradients", progress)
    ]
    return DenseRows(torch.cat(parts), model.problem.sections)


def _batches(data: Data, what: str, progress: bool) -> Any:
    size = data.batch_size or BATCH_SIZE
    steps = tqdm(data.batches(size), what, total=-(-len(data) // size), disable=not progress)
    return ((i * size, batch) for i, batch in enumerate(steps))


def _right_hand_sides(problem: Problem, b: Tensor) -> Tensor:
    rows = torch.as_tensor(b, dtype=problem.dtype, device=problem.device)
    if rows.ndim not in (1, 2) or rows.shape[-1] != problem.n_parameters:
        raise DataError(f"right-hand sides must be (n, {problem.n_parameters}) or (P,); got {tuple(rows.shape)}")
    return rows.reshape(-1, problem.n_parameters)


def _matrix(array: Any, name: str) -> Tensor:
    tensor = torch.as_tensor(np.asarray(array) if not isinstance(array, Tensor) else array.detach().cpu()).double()
    if tensor.ndim == 1:
        tensor = tensor[:, None]
    if tensor.ndim != 2:
        raise DataError(f"{name} must be a matrix, first axis samples; got {tuple(tensor.shape)}")
    return tensor

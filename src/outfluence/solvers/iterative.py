"""Inverses that are applied by iterating over the data: conjugate gradient, and LiSSA."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor
from tqdm.auto import tqdm

from outfluence.curvature import Curvature
from outfluence.data import Data
from outfluence.errors import ConvergenceError, ConvergenceWarning, ProblemError
from outfluence.linalg import conjugate_gradient, extreme_eigenvalues
from outfluence.modes import SecondOrderMode
from outfluence.preconditioners import Fitted, Preconditioner, check_preconditioner
from outfluence.problem import Problem
from outfluence.rows import DenseRows, GradientRows
from outfluence.solvers import ReadingInverse, Regularization, grouped, per_block

#: Most products of conjugate gradient for a right-hand side, if nobody says.
_MAXITER = 1000
#: Units in the last place that are taken for rounding errors.
_ROUNDING = 100


@dataclass(frozen=True)
class CgSolver:
    """Conjugate gradient; see `linalg.conjugate_gradient` and `methods.CgInfluence`.

    Args:
        regularization: lambda, one for all blocks or one for each.
        second_order_mode: which matrix.
        rtol: of the residual, relative to the right-hand side.
        atol: of the residual.
        maxiter: most products for a right-hand side; None: 10 P, at most 1,000.
        progress: show a bar over products.
        precompute_grad: keep the derivatives that do not change between products, for all of the data.
        preconditioner: see `preconditioners`.
        solve_simultaneously: block conjugate gradient.
        warn_on_max_iteration: warn where the tolerance was not reached.
    """

    regularization: Regularization = None
    second_order_mode: SecondOrderMode = SecondOrderMode.HESSIAN
    rtol: float = 1e-4
    atol: float = 1e-6
    maxiter: int | None = None
    progress: bool = False
    precompute_grad: bool = False
    preconditioner: Preconditioner | None = None
    solve_simultaneously: bool = False
    warn_on_max_iteration: bool = True

    def fit(self, problem: Problem, data: Data) -> CgInverse:
        """Reads the data for the preconditioner only."""
        check_positive("maxiter", self.maxiter)
        check_tolerances(rtol=self.rtol, atol=self.atol)
        check_preconditioner(self.preconditioner)
        regularization = per_block(self.regularization, problem)
        fitted = {}
        if self.preconditioner is not None:
            for block in problem.blocks:
                fitted[block] = self.preconditioner.fit(Curvature(problem, data, block, self.second_order_mode))
        return CgInverse(problem, data, regularization, self, fitted)

    def restore(self, problem: Problem, data: Data, tensors: Mapping[str, Tensor]) -> CgInverse:
        """See `Solver`."""
        fitted = {}
        if self.preconditioner is not None:
            for block, parts in grouped(tensors).items():
                curvature = Curvature(problem, data, block, self.second_order_mode)
                fitted[block] = self.preconditioner.restore(curvature, parts)
        return CgInverse(problem, data, per_block(self.regularization, problem), self, fitted)

    def options(self) -> dict[str, Any]:
        """What the result depends on; on all but the matrix only within the tolerance."""
        return {
            "second_order_mode": str(self.second_order_mode),
            "rtol": self.rtol,
            "atol": self.atol,
            "maxiter": self.maxiter,
            "solve_simultaneously": self.solve_simultaneously,
            "preconditioner": None if self.preconditioner is None else repr(self.preconditioner),
        }


@dataclass(frozen=True)
class CgInverse(ReadingInverse):
    """Solves with ``H + lambda 1``.

    Attributes:
        solver: tolerances and the rest.
        preconditioners: per block, if there are any.
    """

    solver: CgSolver
    preconditioners: Mapping[str, Fitted]

    def solve(self, gradients: GradientRows) -> tuple[DenseRows, dict[str, dict[str, Any]]]:
        """Per block: ``iterations``, ``residual`` (relative) and ``converged`` of each right-hand side."""
        solver, solved, info = self.solver, [], {}
        for block, rows in gradients.by_block().items():
            curvature = Curvature(self.problem, self.source, block, solver.second_order_mode)
            damping = self.regularization[block]
            matmat = damped(curvature.precomputed() if solver.precompute_grad else curvature.matmat, damping)
            fitted = self.preconditioners.get(block)
            maxiter = solver.maxiter or min(10 * curvature.size, _MAXITER)
            with tqdm(total=maxiter, desc=f"cg {block}", unit=" products", disable=not solver.progress) as bar:
                solution = conjugate_gradient(
                    matmat,
                    rows.T,
                    rtol=solver.rtol,
                    atol=solver.atol,
                    maxiter=maxiter,
                    precondition=_at(fitted, damping) if fitted is not None else None,
                    block=solver.solve_simultaneously,
                    on_step=bar.update,
                )
            solved.append(solution.x.T)
            info[block] = {
                "iterations": solution.iterations,
                "residual": solution.residual,
                "converged": solution.converged,
            }
            if solver.warn_on_max_iteration and not solution.converged.all():
                warn_unconverged(
                    f"conjugate gradient on block {block!r} (regularization {damping:g})",
                    solution.residual[~solution.converged],
                    len(rows),
                    int(solution.iterations.max()),
                    "The matrix is not positive definite (negative curvature was met): raise the regularization, or "
                    "use second_order_mode='gauss_newton'."
                    if solution.negative_curvature
                    else "Raise maxiter or the regularization, loosen rtol, use a preconditioner or float64.",
                )
        return DenseRows(torch.cat(solved, dim=1), gradients.sections), info

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Those of the preconditioners."""
        return {f"{block}/{k}": t for block, fitted in self.preconditioners.items() for k, t in fitted.tensors.items()}

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> Self:
        """See `Inverse`."""
        fitted = {
            block: one.with_tensors({name: tensors[f"{block}/{name}"] for name in one.tensors})
            for block, one in self.preconditioners.items()
        }
        return type(self)(self.problem, self.source, self.regularization, self.solver, fitted)


@dataclass(frozen=True)
class LissaSolver:
    """The recursion of LiSSA, with reduced variance; see `methods.LissaInfluence`.

    Args:
        regularization: lambda, one for all blocks or one for each.
        second_order_mode: which matrix.
        maxiter: most steps; each takes the product of one batch.
        dampen: d; adds ``scale d`` to lambda.
        scale: the matrix is divided by it; must exceed half its largest eigenvalue.
        rtol: of the residual, relative to the right-hand side.
        progress: show a bar over steps.
        warn_on_max_iteration: warn where the tolerance was not reached.
        seed: of the order of batches.
    """

    regularization: Regularization = None
    second_order_mode: SecondOrderMode = SecondOrderMode.HESSIAN
    maxiter: int = 1000
    dampen: float = 0.0
    scale: float = 10.0
    rtol: float = 1e-4
    progress: bool = False
    warn_on_max_iteration: bool = True
    seed: int = 0

    def fit(self, problem: Problem, data: Data) -> LissaInverse:
        """Reads nothing."""
        check_positive("maxiter", self.maxiter)
        check_positive("scale", self.scale)
        check_tolerances(rtol=self.rtol, dampen=self.dampen)
        return LissaInverse(problem, data, per_block(self.regularization, problem), self)

    def restore(self, problem: Problem, data: Data, tensors: Mapping[str, Tensor]) -> LissaInverse:  # noqa: ARG002
        """See `Solver`."""
        return self.fit(problem, data)

    def options(self) -> dict[str, Any]:
        """What the result depends on; on all but the matrix and ``dampen`` only within the tolerance."""
        return {
            "second_order_mode": str(self.second_order_mode),
            "maxiter": self.maxiter,
            "dampen": self.dampen,
            "scale": self.scale,
            "rtol": self.rtol,
            "seed": self.seed,
        }


@dataclass(frozen=True)
class LissaInverse(ReadingInverse):
    """``x <- x - ((H_batch + lambda) x - b) / scale``, a batch at a time (Agarwal et al. 2017).

    With A = H + lambda and A_batch likewise, an epoch starts at an anchor a, where the residual ``b - A a`` is computed
    on all of the data; its steps are ``x <- x + ((b - A a) - A_batch (x - a)) / scale``, whose noise vanishes as x and
    a come to rest (variance reduction, Johnson & Zhang 2013). So it converges to the solution itself, whatever the
    batches, and knows its residual. An epoch that was too long for its noise is taken back, and halved.

    Attributes:
        solver: scale, tolerance and the rest.
    """

    solver: LissaSolver

    def solve(self, gradients: GradientRows) -> tuple[DenseRows, dict[str, dict[str, Any]]]:
        """Per block: ``max_error`` and ``mean_error`` of the relative residuals, and what conjugate gradient has."""
        solved, info = [], {}
        for block, rows in gradients.by_block().items():
            curvature = Curvature(self.problem, self.source, block, self.solver.second_order_mode)
            x, residual, steps = self._iterate(curvature, rows.T)
            converged = residual <= self.solver.rtol
            solved.append(x.T)
            info[block] = {
                "max_error": residual.max() if len(rows) else residual.sum(),
                "mean_error": residual.mean() if len(rows) else residual.sum(),
                "residual": residual,
                "converged": converged,
                "iterations": steps,
            }
            if self.solver.warn_on_max_iteration and not converged.all():
                warn_unconverged(
                    f"LiSSA on block {block!r} (scale {self.solver.scale:g})",
                    residual[~converged],
                    len(rows),
                    steps,
                    "Raise maxiter or the regularization, loosen rtol, or lower the scale.",
                )
        return DenseRows(torch.cat(solved, dim=1), gradients.sections), info

    def _iterate(self, curvature: Curvature, b: Tensor) -> tuple[Tensor, Tensor, int]:
        solver = self.solver
        damping = self.regularization[curvature.block] + solver.scale * solver.dampen
        matmat = damped(curvature.matmat, damping)
        norms = torch.linalg.vector_norm(b, dim=0).clamp(min=torch.finfo(b.dtype).tiny)
        size, n = curvature.batch_size, len(self.source)
        starts = torch.arange(0, n, size)
        generator = torch.Generator().manual_seed(solver.seed)
        epoch = 1 if len(starts) == 1 else 2 * len(starts)
        anchor, rest = torch.zeros_like(b), b
        error = torch.linalg.vector_norm(rest, dim=0) / norms
        step = 0
        with tqdm(total=solver.maxiter, desc=f"lissa {curvature.block}", disable=not solver.progress) as bar:
            while step < solver.maxiter and (error > solver.rtol).any():
                order = torch.cat([torch.randperm(len(starts), generator=generator) for _ in range(2)])
                x = anchor + rest / solver.scale  # the first step needs no batch: x is the anchor
                taken = min(epoch, solver.maxiter - step)
                for start in starts[order[: taken - 1]].tolist():
                    batch = self.source.rows(slice(start, start + size))
                    moved = x - anchor
                    count = min(size, n - start)
                    image = curvature.product(batch, start)(moved.T.contiguous()).T / count + damping * moved
                    x = x + (rest - image) / solver.scale
                step += taken
                bar.update(taken)
                after = b - matmat(x) if x.isfinite().all() else torch.full_like(b, float("nan"))
                error_after = torch.linalg.vector_norm(after, dim=0) / norms
                if error_after.norm() <= error.norm():
                    anchor, rest, error = x, after, error_after
                elif epoch > 1:
                    epoch //= 2
                else:  # as far as it goes: at working precision, or the rest of b is out of the matrix's reach; or not
                    self._refuse_divergence(curvature, matmat)
                    break
        return anchor, error, step

    def _refuse_divergence(self, curvature: Curvature, matmat: Callable[[Tensor], Tensor]) -> None:
        smallest, largest = extreme_eigenvalues(matmat, curvature.size, curvature.like)
        what = f"LiSSA diverges on block {curvature.block!r} at scale {self.solver.scale:g}"
        if smallest < -_ROUNDING * torch.finfo(self.problem.dtype).eps * abs(largest):
            raise ConvergenceError(
                f"{what}, and would at any other: the regularized matrix has a negative eigenvalue, about "
                f"{smallest:.1e}. Raise the regularization by more than that, or use second_order_mode='gauss_newton'."
            )
        if largest > 1.9 * self.solver.scale:  # it converges below twice; the estimate is from below
            raise ConvergenceError(
                f"{what}: the largest eigenvalue of the regularized matrix is about {largest:.2g}. "
                f"scale={float(f'{1.2 * largest:.1e}'):g} would have worked."
            )


def damped(matmat: Callable[[Tensor], Tensor], damping: float) -> Callable[[Tensor], Tensor]:
    """Products with ``H + lambda 1``."""
    return lambda vectors: matmat(vectors) + damping * vectors


def warn_unconverged(what: str, residuals: Tensor, n: int, iterations: int, advice: str) -> None:
    """Say which residual is left.

    Warns:
        ConvergenceWarning: always.
    """
    warnings.warn(
        f"{what} stopped after {iterations} iterations with {len(residuals)} of {n} right-hand sides short of the "
        f"tolerance; the largest relative residual is {float(residuals.max()):.1e}. {advice}",
        ConvergenceWarning,
        stacklevel=2,
    )


def check_positive(name: str, value: float | None) -> None:
    """Refuse zero and less.

    Raises:
        ProblemError: naming the option.
    """
    if value is not None and not 0 < value < float("inf"):
        raise ProblemError(f"{name} must be positive and finite, not {value!r}")


def check_tolerances(**values: float) -> None:
    """Refuse what is below zero.

    Raises:
        ProblemError: naming the option.
    """
    for name, value in values.items():
        if not 0 <= value < float("inf"):
            raise ProblemError(f"{name} must be finite and >= 0, not {value!r}")


def _at(fitted: Fitted, regularization: float) -> Callable[[Tensor], Tensor]:
    return lambda columns: fitted.solve(columns, regularization)

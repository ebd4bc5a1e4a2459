"""How far scores are from the exact ones, and the model from where they hold: on a sample, without retraining.

Scores predict retraining to first order, of a model whose training has come to rest. `assess` asks of a sample of the
data what can go wrong on the way there: the method may be far from the inverse that it approximates, the regularization
may leave nothing of the curvature, the model may not be at rest, and the Hessian may be that of a saddle.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from outfluence.curvature import Curvature
from outfluence.data import BATCH_SIZE, Batch, Data, DataLike, to_numpy, tree_leaves, tree_map
from outfluence.errors import DataError, ProblemError
from outfluence.estimates import Estimate, rank_correlations
from outfluence.influence import InfluenceModel
from outfluence.linalg import Matmat, Solution, conjugate_gradient, extreme_eigenvalues
from outfluence.machine import float32_products
from outfluence.modes import FisherMode, KernelMode, SecondOrderMode
from outfluence.problem import Problem
from outfluence.rows import DenseRows
from outfluence.solvers.ensemble import EnsembleProblem
from outfluence.solvers.harmonic import HarmonicSolver
from outfluence.solvers.iterative import LissaSolver, damped
from outfluence.solvers.kronecker import KroneckerSolver
from outfluence.solvers.lowrank import LowRankInverse
from outfluence.solvers.projected import ProjectedInverse, ProjectedSolver

#: Highest scores that are compared, random halves of the training samples, and sums of gradients with random signs.
_TOP, _HALVES, _SIGNS = 10, 200, 8
#: Of the exact scores' solves: the residual aimed at, the most products, and the residual from which on they
#: are no measure. At the one aimed at rank correlations are off by a thousandth (digits, lambda from 1e-4 to 1e-1).
_RTOL, _MAXITER, _UNSOLVED = 1e-2, 200, 0.1
#: The damping of the Newton step, over the largest eigenvalue. Where curvature is a twentieth of the largest or more,
#: training comes to rest first. With less, what a step promises tells converged models less well from others.
_STIFF = 0.05
#: Numbers of dense gradients that are there at once.
_NUMBERS = 1 << 23

#: What the matrices are called.
_NAMES = {
    SecondOrderMode.HESSIAN: "Hessian",
    SecondOrderMode.GAUSS_NEWTON: "Gauss-Newton",
    SecondOrderMode.FISHER: "Fisher",
    SecondOrderMode.EMPIRICAL_FISHER: "empirical Fisher",
}

# From where on something is a finding. On digits (`benchmarks/fidelity.py`; docs/fidelity.md has the numbers):
#: The Newton step's promise: 0.09 to 0.41 of the loss while training goes on (1 to 10 of 30 epochs), 0.02 to 0.03 of it
#: after 20, and 0.01 when training has ended.
_MOVING = 0.05
#: Rank correlation of exact scores with products of gradients: 0.56 at a regularization that predicts retraining well
#: (0.54, products of gradients 0.29), 0.94 at one that does not (0.34).
_SWAMPED = 0.9
#: The way that a method goes from products of gradients to exact scores: 0.4 to 0.6 for K-FAC and EK-FAC, 0.3 to 0.9
#: for Arnoldi of rank 100, which predict retraining well; below 0.1 for the ranks 2 and 10, which predict it no better
#: than products of gradients do.
_LITTLE = 0.25
#: Where sums of scores agree as well as this, the way that is left is no matter.
_ALIKE = 0.9


@dataclass(frozen=True)
class Assessment:
    """What `assess` found; print it. Estimates are means over test samples.

    Attributes:
        spearman: rank correlation of a test sample's scores with the exact ones.
        sums: the same of sums of scores over random halves of the training samples, which is what the scores are to
            predict of models trained on these (see `fidelity.linear_datamodeling_score`).
        top: share of the ten highest exact scores that are among the ten highest.
        signs: share of scores that have the sign of the exact ones.
        gradients: rank correlation of products of gradients with the exact scores.
        gradient_sums: the same of sums over halves.
        damping: share of the regularization in ``g^T (H + lambda) s``, s the exact factor of a test gradient g: one
            where there is no curvature beside it, zero where there is nothing but.
        residual: the largest of the exact scores' solves, relative.
        newton: what a damped Newton step promises to lower the mean loss by, relative; see `assess`.
        chance: twice the standard deviation of that over samples of the training data, were the model at rest.
        weight_decay: that with which the model is nearest to a stationary point; zero or more.
        smallest_eigenvalue: of the Hessian, about: there may be smaller ones.
        largest_eigenvalue: likewise.
        regularization: lambda, the smallest of all blocks.
        captured: of low-rank methods and projections the share of the test gradients' squared norm that their
            directions hold; or None.
        matrix: what the exact scores are those of.
        wanted_matrix: what they were to be of; another one where this plus lambda is not positive definite.
        n_test: test samples looked at.
        n_train: training samples looked at; the method was fitted to these.
    """

    spearman: Estimate
    sums: Estimate
    top: Estimate
    signs: Estimate
    gradients: Estimate
    gradient_sums: Estimate
    damping: float
    residual: float
    newton: float
    chance: float
    weight_decay: float
    smallest_eigenvalue: float
    largest_eigenvalue: float
    regularization: float
    captured: float | None
    matrix: str
    wanted_matrix: str
    n_test: int
    n_train: int

    @property
    def gained(self) -> float:
        """How much of the way the method goes from products of gradients (0) to exact scores (1), by `sums`."""
        missing = 1 - self.gradient_sums.value
        return (self.sums.value - self.gradient_sums.value) / missing if missing > 0 else 1.0

    @property
    def findings(self) -> list[str]:
        """What is wrong, in plain words; none where nothing was found that was looked for."""
        found = []
        if self.newton - self.chance > _MOVING:
            found.append(
                f"the model is far from a stationary point: a Newton step promises to lower its loss by "
                f"{self.newton:.0%}. Scores say what retraining does to a model that has converged: train longer"
            )
        if self.matrix != self.wanted_matrix:
            found.append(
                f"the Hessian has negative curvature, an eigenvalue of about {self.smallest_eigenvalue:.1e}: with a "
                f"regularization of {self.regularization:.1e} its scores are those of a saddle point, and are compared "
                f"with those of the {self.matrix} matrix. Use second_order_mode='gauss_newton', or raise the "
                "regularization"
            )
        if self.residual > _UNSOLVED:
            found.append(
                f"the exact scores were not found (residual {self.residual:.1e}): the regularization may be too low "
                "for the precision of the model. Do not trust what follows from them"
            )
        if self.matrix != self.wanted_matrix:
            return found  # what follows is about the matrix of the method
        if self.gradients.value > _SWAMPED and self.damping > 0.5:
            found.append(
                f"the regularization of {self.regularization:.1e} swamps the curvature: even exact scores are little "
                f"more than products of gradients (rank correlation {self.gradients.value:.2f}). Lower it"
            )
        elif self.gained < _LITTLE and self.sums.value < _ALIKE:
            what, instead = "the method is too rough", "use EkfacInfluence, or EkfacCgInfluence, which is exact"
            if self.captured is not None:
                what, instead = "the rank is too low", "raise it, or use EkfacCgInfluence, which drops nothing"
            held = "" if self.captured is None else f"; its directions hold {self.captured:.0%} of gradients"
            found.append(
                f"{what}: from products of gradients it goes {max(0.0, self.gained):.0%} of the way to exact "
                f"scores{held}. Instead, {instead}"
            )
        return found

    def to_json(self) -> dict[str, Any]:
        """All of it as plain values."""
        numbers = asdict(self) | {"gained": self.gained}
        for value in numbers.values():
            if isinstance(value, dict):
                value["each"] = value["each"].tolist()
        return numbers | {"findings": self.findings, "text": str(self)}

    def __str__(self) -> str:
        rows = {
            "beside exact scores": f"of the {self.matrix} matrix, largest residual {self.residual:.1e}",
            "  rank correlation": f"{self.spearman}; products of gradients {self.gradients}",
            "  of sums over halves": f"{self.sums}; products of gradients {self.gradient_sums}",
            f"  top {_TOP} in common": f"{self.top}",
            "  equal signs": f"{self.signs}",
            "a Newton step promises": f"{self.newton:.1%} of the loss (chance {self.chance:.1%})",
            "weight decay": f"{self.weight_decay:.1e}",
            "Hessian's eigenvalues": f"{self.smallest_eigenvalue:.1e} to {self.largest_eigenvalue:.1e}",
            "regularization": f"{self.regularization:.1e}, {self.damping:.0%} of the regularized curvature",
        }
        if self.captured is not None:
            rows["gradients captured"] = f"{self.captured:.0%}"
        verdict = "\n".join(f"- {finding}" for finding in self.findings) or "Nothing wrong was found."
        return "\n".join(
            [
                f"{self.n_test} test and {self.n_train} training samples",
                *(f"{name:<24}{text}" for name, text in rows.items()),
                verdict,
            ]
        )


def assess(
    model: InfluenceModel, test: DataLike, train: DataLike, *, n_test: int = 20, n_train: int = 1000, seed: int = 0
) -> Assessment:
    """How far to believe a method's scores for a model and its data, without retraining.

    The method is fitted to a random sample of the training data, and its scores of random test samples are compared
    with those of the exact inverse of the same matrix, by block conjugate gradient on the same sample, at the same
    regularization: for EK-FAC the Gauss-Newton matrix of all parameters, for the harmonic mean the empirical Fisher.
    Whether the matrix itself, and the regularization, predict retraining is another question; `fidelity` answers it.

    How far the model is from a stationary point is what a Newton step promises, ``1/2 g^T (H + d)^-1 g`` over the mean
    loss: g the mean gradient, H the Hessian, d a twentieth of its largest eigenvalue. Training with weight decay c
    comes to rest where ``g + c theta = 0``, theta the parameters: the c for which this is nearest counts. What g would
    have by chance, as the mean of a sample, is taken off.

    Args:
        model: any influence model, fitted or not; it stays as it is.
        test: anything `Data.of` takes.
        train: anything `Data.of` takes.
        n_test: test samples looked at, at most.
        n_train: training samples looked at, at most; they are held in memory.
        seed: which.

    Returns:
        Numbers, and what is wrong in plain words.

    Raises:
        DataError: if there are no, or too few, samples.
        ProblemError: of an ensemble, or of checkpoints.
        OutfluenceError: whatever `InfluenceModel.fit` raises.
    """
    if isinstance(model.problem, EnsembleProblem):
        raise ProblemError("several models are assessed one by one, each by its influence model")
    if n_test < 1 or n_train < 3:
        raise DataError(f"n_test must be 1 or more, and n_train 3 or more, not {n_test} and {n_train}")
    generator, data = np.random.default_rng(seed), Data.of(train)
    tests, trains = _some(Data.of(test), n_test, generator), _some(data, n_train, generator)
    n = len(tree_leaves(trains)[0])
    if n < 3:
        raise DataError(f"an assessment takes three training samples or more, not {n}")
    sample = Data.from_arrays(*trains)
    sample = sample if data.batch_size is None else sample.in_batches(data.batch_size)
    with float32_products(model.problem.device):
        fitted = model.unfitted().fit(sample)
        return _assess(fitted, tests, sample, 1 - n / len(data), generator)


def _assess(
    fitted: InfluenceModel, tests: Batch, sample: Data, left_out: float, generator: np.random.Generator
) -> Assessment:
    problem, n = fitted.problem, len(sample)
    together = Problem(problem.model, problem.loss, {"all": problem.names})  # in the order of the method's columns
    hessian = Curvature(together, sample, "all")
    multiply = hessian.precomputed()
    smallest, largest = extreme_eigenvalues(multiply, hessian.size, hessian.like)

    gradients = fitted.gradient_rows(*tests, "test").dense().values
    lambdas, wanted = _lambdas(fitted), _matrix(fitted)
    in_blocks = replace(together, block_structure=problem.blocks)
    if isinstance(fitted.solver, KroneckerSolver) and len(set(lambdas.values())) == 1:
        in_blocks, lambdas = together, {"all": next(iter(lambdas.values()))}
    is_saddle = wanted is SecondOrderMode.HESSIAN and smallest < -min(lambdas.values())
    matrix = SecondOrderMode.GAUSS_NEWTON if is_saddle else wanted
    factors, residual = _solved(in_blocks, sample, matrix, lambdas, gradients)
    squares = gradients.square().sum(1).clamp(min=torch.finfo(gradients.dtype).tiny)
    damping = torch.zeros_like(squares)
    for block, section in in_blocks.sections.items():
        damping += lambdas[block] * (gradients * factors)[:, section].sum(1) / squares

    # The mean gradient, and means with random signs: what is left by chance alone.
    weights = torch.from_numpy(generator.choice([-1.0, 1.0], (1 + _SIGNS, n))).to(gradients)
    weights[0] = 1
    left, sums, columns = fitted.left_rows(*tests), gradients.new_zeros(1 + _SIGNS, gradients.shape[1]), []
    size = max(1, min(BATCH_SIZE, _NUMBERS // gradients.shape[1]))
    for start, batch in zip(range(0, n, size), sample.batches(size), strict=True):
        rows = fitted.gradient_rows(*batch, start=start)
        dense = rows.dense().values
        sums += weights[:, start : start + size] @ dense / n
        columns.append([left.dot(fitted.right_rows(rows, left)), factors @ dense.T, gradients @ dense.T])
    found, exact, plain = (to_numpy(torch.cat(parts, 1).double()) for parts in zip(*columns, strict=True))
    halves = (generator.random((_HALVES, n)).argsort(1) < n // 2).T.astype(np.float64)
    highest = [np.argsort(-scores, axis=1, kind="stable")[:, :_TOP].tolist() for scores in (found, exact)]
    losses = torch.cat([problem.losses(*batch) for batch in sample.batches(problem.batch_size)])
    loss = max(float(losses.abs().mean()), torch.finfo(losses.dtype).tiny)
    newton, chance, decay = _newton(multiply, together, sums, (smallest, largest), left_out)
    return Assessment(
        spearman=Estimate.of(np.mean, rank_correlations(found.T, exact.T)),
        sums=Estimate.of(np.mean, rank_correlations((found @ halves).T, (exact @ halves).T)),
        top=Estimate.of(np.mean, np.array([len({*a} & {*b}) / len(b) for a, b in zip(*highest, strict=True)])),
        signs=Estimate.of(np.mean, (np.sign(found) == np.sign(exact)).mean(1)),
        gradients=Estimate.of(np.mean, rank_correlations(plain.T, exact.T)),
        gradient_sums=Estimate.of(np.mean, rank_correlations((plain @ halves).T, (exact @ halves).T)),
        damping=float(damping.mean()),
        residual=residual,
        newton=newton / loss,
        chance=chance / loss,
        weight_decay=decay,
        smallest_eigenvalue=smallest,
        largest_eigenvalue=largest,
        regularization=min(lambdas.values()),
        captured=_captured(fitted, gradients),
        matrix=_NAMES[matrix],
        wanted_matrix=_NAMES[wanted],
        n_test=len(found),
        n_train=n,
    )


def _matrix(fitted: InfluenceModel) -> SecondOrderMode:
    """What the method approximates the inverse of."""
    solver = fitted.solver
    if isinstance(solver, KroneckerSolver):
        is_empirical = solver.fisher is FisherMode.EMPIRICAL
        return SecondOrderMode.EMPIRICAL_FISHER if is_empirical else SecondOrderMode.GAUSS_NEWTON
    if isinstance(solver, HarmonicSolver):
        return SecondOrderMode.EMPIRICAL_FISHER
    if isinstance(solver, ProjectedSolver):
        is_empirical = solver.kernel is KernelMode.EMPIRICAL
        return SecondOrderMode.EMPIRICAL_FISHER if is_empirical else SecondOrderMode.GAUSS_NEWTON
    mode: SecondOrderMode = solver.second_order_mode  # type: ignore[attr-defined]
    return mode


def _lambdas(fitted: InfluenceModel) -> dict[str, float]:
    """What is added to it, per block."""
    solver = fitted.solver
    more = solver.scale * solver.dampen if isinstance(solver, LissaSolver) else 0.0
    return {block: damping + more for block, damping in fitted.regularization.items()}


def _solved(
    problem: Problem, sample: Data, mode: SecondOrderMode, lambdas: Mapping[str, float], gradients: Tensor
) -> tuple[Tensor, float]:
    """Exact factors of gradients, ``(n, P)`` both, and the largest relative residual."""
    parts, residuals = [], []
    for block, section in problem.sections.items():
        # What is kept is less than what a product with `VECTORS` vectors takes.
        multiply = Curvature(problem, sample, block, mode).precomputed()
        solution = _solve(damped(multiply, lambdas[block]), gradients[:, section].T)
        parts.append(solution.x.T)
        residuals.append(float(solution.residual.max()))
    return torch.cat(parts, dim=1), max(residuals)


def _solve(multiply: Matmat, columns: Tensor) -> Solution:
    return conjugate_gradient(multiply, columns, rtol=_RTOL, atol=0.0, maxiter=_MAXITER, block=True)


def _newton(
    multiply: Matmat, problem: Problem, sums: Tensor, extremes: tuple[float, float], left_out: float
) -> tuple[float, float, float]:
    """What a Newton step promises to lower the mean loss by, how far that is off by chance, and the weight decay.

    Args:
        multiply: products with the Hessian.
        problem: for its parameters theta.
        sums: of gradients over n: the mean gradient g, and those with random signs.
        extremes: eigenvalues of the Hessian.
        left_out: share of the training data that is not in the sample.
    """
    smallest, largest = extremes
    damping = max(_STIFF * largest, -1.5 * smallest, torch.finfo(sums.dtype).tiny)
    theta = problem.flatten({name: value[None] for name, value in problem.parameters.items()})
    rows = torch.cat([theta, sums])
    steps = _solve(damped(multiply, damping), rows.T).x.T
    each = (rows * steps).sum(1).double().tolist()
    of_theta, of_mean = each[:2]
    both = float(rows[0] @ steps[1])
    decay = max(0.0, -both / of_theta) if of_theta > 0 else 0.0
    # Were the mean of all N gradients zero, that of n of them would have 1 - n/N of what one with random signs has.
    by_chance = left_out * np.array(each[2:])
    promised = of_mean + 2 * decay * both + decay**2 * of_theta - by_chance.mean()
    return max(0.0, float(promised) / 2), float(by_chance.std(ddof=1)), decay


def _captured(fitted: InfluenceModel, gradients: Tensor) -> float | None:
    """The share of squared norms in the space of the eigenvectors, or of the directions of a projection."""
    inverse = fitted.inverse
    if isinstance(inverse, ProjectedInverse):
        rows = DenseRows(gradients, inverse.sections)
        back = inverse.dense(inverse.right(rows)).values  # of any length: by the angle to the gradient
        inside = (gradients * back).sum(1).square() / back.square().sum(1).clamp(min=torch.finfo(back.dtype).tiny)
        return float(inside.sum() / gradients.square().sum())
    if not isinstance(inverse, LowRankInverse):
        return None
    parts = [(gradients[:, inverse.sections[block]] @ v).square().sum() for block, v in inverse.vectors.items()]
    return float(sum(parts) / gradients.square().sum())


def _some(data: Data, n: int, generator: np.random.Generator) -> Batch:
    """Random samples, in their order; what is decoded together is read once."""
    if n >= len(data):
        return data.rows(slice(0, len(data)))
    chosen, size = np.sort(generator.choice(len(data), n, replace=False)), data.source_rows
    batches = []
    for part in np.unique(chosen // size).tolist():
        rows = data.rows(slice(part * size, min((part + 1) * size, len(data))))
        inside = torch.from_numpy(chosen[chosen // size == part] - part * size)
        batches.append(Batch(*(tree_map(lambda t: t[inside], side) for side in rows)))  # noqa: B023 - used at once
    columns = iter([torch.cat(leaves) for leaves in zip(*map(tree_leaves, batches), strict=True)])
    return Batch(*(tree_map(lambda _: next(columns), side) for side in batches[0]))

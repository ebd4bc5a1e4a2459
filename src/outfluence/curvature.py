"""Second-order matrices of a block of parameters, as means over the samples of a data set.

The loop over data is `Data.total`; a matrix is the few lines that multiply one batch's sum.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.func import grad, vjp, vmap
from torch.utils import _pytree

from outfluence.data import BATCH_SIZE, Batch, Data, Tree, tree_leaves, tree_map
from outfluence.errors import NonFiniteError
from outfluence.likelihood import Likelihood, find_likelihood, the_tensor, uniform_draws
from outfluence.modes import SecondOrderMode
from outfluence.problem import Problem
from outfluence.rows import check_finite

#: Vectors that a batch is multiplied with at a time; with the size of a batch it bounds the memory of a product. More
#: would not stay near the processor.
VECTORS = 32

#: Tensors by parameter name.
Vector = dict[str, Tensor]
#: The sum over a batch times vectors: ``(k, P)`` to ``(k, P)``.
Product = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Curvature:
    """The mean over samples of a second-order matrix of one block of parameters.

    Hessian: second derivatives of the loss. Gauss-Newton: ``J^T H_L J`` with J the Jacobian of the model's output and
    H_L the Hessian of the loss with respect to the output (Schraudolph 2002), positive semi-definite for convex losses.
    Fisher: ``g g^T`` at labels drawn from the model, whose expectation is the Gauss-Newton matrix for the losses of
    `likelihood`. Empirical Fisher: ``g g^T`` at the labels of the data, which is neither (Kunstner et al. 2019).

    Args:
        problem: model and loss.
        data: the samples of the mean.
        block: the block of parameters; P is the number of its parameters.
        mode: which matrix.
    """

    problem: Problem
    data: Data
    block: str
    mode: SecondOrderMode = SecondOrderMode.HESSIAN

    @cached_property
    def likelihood(self) -> Likelihood:
        """The distribution of labels that the loss stands for; see `find_likelihood`."""
        return find_likelihood(self.problem, self.data.rows(slice(0, 3)))

    @property
    def size(self) -> int:
        """P, the number of rows and of columns."""
        section = self.problem.sections[self.block]
        return int(section.stop - section.start)

    @property
    def like(self) -> Tensor:
        """A tensor of the matrix's type and device."""
        return next(iter(self.problem.parameters.values()))

    @property
    def batch_size(self) -> int:
        """Samples at a time."""
        return self.data.batch_size or BATCH_SIZE

    def matmat(self, vectors: Tensor) -> Tensor:
        """The matrix times vectors: ``(P, k)`` to ``(P, k)``, in one pass over the data."""
        total = self.data.total(ProductSum(self._matrix, vectors.T.contiguous()))
        return total["product"].T / len(self.data)

    def precomputed(self) -> Callable[[Tensor], Tensor]:
        """Like `matmat`, for many calls: what does not depend on the vectors is kept, for all of the data."""
        if self.data.sums_elsewhere:
            return self.matmat
        size, matrix = self.batch_size, self._matrix
        products = [matrix.product(batch, i * size) for i, batch in enumerate(self.data.batches(size))]

        def matmat(vectors: Tensor) -> Tensor:
            rows = vectors.T.contiguous()
            total = torch.zeros_like(rows)
            for i, product in enumerate(products):
                total += product(rows)
                if not total.isfinite().all():
                    matrix.blame(self.data.rows(slice(i * size, i * size + size)), i * size)
            return total.T / len(self.data)

        return matmat

    def product(self, batch: Batch, start: int) -> Product:
        """The sum over the samples of a batch, the first of which has index ``start``, times vectors."""
        return self._matrix.product(batch, start)

    def dense(self) -> Tensor:
        """The matrix, ``(P, P)``, symmetric."""
        matrix = self.matmat(torch.eye(self.size, dtype=self.problem.dtype, device=self.problem.device))
        return (matrix + matrix.T) / 2

    @property
    def _matrix(self) -> BatchMatrix:
        likelihood = self.likelihood if self.mode is SecondOrderMode.FISHER else None
        return BatchMatrix(self.problem, self.block, self.mode, likelihood)


@dataclass(frozen=True)
class BatchMatrix:
    """The sum of a second-order matrix over the samples of whatever batch; see `Curvature`."""

    problem: Problem
    block: str
    mode: SecondOrderMode
    likelihood: Likelihood | None

    def product(self, batch: Batch, start: int) -> Product:
        """The sum over the samples of a batch, the first of which has index ``start``, times vectors."""
        problem, names = self.problem, self.problem.blocks[self.block]
        batch = Batch(*map(problem.on_device, batch))
        match self.mode:
            case SecondOrderMode.HESSIAN:
                multiply = _hessian(problem, names, batch)
            case SecondOrderMode.GAUSS_NEWTON:
                multiply = _gauss_newton(problem, names, batch)
            case SecondOrderMode.FISHER:
                assert self.likelihood is not None
                multiply = _fisher(problem, names, batch, start, self.likelihood)
            case SecondOrderMode.EMPIRICAL_FISHER:
                multiply = _outer(problem.block_gradients(*batch, names), start, "gradients")

        def in_parts(rows: Tensor) -> Tensor:
            if len(rows) == 0:
                return rows
            # Detached: a loss may have parameters of its own.
            return torch.cat([multiply(part).detach() for part in torch.split(rows, VECTORS)])

        return in_parts

    def blame(self, batch: Batch, start: int) -> None:
        """Name the samples of a batch whose matrix is not finite, one by one: the solve has failed anyway.

        Raises:
            NonFiniteError: always.
        """
        section = self.problem.sections[self.block]
        ones = torch.ones(1, section.stop - section.start, dtype=self.problem.dtype, device=self.problem.device)
        products = []
        for i in range(len(tree_leaves(batch.x)[0])):
            sample = Batch(*(tree_map(lambda t: t[i : i + 1], part) for part in batch))  # noqa: B023 - used at once
            products.append(self.product(sample, start + i)(ones))
        check_finite(torch.cat(products), f"second derivatives ({self.mode})", "training", start)
        raise NonFiniteError(f"the {self.mode} of block {self.block!r} overflows {self.problem.dtype}", ())


@dataclass(frozen=True)
class ProductSum:
    """A statistic: the sum of a matrix over samples, times vectors.

    Attributes:
        matrix: which.
        rows: the vectors, ``(k, P)``.
    """

    matrix: BatchMatrix
    rows: Tensor

    @property
    def copies(self) -> tuple[int, int, int]:
        """Of the activations of a sample, of its gradient, and of its factors."""
        outer = self.matrix.mode in (SecondOrderMode.FISHER, SecondOrderMode.EMPIRICAL_FISHER)
        return (4, 3, 0) if outer else (4 * max(1, min(len(self.rows), VECTORS)), 0, 0)

    def __call__(self, batch: Batch, start: int) -> dict[str, Tensor]:
        """See `Statistic`."""
        product = self.matrix.product(batch, start)(self.rows)
        if not product.sum().isfinite() and not product.isfinite().all():  # the sum first: it is fast
            self.matrix.blame(batch, start)
        return {"product": product}


def pseudo_problem(problem: Problem) -> Problem:
    """The problem whose gradients at "labels" s, one for each output, are ``J^T s``."""
    return problem.with_loss(_inner)


def draws(seed: int, start: int, z: Tensor, likelihood: Likelihood, stream: int = 0) -> Tensor:
    """Random numbers for the labels of the samples from ``start`` on, whose outputs are z; see `uniform_draws`."""
    numbers = uniform_draws(seed, start, start + len(z), likelihood.n_draws(z), stream)
    return torch.from_numpy(numbers).to(z.device)


def _inner(output: Any, s: Tree) -> Tensor:
    total: Tensor = (the_tensor(output) * s).sum()
    return total


def _on_rows(problem: Problem, names: tuple[str, ...], product: Callable[[Vector], Vector]) -> Product:
    return lambda rows: problem.flatten(vmap(product)(problem.unflatten(rows, names)), names)


def _hessian(problem: Problem, names: tuple[str, ...], batch: Batch) -> Product:
    parameters = problem.parameters

    def total(block: Vector) -> Tensor:
        return problem.sum_loss(parameters | block, *batch)

    # One backward pass is built; each vector then costs one more, backward through it.
    pull = vjp(grad(total), {name: parameters[name] for name in names})[1]
    return _on_rows(problem, names, lambda vector: pull(vector)[0])


def _gauss_newton(problem: Problem, names: tuple[str, ...], batch: Batch) -> Product:
    parameters = problem.parameters

    def output(block: Vector) -> Any:
        return problem.output(parameters | block, batch.x)

    def loss(z: Any) -> Tensor:
        return problem.sum_of_losses(z, batch.y)

    z, pull = vjp(output, {name: parameters[name] for name in names})[:2]
    # J v by transposing u -> J^T u, which needs no forward-mode derivative of the model.
    push = vjp(lambda u: pull(u)[0], _pytree.tree_map(torch.zeros_like, z))[1]
    second = vjp(grad(loss), z)[1]
    return _on_rows(problem, names, lambda vector: pull(second(push(vector)[0])[0])[0])


def _fisher(problem: Problem, names: tuple[str, ...], batch: Batch, start: int, likelihood: Likelihood) -> Product:
    output = problem.output(problem.parameters, batch.x)
    z = the_tensor(output).detach()
    s = likelihood.sampled(z, draws(0, start, z, likelihood), likelihood.weights(problem, output, batch.y))
    return _outer(pseudo_problem(problem).block_gradients(batch.x, s, names), start, "gradients at drawn labels")


def _outer(gradients: Tensor, start: int, what: str) -> Product:
    check_finite(gradients, what, "training", start)
    return lambda rows: (rows @ gradients.T) @ gradients

"""Second-order matrices of a block of parameters, as means over the samples of a data set.

The loop over data, weighted by samples, is written once; a matrix is the few lines that multiply one batch's sum.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.func import grad, vjp, vmap
from torch.utils import _pytree

from outfluence.data import Batch, Data
from outfluence.errors import NonFiniteError
from outfluence.layers import sum_of_losses
from outfluence.modes import SecondOrderMode
from outfluence.problem import Problem
from outfluence.rows import check_finite

#: Samples at a time where the data has no opinion, and vectors at a time. Their product bounds the memory of a product.
BATCH_SIZE = 256
_VECTORS = 64

#: Tensors by parameter name.
Vector = dict[str, Tensor]


@dataclass(frozen=True)
class Curvature:
    """The mean over samples of the Hessian, or of the Gauss-Newton matrix, of one block of parameters.

    Hessian: second derivatives of the loss. Gauss-Newton: ``J^T H_L J`` with J the Jacobian of the model's output and
    H_L the Hessian of the loss with respect to the output (Schraudolph 2002), positive semi-definite for convex losses.

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

    def matmat(self, vectors: Tensor) -> Tensor:
        """The matrix times vectors: ``(P, k)`` to ``(P, k)``, in one pass over the data."""
        names = self.problem.blocks[self.block]
        rows = vectors.T.contiguous()
        total = torch.zeros_like(rows)
        size, first = self.data.batch_size or BATCH_SIZE, 0
        for batch in self.data.batches(size):
            multiply = self._product(names, batch)
            for start in range(0, len(rows), _VECTORS):
                part = slice(start, start + _VECTORS)
                total[part] += self.problem.flatten(vmap(multiply)(self.problem.unflatten(rows[part], names)), names)
            if not total.isfinite().all():
                self._blame(slice(first, first + size))
            first += size
        return total.T / len(self.data)

    def dense(self) -> Tensor:
        """The matrix, ``(P, P)``, symmetric."""
        section = self.problem.sections[self.block]
        eye = torch.eye(section.stop - section.start, dtype=self.problem.dtype, device=self.problem.device)
        matrix = self.matmat(eye)
        return (matrix + matrix.T) / 2

    def _product(self, names: tuple[str, ...], batch: Batch) -> Callable[[Vector], Vector]:
        product = {SecondOrderMode.HESSIAN: _hessian, SecondOrderMode.GAUSS_NEWTON: _gauss_newton}[self.mode]
        return product(self.problem, names, Batch(*map(self.problem.on_device, batch)))

    def _blame(self, samples: slice) -> None:
        """Name the samples of a batch whose curvature is not finite, one by one: the fit has failed anyway."""
        names = self.problem.blocks[self.block]
        ones = {name: torch.ones_like(p) for name, p in self.problem.parameters.items() if name in names}
        products = []
        start, stop, _ = samples.indices(len(self.data))
        for i in range(start, stop):
            product = self._product(names, self.data.rows(slice(i, i + 1)))(ones)
            products.append(self.problem.flatten({name: p.unsqueeze(0) for name, p in product.items()}, names))
        check_finite(torch.cat(products), f"second derivatives ({self.mode})", "training", start)
        raise NonFiniteError(f"the {self.mode} of block {self.block!r} overflows {self.problem.dtype}", ())


def _hessian(problem: Problem, names: tuple[str, ...], batch: Batch) -> Callable[[Vector], Vector]:
    parameters = problem.parameters

    def total(block: Vector) -> Tensor:
        return problem.sum_loss(parameters | block, *batch)

    # One backward pass is built; each vector then costs one more, backward through it.
    pull = vjp(grad(total), {name: parameters[name] for name in names})[1]
    return lambda vector: pull(vector)[0]


def _gauss_newton(problem: Problem, names: tuple[str, ...], batch: Batch) -> Callable[[Vector], Vector]:
    parameters = problem.parameters

    def output(block: Vector) -> Any:
        return problem.output(parameters | block, batch.x)

    def loss(z: Any) -> Tensor:
        return sum_of_losses(problem, z, batch.y)

    z, pull = vjp(output, {name: parameters[name] for name in names})[:2]
    # J v by transposing u -> J^T u, which needs no forward-mode derivative of the model.
    push = vjp(lambda u: pull(u)[0], _pytree.tree_map(torch.zeros_like, z))[1]
    second = vjp(grad(loss), z)[1]
    return lambda vector: pull(second(push(vector)[0])[0])[0]

"""Kronecker-factored inverses of the Fisher: K-FAC and EK-FAC.

For a linear layer with inputs a (a one appended for the bias) and output gradients d, the gradient of a sample is
``sum_t d_t a_t^T`` over its T positions. K-FAC (Martens & Grosse 2015) takes the Fisher of a layer to be
``E[d d^T] (x) E[a a^T]``; with positions, ``G = sum_nt d d^T / N`` and ``A = sum_nt a a^T / (N T)`` ("expand",
Eschenhagen et al. 2023). EK-FAC (George et al. 2018) keeps the eigenvectors and replaces the products of eigenvalues
by the second moments of the gradients in that basis, which are exact.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor

from outfluence.curvature import draws
from outfluence.data import Batch, Data, add_to
from outfluence.errors import SingularMatrixError
from outfluence.layers import LinearLayer, check_layers, linear_layers, record, sum_of_losses
from outfluence.likelihood import Likelihood, find_likelihood, the_tensor
from outfluence.modes import FisherMode
from outfluence.problem import Problem
from outfluence.rows import DenseRows, check_finite
from outfluence.solvers import Inverse, Regularization, grouped, per_block


@dataclass(frozen=True)
class KroneckerSolver:
    """K-FAC, or EK-FAC with ``update_diagonal``.

    Args:
        regularization: lambda, one for all layers or one for each.
        update_diagonal: correct the eigenvalues (EK-FAC); costs a second pass over the data.
        fisher: whose labels the output gradients are taken at.
        seed: of the sampled labels. Sample i gets the same draw whatever the batches.
        progress: show a bar over the data.
    """

    regularization: Regularization = 0.0
    update_diagonal: bool = False
    fisher: FisherMode = FisherMode.SAMPLED
    seed: int = 0
    progress: bool = False

    def fit(self, problem: Problem, data: Data) -> KroneckerInverse:
        """One pass over the data for the covariances, one more for the eigenvalues if they are corrected.

        Raises:
            UnsupportedLayerError: naming a layer with trainable parameters that is not linear.
            ProblemError: if labels are to be drawn from the model and the loss is none of a known distribution.
            SingularMatrixError: if a layer's regularized curvature has no inverse.
        """
        layers = linear_layers(problem)
        sampling = self.fisher is not FisherMode.EMPIRICAL
        likelihood = find_likelihood(problem, data.rows(slice(0, 1))) if sampling else None
        regularization = per_block(self.regularization, problem)
        for start in {0, len(data) // 2, max(0, len(data) - 4)}:
            check_layers(problem, layers, data.rows(slice(start, start + 4)))

        moments = MomentSum(problem, layers, likelihood, self.fisher, self.seed)
        sums = data.total(moments, "covariances" if self.progress else None)
        bases = {
            name: (_eigh(sums[f"out/{name}"] / len(data)), _eigh(sums[f"in/{name}"] / len(data))) for name in layers
        }
        vectors = {name: (g[1], a[1]) for name, (g, a) in bases.items()}
        if self.update_diagonal:
            sums = data.total(replace(moments, vectors=vectors), "eigenvalues" if self.progress else None)
            eigenvalues = {name: sums[name] / len(data) for name in layers}
        else:
            eigenvalues = {name: torch.outer(g[0], a[0]) for name, (g, a) in bases.items()}
        _check_invertible(eigenvalues, regularization)
        return KroneckerInverse(layers, vectors, eigenvalues, regularization)

    def restore(self, problem: Problem, data: Data, tensors: Mapping[str, Tensor]) -> KroneckerInverse:  # noqa: ARG002
        """See `Solver`."""
        layers, parts = linear_layers(problem), grouped(tensors)
        vectors = {name: (parts["out"][name], parts["in"][name]) for name in layers}
        return KroneckerInverse(layers, vectors, parts["eigenvalues"], per_block(self.regularization, problem))

    def options(self) -> dict[str, Any]:
        """What the fit depends on."""
        return {"update_diagonal": self.update_diagonal, "fisher": str(self.fisher), "seed": self.seed}


@dataclass(frozen=True)
class MomentSum:
    """A statistic: second moments of what goes into the layers and of the output gradients.

    Attributes:
        problem: model and loss.
        layers: the layer of each block.
        likelihood: of the labels that are drawn; None: those of the data.
        fisher: whose labels the output gradients are taken at.
        seed: of the sampled labels.
        vectors: per block eigenvectors ``(Q_out, Q_in)``. With them the sums are the second moments of gradients in
            their basis, ``(d_out, d_in)`` by block; without, the covariances ``out/BLOCK`` and ``in/BLOCK``.
    """

    problem: Problem
    layers: Mapping[str, LinearLayer]
    likelihood: Likelihood | None
    fisher: FisherMode
    seed: int
    vectors: Mapping[str, tuple[Tensor, Tensor]] | None = None

    @property
    def copies(self) -> tuple[int, int]:
        """Of the activations of a sample, and of its gradient."""
        return 8, 0 if self.vectors is None else 3

    def __call__(self, batch: Batch, start: int) -> dict[str, Tensor]:
        """See `Statistic`."""
        recording = record(self.problem, self.layers, batch.x)
        sums = dict[str, Tensor]()
        for name, a in recording.inputs.items():
            check_finite(a, f"inputs of layer {name!r}", "training", start)
            if self.vectors is None:
                flat = a.flatten(0, 1)
                sums[f"in/{name}"] = flat.T @ flat / a.shape[1]
        for total in self._labelled(recording.output, batch, start):
            gradients = recording.output_gradients(total)
            for name in self.layers:
                check_finite(gradients[name], f"output gradients of layer {name!r}", "training", start)
                add_to(sums, self._moments(name, recording.inputs[name], gradients[name]))
        return sums

    def _moments(self, name: str, a: Tensor, d: Tensor) -> dict[str, Tensor]:
        if self.vectors is None:
            flat = d.flatten(0, 1)
            return {f"out/{name}": flat.T @ flat}
        q_out, q_in = self.vectors[name]
        rotated_d, rotated_a = d @ q_out, a @ q_in
        if a.shape[1] == 1:  # squared entries of an outer product factor: no per-sample gradient is formed
            return {name: rotated_d[:, 0].square().T @ rotated_a[:, 0].square()}
        return {name: (rotated_d.mT @ rotated_a).square().sum(0)}

    def _labelled(self, output: Any, batch: Batch, start: int) -> Iterator[Tensor]:
        """For each set of labels a scalar whose gradients' second moments add up to the Fisher."""
        if self.likelihood is None:
            yield sum_of_losses(self.problem, output, self.problem.on_device(batch.y))
            return
        z = the_tensor(output)
        if self.fisher is FisherMode.SAMPLED:
            s = self.likelihood.sampled(z.detach(), draws(self.seed, start, z, self.likelihood))
            yield (z * s).sum()
            return
        for s in self.likelihood.expected(z.detach()):
            yield (z * s).sum()


@dataclass(frozen=True)
class KroneckerInverse(Inverse):
    """``Q (Lambda + lambda)^-1 Q^T`` per layer, ``Q = Q_out (x) Q_in``.

    Attributes:
        layers: the layer of each block.
        vectors: per block ``Q_out (d_out, d_out)`` and ``Q_in (d_in, d_in)``, eigenvectors as columns.
        eigenvalues: Lambda, per block ``(d_out, d_in)``.
        regularization: lambda, per block.
    """

    layers: Mapping[str, LinearLayer]
    vectors: Mapping[str, tuple[Tensor, Tensor]]
    eigenvalues: Mapping[str, Tensor]
    regularization: Mapping[str, float]

    def left(self, gradients: DenseRows) -> DenseRows:
        """``Q_out (Q_out^T g Q_in / (Lambda + lambda)) Q_in^T``, g the gradient matrix of a sample and layer."""
        solved = [
            self._solve(name, part, self.eigenvalues[name] + self.regularization[name])
            for name, part in gradients.by_block().items()
        ]
        return gradients.with_arrays({"values": torch.cat(solved, dim=1)})

    def precondition(self, block: str, rows: Tensor, regularization: float) -> Tensor:
        """The inverse of one layer at another regularization, times rows; eigenvalues of zero are no obstacle."""
        damped = self.eigenvalues[block] + regularization
        damped = damped.clamp(min=torch.finfo(damped.dtype).eps * max(float(damped.amax()), 1e-30))
        return self._solve(block, rows, damped)

    def quadratic(self, gradients: DenseRows) -> Tensor:
        """The squared entries in the eigenbasis, over the eigenvalues: half the work of `left`."""
        parts = [
            (self._rotated(name, part).square() / (self.eigenvalues[name] + self.regularization[name])).sum((1, 2))
            for name, part in gradients.by_block().items()
        ]
        return torch.stack(parts).sum(0)

    @property
    def info(self) -> dict[str, dict[str, Any]]:
        """The eigenvalues of each layer."""
        return {name: {"eigenvalues": values} for name, values in self.eigenvalues.items()}

    def with_regularization(self, regularization: Mapping[str, float]) -> Self:
        """The same eigenvectors and eigenvalues."""
        _check_invertible(self.eigenvalues, regularization)
        return replace(self, regularization=dict(regularization))

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Eigenvectors and eigenvalues."""
        named = {f"eigenvalues/{name}": value for name, value in self.eigenvalues.items()}
        for name, (q_out, q_in) in self.vectors.items():
            named |= {f"out/{name}": q_out, f"in/{name}": q_in}
        return named

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> Self:
        """See `Inverse`."""
        return replace(
            self,
            vectors={name: (tensors[f"out/{name}"], tensors[f"in/{name}"]) for name in self.layers},
            eigenvalues={name: tensors[f"eigenvalues/{name}"] for name in self.layers},
        )

    def _rotated(self, block: str, rows: Tensor) -> Tensor:
        """The gradient matrices in the eigenbasis, ``(n, d_out, d_in)``."""
        q_out, q_in = self.vectors[block]
        return q_out.T @ self.layers[block].to_matrix(rows) @ q_in

    def _solve(self, block: str, rows: Tensor, damped: Tensor) -> Tensor:
        q_out, q_in = self.vectors[block]
        return self.layers[block].to_rows(q_out @ (self._rotated(block, rows) / damped) @ q_in.T)


def _check_invertible(eigenvalues: Mapping[str, Tensor], regularization: Mapping[str, float]) -> None:
    for name, values in eigenvalues.items():
        damping = regularization[name]
        smallest, largest = (value.item() for value in values.aminmax())
        if not smallest + damping > torch.finfo(values.dtype).eps * (largest + damping):
            raise SingularMatrixError(
                f"layer {name!r} has no inverse at hessian_regularization {damping:g}: its smallest eigenvalue is "
                f"{smallest:.1e}, its largest {largest:.1e}. Raise it; a tenth of the mean eigenvalue, "
                f"{values.mean().item() / 10:.1e}, is a usual choice."
            )


def _eigh(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, none below zero, and eigenvectors as columns; in float64, whatever the type."""
    values, vectors = torch.linalg.eigh(matrix.double())
    return values.clamp(min=0).to(matrix.dtype), vectors.to(matrix.dtype)

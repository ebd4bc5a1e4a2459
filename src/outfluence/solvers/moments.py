"""What the layers of a model are like over the data: second moments of their inputs and of their output gradients."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from outfluence.curvature import draws
from outfluence.data import Batch, add_to, tree_leaves
from outfluence.factors import WORKSPACE, Basis, Factor, rotated
from outfluence.layers import Unit
from outfluence.likelihood import Likelihood, the_tensor
from outfluence.modes import FisherMode, WeightSharing
from outfluence.problem import Problem
from outfluence.rows import check_finite

#: Largest vector whose Fisher is not taken to be diagonal.
_MAX_VECTOR = 1024
#: Rows of a covariance that are multiplied out together.
_STRIPE = 128


@dataclass(frozen=True)
class MomentSum:
    """A statistic: second moments of what goes into the layers and of the output gradients.

    Attributes:
        problem: model and loss.
        likelihood: of the labels that are drawn; None: those of the data.
        fisher: whose labels the output gradients are taken at.
        seed: of the sampled labels.
        sharing: what the covariances take of several positions.
        vectors: by unit eigenvectors ``(Q_out, Q_in)``. With them the sums are the second moments of gradients in
            their basis, ``(groups, d_out, d_in)`` by unit; without, the covariances ``out/UNIT`` and ``in/UNIT``, and
            ``positions/UNIT``, how many positions the latter are of.
    """

    problem: Problem
    likelihood: Likelihood | None
    fisher: FisherMode
    seed: int
    sharing: WeightSharing
    vectors: Mapping[str, Basis] | None = None

    @property
    def copies(self) -> tuple[int, int, int]:
        """Of the activations of a sample, of its gradient, and of its factors."""
        return 8, 0, 4

    def __call__(self, batch: Batch, start: int) -> dict[str, Tensor]:
        """See `Statistic`."""
        sums = dict[str, Tensor]()
        for part in self.problem.in_batches(batch):
            add_to(sums, self._of(part, start))
            start += len(tree_leaves(part.x)[0])
        return sums

    def _of(self, batch: Batch, start: int) -> dict[str, Tensor]:
        recording, sums = self.problem.record(batch.x), dict[str, Tensor]()
        inputs, counting = dict[str, Factor](), dict[str, Tensor]()
        for loss, along in self._labelled(recording.output, batch, start):
            for name, factor in recording.factors(loss, along).items():
                check_finite(factor.inputs, f"inputs of layer {self._block(name)!r}", "training", start)
                check_finite(factor.gradients, f"output gradients of layer {self._block(name)!r}", "training", start)
                if self.vectors is not None:
                    in_basis = rotated(factor, *self.vectors[name])
                    add_to(sums, {name: _second_moments(in_basis, *self._shape(name))})
                    continue
                if factor.positions > 1:
                    some = factor.gradients.flatten(2).any(2)
                    if self.problem.structure.units[name].kind == "mixed":  # either side may be the output gradient
                        some &= factor.inputs.flatten(2).any(2)
                        factor = Factor(factor.gradients * some[:, :, None, None], factor.inputs)  # noqa: PLW2901
                    counting[name] = counting[name] | some if name in counting else some
                inputs[name] = factor
                d = factor.gradients.sum(1, keepdim=True) if self._is_reduced else factor.gradients
                diagonal = is_diagonal(self.problem.structure.units[name])
                add_to(sums, {f"out/{name}": d.square().sum((0, 1)) if diagonal else _covariance(d)})
        for name, factor in inputs.items():
            sums[f"in/{name}"], sums[f"positions/{name}"] = self._of_inputs(name, factor, counting.get(name))
        return sums

    def _block(self, name: str) -> str:
        return self.problem.structure.units[name].matrix.block

    def _shape(self, name: str) -> tuple[int, int]:
        matrix = self.problem.structure.units[name].matrix
        return matrix.d_out, matrix.d_in

    @property
    def _is_reduced(self) -> bool:
        return self.sharing is WeightSharing.REDUCE

    def _of_inputs(self, name: str, factor: Factor, counting: Tensor | None) -> tuple[Tensor, Tensor]:
        """The sum of outer products of inputs, or of their means, and of how many.

        Args:
            name: of the unit.
            factor: its gradients.
            counting: positions that count, ``(n, T)``; None: all.
        """
        a, d, is_one_hot = factor.inputs, factor.gradients, factor.is_one_hot
        if counting is None or counting.all():
            counting = None
        n_positions = a.shape[0] * a.shape[1] if counting is None else int(counting.sum())
        if self._is_reduced and factor.positions > 1:
            n_positions = len(a) if counting is None else int(counting.any(1).sum())
            weights = d.new_ones(a.shape[:2]) if counting is None else counting.to(d.dtype)
            weights /= weights.sum(1, keepdim=True).clamp(min=1)
            if is_one_hot:
                a = d.new_zeros(len(a), self._shape(name)[1]).scatter_add_(1, a, weights)[:, None, None]
            else:
                a = torch.einsum("nt,ntgi->ngi", weights, a)[:, None]
        elif counting is not None:
            a = a[counting][:, None]
        total = d.new_tensor([n_positions])
        if not a.is_floating_point():
            return torch.bincount(a.flatten(), minlength=self._shape(name)[1]).to(d.dtype)[None], total
        if is_one_hot:  # reduced; its A is kept diagonal
            return a.square().sum((0, 1)), total
        return _covariance(a), total

    def _labelled(self, output: Any, batch: Batch, start: int) -> Iterator[tuple[Tensor, Tensor | None]]:
        """For each set of labels a function whose gradients' second moments add up to the Fisher, and along what."""
        if self.likelihood is None:
            yield self.problem.sum_of_losses(output, self.problem.on_device(batch.y)), None
            return
        z = the_tensor(output)
        weights = self.likelihood.weights(self.problem, output, self.problem.on_device(batch.y)).detach()
        if self.fisher is FisherMode.SAMPLED:
            # Other labels for the eigenvalues than for the eigenvectors: along those of the same labels they would be
            # too large where they are large, and too small where they are small.
            uniform = draws(self.seed, start, z, self.likelihood, stream=int(self.vectors is not None))
            yield z, self.likelihood.sampled(z.detach(), uniform, weights)
            return
        for s in self.likelihood.expected(z.detach(), weights):
            yield z, s


def covariances(sums: Mapping[str, Tensor], units: Mapping[str, Unit], n: int) -> dict[str, tuple[Tensor, Tensor]]:
    """The Kronecker factors of each unit, from the sums of a `MomentSum` over n samples.

    Returns:
        By unit G, of the output gradients, and A, of the inputs: ``(groups, d, d)``, or diagonals ``(groups, d)``.
    """
    return {
        name: (sums[f"out/{name}"] / n, sums[f"in/{name}"] / sums[f"positions/{name}"].clamp(min=1)) for name in units
    }


def eigh(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, none below zero, and eigenvectors as columns; in float64, whatever the type."""
    values, vectors = torch.linalg.eigh(matrix.double())
    return values.clamp(min=0).to(matrix.dtype), vectors.to(matrix.dtype).contiguous()


def is_diagonal(unit: Unit) -> bool:
    """Whether the Fisher of the outputs is taken to be diagonal."""
    return unit.is_vector and unit.matrix.d_out > _MAX_VECTOR


def _covariance(vectors: Tensor) -> Tensor:
    """The sum of the outer products of vectors ``(n, T, groups, d)``: ``(groups, d, d)``."""
    flat = vectors.flatten(0, 1)
    if flat.shape[1] > 1:
        return torch.matmul(flat.permute(1, 2, 0), flat.transpose(0, 1))
    flat, size = flat[:, 0], flat.shape[2]
    turned, total = flat.T.contiguous(), flat.new_empty(1, size, size)
    for start in range(0, size, _STRIPE):  # half of a symmetric matrix is enough
        here = slice(start, start + _STRIPE)
        stripe = turned[here] @ flat[:, start:]
        total[0, here, start:] = stripe
        total[0, start:, here] = stripe.T
    return total


def _second_moments(rotated: Factor, d_out: int, d_in: int) -> Tensor:
    """The sum over samples of the squared entries of their matrices: ``(groups, d_out, d_in)``."""
    d, a = rotated.gradients, rotated.inputs
    if rotated.is_one_hot:
        # Positions of a sample at the same place add up before they are squared.
        # Each place of a sample is a number of its own: nothing of the size of T^2 or of the matrix is formed.
        pairs = (a + d_in * torch.arange(len(a), device=a.device)[:, None]).flatten()
        places, where = torch.unique(pairs, return_inverse=True)
        sums = d.new_zeros(len(places), d_out).index_add_(0, where, d[:, :, 0].flatten(0, 1))
        return d.new_zeros(d_in, d_out).index_add_(0, places % d_in, sums.square_()).T[None]
    if rotated.positions == 1:  # squared entries of an outer product factor: no per-sample gradient is formed
        return d[:, 0].square().transpose(0, 1).mT @ a[:, 0].square().transpose(0, 1)
    total = d.new_zeros(d.shape[2], d_out, d_in)
    step = max(1, min(len(d), WORKSPACE // (2 * d.element_size() * total.numel())))
    matrices = d.new_empty(step, *total.shape)  # written again and again: new memory would cost more
    for start in range(0, len(d), step):
        some = rotated[slice(start, start + step)]
        total += some.formed(d_in, into=matrices[: len(some.gradients)]).square_().sum(0)
    return total

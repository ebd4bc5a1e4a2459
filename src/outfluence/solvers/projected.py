"""Projected gradients: a sample is a few numbers, and the matrix is that of these numbers.

The gradient of a sample, P numbers, is projected to k, and the kernel K, a mean of outer products of such projections,
is inverted there: a score is ``(Phi g)^T (K + lambda 1)^-1 (Phi h)``. Projections are

- two-sided, a layer at a time (LoGra, Choe et al. 2024): of a layer with inputs a and output gradients d, ``sum_t
  (Q_out^T d_t) (Q_in^T a_t)^T``. No gradient is formed. The sides are random and orthogonal, or the leading
  eigenvectors of the covariances that K-FAC takes (PCA);
- of all entries at once (TRAK, Park et al. 2023): entries are multiplied with random signs (Rademacher), normal
  numbers (Gaussian) or added to a few of the k places with random signs (SJLT: Kane & Nelson 2014). The matrix, P x k,
  is never there: pieces of it are drawn when they are needed, the same ones in every process and on every device.

Products of projections are, in the mean over random projections, those of the gradients.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Protocol, Self

import numpy as np
import torch
from torch import Tensor

from outfluence.curvature import draws, pseudo_problem
from outfluence.data import Batch, Data, Tree, add_to, tree_leaves
from outfluence.errors import ProblemError, SingularMatrixError
from outfluence.factors import WORKSPACE, Basis, Factor, Matrix, rotated
from outfluence.likelihood import Likelihood, find_likelihood, the_tensor
from outfluence.modes import FisherMode, KernelMode, Projection, WeightSharing
from outfluence.problem import Problem
from outfluence.rows import CoordinateRows, DenseRows, GradientRows, check_finite
from outfluence.solvers import Inverse, Regularization, check_rank, grouped, per_block
from outfluence.solvers.moments import MomentSum, covariances, eigh

#: Most entries of a gradient whose part of a random matrix is drawn at a time.
_PIECE = 4096
#: Places that an entry is added to (SJLT).
_PLACES = 4


class Projector(Protocol):
    """A linear map of gradients to a few numbers per block."""

    def project(self, gradients: GradientRows) -> dict[str, Tensor]:
        """By block ``(n, k)``."""

    def back(self, coordinates: Mapping[str, Tensor]) -> Iterator[tuple[Matrix, Tensor]]:
        """The transposed map: each matrix, and its entries ``(n, groups, d_out, d_in)``."""

    @property
    def tensors(self) -> dict[str, Tensor]:
        """What it keeps."""

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> Projector:
        """With other tensors."""


@dataclass(frozen=True)
class ProjectedSolver:
    """A projection, and the kernel of the projected gradients; see `methods.ProjectedInfluence`.

    Args:
        regularization: lambda, one for all blocks or one for each.
        rank: most numbers per block.
        projection: which.
        kernel: of which gradients.
        seed: of the projection, and of the labels that are drawn.
    """

    regularization: Regularization = None
    rank: int = 2048
    projection: Projection = Projection.PCA
    kernel: KernelMode = KernelMode.SAMPLED
    seed: int = 0

    def fit(self, problem: Problem, data: Data) -> ProjectedInverse:
        """One pass over the data for the kernel, and before it one for covariances if the projection is PCA."""
        check_rank(self.rank)
        regularization = per_block(self.regularization, problem)
        likelihood = _likelihood(problem, data, self.kernel)
        projector: Projector = self._empty(problem)
        if isinstance(projector, TwoSided):
            projector = projector.random(self.seed, like=_like(problem))
            if self.projection is Projection.PCA and problem.structure.units:
                projector = self._principal(problem, data, likelihood, projector)
        sums = data.total(KernelSum(problem, projector, likelihood, self.kernel, self.seed))
        kernels = {block: (sums[block] + sums[block].T) / (2 * len(data)) for block in problem.blocks}
        inverse = ProjectedInverse(projector, kernels, regularization, problem.sections)
        inverse.check()
        return inverse

    def restore(self, problem: Problem, data: Data, tensors: Mapping[str, Tensor]) -> ProjectedInverse:  # noqa: ARG002
        """See `Solver`."""
        regularization = per_block(self.regularization, problem)
        empty = ProjectedInverse(self._empty(problem), {}, regularization, problem.sections)
        return empty.with_tensors(tensors)

    def options(self) -> dict[str, Any]:
        """What the fit depends on."""
        plain = {"rank": int(self.rank), "seed": self.seed}
        return plain | {"projection": str(self.projection), "kernel": str(self.kernel)}

    def _empty(self, problem: Problem) -> TwoSided | Sketch:
        """What is projected how, without any numbers."""
        matrices = _all_matrices(problem)
        if self.projection not in (Projection.TWO_SIDED, Projection.PCA):
            return Sketch(matrices, self.projection, self.rank, self.seed)
        sides = dict[str, int]()
        for block in problem.blocks:
            own = {name: matrix for name, matrix in matrices.items() if matrix.block == block}
            sides |= dict.fromkeys(own, _side([*own.values()], self.rank))
        return TwoSided(matrices, sides)

    def _principal(self, problem: Problem, data: Data, likelihood: Likelihood | None, projector: TwoSided) -> TwoSided:
        exact = self.kernel is KernelMode.EXACT
        fisher = FisherMode.EMPIRICAL if likelihood is None else FisherMode.EXACT if exact else FisherMode.SAMPLED
        moments = MomentSum(problem, likelihood, fisher, self.seed, WeightSharing.EXPAND)
        bases = dict(projector.bases)
        for name, both in covariances(data.total(moments), problem.structure.units, len(data)).items():
            matrix, side = problem.structure.units[name].matrix, projector.sides[name]
            out, inputs = (
                None if d <= side else _leading(covariance, side)
                for covariance, d in zip(both, (matrix.d_out, matrix.d_in), strict=True)
            )
            bases[name] = out, inputs
        return replace(projector, bases=bases)


@dataclass(frozen=True)
class TwoSided:
    """Both sides of each matrix, projected.

    Attributes:
        matrices: the parts of a gradient.
        sides: of each matrix the most numbers of a side.
        bases: by name ``Q_out (groups, d_out, k)`` and ``Q_in (groups, d_in, k)``; None: the identity.
    """

    matrices: Mapping[str, Matrix]
    sides: Mapping[str, int]
    bases: Mapping[str, Basis] = field(default_factory=dict)

    def random(self, seed: int, like: Tensor) -> TwoSided:
        """With random orthogonal sides, scaled so that products of gradients are kept in the mean."""
        bases = dict[str, Basis]()
        for i, (name, matrix) in enumerate(self.matrices.items()):
            out, inputs = (
                None if d <= self.sides[name] else _orthogonal(matrix.groups, d, self.sides[name], bits).to(like)
                for d, bits in (
                    (matrix.d_out, np.random.Philox(key=seed, counter=[0, 0, 0, i])),
                    (matrix.d_in, np.random.Philox(key=seed, counter=[0, 0, 1, i])),
                )
            )
            bases[name] = out, inputs
        return replace(self, bases=bases)

    def project(self, gradients: GradientRows) -> dict[str, Tensor]:
        """See `Projector`."""
        parts: dict[str, list[Tensor]] = {}
        for name, matrix in self.matrices.items():
            part, (q_out, q_in) = _part(gradients, name, matrix), self.bases[name]
            if isinstance(part, Factor) and part.is_one_hot and q_in is not None:
                part, q_in = Factor(part.gradients, q_in[0][part.inputs][:, :, None]), None
            part = rotated(part, q_out, q_in)
            if isinstance(part, Factor):
                part = part.formed(matrix.d_in if part.is_one_hot else part.inputs.shape[-1])
            parts.setdefault(matrix.block, []).append(part.flatten(1))
        return {block: torch.cat(some, dim=1) for block, some in parts.items()}

    def back(self, coordinates: Mapping[str, Tensor]) -> Iterator[tuple[Matrix, Tensor]]:
        """See `Projector`."""
        starts = dict.fromkeys(coordinates, 0)
        for name, matrix in self.matrices.items():
            of_block, start = coordinates[matrix.block], starts[matrix.block]
            shape = matrix.groups, *(min(d, self.sides[name]) for d in (matrix.d_out, matrix.d_in))
            starts[matrix.block] = stop = start + math.prod(shape)
            entries = of_block[:, start:stop].reshape(len(of_block), *shape)
            q_out, q_in = self.bases[name]
            entries = entries if q_out is None else q_out @ entries
            yield matrix, entries if q_in is None else entries @ q_in.mT

    @property
    def tensors(self) -> dict[str, Tensor]:
        """See `Projector`."""
        both = {name: zip(("out", "in"), basis, strict=True) for name, basis in self.bases.items()}
        return {f"{side}/{name}": q for name, basis in both.items() for side, q in basis if q is not None}

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> TwoSided:
        """See `Projector`."""
        return replace(
            self, bases={name: (tensors.get(f"out/{name}"), tensors.get(f"in/{name}")) for name in self.matrices}
        )


@dataclass(frozen=True)
class Sketch:
    """Random numbers for each entry, drawn when they are needed: a piece of a matrix's entries after the other.

    Attributes:
        matrices: the parts of a gradient.
        kind: Rademacher, Gaussian or SJLT.
        rank: k.
        seed: of the numbers.
    """

    matrices: Mapping[str, Matrix]
    kind: Projection
    rank: int
    seed: int

    def project(self, gradients: GradientRows) -> dict[str, Tensor]:
        """See `Projector`."""
        like = next(iter(gradients.pieces))
        dtype = torch.promote_types(like.dtype, torch.float32)
        # Transposed: what is added to a place is then side by side.
        blocks = dict.fromkeys(matrix.block for matrix in self.matrices.values())
        sums = {block: like.new_zeros(self.rank, len(gradients), dtype=dtype) for block in blocks}
        for number, (name, matrix) in enumerate(self.matrices.items()):
            part, total = _part(gradients, name, matrix), sums[matrix.block]
            for i, (outputs, columns) in enumerate(_pieces(matrix, self._piece)):
                if isinstance(part, Factor):
                    entries = _at(part, columns).formed(columns.stop - columns.start, outputs)
                else:
                    entries = part[:, :, outputs, columns]
                self._add(total, entries.flatten(1), number, i)
        return {block: total.T.contiguous() for block, total in sums.items()}

    def _add(self, total: Tensor, entries: Tensor, number: int, piece: int) -> None:
        if self.kind is not Projection.SJLT:
            torch.addmm(total, self._dense(entries.shape[1], number, piece, total).T, entries.T, out=total)
            return
        places, signs = self._sparse(entries.shape[1], number, piece, total)
        turned = entries.T.contiguous()
        for where, sign in zip(places, signs, strict=True):
            total.index_add_(0, where, turned * sign[:, None])

    def back(self, coordinates: Mapping[str, Tensor]) -> Iterator[tuple[Matrix, Tensor]]:
        """See `Projector`."""
        for number, (_, matrix) in enumerate(self.matrices.items()):
            of_block = coordinates[matrix.block]
            entries = of_block.new_empty(len(of_block), matrix.groups, matrix.d_out, matrix.d_in)
            for i, (outputs, columns) in enumerate(_pieces(matrix, self._piece)):
                into = entries[:, :, outputs, columns]
                size = math.prod(into.shape[1:])
                if self.kind is Projection.SJLT:
                    places, signs = self._sparse(size, number, i, of_block)
                    pairs = zip(places, signs, strict=True)
                    some = sum(of_block[:, where] * sign for where, sign in pairs)
                else:
                    some = of_block @ self._dense(size, number, i, of_block).T
                into.copy_(some.reshape(into.shape))
            yield matrix, entries

    def _dense(self, size: int, number: int, piece: int, like: Tensor) -> Tensor:
        """Random numbers ``(size, k)`` of variance ``1 / k``."""
        bits = self._bits(number, piece)
        if self.kind is Projection.GAUSSIAN:
            normal = np.random.Generator(bits).standard_normal((size, self.rank), dtype=np.float32)
            numbers: Tensor = torch.from_numpy(normal).to(like)
            return numbers.div_(self.rank**0.5)
        n = size * self.rank
        words = bits.random_raw(-(-n // 64)).astype("<u8", copy=False)
        ones = np.unpackbits(words.view(np.uint8), count=n, bitorder="little").reshape(size, self.rank)
        signs: Tensor = torch.from_numpy(ones).to(like).mul_(2).sub_(1)
        return signs.div_(self.rank**0.5)

    def _sparse(self, size: int, number: int, piece: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """For each entry places among k, and signs over the root of their number: ``(places, size)``."""
        words = self._bits(number, piece).random_raw(_PLACES * size).reshape(_PLACES, size)
        places = (((words >> np.uint64(32)) * np.uint64(self.rank)) >> np.uint64(32)).astype(np.int64)
        signs = (words & np.uint64(1)).astype(np.float32) * 2 - 1
        return torch.from_numpy(places).to(like.device), torch.from_numpy(signs).to(like) / _PLACES**0.5

    @property
    def _piece(self) -> int:
        """How many entries are projected at a time: what is drawn for them, with copies, is to fit."""
        return max(1, min(_PIECE, WORKSPACE // (16 * self.rank)))

    def _bits(self, number: int, piece: int) -> np.random.Philox:
        return np.random.Philox(key=self.seed, counter=[0, 0, piece, number])

    @property
    def tensors(self) -> dict[str, Tensor]:
        """See `Projector`: none."""
        return {}

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> Sketch:  # noqa: ARG002
        """See `Projector`."""
        return self


@dataclass(frozen=True)
class KernelSum:
    """A statistic: the sum of the outer products of projected gradients, by block ``(k, k)``.

    Attributes:
        problem: model and loss.
        projector: of gradients.
        likelihood: of the labels that are drawn; None: those of the data.
        kernel: which gradients.
        seed: of the labels.
    """

    problem: Problem
    projector: Projector
    likelihood: Likelihood | None
    kernel: KernelMode
    seed: int

    @property
    def copies(self) -> tuple[int, int, int]:
        """Of the activations of a sample, of its gradient, and of its factors."""
        return 8, 3 if self.problem.structure.dense or not self.problem.structure.units else 0, 4

    def __call__(self, batch: Batch, start: int) -> dict[str, Tensor]:
        """See `Statistic`."""
        sums = dict[str, Tensor]()
        for part in self.problem.in_batches(batch):
            for gradients in self._gradients(part, start):
                for piece in gradients.pieces:
                    check_finite(piece, "gradients", "training", start)
                projected = self.projector.project(gradients)
                add_to(sums, {block: c.T @ c for block, c in projected.items()})
            start += len(tree_leaves(part.x)[0])
        return sums

    def _gradients(self, batch: Batch, start: int) -> Iterator[GradientRows]:
        problem = self.problem
        if self.kernel is KernelMode.EMPIRICAL:
            yield problem.gradients(*batch, compact=False)
        elif self.kernel is KernelMode.MARGIN:
            yield problem.with_loss(_margin).gradients(*batch, compact=False)
        else:
            assert self.likelihood is not None
            output = problem.output(problem.parameters, problem.on_device(batch.x))
            z = the_tensor(output).detach()
            weights = self.likelihood.weights(problem, output, problem.on_device(batch.y)).detach()
            if self.kernel is KernelMode.SAMPLED:
                labels = iter([self.likelihood.sampled(z, draws(self.seed, start, z, self.likelihood, 1), weights)])
            else:
                labels = self.likelihood.expected(z, weights)
            for s in labels:
                yield pseudo_problem(problem).gradients(batch.x, s, compact=False)


@dataclass(frozen=True)
class ProjectedInverse(Inverse):
    """``Phi^T (K + lambda)^-1 Phi``.

    Attributes:
        projector: Phi.
        kernels: K, by block ``(k, k)``.
        regularization: lambda, per block.
        sections: for each block its columns in a gradient.
    """

    projector: Projector
    kernels: Mapping[str, Tensor]
    regularization: Mapping[str, float]
    sections: Mapping[str, slice]

    def left(self, gradients: GradientRows) -> CoordinateRows:
        """Coordinates times the inverse of the kernel."""
        return self._solved(self.right(gradients))

    def right(self, gradients: GradientRows) -> CoordinateRows:
        """Coordinates."""
        return CoordinateRows(torch.cat([*self.projector.project(gradients).values()], dim=1), self._columns)

    def quadratic(self, gradients: GradientRows) -> Tensor:
        """With one projection."""
        right = self.right(gradients)
        return self._solved(right).dot_each(right)

    def _solved(self, right: CoordinateRows) -> CoordinateRows:
        c = right.coordinates
        parts = [torch.cholesky_solve(c[:, s].T.double(), self._roots[block]).T for block, s in self._columns.items()]
        return replace(right, coordinates=torch.cat(parts, dim=1).to(c.dtype))

    def dense(self, left: CoordinateRows) -> DenseRows:
        """``(n, P)``, by the transposed projection."""
        by_block = {block: left.coordinates[:, columns] for block, columns in self._columns.items()}
        values = left.coordinates.new_zeros(len(left), max(s.stop for s in self.sections.values()))
        for matrix, entries in self.projector.back(by_block):
            matrix.put(values[:, self.sections[matrix.block]], entries)
        return DenseRows(values, self.sections)

    @property
    def info(self) -> dict[str, dict[str, Any]]:
        """The kernels, without regularization."""
        return {block: {"kernel": kernel} for block, kernel in self.kernels.items()}

    def with_regularization(self, regularization: Mapping[str, float]) -> Self:
        """The same kernels."""
        other = replace(self, regularization=dict(regularization))
        other.check()
        return other

    @property
    def nbytes(self) -> int:
        """With the factors of the kernels, in float64."""
        return super().nbytes + sum(8 * kernel.numel() for kernel in self.kernels.values())

    @property
    def takes_factors(self) -> bool:
        """They are projected before they are multiplied."""
        return True

    @property
    def in_basis(self) -> bool:
        """They are."""
        return True

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Kernels, and what the projection keeps."""
        return {f"kernel/{block}": kernel for block, kernel in self.kernels.items()} | self.projector.tensors

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> Self:
        """See `Inverse`."""
        kernels = {block: grouped(tensors)["kernel"][block] for block in self.sections}
        return replace(self, projector=self.projector.with_tensors(tensors), kernels=kernels)

    def check(self) -> None:
        """Refuse what has no inverse.

        Raises:
            SingularMatrixError: naming the block, and a regularization that is usual.
        """
        _ = self._roots

    @cached_property
    def _roots(self) -> dict[str, Tensor]:
        """Cholesky factors of the regularized kernels."""
        roots = {}
        for block, kernel in self.kernels.items():
            damping = self.regularization[block]
            mean = float(kernel.diagonal().mean())
            # What rounding has left of eigenvalues that are zero is no eigenvalue.
            rounding = torch.finfo(kernel.dtype).eps * mean * len(kernel)
            identity = torch.eye(len(kernel), dtype=torch.float64, device=kernel.device)
            root, failed = torch.linalg.cholesky_ex(kernel.double() + damping * identity)
            if failed or root.diagonal().amin().square() <= rounding:
                raise SingularMatrixError(
                    f"the kernel of block {block!r}, {len(kernel)} x {len(kernel)}, has no inverse at regularization "
                    f"{damping:g}: raise it (about the mean eigenvalue, {mean:.1e}, is usual), or lower the "
                    "rank below the number of training samples."
                )
            roots[block] = root
        return roots

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_roots"}

    @property
    def _columns(self) -> dict[str, slice]:
        columns, start = {}, 0
        for block, kernel in self.kernels.items():
            columns[block] = slice(start, start := start + len(kernel))
        return columns


def _all_matrices(problem: Problem) -> dict[str, Matrix]:
    """What a gradient consists of, in order: the matrices of layers, and each other parameter."""
    columns, shapes = problem.columns, {name: p.shape for name, p in problem.parameters.items()}
    units = problem.structure.units
    biases = {unit.bias for unit in units.values()}
    found = {}
    for name in problem.names:
        if name in units:
            found[name] = units[name].matrix
        elif name not in biases:
            block, where = columns[name]
            d_out = shapes[name][0] if shapes[name] else 1
            found[name] = Matrix(block, 1, d_out, math.prod(shapes[name][1:]), where)
    return found


def _part(gradients: GradientRows, name: str, matrix: Matrix) -> Factor | Tensor:
    part = gradients.part(name, matrix)
    return part if isinstance(part, Factor) else part.reshape(len(part), matrix.groups, matrix.d_out, matrix.d_in)


def _like(problem: Problem) -> Tensor:
    return next(iter(problem.parameters.values()))


def _side(matrices: list[Matrix], rank: int) -> int:
    """The largest side with which matrices take no more than ``rank`` numbers; one at least."""

    def numbers(side: int) -> int:
        return sum(m.groups * min(m.d_out, side) * min(m.d_in, side) for m in matrices)

    low, high = 1, max(max(m.d_out, m.d_in) for m in matrices) + 1
    if numbers(low) > rank:
        raise ProblemError(f"a rank of {rank} is too low: of each of {len(matrices)} matrices some numbers are needed")
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if numbers(middle) <= rank else (low, middle)
    return low


def _orthogonal(groups: int, d: int, k: int, bits: np.random.Philox) -> Tensor:
    """Random orthogonal columns times ``sqrt(d / k)``: ``(groups, d, k)``, float64."""
    normal = torch.from_numpy(np.random.Generator(bits).standard_normal((groups, d, k)))
    basis: Tensor = torch.linalg.qr(normal).Q
    return basis.mul_((d / k) ** 0.5)


def _leading(covariance: Tensor, k: int) -> Tensor:
    """The leading eigenvectors of covariances, as columns ``(groups, d, k)``; of diagonals ``(groups, d)``, too."""
    if covariance.ndim == 3:
        return eigh(covariance)[1][..., -k:].contiguous()
    top = covariance.topk(k, dim=1).indices
    return torch.zeros(*covariance.shape, k).to(covariance).scatter_(1, top[:, None, :], 1.0)


def _pieces(matrix: Matrix, size: int) -> Iterator[tuple[slice, slice]]:
    """The entries of a matrix, so many at a time."""
    width = min(matrix.d_in, max(1, size // matrix.groups))
    height = max(1, size // (matrix.groups * width))
    for i in range(0, matrix.d_out, height):
        for j in range(0, matrix.d_in, width):
            yield slice(i, min(i + height, matrix.d_out)), slice(j, min(j + width, matrix.d_in))


def _at(factor: Factor, columns: slice) -> Factor:
    """Some columns of the matrices: what is formed is to be no larger."""
    if not factor.is_one_hot:
        return Factor(factor.gradients, factor.inputs[..., columns])
    here = (factor.inputs >= columns.start) & (factor.inputs < columns.stop)
    places = torch.where(here, factor.inputs - columns.start, 0)
    return Factor(factor.gradients * here[:, :, None, None], places)


def _likelihood(problem: Problem, data: Data, kernel: KernelMode) -> Likelihood | None:
    """The distribution whose labels are drawn; None: none are."""
    if kernel is KernelMode.EMPIRICAL:
        return None
    batch = data.rows(slice(0, 3))
    likelihood = find_likelihood(problem, batch)
    if kernel is KernelMode.MARGIN:
        if likelihood.family != "categorical" or not isinstance(batch.y, Tensor) or batch.y.ndim != 1:
            raise ProblemError(
                "kernel='margin' is for cross entropy with one label a sample: take another, or another loss"
            )
        return None
    return likelihood


def _margin(output: Any, y: Tree) -> Tensor:
    """``log(p / (1 - p))``, p the probability of the label (Park et al. 2023, section 3.4)."""
    z = the_tensor(output)
    label = y[:, None].clamp(min=0)
    others = z.scatter(1, label, -torch.inf).logsumexp(1)
    margin: Tensor = ((z.gather(1, label)[:, 0] - others) * (y >= 0)).sum()  # a label below zero is none
    return margin

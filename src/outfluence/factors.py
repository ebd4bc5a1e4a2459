"""Matrices: a layer's part of a gradient, kept as the two sides of a sum of outer products."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

#: Bytes that are formed at a time.
WORKSPACE = 32 << 20
#: Bytes that a core keeps near.
_NEAR = 8 << 20
#: How many times fewer numbers factors of several positions must take to be kept: each product of rows forms them.
_SAVING = 4


@dataclass(frozen=True)
class Matrix:
    """A layer's part of a row, seen as a matrix ``(d_out, d_in)``, or as one for each group of a convolution.

    Attributes:
        block: of which block the parameters are.
        groups: number of matrices.
        d_out: rows of each.
        d_in: columns of each; the last is the bias, if there is one.
        weight: the columns of the weight among those of the block; None if it has no part.
        bias: those of the bias; None if it has no part.
        transposed: whether the weight is kept as ``(d_in, d_out)``.
    """

    block: str
    groups: int
    d_out: int
    d_in: int
    weight: slice | None
    bias: slice | None = None
    transposed: bool = False

    @property
    def size(self) -> int:
        """Number of entries."""
        return self.groups * self.d_out * self.d_in

    def take(self, rows: Tensor, outputs: slice = slice(None), into: Tensor | None = None) -> Tensor:
        """Rows of the matrices, from rows ``(n, P_block)``: ``(n, groups, k, d_in)``; copies go into a tensor given."""
        parts = []
        if self.weight is not None:
            weight = rows[:, self.weight]
            if self.transposed:
                weight = weight.reshape(len(rows), 1, self._d_weight, self.d_out).mT
            else:
                weight = weight.reshape(len(rows), self.groups, self.d_out, self._d_weight)
            parts.append(weight[:, :, outputs])
        if self.bias is not None:
            parts.append(rows[:, self.bias].reshape(len(rows), self.groups, self.d_out, 1)[:, :, outputs])
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=3, out=into)

    def put(self, rows: Tensor, matrices: Tensor) -> None:
        """The inverse of `take`: write matrices ``(n, groups, d_out, d_in)`` into rows ``(n, P_block)``."""
        if self.weight is not None:
            weight = matrices[..., : self._d_weight]
            rows[:, self.weight] = (weight.mT if self.transposed else weight).flatten(1)
        if self.bias is not None:
            rows[:, self.bias] = matrices[..., -1].flatten(1)

    @property
    def sides(self) -> list[tuple[Matrix, slice]]:
        """The weight and the bias, each as a matrix, and which columns of this one it is."""
        if self.weight is None or self.bias is None:
            return [(self, slice(None))]
        weight, bias = replace(self, d_in=self._d_weight, bias=None), replace(self, d_in=1, weight=None)
        return [(weight, slice(self._d_weight)), (replace(bias, transposed=False), slice(self._d_weight, None))]

    @property
    def _d_weight(self) -> int:
        return self.d_in - (self.bias is not None)


@dataclass(frozen=True)
class Factor:
    """The matrices of samples as sums over T positions, ``sum_t d_t a_t^T``.

    Attributes:
        gradients: d, ``(n, T, groups, d_out)``.
        inputs: a, ``(n, T, groups, d_in)``; or ``(n, T)`` integers, the places of the ones in vectors that are zero
            elsewhere (embeddings).
    """

    gradients: Tensor
    inputs: Tensor

    def __getitem__(self, samples: slice) -> Factor:
        return Factor(self.gradients[samples], self.inputs[samples])

    @property
    def is_one_hot(self) -> bool:
        """Whether a is given by places."""
        return not self.inputs.is_floating_point()

    @property
    def positions(self) -> int:
        """T."""
        return self.gradients.shape[1]

    def formed(self, d_in: int, outputs: slice = slice(None), into: Tensor | None = None) -> Tensor:
        """Rows of the matrices: ``(n, groups, k, d_in)``; if not of places, written into a tensor that is given."""
        d, a = self.gradients, self.inputs
        if self.is_one_hot:
            d = d[:, :, 0, outputs]
            matrices = d.new_zeros(len(d), d_in, d.shape[2])
            return matrices.scatter_add_(1, a[:, :, None].expand(d.shape), d).mT[:, None]
        d = d[..., outputs]
        if d.shape[1] == 1:
            return torch.mul(d[:, 0, :, :, None], a[:, 0, :, None, :], out=into)
        return torch.matmul(d.permute(0, 2, 3, 1), a.transpose(1, 2), out=into)

    def entries(self, d_in: int, which: Tensor, into: Tensor) -> None:
        """Some entries of the matrices; the matrices are formed for a few samples at a time, if at all.

        Args:
            d_in: columns of a matrix.
            which: of the entries of all groups, ``(k,)``.
            into: where they are written, ``(n, k)``.
        """
        factor = self
        if self.is_one_hot:
            places, column = torch.unique(which % d_in, return_inverse=True)
            number = torch.full((d_in,), len(places), device=which.device)  # one more column is for all other places
            number[places] = torch.arange(len(places), device=which.device)
            d_in, which = len(places) + 1, which // d_in * (len(places) + 1) + column
            factor = Factor(self.gradients, number[self.inputs])
        n, size = len(into), math.prod(factor.gradients.shape[2:]) * d_in
        # Into memory that is written again and again, and stays near: new memory would cost more than all else.
        step = min(n, max(1, _NEAR // (into.element_size() * size)))
        matrices = into.new_empty(step, *factor.gradients.shape[2:], d_in)
        chosen = into.new_empty(step, len(which))
        for start in range(0, n, max(1, step)):
            m = min(step, n - start)
            formed = factor[slice(start, start + m)].formed(d_in, into=matrices[:m])
            into[start : start + m] = torch.index_select(formed.flatten(1), 1, which, out=chosen[:m])

    def is_smaller(self, matrix: Matrix) -> bool:
        """Whether the sides take so many fewer numbers than the matrices that it pays to form these when needed."""
        if self.is_one_hot:
            return self.positions * (matrix.d_out + 1) < matrix.size
        saving = 1 if self.positions == 1 else _SAVING
        return saving * self.positions * matrix.groups * (matrix.d_out + matrix.d_in) < matrix.size


#: Vectors of the outputs and of the inputs of a matrix, ``(groups, d, k)``, as columns; None: the identity.
Basis = tuple[Tensor | None, Tensor | None]


def rotated(part: Any, q_out: Tensor | None, q_in: Tensor | None) -> Any:
    """A factor, or matrices ``(n, groups, d_out, d_in)``, in a basis."""
    if not isinstance(part, Factor):
        part = part if q_out is None else q_out.mT @ part
        return part if q_in is None else part @ q_in
    return Factor(_times(part.gradients, q_out), _times(part.inputs, q_in))


def _times(vectors: Tensor, matrices: Tensor | None) -> Tensor:
    """Vectors ``(n, T, groups, d)`` times the matrix of their group."""
    if matrices is None:
        return vectors
    if len(matrices) == 1:  # of vectors that are strided, matmul would copy the matrix for each
        return (vectors.flatten(0, 2) @ matrices[0]).view(*vectors.shape[:3], matrices.shape[2])
    return torch.einsum("ntgd,gde->ntge", vectors, matrices)

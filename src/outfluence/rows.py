"""Rows: what a sample is encoded to. A score is the dot product of a left row (test) and a right row (training).

Calculators, stores and plans see only this: `len`, named arrays to store, and dot products.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, Self

import torch
from torch import Tensor

from outfluence.errors import NonFiniteError
from outfluence.factors import WORKSPACE, Factor, Matrix

#: Samples of the left and of the right rows that are multiplied at a time, where what is formed fits.
_LEFT, _RIGHT = 1024, 4096
#: What an entry of a small matrix of positions costs beside the products that it is the sum of.
_ENTRY = 32


class Rows(Protocol):
    """Encoded samples."""

    def __len__(self) -> int: ...

    @property
    def arrays(self) -> dict[str, Tensor]:
        """What to store: named arrays, first axis samples, second axis the same for all samples."""

    @property
    def pieces(self) -> list[Tensor]:
        """All numbers, first axis samples, as they are in memory."""

    def with_arrays(self, arrays: Mapping[str, Tensor]) -> Self:
        """Rows like these, with other samples' arrays."""

    @property
    def positions(self) -> dict[str, int]:
        """T of each factor that they consist of."""

    def dot_by_block(self, right: Any) -> dict[str, Tensor]:
        """Dot products per block, in order: ``(n_left, n_right)`` each."""

    def dot(self, right: Any) -> Tensor:
        """Dot products with other rows: ``(n_left, n_right)``, the sum of `dot_by_block`."""

    def dot_each(self, right: Any) -> Tensor:
        """Dot products of each row with the row at the same place: ``(n,)``."""


@dataclass(frozen=True)
class DenseRows:
    """One vector of all parameters per sample.

    Attributes:
        values: ``(n, P)``; the columns of a block are contiguous.
        sections: for each block, in order, its columns.
    """

    values: Tensor
    sections: Mapping[str, slice]

    def __len__(self) -> int:
        return self.values.shape[0]

    @property
    def arrays(self) -> dict[str, Tensor]:
        """See `Rows`."""
        return {"values": self.values}

    @property
    def pieces(self) -> list[Tensor]:
        """See `Rows`."""
        return [self.values]

    def with_arrays(self, arrays: Mapping[str, Tensor]) -> Self:
        """See `Rows`."""
        return replace(self, values=arrays["values"])

    @property
    def positions(self) -> dict[str, int]:
        """See `Rows`."""
        return {}

    def dot(self, right: GradientRows) -> Tensor:
        """See `Rows`."""
        if isinstance(right, DenseRows):
            return self.values @ right.values.T
        return right.multiplied(self.by_block())

    def dot_each(self, right: GradientRows) -> Tensor:
        """See `Rows`."""
        return (self.values * right.dense().values).sum(1)

    def dot_by_block(self, right: GradientRows) -> dict[str, Tensor]:
        """See `Rows`."""
        return right.multiplied_by_block(self.by_block())

    def by_block(self) -> dict[str, Tensor]:
        """The columns of each block: ``(n, P_block)``."""
        return {name: self.values[:, s] for name, s in self.sections.items()}

    def block(self, name: str) -> Self:
        """These rows with all columns outside a block set to zero."""
        values = torch.zeros_like(self.values)
        values[:, self.sections[name]] = self.values[:, self.sections[name]]
        return replace(self, values=values)

    def dense(self) -> DenseRows:
        """These."""
        return self

    def compact(self) -> DenseRows:
        """These."""
        return self

    def part(self, name: str, matrix: Matrix) -> Tensor:  # noqa: ARG002 - as that of FactoredRows
        """The matrices of samples, ``(n, groups, d_out, d_in)``."""
        return matrix.take(self.values[:, self.sections[matrix.block]])

    def multiplied_by_block(self, vectors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Vectors ``(k, P_block)`` of each block, multiplied with the rows: ``(k, n)``."""
        return {name: vectors[name] @ part.T for name, part in self.by_block().items()}

    def scaled(self, factors: Mapping[str, float]) -> Self:
        """The columns of each block times a number."""
        parts = [part * factors[name] for name, part in self.by_block().items()]
        return replace(self, values=torch.cat(parts, dim=1))


@dataclass(frozen=True)
class FactoredRows:
    """Per layer the inputs and the output gradients, or the product of both where that is smaller.

    Attributes:
        factors: of the matrices that are not formed, by name.
        formed: the entries of all others, ``(n, F)``.
        columns: where they are there, by name.
        matrices: of which all these are, in the order of parameters.
        sections: for each block, in order, its columns in a dense row.
        weights: numbers ``(groups, d_out, d_in)`` that the entries of a matrix that is not formed are multiplied with;
            none: ones. Of two rows that are multiplied only one has any.
    """

    factors: Mapping[str, Factor]
    formed: Tensor
    columns: Mapping[str, slice]
    matrices: Mapping[str, Matrix]
    sections: Mapping[str, slice]
    weights: Mapping[str, Tensor] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        parts: Mapping[str, Factor | Tensor],
        matrices: Mapping[str, Matrix],
        sections: Mapping[str, slice],
        weights: Mapping[str, Tensor] | None = None,
        form: bool = True,
    ) -> Self:
        """From factors, or matrices ``(n, groups, d_out, d_in)``.

        Args:
            parts: by name.
            matrices: what they are.
            sections: see the class.
            weights: multiplied into what is formed, and into factors that are one-hot; kept for the others.
            form: multiply factors where that saves numbers.
        """
        weights, factors, columns, left, start = weights or {}, dict[str, Factor](), dict[str, slice](), {}, 0
        for name, part in parts.items():
            if not isinstance(part, Factor) or (form and not part.is_smaller(matrices[name])):
                columns[name] = slice(start, start := start + matrices[name].size)
            elif part.is_one_hot and name in weights:  # (V, d_out) at the places
                at_places = weights[name][0].T[part.inputs]
                factors[name] = Factor(part.gradients * at_places[:, :, None], part.inputs)
            else:
                factors[name] = part
                if name in weights:
                    left[name] = weights[name]
        n, like = _length_of(parts)
        formed = like.new_empty(n, start)
        for name, where in columns.items():
            part, at = parts[name], matrices[name]
            into = formed[:, where].view(n, at.groups, at.d_out, at.d_in)
            entries = part.formed(at.d_in, into=into) if isinstance(part, Factor) else part
            if name in weights:
                torch.mul(entries, weights[name], out=into)
            elif entries.data_ptr() != into.data_ptr():
                into.copy_(entries)
        return cls(factors, formed, columns, matrices, sections, left)

    def compact(self) -> DenseRows | Self:
        """The same in the fewest numbers."""
        parts = {name: self.part(name) for name in self.matrices}
        rows = type(self).of(parts, self.matrices, self.sections)
        return rows if rows.factors else rows.dense()

    def __len__(self) -> int:
        return self.formed.shape[0]

    @property
    def arrays(self) -> dict[str, Tensor]:
        """See `Rows`: ``formed``, and side by side ``output_gradients``, ``inputs`` and ``places`` of the factors."""
        arrays = {"formed": self.formed} if self.columns else {}
        for name, parts in self._kinds().items():
            if parts:
                arrays[name] = torch.cat([part.flatten(1) for part in parts], dim=1)
        return arrays

    def with_arrays(self, arrays: Mapping[str, Tensor]) -> Self:
        """See `Rows`."""
        split = {}
        for name, parts in self._kinds().items():
            if parts:
                pieces = torch.split(arrays[name], [math.prod(part.shape[1:]) for part in parts], dim=1)
                split[name] = iter(
                    piece.reshape(len(piece), *part.shape[1:]) for piece, part in zip(pieces, parts, strict=True)
                )
        factors = {
            name: Factor(next(split["output_gradients"]), next(split["places" if factor.is_one_hot else "inputs"]))
            for name, factor in self.factors.items()
        }
        n = len(next(iter(arrays.values())))
        formed = arrays["formed"] if self.columns else self.formed.new_zeros(n, 0)
        return replace(self, factors=factors, formed=formed)

    @property
    def pieces(self) -> list[Tensor]:
        """See `Rows`."""
        return [self.formed, *(side for f in self.factors.values() for side in (f.gradients, f.inputs))]

    def dot(self, right: GradientRows) -> Tensor:
        """See `Rows`."""
        if isinstance(right, DenseRows):
            return right.dot(self).T
        out = self.formed @ right.formed.T if self.columns == right.columns else self._zeros(len(self), len(right))
        for name in self.matrices:
            if self.columns != right.columns or name in self.factors:
                self._add_dot(name, right, out)
        return out

    def dot_by_block(self, right: GradientRows) -> dict[str, Tensor]:
        """See `Rows`."""
        if isinstance(right, DenseRows):
            return {name: part.T for name, part in right.dot_by_block(self).items()}
        blocks = {block: self._zeros(len(self), len(right)) for block in self.sections}
        for name, matrix in self.matrices.items():
            self._add_dot(name, right, blocks[matrix.block])
        return blocks

    def dot_each(self, right: GradientRows) -> Tensor:
        """See `Rows`."""
        if isinstance(right, DenseRows):
            return right.dot_each(self)
        out = self._zeros(len(self))
        for name, matrix in self.matrices.items():
            left, other, weight = self.part(name), right.part(name), self._weight(name, right)
            factors = [side for side in (left, other) if isinstance(side, Factor)]
            small = len(factors) == 2 and all(f.positions == 1 and not f.is_one_hot for f in factors)
            taken = matrix.size
            if len(factors) == 2 and factors[0].is_one_hot:
                taken = factors[0].positions * factors[1].positions
            step = len(out) if small else max(1, WORKSPACE // (4 * out.element_size() * taken))
            for part in _parts(len(out), max(1, step)):
                some = left[part]
                out[part] += _dot_each(some, some if other is left else other[part], matrix, weight)
        return out

    def dense(self) -> DenseRows:
        """As vectors of all parameters, ``(n, P)``."""
        values = self._zeros(len(self), max((s.stop for s in self.sections.values()), default=0))
        for name, matrix in self.matrices.items():
            entries = formed(self.part(name), matrix)
            if name in self.weights:
                entries = entries * self.weights[name]
            matrix.put(values[:, self.sections[matrix.block]], entries)
        return DenseRows(values, self.sections)

    def by_block(self) -> dict[str, Tensor]:
        """The columns of each block of `dense`."""
        return self.dense().by_block()

    def multiplied(self, vectors: Mapping[str, Tensor]) -> Tensor:
        """The sum of `multiplied_by_block`."""
        out = self._zeros(len(next(iter(vectors.values()))), len(self))
        for name, matrix in self.matrices.items():
            self._add_product(name, vectors[matrix.block], out)
        return out

    @property
    def positions(self) -> dict[str, int]:
        """See `Rows`."""
        return {name: factor.positions for name, factor in self.factors.items()}

    def multiplied_by_block(self, vectors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Vectors ``(k, P_block)`` of each block, multiplied with the rows: ``(k, n)``."""
        blocks = {block: self._zeros(len(vectors[block]), len(self)) for block in self.sections}
        for name, matrix in self.matrices.items():
            self._add_product(name, vectors[matrix.block], blocks[matrix.block])
        return blocks

    def scaled(self, by: Mapping[str, float]) -> Self:
        """The matrices of each block times a number."""
        factors = {
            name: Factor(factor.gradients * by[self.matrices[name].block], factor.inputs)
            for name, factor in self.factors.items()
        }
        formed = self.formed.clone()
        for name, where in self.columns.items():
            formed[:, where] *= by[self.matrices[name].block]
        return replace(self, factors=factors, formed=formed)

    def _kinds(self) -> dict[str, list[Tensor]]:
        factors = self.factors.values()
        return {
            "output_gradients": [factor.gradients for factor in factors],
            "inputs": [factor.inputs for factor in factors if not factor.is_one_hot],
            "places": [factor.inputs for factor in factors if factor.is_one_hot],
        }

    def _zeros(self, *shape: int) -> Tensor:
        return self.formed.new_zeros(*shape)

    def part(self, name: str, matrix: Matrix | None = None) -> Factor | Tensor:  # noqa: ARG002 - as that of DenseRows
        """What is there of a matrix: its factor, or matrices ``(n, groups, d_out, d_in)``."""
        if name in self.factors:
            return self.factors[name]
        at = self.matrices[name]
        return self.formed[:, self.columns[name]].reshape(len(self), at.groups, at.d_out, at.d_in)

    def _weight(self, name: str, right: FactoredRows) -> Tensor | None:
        return self.weights.get(name, right.weights.get(name))

    def _add_dot(self, name: str, right: FactoredRows, out: Tensor) -> None:
        left, other, matrix = self.part(name), right.part(name), self.matrices[name]
        weight = self._weight(name, right)
        if isinstance(left, Factor) and isinstance(other, Factor):
            if left.is_one_hot:
                return _add_one_hot(left, other, matrix, out)
            if weight is None and _is_gram_cheaper(left, other, matrix):
                return _add_gram(left, other, out)
        for i, j in _tiles(out, 4 * out.element_size() * matrix.groups * matrix.d_in):
            _add_formed(_form(left[i], matrix), _form(other[j], matrix), matrix, weight, out[i, j])
        return None

    def _add_product(self, name: str, vectors: Tensor, out: Tensor) -> None:
        part, matrix, weight = self.part(name), self.matrices[name], self.weights.get(name)
        if isinstance(part, Factor) and part.is_one_hot:
            return _add_gathered(matrix.take(vectors)[:, 0], part, out)
        for side, at, by in _sides(part, matrix, weight):
            for i, j in _tiles(out, 4 * out.element_size() * at.groups * at.d_in):
                _add_formed(_take(vectors[i], at), _form(side[j], at), at, by, out[i, j])
        return None


#: Rows that gradients can be.
GradientRows = DenseRows | FactoredRows


@dataclass(frozen=True)
class CoordinateRows:
    """A few numbers per sample: its coordinates in a basis that left and right rows share.

    Attributes:
        coordinates: ``(n, k)``; the columns of a block are contiguous.
        sections: for each block, in order, its columns.
        identity: the part of the rows that a multiple of the identity adds, which no few coordinates hold; or None.
    """

    coordinates: Tensor
    sections: Mapping[str, slice]
    identity: GradientRows | None = None

    def __len__(self) -> int:
        return self.coordinates.shape[0]

    @property
    def arrays(self) -> dict[str, Tensor]:
        """See `Rows`; those of the identity's part are called ``identity.NAME``."""
        identity = {} if self.identity is None else self.identity.arrays
        return {"coordinates": self.coordinates, **{f"identity.{name}": array for name, array in identity.items()}}

    @property
    def positions(self) -> dict[str, int]:
        """See `Rows`."""
        return {} if self.identity is None else self.identity.positions

    @property
    def pieces(self) -> list[Tensor]:
        """See `Rows`."""
        return [self.coordinates, *(self.identity.pieces if self.identity is not None else ())]

    def with_arrays(self, arrays: Mapping[str, Tensor]) -> Self:
        """See `Rows`."""
        identity = self.identity
        if identity is not None:
            identity = identity.with_arrays({name: arrays[f"identity.{name}"] for name in identity.arrays})
        return replace(self, coordinates=arrays["coordinates"], identity=identity)

    def dot(self, right: CoordinateRows) -> Tensor:
        """See `Rows`."""
        result = self.coordinates @ right.coordinates.T
        if self.identity is not None and right.identity is not None:
            result += self.identity.dot(right.identity)
        return result

    def dot_each(self, right: CoordinateRows) -> Tensor:
        """See `Rows`."""
        result = (self.coordinates * right.coordinates).sum(1)
        if self.identity is not None and right.identity is not None:
            result += self.identity.dot_each(right.identity)
        return result

    def dot_by_block(self, right: CoordinateRows) -> dict[str, Tensor]:
        """See `Rows`."""
        parts = {name: self.coordinates[:, s] @ right.coordinates[:, s].T for name, s in self.sections.items()}
        if self.identity is not None and right.identity is not None:
            for name, part in self.identity.dot_by_block(right.identity).items():
                parts[name] += part
        return parts


#: Rows of matrices, from which of their outputs: ``(n, groups, k, d_in)``; new ones may be written into the second.
_Form = Callable[[slice, Tensor], Tensor]


def _form(part: Factor | Tensor, matrix: Matrix) -> _Form:
    if isinstance(part, Factor):
        return lambda outputs, into: part.formed(matrix.d_in, outputs, into)
    return lambda outputs, _into: part[:, :, outputs]


def _take(rows: Tensor, matrix: Matrix) -> _Form:
    return lambda outputs, into: matrix.take(rows, outputs, into)


def _sides(
    part: Factor | Tensor, matrix: Matrix, weight: Tensor | None
) -> Iterator[tuple[Factor | Tensor, Matrix, Tensor | None]]:
    """The weight and the bias of a factor each for itself, as a vector holds them: together they would be copied."""
    if not isinstance(part, Factor):
        yield part, matrix, weight
        return
    for side, columns in matrix.sides:
        factor, by = Factor(part.gradients, part.inputs[..., columns]), None if weight is None else weight[..., columns]
        if side.transposed:
            side = replace(side, d_out=side.d_in, d_in=side.d_out, transposed=False)  # noqa: PLW2901
            factor, by = Factor(factor.inputs, factor.gradients), None if by is None else by.mT
        yield factor, side, by


def _length_of(parts: Mapping[str, Factor | Tensor]) -> tuple[int, Tensor]:
    first = next(iter(parts.values()))
    like = first.gradients if isinstance(first, Factor) else first
    return len(like), like


def _add_formed(left: _Form, right: _Form, matrix: Matrix, weight: Tensor | None, out: Tensor) -> None:
    """Add the products of matrices, of so many of their rows at a time as fit."""
    per_output = 4 * out.element_size() * matrix.groups * matrix.d_in * sum(out.shape)
    step = min(matrix.d_out, max(1, WORKSPACE // max(1, per_output)))
    # Written again and again: new memory would cost more than what is written there.
    shape = (matrix.groups, step, matrix.d_in)
    left_space, right_space = out.new_empty(len(out), *shape), out.new_empty(out.shape[1], *shape)
    for outputs in _parts(matrix.d_out, step):
        if outputs.stop - outputs.start < step:
            left_space, right_space = (
                space[:, :, : outputs.stop - outputs.start] for space in (left_space, right_space)
            )
        formed = left(outputs, left_space)
        if weight is not None:
            formed = torch.mul(formed, weight[:, outputs], out=left_space)
        # As addmm_, which torch's counter of FLOPs does not know.
        torch.addmm(out, formed.flatten(1), right(outputs, right_space).flatten(1).T, out=out)


def _is_gram_cheaper(left: Factor, right: Factor, matrix: Matrix) -> bool:
    pairs = left.positions * right.positions
    return pairs * (matrix.groups * (matrix.d_out + matrix.d_in) + _ENTRY) < matrix.size


def _add_gram(left: Factor, right: Factor, out: Tensor) -> None:
    """Add ``sum_ts (d_t . d_s) (a_t . a_s)``, from the inner products of positions."""
    t, s = left.positions, right.positions
    for i, j in _tiles(out, None, 3 * out.element_size() * t * s):
        total = out[i, j]
        for group in range(left.gradients.shape[2]):
            d, a, e, b = (
                factor[:, :, group].flatten(0, 1)
                for factor in (left.gradients[i], left.inputs[i], right.gradients[j], right.inputs[j])
            )
            products = (d @ e.T).mul_(a @ b.T)
            if t * s > 1:
                products = products.reshape(total.shape[0], t, total.shape[1], s).sum((1, 3))
            total += products


def _add_one_hot(left: Factor, right: Factor, matrix: Matrix, out: Tensor) -> None:
    """Add ``sum_ts [i_t = j_s] d_t . d_s``: from pairs of positions, or one range of places after the other."""
    t, s = left.positions, right.positions
    if t * s <= matrix.d_in:
        for i, j in _tiles(out, None, 4 * out.element_size() * t * s):
            d, e = left.gradients[i, :, 0], right.gradients[j, :, 0]
            same = left.inputs[i].flatten()[:, None] == right.inputs[j].flatten()
            products = (d.flatten(0, 1) @ e.flatten(0, 1).T).mul_(same)
            out[i, j] += products.reshape(len(d), t, len(e), s).sum((1, 3))
        return
    for i, j in _tiles(out, 4 * out.element_size() * matrix.d_out):
        per_place = 4 * out.element_size() * matrix.d_out * sum(out[i, j].shape)
        for places in _parts(matrix.d_in, max(1, WORKSPACE // max(1, per_place))):
            tile = out[i, j]
            torch.addmm(tile, _at_places(left[i], places), _at_places(right[j], places).T, out=tile)


def _at_places(factor: Factor, places: slice) -> Tensor:
    """Columns of the matrices of a one-hot factor: ``(n, k d_out)``."""
    d, index = factor.gradients[:, :, 0], factor.inputs
    here = (index >= places.start) & (index < places.stop)
    index = torch.where(here, index - places.start, 0)
    columns = d.new_zeros(len(d), places.stop - places.start, d.shape[2])
    return columns.scatter_add_(1, index[:, :, None].expand(d.shape), d * here[:, :, None]).flatten(1)


def _add_gathered(matrices: Tensor, factor: Factor, out: Tensor) -> None:
    """Add the products of matrices ``(k, d_out, d_in)`` and a one-hot factor; only columns at its places are read."""
    t = factor.positions
    columns = matrices.mT  # of an embedding, contiguous
    for i, j in _tiles(out, None, 2 * out.element_size() * t * matrices.shape[1]):
        d, index = factor.gradients[j, :, 0], factor.inputs[j].flatten()
        gathered = columns[i].index_select(1, index)
        products = torch.einsum("kpo,po->kp", gathered, d.flatten(0, 1))
        out[i, j] += products.reshape(len(gathered), len(d), t).sum(2)


def _dot_each(left: Factor | Tensor, right: Factor | Tensor, matrix: Matrix, weight: Tensor | None) -> Tensor:
    if isinstance(left, Factor) and isinstance(right, Factor):
        if left.is_one_hot:
            same = left.inputs[:, :, None] == right.inputs[:, None, :]
            products: Tensor = (left.gradients[:, :, 0] @ right.gradients[:, :, 0].mT * same).sum((1, 2))
            return products
        if left.positions == right.positions == 1:
            d, a = left.gradients[:, 0] * right.gradients[:, 0], left.inputs[:, 0] * right.inputs[:, 0]
            if weight is None:
                return (d.sum(2) * a.sum(2)).sum(1)
            return torch.einsum("ngi,ngi->n", torch.einsum("ngo,goi->ngi", d, weight), a)
    first = formed(left, matrix)
    product = (first * (first if right is left else formed(right, matrix))).flatten(1)
    return product.sum(1) if weight is None else product @ weight.flatten()


def formed(part: Factor | Tensor, matrix: Matrix) -> Tensor:
    """The matrices that a part of factored rows stands for, ``(n, groups, d_out, d_in)``."""
    return part.formed(matrix.d_in) if isinstance(part, Factor) else part


def _tiles(out: Tensor, per_sample: int | None, per_pair: int = 0) -> Iterator[tuple[slice, slice]]:
    """Ranges of left and right samples whose intermediates, so many bytes each or each pair, fit."""
    n, m = out.shape
    rows, columns = min(n, _LEFT), min(m, _RIGHT)
    while rows > 1 or columns > 1:
        taken = rows * columns * per_pair if per_sample is None else (rows + columns) * per_sample
        if taken <= WORKSPACE:
            break
        if columns >= rows:
            columns = -(-columns // 2)
        else:
            rows = -(-rows // 2)
    for i in _parts(n, max(1, rows)):
        for j in _parts(m, max(1, columns)):
            yield i, j


def _parts(n: int, size: int) -> Iterator[slice]:
    for start in range(0, n, size):
        yield slice(start, min(start + size, n))


def joined(parts: Sequence[GradientRows]) -> GradientRows:
    """The rows of one after the other, all of them of the same structure."""
    (first, *more) = parts
    return first.with_arrays(
        {name: torch.cat([array, *(rows.arrays[name] for rows in more)]) for name, array in first.arrays.items()}
    )


def check_finite(rows: Tensor, what: str, samples: str, start: int = 0) -> None:
    """Refuse NaN and infinity.

    Args:
        rows: first axis samples.
        what: the name of the numbers, for the message.
        samples: whose samples they are: "training", "test".
        start: index of the first of them.

    Raises:
        NonFiniteError: naming the first ten offending samples.
    """
    if rows.numel() == 0 or not rows.is_floating_point():
        return
    if rows.sum().isfinite():  # NaN and infinity are carried on; a sum that overflows is looked at, too
        return
    # The maximum norm carries NaN and infinity to one number a sample and makes no copy of the rows.
    worst = torch.linalg.vector_norm(rows.flatten(1) if rows.ndim > 1 else rows[:, None], ord=float("inf"), dim=1)
    bad = (start + torch.nonzero(~torch.isfinite(worst))[:, 0]).tolist()
    if bad:
        shown = ", ".join(map(str, bad[:10])) + (f" and {len(bad) - 10} more" if len(bad) > 10 else "")
        raise NonFiniteError(
            f"NaN or infinite {what} for {samples} sample{'s' if len(bad) > 1 else ''} {shown}. Look at the "
            "sample and at the model's output for it; drop it with torch.utils.data.Subset if it is broken.",
            bad,
        )

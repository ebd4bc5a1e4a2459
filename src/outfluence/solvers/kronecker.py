"""Kronecker-factored inverses of the Fisher: K-FAC and EK-FAC.

For a linear layer with inputs a (a one appended for the bias) and output gradients d, the gradient of a sample is
``sum_t d_t a_t^T`` over its T positions; so it is for a convolution (positions of its output; a matrix for each group)
and an embedding (a has a single one). K-FAC (Martens & Grosse 2015) takes the Fisher of a layer to be
``E[d d^T] (x) E[a a^T]``; with positions, ``G = sum_nt d d^T / N`` and ``A = sum_nt a a^T / (N T)`` ("expand",
Eschenhagen et al. 2023), where a position without any output gradient, such as masked padding, does not count: it adds
nothing to the Fisher. EK-FAC (George et al. 2018) keeps the eigenvectors and replaces the products of eigenvalues by
the second moments of the gradients in that basis, which are exact. The A of an embedding is diagonal. The parameters
of a normalisation, and a bias alone, are a matrix of one column, whose a is one: their block of the Fisher is exact
(of vectors of more than a thousand entries its diagonal is).

In the eigenbasis ``Q_out^T d_t`` and ``Q_in^T a_t`` are factors of a gradient too, and a score is the sum over the
entries of left times right times ``R = 1 / (Lambda + lambda)``: rows are kept as factors.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Self

import torch
from torch import Tensor

from outfluence.data import Data
from outfluence.errors import ProblemError, SingularMatrixError, UnsupportedLayerError
from outfluence.factors import WORKSPACE, Basis, Factor, Matrix, rotated
from outfluence.layers import Unit
from outfluence.likelihood import find_likelihood
from outfluence.modes import FisherMode, WeightSharing
from outfluence.problem import Problem
from outfluence.rows import CoordinateRows, DenseRows, FactoredRows, GradientRows, Rows, check_finite, formed, joined
from outfluence.solvers import Inverse, Regularization, check_rank, grouped, per_block
from outfluence.solvers.moments import MomentSum, covariances, eigh, is_diagonal
from outfluence.solvers.truncation import lost_share, truncation

#: Largest matrix of a layer whose eigenvectors are computed.
_MAX_SIDE = 20_000
#: Training samples whose scores on each other tell whether a tolerance is kept, in groups of so many neighbours; fewer,
#: if their gradients take more bytes than this.
_TRIED, _NEIGHBOURS, _TRIED_BYTES = 256, 8, 256 << 20
#: How many times fewer numbers than a matrix the product of two samples' gradients must take to be used for a constant.
_CHEAPER = 8
#: The regularization, over the mean eigenvalue, where none is given. Measured on five problems (docs/fidelity.md).
_DAMPING = 0.3
#: What of the tolerance is aimed at: test samples are not those that the eigenvalues are from.
_MARGIN = 0.5


@dataclass(frozen=True)
class KroneckerSolver:
    """K-FAC, or EK-FAC with ``update_diagonal``.

    Args:
        regularization: lambda, one for all layers or one for each; None: a part of the mean eigenvalue of all.
        update_diagonal: correct the eigenvalues (EK-FAC); costs a second pass over the data.
        fisher: whose labels the output gradients are taken at.
        seed: of the sampled labels. Sample i gets the same draw whatever the batches.
        progress: show a bar over the data.
        tolerance: error of scores, relative to their root mean square; see `truncation`. 0: none.
        rank: most entries that count one by one; None: as many as the tolerance takes.
        weight_sharing: what the covariances take of several positions.
    """

    regularization: Regularization = 0.0
    update_diagonal: bool = False
    fisher: FisherMode = FisherMode.SAMPLED
    seed: int = 0
    progress: bool = False
    tolerance: float = 0.0
    weight_sharing: WeightSharing = WeightSharing.EXPAND
    rank: int | None = None

    def fit(self, problem: Problem, data: Data) -> KroneckerInverse:
        """One pass over the data for the covariances, one more for the eigenvalues if they are corrected.

        Raises:
            UnsupportedLayerError: naming a parameter whose gradients are not those of a layer that is known.
            ProblemError: if labels are to be drawn from the model and the loss is none of a known distribution.
            SingularMatrixError: if a layer's regularized curvature has no inverse.
        """
        if not 0 <= self.tolerance < 1:
            raise ProblemError(f"tolerance is a part of the scores' size, from 0 to below 1, not {self.tolerance!r}")
        if self.rank is not None:
            check_rank(self.rank)
            if self.tolerance:
                raise ProblemError("give a tolerance or a rank, not both")
        sampling = self.fisher is not FisherMode.EMPIRICAL
        likelihood = find_likelihood(problem, data.rows(slice(0, 3))) if sampling else None
        regularization = per_block(self.regularization, problem)  # refused before any work
        problem = _with_structure(problem, data)
        _check_covered(problem)
        for name, unit in problem.structure.units.items():
            if unit.kind == "mixed" and self.fisher is FisherMode.EXACT:  # what goes in depends on the label, too
                raise UnsupportedLayerError(
                    f"parameter {name!r} is shared by layers of two kinds: fisher='exact' has no Kronecker factors for "
                    "it; use fisher='sampled'"
                )
        for start in {len(data) // 2, max(0, len(data) - 3)}:
            for name, why in problem.differing(data.rows(slice(start, start + 3))).items():
                raise UnsupportedLayerError(f"parameter {name!r} is {why}: freeze it, or use another method")

        moments = MomentSum(problem, likelihood, self.fisher, self.seed, self.weight_sharing)
        sums, bases = data.total(moments, "covariances" if self.progress else None), {}
        for name, (out, inputs) in covariances(sums, problem.structure.units, len(data)).items():
            unit = problem.structure.units[name]
            bases[name] = (
                (out, None) if is_diagonal(unit) else eigh(out),
                (inputs, None) if unit.kind == "one_hot" else eigh(inputs),
            )
        vectors = {name: (g[1], a[1]) for name, (g, a) in bases.items()}
        if self.update_diagonal:
            sums = data.total(replace(moments, vectors=vectors), "eigenvalues" if self.progress else None)
            eigenvalues = {name: sums[name] / len(data) for name in vectors}
        else:
            eigenvalues = {name: g[0].unsqueeze(-1) * a[0].unsqueeze(-2) for name, (g, a) in bases.items()}
        if self.regularization is None:
            regularization = dict.fromkeys(regularization, _usual(eigenvalues))
        unrotated, products = _kinds_of_rows(problem, data)
        inverse = KroneckerInverse(
            problem.structure.units, problem.sections, vectors, eigenvalues, regularization, unrotated, products
        )
        inverse.check()
        if self.rank is not None:
            return inverse.truncated(self.rank)
        return _within_tolerance(inverse, problem, data, self.tolerance) if self.tolerance else inverse

    def restore(self, problem: Problem, data: Data, tensors: Mapping[str, Tensor]) -> KroneckerInverse:
        """See `Solver`."""
        problem = _with_structure(problem, data)
        regularization = per_block(self.regularization, problem)
        if self.regularization is None:
            regularization = dict.fromkeys(regularization, _usual(grouped(tensors)["eigenvalues"]))
        unrotated, products = _kinds_of_rows(problem, data)
        inverse = KroneckerInverse(
            problem.structure.units, problem.sections, {}, {}, regularization, unrotated, products
        )
        return inverse.with_tensors(tensors)

    def options(self) -> dict[str, Any]:
        """What the fit depends on."""
        plain = {name: getattr(self, name) for name in ("update_diagonal", "seed", "tolerance")}
        rank = None if self.rank is None else int(self.rank)
        return plain | {"rank": rank, "fisher": str(self.fisher), "weight_sharing": str(self.weight_sharing)}


@dataclass(frozen=True)
class KroneckerInverse(Inverse):
    """``Q (Lambda + lambda)^-1 Q^T`` per unit, ``Q = Q_out (x) Q_in``.

    Attributes:
        units: the layers, or parameters, that are each a matrix.
        sections: for each block, in order, its columns in a gradient.
        vectors: by unit ``Q_out (groups, d_out, d_out)`` and ``Q_in (groups, d_in, d_in)``, eigenvectors as columns;
            None where it is the identity.
        eigenvalues: Lambda, by unit ``(groups, d_out, d_in)``.
        regularization: lambda, per block.
        unrotated: units whose gradients are smaller when they are multiplied out. Left rows of these are influence
            factors, so that the many right rows, gradients then, need not be rotated.
        products: units for which the product of two samples' gradients is cheap.
        kept: the entries of each unit that count one by one, ``(k,)``; see `truncation`. None: all.
        constants: by unit the number that stands for R at all others, ``(1,)``; none: zero.
        aim: the expected error that `kept` was chosen for, or how many they are to be, ``(1,)``.
    """

    units: Mapping[str, Unit]
    sections: Mapping[str, slice]
    vectors: Mapping[str, Basis]
    eigenvalues: Mapping[str, Tensor]
    regularization: Mapping[str, float]
    unrotated: frozenset[str] = frozenset()
    products: frozenset[str] = frozenset()
    kept: Mapping[str, Tensor] | None = None
    constants: Mapping[str, Tensor] = field(default_factory=dict)
    aim: Tensor | None = None

    def left(self, gradients: GradientRows) -> FactoredRows | CoordinateRows:
        """Gradients in the eigenbasis with ``R = 1 / (Lambda + lambda)``, or influence factors; see the class."""
        if self.kept is not None:
            return self._coordinates(gradients, self.kept, is_left=True)
        parts, weights = self._in_basis(gradients), self._weights
        for name in self.unrotated:
            parts[name] = self._back(name, formed(parts[name], self.units[name].matrix).mul(weights[name]))
        weights = {name: weight for name, weight in weights.items() if name not in self.unrotated}
        return FactoredRows.of(parts, self._matrices, self.sections, weights)

    def right(self, gradients: GradientRows) -> FactoredRows | CoordinateRows:
        """Gradients, in the eigenbasis where left rows are."""
        if self.kept is not None:
            return self._coordinates(gradients, self.kept, is_left=False)
        return FactoredRows.of(self._in_basis(gradients, self.unrotated), self._matrices, self.sections)

    def dense(self, left: FactoredRows | CoordinateRows) -> DenseRows:
        """``Q_out (R * Q_out^T g Q_in) Q_in^T``, g the gradient matrix of a sample and unit."""
        like, arrays = next(iter(self.eigenvalues.values())), left.arrays
        values = like.new_zeros(len(left), max(section.stop for section in self.sections.values()))
        step = max(1, WORKSPACE // (4 * values.element_size() * max(values.shape[1], 1)))
        for start in range(0, len(left), step):
            some = slice(start, start + step)
            for name, entries in self._entries(left.with_arrays({key: array[some] for key, array in arrays.items()})):
                unit, is_back = self.units[name], self.kept is None and name in self.unrotated
                block = values[some, self.sections[unit.matrix.block]]
                unit.matrix.put(block, entries if is_back else self._back(name, entries))
        return DenseRows(values, self.sections)

    def quadratic(self, gradients: GradientRows) -> Tensor:
        """The squared entries in the eigenbasis, times R; all of them."""
        parts = self._in_basis(gradients)
        left = FactoredRows.of(parts, self._matrices, self.sections, self._weights, form=False)
        return left.dot_each(FactoredRows.of(parts, self._matrices, self.sections, form=False))

    def truncated(self, aim: float) -> Self:
        """This inverse with entries that suffice for scores with an error, or so many; see `truncation`."""
        kept, constants = truncation(self.eigenvalues, self._by_unit, self.products, aim)
        like = next(iter(self.eigenvalues.values()))
        return replace(self, kept=kept, constants=constants, aim=like.new_tensor([aim]))

    @property
    def lost_share(self) -> float:
        """What is expected to be lost of the scores' mean square."""
        if self.kept is None:
            return 0.0
        return lost_share(self.eigenvalues, self._by_unit, self.kept, self.constants)

    @property
    def _by_unit(self) -> dict[str, float]:
        return {name: self.regularization[unit.matrix.block] for name, unit in self.units.items()}

    def precondition(self, block: str, rows: Tensor, regularization: float) -> Tensor:
        """The inverse of one block at another regularization, times rows; eigenvalues of zero are no obstacle."""
        solved = torch.empty_like(rows)
        for name, unit in self.units.items():
            if unit.matrix.block == block:
                damped = self.eigenvalues[name] + regularization
                damped = damped.clamp(min=torch.finfo(damped.dtype).eps * max(float(damped.amax()), 1e-30))
                in_basis = rotated(unit.matrix.take(rows), *self.vectors[name])
                unit.matrix.put(solved, self._back(name, in_basis / damped))
        return solved

    @property
    def info(self) -> dict[str, dict[str, Any]]:
        """The eigenvalues of each block: of its matrix, or if it has several, of each by the name of its parameter."""
        info: dict[str, dict[str, Any]] = {}
        for block in self.sections:
            found = {name: self.eigenvalues[name] for name, u in self.units.items() if u.matrix.block == block}
            found = {name: values[0] if len(values) == 1 else values for name, values in found.items()}
            info[block] = {"eigenvalues": next(iter(found.values())) if len(found) == 1 else found}
        return info

    def with_regularization(self, regularization: Mapping[str, float]) -> Self:
        """The same eigenvectors and eigenvalues; with a tolerance, entries for the same expected error; or as many."""
        other = replace(self, regularization=dict(regularization))
        other.check()
        return other if self.aim is None else other.truncated(float(self.aim))

    @property
    def nbytes(self) -> int:
        """With R, which is as large as the eigenvalues."""
        return super().nbytes + sum(value.nbytes for value in self.eigenvalues.values())

    @property
    def takes_factors(self) -> bool:
        """They are rotated before they are multiplied."""
        return True

    @property
    def in_basis(self) -> bool:
        """They are."""
        return True

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Eigenvectors, eigenvalues, and which of them count."""
        named = {f"eigenvalues/{name}": value for name, value in self.eigenvalues.items()}
        named |= {f"kept/{name}": value for name, value in (self.kept or {}).items()}
        named |= {f"constants/{name}": value for name, value in self.constants.items()}
        named |= {} if self.aim is None else {"aim/all": self.aim}
        for name, (q_out, q_in) in self.vectors.items():
            named |= {f"{side}/{name}": q for side, q in (("out", q_out), ("in", q_in)) if q is not None}
        return named

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> Self:
        """See `Inverse`."""
        parts = grouped(tensors)
        return replace(
            self,
            vectors={name: (tensors.get(f"out/{name}"), tensors.get(f"in/{name}")) for name in self.units},
            eigenvalues={name: tensors[f"eigenvalues/{name}"] for name in self.units},
            kept=parts.get("kept"),
            constants=parts.get("constants", {}),
            aim=tensors.get("aim/all"),
        )

    def check(self) -> None:
        """Refuse what has no inverse.

        Raises:
            SingularMatrixError: naming the layer, and a regularization that is usual.
        """
        for name, values in self.eigenvalues.items():
            block = self.units[name].matrix.block
            damping = self.regularization[block]
            smallest, largest = (value.item() for value in values.aminmax())
            if not smallest + damping > torch.finfo(values.dtype).eps * (largest + damping):
                raise SingularMatrixError(
                    f"layer {block!r} has no inverse at hessian_regularization {damping:g}: its smallest eigenvalue is "
                    f"{smallest:.1e}, its largest {largest:.1e}. Raise it; None takes {_DAMPING} of the mean "
                    f"eigenvalue of all layers, {_usual(self.eigenvalues):.1e}."
                )

    @cached_property
    def _weights(self) -> dict[str, Tensor]:
        """R by unit; all rows share it."""
        blocks = {name: unit.matrix.block for name, unit in self.units.items()}
        return {name: 1 / (values + self.regularization[blocks[name]]) for name, values in self.eigenvalues.items()}

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in ("_weights", "_kept_weights")}

    def _in_basis(self, gradients: GradientRows, without: Collection[str] = frozenset()) -> dict[str, Factor | Tensor]:
        """Gradients by unit, in the eigenbasis."""
        parts = {name: gradients.part(name, unit.matrix) for name, unit in self.units.items()}
        return {name: part if name in without else rotated(part, *self.vectors[name]) for name, part in parts.items()}

    @property
    def _matrices(self) -> dict[str, Matrix]:
        return {name: unit.matrix for name, unit in self.units.items()}

    def _coordinates(self, gradients: GradientRows, kept: Mapping[str, Tensor], is_left: bool) -> CoordinateRows:
        """The kept entries; and for the constants, the gradients in the eigenbasis."""
        parts, columns, start = self._in_basis(gradients), dict[str, list[int]](), 0
        like = next(iter(self.eigenvalues.values()))
        coordinates = like.new_empty(len(gradients), sum(map(len, kept.values())))
        for name, unit in self.units.items():
            part, which, matrix = parts[name], kept[name], unit.matrix
            entries = coordinates[:, start : start + len(which)]
            if isinstance(part, Factor):
                part.entries(matrix.d_in, which, entries)
            else:
                entries.copy_(part.flatten(1).index_select(1, which))
            if is_left:
                entries.mul_(self._kept_weights[name])
            columns.setdefault(matrix.block, [start]).append(start := start + len(which))
        sections = {block: slice(columns[block][0], columns[block][-1]) for block in self.sections}
        others = {name: parts[name] for name in self.constants}
        if is_left:
            for name, c in self.constants.items():
                part = parts[name]
                others[name] = Factor(part.gradients * c, part.inputs) if isinstance(part, Factor) else part * c
        matrices = {name: self.units[name].matrix for name in others}
        identity = FactoredRows.of(others, matrices, self.sections, form=False) if others else None
        return CoordinateRows(coordinates, sections, identity)

    def _entries(self, left: FactoredRows | CoordinateRows) -> Iterator[tuple[str, Tensor]]:
        """The matrices that left rows stand for, in the eigenbasis."""
        start = 0
        for name, unit in self.units.items():
            matrix, rows = unit.matrix, left if isinstance(left, FactoredRows) else left.identity
            shape = (len(left), matrix.groups, matrix.d_out, matrix.d_in)
            entries: Tensor | None = None
            if isinstance(rows, FactoredRows) and name in rows.matrices:
                entries = formed(rows.part(name), matrix)
                if name in rows.weights:
                    entries = entries * rows.weights[name]
            if isinstance(left, CoordinateRows):
                assert self.kept is not None
                which = self.kept[name]
                added = left.coordinates[:, start : start + len(which)]
                start += len(which)
                flat = added.new_zeros(len(left), matrix.size)
                if entries is not None:
                    flat += entries.flatten(1)
                entries = flat.index_add_(1, which, added).reshape(shape)
            assert entries is not None
            yield name, entries

    @cached_property
    def _kept_weights(self) -> dict[str, Tensor]:
        """What the kept entries are multiplied with: R, less the constant that counts them in already."""
        weights = {}
        for name, which in (self.kept or {}).items():
            values = self.eigenvalues[name].flatten()[which] + self.regularization[self.units[name].matrix.block]
            weights[name] = 1 / values - self.constants.get(name, 0)
        return weights

    def _back(self, name: str, matrices: Tensor) -> Tensor:
        q_out, q_in = self.vectors[name]
        matrices = matrices if q_out is None else q_out @ matrices
        return matrices if q_in is None else matrices @ q_in.mT


def _usual(eigenvalues: Mapping[str, Tensor]) -> float:
    """The regularization where none is given, rounded: it must not depend on how the eigenvalues were summed."""
    total = sum(float(values.double().sum()) for values in eigenvalues.values())
    return float(f"{_DAMPING * total / sum(values.numel() for values in eigenvalues.values()):.3g}")


def _kinds_of_rows(problem: Problem, data: Data) -> tuple[frozenset[str], frozenset[str]]:
    """By the first sample: which gradients are smaller multiplied out, and whose products are cheap."""
    gradients = problem.gradients(*data.rows(slice(0, 1)), compact=False)
    unrotated, products = set(), set()
    for name, unit in problem.structure.units.items():
        part, matrix = gradients.part(name, unit.matrix), unit.matrix
        if not isinstance(part, Factor):
            continue
        if not part.is_smaller(matrix):
            unrotated.add(name)
        per_pair = matrix.groups * (matrix.d_out + (0 if part.is_one_hot else matrix.d_in))
        if _CHEAPER * part.positions**2 * per_pair < matrix.size:
            products.add(name)
    return frozenset(unrotated), frozenset(products)


def _within_tolerance(inverse: KroneckerInverse, problem: Problem, data: Data, tolerance: float) -> KroneckerInverse:
    """An inverse whose scores of training samples on each other are off by no more."""
    n, some = len(data), list[GradientRows]()
    size = problem.n_parameters * problem.dtype.itemsize + problem.factor_bytes(data.rows(slice(0, 1)))
    groups = max(2, min(_TRIED, _TRIED_BYTES // size) // _NEIGHBOURS)
    neighbours = max(1, min(_NEIGHBOURS, n // 2))
    for start in range(0, n, max(neighbours, -(-n // groups))):
        rows = problem.gradients(*data.rows(slice(start, min(start + neighbours, n))), compact=False)
        for piece in rows.pieces:
            check_finite(piece, "gradients", "training", start)
        some.append(rows)
    # Of other samples: the score of one on itself would hide the errors of all others.
    tests, trains = joined(some[::2]), joined(some[1::2] or some)

    def scores(inverse: KroneckerInverse) -> Tensor:
        left: Rows = inverse.left(tests)
        return left.dot(inverse.right(trains))

    exact, aim = scores(inverse), tolerance * _MARGIN
    while aim > torch.finfo(exact.dtype).eps:
        truncated = inverse.truncated(aim)
        if not torch.linalg.vector_norm(scores(truncated) - exact) > tolerance * torch.linalg.vector_norm(exact):
            return truncated
        aim /= 2
    return inverse  # nothing less than all suffices


def _with_structure(problem: Problem, data: Data) -> Problem:
    return problem if problem.structure.axes else problem.structured(data.rows(slice(0, 3)))


def _check_covered(problem: Problem) -> None:
    for name, why in problem.structure.dense.items():
        raise UnsupportedLayerError(
            f"parameter {name!r} is none of a linear layer, a convolution, an embedding or a normalisation, as far as "
            f"can be seen ({why}): freeze it with requires_grad_(False), or use another method (DirectInfluence takes "
            "any model)"
        )
    for name, unit in problem.structure.units.items():
        sides = (unit.matrix.d_out, 0 if unit.kind == "one_hot" else unit.matrix.d_in)
        if max(sides) > _MAX_SIDE and not is_diagonal(unit):
            raise UnsupportedLayerError(
                f"parameter {name!r} has {max(sides):,} rows or columns: eigenvectors of that many are not computed. "
                "Freeze it with requires_grad_(False), or use another method"
            )

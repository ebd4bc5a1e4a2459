"""Several models at once: a score is the weighted sum of their scores.

Rows are those of all members side by side, so that all that holds for rows of one model holds for these: one pass over
the training data, one store. Blocks, parameters and arrays of member i are called ``i.NAME``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self, TypeVar, cast

import torch
from torch import Tensor, nn

from outfluence.data import Batch, Data, Tree
from outfluence.errors import ProblemError
from outfluence.problem import Problem
from outfluence.rows import DenseRows, GradientRows, Rows
from outfluence.solvers import Inverse, Regularization, Solver, per_block

_T = TypeVar("_T")


class EnsembleProblem(Problem):
    """The problems of several models, whose parameters are one behind the other.

    Args:
        members: of each model.

    Raises:
        ProblemError: if they share trainable parameters, or differ in their type or device.
    """

    _members: tuple[Problem, ...]

    def __init__(self, members: Sequence[Problem]) -> None:
        seen: set[int] = set()
        for i, member in enumerate(members):
            own = {id(p) for p in member.model.parameters() if p.requires_grad}
            if own & seen:
                raise ProblemError(
                    f"model {i} shares trainable parameters with another model of the ensemble: give each its own "
                    "(copy.deepcopy)"
                )
            seen |= own
        if len({(member.dtype, member.device) for member in members}) != 1:
            raise ProblemError("the models of an ensemble must be of one floating type, on one device")
        blocks = {
            block: [f"{i}.{name}" for name in names]
            for i, member in enumerate(members)
            for block, names in _named(i, member.blocks).items()
        }
        super().__init__(nn.ModuleList([member.model for member in members]), members[0].loss, blocks)
        object.__setattr__(self, "_members", tuple(members))

    @property
    def members(self) -> tuple[Problem, ...]:
        """See `Problem`."""
        return self._members

    def unstructured(self) -> EnsembleProblem:
        """See `Problem`."""
        return EnsembleProblem([member.unstructured() for member in self.members])

    def structured(self, batch: Batch) -> EnsembleProblem:
        """See `Problem`."""
        return EnsembleProblem([member.structured(batch) for member in self.members])

    def check(self, batch: Batch, whose: str) -> EnsembleProblem:
        """See `Problem`."""
        return EnsembleProblem([member.check(batch, whose) for member in self.members])

    def to(self, device: torch.device | str) -> EnsembleProblem:
        """See `Problem`."""
        return EnsembleProblem([member.to(device) for member in self.members])

    def gradients(
        self,
        x: Tree,
        y: Tree,
        compact: bool = True,
        into: Tensor | None = None,  # noqa: ARG002 - there are several arrays
    ) -> GradientRows:
        """See `Problem`."""
        rows = [member.gradients(x, y, compact) for member in self.members]
        return cast(GradientRows, EnsembleRows(tuple(rows), (1.0,) * len(rows)))  # for the inverses of the members

    def mixed_derivatives(self, directions: Tensor, x: Tree, y: Tree) -> Tensor:
        """See `Problem`; the sum over members."""
        parts = directions.split([member.n_parameters for member in self.members], dim=1)  # type: ignore[no-untyped-call]
        total = self.members[0].mixed_derivatives(parts[0], x, y)
        for member, part in zip(self.members[1:], parts[1:], strict=True):
            total += member.mixed_derivatives(part, x, y)
        return total

    @property
    def batch_size(self) -> int:
        """See `Problem`."""
        return min(member.batch_size for member in self.members)

    def factor_bytes(self, sample: Batch) -> int:
        """See `Problem`."""
        return sum(member.factor_bytes(sample) for member in self.members)

    def activation_bytes(self, sample: Batch, twice: bool = True) -> int:
        """See `Problem`; they run one after the other."""
        return max(member.activation_bytes(sample, twice) for member in self.members)

    def describe(self, batch: Batch) -> str:
        """See `Problem`."""
        return "\n".join(f"model {i}:\n{member.describe(batch)}" for i, member in enumerate(self.members))

    def fingerprint(self) -> dict[str, str]:
        """See `Problem`."""
        found = [member.fingerprint() for member in self.members]
        return {key: " | ".join(each[key] for each in found) for key in found[0]}


@dataclass(frozen=True)
class EnsembleRows:
    """The rows of all members, side by side.

    Attributes:
        members: of each member.
        weights: of their scores.
    """

    members: tuple[Any, ...]
    weights: tuple[float, ...]

    def __len__(self) -> int:
        return len(self.members[0])

    @property
    def arrays(self) -> dict[str, Tensor]:
        """See `Rows`."""
        return {name: a for i, rows in enumerate(self.members) for name, a in _named(i, rows.arrays).items()}

    @property
    def pieces(self) -> list[Tensor]:
        """See `Rows`."""
        return [piece for rows in self.members for piece in rows.pieces]

    def with_arrays(self, arrays: Mapping[str, Tensor]) -> Self:
        """See `Rows`."""
        return replace(self, members=tuple(rows.with_arrays(_of(i, arrays)) for i, rows in enumerate(self.members)))

    @property
    def positions(self) -> dict[str, int]:
        """See `Rows`."""
        return {name: n for i, rows in enumerate(self.members) for name, n in _named(i, rows.positions).items()}

    def dot(self, right: EnsembleRows) -> Tensor:
        """See `Rows`."""
        total: Tensor | None = None
        for left, other, weight in self._with(right):
            scores = left.dot(other).mul_(weight)
            total = scores if total is None else total.add_(scores)
        assert total is not None
        return total

    def dot_by_block(self, right: EnsembleRows) -> dict[str, Tensor]:
        """See `Rows`."""
        return {
            name: part * weight
            for i, (left, other, weight) in enumerate(self._with(right))
            for name, part in _named(i, left.dot_by_block(other)).items()
        }

    def dot_each(self, right: EnsembleRows) -> Tensor:
        """See `Rows`."""
        total: Tensor = sum(left.dot_each(other) * weight for left, other, weight in self._with(right))
        return total

    def dense(self) -> DenseRows:
        """Gradients of all members as vectors, without the weights."""
        return _side_by_side([rows.dense() for rows in self.members])

    def compact(self) -> Self:
        """Gradients in the fewest numbers."""
        return replace(self, members=tuple(rows.compact() for rows in self.members))

    def multiplied(self, vectors: Mapping[str, Tensor]) -> Tensor:
        """Vectors ``(k, P_block)`` of each block, multiplied with gradients, without the weights: ``(k, n)``."""
        return torch.stack([*self.multiplied_by_block(vectors).values()]).sum(0)

    def multiplied_by_block(self, vectors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The parts of `multiplied`."""
        return {
            name: part
            for i, rows in enumerate(self.members)
            for name, part in _named(i, rows.multiplied_by_block(_of(i, vectors))).items()
        }

    def _with(self, right: EnsembleRows) -> Iterator[tuple[Any, Any, float]]:
        return zip(self.members, right.members, self.weights, strict=True)


@dataclass(frozen=True)
class EnsembleSolver:
    """The solvers of all members.

    Args:
        members: of each.
        weights: of their scores.
        regularization: by block of all of them; None: what each of them has.
    """

    members: tuple[Any, ...]
    weights: tuple[float, ...]
    regularization: Regularization = None

    def fit(self, problem: Problem, data: Data) -> EnsembleInverse:
        """One after the other."""
        inverses = [solver.fit(member, data) for solver, member in self._each(problem)]
        return EnsembleInverse(tuple(inverses), self.weights)

    def restore(self, problem: Problem, data: Data, tensors: Mapping[str, Tensor]) -> EnsembleInverse:
        """See `Solver`."""
        inverses = [
            solver.restore(member, data, _of(i, tensors)) for i, (solver, member) in enumerate(self._each(problem))
        ]
        return EnsembleInverse(tuple(inverses), self.weights)

    def options(self) -> dict[str, Any]:
        """What the fit depends on."""
        members = [{"solver": type(solver).__name__} | solver.options() for solver in self.members]
        return {"members": members, "weights": list(self.weights)}

    @property
    def precompute_grad(self) -> bool:
        """Whether a member keeps what does not change between products; see `CgSolver`."""
        return any(getattr(solver, "precompute_grad", False) for solver in self.members)

    def _each(self, problem: Problem) -> Iterator[tuple[Solver, Problem]]:
        assert isinstance(problem, EnsembleProblem)
        for i, (solver, member) in enumerate(zip(self.members, problem.members, strict=True)):
            if self.regularization is not None:
                solver = replace(solver, regularization=_of(i, per_block(self.regularization, problem)))  # noqa: PLW2901
            yield solver, member


@dataclass(frozen=True)
class EnsembleInverse(Inverse):
    """The inverses of all members.

    Attributes:
        members: of each.
        weights: of their scores.
    """

    members: tuple[Inverse, ...]
    weights: tuple[float, ...]

    def left(self, gradients: Any) -> EnsembleRows:
        """Those of each member."""
        return self._rows(inverse.left(rows) for inverse, rows in self._each(gradients))

    def right(self, gradients: Any) -> EnsembleRows:
        """Those of each member."""
        return self._rows(inverse.right(rows) for inverse, rows in self._each(gradients))

    def dense(self, left: EnsembleRows) -> DenseRows:
        """Those of each member, times their weights."""
        parts = [inverse.dense(rows) for inverse, rows in self._each(left)]
        return _side_by_side(
            [replace(part, values=part.values * w) for part, w in zip(parts, self.weights, strict=True)]
        )

    def quadratic(self, gradients: Any) -> Tensor:
        """The weighted sum."""
        each = [inverse.quadratic(rows) for inverse, rows in self._each(gradients)]
        return torch.stack([part * weight for part, weight in zip(each, self.weights, strict=True)]).sum(0)

    @property
    def info(self) -> dict[str, dict[str, Any]]:
        """What the fits found out."""
        return self._joined([inverse.info for inverse in self.members])

    @property
    def regularization(self) -> dict[str, float]:  # type: ignore[override]
        """Those of all."""
        return self._joined([inverse.regularization for inverse in self.members])

    def with_regularization(self, regularization: Mapping[str, float]) -> Self:
        """See `Inverse`."""
        return self._by_member(lambda i, inverse: inverse.with_regularization(_of(i, regularization)))

    @property
    def nbytes(self) -> int:
        """See `Inverse`."""
        return sum(inverse.nbytes for inverse in self.members)

    @property
    def takes_factors(self) -> bool:
        """Whether any does."""
        return any(inverse.takes_factors for inverse in self.members)

    @property
    def in_basis(self) -> bool:
        """Whether rows of any are."""
        return any(inverse.in_basis for inverse in self.members)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Those of all."""
        return self._joined([inverse.tensors for inverse in self.members])

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> Self:
        """See `Inverse`."""
        return self._by_member(lambda i, inverse: inverse.with_tensors(_of(i, tensors)))

    @property
    def data(self) -> Data | None:
        """See `Inverse`; all have been fitted to the same."""
        return next((inverse.data for inverse in self.members if inverse.data is not None), None)

    def reading(self, problem: Problem, data: Data) -> Self:
        """See `Inverse`."""
        assert isinstance(problem, EnsembleProblem)
        problems = problem.members
        return self._by_member(lambda i, inverse: inverse.reading(problems[i], data))

    def _rows(self, members: Iterator[Rows]) -> EnsembleRows:
        return EnsembleRows(tuple(members), self.weights)

    def _each(self, rows: EnsembleRows) -> Iterator[tuple[Inverse, Any]]:
        return zip(self.members, rows.members, strict=True)

    def _by_member(self, function: Any) -> Self:
        return replace(self, members=tuple(function(i, inverse) for i, inverse in enumerate(self.members)))

    @staticmethod
    def _joined(parts: Sequence[Mapping[str, _T]]) -> dict[str, _T]:
        return {name: value for i, part in enumerate(parts) for name, value in _named(i, part).items()}


def _side_by_side(members: Sequence[DenseRows]) -> DenseRows:
    sections, start = dict[str, slice](), 0
    for i, rows in enumerate(members):
        sections |= {name: slice(start + s.start, start + s.stop) for name, s in _named(i, rows.sections).items()}
        start += rows.values.shape[1]
    return DenseRows(torch.cat([rows.values for rows in members], dim=1), sections)


def _named(i: int, things: Mapping[str, _T]) -> dict[str, _T]:
    """With the names that things of member i have."""
    return {f"{i}.{name}": thing for name, thing in things.items()}


def _of(i: int, things: Mapping[str, _T]) -> dict[str, _T]:
    """Those of member i, with the names that they have there."""
    return {name.removeprefix(f"{i}."): thing for name, thing in things.items() if name.startswith(f"{i}.")}

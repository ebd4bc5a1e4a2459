"""Rows: what a sample is encoded to. A score is the dot product of a left row (test) and a right row (training).

Calculators, stores and plans see only this: `len`, named arrays to store, and dot products.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Protocol, Self

import torch
from torch import Tensor

from outfluence.errors import NonFiniteError


class Rows(Protocol):
    """Encoded samples. Left and right rows that are multiplied are of the same kind."""

    def __len__(self) -> int: ...

    @property
    def arrays(self) -> dict[str, Tensor]:
        """What to store: named arrays, first axis samples, trailing shapes the same for all samples."""

    def with_arrays(self, arrays: Mapping[str, Tensor]) -> Self:
        """Rows like these, with other samples' arrays."""

    def dot_by_block(self, right: Self) -> dict[str, Tensor]:
        """Dot products per block, in order: ``(n_left, n_right)`` each."""

    def dot(self, right: Self) -> Tensor:
        """Dot products with other rows: ``(n_left, n_right)``, the sum of `dot_by_block`."""

    def dot_each(self, right: Self) -> Tensor:
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

    def with_arrays(self, arrays: Mapping[str, Tensor]) -> Self:
        """See `Rows`."""
        return replace(self, values=arrays["values"])

    def dot(self, right: DenseRows) -> Tensor:
        """See `Rows`."""
        return self.values @ right.values.T

    def dot_each(self, right: DenseRows) -> Tensor:
        """See `Rows`."""
        return (self.values * right.values).sum(1)

    def dot_by_block(self, right: DenseRows) -> dict[str, Tensor]:
        """See `Rows`."""
        return {name: self.values[:, s] @ right.values[:, s].T for name, s in self.sections.items()}

    def by_block(self) -> dict[str, Tensor]:
        """The columns of each block: ``(n, P_block)``."""
        return {name: self.values[:, s] for name, s in self.sections.items()}

    def block(self, name: str) -> Self:
        """These rows with all columns outside a block set to zero."""
        values = torch.zeros_like(self.values)
        values[:, self.sections[name]] = self.values[:, self.sections[name]]
        return replace(self, values=values)


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
    identity: DenseRows | None = None

    def __len__(self) -> int:
        return self.coordinates.shape[0]

    @property
    def arrays(self) -> dict[str, Tensor]:
        """See `Rows`."""
        identity = {} if self.identity is None else {"identity": self.identity.values}
        return {"coordinates": self.coordinates, **identity}

    def with_arrays(self, arrays: Mapping[str, Tensor]) -> Self:
        """See `Rows`."""
        identity = None if self.identity is None else replace(self.identity, values=arrays["identity"])
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
    if rows.numel() == 0:
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

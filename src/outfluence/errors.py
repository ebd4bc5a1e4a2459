"""The exceptions users meet. Each message says what was wrong, where, and what to do next."""

from __future__ import annotations

from collections.abc import Sequence


class OutfluenceError(Exception):
    """Base of every error this package raises on purpose."""


class DataError(OutfluenceError, ValueError):
    """The data cannot be read the same way twice, or its parts do not fit together."""


class ProblemError(OutfluenceError, ValueError):
    """The model, the loss or the blocks do not define an influence."""


class UnsupportedLayerError(ProblemError):
    """A method that needs layer structure met a layer it has no formula for."""


class NotFittedError(OutfluenceError, RuntimeError):
    """An influence model was used before `fit`."""


class SingularMatrixError(OutfluenceError, ValueError):
    """The regularized matrix has no inverse at working precision."""


class NonFiniteError(OutfluenceError, ValueError):
    """NaN or infinite gradients, factors or scores.

    Attributes:
        samples: indices of the offending samples, in the data they came from.
    """

    def __init__(self, message: str, samples: Sequence[int] = ()) -> None:
        super().__init__(message, tuple(samples))
        self.samples = tuple(samples)

    def __str__(self) -> str:
        return str(self.args[0])


class ConvergenceError(OutfluenceError, RuntimeError):
    """An iteration diverged, or found nothing."""


class ConvergenceWarning(UserWarning):
    """An iteration stopped before it reached its tolerance; the message names the residual."""


class DamageWarning(UserWarning):
    """Stored results were damaged after they had been written; they are computed again."""


class Interrupted(KeyboardInterrupt):
    """A run was interrupted, or its process told to end; what was computed is stored, and the same call goes on."""


class PlanError(OutfluenceError, ValueError):
    """The work does not fit into the memory it was promised."""


class StoreError(OutfluenceError, RuntimeError):
    """A store cannot be written, read or continued."""


class StoreMismatchError(StoreError):
    """A store exists already and was made by something else."""


class ClusterError(OutfluenceError, RuntimeError):
    """The Dask cluster cannot run this work safely."""


class RunError(OutfluenceError, RuntimeError):
    """Some tasks failed; all others are finished and stored.

    Attributes:
        failures: for each failed task its name and the message of its error.
    """

    def __init__(self, message: str, failures: Sequence[tuple[str, str]] = ()) -> None:
        super().__init__(message, tuple(failures))
        self.failures = tuple(failures)

    def __str__(self) -> str:
        return str(self.args[0])

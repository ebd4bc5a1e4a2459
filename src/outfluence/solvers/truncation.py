"""Which entries of a diagonal inverse count one by one, where scores may be off by a little.

In the basis of eigenvectors a score is ``sum_e R_e g_e h_e``, with ``R = 1 / (Lambda + lambda)``, over the entries e
of the gradients of a test and a training sample. Where Lambda is small beside lambda, R is nearly the same for all
entries, and they add up to a multiple of the product of the gradients:

    sum_{e kept} (R_e - c) g_e h_e  +  c sum_e g_e h_e

The kept entries of each matrix are those of the largest eigenvalues; c is the mean of R over the others, weighted
by ``Lambda^2``. Lambda is the second moment of an entry, so if entries are uncorrelated the mean square of a score is
``sum_e (R_e Lambda_e)^2``, and that of its error the sum of ``((R_e - c) Lambda_e)^2`` over what is not kept.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor

#: Halvings of the threshold, from a largest to a smallest contribution.
_STEPS = 80


def truncation(
    eigenvalues: Mapping[str, Tensor], regularization: Mapping[str, float], with_constant: Collection[str], aim: float
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The fewest entries with which scores have at most an error; or so many, with the least error.

    Args:
        eigenvalues: Lambda, by name, of any shape.
        regularization: lambda, by name.
        with_constant: names for which the product of gradients is cheap; for all others c is zero.
        aim: below one the expected root mean square of the error, relative to that of scores; else the most entries.

    Returns:
        By name the places of the kept entries, ascending ``(k,)``; and for the names with a constant c, ``(1,)``.
    """
    orders, remaining, constants, gains, total = {}, {}, {}, {}, 0.0
    for name, values in eigenvalues.items():
        flat = values.flatten().double()
        orders[name] = order = flat.argsort(descending=True)
        lambdas = flat[order]
        inverses = 1 / (lambdas + regularization[name])
        rest = _sums_from(inverses.square() * lambdas.square())
        total += float(rest[0])
        if name in with_constant:
            weighted, weights = _sums_from(inverses * lambdas.square()), _sums_from(lambdas.square())
            constants[name] = torch.where(weights > 0, weighted / weights, 1 / max(regularization[name], 1e-300))
            rest = (rest - weighted * constants[name]).clamp(min=0)
        remaining[name] = rest
        # What it gains to keep one more; or, on the way to a greater gain, that one.
        gains[name] = (rest[:-1] - rest[1:]).flip(0).cummax(0).values

    def counts(threshold: float) -> dict[str, int]:
        return {name: len(gain) - int(torch.searchsorted(gain, threshold, right=True)) for name, gain in gains.items()}

    largest = max(float(gain[-1]) for gain in gains.values() if len(gain))
    low, high = -120.0, 0.0  # in halvings of the largest gain; at the lowest all counts
    for _ in range(_STEPS):
        middle = (low + high) / 2
        chosen = counts(largest * 2.0**middle)
        if aim < 1:
            enough = sum(float(remaining[name][k]) for name, k in chosen.items()) <= aim**2 * total
        else:
            enough = sum(chosen.values()) > aim
        low, high = (middle, high) if enough else (low, middle)
    chosen = counts(largest * 2.0**low)
    if aim >= 1:  # of those that come next all would be too many: a part of them
        more, chosen = chosen, counts(largest * 2.0**high)
        for name, k in more.items():
            chosen[name] += min(k - chosen[name], int(aim) - sum(chosen.values()))
    kept = {name: orders[name][:k].sort().values for name, k in chosen.items()}
    dtype = next(iter(eigenvalues.values())).dtype
    of_the_rest = {name: c[chosen[name]].to(dtype)[None] for name, c in constants.items() if chosen[name] < len(c) - 1}
    return kept, of_the_rest


def lost_share(
    eigenvalues: Mapping[str, Tensor],
    regularization: Mapping[str, float],
    kept: Mapping[str, Tensor],
    constants: Mapping[str, Tensor],
) -> float:
    """What is lost of the scores' mean square, where only some entries count; see `truncation`."""
    lost = total = 0.0
    for name, values in eigenvalues.items():
        flat = values.flatten().double()
        inverses = 1 / (flat + regularization[name])
        errors = inverses - constants[name].double() if name in constants else inverses.clone()
        errors[kept[name]] = 0.0
        total += float((inverses * flat).square().sum())
        lost += float((errors * flat).square().sum())
    return lost / total if total else 0.0


def _sums_from(values: Tensor) -> Tensor:
    """For each place the sum from there on: one more than values."""
    sums = values.flip(0).cumsum(0).flip(0)
    return torch.cat([sums, sums.new_zeros(1)])

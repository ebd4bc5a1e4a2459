"""The choices a user names, as enums. A string with the member's value may stand wherever a member may."""

from __future__ import annotations

from enum import StrEnum
from typing import NoReturn


class _Choice(StrEnum):
    @classmethod
    def _missing_(cls, value: object) -> NoReturn:
        raise ValueError(f"{value!r} is no {cls.__name__}; choose one of {', '.join(map(repr, map(str, cls)))}")


class InfluenceMode(_Choice):
    """What is perturbed: the weight of a training sample, or its features."""

    Up = "up"
    Perturbation = "perturbation"


class BlockMode(_Choice):
    """How the parameters are grouped; the second-order matrix is block-diagonal in these groups."""

    FULL = "full"
    LAYER_WISE = "layer_wise"
    PARAMETER_WISE = "parameter_wise"


class SecondOrderMode(_Choice):
    """Which second-order matrix stands for the curvature of the loss; all are means over the training samples.

    ``hessian``: second derivatives of the loss; ``gauss_newton``: ``J^T H_L J``, with the Jacobian of the model's
    output and the Hessian of the loss with respect to it; ``fisher``: outer products of gradients at labels drawn from
    the model; ``empirical_fisher``: at the labels of the data.
    """

    HESSIAN = "hessian"
    GAUSS_NEWTON = "gauss_newton"
    FISHER = "fisher"
    EMPIRICAL_FISHER = "empirical_fisher"


class FisherMode(_Choice):
    """Whose labels the Fisher's gradients are taken at.

    ``sampled``: drawn from the model's predictive distribution; ``exact``: the expectation over it;
    ``empirical``: the labels of the data (not the Fisher, and said so by the name).
    """

    SAMPLED = "sampled"
    EXACT = "exact"
    EMPIRICAL = "empirical"


class WeightSharing(_Choice):
    """What K-FAC takes of a layer that is applied to several positions of a sample (Eschenhagen et al. 2023).

    ``expand``: each position counts as a sample of its own; ``reduce``: the mean of the inputs counts, and the sum of
    the output gradients.
    """

    EXPAND = "expand"
    REDUCE = "reduce"


class Projection(_Choice):
    """How gradients are projected to a few numbers.

    ``two_sided``: both sides of each layer's gradient, on random orthogonal directions; ``pca``: on the leading
    eigenvectors of the covariances of inputs and output gradients; ``rademacher``, ``gaussian``, ``sjlt``: all entries
    at once, times random signs, normal numbers, or a sparse matrix of signs.
    """

    TWO_SIDED = "two_sided"
    PCA = "pca"
    RADEMACHER = "rademacher"
    GAUSSIAN = "gaussian"
    SJLT = "sjlt"


class KernelMode(_Choice):
    """Of which gradients the kernel of projected ones is.

    ``sampled``, ``exact``, ``empirical``: see `FisherMode`; ``margin``: those of ``log(p / (1 - p))``, p the
    probability of the sample's label, unweighted (Park et al. 2023).
    """

    SAMPLED = "sampled"
    EXACT = "exact"
    EMPIRICAL = "empirical"
    MARGIN = "margin"

"""The distribution of labels that a loss stands for: what the Fisher is an expectation over.

A loss that is ``c`` times the negative log-likelihood of a categorical, Gaussian or Bernoulli distribution is known
by its derivatives, however it was written: as a torch loss with any reduction, a multiple of one, or a function around
it. The matrix made of it is ``c`` times the Fisher of the distribution, which for these is the Gauss-Newton matrix
``J^T H_L J`` (Martens 2020, section 9): ``H_L``, the Hessian of the loss with respect to the output, does not depend on
the label, and is the mean of ``s s^T`` over the *pseudo-gradients* s given here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.func import grad, vmap
from torch.utils import _pytree

from outfluence.data import Batch, describe
from outfluence.errors import ProblemError
from outfluence.problem import Problem

#: Most classes that are tried when a loss is looked at.
_CLASSES = 1024


@dataclass(frozen=True)
class Likelihood:
    """A distribution of labels, given a model's output z.

    Attributes:
        family: "categorical" (z are class scores), "gaussian" (z are means, variance 1), "bernoulli" (z are logits).
        scale: c, the loss as a multiple of the negative log-likelihood.
    """

    family: str
    scale: float

    def sampled(self, z: Tensor, uniform: Tensor) -> Tensor:
        """Pseudo-gradients at a label drawn for each sample: ``sqrt(c)`` times the log-likelihood's.

        Args:
            z: outputs, ``(n, *shape)``.
            uniform: numbers in (0, 1), float64, ``(n, n_draws(z))``.
        """
        if self.family == "categorical":
            below = z.softmax(1).double().cumsum(1) < uniform
            labels = below.sum(1).clamp(max=z.shape[1] - 1)
            unit = z.softmax(1) - torch.nn.functional.one_hot(labels, z.shape[1])
        elif self.family == "gaussian":
            unit = torch.special.ndtri(uniform).reshape(z.shape).to(z.dtype)
        else:
            p = z.sigmoid()
            unit = p - (uniform.reshape(z.shape) <= p.double()).to(z.dtype)
        scaled: Tensor = unit * self.scale**0.5
        return scaled

    def n_draws(self, z: Tensor) -> int:
        """How many random numbers a label takes."""
        return 1 if self.family == "categorical" else int(z[0].numel())

    def expected(self, z: Tensor) -> Iterator[Tensor]:
        """Pseudo-gradients whose outer products sum up to ``H_L``, with no sampling noise: one for each entry of z."""
        if self.family == "categorical":
            p = z.softmax(1)
            for label in range(z.shape[1]):
                unit = p.clone()
                unit[:, label] -= 1
                yield unit * (self.scale * p[:, label, None]).sqrt()
            return
        p = z.sigmoid()
        root = torch.ones_like(z) if self.family == "gaussian" else (p * (1 - p)).sqrt()
        for entry in range(z[0].numel()):
            unit = torch.zeros_like(z).flatten(1)
            unit[:, entry] = root.flatten(1)[:, entry] * self.scale**0.5
            yield unit.reshape(z.shape)


def find_likelihood(problem: Problem, batch: Batch) -> Likelihood:
    """The distribution that a problem's loss stands for.

    Args:
        problem: model and loss.
        batch: one or a few samples.

    Raises:
        ProblemError: if the loss is none that is known, or the output not one tensor.
    """
    with torch.no_grad():
        output = problem.output(problem.parameters, problem.on_device(batch.x))
    z, y = the_tensor(output)[:1].detach(), problem.on_device(batch.y)
    generator = torch.Generator().manual_seed(0)

    def normal(n: int, scale: float) -> Tensor:
        return (torch.randn(n, *z.shape[1:], generator=generator, dtype=torch.float64) * scale).to(z)

    def gradients(outputs: Tensor, labels: Tensor) -> Tensor:
        def loss(one: Tensor, label: Tensor) -> Tensor:
            return problem.output_loss(_in_place_of(output, one.unsqueeze(0)), label.unsqueeze(0))

        derivative: Tensor = vmap(grad(loss))(outputs, labels)
        return derivative

    tolerance = 1e4 * torch.finfo(z.dtype).eps
    for family in _families(z, y):
        if family == "categorical":
            labels = torch.linspace(0, z.shape[1] - 1, min(z.shape[1], _CLASSES), device=z.device).round().long()
            outputs = torch.cat([normal(len(labels), 1.0), normal(len(labels), 10.0)])
            labels = labels.repeat(2)
            expected = outputs.softmax(1) - torch.nn.functional.one_hot(labels, z.shape[1])
        else:
            outputs, labels = torch.cat([normal(16, 1.0), normal(16, 10.0)]), normal(32, 3.0)
            if family == "bernoulli":
                labels = (labels > 0).to(z.dtype)
            expected = (outputs.sigmoid() if family == "bernoulli" else outputs) - labels
        actual = gradients(outputs, labels.reshape(-1, *y.shape[1:]).to(y.dtype))
        scale = ((actual * expected).sum() / expected.square().sum()).item()
        if scale > 0 and (actual - scale * expected).abs().max() <= tolerance * scale * expected.abs().max():
            return Likelihood(family, scale)
    raise ProblemError(
        f"labels can be drawn from the model for cross entropy, squared error, and binary cross entropy with logits, "
        f"and multiples of them; this loss is none of these (output {describe(z, batched=True)}, label "
        f"{describe(y, batched=True)} a sample). Let the model return what such a loss takes, or take the labels of "
        "the data: fisher='empirical', second_order_mode='empirical_fisher'."
    )


def the_tensor(output: Any) -> Tensor:
    """The one tensor of a model's output, which may be wrapped (in a tuple, or a class registered with torch).

    Raises:
        ProblemError: if there are more.
    """
    tensors = [leaf for leaf in _pytree.tree_leaves(output) if isinstance(leaf, Tensor)]
    if len(tensors) != 1 or tensors[0].ndim < 1:
        raise ProblemError(
            f"to draw labels from the model its output must be one tensor, first axis samples; it gives {len(tensors)} "
            f"({describe(output)}). Wrap the model, or use fisher='empirical'."
        )
    return tensors[0]


def uniform_draws(seed: int, start: int, stop: int, width: int = 1) -> np.ndarray:
    """Uniform numbers in (0, 1) for samples ``start`` to ``stop - 1``: float64 ``(n, width)``, from a counter.

    A sample's numbers depend on the seed and its index only, so that batches, chunks and workers do not matter
    (Philox, Salmon et al. 2011; a step of its counter gives four words).
    """
    bits, steps = np.random.Philox(key=seed), -(-width // 4)
    bits.advance(start * steps)
    words = bits.random_raw(4 * steps * (stop - start)).reshape(stop - start, 4 * steps)[:, :width]
    return ((words >> np.uint64(12)) + 0.5) * 2.0**-52


def _families(z: Tensor, y: Any) -> list[str]:
    if not isinstance(y, Tensor):
        return []
    if z.ndim == 2 and y.ndim == 1 and not y.is_floating_point():
        return ["categorical"]
    return ["gaussian", "bernoulli"] if y[0].numel() == z[0].numel() and y.is_floating_point() else []


def _in_place_of(output: Any, tensor: Tensor) -> Any:
    return _pytree.tree_map(lambda leaf: tensor if isinstance(leaf, Tensor) else leaf, output)

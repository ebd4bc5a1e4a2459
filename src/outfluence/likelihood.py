"""The distribution of labels that a loss stands for: what the Fisher is an expectation over.

A loss that is ``c`` times the negative log-likelihood of a categorical, Gaussian or Bernoulli distribution is known
by its derivatives, however it was written: as a torch loss with any reduction, a multiple of one, or a function around
it. The matrix made of it is ``c`` times the Fisher of the distribution, which for these is the Gauss-Newton matrix
``J^T H_L J`` (Martens 2020, section 9): ``H_L``, the Hessian of the loss with respect to the output, is the mean of
``s s^T`` over the *pseudo-gradients* s given here. Of classes, c may depend on the sample: on masks and weights in y,
on the class of its label, and on the position of a label, where a sample has many; where a label is ignored it is zero.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.func import grad, vmap
from torch.utils import _pytree

from outfluence.data import Batch, Tree, describe, tree_leaves, tree_map
from outfluence.errors import ProblemError
from outfluence.problem import Problem

#: Most pairs of outputs and labels that a loss is looked at with, and about how many numbers of the outputs.
_TRIED, _MOST_NUMBERS = 32, 1 << 22
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.uint8, torch.int8)


@dataclass(frozen=True)
class Likelihood:
    """A distribution of labels, given a model's output z.

    Attributes:
        family: "categorical" (z are class scores), "gaussian" (z are means, variance 1), "bernoulli" (z are logits).
        scale: c, the loss as a multiple of the negative log-likelihood; None where it depends on y or the position.
        axis: of class scores, that of the classes; along all others there are positions, each with a label.
        leaf: which of the tensors of y are the labels.
    """

    family: str
    scale: float | None
    axis: int = 1
    leaf: int = 0

    def weights(self, problem: Problem, output: Any, y: Tree) -> Tensor:
        """The c of each sample: a scalar if it is the same for all; of class scores of each label, ``(n, *positions)``.

        It is zero where the loss ignores the label that is there, and whatever the loss makes of masks and weights in
        y, or of the label's class.

        Args:
            problem: model and loss.
            output: the model's, for the samples.
            y: their labels.
        """
        z = the_tensor(output)
        if self.family != "categorical":
            return z.new_tensor(self.scale)
        # Where the scores are zero no class is certain, and no derivative is zero unless c is.
        gradients = _gradients(problem, output, torch.zeros_like(z), y).movedim(self.axis, -1)
        return _multiples(gradients, tree_leaves(y)[self.leaf])

    def sampled(self, z: Tensor, uniform: Tensor, weights: Tensor) -> Tensor:
        """Pseudo-gradients at a label drawn for each sample: ``sqrt(c)`` times the log-likelihood's.

        Args:
            z: outputs, ``(n, *shape)``.
            uniform: numbers in (0, 1), float64, ``(n, n_draws(z))``.
            weights: c; see `weights`.
        """
        if self.family == "categorical":
            p = z.movedim(self.axis, -1).softmax(-1)
            below = torch.searchsorted(p.cumsum(-1, dtype=torch.float64), uniform.reshape(*p.shape[:-1], 1))
            unit = _minus_ones(p, below.squeeze(-1).clamp(max=p.shape[-1] - 1))
            return unit.mul_(weights.sqrt().unsqueeze(-1)).movedim(-1, self.axis)
        if self.family == "gaussian":
            unit = torch.special.ndtri(uniform).reshape(z.shape).to(z.dtype)
        else:
            p = z.sigmoid()
            unit = p - (uniform.reshape(z.shape) <= p.double()).to(z.dtype)
        return unit * weights.sqrt()

    def n_draws(self, z: Tensor) -> int:
        """How many random numbers the labels of a sample take."""
        return int(z[0].numel()) // (z.shape[self.axis] if self.family == "categorical" else 1)

    def expected(self, z: Tensor, weights: Tensor) -> Iterator[Tensor]:
        """Pseudo-gradients whose outer products sum up to ``H_L``, with no sampling noise: one for each entry of z."""
        if self.family == "categorical":
            p = z.movedim(self.axis, -1).softmax(-1)
            flat = p.reshape(len(z), -1, p.shape[-1])
            roots = weights.expand(p.shape[:-1]).reshape(flat.shape[:2]).sqrt()
            for position in range(flat.shape[1]):
                for label in range(flat.shape[2]):
                    unit = torch.zeros_like(flat)
                    unit[:, position] = flat[:, position]
                    unit[:, position, label] -= 1
                    unit[:, position] *= (roots[:, position] * flat[:, position, label].sqrt())[:, None]
                    yield unit.reshape(p.shape).movedim(-1, self.axis)
            return
        p = z.sigmoid()
        root = torch.ones_like(z) if self.family == "gaussian" else (p * (1 - p)).sqrt()
        for entry in range(z[0].numel()):
            unit = torch.zeros_like(z).flatten(1)
            unit[:, entry] = root.flatten(1)[:, entry] * weights.sqrt()
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
    z, y = the_tensor(output).detach(), problem.on_device(batch.y)
    generator = torch.Generator().manual_seed(0)

    def normal(n: int, scale: float) -> Tensor:
        return (torch.randn(n, *z.shape[1:], generator=generator, dtype=torch.float64) * scale).to(z)

    def gradients(outputs: Tensor, leaf: int, labels: Tensor) -> Tensor:
        number = iter(range(len(tree_leaves(y))))
        given = tree_map(
            lambda t: labels.to(t.dtype) if next(number) == leaf else t[torch.arange(len(labels)) % len(t)], y
        )
        return _gradients(problem, output, outputs, given)

    tolerance = 1e4 * torch.finfo(z.dtype).eps
    for leaf, axis in _classes_in(z, y):
        n, shape = max(2, min(_TRIED, _MOST_NUMBERS // z[0].numel())), (*z.shape[1:axis], *z.shape[axis + 1 :])
        labels = torch.randint(0, z.shape[axis], (n, *shape), generator=generator).to(z.device)
        outputs = torch.cat([normal(n // 2, 1.0), normal(n - n // 2, 10.0)])
        with suppress(RuntimeError, IndexError, ValueError):  # of a loss that takes labels of another kind there
            actual = gradients(outputs, leaf, labels).movedim(axis, -1)
            finite = actual.isfinite().flatten(1).all(1)  # a mean over no label that counts is not
            actual, outputs, labels = actual[finite], outputs[finite], labels[finite]
            weights = _multiples(gradients(torch.zeros_like(outputs), leaf, labels).movedim(axis, -1), labels)
            expected = weights.unsqueeze(-1) * _minus_ones(outputs.movedim(axis, -1).softmax(-1), labels)
            largest = weights.max().item()
            if largest > 0 and weights.min() >= 0 and (actual - expected).abs().max() <= tolerance * largest:
                same = isinstance(y, Tensor) and not shape and weights.min() >= (1 - tolerance) * largest
                return Likelihood("categorical", largest if same else None, axis, leaf)
    for family in _families(z, y):
        outputs, labels = torch.cat([normal(16, 1.0), normal(16, 10.0)]), normal(32, 3.0)
        if family == "bernoulli":
            labels = (labels > 0).to(z.dtype)
        expected = (outputs.sigmoid() if family == "bernoulli" else outputs) - labels
        actual = gradients(outputs, 0, labels.reshape(-1, *y.shape[1:]))
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


def uniform_draws(seed: int, start: int, stop: int, width: int = 1, stream: int = 0) -> np.ndarray:
    """Uniform numbers in (0, 1) for samples ``start`` to ``stop - 1``: float64 ``(n, width)``, from a counter.

    A number depends on the seed, the stream, the index of its sample, and its place in the row only, so that batches,
    chunks, workers and padding do not matter (Philox, Salmon et al. 2011). A step of the counter gives the four words
    that are side by side in the row of a sample; each four have a counter of their own.
    """
    n, words = stop - start, []
    for four in range(-(-width // 4)):
        bits = np.random.Philox(key=seed + (stream << 64), counter=[0, four, 0, 0])
        bits.advance(start)
        words.append(bits.random_raw(4 * n).reshape(n, 4))
    return ((np.concatenate(words, 1)[:, :width] >> np.uint64(12)) + 0.5) * 2.0**-52


def _gradients(problem: Problem, output: Any, outputs: Tensor, y: Tree) -> Tensor:
    """Derivatives of each sample's loss with respect to its output, of which `output` shows the form."""

    def loss(one: Tensor, label: Tree) -> Tensor:
        return problem.output_loss(
            _in_place_of(output, one.unsqueeze(0)), tree_map(lambda leaf: leaf.unsqueeze(0), label)
        )

    derivative: Tensor = vmap(grad(loss))(outputs, y)
    return derivative


def _multiples(gradients: Tensor, labels: Tensor) -> Tensor:
    """c, from derivatives ``c (1 / C - [k is the label])`` where all scores are zero: ``(n, *positions, C)``."""
    classes = gradients.shape[-1]
    at_label = gradients.gather(-1, labels.long().clamp(0, classes - 1).unsqueeze(-1)).squeeze(-1)
    return (gradients.mean(-1) - at_label) / (1 - 1 / classes)


def _minus_ones(p: Tensor, labels: Tensor) -> Tensor:
    """``p_k - [k is the label]``."""
    return p.scatter_add(-1, labels.unsqueeze(-1), -torch.ones_like(p[..., :1]))


def _classes_in(z: Tensor, y: Any) -> Iterator[tuple[int, int]]:
    """Where classes may be: which tensor of y are labels, and which axis of z goes over their classes."""
    for i, leaf in enumerate(tree_leaves(y)):
        for axis in range(1, z.ndim):
            if (
                z.shape[axis] > 1
                and z.shape[1:axis] + z.shape[axis + 1 :] == leaf.shape[1:]
                and leaf.dtype in _INTEGERS
            ):
                yield i, axis


def _families(z: Tensor, y: Any) -> list[str]:
    if not isinstance(y, Tensor):
        return []
    return ["gaussian", "bernoulli"] if y[0].numel() == z[0].numel() and y.is_floating_point() else []


def _in_place_of(output: Any, tensor: Tensor) -> Any:
    return _pytree.tree_map(lambda leaf: tensor if isinstance(leaf, Tensor) else leaf, output)

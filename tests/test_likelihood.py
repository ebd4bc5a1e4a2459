"""Labels at many positions: what the Fisher of a loss is an expectation over, against the Hessian of the loss."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from outfluence import EkfacInfluence, Problem
from outfluence import likelihood as likelihood_module
from outfluence.data import Batch, tree_map
from outfluence.errors import ProblemError
from outfluence.likelihood import find_likelihood, uniform_draws

CLASSES, POSITIONS, N = 4, 3, 5
IGNORED = -100


def labels(ignored=False):
    torch.manual_seed(1)
    y = torch.randint(0, CLASSES, (N, POSITIONS))
    if ignored:
        y[0, 1:], y[3, 0] = IGNORED, IGNORED
    return y


def masked(z, y):
    losses = F.cross_entropy(z.transpose(1, 2), y["words"], reduction="none")
    return (losses * y["mask"]).sum() / y["mask"].sum()


#: Loss, labels, and the axis of classes.
LOSSES = {
    "sum": (lambda z, y: F.cross_entropy(z.transpose(1, 2), y, reduction="sum"), labels(), 2),
    "mean": (lambda z, y: F.cross_entropy(z.transpose(1, 2), y), labels(), 2),
    "flattened": (lambda z, y: F.cross_entropy(z.flatten(0, 1), y.flatten(), reduction="sum"), labels(), 2),
    "classes first": (F.cross_entropy, labels(), 1),
    "ignored, mean": (lambda z, y: F.cross_entropy(z.transpose(1, 2), y), labels(ignored=True), 2),
    "ignored, sum": (lambda z, y: 3 * F.cross_entropy(z, y, reduction="sum"), labels(ignored=True), 1),
    "smaller integers": (lambda z, y: F.cross_entropy(z, y.long()), labels().to(torch.int32), 1),
    "a mask": (masked, {"words": labels(), "mask": (labels() > 0).double() + 0.5}, 2),
    "a mask that hides all of the first sample": (
        lambda z, y: (F.cross_entropy(z, y["words"], reduction="none") * y["mask"]).sum(),
        {"words": labels(), "mask": torch.tensor([0.0, 1.0, 0.5, 2.0, 1.0]).double()[:, None].expand(N, POSITIONS)},
        1,
    ),
    "weights of classes": (
        nn.CrossEntropyLoss(torch.tensor([1.0, 2.0, 3.0, 4.0]).double(), reduction="sum"),
        labels(),
        1,
    ),
    "a class that is ignored": (nn.CrossEntropyLoss(ignore_index=1), (labels() + 1) % 2 + labels() // 2, 1),
    "last positions count more": (
        lambda z, y: (F.cross_entropy(z, y, reduction="none") * torch.arange(1.0, 1 + POSITIONS)).sum(),
        labels(),
        1,
    ),
}


class Words(nn.Module):
    """Class scores at each position, ``(n, T, C)`` or ``(n, C, T)``."""

    def __init__(self, axis):
        super().__init__()
        torch.manual_seed(2)
        self.first, self.head, self.axis = nn.Linear(3, 5).double(), nn.Linear(5, CLASSES).double(), axis

    def forward(self, x):
        z = self.head(torch.tanh(self.first(x)))
        return z if self.axis == 2 else z.transpose(1, 2)


def case(name):
    loss, y, axis = LOSSES[name]
    torch.manual_seed(3)
    return Words(axis), loss, torch.randn(N, POSITIONS, 3).double(), y, axis


def hessian(loss, z, y, i):
    """Of the loss of sample i with respect to its output."""
    label = tree_map(lambda t: t[i : i + 1], y)
    whole = torch.autograd.functional.hessian(lambda one: loss(one[None], label), z[i])
    return whole.reshape(z[i].numel(), -1)


@pytest.mark.parametrize("name", LOSSES)
def test_pseudo_gradients_add_up_to_the_hessian_of_the_loss(name):
    model, loss, x, y, axis = case(name)
    problem = Problem(model, loss)
    likelihood = find_likelihood(problem, Batch(x, y))
    assert (likelihood.family, likelihood.axis, likelihood.scale) == ("categorical", axis, None)
    z = model(x).detach()
    weights = likelihood.weights(problem, z, y)
    assert weights.shape == (N, POSITIONS)
    sides = [s.flatten(1) for s in likelihood.expected(z, weights)]
    assert len(sides) == CLASSES * POSITIONS
    for i in range(N):
        total = sum(torch.outer(s[i], s[i]) for s in sides)
        assert torch.allclose(total, hessian(loss, z, y, i), rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("name", ["mean", "ignored, sum", "a mask"])
def test_drawn_labels_have_that_mean(name):
    model, loss, x, y, _ = case(name)
    problem = Problem(model, loss)
    likelihood = find_likelihood(problem, Batch(x, y))
    z, weights = model(x).detach(), None
    weights = likelihood.weights(problem, z, y)
    assert likelihood.n_draws(z) == POSITIONS
    n = 4000
    total = 0
    for seed in range(n):
        uniform = torch.from_numpy(uniform_draws(seed, 0, N, POSITIONS))
        s = likelihood.sampled(z, uniform, weights).flatten(1)
        total = total + s[:, :, None] * s[:, None, :] / n
    for i in range(N):
        expected = hessian(loss, z, y, i)
        assert (total[i] - expected).norm() < 0.06 * expected.norm() + 1e-12


ONE_LABEL = {
    "weights of samples": (
        lambda z, y: (F.cross_entropy(z, y["label"], reduction="none") * y["weight"]).sum(),
        lambda y: {"label": y, "weight": torch.tensor([0.0, 3.0, 0.5, 1.0, 2.0]).double()},
    ),
    "weights of classes": (
        nn.CrossEntropyLoss(torch.tensor([1.0, 2.0, 3.0, 4.0]).double(), reduction="sum"),
        lambda y: y,
    ),
    "ignored": (nn.CrossEntropyLoss(reduction="sum"), lambda y: y.where(y != 2, IGNORED)),
    "a class that is ignored": (nn.CrossEntropyLoss(reduction="sum", ignore_index=0), lambda y: y),
    "a class that is ignored, mean": (nn.CrossEntropyLoss(ignore_index=0), lambda y: y.clamp(min=1)),
}


@pytest.mark.parametrize("name", ONE_LABEL)
def test_one_label_a_sample_has_its_own_weight(name):
    loss, make = ONE_LABEL[name]
    torch.manual_seed(4)
    model, x = nn.Linear(3, CLASSES).double(), torch.randn(N, 3).double()
    y = make(torch.tensor([2, 0, 3, 1, 2]))
    problem = Problem(model, loss)
    likelihood = find_likelihood(problem, Batch(x[:3], tree_map(lambda t: t[:3], y)))
    z = model(x).detach()
    sides = [*likelihood.expected(z, likelihood.weights(problem, z, y))]
    for i in range(N):
        total = sum(torch.outer(s[i], s[i]) for s in sides)
        assert torch.allclose(total, hessian(loss, z, y, i), rtol=1e-8, atol=1e-12)


def test_more_classes_than_are_tried(monkeypatch):
    """A large vocabulary, whose last word is ignored."""
    monkeypatch.setattr(likelihood_module, "_MOST_NUMBERS", 1)
    classes, loss = 3000, nn.CrossEntropyLoss(ignore_index=2999)
    torch.manual_seed(5)
    model, x = nn.Linear(3, classes).double(), torch.randn(4, 6, 3).double()
    y = torch.randint(0, classes, (4, 6))
    y[:, 3:] = 2999
    problem = Problem(model, lambda z, y: loss(z.transpose(1, 2), y))
    likelihood = find_likelihood(problem, Batch(x, y))
    weights = likelihood.weights(problem, model(x).detach(), y)
    assert torch.allclose(weights, torch.tensor([1 / 3, 1 / 3, 1 / 3, 0, 0, 0]).double().expand(4, 6))


def test_smoothed_labels_are_no_likelihood():
    model, _, x, y, _ = case("classes first")
    with pytest.raises(ProblemError, match="labels can be drawn from the model for cross entropy"):
        find_likelihood(Problem(model, nn.CrossEntropyLoss(label_smoothing=0.1)), Batch(x, y))


@pytest.mark.parametrize("name", ["sum", "ignored, mean", "a mask"])
def test_ekfac_of_labels_at_positions_equals_the_dense_formula(name):
    """The head alone: its gradient is ``sum_t s_t a_t^T`` at each pseudo-gradient s, with a written out by hand."""
    model, loss, x, y, _ = case(name)
    model.first.requires_grad_(False)
    influence = EkfacInfluence(model, True, 0.05, loss=loss, fisher="exact").fit((x, y))
    a = torch.cat([torch.tanh(model.first(x)), torch.ones(N, POSITIONS, 1).double()], dim=2).detach().numpy()
    z = model(x).detach()
    of_outputs, fisher, of_inputs, count = 0, 0, 0, 0
    for i in range(N):
        h = hessian(loss, z, y, i).numpy().reshape(POSITIONS, CLASSES, POSITIONS, CLASSES)
        counting = a[i][h.any((1, 2, 3))]  # a position whose label is ignored adds nothing
        of_inputs, count = of_inputs + counting.T @ counting, count + len(counting)
        of_outputs = of_outputs + np.einsum("tctd->cd", h) / N
        fisher = fisher + np.einsum("tcsd,ti,sj->cidj", h, a[i], a[i]) / N
    basis = np.kron(np.linalg.eigh(of_outputs)[1], np.linalg.eigh(of_inputs / count)[1])
    size = CLASSES * a.shape[2]
    eigenvalues = np.diag(basis.T @ fisher.reshape(size, size) @ basis)
    gradients = []
    for i in range(N):
        label = tree_map(lambda t: t[i : i + 1], y)  # noqa: B023 - used at once
        d = torch.func.grad(lambda one: loss(one[None], label))(z[i]).numpy()  # noqa: B023 - used at once
        gradients.append(np.einsum("tc,ti->ci", d, a[i]).ravel() @ basis)
    rows = np.stack(gradients)
    expected = rows / (eigenvalues + 0.05) @ rows.T
    assert np.allclose(influence.influences(x, y).numpy(), expected, rtol=1e-8, atol=1e-10)

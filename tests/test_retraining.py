"""Influence is a prediction of what retraining without a sample does. Retrain, and compare."""

from __future__ import annotations

import numpy as np
import torch
from sklearn.datasets import load_breast_cancer
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits

from outfluence import DirectInfluence

L2 = 1e-2


class Logistic(nn.Module):
    def __init__(self, n_features):
        super().__init__()
        self.linear = nn.Linear(n_features, 1)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x):
        return self.linear(x)[:, 0]


def trained(x, y, keep, start=None):
    """The minimum of (sum of kept losses) / N + L2 / 2 |theta|^2, by Newton's method; N is that of all samples."""
    design = np.hstack([x.numpy(), np.ones((len(x), 1))])[keep]
    target, n = y.numpy()[keep], len(x)
    theta = np.zeros(design.shape[1]) if start is None else start
    for _ in range(50):
        p = 1 / (1 + np.exp(-design @ theta))
        gradient = design.T @ (p - target) / n + L2 * theta
        hessian = (design.T * (p * (1 - p))) @ design / n + L2 * np.eye(len(theta))
        step = np.linalg.solve(hessian, gradient)
        theta = theta - step
        if np.abs(step).max() < 1e-13:
            return theta
    raise AssertionError("Newton's method did not converge")


def test_removing_each_of_100_samples_changes_the_loss_as_predicted():
    features, labels = load_breast_cancer(return_X_y=True)
    features = (features - features.mean(0)) / features.std(0)
    order = np.random.default_rng(0).permutation(len(features))
    x, y = torch.from_numpy(features[order]), torch.from_numpy(labels[order].astype(float))
    test, train = (x[:100], y[:100]), (x[100:], y[100:])
    n = len(train[0])

    everything = np.ones(n, dtype=bool)
    theta = trained(*train, everything)
    model = Logistic(x.shape[1]).double()
    with torch.no_grad():
        model.linear.weight.copy_(torch.from_numpy(theta[None, :-1]))
        model.linear.bias.copy_(torch.from_numpy(theta[-1:]))

    influence = DirectInfluence(model, binary_cross_entropy_with_logits, regularization=L2).fit(train)
    scores = influence.influences(*test, *train).mean(0).numpy()

    def test_loss(parameters):
        margin = np.hstack([test[0].numpy(), np.ones((100, 1))]) @ parameters
        return np.mean(np.logaddexp(0, margin) - test[1].numpy() * margin)

    removed = np.random.default_rng(1).choice(n, 100, replace=False)
    changes = []
    for i in removed:
        keep = everything.copy()
        keep[i] = False
        changes.append(test_loss(trained(*train, keep, theta)) - test_loss(theta))
    # To first order, removing sample i raises the test loss by its influence over N.
    predicted, actual = scores[removed], n * np.array(changes)
    assert np.corrcoef(predicted, actual)[0, 1] > 0.98
    # Not only up to scale: the slope is one, up to what the first order leaves out.
    slope = (predicted @ actual) / (predicted @ predicted)
    assert 0.9 < slope < 1.3
    # And it is the inverse that predicts: gradient dot products do not.
    plain = DirectInfluence(model, binary_cross_entropy_with_logits, regularization=1e6).fit(train)
    assert np.corrcoef(plain.influences(*test, *train).mean(0).numpy()[removed], actual)[0, 1] < 0.9

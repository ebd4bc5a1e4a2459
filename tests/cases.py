"""Problems to test methods on: small enough for a dense reference, different enough to break a wrong formula."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn


@dataclass
class Case:
    model: nn.Module
    loss: Any
    train: tuple[Any, Any]
    test: tuple[Any, Any]


class Nested(nn.Module):
    """Parameters at the root, a nested module, a frozen layer."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor([1.0, 0.5, -0.3, 0.2]))
        self.body = nn.Sequential(nn.Linear(4, 3), nn.Sequential(nn.Tanh(), nn.Linear(3, 3)))
        self.head = nn.Linear(3, 3)
        self.head.requires_grad_(False)

    def forward(self, x):
        return self.head(torch.tanh(self.body(x * self.scale)))


class Tied(nn.Module):
    """One weight in two layers."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 4, bias=False)
        self.second = nn.Linear(4, 4)
        self.second.weight = self.first.weight
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.second(torch.tanh(self.first(x)))))


class Attention(nn.Module):
    """One attention head with a layer norm, over five positions."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(2, 4)
        self.norm = nn.LayerNorm(4)
        self.mix = nn.Linear(4, 4, bias=False)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        h = self.norm(self.embed(x))
        h = h + torch.softmax(h @ h.mT / 2, dim=-1) @ self.mix(h)
        return self.head(h.mean(1))


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(5, 3)
        self.linear = nn.Linear(6, 3)

    def forward(self, tokens, features):
        return self.linear(torch.cat([self.embed(tokens).mean(1), features], dim=1))


def _classes(n):
    return torch.randint(0, 3, (n,))


def _floats(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def _linear():
    return nn.Linear(4, 1), F.mse_loss, lambda n: (_floats(n, 4), _floats(n, 1))


def _logistic():
    return nn.Linear(4, 3, bias=False), F.cross_entropy, lambda n: (_floats(n, 4), _classes(n))


def _mlp():
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    return model, F.cross_entropy, lambda n: (_floats(n, 4), _classes(n))


def _mlp_regression():
    model = nn.Sequential(nn.Linear(4, 5), nn.Softplus(), nn.Linear(5, 2))
    return model, nn.MSELoss(), lambda n: (_floats(n, 4), _floats(n, 2))


def _bernoulli():
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2))
    return model, nn.BCEWithLogitsLoss(), lambda n: (_floats(n, 4), (_floats(n, 2) > 0).double())


def _cnn():
    model = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.Tanh(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(8, 3))
    return model, F.cross_entropy, lambda n: (_floats(n, 1, 4, 4), _classes(n))


def _dict_inputs():
    def data(n):
        return {"features": _floats(n, 3), "tokens": torch.randint(0, 5, (n, 2))}, _classes(n)

    return TwoInputs(), F.cross_entropy, data


def _tuple_inputs():
    def data(n):
        return (torch.randint(0, 5, (n, 2)), _floats(n, 3)), _classes(n)

    return TwoInputs(), F.cross_entropy, data


CASES = {
    "linear": _linear,
    "logistic": _logistic,
    "mlp": _mlp,
    "mlp_regression": _mlp_regression,
    "bernoulli": _bernoulli,
    "cnn": _cnn,
    "nested": lambda: (Nested(), *_logistic()[1:]),
    "tied": lambda: (Tied(), *_logistic()[1:]),
    "attention": lambda: (Attention(), F.cross_entropy, lambda n: (_floats(n, 5, 2), _classes(n))),
    "dict_inputs": _dict_inputs,
    "tuple_inputs": _tuple_inputs,
}


def make_case(name: str, n_train: int = 24, n_test: int = 7) -> Case:
    torch.manual_seed(0)
    model, loss, data = CASES[name]()
    return Case(model.double().eval(), loss, data(n_train), data(n_test))

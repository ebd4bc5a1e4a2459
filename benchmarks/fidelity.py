"""Which method predicts retraining best, and what it costs: python benchmarks/fidelity.py [PROBLEM ...] [--store FOLDER].

For each problem (see `PROBLEMS`) models are trained on random halves of the training data, with several seeds
(`outfluence.fidelity.retrain`; kept in ``--store``, so that a second run trains nothing). For each method one line of
JSON: the linear datamodeling score, the mean over test samples of the rank correlation over the halves between the sum
of the scores of a half's samples and the loss of the models trained on it, with its 95% bootstrap interval; of the
scores of one model trained on all data (``one``), and of their mean over `MODELS` models of other seeds (``mean``).
`cpu` are CPU seconds for one model, from data in memory to scores in memory.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import math
import os
import platform
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from outfluence import CgInfluence, DirectInfluence, EkfacInfluence, EkfacPreconditioner
from outfluence.fidelity import linear_datamodeling_score, random_subsets, retrain

MODELS = 5


class Digits:
    """1,797 digits of 8 x 8, a network 64-64-10."""

    n_train, n_test, n_subsets, seeds = 1200, 200, 100, 5
    damping = 1e-3

    def __init__(self):
        from sklearn.datasets import load_digits

        digits = load_digits()
        order = np.random.default_rng(0).permutation(len(digits.target))
        x = torch.tensor(digits.data[order] / 16, dtype=torch.float32)
        y = torch.tensor(digits.target[order])
        self.train, self.test = (
            (x[: self.n_train], y[: self.n_train]),
            (x[self.n_train :][: self.n_test], y[self.n_train :][: self.n_test]),
        )

    def model(self):
        return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))

    loss = staticmethod(F.cross_entropy)

    def __call__(self, indices, seed):
        """Train: SGD with momentum and weight decay, 30 epochs, the step falling to zero along a cosine."""
        torch.manual_seed(seed)
        model, (x, y) = self.model(), (part[indices] for part in self.train)
        optimizer = torch.optim.SGD(model.parameters(), momentum=0.9, weight_decay=1e-3, fused=True)
        epochs, n_batches = 30, -(-len(x) // 60)
        for epoch in range(epochs):
            order = torch.randperm(len(x))
            for i, (some_x, some_y) in enumerate(zip(x[order].split(60), y[order].split(60), strict=True)):
                done = (epoch + i / n_batches) / epochs
                optimizer.param_groups[0]["lr"] = 0.05 * (1 + math.cos(math.pi * done))
                optimizer.zero_grad()
                self.loss(model(some_x), some_y).backward()
                optimizer.step()
        return model.eval()


PROBLEMS = {"digits": Digits}


def methods(problem):
    """By name: what makes a fitted influence model of a trained model."""
    loss = problem.loss
    for damping in (1e-4, 1e-3, 1e-2):
        yield f"EK-FAC, {damping:g}", lambda model, damping=damping: EkfacInfluence(model, True, damping)
        yield (
            f"EK-FAC, exact Fisher, {damping:g}",
            lambda model, damping=damping: EkfacInfluence(model, True, damping, fisher="exact"),
        )
    for damping in (1e-4, 1e-3, 1e-2):
        yield (
            f"Gauss-Newton, {damping:g}",
            lambda model, damping=damping: DirectInfluence(model, loss, damping, second_order_mode="gauss_newton"),
        )


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("problems", nargs="*")
    parser.add_argument("--store")
    arguments = parser.parse_args()
    about = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        **{name: importlib.metadata.version(name) for name in ("outfluence", "torch")},
        "python": platform.python_version(),
    }
    with tempfile.TemporaryDirectory() as own:
        for name in arguments.problems or PROBLEMS:
            problem = PROBLEMS[name]()
            subsets = random_subsets(problem.n_train, problem.n_subsets)
            found = retrain(
                problem,
                subsets,
                problem.test,
                Path(arguments.store or own) / f"{name}.zarr",
                loss=problem.loss,
                seeds=problem.seeds,
                progress=True,
            )
            losses = found.losses.values
            models = [problem(np.arange(problem.n_train), seed) for seed in range(MODELS)]
            for method, make in methods(problem):
                scores, cpu = [], time.process_time()
                for model in models:
                    influence = make(model).fit(problem.train)
                    scores.append(influence.influences(*problem.test, *problem.train).numpy())
                cpu = (time.process_time() - cpu) / len(models)
                one, mean = (linear_datamodeling_score(s, subsets, losses) for s in (scores[0], np.mean(scores, 0)))
                line = {"problem": name, "method": method, "one": str(one), "mean": str(mean), "cpu": round(cpu, 2)}
                print(json.dumps(line | about), flush=True)


if __name__ == "__main__":
    main()

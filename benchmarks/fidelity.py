"""Which method predicts retraining, and what it costs: python benchmarks/fidelity.py [PROBLEM ...] [--store FOLDER].

For each problem (see `PROBLEMS`) models are trained on random halves of the training data, with several seeds
(`outfluence.fidelity.retrain`; kept in ``--store``, so that a second run trains nothing). For each method one line of
JSON: the linear datamodeling score (Park et al. 2023), which is the mean over test samples of the rank correlation,
over the halves, of the sum of the scores of a half's samples with the loss of the models trained on it; with its 95%
bootstrap interval. ``one``: of the scores of one model trained on all data; ``mean``: of their mean over `MODELS`
models of other seeds. `cpu` are CPU seconds for one model, from data in memory to scores in memory; the first model
is not counted (torch loads what it needs). The number in a method's name is the regularization. ``--table FILE`` turns
lines that were kept into a table in Markdown.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import itertools
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
from sklearn.datasets import load_digits
from torch import nn

from outfluence import ArnoldiInfluence, DirectInfluence, EkfacCgInfluence, EkfacInfluence, Problem
from outfluence.fidelity import linear_datamodeling_score, random_subsets, retrain

MODELS = 5


class Digits:
    """1,797 digits of 8 x 8, a network 64-64-10."""

    n_train, n_test, n_subsets, seeds = 1200, 200, 100, 5

    def __init__(self):
        digits = load_digits()
        order = np.random.default_rng(0).permutation(len(digits.target))
        x = torch.tensor(digits.data[order] / 16, dtype=torch.float32)
        y = torch.tensor(digits.target[order])
        self.train, self.test = (
            (x[: self.n_train], y[: self.n_train]),
            (x[self.n_train :][: self.n_test], y[self.n_train :][: self.n_test]),
        )

    def model(self):
        """A network of 4,810 parameters."""
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
    """By name: what makes an influence model of a trained model."""
    loss = problem.loss
    yield "gradients alone", None
    for damping in (1e-4, 1e-3, 1e-2):
        yield f"K-FAC, {damping:g}", lambda m, d=damping: EkfacInfluence(m, False, d)
        yield f"EK-FAC, {damping:g}", lambda m, d=damping: EkfacInfluence(m, True, d)
        yield f"EK-FAC, exact Fisher, {damping:g}", lambda m, d=damping: EkfacInfluence(m, True, d, fisher="exact")
    for tolerance in (0.02, 0.1):
        yield (
            f"EK-FAC, 0.0001, tolerance {tolerance:g}",
            lambda m, t=tolerance: EkfacInfluence(m, True, 1e-4, tolerance=t),
        )
    for damping, rtol in itertools.product((1e-3, 1e-2), (0.3, 0.1)):
        yield (
            f"EK-FAC CG, {damping:g}, rtol {rtol:g}",
            lambda m, d=damping, r=rtol: EkfacCgInfluence(m, loss, d, rtol=r),
        )
    for damping in (1e-3, 1e-2):
        yield (
            f"Gauss-Newton, {damping:g}",
            lambda m, d=damping: DirectInfluence(m, loss, d, second_order_mode="gauss_newton"),
        )
        yield (
            f"Arnoldi, rank 100, {damping:g}",
            lambda m, d=damping: ArnoldiInfluence(m, loss, d, rank=100, tol=1e-2, second_order_mode="gauss_newton"),
        )


def scores_of(make, model, problem):
    """With the CPU seconds that they take."""
    start = time.process_time()
    if make is None:
        rows = [Problem(model, problem.loss).gradients(*data) for data in (problem.test, problem.train)]
        scores = rows[0].dot(rows[1])
    else:
        scores = make(model).fit(problem.train).influences(*problem.test, *problem.train)
    return scores.numpy(), time.process_time() - start


def table(lines):
    """In Markdown."""
    rows = ["| problem | method | one model | mean of five | CPU s |", "|---|---|---|---|---|"]
    rows += [f"| {d['problem']} | {d['method']} | {d['one']} | {d['mean']} | {d['cpu']} |" for d in lines]
    return "\n".join(rows)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("problems", nargs="*")
    parser.add_argument("--store")
    parser.add_argument("--table")
    arguments = parser.parse_args()
    if arguments.table:
        print(table([json.loads(line) for line in Path(arguments.table).read_text().splitlines()]))
        return
    torch.set_num_threads(1)
    about = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        **{name: importlib.metadata.version(name) for name in ("outfluence", "torch")},
        "python": platform.python_version(),
    }
    with tempfile.TemporaryDirectory() as own:
        for name in arguments.problems or PROBLEMS:
            problem = PROBLEMS[name]()
            subsets = random_subsets(problem.n_train, problem.n_subsets)
            path = Path(arguments.store or own) / f"{name}.zarr"
            found = retrain(problem, subsets, problem.test, path, loss=problem.loss, seeds=problem.seeds)
            losses = found.losses.values
            models = [problem(np.arange(problem.n_train), seed) for seed in range(MODELS)]
            for method, make in methods(problem):
                scores, cpu = zip(*(scores_of(make, model, problem) for model in models), strict=True)
                one, mean = (linear_datamodeling_score(s, subsets, losses) for s in (scores[0], np.mean(scores, 0)))
                line = {"problem": name, "method": method, "one": str(one), "mean": str(mean)}
                line |= {"cpu": round(float(np.mean(cpu[1:])), 3), "n_train": problem.n_train, "n_test": problem.n_test}
                line |= {"subsets": problem.n_subsets, "seeds": problem.seeds, "models": MODELS}
                print(json.dumps(line | about), flush=True)


if __name__ == "__main__":
    main()

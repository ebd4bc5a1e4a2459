"""Solves with the Gauss-Newton matrix of a trained network: make bench (or: python benchmarks/solvers.py).

For each way to solve one line of JSON: `products` (passes over the training data) until the residual of all `n_test`
right-hand sides is below `rtol`, `seconds` for them (wall clock, fits of preconditioners included), and `ratio`, the
products over those of plain conjugate gradient in the same run. Real digits: `raw` are pixels from 0 to 16, 1,797
samples for 1,210 parameters; `scaled` are pixels from 0 to 1, for 2,410 parameters.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import time

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

from outfluence import CgInfluence, EkfacInfluence, EkfacPreconditioner, JacobiPreconditioner, NystroemPreconditioner

REGULARIZATION, RTOL, N_TEST = 1e-5, 1e-2, 10


def trained(x, y, hidden):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, hidden), nn.Tanh(), nn.Linear(hidden, 10)).double()
    optimizer = torch.optim.Adam(model.parameters(), 3e-3, weight_decay=1e-4)
    for _ in range(600):
        some = torch.randint(0, len(x), (64,))
        optimizer.zero_grad()
        F.cross_entropy(model(x[some]), y[some]).backward()
        optimizer.step()
    return model


def ways(model):
    ekfac = EkfacPreconditioner(EkfacInfluence(model, True, fisher="exact"))
    return {
        "plain": {},
        "block": {"solve_simultaneously": True},
        "jacobi": {"preconditioner": JacobiPreconditioner(20)},
        "nystroem": {"preconditioner": NystroemPreconditioner(100)},
        "ekfac": {"preconditioner": ekfac},
        "ekfac block": {"preconditioner": ekfac, "solve_simultaneously": True},
    }


def main():
    x, y = (torch.tensor(part) for part in load_digits(return_X_y=True))
    machine = {
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        "versions": {name: importlib.metadata.version(name) for name in ("outfluence", "torch")},
    }
    for case, inputs, hidden in (("raw", x, 16), ("scaled", x / 16, 32)):
        model, plain = trained(inputs, y, hidden), None
        for name, options in ways(model).items():
            start = time.perf_counter()
            influence = CgInfluence(
                model,
                F.cross_entropy,
                regularization=REGULARIZATION,
                rtol=RTOL,
                atol=0.0,
                precompute_grad=True,
                second_order_mode="gauss_newton",
                warn_on_max_iteration=False,
                **options,
            ).fit((inputs, y))
            rows = influence.gradient_rows(inputs[:N_TEST], y[:N_TEST])
            info = influence.inverse.solve(rows)[1]["all"]
            products = int(info["iterations"].max())
            plain = plain or products
            print(
                json.dumps(
                    {
                        "benchmark": "solvers",
                        "case": case,
                        "solver": name,
                        "products": products,
                        "converged": bool(info["converged"].all()),
                        "ratio": round(products / plain, 3),
                        "seconds": round(time.perf_counter() - start, 2),
                        "n_parameters": influence.n_parameters,
                        "n_train": len(x),
                        "n_test": N_TEST,
                        "regularization": REGULARIZATION,
                        "rtol": RTOL,
                        **machine,
                    }
                ),
                flush=True,
            )


if __name__ == "__main__":
    main()

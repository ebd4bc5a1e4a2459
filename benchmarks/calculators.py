"""Calculators against the arithmetic they cannot avoid: make bench (or: python benchmarks/calculators.py).

For each case one line of JSON. `limit_seconds` is measured in the same run, in memory, with nothing around it: the
gradients of the training samples (one vmapped backward pass a batch) and the matrix product of factors and gradients.
`seconds` is all that a calculator takes to make a store from factors that another store holds: copying them, reading
rows, gradients, products, checks, and writing to disk, synced and read back. `ratio` is the one over the other; one is
as good as it can get, and `seconds_in_tasks` says where the rest goes. Wall-clock, the best of `repeats`; the limit is
measured before and after, and the lower counts.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import tempfile
import time
from pathlib import Path

import torch
from dask.distributed import Client, LocalCluster
from torch import nn

from outfluence import DaskInfluenceCalculator, Data, EkfacInfluence, SequentialInfluenceCalculator, Store

REPEATS = 2


def problem(width, n_train, n_test):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 10))
    data = [(torch.randn(n, 64), torch.randint(0, 10, (n,))) for n in (n_train, n_test)]
    return EkfacInfluence(model, update_diagonal=True, hessian_regularization=1e-3).fit(data[0]), *data


def seconds(function):
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def limit(influence, train, test, batch=256):
    """Gradients and products, in memory, results thrown away."""
    factors = influence.influence_factors(*test)

    def arithmetic():
        for start in range(0, len(train[0]), batch):
            part = slice(start, start + batch)
            torch.matmul(factors, influence.problem.gradients(train[0][part], train[1][part]).values.T)

    return min(seconds(arithmetic) for _ in range(REPEATS))


def measure(make_calculator, influence, train, test, folder):
    """The best run's seconds, and where they went, from the receipts."""
    factors = SequentialInfluenceCalculator(influence).influence_factors(test).to_zarr(folder / "factors.zarr", True)
    best = None
    for repeat in range(REPEATS):
        path = folder / f"{repeat}.zarr"
        lazy = make_calculator(influence).influences_from_factors(factors, Data.of(train))
        took = seconds(lambda lazy=lazy, path=path: lazy.to_zarr(path, True))
        receipts = Store(path).receipts("scores")
        parts = {}
        for receipt in receipts:
            for part, value in receipt["seconds_by_part"].items():
                parts[part] = round(parts.get(part, 0.0) + value, 4)
        if best is None or took < best["seconds"]:
            peak = max(r["peak_bytes"] for r in receipts) / 2**20
            best = {
                "seconds": round(took, 3),
                "seconds_in_tasks": parts,
                "tasks": len(receipts),
                "peak_mib_planned": round(lazy.plan.peak / 2**20),
                "peak_mib": round(peak),
            }
    return best


def main():
    about = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        **{name: importlib.metadata.version(name) for name in ("outfluence", "torch", "dask", "zarr")},
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "repeats": REPEATS,
    }
    with (
        LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=":0") as cluster,
        Client(cluster) as client,
        tempfile.TemporaryDirectory() as folder,
    ):
        calculators = {
            "sequential": SequentialInfluenceCalculator,
            "dask, 2 workers": lambda influence: DaskInfluenceCalculator(influence, client),
        }
        for width, n_train, n_test in ((1024, 5000, 500), (256, 20000, 500)):
            influence, train, test = problem(width, n_train, n_test)
            for name, make in calculators.items():
                before = limit(influence, train, test)
                result = measure(make, influence, train, test, Path(folder))
                best = min(before, limit(influence, train, test))
                size = {"parameters": influence.n_parameters, "n_train": n_train, "n_test": n_test}
                case = {"case": f"EK-FAC scores to Zarr, {name}", **size, **result}
                case |= {"limit_seconds": round(best, 3), "ratio": round(result["seconds"] / best, 2), **about}
                print(json.dumps(case), flush=True)


if __name__ == "__main__":
    main()

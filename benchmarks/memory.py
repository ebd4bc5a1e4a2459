"""Memory that is promised and kept: python benchmarks/memory.py [--growth].

For each case one line of JSON: the limit, the projected and the measured peak of a worker's resident memory above what
it takes after its imports, in MiB; what is larger than the limit, and by how much. ``kept`` says whether measured <=
projected <= limit for every task. Each case runs in a process of its own (sequential), or on two fresh workers (dask),
so that nothing of another case is counted or reused.

With --growth: the time of a run with 10,000 to 320,000 training samples, and the exponent of a power law fitted to
it; one is linear. CPU seconds, of one process.
"""

from __future__ import annotations

import copy
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from dask.distributed import Client, LocalCluster
from torch import nn

from outfluence import (
    ArnoldiInfluence,
    DaskInfluenceCalculator,
    Data,
    EkfacInfluence,
    EnsembleInfluence,
    InverseHarmonicMeanInfluence,
    NystroemSketchInfluence,
    ProjectedInfluence,
    SequentialInfluenceCalculator,
    open_history,
)

MIB = 1 << 20

#: Positions of the sequences of some cases: so many that forming a gradient takes fewer numbers than its factors.
POSITIONS = 64
NO_MATRIX = {"matrix": False, "top_k": 50, "bottom_k": 50}
#: By name: features, width of the network, training and test samples, limit in MiB, method, mode, options.
CASES = {
    "data 4x the limit": (8192, 4, 41_000, 20, 320, "arnoldi", "up", {"self_influences": True}),
    "result 8x the limit": (64, 32, 160_000, 4_200, 320, "arnoldi", "up", {}),
    "dense rows": (POSITIONS * 32, 256, 8_000, 400, 640, "harmonic", "up", {"top_k": 20}),
    "factored rows": (256, 512, 6_000, 600, 384, "ekfac", "up", {"top_k": 20, "self_influences": True}),
    "factored rows, no matrix": (64, 64, 40_000, 1_000, 384, "ekfac", "up", NO_MATRIX),
    "formed rows": (POSITIONS * 32, 256, 8_000, 400, 640, "ekfac positions", "up", {"keep_gradients": True}),
    "coordinate rows": (64, 128, 100_000, 1_000, 320, "arnoldi", "up", {"top_k": 20, "keep_gradients": True}),
    "coordinates and identity": (64, 128, 40_000, 500, 384, "nystroem", "up", {"self_influences": True}),
    "coordinates and constants": (256, 512, 6_000, 600, 384, "ekfac tolerance", "up", {"self_influences": True}),
    "projected rows": (256, 512, 20_000, 600, 640, "projected", "up", {"keep_gradients": True}),
    "projected by random signs": (256, 512, 6_000, 600, 640, "projected signs", "up", {"self_influences": True}),
    "three models": (256, 512, 6_000, 600, 384, "ensemble", "up", {"top_k": 20, "self_influences": True}),
    "groups": (64, 64, 40_000, 2_000, 384, "ekfac", "up", {"matrix": False, "groups": True}),
    "perturbation": (784, 32, 2_000, 100, 640, "ekfac", "perturbation", {}),
}


def data(folder, n, features, seed):
    """Files: nothing of the data is in memory before it is read."""
    generator = np.random.default_rng(seed)
    x = np.lib.format.open_memmap(folder / f"x{seed}.npy", "w+", np.float32, (n, features))
    for start in range(0, n, 4096):
        part = x[start : start + 4096]
        part[:] = generator.standard_normal(part.shape, np.float32)
    x.flush()
    del x
    y = torch.from_numpy(generator.integers(0, 10, n))
    return Data.from_arrays(np.load(folder / f"x{seed}.npy", mmap_mode="r"), y, fingerprint=f"{n} {features} {seed}")


class OverPositions(nn.Module):
    """The same network at each position, and the mean of its outputs."""

    def __init__(self, features, width):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(features // POSITIONS, width), nn.Tanh(), nn.Linear(width, 10))

    def forward(self, x):
        """Scores of classes, ``(n, 10)``."""
        return self.layers(x.unflatten(1, (POSITIONS, -1))).mean(1)


def influence(method, features, width):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(features, width), nn.Tanh(), nn.Linear(width, 10))
    if method in ("harmonic", "ekfac positions"):
        model = OverPositions(features, width)
    small = torch.randn(400, features), torch.randint(0, 10, (400,))
    loss, options = nn.functional.cross_entropy, {"second_order_mode": "gauss_newton"}
    return {
        "ekfac": EkfacInfluence(model, True, 1e-3),
        "ekfac tolerance": EkfacInfluence(model, True, 1e-3, tolerance=0.01),
        "arnoldi": ArnoldiInfluence(model, loss, 1e-3, rank=20, tol=1e-2, **options),
        "ekfac positions": EkfacInfluence(model, True, 1e-3),
        "projected": ProjectedInfluence(model, loss, 1e-3),
        "projected signs": ProjectedInfluence(model, loss, 1e-3, projection="rademacher"),
        "ensemble": EnsembleInfluence([EkfacInfluence(copy.deepcopy(model), True, 1e-3) for _ in range(3)]),
        "harmonic": InverseHarmonicMeanInfluence(model, loss, 1e-3),
        "nystroem": NystroemSketchInfluence(model, loss, 1e-3, 20, **options),
    }[method].fit(small)


def measure(name, on_dask, folder):
    features, width, n_train, n_test, limit, method, mode, options = CASES[name]
    train, test = data(folder, n_train, features, 0), data(folder, n_test, features, 1)
    fitted = influence(method, features, width)
    if "groups" in options:
        options = options | {"groups": np.arange(n_test) % 10}
    path, arguments = folder / "store.zarr", {"mode": mode, "memory_limit": limit * MIB, **options}
    start = time.perf_counter()
    if on_dask:
        with (
            LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=":0") as cluster,
            Client(cluster) as client,
        ):
            lazy = DaskInfluenceCalculator(fitted, client).influences(test, train, **arguments)
            lazy.to_zarr(path)
    else:
        lazy = SequentialInfluenceCalculator(fitted).influences(test, train, **arguments)
        lazy.to_zarr(path)
    history = open_history(path)
    kept = (history["peak_bytes"] <= history["projected_bytes"]) & (history["projected_bytes"] <= limit * MIB)
    data_mib = n_train * features * 4 / MIB
    return {
        "case": name,
        "calculator": "dask, 2 workers" if on_dask else "sequential",
        "rows": " + ".join(lazy.plan.work.arrays),
        "data_over_limit": round(data_mib / limit, 1),
        "result_over_limit": round(sum(lazy.plan.work.sizes.values()) / MIB / limit, 1),
        "limit_mib": limit,
        "projected_mib": round(float(history["projected_bytes"].max()) / MIB),
        "measured_mib": round(int(history["peak_bytes"].max()) / MIB),
        "kept": bool(kept.all()),
        "tasks": history.sizes["task"],
        "seconds": round(time.perf_counter() - start, 1),
    }


def growth(folder):
    """CPU seconds of runs with more and more training samples."""
    sizes, seconds = [10_000, 20_000, 40_000, 80_000, 160_000, 320_000], []
    fitted = influence("ekfac", 64, 32)
    test = data(folder, 200, 64, 1)
    everything = data(folder, sizes[-1], 64, 0)
    x, y = everything.rows(slice(0, sizes[-1]))
    calculator = SequentialInfluenceCalculator(fitted)
    for n in [sizes[0], *sizes]:  # the first to warm up
        start = time.process_time()
        part = Data.from_arrays(x[:n].numpy(), y[:n], fingerprint=str(n))
        calculator.influences(test, part, top_k=20, train_chunk=2_000).to_zarr(folder / "growth.zarr", overwrite=True)
        seconds.append(time.process_time() - start)
        shutil.rmtree(folder / "growth.zarr")
    exponent = np.polyfit(np.log(sizes), np.log(seconds[1:]), 1)[0]
    tail = np.polyfit(np.log(sizes[2:]), np.log(seconds[3:]), 1)[0]
    return {
        "case": "growth with n_train",
        "n_train": sizes,
        "cpu_seconds": [round(s, 2) for s in seconds[1:]],
        "exponent": round(float(exponent), 3),
        "exponent_from_40000": round(float(tail), 3),
    }


def main():
    about = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        **{name: importlib.metadata.version(name) for name in ("outfluence", "torch", "dask", "zarr")},
        "python": platform.python_version(),
    }
    if "--case" in sys.argv:  # in a process of its own
        at = sys.argv.index("--case")
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps(measure(sys.argv[at + 1], sys.argv[at + 2] == "dask", Path(folder)) | about), flush=True)
    elif "--growth" in sys.argv:
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps(growth(Path(folder)) | about), flush=True)
    else:
        for name in CASES:
            for where in ("sequential", "dask"):
                subprocess.run([sys.executable, __file__, "--case", name, where], check=True)
        subprocess.run([sys.executable, __file__, "--growth"], check=True)


if __name__ == "__main__":
    main()

"""What a run costs as its sizes grow: python benchmarks/scaling.py [AXIS ...].

For each axis one line of JSON: the sizes, the CPU seconds of EK-FAC from fit to scores on disk (imports and a warm-up
not counted), and the `exponent` of a power law fitted to them; one is linear. For `workers` and `threads` wall seconds,
as these do not save CPU time. What an axis does not change is as in `BASE`.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import platform
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from dask.distributed import Client, LocalCluster
from torch import nn

from outfluence import DaskInfluenceCalculator, EkfacInfluence, SequentialInfluenceCalculator

BASE = {"n_train": 2_000, "n_test": 200, "width": 128, "positions": 1}
#: What each axis changes, and to what.
AXES = {
    "n_train": ("n_train", [2_000, 4_000, 8_000, 16_000]),
    "n_test": ("n_test", [200, 400, 800, 1_600]),
    "parameters": ("width", [128, 192, 272, 400]),
    "positions": ("positions", [8, 16, 32, 64]),
    "workers": ("workers", [1, 2]),
    "threads": ("threads", [1, 2]),
}


class OverPositions(nn.Module):
    """The same network at each position, and the mean of its outputs."""

    def __init__(self, width):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(64, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh())
        self.head = nn.Linear(width, 10)

    def forward(self, x):
        """Scores of classes, ``(n, 10)``."""
        return self.head(self.layers(x)).mean(1)


def run(n_train, n_test, width, positions, folder, workers=0, threads=1):
    """Wall and CPU seconds, and the number of parameters."""
    torch.manual_seed(0)
    torch.set_num_threads(threads)
    train, test = ((torch.randn(n, positions, 64), torch.randint(0, 10, (n,))) for n in (n_train, n_test))
    influence = EkfacInfluence(OverPositions(width), True, 1e-4)
    with contextlib.ExitStack() as stack:
        calculator = SequentialInfluenceCalculator(influence)
        if workers:
            cluster = LocalCluster(n_workers=workers, threads_per_worker=1, dashboard_address=":0")
            client = stack.enter_context(Client(stack.enter_context(cluster)))
            calculator = DaskInfluenceCalculator(influence, client)
        wall, cpu = time.perf_counter(), time.process_time()
        influence.fit(train)
        calculator.influences(test, train).to_zarr(folder / "scores.zarr", overwrite=True)
        return time.perf_counter() - wall, time.process_time() - cpu, influence.n_parameters


def main():
    about = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        **{name: importlib.metadata.version(name) for name in ("outfluence", "torch", "dask", "zarr")},
        "python": platform.python_version(),
    }
    with tempfile.TemporaryDirectory() as folder:
        run(**BASE, folder=Path(folder))  # to warm up
        for axis in sys.argv[1:] or AXES:
            changed, sizes = AXES[axis]
            base = BASE | ({"n_train": 20_000, "n_test": 1_000, "width": 256} if axis in ("workers", "threads") else {})
            runs = [run(**(base | {changed: size}), folder=Path(folder)) for size in sizes]
            if axis == "parameters":
                sizes = [parameters for _, _, parameters in runs]
            which = 0 if axis in ("workers", "threads") else 1
            seconds = [found[which] for found in runs]
            line = {
                "axis": axis,
                "sizes": sizes,
                ("wall_seconds", "cpu_seconds")[which]: [round(s, 2) for s in seconds],
            }
            line["exponent"] = round(float(np.polyfit(np.log(sizes), np.log(seconds), 1)[0]), 2)
            print(json.dumps(line | {"base": base} | about), flush=True)


if __name__ == "__main__":
    main()

"""What `assess` costs beside a full run of a typical size: python benchmarks/assessment.py.

One line of JSON: CPU seconds of fitting EK-FAC for a network of 99,530 parameters and of the scores of 50,000 training
samples on 5,000 test samples, streamed to disk, and those of `assess` with the same model and data; `ratio` is the one
over the other. One thread, in this process. The network has been trained: what the exact scores of the sample take
depends on the curvature.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import tempfile
import time

import torch
import torch.nn.functional as F

from limits import WIDTHS, mlp
from outfluence import EkfacInfluence, SequentialInfluenceCalculator, assess

N_TRAIN, N_TEST, EPOCHS, DAMPING = 50_000, 5_000, 3, 1e-3


def trained():
    """A network that has learnt what another one says of random inputs; and the data."""
    torch.manual_seed(0)
    teacher, model = mlp(*WIDTHS), mlp(*WIDTHS)
    x = torch.randn(N_TRAIN + N_TEST, WIDTHS[0])
    with torch.no_grad():
        y = (10 * teacher(x)).argmax(1)
    optimizer = torch.optim.Adam(model.parameters())
    for _ in range(EPOCHS):
        for some in torch.randperm(N_TRAIN).split(100):
            optimizer.zero_grad()
            F.cross_entropy(model(x[some]), y[some]).backward()
            optimizer.step()
    return model.eval(), (x[:N_TRAIN], y[:N_TRAIN]), (x[N_TRAIN:], y[N_TRAIN:])


def main():
    torch.set_num_threads(1)
    model, train, test = trained()
    influence = EkfacInfluence(model, True, DAMPING)
    seconds = {}
    with tempfile.TemporaryDirectory() as folder:
        start = time.process_time()
        calculator = SequentialInfluenceCalculator(influence.fit(train))
        calculator.influences(test, train).to_zarr(f"{folder}/run.zarr")
        seconds["run"] = time.process_time() - start
    start = time.process_time()
    assessment = assess(influence, test, train)
    seconds["assess"] = time.process_time() - start
    line = {
        "case": "assess beside a run of EK-FAC",
        "parameters": influence.n_parameters,
        "n_train": N_TRAIN,
        "n_test": N_TEST,
        **{f"{what}_cpu_seconds": round(taken, 2) for what, taken in seconds.items()},
        "ratio": round(seconds["assess"] / seconds["run"], 4),
        "residual": assessment.residual,
        "findings": assessment.findings,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        **{name: importlib.metadata.version(name) for name in ("outfluence", "torch")},
        "python": platform.python_version(),
    }
    print(json.dumps(line))


if __name__ == "__main__":
    main()

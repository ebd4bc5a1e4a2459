"""A fit and a run that take some seconds, for the fault tests to kill: python long_job.py STORE [SCHEDULER [SLEEP]]."""

from __future__ import annotations

import sys
import time

import torch
from distributed import Client
from torch import nn

from outfluence import DaskInfluenceCalculator, Data, EkfacInfluence, SequentialInfluenceCalculator


class Slow(nn.Module):
    """A small network that takes its time, so that there is a middle to kill it in."""

    def __init__(self, seconds):
        super().__init__()
        self.seconds = seconds
        self.body = nn.Sequential(nn.Linear(50, 60), nn.ReLU(), nn.Linear(60, 5))

    def forward(self, x):
        time.sleep(self.seconds)
        return self.body(x)


def job(seconds=0.005):
    torch.manual_seed(0)
    model = Slow(seconds)
    train = torch.randn(300, 50), torch.randint(0, 5, (300,))
    test = torch.randn(60, 50), torch.randint(0, 5, (60,))
    return EkfacInfluence(model, True, 1e-2), test, Data.of(train).in_batches(10)


def run(path, client=None, seconds=0.005):
    """Fit into STORE.fit, then influences into STORE."""
    model, test, train = job(seconds)
    threads = torch.get_num_threads()
    torch.set_num_threads(
        1
    )  # processes that Dask starts have another number: the numbers would differ in the last bits
    try:
        calculator = SequentialInfluenceCalculator(model) if client is None else DaskInfluenceCalculator(model, client)
        calculator.fit(train, f"{path}.fit")
        chunk = 10 if seconds < 0.01 else 2  # so many tasks of factors that there is a middle to kill them in
        lazy = calculator.influences(test, train, self_influences=True, top_k=7, test_chunk=chunk, train_chunk=10)
        return lazy.to_zarr(path)
    finally:
        torch.set_num_threads(threads)


if __name__ == "__main__":
    if len(sys.argv) > 2:
        with Client(sys.argv[2], set_as_default=False, timeout=60) as the_client:
            run(sys.argv[1], the_client, *map(float, sys.argv[3:]))
    else:
        run(sys.argv[1])

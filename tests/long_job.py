"""A run that takes some seconds, for the fault tests to kill: python long_job.py STORE [SCHEDULER]."""

from __future__ import annotations

import sys
import time

import torch
from distributed import Client
from torch import nn

from outfluence import DaskInfluenceCalculator, EkfacInfluence, SequentialInfluenceCalculator


class Slow(nn.Module):
    """A small network that takes its time, so that there is a middle to kill it in."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(50, 60), nn.ReLU(), nn.Linear(60, 5))

    def forward(self, x):
        time.sleep(0.02)
        return self.body(x)


def job():
    torch.manual_seed(0)
    model = Slow()
    train = torch.randn(600, 50), torch.randint(0, 5, (600,))
    test = torch.randn(70, 50), torch.randint(0, 5, (70,))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # processes that Dask starts have another number: the fits would differ in the last bits
    influence = EkfacInfluence(model, True, 1e-2).fit(train)
    torch.set_num_threads(threads)
    return influence, test, train


def run(path, client=None):
    model, test, train = job()
    calculator = SequentialInfluenceCalculator(model) if client is None else DaskInfluenceCalculator(model, client)
    lazy = calculator.influences(test, train, self_influences=True, test_chunk=10, train_chunk=10)
    return lazy.to_zarr(path)


if __name__ == "__main__":
    if len(sys.argv) > 2:
        with Client(sys.argv[2], set_as_default=False) as the_client:
            run(sys.argv[1], the_client)
    else:
        run(sys.argv[1])

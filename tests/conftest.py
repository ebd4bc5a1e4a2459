"""Fixtures: small problems of every shape, and one Dask cluster for all tests."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from distributed import Client, LocalCluster
from hypothesis import settings

sys.path.insert(0, str(Path(__file__).parent))

from cases import CASES, make_case

# Small problems: threads would only get into each other's way, and into that of the cluster.
torch.set_num_threads(1)

settings.register_profile("outfluence", deadline=None)  # timed assertions do not belong in tests
settings.load_profile("outfluence")


@pytest.fixture(autouse=True)
def _own_randomness():
    """Each test starts from the same seed and leaves torch's generator as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


@pytest.fixture(params=sorted(CASES))
def case(request):
    return make_case(request.param)


@pytest.fixture(scope="session")
def client():
    with (
        LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=":0") as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        yield client

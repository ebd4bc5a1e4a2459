"""Killed twenty times at random moments, in each stage: client, worker or scheduler. Slow: python -m pytest -m slow."""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from distributed import Client

from long_job import run
from outfluence import Store

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).parent / "long_job.py"
KILLS, SLEEP = 20, 0.05


class Cluster:
    """A scheduler and two workers with nannies, as a batch system would start them, and a client."""

    def __init__(self, folder):
        self.folder = folder
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.address = f"tcp://127.0.0.1:{free.getsockname()[1]}"
        self.environment = {k: v for k, v in os.environ.items() if not k.endswith("_NUM_THREADS")}
        self.processes = {}

    def start(self, name, *command):
        with (self.folder / f"{name}.log").open("a") as log:
            environment = self.environment | {"DASK_DISTRIBUTED__COMM__TIMEOUTS__CONNECT": "10s"}
            self.processes[name] = subprocess.Popen(
                [sys.executable, *command], env=environment, stdout=log, stderr=log, start_new_session=True
            )

    def start_missing(self):
        """Start again whatever is not there."""
        if not self.runs("scheduler"):
            for i in range(2):  # they would wait for the old one
                self.kill(f"worker{i}")
            port = self.address.rpartition(":")[2]
            module = ("-m", "distributed.cli.dask_scheduler")
            self.start("scheduler", *module, "--host", "127.0.0.1", "--port", port, "--dashboard-address", ":0")
        for i in range(2):
            if not self.runs(f"worker{i}"):
                module, options = ("-m", "distributed.cli.dask_worker"), ("--nthreads", "1", "--no-dashboard")
                folder = ("--local-directory", str(self.folder))
                self.start(f"worker{i}", *module, self.address, *options, *folder)

    def start_client(self, path):
        self.start("client", str(SCRIPT), str(path), self.address, str(SLEEP))

    def runs(self, name):
        return name in self.processes and self.processes[name].poll() is None

    def kill(self, name):
        """SIGKILL, with all that it started; of a worker only the process that computes: its nanny starts another."""
        if not self.runs(name):
            return
        process = psutil.Process(self.processes[name].pid)
        children = process.children(recursive=True)
        for victim in [process, *children]:
            victim.send_signal(signal.SIGKILL)
        self.processes[name].wait()

    def kill_computing(self, name):
        for child in psutil.Process(self.processes[name].pid).children(recursive=True):
            if "spawn_main" in " ".join(child.cmdline()):
                child.send_signal(signal.SIGKILL)
                return True
        return False

    def close(self):
        for name in list(self.processes):
            self.kill(name)


def receipts(path):
    folders = [Path(path) / "receipts", Path(f"{path}.fit") / "receipts"]
    return {file: file.stat().st_mtime_ns for folder in folders for file in folder.glob("[!.]*[0-9].json")}


def n_of(path, stage):
    store = Path(f"{path}.fit") if stage == "fit" else path
    try:
        return len(list((store / "receipts").glob(f"{stage}-*[0-9].json")))
    except FileNotFoundError:
        return 0


def is_done(path, stage):
    if stage == "fit":
        return (Path(f"{path}.fit") / "receipts" / "inverse-00000000.json").exists()
    return path.exists() and n_of(path, stage) == dict(Store(path).about["tasks"])[stage]


@pytest.mark.parametrize("victim", ["client", "worker", "scheduler"])
@pytest.mark.parametrize("stage", ["fit", "factors", "scores"])
def test_killed_at_twenty_random_moments(stage, victim, tmp_path):
    randomly = random.Random(f"{stage} {victim}")
    cluster = Cluster(tmp_path)
    runs, kills, seen = [], 0, {}
    try:
        while kills < KILLS or not is_done(runs[-1], "scores"):
            if not runs or is_done(runs[-1], stage):  # this one has no more of the stage to be disturbed in
                if runs:
                    finish(cluster, runs[-1])
                if kills >= KILLS:
                    break
                runs.append(tmp_path / f"{len(runs)}.zarr")
            path = runs[-1]
            cluster.start_missing()
            if not cluster.runs("client"):
                cluster.start_client(path)
            before, end = n_of(path, stage), time.monotonic() + 120
            while n_of(path, stage) <= before and not is_done(path, stage):
                assert time.monotonic() < end, (tmp_path / "client.log").read_text()[-3000:]
                if not cluster.runs("client") and not is_done(path, stage):  # it has noticed a kill, and ended
                    cluster.start_client(path)
                time.sleep(0.005)
            time.sleep(randomly.uniform(0, 0.5))
            if is_done(path, stage):
                continue
            seen |= receipts(path)
            if victim == "worker":
                kills += cluster.kill_computing(f"worker{randomly.randrange(2)}")
            else:
                cluster.kill(victim)
                kills += 1
        finish(cluster, runs[-1])
        undisturbed = tmp_path / "undisturbed.zarr"
        finish(cluster, undisturbed)
        with Client(cluster.address, set_as_default=False) as client:
            expected = run(undisturbed, client, SLEEP).load()
            for path in runs:
                found = run(path, client, SLEEP).load()  # finished: it is opened only
                assert found.drop_attrs().identical(expected.drop_attrs())
    finally:
        cluster.close()
    assert kills >= KILLS
    after = {file: stamp for path in runs for file, stamp in receipts(path).items()}
    assert seen.items() <= after.items()  # what had a receipt was not done again


def finish(cluster, path):
    """Let a run come to its end."""
    end = time.monotonic() + 300
    while not (is_done(path, "strongest") and not cluster.runs("client")):
        assert time.monotonic() < end, (cluster.folder / "client.log").read_text()[-3000:]
        cluster.start_missing()
        if not cluster.runs("client"):
            cluster.start_client(path)
        time.sleep(0.05)

"""Kill it in the middle, with SIGKILL: what is finished stays, what is missing follows, to the bit."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from distributed import Client, LocalCluster

from long_job import run
from outfluence import Store

SCRIPT = Path(__file__).parent / "long_job.py"


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it took too long"
        time.sleep(0.01)


def n_done(path, stage):
    return len(Store(path).done(stage)) if path.exists() else 0


def stamps(path):
    """When each receipt was left. A task that is done again leaves it again."""
    return {file.name: file.stat().st_mtime_ns for file in (path / "receipts").glob("[!.]*.json")}


@pytest.fixture(scope="module")
def cluster():
    with LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=":0") as cluster:
        yield cluster


@pytest.fixture(scope="module")
def whole(cluster, tmp_path_factory):
    """What undisturbed runs give: in this process, and on the cluster."""
    folder = tmp_path_factory.mktemp("whole")
    with Client(cluster, set_as_default=False) as client:
        return {False: run(folder / "here.zarr").load(), True: run(folder / "there.zarr", client).load()}


@pytest.fixture
def fresh_client(cluster):
    with Client(cluster, set_as_default=False) as client:
        wait_for(lambda: len(client.nthreads()) == 2)
        yield client


def start(*arguments, **options):
    # Dask leaves OMP_NUM_THREADS=1 and the like in the environment: start as this process was started.
    environment = {name: value for name, value in os.environ.items() if not name.endswith("_NUM_THREADS")}
    return subprocess.Popen([sys.executable, str(SCRIPT), *map(str, arguments)], env=environment, **options)


def killed_in_the_middle(arguments, path, stage):
    process = start(*arguments)
    try:
        wait_for(lambda: n_done(path, stage) >= 3 or process.poll() is not None)
        process.send_signal(signal.SIGKILL)
    finally:
        process.kill()
        process.wait()
    store = Store(path)
    assert not store.is_complete
    return stamps(path)


@pytest.mark.parametrize("stage", ["factors", "scores"])
def test_a_killed_process_is_continued(tmp_path, whole, stage):
    undisturbed = whole[False]
    path = tmp_path / "killed.zarr"
    before = killed_in_the_middle([path], path, stage)
    assert len(before) >= 3
    again = run(path).load()
    assert again.drop_attrs().identical(undisturbed.drop_attrs())
    after = stamps(path)
    assert {name: after[name] for name in before} == before
    assert len(after) == 6 + 30 + 1  # the strongest are merged by one task


@pytest.mark.parametrize("on_dask", [False, True])
def test_a_process_that_is_told_to_end_says_how_to_go_on(on_dask, cluster, fresh_client, whole, tmp_path):
    """SIGTERM is what batch systems send when the time is up."""
    path = tmp_path / "ended.zarr"
    client = fresh_client if on_dask else None
    process = start(path, *([cluster.scheduler_address] if on_dask else []), stderr=subprocess.PIPE)
    try:
        wait_for(lambda: n_done(path, "scores") >= 3)
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    assert process.returncode != 0
    assert b"Interrupted: interrupted; what was computed is stored in" in said
    assert b"The same call again goes on from there." in said
    wait_for(lambda: not any(fresh_client.processing().values()))
    before = stamps(path)
    again = run(path, client).load()
    assert again.drop_attrs().identical(whole[on_dask].drop_attrs())
    assert before.items() <= stamps(path).items()


def test_a_killed_client_is_continued(cluster, fresh_client, whole, tmp_path):
    undisturbed = whole[True]
    path = tmp_path / "killed.zarr"
    before = killed_in_the_middle([path, cluster.scheduler_address], path, "scores")
    # Tasks that were running when the client died may finish on the surviving workers; then nothing moves any more.
    wait_for(lambda: not any(fresh_client.processing().values()))
    before |= stamps(path)
    again = run(path, fresh_client).load()
    assert again.drop_attrs().identical(undisturbed.drop_attrs())
    after = stamps(path)
    assert {name: after[name] for name in before} == before


def test_a_killed_worker_takes_nothing_with_it(cluster, fresh_client, whole, tmp_path):
    undisturbed = whole[True]
    path = tmp_path / "killed.zarr"
    process = start(path, cluster.scheduler_address)
    try:
        wait_for(lambda: n_done(path, "scores") >= 3)
        victim = next(iter(fresh_client.run(os.getpid).values()))
        os.kill(victim, signal.SIGKILL)
        before = stamps(path)
        assert not Store(path).is_complete
        assert process.wait(timeout=120) == 0  # the same run goes on by itself
    finally:
        process.kill()
        process.wait()
    assert Store(path).is_complete
    result = run(path, fresh_client).load()
    assert result.drop_attrs().identical(undisturbed.drop_attrs())
    after = stamps(path)
    assert {name: after[name] for name in before} == before
    workers = {r["worker"] for r in Store(path).receipts("scores")}
    assert len(workers) >= 2

"""Executors: one outcome for each task, whatever becomes of workers, scheduler and tasks."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from functools import partial

import dask
import pytest
from distributed import Client, LocalCluster
from distributed.core import Status

from outfluence import executors
from outfluence.errors import ClusterError
from outfluence.executors import KILLED, DaskExecutor, SequentialExecutor


@pytest.fixture(params=["sequential", "dask"])
def executor(request):
    if request.param == "sequential":
        return SequentialExecutor()
    return DaskExecutor(request.getfixturevalue("client"))


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(executors, "_LOOK", 0.1)
    return monkeypatch


@contextmanager
def own_cluster(allowed_failures=0, **options):
    """A cluster to kill things in."""
    with (
        dask.config.set({"distributed.scheduler.allowed-failures": allowed_failures}),
        LocalCluster(threads_per_worker=1, dashboard_address=":0", **{"n_workers": 2, **options}) as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        yield cluster, client


def wait_for(condition, seconds=30):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it took too long"
        time.sleep(0.02)


def receipts(outcomes):
    """Receipts by task; each task once, and none with an error."""
    outcomes = list(outcomes)
    assert [outcome.error for outcome in outcomes] == [None] * len(outcomes)
    result = {outcome.task: outcome.receipt for outcome in outcomes}
    assert len(result) == len(outcomes)
    return result


# Tasks. Those with a folder leave a file each time they begin.


def begun(folder, task):
    return sorted(folder.glob(f"{task}-*"))


def begin(folder, task, attempt):
    (folder / f"{task}-{attempt}-{time.time_ns()}").touch()


def plain(task, attempt):
    return {"task": task, "attempt": attempt, "pid": os.getpid()}


def fails(times, task, attempt):
    if task == 3 and attempt < times:
        raise ValueError(f"attempt {attempt} of {task}")
    return plain(task, attempt)


def noted(folder, seconds, task, attempt):
    begin(folder, task, attempt)
    time.sleep(seconds)
    return plain(task, attempt)


def dies(folder, times, task, attempt):
    """Task 2 kills the worker, the first times that it begins."""
    begin(folder, task, attempt)
    if task == 2 and len(begun(folder, task)) <= times:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(0.05)
    return plain(task, attempt)


def slow_at_first(folder, task, attempt):
    begin(folder, task, attempt)
    time.sleep(20 if task == 5 and len(begun(folder, task)) == 1 else 0.05)
    return plain(task, attempt)


def interrupted(task, attempt):
    raise KeyboardInterrupt


# Outcomes


def test_one_outcome_for_each_task(executor):
    assert {task: r["attempt"] for task, r in receipts(executor.run(plain, range(20), "t")).items()} == dict.fromkeys(
        range(20), 0
    )
    assert list(executor.run(plain, [], "t")) == []


def test_more_tasks_than_a_wave(client, monkeypatch):
    monkeypatch.setattr(executors, "_WAVE", 8)
    monkeypatch.setattr(executors, "_BATCH", 3)
    handed_in = []
    real_map = client.map
    monkeypatch.setattr(
        client, "map", lambda f, tasks, *a, **k: handed_in.append(len(tasks)) or real_map(f, tasks, *a, **k)
    )
    assert receipts(DaskExecutor(client).run(plain, range(50), "t")).keys() == set(range(50))
    assert sum(handed_in) == 50
    assert max(handed_in) == 8
    assert len(handed_in) > 50 / 8


def test_the_next_wave_does_not_wait_for_the_last_of_a_wave(client, monkeypatch, tmp_path):
    monkeypatch.setattr(executors, "_WAVE", 4)
    others_are_done, order = tmp_path / "done", []
    for outcome in DaskExecutor(client).run(partial(waits_at_zero, others_are_done), range(12), "t"):
        order.append(outcome.task)
        if len(order) == 11:
            others_are_done.touch()
    assert order[-1] == 0
    assert sorted(order) == list(range(12))


def waits_at_zero(file, task, attempt):
    end = time.monotonic() + 60
    while task == 0 and not file.exists() and time.monotonic() < end:
        time.sleep(0.02)
    return plain(task, attempt)


def test_a_task_that_fails_is_repeated_after_the_others(executor):
    outcomes = list(executor.run(partial(fails, 1), range(10), "t"))
    assert {t: r["attempt"] for t, r in receipts(outcomes).items()} == {t: int(t == 3) for t in range(10)}
    assert outcomes[-1].task == 3


def test_a_task_that_fails_twice_is_reported_with_its_second_error(executor):
    outcomes = list(executor.run(partial(fails, 2), range(10), "t"))
    errors = {outcome.task: outcome.error for outcome in outcomes if outcome.error is not None}
    assert errors.keys() == {3}
    assert isinstance(errors[3], ValueError)
    assert str(errors[3]) == "attempt 1 of 3"
    assert receipts(o for o in outcomes if o.task != 3).keys() == set(range(10)) - {3}


def test_interrupts_are_not_swallowed():
    with pytest.raises(KeyboardInterrupt):
        list(SequentialExecutor().run(interrupted, range(2), "t"))


def test_closing_the_iterator_cancels_what_has_not_begun(client, tmp_path, monkeypatch):
    kept, real_map = [], client.map  # futures that nobody keeps are released anyway
    monkeypatch.setattr(client, "map", lambda *a, **k: kept.append(real_map(*a, **k)) or kept[-1])
    run = DaskExecutor(client).run(partial(noted, tmp_path, 0.1), range(100), "closed")
    next(run)
    start = time.monotonic()
    run.close()
    assert time.monotonic() - start < 5
    wait_for(lambda: not any(client.processing().values()))
    n = len(list(tmp_path.iterdir()))
    time.sleep(0.5)
    assert len(list(tmp_path.iterdir())) == n < 20


# Workers


def test_a_killed_worker_is_no_fault_of_the_task(tmp_path):
    with own_cluster(allowed_failures=3) as (_, client):
        done = receipts(DaskExecutor(client).run(partial(dies, tmp_path, 1), range(8), "t"))
    assert done.keys() == set(range(8))
    assert len(begun(tmp_path, 2)) == 2


@pytest.mark.parametrize(("deaths", "attempt"), [(1, 0), (2, KILLED)])
def test_a_task_whose_workers_died_takes_less_memory_in_the_end(tmp_path, deaths, attempt):
    """Not at once: its numbers would be others in the last bits, and a worker may be killed by anything."""
    with own_cluster() as (_, client):
        done = receipts(DaskExecutor(client).run(partial(dies, tmp_path, deaths), range(8), "t"))
    assert done.keys() == set(range(8))
    assert done[2]["attempt"] == attempt


@pytest.mark.parametrize("n_workers", [1, 2])
def test_a_task_that_kills_every_worker_is_reported_and_the_others_finish(tmp_path, n_workers):
    """Also those that were always given to the same worker."""
    with own_cluster(n_workers=n_workers) as (_, client):
        outcomes = list(DaskExecutor(client).run(partial(dies, tmp_path, 1000), range(8), "t"))
    errors = {outcome.task: outcome.error for outcome in outcomes if outcome.error is not None}
    assert errors.keys() == {2}
    assert isinstance(errors[2], ClusterError)
    assert "killed 3 workers while it ran: too little memory?" in str(errors[2])
    assert len(begun(tmp_path, 2)) == 3
    assert receipts(o for o in outcomes if o.task != 2).keys() == set(range(8)) - {2}


def test_a_restarted_cluster_goes_on(tmp_path):
    with own_cluster() as (_, client):
        run = DaskExecutor(client).run(partial(noted, tmp_path, 0.1), range(10), "t")
        first = next(run)
        client.restart()
        assert receipts([first, *run]).keys() == set(range(10))


def test_a_straggler_is_overtaken(client, tmp_path, impatient):
    impatient.setattr(executors, "_STRAGGLER_SECONDS", 0.5)
    start = time.monotonic()
    done = receipts(DaskExecutor(client).run(partial(slow_at_first, tmp_path), range(8), "t"))
    assert time.monotonic() - start < 15
    assert done.keys() == set(range(8))
    assert len(begun(tmp_path, 5)) == 2
    assert all(len(begun(tmp_path, task)) == 1 for task in set(range(8)) - {5})


def test_nothing_is_doubled_while_workers_are_busy(client, tmp_path, impatient):
    impatient.setattr(executors, "_STRAGGLER_SECONDS", 0.2)
    impatient.setattr(executors, "_STRAGGLER_FACTOR", 0.1)
    receipts(DaskExecutor(client).run(partial(noted, tmp_path, 0.5), range(6), "t"))
    assert len(list(tmp_path.iterdir())) == 6


def test_a_run_waits_for_workers(impatient):
    with own_cluster(n_workers=0) as (cluster, client):
        run = DaskExecutor(client).run(plain, range(4), "t")
        impatient.setattr(executors, "_IDLE_SECONDS", 1.0)
        with pytest.raises(ClusterError, match=r"there is no worker, for \d s; 4 task.*the same call goes on"):
            next(run)
        impatient.setattr(executors, "_IDLE_SECONDS", 60.0)
        client.loop.call_later(1.0, cluster.scale, 1)
        assert receipts(DaskExecutor(client).run(plain, range(4), "t")).keys() == set(range(4))


def test_workers_without_memory_are_named(impatient):
    impatient.setattr(executors, "_IDLE_SECONDS", 1.0)
    with own_cluster() as (_, client):
        client.run(pause)
        with pytest.raises(ClusterError, match=r"all 2 worker\(s\) are paused: their memory is full"):
            list(DaskExecutor(client).run(plain, range(4), "t"))
        client.run(resume)
        assert receipts(DaskExecutor(client).run(plain, range(4), "t")).keys() == set(range(4))


def test_a_paused_worker_finishes_what_it_has_begun(impatient, tmp_path):
    impatient.setattr(executors, "_IDLE_SECONDS", 0.5)
    with own_cluster(n_workers=1) as (_, client):
        run = DaskExecutor(client).run(partial(noted, tmp_path, 4), range(1), "t")
        client.loop.call_later(1.0, partial(client.run, pause, asynchronous=True))
        assert receipts(run).keys() == {0}


def pause(dask_worker):
    dask_worker.periodic_callbacks["memory_monitor"].stop()
    dask_worker.status = Status.paused


def resume(dask_worker):
    dask_worker.status = Status.running


# Schedulers


class Processes:
    """A scheduler and a worker as processes of their own."""

    def __init__(self, folder):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = str(free.getsockname()[1])
        self.address = f"tcp://127.0.0.1:{self.port}"
        self.folder = folder
        self.started = []

    def start(self, what, *arguments):
        command = [sys.executable, "-m", f"distributed.cli.dask_{what}", *arguments]
        # Graphs name the functions of this file: the scheduler reads them too.
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        with (self.folder / f"{len(self.started)}.log").open("w") as log:
            self.started.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))
        return self.started[-1]

    def start_scheduler(self):
        return self.start("scheduler", "--host", "127.0.0.1", "--port", self.port, "--dashboard-address", ":0")

    def start_worker(self):
        folder = str(self.folder)
        return self.start("worker", self.address, "--nthreads", "1", "--no-dashboard", "--local-directory", folder)


@pytest.fixture
def processes(tmp_path):
    processes = Processes(tmp_path)
    try:
        processes.scheduler = processes.start_scheduler()
        processes.start_worker()
        yield processes
    finally:
        for process in processes.started:
            process.kill()
            process.wait()


def sleepy(seconds, task, attempt):
    time.sleep(seconds)
    return plain(task, attempt)


def test_a_scheduler_that_is_gone_is_named(processes, impatient):
    impatient.setattr(executors, "_LOST_SECONDS", 2.0)
    with Client(processes.address, set_as_default=False) as client:
        run = DaskExecutor(client).run(partial(sleepy, 0.2), range(100), "t")
        assert next(run).error is None
        processes.scheduler.send_signal(signal.SIGKILL)
        start = time.monotonic()
        with pytest.raises(ClusterError, match=r"the scheduler is gone .* same call with a new client goes on"):
            receipts(run)
        assert time.monotonic() - start < 15


def test_a_scheduler_that_hangs_is_named(processes, impatient):
    impatient.setattr(executors, "_LOST_SECONDS", 1.0)
    impatient.setattr(executors, "_ANSWER_SECONDS", 0.5)
    with Client(processes.address, set_as_default=False) as client:
        run = DaskExecutor(client).run(partial(sleepy, 0.2), range(100), "t")
        assert next(run).error is None
        processes.scheduler.send_signal(signal.SIGSTOP)
        start = time.monotonic()
        with pytest.raises(ClusterError, match="the scheduler is gone"):
            receipts(run)
        assert time.monotonic() - start < 15
        processes.scheduler.send_signal(signal.SIGCONT)


def test_a_scheduler_that_comes_back_is_used_again(processes):
    with Client(processes.address, set_as_default=False) as client:
        run = DaskExecutor(client).run(partial(sleepy, 0.1), range(30), "t")
        first = next(run)
        processes.scheduler.send_signal(signal.SIGKILL)
        processes.scheduler.wait()
        processes.start_scheduler()
        processes.start_worker()
        assert receipts([first, *run]).keys() == set(range(30))


def test_a_closed_client_ends_the_run():
    with own_cluster() as (cluster, _):
        client = Client(cluster, set_as_default=False)
        run = DaskExecutor(client).run(partial(sleepy, 0.1), range(30), "t")
        next(run)
        client.close()
        start = time.monotonic()
        with pytest.raises(ClusterError, match="the scheduler is gone"):
            receipts(run)
        assert time.monotonic() - start < 5

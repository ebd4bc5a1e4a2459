"""Executors: run numbered tasks somewhere and give back their outcomes as they come. They never see data.

A task leaves its results in the store itself; an outcome is a few hundred bytes. A task that fails does not stop the
others.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Protocol
from uuid import uuid4

from distributed import Client, LocalCluster, as_completed, get_client

from outfluence.errors import ClusterError

#: Tasks handed to the scheduler at a time: beyond this, its bookkeeping costs more than it gains.
_WAVE = 10_000


@dataclass(frozen=True)
class Outcome:
    """What became of a task.

    Attributes:
        task: its number.
        receipt: what it left in the store, if it succeeded.
        error: why it did not, else None.
    """

    task: int
    receipt: dict[str, Any] | None
    error: BaseException | None = None


class Executor(Protocol):
    """Runs tasks."""

    def run(self, function: Callable[[int], dict[str, Any]], tasks: Sequence[int], name: str) -> Iterator[Outcome]:
        """Run a function on each task number; yield outcomes in the order in which they come.

        Args:
            function: does the task and returns its receipt.
            tasks: the numbers.
            name: of this kind of task, for dashboards.
        """


class SequentialExecutor:
    """One task after another, in this process."""

    def run(
        self,
        function: Callable[[int], dict[str, Any]],
        tasks: Sequence[int],
        name: str,  # noqa: ARG002
    ) -> Iterator[Outcome]:
        """See `Executor`."""
        for task in tasks:
            try:
                yield Outcome(task, function(task))
            except Exception as error:
                yield Outcome(task, None, error)


class DaskExecutor:
    """Tasks on the workers of a Dask cluster.

    Args:
        client: a `distributed.Client`, not asynchronous.
    """

    def __init__(self, client: Any) -> None:
        self.client = client

    def run(self, function: Callable[[int], dict[str, Any]], tasks: Sequence[int], name: str) -> Iterator[Outcome]:
        """See `Executor`."""
        run = uuid4().hex[:8]
        for start in range(0, len(tasks), _WAVE):
            wave = list(tasks[start : start + _WAVE])
            keys = [f"{name}-{run}-{task}" for task in wave]
            futures = self.client.map(function, wave, key=keys, pure=False, retries=0)
            task_of = dict(zip(keys, wave, strict=True))
            try:
                for future in as_completed(futures, loop=self.client.loop):
                    task = task_of.pop(future.key)
                    if future.status == "finished":
                        yield Outcome(task, future.result())
                    else:
                        error = future.exception() if future.status == "error" else None
                        yield Outcome(task, None, error or ClusterError(f"the task was {future.status}"))
                    future.release()
            finally:  # interrupted: what has not begun shall not
                with suppress(Exception):  # the cluster may be gone
                    self.client.cancel([f for f in futures if not f.done()])
            for task in task_of.values():
                yield Outcome(task, None, ClusterError("the cluster lost the task: was it restarted?"))

    def check(self) -> None:
        """Refuse a cluster that cannot compute safely.

        Raises:
            ClusterError: if workers run several threads, or their versions differ from the client's.
        """
        if getattr(self.client, "asynchronous", False):
            raise ClusterError("the Dask client is asynchronous; pass one made with Client(..., asynchronous=False)")
        threads = {address: n for address, n in self.client.nthreads().items() if n > 1}
        if threads:
            address, n = next(iter(threads.items()))
            raise ClusterError(
                f"{len(threads)} Dask worker(s) run tasks in several threads ({address} in {n}): torch.func and "
                "forward hooks give wrong gradients when threads share a model. Start workers with "
                "threads_per_worker=1 (dask worker --nthreads 1); outfluence gives each worker its share of cores."
            )
        places = [tuple(place) for place in self.client.run(_process).values()]
        if len(set(places)) < len(places):
            raise ClusterError(
                "several Dask workers share one process, and so the model: start them as processes (processes=True)"
            )
        try:
            self.client.get_versions(check=True, packages=["outfluence", "torch"])
        except ValueError as error:
            raise ClusterError(f"client, scheduler and workers run different software: {error}") from error

    def check_path(self, path: str) -> None:
        """Check that every worker sees a file.

        Raises:
            ClusterError: naming a worker that does not.
        """
        blind = [address for address, sees in self.client.run(os.path.exists, path).items() if not sees]
        if blind:
            raise ClusterError(
                f"worker {blind[0]} (and {len(blind) - 1} more) cannot see {path}: workers read inputs and write "
                "results themselves. Call .to_zarr with a path on a file system that all of them share."
            )

    def torch_threads(self) -> int:
        """Threads that torch may use in each worker: the cores of a machine over the workers on it, at least one."""
        found = self.client.run(cores)
        if not found:
            return 1
        hosts = [address.rpartition(":")[0] for address in found]
        shares: list[int] = [n // hosts.count(host) for n, host in zip(found.values(), hosts, strict=True)]
        return max(1, min(shares))

    def memory_limit(self) -> int | None:
        """The smallest memory limit of a worker, in bytes; None if there is none, or no worker yet."""
        workers = self.client.scheduler_info(n_workers=-1)["workers"].values()
        return min((w["memory_limit"] for w in workers if w["memory_limit"]), default=None)

    def forget(self, function: Callable[[], None]) -> None:
        """Run something on every worker, to let go of what it keeps for a run."""
        with suppress(Exception):  # workers that are gone keep nothing
            self.client.run(function)


@contextmanager
def dask_executor(client: Any = None) -> Iterator[DaskExecutor]:
    """An executor on a client, on the current client, or on a local cluster of its own, with a worker a core."""
    client = client or current_client()
    if client is not None:
        yield DaskExecutor(client)
        return
    cluster = LocalCluster(n_workers=cores(), threads_per_worker=1, dashboard_address=":0")
    with cluster, Client(cluster) as own:
        yield DaskExecutor(own)


def current_client() -> Any:
    """The client that is current, or None."""
    try:
        return get_client()
    except ValueError:
        return None


def _process() -> tuple[str, int]:
    return socket.gethostname(), os.getpid()


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

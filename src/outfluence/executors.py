"""Executors: run numbered tasks somewhere and give back their outcomes as they come. They never see data.

A task leaves its results in the store itself; an outcome is a few hundred bytes. A task that fails does not stop the
others, and one that is repeated, or runs twice at a time, does no harm: it writes the same bytes.
"""

from __future__ import annotations

import os
import socket
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from statistics import median
from typing import Any, Protocol
from uuid import uuid4

from distributed import Client, KilledWorker, LocalCluster, get_client
from distributed.client import FutureCancelledError
from distributed.comm import CommClosedError

from outfluence.errors import ClusterError

#: Tasks that the scheduler has at a time: beyond this, its bookkeeping costs more than it gains.
_WAVE = 10_000

#: Results fetched at a time.
_BATCH = 1_000

#: How often a task is handed in before it counts as lost.
_HAND_INS = 3

#: Seconds between two glances at the futures, and between two looks at the cluster.
_GLANCE, _LOOK = 0.1, 1.0

#: So few futures cost little to glance at: more often, then.
_FEW = 200

#: Seconds to wait for an answer of the scheduler; and for the scheduler to come back.
_ANSWER_SECONDS, _LOST_SECONDS = 10.0, 30.0

#: Seconds to wait for a worker that takes tasks.
_IDLE_SECONDS = 120.0

#: A task that runs longer than this many seconds, and than so many times the median, is handed to a second worker.
_STRAGGLER_SECONDS, _STRAGGLER_FACTOR = 30.0, 5.0

#: The last attempt at a task that workers were killed under.
KILLED = 2

#: What a task does: ``function(task, attempt)`` returns its receipt.
Function = Callable[[int, int], dict[str, Any]]


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

    def run(self, function: Function, tasks: Sequence[int], name: str) -> Iterator[Outcome]:
        """Run a function on each task number; yield one outcome each, in the order in which they come.

        A task that raises is repeated once, after the others.

        Args:
            function: does the task and returns its receipt. Its second argument is 0, 1 if the task has failed before,
                or `KILLED` if workers were killed under it, perhaps for their memory: it can work in smaller pieces.
            tasks: the numbers.
            name: of this kind of task, for dashboards.

        Raises:
            ClusterError: if nobody is there to compute, and nobody comes.
        """


class SequentialExecutor:
    """One task after another, in this process."""

    def run(self, function: Function, tasks: Sequence[int], name: str) -> Iterator[Outcome]:  # noqa: ARG002
        """See `Executor`."""
        failed = []
        for task in tasks:
            try:
                receipt = function(task, 0)
            except Exception:
                failed.append(task)
            else:
                yield Outcome(task, receipt)
        for task in failed:
            try:
                outcome = Outcome(task, function(task, 1))
            except Exception as error:
                outcome = Outcome(task, None, error)
            yield outcome


class DaskExecutor:
    """Tasks on the workers of a Dask cluster, which may come and go.

    Args:
        client: a `distributed.Client`, not asynchronous.
    """

    def __init__(self, client: Any) -> None:
        self.client = client

    def run(self, function: Function, tasks: Sequence[int], name: str) -> Iterator[Outcome]:
        """See `Executor`.

        A task that the cluster loses is handed in again. When workers idle because nothing is left to begin, a
        straggler is handed to a second worker, and whoever is first wins.
        """
        return _Run(self.client, function, tasks, name).outcomes()

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
            self.client.run(_leave, function, callback_timeout=_ANSWER_SECONDS)


@dataclass(eq=False)
class _Task:
    """A task on its way: what has happened to it, and the keys of its futures: two if a copy of it runs."""

    number: int
    attempt: int = 0
    hand_ins: int = 0
    failures: int = 0
    losses: int = 0
    killed: int = 0
    keys: set[str] = field(default_factory=set)

    def loss(self) -> ClusterError:
        if self.killed:
            return ClusterError(
                f"the task killed {self.killed} workers while it ran: too little memory? See their logs."
            )
        return ClusterError(f"the cluster lost the task {self.losses} times: was it restarted?")


class _Run:
    """One call of `DaskExecutor.run`.

    The futures are glanced at ten times a second: that costs a fifth of a microsecond each, less than a callback each,
    nothing can be missed, and results are fetched many at a time. The cluster is looked at every second or so.
    """

    def __init__(self, client: Any, function: Function, tasks: Sequence[int], name: str) -> None:
        self.client = client
        self.function = function
        self.name = f"{name}-{uuid4().hex[:8]}"
        self.n_left = len(tasks)
        self.fresh = (_Task(number) for number in tasks)
        self.again = deque[_Task]()
        self.suspects = deque[_Task]()  # to run with nothing beside them: if the worker dies again, it was their fault
        self.out = dict[str, tuple[_Task, Any]]()  # by key: the task and its future
        self.running = dict[str, tuple[str, float]]()  # by key: the worker, and since when it has been seen there
        self.seconds = deque[float](maxlen=1000)  # that the last tasks took; 0 if they were never seen running
        self.lost_since: float | None = None
        self.idle_since: float | None = None

    def outcomes(self) -> Iterator[Outcome]:
        """One for each task."""
        next_look = time.monotonic() + _LOOK
        try:
            while self.n_left:
                self._fill()
                time.sleep(_GLANCE if len(self.out) > _FEW else _GLANCE / 10)
                for outcome in self._collect():
                    self.n_left -= 1
                    yield outcome
                start = time.monotonic()
                if start >= next_look:
                    self._look()
                    now = time.monotonic()
                    next_look = now + max(_LOOK, 20 * (now - start))  # a large cluster is looked at more rarely
        finally:  # interrupted: what has not begun shall not
            self._cancel([future for _, future in self.out.values()])

    def _fill(self) -> None:
        """Hand in more when half of a wave is done, so that no worker waits for the last of a wave."""
        room = _WAVE - len(self.out)
        if room < _WAVE / 2 or self.client.status != "running":
            return
        batch = list(islice(self.fresh, room))
        while self.again and len(batch) < room:
            batch.append(self.again.popleft())
        if self.suspects and not batch and not self.out:
            batch.append(self.suspects.popleft())
        self._hand_in(batch)

    def _hand_in(self, batch: list[_Task], workers: list[str] | None = None) -> None:
        if not batch:
            return
        keys = [f"{self.name}-{t.number}" + (f"-{t.hand_ins}" if t.hand_ins else "") for t in batch]
        numbers, attempts = [t.number for t in batch], [t.attempt for t in batch]
        try:
            futures = self.client.map(
                self.function, numbers, attempts, key=keys, pure=False, retries=0, workers=workers
            )
        except Exception:
            if self.client.status == "running":
                raise
            self.again.extend(t for t in batch if not t.keys)  # it has just gone: the next look says so
            return
        for task, key, future in zip(batch, keys, futures, strict=True):
            task.hand_ins += 1
            task.keys.add(key)
            self.out[key] = task, future

    def _collect(self) -> Iterator[Outcome]:
        """The outcomes that are there."""
        # "lost" is not the end: the result went with its worker, and the scheduler has the task done again.
        ended = [key for key, (_, future) in self.out.items() if future.status not in ("pending", "lost")]
        finished = [key for key in ended if self.out[key][1].status == "finished"]
        for key, receipt in self._fetch(finished[:_BATCH]).items():
            if key in self.out and receipt is not None:  # else its copy was first, or it was lost on the way
                yield self._succeeded(key, receipt)
        for key in set(ended).difference(finished):
            if key in self.out and (outcome := self._failed(key)) is not None:
                yield outcome

    def _fetch(self, keys: list[str]) -> dict[str, Any]:
        if not keys:
            return {}
        gather = partial(self.client.gather, {k: self.out[k][1] for k in keys}, errors="skip", asynchronous=True)
        return self._ask(lambda: self.client.sync(gather, callback_timeout=_ANSWER_SECONDS)) or {}

    def _succeeded(self, key: str, receipt: dict[str, Any]) -> Outcome:
        task, _ = self.out[key]
        seen = self.running.pop(key, None)
        self.seconds.append(time.monotonic() - seen[1] if seen else 0.0)
        futures = {k: self.out.pop(k)[1] for k in task.keys}
        del futures[key]
        if futures:
            self._cancel(list(futures.values()))
        return Outcome(task.number, receipt)

    def _failed(self, key: str) -> Outcome | None:
        """What becomes of a task whose future came to no result: None if it has another chance."""
        task, future = self.out.pop(key)
        task.keys.remove(key)
        self.running.pop(key, None)
        error = self._ask(lambda: future.exception(timeout=_ANSWER_SECONDS)) if future.status == "error" else None
        if isinstance(error, KilledWorker):
            task.killed += error.allowed_failures + 1
        if task.keys:  # its copy still runs
            return None
        if error is None or isinstance(error, KilledWorker | FutureCancelledError | CommClosedError):
            task.losses += 1
            if task.losses >= _HAND_INS:
                return Outcome(task.number, None, task.loss())
            if task.losses == _HAND_INS - 1 and task.killed:
                # Not before: in smaller pieces the last bits are others, and workers die of other things, too.
                task.attempt = KILLED
                self.suspects.append(task)
            else:
                self.again.append(task)
            return None
        task.failures += 1
        if task.failures > 1:
            return Outcome(task.number, None, error)
        task.attempt = max(task.attempt, 1)
        self.again.append(task)
        return None

    def _look(self) -> None:
        """See whether the cluster is there, whether it works, and who is late.

        Raises:
            ClusterError: if it is not, or does not.
        """
        scheduler = self.client.scheduler  # asked itself: the client's own methods would wait without end
        answers = partial(self.client.sync, callback_timeout=_ANSWER_SECONDS)
        processing = self._ask(lambda: answers(scheduler.processing, workers=None))
        identity = self._ask(lambda: answers(scheduler.identity, n_workers=-1))
        if processing is None or identity is None:
            return
        self.lost_since = None
        self._mind_idleness(identity["workers"].values())
        self._mind_stragglers(processing)

    def _ask(self, question: Callable[[], Any]) -> Any:
        """What the cluster answers, or None if it does not.

        Raises:
            ClusterError: if the scheduler has not answered for too long.
        """
        start = time.monotonic()
        if self.client.status == "running":
            try:
                return question()
            except Exception as error:
                if self.client.status == "running" and not isinstance(error, OSError):
                    raise
        self.lost_since = self.lost_since or start
        closed = self.client.status in ("closing", "closed")
        if closed or time.monotonic() - self.lost_since > _LOST_SECONDS:
            raise ClusterError(
                f"the scheduler is gone (the client is {self.client.status}); {self.n_left} task(s) of {self.name} are "
                "missing. What is finished is stored: the same call with a new client goes on from there."
            )
        return None

    def _mind_idleness(self, workers: Any) -> None:
        """Wait for workers, or for their memory, but not for ever.

        A paused worker may be at work: what it has begun it finishes.
        """
        counts = [w.get("metrics", {}).get("task_counts", {}) for w in workers]
        if any(w["status"] != "paused" or n.get("executing") for w, n in zip(workers, counts, strict=True)):
            self.idle_since = None
            return
        now = time.monotonic()
        self.idle_since = self.idle_since or now
        if now - self.idle_since > _IDLE_SECONDS:
            seen = f"all {len(workers)} worker(s) are paused: their memory is full" if workers else "there is no worker"
            raise ClusterError(
                f"{seen}, for {now - self.idle_since:.0f} s; {self.n_left} task(s) of {self.name} are missing. What is "
                "finished is stored: the same call goes on from there when there are workers with memory to spare."
            )

    def _mind_stragglers(self, processing: dict[str, list[Any]]) -> None:
        """Hand what takes too long to a second worker, if workers idle and nothing is left to begin."""
        now = time.monotonic()
        # A worker has one thread: it runs the first task that it was given; the others wait.
        heads = {keys[0]: worker for worker, keys in processing.items() if keys and keys[0] in self.out}
        before, self.running = self.running, {}
        for key, worker in heads.items():
            seen = before.get(key)
            self.running[key] = seen if seen and seen[0] == worker else (worker, now)
        if not self.seconds:  # nothing to compare with
            return
        limit = max(_STRAGGLER_SECONDS, _STRAGGLER_FACTOR * median(self.seconds))
        for key, (worker, since) in self.running.items():
            task, _ = self.out[key]
            idle = len(self.out) < len(processing) and not self.again  # a worker at least
            if idle and len(task.keys) == 1 and now - since > limit:
                self._hand_in([task], [other for other in processing if other != worker])

    def _cancel(self, futures: list[Any]) -> None:
        cancel = partial(self.client.cancel, futures, asynchronous=True)
        with suppress(Exception):  # the cluster may be gone
            self.client.sync(cancel, callback_timeout=_ANSWER_SECONDS)


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


def profile_worker(worker: Any, on: bool) -> None:
    """Start or stop the profiler of a worker, if it has one.

    Its records of call stacks grow by some 100 kB a second, for an hour: more than many a plan leaves over.
    """
    for name in ("profile", "profile-cycle"):
        callback = worker.periodic_callbacks.get(name)
        if callback is not None and callback.is_running() != on:
            worker.loop.add_callback(callback.start if on else callback.stop)
    if not on:
        worker.profile_history.clear()
        worker.profile_keys_history.clear()


def _leave(function: Callable[[], None], dask_worker: Any) -> None:
    function()
    profile_worker(dask_worker, True)


def _process() -> tuple[str, int]:
    return socket.gethostname(), os.getpid()


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

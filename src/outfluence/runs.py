"""Where tasks run, with what they need; and how a run is interrupted."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol, Self

import cloudpickle
import torch

from outfluence import fitting, tasks
from outfluence.errors import Interrupted
from outfluence.executors import DaskExecutor, Executor
from outfluence.fingerprint import fingerprint
from outfluence.progress import Bars, ProgressCallback
from outfluence.record import resident_bytes
from outfluence.store import Store
from outfluence.tasks import remote_task


class Ships(Protocol):
    """A frozen dataclass that holds all that its tasks need, with fields ``threads`` and ``baseline_bytes``."""

    def shipped(self, store: Store) -> Self:
        """As workers can read it: data that lives in memory only are put into the store."""

    def arrived(self, baseline_bytes: int) -> Self:
        """In a worker, whose process took so many bytes before."""


#: Makes of a function of a job, and what is common to its tasks, a function of a task's number and the attempt.
Do = Callable[..., Callable[[int, int], dict[str, Any]]]


@contextmanager
def workplace(job: Ships, executor: Executor, store: Store, callback: ProgressCallback | None) -> Iterator[Do]:
    """Everything that tasks need, where they run; and order left behind."""
    # The last bits of a matrix product may depend on the number of threads: go on with as many as were begun with.
    begun_with, threads_before = store.read_json("threads.json") or store.any_receipt(), torch.get_num_threads()
    if begun_with is not None:
        threads = begun_with["threads"]
    else:
        threads = executor.torch_threads() if isinstance(executor, DaskExecutor) else threads_before
    store.put_json("threads.json", {"threads": threads})
    try:
        if isinstance(executor, DaskExecutor):
            recipe = _ship(job, threads, store)
            executor.check_path(str(recipe))
            yield partial(_remotely, str(recipe))
        else:
            torch.set_num_threads(threads)
            yield partial(here, _with(job, baseline_bytes=resident_bytes()))
    finally:
        forget_all()
        if isinstance(executor, DaskExecutor):
            executor.forget(forget_all)
        torch.set_num_threads(threads_before)
        if isinstance(callback, Bars):
            callback.close()


def _remotely(recipe: str, function: Callable[..., Any], **options: Any) -> Callable[[int, int], Any]:
    return partial(remote_task, recipe, partial(function, **options))


def here(job: Ships, function: Callable[..., Any], **options: Any) -> Callable[[int, int], Any]:
    """A function of a task's number and the attempt, in this process."""
    return lambda task, attempt: function(job, **options, task=task, attempt=attempt)


def forget_all() -> None:
    """Let go of what this process keeps between tasks."""
    tasks.forget()
    fitting.forget()


@contextmanager
def resumable(store: Store) -> Iterator[None]:
    """Say how to go on when the run is interrupted, or its process told to end (batch systems do before they kill)."""
    handles = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, _interrupt) if handles else None
    try:
        yield
    except KeyboardInterrupt as error:
        done = ", ".join(f"{name} {n:,} of {total:,}" for name, (n, total) in store.progress().items())
        raise Interrupted(
            f"interrupted; what was computed is stored in {store.path} (tasks done: {done}). The same call again goes "
            "on from there."
        ) from error
    finally:
        if handles:
            signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


def _interrupt(_number: int, _frame: Any) -> None:
    raise KeyboardInterrupt


def _ship(job: Ships, threads: int, store: Store) -> Path:
    """Write the recipe of a job, and first the data that lives in memory only."""
    content = cloudpickle.dumps(_with(job.shipped(store), threads=threads))
    # Another name for each: a task of a client that was killed may still be under way, and must not read a later one.
    name = f"{fingerprint(content)[:16]}.pkl"
    file = store.put_file(f"recipe/{name}", content)
    store.drop_files("recipe", keep=name)
    return file


def _with(job: Ships, **fields: Any) -> Ships:
    changed: Ships = replace(job, **fields)  # type: ignore[type-var]
    return changed

"""What a task did, and how much memory its process took."""

from __future__ import annotations

import ctypes
import datetime
import os
import resource
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

from outfluence.errors import StoreError
from outfluence.machine import keep_memory
from outfluence.store import Store


class Record:
    """What a task did: what it wrote, where the time went, and how much memory its process took.

    Args:
        store: where it reads and writes.
        baseline_bytes: what the process took before.
        task: stage and number of the task.

    Attributes:
        missing: ranges of test samples that had no factors.
    """

    def __init__(self, store: Store, baseline_bytes: int = 0, task: tuple[str, int] | None = None) -> None:
        self._task = task
        self.missing: list[list[int]] = []
        self._store = store
        self._written: list[dict[str, Any]] = []
        self._bytes_read = 0
        self._seconds: dict[str, float] = {}
        self._start, self._started = time.perf_counter(), _now()
        self._baseline_bytes = baseline_bytes
        _give_back()
        with suppress(OSError):  # Linux: the peak of this task, not of the process since it began
            Path("/proc/self/clear_refs").write_text("5")

    @contextmanager
    def __call__(self, what: str) -> Iterator[None]:
        """Time a part."""
        start = time.perf_counter()
        yield
        self._seconds[what] = self._seconds.get(what, 0.0) + time.perf_counter() - start

    def each(self, what: str, things: Iterator[Any]) -> Iterator[Any]:
        """Time each step of an iterator."""
        while True:
            with self(what):
                thing = next(things, self)
            if thing is self:
                return
            yield thing

    def write(self, path: str, region: tuple[slice, ...], block: np.ndarray) -> None:
        """See `Store.write`.

        Raises:
            StoreError: if this is a part only, and another run has done the whole.
        """
        if self.missing and self._task is not None and self._store.receipt(*self._task) is not None:
            raise StoreError(f"task {self._task[1]} of {self._task[0]!r} has been done by another run")
        with self("write"):
            self._written.append(self._store.write(path, region, block))

    def read(self, path: str, region: tuple[slice, ...]) -> np.ndarray:
        """See `Store.read`."""
        with self(f"read {path.partition('/')[0]}"):
            block = self._store.read(path, region)
        self._bytes_read += block.nbytes
        return block

    def report(self) -> dict[str, Any]:
        """As plain values."""
        return {
            "written": self._written,
            "bytes_written": sum(written["bytes"] for written in self._written),
            "bytes_read": self._bytes_read,
            "started": self._started,
            "finished": _now(),
            "seconds": round(time.perf_counter() - self._start, 6),
            "seconds_by_part": {what: round(seconds, 6) for what, seconds in self._seconds.items()},
            "peak_bytes": max(0, _peak_bytes() - self._baseline_bytes),
            "threads": torch.get_num_threads(),
            "worker": f"{socket.gethostname()}:{os.getpid()}",
        }


def resident_bytes() -> int:
    """Memory that this process takes now, and has a use for."""
    _give_back()
    return int(psutil.Process().memory_info().rss)


def _peak_bytes() -> int:
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM"):
                return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _give_back() -> None:
    """Return freed memory to the system, where the C library keeps it (glibc): it would count for the next task."""
    keep_memory()
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")

"""How far a run is: events as tasks finish, for a callback. `Bars` is one such callback."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Any

from dask.utils import format_bytes
from tqdm.auto import tqdm


@dataclass(frozen=True)
class Progress:
    """How far a stage is. There is one when it begins, and one for each task that comes back.

    What was done before this run began counts as done, and for no rate: a run that goes on is not faster for it.

    Attributes:
        stage: its name.
        n_tasks: its tasks in all.
        tasks_done: those that are done, in this run or before.
        tasks_before: those that were done before.
        failed: tasks that failed in this run.
        n_samples: its samples in all.
        samples_done: those whose task is done, in this run or before.
        samples_before: those whose task was done before.
        samples_failed: those whose task failed in this run.
        bytes_written: what this run has written to the store, in this stage.
        bytes_read: what it has read back from the store, likewise.
        peak_bytes: the largest peak memory of a task of this run and stage.
        seconds: since this run began the stage.
    """

    stage: str
    n_tasks: int
    tasks_done: int
    tasks_before: int
    failed: int
    n_samples: int
    samples_done: int
    samples_before: int
    samples_failed: int
    bytes_written: int
    bytes_read: int
    peak_bytes: int
    seconds: float

    @property
    def samples_per_second(self) -> float:
        """Samples done in this run, per second; 0 while there are none."""
        return self._per_second(self.samples_done - self.samples_before)

    @property
    def bytes_per_second(self) -> float:
        """Bytes written to and read from the store in this run, per second."""
        return self._per_second(self.bytes_written + self.bytes_read)

    @property
    def remaining_seconds(self) -> float | None:
        """How long the stage goes on at the rate of this run; None until a task is done."""
        left = self.n_samples - self.samples_done - self.samples_failed
        if left == 0:
            return 0.0
        rate = self.samples_per_second
        return left / rate if rate else None

    @property
    def is_finished(self) -> bool:
        """Whether no task of this run is left: each is done, or failed."""
        return self.tasks_done + self.failed >= self.n_tasks

    def _per_second(self, n: int) -> float:
        return n / self.seconds if self.seconds else 0.0


ProgressCallback = Callable[[Progress], None]


class Tracker:
    """Counts the tasks of a stage as they come back, and tells a callback. The first event is that the stage begins.

    Args:
        stage: its name.
        n_tasks: its tasks in all.
        n_samples: its samples in all.
        tasks_before: tasks that are done already.
        samples_before: their samples.
        callback: is called in this thread, so it should be quick; what it raises ends the run, which can go on later.

    Attributes:
        progress: the last event.
    """

    def __init__(
        self,
        stage: str,
        n_tasks: int,
        n_samples: int,
        tasks_before: int,
        samples_before: int,
        callback: ProgressCallback | None,
    ) -> None:
        self._callback = callback
        self._start = perf_counter()
        self.progress = Progress(
            stage=stage,
            n_tasks=n_tasks,
            tasks_done=tasks_before,
            tasks_before=tasks_before,
            failed=0,
            n_samples=n_samples,
            samples_done=samples_before,
            samples_before=samples_before,
            samples_failed=0,
            bytes_written=0,
            bytes_read=0,
            peak_bytes=0,
            seconds=0.0,
        )
        self._report()

    def update(self, n_samples: int, receipt: Mapping[str, Any] | None) -> None:
        """A task has come back.

        Args:
            n_samples: how many samples were its own.
            receipt: what it left in the store; None if it failed.
        """
        now = replace(self.progress, seconds=perf_counter() - self._start)
        if receipt is None:
            now = replace(now, failed=now.failed + 1, samples_failed=now.samples_failed + n_samples)
        else:
            now = replace(
                now,
                tasks_done=now.tasks_done + 1,
                samples_done=now.samples_done + n_samples,
                bytes_written=now.bytes_written + receipt["bytes_written"],
                bytes_read=now.bytes_read + receipt.get("bytes_read", 0),  # earlier versions do not say
                peak_bytes=max(now.peak_bytes, receipt["peak_bytes"]),
            )
        self.progress = now
        self._report()

    def _report(self) -> None:
        if self._callback is not None:
            self._callback(self.progress)


class Bars:
    """Draws a bar for each stage, in samples, in a terminal or a notebook."""

    def __init__(self) -> None:
        self._bar: Any = None
        self._failed = 0

    def __call__(self, progress: Progress) -> None:
        """Draw an event."""
        begins = progress.tasks_done == progress.tasks_before and not progress.failed
        if self._bar is None or begins:
            self.close()  # of the stage before, or of a run that was interrupted
            self._failed = 0
            self._bar = tqdm(
                desc=progress.stage,
                total=progress.n_samples,
                initial=progress.samples_before,
                unit=" samples",
                smoothing=0,  # the rate of the whole run: workers come back in bursts
                dynamic_ncols=True,
            )
        self._bar.set_postfix_str(_postfix(progress), refresh=False)
        self._bar.update(progress.samples_done - self._bar.n)  # draws, unless it did a moment ago
        if progress.failed > self._failed:
            self._failed = progress.failed
            self._bar.refresh()
        if progress.is_finished:
            self.close()

    def close(self) -> None:
        """Leave the bar as it is, and go to the next line. Also for runs that end by an exception."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def as_callback(progress: bool | ProgressCallback) -> ProgressCallback | None:
    """What a user says about progress as a callback: bars for True, nothing for False.

    Raises:
        TypeError: if it is neither a bool nor can be called.
    """
    if isinstance(progress, bool):
        return Bars() if progress else None
    if not callable(progress):
        raise TypeError(f"progress must be True, False or a function of a Progress, not {progress!r}")
    return progress


def _postfix(progress: Progress) -> str:
    parts = [f"{format_bytes(int(progress.bytes_per_second))}/s"]
    if progress.peak_bytes:
        parts.append(f"peak {format_bytes(progress.peak_bytes)}")
    if progress.failed:
        parts.append(f"{progress.failed:,} failed")
    return ", ".join(parts)

"""Fit out of core: sums over the data as tasks, wherever an executor runs them, in passes that can be resumed.

A solver fits by sums (`Data.total`), one after another. Here a sum is a pass: tasks add up a range of samples each, and
a tree of tasks adds up their parts. All of it is kept in the store, so a fit that is run again walks through the same
passes, finds those that are done, and goes on where it stopped. A pass is known by its number and by what is summed: if
that differs, in the last bit, it is another pass.
"""

from __future__ import annotations

import io
import pickle
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import cloudpickle
import torch
from dask.utils import format_bytes
from torch import Tensor

from outfluence.data import BATCH_SIZE, Data, Statistic, add_to, tree_leaves
from outfluence.errors import PlanError, RunError, StoreError
from outfluence.executors import Executor
from outfluence.factors import WORKSPACE
from outfluence.fingerprint import fingerprint
from outfluence.jobs import Job, length, raise_failures
from outfluence.machine import float32_products
from outfluence.plan import MIB, RUNTIME_BYTES, Stage
from outfluence.problem import Problem
from outfluence.progress import ProgressCallback, Tracker
from outfluence.record import Record
from outfluence.store import Store

#: Tasks of a pass at most, and at least if there are so many batches; and bytes of all that they leave, about.
_MAX_TASKS, _MIN_TASKS, _PARTS_BYTES = 64, 8, 4 << 30
#: Parts that one task of the tree adds up.
_FAN_IN = 8
#: Copies of what is summed: the sum, that of a batch, and the file; and of what it is made with.
_SUM_COPIES, _INPUT_COPIES = 4, 3


@dataclass(frozen=True)
class Pass:
    """How a sum over all samples is cut.

    Attributes:
        name: its folder; numbers the pass and tells what is summed.
        n_samples: all of them.
        chunk: samples per task, whole batches.
        batch_size: samples at once through the model.
        projected_bytes: peak of a task above the imports.
    """

    name: str
    n_samples: int
    chunk: int
    batch_size: int
    projected_bytes: int

    @property
    def levels(self) -> list[Stage]:
        """The tasks over samples, then those of each level of the tree, whose samples are tasks of the level before."""
        stages = [Stage(f"{self.name}-0", self.n_samples, self.chunk)]
        while stages[-1].n_tasks > 1:
            stages.append(Stage(f"{self.name}-{len(stages)}", stages[-1].n_tasks, _FAN_IN))
        return stages


class Summed(Data):
    """A handle on data whose sums are added up by an executor, and kept in a store.

    Args:
        role: which of the job's inputs the data is.
        job: model, data and store.
        do: makes a function of a task's number of a function of a job.
        executor: who computes.
        memory_limit: bytes a worker may take above its imports.
        callback: is told how far a pass is.
    """

    sums_elsewhere = True

    def __init__(
        self,
        role: str,
        job: Job,
        do: Callable[..., Any],
        executor: Executor,
        memory_limit: int,
        callback: ProgressCallback | None,
    ) -> None:
        data = job.inputs[role]
        super().__init__(data._source, batch_size=data.batch_size, fingerprint=data.fingerprint)
        assert job.store is not None
        self._role = role
        self._job, self._do, self._executor, self._limit, self._callback = job, do, executor, memory_limit, callback
        self._store = Store(job.store)
        self._n_passes = 0

    def total(self, statistic: Statistic, progress: str | None = None) -> dict[str, Tensor]:
        """See `Data.total`.

        Raises:
            PlanError: if the pass does not fit into the memory limit.
            RunError: if tasks failed twice.
        """
        problem = self._job.model.problem
        content = _pickled(statistic, problem.members)
        what = fingerprint(statistic, without=problem.members)
        name = f"fit-{self._n_passes:04d}-{what[:12]}"
        title = f"{progress or 'fit'} (pass {self._n_passes + 1})"
        self._n_passes += 1
        pass_ = self._planned(name, statistic, len(content))
        for _ in range(2 * len(pass_.levels)):  # damage is found level by level
            try:
                sums = self._summed(pass_, content, title)
            except RunError as error:
                if not isinstance(error.__cause__, _DamagedError):
                    raise
            except _DamagedError:
                pass
            else:
                self._store.drop_files(name, keep=_part_name(pass_.levels[-1].name, 0))
                return {key: tensor.to(problem.device) for key, tensor in sums.items()}
        raise StoreError(f"{self._store.path}: parts of the fit are damaged again and again: the disk is not reliable")

    def _summed(self, pass_: Pass, content: bytes, title: str) -> dict[str, Tensor]:
        last = pass_.levels[-1]
        if 0 not in self._store.done(last.name):
            self._store.put_file(f"{pass_.name}/statistic.pkl", content)
            for level, stage in enumerate(pass_.levels):
                self._run(stage, level, pass_, title)
        return _read_parts(self._store, last.name, range(1))

    def _planned(self, name: str, statistic: Statistic, input_bytes: int) -> Pass:
        stored = self._store.read_json(f"{name}.json")
        if stored is not None:
            pass_ = Pass(**stored)
            if pass_.projected_bytes <= self._limit:
                return pass_
            if any(self._store.done(stage.name) for stage in pass_.levels):
                raise PlanError(
                    f"{self._store.path} was begun with batches that need {-(-pass_.projected_bytes // MIB)} MiB a "
                    f"worker, more than the memory_limit now. Raise memory_limit to go on, or choose another path."
                )
        problem, n = self._job.model.problem, len(self)
        sample = self.rows(slice(0, 1))
        sums = statistic(sample, 0)
        sum_bytes = sum(tensor.nbytes for tensor in sums.values())
        sample_bytes = sum(leaf.nbytes for leaf in tree_leaves(sample.x) + tree_leaves(sample.y))
        activations, gradients, factors = getattr(statistic, "copies", (4, 3, 3))
        per_sample = activations * problem.activation_bytes(sample, twice=not factors) + 4 * sample_bytes
        per_sample += gradients * problem.n_parameters * torch.finfo(problem.dtype).bits // 8
        per_sample += factors * problem.factor_bytes(sample)
        fixed = RUNTIME_BYTES + (WORKSPACE if factors else 0) + _SUM_COPIES * sum_bytes + _INPUT_COPIES * input_bytes
        fixed += sum(t.nbytes for t in problem.model.state_dict().values()) + 3 * self.source_rows * sample_bytes
        batch = min(self.batch_size or BATCH_SIZE, n)
        while fixed + batch * per_sample > self._limit:
            if batch == 1:
                raise PlanError(
                    f"a pass of the fit does not fit into memory_limit {format_bytes(self._limit)}: it sums "
                    f"{format_bytes(sum_bytes)}, and takes {format_bytes(per_sample)} for each sample. Set "
                    f"memory_limit to {-(-(fixed + per_sample) // MIB)}MiB or more, or lower the rank, use smaller "
                    "blocks or fewer trainable parameters."
                )
            batch = -(-batch // 2)
        n_batches = -(-n // batch)
        n_tasks = max(_MIN_TASKS, min(_MAX_TASKS, _PARTS_BYTES // max(1, sum_bytes)))
        pass_ = Pass(name, n, batch * -(-n_batches // n_tasks), batch, fixed + batch * per_sample)
        self._store.put_json(f"{name}.json", vars(pass_))
        return pass_

    def _run(self, stage: Stage, level: int, pass_: Pass, title: str) -> None:
        done = self._store.done(stage.name)
        todo = [task for task in range(stage.n_tasks) if task not in done]
        before = stage.n_samples - sum(length(stage.samples(task)) for task in todo)
        callback = self._callback if level == 0 else None  # the tree takes no time
        tracker = Tracker(title, stage.n_tasks, stage.n_samples, len(done), before, callback)
        failures: list[tuple[str, BaseException]] = []
        do = self._do(sum_task, role=self._role, pass_=pass_, level=level)
        for outcome in self._executor.run(do, todo, stage.name):
            samples = stage.samples(outcome.task)
            if outcome.error is not None:
                failures.append((f"{title}, samples {samples.start} to {samples.stop - 1}", outcome.error))
            tracker.update(length(samples), outcome.receipt)
        if failures:
            raise_failures(failures, "fit", len(failures), self._store)


def sum_task(
    job: Job,
    role: str,
    pass_: Pass,
    level: int,
    task: int,
    attempt: int = 0,  # noqa: ARG001
) -> dict[str, Any]:
    """Add up a statistic over the samples of a task, or parts of the level before; leave the receipt."""
    store, stage = Store.reopened(job.store, job.store_id), pass_.levels[level]
    finished = store.receipt(stage.name, task)
    if finished is not None:
        return finished
    record, samples, sums = Record(store, job.baseline_bytes), stage.samples(task), dict[str, Tensor]()
    with torch.enable_grad(), float32_products(job.model.problem.device, job.precision):
        if level == 0:
            statistic = _statistic(job, pass_.name)
            for start, batch in record.each("read", job.inputs[role].enumerate(pass_.batch_size, samples)):
                with record("sum"):
                    add_to(sums, statistic(batch, start))
        else:
            with record("read"):
                sums = _read_parts(store, pass_.levels[level - 1].name, range(samples.start, samples.stop))
    content = io.BytesIO()
    torch.save({name: tensor.detach().cpu().clone() for name, tensor in sums.items()}, content)
    with record("write"):
        store.put_file(f"{pass_.name}/{_part_name(stage.name, task)}", content.getvalue())
    receipt = {
        "stage": stage.name,
        "task": task,
        "start": samples.start,
        "stop": samples.stop,
        "projected_bytes": pass_.projected_bytes,
        **record.report(),
        "bytes_written": content.tell(),
        "crc32": zlib.crc32(content.getvalue()),
    }
    store.leave_receipt(stage.name, task, receipt)
    return receipt


def _part_name(stage: str, task: int) -> str:
    return f"{stage}-{task:05d}.pt"


def _read_parts(store: Store, stage: str, tasks: range) -> dict[str, Tensor]:
    """The sum of what tasks have left.

    Raises:
        _DamagedError: if the file of one is not as it was written; then its receipt is withdrawn.
    """
    sums, damaged = dict[str, Tensor](), []
    for task in tasks:
        receipt = store.receipt(stage, task)
        file = store.work_file(f"{stage.rpartition('-')[0]}/{_part_name(stage, task)}")
        content = file.read_bytes() if file.exists() else b""
        if receipt is None or zlib.crc32(content) != receipt["crc32"]:
            store.withdraw_receipt(stage, task)
            damaged.append(str(file))
        elif not damaged:
            add_to(sums, torch.load(io.BytesIO(content), weights_only=True))
    if damaged:
        raise _DamagedError(f"{', '.join(damaged)}: damaged")
    return sums


class _DamagedError(StoreError):
    """Parts of a sum are not as they were written."""


def _pickled(statistic: Statistic, problems: Sequence[Problem]) -> bytes:
    """A statistic without the problem that it is about, one of these: the worker has it."""

    class Pickler(cloudpickle.Pickler):  # type: ignore[misc]
        def persistent_id(self, thing: Any) -> int | None:
            return next((i for i, problem in enumerate(problems) if thing is problem), None)

    content = io.BytesIO()
    Pickler(content).dump(statistic)
    return content.getvalue()


def _statistic(job: Job, name: str) -> Statistic:
    """What a pass sums up, read once a process."""
    assert job.store is not None
    key = job.store_id, name
    if key not in _LOADED:
        problems = job.model.problem.members

        class Unpickler(pickle.Unpickler):
            def persistent_load(self, pid: Any) -> Any:
                return problems[pid]

        content = Store(job.store).work_file(f"{name}/statistic.pkl").read_bytes()
        _LOADED.clear()  # one pass at a time
        _LOADED[key] = Unpickler(io.BytesIO(content)).load()
    return _LOADED[key]


#: The statistic of the pass that is being computed, by store and pass.
_LOADED: dict[tuple[str, str], Statistic] = {}


def forget() -> None:
    """Let go of what this process keeps between the tasks of a fit."""
    _LOADED.clear()

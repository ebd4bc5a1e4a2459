"""What a run computes: the job and its tasks.

Tasks run in workers: what they need is in the job, which they read from the store; what they make goes into the store.
With `calculators` the only module that knows both halves.
"""

from __future__ import annotations

import ctypes
import datetime
import importlib.metadata
import os
import pickle
import resource
import socket
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from distributed import get_worker
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from outfluence.analysis import first_of
from outfluence.curvature import VECTORS
from outfluence.data import Data, to_numpy, tree_leaves, tree_map
from outfluence.errors import ClusterError, ConvergenceWarning, DataError, StoreError
from outfluence.executors import KILLED, profile_worker
from outfluence.fingerprint import fingerprint
from outfluence.influence import InfluenceModel
from outfluence.modes import InfluenceMode
from outfluence.plan import ACTIVATION_COPIES, Costs, Plan, Work
from outfluence.problem import DIRECTIONS
from outfluence.rows import WORKSPACE, DenseRows, FactoredRows, GradientRows, Rows, check_finite
from outfluence.store import Store

#: Where the arrays of left rows, scores, self-influences, means of groups and right rows are in a store.
FACTORS, SCORES, SELVES, MEANS, GRADIENTS = "factors", "scores", "self_influences", "group_means", "gradients"
#: The strongest scores: names of the arrays of the highest and of the lowest.
TOP, BOTTOM = "top", "bottom"
#: Where strips leave their strongest scores.
CANDIDATES = "work/candidates"

#: Rows of a block of scores that are looked at together where that takes memory.
_ROWS = 64


@dataclass(frozen=True)
class Wanted:
    """What is made of the scores, all in one pass.

    Attributes:
        matrix: all of them.
        top: the highest of each test sample, so many.
        bottom: the lowest.
        self_influences: those of training samples on themselves.
        gradients: the rows of the training samples, for later.
        group_of: for the means over groups of test samples, the number of each one's group; or None.
        group_names: of the groups, in order of their numbers.
    """

    matrix: bool = True
    top: int = 0
    bottom: int = 0
    self_influences: bool = False
    gradients: bool = False
    group_of: np.ndarray | None = None
    group_names: np.ndarray | None = None

    @property
    def n_groups(self) -> int:
        """Number of groups."""
        return 0 if self.group_names is None else len(self.group_names)

    @property
    def strongest(self) -> dict[str, int]:
        """How many of the strongest scores are wanted, of each kind."""
        return {kind: k for kind, k in ((TOP, self.top), (BOTTOM, self.bottom)) if k}

    def identity(self) -> dict[str, Any]:
        """As plain values."""
        groups = None if self.group_of is None else fingerprint((self.group_of, self.group_names.tolist()))  # type: ignore[union-attr]
        names = ("matrix", "top", "bottom", "self_influences", "gradients")
        return {name: getattr(self, name) for name in names} | {"groups": groups}


@dataclass(frozen=True)
class Job:
    """All that a task needs. Workers read it from the store.

    Attributes:
        model: fitted.
        test: whose factors are computed; or
        factors: computed before.
        train: whose gradients are computed; or
        gradients: their rows, kept by another run.
        mode: perturb weights or features.
        wanted: which results.
        plan: how it is cut.
        store: where the results go.
        store_id: of that store.
        threads: that torch is to use; None: as it is.
        baseline_bytes: what the process took before.
        test_gradients: of no test samples: what they consist of; None where there are only factors.
        train_gradients: of no training samples; None where there are only gradients that were kept.
    """

    model: InfluenceModel
    test: Data | None = None
    factors: Data | None = None
    train: Data | None = None
    gradients: Data | None = None
    mode: InfluenceMode = InfluenceMode.Up
    wanted: Wanted = Wanted()
    plan: Plan | None = None
    store: Path | None = None
    store_id: str = ""
    threads: int | None = None
    baseline_bytes: int = 0
    test_gradients: GradientRows | None = None
    train_gradients: GradientRows | None = None

    @property
    def data(self) -> dict[str, Data]:
        """The data by role."""
        roles = {"test": self.test, "factors": self.factors, "train": self.train, "gradients": self.gradients}
        return {role: data for role, data in roles.items() if data is not None}

    @property
    def inputs(self) -> dict[str, Data]:
        """All data that is read: those of `data`, and those of the fit if the inverse reads them."""
        source = self.model.inverse.data if self.model.is_fitted else None
        return self.data | ({} if source is None else {"fit": source})

    @property
    def has_test(self) -> bool:
        """Whether there are test samples."""
        return self.test is not None or self.factors is not None

    def left_rows(self) -> Rows:
        """Left rows of no samples: what arrays they consist of."""
        if self.factors is not None and isinstance(self.factors.rows(slice(0, 1)).x, Tensor):
            return self.model.as_rows(torch.zeros(0, self.model.n_parameters))
        rows: Rows = self.model.inverse.left(self._gradients(self.test_gradients, self.train_gradients))
        return rows

    def right_rows(self) -> Rows:
        """Right rows of no samples."""
        return self.model.right_rows(self._gradients(self.train_gradients, self.test_gradients), self.left_rows())

    def _gradients(self, *known: GradientRows | None) -> GradientRows:
        return next((rows for rows in known if rows is not None), self.model.empty_gradients())

    def in_batches(self, size: int) -> Job:
        """This job with other batches."""
        assert self.plan is not None
        source = self.model.inverse.data
        model = self.model if source is None else self.model.reading(source.in_batches(size))
        return replace(self, model=model, plan=replace(self.plan, batch_size=size))

    def identity(self) -> dict[str, Any]:
        """What the numbers in the store depend on. A store is continued by the same identity only."""
        return {
            **self.model.identity(),
            **{f"{role}_data": data.fingerprint for role, data in self.data.items()},
            "mode": str(self.mode),
            "results": self.wanted.identity(),
            "dtype": numpy_name(self.model.problem.dtype),
            "versions": major_versions(),
        }

    def work(self) -> Work:
        """The sizes of this job."""
        problem, wanted = self.model.problem, self.wanted
        itemsize = torch.finfo(problem.dtype).bits // 8
        n_rows = self.test if self.test is not None else self.factors
        read = self.train if self.train is not None else self.gradients
        sample_of = next(data for data in (read, n_rows) if data is not None)
        sample = sample_of.rows(slice(0, 1))
        perturbation = self.mode is InfluenceMode.Perturbation and self.train is not None
        floats = [leaf for leaf in tree_leaves(sample.x) if leaf.is_floating_point()]
        if perturbation:  # raises where there is nothing to differentiate by
            zeros = torch.zeros(1, problem.n_parameters, dtype=problem.dtype, device=problem.device)
            problem.mixed_derivatives(zeros, *sample)
        hints = [data.batch_size for data in self.inputs.values() if data.batch_size]
        through_model = self.train if self.train is not None else self.test
        activations = 0 if through_model is None else problem.activation_bytes(through_model.rows(slice(0, 1)))
        source = self.model.inverse.data
        kept = (
            len(source) * activations * ACTIVATION_COPIES
            if source and getattr(self.model.solver, "precompute_grad", False)
            else 0
        )
        left, right = self.left_rows(), self.right_rows()
        gradients = self._gradients(self.train_gradients, self.test_gradients)
        is_factored = not all(isinstance(rows, DenseRows) for rows in (left, right, gradients))
        inverse = sum(t.nbytes for t in self.model.inverse.tensors.values())
        if isinstance(left, FactoredRows):
            inverse += sum(weight.nbytes for weight in left.weights.values())
        buffers = sum(b.nbytes for b in self.model.problem.model.buffers())
        return Work(
            n_test=len(n_rows) if n_rows is not None else 0,
            n_train=len(read) if read is not None else 0,
            arrays=_widths(left, itemsize),
            itemsize=itemsize,
            n_parameters=problem.n_parameters,
            right_numbers=sum(_widths(right, itemsize).values()),
            gradient_numbers=sum(_widths(gradients, itemsize).values()),
            factor_bytes=0 if through_model is None else problem.factor_bytes(through_model.rows(slice(0, 1))),
            workspace_bytes=WORKSPACE if is_factored else 0,
            features=tuple(floats[0].shape[1:]) if perturbation else (),
            directions=DIRECTIONS if perturbation else 0,
            self_influences=wanted.self_influences,
            matrix=wanted.matrix and n_rows is not None and read is not None,
            top=wanted.top,
            bottom=wanted.bottom,
            groups=wanted.n_groups,
            keeps_gradients=wanted.gradients,
            reads_gradients=self.gradients is not None,
            source_rows=sample_of.source_rows,
            read_copies=sample_of.read_copies,
            test_bytes=0 if n_rows is None else _bytes_of(n_rows),
            test_rows=1 if n_rows is None else n_rows.source_rows,
            test_copies=2 if n_rows is None else n_rows.read_copies,
            fit_bytes=0 if source is None else _bytes_of(source) * source.source_rows,
            model_bytes=sum(p.nbytes for p in problem.model.parameters()) + buffers + inverse,
            activation_bytes=activations,
            batch_size=min(hints) if hints else None,
            sample_bytes=_bytes_of(sample_of),
            solves=source is not None,
            vectors=VECTORS if source is not None else 0,
            kept_bytes=kept,
        )


def _widths(rows: Rows, itemsize: int) -> dict[str, int]:
    """How many numbers, of so many bytes, each array of a row takes."""
    return {name: array.shape[1] * array.element_size() // itemsize for name, array in rows.arrays.items()}


def _bytes_of(data: Data) -> int:
    """Bytes of one sample."""
    sample = data.rows(slice(0, 1))
    return sum(leaf.nbytes for leaf in tree_leaves(sample.x) + tree_leaves(sample.y))


#: Something done in a worker: with the job, a task's number and which attempt it is; gives a receipt.
Do = Callable[..., dict[str, Any]]


def remote_task(recipe: str, do: Do, task: int, attempt: int = 0) -> dict[str, Any]:
    """Do a task in a Dask worker, with the job that its store keeps.

    Raises:
        ClusterError: if the worker runs other tasks beside this one: it may have joined after the calculator looked.
    """
    worker = get_worker()
    if worker.state.nthreads > 1:
        raise ClusterError(f"worker {worker.address} runs {worker.state.nthreads} threads: start it with --nthreads 1")
    if not _BUSY.acquire(blocking=False):
        raise ClusterError(f"worker {worker.address} shares its process with another: start workers as processes")
    profile_worker(worker, False)
    try:
        return do(job_from(recipe), task=task, attempt=attempt)
    finally:
        _BUSY.release()


#: Held while a task runs: threads that share a model give wrong gradients.
_BUSY = threading.Lock()


@lru_cache(maxsize=1)
def job_from(recipe: str) -> Job:
    """Read a job, once a process."""
    baseline = resident_bytes()  # before the model: the worker may have done other work before
    with Path(recipe).open("rb") as file:
        job: Job = replace(pickle.load(file), baseline_bytes=baseline)
    job.model.assume_unchanged()
    if job.threads is not None:
        torch.set_num_threads(job.threads)
    return job


def forget() -> None:
    """Let go of what this process keeps between the tasks of a run."""
    job_from.cache_clear()
    _held_factors.cache_clear()


def run_task(job: Job, stage: str, missing: Sequence[int], task: int, attempt: int = 0) -> dict[str, Any]:
    """Compute and store one range of samples, and leave the receipt.

    Args:
        job: what is computed.
        stage: of which stage.
        missing: the first sample of each tile of test samples that has no factors.
        task: which task of the stage.
        attempt: `KILLED` if workers were killed while it ran: then in smaller batches. Otherwise an attempt is like any
            other, so that its numbers are the same to the bit.
    """
    assert job.plan is not None
    assert job.store is not None
    store = Store(job.store)
    if store.id != job.store_id:
        raise StoreError(f"{job.store} has been replaced by another store")
    finished = store.receipt(stage, task)
    if finished is not None:  # a scheduler repeats a finished task if the worker that knew of it is lost
        return _summary(finished)
    (samples,) = (s.samples(task) for s in job.plan.stages if s.name == stage)
    if attempt == KILLED:
        job = job.in_batches(max(1, job.plan.batch_size // 4))
    plan = job.plan
    assert plan is not None
    if missing:  # a run that went on meanwhile may have them
        there = store.done("factors")
        missing = [tile.start for i, tile in enumerate(plan.test_tiles) if i not in there]
    with torch.no_grad(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ConvergenceWarning)
        record = _within_memory(job, store, (stage, task), samples, missing)
    for one in caught:
        if not issubclass(one.category, ConvergenceWarning):
            warnings.warn_explicit(one.message, one.category, one.filename, one.lineno)
    receipt = {
        "stage": stage,
        "task": task,
        "start": samples.start,
        "stop": samples.stop,
        "missing": record.missing,
        "warnings": [str(one.message) for one in caught if issubclass(one.category, ConvergenceWarning)],
        "projected_bytes": sum(plan.memory(stage).values()),
        **record.report(),
    }
    store.leave_receipt(stage, task, receipt)
    return _summary(receipt)


def _summary(receipt: dict[str, Any]) -> dict[str, Any]:
    """What the client wants to know; a list of all that was written may be long."""
    return {key: value for key, value in receipt.items() if key != "written"}


def check_task(job: Job, stage: str, results_only: bool, task: int, attempt: int = 0) -> dict[str, Any]:  # noqa: ARG001
    """Whether what a task has written is still there, unchanged: ``sound``."""
    assert job.store is not None
    store = Store(job.store)
    receipt = store.receipt(stage, task, or_in_part=True)
    return {"sound": receipt is not None and store.is_sound(receipt, results_only)}


def _within_memory(job: Job, store: Store, task: tuple[str, int], samples: slice, missing: Sequence[int]) -> Record:
    """Do it; if memory does not suffice, in batches of half the size, and so on."""
    bodies = {"factors": _factors, "scores": _strip, "strongest": _strongest}
    if task[0] == "strongest":
        _held_factors.cache_clear()
    while True:
        record = Record(store, job.baseline_bytes, task)
        try:
            bodies[task[0]](job, samples, record, missing)
        except (MemoryError, RuntimeError) as error:
            assert job.plan is not None
            if not _is_out_of_memory(error) or job.plan.batch_size == 1:
                raise
            job = job.in_batches(job.plan.batch_size // 2)
        else:
            return record
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error)


def _factors(job: Job, samples: slice, record: Record, _missing: Sequence[int]) -> None:
    """The left rows of a range of test samples."""
    model, plan = job.model, job.plan
    assert plan is not None
    template = job.left_rows()
    arrays = {
        name: np.empty((length(samples), array.shape[1]), numpy_name(array.dtype))
        for name, array in template.arrays.items()
    }
    source = job.factors if job.factors is not None else job.test
    assert source is not None
    with record("read"):
        samples_read = source.rows(samples)
    # Passes over the data of the fit are shared by all samples of the chunk.
    for part in [samples] if plan.work.solves else list(_batches(samples, plan.batch_size)):
        x, y = tree_map(partial(_part, _within(part, samples)), samples_read)
        if job.factors is not None:
            with record("read"):
                rows = _given_rows(template, x, model)
            for array in rows.arrays.values():
                check_finite(array, "influence factors", "test", part.start)
        else:
            gradients = _gradients(job, x, y, part, record)
            with record("factors"):
                rows = model.encode(gradients, "test", part.start)
        for name, array in _alike(rows, template, "test", part):
            arrays[name][_within(part, samples)] = to_numpy(array)
    for name, values in arrays.items():
        record.write(f"{FACTORS}/{name}", (samples,), values)


def _alike(rows: Rows, template: Rows, whose: str, samples: slice) -> Iterator[tuple[str, Tensor]]:
    """The arrays of rows, if they are of the same width as those of the first sample.

    Raises:
        DataError: if they are not.
    """
    wanted = {name: array.shape[1] for name, array in template.arrays.items()}
    for name, array in rows.arrays.items():
        if array.shape[1] != wanted.get(name):
            raise DataError(
                f"{whose} samples {samples.start} to {samples.stop - 1} are encoded to {array.shape[1]} numbers, the "
                f"first of the data to {wanted.get(name)}: samples must be of one size (pad them alike)"
            )
        yield name, array


def _gradients(job: Job, x: Any, y: Any, samples: slice, record: Record) -> GradientRows:
    """The gradients of a range of test samples, a batch at a time."""
    assert job.plan is not None
    parts = []
    for part in _batches(samples, job.plan.batch_size):
        with record("gradients"):
            inputs, labels = tree_map(partial(_part, _within(part, samples)), (x, y))
            parts.append(job.model.gradient_rows(inputs, labels, "test", part.start))
    if len(parts) == 1:
        return parts[0]
    arrays = {name: torch.cat([rows.arrays[name] for rows in parts]) for name in parts[0].arrays}
    return parts[0].with_arrays(arrays)


def _given_rows(template: Rows, x: Any, model: InfluenceModel) -> Rows:
    arrays = {"values": x} if isinstance(x, Tensor) else x
    device, like = model.problem.device, template.arrays
    return template.with_arrays({name: array.to(device, like[name].dtype) for name, array in arrays.items()})


def _strip(job: Job, samples: slice, record: Record, missing: Sequence[int]) -> None:
    """All results that a range of training samples has a part in, chunk by chunk."""
    assert job.plan is not None
    for chunk in _batches(samples, job.plan.train_chunk):
        if job.mode is InfluenceMode.Perturbation:
            scores = _perturbed(job, chunk, record)
        else:
            scores = _dot_products(job, chunk, record)
        _collect(job, chunk, scores, record, missing)


#: The scores of a tile of test samples.
Scores = Callable[[slice], Tensor]


def _dot_products(job: Job, chunk: slice, record: Record) -> Scores:
    """Scores of a chunk of training samples, from their rows, which are computed here; and what else these give."""
    model, plan = job.model, job.plan
    assert plan is not None
    template = job.right_rows()
    n = length(chunk) if plan.test_tiles or job.wanted.gradients else 0
    if job.gradients is not None:
        with record("read"):
            right = _given_rows(template, job.gradients.rows(chunk).x, model)
        for array in right.arrays.values():
            check_finite(array, "stored gradients", "training", chunk.start)
    else:
        arrays = {name: array.new_empty(n, array.shape[1]) for name, array in template.arrays.items()}
        left = job.left_rows()
        for part, gradients in _gradients_of_chunk(job, chunk, record):
            if n:
                with record("gradients"):
                    for name, array in _alike(model.right_rows(gradients, left), template, "training", part):
                        arrays[name][_within(part, chunk)] = array
        right = template.with_arrays(arrays)
    if job.wanted.gradients:
        for name, array in right.arrays.items():
            record.write(f"{GRADIENTS}/{name}", (chunk,), to_numpy(array))

    def scores(tile: slice) -> Tensor:
        left = _factors_of(job, tile, record)
        with record("scores"):
            return left.dot(right)

    return scores


def _perturbed(job: Job, chunk: slice, record: Record) -> Scores:
    """Scores of the features of a chunk of training samples."""
    model, plan = job.model, job.plan
    assert plan is not None
    assert job.train is not None
    if job.wanted.self_influences:
        for _ in _gradients_of_chunk(job, chunk, record):
            pass
    with record("read"):
        rows = job.train.rows(chunk)

    def scores(tile: slice) -> Tensor:
        left = _factors_of(job, tile, record)
        block = torch.empty(len(left), length(chunk), *plan.work.features, dtype=model.problem.dtype)
        for part in _batches(chunk, plan.batch_size):
            batch = tree_map(partial(_part, _within(part, chunk)), rows)
            with record("scores"):
                block[:, _within(part, chunk)] = model.perturbations(left, *batch).to(block)
        return block

    return scores


def _gradients_of_chunk(job: Job, chunk: slice, record: Record) -> Iterator[tuple[slice, GradientRows]]:
    """The gradients of a chunk of training samples, a batch at a time; their self-influences on the way."""
    assert job.plan is not None
    assert job.train is not None
    selves = []
    with record("read"):
        rows = job.train.rows(chunk)
    for part in _batches(chunk, job.plan.batch_size):
        x, y = tree_map(partial(_part, _within(part, chunk)), rows)
        with record("gradients"):
            gradients = job.model.gradient_rows(x, y, "training", part.start)
        if job.wanted.self_influences:
            with record("self-influences"):
                selves.append(job.model.inverse.quadratic(gradients))
        yield part, gradients
    if selves:
        block = torch.cat(selves)
        check_finite(block, "self-influences", "training", chunk.start)
        record.write(SELVES, (chunk,), to_numpy(block))


def _collect(job: Job, chunk: slice, scores: Scores, record: Record, missing: Sequence[int]) -> None:
    """Make all results of the blocks of scores of a chunk, a tile of test samples after the other."""
    plan, wanted = job.plan, job.wanted
    assert plan is not None
    work = plan.work
    means = torch.zeros(wanted.n_groups, length(chunk), *work.features, dtype=torch.float64)
    candidates = _Candidates(job, chunk, record)
    for tile in plan.test_tiles:
        groups = None if wanted.group_of is None else torch.from_numpy(wanted.group_of[tile])
        if tile.start in missing:
            record.missing.append([tile.start, tile.stop])
            if groups is not None:
                means[groups] = float("nan")
        else:
            block = scores(tile)
            check_finite(block, "scores", "test", tile.start)
            if wanted.matrix:
                record.write(SCORES, (tile, chunk), to_numpy(block))
            if groups is not None:
                with record("means"):
                    for rows in torch.arange(len(block)).split(_ROWS):  # type: ignore[no-untyped-call]
                        means.index_add_(0, groups[rows], block[rows].to("cpu", torch.float64))
            if wanted.strongest:
                with record("strongest"):
                    candidates.add(tile, block)
        candidates.write_up_to(tile.stop)
    if wanted.group_of is not None:
        sizes = np.bincount(wanted.group_of, minlength=wanted.n_groups)
        means /= torch.from_numpy(sizes).reshape(-1, *[1] * (means.ndim - 1))
        record.write(MEANS, (slice(0, wanted.n_groups), chunk), to_numpy(means.to(job.model.problem.dtype)))


class _Candidates:
    """The strongest scores of a chunk of training samples, for so many test samples as are kept in one file."""

    def __init__(self, job: Job, chunk: slice, record: Record) -> None:
        assert job.plan is not None
        self._job, self._plan, self._chunk, self._record = job, job.plan, chunk, record
        self._start = 0
        self._kept: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        self._begin()

    def _begin(self) -> None:
        n = min(self._plan.candidate_chunk, self._plan.work.n_test - self._start)
        dtype = numpy_name(self._job.model.problem.dtype)
        for kind, k in self._job.wanted.strongest.items():
            width = min(k, self._plan.train_chunk)
            self._kept[kind] = np.full((n, width), np.nan, dtype), np.full((n, width), -1, np.int64)

    def add(self, tile: slice, block: Tensor) -> None:
        rows = _within(tile, slice(self._start, 0))
        for kind, (values, index) in self._kept.items():
            width = min(values.shape[1], block.shape[1])
            best, where = strongest(block, width, largest=kind == TOP)
            values[rows, :width], index[rows, :width] = to_numpy(best), to_numpy(where) + self._chunk.start

    def write_up_to(self, stop: int) -> None:
        if not self._kept or (stop - self._start < self._plan.candidate_chunk and stop < self._plan.work.n_test):
            return
        number = self._chunk.start // self._plan.train_chunk
        region = (slice(number, number + 1), slice(self._start, stop))
        for kind, (values, index) in self._kept.items():
            self._record.write(f"{CANDIDATES}/{kind}_scores", region, values[None])
            self._record.write(f"{CANDIDATES}/{kind}_train", region, index[None])
        self._start = stop
        self._begin()


def strongest(block: Tensor, k: int, largest: bool) -> tuple[Tensor, Tensor]:
    """The k strongest scores of each row and their columns, the strongest first; of equal ones the lower column."""
    best = block.new_empty(len(block), k)
    where = torch.empty(best.shape, dtype=torch.long, device=block.device)
    for rows in torch.arange(len(block)).split(_ROWS):  # type: ignore[no-untyped-call]
        part = block[rows]
        values, index = part.topk(k, dim=1, largest=largest, sorted=True)
        # Which of equal scores topk takes, and in which order, is not said. Take the lowest columns.
        reaching = (part >= values[:, -1:]) if largest else (part <= values[:, -1:])
        ambiguous = reaching.sum(1) > k
        in_order = part[ambiguous].sort(dim=1, descending=largest, stable=True)
        values[ambiguous], index[ambiguous] = in_order.values[:, :k], in_order.indices[:, :k]
        by_column = index.argsort(dim=1)
        by_value = values.gather(1, by_column).sort(dim=1, descending=largest, stable=True)
        best[rows], where[rows] = by_value.values, index.gather(1, by_column).gather(1, by_value.indices)
    return best, where


def _strongest(job: Job, samples: slice, record: Record, missing: Sequence[int]) -> None:
    """The strongest scores of a range of test samples, from the candidates of all strips."""
    plan = job.plan
    assert plan is not None
    record.missing += [
        [t.start, t.stop]
        for t in plan.test_tiles
        if t.start in missing and t.start in range(samples.start, samples.stop)
    ]
    for kind, k in job.wanted.strongest.items():
        values = np.empty((length(samples), 0), numpy_name(job.model.problem.dtype))
        index = np.empty(values.shape, np.int64)
        for number in range(plan.n_chunks):
            region = (slice(number, number + 1), samples)
            more = [record.read(f"{CANDIDATES}/{kind}_{what}", region)[0] for what in ("scores", "train")]
            with record("strongest"):
                # Strips in order, and a stable sort: of equal scores the lower index comes first. NaN comes last.
                values, index = first_of(np.hstack([values, more[0]]), np.hstack([index, more[1]]), k, kind == TOP)
        record.write(f"{kind}_scores", (samples,), values)
        record.write(f"{kind}_train", (samples,), index)


def _factors_of(job: Job, tile: slice, record: Record) -> Rows:
    """The left rows of a tile of test samples, from the store, or held from the strip before."""
    assert job.plan is not None
    if not job.plan.holds_factors:
        return _read_factors(job, tile, record)
    held = _held_factors(job.store_id)
    if tile.start not in held:
        held[tile.start] = _read_factors(job, tile, record)
    return held[tile.start]


@lru_cache(maxsize=1)
def _held_factors(store_id: str) -> dict[int, Rows]:  # noqa: ARG001 - one run's factors at a time
    return {}


def _read_factors(job: Job, tile: slice, record: Record) -> Rows:
    template, arrays = job.left_rows(), {}
    for name, array in template.arrays.items():
        stored = torch.from_numpy(record.read(f"{FACTORS}/{name}", (tile,))).clone()  # aligned, see data
        arrays[name] = stored.to(array.device)
        check_finite(arrays[name], "stored influence factors", "test", tile.start)
    return template.with_arrays(arrays)


def read_all_factors(job: Job, store: Store) -> np.ndarray:
    """The influence factors in a store, ``(n_test, P)``, whatever they are stored as."""
    assert job.plan is not None
    left = _read_factors(job, slice(0, job.plan.work.n_test), Record(store))
    return to_numpy(job.model.dense(left).values)


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


def calibrate(job: Job, n_workers: int) -> Costs:
    """What a job costs here and now: one batch, timed."""
    plan, model = job.plan, job.model
    assert plan is not None
    timed = _Timed()
    left: Rows = model.as_rows(torch.ones(1, model.n_parameters))  # stands for factors that are not computed here
    right: Rows = left
    selves = 0.0
    with torch.no_grad():
        if job.test is not None:
            n = min(plan.batch_size, len(job.test))
            gradients = timed("factor", n, lambda: _first_gradients(job, "test", n))
            right = gradients
            if not plan.work.solves:  # iterations cannot be foreseen
                left = timed("factor", n, lambda: model.encode(gradients))
                right = model.right_rows(gradients, left)
        if job.train is not None:
            n = min(plan.batch_size, len(job.train))
            right = timed("gradient", n, lambda: model.right_rows(_first_gradients(job, "train", n), left))
            if job.wanted.self_influences and not plan.work.solves:
                training = _first_gradients(job, "train", n)
                timed("self", n, lambda: model.inverse.quadratic(training))
                selves = timed.seconds["self"]
        many = left.with_arrays({name: a[:1].expand(256, -1).contiguous() for name, a in left.arrays.items()})
        more = right.with_arrays({name: a[:1].expand(256, -1).contiguous() for name, a in right.arrays.items()})
        timed("dot", 256 * 256, lambda: many.dot(more))
    return Costs(
        factor_flops=timed.flops.get("factor", 0),
        factor_seconds=timed.seconds.get("factor", 0.0),
        gradient_flops=timed.flops.get("gradient", 0),
        gradient_seconds=timed.seconds.get("gradient", 0.0),
        self_seconds=selves,
        dot_flops=timed.flops["dot"],
        dot_seconds=timed.seconds["dot"],
        bytes_per_second=_write_rate(),
        n_workers=n_workers,
    )


class _Timed:
    """Seconds and floating-point operations of a sample, by what is done."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.flops: dict[str, int] = {}

    def __call__(self, what: str, n: int, function: Callable[[], Any]) -> Any:
        with FlopCounterMode(display=False) as counter:  # also warms up
            function()
        start = time.perf_counter()
        result = function()
        self.seconds[what] = self.seconds.get(what, 0.0) + (time.perf_counter() - start) / n
        self.flops[what] = self.flops.get(what, 0) + counter.get_total_flops() // n
        return result


def _first_gradients(job: Job, role: str, n: int) -> GradientRows:
    return job.model.gradient_rows(*job.data[role].rows(slice(0, n)), "test" if role == "test" else "training")


def _write_rate() -> float:
    """Bytes a second that a temporary file takes, down to the disk."""
    content, start = bytes(16 << 20), time.perf_counter()
    with tempfile.TemporaryFile() as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    return len(content) / (time.perf_counter() - start)


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")


def _give_back() -> None:
    """Return freed memory to the system, now and from now on, where the C library keeps it (glibc).

    It would count for the next task. Dask's nannies set the like for their workers.
    """
    with suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(_TRIM_THRESHOLD, 1 << 16)
        libc.mallopt(_MMAP_THRESHOLD, 1 << 17)
        libc.malloc_trim(0)


#: Parameters of glibc's mallopt. Setting them ends their growth with the sizes that are freed.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3


def _peak_bytes() -> int:
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM"):
                return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def resident_bytes() -> int:
    """Memory that this process takes now, and has a use for."""
    _give_back()
    return int(psutil.Process().memory_info().rss)


def numpy_name(dtype: torch.dtype) -> str:
    """What numpy calls a type of torch."""
    return str(dtype).removeprefix("torch.")


def version_of(package: str) -> str:
    """The installed version of a package."""
    return importlib.metadata.version(package)


def major_versions() -> dict[str, str]:
    """Of what numbers depend on."""
    return {name: version_of(name).split(".")[0] for name in ("outfluence", "torch")}


def length(samples: slice) -> int:
    """How many samples."""
    return int(samples.stop - samples.start)


def _within(part: slice, samples: slice) -> slice:
    return slice(part.start - samples.start, part.stop - samples.start)


def _batches(samples: slice, size: int) -> Iterator[slice]:
    for start in range(samples.start, samples.stop, size):
        yield slice(start, min(start + size, samples.stop))


def _part(index: slice, rows: Tensor) -> Tensor:
    return rows[index].clone()  # aligned, see data

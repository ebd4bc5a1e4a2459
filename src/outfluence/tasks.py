"""What a run computes: the tasks of a job.

They run in workers: what they need is in the job, which they read from the store; what they make goes into the store.
"""

from __future__ import annotations

import os
import pickle
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from distributed import get_worker
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from outfluence.analysis import first_of
from outfluence.assessment import assess
from outfluence.data import to_numpy, tree_map
from outfluence.errors import ClusterError, ConvergenceWarning, DataError
from outfluence.executors import KILLED, profile_worker
from outfluence.influence import InfluenceModel
from outfluence.jobs import (
    CANDIDATES,
    FACTORS,
    GRADIENTS,
    MEANS,
    SCORES,
    SELVES,
    TOP,
    Job,
    length,
    numpy_name,
)
from outfluence.machine import float32_products, new_memory
from outfluence.modes import InfluenceMode
from outfluence.plan import Costs
from outfluence.record import Record, resident_bytes
from outfluence.rows import DenseRows, GradientRows, Rows, check_finite
from outfluence.store import ASSESS, Store

#: Rows of a block of scores that are looked at together where that takes memory.
_ROWS = 64


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
def job_from(recipe: str) -> Any:
    """Read a job, once a process."""
    baseline = resident_bytes()  # before the model: the worker may have done other work before
    with Path(recipe).open("rb") as file:
        job = pickle.load(file).arrived(baseline)
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
    store = Store.reopened(job.store, job.store_id)
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
    as_asked = float32_products(job.model.problem.device, job.precision)
    with torch.no_grad(), as_asked, warnings.catch_warnings(record=True) as caught:
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


def assess_task(job: Job, task: int, attempt: int = 0) -> dict[str, Any]:  # noqa: ARG001
    """Assess the scores, and keep what was found as the receipt."""
    assert job.test is not None
    assert job.train is not None
    store = Store.reopened(job.store, job.store_id)
    finished = store.receipt(ASSESS, task)
    if finished is not None:
        return _summary(finished)
    record = Record(store, job.baseline_bytes)
    with record(ASSESS), float32_products(job.model.problem.device, job.precision):
        found = assess(job.model, job.test, job.train)
    receipt = {"stage": ASSESS, "task": task, "start": 0, "stop": found.n_train, "assessment": found.to_json()}
    receipt |= record.report()
    store.leave_receipt(ASSESS, task, receipt)
    return _summary(receipt)


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
        arrays = {name: new_memory(array, n, array.shape[1]) for name, array in template.arrays.items()}
        left, into = job.left_rows(), arrays["values"] if n and isinstance(template, DenseRows) else None
        for part, gradients in _gradients_of_chunk(job, chunk, record, into):
            if n:
                with record("gradients"):
                    for name, array in _alike(model.right_rows(gradients, left), template, "training", part):
                        place = arrays[name][_within(part, chunk)]
                        if array.data_ptr() != place.data_ptr():
                            place.copy_(array)
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


def _gradients_of_chunk(
    job: Job, chunk: slice, record: Record, into: Tensor | None = None
) -> Iterator[tuple[slice, GradientRows]]:
    """The gradients of a chunk of training samples, a batch at a time; their self-influences on the way.

    Args:
        job: what is computed.
        chunk: which samples.
        record: of the task.
        into: where dense gradients may be written.
    """
    assert job.plan is not None
    assert job.train is not None
    selves = []
    with record("read"):
        rows = job.train.rows(chunk)
    for part in _batches(chunk, job.plan.batch_size):
        x, y = tree_map(partial(_part, _within(part, chunk)), rows)
        with record("gradients"):
            place = None if into is None else into[_within(part, chunk)]
            gradients = job.model.gradient_rows(x, y, "training", part.start, place)
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
        stored = torch.from_numpy(record.read(f"{FACTORS}/{name}", (tile,)))
        arrays[name] = new_memory(array, *stored.shape).copy_(stored)  # aligned, see data
        check_finite(arrays[name], "stored influence factors", "test", tile.start)
    return template.with_arrays(arrays)


def read_all_factors(job: Job, store: Store) -> np.ndarray:
    """The influence factors in a store, ``(n_test, P)``, whatever they are stored as."""
    assert job.plan is not None
    left = _read_factors(job, slice(0, job.plan.work.n_test), Record(store))
    return to_numpy(job.model.dense(left).values)


def calibrate(job: Job, n_workers: int) -> Costs:
    """What a job costs here and now: one batch, timed."""
    plan, model = job.plan, job.model
    assert plan is not None
    timed = _Timed()
    left: Rows = model.as_rows(torch.ones(1, model.n_parameters))  # stands for factors that are not computed here
    right: Rows = left
    selves = 0.0
    with torch.no_grad(), float32_products(model.problem.device, job.precision):
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


def _within(part: slice, samples: slice) -> slice:
    return slice(part.start - samples.start, part.stop - samples.start)


def _batches(samples: slice, size: int) -> Iterator[slice]:
    for start in range(samples.start, samples.stop, size):
        yield slice(start, min(start + size, samples.stop))


def _part(index: slice, rows: Tensor) -> Tensor:
    return rows[index].clone()  # aligned, see data

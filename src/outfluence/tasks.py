"""What a run computes: the job and its tasks.

Tasks run in workers: what they need is in the job, which they read from the store; what they make goes into the store.
With `calculators` the only module that knows both halves.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import pickle
import resource
import socket
import sys
import threading
import time
import warnings
from collections.abc import Iterator
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

from outfluence.curvature import VECTORS
from outfluence.data import Data, to_numpy, tree_leaves, tree_map
from outfluence.errors import ClusterError, ConvergenceWarning, StoreError
from outfluence.influence import InfluenceModel
from outfluence.modes import InfluenceMode
from outfluence.plan import ACTIVATION_COPIES, Plan, Work
from outfluence.problem import DIRECTIONS
from outfluence.rows import DenseRows, Rows, check_finite
from outfluence.store import Store

#: Where the arrays of left rows, scores and self-influences are in a store.
FACTORS, SCORES, SELVES = "factors", "scores", "self_influences"


@dataclass(frozen=True)
class Job:
    """All that a task needs. Workers read it from the store."""

    model: InfluenceModel
    test: Data | None = None
    factors: Data | None = None
    train: Data | None = None
    mode: InfluenceMode = InfluenceMode.Up
    self_influences: bool = False
    plan: Plan | None = None
    store: Path | None = None
    store_id: str = ""
    threads: int | None = None
    baseline_bytes: int = 0

    @property
    def results(self) -> list[str]:
        """Names of the variables of the result; what was asked for first comes last."""
        has_test = self.test is not None or self.factors is not None
        if self.train is None:
            return ["factors"]
        return (
            (["factors"] if has_test else [])
            + ([SELVES] if self.self_influences else [])
            + ([SCORES] if has_test else [])
        )

    @property
    def data(self) -> dict[str, Data]:
        """The data by role."""
        roles = {"test": self.test, "factors": self.factors, "train": self.train}
        return {role: data for role, data in roles.items() if data is not None}

    @property
    def inputs(self) -> dict[str, Data]:
        """All data that is read: those of `data`, and those of the fit if the inverse reads them."""
        source = self.model.inverse.data
        return self.data | ({} if source is None else {"fit": source})

    def left_rows(self) -> Rows:
        """Left rows of no samples: what arrays they consist of."""
        dense = self.factors is not None and isinstance(self.factors.rows(slice(0, 1)).x, Tensor)
        return self.model.empty_rows(dense)

    def identity(self) -> dict[str, Any]:
        """What the numbers in the store depend on. A store is continued by the same identity only."""
        return {
            **self.model.identity(),
            **{f"{role}_data": data.fingerprint for role, data in self.data.items()},
            "mode": str(self.mode),
            "results": self.results,
            "dtype": numpy_name(self.model.problem.dtype),
            "versions": {name: version_of(name).split(".")[0] for name in ("outfluence", "torch")},
        }

    def work(self) -> Work:
        """The sizes of this job."""
        problem = self.model.problem
        itemsize = torch.finfo(problem.dtype).bits // 8
        n_rows = self.test if self.test is not None else self.factors
        sample_of = self.train if self.train is not None else self.test
        assert sample_of is not None
        sample = sample_of.rows(slice(0, 1))
        perturbation = self.mode is InfluenceMode.Perturbation and self.train is not None
        floats = [leaf for leaf in tree_leaves(sample.x) if leaf.is_floating_point()]
        if perturbation:  # raises where there is nothing to differentiate by
            zeros = torch.zeros(1, problem.n_parameters, dtype=problem.dtype, device=problem.device)
            problem.mixed_derivatives(zeros, *sample)
        hints = [data.batch_size for data in self.inputs.values() if data.batch_size]
        activations = problem.activation_bytes(sample)
        source = self.model.inverse.data
        kept = (
            len(source) * activations * ACTIVATION_COPIES
            if source and getattr(self.model.solver, "precompute_grad", False)
            else 0
        )
        inverse = sum(t.nbytes for t in self.model.inverse.tensors.values())
        buffers = sum(b.nbytes for b in self.model.problem.model.buffers())
        return Work(
            n_test=len(n_rows) if n_rows is not None else 0,
            n_train=len(self.train) if self.train is not None else 0,
            arrays={name: array.shape[1] for name, array in self.left_rows().arrays.items()},
            itemsize=itemsize,
            n_parameters=problem.n_parameters,
            features=tuple(floats[0].shape[1:]) if perturbation else (),
            directions=DIRECTIONS if perturbation else 0,
            self_influences=self.self_influences,
            model_bytes=sum(p.nbytes for p in problem.model.parameters()) + buffers + inverse,
            activation_bytes=activations,
            batch_size=min(hints) if hints else None,
            sample_bytes=sum(leaf.nbytes for leaf in tree_leaves(sample.x) + tree_leaves(sample.y)),
            solves=source is not None,
            vectors=VECTORS if source is not None else 0,
            kept_bytes=kept,
        )


def remote_task(recipe: str, version: int, stage: str, task: int) -> dict[str, Any]:
    """Do a task in a Dask worker, with the job that its store keeps.

    Raises:
        ClusterError: if the worker runs other tasks beside this one: it may have joined after the calculator looked.
    """
    worker = get_worker()
    if worker.state.nthreads > 1:
        raise ClusterError(f"worker {worker.address} runs {worker.state.nthreads} threads: start it with --nthreads 1")
    if not _BUSY.acquire(blocking=False):
        raise ClusterError(f"worker {worker.address} shares its process with another: start workers as processes")
    try:
        return run_task(_job_from(recipe, version), stage, task)
    finally:
        _BUSY.release()


#: Held while a task runs: threads that share a model give wrong gradients.
_BUSY = threading.Lock()


@lru_cache(maxsize=1)
def _job_from(recipe: str, version: int) -> Job:  # noqa: ARG001 - a rewritten recipe is another one
    baseline = resident_bytes()  # before the model: the worker may have done other work before
    job: Job = replace(pickle.loads(Path(recipe).read_bytes()), baseline_bytes=baseline)
    job.model.assume_unchanged()
    if job.threads is not None:
        torch.set_num_threads(job.threads)
    return job


def forget() -> None:
    """Let go of what this process keeps between the tasks of a run."""
    _job_from.cache_clear()
    _held_factors.cache_clear()


def run_task(job: Job, stage: str, task: int) -> dict[str, Any]:
    """Compute and store one range of samples, and leave the receipt."""
    assert job.plan is not None
    assert job.store is not None
    watch = _Watch(job.baseline_bytes)
    store = Store(job.store)
    if store.id != job.store_id:
        raise StoreError(f"{job.store} has been replaced by another store")
    finished = store.receipt(stage, task)
    if finished is not None:  # a scheduler repeats a finished task if the worker that knew of it is lost
        return finished
    (samples,) = (s.samples(task) for s in job.plan.stages if s.name == stage)
    with torch.no_grad(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ConvergenceWarning)
        written, checksums = (_factors if stage == "factors" else _strip)(job, store, samples, watch)
    for one in caught:
        if not issubclass(one.category, ConvergenceWarning):
            warnings.warn_explicit(one.message, one.category, one.filename, one.lineno)
    receipt = {
        "stage": stage,
        "task": task,
        "start": samples.start,
        "stop": samples.stop,
        "bytes_written": written,
        "checksums": checksums,
        "finished": datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds"),
        "worker": f"{socket.gethostname()}:{os.getpid()}",
        "warnings": [str(one.message) for one in caught if issubclass(one.category, ConvergenceWarning)],
        **watch.report(),
    }
    store.leave_receipt(stage, task, receipt)
    return receipt


def _factors(job: Job, store: Store, samples: slice, watch: _Watch) -> tuple[int, dict[str, int]]:
    """The left rows of a range of test samples."""
    model, plan = job.model, job.plan
    assert plan is not None
    arrays = {
        name: np.empty((length(samples), width), numpy_name(model.problem.dtype))
        for name, width in plan.work.arrays.items()
    }
    template = job.left_rows()
    # Passes over the data of the fit are shared by all samples of the chunk.
    for part in [samples] if plan.work.solves else list(_batches(samples, plan.batch_size)):
        if job.factors is not None:
            with watch("read"):
                rows = _given_factors(template, job.factors.rows(part).x, model)
            for array in rows.arrays.values():
                check_finite(array, "influence factors", "test", part.start)
        else:
            gradients = _gradients(job, part, watch)
            with watch("factors"):
                rows = model.encode(gradients, "test", part.start)
        for name, array in rows.arrays.items():
            arrays[name][_within(part, samples)] = to_numpy(array)
    with watch("write"):
        checksums = {f"{FACTORS}/{name}": store.write(f"{FACTORS}/{name}", (samples,), a) for name, a in arrays.items()}
    return sum(array.nbytes for array in arrays.values()), checksums


def _gradients(job: Job, samples: slice, watch: _Watch) -> DenseRows:
    """The gradients of a range of test samples, a batch at a time."""
    assert job.plan is not None
    assert job.test is not None
    parts = []
    for part in _batches(samples, job.plan.batch_size):
        with watch("read"):
            batch = job.test.rows(part)
        with watch("gradients"):
            parts.append(job.model.gradient_rows(*batch, "test", part.start))
    values = parts[0].values if len(parts) == 1 else torch.cat([rows.values for rows in parts])
    return parts[0].with_arrays({"values": values})


def _given_factors(template: Rows, x: Any, model: InfluenceModel) -> Rows:
    arrays = {"values": x} if isinstance(x, Tensor) else x
    return template.with_arrays({name: a.to(model.problem.device, model.problem.dtype) for name, a in arrays.items()})


def _strip(job: Job, store: Store, samples: slice, watch: _Watch) -> tuple[int, dict[str, int]]:
    """The scores of a range of training samples for all test samples, and their self-influences."""
    if job.mode is InfluenceMode.Perturbation:
        return _perturbed_strip(job, store, samples, watch)
    model, plan = job.model, job.plan
    assert plan is not None
    assert job.train is not None
    left = job.left_rows()
    n = length(samples) if plan.test_tiles else 0
    arrays = {name: array.new_empty(n, array.shape[1]) for name, array in left.arrays.items()}
    selves = []
    with watch("read"):
        rows = job.train.rows(samples)
    for part in _batches(samples, plan.batch_size):
        x, y = tree_map(partial(_part, _within(part, samples)), rows)
        with watch("gradients"):
            gradients = model.gradient_rows(x, y, "training", part.start)
            if plan.test_tiles:
                for name, array in model.right_rows(gradients, left).arrays.items():
                    arrays[name][_within(part, samples)] = array
        if job.self_influences:
            with watch("self-influences"):
                selves.append(model.inverse.quadratic(gradients))
    written, checksums = 0, {}
    if job.self_influences:
        block = torch.cat(selves)
        check_finite(block, "self-influences", "training", samples.start)
        with watch("write"):
            checksums[SELVES] = store.write(SELVES, (samples,), to_numpy(block))
        written += block.nbytes
    right = left.with_arrays(arrays)
    for tile in plan.test_tiles:
        with watch("read factors"):
            left = _factors_of(job, store, tile)
        with watch("scores"):
            block = left.dot(right)
        written += _write_scores(store, (tile, samples), block, watch, checksums)
    return written, checksums


def _perturbed_strip(job: Job, store: Store, samples: slice, watch: _Watch) -> tuple[int, dict[str, int]]:
    """The scores of the features of a range of training samples, for all test samples."""
    model, plan = job.model, job.plan
    assert plan is not None
    assert job.train is not None
    written, checksums = 0, dict[str, int]()
    with watch("read"):
        rows = job.train.rows(samples)
    for tile in plan.test_tiles:
        with watch("read factors"):
            left = _factors_of(job, store, tile)
        block = torch.empty(len(left), length(samples), *plan.work.features, dtype=model.problem.dtype)
        for part in _batches(samples, plan.batch_size):
            batch = tree_map(partial(_part, _within(part, samples)), rows)
            with watch("scores"):
                block[:, _within(part, samples)] = model.perturbations(left, *batch).to(block)
        written += _write_scores(store, (tile, samples), block, watch, checksums)
    if job.self_influences:
        up, more = _strip(replace(job, mode=InfluenceMode.Up, plan=_without_test(plan)), store, samples, watch)
        return written + up, checksums | more
    return written, checksums


def _factors_of(job: Job, store: Store, tile: slice) -> Rows:
    """The left rows of a tile of test samples, from the store, or held from the strip before."""
    assert job.plan is not None
    if not job.plan.holds_factors:
        return _read_factors(store, tile, job)
    held = _held_factors(store.id)
    if tile.start not in held:
        held[tile.start] = _read_factors(store, tile, job)
    return held[tile.start]


@lru_cache(maxsize=1)
def _held_factors(store_id: str) -> dict[int, Rows]:  # noqa: ARG001 - one run's factors at a time
    return {}


def _read_factors(store: Store, tile: slice, job: Job) -> Rows:
    template, arrays = job.left_rows(), {}
    for name, array in template.arrays.items():
        stored = torch.from_numpy(store.read(f"{FACTORS}/{name}", (tile,))).clone()  # aligned, see data
        arrays[name] = stored.to(array.device)
        check_finite(arrays[name], "stored influence factors", "test", tile.start)
    return template.with_arrays(arrays)


def read_all_factors(job: Job, store: Store) -> np.ndarray:
    """The influence factors in a store, ``(n_test, P)``, whatever they are stored as."""
    assert job.plan is not None
    n = job.plan.work.n_test
    return to_numpy(job.model.dense(_read_factors(store, slice(0, n), job)).values)


def _write_scores(
    store: Store, region: tuple[slice, slice], block: Tensor, watch: _Watch, checksums: dict[str, int]
) -> int:
    tile, samples = region
    check_finite(block, "scores", "test", tile.start)
    with watch("write"):
        checksums[f"{SCORES} {tile.start}"] = store.write(SCORES, (tile, samples), to_numpy(block))
    return block.nbytes


class _Watch:
    """Where the time of a task goes, and how much memory its process took."""

    def __init__(self, baseline_bytes: int) -> None:
        self._seconds: dict[str, float] = {}
        self._start = time.perf_counter()
        self._baseline_bytes = baseline_bytes
        with suppress(OSError):  # Linux: the peak of this task, not of the process since it began
            Path("/proc/self/clear_refs").write_text("5")

    @contextmanager
    def __call__(self, what: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self._seconds[what] = self._seconds.get(what, 0.0) + time.perf_counter() - start

    def report(self) -> dict[str, Any]:
        return {
            "seconds": round(time.perf_counter() - self._start, 6),
            "seconds_by_part": {what: round(seconds, 6) for what, seconds in self._seconds.items()},
            "peak_bytes": max(0, _peak_bytes() - self._baseline_bytes),
            "threads": torch.get_num_threads(),
        }


def _peak_bytes() -> int:
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM"):
                return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def resident_bytes() -> int:
    """Memory that this process takes now."""
    return int(psutil.Process().memory_info().rss)


def _without_test(plan: Plan) -> Plan:
    return replace(plan, work=replace(plan.work, n_test=0, directions=0, features=()))


def numpy_name(dtype: torch.dtype) -> str:
    """What numpy calls a type of torch."""
    return str(dtype).removeprefix("torch.")


def version_of(package: str) -> str:
    """The installed version of a package."""
    return importlib.metadata.version(package)


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

"""Calculators: map an influence model over data, chunk by chunk, following a plan, into a store.

The one module that knows both halves. A calculator only collects what a run needs and says who computes; the tasks at
the bottom of this file are the same everywhere, and give the same numbers.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import pickle
import platform
import resource
import shutil
import socket
import sys
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, final

import cloudpickle
import numpy as np
import psutil
import torch
import xarray as xr
from torch import Tensor
from tqdm.auto import tqdm

from outfluence.analysis import open_influences
from outfluence.data import Data, DataLike, to_numpy, tree_leaves
from outfluence.errors import ClusterError, DataError, PlanError, RunError, StoreMismatchError
from outfluence.executors import DaskExecutor, Executor, SequentialExecutor, dask_executor
from outfluence.influence import InfluenceModel
from outfluence.modes import InfluenceMode
from outfluence.plan import Plan, Work, make_plan, parse_bytes
from outfluence.problem import DIRECTIONS
from outfluence.rows import DenseRows, check_finite
from outfluence.store import ArraySpec, Store

#: Columns of a chunk of the stored factors: bounds the size of its files.
_FACTOR_COLUMNS = 1 << 16

#: Where factors, scores and self-influences are in a store.
FACTORS, SCORES, SELVES = "factors/values", "scores", "self_influences"


class InfluenceCalculator(ABC):
    """What both calculators do.

    Args:
        model: a fitted influence model.
    """

    def __init__(self, model: InfluenceModel) -> None:
        self.model = model

    def influence_factors(self, test: DataLike, *, memory_limit: str | int | None = None) -> LazyInfluences:
        """Influence factors of test samples, ``(n_test, P)``, to be computed.

        Args:
            test: anything `Data.of` takes.
            memory_limit: bytes a worker may take above its imports, as a number or "4GiB"; None: half of the memory
                of the machine, shared among workers, or of the workers' own limit.

        Raises:
            OutfluenceError: whatever would make the run fail, before any work.
        """
        return self._lazy(_Job(self.model, test=Data.of(test)), memory_limit)

    def influences(
        self,
        test: DataLike,
        train: DataLike,
        mode: InfluenceMode | str = InfluenceMode.Up,
        *,
        self_influences: bool = False,
        memory_limit: str | int | None = None,
        test_chunk: int | None = None,
        train_chunk: int | None = None,
    ) -> LazyInfluences:
        """Influences of training samples on test samples, to be computed.

        Factors are computed once per test chunk and stored; then each training gradient once.

        Args:
            test: anything `Data.of` takes.
            train: likewise.
            mode: perturb weights, ``(n_test, n_train)``, or features, ``(n_test, n_train, *features)``.
            self_influences: also the influence of each training sample on itself, ``(n_train,)``, in the same pass.
            memory_limit: see `influence_factors`.
            test_chunk: test samples per chunk of the result; None: the plan chooses.
            train_chunk: training samples per chunk of the result, and per task; None: the plan chooses.

        Raises:
            OutfluenceError: whatever would make the run fail, before any work.
        """
        job = _Job(
            self.model,
            test=Data.of(test),
            train=Data.of(train),
            mode=InfluenceMode(mode),
            self_influences=self_influences,
        )
        return self._lazy(job, memory_limit, test_chunk, train_chunk)

    def influences_from_factors(
        self,
        factors: Any,
        train: DataLike,
        mode: InfluenceMode | str = InfluenceMode.Up,
        *,
        self_influences: bool = False,
        memory_limit: str | int | None = None,
        test_chunk: int | None = None,
        train_chunk: int | None = None,
    ) -> LazyInfluences:
        """Influences from factors computed before.

        Args:
            factors: ``(n_test, P)``: an array (torch, numpy, zarr, dask, xarray), or a dataset with ``factors`` as
                ``influence_factors(test).to_zarr(path)`` gives back.
            train: see `influences`; as all that follow.
            mode: see `influences`.
            self_influences: see `influences`.
            memory_limit: see `influence_factors`.
            test_chunk: see `influences`.
            train_chunk: see `influences`.

        Raises:
            DataError: if the factors do not have one column for each parameter.
        """
        job = _Job(
            self.model,
            factors=_factor_data(factors, self.model),
            train=Data.of(train),
            mode=InfluenceMode(mode),
            self_influences=self_influences,
        )
        return self._lazy(job, memory_limit, test_chunk, train_chunk)

    def self_influences(
        self, train: DataLike, *, memory_limit: str | int | None = None, train_chunk: int | None = None
    ) -> LazyInfluences:
        """The influence of each training sample on itself, ``(n_train,)``, to be computed.

        High values point at wrong labels and outliers.

        Args:
            train: anything `Data.of` takes.
            memory_limit: see `influence_factors`.
            train_chunk: see `influences`.
        """
        job = _Job(self.model, train=Data.of(train), self_influences=True)
        return self._lazy(job, memory_limit, None, train_chunk)

    @abstractmethod
    def _executor(self) -> AbstractContextManager[Executor]:
        """Who computes."""

    def _lazy(
        self,
        job: _Job,
        memory_limit: str | int | None,
        test_chunk: int | None = None,
        train_chunk: int | None = None,
    ) -> LazyInfluences:
        for data, whose in ((job.test, "test"), (job.train, "training")):
            if data is not None:
                self.model.check(data, whose)
        limit = parse_bytes(memory_limit) if memory_limit is not None else self._default_limit()
        plan = make_plan(job.work(), limit, test_chunk=test_chunk, train_chunk=train_chunk)
        asked = {"test_chunk": test_chunk, "train_chunk": train_chunk}
        return LazyInfluences(
            job, plan, {name: getattr(plan, name) for name, value in asked.items() if value}, self._executor
        )

    def _default_limit(self) -> int:
        return int(psutil.virtual_memory().total) // 2


@final
class SequentialInfluenceCalculator(InfluenceCalculator):
    """Computes in this process, one chunk after another.

    Args:
        model: a fitted influence model.
    """

    def _executor(self) -> AbstractContextManager[Executor]:
        return nullcontext(SequentialExecutor())


@final
class DaskInfluenceCalculator(InfluenceCalculator):
    """Computes on the workers of a Dask cluster. They read their rows and write their chunks themselves.

    Args:
        model: a fitted influence model.
        client: a `distributed.Client`; None: the current one, or else a local cluster with a worker a core, started for
            each run and closed after it.

    Raises:
        ClusterError: if the cluster cannot compute safely (several threads a worker, different versions).
    """

    def __init__(self, model: InfluenceModel, client: Any = None) -> None:
        super().__init__(model)
        self.client = client
        if client is not None:
            DaskExecutor(client).check()

    @contextmanager
    def _executor(self) -> Iterator[Executor]:
        with dask_executor(self.client) as executor:
            executor.check()
            yield executor

    def _default_limit(self) -> int:
        limit = DaskExecutor(self.client).memory_limit() if self.client is not None else None
        return (limit or int(psutil.virtual_memory().total) // len(os.sched_getaffinity(0))) // 2


@dataclass(frozen=True)
class LazyInfluences:
    """A result that is not computed yet: print it to see the plan, then call `compute` or `to_zarr`.

    Attributes:
        plan: chunk sizes, tasks and projected memory.
    """

    _job: _Job = field(repr=False)
    plan: Plan
    _chunks: Mapping[str, int] = field(repr=False)
    _make_executor: Callable[[], AbstractContextManager[Executor]] = field(repr=False)

    def __str__(self) -> str:
        return str(self.plan)

    def compute(self, *, progress: bool = False) -> np.ndarray:
        """Compute the result into memory.

        Args:
            progress: show bars.

        Returns:
            The scores; the factors or the self-influences if only these were asked for.
        """
        # Through a store in the temporary folder: one way to compute, one to test.
        folder = tempfile.mkdtemp(prefix="outfluence-")
        try:
            dataset = self.to_zarr(Path(folder) / "result.zarr", progress=progress)
            return np.asarray(dataset[self._job.results[-1]].values)
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def to_zarr(self, path: str | os.PathLike[str], overwrite: bool = False, *, progress: bool = False) -> xr.Dataset:
        """Stream the result into a Zarr store, and open it.

        On an unfinished store of the same job this goes on with it; on a finished one it computes nothing.

        Args:
            path: folder of the store, on a file system that all workers share.
            overwrite: replace a store that is there, whatever job made it.
            progress: show bars.

        Returns:
            ``scores (test, train, ...)``, ``self_influences (train,)`` and ``factors (test, parameter)``, as far as they
            were asked for, chunk by chunk from disk when used.

        Raises:
            StoreMismatchError: if the store there was made by something else; it says what differs.
            StoreError: if the path cannot be written.
            RunError: if tasks failed, saying which and why. All others are stored: run again to repeat only these.
        """
        job, plan = self._job, self.plan
        identity = job.identity()
        store = Store.find(path)
        if store is not None and overwrite:
            store.remove()
            store = None
        if store is None:
            store = Store.create(path, _specs(plan), _coordinates(plan), _about(identity, plan))
        else:
            store.require(identity)
            plan = self._stored_plan(store)
        if not store.is_complete:
            with self._make_executor() as executor:
                _run(replace(job, plan=plan, store=store.path, threads=None), executor, store, progress)
            store.drop_inputs()
        return open_influences(store.path)

    def _stored_plan(self, store: Store) -> Plan:
        """The plan that the store was begun with: chunks cannot change on the way."""
        plan = Plan.from_json(store.about["plan"])
        for name, value in self._chunks.items():
            if value != getattr(plan, name):
                raise StoreMismatchError(
                    f"{store.path} was begun with {name}={getattr(plan, name)}, now {name}={value} is asked for. Leave it "
                    "out to go on, or pass overwrite=True to start again."
                )
        if not store.is_complete and plan.peak > self.plan.memory_limit:
            raise PlanError(
                f"{store.path} was begun with chunks that need {-(-plan.peak >> 20)} MiB a worker, more than the memory_limit "
                f"now. Raise memory_limit to go on, or pass overwrite=True to start again."
            )
        return plan


@dataclass(frozen=True)
class _Job:
    """All that a task needs. Workers read it from the store."""

    model: InfluenceModel
    test: Data | None = None
    factors: Data | None = None
    train: Data | None = None
    mode: InfluenceMode = InfluenceMode.Up
    self_influences: bool = False
    plan: Plan | None = None
    store: Path | None = None
    threads: int | None = None

    @property
    def results(self) -> list[str]:
        """Names of the variables of the result; what was asked for first comes last."""
        has_test = self.test is not None or self.factors is not None
        if self.train is None:
            return ["factors"]
        return (["factors"] if has_test else []) + ([SELVES] if self.self_influences else []) + ([SCORES] if has_test else [])

    @property
    def data(self) -> dict[str, Data]:
        """The data by role."""
        roles = {"test": self.test, "factors": self.factors, "train": self.train}
        return {role: data for role, data in roles.items() if data is not None}

    def identity(self) -> dict[str, Any]:
        """What the numbers in the store depend on. A store is continued by the same identity only."""
        return {
            **self.model.identity(),
            **{f"{role}_data": data.fingerprint for role, data in self.data.items()},
            "mode": str(self.mode),
            "results": self.results,
            "dtype": _numpy_name(self.model.problem.dtype),
            "versions": {name: _version(name).split(".")[0] for name in ("outfluence", "torch")},
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
            problem.mixed_derivatives(torch.zeros(1, problem.n_parameters, dtype=problem.dtype), *sample)
        hints = [data.batch_size for data in self.data.values() if data.batch_size]
        buffers = sum(b.nbytes for b in self.model.problem.model.buffers())
        return Work(
            n_test=len(n_rows) if n_rows is not None else 0,
            n_train=len(self.train) if self.train is not None else 0,
            row_bytes=problem.n_parameters * itemsize,
            itemsize=itemsize,
            features=tuple(floats[0].shape[1:]) if perturbation else (),
            directions=DIRECTIONS if perturbation else 0,
            self_influences=self.self_influences,
            model_bytes=sum(p.nbytes for p in problem.model.parameters()) + buffers + self.model.inverse.nbytes,
            activation_bytes=problem.activation_bytes(sample),
            batch_size=min(hints) if hints else None,
        )


def _run(job: _Job, executor: Executor, store: Store, progress: bool) -> None:
    """Do every task that has left no receipt."""
    assert job.plan is not None
    task_function: Callable[[str, int], dict[str, Any]]
    if isinstance(executor, DaskExecutor):
        recipe = _ship(replace(job, threads=executor.torch_threads()), store)
        executor.check_path(str(recipe))
        task_function = partial(_remote_task, str(recipe), recipe.stat().st_mtime_ns)
    else:
        task_function = partial(_task, job)
    try:
        for stage in job.plan.stages:
            done = store.done(stage.name)
            todo = [task for task in range(stage.n_tasks) if task not in done]
            failures = []
            with tqdm(
                total=stage.n_samples, desc=stage.name, unit=" samples", disable=not progress,
                initial=stage.n_samples - sum(_length(stage.samples(task)) for task in todo),
            ) as bar:
                for outcome in executor.run(partial(task_function, stage.name), todo, stage.name):
                    if outcome.error is not None:
                        failures.append((f"{stage.name} of samples {_text(stage.samples(outcome.task))}", outcome.error))
                    bar.update(_length(stage.samples(outcome.task)))
            if failures:
                _raise_failures(failures, store)
    finally:
        if isinstance(executor, DaskExecutor):
            executor.forget(_forget)


def _ship(job: _Job, store: Store) -> Path:
    """Write the recipe of a job, and first the data that lives in memory only."""
    stored = {}
    for role, data in job.data.items():
        if data.portable:
            stored[role] = data
            continue
        stored[role] = data.stored(partial(store.put_input, role))
    model = job.model
    if not model.problem.device.type == "cpu":
        raise ClusterError("workers load the model on their CPU: call model.to('cpu') first")
    return store.put_recipe(cloudpickle.dumps(replace(job, **stored)))


def _raise_failures(failures: list[tuple[str, BaseException]], store: Store) -> None:
    texts = [(task, f"{type(error).__name__}: {error}") for task, error in failures]
    shown = "\n".join(f"  {task}: {text}" for task, text in texts[:10])
    more = f"\n  and {len(texts) - 10} more" if len(texts) > 10 else ""
    raise RunError(
        f"{len(texts)} task(s) failed:\n{shown}{more}\nAll others are stored in {store.path}; the same call again repeats "
        "only what is missing.",
        texts,
    ) from failures[0][1]


# Tasks. They run in workers: what they need is in the job, what they make goes into the store.


def _remote_task(recipe: str, version: int, stage: str, task: int) -> dict[str, Any]:
    """Do a task in a worker, with the job that its store keeps."""
    return _task(_job_from(recipe, version), stage, task)


@lru_cache(maxsize=1)
def _job_from(recipe: str, version: int) -> _Job:  # noqa: ARG001 - a rewritten recipe is another one
    job: _Job = pickle.loads(Path(recipe).read_bytes())
    if job.threads is not None:
        torch.set_num_threads(job.threads)
    return job


def _forget() -> None:
    _job_from.cache_clear()


def _task(job: _Job, stage: str, task: int) -> dict[str, Any]:
    """Compute and store one range of samples, and leave the receipt."""
    assert job.plan is not None
    assert job.store is not None
    watch = _Watch()
    store = Store(job.store)
    (samples,) = (s.samples(task) for s in job.plan.stages if s.name == stage)
    with torch.no_grad():
        written, checksums = (_factors if stage == "factors" else _strip)(job, store, samples, watch)
    receipt = {
        "stage": stage,
        "task": task,
        "start": samples.start,
        "stop": samples.stop,
        "bytes_written": written,
        "checksums": checksums,
        "finished": datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds"),
        "worker": f"{socket.gethostname()}:{os.getpid()}",
        **watch.report(),
    }
    store.leave_receipt(stage, task, receipt)
    return receipt


def _factors(job: _Job, store: Store, samples: slice, watch: _Watch) -> tuple[int, dict[str, int]]:
    """The left rows of a range of test samples."""
    model, plan = job.model, job.plan
    assert plan is not None
    values = np.empty((_length(samples), model.n_parameters), _numpy_name(model.problem.dtype))
    for part in _batches(samples, plan.batch_size):
        if job.factors is not None:
            with watch("read"):
                rows = job.factors.rows(part).x.to(model.problem.dtype)
            check_finite(rows, "influence factors", "test", part.start)
        else:
            assert job.test is not None
            with watch("read"):
                batch = job.test.rows(part)
            with watch("factors"):
                rows = model.left_rows(*batch, "test", part.start).values
        values[_within(part, samples)] = to_numpy(rows)
    with watch("write"):
        checksum = store.write(FACTORS, (samples,), values)
    return values.nbytes, {FACTORS: checksum}


def _strip(job: _Job, store: Store, samples: slice, watch: _Watch) -> tuple[int, dict[str, int]]:
    """The scores of a range of training samples for all test samples, and their self-influences."""
    if job.mode is InfluenceMode.Perturbation:
        return _perturbed_strip(job, store, samples, watch)
    model, plan = job.model, job.plan
    assert plan is not None
    assert job.train is not None
    values = torch.empty(_length(samples), model.n_parameters, dtype=model.problem.dtype, device=model.problem.device)
    selves = []
    for part in _batches(samples, plan.batch_size):
        with watch("read"):
            batch = job.train.rows(part)
        with watch("gradients"):
            gradients = model.gradient_rows(*batch, "training", part.start)
            right = model.right_rows(gradients)
            values[_within(part, samples)] = right.values
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
    right = right.with_arrays({"values": values})
    for tile in plan.test_tiles:
        with watch("read factors"):
            left = _read_left(store, tile, model)
        with watch("scores"):
            block = left.dot(right)
        written += _write_scores(store, (tile, samples), block, watch, checksums)
    return written, checksums


def _perturbed_strip(job: _Job, store: Store, samples: slice, watch: _Watch) -> tuple[int, dict[str, int]]:
    """The scores of the features of a range of training samples, for all test samples."""
    model, plan = job.model, job.plan
    assert plan is not None
    assert job.train is not None
    written, checksums = 0, dict[str, int]()
    for tile in plan.test_tiles:
        with watch("read factors"):
            left = _read_left(store, tile, model)
        block = torch.empty(len(left), _length(samples), *plan.work.features, dtype=model.problem.dtype)
        for part in _batches(samples, plan.batch_size):
            with watch("read"):
                batch = job.train.rows(part)
            with watch("scores"):
                block[:, _within(part, samples)] = model.perturbations(left, *batch).to(block)
        written += _write_scores(store, (tile, samples), block, watch, checksums)
    if job.self_influences:
        up, more = _strip(replace(job, mode=InfluenceMode.Up, plan=_without_test(plan)), store, samples, watch)
        return written + up, checksums | more
    return written, checksums


def _read_left(store: Store, tile: slice, model: InfluenceModel) -> DenseRows:
    values = torch.from_numpy(store.read(FACTORS, (tile,))).to(model.problem.device)
    check_finite(values, "stored influence factors", "test", tile.start)
    return DenseRows(values, model.problem.sections)


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

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}
        self._start = time.perf_counter()

    @contextmanager
    def __call__(self, what: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self._seconds[what] = self._seconds.get(what, 0.0) + time.perf_counter() - start

    def report(self) -> dict[str, Any]:
        unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss
        return {
            "seconds": round(time.perf_counter() - self._start, 6),
            "seconds_by_part": {what: round(seconds, 6) for what, seconds in self._seconds.items()},
            "peak_bytes": max(0, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit - _BASELINE_BYTES),
            "threads": torch.get_num_threads(),
        }


#: What this process took when it had imported everything; memory is reported above it.
_BASELINE_BYTES = psutil.Process().memory_info().rss


def _specs(plan: Plan) -> list[ArraySpec]:
    work = plan.work
    dtype = f"float{8 * work.itemsize}"
    specs = []
    if work.n_test:
        columns = work.row_bytes // work.itemsize
        about = {"long_name": "influence factors g^T (H + lambda 1)^-1", "axes": "test sample, model parameter"}
        shape, chunks = (work.n_test, columns), (plan.test_chunk, min(columns, _FACTOR_COLUMNS))
        specs.append(ArraySpec(FACTORS, shape, chunks, dtype, ("test", "parameter"), about))
    if work.n_test and work.n_train:
        about = {"long_name": "influence of a training sample on a test sample; positive: it helps"}
        shape = (work.n_test, work.n_train, *work.features)
        chunks = (plan.test_chunk, plan.train_chunk, *work.features)
        dims = ("test", "train", *(f"feature_{i}" for i in range(len(work.features))))
        specs.append(ArraySpec(SCORES, shape, chunks, dtype, dims, about))
    if work.self_influences:
        about = {"long_name": "influence of a training sample on itself"}
        specs.append(ArraySpec(SELVES, (work.n_train,), (plan.train_chunk,), dtype, ("train",), about))
    return specs


def _coordinates(plan: Plan) -> dict[str, int]:
    return {dim: n for dim, n in (("test", plan.work.n_test), ("train", plan.work.n_train)) if n}


def _about(identity: dict[str, Any], plan: Plan) -> dict[str, Any]:
    packages = ("outfluence", "torch", "numpy", "zarr", "xarray", "dask", "distributed")
    return {
        "identity": identity,
        "plan": plan.to_json(),
        "tasks": {stage.name: stage.n_tasks for stage in plan.stages},
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in packages}},
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def _factor_data(factors: Any, model: InfluenceModel) -> Data:
    if isinstance(factors, xr.Dataset):
        if "factors" not in factors:
            raise DataError(f"the dataset holds no factors, only {list(factors.data_vars)}")
        factors = factors["factors"]
    if isinstance(factors, xr.DataArray):
        factors = factors.data
    data = Data.from_arrays(factors)
    (width,) = (tuple(leaf.shape[1:]) for leaf in tree_leaves(data.rows(slice(0, 1)).x))
    if width != (model.n_parameters,):
        raise DataError(
            f"factors must be (n_test, {model.n_parameters}), one column for each parameter; got (n_test, "
            f"{', '.join(map(str, width))})"
        )
    return data


def _without_test(plan: Plan) -> Plan:
    return replace(plan, work=replace(plan.work, n_test=0, directions=0, features=()))


def _numpy_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _version(package: str) -> str:
    return importlib.metadata.version(package)


def _length(samples: slice) -> int:
    return int(samples.stop - samples.start)


def _text(samples: slice) -> str:
    return f"{samples.start} to {samples.stop - 1}"


def _within(part: slice, samples: slice) -> slice:
    return slice(part.start - samples.start, part.stop - samples.start)


def _batches(samples: slice, size: int) -> Iterator[slice]:
    for start in range(samples.start, samples.stop, size):
        yield slice(start, min(start + size, samples.stop))

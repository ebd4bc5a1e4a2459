"""Calculators: map an influence model over data, chunk by chunk, following a plan, into a store.

A calculator only collects what a run needs and says who computes; the tasks (`tasks`) are the same everywhere, and give
the same numbers.
"""

from __future__ import annotations

import datetime
import io
import os
import platform
import shutil
import tempfile
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, final

import cloudpickle
import numpy as np
import psutil
import torch
import xarray as xr
from distributed import Client
from tqdm.auto import tqdm

from outfluence.analysis import open_influences
from outfluence.data import Data, DataLike
from outfluence.errors import (
    ClusterError,
    ConvergenceWarning,
    DataError,
    PlanError,
    ProblemError,
    RunError,
    StoreError,
    StoreMismatchError,
)
from outfluence.executors import (
    DaskExecutor,
    Executor,
    SequentialExecutor,
    cores,
    current_client,
    dask_executor,
)
from outfluence.fingerprint import fingerprint
from outfluence.influence import InfluenceModel
from outfluence.modes import InfluenceMode
from outfluence.plan import Plan, make_plan, parse_bytes
from outfluence.store import ArraySpec, Store
from outfluence.tasks import (
    FACTORS,
    SCORES,
    SELVES,
    Job,
    forget,
    length,
    read_all_factors,
    remote_task,
    resident_bytes,
    run_task,
    version_of,
)

#: Columns of a chunk of the stored factors: bounds the size of its files.
_FACTOR_COLUMNS = 1 << 16


#: The arrays of rows: what they are, and what their second axis counts.
_ROWS = {
    "values": ("influence factors g^T (H + lambda 1)^-1", "parameter"),
    "coordinates": ("coordinates of influence factors in the basis of the method", "coordinate"),
    "identity": ("the identity's part of influence factors", "parameter"),
}


class InfluenceCalculator(ABC):
    """What both calculators do.

    Args:
        model: a fitted influence model.
    """

    def __init__(self, model: InfluenceModel) -> None:
        if not isinstance(model, InfluenceModel):
            raise ProblemError(
                f"model must be a fitted influence model (EkfacInfluence, say), not a {type(model).__name__}"
            )
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
        return self._lazy(Job(self.model, test=Data.of(test)), memory_limit)

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
        job = Job(
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
        job = Job(
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
        job = Job(self.model, train=Data.of(train), self_influences=True)
        return self._lazy(job, memory_limit, None, train_chunk)

    @abstractmethod
    def _executor(self) -> AbstractContextManager[Executor]:
        """Who computes."""

    def _lazy(
        self,
        job: Job,
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
        if client is not None and not isinstance(client, Client):
            raise ClusterError(f"client must be a distributed.Client, not a {type(client).__name__}: Client(cluster)")
        self.client = client
        if client is not None:
            DaskExecutor(client).check()

    @contextmanager
    def _executor(self) -> Iterator[Executor]:
        with dask_executor(self.client) as executor:
            executor.check()
            yield executor

    def _default_limit(self) -> int:
        client = self.client or current_client()
        limit = DaskExecutor(client).memory_limit() if client is not None else None
        return (limit or int(psutil.virtual_memory().total) // cores()) // 2


@dataclass(frozen=True)
class LazyInfluences:
    """A result that is not computed yet: print it to see the plan, then call `compute` or `to_zarr`.

    Attributes:
        plan: chunk sizes, tasks and projected memory.
    """

    _job: Job = field(repr=False)
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
            The scores; the factors ``(n_test, P)`` or the self-influences if only these were asked for.
        """
        # Through a store in the temporary folder: one way to compute, one to test.
        folder = tempfile.mkdtemp(prefix="outfluence-")
        try:
            path = Path(folder) / "result.zarr"
            dataset = self.to_zarr(path, progress=progress)
            if self._job.train is None:
                return read_all_factors(replace(self._job, plan=self.plan), Store(path))
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
            ``scores (test, train, ...)``, ``self_influences (train,)`` and ``factors (test, parameter)``, as far as
            they were asked for, chunk by chunk from disk when used. Low-rank methods store their coordinates instead
            of factors; see `open_influences`.

        Raises:
            StoreMismatchError: if the store there was made by something else; it says what differs.
            StoreError: if the path cannot be written.
            RunError: if tasks failed, saying which and why. All others are stored: run again to repeat only these.
        """
        job, path = self._job, _local(path)
        for data, whose in ((job.test, "test"), (job.train, "training")):
            if data is not None:  # again: the model may have gone on training since
                job.model.check(data, whose)
        identity = job.identity()
        store, replaced = Store.find(path), None
        if store is not None and overwrite:
            replaced, store = _move_aside(store, job, identity), None
        if store is None:
            plan = self.plan
            try:
                store = Store.create(path, _specs(plan), _coordinates(plan), _about(job, identity, plan))
            except StoreError:
                if replaced is not None:
                    replaced.rename(path)
                raise
        store.require(identity)
        plan = self._stored_plan(store)
        if replaced is not None:
            shutil.rmtree(replaced)
        if not store.is_complete:
            model = _begun_with(store, job.model)
            if model.inverse.data is not None:  # passes in batches that the plan has counted
                model = model.reading(model.inverse.data.in_batches(plan.batch_size))
            with self._make_executor() as executor:
                _run(
                    replace(job, model=model, plan=plan, store=store.path, store_id=store.id), executor, store, progress
                )
        store.drop_inputs()
        return open_influences(store.path)

    def _stored_plan(self, store: Store) -> Plan:
        """The plan that the store was begun with: chunks cannot change on the way."""
        plan = Plan.from_json(store.about["plan"])
        for name, value in self._chunks.items():
            if value != getattr(plan, name):
                raise StoreMismatchError(
                    f"{store.path} was begun with {name}={getattr(plan, name)}, now {name}={value} is asked for. Leave "
                    "it out to go on, or pass overwrite=True to start again."
                )
        if not store.is_complete and plan.peak > self.plan.memory_limit:
            raise PlanError(
                f"{store.path} was begun with chunks that need {-(-plan.peak >> 20)} MiB a worker, more than the "
                f"memory_limit now. Raise memory_limit to go on, or pass overwrite=True to start again."
            )
        return plan


def _run(job: Job, executor: Executor, store: Store, progress: bool) -> None:
    """Do every task that has left no receipt."""
    assert job.plan is not None
    task_function: Callable[[str, int], dict[str, Any]]
    # The last bits of a matrix product may depend on the number of threads: go on with as many as were begun with.
    first = next((store.receipt(s.name, task) for s in job.plan.stages for task in store.done(s.name)), None)
    begun_with = first["threads"] if first else None
    threads_before = torch.get_num_threads()
    if isinstance(executor, DaskExecutor):
        recipe = _ship(replace(job, threads=begun_with or executor.torch_threads()), store)
        executor.check_path(str(recipe))
        task_function = partial(remote_task, str(recipe), recipe.stat().st_mtime_ns)
    else:
        task_function = partial(run_task, replace(job, baseline_bytes=resident_bytes()))
        torch.set_num_threads(begun_with or threads_before)
    try:
        for stage in job.plan.stages:
            done = store.done(stage.name)
            todo = [task for task in range(stage.n_tasks) if task not in done]
            failures: list[tuple[str, BaseException]] = []
            doubts: list[str] = []
            with tqdm(
                total=stage.n_samples,
                desc=stage.name,
                unit=" samples",
                disable=not progress,
                initial=stage.n_samples - sum(length(stage.samples(task)) for task in todo),
            ) as bar:
                for outcome in executor.run(partial(task_function, stage.name), todo, stage.name):
                    if outcome.error is not None:
                        failures.append(
                            (f"{stage.name} of samples {_text(stage.samples(outcome.task))}", outcome.error)
                        )
                    else:
                        doubts += (outcome.receipt or {}).get("warnings", [])
                    bar.update(length(stage.samples(outcome.task)))
            if doubts:
                warnings.warn(
                    f"{len(doubts)} warning(s) from tasks of {stage.name!r}, the first: {doubts[0]}",
                    ConvergenceWarning,
                    stacklevel=3,
                )
            missing = set(range(stage.n_tasks)) - store.done(stage.name)
            if failures or missing:
                _raise_failures(failures, len(missing), stage.name, store)
    finally:
        forget()
        if isinstance(executor, DaskExecutor):
            executor.forget(forget)
        torch.set_num_threads(threads_before)


def _ship(job: Job, store: Store) -> Path:
    """Write the recipe of a job, and first the data that lives in memory only."""
    if job.model.problem.device.type != "cpu":
        raise ClusterError("workers load the model on their CPU: call model.to('cpu') first")
    stored: dict[str, Any] = {
        role: data.stored(partial(store.put_input, data.fingerprint)) for role, data in job.inputs.items()
    }
    fit = stored.pop("fit", None)
    if fit is not None:
        stored["model"] = job.model.reading(fit)
    return store.put_file("recipe.pkl", cloudpickle.dumps(replace(job, **stored)))


def _begun_with(store: Store, model: InfluenceModel) -> InfluenceModel:
    """The model with the inverse that the store was begun with.

    A fit that is repeated may differ in the last bits (with the number of threads, say), and the halves of the result
    with it. So an unfinished store keeps its inverse: named tensors, and nothing that runs when it is loaded.
    """
    file = store.input_file("inverse.pt")
    if file.exists():
        tensors = torch.load(file, map_location=model.problem.device, weights_only=True)
        return model.with_inverse(model.inverse.with_tensors(tensors))
    content = io.BytesIO()
    torch.save(model.inverse.tensors, content)
    store.put_file("inverse.pt", content.getvalue())
    return model


def _raise_failures(failures: list[tuple[str, BaseException]], n_missing: int, stage: str, store: Store) -> None:
    texts = [(task, f"{type(error).__name__}: {error}") for task, error in failures]
    shown = "\n".join(f"  {task}: {text}" for task, text in texts[:10])
    more = f"\n  and {len(texts) - 10} more" if len(texts) > 10 else ""
    raise RunError(
        f"{n_missing} task(s) of {stage!r} failed:\n{shown}{more}\nWhat was computed is stored in {store.path}; the "
        "same call again goes on from there.",
        texts,
    ) from (failures[0][1] if failures else None)


def _local(path: str | os.PathLike[str]) -> Path:
    text = os.fspath(path)
    if "://" in text:
        raise StoreError(f"{text}: stores are folders of a file system; object stores are not supported yet")
    return Path(text).expanduser().absolute()


def _move_aside(store: Store, job: Job, identity: Mapping[str, Any]) -> Path:
    """Free the path of a store that is to be replaced, unless it holds what the new one is made from."""
    aside = store.move_aside()
    try:
        unchanged = all(identity[f"{role}_data"] == data.content_now() for role, data in job.inputs.items())
    except Exception:  # it cannot even be read any more
        unchanged = False
    if not unchanged:
        aside.rename(store.path)
        raise StoreMismatchError(
            f"{store.path} holds factors or data that the new store is to be made from: choose another path for it"
        )
    return aside


def _specs(plan: Plan) -> list[ArraySpec]:
    work = plan.work
    dtype = f"float{8 * work.itemsize}"
    specs: list[ArraySpec] = []
    shape: tuple[int, ...]
    chunks: tuple[int, ...]
    dims: tuple[str, ...]
    if work.n_test:
        for name, columns in work.arrays.items():
            shape, chunks = (work.n_test, columns), (plan.test_chunk, max(1, min(columns, _FACTOR_COLUMNS)))
            about, dims = {"long_name": _ROWS[name][0]}, ("test", _ROWS[name][1])
            specs.append(ArraySpec(f"{FACTORS}/{name}", shape, chunks, dtype, dims, about))
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


def _basis(model: InfluenceModel) -> str | None:
    """What the coordinates of this very fit refer to; None if its rows are no coordinates."""
    if "values" in model.empty_rows().arrays:
        return None
    return fingerprint({name: tensor.cpu() for name, tensor in model.inverse.tensors.items()})


def _about(job: Job, identity: dict[str, Any], plan: Plan) -> dict[str, Any]:
    packages = ("outfluence", "torch", "numpy", "zarr", "xarray", "dask", "distributed")
    return {
        "identity": identity,
        "basis": _basis(job.model),
        "plan": plan.to_json(),
        "tasks": {stage.name: stage.n_tasks for stage in plan.stages},
        "versions": {"python": platform.python_version(), **{name: version_of(name) for name in packages}},
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def _factor_data(factors: Any, model: InfluenceModel) -> Data:
    """Factors as data whose x is the values, or a dict of the arrays of another kind of rows."""
    wanted = model.empty_rows().arrays
    if isinstance(factors, xr.Dataset):
        names = {f"factor_{name}": name for name in wanted}
        if "factors" in factors:
            factors = factors["factors"]
        elif names.keys() <= set(factors.data_vars):
            if factors.attrs.get("outfluence", {}).get("basis") != _basis(model):
                raise DataError(
                    "these factors are coordinates in the basis of another fit or rank: compute them again with this "
                    "model, or keep the model that made them"
                )
            factors = {name: factors[variable].data for variable, name in names.items()}
        else:
            raise DataError(f"the dataset holds no factors of {type(model).__name__}, only {list(factors.data_vars)}")
    if isinstance(factors, xr.DataArray):
        factors = factors.data
    data = Data.from_arrays(factors)
    x = data.rows(slice(0, 1)).x
    if not isinstance(x, dict) and tuple(x.shape[1:]) != (model.n_parameters,):
        raise DataError(
            f"factors must be (n_test, {model.n_parameters}), one column for each parameter; got (n_test, "
            f"{', '.join(map(str, x.shape[1:]))})"
        )
    return data


def _text(samples: slice) -> str:
    return f"{samples.start} to {samples.stop - 1}"

"""Calculators: map an influence model over data, chunk by chunk, following a plan, into a store.

A calculator only collects what a run needs and says who computes; the tasks (`tasks`) are the same everywhere, and give
the same numbers.
"""

from __future__ import annotations

import io
import os
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

import numpy as np
import psutil
import torch
import xarray as xr
from distributed import Client

from outfluence.analysis import open_influences
from outfluence.contents import (
    about_fit,
    about_run,
    array_specs,
    coordinates,
    fit_identity,
    keep_inverse,
    stored_inverse,
)
from outfluence.data import Data, DataLike
from outfluence.errors import (
    ClusterError,
    ConvergenceWarning,
    DamageWarning,
    DataError,
    Interrupted,
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
from outfluence.fitting import Summed
from outfluence.influence import InfluenceModel
from outfluence.jobs import (
    SCORES,
    SELVES,
    Job,
    Wanted,
    factor_data,
    length,
    local_path,
    raise_failures,
    wanted_of,
    with_training,
)
from outfluence.modes import InfluenceMode
from outfluence.plan import Plan, Stage, make_plan, parse_bytes
from outfluence.progress import ProgressCallback, Tracker, as_callback
from outfluence.record import resident_bytes
from outfluence.rows import GradientRows
from outfluence.runs import Do, here, resumable, workplace
from outfluence.solvers.ensemble import EnsembleProblem
from outfluence.store import ASSESS, Store
from outfluence.tasks import (
    assess_task,
    calibrate,
    check_task,
    read_all_factors,
    run_task,
)


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

    def fit(
        self,
        train: DataLike,
        path: str | os.PathLike[str] | None = None,
        *,
        memory_limit: str | int | None = None,
        progress: bool | ProgressCallback = False,
    ) -> InfluenceModel:
        """Fit the model by sums over chunks of the training data, in tasks that keep to a memory limit.

        Equals ``model.fit(train)`` up to rounding. What the method makes of the sums (eigenvectors, say) is computed in
        this process. Conjugate gradient, LiSSA and the harmonic mean read the data when they are applied; of them only
        preconditioners are fitted.

        Args:
            train: anything `Data.of` takes.
            path: folder of a store for the fitted model, on a file system that all workers share. If a fit of the same
                model to the same data is there, it is loaded; if an unfinished one, this goes on with it. None: nothing
                is kept.
            memory_limit: bytes a worker may take above its imports; see `influence_factors`.
            progress: show bars, or call a function with each `Progress`.

        Returns:
            The model of this calculator, fitted.

        Raises:
            PlanError: if a pass does not fit into the memory limit.
            StoreMismatchError: if the store there was made by something else; it says what differs.
            RunError: if tasks failed. What was computed is stored, if a path was given.
            Interrupted: on Ctrl-C, or when the process is told to end (SIGTERM). The same call goes on.
        """
        data, model = Data.of(train), self.model
        limit = parse_bytes(memory_limit) if memory_limit is not None else self._default_limit()
        folder = tempfile.mkdtemp(prefix="outfluence-") if path is None else None
        try:
            where = Path(folder) / "fit.zarr" if path is None and folder else local_path(path or "")
            identity = fit_identity(model, data)
            store = Store.find(where) or Store.create(where, [], {}, about_fit(identity, limit))
            store.require(identity)
            if not store.is_complete:
                unfitted = model.unfitted()
                unfitted.look_at(data)  # before workers get it
                job = Job(unfitted, train=data, store=store.path, store_id=store.id)
                callback = as_callback(progress)
                with resumable(store), self._executor() as executor, workplace(job, executor, store, callback) as do:
                    unfitted.fit(Summed("train", job, do, executor, limit, callback))
                    keep_inverse(store, unfitted.inverse.tensors)
            store.drop_work()
            # As it is stored, also the first time: the layout in memory makes a difference in the last bits.
            return model.restore(data, stored_inverse(store))
        finally:
            if folder is not None:
                shutil.rmtree(folder, ignore_errors=True)

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
        train: DataLike = None,
        mode: InfluenceMode | str = InfluenceMode.Up,
        *,
        matrix: bool = True,
        top_k: int | None = None,
        bottom_k: int | None = None,
        groups: Any = None,
        self_influences: bool = False,
        keep_gradients: bool = False,
        from_store: str | os.PathLike[str] | None = None,
        assess: bool = False,
        memory_limit: str | int | None = None,
        test_chunk: int | None = None,
        train_chunk: int | None = None,
    ) -> LazyInfluences:
        """Influences of training samples on test samples, to be computed.

        Factors are computed once per test chunk and stored; then each training gradient once, in one pass for all
        results.

        Args:
            test: anything `Data.of` takes.
            train: likewise; None with ``from_store``.
            mode: perturb weights, ``(n_test, n_train)``, or features, ``(n_test, n_train, *features)``.
            matrix: keep all scores. Without it the matrix never exists, not on disk either.
            top_k: keep for each test sample the so many highest scores, which help it, and whose they are.
            bottom_k: and the lowest, which harm it.
            groups: for each test sample the name of its group, numbers or texts: keep for each group the mean score of
                each training sample.
            self_influences: also the influence of each training sample on itself, ``(n_train,)``.
            keep_gradients: also keep the rows that training samples are encoded to, for ``from_store``.
            from_store: a store with such rows: the training data is not read and the model does not see it.
            assess: also say how far to believe the scores, from a sample of the data; see `assess`. It is a task of its
                own, the first one, whose memory is not planned. The store keeps what it finds; asked of a finished
                store it is the only one.
            memory_limit: see `influence_factors`.
            test_chunk: test samples per chunk of the result; None: the plan chooses.
            train_chunk: training samples per chunk of the result; None: the plan chooses.

        Raises:
            OutfluenceError: whatever would make the run fail, before any work.
        """
        job = Job(self.model, test=Data.of(test), mode=InfluenceMode(mode))
        job = with_training(job, train, from_store)
        if assess and job.train is None:
            raise DataError("assess needs the training data: it cannot be had from_store")
        if assess and isinstance(self.model.problem, EnsembleProblem):
            raise ProblemError("several models are assessed one by one, each by its influence model: see assess")
        wanted = wanted_of(job, matrix, top_k, bottom_k, groups, self_influences, keep_gradients)
        return self._lazy(replace(job, wanted=wanted, assess=assess), memory_limit, test_chunk, train_chunk)

    def influences_from_factors(
        self,
        factors: Any,
        train: DataLike = None,
        mode: InfluenceMode | str = InfluenceMode.Up,
        *,
        matrix: bool = True,
        top_k: int | None = None,
        bottom_k: int | None = None,
        groups: Any = None,
        self_influences: bool = False,
        keep_gradients: bool = False,
        from_store: str | os.PathLike[str] | None = None,
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
            matrix: see `influences`.
            top_k: see `influences`.
            bottom_k: see `influences`.
            groups: see `influences`.
            self_influences: see `influences`.
            keep_gradients: see `influences`.
            from_store: see `influences`.
            memory_limit: see `influence_factors`.
            test_chunk: see `influences`.
            train_chunk: see `influences`.

        Raises:
            DataError: if the factors do not have one column for each parameter.
        """
        job = Job(self.model, factors=factor_data(factors, self.model), mode=InfluenceMode(mode))
        job = with_training(job, train, from_store)
        wanted = wanted_of(job, matrix, top_k, bottom_k, groups, self_influences, keep_gradients)
        return self._lazy(replace(job, wanted=wanted), memory_limit, test_chunk, train_chunk)

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
        job = Job(self.model, train=Data.of(train), wanted=Wanted(matrix=False, self_influences=True))
        return self._lazy(job, memory_limit, None, train_chunk)

    def plan(self, test: DataLike, train: DataLike = None, **options: Any) -> Plan:
        """What `influences` with the same arguments would do, and about how long it would take.

        Times follow from a calibration on the first batch, in this process; they are estimates.

        Args:
            test: see `influences`.
            train: see `influences`.
            options: see `influences`.

        Raises:
            PlanError: if it does not fit into the memory limit; it names the smallest that works, and what to change.
        """
        lazy = self.influences(test, train, **options)
        return replace(lazy.plan, costs=calibrate(replace(lazy.job, plan=lazy.plan), self._n_workers()))

    @abstractmethod
    def _n_workers(self) -> int:
        """How many share the work."""

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
        job = replace(job, test_gradients=self._empty(job.test), train_gradients=self._empty(job.train))
        plan = make_plan(job.work(), limit, test_chunk=test_chunk, train_chunk=train_chunk)
        asked = {"test_chunk": test_chunk, "train_chunk": train_chunk}
        return LazyInfluences(
            job, plan, {name: getattr(plan, name) for name, value in asked.items() if value}, self._executor
        )

    def _default_limit(self) -> int:
        return int(psutil.virtual_memory().total) // 2

    def _empty(self, data: Data | None) -> GradientRows | None:
        """Gradients of none of its samples; their shapes depend on those of the samples."""
        return None if data is None else self.model.empty_gradients(data.rows(slice(0, 1)))


@final
class SequentialInfluenceCalculator(InfluenceCalculator):
    """Computes in this process, one chunk after another.

    Args:
        model: a fitted influence model.
    """

    def _executor(self) -> AbstractContextManager[Executor]:
        return nullcontext(SequentialExecutor())

    def _n_workers(self) -> int:
        return 1


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

    def _n_workers(self) -> int:
        client = self.client or current_client()
        return max(1, len(client.nthreads())) if client is not None else cores()

    def _default_limit(self) -> int:
        client = self.client or current_client()
        limit = DaskExecutor(client).memory_limit() if client is not None else None
        return (limit or int(psutil.virtual_memory().total) // cores()) // 2


@dataclass(frozen=True)
class LazyInfluences:
    """A result that is not computed yet: print it to see the plan, then call `compute` or `to_zarr`.

    Attributes:
        job: what is computed.
        plan: chunk sizes, tasks and projected memory.
    """

    job: Job = field(repr=False)
    plan: Plan
    _chunks: Mapping[str, int] = field(repr=False)
    _make_executor: Callable[[], AbstractContextManager[Executor]] = field(repr=False)

    def __str__(self) -> str:
        return str(self.plan)

    def _repr_html_(self) -> str:
        return self.plan._repr_html_()

    def compute(self, *, progress: bool | ProgressCallback = False) -> Any:
        """Compute the result into memory.

        Args:
            progress: show bars, or call a function with each `Progress`.

        Returns:
            The scores, the factors ``(n_test, P)`` or the self-influences as an array, if only these were asked for;
            else a dataset, in memory.
        """
        # Through a store in the temporary folder: one way to compute, one to test.
        folder = tempfile.mkdtemp(prefix="outfluence-")
        job, work = self.job, self.plan.work
        try:
            path = Path(folder) / "result.zarr"
            dataset = self.to_zarr(path, progress=progress)
            if not work.n_train:
                return read_all_factors(replace(job, plan=self.plan), Store(path))
            if not job.has_test:
                return np.asarray(dataset[SELVES].values)
            is_plain = job.wanted.identity() == Wanted().identity() and not job.assess
            return np.asarray(dataset[SCORES].values) if is_plain else dataset.load()
        except (RunError, Interrupted) as error:
            error.add_note("compute() keeps nothing where it fails: use to_zarr(path), which goes on from there")
            raise
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def to_zarr(
        self, path: str | os.PathLike[str], overwrite: bool = False, *, progress: bool | ProgressCallback = False
    ) -> xr.Dataset:
        """Stream the result into a Zarr store, and open it.

        On an unfinished store of the same job this goes on with it; on a finished one it computes nothing. What an
        unfinished store holds already is read and compared with its checksums first; what is damaged is computed again.

        Args:
            path: folder of the store, on a file system that all workers share.
            overwrite: replace a store that is there, whatever job made it.
            progress: show bars, or call a function with each `Progress`.

        Returns:
            What `open_influences` gives.

        Raises:
            StoreMismatchError: if the store there was made by something else; it says what differs.
            StoreError: if the path cannot be written.
            RunError: if tasks failed, saying which and why. All others are stored: run again to repeat only these.
            Interrupted: on Ctrl-C, or when the process is told to end (SIGTERM). The same call goes on.
        """
        job, path = self.job, local_path(path)
        for data, whose in ((job.test, "test"), (job.train, "training")):
            if data is not None:  # again: the model may have gone on training since
                job.model.check(data, whose)
        identity = job.identity()
        Store.recover(path)
        store, replaced = Store.find(path), None
        if store is not None and overwrite:
            replaced, store = _move_aside(store, job, identity), None
        if store is None:
            plan = self.plan
            try:
                store = Store.create(
                    path, array_specs(job, plan), coordinates(job, plan), about_run(job, identity, plan)
                )
            except StoreError:
                if replaced is not None:
                    replaced.rename(path)
                raise
        store.require(identity)
        plan = self._stored_plan(store)
        if replaced is not None:
            shutil.rmtree(replaced, ignore_errors=True)
        if not store.is_complete or (job.assess and not store.done(ASSESS)):
            # Passes over the data of the fit are in batches that the plan has counted.
            job = replace(job, model=_begun_with(store, job.model), plan=plan).in_batches(plan.batch_size)
            job = replace(job, store=store.path, store_id=store.id)
            store.restore_work(array_specs(job, plan))
            with resumable(store), self._make_executor() as executor:
                _run(job, executor, store, as_callback(progress))
        store.drop_work()
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


def _run(job: Job, executor: Executor, store: Store, callback: ProgressCallback | None) -> None:
    """Do every task that has left no receipt, and those whose work is damaged."""
    assert job.plan is not None
    failures: list[tuple[str, BaseException]] = []
    on_dask = isinstance(executor, DaskExecutor)
    with workplace(job, executor, store, callback) as do:
        if job.assess and not store.done(ASSESS):
            outcomes = executor.run(do(assess_task), [0], ASSESS)
            failures += [("assess", outcome.error) for outcome in outcomes if outcome.error is not None]
        stages = [] if store.is_complete else job.plan.stages
        if stages:
            _withdraw_damaged(do, job.plan, executor, store)
        for stage in stages:
            if stage.name == "strongest" and len(store.done("scores", or_in_part=True)) < _stage(job, "scores").n_tasks:
                break  # without the candidates of all strips there is nothing to merge; the failures say why
            where: tuple[Do, Executor] = (do, executor)
            if stage.name == "factors" and stage.n_tasks == 1 and job.plan.work.solves and on_dask:
                # One solve for all test samples: it runs here, and all workers take part in its passes over the data.
                data = Summed("fit", job, do, executor, job.plan.memory_limit, None)
                solving = replace(job, model=job.model.reading(data), baseline_bytes=resident_bytes())
                where = partial(here, solving), SequentialExecutor()
            failures += _run_stage(stage, job.plan, *where, store, callback)
    n_missing = sum(total - done for done, total in store.progress().values())
    if failures or n_missing:
        raise_failures(failures, "run", n_missing, store)


def _run_stage(
    stage: Stage,
    plan: Plan,
    do: Do,
    executor: Executor,
    store: Store,
    callback: ProgressCallback | None,
) -> list[tuple[str, BaseException]]:
    """Do the tasks of a stage that are not done; those that failed, with the reasons."""
    with_factors = store.done("factors")
    tiles = plan.test_tiles
    missing = () if stage.name == "factors" else tuple(t.start for i, t in enumerate(tiles) if i not in with_factors)
    done = store.done(stage.name) | store.done_in_part(stage.name, set(missing))
    todo = [task for task in range(stage.n_tasks) if task not in done]
    failures: list[tuple[str, BaseException]] = []
    doubts: list[str] = []
    samples_before = stage.n_samples - sum(length(stage.samples(task)) for task in todo)
    tracker = Tracker(stage.name, stage.n_tasks, stage.n_samples, len(done), samples_before, callback)
    for outcome in executor.run(do(run_task, stage=stage.name, missing=missing), todo, stage.name):
        samples = stage.samples(outcome.task)
        if outcome.error is not None:
            failures.append((f"{stage.name} of samples {_text(samples)}", outcome.error))
        else:
            doubts += (outcome.receipt or {}).get("warnings", [])
        tracker.update(length(samples), outcome.receipt)
    if doubts:
        warnings.warn(
            f"{len(doubts)} warning(s) from tasks of {stage.name!r}, the first: {doubts[0]}",
            ConvergenceWarning,
            stacklevel=4,
        )
    return failures


def _withdraw_damaged(do: Do, plan: Plan, executor: Executor, store: Store) -> None:
    """Read what is done already, and take back the receipts of what is not there any more as it was written."""
    merged = True  # once merged, candidates are of no use any more
    for stage in reversed(plan.stages):
        done = sorted(store.done(stage.name, or_in_part=True))
        check = do(check_task, stage=stage.name, results_only=merged)
        for outcome in executor.run(check, done, f"check-{stage.name}"):
            if outcome.receipt is None or not outcome.receipt["sound"]:
                warnings.warn(
                    f"{store.path}: {stage.name} of samples {_text(stage.samples(outcome.task))} are damaged (a "
                    "checksum differs, or a file is missing); they are computed again",
                    DamageWarning,
                    stacklevel=5,
                )
                store.withdraw_receipt(stage.name, outcome.task)
        merged = stage.name != "strongest" or len(store.done(stage.name)) == stage.n_tasks


def _stage(job: Job, name: str) -> Stage:
    assert job.plan is not None
    return next(stage for stage in job.plan.stages if stage.name == name)


def _begun_with(store: Store, model: InfluenceModel) -> InfluenceModel:
    """The model with the inverse that the store was begun with.

    A fit that is repeated may differ in the last bits (with the number of threads, say), and the halves of the result
    with it. So an unfinished store keeps its inverse: named tensors, and nothing that runs when it is loaded.
    """
    file = store.work_file("inverse.pt")
    if file.exists():
        tensors = torch.load(file, map_location=model.problem.device, weights_only=True)
        return model.with_inverse(model.inverse.with_tensors(tensors))
    content = io.BytesIO()
    torch.save(model.inverse.tensors, content)
    store.put_file("inverse.pt", content.getvalue(), once=True)
    return _begun_with(store, model)  # another client may have been faster


def _move_aside(store: Store, job: Job, identity: Mapping[str, Any]) -> Path:
    """Free the path of a store that is to be replaced, unless it holds what the new one is made from."""
    glimpses = {role: fingerprint(data.rows(slice(0, 1))) for role, data in job.inputs.items()}
    aside = store.move_aside()
    try:
        # A handle whose fingerprint was given, by a user or by a store, is believed without reading: look at it.
        unchanged = all(
            glimpses[role] == fingerprint(data.rows(slice(0, 1)))
            and identity.get(f"{role}_data", data.fingerprint) == data.content_now()
            for role, data in job.inputs.items()
        )
    except Exception:  # it cannot even be read any more
        unchanged = False
    except BaseException:
        aside.rename(store.path)
        raise
    if not unchanged:
        aside.rename(store.path)
        raise StoreMismatchError(
            f"{store.path} holds factors or data that the new store is to be made from: choose another path for it"
        )
    return aside


def _text(samples: slice) -> str:
    return f"{samples.start} to {samples.stop - 1}"

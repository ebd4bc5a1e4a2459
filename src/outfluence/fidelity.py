"""How far to believe scores: what they predict, against what retraining does.

A score says what a training sample does to the loss of a test sample. So the sum of the scores of a subset of the
training samples predicts how a model does that is trained on the subset: `retrain` trains such models, on the
executors of a run, and `linear_datamodeling_score` compares (Park et al. 2023). `leave_one_out` and `topk_removal` ask
for single samples; `mislabel_detection` needs no retraining, but labels that are known to be wrong.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Self

import dask.array as da
import numpy as np
import torch
import torch.nn.functional as F
import xarray as xr

from outfluence.contents import made_now
from outfluence.data import Data, DataLike, to_numpy
from outfluence.errors import DataError, NonFiniteError
from outfluence.estimates import Estimate, rank_correlations, ranks
from outfluence.executors import DaskExecutor, Executor, SequentialExecutor, dask_executor
from outfluence.fingerprint import fingerprint
from outfluence.jobs import local_path, major_versions, raise_failures
from outfluence.machine import float32_products, precision_asked
from outfluence.problem import Loss, Problem, check_deterministic
from outfluence.progress import ProgressCallback, Tracker, as_callback
from outfluence.record import Record
from outfluence.runs import Do, resumable, workplace
from outfluence.store import ArraySpec, Store

#: Trains a model on the training samples with these indices; the seed is for its initial weights and its shuffling.
Train = Callable[[np.ndarray, int], torch.nn.Module]

LOSSES = "losses"


def random_subsets(n_train: int, n: int, *, fraction: float = 0.5, seed: int = 0) -> np.ndarray:
    """Random subsets of the training samples, all of the same size: ``(n, n_train)``, true for its members."""
    if not 0 < fraction < 1:
        raise DataError(f"fraction is the share of the samples that a subset holds, between 0 and 1, not {fraction}")
    generator, size = np.random.default_rng(seed), round(fraction * n_train)
    subsets = np.zeros((n, n_train), dtype=bool)
    for subset in subsets:
        subset[generator.choice(n_train, size, replace=False)] = True
    return subsets


def linear_datamodeling_score(scores: Any, subsets: Any, losses: Any) -> Estimate:
    """The rank correlation, over subsets, of what scores predict with what retraining gives.

    The prediction for a subset is the sum of the scores of its members (Park et al. 2023, definition 2.4); scores are
    positive for samples that help, so a high sum predicts a low loss.

    Args:
        scores: ``(n_test, n_train)``: an array (torch, numpy, xarray, dask, zarr). Read block by block.
        subsets: ``(n_subsets, n_train)``, true for the members; see `random_subsets`.
        losses: of the test samples, of models trained on the subsets, ``(n_subsets, n_test)``; or with several seeds a
            subset, whose mean counts, ``(n_subsets, n_seeds, n_test)``; see `retrain`.

    Returns:
        The mean over test samples with its interval; ``each`` is the correlation of each ``(n_test,)``, zero where
        predictions or losses are all equal.

    Raises:
        DataError: if the shapes do not fit together.
        NonFiniteError: if scores or losses are NaN or infinite.
    """
    subsets, losses = np.asarray(subsets), np.asarray(losses, dtype=np.float64)
    losses = losses.mean(1) if losses.ndim == 3 else losses
    if isinstance(scores, torch.Tensor):
        scores = to_numpy(scores)
    scores = da.asarray(scores.data if isinstance(scores, xr.DataArray) else scores)
    wanted = (losses.shape[-1], subsets.shape[-1]), (len(subsets), losses.shape[-1])
    if (scores.shape, losses.shape) != wanted or len(subsets) < 3:
        raise DataError(
            f"scores {scores.shape}, subsets {subsets.shape} and losses {losses.shape} do not fit together: they are "
            "(n_test, n_train), (n_subsets, n_train) and (n_subsets, n_test), with three subsets or more"
        )
    if not np.isfinite(losses).all():
        raise NonFiniteError("losses of retrained models are NaN or infinite: did the training diverge?", ())
    if not scores.size:
        raise DataError("there are no test samples")
    predicted = np.asarray((scores.astype(np.float64) @ da.from_array(subsets.T.astype(np.float64))).compute()).T
    if not np.isfinite(predicted).all():
        bad = np.flatnonzero(~np.isfinite(predicted).all(0)).tolist()
        raise NonFiniteError(f"scores of test samples {bad[:10]} are NaN or infinite: is their run finished?", bad)
    return Estimate.of(np.mean, rank_correlations(-predicted, losses))


def mislabel_detection(self_influences: Any, is_wrong: Any) -> Estimate:
    """How well self-influence finds wrong labels: the area under the ROC curve.

    The chance that a wrong sample has a higher self-influence than a right one; 0.5 is chance.

    Args:
        self_influences: ``(n,)``, or any other suspicion.
        is_wrong: ``(n,)``, true where the label is known to be wrong.

    Raises:
        DataError: if there is no wrong, or no right one.
    """
    suspicion, wrong = np.asarray(self_influences, dtype=np.float64), np.asarray(is_wrong, dtype=bool)
    if suspicion.shape != wrong.shape or suspicion.ndim != 1:
        raise DataError(f"self_influences {suspicion.shape} and is_wrong {wrong.shape} must be one number a sample")
    if wrong.all() or not wrong.any():
        raise DataError("to tell right from wrong labels takes some of each")

    def area(values: np.ndarray, is_wrong: np.ndarray) -> float:
        n_wrong = int(is_wrong.sum())
        n_right = len(is_wrong) - n_wrong
        if n_wrong == 0 or n_right == 0:  # of a bootstrap sample
            return 0.5
        of_wrong = ranks(values[:, None])[is_wrong > 0].sum()
        return float((of_wrong - n_wrong * (n_wrong + 1) / 2) / (n_wrong * n_right))

    return Estimate.of(area, suspicion, wrong)


def retrain(
    train: Train,
    subsets: Any,
    test: DataLike,
    path: str | os.PathLike[str],
    *,
    loss: Loss = F.cross_entropy,
    seeds: int = 1,
    client: Any = None,
    sequential: bool = False,
    progress: bool | ProgressCallback = False,
) -> xr.Dataset:
    """Train models on subsets of the training samples, and take their losses on test samples.

    Each model is a task; what is done is stored. The same call again goes on where this was interrupted, and reads what
    is finished.

    Args:
        train: ``train(indices, seed)`` gives a model, ready to be evaluated. The generators of torch, numpy and random
            start from the seed. It is sent to the workers with all that it refers to: let it read large data itself.
        subsets: ``(n_subsets, n_train)``, true for the members; see `random_subsets`.
        test: anything `Data.of` takes.
        path: folder of the store, on a file system that all workers share.
        loss: of one test sample, as for `Problem`.
        seeds: models for each subset, with seeds 0, 1, ...
        client: a Dask client; None: the current one, or a local cluster with a worker a core.
        sequential: train in this process, without Dask.
        progress: show a bar, or call a function with each `Progress`.

    Returns:
        ``losses (subset, seed, test)``, as xarray opens the store, and ``subsets (subset, train)`` as given.

    Raises:
        DataError: if subsets are not ``(n_subsets, n_train)`` booleans, one is empty, or there is no seed.
        ClusterError: if workers have more than one thread.
        StoreMismatchError: if the store there was made by something else; it says what differs.
        RunError: if trainings failed twice, or gave a model that is not in evaluation mode. The others are stored.
        Interrupted: on Ctrl-C, or when the process is told to end (SIGTERM).
    """
    members, data = np.asarray(subsets), Data.of(test)
    if members.dtype != bool or members.ndim != 2 or not members.any(1).all():
        raise DataError("subsets must be (n_subsets, n_train), true for members, none of them empty")
    if seeds < 1:
        raise DataError(f"seeds is the number of models for each subset, one or more, not {seeds}")
    job = Retraining(train, members, data, loss, seeds)
    store = Store.find(local_path(path)) or job.create(local_path(path))
    store.require(job.identity())
    if not store.is_complete:
        job, callback = replace(job, store=store.path, store_id=store.id), as_callback(progress)
        executors = nullcontext(SequentialExecutor()) if sequential else dask_executor(client)
        with resumable(store), executors as executor:
            if isinstance(executor, DaskExecutor):
                executor.check()
            with workplace(job, executor, store, callback) as do:
                failures = _train(job, do, executor, store, callback)
            if failures:
                raise_failures(failures, "retrain", len(failures), store)
    store.drop_work()
    found: xr.Dataset = xr.open_zarr(store.path)
    return found.assign(subsets=(("subset", "train"), members))


def leave_one_out(
    scores: Any, train: Train, test: DataLike, path: str | os.PathLike[str], *, samples: Sequence[int], **options: Any
) -> Estimate:
    """The rank correlation of scores with what retraining without a single training sample does.

    Where training is not deterministic, what one sample does is small beside what the seed does: take many seeds.

    Args:
        scores: ``(n_test, n_train)``; see `linear_datamodeling_score`.
        train: see `retrain`.
        test: see `retrain`; those of the scores.
        path: see `retrain`.
        samples: training samples that are left out, one at a time; three or more.
        options: of `retrain`.

    Returns:
        As `linear_datamodeling_score`.

    Raises:
        DataError: if the scores are not of these test samples, or fewer than three samples are left out.
    """
    _check_shape(scores, test)
    if len(samples) < 3:
        raise DataError(f"a rank correlation takes three samples or more, not {len(samples)}")
    subsets = np.ones((len(samples), scores.shape[1]), dtype=bool)
    subsets[np.arange(len(samples)), list(samples)] = False
    return linear_datamodeling_score(scores, subsets, retrain(train, subsets, test, path, **options)[LOSSES])


def _check_shape(scores: Any, test: DataLike) -> None:
    n_test = len(Data.of(test))
    if len(scores.shape) != 2 or scores.shape[0] != n_test:
        raise DataError(f"scores must be (n_test, n_train) for {n_test} test samples, not {tuple(scores.shape)}")


def is_misclassified(output: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """A "loss" that is one where the highest class score is not that of the label, and else zero."""
    return (output.argmax(-1) != y).to(output.dtype).sum()


def topk_removal(
    scores: Any,
    train: Train,
    test: DataLike,
    path: str | os.PathLike[str],
    *,
    ks: Sequence[int],
    loss: Loss = is_misclassified,
    **options: Any,
) -> xr.Dataset:
    """What is lost when the training samples that help a test sample most are removed (brittleness, Ilyas et al. 2022).

    For each test sample and each k two models for each seed: without the k samples of the highest scores, and without k
    random ones. So take few test samples.

    Args:
        scores: ``(n_test, n_train)``, in memory.
        train: see `retrain`.
        test: see `retrain`; those of the scores.
        path: see `retrain`.
        ks: how many are removed.
        loss: what is lost; by default whether the test sample is misclassified.
        options: of `retrain`.

    Returns:
        ``top (k, test)`` and ``random (k, test)``: means over seeds of the loss of each test sample where its own
        strongest samples, or random ones, are missing.

    Raises:
        DataError: if the scores are not of these test samples, or a k is not from 1 to one less than there are
            training samples.
    """
    _check_shape(scores, test)
    values = to_numpy(scores) if isinstance(scores, torch.Tensor) else np.asarray(scores)
    n_test, n_train = values.shape
    if not all(1 <= k < n_train for k in ks):
        raise DataError(f"ks are numbers of training samples to remove, from 1 to {n_train - 1}, not {list(ks)}")
    order, generator = np.argsort(-values, axis=1, kind="stable"), np.random.default_rng(0)
    subsets = np.ones((2, len(ks), n_test, n_train), dtype=bool)
    for i in range(n_test):
        for j, k in enumerate(ks):
            subsets[0, j, i, order[i, :k]] = False
            subsets[1, j, i, generator.choice(n_train, k, replace=False)] = False
    found = retrain(train, subsets.reshape(-1, n_train), test, path, loss=loss, **options)[LOSSES].mean("seed").values
    own = found.reshape(2, len(ks), n_test, n_test).diagonal(axis1=2, axis2=3)
    axes = {"k": list(ks), "test": np.arange(n_test)}
    return xr.Dataset({name: (("k", "test"), part) for name, part in zip(("top", "random"), own, strict=True)}, axes)


def _train(
    job: Retraining, do: Do, executor: Executor, store: Store, callback: ProgressCallback | None
) -> list[tuple[str, BaseException]]:
    """Train what is missing; which failed, and why."""
    done, failures = store.done("retrain"), list[tuple[str, BaseException]]()
    todo = [task for task in range(job.n_tasks) if task not in done]
    tracker = Tracker("retrain", job.n_tasks, job.n_tasks, len(done), len(done), callback)
    for outcome in executor.run(do(retrain_task), todo, "retrain"):
        if outcome.error is not None:
            subset, seed = divmod(outcome.task, job.seeds)
            failures.append((f"training on subset {subset} with seed {seed}", outcome.error))
        tracker.update(1, outcome.receipt)
    return failures


@dataclass(frozen=True)
class Retraining:
    """What the tasks of `retrain` need; see there."""

    train: Train
    subsets: np.ndarray
    test: Data
    loss: Loss
    seeds: int
    store: Path | None = None
    store_id: str = ""
    threads: int | None = None
    precision: str = field(default_factory=precision_asked)
    baseline_bytes: int = 0

    @property
    def n_tasks(self) -> int:
        """One for each subset and seed."""
        return len(self.subsets) * self.seeds

    def identity(self) -> dict[str, Any]:
        """What the losses depend on."""
        return {
            "results": "retrain",
            "train": fingerprint(self.train),
            "subsets": fingerprint(self.subsets),
            "seeds": self.seeds,
            "test_data": self.test.fingerprint,
            "loss": fingerprint(self.loss),
            "precision": self.precision,
            "versions": major_versions(),
        }

    def create(self, path: Path) -> Store:
        """Make the store."""
        shape = len(self.subsets), self.seeds, len(self.test)
        about = {"of": "models trained on subsets of the training samples"}
        spec = ArraySpec(LOSSES, shape, (1, 1, shape[2]), "float64", ("subset", "seed", "test"), about)
        axes = {dim: np.arange(n) for dim, n in zip(spec.dims, shape, strict=True)}
        tasks = {"retrain": self.n_tasks}
        identity = {"identity": self.identity(), "plan": None, "memory_limit": None, "basis": None, "tasks": tasks}
        return Store.create(path, [spec], axes, identity | made_now())

    def shipped(self, store: Store) -> Self:
        """See `Ships`."""
        return replace(self, test=self.test.stored(partial(store.put_input, self.test.fingerprint)))

    def arrived(self, baseline_bytes: int) -> Self:
        """See `Ships`."""
        return replace(self, baseline_bytes=baseline_bytes)


def retrain_task(job: Retraining, task: int, attempt: int = 0) -> dict[str, Any]:  # noqa: ARG001
    """Train a model, and store its losses."""
    store = Store.reopened(job.store, job.store_id)
    finished = store.receipt("retrain", task)
    if finished is not None:
        return finished
    record, (subset, seed) = Record(store, job.baseline_bytes), divmod(task, job.seeds)
    with float32_products(None, job.precision):  # training is the user's: as it is without us
        with record("train"), torch.enable_grad(), _seeded(seed):
            model = job.train(np.flatnonzero(job.subsets[subset]), seed)
        with record("losses"), torch.no_grad():
            check_deterministic(model)
            problem = Problem(model.requires_grad_(True), job.loss)
            losses = torch.cat([problem.losses(*batch) for batch in job.test.batches(problem.batch_size)])
    record.write(
        LOSSES,
        (slice(subset, subset + 1), slice(seed, seed + 1), slice(0, len(losses))),
        to_numpy(losses.double())[None, None],
    )
    receipt = {"stage": "retrain", "task": task, "start": task, "stop": task + 1, **record.report()}
    store.leave_receipt("retrain", task, receipt)
    return {key: value for key, value in receipt.items() if key != "written"}


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """With all random generators at the start of a seed; afterwards as before."""
    of_numpy, of_python = np.random.get_state(), random.getstate()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        np.random.seed(seed)
        random.seed(seed)
        try:
            yield
        finally:
            np.random.set_state(of_numpy)
            random.setstate(of_python)

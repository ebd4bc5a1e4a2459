"""A job: what is asked for, checked, and all that its tasks need."""

from __future__ import annotations

import importlib.metadata
import os
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from outfluence.curvature import VECTORS
from outfluence.data import Data, DataLike, tree_leaves
from outfluence.errors import ClusterError, DataError, RunError, StoreError
from outfluence.factors import WORKSPACE
from outfluence.fingerprint import fingerprint
from outfluence.influence import InfluenceModel
from outfluence.machine import precision_asked
from outfluence.modes import InfluenceMode
from outfluence.plan import ACTIVATION_COPIES, Plan, Work
from outfluence.problem import DIRECTIONS
from outfluence.rows import DenseRows, GradientRows, Rows
from outfluence.store import Store

#: Where the arrays of left rows, scores, self-influences, means of groups and right rows are in a store.
FACTORS, SCORES, SELVES, MEANS, GRADIENTS = "factors", "scores", "self_influences", "group_means", "gradients"
#: The strongest scores: names of the arrays of the highest and of the lowest.
TOP, BOTTOM = "top", "bottom"
#: Where strips leave their strongest scores.
CANDIDATES = "work/candidates"


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
        assess: whether the scores are assessed; see `assessment`.
        plan: how it is cut.
        store: where the results go.
        store_id: of that store.
        threads: that torch is to use; None: as it is.
        precision: of products of float32 matrices; see `precision_asked`.
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
    assess: bool = False
    plan: Plan | None = None
    store: Path | None = None
    store_id: str = ""
    threads: int | None = None
    precision: str = field(default_factory=precision_asked)
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
        rows: Rows = self.model.inverse.left(self._gradients(self.test_gradients))
        return rows

    def right_rows(self) -> Rows:
        """Right rows of no samples."""
        return self.model.right_rows(self._gradients(self.train_gradients), self.left_rows())

    def _gradients(self, *known: GradientRows | None) -> GradientRows:
        """The first that is known, or those of the data of the fit."""
        return next((rows for rows in known if rows is not None), self.model.empty_gradients())

    def in_batches(self, size: int) -> Job:
        """This job with other batches."""
        assert self.plan is not None
        source = self.model.inverse.data
        model = self.model if source is None else self.model.reading(source.in_batches(size))
        return replace(self, model=model, plan=replace(self.plan, batch_size=size))

    def shipped(self, store: Store) -> Job:
        """This job as workers can read it: data that lives in memory only are put into the store.

        Raises:
            ClusterError: if the model is on another device than the CPU.
        """
        if self.model.problem.device.type != "cpu":
            raise ClusterError("workers load the model on their CPU: call model.to('cpu') first")
        stored: dict[str, Any] = {
            role: data.stored(partial(store.put_input, data.fingerprint)) for role, data in self.inputs.items()
        }
        fit = stored.pop("fit", None)
        if fit is not None:
            stored["model"] = self.model.reading(fit)
        return replace(self, **stored)

    def arrived(self, baseline_bytes: int) -> Job:
        """This job in a worker, whose process took so many bytes before."""
        self.model.assume_unchanged()
        return replace(self, baseline_bytes=baseline_bytes)

    def identity(self) -> dict[str, Any]:
        """What the numbers in the store depend on. A store is continued by the same identity only."""
        return {
            **self.model.identity(),
            **{f"{role}_data": data.fingerprint for role, data in self.data.items()},
            "mode": str(self.mode),
            "results": self.wanted.identity(),
            "dtype": numpy_name(self.model.problem.dtype),
            "precision": self.precision,
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
        hints = [problem.batch_size, *(data.batch_size for data in self.inputs.values() if data.batch_size)]
        through_model = self.train if self.train is not None else self.test
        source = self.model.inverse.data
        activations = 0
        if through_model is not None:
            twice = perturbation or source is not None
            activations = problem.activation_bytes(through_model.rows(slice(0, 1)), twice)
        kept = (
            len(source) * activations * ACTIVATION_COPIES
            if source and getattr(self.model.solver, "precompute_grad", False)
            else 0
        )
        left, right = self.left_rows(), self.right_rows()
        gradients = self._gradients(self.train_gradients, self.test_gradients)
        is_factored = not all(isinstance(rows, DenseRows) for rows in (left, right, gradients))
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
            model_bytes=sum(p.nbytes for p in problem.model.parameters()) + buffers + self.model.inverse.nbytes,
            activation_bytes=activations,
            batch_size=min(hints),
            sample_bytes=_bytes_of(sample_of),
            solves=source is not None,
            vectors=VECTORS if source is not None else 0,
            kept_bytes=kept,
        )


def with_training(job: Job, train: DataLike, from_store: str | os.PathLike[str] | None) -> Job:
    """The job with training data, or with rows of it that a store has kept."""
    if (train is None) == (from_store is None):
        raise DataError("give training data, or from_store=, a store whose run was asked to keep_gradients; not both")
    if from_store is None:
        return replace(job, train=Data.of(train))
    if job.mode is InfluenceMode.Perturbation:
        raise DataError("mode='perturbation' needs the training samples: kept gradients know nothing of their features")
    return replace(job, gradients=_gradient_data(Store(local_path(from_store)), job))


def wanted_of(
    job: Job,
    matrix: bool,
    top_k: int | None,
    bottom_k: int | None,
    groups: Any,
    self_influences: bool,
    keep_gradients: bool,
) -> Wanted:
    """What is asked for, checked."""
    (n_test, n_train) = (
        len(next(d for d in pair if d is not None)) for pair in ((job.test, job.factors), (job.train, job.gradients))
    )
    for name, k in (("top_k", top_k), ("bottom_k", bottom_k)):
        if k is not None and (isinstance(k, bool) or not isinstance(k, (int, np.integer)) or not 1 <= k <= n_train):
            raise DataError(f"{name} must be between 1 and the {n_train} training samples, not {k!r}")
    per_feature = job.mode is InfluenceMode.Perturbation
    if per_feature and (top_k or bottom_k or keep_gradients):
        raise DataError("top_k, bottom_k and keep_gradients go with mode='up' only: there a score is one number")
    if job.gradients is not None and (self_influences or keep_gradients):
        raise DataError("self_influences and keep_gradients need the training data: they cannot be had from_store")
    names = numbers = None
    if groups is not None:
        groups = np.asarray(groups)
        if groups.shape != (n_test,) or groups.dtype.kind not in "biuSUO":
            raise DataError(f"groups must name the group of each of the {n_test} test samples, with integers or texts")
        names, numbers = np.unique(groups.astype(str) if groups.dtype.kind in "bSUO" else groups, return_inverse=True)
    if not (matrix or top_k or bottom_k or groups is not None or keep_gradients):
        raise DataError("nothing is asked for: matrix=False goes with top_k, bottom_k, groups or keep_gradients")
    return Wanted(matrix, int(top_k or 0), int(bottom_k or 0), self_influences, keep_gradients, numbers, names)


def factor_data(factors: Any, model: InfluenceModel) -> Data:
    """Factors as data whose x is the values, or a dict of the arrays of another kind of rows."""
    left = model.inverse.left(model.empty_gradients())
    wanted = left.arrays
    if isinstance(factors, xr.Dataset):
        about = factors.attrs.get("outfluence", {})
        names = {f"factor_{name}": name for name in wanted}
        if "factors" in factors:
            factors = factors["factors"]
        elif about.get("positions", {}).get(FACTORS, {}) != left.positions:
            raise DataError("these factors are of samples of another size than those of the fit: fit on such")
        elif names.keys() <= set(factors.data_vars):
            if about.get("basis") != basis_of(model):
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


def _gradient_data(store: Store, job: Job) -> Data:
    """Kept rows of training samples as data whose x is the values, or a dict of the arrays of another kind of rows."""
    if GRADIENTS not in store.group:
        raise DataError(f"{store.path} keeps no gradients: make it with keep_gradients=True")
    if not store.is_complete:
        raise DataError(f"{store.path} is not finished: call its to_zarr again first")
    made_by, model = store.about["identity"], job.model
    now = model.identity()
    differing = [key for key in ("model", "weights", "loss", "blocks") if made_by.get(key) != now[key]]
    rows = job.right_rows().arrays
    wanted = list(rows)
    found = list(store.group[GRADIENTS].array_keys())  # type: ignore[union-attr]
    if sorted(found) != sorted(wanted):
        raise DataError(
            f"{store.path} keeps {', '.join(sorted(found))} of gradients, {type(model).__name__} needs "
            f"{', '.join(sorted(wanted))}: keep gradients with the same method"
        )
    arrays = {name: store.group[f"{GRADIENTS}/{name}"] for name in wanted}
    if store.about.get("positions", {}).get(GRADIENTS, {}) != job.right_rows().positions:
        raise DataError(f"{store.path} keeps gradients of samples of another size than those of the fit: fit on such")
    if store.about.get("gradients_basis") != gradients_basis(job):
        differing.append("basis (another fit or rank)")
    if differing:
        raise DataError(f"{store.path} keeps gradients of something else; these differ: {', '.join(differing)}")
    made_from = [made_by["train_data"], store.about["gradients_basis"], made_by["weights"], made_by["loss"]]
    content = fingerprint(made_from)
    return Data.from_arrays(arrays if wanted != ["values"] else arrays["values"], fingerprint=content)


def gradients_basis(job: Job) -> str | None:
    """What kept rows of training samples refer to; None where they are gradients."""
    return None if isinstance(job.left_rows(), DenseRows) else basis_of(job.model)


def basis_of(model: InfluenceModel) -> str | None:
    """What the coordinates of this very fit refer to; None if its rows are no coordinates."""
    if not model.inverse.in_basis:
        return None
    return fingerprint({name: tensor.cpu() for name, tensor in model.inverse.tensors.items()})


def local_path(path: str | os.PathLike[str]) -> Path:
    """The absolute path of a store.

    Raises:
        StoreError: if it is none of a file system.
    """
    text = os.fspath(path)
    if "://" in text:
        raise StoreError(f"{text}: stores are folders of a file system; object stores are not supported yet")
    return Path(text).expanduser().absolute()


def raise_failures(failures: list[tuple[str, BaseException]], what: str, n_missing: int, store: Store) -> None:
    """Say which tasks of a run or a fit failed, and why.

    Raises:
        RunError: always.
    """
    texts = [(task, f"{type(error).__name__}: {error}") for task, error in failures]
    shown = "\n".join(f"  {task}: {text}" for task, text in texts[:10])
    more = f"\n  and {len(texts) - 10} more" if len(texts) > 10 else ""
    raise RunError(
        f"{len(texts)} task(s) of the {what} failed:\n{shown}{more}\nWithout them {n_missing} task(s) are not "
        f"complete. What was computed is stored in {store.path}; the same call again goes on from there.",
        texts,
    ) from (failures[0][1] if failures else None)


def _widths(rows: Rows, itemsize: int) -> dict[str, int]:
    """How many numbers, of so many bytes, each array of a row takes."""
    return {name: array.shape[1] * array.element_size() // itemsize for name, array in rows.arrays.items()}


def _bytes_of(data: Data) -> int:
    """Bytes of one sample."""
    sample = data.rows(slice(0, 1))
    return sum(leaf.nbytes for leaf in tree_leaves(sample.x) + tree_leaves(sample.y))


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

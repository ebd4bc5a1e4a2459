"""What is in a store: its arrays, what made it, and a fitted inverse."""

from __future__ import annotations

import datetime
import platform
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from outfluence.data import Data, to_numpy
from outfluence.errors import StoreError
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
    basis_of,
    gradients_basis,
    major_versions,
    numpy_name,
    version_of,
)
from outfluence.machine import precision_asked
from outfluence.plan import Plan
from outfluence.record import Record
from outfluence.rows import Rows
from outfluence.store import ArraySpec, Store

#: Columns of a chunk of stored rows, and bytes of a chunk of a stored inverse: bounds the size of files.
_COLUMNS, _CHUNK_BYTES = 1 << 16, 32 << 20
#: Where a fitted inverse is in a store.
INVERSE = "inverse"
#: The arrays of rows: what they are of test and of training samples, and what their second axis counts.
_ROWS = {
    "values": ("influence factors g^T (H + lambda 1)^-1", "gradients g", "parameter"),
    "coordinates": (
        "coordinates of influence factors in the basis of the method",
        "coordinates of gradients in the basis of the method",
        "coordinate",
    ),
    "formed": (
        "entries of the layers' matrices, the inverse multiplied in where it is diagonal",
        "entries of the layers' matrices",
        "entry",
    ),
    "output_gradients": ("output gradients, layer after layer and position after position",) * 2 + ("output",),
    "inputs": ("inputs, layer after layer and position after position",) * 2 + ("input",),
    "places": ("indices of embeddings, position after position",) * 2 + ("place",),
}


def array_specs(job: Job, plan: Plan) -> list[ArraySpec]:
    """The arrays of a run: results, factors, kept gradients, and what only the run needs."""
    work, wanted = plan.work, job.wanted
    dtype = f"float{8 * work.itemsize}"
    tests, trains = (work.n_test, plan.test_chunk, "test"), (work.n_train, plan.train_chunk, "train")
    groups = (work.groups, max(1, work.groups), "group")
    features = [(n, n, f"feature_{i}") for i, n in enumerate(work.features)]
    specs = []

    def add(path: str, about: str, *axes: tuple[int, int, str], dtype: str = dtype) -> None:
        shape, chunks, dims = zip(*axes, strict=True)
        specs.append(ArraySpec(path, shape, chunks, dtype, dims, {"long_name": about}))

    def add_rows(path: str, rows: Rows, samples: tuple[int, int, str], which: int) -> None:
        for name, array in rows.arrays.items():
            *of, kind = name.split(".")
            columns, about, axis = array.shape[1], _ROWS[kind][which], _ROWS[kind][2]
            of_identity = "identity" if "identity" in of else ""
            if axis not in ("parameter", "coordinate"):  # of which there may be others of training than of test samples
                axis = f"{samples[2]}_{of_identity}{axis}"
            if of_identity:
                about = f"for the part that a multiple of the identity adds: {about}"
            number = [part for part in of if part.isdigit()]  # of a model of an ensemble, which may be one itself
            if number:
                axis, about = f"model_{'_'.join(number)}_{axis}", f"of model {'.'.join(number)}: {about}"
            chunk = max(1, min(columns, _COLUMNS))
            add(f"{path}/{name}", about, samples, (columns, chunk, axis), dtype=numpy_name(array.dtype))

    if work.n_test:
        add_rows(FACTORS, job.left_rows(), tests, 0)
    if wanted.gradients:
        add_rows(GRADIENTS, job.right_rows(), trains, 1)
    if work.matrix:
        add(SCORES, "influence of a training sample on a test sample; positive: it helps", tests, trains, *features)
    if work.groups:
        add(MEANS, "mean influence of a training sample on a group of test samples", groups, trains, *features)
    if work.self_influences:
        add(SELVES, "influence of a training sample on itself", trains)
    for kind, k in wanted.strongest.items():
        ranks, name = (k, k, f"{kind}_rank"), "highest" if kind == TOP else "lowest"
        merged = (work.n_test, plan.candidate_chunk, "test")
        add(f"{kind}_scores", f"the {name} influences on a test sample", merged, ranks)
        add(f"{kind}_train", f"the training samples of the {name} influences", merged, ranks, dtype="int64")
        chunks, width = (plan.n_chunks, 1, "chunk"), min(k, plan.train_chunk)
        for what, numbers in (("scores", dtype), ("train", "int64")):
            add(f"{CANDIDATES}/{kind}_{what}", "", chunks, merged, (width, width, "rank"), dtype=numbers)
    return specs


def coordinates(job: Job, plan: Plan) -> dict[str, np.ndarray]:
    """The labels of samples and groups."""
    axes = {dim: np.arange(n) for dim, n in (("test", plan.work.n_test), ("train", plan.work.n_train)) if n}
    names = job.wanted.group_names
    return axes if names is None else axes | {"group": names}


def about_run(job: Job, identity: dict[str, Any], plan: Plan) -> dict[str, Any]:
    """What made a store, as plain values."""
    return {
        "identity": identity,
        "basis": basis_of(job.model),
        "gradients_basis": gradients_basis(job) if job.wanted.gradients else None,
        "lost_share": getattr(job.model.inverse, "lost_share", None),
        "positions": {FACTORS: job.left_rows().positions, GRADIENTS: job.right_rows().positions},
        "plan": plan.to_json(),
        "memory_limit": plan.memory_limit,
        "tasks": {stage.name: stage.n_tasks for stage in plan.stages},
    } | made_now()


def about_fit(identity: dict[str, Any], memory_limit: int) -> dict[str, Any]:
    """What made the store of a fit."""
    about = {"identity": identity, "basis": None, "plan": None, "memory_limit": memory_limit, "tasks": {"inverse": 1}}
    return about | made_now()


def made_now() -> dict[str, Any]:
    """Versions and time."""
    packages = ("outfluence", "torch", "numpy", "zarr", "xarray", "dask", "distributed")
    return {
        "versions": {"python": platform.python_version(), **{name: version_of(name) for name in packages}},
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def fit_identity(model: InfluenceModel, data: Data) -> dict[str, Any]:
    """What the numbers of a fit depend on."""
    of_fit = {"results": "fit", "precision": precision_asked(), "versions": major_versions()}
    return model.identity_on(data) | of_fit


def keep_inverse(store: Store, tensors: Mapping[str, torch.Tensor]) -> None:
    """Store a fitted inverse: an array for each of its tensors."""
    record = Record(store)
    arrays = {f"{INVERSE}/{name}": to_numpy(tensor) for name, tensor in tensors.items()}
    specs = []
    for path, array in arrays.items():
        rows = max(1, min(len(array), _CHUNK_BYTES // max(1, array[:1].nbytes)))
        dims = tuple(f"axis_{i}" for i in range(array.ndim))
        specs.append(ArraySpec(path, array.shape, (rows, *array.shape[1:]), array.dtype.name, dims, {}))
    store.add(specs)
    for path, array in arrays.items():
        record.write(path, (slice(0, len(array)),), array)
    store.leave_receipt(
        "inverse", 0, {"stage": "inverse", "task": 0, "start": 0, "stop": 1, "names": [*tensors]} | record.report()
    )


def stored_inverse(store: Store) -> dict[str, torch.Tensor]:
    """The tensors of a fitted inverse.

    Raises:
        StoreError: if they are damaged.
    """
    receipt = store.receipt("inverse", 0)
    assert receipt is not None
    if not store.is_sound(receipt):
        store.withdraw_receipt("inverse", 0)
        store.withdraw_stages("fit-")  # what they summed is gone
        raise StoreError(
            f"{store.path}: the fitted inverse is damaged (a checksum differs): call fit again, it starts anew"
        )
    arrays = {name: store.read(f"{INVERSE}/{name}", (slice(None),)) for name in receipt["names"]}
    return {name: torch.from_numpy(array).clone() for name, array in arrays.items()}

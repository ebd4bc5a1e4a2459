"""From a store to answers: open it, find the strongest influences, judge a ranking, see how the run went.

numpy and xarray only.
"""

from __future__ import annotations

import datetime
import os
import warnings
from typing import Any

import numpy as np
import xarray as xr

from outfluence.errors import DataError
from outfluence.plan import Plan
from outfluence.store import ASSESS, Store


def open_influences(path: str | os.PathLike[str]) -> xr.Dataset:
    """Open a store; nothing is read until it is used.

    ``xarray.open_zarr(path)`` does nearly the same: this adds the factors and a warning where results are missing.

    Args:
        path: folder of the store.

    Returns:
        As far as the store has them: ``scores (test, train, ...)``, ``self_influences (train,)``, ``top_scores`` and
        ``top_train (test, top_rank)``, ``bottom_scores`` and ``bottom_train (test, bottom_rank)``,
        ``group_means (group, train, ...)``, ``factors (test, parameter)``, ``gradients (train, parameter)``; of
        methods whose factors are kept in fewer numbers the arrays of these instead (``factor_coordinates (test,
        coordinate)``, ``factor_inputs (test, test_input)``, ...; docs/format.md lists them), and so for gradients. The
        attribute ``assessment`` says how far to believe them, where the run was asked to ``assess``.

    Raises:
        StoreError: if there is no store.

    Warns:
        UserWarning: if the run is not finished; what is missing is NaN.
    """
    store = Store(path)
    dataset: xr.Dataset = xr.open_zarr(store.path)
    for group in ("factors", "gradients"):
        if group in store.group:
            for name, array in xr.open_zarr(store.path, group=group).data_vars.items():
                dataset[group if name == "values" else f"{group.removesuffix('s')}_{name}"] = array
    assessed = store.receipt(ASSESS, 0)
    if assessed is not None:
        dataset.attrs["assessment"] = assessed["assessment"]["text"]
    if not store.is_complete:
        done = ", ".join(f"{n} of {total} tasks of {stage!r}" for stage, (n, total) in store.progress().items())
        warnings.warn(
            f"{path} is not finished ({done} are done): what is missing is NaN. Run the same job again to go on.",
            stacklevel=2,
        )
    return dataset


def open_history(path: str | os.PathLike[str]) -> xr.Dataset:
    """How a run went, or goes: its finished tasks in the order in which they began. Reads all receipts.

    Args:
        path: folder of the store, finished or not.

    Returns:
        By ``task``: ``stage`` and ``number`` in it, ``started`` and ``finished`` (UTC), ``seconds``, ``n_samples``,
        ``bytes_written``, ``bytes_read`` (0 if not known), ``peak_bytes``, ``projected_bytes`` (NaN if not known) and
        ``worker``. Attributes: ``memory_limit`` in bytes, and ``projected``, the peak of each stage that was planned.

    Raises:
        StoreError: if there is no store.
    """
    store = Store(path)
    receipts = [(stage, receipt) for stage in store.stages for receipt in store.receipts(stage)]
    finished = np.array([_utc(r["finished"]) for _, r in receipts], "M8[ns]")
    seconds = np.array([r["seconds"] for _, r in receipts], float)
    durations = np.round(seconds * 1e9).astype("m8[ns]")
    told = np.array([_utc(r["started"]) if "started" in r else "NaT" for _, r in receipts], "M8[ns]")
    columns: dict[str, Any] = {
        "stage": np.array([stage for stage, _ in receipts], str),
        "number": np.array([r["task"] for _, r in receipts], np.int64),
        "started": np.where(np.isnat(told), finished - durations, told),  # earlier versions do not tell
        "finished": finished,
        "seconds": seconds,
        "n_samples": np.array([r["stop"] - r["start"] for _, r in receipts], np.int64),
        "bytes_written": np.array([r["bytes_written"] for _, r in receipts], np.int64),
        "bytes_read": np.array([r.get("bytes_read", 0) for _, r in receipts], np.int64),
        "peak_bytes": np.array([r["peak_bytes"] for _, r in receipts], np.int64),
        "projected_bytes": np.array([r.get("projected_bytes") or np.nan for _, r in receipts], float),
        "worker": np.array([r["worker"] for _, r in receipts], str),
    }
    order = np.argsort(columns["started"], kind="stable")
    planned = Plan.from_json(store.about["plan"]) if store.about["plan"] else None
    projected = {stage.name: sum(planned.memory(stage.name).values()) for stage in planned.stages} if planned else {}
    for stage, receipt in receipts:  # passes of a fit are planned one by one
        if stage not in store.about["tasks"] and receipt.get("projected_bytes"):
            projected[stage] = max(projected.get(stage, 0), receipt["projected_bytes"])
    return xr.Dataset(
        {name: ("task", column[order]) for name, column in columns.items()},
        attrs={
            "memory_limit": planned.memory_limit if planned else store.about["memory_limit"],
            "projected": projected,
        },
    )


def top_k(scores: xr.Dataset | xr.DataArray | str | os.PathLike[str], k: int, *, largest: bool = True) -> xr.Dataset:
    """The training samples with the highest (or lowest) scores for each test sample.

    Reads the matrix once, a chunk at a time. Of equal scores the lower index comes first; NaN comes last.

    Args:
        scores: a store's path, a dataset with ``scores``, or the scores ``(test, train)`` themselves.
        k: how many.
        largest: the highest, which help the test sample; else the lowest, which harm it.

    Returns:
        ``scores`` and ``train``, both ``(test, rank)``, the strongest first; ``train`` holds the ``train`` coordinates.

    Raises:
        DataError: if k is not between 1 and the number of training samples, or scores have more axes.
    """
    if isinstance(scores, (str, os.PathLike)):
        scores = open_influences(scores)
    array = scores["scores"] if isinstance(scores, xr.Dataset) else scores
    if array.dims != ("test", "train"):
        raise DataError(f"top_k takes scores (test, train), not {array.dims}; reduce the other axes first")
    if not 1 <= k <= array.sizes["train"]:
        raise DataError(f"k must be between 1 and the {array.sizes['train']} training samples, not {k}")
    labels = array["train"].values if "train" in array.coords else np.arange(array.sizes["train"])
    chunks = (
        dict(zip(array.dims, array.chunks, strict=True)) if array.chunks else {d: (n,) for d, n in array.sizes.items()}
    )
    best = []
    for rows in _slices(chunks["test"]):
        values = np.empty((rows.stop - rows.start, 0), array.dtype)
        index = np.empty(values.shape, np.int64)
        for columns in _slices(chunks["train"]):
            block = array[rows, columns].values
            values = np.concatenate([values, block], axis=1)
            index = np.concatenate(
                [index, np.broadcast_to(np.arange(columns.start, columns.stop), block.shape)], axis=1
            )
            values, index = first_of(values, index, k, largest)
        best.append((values, labels[index]))
    dims = ("test", "rank")
    variables: dict[str, Any] = {
        "scores": (dims, np.concatenate([values for values, _ in best])),
        "train": (dims, np.concatenate([index for _, index in best])),
    }
    coords = {"test": array["test"]} if "test" in array.coords else {}
    return xr.Dataset(variables, coords=coords)


def first_of(values: np.ndarray, index: np.ndarray, k: int, largest: bool) -> tuple[np.ndarray, np.ndarray]:
    """The k strongest of each row, the strongest first; of equal ones those that stand first. NaN comes last."""
    order = np.argsort(-values if largest else values, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(values, order, 1), np.take_along_axis(index, order, 1)


def detection_curve(scores: Any, is_wrong: Any) -> np.ndarray:
    """How many of the wrong samples are among those with the highest scores.

    Args:
        scores: ``(n,)``, self-influences say.
        is_wrong: ``(n,)``, true where a sample is wrong.

    Returns:
        ``(n,)``: entry i is the share of all wrong samples among the i + 1 highest scores.
    """
    order = np.argsort(-np.asarray(scores), kind="stable")
    found = np.cumsum(np.asarray(is_wrong, dtype=bool)[order])
    return np.asarray(found / max(int(found[-1]), 1))


def precision_at(k: int, scores: Any, is_wrong: Any) -> float:
    """The share of wrong samples among the k with the highest scores; see `detection_curve`."""
    order = np.argsort(-np.asarray(scores), kind="stable")[:k]
    return float(np.asarray(is_wrong, dtype=bool)[order].mean())


def _utc(text: str) -> datetime.datetime:
    """A time as numpy takes it: in UTC, and without saying so."""
    return datetime.datetime.fromisoformat(text).astimezone(datetime.UTC).replace(tzinfo=None)


def _slices(sizes: tuple[int, ...]) -> list[slice]:
    stops = np.cumsum(sizes).tolist()
    return [slice(stop - size, stop) for size, stop in zip(sizes, stops, strict=True)]

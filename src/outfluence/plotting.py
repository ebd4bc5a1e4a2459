"""Pictures of scores and of runs, with matplotlib. Each function draws one figure and gives it back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import xarray as xr
from dask.utils import format_bytes
from matplotlib.collections import LineCollection, PolyCollection
from matplotlib.figure import Figure

from outfluence.analysis import detection_curve, top_k
from outfluence.errors import DataError

_GREEN, _RED, _BLUE, _GREY = "#2a7d4f", "#b3372f", "#2b5f9e", "#8a8a8a"
#: Of the stages of a run, in order.
_STAGES = (_GREEN, _BLUE, _GREY)
#: A limit so many times higher than all else would press it flat: it is named instead of shown.
_FAR = 4


def influential_images(
    scores: xr.DataArray,
    test_images: Any,
    train_images: Any,
    test_titles: Sequence[str],
    train_titles: Sequence[str],
    test: Sequence[int],
    k: int = 5,
) -> Figure:
    """For some test images their most helpful and most harmful training images.

    Args:
        scores: ``(test, train)``.
        test_images: ``(n_test, height, width)`` or with colours last.
        train_images: ``(n_train, height, width)``, likewise.
        test_titles: a text for each test image.
        train_titles: a text for each training image.
        test: which test images, a row each.
        k: how many training images of either kind.
    """
    chosen = scores.isel(test=list(test))
    helpful, harmful = top_k(chosen, k), top_k(chosen, k, largest=False)
    figure = Figure(figsize=(1.1 * (2 * k + 1) + 0.6, 1.3 * len(test) + 0.5), layout="constrained")
    parts: Any = figure.subfigures(1, 3, width_ratios=[1.2, k, k])
    _images(parts[0], "test image", "black", test_images, test_titles, np.asarray(test)[:, None])
    for part, what, colour, ranked in ((parts[1], "helpful", _GREEN, helpful), (parts[2], "harmful", _RED, harmful)):
        _images(part, f"{k} most {what} training images", colour, train_images, train_titles, ranked["train"].values)
    return figure


def label_errors(self_influences: Any, is_wrong: Any) -> Figure:
    """How fast wrong labels are found when samples are checked in order of their self-influence.

    Args:
        self_influences: ``(n,)``.
        is_wrong: ``(n,)``, true where the label is wrong.
    """
    is_wrong = np.asarray(is_wrong, dtype=bool)
    curve = detection_curve(self_influences, is_wrong)
    share = np.arange(1, len(curve) + 1) / len(curve)
    wrong = is_wrong.mean()
    figure = Figure(figsize=(6, 4), layout="constrained")
    axis = figure.subplots()
    axis.plot(100 * share, 100 * curve, color=_BLUE, label="by self-influence")
    axis.plot([0, 100 * wrong, 100], [0, 100, 100], color=_GREY, ls=":", label="perfect")
    axis.plot([0, 100], [0, 100], color=_GREY, ls="--", label="chance")
    axis.set(xlabel="training samples checked (%)", ylabel="wrong labels found (%)", xlim=(0, 100), ylim=(0, 102))
    axis.set_title(f"{is_wrong.sum()} wrong labels among {len(curve):,}")
    axis.legend(loc="lower right", frameon=False)
    axis.spines[["top", "right"]].set_visible(False)
    return figure


def timeline(history: xr.Dataset) -> Figure:
    """Which worker computed when: a row for each worker, a bar for each task.

    Args:
        history: as `open_history` gives it.

    Raises:
        DataError: if no task is finished.
    """
    start, seconds = _times(history)
    workers, row = np.unique(history["worker"].values, return_inverse=True)
    span, scale, unit = _clock(start + seconds)
    left, right = start / scale, (start + seconds) / scale
    figure = Figure(figsize=(9, 1.4 + min(0.3, 9 / len(workers)) * len(workers)), layout="constrained")
    axis = figure.subplots()
    # White edges tell neighbours apart while there is room for them. Thin bars must not snap to pixels: a gap of a
    # tenth of a pixel would show as a whole one.
    roomy = np.bincount(row).max() <= 120
    for stage, colour, ours in _stages(history):
        corners = [(left, row - 0.4), (left, row + 0.4), (right, row + 0.4), (right, row - 0.4)]
        shapes: Any = np.stack([np.stack(corner, axis=1)[ours] for corner in corners], axis=1)
        bars = PolyCollection(shapes, facecolor=colour, label=stage)
        bars.set(edgecolor="white" if roomy else colour, linewidth=0.5 if roomy else 0.2, snap=roomy)
        axis.add_collection(bars)
    step = -(-len(workers) // 60)  # a label for each row, as long as one can read them
    axis.set_yticks(np.arange(len(workers))[::step], workers[::step], fontsize=8 if len(workers) <= 20 else 6)
    axis.tick_params(axis="y", length=0)
    axis.set(
        xlim=(0, span / scale), ylim=(len(workers) - 0.4, -0.6), xlabel=f"time since the first task began ({unit})"
    )
    busy = seconds.sum() / (span * len(workers))
    tasks, many = _count(len(start), "task"), _count(len(workers), "worker")
    axis.set_title(f"{tasks} by {many} in {span / scale:.3g} {unit}, busy {busy:.0%} of the time", fontsize=10)
    axis.spines[["top", "right", "left"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    return figure


def memory(history: xr.Dataset) -> Figure:
    """How much memory tasks took: measured, projected by the plan, and the limit; a dash for each task.

    Args:
        history: as `open_history` gives it.

    Raises:
        DataError: if no task is finished.
    """
    start, seconds = _times(history)
    span, scale, unit = _clock(start + seconds)
    left, right = start / scale, (start + seconds) / scale
    peak, limit, projected = history["peak_bytes"].values, history.attrs["memory_limit"], history.attrs["projected"]
    largest = {"measured": int(peak.max()), "projected": max(projected.values()), "limit": limit}
    shown = max(largest["measured"], largest["projected"])
    is_far = limit > _FAR * shown
    top = 1.25 * shown if is_far else 1.08 * max(limit, shown)
    size, name = (2**30, "GiB") if top >= 2 * 2**30 else (2**20, "MiB")
    figure = Figure(figsize=(9, 4), layout="constrained")
    axis = figure.subplots()
    for stage, colour, ours in _stages(history):
        ends: Any = np.stack([np.stack([x, peak / size], axis=1)[ours] for x in (left, right)], axis=1)
        axis.add_collection(LineCollection(ends, color=colour, lw=2.5, capstyle="round", label=stage))
        extent = left[ours].min(), right[ours].max()
        if stage in projected:
            axis.hlines(projected[stage] / size, *extent, color=colour, ls=":", lw=1.5, label=f"{stage}, projected")
    axis.axhline(limit / size, color=_RED, ls="--", lw=1.2, label="limit")
    if is_far:
        axis.annotate(
            f"limit {format_bytes(limit)} ↑",
            (1, 1),
            xycoords="axes fraction",
            ha="right",
            va="top",
            color=_RED,
            fontsize=9,
        )
    axis.set(xlim=(0, span / scale), ylim=(0, top / size))
    axis.set(xlabel=f"time since the first task began ({unit})", ylabel=f"peak memory of a task ({name})")
    axis.set_title(
        "largest peak: " + ", ".join(f"{what} {format_bytes(n)}" for what, n in largest.items()), fontsize=10
    )
    axis.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=5, frameon=False, fontsize=9)
    return figure


def _times(history: xr.Dataset) -> tuple[np.ndarray, np.ndarray]:
    """When each task began, in seconds since the first, and how long it took."""
    if not history.sizes["task"]:
        raise DataError("no task of this run is finished yet: there is nothing to draw")
    started = history["started"].values
    return (started - started.min()) / np.timedelta64(1, "s"), history["seconds"].values


def _clock(stops: np.ndarray) -> tuple[float, float, str]:
    """How long a run took in seconds, how many of them make a unit that suits it, and the unit."""
    span = max(float(stops.max()), 1e-6)
    scale, unit = (1, "seconds") if span < 180 else (60, "minutes") if span < 3 * 3600 else (3600, "hours")
    return span, scale, unit


def _stages(history: xr.Dataset) -> list[tuple[str, str, np.ndarray]]:
    """Each stage, the earliest first, with its colour and which tasks are its own."""
    stages = history["stage"].values
    names = dict.fromkeys(stages.tolist())
    return [(name, _STAGES[i % len(_STAGES)], stages == name) for i, name in enumerate(names)]


def _count(n: int, what: str) -> str:
    return f"{n:,} {what}{'s' if n != 1 else ''}"


def _images(figure: Any, heading: str, colour: str, images: Any, titles: Sequence[str], index: np.ndarray) -> None:
    """Draw ``images[index]`` as a grid of the shape of ``index``."""
    figure.suptitle(heading, weight="bold", color=colour, fontsize=10)
    for axis, i in zip(figure.subplots(*index.shape, squeeze=False).flat, index.flat, strict=True):
        axis.imshow(np.asarray(images[i]), cmap="gray_r")
        axis.set_title(titles[i], fontsize=7, color=colour, pad=2)
        axis.set_axis_off()

"""Pictures from scores, with matplotlib. Each function draws one figure and gives it back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import xarray as xr
from matplotlib.figure import Figure

from outfluence.analysis import detection_curve, top_k

_GREEN, _RED, _BLUE, _GREY = "#2a7d4f", "#b3372f", "#2b5f9e", "#8a8a8a"


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


def _images(figure: Any, heading: str, colour: str, images: Any, titles: Sequence[str], index: np.ndarray) -> None:
    """Draw ``images[index]`` as a grid of the shape of ``index``."""
    figure.suptitle(heading, weight="bold", color=colour, fontsize=10)
    for axis, i in zip(figure.subplots(*index.shape, squeeze=False).flat, index.flat, strict=True):
        axis.imshow(np.asarray(images[i]), cmap="gray_r")
        axis.set_title(titles[i], fontsize=7, color=colour, pad=2)
        axis.set_axis_off()

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
    figure = Figure(figsize=(1.15 * (2 * k + 2), 1.45 * len(test)), layout="constrained")
    axes = figure.subplots(len(test), 2 * k + 2, squeeze=False, gridspec_kw={"width_ratios": [1, *[1] * k, 0.3, *[1] * k]})
    for axis in axes.flat:
        axis.set_axis_off()
    for row, i in enumerate(test):
        _image(axes[row, 0], test_images[i], test_titles[i], "black")
        for first, ranked, colour in ((1, helpful, _GREEN), (k + 2, harmful, _RED)):
            for rank, j in enumerate(ranked["train"].values[row]):
                _image(axes[row, first + rank], train_images[j], train_titles[j], colour)
    # Headings stand above the groups of columns: as a second line over the first row's middle image.
    for column, text, colour in (
        (0, "test image", "black"),
        (1 + k // 2, f"{k} most helpful training images", _GREEN),
        (k + 2 + k // 2, f"{k} most harmful training images", _RED),
    ):
        axis = axes[0, column]
        axis.annotate(
            text, (0.5, 1), xytext=(0, 22), xycoords="axes fraction", textcoords="offset points", ha="center",
            weight="bold", color=colour, annotation_clip=False,
        )
    return figure


def label_errors(self_influences: Any, is_wrong: Any) -> Figure:
    """How fast wrong labels are found when samples are checked in order of their self-influence.

    Args:
        self_influences: ``(n,)``.
        is_wrong: ``(n,)``, true where the label is wrong.
    """
    curve = detection_curve(self_influences, is_wrong)
    share = np.arange(1, len(curve) + 1) / len(curve)
    wrong = float(np.mean(is_wrong))
    figure = Figure(figsize=(6, 4), layout="constrained")
    axis = figure.subplots()
    axis.plot(100 * share, 100 * curve, color=_BLUE, label="by self-influence")
    axis.plot([0, 100 * wrong, 100], [0, 100, 100], color=_GREY, ls=":", label="perfect")
    axis.plot([0, 100], [0, 100], color=_GREY, ls="--", label="chance")
    axis.set(xlabel="training samples checked (%)", ylabel="wrong labels found (%)", xlim=(0, 100), ylim=(0, 102))
    axis.set_title(f"{int(np.sum(is_wrong))} wrong labels among {len(curve):,}")
    axis.legend(loc="lower right", frameon=False)
    axis.spines[["top", "right"]].set_visible(False)
    return figure


def _image(axis: Any, image: Any, title: str, colour: str) -> None:
    axis.imshow(np.asarray(image), cmap="gray_r")
    axis.set_title(title, fontsize=8, color=colour, pad=2)

"""Rankings and curves."""

from __future__ import annotations

import dask.array as da
import numpy as np
import pytest
import xarray as xr
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from outfluence.analysis import detection_curve, precision_at, top_k
from outfluence.errors import DataError
from outfluence.plotting import influential_images, label_errors


@given(
    values=hnp.arrays(
        "f4", st.tuples(st.integers(1, 6), st.integers(1, 20)), elements=st.sampled_from([-1.0, 0.0, 0.5, 2.0])
    ),
    chunks=st.tuples(st.integers(1, 6), st.integers(1, 20)),
    k=st.integers(1, 20),
    largest=st.booleans(),
)
def test_top_k_equals_sorting_the_matrix(values, chunks, k, largest):
    k = min(k, values.shape[1])
    expected = np.argsort(-values if largest else values, axis=1, kind="stable")[:, :k]
    for data in (values, da.from_array(values, chunks=chunks)):
        best = top_k(xr.DataArray(data, dims=("test", "train")), k, largest=largest)
        assert np.array_equal(best["train"], expected)
        assert np.array_equal(best["scores"], np.take_along_axis(values, expected, 1))


def test_top_k_gives_coordinates_and_puts_what_is_missing_last():
    scores = xr.DataArray(
        [[1.0, np.nan, 3.0]], dims=("test", "train"), coords={"test": [5], "train": [10, 20, 30]}, name="scores"
    )
    best = top_k(scores.to_dataset(), 3)
    assert best["train"].values.tolist() == [[30, 10, 20]]
    assert best["test"].values.tolist() == [5]


def test_top_k_refuses():
    scores = xr.DataArray(np.zeros((2, 3)), dims=("test", "train"))
    with pytest.raises(DataError, match="k must be between 1 and the 3 training samples, not 4"):
        top_k(scores, 4)
    with pytest.raises(DataError, match="reduce the other axes first"):
        top_k(scores.expand_dims("feature_0"), 1)


def test_detection():
    scores, is_wrong = [0.1, 5.0, 0.2, 3.0, 0.0], [False, True, False, False, True]
    assert detection_curve(scores, is_wrong).tolist() == [0.5, 0.5, 0.5, 0.5, 1.0]
    assert precision_at(2, scores, is_wrong) == 0.5
    assert detection_curve([1.0, 2.0], [False, False]).tolist() == [0, 0]


def test_pictures(tmp_path):
    rng = np.random.default_rng(0)
    scores = xr.DataArray(rng.normal(size=(4, 9)), dims=("test", "train"))
    images = rng.random((9, 5, 5))
    figure = influential_images(scores, images[:4], images, list("abcd"), list("ABCDEFGHI"), test=[1, 3], k=2)
    titles = [axis.get_title() for axis in figure.get_axes()]
    order = np.argsort(-scores.values[[1, 3]], axis=1)
    letters = [["ABCDEFGHI"[j] for j in row] for row in order]
    assert titles == ["b", "d", *letters[0][:2], *letters[1][:2], *letters[0][:-3:-1], *letters[1][:-3:-1]]
    figure.savefig(tmp_path / "a.png")
    label_errors(rng.random(50), rng.random(50) < 0.2).savefig(tmp_path / "b.png")
    assert all((tmp_path / name).stat().st_size > 1000 for name in ("a.png", "b.png"))

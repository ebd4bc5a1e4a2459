"""The history of a run says what its receipts say, and the pictures show it."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import xarray as xr
from dask.utils import format_bytes
from matplotlib.collections import LineCollection, PolyCollection
from matplotlib.colors import to_hex

from cases import make_case
from outfluence import DirectInfluence, SequentialInfluenceCalculator, Store
from outfluence.analysis import open_history
from outfluence.errors import DataError, StoreError
from outfluence.plan import Work, make_plan
from outfluence.plotting import memory, timeline

MIB = 1 << 20
DAY = "2026-03-04"
PLAN = make_plan(
    Work(n_test=4, n_train=30, arrays={"values": 50}, itemsize=4, n_parameters=50),
    512 * MIB,
    test_chunk=2,
    train_chunk=10,
)
#: stage, task, samples, end, seconds, peak, worker, and what else: not in the order in which they began.
ROWS = [
    ("factors", 0, (0, 2), "10:00:04.000", 4.0, 100 * MIB, "a:1", {}),
    ("factors", 1, (2, 4), "10:00:03.500", 2.5, 110 * MIB, "b:2", {}),
    ("scores", 0, (0, 10), "10:00:20.000", 9.0, 150 * MIB, "b:2", {"bytes_read": 7, "projected_bytes": 200 * MIB}),
    ("scores", 2, (20, 30), "10:00:10.000", 5.0, 140 * MIB, "a:1", {"started": f"{DAY}T11:00:05.250+01:00"}),
]


@pytest.fixture
def store(tmp_path):
    tasks = {stage.name: stage.n_tasks for stage in PLAN.stages}
    store = Store.create(tmp_path / "a.zarr", [], {}, {"identity": {}, "plan": PLAN.to_json(), "tasks": tasks})
    for stage, task, (start, stop), finished, seconds, peak, worker, more in ROWS:
        receipt = {
            "task": task,
            "start": start,
            "stop": stop,
            "finished": f"{DAY}T{finished}+00:00",
            "seconds": seconds,
            "bytes_written": 100 * task + 1,
            "peak_bytes": peak,
            "worker": worker,
        }
        store.leave_receipt(stage, task, receipt | more)
    return store


def run(workers=2, tasks=24, limit=600 * MIB, seconds=3.0):
    """A history as a cluster would leave it."""
    number = np.arange(tasks)
    row, turn = number % workers, number // workers
    started = np.datetime64(f"{DAY}T10:00:00", "ns") + (turn * seconds * 1e9).astype("m8[ns]")
    columns = {
        "stage": np.where(turn < 2, "factors", "scores"),
        "started": started,
        "seconds": np.full(tasks, 0.9 * seconds),
        "peak_bytes": (300 + number % 7) * MIB,
        "worker": np.array([f"node:{i:03d}" for i in row]),
    }
    projected = {"factors": 350 * MIB, "scores": 400 * MIB}
    return xr.Dataset(
        {name: ("task", column) for name, column in columns.items()},
        attrs={"memory_limit": limit, "projected": projected},
    )


def test_history_is_what_the_receipts_say_in_order_of_start(store):
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # numpy warns of times with a zone
        history = open_history(store.path)
    assert history["stage"].values.tolist() == ["factors", "factors", "scores", "scores"]
    assert history["number"].values.tolist() == [0, 1, 2, 0]
    assert history["worker"].values.tolist() == ["a:1", "b:2", "a:1", "b:2"]
    assert history["n_samples"].values.tolist() == [2, 2, 10, 10]
    assert history["seconds"].values.tolist() == [4, 2.5, 5, 9]
    assert history["bytes_written"].values.tolist() == [1, 101, 201, 1]
    assert history["bytes_read"].values.tolist() == [0, 0, 0, 7]
    assert history["peak_bytes"].values.tolist() == [n * MIB for n in (100, 110, 140, 150)]
    assert np.array_equal(history["projected_bytes"], [np.nan, np.nan, np.nan, 200 * MIB], equal_nan=True)
    times = ["10:00:00", "10:00:01", "10:00:05.250", "10:00:11"]  # the third as its receipt says
    assert history["started"].dtype == history["finished"].dtype == np.dtype("M8[ns]")
    assert np.array_equal(history["started"], np.array([f"{DAY}T{time}" for time in times], "M8[ns]"))
    assert history["finished"].values[1] == np.datetime64(f"{DAY}T10:00:03.5")
    assert history.attrs["memory_limit"] == 512 * MIB
    assert history.attrs["projected"] == {name: sum(PLAN.memory(name).values()) for name in ("factors", "scores")}


def test_history_of_a_run(tmp_path):
    case = make_case("mlp")
    calculator = SequentialInfluenceCalculator(DirectInfluence(case.model, case.loss, 0.05).fit(case.train))
    lazy = calculator.influences(case.test, case.train, test_chunk=3, train_chunk=10)
    lazy.to_zarr(tmp_path / "a.zarr")
    history = open_history(tmp_path / "a.zarr")
    assert history.sizes == {"task": 6}
    assert history["stage"].values.tolist() == ["factors"] * 3 + ["scores"] * 3
    assert history["n_samples"].values.tolist() == [3, 3, 1, 10, 10, 4]
    assert int(history["bytes_written"].sum()) == lazy.plan.bytes_written
    assert len(np.unique(history["worker"])) == 1
    # Tasks of one process come one after another, up to the milliseconds of their receipts.
    gaps = history["started"].values[1:] - history["finished"].values[:-1]
    assert (gaps > np.timedelta64(-5, "ms")).all()
    took = (history["finished"] - history["started"]).values / np.timedelta64(1, "s")
    assert np.abs(took - history["seconds"]).max() < 0.05
    assert history.attrs["projected"]["scores"] == sum(lazy.plan.memory("scores").values())
    for draw in (timeline, memory):
        draw(history).savefig(tmp_path / "a.png")


def test_history_of_a_run_that_has_done_nothing_yet(store, tmp_path):
    for file in (store.path / "receipts").iterdir():
        file.unlink()
    history = open_history(store.path)
    assert history.sizes == {"task": 0}
    assert history["started"].dtype == np.dtype("M8[ns]")
    for draw in (timeline, memory):
        with pytest.raises(DataError, match="no task of this run is finished yet"):
            draw(history)
    with pytest.raises(StoreError, match="is no store"):
        open_history(tmp_path)


def boxes(axis):
    """By the label of each collection: left, right and row of its bars, in order."""
    found = {}
    for bars in axis.collections:
        assert isinstance(bars, PolyCollection)
        corners = [path.vertices for path in bars.get_paths()]
        found[bars.get_label()] = [
            (c[:, 0].min(), c[:, 0].max(), round((c[:, 1].min() + c[:, 1].max()) / 2, 6)) for c in corners
        ]
    return found


def test_timeline_has_a_bar_for_each_task_where_it_was(store):
    figure = timeline(open_history(store.path))
    (axis,) = figure.get_axes()
    bars = boxes(axis)
    assert np.allclose(bars["factors"], [(0, 4, 0), (1, 3.5, 1)])
    assert np.allclose(bars["scores"], [(5.25, 10.25, 0), (11, 20, 1)])
    assert [label.get_text() for label in axis.get_yticklabels()] == ["a:1", "b:2"]
    assert axis.get_xlim() == (0, 20)
    assert axis.get_ylim()[0] > 1.4  # the first worker above, all bars within
    assert axis.get_ylim()[1] < -0.4
    assert len({to_hex(collection.get_facecolor()[0]) for collection in axis.collections}) == 2
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["factors", "scores"]
    assert axis.get_title() == "4 tasks by 2 workers in 20 seconds, busy 51% of the time"  # 20.5 of 40


@pytest.mark.parametrize(
    ("seconds", "unit", "span"), [(10, "seconds", 119), (100, "minutes", 1190 / 60), (5000, "hours", 59500 / 3600)]
)
def test_timeline_in_a_unit_that_suits_it(seconds, unit, span):
    (axis,) = timeline(run(seconds=seconds)).get_axes()
    assert unit in axis.get_xlabel()
    assert np.isclose(axis.get_xlim()[1], span)


def test_timeline_of_many_workers_and_tasks(tmp_path):
    figure = timeline(run(workers=50, tasks=100_000))
    (axis,) = figure.get_axes()
    assert {name: len(bars) for name, bars in boxes(axis).items()} == {"factors": 100, "scores": 99_900}
    assert len(axis.get_yticks()) == 50
    assert len(axis.get_children()) < 20  # a collection a stage, not an artist a task
    assert figure.get_size_inches()[1] < 12
    figure.savefig(tmp_path / "a.png")


def heights(axis):
    """By label the heights of the lines across, and the dashes of tasks: left, right, height."""
    dashes = {c.get_label(): np.array([(*s[:, 0], s[0, 1]) for s in c.get_segments()]) for c in axis.collections}
    assert all(isinstance(c, LineCollection) for c in axis.collections)
    (limit,) = axis.get_lines()
    return dashes | {limit.get_label(): limit.get_ydata()[0]}


def test_memory_shows_measured_projected_and_limit(store):
    history = open_history(store.path)
    (axis,) = memory(history).get_axes()
    drawn = heights(axis)
    assert np.allclose(drawn["factors"], [(0, 4, 100), (1, 3.5, 110)])
    assert np.allclose(drawn["scores"], [(5.25, 10.25, 140), (11, 20, 150)])
    projected = {name: size / MIB for name, size in history.attrs["projected"].items()}
    assert np.allclose(drawn["factors, projected"], [(0, 4, projected["factors"])])
    assert np.allclose(drawn["scores, projected"], [(5.25, 20, projected["scores"])])
    assert drawn["limit"] == 512
    assert axis.get_ylim()[1] > 512
    assert "(MiB)" in axis.get_ylabel()
    largest = format_bytes(max(history.attrs["projected"].values()))
    assert axis.get_title() == f"largest peak: measured 150.00 MiB, projected {largest}, limit 512.00 MiB"


def test_memory_in_gibibytes():
    (axis,) = memory(
        run().assign(peak_bytes=("task", np.full(24, 3 << 30))).assign_attrs(memory_limit=4 << 30)
    ).get_axes()
    drawn = heights(axis)
    assert (drawn["limit"], drawn["scores"][0, 2], drawn["scores, projected"][0, 2]) == (4, 3, 400 / 1024)
    assert "(GiB)" in axis.get_ylabel()


def test_memory_names_a_limit_that_is_far_above():
    (axis,) = memory(run(limit=64 << 30)).get_axes()
    assert axis.get_ylim()[1] == 500  # a quarter above the projected peak
    assert [text.get_text() for text in axis.texts] == ["limit 64.00 GiB ↑"]
    (axis,) = memory(run()).get_axes()
    assert not axis.texts


def test_memory_above_the_limit_is_in_the_picture():
    (axis,) = memory(run(limit=200 * MIB)).get_axes()
    assert axis.get_ylim()[1] > 400

"""Stores appear whole, know what made them, and hand back exactly what was written."""

from __future__ import annotations

import json
import os
import warnings

import numpy as np
import pytest
import xarray as xr
import zarr

from outfluence import Store, open_influences
from outfluence.errors import StoreError, StoreMismatchError
from outfluence.store import ArraySpec

IDENTITY = {"method": "DirectInfluence", "options": {"seed": 0}, "weights": "abc"}


def create(path, tasks=None):
    about = {"identity": IDENTITY, "plan": {}, "tasks": tasks or {"scores": 2}}
    spec = ArraySpec("scores", (5, 7), (2, 4), "float32", ("test", "train"), {"long_name": "scores"})
    factors = ArraySpec("factors/values", (5, 3), (2, 3), "float32", ("test", "parameter"), {})
    return Store.create(path, [spec, factors], {"test": np.arange(5), "train": np.arange(7)}, about)


@pytest.fixture
def store(tmp_path):
    return create(tmp_path / "a.zarr")


def test_plain_xarray_and_zarr_read_it(store):
    block = np.arange(8, dtype="f4").reshape(2, 4)
    store.write("scores", (slice(0, 2), slice(0, 4)), block)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dataset = xr.open_zarr(store.path)
        tree = xr.open_datatree(store.path, engine="zarr")
    assert dataset["scores"].dims == ("test", "train")
    assert dataset["scores"].dtype == np.float32
    assert np.array_equal(dataset["train"], np.arange(7))
    assert np.array_equal(dataset["scores"][:2, :4], block)
    assert np.isnan(dataset["scores"][2:]).all()
    assert tree["factors/values"].shape == (5, 3)
    assert dataset.attrs["outfluence"]["identity"] == IDENTITY
    assert np.array_equal(zarr.open_array(store.path / "scores", mode="r")[:2, :4], block)


def test_an_unfinished_store_says_so_when_it_is_opened(store):
    with pytest.warns(UserWarning, match=r"not finished \(0 of 2 tasks of 'scores' are done\): what is missing is NaN"):
        open_influences(store.path)
    for task in range(2):
        store.leave_receipt("scores", task, {})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert set(open_influences(store.path).data_vars) == {"scores", "factors"}


def test_receipts(store):
    assert store.done("scores") == set()
    store.leave_receipt("scores", 1, {"seconds": 2})
    assert store.done("scores") == {1}
    assert store.receipts("scores") == [{"seconds": 2}]
    assert [store.receipt("scores", task) for task in range(2)] == [None, {"seconds": 2}]
    assert store.progress() == {"scores": (1, 2)}
    assert not store.is_complete
    assert "scores 1 of 2" in repr(store)
    (store.path / "receipts" / ".scores-00000000.json.abc").write_text("{")  # killed while writing
    assert store.done("scores") == {1}


@pytest.mark.parametrize(
    ("identity", "message"),
    [
        ({**IDENTITY, "weights": "abd"}, r"these differ: weights \(stored: abc, now: abd\)"),
        ({**IDENTITY, "options": {"seed": 1}}, r"options\.seed \(stored: 0, now: 1\)"),
        ({k: v for k, v in IDENTITY.items() if k != "method"}, r"method \(stored: DirectInfluence, now: nothing\)"),
    ],
)
def test_only_the_same_job_goes_on(store, identity, message):
    store.require(IDENTITY)
    with pytest.raises(StoreMismatchError, match=message) as error:
        store.require(identity)
    assert "overwrite=True" in str(error.value)


def test_what_is_not_ours_is_left_alone(tmp_path):
    assert Store.find(tmp_path / "free.zarr") is None
    (tmp_path / "empty").mkdir()
    assert Store.find(tmp_path / "empty") is None
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("mine")
    zarr.create_group(str(tmp_path / "other.zarr"))
    zarr.create_array(str(tmp_path / "array.zarr"), shape=(3,), dtype="f4")
    (tmp_path / "file").write_text("mine")
    for name in ("notes", "other.zarr", "array.zarr", "file"):
        with pytest.raises(StoreMismatchError, match="is no store of outfluence, but something is there"):
            Store.find(tmp_path / name)
    assert (tmp_path / "notes" / "a.txt").exists()
    with pytest.raises(StoreError, match="is no store of outfluence"):
        open_influences(tmp_path / "free.zarr")


def test_a_path_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(StoreError, match=r"cannot write a store at .*Choose a path that you may write to"):
        create(tmp_path / "file" / "a.zarr")


def test_a_newer_format_is_refused(store):
    meta = json.loads((store.path / "zarr.json").read_text())
    meta["attributes"]["outfluence"]["format_version"] = 99
    (store.path / "zarr.json").write_text(json.dumps(meta))
    with pytest.raises(StoreError, match="has format 99, this version of outfluence reads up to 1: upgrade"):
        Store.find(store.path)


def test_a_store_appears_whole_or_not_at_all(tmp_path, monkeypatch):
    def full(*_args, **_options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(zarr, "consolidate_metadata", full)
    with pytest.raises(StoreError, match="No space left on device"):
        create(tmp_path / "a.zarr")
    assert os.listdir(tmp_path) == []


def test_only_whole_chunks_are_written(store):
    with pytest.raises(StoreError, match="is not made of whole chunks"):
        store.write("scores", (slice(0, 1), slice(0, 4)), np.zeros((1, 4), "f4"))
    with pytest.raises(StoreError, match="scores holds float32, not float64"):
        store.write("scores", (slice(0, 2), slice(0, 4)), np.zeros((2, 4)))
    store.write("scores", (slice(4, 5), slice(4, 7)), np.zeros((1, 3), "f4"))  # the last ones are smaller


def test_a_disk_that_forgets_is_noticed(store, monkeypatch):
    original = zarr.Array.__getitem__
    monkeypatch.setattr(zarr.Array, "__getitem__", lambda self, key: original(self, key) + 1)
    with pytest.raises(StoreError, match="reads back differently"):
        store.write("scores", (slice(0, 2), slice(0, 4)), np.ones((2, 4), "f4"))


def test_a_flipped_bit_is_not_read_in_silence(store):
    store.write("scores", (slice(0, 2), slice(0, 4)), np.ones((2, 4), "f4"))
    chunk = store.path / "scores" / "c" / "0" / "0"
    content = bytearray(chunk.read_bytes())
    content[5] ^= 1
    chunk.write_bytes(content)
    with pytest.raises(ValueError, match="checksum do not match"):
        store.read("scores", (slice(0, 2), slice(0, 4)))


def test_all_zero_and_nothing_are_different(store):
    store.write("scores", (slice(0, 2), slice(0, 4)), np.zeros((2, 4), "f4"))
    assert (store.path / "scores" / "c" / "0" / "0").exists()
    assert np.array_equal(store.read("scores", (slice(0, 2), slice(0, 4))), np.zeros((2, 4)))


def test_inputs_are_kept_for_the_run_and_forgotten_after(store):
    array = store.put_input("abc", "x0", 5, iter([np.ones((3, 2)), np.zeros((2, 2))]))
    assert np.array_equal(array[2:4], [[1, 1], [0, 0]])
    again = store.put_input("abc", "x0", 5, iter([np.full((5, 2), 7.0)]))  # never written again
    assert np.array_equal(again[:], array[:])
    assert store.put_file("recipe.pkl", b"recipe") == store.work_file("recipe.pkl")
    assert store.work_file("recipe.pkl").read_bytes() == b"recipe"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        xr.open_zarr(store.path)  # not disturbed by what lies beside the arrays
    store.drop_work()
    assert sorted(p.name for p in store.path.iterdir()) == ["factors", "scores", "test", "train", "zarr.json"]


def test_another_store_at_the_path_is_not_written_into(store):
    """A task of a killed run must not write into the store that has replaced its own."""
    aside = store.move_aside()
    assert sorted(os.listdir(aside.parent)) == [aside.name]
    create(store.path)
    for action in (
        lambda: store.write("scores", (slice(0, 2), slice(0, 4)), np.zeros((2, 4), "f4")),
        lambda: store.leave_receipt("scores", 0, {}),
        lambda: Store.reopened(store.path, store.id),
    ):
        with pytest.raises(StoreError, match="has been replaced by another store"):
            action()
    assert Store(store.path).done("scores") == set()


def test_two_processes_that_start_at_once_share_one_store(store):
    assert create(store.path).id == store.id


@pytest.mark.parametrize("kind", ["float32", "float64", "int64", "int32"])
def test_a_lost_chunk_of_an_input_is_not_taken_for_data(tmp_path, kind):
    store = Store.create(tmp_path / "a.zarr", [], {}, {"identity": {}, "tasks": {}})
    array = store.put_input("content", "x0", 6, iter([np.zeros((3, 2), kind), np.ones((3, 2), kind)]))
    assert np.array_equal(array[:], np.repeat([0, 1], 3)[:, None].repeat(2, 1).astype(kind))
    (store.work_file("content") / "x0" / "c" / "0" / "0").unlink()
    lost = array[:3]
    assert np.isnan(lost).all() if kind.startswith("f") else (lost == np.iinfo(kind).min).all()
    assert np.array_equal(store.put_input("content", "x0", 6, iter([np.zeros((6, 2), kind)]))[:], np.zeros((6, 2)))
